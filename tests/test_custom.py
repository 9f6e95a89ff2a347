"""Custom autograd functions that are a softmax or dropout: those whose backward is autograd's own are read, others keep theirs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.backend import listening
from attnfuse.remark import Report
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


def mask_written_in_between(scores: Tensor, mask: Tensor) -> Tensor:
    mask = mask.clone()
    weights = torch.softmax(filled(scores, mask), -1)
    mask[..., 0] = True
    return weights.masked_fill(mask, 0)


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
    "a mask that is written to": function(mask_written_in_between),
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


def dropping(
    keep: float = 0.75,
    scale: float = 1 / 0.75,
    back: float = 1 / 0.75,
    drawn: Callable[[Tensor, float], Tensor] = lambda x, keep: (1 - torch.empty_like(x).bernoulli_(keep)).to(
        torch.bool
    ),
) -> Any:
    """SEW-D's and DeBERTa's dropout."""

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            mask = drawn(x, keep)
            ctx.save_for_backward(mask)
            return x.masked_fill(mask, 0) * scale

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (mask,) = ctx.saved_tensors
            return grad.masked_fill(mask, 0) * back

    return Drop.apply


OTHER_DROPOUT: dict[str, Any] = {
    "scaled otherwise": dropping(scale=1.5),
    "scaled otherwise on the way back": dropping(back=1.0),
    "the others kept": dropping(drawn=lambda x, keep: torch.empty_like(x).bernoulli_(keep).to(torch.bool)),
    "a mask that is not drawn": dropping(drawn=lambda x, keep: (1 - torch.ones_like(x)).to(torch.bool)),
}


def reports(drop: Any, *given: Tensor) -> tuple[Report, Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return drop((q @ k.mT * 0.5).softmax(-1)) @ v

    torch._dynamo.reset()
    found: list[Report] = []
    with listening(found.append):
        out = torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager"})(*given)
    return Report(()).merge(*found), out


def test_a_function_that_is_dropout() -> None:
    """Of weights on an identity as values the dropped ones and the scale are seen; the gradient has the same mask."""
    q, k = (torch.randn(2, 4, 64, 16, generator=torch.Generator().manual_seed(at)) for at in range(2))
    v = torch.eye(64).expand(2, 4, 64, 64).clone().requires_grad_()
    report, weights = reports(dropping(), q.requires_grad_(), k, v)
    assert str(report.fused[0].facts["spec"]) == "dropout 0.25; s*0.5"
    exact = (q @ k.mT * 0.5).softmax(-1)
    kept = weights != 0
    # of 32,768 draws: five standard deviations
    assert abs(kept.double().mean() - 0.75) < 5 * (0.75 * 0.25 / kept.numel()) ** 0.5
    torch.testing.assert_close(weights[kept], (exact / 0.75)[kept])
    (gradient,) = torch.autograd.grad(weights.sum(), v)
    torch.testing.assert_close(gradient[..., 0], weights.detach().sum(-2))


def test_dropout_of_anything_else_keeps_its_numbers() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dropping()(q.sin()), (q @ k.mT).softmax(-1) @ v

    torch._dynamo.reset()
    q, k, v = (x.requires_grad_() for x in qkv())
    compiled = torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager"})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        actual = compiled(q, k, v)[0]
        torch.manual_seed(3)
        expected = model(q, k, v)[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("drop", OTHER_DROPOUT.values(), ids=OTHER_DROPOUT.keys())
def test_another_function_is_no_dropout(drop: Any) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    report, _ = reports(drop, q, k, v)
    assert [remark.kind for remark in report.remarks] == ["missed"]
