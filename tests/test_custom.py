"""Custom autograd functions that are a softmax: those whose backward is autograd's own are fused, others keep theirs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness import check, qkv, verdict

LEAST = torch.finfo(torch.float32).min


def function(
    forward: Callable[[Tensor, Tensor], Tensor],
    backward: Callable[..., Tensor] = lambda grad, weights, mask: torch._softmax_backward_data(
        grad, weights, -1, weights.dtype
    ),
    saved: Callable[[Tensor, Tensor], Tensor] = lambda weights, scores: weights,
) -> Any:
    """A function of scores and a mask that is true where a key is not seen."""

    class Weights(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
            weights = forward(scores, mask)
            ctx.save_for_backward(saved(weights, scores), mask)
            return weights

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return backward(grad, *ctx.saved_tensors), None

    return Weights.apply


def filled(scores: Tensor, mask: Tensor, value: float = LEAST) -> Tensor:
    return scores.masked_fill(mask, value)


def in_place(scores: Tensor, mask: Tensor) -> Tensor:
    """SEW-D's and DeBERTa's XSoftmax."""
    weights = torch.softmax(filled(scores, mask), -1)
    weights.masked_fill_(mask, 0)
    return weights


OWN: dict[str, Any] = {
    "s*0.5": function(lambda scores, mask: scores.softmax(-1)),
    "pad: bool[:, :]; s*0.5 where ~pad[b, n] else 0row": function(in_place),
}
OTHER: dict[str, Any] = {
    "another factor": function(
        in_place, lambda grad, w, mask: torch._softmax_backward_data(grad, w, -1, w.dtype) * 0.5
    ),
    "written out": function(in_place, lambda grad, w, mask: w * (grad - (grad * w).sum(-1, keepdim=True))),
    "another dimension": function(in_place, lambda grad, w, mask: torch._softmax_backward_data(grad, w, -2, w.dtype)),
    "of the scores": function(in_place, saved=lambda weights, scores: scores),
    "twice the gradient": function(
        in_place, lambda grad, w, mask: torch._softmax_backward_data(grad + grad, w, -1, w.dtype)
    ),
    "straight through": function(in_place, lambda grad, w, mask: grad),
    "masked before only": function(lambda scores, mask: filled(scores, mask).softmax(-1)),
    "masked after only": function(lambda scores, mask: scores.softmax(-1).masked_fill(mask, 0)),
    "two masks": function(lambda scores, mask: filled(scores, mask).softmax(-1).masked_fill(~mask, 0)),
    "filled with another number": function(lambda scores, mask: filled(scores, mask).softmax(-1).masked_fill(mask, 1)),
    "scaled": function(lambda scores, mask: filled(scores * 2, mask).softmax(-1).masked_fill(mask, 0)),
    "in another type": function(lambda scores, mask: scores.softmax(-1, dtype=torch.float64).to(scores.dtype)),
    "twice": function(lambda scores, mask: scores.softmax(-1).softmax(-1)),
}


def given(mask: Tensor) -> tuple[Tensor, ...]:
    return (*qkv(), mask)


def attention(weights: Any) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return weights(q @ k.mT * 0.5, mask[:, None, None]) @ v + (q @ k.mT).tanh().softmax(-1) @ v

    return model


PADDING = torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6]).bool()
"""The second sequence has no key at all."""


@pytest.mark.parametrize(("spec", "weights"), OWN.items(), ids=["plain", "masked"])
def test_a_backward_that_is_autograds_own(spec: str, weights: Any) -> None:
    report = check(attention(weights), *given(PADDING))
    assert [verdict(remark) for remark in report.remarks] == [spec, "tanh(s)"]


@pytest.mark.parametrize("weights", OTHER.values(), ids=OTHER.keys())
def test_another_function_keeps_its_backward(weights: Any) -> None:
    report = check(attention(weights), *given(PADDING))
    assert [verdict(remark) for remark in report.fused] == ["tanh(s)"]
    assert {remark.code for remark in report.missed} == {"AF036"}
