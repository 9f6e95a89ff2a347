"""attnfuse's own kernels for the CPU; the families of specs run through them in test_blocked too."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.reference import attention as reference
from attnfuse.score import parse_expr
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import flash_step, native, plain_step, work
from attnfuse.templates.affine import as_load, capped
from attnfuse.templates.native import Cells, Keys, Score
from attnfuse.templates.native_step import takes
from tests.families import Call, floats, hold_to_oracle, made
from tests.numerics import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
has_rows = native._has_rows
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
    "a multiple": "bias: f32[:, :]; (s + bias[m, n])*0.125 where n <= m else =min",
    "a table": "bias: f32[:, :]; s*0.125 + bias[(m + n * n) % 7, h] where n <= m + 30 else =min",
    "dropout": "dropout 0.2; s*0.125 where n <= m else =min",
    "dropout of a window": "dropout 0.7; s*0.125 where n <= m & n > m - 40 else =min",
    "dropout, softcap and bias": "bias: f32[:, :, :]; dropout 0.1; 2*tanh(s*0.5) + bias[h, m, n]",
}
LEAVES: dict[str, Any] = {
    "softcap and bias": lambda x: floats(x.H, x.N),
    "bias of each cell": lambda x: floats(x.B, x.H, x.M, x.N),
    "bias of rows": lambda x: floats(x.B, x.M),
    "diagonals": lambda x: floats(x.H, x.M + x.N - 1),
    "a sum": lambda x: floats(x.H, x.N),
    "a multiple": lambda x: floats(x.M, x.N),
    "a table": lambda x: floats(7, x.H),
    "dropout, softcap and bias": lambda x: floats(x.H, x.M, x.N),
}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_has_rows", lambda *_: True)
    monkeypatch.setattr(native, "_PRODUCTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is called."""
    seen: Counter[str] = Counter()
    run = native._Call.run

    def counted(self: Any, name: str) -> None:
        seen[name] += 1
        run(self, name)

    monkeypatch.setattr(native._Call, "run", counted)
    return seen


def call_of(name: str, shape: Shape, dtype: torch.dtype) -> Call:
    leaves = (LEAVES[name](shape),) if name in LEAVES else ()
    return made(TEXTS[name], shape, leaves, dtype)


def _each() -> Iterator[Any]:
    for name in TEXTS:
        for shape in SHAPES:
            for dtype in DTYPES:
                # the slope at a row's only key is zero, but for what rounded its output
                if "dropout" not in name or shape.N > 1 or dtype == torch.float32:
                    yield pytest.param(name, shape, dtype, id=f"{name}-{'x'.join(map(str, shape))}-{dtype}")


