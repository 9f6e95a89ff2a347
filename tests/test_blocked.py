"""The CPU template against the oracle: spec families by type and shape, random programs by block size, what is read and kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnfuse.ops  # noqa: F401  (defines the operators)
from attnfuse.reference import attention as reference
from attnfuse.spec import Shape
from attnfuse.templates import cover, dropout, flash_kernel, flash_step, native, plain_step
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.blocked import Blocked
from tests.families import (
    FAMILIES,
    LAYOUTS,
    SEED,
    SHAPES,
    Call,
    Leaves,
    floats,
    hold_to_oracle,
    in_types,
    made,
    scattered,
    values_of,
)
from tests.numerics import assert_close
from tests.strategies import Case, cases


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("text", "leaves"), FAMILIES.values(), ids=FAMILIES.keys())
def test_families_fp32(text: str, leaves: Leaves, shape: Shape) -> None:
    hold_to_oracle(made(text, shape, leaves(shape)))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("text", "leaves", "dtype"), in_types(FAMILIES, torch.bfloat16, torch.float16, torch.float64))
def test_families_in_other_types(text: str, leaves: Leaves, dtype: torch.dtype) -> None:
    shape = SHAPES["grouped"]
    hold_to_oracle(made(text, shape, leaves(shape), dtype))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", ["causal", "left padding", "nested", "softcap", "dense bias", "sinks", "dropout"])
def test_the_log_sum_exp_is_differentiable(name: str) -> None:
    text, leaves = FAMILIES[name]
    shape = SHAPES["grouped"]
    hold_to_oracle(made(text, shape, leaves(shape)), with_lse=True)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dense bias", "infinite bias", "two dimensions", "diagonals", "relative"])
def test_biases_of_more_rows_than_a_block(name: str, dtype: torch.dtype) -> None:
    """Up to a block of rows the library's kernel may be called once, for a bias of all cells."""
    text, leaves = FAMILIES[name]
    shape = Shape(2, 4, 2, 300, 270, 16, 16)
    hold_to_oracle(made(text, shape, leaves(shape), dtype))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [100, 200, 256, 300])
@pytest.mark.parametrize("bias", ["bias[m, n]", "bias[h, n]", "bias[b, h, m, n]"])
def test_rows_without_a_finite_score_below_a_diagonal(bias: str, rows: int) -> None:
    """NaN, whatever the bias above it is."""
    axes = bias.removeprefix("bias[").rstrip("]").split(", ")
    size = {"b": 2, "h": 4, "m": rows, "n": rows}
    x = floats(*(size[axis] for axis in axes))
    x[..., :6] = -torch.inf
    text = f"bias: f32[{', '.join(':' for _ in axes)}]; s*0.125 + {bias} where n <= m else -inf"
    call = made(text, Shape(2, 4, 2, rows, rows, 16, 16), (x,))
    out, lse = call.run()
    assert out[:, :, :6].isnan().all()
    assert (lse[:, :, :6] == -torch.inf).all()
    exact, original = (
        reference(call.spec, call.q, call.k, call.v, call.leaves, dtype=dtype)[0][:, :, 6:]
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(out[:, :, 6:], original, exact)
    (dq,) = torch.autograd.grad(out.sum(), call.q)
    assert dq[:, :, :6].isnan().all()
    assert dq[:, :, 6:].isfinite().all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["dense", "sparse"])
@pytest.mark.parametrize("tier", ["", " where bias[b, m, n] != -inf else 0row"])
def test_a_bias_that_is_given_for_all_cells(
    tier: str, share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of the library's kernel, unless its -inf leave out whole tiles; larger than the call, and with rows of -inf."""
    calls: list[int] = []
    kernel = flash_kernel._FORWARD

    def run(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(q.shape[2])
        return kernel(q, *args, **kwargs)

    monkeypatch.setattr(flash_kernel, "_FORWARD", run)
    x = floats(2, 700, 720)
    x[:, :, int(640 * (1 - share)) : 640] = -torch.inf
    x[1, 40] = -torch.inf
    call = made(f"bias: f32[:, :, :]; s*0.125 + bias[b, m, n]{tier}", Shape(2, 4, 2, 650, 640, 16, 16), (x,), dtype)
    call.run()
    assert (calls == [650]) == (not tier or not share)
    torch.autograd.grad(call.run()[0].nan_to_num().sum(), (call.q, call.k, call.v))
    hold_to_oracle(call)


@pytest.mark.usefixtures("library")
def test_a_bias_of_few_rows_is_one_call_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients too, unless the log-sum-exp has too few digits."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        kernel = getattr(flash_kernel, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return kernel(*args, **kwargs)

        return run

    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(flash_kernel, name, counting(name))
    shape = Shape(2, 4, 2, 200, 270, 16, 16)
    for offset, expected in ((0.0, ["_FORWARD", "_BACKWARD"]), (-1e4, ["_FORWARD"])):
        calls.clear()
        call = made("bias: f32[:, :]; s*0.125 + bias[m, n]", shape, (floats(200, 270) + offset,))
        torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v))
        assert calls == expected
        # the leaf asks for no gradient here, and does there
        hold_to_oracle(call)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("fast", [True, False])
