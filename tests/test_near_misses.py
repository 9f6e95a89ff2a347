"""Functions that differ from an attention in one fact: each keeps its result, and none becomes what it is not.

Every one of them is compiled beside an attention that is fused, so that it runs in a graph that was rewritten.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import check, qkv, randn, verdict

NEAR_MISSES: list[Any] = []
Inputs = Callable[[], tuple[object, ...]]


def near_miss(*verdicts: str, inputs: Inputs = qkv, **how: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of `inputs()` with what is said about its softmaxes: a code, or the spec that it does have."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES.append(pytest.param(fn, inputs, verdicts, how, id=fn.__name__))
        return fn

    return register


def given(*more: Tensor, **sizes: Any) -> Inputs:
    return lambda: (*qkv(**sizes), *more)


@pytest.mark.parametrize(("fn", "inputs", "verdicts", "how"), NEAR_MISSES)
def test_near_miss(fn: Callable[..., Any], inputs: Inputs, verdicts: tuple[str, ...], how: dict[str, Any]) -> None:
    def beside_an_attention(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Any:
        return fn(*more), (q @ k.mT).tanh().softmax(-1) @ v

    report = check(beside_an_attention, *qkv(B=1, H=2, M=3), *inputs(), **how)
    *found, attention = (verdict(remark) for remark in report.remarks)
    assert attention == "tanh(s)"
    assert [text[:5] if text.startswith("AF") else text for text in found] == list(verdicts)


def causal() -> Tensor:
    return torch.arange(6) <= torch.arange(6)[:, None]


# Heads that are mixed


def mixing(*sizes: int) -> Callable[[], tuple[Tensor, ...]]:
    """q, k, v of 4 heads and 6 tokens, and two matrices of these sizes."""
    return lambda: (*qkv(), *(randn(size, size, seed=20 + i) / size**0.5 for i, size in enumerate(sizes)))


def over(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """The matrix over one dimension of the scores."""
    return F.linear(x.movedim(dim, -1), matrix).movedim(-1, dim)


@near_miss("AF038", inputs=mixing(4, 4))
def heads_mixed_before_and_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), a).permute(0, 3, 1, 2)
    return F.linear(scores.softmax(-1).permute(0, 2, 3, 1), b).permute(0, 3, 1, 2) @ v


@near_miss("AF038", inputs=mixing(4, 4))
def heads_mixed_by_einsum_under_a_mask(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT * 0.5, a)
    weights = scores.masked_fill(~causal(), -torch.inf).softmax(-1)
    return torch.einsum("bgij,bgjd->bgid", torch.einsum("bhij,hg->bgij", weights, b), v)


@near_miss("AF038", inputs=mixing(4))
def heads_mixed_before_the_softmax(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return F.conv2d(q @ k.mT, a[:, :, None, None]).softmax(-1) @ v


@near_miss("AF038", inputs=mixing(4))
def heads_mixed_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over((q @ k.mT).softmax(-1), a, 1) @ v


@near_miss("AF024", inputs=mixing(6))
def queries_mixed(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over(q @ k.mT, a, 2).softmax(-1) @ v


@near_miss("AF024", inputs=mixing(6))
def keys_mixed(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over(q @ k.mT, a, 3).softmax(-1) @ v


@near_miss("AF024", inputs=mixing(4))
def heads_mixed_and_summed_up(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over(q @ k.mT, a, 1).cumsum(-1).softmax(-1) @ v


@near_miss("AF023", inputs=mixing(6))
def weights_of_queries_mixed(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over((q @ k.mT).softmax(-1), a, 2) @ v


@near_miss("AF023", inputs=mixing(6))
def weights_of_keys_mixed(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over((q @ k.mT).softmax(-1), a, 3) @ v


@near_miss("AF023", inputs=mixing(4))
def weights_of_heads_mixed_and_squared(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    return over((q @ k.mT).softmax(-1), a, 1) ** 2 @ v


# Weights and scores that are seen by others


@near_miss("AF037")
def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@near_miss("AF037")
def weights_returned_after_dropout_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.dropout((q @ k.mT).softmax(-1), 0.0)
    return weights @ v, weights


@near_miss("AF021")
def weights_multiplied_with_two_values(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights @ (v * 2)


@near_miss("AF037")
def weights_summed_up_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, (weights * weights.log()).sum(-1)


@near_miss("AF037")
def weights_put_where_they_are_read(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    kept = weights.new_zeros(2, 4, 6, 8)
    kept.scatter_(3, torch.arange(6).expand(2, 4, 6, 6), weights)
    return weights @ v, kept.amax(-1)


@near_miss("AF021")
def weights_as_both_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ weights


@near_miss("AF021", gradients=False)
def weights_changed_in_place_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).softmax(-1)
    out = weights.detach() @ v
    weights.mul_(2)
    return out, weights


@near_miss("AF025")
def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.mT
    return s.softmax(-1) @ v, s


@near_miss("AF025")
def scaled_scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = (q @ k.mT) * 0.5
    return s.masked_fill(~causal(), -math.inf).softmax(-1) @ v, s


@near_miss("AF025")
def masked_scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = ((q @ k.mT) * 0.5).masked_fill(~causal(), -math.inf)
    return s.softmax(-1) @ v, s


@near_miss("s")
def scores_used_for_a_log_sum_exp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.mT
    return s.softmax(-1) @ v, s.logsumexp(-1)


@near_miss("AF025", "AF025")
def two_softmaxes_of_the_same_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = q @ k.mT
    return s.softmax(-1) @ v, (s * 2).softmax(-1) @ v


# Axes


@near_miss("AF022")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


@near_miss("AF022", inputs=given(H=6))
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


@near_miss("AF022", inputs=given(B=6))
def softmax_over_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(0) @ v


@near_miss("AF022", inputs=given(B=6, H=6))
def softmax_over_heads_that_are_as_many_as_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1).transpose(1, 3) @ v


@near_miss("AF022")
def weights_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).mT @ v


@near_miss("AF022")
def weights_transposed_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhid->bhjd", (q @ k.mT).softmax(-1), v)


@near_miss("AF022", inputs=given(H=6))
def value_product_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bijd", (q @ k.mT).softmax(-1), v.transpose(1, 2))


@near_miss("s", inputs=given(M=6, D=6))
def query_times_key_not_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k).softmax(-1) @ v


@near_miss("s*0.5", inputs=given(B=4))
def key_with_heads_and_batch_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(0, 1).mT) * 0.5).softmax(-1) @ v


@near_miss("s", inputs=lambda: tuple(randn(2, 6, 6, 4, seed=i) for i in range(3)))
def key_with_heads_and_sequence_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(1, 2).mT).softmax(-1) @ v


@near_miss("AF027", inputs=given(H=6))
def weights_with_heads_and_queries_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).transpose(1, 2) @ v


@near_miss("AF023", inputs=given(H=6, N=4))
def weights_viewed_with_another_meaning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).view(2, 6, 4, 6) @ torch.cat([v, v], 2)[:, :, :6]


@near_miss("AF035")
def value_times_value_of_no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * k).softmax(-1) @ v.mT


@near_miss("AF022")
def first_keys_cut_from_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[..., 2:].softmax(-1) @ v[:, :, 2:]


@near_miss("AF022")
def last_keys_cut_from_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[..., :4].softmax(-1) @ v[:, :, :4]


@near_miss("AF022")
def some_queries_cut_from_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT)[:, :, 1:4].softmax(-1) @ v


@near_miss("AF024")
def keys_of_the_scores_in_reverse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).flip(-1).softmax(-1) @ v


@near_miss("AF027", inputs=lambda: (*(x[:, :2] for x in qkv()[:2]), qkv()[2]))
def scores_repeated_for_each_two_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).repeat_interleave(2, 1).softmax(-1) @ v


@near_miss("s", inputs=given(B=4, M=4))
def values_with_batch_and_heads_exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,hkbd->bqhd", weights, v)


# What is done to the weights


@near_miss("AF023")
def mask_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).masked_fill(~causal(), 0.0) @ v


@near_miss("AF023")
def mask_multiplied_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * causal()) @ v


@near_miss("AF023")
def tril_of_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).tril() @ v


@near_miss("s")
def weights_renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@near_miss("AF021")
def weights_renormalised_over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.normalize((q @ k.mT).softmax(-1), p=1.0, dim=-2) @ v


@near_miss("AF023")
def weights_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).detach() @ v


@near_miss("AF023")
def noise_added_to_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) + 0.1) @ v


@near_miss("AF023")
def weights_rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).round(decimals=1) @ v


@near_miss("AF023")
def weights_cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[..., :5] @ v[:, :, :5]


@near_miss("AF023", "AF024")
def softmax_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


@near_miss("AF023")
def product_added_to_something(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(v, (q @ k.mT).softmax(-1), v)


@near_miss("AF023")
def product_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(v, (q @ k.mT).softmax(-1), v, beta=0, alpha=2)


@near_miss()
def no_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q @ k.mT).softmax(-1)
    return v * 2


@near_miss("AF021")
def only_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


# What is done to the scores


@near_miss("AF024")
def topk_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    least = s.topk(3, dim=-1).values[..., -1:]
    return s.masked_fill(s < least, -math.inf).softmax(-1) @ v


@near_miss("s")
def maximum_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s - s.amax(-1, keepdim=True)).softmax(-1) @ v


@near_miss("AF024")
def scores_mixed_between_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s + s.roll(1, 1)).softmax(-1) @ v


@near_miss("AF038", inputs=given(randn(4, 4)))
def scores_projected_between_heads(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", q @ k.mT, w).softmax(-1) @ v


@near_miss("AF024")
def scores_shifted_along_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(q @ k.mT, (1, 0))[..., :-1].softmax(-1) @ v


@near_miss("AF024")
def dropout_before_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(q @ k.mT, 1e-9).softmax(-1) @ v


@near_miss("AF024")
def scores_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).detach().softmax(-1) @ v


@near_miss("AF035", inputs=given(randn(2, 4, 6, 6)))
def scores_given_by_the_caller(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (s.cumsum(-1) * 0.5).softmax(-1) @ v


@near_miss("AF024")
def scores_rounded_to_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).long().to(q.dtype).softmax(-1) @ v


@near_miss("where(s > 0.0, s, s*s)")
def bias_that_depends_on_the_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return torch.where(s > 0, s, s * s).softmax(-1) @ v


@near_miss("s*s")
def scores_times_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s * s).softmax(-1) @ v


@near_miss("AF024")
def scores_plus_transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s + s.mT).softmax(-1) @ v


@near_miss("bias: f32[:, :, :, :]; s - bias[b, h, m, n]")
def difference_of_two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT - k @ q.mT).softmax(-1) @ v


# Fills and masks


@near_miss("where(n > m, -1.0, s)")
def fill_of_minus_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), -1.0).softmax(-1) @ v


@near_miss("where(n > m, 0.0, s)")
def fill_of_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), 0.0).softmax(-1) @ v


@near_miss("where(n > m, -10000.0, s)")
def fill_of_minus_ten_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), -1e4).softmax(-1) @ v


@near_miss("where(n > m, -65504.0, s)")
def minimum_of_half_precision_in_single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), torch.finfo(torch.float16).min).softmax(-1) @ v


@near_miss(
    "where(n > m, 3.4028234663852886e+38, s)",
)
def greatest_instead_of_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), torch.finfo(torch.float32).max).softmax(-1) @ v


@near_miss("AF024")
def infinity_times_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - causal().to(q.dtype)) * -math.inf).softmax(-1) @ v


@near_miss("AF024")
def infinity_with_the_wrong_sign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), math.inf).softmax(-1) @ v


@near_miss("s + 1.0 where n <= m else -inf")
def addend_that_is_not_zero_where_allowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.where(causal(), 1.0, -math.inf)).softmax(-1) @ v


@near_miss("s where n <= m - 1 else -inf")
def mask_off_by_one_downwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(-1), -math.inf).softmax(-1) @ v


@near_miss("s where n <= m + 1 else -inf")
def mask_off_by_one_upwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(1), -math.inf).softmax(-1) @ v


@near_miss("s where n >= m else -inf")
def mask_the_other_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(causal().mT.logical_not(), -math.inf).softmax(-1) @ v


@near_miss("s where n > m else -inf")
def mask_inverted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(causal(), -math.inf).softmax(-1) @ v


@near_miss("s where m <= h else -inf", inputs=given(H=6))
def mask_of_heads_and_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal()[:, :, None], -math.inf).softmax(-1) @ v


@near_miss("pad: bool[:, :]; s where ~pad[b, n] else -inf", inputs=given(torch.randint(3, (2, 1, 1, 6))))
def mask_compared_with_two(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(mask == 2, -math.inf).softmax(-1) @ v


@near_miss("bias: f32[:, :]; s + bias[b, n]", inputs=given(torch.randint(3, (2, 1, 1, 6))), gradients=False)
def mask_of_integers_that_may_be_two(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - mask.to(q.dtype)) * -100.0).softmax(-1) @ v


@near_miss(
    "mask: bool[:]; mask2: bool[:, :]; s where where(mask[m], n <= m, mask2[m, n]) else -inf",
    inputs=given(randn(6, 6) > 0, randn(6) > 0),
)
def two_masks_in_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    allowed = torch.where(rows[:, None], causal(), mask)
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@near_miss(
    "mask: bool[:, :]; bias: f32[:, :]; s + where(mask[m, n], 0.0, bias[m, n])",
    inputs=given(randn(6, 6) > 0, randn(6, 6)),
)
def fill_that_is_data(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    return (q @ k.mT + torch.where(mask, 0.0, fill)).softmax(-1) @ v


@near_miss("scale: f32[]; where(n <= m, s, scale[])", inputs=given(torch.tensor(-3.0)))
def fill_that_is_an_input(q: Tensor, k: Tensor, v: Tensor, fill: Tensor) -> Tensor:
    return torch.where(causal(), q @ k.mT, fill).softmax(-1) @ v


@near_miss("s*0.5 + 1.0 where n <= m else -inf")
def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~causal(), -math.inf) * 0.5 + 1.0).softmax(-1) @ v


@near_miss("where(n > m, -3.4028234663852886e+38, s)*0.5")
def minimum_scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~causal(), torch.finfo(torch.float32).min) * 0.5).softmax(-1) @ v


@near_miss("AF024")
def softcap_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(), -math.inf).tanh().softmax(-1) @ v


# Operands that change in between


@near_miss("AF026", gradients=False)
def key_written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    weights = (q @ k.mT).softmax(-1)
    k[:, :, 1:].add_(1)
    return weights @ v + k


@near_miss("AF026", inputs=qkv, gradients=False)
def key_of_the_caller_written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    k.add_(1)
    return weights @ v


@near_miss("s", gradients=False)
def query_written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1
    weights = (q @ k.mT).softmax(-1)
    q.add_(1)
    return weights @ v + q


@near_miss("AF026", gradients=False)
def query_seen_by_a_view_written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1
    row = q[:, :, 0]
    weights = (q @ k.mT).softmax(-1)
    q.add_(1)
    return weights @ v + row[:, :, None]


@near_miss("s", gradients=False)
def value_written_before_it_is_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v * 1
    weights = (q @ k.mT).softmax(-1)
    v.mul_(2)
    return weights @ v


@near_miss("AF026", gradients=False)
def key_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    first = k[:, 0]
    weights = (q @ k.mT).softmax(-1)
    first.zero_()
    return weights @ v + k


@near_miss("bias: f32[:, :, :, :]; s + bias[b, h, m, n]")
def mask_written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = q[..., :1].detach() * torch.ones(6)
    s = q @ k.mT + mask
    mask.zero_()
    return s.softmax(-1) @ v + mask.sum()


@near_miss("mask: bool[:, :]; s where mask[m, n] else -inf", inputs=given(causal()), gradients=False)
def mask_of_the_caller_written_in_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1)
    mask.fill_(True)
    return weights @ v


@near_miss("AF026", inputs=given(causal()), gradients=False)
def mask_read_again_after_it_was_written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    seen = mask[:]
    s = torch.where(seen, q @ k.mT, -math.inf)
    mask.fill_(True)
    return torch.where(seen, s, -math.inf).softmax(-1) @ v


@near_miss(*["mask: bool[:, :]; s where mask[m, n] else -inf"] * 2, inputs=given(causal()), gradients=False)
def mask_written_between_two_layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    first = (q @ k.mT).masked_fill(~mask, -math.inf)
    second = (k @ q.mT).masked_fill(~mask, -math.inf)
    mask.fill_(True)
    return first.softmax(-1) @ v + second.softmax(-1) @ v


@near_miss("bias: f32[:]; s + bias[n]", gradients=False)
def mask_written_before_it_is_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(6)
    mask[2:] = -5.0
    return (q @ k.mT + mask).softmax(-1) @ v


@near_miss("s", gradients=False)
def cache_written_before_it_is_read(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    cache = torch.zeros_like(k)
    cache[:, :, :6] = k
    return (q @ cache.mT).softmax(-1) @ v, cache


@near_miss("AF024")
def scores_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s[..., 0] = -1.0
    return s.softmax(-1) @ v


@near_miss("AF021")
def weights_written_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    with torch.no_grad():
        weights[..., 0] = 0.0
    return weights.detach() @ v


# Modes


@near_miss("AF034")
def weights_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


@near_miss("AF034")
def scores_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = q @ k.mT
    return s.softmax(-1) @ v


@near_miss("AF034", gradients=False)
def autocast_switched_off_for_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        s = q @ k.mT
        with torch.autocast("cpu", enabled=False):
            weights = (s * 0.5).softmax(-1)
        return weights @ v


@near_miss("AF024", inputs=given(randn(6, 6)), gradients=False)
def mask_rounded_by_autocast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@near_miss("AF024", gradients=False)
def masked_by_a_number_that_autocast_may_round_to_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(), 0.0, -3.395e38).to(q.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@near_miss("AF024", inputs=given(torch.randint(5, (6, 6))), gradients=False)
def a_power_that_autocast_may_round_to_infinity(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(2.0**ids).to(q.dtype))


@near_miss("AF024", gradients=False)
def mask_that_is_not_rounded_where_autocast_is_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(), 0.0, torch.finfo(torch.float32).min).to(q.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        q = q @ torch.eye(4, dtype=q.dtype)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)


# Types


@near_miss("AF029", inputs=lambda: (torch.randint(5, (2, 4, 6, 4)), torch.randint(5, (2, 4, 6, 4)), randn(2, 4, 6, 4)))
def integer_query_and_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).to(v.dtype).softmax(-1) @ v


# Softmaxes that are no attention


@near_miss("s")
def softmax_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    weights = (s - s.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@near_miss("AF037", inputs=lambda: tuple(randn(6, 2, 4, seed=i) for i in range(3)))
def averaged_weights_of_multi_head_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    eye = torch.eye(4, dtype=q.dtype)
    return F.multi_head_attention_forward(
        q, k, v, 4, 2, eye.repeat(3, 1), None, None, None, False, 0.0, eye, None, need_weights=True
    )


@near_miss("AF020", inputs=lambda: (randn(2, 6, 8), randn(8, 5)))
def router(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.mT).softmax(-1).amax(-1)


@near_miss("AF023", inputs=lambda: (randn(6, 8), randn(8, 5), randn(5, 6)))
def gate_of_a_mixture(x: Tensor, w: Tensor, values: Tensor) -> Tensor:
    return ((x @ w).softmax(-1)[:, :, None] * values).sum(1)


@near_miss("s", inputs=lambda: (randn(6, 8), randn(8, 5), randn(5, 6)))
def weights_of_two_projections_are_an_attention(x: Tensor, w: Tensor, values: Tensor) -> Tensor:
    return (x @ w).softmax(-1) @ values
