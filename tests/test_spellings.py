"""Ways to write an attention, each with the spec that it has to be read as, and right in value and gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.harness import check, compare, qkv, randn, verdict

SPELLINGS: list[Any] = []
Inputs = Callable[[], tuple[object, ...]]


def spelling(text: str, inputs: Inputs = qkv, *, name: str = "", **how: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of `inputs()` whose one attention has the spec `text`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        SPELLINGS.append(pytest.param(fn, inputs, text, how, id=name or fn.__name__))
        return fn

    return register


def given(*more: Tensor, **sizes: Any) -> Inputs:
    """q, k and v of these sizes, and further inputs."""
    return lambda: (*qkv(**sizes), *more)


@pytest.mark.parametrize(("fn", "inputs", "text", "how"), SPELLINGS)
def test_spelling(fn: Callable[..., Any], inputs: Inputs, text: str, how: dict[str, Any]) -> None:
    shape = how.pop("shape", None)
    (remark,) = check(fn, *inputs(), **how).remarks
    assert verdict(remark) == text
    assert shape in (None, remark.facts["shape"])


def wide(x: Tensor) -> torch.dtype:
    """The type in which a careful model takes its softmax."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal(M: int, N: int) -> Tensor:
    return torch.arange(N) <= torch.arange(M)[:, None]


# Scale


@spelling("s")
def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling("s*0.5")
def scores_times_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)) * 0.5).softmax(-1) @ v


@spelling("s*0.5")
def constant_times_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.5 * (q @ k.transpose(-1, -2))).softmax(-1) @ v


@spelling("s/2.0")
def scores_over_root_of_depth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.size(-1)), dim=-1) @ v


@spelling("s/2.0")
def scores_over_root_as_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.mT) / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype)), dim=-1) @ v


@spelling("s/2.0")
def scores_over_root_as_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.mT) / torch.full([], 4.0, dtype=q.dtype).sqrt(), dim=-1) @ v


@spelling("s/3.0")
def scores_over_integer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) / 3).softmax(-1) @ v


@spelling("s")
def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.5) @ k.mT).softmax(-1) @ v


@spelling("s")
def scaled_key_over(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k / 2.0).mT).softmax(-1) @ v


@spelling("s")
def half_the_scale_on_each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = 1 / math.sqrt(math.sqrt(4))
    return ((q * scale) @ (k * scale).mT).softmax(-1) @ v


@spelling("s*0.5/3.0*1.25")
def several_scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q * 1.5) @ k.mT) * 0.5 / 3.0 * 1.25).softmax(-1) @ v


@spelling("scale: f32[]; s*scale[]", given(torch.tensor(0.7)))
def learned_temperature(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return ((q @ k.mT) * scale).softmax(-1) @ v


@spelling("bias: f32[:]; s*bias[h]", given(randn(4, 1, 1) * 0.2))
def learned_temperature_of_each_head(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return ((q @ k.mT) * scale.exp()).softmax(-1) @ v


@spelling("-(s*0.5)")
def negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-((q @ k.mT) * 0.5)).softmax(-1) @ v


# Score arithmetic


@spelling("tanh(s*0.5/5.0)*5.0")
def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh((q @ k.mT) * 0.5 / 5.0) * 5.0).softmax(-1) @ v


@spelling("tanh(s*0.5/5.0)*5.0 where n <= m else +min")
def softcap_before_an_added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5
    s = s / 5.0
    s = torch.tanh(s)
    s = s * 5.0
    mask = torch.zeros(6, 6, dtype=q.dtype).masked_fill(~causal(6, 6), torch.finfo(q.dtype).min)
    return (s + mask[None, None]).softmax(-1) @ v


@spelling("s*s*0.1 + sigmoid(s)")
def square_and_sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return (s**2 * 0.1 + s.sigmoid()).softmax(-1) @ v


@spelling("where(s < -1.0, -1.0, s)")
def clamped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(min=-1.0).softmax(-1) @ v


@spelling("bias: f32[:]; s*0.5 + bias[h]*float(n - m) where n <= m else -inf", given(randn(4)))
def alibi_by_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    at = torch.arange(6)
    bias = slopes[:, None, None] * (at[None, :] - at[:, None])
    s = (q @ k.mT) * 0.5 + bias
    return s.masked_fill(~causal(6, 6), float("-inf")).softmax(-1) @ v


@spelling("s*0.5 + abs(float(n) - float(m))*-0.25")
def alibi_with_constant_slope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(6, dtype=q.dtype)
    return ((q @ k.mT) * 0.5 + -0.25 * (at[None, :] - at[:, None]).abs()).softmax(-1) @ v


@spelling("bias: f32[:, :, :]; s*0.5 + bias[h, m, n]", given(randn(1, 4, 6, 6)))
def learned_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5 + bias).softmax(-1) @ v


