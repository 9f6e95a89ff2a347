"""Keys and values in parts: what is joined is fused and right, what may not be joined stays as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import check, qkv, randn, verdict

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
JOINED: list[Any] = []
LEFT: list[Any] = []


def parts(dtype: torch.dtype = torch.float32) -> Parts:
    """q, k, v, and three more keys and values."""
    q, k, v = qkv(dtype=dtype)
    return q, k, v, randn(2, 4, 3, 4, seed=11).to(dtype), randn(2, 4, 3, 4, seed=12).to(dtype)


def joined(spec: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of `parts()` that is one attention over nine keys."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        JOINED.append(pytest.param(fn, spec, id=fn.__name__))
        return fn

    return register


def left(code: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a near miss."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        LEFT.append(pytest.param(fn, code, how, id=fn.__name__))
        return fn

    return register


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fn", "spec"), JOINED)
def test_joined(fn: Callable[..., Any], spec: str, dtype: torch.dtype) -> None:
    (remark,) = check(fn, *parts(dtype)).remarks
    assert verdict(remark) == spec


@pytest.mark.parametrize(("fn", "code", "how"), LEFT)
def test_left(fn: Callable[..., Any], code: str, how: dict[str, Any]) -> None:
    """Beside an attention that is fused, so that the graph is rewritten."""

    def beside(*given: Tensor) -> Any:
        q, k, v = (x * 0.5 for x in given[:3])
        return fn(*given), (q @ k.mT).tanh().softmax(-1) @ v

    report = check(beside, *parts(), **how)
    assert [remark.code for remark in report.remarks] == [code, "AF000"]


@joined("s*0.5 where n < 3 | n < m + 4 else -inf")
def a_prefix_and_a_triangle(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """The keys of a prefix are seen by all queries (prefix tuning)."""
    causal = (q @ k.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    weights = (torch.cat([q @ k2.mT, causal], -1) * 0.5).softmax(-1)
    return weights[..., :3] @ v2 + weights[..., 3:] @ v


@joined("where(n < 6, s*0.5 + 1.0, s)")
def parts_in_other_arithmetic_and_other_products(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """One part is shared by the heads; the output is summed in place, in another order."""
    scores = torch.cat([q @ k.mT * 0.5 + 1.0, torch.einsum("bhmd,bnd->bhmn", q, k2[:, 0])], -1)
    weights = scores.softmax(-1)
    out = torch.einsum("bhmn,bnd->bhmd", weights[..., 6:], v2[:, 1])
    out += weights[..., :6] @ v
    return out


@joined("s")
def only_the_keys(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1) @ torch.cat([v, v2], -2)


@joined("s")
def only_the_values(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = (q @ torch.cat([k, k2], -2).mT).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights[..., :6] @ v + weights[..., -3:] @ v2


@joined("s where n < 6 | n != 7 else +min")
def masks_of_the_least_number_in_one_part(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    mask = torch.zeros(3, dtype=q.dtype).masked_fill(torch.arange(3) == 1, torch.finfo(q.dtype).min)
    weights = torch.cat([q @ k.mT, q @ k2.mT + mask], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ v2


@joined("s")
def four_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k[:, :, :2].mT, q @ k2.mT, q @ k[:, :, 2:4].mT, q @ k[:, :, 4:].mT], -1).softmax(-1)
    first, last = weights[..., :2] @ v[:, :, :2], weights[..., 7:] @ v[:, :, 4:]
    return (first + weights[..., 2:5] @ v2) + (last + weights[..., 5:7] @ v[:, :, 2:4])


@left("AF023")
def one_key_by_itself(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k2[:, :, :1].mT, q @ k.mT], -1).softmax(-1)
    return weights[..., :1] @ v2[:, :, :1] + weights[..., 1:] @ v


@left("AF024")
def another_query(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, (q * 2) @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ v2


@left("AF024")
def the_query_of_another_head(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, torch.einsum("bhmd,bgnd->bgmn", q, k2)], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ v2


@left("AF021")
def a_part_of_the_weights_that_has_no_value(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 7:] @ v2[:, :, 1:]


@left("AF021")
def parts_that_overlap(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 5:8] @ v2


@left("AF021")
def a_difference_of_the_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v - weights[..., 6:] @ v2


@left("AF021")
def a_sum_with_a_factor(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return torch.add(weights[..., :6] @ v, weights[..., 6:] @ v2, alpha=2)


@left("AF021")
def a_part_of_the_output_returned(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    first = weights[..., :6] @ v
    return first + weights[..., 6:] @ v2, first


@left("AF024")
def scores_of_a_part_returned(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    weights = torch.cat([scores, q @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ v2, scores


@left("AF024", gradients=False)
def a_key_written_between_the_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    k2 = k2 * 1
    second = q @ k2.mT
    k2[:, :, 0].mul_(3)
    weights = torch.cat([q @ k.mT, second], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ (v2 + k2)


@left("AF021", gradients=False)
def a_value_written_between_the_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    v2 = v2 * 1
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    second = weights[..., 6:] @ v2
    v2[:, :, 0].mul_(3)
    return weights[..., :6] @ (v + v2.sum()) + second


@left("AF024")
def a_part_without_gradient(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    with torch.no_grad():
        second = q @ k2.mT
    weights = torch.cat([q @ k.mT, second], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ v2


@left("AF024", gradients=False)
def a_key_made_of_the_scores_of_another_part(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = torch.cat([scores, q @ (k2 + scores.sum())[:, :, :3].mT], -1).softmax(-1)
    return weights[..., :6] @ v + weights[..., 6:] @ v2


@left("AF024")
def keys_of_their_own_for_each_query(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    own = k2[:, :, None] * q.sin()[:, :, :, None]
    weights = torch.cat([q @ k.mT, torch.einsum("bhmd,bhmnd->bhmn", q, own)], -1).softmax(-1)
    return weights @ torch.cat([v, v2], -2)


@left("AF021")
def values_of_their_own_for_each_query(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    own = v2[:, :, None] * q.sin()[:, :, :, None]
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v + torch.einsum("bhmn,bhmnd->bhmd", weights[..., 6:], own)


@left("AF021")
def a_sum_that_is_broadcast(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k.mT, q @ k2.mT], -1).softmax(-1)
    return weights[..., :6] @ v[..., :1] + weights[..., 6:] @ v2


@left("AF024")
def heads_behind_the_queries(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    parts = [torch.einsum("bmhd,bnhd->bmhn", q.transpose(1, 2), x.transpose(1, 2)) for x in (k, k2)]
    weights = torch.cat(parts, -1).softmax(-1)
    return torch.einsum("bmhn,bnhd->bmhd", weights, torch.cat([v, v2], 2).transpose(1, 2))


def test_parts_under_autocast() -> None:
    """The weights are float32 there, or the values."""

    def model(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = only_in_parts(*given)
        return out

    report = check(model, *parts(), gradients=False)
    assert [remark.kind for remark in report.remarks] == ["fused"]


def only_in_parts(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k2.mT, q @ k.mT], -1).softmax(-1)
    return weights[..., :3] @ v2 + weights[..., 3:] @ v


LEAST = torch.finfo(torch.float32).min
MASK = torch.tensor([[False, True, True]] * 3 + [[True] * 3] * 3)


@pytest.mark.parametrize(
    "first",
    [
        lambda s, rows: s + LEAST,
        lambda s, rows: s + torch.where(rows > 0, LEAST, 0.0)[:, None],
        lambda s, rows: s + torch.where(rows > 0, -torch.inf, 0.0)[:, None],
        lambda s, rows: s + rows[:, None] * 1e30,
        lambda s, rows: torch.where(s > 0, s, LEAST),
    ],
    ids=["all masked", "rows masked", "rows at -inf", "rows of data", "low scores masked"],
)
@pytest.mark.parametrize("replaced", [True, False])
def test_a_part_as_low_as_the_mask_of_another(first: Callable[[Tensor, Tensor], Tensor], replaced: bool) -> None:
    """Keys of the second part are no longer certainly the least of a row."""

    def model(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, rows: Tensor) -> Tensor:
        second = q @ k2.mT
        second = second.masked_fill(MASK, LEAST) if replaced else second + torch.zeros(6, 3).masked_fill(MASK, LEAST)
        weights = torch.cat([first(q @ k.mT, rows), second], -1).softmax(-1)
        return weights[..., :6] @ v + weights[..., 6:] @ v2

    rows = torch.tensor([0.0, -1, 1, 0, -1, 1])
    report = check(model, *parts(), rows, gradients=False, options={"inline_scores": 0})
    assert [remark.kind for remark in report.remarks] == ["fused"]


def test_a_column_beside_joined_keys() -> None:
    """A sink is no part: it has no product."""

    def model(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        column = sink[None, :, None, None].expand(2, 4, 6, 1)
        return torch.cat([q @ k.mT, column], -1).softmax(-1)[..., :-1] @ v

    (remark,) = check(model, *qkv(), randn(4, seed=5)).remarks
    assert remark.kind == "fused"
    assert "sink" in remark.score


def test_sizes_that_are_not_known_are_not_joined() -> None:
    report = check(a_prefix_and_a_triangle_of_any_length, *parts(), dynamic=True)
    assert [remark.kind for remark in report.remarks] == ["missed"]


def a_prefix_and_a_triangle_of_any_length(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    weights = torch.cat([q @ k2.mT, q @ k.mT], -1).softmax(-1)
    return weights[..., : k2.shape[2]] @ v2 + weights[..., k2.shape[2] :] @ v
