"""The operators: registration, strides, autograd, errors, compilation, caches across processes, cost of a call."""

import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad

import attnfuse
from attnfuse import ops
from attnfuse.ops import ABI, attention
from attnfuse.reference import attention as reference
from attnfuse.score import ScoreSyntaxError
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import dropout
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.dense import Dense
from tests.families import Call, scales_of
from tests.numerics import assert_close

OP = torch.ops.attnfuse.attention.default
BACKWARD = torch.ops.attnfuse.attention_backward.default
CAUSAL = "s*0.25 where n <= m else +min"
PADDED = "pad: bool[:, :]; s*0.25 where n <= m & pad[b, n] else +min"
SLOPED = "slope: f32[:]; s*0.25 + slope[h]*n where n <= m + i0 else -inf"
DROPPED = "dropout 0.25; s*0.25 where n <= m else -inf"


def operands(grad: bool = True, dtype: torch.dtype = torch.float32, length: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        x = torch.randn(2, length, heads, 16, generator=generator).to(dtype)
        return x.transpose(1, 2).detach().requires_grad_(grad)

    return normal(4), normal(2), normal(2)


def pad(length: int = 20) -> Tensor:
    return torch.arange(length) >= torch.tensor([[5], [0]])


def call(
    text: str, *, grad: bool = True, sizes: tuple[int, ...] = (), leaves: tuple[Tensor, ...] = ()
) -> tuple[Any, ...]:
    """Arguments of the operator."""
    seed = torch.tensor([7]) if "dropout" in text else None
    return (*operands(grad), list(leaves), list(sizes), [], seed, text, [0, 2, 1, 3], ABI)


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "causal": lambda: call(CAUSAL),
    "without gradients": lambda: call(CAUSAL, grad=False),
    "padded": lambda: call(PADDED, leaves=(pad(),)),
    "float leaf and size": lambda: call(SLOPED, sizes=(3,), leaves=(torch.rand(4, requires_grad=True),)),
    "dropout": lambda: call(DROPPED),
}


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_opcheck(make: Callable[[], tuple[Any, ...]]) -> None:
    torch.library.opcheck(OP, make())


@pytest.mark.parametrize("name", ["causal", "padded", "dropout"])
def test_opcheck_of_the_backward(name: str) -> None:
    q, k, v, leaves, sizes, tiles, seed, text, order, abi = CALLS[name]()
    with torch.no_grad():
        out, lse = OP(q, k, v, leaves, sizes, tiles, seed, text, order, abi)
    needs = [True, True, True, *(False for _ in leaves)]
    q, k, v = (x.detach() for x in (q, k, v))
    given = (torch.randn_like(out), None, q, k, v, leaves, sizes, tiles, out, lse, seed, text, needs, order, abi)
    torch.library.opcheck(BACKWARD, given)


def test_schemas() -> None:
    assert str(OP._schema) == "attnfuse::" + ops.FORWARD_SCHEMA
    assert str(BACKWARD._schema) == "attnfuse::" + ops.BACKWARD_SCHEMA


# What a graph in a cache relies on.  If this fails, raise ABI in attnfuse/ops.py and write the new pair here.
ABI_AND_DIGEST = (2, "614ff83f73a78586")