@spelling("bias: f32[:, :, :, :]; bias[b, h, m, n] + s*0.5", given(randn(2, 4, 6, 6)))
def learned_bias_of_each_row_of_the_batch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (bias + (q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("bias: f32[:, :]; s + bias[n - m + 5, h]", given(randn(11, 4)))
def relative_bias_from_a_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    at = torch.arange(6)
    return (q @ k.mT + table[at[None, :] - at[:, None] + 5].permute(2, 0, 1)).softmax(-1) @ v


@spelling("bias: f32[:, :]; s + bias[n - m + 5, h]", given(randn(11, 4)))
def relative_bias_from_an_embedding(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    at = torch.arange(6)
    return (q @ k.mT + F.embedding(at[None, :] - at[:, None] + 5, table).permute(2, 0, 1)[None]).softmax(-1) @ v


# Causal masks


@spelling("s*0.5 where n <= m else -inf")
def causal_by_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    return ((q @ k.mT) * 0.5).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@spelling("s*0.5 where n <= m else -inf")
def causal_by_tril_of_floats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(6, 6).tril().view(1, 1, 6, 6)
    return ((q @ k.mT) * 0.5).masked_fill(allowed == 0, float("-inf")).softmax(-1) @ v


@spelling("s*0.5 where n < m + 1 else -inf")
def causal_by_triu_of_infinities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((6, 6), float("-inf")).triu(1)
    return ((q @ k.mT) * 0.5 + mask).softmax(-1) @ v


@spelling("s*0.5 where n < m + 1 else -inf")
def causal_by_triu_of_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.triu(torch.ones(6, 6), diagonal=1).bool()
    return torch.where(future, float("-inf"), (q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5 where n < m + 1 else +min")
def causal_by_triu_of_minima(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((6, 6), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask = torch.triu(mask, diagonal=1)
    return ((q @ k.mT) * 0.5 + mask[None, None, :, :].expand(2, 1, -1, -1)).softmax(-1) @ v


@spelling("s*0.5 where n <= m else +min")
def causal_by_product_with_a_comparison(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((6, 6), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask = mask * (torch.arange(6) > torch.arange(6).reshape(-1, 1))
    return ((q @ k.mT) * 0.5 + mask[None, None]).softmax(-1) @ v


@spelling("s*0.5 where n <= m else =min")
def causal_by_where_with_a_tensor_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5
    return torch.where(causal(6, 6), s, torch.full([], torch.finfo(s.dtype).min, dtype=s.dtype)).softmax(-1) @ v


@spelling("s*0.5 where n <= m else =min")
def causal_by_where_with_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5
    return torch.where(causal(6, 6), s, torch.finfo(s.dtype).min).softmax(-1) @ v


@spelling("s*0.5 where n <= m else -inf")
def causal_by_rows_against_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6).view(-1, 1), torch.arange(6).view(1, -1)
    return ((q @ k.mT) * 0.5).masked_fill(i < j, float("-inf")).softmax(-1) @ v


@spelling("s*0.5 where n <= m else -inf")
def causal_by_difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6)[:, None], torch.arange(6)[None]
    return ((q @ k.mT) * 0.5).masked_fill(i - j < 0, float("-inf")).softmax(-1) @ v


@spelling("s*0.5 where n <= m else -inf")
def causal_where_sum_is_masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5
    s.masked_fill_(torch.arange(6) > torch.arange(6)[:, None], float("-inf"))
    return s.softmax(-1) @ v


@spelling("s where n <= m + 3 else -inf", given(M=6, N=9))
def causal_ending_at_the_last_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~torch.ones(6, 9, dtype=torch.bool).tril(diagonal=9 - 6), float("-inf")).softmax(
        -1
    ) @ v


@spelling("s where n <= m + 3 else -inf", given(M=6, N=9))
def causal_by_slices_of_a_square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    square = torch.tril(torch.ones(16, 16, dtype=torch.bool)).view(1, 1, 16, 16)
    return torch.where(square[:, :, 3:9, :9], q @ k.mT, float("-inf")).softmax(-1) @ v


@spelling("s where n <= m else -inf", given(M=9, N=6))
def causal_with_fewer_keys_than_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(9, 6), float("-inf")).softmax(-1) @ v


@spelling("s where n < m else -inf")
def strictly_causal_gives_a_row_of_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.arange(6) >= torch.arange(6)[:, None], float("-inf")).softmax(-1) @ v


@spelling("s where n < m else =min")
def strictly_causal_with_minima_gives_a_row_of_means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    return s.masked_fill(torch.arange(6) >= torch.arange(6)[:, None], torch.finfo(s.dtype).min).softmax(-1) @ v


@spelling("s where n < m else +min")
def strictly_causal_with_added_minima(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (torch.arange(6) >= torch.arange(6)[:, None]).to(q.dtype) * torch.finfo(q.dtype).min
    return (q @ k.mT + mask).softmax(-1) @ v


# Other masks of the indices


@spelling("s*0.5 where n <= m & n > m - 3 else -inf")
def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6)[:, None], torch.arange(6)
    return ((q @ k.mT) * 0.5).masked_fill(~((j <= i) & (j > i - 3)), float("-inf")).softmax(-1) @ v


@spelling("s*0.5 where n >= m - 2 & n <= m else =min")
def sliding_window_by_tril_and_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    s = (q @ k.mT) * 0.5
    return s.masked_fill(~allowed, torch.finfo(s.dtype).min).softmax(-1) @ v


@spelling("s where ~(n > m | n <= m - 3) else +min")
def sliding_window_by_a_product_of_minima(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(6)
    mask = torch.full((6, 6), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask = mask * ((at > at[:, None]) | (at <= at[:, None] - 3))
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling("s where abs(m - n) <= 2 else -inf")
def window_on_both_sides_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6)[:, None], torch.arange(6)
    return (q @ k.mT).masked_fill((i - j).abs() > 2, float("-inf")).softmax(-1) @ v


@spelling("s where n >= m - 1 & n <= m + 2 else -inf")
def window_on_both_sides_uneven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(6, 6).tril(2).triu(-1)
    return torch.where(allowed == 1, q @ k.mT, -math.inf).softmax(-1) @ v


@spelling("s where n // 2 <= m // 2 else -inf")
def chunks_by_whole_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6)[:, None] // 2, torch.arange(6) // 2
    return (q @ k.mT).masked_fill(j > i, float("-inf")).softmax(-1) @ v


@spelling("s where n <= m | n < 2 else -inf")
def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6)[:, None], torch.arange(6)
    return (q @ k.mT).masked_fill(~((j <= i) | (j < 2)), float("-inf")).softmax(-1) @ v


@spelling("s where (m - n) % 2 == 0 else -inf")
def dilated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(6)[:, None], torch.arange(6)
    return (q @ k.mT).masked_fill(torch.remainder(i - j, 2) != 0, float("-inf")).softmax(-1) @ v


# Masks of data


def padding() -> Tensor:
    return torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


@spelling("pad: bool[:, :]; s*0.5 where pad[b, n] else +min", given(padding().bool()))
def padding_by_one_minus_truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return ((q @ k.mT) * 0.5 + added).softmax(-1) @ v


@spelling("bias: f32[:, :]; s*0.5 + bias[b, n]", given(padding()))
def padding_by_one_minus_integers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    added = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return ((q @ k.mT) * 0.5 + added).softmax(-1) @ v


@spelling("ids: i64[:, :]; s*0.5 where 1.0 - float(ids[b, n]) == 0.0 else +min", given(padding()))
def padding_by_masked_fill_of_one_minus_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    inverted = 1.0 - mask[:, None, None, :].expand(2, 1, 6, 6).to(q.dtype)
    added = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(q.dtype).min)
    return ((q @ k.mT) * 0.5 + added).softmax(-1) @ v


@spelling("pad: bool[:, :]; s*0.5 where pad[b, n] else -inf", given(padding().bool()))
def padding_by_masked_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1) @ v


@spelling("pad: bool[:, :]; s*0.5 where ~pad[b, n] else -inf", given(~padding().bool()))
def padding_where_true_is_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).masked_fill(mask.view(2, 1, 1, 6), float("-inf")).softmax(-1) @ v


@spelling("pad: bool[:, :]; s*0.5 where ~pad[b, n] else =min", given(padding()))
def padding_by_comparison_with_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5
    return s.masked_fill(mask[:, None, None, :] == 0, torch.finfo(s.dtype).min).softmax(-1) @ v


