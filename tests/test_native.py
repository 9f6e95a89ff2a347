"""attnfuse's own kernels for the CPU; the families of specs run through them in test_blocked too."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.ops import ABI
from attnfuse.spec import Shape
from attnfuse.templates import flash_step, native, plain_step
from attnfuse.templates.native import Cells, Keys, Score
from tests.families import Call, floats, hold_to_oracle, made

OP = torch.ops.attnfuse.attention.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
served = pytest.mark.skipif(
    native.about().startswith("PyTorch's"), reason=f"attnfuse's kernels are not for this machine: {native.about()}"
)

# Depths that are no vectors, odd ones, more than a panel; rows and keys that end within a block, and single ones.
SHAPES = (
    Shape(2, 4, 2, 100, 130, 64, 64),
    Shape(1, 2, 1, 197, 197, 80, 48),
    Shape(1, 1, 1, 61, 600, 33, 17),
    Shape(1, 3, 3, 7, 5, 128, 256),
    Shape(2, 2, 1, 129, 129, 7, 3),
    Shape(1, 2, 2, 1, 70, 16, 1),
    Shape(1, 2, 1, 50, 1, 1, 16),
)
TEXTS = {
    "all": "s*0.125",
    "causal": "s*0.125 where n <= m else =min",
    "window": "s*0.125 where n <= m & n > m - 40 else =min",
    "in steps": "s*0.125 where n <= m // 8 * 8 + 7 & n >= m // 8 * 8 - 24 else =min",
    "negative": "s*(-0.25) where n <= m else =min",
    "nothing": "s*0.0 where n <= m else =min",
    "softcap": "2*tanh(s*0.5) where n <= m else =min",
    "softcap and bias": "bias: f32[:, :]; 2*tanh(s*0.5) + bias[h, n]",
    "bias of each cell": "bias: f32[:, :, :, :]; s*0.125 + bias[b, h, m, n]",
    "bias of rows": "bias: f32[:, :]; s*0.125 + bias[b, m]",
    "diagonals": "bias: f32[:, :]; s*0.125 + bias[h, n - m + M - 1] where n <= m else =min",
    "a sum": "bias: f32[:, :]; s*0.125 + (bias[h, n] + 0.25*m)",
}
LEAVES: dict[str, Any] = {
    "softcap and bias": lambda x: floats(x.H, x.N),
    "bias of each cell": lambda x: floats(x.B, x.H, x.M, x.N),
    "bias of rows": lambda x: floats(x.B, x.M),
    "diagonals": lambda x: floats(x.H, x.M + x.N - 1),
    "a sum": lambda x: floats(x.H, x.N),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is called."""
    seen: Counter[str] = Counter()
    run = native._Call.run

    def counted(self: Any, name: str, heads: int) -> None:
        seen[name] += 1
        run(self, name, heads)

    monkeypatch.setattr(native._Call, "run", counted)
    return seen


def call_of(name: str, shape: Shape, dtype: torch.dtype) -> Call:
    leaves = (LEAVES[name](shape),) if name in LEAVES else ()
    return made(TEXTS[name], shape, leaves, dtype)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", TEXTS)