@served
@pytest.mark.parametrize(("name", "shape", "dtype"), [*_each()])
def test_results_and_gradients(
    name: str, shape: Shape, dtype: torch.dtype, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All by these kernels: one call for a segment of rows."""
    call = call_of(name, shape, dtype)
    wanted = (call.q, call.k, call.v, *(x.requires_grad_() for x in call.leaves))
    with monkeypatch.context() as patch:
        for step in (flash_step, plain_step):
            patch.setattr(step, "forward", None)
            patch.setattr(step, "backward", None)
        torch.autograd.grad(call.run()[0].sum(), wanted)
    assert 1 <= calls["forward"] == calls["backward"] <= 3
    hold_to_oracle(call)


# Near misses of a softcapped score, and of a bias that is a leaf as it stands.
NOT_CAPPED = (
    "2*tanh(s*0.5) + s",
    "2*tanh(s*0.5)*s",
    "2*tanh(tanh(s))",
    "tanh(s) + tanh(s*2)",
    "2*tanh(s*0.5 + slope[n])",
    "2*tanh(s*0.5)*slope[n]",
    "slope[n]*tanh(s)",
    "bf16(2*tanh(s*0.5))",
)


@pytest.mark.parametrize("score", NOT_CAPPED)
def test_what_is_no_softcapped_score(score: str, calls: Counter[str]) -> None:
    """It goes to no kernel of ours, and is right all the same."""
    given = "slope: f32[:]; " if "slope" in score else ""
    call = made(f"{given}{score}", Shape(1, 2, 2, 80, 70, 16, 16), (floats(70),) if given else ())
    assert capped(call.spec.program.body) is None
    assert not takes(call.spec)
    call.run()
    assert not calls
    if "bf16" not in score:
        hold_to_oracle(call)


def test_what_is_no_load() -> None:
    """Integers, and products of a load, have to be computed."""
    spec = parse_spec("ids: i64[:]; bias: f32[:]; s + bias[n]")
    taken = {text: as_load(spec, parse_expr(text)) for text in ("bias[n]", "float(ids[n])", "bias[n]*2.0", "-bias[n]")}
    assert [text for text, load in taken.items() if load is not None] == ["bias[n]"]


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_lse_alone_where_values_have_no_columns(dtype: torch.dtype) -> None:
    """Operands of no columns leave those beside them in memory alone."""
    empty, one = (call_of("all", Shape(1, 2, 1, 128, 130, 32, columns), dtype) for columns in (0, 1))
    grads = [torch.autograd.grad(c.run()[1].square().sum(), (c.q, c.k)) for c in (empty, one)]
    assert all(map(torch.equal, *grads))


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_without_columns(dtype: torch.dtype) -> None:
    """Sums of no terms are zeros, not what the memory held before."""
    call = call_of("causal", Shape(2, 4, 2, 100, 130, 16, 0), dtype)
    torch.empty(1 << 20).fill_(torch.nan)
    out, lse = call.run()
    assert lse.isfinite().all()
    for grad in torch.autograd.grad((out.sum(), lse.sum() * 0.0), (call.q, call.k, call.v)):
        assert not grad.any()


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


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[Score]:
    """The scores of the calls."""
    seen: list[Score] = []
    init = native._Call.__init__

    def watched(self: Any, *args: Any, **named: Any) -> None:
        seen.append(args[5])
        init(self, *args, **named)

    monkeypatch.setattr(native._Call, "__init__", watched)
    return seen


@served
@pytest.mark.parametrize(
    ("text", "x"),
    [
        ("bias: bf16[:, :, :]; s + bias[m, h, n]", floats(512, 2, 600).bfloat16()[:, :, 40:]),
        ("bias: f32[:, :, :]; s + bias[m, h, n]", floats(512, 2, 512)),
        ("bias: bf16[:, :]; s + bias[h, n - m + 511]", floats(2, 1023).bfloat16()),
    ],
)
def test_a_bias_is_read_where_it_is(text: str, x: Tensor, scores: list[Score]) -> None:
    """Transposed, sliced, of the operands' type or float32, along a diagonal: no copy is made."""
    call = made(text, Shape(1, 2, 2, 512, 512, 16, 16), (x,), torch.bfloat16)
    torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert len(scores) == 2
    for score in scores:
        assert score.bias is not None
        assert score.bias.x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    hold_to_oracle(call)


@served
def test_a_bias_of_another_type_is_converted_in_parts(scores: list[Score]) -> None:
    """Of batches whose keys differ each has its own."""
    shape = Shape(4, 2, 2, 200, 200, 16, 16)
    pad = torch.arange(200) >= torch.tensor([[1], [40], [70], [99]])
    leaves = (floats(4, 200, 200).half(), pad)
    text = "bias: f16[:, :, :]; pad: bool[:, :]; s + bias[b, m, n] where n <= m & pad[b, n] else =min"
    call = made(text, shape, leaves)
    call.run()
    numbers = [score.bias.x.numel() for score in scores if score.bias is not None]
    assert 0 < sum(numbers) <= 4 * 200 * 200
    hold_to_oracle(call)


@served
@pytest.mark.parametrize(("M", "N"), [(96, 160), (160, 96)])
def test_a_bias_whose_elements_overlap_is_converted(M: int, N: int, scores: list[Score]) -> None:
    """A Toeplitz matrix of float16, of which a copy has strides of its own."""
    bias = floats(M + N).half().as_strided((M, N), (1, 1))
    call = made("bias: f16[:, :]; s + bias[m, n]", Shape(1, 2, 2, M, N, 16, 16), (bias,))
    call.run()
    assert all(score.bias is not None and score.bias.x.dtype == torch.float32 for score in scores)
    out, _ = call.run()
    expected, _ = call._replace(leaves=(bias.clone(memory_format=torch.contiguous_format),)).run()
    assert torch.equal(out, expected)
    hold_to_oracle(call._replace(leaves=(bias.clone(memory_format=torch.contiguous_format),)))


@served
def test_a_score_of_infinity_makes_gradients_nan() -> None:
    bias = floats(1, 1, 70, 80)
    bias[0, 0, 5, 7] = torch.inf
    call = made("bias: f32[:, :, :, :]; s + bias[b, h, m, n]", Shape(1, 1, 1, 70, 80, 16, 16), (bias,))
    dq, dk, dv = torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert dq[0, 0, 5].isnan().all()
    assert dq[0, 0, 6:].isfinite().all()
    assert dk.isnan().all()
    assert dv.isnan().all()


@served
def test_a_bias_of_another_type_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []
    to = Tensor.to

    def watched(self: Tensor, *args: Any, **named: Any) -> Tensor:
        if self.dtype == torch.float16 and torch.float32 in (*args, *named.values()):
            converted.append(self.numel())
        return to(self, *args, **named)

    call = made(
        "bias: f16[:, :, :]; s + bias[h, m, n]", Shape(2, 2, 2, 300, 200, 16, 16), (floats(2, 300, 200).half(),)
    )
    monkeypatch.setattr(Tensor, "to", watched)
    out, _ = call.run()
    assert converted == [2 * 300 * 200]
    torch.autograd.grad(out.sum(), (call.q, call.k, call.v))
    assert converted == [2 * 300 * 200] * 2


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conditions_beside_a_bias(dtype: torch.dtype, scores: list[Score]) -> None:
    """The kernel takes them as they are, and the bias is not copied for them."""
    shape = Shape(2, 4, 2, 150, 170, 16, 16)
    leaves = (floats(4, 150, 170), torch.rand(2, 170, generator=torch.Generator().manual_seed(0)) < 0.7)
    text = "bias: f32[:, :, :]; some: bool[:, :]; s*0.125 + bias[h, m, n] where some[b, n] & some[b, m] else =min"
    call = made(text, shape, leaves, dtype)
    torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert len(scores) >= 2
    assert all(score.bias is not None and score.mask is not None for score in scores)
    hold_to_oracle(call)


# Masks whose rows see no whole intervals of keys.
MASKED = {
    "dropout": ("some: bool[:, :]; dropout 0.3; s*0.125 where some[b, n] else =min", 0),
    "dropout of each third": ("dropout 0.3; s*0.125 where (m - n) % 3 == 0 else =min", None),
    "softcap": ("some: bool[:, :]; 2*tanh(s*0.5) where some[b, n] & n <= m else =min", 0),
    "softcap of each third": ("2*tanh(s*0.5) where (m - n) % 3 == 0 & n < m + 40 else -inf", None),
    "bias": (
        "bias: f32[:, :, :]; some: bool[:, :]; s*0.125 + bias[h, m, n] where some[b, n] & some[b, m] else 0row",
        1,
    ),
    "diagonals": ("bias: f32[:, :]; some: bool[:, :]; s*0.125 + bias[h, n - m + M - 1] where some[b, n] else =min", 1),
    "all": (
        "bias: f32[:, :]; some: bool[:, :]; dropout 0.2; 2*tanh(s*0.5) + bias[(m + n) % 5, h] where some[b, n] else 0row",
        1,
    ),
    "sink": ("sinks: f32[:]; dropout 0.2; s*0.125 where (m - n) % 3 == 0 else =min sink sinks[h]", None),
}


def _masked(name: str, dtype: torch.dtype) -> Call:
    shape = Shape(2, 4, 2, 170, 190, 24, 16)
    text, at = MASKED[name]
    leaves: list[Tensor] = []
    if "bias:" in text:
        size = (shape.H, shape.M + shape.N - 1) if name == "diagonals" else (shape.H, shape.M, shape.N)
        leaves.append(floats(5, shape.H) if name == "all" else floats(*size))
    if "sinks" in text:
        leaves.append(floats(shape.H))
    if at is not None:
        some = torch.rand(2, 190, generator=torch.Generator().manual_seed(0)) < 0.7
        some[1, : -20 if name == "all" else 20] = False
        leaves.append(some)
    return made(text, shape, tuple(leaves), dtype)


@served
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKED)
def test_under_any_mask(
    name: str, dtype: torch.dtype, with_lse: bool, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softcaps, dropout and gradients of biases and of lse need no other step, but the gradient of lse beside a sink."""
    call = _masked(name, dtype)
    with monkeypatch.context() as patch:
        patch.setattr(plain_step, "forward", None)
        if not (with_lse and name == "sink"):
            patch.setattr(plain_step, "backward", None)
        hold_to_oracle(call, with_lse=with_lse)
    assert calls["forward"]


@served
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bias[h, m, n]", (6, 300, 300)),
        ("bias[h, n - m + 299]", (6, 599)),
        ("2*bias[m, n]", (300, 300)),
        ("bias[b, (m*n) % 7]", (4, 7)),
    ],
)
def test_gradients_of_scores_leave_the_kernel_in_parts(
    text: str, size: tuple[int, ...], calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some batches, heads and rows at a time."""
    monkeypatch.setattr(work, "GRADIENT_CELLS", 1 << 17)
    bias, given = floats(*size), ", ".join(":" * len(size))
    call = made(
        f"bias: f32[{given}]; s*0.25 + {text} where n <= m + 20 else =min", Shape(4, 6, 2, 300, 300, 16, 16), (bias,)
    )
    hold_to_oracle(call)
    assert calls["forward"] <= 2
    assert calls["backward"] >= 12


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("added", [40.0, -300.0, 1e5, -1e9, 3e30, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("mask", ["where n <= m + 20 else -inf", "where some[b, n] else -inf"])
def test_gradients_where_a_log_sum_exp_has_few_digits(
    mask: str, added: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows to all of whose keys something large is added, beside others."""
    bias = floats(2, 150)
    bias[:, ::3] += added
    some = torch.rand(2, 170, generator=torch.Generator().manual_seed(0)) < 0.7
    given = ("bias: f32[:, :]; some: bool[:, :]; ", (bias, some)) if "some" in mask else ("bias: f32[:, :]; ", (bias,))
    monkeypatch.setattr(plain_step, "backward", None)
    hold_to_oracle(made(f"{given[0]}s*0.25 + bias[h, m] {mask}", Shape(2, 2, 1, 150, 170, 16, 16), given[1], dtype))


@served
@pytest.mark.parametrize("text", ["bias[h, n]", "bias[h, m]", "bias[h, m % 5 + n % 5]"])
def test_few_gradients_of_scores_are_in_memory(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mask of keys too, where one mask would serve all rows."""
    sizes: list[int] = []
    backward = native.backward

    def watched(*args: Any, dscores: Tensor, **named: Any) -> None:
        sizes.append(dscores.numel())
        backward(*args, dscores=dscores, **named)

    monkeypatch.setattr(native, "backward", watched)
    monkeypatch.setattr(work, "GRADIENT_CELLS", 1 << 17)
    some = torch.rand(1, 500, generator=torch.Generator().manual_seed(0)) < 0.7
    call = made(
        f"bias: f32[:, :]; some: bool[:, :]; s*0.125 + {text} where some[b, n] else =min",
        Shape(1, 4, 2, 500, 500, 16, 16),
        (floats(4, 9 if "%" in text else 500), some),
    )
    hold_to_oracle(call)
    assert 0 < max(sizes) <= 2 * work.GRADIENT_ROWS * 500


@served
def test_scores_without_a_bias_have_no_gradients_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leaf is read where the mask allows nothing."""
    monkeypatch.setattr(work.Gradients, "add_of_scores", None)
    pad = torch.arange(90)[None] < 70
    call = made(
        "bias: f32[:, :]; pad: bool[:, :]; where(pad[b, n], s*0.25, bias[m, n]) where pad[b, n] else -inf",
        Shape(1, 2, 2, 80, 90, 16, 16),
        (floats(80, 90), pad),
    )
    hold_to_oracle(call)


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.25, -0.25])
@pytest.mark.parametrize("factor", [10.0, 100.0, 1e4, 1e6])
def test_large_scores(factor: float, scale: float, dtype: torch.dtype) -> None:
    """The rounding of a score is the same wherever it is compared; weights are those of the greatest."""
    call = made(f"s*({scale}) where n <= m else =min", Shape(1, 2, 1, 70, 70, 16, 16), (), dtype)
    call = call._replace(q=(call.q * factor).detach(), k=(call.k * factor).detach())
    out, lse = call.run()
    exact, exact_lse = reference(call.spec, call.q, call.k, call.v, ())
    original, original_lse = reference(call.spec, call.q, call.k, call.v, (), dtype=torch.float32)
    assert_close(out, original.to(dtype), exact)
    assert_close(lse, original_lse, exact_lse)


@served
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("text", "unseen"),
    [
        ("pos: i64[:]; s*0.25 where n <= pos[m] else -inf", [101, 200, 255]),
        ("s*0.25 where n <= m + 3 & n > m - 9 else -inf", [103, 104, 105]),
        ("s*0.25 where n < 35 else -inf", [35, 36, 47]),
        ("s*0.25 where n >= 37 else -inf", [0, 35, 36]),
    ],
)
def test_keys_that_no_row_sees_may_hold_anything(text: str, unseen: list[int], dtype: torch.dtype) -> None:
    """As those of a cache that is filled in part."""
    rows = 96 if "pos" not in text and "m + 3" in text else 3
    leaves = (torch.tensor([40, 100, 99]),) if "pos" in text else ()
    call = made(text, Shape(1, 2, 2, rows, 256, 16, 16), leaves, dtype)
    k, v = call.k.detach().clone(), call.v.detach().clone()
    k[:, :, unseen] = v[:, :, unseen] = torch.nan
    dirty = call._replace(k=k.requires_grad_(), v=v.requires_grad_())
    out, lse = dirty.run()
    expected, expected_lse = call.run()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    (found,), (clean,) = (torch.autograd.grad(x.sum(), c.q) for x, c in ((out, dirty), (expected, call)))
    assert torch.equal(found, clean)


@served
def test_infinite_scores() -> None:
    """A row with a score of +inf has that as its log-sum-exp, and is NaN."""
    q, k, v = (torch.randn(1, 1, 70, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(1, 1, 70)
    bias = torch.zeros(1, 1, 70, 70)
    bias[..., 3, 9] = torch.inf
    native.forward(q, k, v, out, lse, Score(0.25, bias=Cells.of(bias)), Keys(0, 70))
    assert lse[0, 0, 3] == torch.inf
    assert out[0, 0, 3].isnan().all()
    assert out[0, 0, 4:].isfinite().all()


@served
@pytest.mark.parametrize("stride", [1 << 20, (1 << 27) + 64])
def test_keys_far_apart(stride: int) -> None:
    """As in a cache whose first axis is the sequence."""
    # pages that nothing touches take no memory
    storage = torch.empty(18 * stride, dtype=torch.bfloat16)
    k = storage.as_strided((1, 1, 18, 16), (0, 0, stride, 1))
    k.copy_(torch.randn(1, 1, 18, 16, generator=torch.Generator().manual_seed(0)))
    q = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for keys in (k, k.contiguous()):
        out, lse = torch.empty_like(q), torch.empty(1, 1, 64)
        native.forward(q, keys, keys, out, lse, Score(0.25), Keys(0, 18))
        results.append((out, lse))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@served
def test_rows_of_many_documents_are_one_call(calls: Counter[str]) -> None:
    shape = Shape(1, 2, 2, 400, 400, 16, 16)
    doc = (torch.arange(400) // 9)[None]
    call = made("doc: i64[:, :]; s where n <= m & doc[b, m] == doc[b, n] else -inf", shape, (doc,))
    torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
    assert calls == {"forward": 1, "backward": 1}
    hold_to_oracle(call)


_built_otherwise = cache(native._library.__wrapped__)


@pytest.fixture
def otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that multiply bfloat16 in pairs where those of this machine do not, and the other way round."""
    on = native.processor()
    assert on is not None
    monkeypatch.setattr(native, "processor", lambda: on._replace(pairs=not on.pairs))
    monkeypatch.setattr(native, "_library", _built_otherwise)


@served
@pytest.mark.skipif(
    "avx512_bf16" not in native._facts().get("flags", ""), reason="no instructions for pairs of bfloat16"
)
@pytest.mark.usefixtures("otherwise")
@pytest.mark.parametrize("name", TEXTS)
def test_the_other_products_of_bfloat16(name: str) -> None:
    for shape in SHAPES if "dropout" not in name else SHAPES[:2]:
        hold_to_oracle(call_of(name, shape, torch.bfloat16))


@served
@pytest.mark.parametrize("heads", [3, 4, 8, 9, 16, 17])
def test_heads_apart_and_together(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads take heads of their own where each has as many, or at least eight; two threads here."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for dtype in DTYPES:
        hold_to_oracle(made("s*0.25 where n <= m else =min", Shape(1, 2 * heads, heads, 100, 130, 16, 16), (), dtype))


@served
@pytest.mark.parametrize(
    ("dtype", "H", "M", "ours"), [("f32", 2, 63, 0), ("f32", 4, 32, 1), ("bf16", 2, 15, 0), ("bf16", 2, 16, 1)]
)
def test_few_rows_are_left_to_pytorchs_kernel(
    dtype: str, H: int, M: int, ours: int, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where fewer than 64 read the keys of a KV head in float32, 16 in narrower types."""
    monkeypatch.setattr(native, "_has_rows", has_rows)
    on = native.processor()
    assert on is not None
    monkeypatch.setattr(native, "processor", lambda: on._replace(fewest_rows=(64, 16)))
    call = made("s*0.125", Shape(1, H, 2, M, 300, 16, 16), (), torch.float32 if dtype == "f32" else torch.bfloat16)
    call.run()
    assert calls["forward"] == ours
    hold_to_oracle(call)


@served
@pytest.mark.parametrize("on", [native.AMD, native.INTEL], ids=lambda on: on.name)
def test_float16_stays_what_it_is_for_our_kernel(on: native.Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is converted for the library's where that is slow in it; here each block of rows is a call."""
    monkeypatch.setattr(native, "_has_rows", has_rows)
    monkeypatch.setattr(native, "processor", lambda: on)
    monkeypatch.setattr(native, "multiplies_float16", lambda: False)
    types: set[torch.dtype] = set()
    run = native.forward

    def seeing(q: Tensor, *args: Any) -> None:
        types.add(q.dtype)
        run(q, *args)

    monkeypatch.setattr(native, "forward", seeing)
    for text in ("s*0.125 where (n - m) % 3 == 0 else =min", "s*0.125 where n <= m else =min"):
        hold_to_oracle(made(text, Shape(1, 4, 2, 300, 300, 16, 16), (), torch.float16))
    assert types == {torch.float16}


def test_without_a_compiler_pytorchs_kernels_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a compiler's output\nx.cpp:1: error: no AVX-512")

    cached = native._library, native._is_built, native.differentiates
    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(native, "is_faster_in", lambda dtype: True)
    for function in cached:
        function.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "attnfuse"):
            assert not native.serves(torch.float32, 100)
            assert not native.differentiates(torch.float32)
        assert "could not be built" in caplog.text
        assert "error: no AVX-512" in caplog.text
        assert "could not be built" in native.about()
        hold_to_oracle(made("s*0.125 where n <= m else -inf", SHAPES[0]))
    finally:
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "flags", "features", "expected"),
    [
        ("AuthenticAMD", "avx512f", {"avx512"}, DTYPES),
        ("AuthenticAMD", "avx512f", {"avx512", "amx_tile"}, (torch.float32, torch.float16)),
        ("AuthenticAMD", "avx512f", {"avx512", "amx_tile", "amx_fp16"}, (torch.float32,)),
        ("AuthenticAMD", "avx2", set(), ()),
        ("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", {"avx512"}, DTYPES),
        ("GenuineIntel", "avx512f avx512_fp16 amx_tile", {"avx512", "amx_tile"}, (torch.float32, torch.float16)),
        ("GenuineIntel", "avx512f avx512_bf16", {"avx512"}, ()),
        ("GenuineIntel", "avx512_fp16", set(), ()),
        ("", "avx512f avx512_fp16", {"avx512"}, ()),
    ],
)
def test_processors(
    vendor: str, flags: str, features: set[str], expected: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_facts", lambda: {"vendor_id": vendor, "flags": flags})
    monkeypatch.setattr(native, "has", lambda feature: feature in features)
    monkeypatch.setattr(native, "_has_rows", has_rows)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(native, "processor", native.processor.__wrapped__)
    monkeypatch.setattr(native, "is_faster_in", native.is_faster_in.__wrapped__)
    assert tuple(dtype for dtype in (*DTYPES, torch.float64) if native.is_faster_in(dtype)) == expected
    name = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}.get(vendor, "")
    for dtype in DTYPES:
        assert native.suits(dtype, 1000, 1000 * 1000, 1) == (name if dtype in expected else "")


@pytest.mark.parametrize(
    ("on", "dtype", "rows", "scores", "heads", "suits"),
    [
        (native.AMD, torch.float32, 48, 1, 1, True),
        (native.AMD, torch.float32, 47, 1 << 20, 1, False),
        (native.AMD, torch.bfloat16, 1, 1, 1, True),
        (native.INTEL, torch.float32, 1000, 128 * 128, 16, False),
        (native.INTEL, torch.float32, 1000, 128 * 128, 17, True),
        (native.INTEL, torch.float32, 48, 128 * 128 + 1, 1, True),
        (native.INTEL, torch.float32, 47, 1 << 20, 100, False),
        (native.INTEL, torch.bfloat16, 16, 1, 1, True),
        (native.INTEL, torch.float16, 15, 1 << 20, 1, False),
    ],
)
def test_sizes(
    on: native.Processor,
    dtype: torch.dtype,
    rows: int,
    scores: int,
    heads: int,
    suits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "processor", lambda: on)
    monkeypatch.setattr(native, "is_faster_in", lambda dtype: True)
    monkeypatch.setattr(native, "_has_rows", has_rows)
    assert native.suits(dtype, rows, scores, heads) == (on.name if suits else "")