@spelling("pos: i64[:]; s where n < pos[b] else -inf", given(torch.tensor([4, 6])))
def padding_by_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    allowed = torch.arange(6)[None, :] < lengths[:, None]
    return (q @ k.mT).masked_fill(~allowed[:, None, None], float("-inf")).softmax(-1) @ v


@spelling("pad: bool[:, :]; s*0.5 where n <= m & pad[b, n] else +min", given(padding().bool()))
def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    allowed = causal(6, 6)[None, None] & mask[:, None, None, :]
    added = torch.where(allowed, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return ((q @ k.mT) * 0.5 + added).softmax(-1) @ v


@spelling("pad: bool[:, :]; s*0.5 where n <= m & pad[b, n] else +min", given(padding().bool()))
def causal_and_padding_by_gather(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, m, n = torch.arange(2)[:, None, None, None], torch.arange(6)[:, None], torch.arange(6)
    allowed = (n <= m) & mask[b, n]
    added = torch.where(allowed, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return ((q @ k.mT) * 0.5 + added).softmax(-1) @ v


@spelling("pad: bool[:, :]; s*0.5 where n <= m else =min where pad[b, n] else +min", given(padding().bool()))
def two_masks_one_after_the_other(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = torch.where(causal(6, 6), (q @ k.mT) * 0.5, torch.finfo(q.dtype).min)
    added = (~mask).to(q.dtype)[:, None, None, :] * torch.finfo(q.dtype).min
    return (s + added).softmax(-1) @ v


@spelling("ids: i64[:, :]; s where ids[b, n] == ids[b, m] else -inf", given(torch.tensor([[0, 0, 0, 1, 1, 2]] * 2)))
def packed_documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    allowed = document[:, None, None, :] == document[:, None, :, None]
    return (q @ k.mT).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@spelling("mask: bool[:, :, :]; s where mask[b, m, n] else -inf", given(randn(2, 1, 6, 6) > -1))
def dense_truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@spelling("bias: f32[:, :, :]; s + bias[b, m, n]", given(randn(2, 1, 6, 6)))
def dense_addend_with_gradient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling("bias: f32[:, :, :]; s + bias[b, m, n]", given((randn(2, 1, 6, 6) < -1) * -1e9), gradients=False)
def dense_addend_with_fill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling(
    "bias: f32[:, :]; s + bias[m, n] where bias[m, n] != -inf else -inf",
    given(torch.full((6, 6), -math.inf).triu(1)),
    gradients=False,
)
def dense_addend_of_infinities(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling("mask: bool[:, :]; s where mask[m, n] else +min", given(causal(6, 6)))
def dense_truth_by_one_minus_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - mask.to(q.dtype)) * torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling("mask: bool[:, :]; s where n <= m & mask[m, n] else -inf", given(randn(6, 6) > -1))
def causal_and_dense_truth(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = q @ k.mT
    s = s.masked_fill(~(causal(6, 6) & mask), float("-inf"))
    return s.softmax(-1) @ v


@spelling("s where n <= m else -inf where n > m - 3 else -inf")
def masks_one_after_the_other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(~causal(6, 6), float("-inf"))
    return s.masked_fill(torch.arange(6) <= torch.arange(6)[:, None] - 3, float("-inf")).softmax(-1) @ v


@spelling("where(n > m, -10000.0, s)")
def fill_of_ten_thousand_is_arithmetic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(6, 6), -1e4).softmax(-1) @ v


@spelling("where(n >= m, -10000.0, s)")
def row_of_ten_thousands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.arange(6) >= torch.arange(6)[:, None], -1e4).softmax(-1) @ v


@spelling("pad: bool[:, :]; s + where(~(pad[b, n] & n <= m), -1000000000.0, -0.0)", given(padding().bool()))
def rows_of_billions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    allowed = mask[:, None, None, :] & causal(6, 6)
    return (q @ k.mT + (~allowed).to(q.dtype) * -1e9).softmax(-1) @ v


@spelling("s + where(n <= m, 0.0, -1000000000.0)")
def addend_of_a_billion_is_arithmetic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.where(causal(6, 6), 0.0, -1e9).to(q.dtype)).softmax(-1) @ v


@spelling("bias: f32[:, :]; s + (bias[n - m + 5, h] + where(n > m, -3.4028234663852886e+38, 0.0))", given(randn(11, 4)))
def bias_and_mask_in_one_sum(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    at = torch.arange(6)
    bias = table[at - at[:, None] + 5].permute(2, 0, 1)[None]
    bias = bias + torch.zeros(6, 6, dtype=q.dtype).masked_fill(~causal(6, 6), torch.finfo(q.dtype).min)
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling("bias: f32[:, :, :]; s + where(n >= m, -3.4028234663852886e+38, 0.0) + bias[h, m, n]", given(randn(4, 6, 6)))
def bias_after_an_added_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    mask = torch.zeros(6, 6, dtype=q.dtype)
    mask = mask.masked_fill(torch.arange(6) >= torch.arange(6)[:, None], torch.finfo(q.dtype).min)
    return (q @ k.mT + mask + bias).softmax(-1) @ v


@spelling("bias: f32[:]; s + bias[h]*float(n - m) where n <= m else -inf", given(randn(4)))
def bias_and_infinity_in_one_choice(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(6) - torch.arange(6)[:, None]
    bias = torch.where(distance <= 0, slopes[:, None, None] * distance, -math.inf)
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling("s*0.5 where n < m else -inf")
def scaled_after_infinities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).masked_fill(torch.arange(6) >= torch.arange(6)[:, None], -math.inf)
    return (s * 0.5).softmax(-1) @ v


@spelling("where(n < m, s, -3.4028234663852886e+38)*0.5")
def scaled_after_minima(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.where(torch.arange(6) < torch.arange(6)[:, None], q @ k.mT, torch.finfo(torch.float32).min)
    return (s * 0.5).softmax(-1) @ v


@spelling("bias: f32[:, :, :]; where(n < m, s, -3.4028234663852886e+38) + bias[h, m, n]", given(randn(4, 6, 6)))
def bias_after_minima_that_replace(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    s = torch.where(torch.arange(6) < torch.arange(6)[:, None], q @ k.mT, torch.finfo(torch.float32).min)
    return (s + bias).softmax(-1) @ v


@spelling("s where n <= m else -inf")
def logarithm_of_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.log(causal(6, 6).to(q.dtype))).softmax(-1) @ v


@spelling("s*where(n <= m, 1.0, 0.0)")
def mask_multiplied_with_the_scores_is_arithmetic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * causal(6, 6)).softmax(-1) @ v


# Types


@spelling("s*0.5 where n <= m else =min", given(dtype=torch.bfloat16))
def upcast_by_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5
    s = s.masked_fill(~causal(6, 6), torch.finfo(s.dtype).min)
    return F.softmax(s, dim=-1, dtype=wide(q)).to(q.dtype) @ v


@spelling("s*0.5 where n <= m else =min", given(dtype=torch.bfloat16))
def upcast_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = ((q @ k.mT) * 0.5).to(wide(q))
    s = s.masked_fill(~causal(6, 6), torch.finfo(s.dtype).min)
    return F.softmax(s, dim=-1).type_as(q) @ v


@spelling("s*0.5", given(dtype=torch.bfloat16))
def upcast_of_query_and_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.to(wide(q)) @ k.to(wide(q)).mT) * 0.5).softmax(-1).to(v.dtype) @ v


@spelling("s*0.5", given(dtype=torch.bfloat16))
def everything_upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q.to(wide(q)) @ k.to(wide(q)).mT) * 0.5).softmax(-1) @ v.to(wide(q))).to(q.dtype)