def test_results_and_gradients(
    name: str, shape: Shape, dtype: torch.dtype, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All by these kernels, but for the gradient of a bias: one call for a segment of rows."""
    call = call_of(name, shape, dtype)
    with monkeypatch.context() as patch:
        for step in (flash_step, plain_step):
            patch.setattr(step, "forward", None)
            patch.setattr(step, "backward", None)
        torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert 1 <= calls["forward"] == calls["backward"] <= 3
    hold_to_oracle(call)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "softcap", "bias of each cell"])
def test_the_gradient_of_lse(name: str, dtype: torch.dtype) -> None:
    hold_to_oracle(call_of(name, SHAPES[0], dtype), with_lse=True)


@served
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [Shape(1, 2, 1, 300, 500, 16, 16), Shape(3, 4, 4, 90, 90, 16, 16)], ids=str)
def test_any_number_of_threads(shape: Shape, threads: int) -> None:
    """More of them than heads share the keys of one; each number gives the same each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = call_of("causal", shape, torch.float32)

        def results() -> list[Tensor]:
            out, lse = call.run()
            return [out, lse, *torch.autograd.grad(out.square().sum(), (call.q, call.k, call.v))]

        assert all(map(torch.equal, results(), results()))
        hold_to_oracle(call)
    finally:
        torch.set_num_threads(before)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    """They reach the rows that see them, and their block of rows at most; a row of -inf alone is NaN, one without keys zeros."""
    q, k, v = (torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(3))
    q[0, 0, 400] = torch.nan
    v[0, 0, 500] = torch.inf
    bias = torch.zeros(1, 1, 512, 512)
    bias[..., 300, :] = -torch.inf
    out, lse = torch.empty_like(q), torch.empty(1, 1, 512)
    native.forward(q, k, v, out, lse, Score(0.25, bias=Cells.of(bias)), Keys(-7, -6, 1, 1))
    # row m sees key m - 7 alone
    expected = torch.cat((torch.zeros(7, 16, dtype=dtype), v[0, 0, :-7]))
    expected[[300, 400]] = torch.nan
    assert out[0, 0, 507].isinf().all()
    others = [m for m in range(512) if m // 48 != 507 // 48]
    assert torch.equal(out[0, 0, others].nan_to_num(7.0), expected[others].nan_to_num(7.0))
    assert lse[0, 0, :7].eq(-torch.inf).all()
    assert lse[0, 0, 300] == -torch.inf
    assert lse[0, 0, 400].isnan()
    native.forward(q, k, v, out, lse, Score(0.25, bias=Cells.of(bias)), Keys(-7, -6, 1, 1), dead=0.0)
    assert out[0, 0, 300].eq(0.0).all()


@served
@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_rows_of_the_least_number(least: float) -> None:
    """Every key counts alike; no multiple of such a score is finite."""
    q, k, v = (torch.randn(1, 1, 70, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(1, 1, 70)
    native.forward(q, k, v, out, lse, Score(0.25, bias=Cells.of(torch.full((1, 1, 1, 1), least))), Keys(0, 70))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))
    assert lse.eq(least).all()


@served
def test_a_bias_is_read_where_it_is(calls: Counter[str]) -> None:
    """Transposed, sliced, of the operands' type, along a diagonal: no copy of an M x N tensor is made."""
    shape = Shape(1, 2, 2, 512, 512, 16, 16)
    for text, x in (
        ("bias: bf16[:, :, :]; s + bias[m, h, n]", floats(512, 2, 600).bfloat16()[:, :, 40:]),
        ("bias: bf16[:, :]; s + bias[h, n - m + 511]", floats(2, 1023).bfloat16()),
    ):
        call = made(text, shape, (x,), torch.bfloat16)
        calls.clear()
        largest = 0

        class Largest(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                for x in torch.utils._pytree.tree_leaves(out):
                    if isinstance(x, Tensor):
                        largest = max(largest, x.untyped_storage().nbytes())
                return out

        with Largest():
            OP(call.q, call.k, call.v, [x], [], [], None, text, [0, 2, 1, 3], ABI)
        assert calls == {"forward": 1}
        assert largest < 512 * 512 * 2, largest
        hold_to_oracle(call)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conditions_beside_a_bias(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes them as they are, and the bias is not copied for them."""
    seen: list[tuple[bool, bool]] = []
    init = native._Call.__init__

    def watched(self: Any, *args: Any, **named: Any) -> None:
        score = args[5]
        seen.append((score.bias is not None, score.mask is not None))
        init(self, *args, **named)

    monkeypatch.setattr(native._Call, "__init__", watched)
    shape = Shape(2, 4, 2, 150, 170, 16, 16)
    leaves = (floats(4, 150, 170), torch.rand(2, 170, generator=torch.Generator().manual_seed(0)) < 0.7)
    text = "bias: f32[:, :, :]; some: bool[:, :]; s*0.125 + bias[h, m, n] where some[b, n] & some[b, m] else =min"
    call = made(text, shape, leaves, dtype)
    torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert len(seen) >= 2
    assert set(seen) == {(True, True)}
    hold_to_oracle(call)


@served
def test_rows_of_many_documents_are_one_call(calls: Counter[str]) -> None:
    shape = Shape(1, 2, 2, 400, 400, 16, 16)
    doc = (torch.arange(400) // 9)[None]
    call = made("doc: i64[:, :]; s where n <= m & doc[b, m] == doc[b, n] else -inf", shape, (doc,))
    torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert calls == {"forward": 1, "backward": 1}
    hold_to_oracle(call)


def test_without_a_compiler_pytorchs_kernels_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a compiler's output\nx.cpp:1: error: no AVX-512")

    cached = native._library, native.serves, native.differentiates
    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(native, "is_faster_in", lambda dtype: True)
    for function in cached:
        function.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "attnfuse"):
            assert not native.serves(torch.float32)
            assert not native.differentiates(torch.float32)
        assert "could not be built" in caplog.text
        assert "error: no AVX-512" in caplog.text
        assert "could not be built" in native.about()
        hold_to_oracle(made("s*0.125 where n <= m else -inf", SHAPES[0]))
    finally:
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "features", "expected"),
    [
        ("AuthenticAMD", {"avx512"}, DTYPES),
        ("GenuineIntel", {"avx512"}, DTYPES[1:]),
        ("GenuineIntel", {"avx512", "amx_tile"}, DTYPES[2:]),
        ("GenuineIntel", {"avx512", "amx_tile", "amx_fp16"}, ()),
        ("AuthenticAMD", set(), ()),
    ],
)
def test_processors(
    vendor: str, features: set[str], expected: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_vendor", lambda: vendor)
    monkeypatch.setattr(native, "has", lambda feature: feature in features)
    native.is_faster_in.cache_clear()
    try:
        assert tuple(dtype for dtype in (*DTYPES, torch.float64) if native.is_faster_in(dtype)) == expected
    finally:
        native.is_faster_in.cache_clear()