def test_abi_rises_with_schema_fakes_strides_and_autograd() -> None:
    parts = [ops.FORWARD_SCHEMA, ops.BACKWARD_SCHEMA, ops.TILE_MAP_SCHEMA]
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    fakes = ops._forward_fake, ops._backward_fake, ops._tile_map_fake
    for function in (*fakes, ops._Attention, ops._Once, ops._forward_autograd):
        tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline)
        words = " ".join(token.string for token in tokens if token.type not in layout)
        parts.append(words.replace(", )", " )"))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    assert (ABI, digest) == ABI_AND_DIGEST


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [2, 0, 1, 3]])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fake_strides_are_the_real_ones(order: list[int], dynamic: bool) -> None:
    q, k, v, leaves, sizes, tiles, seed, text, _, abi = CALLS["padded"]()
    out, lse = OP(q, k, v, leaves, sizes, tiles, seed, text, order, abi)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    seen: list[tuple[int, ...]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return gm

    compiled = torch.compile(
        lambda q, k, v, mask: OP(q, k, v, [mask], sizes, tiles, seed, text, order, abi),
        backend=backend,
        dynamic=dynamic,
    )
    out2, lse2 = compiled(q, k, v, leaves[0])
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [mode.from_tensor(x) for x in (q, k, v)]
        out3, lse3 = OP(*faked, [mode.from_tensor(leaves[0])], sizes, tiles, seed, text, order, abi)
        grads3 = torch.autograd.grad(out3.sum(), faked)
    seen = [x.stride() for x in (out3, lse3, *grads3)]
    assert [x.stride() for x in (out, lse, *grads)] == seen
    assert [x.stride() for x in (out2, lse2)] == seen[:2]


# --- autograd --------------------------------------------------------------------------------------------------------


def test_only_the_wanted_gradients_are_computed() -> None:
    for wanted in range(3):
        q, k, v = operands(grad=False)
        x = (q, k, v)[wanted].requires_grad_()
        out, _ = OP(q, k, v, [], [], [], None, CAUSAL, [0, 2, 1, 3], ABI)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        exact, _ = reference(parse_spec(CAUSAL), q, k, v, ())
        (expected,) = torch.autograd.grad(exact.square().sum(), x)
        torch.testing.assert_close(grad, expected)


def test_gradient_of_a_leaf_alone() -> None:
    q, k, v = operands(grad=False)
    slope = torch.linspace(0.1, 0.9, 4, requires_grad=True)
    spec = parse_spec(SLOPED)
    out, _ = OP(q, k, v, [slope], [3], [], None, SLOPED, [0, 2, 1, 3], ABI)
    original, exact = (
        reference(spec, q, k, v, (slope,), (3,), dtype=kind)[0] for kind in (torch.float32, torch.float64)
    )
    dout = torch.ones_like(out)
    found, expected, by_oracle = (
        torch.autograd.grad(x, slope, dout.to(x.dtype), retain_graph=True)[0] for x in (out, original, exact)
    )
    scales = scales_of(Call(spec, q, k, v, (slope,), (3,)), dout, None, None)
    assert_close(found, expected, by_oracle.double(), scales["slope"])


def test_gradient_of_lse_alone() -> None:
    q, k, v = operands()
    _, lse = OP(q, k, v, [], [], [], None, CAUSAL, [0, 2, 1, 3], ABI)
    _, exact = reference(parse_spec(CAUSAL), q, k, v, ())
    found = torch.autograd.grad(lse.sum(), (q, k, v), materialize_grads=True)
    expected = torch.autograd.grad(exact.sum(), (q, k), materialize_grads=True)
    torch.testing.assert_close(found[:2], expected)
    assert not found[2].any()


def test_gradcheck() -> None:
    q, k, v = (x[:, :, :5, :3].detach().double().requires_grad_() for x in operands())
    slope = torch.rand(4, dtype=torch.float64, requires_grad=True)
    text = "slope: f64[:]; 3*tanh(s*0.25/3) + slope[h]*n where n <= m else -inf"
    assert torch.autograd.gradcheck(
        lambda *x: OP(*x[:3], [x[3]], [], [], None, text, [0, 1, 2, 3], ABI), (q, k, v, slope)
    )


def refused(run: Callable[[], object], what: str) -> None:
    with pytest.raises(NotImplementedError, match=f"attnfuse::attention does not support {what}.*plain PyTorch"):
        run()


def test_what_is_not_supported_is_refused() -> None:
    q, k, v = operands()
    plain = [x.detach() for x in (q, k, v)]
    (first,) = torch.autograd.grad(attention(q, k, v, "s").square().sum(), q, create_graph=True)
    refused(lambda: torch.autograd.grad(first.sum(), q), "differentiating a second time")
    stacked = torch.stack((plain[0], plain[0]))
    refused(lambda: torch.func.vmap(lambda x: attention(x, *plain[1:], "s"))(stacked), "vmap")
    refused(lambda: torch.func.jvp(lambda x: attention(x, *plain[1:], "s"), (plain[0],), (plain[0],)), "forward-mode")
    refused(lambda: torch.func.grad(lambda x: attention(x, *plain[1:], "s").sum())(plain[0]), "torch.func")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain[0], plain[0])
        refused(lambda: attention(dual, *plain[1:], "s"), "forward-mode")
        refused(lambda: attention(dual, k, v, "s"), "forward-mode")
        attention(*plain, "s")


