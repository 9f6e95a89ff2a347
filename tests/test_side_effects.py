"""Graphs are put in order before attention is looked for: whatever they do beside it, they do as before.

Writes to inputs and through aliases, grad modes, statistics, strides; each beside an attention that is fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import check, qkv, randn

CASES: list[Any] = []
MIN = torch.finfo(torch.float32).min
# Row 2 has no key.
EMPTY = torch.zeros(6, 6).index_fill(0, torch.tensor([2]), 1.0).bool()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).tanh().softmax(-1) @ v


def case(*more: Tensor, gradients: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of q, k, v and `more`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(pytest.param(fn, more, gradients, id=fn.__name__))
        return fn

    return register


@pytest.mark.parametrize(("fn", "more", "gradients"), CASES)
def test_effect(fn: Callable[..., Any], more: tuple[Tensor, ...], gradients: bool) -> None:
    def beside_an_attention(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Any:
        return fn(q, k, v, *more), attention(q, k, v)

    report = check(beside_an_attention, *qkv(), *(x.clone() for x in more), gradients=gradients)
    assert report.fused


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * 0.5


X = randn(3, 4, seed=5)
W = randn(2, 4, 6, 6, seed=6)


@case(X, gradients=False)
def adds_to_what_dropout_gave_back(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    h = F.dropout(x, 0.1, False)
    h += 1.0
    return h + x


@case(X, gradients=False)
def scales_what_dropout_gave_back(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    F.dropout(x, 0.1, False).mul_(2)


@case(randn(6, seed=7))
def scales_the_weights_that_dropout_gave_back(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    d = F.dropout(p * 1.0, 0.1, False)
    d.mul_(factor)
    return d @ v


@case(X, gradients=False)
def writes_to_what_has_the_type_already(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    x.type_as(q).add_(1)


@case(X, gradients=False)
def writes_through_einsum(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    torch.einsum("ij->ji", x).mul_(3)


@case(torch.zeros(4), torch.ones(4), gradients=False)
def updates_running_statistics(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, variance: Tensor) -> None:
    F.batch_norm(q.reshape(-1, 4), mean, variance, training=True)


@case(randn(4, 6, seed=8))
def shows_the_strides_of_a_slice(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = (x * 2)[..., :3]
    s.add_(1)
    return s


@case(randn(4, 6, seed=8), gradients=False)
def shows_the_storage_of_a_slice(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = (x * 2)[:, ::2]
    s.add_(1)
    return s.as_strided((2, 2), (8, 2)) * 1


@case(X)
def writes_under_no_grad(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    y = x * 3
    with torch.no_grad():
        y.mul_(0.5)
    return y


@case(W)
def takes_a_maximum_off_under_no_grad(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        y = w - w.amax(-1, keepdim=True)
    return (y + q @ k.mT).softmax(-1) @ v


@case(W, gradients=False)
def takes_a_maximum_off_before_a_write(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    y = w - w.amax(-1, keepdim=True)
    w.zero_()
    return (y + q @ k.mT).softmax(-1) @ v


@case(~EMPTY)
def zeros_that_are_none_any_more(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    z = torch.zeros(6, 6, dtype=q.dtype)
    z[..., 0] = 1.0
    e = torch.where(allowed, scores(q, k).exp(), z)
    return (e / e.sum(-1, keepdim=True)) @ v


@case(EMPTY)
def weights_that_are_no_zeros_where_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    z = torch.zeros(6, 6, dtype=q.dtype)
    z[..., 0] = 1.0
    return torch.where(~mask, scores(q, k).masked_fill(mask, MIN).softmax(-1), z) @ v


@case(EMPTY, gradients=False)
def mask_turned_round_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    p = scores(q, k).masked_fill(mask, MIN).softmax(-1)
    mask.view(-1).logical_not_()
    return p.masked_fill(mask, 0.0) @ v


@case(randn(4, 1, 1, seed=9), gradients=False)
def bias_written_between_two_readings(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = scores(q, k)
    lse = (s + bias).logsumexp(-1, True)
    bias.view(-1).add_(1)
    return torch.exp((s + bias) - lse) @ v


@case(EMPTY, gradients=False)
def maximum_of_all_rows_taken_off(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(mask, MIN)
    e = torch.exp(s - s.max())
    return (e / e.sum(-1, keepdim=True)) @ v


@case(EMPTY)
def exponentials_of_an_empty_row_set_to_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    e = torch.exp(scores(q, k).masked_fill(mask, MIN))
    return ((e / e.sum(-1, keepdim=True)) * (~mask).to(q.dtype)) @ v


@case(EMPTY)
def log_sum_exp_of_weights_set_to_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k).masked_fill(mask, MIN)
    return s.softmax(-1).masked_fill(mask, 0.0) @ v, s.logsumexp(-1) * 0.0


@case(EMPTY)
def log_sum_exp_of_an_empty_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k) + torch.zeros(6, 6, dtype=q.dtype).masked_fill(mask, MIN)
    return s.softmax(-1) @ v, s.logsumexp(-1).clamp(min=-10.0)


@case(W)
def mask_written_under_no_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    b = torch.where(torch.arange(6)[:, None] >= torch.arange(6), bias * 1, -math.inf)
    c = bias * 2
    with torch.no_grad():
        c.zero_()
    return (q @ k.mT + b + c).softmax(-1) @ v


@case()
def the_same_attention_with_and_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        a = scores(q, k).softmax(-1) @ v
    return a, scores(q, k).softmax(-1) @ v


@case(EMPTY)
def sink_as_low_as_masked_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = F.pad(scores(q, k).masked_fill(mask, -1e9), (0, 1), value=-1e9)
    return s.softmax(-1)[..., :-1] @ v


@case(EMPTY)
def sink_of_the_least_number(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(mask, MIN)
    return torch.cat((s, torch.full_like(s[..., :1], MIN)), -1).softmax(-1)[..., :-1] @ v


@case(X)
def renormalised_softmax_that_is_returned(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    p = x.softmax(-1) * (x > 0).to(x.dtype)
    return p / (p.sum(-1, keepdim=True) + 1.0)


@case(X, gradients=False)
def out_written_and_written_again(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    c = torch.empty_like(x)
    torch.add(x, 1, out=c)
    c.mul_(2)
    return c


@case()
def writes_a_part_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[:, :, 1:] = s[:, :, :-1] * 0.5
    return s.softmax(-1) @ v


@case()
def writes_twice_to_a_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    part = s[:, :, 1:]
    part.add_(1.0)
    part.mul_(0.5)
    return s.softmax(-1) @ v


@case()
def reads_a_view_before_and_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    view = s[:, :, :3]
    before = view.sum(-1)
    s.copy_(s * 0.5)
    return before, view * 1.0


@case()
def takes_a_view_of_an_early_view_after(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    view = s.view(2, 4, 36)
    early = view * 0.5
    s.copy_(early.view(2, 4, 6, 6))
    return view[:, :, 3] * 1.0, s.softmax(-1) @ v


@case()
def copies_over_all_and_changes_what_was_copied(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s, other = scores(q, k), (q @ k.mT).sin()
    s[:, :, 0:, 0:] = other
    other.mul_(2.0)
    return s.softmax(-1) @ v, other


@case()
def returns_a_tensor_and_all_of_it(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    return s, s[:, 0:]


@case(X)
def copies_what_is_broadcast_or_of_another_type(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.sin(), x.cos()
    a[:] = x[0]
    b.copy_(x.double())
    return a, b


@case(W)
def adds_to_the_transposed_scores(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s = scores(q, k)
    s.mT.add_(w)
    return s.softmax(-1) @ v


@case(W)
def adds_to_scores_that_are_flattened(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s = scores(q, k)
    s.flatten(0, 1).add_(w.flatten(0, 1))
    return s.softmax(-1) @ v


@case(X)
def reads_a_part_that_was_written_after_the_whole(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = x * 0.5
    part = s[:2].mul_(2.0)
    s.add_(1.0)
    return s * part.sum()


@case(W)
def writes_to_a_copy_of_another_layout(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    copy = s.mT.contiguous()
    copy.masked_fill_(w > 0, -3.0)
    return s.softmax(-1) @ v, copy.softmax(-1) @ v


@case(X)
def writes_to_a_detached_view(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = x * 0.5
    s.detach().mul_(0.5)
    return s * 2


@case(X)
def copies_constants_to_what_asks_for_a_gradient(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    s = x * 0.5
    s.copy_(torch.ones_like(x))
    return s


@case(X, X.flip(0))
def copies_another_tensor_to_what_asks_for_a_gradient(q: Tensor, k: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    s = x * 0.5
    s.copy_(y * 2.0)
    return s


@case(W, gradients=False)
def transposes_a_slice_in_place(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = w[0, 0] * 0.5
    whole = s[:]
    whole.t_()
    return s * 2 + w[0, 1], whole * 1.0


def test_a_product_of_somebody_elses_is_none() -> None:
    """Under dynamic sizes the product of PyTorch is not run once more; a function of its name is another one."""

    @torch.compiler.allow_in_graph
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b) * 3

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return matmul(q, k.mT).softmax(-1) @ v, attention(q, k, v)

    check(model, *qkv(), dynamic=True)


def test_a_mask_that_is_changed_after_it_was_added_in_a_wider_type() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, mask = scores(q, k), x.float() * 2
        s += mask
        mask.mul_(2)
        return s, mask, attention(q, k, v)

    torch._dynamo.reset()
    given = (*qkv(dtype=torch.bfloat16), W.bfloat16())
    compiled = torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager", "strict": True})
    (s, mask, _), (other_s, other_mask, _) = compiled(*given), model(*given)
    assert torch.equal(s, other_s)
    assert torch.equal(mask, other_mask)


def test_scores_that_are_copied_back_are_fused() -> None:
    """MViT adds its positions to a slice of the scores which is all of them."""

    def relative(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = scores(q, k)
        s[:, :, 0:, 0:] = (s[:, :, 0:, 0:].view(2, 4, 2, 3, 6) + bias.view(2, 3, 6)).view(2, 4, 6, 6)
        return s.softmax(-1) @ v

    report = check(relative, *qkv(), randn(6, 6, seed=8))
    assert [r.kind for r in report.remarks] == ["fused"]
    assert report.fused[0].score == "s*0.5 + bias[m, n]"


def test_a_sum_in_float32_that_is_written_to_bfloat16_is_rounded_once() -> None:
    """LongT5's mask is float32 in any model; added in place it leaves the scores their type. The program says what may overflow there."""

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.mT
        s += torch.where(bias > 0, 0.0, -1e10).to(torch.float32)
        steps = torch.arange(6)
        steps += 1
        s += bias.to(q.dtype)
        return s.float().softmax(-1).to(q.dtype) @ v, steps

    bias = randn(6, 6, seed=8).diagonal_scatter(torch.ones(6))
    report = check(biased, *qkv(dtype=torch.bfloat16), bias, gradients=False)
    assert [r.kind for r in report.remarks] == ["fused"]

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        s = q @ k.mT
        s += bias
        return s.float().softmax(-1).to(q.dtype) @ v

    report = check(dense, *qkv(dtype=torch.bfloat16), bias, gradients=False)
    assert [r.score for r in report.remarks] == ["bf16(s + bias[m, n])"]