def test_a_type_that_the_kernel_is_slow_in(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Operands are converted, in bands of blocks and in one piece, and results are those of the type."""
    types: set[torch.dtype] = set()

    def seeing(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            types.update(x.dtype for x in args[: 4 if kernel is backward else 3] if isinstance(x, Tensor))
            return kernel(*args, **kwargs)

        return run

    backward = flash_kernel._BACKWARD
    monkeypatch.setattr(flash_kernel, "_FORWARD", seeing(flash_kernel._FORWARD))
    monkeypatch.setattr(flash_kernel, "_BACKWARD", seeing(backward))
    monkeypatch.setattr(native, "multiplies_float16", lambda: fast)
    for text in ("s*0.125", "s*0.125 where n <= m & n > m - 60 else -inf", "s*0.125 + 0.25*m where n < m else =min"):
        types.clear()
        hold_to_oracle(made(text, Shape(2, 4, 2, 400, 400, 16, 16), (), torch.float16))
        assert types == {torch.float16 if fast else torch.float32}


@pytest.mark.usefixtures("kernel")
def test_sizes_of_the_call() -> None:
    shape = SHAPES["short"]
    hold_to_oracle(made("s*0.125 where n <= m + i0 & n > m + i0 - i1 else -inf", shape, sizes=(30, 20)))
    hold_to_oracle(made("s*0.125/float(N) where n <= m + i0 else -inf", shape, sizes=(30,)))


@contextmanager
def blocks(rows: int, cells: int) -> Iterator[None]:
    """Blocks of that many rows, tiles of that many cells, in both inner steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_step, "rows_of_block", lambda shape: rows)
        patch.setattr(plain_step, "BLOCK_CELLS", cells)
        patch.setattr(flash_step, "_ROWS", rows)
        patch.setattr(flash_step, "_ROWS_OF_RECTANGLE", 2 * rows)
        patch.setattr("attnfuse.templates.degenerate.BLOCK_CELLS", cells)
        patch.setattr(cover, "_SEGMENTS", 3)
        yield


@pytest.mark.usefixtures("library")
@given(cases(), st.sampled_from(((3, 16), (4, 60), (64, 1 << 20))))
@settings(max_examples=120)
def test_random_programs_in_blocks_of_any_size(case: Case, size: tuple[int, int]) -> None:
    cover.index_rows.cache_clear()
    with blocks(*size):
        hold_to_oracle(values_of(case))


@pytest.mark.parametrize("text", ["dropout 0.4; s", "dropout 0.4; 5*tanh(s/5) where n <= m else -inf"])
def test_the_dropout_mask_does_not_depend_on_blocks(text: str) -> None:
    shape = Shape(2, 4, 2, 50, 61, 8, 61)
    call = made(text, shape)
    eye = torch.eye(61).expand(2, 2, 61, 61)
    kept = dropout.keep(SEED, 0.4, (2, 4, 50, 61))
    for rows, cells in ((7, 100), (16, 5000), (64, 1 << 20)):
        with blocks(rows, cells):
            weights, _ = call._replace(v=eye).run()
        assert not weights[~kept].any(), "a dropped weight was used"
        allowed = weights.new_ones(50, 61).tril().bool() if "where" in text else weights.new_ones(50, 61).bool()
        assert (weights != 0)[kept & allowed].all(), "a kept weight was dropped"


def test_dropout_is_random_in_every_direction() -> None:
    p, size = 0.3, (2, 4, 256, 512)
    x = dropout.keep(SEED, p, size).double() - (1 - p)
    variance = p * (1 - p)

    def deviation(product: Tensor, power: int) -> float:
        return abs(float(product.sum())) / (variance ** (power / 2) * product.numel() ** 0.5)

    assert deviation(x, 1) < 4
    neighbours = [x[1:] * x[:-1], x[:, 1:] * x[:, :-1], x[..., 1:, :] * x[..., :-1, :], x[..., 1:] * x[..., :-1]]
    squares = x[..., 1:, 1:] * x[..., 1:, :-1] * x[..., :-1, 1:] * x[..., :-1, :-1]
    assert [deviation(y, 2) < 4 for y in neighbours] == [True] * 4
    assert deviation(squares, 4) < 4
    other = dropout.keep(SEED + 1, p, size).double() - (1 - p)
    assert deviation(x * other, 2) < 4