def test_checkpointing_recomputes_the_same_dropout() -> None:
    q, k, v = operands()
    seed = torch.tensor([11])

    def run(q: Tensor) -> Tensor:
        return attention(q, k, v, "s where n <= m else -inf", dropout=0.5, seed=seed)

    expected = torch.autograd.grad(run(q).square().sum(), q)
    out = torch.utils.checkpoint.checkpoint(run, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], expected[0])


def test_no_autocast_rule() -> None:
    q, k, v = operands(grad=False)
    bias = torch.full((20, 20), torch.finfo(torch.float32).min)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, "s + bias[m, n]", bias=bias)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_inference_mode_and_conjugate_views() -> None:
    q, k, v = operands(grad=False)
    expected = attention(q, k, v, "s")
    with torch.inference_mode():
        assert torch.equal(attention(q, k, v, "s"), expected)
    negative = torch._neg_view(-q)
    assert negative.is_neg()
    torch.testing.assert_close(attention(negative, k, v, "s"), expected)


# --- operands --------------------------------------------------------------------------------------------------------


def with_shape(at: int, *size: int) -> Callable[[], object]:
    x = list(operands(grad=False))
    x[at] = torch.zeros(size)
    return lambda: attention(*x, "s")  # type: ignore[arg-type]


def with_dtype(at: int, dtype: torch.dtype) -> Callable[[], object]:
    x = list(operands(grad=False))
    x[at] = x[at].to(dtype)
    return lambda: attention(*x, "s")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (with_shape(0, 4, 20, 16), r"q has 3 dimensions, \[4, 20, 16\]: attention takes 4"),
        (with_shape(0, 1, 4, 20, 16), "batches of q and k differ, 1 and 2: q .1, 4, 20, 16.*expand or slice"),
        (with_shape(2, 1, 2, 20, 16), "batches of k and v differ, 2 and 1"),
        (with_shape(2, 2, 4, 20, 16), "heads of k and v differ, 2 and 4"),
        (with_shape(2, 2, 2, 19, 16), "lengths of k and v differ, 20 and 19"),
        (with_shape(0, 2, 4, 20, 8), "depths of q and k differ, 8 and 16"),
        (with_shape(0, 2, 3, 20, 16), "3 query heads over 2 key heads: the first must be a multiple of the second"),
        (
            with_dtype(0, torch.int32),
            "q is torch.int32: attention takes float16, bfloat16, float32 or float64; cast it",
        ),
        (with_dtype(2, torch.bool), "v is torch.bool"),
        (with_dtype(1, torch.float16), "q is torch.float32 and k torch.float16: attention takes one type for both"),
    ],
)
def test_operands_that_do_not_fit(run: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"abi": ABI + 1}, f"called with abi {ABI + 1}, this version has abi {ABI}.*compile it again"),
        ({"out_order": [0, 1, 2, 2]}, r"out_order \[0, 1, 2, 2\]: expected the axes"),
        ({"leaves": []}, "0 leaves given, the score declares 1"),
        ({"leaves": [torch.zeros(2, 20)]}, r"leaf pad is a torch.float32 tensor of 2 dimensions.*pad: bool\[:, :\]"),
        ({"leaves": [torch.ones(20).bool()]}, "leaf pad is a torch.bool tensor of 1 dimensions.*cast or reshape"),
        ({"spec": SLOPED, "leaves": [torch.zeros(4)]}, "0 sizes given, the score uses 1"),
        (
            {"tiles": [torch.zeros(1, 1, 1, 3, dtype=torch.int32)]},
            r"tiles have the shapes \(\(1, 1, 1, 3\),\); a tile map of",
        ),
        ({"spec": DROPPED, "leaves": []}, "dropout 0.25 needs a seed, one int64 element.*or dropout 0"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("q", "k", "v", "leaves", "sizes", "tiles", "seed", "spec", "out_order", "abi")
    given = dict(zip(names, call(PADDED, leaves=(pad(),)), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        OP(*given.values())


# --- the public function ---------------------------------------------------------------------------------------------


def test_attention_is_public() -> None:
    assert attnfuse.attention is attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_leaves_of_every_type(dtype: torch.dtype) -> None:
    q, k, v = operands(grad=False, dtype=dtype)
    text = "s*0.25 + slope[h]*n + table[kind[n]] where n <= m & pad[b, n] & doc[n] == doc[m] else -inf"
    leaves = {
        "slope": torch.linspace(0.1, 0.9, 4),
        "table": torch.linspace(-0.7, 0.8, 3, dtype=torch.float64),
        "kind": torch.arange(20, dtype=torch.uint8) % 3,
        "pad": torch.arange(20).expand(2, 20) >= 0,
        "doc": torch.arange(20, dtype=torch.int16) // 5,
    }
    out = attention(q, k, v, text, **leaves)
    declared = "slope: f32[:]; table: f64[:]; kind: u8[:]; pad: bool[:, :]; doc: i16[:]; "
    exact, original = (
        reference(parse_spec(declared + text), q, k, v, list(leaves.values()), dtype=kind)[0]
        for kind in (torch.float64, dtype)
    )
    assert_close(out, original, exact)


def test_attention_refuses_leaves_that_are_not_used_and_scores_that_are_no_text() -> None:
    q, k, v = operands(grad=False)
    with pytest.raises(
        ValueError, match=r"nothing is loaded from bias; leave it out, or load from it as in bias\[b, n\]"
    ):
        attention(q, k, v, "s", bias=torch.zeros(2, 20))
    with pytest.raises(ValueError, match="the score is None of type NoneType"):
        attention(q, k, v, None)  # type: ignore[arg-type]


def test_a_float_leaf_of_the_padding_has_a_gradient_of_zero() -> None:
    q, k, v = operands()
    keep = torch.ones(2, 20, requires_grad=True)
    attention(q, k, v, "s*0.25 where keep[b, n] > 0.0 else -inf", keep=keep).sum().backward()
    assert keep.grad is not None
    assert not keep.grad.any()
    assert q.grad is not None


def test_attention_keeps_the_memory_order_of_q() -> None:
    q, k, v = operands(grad=False)
    assert attention(q, k, v, "s").transpose(1, 2).is_contiguous()
    assert attention(q.contiguous(), k, v, "s").is_contiguous()


def test_attention_draws_its_seed_from_torch() -> None:
    q, k, v = operands(grad=False)

    def draw() -> Tensor:
        return attention(q, k, v, "s", dropout=0.5)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


def test_operands_on_different_devices() -> None:
    q, k, v = operands(grad=False)
    with pytest.raises(ValueError, match="q is on cpu and v on meta: move one"):
        attention(q, k, v.to("meta"), "s")
    with pytest.raises(ValueError, match="q is on cpu and leaf pad on meta: move one"):
        attention(q, k, v, "s where pad[b, n] else -inf", pad=pad().to("meta"))


def test_errors_of_attention() -> None:
    q, k, v = operands(grad=False)
    with pytest.raises(ScoreSyntaxError, match="unknown name 'else'") as error:
        attention(q, k, v, "s where n <= else -inf")
    assert error.value.position == "s where n <= else -inf".index("else")
    with pytest.raises(ScoreSyntaxError, match="leaves and dropout are arguments") as error:
        attention(q, k, v, "dropout 0.1; s")
    assert error.value.position == len("dropout 0.1")
    with pytest.raises(ValueError, match=r"loads from 'pad', which is not declared \(leaves: mask\)"):
        attention(q, k, v, "s where pad[b, n] else -inf", mask=pad())
    with pytest.raises(ValueError, match=r"pad\[b, n\] has 2 indices, leaf pad: bool\[:\] takes 1"):
        attention(q, k, v, "s where pad[b, n] else -inf", pad=pad()[0])
    with pytest.raises(ValueError, match="i0 … are entries of the operator's sizes; write the number"):
        attention(q, k, v, "s where n <= i0 else -inf")
    with pytest.raises(ValueError, match=r"leaf z is torch.complex64: the score language takes torch.bool"):
        attention(q, k, v, "s", z=torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"dropout 1.0: expected a probability in \[0, 1\)"):
        attention(q, k, v, "s", dropout=1.0)


# --- the last resort -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS.keys())
def test_dense_gives_what_the_operator_gives(name: str) -> None:
    q, k, v, leaves, sizes, _, seed, text, order, _ = CALLS[name]()
    q, k, v, *leaves = (x.detach().double() if x.is_floating_point() else x for x in (q, k, v, *leaves))
    spec = parse_spec(text)
    inputs = Inputs(spec, text, Shape(2, 4, 2, 20, 20, 16, 16), q, k, v, leaves, tuple(sizes), seed, tuple(order))
    kernel, same = ops._prepared(False, *CALLS[name]())
    assert same.spec == spec
    results = [template.forward(inputs) for template in (Dense(), kernel)]
    dout, dlse = torch.randn_like(results[0][0]), torch.randn_like(results[0][1])
    needs = (True, True, True, *(x.is_floating_point() for x in leaves))
    for template, result in zip((Dense(), kernel), tuple(results), strict=True):
        grads = template.backward(inputs, Cotangents(*result, dout, dlse, needs))
        results.append((*result, *grads))
    torch.testing.assert_close(results[2], results[3])
    assert [x.stride() for x in results[2]] == [x.stride() for x in results[3]]


def test_a_device_without_templates_is_served_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ops._kind(*call(CAUSAL))
    kernel, _, _ = ops._kernel(kind, "xpu", False)
    assert isinstance(kernel, Dense)
    keep = dropout.keep(torch.tensor([7]), 0.25, (2, 4, 20, 20))
    exact, original = (
        reference(parse_spec(DROPPED), *operands(), (), (), keep, kind_)[0] for kind_ in (torch.float64, torch.float32)
    )
    monkeypatch.setattr(
        ops, "_kernel", lambda kind, device, training: (Dense(), *ops_kernel(kind, device, training)[1:])
    )
    assert_close(OP(*call(DROPPED))[0], original, exact)


@pytest.mark.parametrize("text", [CAUSAL, "5*tanh(s/5) where n <= m else -inf"])
def test_autocast_does_not_reach_into_kernels(text: str) -> None:
    q, k, v = (x.detach().requires_grad_() for x in operands())
    expected = OP(q, k, v, [], [], [], None, text, [0, 1, 2, 3], ABI)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = OP(q, k, v, [], [], [], None, text, [0, 1, 2, 3], ABI)[0]
        grads = torch.autograd.grad(found.sum(), (q, k, v))
    assert torch.equal(found, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), (q, k, v))))