@spelling("s*0.5 + where(n >= m + 1, -65504.0, 0.0)", given(dtype=torch.float16))
def half_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((6, 6), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return torch.softmax((q @ k.mT) * 0.5 + mask, -1) @ v


@spelling("s*0.5 where n < m + 1 else -inf", given(dtype=torch.bfloat16))
def single_precision_minimum_cast_to_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((6, 6), torch.finfo(wide(q)).min, dtype=wide(q)).triu(1).to(q.dtype)
    return torch.softmax((q @ k.mT) * 0.5 + mask, -1) @ v


@spelling("s*0.5", given(dtype=torch.float64))
def double_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


# Dropout that does nothing


@spelling("s*0.5")
def dropout_of_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(((q @ k.mT) * 0.5).softmax(-1), p=0.0, training=True) @ v


@spelling("s*0.5")
def dropout_when_not_training(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(((q @ k.mT) * 0.5).softmax(-1), p=0.3, training=False) @ v


# Fewer KV heads than query heads


@spelling("s*0.5", given(Hkv=2), shape="B2 H4/2 M6 N6 D4")
def grouped_by_repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1)
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    B, Hkv, N, D = x.shape
    return x[:, :, None, :, :].expand(B, Hkv, groups, N, D).reshape(B, Hkv * groups, N, D)


@spelling("s*0.5 where n < m + 1 else -inf", given(Hkv=2), shape="B2 H4/2 M6 N6 D4")
def grouped_by_expand_and_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ repeat_kv(k, 2).mT) * 0.5 + torch.full((6, 6), -math.inf).triu(1)
    return s.softmax(-1) @ repeat_kv(v, 2)


@spelling("s*0.5", given(Hkv=1), shape="B2 H4/1 M6 N6 D4")
def one_kv_head_by_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5", given(Hkv=1), shape="B2 H4/1 M6 N6 D4")
def one_kv_head_by_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.expand(2, 4, 6, 4), v.expand(-1, 4, -1, -1)
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5", given(Hkv=2), shape="B4 H2/1 M6 N6 D4")
def grouped_by_five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.view(2, 2, 2, 6, 4)
    weights = ((grouped @ k[:, :, None].mT) * 0.5).softmax(-1)
    return (weights @ v[:, :, None]).view(2, 4, 6, 4)


@spelling("s*0.5", given(Hkv=2), shape="B4 H2/1 M6 N6 D4")
def grouped_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.view(2, 2, 2, 6, 4)
    weights = (torch.einsum("bhgmd,bhnd->bhgmn", grouped, k) * 0.5).softmax(-1)
    return torch.einsum("bhgmn,bhnd->bhgmd", weights, v).reshape(2, 4, 6, 4)


# Operands that are shared


@spelling("s*0.3", lambda: (randn(2, 6, 8),), shape="B2 H1 M6 N6 D8")
def one_tensor_for_all_three(x: Tensor) -> Tensor:
    return ((x @ x.mT) * 0.3).softmax(-1) @ x


@spelling("s", lambda: (*(x[:, :1] for x in qkv()[:2]), qkv()[2]), shape="B2 H4 M6 N6 D4")
def scores_shared_by_all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).expand(2, 4, 6, 6).softmax(-1) @ v


@spelling("s", lambda: (qkv()[0], qkv(Hkv=2)[1], qkv()[2]), shape="B2 H4 M6 N6 D4")
def fewer_heads_of_keys_than_of_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v


@spelling("s", lambda: (*qkv()[:2], randn(6, 4)))
def values_shared_by_heads_and_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling("s", lambda: (randn(4, 6, 4), *qkv()[1:]))
def learned_queries_shared_by_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling("s", lambda: (qkv()[0], qkv(B=1)[1], qkv()[2]))
def keys_shared_by_the_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@spelling("s*0.5", lambda: (qkv()[0], qkv(B=1, Hkv=1)[1], qkv(Hkv=1)[2]), shape="B2 H4/1 M6 N6 D4")
def sdpa_of_shared_keys_and_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


# Products


@spelling("s*0.5")
def flattened_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(8, 6, 4) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.5).softmax(-1), v).view(2, 4, 6, 4)


@spelling("pad: bool[:, :]; s*0.5 where pad[b, n] else -inf", given(padding().bool()))
def flattened_bmm_and_mask_of_four_dimensions(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.reshape(8, 6, 4) for x in (q, k, v))
    s = (torch.bmm(q, k.transpose(1, 2)) * 0.5).view(2, 4, 6, 6)
    s = s.masked_fill(~mask[:, None, None], float("-inf")).view(8, 6, 6)
    return torch.bmm(s.softmax(-1), v).view(2, 4, 6, 4)


@spelling("bias: f32[:, :]; s*0.5 + bias[b % 4, n]", given(randn(4, 6)))
def baddbmm_of_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    added = bias[None, :, None].expand(2, 4, 6, 6).reshape(8, 6, 6)
    q, k, v = (x.reshape(8, 6, 4) for x in (q, k, v))
    s = torch.baddbmm(added, q, k.mT, alpha=0.5)
    return torch.bmm(s.softmax(-1), v).view(2, 4, 6, 4)


@spelling("s*0.5")
def baddbmm_with_beta_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(8, 6, 4) for x in (q, k, v))
    s = torch.baddbmm(torch.empty(8, 6, 6, dtype=q.dtype), q, k.mT, beta=0, alpha=0.5)
    return torch.bmm(s.softmax(-1), v).view(2, 4, 6, 4)


