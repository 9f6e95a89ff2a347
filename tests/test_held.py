"""Additive masks from outside the graph: where they hold -inf or finfo.min they are masks, and stay right when they hold others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import attnfuse
from attnfuse.backend import listening
from attnfuse.remark import Report
from attnfuse.templates import cover, tile_lists
from attnfuse.templates.base import Tiles
from attnfuse.templates.cover import Run
from attnfuse.templates.tile_map import EMPTY
from tests.harness import check, compare

INF = -math.inf
MIN = torch.finfo(torch.float32).min
N = 48
TEMPERATURES = torch.tensor([0.5, 0.75]).view(2, 1, 1)
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def qkv(length: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.randn(2, 2, length, 8, generator=generator).to(dtype) for _ in range(3))


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + mask).softmax(-1) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (2.0 * torch.tanh(q @ k.mT * 0.25) + mask).softmax(-1) @ v


def with_temperatures(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * TEMPERATURES + mask).softmax(-1) @ v


def given_to_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=0.5)


def window(fill: float, length: int = N, width: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    i = torch.arange(length)
    outside = (i[None] > i[:, None]) | (i[:, None] - i[None] >= width)
    return torch.zeros(length, length, dtype=dtype).masked_fill(outside, fill)


def other_masks() -> list[Tensor]:
    """What later calls may pass: other fills, rows of fills alone, fills side by side, large numbers, plain biases."""
    generator = torch.Generator().manual_seed(3)
    rows = window(INF)
    rows[5] = MIN
    rows[6, 10:] = MIN
    rows[6, :10] = INF
    large = window(-1e38)
    large[7] = MIN
    large[7, 20] = INF
    large[8] = math.nextafter(MIN / 2, 0)
    return [window(INF), window(MIN), rows, large, torch.randn(N, N, generator=generator), torch.zeros(N, N)]


def compiled_for(attention: Attention, mask: Tensor, *inputs: Tensor) -> tuple[Callable[..., Tensor], Report]:
    """The attention under a mask that keeps its place, compiled for what the mask holds now; and the report."""
    torch._dynamo.reset()
    reports: list[Report] = []
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, mask), backend="attnfuse", options={"downstream": "aot_eager"}
    )
    with listening(reports.append):
        compiled(*(x.detach().clone().requires_grad_() for x in inputs))
    return compiled, Report(()).merge(*reports)


@pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)
@pytest.mark.parametrize(
    ("attention", "body"),
    [
        (added, "s*0.5"),
        (given_to_sdpa, "s*0.5"),
        (softcapped, "tanh(s*0.25)*2.0"),
        (with_temperatures, "s*bias[h]"),
    ],
)
@pytest.mark.parametrize("fill", [INF, MIN])
def test_a_mask_that_was_seen_is_right_for_any_that_follow(
    attention: Attention, body: str, fill: float, small: str
) -> None:
    mask = window(fill)
    compiled, report = compiled_for(attention, mask, *qkv())
    empty = "0row" if attention is given_to_sdpa else "-inf"
    tiers = f"where bias[m, n] != -inf else {empty}"
    tiers += f" where bias[m, n] != {MIN} else +min" if fill == MIN else ""
    (remark,) = report.remarks
    assert str(remark.score).replace("bias2", "bias") == f"{body} + bias[m, n] {tiers}"
    for other in other_masks():
        mask.copy_(other)
        # the kernel that PyTorch has gives rows of least numbers as many times the gradient as there are keys
        least = bool((other < -1e38).all(-1).any())
        compare(
            lambda q, k, v: attention(q, k, v, mask),
            compiled,
            *qkv(),
            gradients=attention is not given_to_sdpa or not least,
        )


@pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)
@pytest.mark.parametrize("fill", [INF, MIN])
def test_rows_of_infinities_are_nan_as_the_model_has_them(fill: float, small: str) -> None:
    mask = window(fill)
    compiled, _ = compiled_for(added, mask, *qkv())
    mask[3] = INF
    q, k, v = qkv()
    actual, expected = compiled(q, k, v), added(q, k, v, mask)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected[:, :, 3].isnan().all()
    assert expected.isnan().sum() == expected[:, :, 3].numel()


def test_a_narrow_mask_is_one_of_its_own_least_number() -> None:
    """bfloat16's least number masks in bfloat16 and in float32; rows of it are uniform."""
    least = torch.finfo(torch.bfloat16).min
    mask = window(least, dtype=torch.bfloat16)
    mask[4] = least
    for dtype in (torch.bfloat16, torch.float32):
        (remark,) = check(lambda q, k, v: added(q, k, v, mask), *qkv(dtype=dtype)).remarks
        assert f"where bias[m, n] != {least} else +min" in str(remark.score)


@pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)
def test_the_least_number_of_float64(small: str) -> None:
    least = torch.finfo(torch.float64).min
    mask = window(least, dtype=torch.float64)
    mask[4] = least
    (remark,) = check(lambda q, k, v: added(q, k, v, mask), *qkv(dtype=torch.float64)).remarks
    assert str(remark.score).endswith(f"where bias[m, n] != {least} else +min")


@pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)
def test_masks_of_rows_and_of_keys(small: str) -> None:
    """Where both are finfo.min the sum is -inf."""
    rows, keys = torch.zeros(2, 1, N, 1), torch.zeros(2, 1, 1, N)
    rows[1, :, 40:], keys[1, ..., 40:] = MIN, MIN

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + rows + keys).softmax(-1) @ v

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="attnfuse", options={"downstream": "aot_eager"})
    compare(both, compiled, *qkv())
    rows[1], keys[1] = MIN, MIN
    q, k, v = qkv()
    actual, expected = compiled(q, k, v), both(q, k, v)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected[1].isnan().all()


def test_the_log_sum_exp_of_a_row_of_numbers_like_fills() -> None:
    """A float32 mask of -inf that later holds bfloat16's least number."""
    least = torch.finfo(torch.bfloat16).min

    def with_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * 0.5 + mask
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    mask = window(INF)
    torch._dynamo.reset()
    compiled = torch.compile(with_sums, backend="attnfuse", options={"downstream": "aot_eager"})
    compiled(*qkv())
    mask[5] = least
    assert torch.equal(compiled(*qkv())[1][..., 5], torch.full((2, 2), least))


def test_least_numbers_that_a_softmax_rounds_to_infinity() -> None:
    """float32's least number is -inf for a softmax in bfloat16, bfloat16's stays."""

    def narrow(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT).float() * 0.5 + mask + mask.mT, -1, dtype=q.dtype) @ v

    mask = torch.zeros(N, N, dtype=torch.bfloat16)
    mask[4] = torch.finfo(torch.bfloat16).min
    check(lambda q, k, v: narrow(q, k, v, mask), *qkv(dtype=torch.bfloat16), gradients=False)


@pytest.mark.parametrize("shape", [(N, N), (2, 1, N, N), (1, 2, N, N), (2, 1, 1, N), (2 * N, 2 * N)], ids=str)
def test_masks_of_any_axes(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape)
    mask[..., ::3] = MIN
    mask[..., 1] = INF
    (remark,) = check(lambda q, k, v: added(q, k, v, mask[..., :N, :N]), *qkv()).remarks
    assert str(remark.score).endswith("+min")


def test_a_mask_may_come_through_a_region() -> None:
    mask = window(INF)

    def recomputed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(added, q, k, v, mask, use_reentrant=False)  # type: ignore[return-value]

    (remark,) = check(recomputed, *qkv()).remarks
    assert str(remark.score).endswith("where bias[m, n] != -inf else -inf")


@pytest.mark.parametrize("fill", [INF, MIN])
def test_tiles_without_an_allowed_key_are_skipped(fill: float, monkeypatch: pytest.MonkeyPatch) -> None:
    length, side = 256, 32
    monkeypatch.setattr(tile_lists, "TILES", Tiles(side, side))
    monkeypatch.setattr("attnfuse.templates.flash_step._ROWS", side)
    runs: list[Run] = []
    covered = cover.cover
    monkeypatch.setattr(
        "attnfuse.templates.blocked.cover", lambda inputs: runs.extend(found := covered(inputs)) or found
    )
    mask = window(fill, length, 40)
    (remark,) = check(lambda q, k, v: added(q, k, v, mask), *qkv(length)).remarks
    blocks = (mask == 0).view(length // side, side, length // side, side).any(3).any(1)
    classes = attnfuse.tile_map(remark, tiles=(side, side), bias=mask).classes
    assert torch.equal(classes[0, 0] != EMPTY, blocks)
    visited = [run.rows.keys(m, m + side).count for run in runs for m in range(0, length, side)]
    assert visited[: len(blocks)] == (blocks.sum(1) * side).tolist()


def _twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + mask + (mask * 2.0).clamp(min=-1.0)).softmax(-1) @ v


def _scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + mask * 0.25).softmax(-1) @ v


def _written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + mask.clone().fill_diagonal_(0.5)).softmax(-1) @ v


def _beside_another(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    n = torch.arange(N)
    causal = torch.where(n <= n[:, None], 0.0, MIN).to(q.dtype)
    return (q @ k.mT * 0.5 + causal + mask).softmax(-1) @ v


@pytest.mark.parametrize("attention", [_twice, _scaled, _written, _beside_another])
def test_what_is_no_plain_addend_is_no_mask_of_least_numbers(attention: Attention) -> None:
    mask = window(MIN)
    mask[4, 5:] = MIN / 4
    compiled, report = compiled_for(attention, mask, *qkv())
    assert not any("+min" in str(remark.score) and "bias" in str(remark.score) for remark in report.remarks)
    compare(lambda q, k, v: attention(q, k, v, mask), compiled, *qkv())


@pytest.mark.parametrize("fill", [0.5, -1e4, torch.finfo(torch.bfloat16).min])
def test_other_numbers_are_a_bias(fill: float) -> None:
    _, report = compiled_for(added, window(fill), *qkv())
    assert [remark.score for remark in report.remarks] == ["s*0.5 + bias[m, n]"]


def test_what_asks_for_a_gradient_is_a_bias() -> None:
    """Its gradient in a row of least numbers is the model's."""
    (remark,) = check(added, *qkv(), window(MIN)).remarks
    assert remark.score == "s*0.5 + bias[m, n]"
