"""Programs that look like an attention which they are not quite: each once fused into something else, found by review."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.harness import check, compare

pytestmark = pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)

MIN = torch.finfo(torch.float32).min
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def qkv(heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 4, 6, 8, generator=generator),
        torch.randn(2, heads, 6, 8, generator=generator),
        torch.randn(2, 4, 6, 8, generator=generator),
    )


def test_a_dense_mask_may_hold_the_fill_itself() -> None:
    dense = torch.zeros(2, 1, 6, 6)
    dense[1, :, :, :4] = MIN

    def two_masks(q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> Tensor:
        n = torch.arange(6)
        causal = torch.where(n[None] <= n[:, None], 0.0, MIN).to(q.dtype)
        return (q @ k.mT * 0.5 + causal + dense).softmax(-1) @ v

    report = check(two_masks, *qkv(), dense, gradients=False)
    assert "else +min" not in report.remarks[0].score


def test_a_copy_that_was_written_to_is_not_its_source() -> None:
    def cloned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = k.expand(2, 4, 6, 8).clone()
        wide[:, 0] = 0.0
        return (q @ wide.mT).softmax(-1) @ v

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = k.repeat(1, 4, 1, 1)
        wide[:, 0, 2:] = 0.5
        return F.scaled_dot_product_attention(q, wide, v, CAUSAL)

    for fn in (cloned, repeated):
        check(fn, *qkv(1))


def test_no_gradient_passes_a_view_made_under_no_grad() -> None:
    def frozen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            wide = k.expand(2, 4, 6, 8)
        return (q @ wide.mT).softmax(-1) @ v

    q, k, v = (x.requires_grad_() for x in qkv(1))
    torch._dynamo.reset()
    torch.compile(frozen, backend="attnfuse", options={"downstream": "aot_eager"})(q, k, v).sum().backward()
    assert k.grad is None or not k.grad.any()
    assert q.grad is not None
    assert q.grad.any()


def test_a_remainder_of_the_models_own_is_no_digit() -> None:
    def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return (q @ k.mT + table.reshape(8)[torch.arange(6) % 4]).softmax(-1) @ v

    check(gathered, *qkv(), torch.arange(8.0).reshape(4, 2))


def test_a_checkpoint_may_write_to_its_operands() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k = k * 1
        weights = (q @ k.mT).softmax(-1)
        y = checkpoint(lambda x: x.mul_(2.0), v * 1, use_reentrant=False)
        return weights @ y, y * 1

    check(written, *qkv(), gradients=False)


@pytest.mark.parametrize("form", ["uint8", "int8", "bf16"])
def test_positions_that_wrap_or_round(form: str) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(6)
        if form == "uint8":
            small = n.to(torch.uint8)
            allowed = (small[:, None] - small[None]) < 4
        elif form == "int8":
            small = (n * 50).to(torch.int8)
            allowed = small[None] <= small[:, None]
        else:
            wide = (n + 255).to(torch.bfloat16).float()
            allowed = wide[None] <= wide[:, None]
        return (q @ k.mT).masked_fill(~allowed, MIN).softmax(-1) @ v

    check(masked, *qkv())


def test_a_softmax_in_a_narrower_type_is_left_alone() -> None:
    def narrow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~CAUSAL, MIN)
        return scores.softmax(-1, dtype=torch.bfloat16).to(v.dtype) @ v

    report = check(narrow, *qkv(), gradients=False)
    assert [r.code for r in report.remarks] == ["AF024"]


def test_a_dense_sdpa_mask_keeps_its_nan_and_its_infinities() -> None:
    def negated(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, -w)

    w = torch.zeros(6, 6)
    w[2] = torch.inf
    check(negated, *qkv(), w, gradients=False)

    def large(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        mask = torch.where(pad[:, None, None] & CAUSAL, 0.0, -1e4).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask)

    pad = torch.ones(2, 6, dtype=torch.bool)
    pad[1, :3] = False
    report = check(large, *qkv(), pad)
    assert [r.kind for r in report.remarks] == ["fused"]


def test_an_attention_may_feed_the_next() -> None:
    def chained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).masked_fill(~CAUSAL, MIN).softmax(-1) @ v
        return (out @ k.mT).masked_fill(~CAUSAL, MIN).softmax(-1) @ v

    report = check(chained, *qkv())
    assert [r.kind for r in report.remarks] == ["fused", "fused"]


def test_in_place_operations_beside_an_attention_keep_their_types() -> None:
    def beside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flags = (q[0, 0] > 0).to(q.dtype)
        flags.logical_not_()
        counts = torch.ones(4, dtype=torch.int32)
        counts.cumsum_(0)
        return (q @ k.mT).masked_fill(~CAUSAL, MIN).softmax(-1) @ v, flags, counts

    check(beside, *qkv(), gradients=False)


@pytest.mark.parametrize("form", ["bert", "dense", "dense beside causal", "-1e9", "-1e9 beside causal"])
@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_keys_all_carry_a_huge_bias(form: str, spelling: str, dtype: torch.dtype) -> None:
    """Their log-sum-exp is finfo.min or -1e9 and has no digit left that tells the number of keys.

    The gradients of both spellings are held against the written-out one's: the library's own CPU kernel takes each weight in
    such a row for 1.
    """

    def added(q: Tensor, pad: Tensor) -> Tensor:
        least = torch.finfo(dtype).min
        n = torch.arange(6)
        causal = torch.where(n[None] <= n[:, None], 0.0, least).to(q.dtype)
        padding = (1.0 - pad.to(q.dtype))[:, None, None] * (-1e9 if form.startswith("-1e9") else least)
        if form == "dense":
            return padding.expand(2, 1, 6, 6).contiguous()
        return padding + causal if form.endswith("causal") else padding

    def written_out(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return ((q @ k.mT * 0.5 + added(q, pad)).softmax(-1) @ v).contiguous()

    def called(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, added(q, pad), scale=0.5).contiguous()

    pad = torch.ones(2, 6, dtype=torch.int64)
    pad[0] = 0
    pad[1, :2] = 0
    torch._dynamo.reset()
    fn = written_out if spelling == "eager" else called
    reports: list[Report] = []
    with listening(reports.append):
        compiled = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})
        compare(written_out, compiled, *(x.to(dtype) for x in qkv()), pad)
    assert [r.kind for report in reports for r in report.remarks] == ["fused"]
