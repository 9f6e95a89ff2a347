"""Attention under autocast, no_grad and inference mode, around the compiled function and within it, mixed in one graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.harness import check, qkv, verdict
from tests.numerics import assert_close

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(6, 6, dtype=q.dtype).masked_fill(torch.arange(6) > torch.arange(6)[:, None], -torch.inf)
    return ((q @ k.mT) * 0.5 + mask).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.arange(6) <= torch.arange(6)[:, None], scale=0.5)


TEXTS = {written_out: "s*0.5 where n <= m else -inf", sdpa: "s*0.5 where n <= m else 0row"}
REGIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("attention", TEXTS)
@pytest.mark.parametrize("region", REGIONS)
def test_a_region_in_the_graph(region: str, attention: Attention) -> None:
    """One attention inside, one outside, each with its own gradient or none."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with REGIONS[region]():
            inside = attention(q, k, v)
        return attention(q * 2, k, v) + inside.detach()

    first, second = check(fn, *qkv()).remarks
    assert verdict(first) == verdict(second) == TEXTS[attention]


def test_regions_within_regions() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = written_out(q, k, v)
        with torch.no_grad():
            b = written_out(q, k, v)
            with torch.enable_grad():
                c = written_out(q, k, v * 3)
        with torch.inference_mode():
            d = sdpa(q, k, v)
        return a + b.detach() + c + d.clone()

    report = check(fn, *qkv())
    assert [verdict(remark) for remark in report.remarks] == [TEXTS[written_out]] * 3 + [TEXTS[sdpa]]


@pytest.mark.parametrize("region", ["no_grad", "inference_mode"])
def test_attention_across_the_edge_of_a_region_is_left_alone(region: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with REGIONS[region]():
            scores = (q @ k.mT) * 0.5
        return scores.clone().softmax(-1) @ v

    (remark,) = check(fn, *qkv()).remarks
    assert verdict(remark).startswith("AF034")


@pytest.mark.parametrize("attention", TEXTS)
@pytest.mark.parametrize("region", ["no_grad", "inference_mode"])
def test_called_under(region: str, attention: Attention) -> None:
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="attnfuse", options={"downstream": "aot_eager"})
    q, k, v = qkv()
    with REGIONS[region](), listening(reports.append):
        actual = compiled(q, k, v)
    assert_close(actual.clone(), attention(q, k, v), attention(q.double(), k.double(), v.double()))
    assert [verdict(r) for report in reports for r in report.remarks] == [TEXTS[attention]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ambient", [True, False], ids=["around", "within"])
@pytest.mark.parametrize("attention", TEXTS)
def test_autocast(attention: Attention, ambient: bool, dtype: torch.dtype) -> None:
    """Outputs have autocast's type and precision, gradients the inputs' type."""

    def region(here: bool) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype) if here else nullcontext()

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with region(not ambient):
            return attention(q, k, v)

    def gradients(call: Callable[..., Tensor], *, exact: bool = False) -> tuple[Tensor, ...]:
        q, k, v = (x.double() if exact else x for x in qkv())
        inputs = [x.requires_grad_() for x in (q, k, v)]
        with region(ambient and not exact):
            out = call(*inputs)
        return out.detach(), *torch.autograd.grad(out.double().square().sum(), inputs)

    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        actual = gradients(compiled)
    original, true = gradients(fn), gradients(attention, exact=True)
    assert [verdict(r) for report in reports for r in report.remarks] == [TEXTS[attention]]
    for mine, theirs, x in zip(actual, original, true, strict=True):
        assert mine.dtype == theirs.dtype
        # what autocast rounds to is the precision that the contract is about
        assert_close(mine.to(dtype), theirs.to(dtype), x, float(x.abs().max()))


class Biased(torch.nn.Module):
    """A learned bias and a mask of float32, one row of which allows no key."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(6)[None] < torch.arange(6)[:, None]
        mask = self.bias + torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype) if q.dtype == torch.float64 else mask)


@pytest.mark.parametrize("ambient", [True, False], ids=["around", "within"])
def test_autocast_rounds_a_mask_to_infinity(ambient: bool) -> None:
    """The row that allows no key is zeros there, the mean of all values without autocast."""
    model = Biased()

    def results(call: Callable[..., Tensor], *, autocast: bool) -> tuple[Tensor, ...]:
        q, k, v = (x.requires_grad_() for x in qkv())
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            out = call(q, k, v)
        return out.detach().float(), *torch.autograd.grad(out.float().square().sum(), (q, k, v, model.bias))

    def within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(q, k, v)

    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(model if ambient else within, backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        actual = results(compiled, autocast=ambient)
    assert [verdict(r) for report in reports for r in report.remarks] == [
        "bias: f32[:, :, :]; s*0.5 + bias[h, m, n] where n < m else 0row"
    ]
    assert not actual[0][:, :, 0].any()
    original = results(model, autocast=True)
    exact = results(model, autocast=False)
    for mine, theirs, x in zip(actual, original, exact, strict=True):
        scale = float(x.abs().max())
        rows = slice(1, None) if mine.dim() == 4 and mine.shape[2] == 6 else slice(None)
        mine, theirs, x = (y.to(torch.bfloat16)[..., rows, :] for y in (mine, theirs, x))
        assert_close(mine, theirs, x.double(), scale)