@pytest.mark.parametrize(("p", "rate"), [(0.0, 0.0), (1e-3, 1e-3), (0.5, 0.5), (0.999, 0.999)])
def test_dropout_rates(p: float, rate: float) -> None:
    dropped = 1 - dropout.keep(SEED, p, (1, 8, 512, 512)).double().mean().item()
    assert dropped == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 2**21) ** 0.5)


@pytest.mark.parametrize(
    "text", ["s", "s where n <= m else -inf", "5*tanh(s/5)", "sinks: f32[:]; s sink sinks[h]", "dropout 0.5; s"]
)
@pytest.mark.parametrize("empty", ["B", "M", "N", "D", "Dv"])
def test_nothing_of_one_size(text: str, empty: str) -> None:
    shape = Shape(2, 4, 2, 5, 6, 8, 8)._replace(**{empty: 0})
    call = made(text, shape, (torch.zeros(4),) if "sinks" in text else ())
    out, lse = call.run()
    assert out.shape == (shape.B, 4, shape.M, shape.Dv)
    assert lse.shape == (shape.B, 4, shape.M)
    if empty == "N":
        assert not out.any()
        assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (call.q, call.k, call.v))
    assert [g.shape for g in grads] == [call.q.shape, call.k.shape, call.v.shape]
    assert not any(g.isnan().any() for g in grads)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (3, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("text", ["s where n <= m else -inf", "5*tanh(s/5) where n <= m else -inf"])
def test_layouts(text: str, layout: Callable[[Tensor], Tensor], order: tuple[int, ...]) -> None:
    plain = made(text, Shape(2, 4, 2, 20, 20, 8, 8))
    q, k, v = (layout(x.detach()).requires_grad_() for x in (plain.q, plain.k, plain.v))
    call = plain._replace(q=q, k=k, v=v, order=order)
    out, lse = call.run()
    for x in (out, lse.unsqueeze(-1)):
        assert x.permute(order if x is out else (0, 1, 2, 3)).is_contiguous()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.permute(order).is_contiguous()
    hold_to_oracle(call)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["causal", "left padding", "alibi", "window"])
def test_grouped_heads_where_the_kernel_does_not_take_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert flash_kernel.takes_groups(), (
        "torch 2.11 to 2.13 take them; if a newer one does not, the plain step serves it"
    )
    monkeypatch.setattr(flash_kernel, "takes_groups", lambda: False)
    monkeypatch.setattr(flash_kernel, "_FORWARD", None)
    text, leaves = FAMILIES[name]
    hold_to_oracle(made(text, SHAPES["grouped"], leaves(SHAPES["grouped"])))


def test_types_of_values_differ_from_those_of_scores() -> None:
    for v_dtype in (torch.bfloat16, torch.float64):
        call = made("s*0.125 where n <= m else -inf", SHAPES["grouped"])
        call = call._replace(v=call.v.detach().to(v_dtype).requires_grad_())
        out, lse = call.run()
        assert (out.dtype, lse.dtype) == (v_dtype, torch.float32)
        exact, _ = reference(call.spec, call.q, call.k, call.v, ())
        tolerance = 2 * torch.finfo(torch.bfloat16 if v_dtype == torch.bfloat16 else torch.float32).eps
        assert (out.double() - exact).abs().max() < tolerance * exact.abs().max()


# --- what is computed ------------------------------------------------------------------------------------------------


def poisoned(x: Tensor, where: Tensor) -> Tensor:
    """NaN in the keys [b, n] that must not be read."""
    return x.detach().masked_fill(where[:, None, :, None], torch.nan)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("score", ["s*0.125", "5*tanh(s/5)", "s*0.125 + n*0.01"])
