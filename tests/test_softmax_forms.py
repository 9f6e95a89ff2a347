"""Softmax as people write it: by hand, with a maximum taken off, beside a sink, with its log-sum-exp; and what only looks like it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import check, qkv, randn, verdict

FORMS: list[Any] = []
OTHERS: list[Any] = []


def form(text: str, *more: Tensor) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function of q, k, v and `more` whose one attention has the spec `text`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        FORMS.append(pytest.param(fn, more, text, id=fn.__name__))
        return fn

    return register


def other(*more: Tensor) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function that is not fused."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        OTHERS.append(pytest.param(fn, more, id=fn.__name__))
        return fn

    return register


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fn", "more", "text"), FORMS)
def test_form(fn: Callable[..., Any], more: tuple[Tensor, ...], text: str, dtype: torch.dtype) -> None:
    given = [x.to(dtype) if x.is_floating_point() else x for x in (*qkv(), *more)]
    (remark,) = check(fn, *given).remarks
    short = "f32" if dtype == torch.float32 else "bf16"
    assert verdict(remark) == text.replace("f32", short)


@pytest.mark.parametrize(("fn", "more"), OTHERS)
def test_what_only_looks_like_it(fn: Callable[..., Any], more: tuple[Tensor, ...]) -> None:
    report = check(fn, *qkv(), *more)
    assert not report.fused
    assert not report.kept


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT) * 0.5


def added(allowed: Tensor, q: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, torch.finfo(q.dtype).min)


PAD = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
CAUSAL = torch.ones(6, 6).tril().bool()


# Written by hand


@form("s*0.5")
def exponentials_over_their_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@form("s*0.5")
def of_what_is_left_after_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@form("s*0.5")
def with_a_detached_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True).detach())
    return e.div(e.sum(-1, keepdim=True)).matmul(v)


@form("s*0.5")
def with_the_greatest_of_all_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.max())
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@form("s*0.5")
def times_the_reciprocal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


@form("s*0.5")
def computed_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (torch.exp(s) / torch.exp(s).sum(-1)[..., None]) @ v


@form("s*0.5")
def less_the_log_sum_exp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)) @ v


@form("s*0.5")
def of_the_logarithm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), dim=-1).exp() @ v


@form("s*0.5")
def normalised_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


@form("s*0.5 where n <= m else -inf")
def masked_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.arange(6) <= torch.arange(6)[:, None]
    s = scores(q, k).masked_fill(~causal, -math.inf)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@form("pad: bool[:, :]; s*0.5 where pad[b, n] else -inf", PAD)
def masked_after_the_exponential(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True)).masked_fill(~pad[:, None, None], 0.0)
    return (e / e.sum(-1, keepdim=True)) @ v


@form("pad: bool[:, :]; s*0.5 where pad[b, n] else -inf", PAD)
def masked_by_a_factor(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    e = torch.exp(scores(q, k)) * pad[:, None, None].to(q.dtype)
    return (e / e.sum(-1, keepdim=True)) @ v


@form("pad: bool[:, :]; s*0.5 where pad[b, n] else -inf", PAD)
def masked_by_a_choice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    e = torch.where(pad[:, None, None], torch.exp(scores(q, k)), 0.0)
    return (e @ v) / e.sum(-1, keepdim=True)


@form("s*0.5")
def softmax_of_what_is_left_after_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.max(-1, keepdim=True)[0]).softmax(-1) @ v


# Beside a sink


@form("sinks: f32[:]; s*0.5 sink sinks[h]", randn(4))
def sink_of_each_head(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat((scores(q, k), column), -1).softmax(-1)[..., :-1] @ v


@form("sinks: f32[:]; s*0.5 where n <= m else +min sink sinks[h]", randn(4))
def sink_below_the_maximum(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    mask = added(torch.arange(6) <= torch.arange(6)[:, None], q)
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat((scores(q, k) + mask, column), -1)
    both = both - both.max(dim=-1, keepdim=True).values
    weights = F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]
    return F.dropout(weights, 0.0) @ v


@form("s*0.5 sink 0.0")
def quiet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.pad(scores(q, k), (1, 0)).softmax(-1)[..., 1:] @ v


@form("sinks: f32[:, :, :]; s*0.5 sink sinks[b, h, m]", randn(2, 4, 6, 1))
def sink_first_and_by_query(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return torch.cat((sinks, scores(q, k)), 3).softmax(3).narrow(3, 1, 6) @ v


@form("pad: bool[:, :]; sinks: f32[:]; s*0.5 where pad[b, n] else -inf sink sinks[h]", randn(4), PAD)
def sink_saves_a_row_without_keys(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, pad: Tensor) -> Tensor:
    s = scores(q, k).masked_fill(~(pad & pad[:1])[:, None, None], -math.inf)
    return torch.cat((s, sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)), -1).softmax(-1)[..., :6] @ v


# With its log-sum-exp


@form("s*0.5", randn(4))
def gated_by_the_log_sum_exp(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    s = scores(q, k)
    gate = (torch.logsumexp(s, dim=-1) - sinks.view(1, -1, 1)).sigmoid()
    return (s.softmax(-1) @ v) * gate.unsqueeze(-1)


@form("s*0.5 where n <= m else -inf")
def returned_with_the_log_sum_exp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k).masked_fill(torch.arange(6) > torch.arange(6)[:, None], -math.inf)
    return s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)


@form("pad: bool[:, :]; s*0.5 where pad[b, n] else +min", PAD & torch.tensor([[True], [False]]))
def log_sum_exp_of_rows_without_keys(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k) + added(pad[:, None, None], q)
    return s.softmax(-1) @ v, (s.logsumexp(-1) * 0.5).sigmoid()


# Not a softmax over the keys, or of something else


@other()
def sum_over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / e.sum(-2, keepdim=True)) @ v


@other()
def sum_of_other_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s.exp() / (s * 2).exp().sum(-1, keepdim=True)) @ v


@other()
def something_added_to_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / (e.sum(-1, keepdim=True) + 0.5)) @ v


@other()
def maximum_over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-2, keepdim=True)).softmax(-1) @ v


@other()
def mean_taken_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return (s - 2 * s.amax(-1, keepdim=True) * s).softmax(-1) @ v


@other()
def logarithm_without_exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores(q, k), -1) @ v


@other(CAUSAL)
def sum_before_the_mask(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return ((e * allowed) / e.sum(-1, keepdim=True)) @ v


@other(randn(6, 6))
def masked_by_a_factor_that_is_no_mask(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    e = scores(q, k).exp() * factor.abs()
    return (e / e.sum(-1, keepdim=True)) @ v


@other(randn(4))
def another_column_than_the_sink_cut_off(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks.reshape(1, -1, 1, 1).expand(2, 4, 6, 1)
    return torch.cat((scores(q, k), column), -1).softmax(-1)[..., 1:] @ v


@other(randn(4))
def sink_with_a_value(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks.reshape(1, -1, 1, 1).expand(2, 4, 6, 1)
    return torch.cat((scores(q, k), column), -1).softmax(-1) @ torch.cat((v, v[:, :, :1]), 2)


@other(randn(4))
def two_columns(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    column = sinks.reshape(1, -1, 1, 1).expand(2, 4, 6, 2)
    return torch.cat((scores(q, k), column), -1).softmax(-1)[..., :-2] @ v


@other()
def sink_made_of_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.cat((s, s.mean(-1, keepdim=True)), -1).softmax(-1)[..., :-1] @ v


@other()
def log_sum_exp_over_the_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    return s.softmax(-1) @ v, s.logsumexp(-2)


@other(randn(2, 4, 6, 6))
def value_made_of_the_log_sum_exp(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ (v * s.logsumexp(-1, keepdim=True))


def test_a_softmax_that_is_normalised_once_more_has_one_remark() -> None:
    """At first it is taken for exponentials over their sum; left as it stands, the softmax in it is an anchor of its own."""

    def renormalised(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT + torch.where(pad[:, None, None], torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
        weights = scores.softmax(-1)
        return (weights / weights.sum(-1, keepdim=True)) @ v, (q @ k.mT).tanh().softmax(-1) @ v

    pad = torch.ones(2, 6, dtype=torch.bool)
    pad[1, 3:] = False
    report = check(renormalised, *qkv(), pad)
    assert [r.kind for r in report.remarks] == ["missed", "fused"]
    assert report.remarks[0].code == "AF021"