@spelling("bias: f32[:, :]; s*0.5 + bias[m, n]*2.0", given(randn(6, 6)))
def baddbmm_with_beta(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (x.reshape(8, 6, 4) for x in (q, k, v))
    s = torch.baddbmm(bias[None], q, k.mT, beta=2.0, alpha=0.5)
    return torch.bmm(s.softmax(-1), v).view(2, 4, 6, 4)


@spelling("s*0.5")
def einsum_heads_second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.5).softmax(-1), v)


@spelling("s*0.5")
def einsum_heads_third(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5).softmax(-1), v)


@spelling("s*0.5")
def einsum_of_key_and_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhjd,bhij->bhid", v, (torch.einsum("bhjd,bhid->bhij", k, q) * 0.5).softmax(-1))


@spelling("s*0.5")
def einsum_with_ellipsis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ij,...jd->...id", (torch.einsum("...id,...jd->...ij", q, k) * 0.5).softmax(-1), v)


@spelling("s*0.5")
def einsum_of_transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhji", q, k) * 0.5
    return torch.einsum("bhji,bhjd->bhid", s.softmax(2), v)


@spelling("s*0.5")
def einsum_with_keys_transposed_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bihd", (torch.einsum("bhid,bhdj->bhij", q, k.mT) * 0.5).softmax(-1), v)


@spelling("s*0.5")
def scores_of_keys_by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((k @ q.mT) * 0.5).softmax(-2)
    return weights.mT @ v


@spelling("s*0.5")
def values_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ ((q @ k.mT) * 0.5).softmax(-1).mT).mT


@spelling("s*0.5")
def functional_matmul_and_method_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.nn.Softmax(dim=-1)(q.matmul(k.transpose(-2, -1)).mul(0.5)), v)


# Layouts


@spelling("s*0.5")
def output_made_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).contiguous()


@spelling("s*0.5")
def output_reshaped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 16)


@spelling("s*0.5")
def output_made_contiguous_and_viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).permute(0, 2, 1, 3).contiguous().view(2, 6, 16)


@spelling("s*0.5")
def output_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2)


@spelling("tanh(s)")
def output_split_by_a_reshape_that_is_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).tanh().softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 4, 2, 2) + 1


@spelling("s*0.5")
def output_read_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = ((q @ k.mT) * 0.5).softmax(-1) @ v
    return out.transpose(1, 2).reshape(2, 6, 16), out.sum(-1)


def projected() -> tuple[object, ...]:
    return randn(2, 6, 16, seed=1), randn(16, 16, seed=2) / 4, randn(16, 16, seed=3) / 4, randn(16, 16, seed=4) / 4


@spelling("s*0.5", projected)
def projections_with_heads_in_memory_order(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(2, 6, 4, 4).transpose(1, 2) for w in (wq, wk, wv))
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 16)


@spelling("s*0.5", lambda: (randn(2, 6, 16, seed=1), randn(48, 16, seed=2) / 4))
def one_projection_split_by_chunk(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (y.view(2, 6, 4, 4).transpose(1, 2) for y in F.linear(x, w).chunk(3, dim=-1))
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 16)


@spelling("s*0.5", lambda: (randn(2, 6, 16, seed=1), randn(48, 16, seed=2) / 4))
def one_projection_split_by_unbind(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = F.linear(x, w).reshape(2, 6, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 16)


@spelling("s*0.5", lambda: (randn(2, 6, 16, seed=1), randn(48, 16, seed=2) / 4))
def one_projection_split_by_index(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w).reshape(2, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)
    return (((y[0] @ y[1].mT) * 0.5).softmax(-1) @ y[2]).transpose(1, 2).reshape(2, 6, 16)


@spelling("s*0.5", lambda: (randn(2, 6, 16, seed=1), randn(48, 16, seed=2) / 4))
def heads_outside_of_the_three(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = F.linear(x, w).view(2, 6, 4, 12).transpose(1, 2).split(4, dim=-1)
    return (((q @ k.mT) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 6, 16)


@spelling("s*0.5", lambda: tuple(x.transpose(1, 2) for x in qkv()))
def inputs_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * 0.5).softmax(-1) @ v.transpose(1, 2)


@spelling("s*0.5", lambda: tuple(x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for x in qkv()))
def inputs_not_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5", lambda: tuple(x.repeat_interleave(2, -1)[..., ::2] for x in qkv()), gradients=False)
def inputs_with_gaps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5", lambda: tuple(randn(6, 2, 16, seed=i) for i in range(3)))
def sequence_first_as_multi_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(6, 8, 4).transpose(0, 1) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * 0.5).softmax(-1), v).transpose(0, 1).contiguous().view(6, 2, 16)


@spelling("s*0.5", lambda: tuple(x[:, 0] for x in qkv()))
def three_dimensions_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5 where n <= m else -inf", lambda: tuple(x[0, 0] for x in qkv()))
def two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.T) * 0.5).masked_fill(~causal(6, 6), float("-inf")).softmax(-1) @ v


@spelling("s*0.5", lambda: tuple(x[0, 0] for x in qkv()))
def two_dimensions_by_mm_and_addmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.addmm(torch.zeros((), dtype=q.dtype), q, k.t(), beta=0, alpha=0.5)
    return torch.mm(s.softmax(-1), v)


@spelling("s*0.5", lambda: tuple(randn(2, 3, 4, 6, 4, seed=i) for i in range(3)))
def five_dimensions_of_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling(
    "mask: bool[:, :, :]; s*0.5 where ~mask[b % 3, m, n] else -inf",
    lambda: (*(randn(2, 3, 4, 6, 4, seed=i) for i in range(3)), randn(3, 6, 6) < -1),
)
def five_dimensions_of_windows_and_a_mask(q: Tensor, k: Tensor, v: Tensor, shifted: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).masked_fill(shifted[None, :, None], float("-inf")).softmax(-1) @ v


@spelling(
    "bias: f32[:, :, :]; bias2: f32[:, :, :]; s*0.5 + bias[h, m, n] + bias2[b % 3, m, n]",
    lambda: (*(randn(6, 4, 6, 4, seed=i) for i in range(3)), randn(4, 6, 6), randn(3, 6, 6)),
)
def shifted_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    s = (q @ k.mT) * 0.5 + bias[None]
    s = s.view(2, 3, 4, 6, 6) + mask[None, :, None]
    return s.view(6, 4, 6, 6).softmax(-1) @ v