@pytest.mark.parametrize(
    ("mask", "unread"),
    [
        ("n <= m & n >= 40", lambda n: n < 40),
        ("n < 70", lambda n: n >= 70),
        ("n // 32 == 1", lambda n: (n < 32) | (n >= 64)),
        ("pad[b, n]", lambda n: (n < 30) | (n >= 90)),
        ("n <= m & pad[b, n] & m >= 30", lambda n: (n < 30) | (n >= 90)),
        ("n < stop[b]", lambda n: n >= 50),
    ],
)
def test_keys_that_the_mask_excludes_are_not_read(score: str, mask: str, unread: Callable[[Tensor], Tensor]) -> None:
    shape = Shape(2, 4, 2, 128, 128, 8, 8)
    excluded = unread(torch.arange(128)).expand(2, 128)
    declared = "pad: bool[:, :]; " if "pad" in mask else "stop: i64[:]; " if "stop" in mask else ""
    leaves = () if not declared else (~excluded,) if "pad" in mask else (torch.tensor([50, 50]),)
    call = made(f"{declared}{score} where {mask} else 0row", shape, leaves)
    k, v = (poisoned(x, excluded).requires_grad_() for x in (call.k, call.v))
    out, _ = call._replace(k=k, v=v).run()
    assert out.isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (call.q, k, v))
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.usefixtures("library")
def test_packed_documents_are_computed_one_by_one() -> None:
    """Blocks see only the keys that some row of theirs may look at, in the forward and in the backward."""
    shape = Shape(1, 2, 2, 1024, 1024, 8, 8)
    doc = (torch.arange(1024) // 128)[None]
    for score in ("s*0.125", "5*tanh(s/5)"):
        call = made(f"doc: i64[:, :]; {score} where n <= m & doc[b, m] == doc[b, n] else -inf", shape, (doc,))
        with Largest() as seen:
            forward_and_backward(call)
        # the mask itself is looked at for a block of rows and all keys before it
        assert seen.floats <= 2 * 128 * 128


def forward_and_backward(call: Call) -> None:
    """What the operator does for both: a dispatch mode sees nothing of what goes on inside of an operator."""
    q, k, v, *leaves = (x.detach() for x in (call.q, call.k, call.v, *call.leaves))
    inputs = Inputs(call.spec, str(call.spec), call.shape, q, k, v, leaves, call.sizes, None, call.order)
    out, lse = Blocked().forward(inputs)
    needs = (True,) * 3 + (False,) * len(leaves)
    Blocked().backward(inputs, Cotangents(out, lse, torch.ones_like(out), None, needs))


class Largest(TorchDispatchMode):
    """The greatest number of elements of a tensor that any operator made, of all types and of floating-point ones."""

    def __init__(self) -> None:
        super().__init__()
        self.any = self.floats = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.any = max(self.any, x.numel())
                self.shapes.add(tuple(x.shape))
                if x.is_floating_point() and not func.is_view:
                    self.floats = max(self.floats, x.numel())
        return out


MEMORY = {
    "causal": "s*0.125 where n <= m else +min",
    "padded": "pad: bool[:, :]; s*0.125 where n <= m & pad[b, n] else +min",
    "window": "s*0.125 where n <= m & n > m - 512 else +min",
    "softcap": "5*tanh(s/5) where n <= m else -inf",
    "alibi": "slope: f32[:]; s*0.125 + slope[h]*n where n <= m else -inf",
    "dropout": "dropout 0.1; s*0.125 where n <= m else +min",
}


@cache
def dense_peaks() -> tuple[int, int]:
    """Peak memory of dense attention at length 4096, forward and both ways, with the shapes of `peaks`."""
    q, k, v = (torch.randn(1, 2, 4096, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(4096, 4096, dtype=torch.bool).tril()

    def run() -> Tensor:
        return (q @ k.mT * 0.125).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    with torch.no_grad():
        forward = peak_bytes(run)
    return forward, peak_bytes(lambda: torch.autograd.grad(run().sum(), (q, k, v)))


def peaks(text: str, length: int) -> tuple[int, int]:
    pad = torch.arange(length)[None] >= length // 8
    leaves = (pad,) if "pad" in text else (torch.rand(2).requires_grad_(),) if "slope" in text else ()
    call = made(text, Shape(1, 2, 1, length, length, 16, 16), leaves)
    forward = peak_bytes(lambda: call.run()[0].detach())
    return forward, peak_bytes(lambda: torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v)))


@pytest.mark.parametrize("text", MEMORY.values(), ids=MEMORY.keys())
def test_peak_memory_is_at_most_an_eighth_of_dense_attention(text: str) -> None:
    for ours, dense in zip(peaks(text, 4096), dense_peaks(), strict=True):
        assert ours <= dense / 8


@pytest.mark.parametrize("name", ["padded", "softcap"])
def test_peak_memory_is_linear(name: str) -> None:
    for short, long in zip(peaks(MEMORY[name], 1024), peaks(MEMORY[name], 4096), strict=True):
        assert long <= 5 * short


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that the CPU's allocator holds at one time during a call, what it holds before left out."""
    run()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert profile.profiler is not None
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    assert changes, "the profiler recorded no memory"
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("text", ["s*0.125", "5*tanh(s/5)", "pad: bool[:, :]; s*0.125 where pad[b, n] else +min"])
def test_grouped_heads_are_never_expanded(text: str) -> None:
    shape = Shape(1, 32, 2, 4, 512, 16, 16)
    call = made(text, shape, (scattered(1, 512),) if "pad" in text else ())
    with Largest() as seen:
        forward_and_backward(call)
    assert seen.any < shape.H * shape.N * shape.D
