"""The path that everything else stands on: normalise, an operator put in by hand, Inductor, held against stock.

A tiny Llama with everything that has broken such a path before: grouped heads, checkpointed layers, left padding, bf16
autocast, training, one sequence length and then others. The rewrite here is done by hand and knows Llama's spelling; the
operator has the registration that attnfuse's own has (`Library.impl`, fakes with true strides, a backward operator).

Inductor runs without its C++ code generation, which costs minutes here and changes nothing that is looked at; the tests
that need generated code have small graphs.
"""

import contextlib
import json
import math
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from numerics import assert_close
from torch import Tensor, fx
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass

from attnfuse.passes.normalise import normalise

aten = torch.ops.aten
LENGTHS = (16, 24, 40)

# The operators


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    s = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if mask is None:
        return s
    return s.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else s + mask


def _empty(shape: tuple[int, ...], order: list[int], like: Tensor) -> Tensor:
    """A dense tensor whose axes lie in memory in `order`, outermost first."""
    return like.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])


def _weights(s: Tensor) -> Tensor:
    """Softmax of the scores, zeros in a row without a key, as in SDPA.

    Not exp(s - lse): in a row where finfo.min was added to every score, fp32 cannot tell min + log(N) from min.
    """
    return torch.softmax(s, -1).nan_to_num(0.0)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, order: list[int]
) -> tuple[Tensor, Tensor]:
    s = _scores(q, k, mask, scale)
    out = _weights(s) @ v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return _empty(tuple(out.shape), order, q).copy_(out), s.logsumexp(-1)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, order: list[int]
) -> tuple[Tensor, Tensor]:
    B, H, M, _ = q.shape
    return _empty((B, H, M, v.shape[-1]), order, q), q.new_empty((B, H, M), dtype=torch.float32)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, Hkv, N, _ = k.shape
    group = q.shape[1] // Hkv
    p = _weights(_scores(q, k, mask, scale))
    do = dout.float()
    dp = do @ v.float().repeat_interleave(group, 1).mT
    ds = p * (dp - (do * out.float()).sum(-1, keepdim=True))
    dq = ds @ k.float().repeat_interleave(group, 1) * scale
    dk, dv = ((x.mT @ y.float()).view(B, Hkv, group, N, -1).sum(2) for x, y in ((ds * scale, q), (p, dout)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


class _BoomError(Exception):
    pass


def _fail(*args: object, **kwargs: object) -> None:
    raise _BoomError("boom")


drawn: list[tuple[str, int]] = []


def _keep(kind: str, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x where a generator with this seed keeps it, else 0; every call is noted in `drawn`."""
    drawn.append((kind, int(seed)))
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(seed))) >= p
    return x * kept


LIBRARY = torch.library.Library("first_risk", "DEF")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int[] order) -> (Tensor, Tensor)")
LIBRARY.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("failing(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int[] order) -> (Tensor, Tensor)")
LIBRARY.define("drop(Tensor x, Tensor seed, float p) -> Tensor")
LIBRARY.define("drop_backward(Tensor dout, Tensor seed, float p) -> Tensor")
attention, attention_backward, failing, drop, drop_backward = (
    getattr(torch.ops.first_risk, name).default
    for name in ("attention", "backward", "failing", "drop", "drop_backward")
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention(*args)
        ctx.save_for_backward(*args[:4], out, lse)
        ctx.scale = args[4]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        return (*attention_backward(dout, *ctx.saved_tensors, ctx.scale), None, None, None)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        with torch._C._AutoDispatchBelowAutograd():
            return drop(x, seed, p)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        return drop_backward(dout, *ctx.saved_tensors, ctx.p), None, None


for _name, _kernel, _fake in (
    ("attention", _attention, _attention_fake),
    ("backward", _backward, _backward_fake),
    ("failing", _attention, _fail),
    ("drop", lambda x, seed, p: _keep("forward", x, seed, p), lambda x, seed, p: torch.empty_like(x)),
    ("drop_backward", lambda x, seed, p: _keep("backward", x, seed, p), lambda x, seed, p: torch.empty_like(x)),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"first_risk::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("attention", lambda *args: _Attention.apply(*args), "Autograd")
LIBRARY.impl("drop", lambda *args: _Drop.apply(*args), "Autograd")

# The rewrite


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def _through(node: fx.Node, *targets: object) -> fx.Node:
    while node.target in targets:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _sole_user(node: fx.Node, target: object) -> fx.Node:
    (user,) = node.users
    assert user.target is target, f"{user.format_node()} is no {target}"
    return user


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, Any, Any, Any, float]:
    """The last node of an attention as Llama spells it, with q, k, v, mask and scale; `node` is its SDPA call or its softmax."""
    if node.target is aten.scaled_dot_product_attention.default:
        q, k, v, mask, p, causal = (*node.args, None, 0.0, False)[:6]
        assert not p
        assert not causal
        return node, q, k, v, mask, node.kwargs["scale"]
    last = _sole_user(node, aten.to.dtype)
    last = _sole_user(last, aten.dropout.default)
    last = _sole_user(last, aten.matmul.default)
    add: Any = node.args[0]
    assert add.target is aten.add.Tensor
    scaled, mask = add.args
    product, scale = scaled.args
    q, transposed = product.args
    assert transposed.target is aten.transpose.int
    return last, q, transposed.args[0], last.args[1], mask, scale


def rewrite(gm: fx.GraphModule) -> int:
    """Put the operator in the place of every attention, in the graph and in its bodies; how many there were."""
    count = 0
    for module in _graphs(gm):
        graph = module.graph
        for anchor in [*graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)] or [
            *graph.find_nodes(op="call_function", target=aten.softmax.int)
        ]:
            last, q, k, v, mask, scale = _operands(anchor)
            val: Tensor = last.meta["val"]
            k, v = (
                _through(x, aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor)
                for x in (k, v)
            )
            hints = [s if isinstance(s, int) else s.node.hint for s in val.stride()]
            with graph.inserting_before(last):
                args = [graph.call_function(aten.to.dtype, (x, val.dtype)) for x in (q, k, v)]
                new = graph.call_function(attention, (*args, mask, scale, sorted(range(4), key=lambda i: -hints[i])))
                out = graph.call_function(operator.getitem, (new, 0), {})
            last.replace_all_uses_with(out)
            graph.erase_node(last)
            count += 1
        graph.eliminate_dead_code()
        graph.lint()
        module.recompile()
    return count


# The model and its runs


def llama(implementation: str = "sdpa", layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation=implementation,
    )
    model = transformers.LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    return model


def batch(length: int) -> dict[str, Tensor]:
    """Two sequences, the first padded by five on the left."""
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Run:
    """What a backend saw and what came out, one entry a compiled graph or a length."""

    attentions: list[int] = field(default_factory=list)
    graphs: list[tuple[bool, list[int], list[str]]] = field(default_factory=list)
    static: list[list[int]] = field(default_factory=list)
    shape_guards: list[list[str]] = field(default_factory=list)
    guards: list[set[str]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


def _described(guards: object) -> set[str]:
    """The lines of a tree of guards, without the numbers that count up within a process."""
    numbers = re.compile(r"^[| +-]+|(?<=___)\d+|(?<=_c)\d+|(?<!\d)\d{9,}(?!\d)")
    return {numbers.sub("", line) for line in str(guards).splitlines()}


def _train(
    model: torch.nn.Module, forward: Callable[..., Tensor], length: int, run: Run, *, autocast: bool = True
) -> None:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = forward(**batch(length))
    logits.float().square().mean().backward() if autocast else logits.square().mean().backward()
    run.logits.append(logits.detach())
    run.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def _compiled_run(model: torch.nn.Module, *, fused: bool) -> Run:
    run = Run()

    def step(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask).logits

    def inner(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        targets = [str(node.target) for node in gm.graph.nodes]
        run.graphs.append((bool(kwargs.get("is_backward")), list(kwargs["static_input_idxs"]), targets))
        return compile_fx_inner(gm, inputs, **kwargs)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        if fused:
            gm = normalise(gm)
            run.attentions.append(rewrite(gm))
        compiled = compile_fx(gm, inputs, inner_compile=inner)
        context = torch._guards.TracingContext.get()
        run.static.append(list(context.fw_metadata.static_input_indices))
        run.shape_guards.append([str(guard.expr) for guard in context.fake_mode.shape_env.guards])
        return compiled

    torch._dynamo.reset()
    forward = torch.compile(step, backend=backend)
    for length in LENGTHS:
        _train(model, forward, length, run)
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(step.__code__)
    run.guards = [_described(entry.guard_manager) for entry in entries]
    return run


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Inductor without C++, and without the caches: a hit would skip the compilation that is looked at."""
    with (
        inductor_config.patch(fx_graph_cache=False, disable_cpp_codegen=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """One for both runs, since guards name objects."""
    return llama()


@pytest.fixture(scope="module")
def stock(model: torch.nn.Module) -> Run:
    with uncached():
        return _compiled_run(model, fused=False)


@pytest.fixture(scope="module")
def fused(model: torch.nn.Module) -> Run:
    with uncached():
        return _compiled_run(model, fused=True)


def test_every_attention_is_replaced_and_compiled(fused: Run) -> None:
    assert fused.attentions == [2, 2]
    forwards = [targets for backward, _, targets in fused.graphs if not backward]
    assert [targets.count("first_risk.attention.default") for targets in forwards] == [2, 2]


def test_checkpointed_attentions_are_recomputed_in_the_backward(fused: Run) -> None:
    backwards = [targets for backward, _, targets in fused.graphs if backward]
    for name in ("first_risk.attention.default", "first_risk.backward.default"):
        assert [targets.count(name) for targets in backwards] == [2, 2]


def test_output_strides_equal_stock(stock: Run, fused: Run) -> None:
    assert [x.stride() for x in fused.logits] == [x.stride() for x in stock.logits]
    for ours, theirs in zip(fused.gradients, stock.gradients, strict=True):
        assert {name: x.stride() for name, x in ours.items()} == {name: x.stride() for name, x in theirs.items()}


def test_static_inputs_equal_stock(stock: Run, fused: Run) -> None:
    assert all(stock.static)
    assert fused.static == stock.static
    assert [static for backward, static, _ in fused.graphs if not backward] == [
        static for backward, static, _ in stock.graphs if not backward
    ]


def test_guards_equal_stock(stock: Run, fused: Run) -> None:
    assert stock.shape_guards[1], "the second length is compiled with symbolic sizes"
    assert fused.shape_guards == stock.shape_guards
    assert fused.guards == stock.guards


def test_recompiles_equal_stock(stock: Run, fused: Run) -> None:
    assert len(stock.static) == 2, "one static graph, one for all other lengths"
    assert len(fused.static) == len(stock.static)
    assert len(fused.guards) == len(stock.guards)


def _eager_run(implementation: str, lengths: tuple[int, ...], *, exact: bool) -> Run:
    run = Run()
    model = llama(implementation)
    if exact and implementation == "sdpa":
        model = model.double()
    # The eager spelling stays in float32, exact enough for bf16: its softmax(dtype=float32) makes -inf of float64's finfo.min,
    # and NaN of the rows that padding masks out.
    for length in lengths:
        _train(model, lambda **inputs: model(**inputs).logits, length, run, autocast=not exact)
    return run


def _assert_close_to_eager(run: Run, implementation: str, lengths: tuple[int, ...]) -> None:
    eager, exact = (_eager_run(implementation, lengths, exact=which) for which in (False, True))
    for at, length in enumerate(lengths):
        assert_close(run.logits[at], eager.logits[at], exact.logits[at].double(), what=f"logits at {length}")
        assert run.gradients[at].keys() == eager.gradients[at].keys()
        for name, gradient in run.gradients[at].items():
            original, reference = eager.gradients[at][name], exact.gradients[at][name].double()
            assert_close(gradient, original, reference, what=f"{name} at {length}")


def test_gradients_against_eager(fused: Run) -> None:
    _assert_close_to_eager(fused, "sdpa", LENGTHS)


def test_gradients_of_the_eager_spelling() -> None:
    run = Run()
    model = llama("eager")

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        gm = normalise(gm)
        run.attentions.append(rewrite(gm))
        return aot_eager(gm, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for length in LENGTHS[:2]:
        _train(model, lambda **inputs: compiled(**inputs).logits, length, run)
    assert run.attentions == [2, 2]
    _assert_close_to_eager(run, "eager", LENGTHS[:2])


def test_ambient_autocast_casts_what_the_rewrite_casts_and_no_leaf() -> None:
    dtypes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, order: list[int]) -> Any:
        dtypes.append([x.dtype for x in (q, k, v, mask)])
        return _attention(q, k, v, mask, scale, order)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        gm = normalise(gm)
        assert rewrite(gm) == 1
        return aot_eager(gm, inputs)

    model = llama("eager", layers=1)
    torch._dynamo.reset()
    with torch.library._scoped_library("first_risk", "IMPL") as library:
        library.impl("attention", kernel, "CPU")
        _train(model, lambda **inputs: torch.compile(model, backend=backend)(**inputs).logits, 16, Run())
    # Once in the forward, once recomputed in the backward.
    assert dtypes == [[torch.bfloat16] * 3 + [torch.float32]] * 2


@pytest.mark.parametrize("returned", ["scores' order", "heads last"])
def test_returned_attention_has_the_strides_of_stock(returned: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
        return out if returned == "scores' order" else out.transpose(1, 2)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        gm = normalise(gm)
        assert rewrite(gm) == 1
        return compile_fx(gm, inputs)

    q, k, v = (torch.randn(2, 7, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    strides = []
    for compiler in ("inductor", backend):
        torch._dynamo.reset()
        with uncached():
            strides.append(torch.compile(fn, backend=compiler)(q, k, v).stride())
    assert strides[0] == strides[1]


# Dropout in a checkpoint


def _seeded(gm: fx.GraphModule) -> fx.GraphModule:
    """Dropout replaced by an operator that draws from a seed made beside it."""
    gm = normalise(gm)
    for module in _graphs(gm):
        for node in module.graph.find_nodes(op="call_function", target=aten.dropout.default):
            x, p, _ = node.args
            with module.graph.inserting_before(node):
                # Without a device, Inductor's fallback_random cannot save the generator's state for the recomputation.
                options = {"dtype": torch.int64, "device": x.meta["val"].device}
                seed = module.graph.call_function(aten.randint.low, (0, 2**31, []), options)
                new = module.graph.call_function(drop, (x, seed, p))
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
        module.recompile()
    return gm


@pytest.mark.parametrize("downstream", ["inductor", "inductor fallback_random", "aot_eager"])
def test_recomputation_draws_the_mask_of_the_forward(downstream: str) -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        gm = _seeded(gm)
        if downstream == "aot_eager":
            return aot_eager(gm, inputs)
        return compile_fx(gm, inputs, config_patches={"fallback_random": "fallback" in downstream})

    def layer(x: Tensor) -> Tensor:
        return F.dropout(x.sin(), 0.5, training=True).exp()

    def fn(x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend)
    steps = []
    for _ in range(2):
        drawn.clear()
        x = torch.full((16, 16), 0.5, requires_grad=True)
        out = compiled(x)
        out.sum().backward()
        (_, first), (_, second), *rest = drawn
        # Which layer's forward has to run once more is the partitioner's choice.
        assert {("backward", first), ("backward", second)} < set(rest)
        assert set(rest) <= {(kind, seed) for kind in ("forward", "backward") for seed in (first, second)}
        # d out / d x is zero where either layer dropped, and out is 1 = exp(0) where the second did.
        assert x.grad is not None
        kept = [torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) >= 0.5 for seed in (first, second)]
        assert torch.equal(out != 1.0, kept[1])
        assert torch.equal(x.grad != 0.0, kept[0] & kept[1])
        steps += [first, second]
    assert len(set(steps)) == 4, "each layer and each step has its own seed"


# Caches


def _child() -> None:
    """One process of `test_caches_hit_in_a_second_process`: prints the counters of inference and of training as JSON."""
    result = {}
    for training in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = llama(layers=1)

        def backend(gm: fx.GraphModule, inputs: Any) -> Any:
            gm = normalise(gm)
            assert rewrite(gm) == 1
            return compile_fx(gm, inputs, config_patches={"disable_cpp_codegen": True, **_without_attention_patterns()})

        forward = torch.compile(model, backend=backend)
        if training:
            _train(model, lambda **inputs: forward(**inputs).logits, 16, Run())  # noqa: B023
        else:
            with torch.no_grad():
                forward(**batch(16))
        found = counters["aot_autograd"], counters["inductor"]
        result["training" if training else "inference"] = [
            {name: n for name, n in counter.items() if re.search("cache_(hit|miss|bypass)", name)} for counter in found
        ]
    print(json.dumps(result))


def test_caches_hit_in_a_second_process(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", "import test_first_risk; test_first_risk._child()"]
    first, second = (
        json.loads(
            subprocess.run(
                command, cwd=Path(__file__).parent, env=environment, check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    for kind, graphs in (("inference", 1), ("training", 2)):
        assert first[kind] == [{"autograd_cache_miss": 1}, {"fxgraph_cache_miss": graphs}]
        assert second[kind] == [{"autograd_cache_hit": 1}, {"fxgraph_cache_hit": graphs}]


# Inductor's attention patterns


def _held_exp(x: Tensor) -> Tensor:
    return aten.exp.default(x)


class _Retarget(CustomGraphPass):
    """Gives the nodes of one target another."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=self.old):
            node.target = self.new

    def uuid(self) -> Any:
        return "attention patterns off", 1


def _without_attention_patterns() -> dict[str, Any]:
    """Config patches for one compilation. Every attention pattern of Inductor has an exp in it, and none sees this one."""
    return {
        "joint_custom_pre_pass": _Retarget(aten.exp.default, _held_exp),
        "joint_custom_post_pass": _Retarget(_held_exp, aten.exp.default),
    }


def test_every_attention_pattern_has_an_exp() -> None:
    patterns = Path(torch._inductor.__file__).parent / "fx_passes" / "serialized_patterns"
    files = sorted(patterns.glob("_sfdp_pattern_*.py"))
    assert len(files) >= 28
    assert [file.name for file in files if "aten.exp.default" not in file.read_text()] == []


@pytest.mark.parametrize("training", [False, True])
def test_attention_patterns_are_off_for_one_compilation(training: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) / 4.0, -1) @ v

    q, k, v = (torch.randn(2, 4, 8, 16, requires_grad=training) for _ in range(3))
    fused = []
    # With the patterns off in between, so that neither a cache nor what is left behind can hide the difference.
    for patches in ({}, _without_attention_patterns(), {}):
        torch._dynamo.reset()
        counters.clear()
        with mock.patch.dict(os.environ, {}):
            compiled = torch.compile(
                fn, backend=lambda gm, x, p=patches: compile_fx(normalise(gm), x, config_patches=p)
            )
        out = compiled(q, k, v)
        torch.testing.assert_close(out, fn(q, k, v))
        if training:
            # what stands in the cache is forward and backward together
            out.sum().backward()
        misses = counters["aot_autograd"]["autograd_cache_miss"]
        fused.append((counters["inductor"]["fuse_attention"] > 0, misses > 0))
    assert fused == [(True, True), (False, True), (False, False)], "the third is the first's, from the cache"


# When the rewritten graph fails


def _fail_in_fake(gm: fx.GraphModule) -> None:
    for module in _graphs(gm):
        for node in module.graph.find_nodes(op="call_function", target=attention):
            node.target = failing
        module.recompile()


@pytest.mark.parametrize("stage", ["fake", "lowering", "forward", "backward"])
def test_the_original_compiles_after_the_rewritten_graph_failed(stage: str) -> None:
    """Nothing of the failed compilation is left in Dynamo's graph, its shape environment or its tracing context."""
    model = llama(layers=1)
    seen: dict[str, list[Any]] = {"stock": [], "fallback": []}

    def inner(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        if stage == ("backward" if kwargs.get("is_backward") else "forward"):
            raise _BoomError("boom")
        return compile_fx_inner(gm, inputs, **kwargs)

    def fail(gm: fx.GraphModule, inputs: Any) -> None:
        gm = normalise(gm)
        rewrite(gm)
        with contextlib.ExitStack() as stack:
            if stage == "fake":
                _fail_in_fake(gm)
            if stage == "lowering":
                stack.enter_context(mock.patch("torch._inductor.graph.GraphLowering.call_function", _fail))
            # The backward of a static graph is lowered when it first runs, out of a backend's reach, unless this is set.
            stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
            compile_fx(gm, inputs, inner_compile=inner)

    def backend(kind: str) -> Callable[[fx.GraphModule, Any], Any]:
        def compile_graph(gm: fx.GraphModule, inputs: Any) -> Any:
            if kind == "fallback":
                before = _snapshot(gm)
                with pytest.raises(Exception, match="boom"):
                    fail(gm, inputs)
                assert _snapshot(gm) == before
            compiled = compile_fx(gm, inputs)
            context = torch._guards.TracingContext.get()
            guards = [str(guard.expr) for guard in context.fake_mode.shape_env.guards]
            seen[kind].append((context.fw_metadata.static_input_indices, guards))
            return compiled

        return compile_graph

    runs = {}
    for kind in seen:
        torch._dynamo.reset()
        runs[kind] = run = Run()
        compiled = torch.compile(model, backend=backend(kind))
        with uncached():
            for length in LENGTHS[:2]:
                _train(model, lambda **inputs: compiled(**inputs).logits, length, run)  # noqa: B023
    assert seen["fallback"] == seen["stock"]
    for at in range(2):
        assert torch.equal(runs["fallback"].logits[at], runs["stock"].logits[at])
        for name, gradient in runs["stock"].gradients[at].items():
            assert torch.equal(runs["fallback"].gradients[at][name], gradient)


def _snapshot(gm: fx.GraphModule) -> list[str]:
    """The graph and its bodies as text, with what Dynamo recorded of every value."""
    return [
        f"{node.format_node()} {node.meta.get('example_value')}"
        for module in _graphs(gm)
        for node in module.graph.nodes
    ]