@spelling("s", lambda: qkv(B=4, H=4, M=4, D=4))
def output_of_an_einsum_in_memory_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@spelling("bias: f32[:, :]; s + bias[m, b]", lambda: (*qkv(B=4, H=4, M=4, D=4), randn(4, 4)))
def bias_of_batch_and_queries_where_all_sizes_are_equal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias.mT[:, None, :, None]).softmax(-1) @ v


@spelling("s", lambda: qkv(B=4, H=4, M=4, D=4))
def all_dimensions_permuted_where_all_sizes_are_equal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.permute(1, 2, 3, 0) @ k.permute(1, 2, 0, 3)).softmax(-1) @ v.permute(3, 1, 2, 0)


@spelling("s", lambda: qkv(B=4, H=4, M=4, D=4))
def batch_and_heads_of_the_scores_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).transpose(0, 1).softmax(-1) @ v


# Sizes


@spelling("s*0.5", given(M=3, N=7, Dv=5))
def more_keys_than_queries_and_wider_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


for case, sizes in {
    "one_query": {"M": 1, "N": 6},
    "one_row_of_the_batch": {"B": 1},
    "one_head": {"H": 1},
    "one_row_and_one_head": {"B": 1, "H": 1},
    "one_of_depth": {"D": 1, "Dv": 4},
    "one_of_value_depth": {"Dv": 1},
}.items():

    @spelling("s*0.5", given(**sizes), name=case)
    def of_these_sizes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5 where n <= 5 else -inf", given(M=1, N=6))
def one_query_of_a_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(1) + 5
    return ((q @ k.mT) * 0.5).masked_fill(torch.arange(6) > at[:, None], float("-inf")).softmax(-1) @ v


