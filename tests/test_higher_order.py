"""Attention in the bodies of higher-order operators: looked into where the body is run like the graph around it (regions that are
compiled once), left alone with a remark elsewhere, and the custom backward of a function is the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import compile_fx
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.harness import check, compare, qkv, randn, verdict

CAUSAL_AND_PADDED = "s*0.5 where n <= m & pad[b, n] else +min"


def spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.5 + mask, -1) @ v


region = torch.compiler.nested_compile_region(spelled_out)


def padded(q: Tensor, pad: Tensor) -> Tensor:
    """The additive mask of a causal decoder whose batch is padded."""
    at = torch.arange(q.shape[2])
    allowed = (at <= at[:, None]) & pad[:, None, None, :]
    return torch.where(allowed, 0.0, torch.finfo(q.dtype).min)


def padding() -> Tensor:
    pad = torch.ones(2, 6, dtype=torch.bool)
    pad[1, :2] = False
    return pad


def three(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Three layers that share a mask, each called like the last."""

    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q, pad)
        for _ in range(3):
            q = q + layer(q, k, v, mask)
        return q

    return model


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("downstream", ["aot_eager", "inductor"])
def test_a_region_that_is_compiled_once_reads_the_mask_around_it(downstream: str, gradients: bool) -> None:
    options = {"downstream": downstream, "strict": True}
    report = check(three(region), *qkv(), padding(), options=options, gradients=gradients)
    # without gradients all three calls share one body; with them q asks for one only after the first
    assert {verdict(r) for r in report.remarks} == {CAUSAL_AND_PADDED}
    assert len(report.remarks) <= 2


def test_a_region_with_another_mask_at_each_call_keeps_it_as_data() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q, pad)
        return region(q, k, v, mask) + region(q, k, v, mask.roll(1, -1))

    report = check(model, *qkv(), padding(), options={"strict": True})
    assert [r.code for r in report.remarks] == ["AF000"]
    assert "<=" not in verdict(report.remarks[0])


def test_a_mask_that_is_written_between_two_calls_is_read_by_each_as_it_is() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q, pad)
        out = region(q, k, v, mask)
        mask.zero_()
        return out + region(q, k, v, mask)

    check(model, *qkv(), padding(), options={"strict": True})


def test_what_the_mask_is_made_of_may_be_written_between_two_calls() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q, pad)
        out = region(q, k, v, mask)
        pad.logical_not_()
        return out + region(q, k, v, mask)

    check(model, *qkv(), padding(), options={"strict": True})


def test_calls_of_a_region_with_and_without_gradient() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q, pad)
        with torch.no_grad():
            first = region(q, k, v, mask)
        return first + region(q, k, v, mask)

    check(model, *qkv(), padding(), options={"strict": True})


def test_a_region_within_a_region() -> None:
    @torch.compiler.nested_compile_region
    def outer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return region(q * 2, k, v, mask) + 1

    report = check(three(outer), *qkv(), padding(), options={"strict": True})
    assert {verdict(r) for r in report.remarks} == {CAUSAL_AND_PADDED}


@pytest.mark.lenient
def test_a_region_that_fails_downstream_is_compiled_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = compile_fx.compile_fx_inner
    hits: list[int] = []

    def failing(gm: Any, *args: Any, **kwargs: Any) -> Any:
        if not hits and "attnfuse" in gm.print_readable(print_output=False):
            hits.append(1)
            raise RuntimeError("injected downstream")
        return inner(gm, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", failing)
    report = check(three(region), *qkv(), padding(), options={"downstream": "inductor", "fx_graph_cache": False})
    assert hits
    assert "AF043" in {r.code for r in report.remarks}


def test_attention_in_a_branch_has_a_remark() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.mT, -1) @ v

        def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v) * 2

        return torch.cond(q.sum() > 0, attention, mean, (q, k, v)) + attention(q, k, v)

    report = check(model, *qkv(), options={"strict": True})
    assert sorted(r.code for r in report.remarks) == ["AF000", "AF036", "AF036"]
    assert all(r.facts["why"] == "cond" and "test_higher_order" in r.source for r in report.missed)


class Halved(torch.autograd.Function):
    """A softmax whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        return 0.5 * weights * (grad - (grad * weights).sum(-1, keepdim=True))


def test_the_backward_of_a_custom_function_is_the_models_own() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = Halved.apply(q @ k.mT) @ v
        return own + torch.softmax(q @ k.mT, -1) @ v

    report = check(model, *qkv(), options={"strict": True})
    assert sorted(r.code for r in report.remarks) == ["AF000", "AF036"]


def test_flex_attention_is_kept() -> None:
    def bias(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return score + (m - n)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=bias) + torch.softmax(q @ k.mT, -1) @ v

    q, k, v = (randn(1, 2, 128, 16, seed=at) for at in range(3))
    reports: list[Report] = []
    with listening(reports.append):
        torch._dynamo.reset()
        compare(model, torch.compile(model, backend="attnfuse", options={"strict": True}), q, k, v, gradients=False)
    (report,) = reports
    assert sorted(r.code for r in report.remarks) == ["AF000", "AF002"]
