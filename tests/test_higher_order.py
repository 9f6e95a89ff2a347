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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.harness import check, qkv, randn, since_2_13

CAUSAL_AND_PADDED = "s*0.5 where n <= m & pad[b, n] else +min"


def spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5 + mask, -1) @ v


region = torch.compiler.nested_compile_region(spelled_out)


def layer(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """x [B, M, 16] and its attention with 4 heads; weights [4, 16, 16] of q, k, v and the output."""
    q, k, v = ((x @ weight).unflatten(-1, (4, 4)).transpose(1, 2) for weight in weights[:3])
    return x + spelled_out(q, k, v, mask).transpose(1, 2).flatten(2) @ weights[3]


def padded(M: int, pad: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of a causal decoder whose batch is padded."""
    at = torch.arange(M)
    allowed = (at <= at[:, None]) & pad[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def padding() -> Tensor:
    pad = torch.ones(2, 6, dtype=torch.bool)
    pad[1, :2] = False
    return pad


def stack(once: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Three layers that share a mask, each with weights of its own."""

    def model(x: Tensor, pad: Tensor, *weights: Tensor) -> Tensor:
        mask = padded(x.shape[1], pad, x.dtype)
        for own in weights:
            x = once(x, own, mask)
        return x

    return model


def stacked() -> tuple[Tensor, ...]:
    """The inputs of a stack."""
    return randn(2, 6, 16), padding(), *(randn(4, 16, 16, seed=at) * 0.25 for at in range(3))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("downstream", ["aot_eager", "inductor"])
def test_a_region_that_is_compiled_once_reads_the_mask_around_it(downstream: str, gradients: bool) -> None:
    model = stack(torch.compiler.nested_compile_region(layer))
    report = check(model, *stacked(), options={"downstream": downstream}, gradients=gradients)
    assert [r.score for r in report.fused] == [CAUSAL_AND_PADDED]
    assert report.fused == report.remarks


def test_a_region_with_another_mask_at_each_call_keeps_it_as_data() -> None:
    once = torch.compiler.nested_compile_region(layer)

    def model(x: Tensor, pad: Tensor, weights: Tensor) -> Tensor:
        mask = padded(x.shape[1], pad, x.dtype)
        return once(once(x, weights, mask), weights, mask.roll(1, -1))

    (remark,) = check(model, *stacked()[:3]).remarks
    assert remark.kind == "fused"
    assert "<=" not in remark.score


@since_2_13
@pytest.mark.parametrize("downstream", ["aot_eager", "inductor"])
def test_bodies_of_one_region_with_a_mask_each(downstream: str) -> None:
    """Called in the graph and within another region, a region has two bodies, and Dynamo gives them one name."""
    once = torch.compiler.nested_compile_region(layer)

    @torch.compiler.nested_compile_region
    def around(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        return once(x * 2, weights, mask) * 1.5

    def model(x: Tensor, pad: Tensor, weights: Tensor) -> Tensor:
        forward = padded(x.shape[1], pad, x.dtype)
        at = torch.arange(x.shape[1])
        backward = torch.zeros(6, 6, dtype=x.dtype).masked_fill(at < at[:, None], -torch.inf)
        return once(x, weights, forward) + around(x, weights, backward)

    report = check(model, *stacked()[:3], options={"downstream": downstream})
    assert {r.score for r in report.fused} == {CAUSAL_AND_PADDED, "s*0.5 where n >= m else -inf"}


@pytest.mark.parametrize("gradients", [True, False])
def test_a_region_that_returns_the_attention(gradients: bool) -> None:
    """Inductor overwrites what a body both returns and keeps for the backward (torch 2.13); without gradients nothing is kept."""

    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return region(q, k, v, bias) + region(q * 2, k, v, bias)

    report = check(model, *qkv(), randn(4, 6, 6), options={"downstream": "inductor"}, gradients=gradients)
    assert [r.code for r in report.remarks] == ["AF036" if gradients else "AF000"]


@since_2_13
def test_outputs_of_a_region_that_have_no_gradient() -> None:
    @torch.compiler.nested_compile_region
    def once(x: Tensor, weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(x, weights, mask)
        return out, out.detach().square().mean()

    def model(x: Tensor, pad: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        mask, total = padded(x.shape[1], pad, x.dtype), x.detach().sum()
        for own in weights:
            x, size = once(x, own, mask)
            total = total + size
        return x, total

    report = check(model, *stacked())
    assert report.fused


def test_a_mask_that_is_written_between_two_calls_is_read_by_each_as_it_is() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q.shape[2], pad, q.dtype)
        out = region(q, k, v, mask)
        mask.zero_()
        return out + region(q, k, v, mask)

    # with gradients stock refuses it
    check(model, *qkv(), padding(), gradients=False)


def test_what_the_mask_is_made_of_may_be_written_between_two_calls() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q.shape[2], pad, q.dtype)
        out = region(q, k, v, mask) * 2
        pad.logical_not_()
        return out + region(q, k, v, mask) * 2

    check(model, *qkv(), padding())


def test_calls_of_a_region_with_and_without_gradient() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = padded(q.shape[2], pad, q.dtype)
        out = region(q, k, v, mask)
        with torch.no_grad():
            return out + region(q, k, v, mask)

    report = check(model, *qkv(), padding())
    # one body for both: which of them it is read for cannot be told
    assert [r.code for r in report.remarks] == ["AF036", "AF036"]


def test_a_region_within_a_region() -> None:
    inner = torch.compiler.nested_compile_region(layer)

    @torch.compiler.nested_compile_region
    def outer(x: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        return inner(x * 0.5, weights, mask) + 1

    report = check(stack(outer), *stacked())
    assert [r.score for r in report.remarks] == [CAUSAL_AND_PADDED]


@pytest.mark.lenient
def test_a_region_that_fails_downstream_is_compiled_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that PyTorch made of the rewritten body is found when the original is compiled."""
    inner = compile_fx.compile_fx_inner
    hits: list[int] = []

    def failing(gm: Any, *args: Any, **kwargs: Any) -> Any:
        if not hits:
            hits.append(1)
            raise RuntimeError("injected downstream")
        return inner(gm, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", failing)
    model = stack(torch.compiler.nested_compile_region(layer))
    options = {"downstream": "inductor", "fx_graph_cache": False, "inline_scores": 0}
    report = check(model, *stacked(), options=options)
    assert hits
    assert "AF043" in {r.code for r in report.remarks}


def same_as_eager(model: Callable[..., Any], *given: Tensor) -> Report:
    """Without a float64 oracle, which has no kernels for higher-order operators."""
    reports: list[Report] = []
    torch._dynamo.reset()
    with torch.no_grad(), listening(reports.append):
        torch.testing.assert_close(torch.compile(model, backend="attnfuse")(*given), model(*given))
    (report,) = reports
    return report


def test_attention_in_a_branch_has_a_remark() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).contiguous()

        def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (F.scaled_dot_product_attention(q, k, v) * 2).contiguous()

        return torch.cond(q.sum() > 0, attention, other, (q, k, v)) + attention(q, k, v)

    report = same_as_eager(model, *qkv())
    assert sorted(r.code for r in report.remarks) == ["AF010", "AF036", "AF036"]
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

    report = check(model, *qkv())
    assert sorted(r.code for r in report.remarks) == ["AF010", "AF036"]


def _distance(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return score + (m - n)


def _blocks() -> BlockMask:
    return create_block_mask(lambda b, h, m, n: n <= m, None, None, 128, 128, device="cpu")


@pytest.mark.parametrize("blocks", ["none", "made before", "made in the graph"])
def test_flex_attention_is_kept(blocks: str) -> None:
    """Without a block mask, and where it is made in the graph, PyTorch makes one under vmap."""
    made = _blocks() if blocks == "made before" else None

    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        given = _blocks() if blocks == "made in the graph" else made
        return flex_attention(q, k, v, score_mod=_distance, block_mask=given), torch.softmax(q @ k.mT, -1) @ v

    q, k, v = (randn(1, 2, 128, 16, seed=at) for at in range(3))
    report = same_as_eager(model, q, k, v)
    assert sorted(r.code for r in report.remarks) == ["AF002", "AF010"]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def under_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One attention beside what runs under vmap, nested, and one in it."""
    scaled = torch.vmap(lambda a: torch.vmap(lambda b: b / b.norm())(a))(q)
    return plain(scaled, k, v) + torch.vmap(plain, in_dims=(0, None, 0))(q, k[0], v)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=since_2_13)])
def test_what_runs_under_vmap_is_left_as_it_is(dynamic: bool) -> None:
    report = check(under_vmap, *qkv(), dynamic=dynamic, options={"inline_scores": 0})
    assert sorted(r.code for r in report.remarks) == ["AF010", "AF036"]
    assert [r.facts["why"] for r in report.missed] == ["vmap"]


def seen_through_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    same = torch.vmap(lambda a: a.transpose(0, 1))(k)
    scores = q @ k.transpose(-1, -2)
    same.mul_(2)
    return torch.softmax(scores, -1) @ v + k


def written_behind_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    same = torch.vmap(lambda a: a)(scores)
    scores *= 0.5
    return torch.softmax(same, -1) @ v


def written_by_inplace_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    scores = q @ k.transpose(-1, -2)
    out = torch.vmap(lambda a: F.relu(a, inplace=True))(k)
    return torch.softmax(scores, -1) @ v + k + out


def written_to_an_item(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    scores = q @ k.transpose(-1, -2)

    def first_doubled(a: Tensor) -> Tensor:
        a[0].mul_(2)
        return a.sum(0)

    out = torch.vmap(first_doubled)(k)
    return torch.softmax(scores, -1) @ v + k + out.sum()


def written_by_aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    scores = q @ k.transpose(-1, -2)
    out = torch.vmap(lambda a: torch.ops.aten.mul_.Tensor(torch.ops.aten.transpose.int(a, 0, 1), 2.0))(k)
    return torch.softmax(scores, -1) @ v + k + out.sum()


WRITTEN = [seen_through_vmap, written_behind_vmap, written_by_inplace_relu, written_to_an_item, written_by_aten]


@pytest.mark.parametrize("model", WRITTEN)
def test_what_comes_out_of_vmap_may_be_what_went_in(model: Callable[..., Tensor]) -> None:
    """Each is fused wrongly, reading k or the scores after the write, where vmap is taken for something that reads only."""
    report = check(model, *qkv(), gradients=False)
    (remark,) = report.remarks
    assert remark.code in ("AF020", "AF026"), str(report)


def under_vmap_in_aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        like = torch.ops.aten.type_as.default(q, k)
        return torch.ops.aten.softmax.int(like @ k.transpose(-1, -2), -1) @ v

    return torch.vmap(one)(q, k, v) + plain(q, k, v)


def test_operators_of_aten_under_vmap() -> None:
    report = check(under_vmap_in_aten, *qkv())
    assert sorted(r.code for r in report.remarks) == ["AF010", "AF036"]