def test_the_dense_template_is_differentiable_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *more = call(CAUSAL)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    expected = torch.autograd.grad(OP(q, k, v, *more)[0].square().sum(), (q, k, v))
    monkeypatch.setattr(
        ops, "_kernel", lambda kind, device, training: (Dense(), *ops_kernel(kind, device, training)[1:])
    )
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = torch.autograd.grad(OP(q, k, v, *more)[0].square().sum(), (q, k, v))
        torch.testing.assert_close(found, expected)


ops_kernel = ops._kernel


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_compiles_once_for_all_sizes(training: bool) -> None:
    compiles = 0

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.backends.debugging.aot_eager(gm, example_inputs)

    def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        text = "pad: bool[:, :]; s*0.25 where n <= m + i0 & pad[b, n] else +min"
        out, _ = OP(q, k, v, [pad], [q.shape[2] // 4], [], None, text, [0, 2, 1, 3], ABI)
        return out * 2

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, dynamic=True, fullgraph=True)
    for length in (20, 28, 33):
        q, k, v = operands(grad=training, length=length)
        out, expected = compiled(q, k, v, pad(length)), run(q, k, v, pad(length))
        assert torch.equal(out, expected)
        if training:
            assert torch.equal(*(torch.autograd.grad(x.sum(), q)[0] for x in (out, expected)))
    assert compiles == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_can_be_compiled(dynamic: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, seed: Tensor) -> Tensor:
        out = attention(q, k, v, "s*0.25 where n <= m & pad[b, n] else +min", pad=pad)
        return out + attention(q, k, v, "s*0.25", dropout=0.5, seed=seed)

    torch._dynamo.reset()
    q, k, v = operands()
    given = (q, k, v, pad(), torch.tensor(5))
    out = torch.compile(run, backend="aot_eager", dynamic=dynamic, fullgraph=True)(*given)
    expected = run(*given)
    assert torch.equal(out, expected)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from attnfuse.ops import ABI

text = "pad: bool[:, :]; s*0.25 where n <= m & pad[b, n] else +min"

def run(q, k, v, pad):
    return torch.ops.attnfuse.attention(q, k, v, [pad], [], [], None, text, [0, 2, 1, 3], ABI)[0]

torch.manual_seed(0)
training = sys.argv[1] == "training"
q, k, v = (torch.randn(1, 2, 8, 8, requires_grad=training) for _ in range(3))
out = torch.compile(run)(q, k, v, torch.ones(1, 8, dtype=torch.bool))
if training:
    out.sum().backward()
seen = {name: counters["aot_autograd"][name] for name in ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")}
print(json.dumps(seen | {"fx_hit": counters["inductor"]["fxgraph_cache_hit"], "sum": float(out.sum())}))
"""


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_a_second_process_takes_the_compiled_graph_from_the_cache(kind: str, tmp_path: Path) -> None:
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, kind],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = seen
    assert (first["autograd_cache_miss"], first["autograd_cache_hit"], first["autograd_cache_bypass"]) == (1, 0, 0)
    assert (second["autograd_cache_miss"], second["autograd_cache_hit"], second["autograd_cache_bypass"]) == (0, 1, 0)
    assert first["sum"] == second["sum"]


# --- cost of a call --------------------------------------------------------------------------------------------------


def python_calls(run: Callable[[], object]) -> int:
    """Python functions that a call enters."""
    entered = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal entered
        entered += event == "call"

    run()
    run()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.usefixtures("library")
def test_a_call_without_gradients_is_cheap() -> None:
    """Counted in Python functions and operators, not in time: what is computed once a spec and shape is not computed again."""
    given = call(CAUSAL, grad=False)
    assert python_calls(lambda: OP(*given)) <= 25
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OP(*given)
    ran = {e.key for e in profile.key_averages()}
    assert ran <= {
        "attnfuse::attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        # inside the kernel, and for lse [B, H, M]
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::transpose",
        "aten::as_strided",
        "aten::zeros",
        "aten::zero_",
        "aten::fill_",
        "aten::contiguous",
        "aten::clone",
        "aten::copy_",
    }


@pytest.mark.usefixtures("library")
def test_padding_costs_few_operators_more() -> None:
    """A left-padded batch: two causal squares, one mean, one look at the mask."""
    given = call(PADDED, grad=False, leaves=(pad(),))
    OP(*given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OP(*given)
    ran = {e.key: e.count for e in profile.key_averages()}
    assert ran["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2
    assert ran["aten::mean"] == 1
    assert not ran.keys() & {"aten::bmm", "aten::softmax", "aten::masked_fill", "aten::where"}