@spelling("s*0.5", given(N=1))
def one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5", given(M=1, N=1))
def one_query_and_one_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@spelling("s*0.5")
def weights_set_to_zero_nowhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeBERTa's softmax with the mask of a batch without padding."""
    masked = ~torch.ones(2, 1, 1, 6).bool()
    scores = ((q @ k.mT) * 0.5).masked_fill(masked, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(masked, 0.0) @ v


@spelling("s*0.5")
def weights_put_where_nobody_reads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BigBird's weights of all blocks side by side."""
    weights = ((q @ k.mT) * 0.5).softmax(-1)
    kept = torch.zeros(2, 4, 6, 8, dtype=q.dtype)
    kept[..., :2] = weights[..., :2]
    kept.scatter_(3, torch.arange(2, 6).expand(2, 4, 6, 4), weights[..., 2:])
    kept.view(2, 24, 8)[:, torch.arange(6), :6] = weights[:, 0]
    return weights @ v


@spelling("pad: bool[:, :]; s where (n < 2 | n <= m + 2) & pad[b, n] else -inf", given(padding().bool()))
def prefix_joined_to_a_triangle(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    allowed = torch.cat([torch.ones(6, 2).bool(), torch.ones(6, 4).tril().bool()], -1)
    return (q @ k.mT).masked_fill(~(allowed & pad[:, None, None]), -torch.inf).softmax(-1) @ v


def at_distances(x: Tensor, table: Tensor) -> Tensor:
    """A product with each distance between two tokens, at the distance of each query and key (DeBERTa)."""
    distance = torch.arange(6)[:, None] - torch.arange(6) + 5
    return (x @ table.mT / math.sqrt(8.0)).gather(-1, distance.expand(2, 4, 6, 6))


def relative(x: Tensor, table: Tensor) -> Tensor:
    """The same with a projection of the distances."""
    return at_distances(x, table @ torch.linspace(-1, 1, 16, dtype=x.dtype).view(4, 4))


TABLE = randn(2, 4, 11, 4, seed=21)


@spelling(
    "bias: f32[:, :, :, :]; pad: bool[:, :]; s + bias[b, h, m, n] where pad[b, n] else =min",
    given(TABLE, padding().bool()),
)
def padding_over_a_bias_made_of_q_and_k(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """What is made of products with q and k is no mask itself, so that the padding is one."""
    scores = q @ k.mT + (relative(q, table) + relative(k, table).mT)
    return scores.masked_fill(~pad[:, None, None], torch.finfo(q.dtype).min).softmax(-1) @ v


def with_a_least_row(table: Tensor, copy: bool = False) -> Tensor:
    """A projection of which one row is written over by numbers as low as a mask's."""
    projected = table @ torch.linspace(-1, 1, 16, dtype=table.dtype).view(4, 4)
    projected = projected.clone() if copy else projected
    projected[:, :, 3] = torch.finfo(torch.float32).min / 64
    return projected


def other_biases() -> dict[str, Callable[..., Tensor]]:
    least = torch.finfo(torch.float32).min
    return {
        "made of no q or k": lambda q, k, table: relative(table[:, :, :6] * 2, table),
        "with a table that is given": lambda q, k, table: at_distances(q, table),
        "with a projection that is written to": lambda q, k, table: at_distances(q, with_a_least_row(table)),
        "with a copy that is written to": lambda q, k, table: at_distances(q, with_a_least_row(table, copy=True)),
        "scaled twice": lambda q, k, table: relative(q * 2.0**15 * 2.0**15, table),
        "a table by itself": lambda q, k, table: table.sum(-1)[:, :, :6, None] * table.sum(-1)[:, :, None, :6],
        "times a mask": lambda q, k, table: relative(q, table) * torch.where(table[:, :, :6, :1] > 2, least / 16, 0.0),
        "times a large number": lambda q, k, table: relative(q, table) * 1e30,
        "divided by a small number": lambda q, k, table: relative(q, table) / 1e-30,
        "written to": lambda q, k, table: (
            relative(q, table).add(0.0).view(8, 6, 6).clamp_(min=least / 16).view(2, 4, 6, 6)
        ),
        "times an unknown number": lambda q, k, table: relative(q, table) * table.sum(),
        "chosen": lambda q, k, table: torch.where(table[:, :, :6, :1].mT > 2, least, relative(q, table)),
    }


@pytest.mark.parametrize("bias", other_biases().values(), ids=other_biases().keys())
def test_a_bias_that_may_be_a_mask(bias: Callable[..., Tensor]) -> None:
    """Near misses of the bias above: the padding stays in the score's arithmetic, which is right whatever the bias holds."""

    def padded(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
        scores = q @ k.mT + bias(q, k, table)
        return scores.masked_fill(~pad[:, None, None], torch.finfo(q.dtype).min).softmax(-1) @ v

    (remark,) = check(padded, *qkv(), TABLE, padding().bool(), gradients=False).remarks
    assert "where(" in remark.score


# In place


@spelling("s", gradients=False)
def all_of_the_key_written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is added to is another tensor from then on; with gradients eager refuses it."""
    k = k * 1
    weights = (q @ k.mT).softmax(-1)
    k.add_(1)
    return weights @ v + k


@spelling("s*0.5 where n < m + 1 else -inf")
def scaled_and_masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    s *= 0.5
    s += torch.full((6, 6), -math.inf).triu(1)
    return s.softmax(-1) @ v


@spelling("s/2.0 where n < m + 1 else -inf")
def divided_and_filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = (q @ k.mT).div_(2.0)
    s.masked_fill_(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
    return s.softmax(-1) @ v


@spelling("s where n < m + 1 else +min")
def mask_made_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((6, 6), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask.triu_(1)
    return (q @ k.mT).add_(mask).softmax(-1) @ v


@spelling("s where n <= m else -inf")
def mask_filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(6, 6, dtype=q.dtype)
    mask.masked_fill_(~causal(6, 6), float("-inf"))
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling("s*0.5")
def output_written_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ((q @ k.mT) * 0.5).softmax(-1) @ v
    out += 1
    return out


@spelling("tanh(s)")
def output_written_in_place_after_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ((q @ k.mT).tanh().softmax(-1) @ v).transpose(1, 2).contiguous()
    out.mul_(2)
    return out


@spelling("tanh(s)")
def output_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (q @ k.mT).tanh().softmax(-1) @ v
    out.transpose(1, 2)[:, 0] = 0
    return out


# Modes


@spelling("s*0.5", lambda: (*qkv(), randn(4, 4)))
def autocast_ends_with_the_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = ((q @ k.mT) * 0.5).softmax(-1) @ v
    return out.to(w.dtype) @ w


@spelling("s*0.5 where n <= m else =min")
def autocast_and_an_upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        s = (q @ k.mT) * 0.5
        s = s.masked_fill(~causal(6, 6), torch.finfo(s.dtype).min)
        return s.softmax(-1, dtype=wide(q)).to(q.dtype) @ v


@spelling("mask: bool[:, :]; s*0.5 where mask[m, n] else 0row", given(randn(6, 6) > -1))
def autocast_and_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("s*0.5 where n <= m else 0row")
def autocast_rounds_what_masks_to_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(6, 6), 0.0, torch.finfo(torch.float32).min).to(q.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("s*0.5 where n <= m else +min where n > m - 3 else +min where n <= m | n > m - 3 else 0row")
def sdpa_with_two_masks_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = torch.arange(6) > torch.arange(6)[:, None] - 3
    first, second = (
        torch.zeros(6, 6, dtype=q.dtype).masked_fill(~x, torch.finfo(q.dtype).min) for x in (causal(6, 6), near)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=first + second)


@spelling("s*0.5 where n < m else +min where n < m - 1 else +min where n < m | n < m - 1 else 0row")
def sdpa_with_all_keys_of_a_row_masked_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (
        torch.zeros(6, 6, dtype=q.dtype).masked_fill(torch.ones(6, 6).triu(at).bool(), torch.finfo(q.dtype).min)
        for at in (0, -1)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=first + second)[:, :, ::5]


@spelling("s*0.5 where n <= m else +min")
def autocast_leaves_the_least_number_of_its_type(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(6, 6), 0.0, torch.finfo(torch.bfloat16).min).to(q.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("s")
def all_of_it_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        out = (q @ k.mT).softmax(-1) @ v
    return out * q


# scaled_dot_product_attention


@spelling("s*0.5")
def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@spelling("s*0.3 where n <= m else 0row", given(M=6, N=9))
def sdpa_causal_with_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@spelling("s*0.5 where n <= m else 0row")
def sdpa_with_a_causal_mask_of_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(6, 6))


@spelling("pad: bool[:, :]; s*0.5 where pad[b, n] else 0row", given(padding().bool()))
def sdpa_with_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].expand(2, 1, 6, 6))


@spelling("mask: bool[:, :, :]; s*0.5 where mask[b, m, n] else 0row", given(randn(2, 1, 6, 6) > 1))
def sdpa_with_rows_of_no_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("s*0.5 where n < m + 1 else 0row")
def sdpa_with_a_mask_of_infinities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((6, 6), -math.inf, dtype=q.dtype).triu(1))


@spelling("s*0.5 where n < m + 1 else +min")
def sdpa_with_a_mask_of_minima(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.full((6, 6), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    )


@spelling(
    "bias: f32[:, :, :]; s*0.5 + bias[h, m, n] where bias[h, m, n] != -inf else 0row",
    given(
        randn(1, 4, 6, 6).masked_fill(torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4, -math.inf)
    ),
    gradients=False,
)
def sdpa_with_a_dense_addend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("bias: f32[:, :, :]; s*0.5 + bias[h, m, n] where bias[h, m, n] != -inf else 0row", given(randn(1, 4, 6, 6)))
def sdpa_with_a_learned_addend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling("s*0.5 where n <= m else 0row", given(Hkv=2), shape="B2 H4/2 M6 N6 D4")
def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@spelling("s*0.5 where n <= m else 0row", given(Hkv=2), shape="B2 H4/2 M6 N6 D4")
def sdpa_of_repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), is_causal=True)


@spelling("s*0.5", lambda: tuple(x[:, 0] for x in qkv()))
def sdpa_of_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@spelling("pad: bool[:, :]; s*0.5 where pad[b, n] else 0row", given(padding().bool(), dtype=torch.bfloat16))
def sdpa_transposed_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    return out.transpose(1, 2).contiguous().view(2, 6, 16)


# Sizes that change


DYNAMIC: list[Any] = []


def dynamic(text: str, *more: Callable[[int, int], Tensor], **sizes: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of q, k, v and `more(B, N)`, all of which change with the batch and the length."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        DYNAMIC.append(pytest.param(fn, more, text, sizes, id=fn.__name__))
        return fn

    return register


@dynamic("s*0.5")
def any_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5).softmax(-1) @ v


@dynamic("s*0.5 where n <= m else -inf")
def any_length_causal_by_comparison(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    return ((q @ k.mT) * 0.5).masked_fill(at > at[:, None], -math.inf).softmax(-1) @ v


@dynamic("s*0.5 where n < m + 1 else +min")
def any_length_causal_by_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    N = q.size(-2)
    mask = torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    return ((q @ k.mT) * 0.5 + mask).softmax(-1) @ v


@dynamic("s*0.5 where n <= m else -inf")
def any_length_causal_by_a_slice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    N = v.shape[2]
    allowed = torch.ones(16, 16, dtype=torch.bool).tril()[:N, :N]
    return torch.where(allowed, (q @ k.mT) * 0.5, -math.inf).softmax(-1) @ v


@dynamic("s*0.5 where n <= m & n > m - 3 else -inf")
def any_length_in_a_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m, n = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return ((q @ k.mT) * 0.5).masked_fill(~((n <= m) & (n > m - 3)), -math.inf).softmax(-1) @ v


@dynamic("pad: bool[:, :]; s*0.5 where n <= m & pad[b, n] else +min", lambda B, N: torch.arange(B * N).view(B, N) > 1)
def any_length_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    allowed = (at <= at[:, None]) & mask[:, None, None, :]
    added = torch.zeros((), dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return ((q @ k.mT) * 0.5 + added).softmax(-1) @ v


@dynamic("s*0.5 where n <= m else -inf", Hkv=2)
def any_length_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, M, D = q.shape
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    at = torch.arange(M)
    s = ((q @ k.transpose(2, 3)) * 0.5).masked_fill(at > at[:, None], -math.inf)
    return (s.softmax(-1) @ v).transpose(1, 2).contiguous().view(B, M, H * D)


@dynamic("s*0.5")
def any_length_flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, H, M, D = q.shape
    q, k, v = (x.reshape(B * H, M, D) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.mT) * 0.5).softmax(-1), v).view(B, H, M, D).transpose(1, 2).reshape(B, M, H * D)


@dynamic("s*0.5 where n <= m else 0row")
def any_length_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@dynamic("pad: bool[:, :]; s*0.5 where pad[b, n] else 0row", lambda B, N: torch.arange(B * N).view(B, N) > 1)
def any_length_sdpa_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])


@dynamic("bias: f32[:, :, :]; s*0.5 + bias[h, m, n]", lambda B, N: randn(4, N, N))
def any_length_with_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize(("fn", "more", "text", "sizes"), DYNAMIC)
def test_one_compile_serves_two_sizes(
    fn: Callable[..., Any], more: tuple[Callable[[int, int], Tensor], ...], text: str, sizes: dict[str, Any]
) -> None:
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        for B, N in ((5, 6), (3, 9)):
            inputs = (*qkv(B=B, M=N, **sizes), *(make(B, N) for make in more))
            for x in inputs:
                for dim in range(x.dim()):
                    if x.shape[dim] in (B, N):
                        torch._dynamo.mark_dynamic(x, dim)
            compare(fn, compiled, *inputs)
    assert [verdict(remark) for report in reports for remark in report.remarks] == [text]


@pytest.mark.parametrize(
    "fn", [any_length_grouped, any_length_flattened, any_length_causal_by_comparison, any_length_sdpa]
)
def test_heads_and_depth_that_change(fn: Callable[..., Any]) -> None:
    compiled = torch.compile(fn, backend="attnfuse", dynamic=True, options={"downstream": "aot_eager"})
    for B, H, N, D in ((2, 4, 6, 8), (3, 8, 9, 16)):
        Hkv = H // 2 if fn is any_length_grouped else H
        compare(fn, compiled, *qkv(B, H, N, D=D, Hkv=Hkv), gradients=False)


def test_only_the_number_of_keys_changes() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(k.shape[2])
        s = (q @ k.mT).masked_fill(at > at[-q.shape[2] :, None], -math.inf)
        return s.softmax(-1) @ v

    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        for N in (7, 12):
            q, k, v = qkv(M=3, N=N)
            for x in (k, v):
                torch._dynamo.mark_dynamic(x, 2)
            compare(fn, compiled, q, k, v)
    assert [verdict(remark) for report in reports for remark in report.remarks] == [
        "pos: i64[:]; s where ~n > pos[m] else -inf"
    ]


# Dropout


@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("spelling", ["dropout", "sdpa"])
def test_dropout(spelling: str, p: float) -> None:
    """With the identity as v the output shows the weights: each is zero or divided by 1 - p, in the gradient as well."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return F.dropout(((q @ k.mT) * 0.5).softmax(-1), p) @ v

    q, k, _ = qkv(B=3, M=32, N=40)
    v = torch.eye(40).expand(3, 4, 40, 40)
    q.requires_grad_()
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})
    outs = []
    with listening(reports.append):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(compiled(q, k, v))
        outs.append(compiled(q, k, v))
    assert [verdict(remark) for report in reports for remark in report.remarks] == [f"dropout {p}; s*0.5"]
    first, again, other, next_one = (out.detach() for out in outs)
    assert torch.equal(first, again)
    weights = ((q @ k.mT) * 0.5).softmax(-1)
    for out in (first, other, next_one):
        kept = out != 0
        torch.testing.assert_close(out, weights.detach() * kept / (1 - p))
        sigma = math.sqrt(p * (1 - p) / kept.numel())
        assert abs(kept.double().mean() - (1 - p)) < 4 * sigma
        assert (kept.double().mean((0, 1, 2)) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) * 40 / kept.numel())
    for out in (other, next_one):
        same = ((out != 0) == (first != 0)).double().mean()
        assert abs(same - (p**2 + (1 - p) ** 2)) < 0.03
    dout = randn(*first.shape, seed=5)
    (actual,) = torch.autograd.grad(outs[0], q, dout)
    (expected,) = torch.autograd.grad((weights * (first != 0) / (1 - p)), q, dout)
    torch.testing.assert_close(actual, expected)


def test_sizes_that_a_guard_has_replaced_by_sums() -> None:
    """The lengths of two windows make up a known one: one of them becomes 12 less the other, and what Dynamo knew of products of
    it is not seen in the sums that they are then (Qwen2.5-VL)."""

    def windows(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        parts = [((a @ b.transpose(2, 3)) * 0.5).softmax(-1) @ c for a, b, c in ((q, k, v), (q2, k2, v2))]
        return torch.cat([part.transpose(1, 2).contiguous() for part in parts], 1).reshape(2, 12, 16)

    report = check(windows, *qkv(M=5), *qkv(M=7), dynamic=True)
    assert [verdict(remark) for remark in report.remarks] == ["s*0.5", "s*0.5"]


def test_a_tensor_that_is_a_size() -> None:
    """Longformer divides a length by torch.div, and views by what that gives."""

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = torch.div(q.shape[2], 2, rounding_mode="trunc")
        k = k.view(2, 4, half, 2, 4).flatten(2, 3)
        return ((q @ k.mT) * 0.5).softmax(-1) @ v

    (remark,) = check(folded, *qkv()).remarks
    assert verdict(remark) == "s*0.5"
