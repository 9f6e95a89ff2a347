"""Sums of weights and weights times a factor before the values: each softmax is fused by itself and right, near misses stay."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.passes import decide
from tests.harness import check, qkv, randn, report_of, verdict

Given = tuple[Tensor, ...]
SUMS: list[Any] = []
LEFT: list[Any] = []


def given(dtype: torch.dtype = torch.float32) -> Given:
    """q, k, v, another q and k, a factor by head."""
    q, k, v = qkv(dtype=dtype)
    more = (randn(*x.shape, seed=seed).to(dtype) for seed, x in ((21, q), (22, k)))
    return q, k, v, *more, (randn(1, q.shape[1], 1, 1, seed=23) * 0.2 + 0.5).to(dtype)


def summed(*specs: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of `given()` with the specs of its attentions."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        SUMS.append(pytest.param(fn, specs, id=fn.__name__))
        return fn

    return register


def left(*codes: str, **how: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a near miss."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        LEFT.append(pytest.param(fn, codes, how, id=fn.__name__))
        return fn

    return register


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fn", "specs"), SUMS)
def test_summed(fn: Callable[..., Any], specs: tuple[str, ...], dtype: torch.dtype) -> None:
    report = check(fn, *given(dtype), options={"inline_scores": 0})
    assert [verdict(remark) for remark in report.remarks] == [*specs]


@pytest.mark.parametrize(("fn", "codes", "how"), LEFT)
def test_left(fn: Callable[..., Any], codes: tuple[str, ...], how: dict[str, Any]) -> None:
    """Beside an attention that is fused, so that the graph is rewritten."""

    def beside(*given: Tensor) -> Any:
        q, k, v = (x * 0.5 for x in given[:3])
        return fn(*given), (q @ k.mT).tanh().softmax(-1) @ v

    report = check(beside, *given(), options={"inline_scores": 0}, **how)
    assert [remark.code for remark in report.remarks] == [*codes, "AF000"]


@summed("s*0.5 where n < m + 1 else -inf", "s*0.5 where n < m + 1 else -inf")
def difference(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    """Differential attention."""
    mask = torch.full((6, 6), -torch.inf).triu(1).to(q.dtype)
    first, second = ((x @ y.mT * 0.5 + mask).softmax(-1) for x, y in ((q, k), (q2, k2)))
    return (first - factor * second) @ v


@summed("s")
def difference_of_entries(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    """Differential attention whose pairs of heads are one softmax."""
    scores = torch.stack((q, q2), 2) @ torch.stack((k, k2), 2).mT
    weights = scores.softmax(-1)
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


@summed("s")
def difference_of_neighbouring_heads(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    q, k = torch.stack((q, q2), 2).flatten(1, 2), torch.stack((k, k2), 2).flatten(1, 2)
    weights = torch.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype).unflatten(1, (4, 2))
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


@summed("s", "s*2.0")
def gates_of_numbers_and_rows(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    """A negative term first, a quotient, a factor for each row, the product as an einsum."""
    rows = q.mean(-1, keepdim=True).sigmoid()
    weights = -(q @ k.mT).softmax(-1) / 4.0 + (q2 @ k2.mT * 2.0).softmax(-1) * rows
    return torch.einsum("bhmn,bhnd->bhmd", weights * 3, v)


@summed("s")
def weights_times_a_gate(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * factor) @ v


@summed("s")
def weights_beside_a_matrix(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    """Weights added to those of no attention."""
    return ((q @ k.mT).softmax(-1) + (q2 @ k2.mT).tanh()) @ v


@left("AF023")
def a_factor_by_key(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * k.mean(-1)[:, :, None]) @ v


@left("AF023")
def a_number_added(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) + factor) @ v


@left("AF023", "AF023")
def a_product_of_weights(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * (q2 @ k2.mT).softmax(-1)) @ v


@left("AF023", "AF023")
def rectified(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) - factor * (q2 @ k2.mT).softmax(-1)).relu() @ v


@left("AF023")
def a_factor_over_the_weights(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    return (factor / (q @ k.mT).softmax(-1)) @ v


@left("AF023", "AF023")
def an_output_of_other_strides(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    """Of values that all batches share."""
    weights = (q @ k.mT).softmax(-1) - factor * (q2 @ k2.mT).softmax(-1)
    return torch.einsum("bhmn,hnd->bhmd", weights, v[0]).permute(1, 0, 2, 3).view(4, -1, 4)


@left("AF021")
def some_entries(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    weights = (torch.stack((q, q2, q2), 2) @ torch.stack((k, k2, k), 2).mT).softmax(-1)
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v


@left("AF023", "AF023")
def a_difference_that_is_read_elsewhere(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1) - factor * (q2 @ k2.mT).softmax(-1)
    return weights @ v, weights.sum()


@left("AF021")
def entries_that_are_read_elsewhere(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    weights = (torch.stack((q, q2), 2) @ torch.stack((k, k2), 2).mT).softmax(-1)
    return (weights[:, :, 0] - factor * weights[:, :, 1]) @ v, weights[:, :, 1].sum()


@left("AF023", "AF023", gradients=False)
def a_factor_that_is_written_to(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
    changing = factor.clone()
    weights = (q @ k.mT).softmax(-1) - changing * (q2 @ k2.mT).softmax(-1)
    changing.fill_(0.25)
    return weights @ (v * changing)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_small_ones_are_left_alone(small: str) -> None:
    """A product more, and the weights are in memory all the same."""
    report = report_of(difference, *given())
    assert [remark.code for remark in report.remarks] == ["AF031", "AF031"]
    gated = report_of(weights_times_a_gate, *given())
    assert [remark.kind for remark in gated.remarks] == ["fused"]


@pytest.mark.parametrize("ours", [False, True])
def test_fewer_are_small_where_attnfuse_has_a_kernel(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """36 scores a head: more than twice what `inline_scores` says, and less than sixteen times that."""
    monkeypatch.setattr(sys.modules[decide.__module__], "suits", lambda *_: "AMD" if ours else "")
    remarks = check(difference, *given(), options={"inline_scores": 16}, gradients=False).remarks
    assert [remark.kind for remark in remarks] == ["fused" if ours else "declined"] * 2


def test_dropout_of_each_term() -> None:
    """Each is an attention with a dropout of its own."""

    def dropped(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
        first, second = (torch.dropout((x @ y.mT).softmax(-1), 0.5, True) for x, y in ((q, k), (q2, k2)))
        return (first - factor * second) @ torch.ones_like(v)

    report = report_of(dropped, *given())
    assert [remark.code for remark in report.remarks] == ["AF000", "AF000"]
    assert all(verdict(remark).startswith("dropout 0.5;") for remark in report.remarks)


def test_a_dropout_of_the_difference_is_none_of_its_terms() -> None:
    """What it drops it drops of both."""

    def dropped(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, factor: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1) - factor * (q2 @ k2.mT).softmax(-1)
        return torch.dropout(weights, 0.5, True) @ v

    assert [remark.kind for remark in report_of(dropped, *given()).remarks] == ["missed", "missed"]
