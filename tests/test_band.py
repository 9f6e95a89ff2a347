"""Sliding windows that are computed over offsets: what is the same as queries against keys is fused and right, what differs in one
fact stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import check, randn, verdict

B, H, M, D, W = 2, 3, 24, 4, 4
BANDS: list[Any] = []
LEFT: list[Any] = []


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and which keys are padding."""
    q, k, v = (randn(B, H, M, D, seed=seed).to(dtype) for seed in (1, 2, 3))
    return q, k, v, torch.arange(M) >= torch.tensor([[M], [M - 9]])


def band(spec: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of `given()` that is one attention."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        BANDS.append(pytest.param(fn, spec, id=fn.__name__))
        return fn

    return register


def left(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a near miss."""
    LEFT.append(pytest.param(fn, id=fn.__name__))
    return fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fn", "spec"), BANDS)
def test_bands(fn: Callable[..., Any], spec: str, dtype: torch.dtype) -> None:
    (remark,) = check(fn, *given(dtype)).remarks
    assert verdict(remark) == spec


@pytest.mark.parametrize("fn", LEFT)
def test_left(fn: Callable[..., Any]) -> None:
    """Beside an attention that is fused, so that the graph is rewritten."""

    def beside(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Any:
        return fn(q, k, v, pad), (q @ k.mT).tanh().softmax(-1) @ v

    first, second = check(beside, *given()).remarks
    assert first.kind == "missed"
    assert second.code == "AF000"


@torch.library.custom_op("attnfuse_tests::shifted", mutates_args=())
def shifted(rows: int, offsets: int) -> Tensor:
    """What an operator of somebody else's gives is known when it runs."""
    return (torch.arange(offsets) < SHIFT).expand(rows, offsets).clone()


@shifted.register_fake
def _(rows: int, offsets: int) -> Tensor:
    return torch.empty(rows, offsets, dtype=torch.bool)


SHIFT = 0


# Windows, read by each query


def windows(x: Tensor, before: int = W, after: int = W, fill: float = 0.0, step: int = 1) -> Tensor:
    """[B, H, M, D, J]: the keys that each query sees."""
    padded = torch.nn.functional.pad(x, (0, 0, before, after), value=fill)
    return padded.unfold(2, before + after + 1, step)


def outside(before: int = W, after: int = W, shift: int = 0) -> Tensor:
    """[M, J]: offsets at which there is no key."""
    key = torch.arange(M)[:, None] + torch.arange(before + after + 1) - before + shift
    return (key < 0) | (key >= M)


def scores(q: Tensor, k: Tensor, scale: float = 0.5) -> Tensor:
    return torch.einsum("bhmd,bhmdj->bhmj", q, k) * scale


def sums(w: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhmj,bhmdj->bhmd", w, v)


@band("s*0.5 where abs(n - m) <= 4 else -inf")
def each_query_reads_its_window(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sums(scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1), windows(v))


@band("s*0.5 where n >= m - 4 & n <= m else -inf")
def only_what_was_before(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    w = torch.where(outside(W, 0), -torch.inf, scores(q, windows(k, W, 0))).softmax(-1)
    return sums(w, windows(v, W, 0))


@band("s*0.5 where abs(n - m) <= 4 else -inf")
def offsets_the_other_way_round(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    w = scores(q, windows(k).flip(-1)).masked_fill(outside().flip(-1), -torch.inf).softmax(-1)
    return sums(w.flip(-1), windows(v))


@band("pad: bool[:, :]; s*0.5 where ~pad[b, n] else +min where abs(n - m) <= 4 else -inf")
def padding_in_windows_of_its_own(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    added = torch.zeros(B, 1, M, 1, dtype=q.dtype).masked_fill(pad[:, None, :, None], torch.finfo(q.dtype).min)
    x = scores(q, windows(k)) + windows(added)[:, :, :, 0]
    return sums(x.masked_fill(outside(), -torch.inf).softmax(-1), windows(v))


@left
def values_of_the_next_key(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sums(scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1), windows(v, W - 1, W + 1))


@left
def a_mask_one_further(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The first row sees a key of zeros, which has a weight."""
    return sums(scores(q, windows(k)).masked_fill(outside(shift=1), -torch.inf).softmax(-1), windows(v))


@left
def keys_of_padding_leak(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sums(scores(q, windows(k)).softmax(-1), windows(v))


@left
def offsets_of_the_values_the_other_way_round(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sums(scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1), windows(v).flip(-1))


@left
def weights_that_something_else_reads(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
    w = scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1)
    return sums(w, windows(v)), w


@left
def scores_that_something_else_reads(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
    x = scores(q, windows(k))
    return sums(x.masked_fill(outside(), -torch.inf).softmax(-1), windows(v)), x


@left
def keys_without_a_gradient(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    with torch.no_grad():
        x = scores(q, windows(k)).masked_fill(outside(), -torch.inf)
    return sums((x + 0 * q[..., :1]).softmax(-1), windows(v))


@left
def a_bias_by_offset(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    x = scores(q, windows(k)) + v[0, 0, : 2 * W + 1, 0]
    return sums(x.masked_fill(outside(), -torch.inf).softmax(-1), windows(v))


@left
def heads_of_the_values_in_another_order(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return sums(scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1), windows(v.flip(1)))


@left
def a_mask_of_data(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    hidden = outside() | (q[0, 0, :, :1] > 0)
    return sums(scores(q, windows(k)).masked_fill(hidden, -torch.inf).softmax(-1), windows(v))


# Chunks of 2 W keys, which overlap by W


def chunks(x: Tensor, size: int) -> Tensor:
    """[B·H, chunks, size, D], the next one W rows further."""
    x = x.flatten(0, 1).contiguous()
    return x.as_strided(
        (B * H, (x.shape[1] - size) // W + 1, size, x.shape[2]), (x.stride(0), W * x.stride(1), *x.stride()[1:])
    )


def diagonals(square: Tensor) -> Tensor:
    """Column j of row r is what stood j columns right of the diagonal, or of the row before it."""
    count, rows = square.shape[1], square.shape[2]
    return torch.nn.functional.pad(square, (0, 0, 0, 1)).view(B * H, count, rows, rows + 1)


def assembled(square: Tensor, corner: bool = True) -> Tensor:
    """[B, H, M, 2 W + 1] of the products of chunks.

    Args:
        corner: whether what the first rows see before them is moved too.
    """
    moved = diagonals(square)
    out = moved.new_zeros(B * H, M // W, W, 2 * W + 1)
    out[:, :-1, :, W:] = moved[:, :, :W, : W + 1]
    out[:, -1, :, W:] = moved[:, -1, W:, : W + 1]
    out[:, 1:, :, :W] = moved[:, :, -W - 1 : -1, W + 1 :]
    if corner:
        out[:, 0, 1:, 1:W] = moved[:, 0, : W - 1, 1 - W :]
    return out.view(B, H, M, 2 * W + 1)


def spread(w: Tensor) -> Tensor:
    """[B·H, M/W, W, 3 W]: the weights of each row over the keys of the three blocks around it."""
    w = torch.nn.functional.pad(w.reshape(B * H, M // W, W, 2 * W + 1), (0, W + 1))
    return w.flatten(2)[..., :-W].unflatten(2, (W, 3 * W + 1))[..., :-1]


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    fill: float = -1.0,
    blank: bool = True,
    corner: bool = True,
    drop: float = 0.0,
    first: int = W,
) -> Callable[..., Tensor]:
    """The attention, from what is done to its scores and its weights."""

    def attention(
        on_scores: Callable[[Tensor], Tensor] = lambda x: x, on_weights: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        x = assembled(torch.einsum("bcxd,bcyd->bcxy", chunks(q * 0.5, 2 * W), chunks(k, 2 * W)), corner)
        if blank:
            x[:, :, :W] = x[:, :, :W].masked_fill(outside()[:W], -torch.inf)
            x[:, :, -W:] = x[:, :, -W:].masked_fill(outside()[-W:], -torch.inf)
        w = on_weights(on_scores(x).softmax(-1, dtype=torch.float32)).type_as(x)
        if drop:
            w = torch.nn.functional.dropout(w, drop)
        padded = torch.nn.functional.pad(v, (0, 0, first, 2 * W - first), value=fill)
        out = torch.einsum("bcxy,bcyd->bcxd", spread(w), chunks(padded, 3 * W))
        return out.view(B, H, M, D).transpose(1, 2)

    return attention


@band("s where abs(n - m) <= 4 else -inf")
def products_of_chunks(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return chunked(q, k, v)()


@band("s where abs(n - m) <= 4 else -inf")
def rows_of_padding_are_zero(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return chunked(q, k, v)(on_weights=lambda w: w.masked_fill(pad[:, None, :, None], 0.0))


@band("s*0.25 where abs(n - m) <= 4 else -inf")
def scaled_after_they_are_assembled(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return chunked(q, k, v)(lambda x: x * 0.25)


@left
def corners_that_are_not_blank(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return chunked(q, k, v, blank=False)()


@left
def a_corner_that_is_not_moved(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The scores of the first rows with what is before them are zero."""
    return chunked(q, k, v, corner=False)()


@left
def values_one_further(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return chunked(q, k, v, first=W - 1)()


@left
def weights_set_to_zero_one_by_one(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    return chunked(q, k, v)(on_weights=lambda w: w.masked_fill(pad[:, None, : 2 * W + 1].unsqueeze(2), 0.0))


@left
def half_of_each_product_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """What is above the diagonal is that of the chunk before."""

    def mixed(x: Tensor) -> Tensor:
        x[:, :, W:, W + 1 :] = x[:, :, :-W, W + 1 :].clone()
        return x

    return chunked(q, k, v)(mixed)


@left
def values_padded_with_infinities(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """The weight of no key is zero, and its product NaN."""
    return chunked(q, k, v, fill=torch.inf)().nan_to_num()


@left
def dropped_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """It is a band, but nothing that is fused: the chunks are still there."""
    return chunked(q, k, v, drop=1e-9)(on_weights=lambda w: torch.nn.functional.dropout(w, 1e-9))


@left
def a_mask_of_an_operator_that_is_not_known(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    blank = torch.ops.attnfuse_tests.shifted(M, 2 * W + 1) | outside()
    return sums(scores(q, windows(k)).masked_fill(blank, -torch.inf).softmax(-1), windows(v))


@left
def a_rounded_quotient(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    low = torch.div(scores(q, windows(k)), 0.125, rounding_mode="floor")
    return sums(low.masked_fill(outside(), -torch.inf).softmax(-1), windows(v))


@left
def a_depth_that_is_expanded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    wide = q[..., :1].expand(q.shape)
    return sums(scores(wide, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1), windows(v))


@left
def heads_that_are_expanded(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    q, k, v = (x[:, :1].expand(x.shape) for x in (q, k, v))
    return sums(scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1), windows(v))


def test_a_mask_of_rows_that_is_overwritten_after_it_was_read() -> None:
    def overwritten(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
        rows = (~pad)[:, None, :, None].clone()
        weights = scores(q, windows(k)).masked_fill(outside(), -torch.inf).softmax(-1).masked_fill(rows, 0.0)
        rows.logical_not_()
        return sums(weights, windows(v)), rows

    check(overwritten, *given(), gradients=False)


def test_numbers_are_not_rounded_before_they_are_multiplied() -> None:
    def small(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        fill = torch.full((M, 2 * W + 1), 1e-5, dtype=torch.float16) * -1e5
        return sums(torch.where(outside(), fill, scores(q, windows(k))).softmax(-1), windows(v))

    (remark,) = check(small, *given(torch.float16)).remarks
    assert remark.kind == "missed"


def test_one_head() -> None:
    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        added = torch.arange(M).view(1, 1, M, 1) * 0.125
        x = scores(q, windows(k)) + windows(added)[:, :, :, 0]
        return sums(x.masked_fill(outside(), -torch.inf).softmax(-1), windows(v))

    (remark,) = check(alone, *(x[:1, :1] for x in given()[:3])).remarks
    assert verdict(remark) == "s*0.5 + float(n)*0.125 where abs(n - m) <= 4 else -inf"


def test_dynamic_sizes_are_left() -> None:
    remarks = check(each_query_reads_its_window, *given(), dynamic=True).remarks
    assert {remark.kind for remark in remarks} == {"missed"}


def test_dropout() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        torch.manual_seed(0)
        return chunked(q, k, v, drop=1e-9)()

    (remark,) = check(dropped, *given()).remarks
    assert verdict(remark) == "dropout 1e-09; s where abs(n - m) <= 4 else -inf"
