"""Dense masks of the literature through the backend: what they are proven to be, one map for all layers, results."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnfuse.templates import cover, tile_lists
from attnfuse.templates.base import Tiles
from attnfuse.templates.cover import Run
from tests.dense_masks import DENSE_MASKS, B, D, DenseMask, H, N, attention, big_bird, longformer
from tests.harness import check, report_of


def operand(*size: int) -> Tensor:
    return torch.randn(size or (B, N, 3 * H * D), generator=torch.Generator().manual_seed(0))


def of_any_length(*tensors: Tensor) -> tuple[Tensor, ...]:
    """These tensors, their dimensions of N elements dynamic."""
    for x in tensors:
        for dim, size in enumerate(x.shape):
            if size == N:
                torch._dynamo.mark_dynamic(x, dim)
    return tensors


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_lists, "TILES", Tiles(32, 32))
    monkeypatch.setattr("attnfuse.templates.flash_step._ROWS", 32)
    cover._index_parts.cache_clear()


@pytest.mark.parametrize("mask", DENSE_MASKS.values(), ids=DENSE_MASKS.keys())
def test_what_is_proven(mask: DenseMask) -> None:
    (remark,) = report_of(attention(mask), operand(), *mask.inputs()).remarks
    assert (remark.kind, remark.score) == ("fused", mask.program)


@pytest.mark.parametrize(
    ("mask", "dynamic"),
    # a table of blocks is of one length
    [
        pytest.param(mask, dynamic, id=f"{name}{'-dynamic' * dynamic}")
        for name, mask in DENSE_MASKS.items()
        for dynamic in ((False,) if mask.build is big_bird else (False, True))
    ],
)
def test_results_and_gradients(mask: DenseMask, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    covered = cover.cover
    monkeypatch.setattr(
        "attnfuse.templates.blocked.cover", lambda inputs: runs.extend(found := covered(inputs)) or found
    )
    given = operand(), *mask.inputs()
    report = check(attention(mask), *(of_any_length(*given) if dynamic else given))
    assert [remark.kind for remark in report.remarks] == ["fused"]
    # every mask here leaves keys out for some block of rows
    blocks = [run.rows.keys(m, m + 32).count for run in runs for m in range(0, N, 32)]
    assert min(blocks) < N


def layers(x: Tensor, flags: Tensor, *weights: Tensor) -> Tensor:
    """Layers of attention under one mask, each with a score of its own."""
    mask = longformer(x.shape[1], flags)
    for at, weight in enumerate(weights):
        q, k, v = (x @ weight).view(x.shape[0], -1, 3, H, D).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.1 * (at + 1))
        x = x + out.transpose(1, 2).flatten(2)
    return x


def final_graph(folder: Path) -> str:
    (file,) = folder.glob("*/3_rewritten.py")
    return file.read_text()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_one_map_for_all_layers(dynamic: bool, tmp_path: Path) -> None:
    """The graph has one node of it, which every attention reads; so does the backward, which makes none."""
    (flags,) = DENSE_MASKS["Longformer"].inputs()
    weights = [operand(H * D, 3 * H * D) / 8 for _ in range(3)]
    x = operand(B, N, H * D)
    if dynamic:
        of_any_length(x, flags)
    report = check(layers, x, flags, *weights, options={"dump": str(tmp_path)})
    assert [r.kind for r in report.remarks] == ["fused"] * 3
    text = final_graph(tmp_path)
    assert text.count("attnfuse.tile_map") == 1
    assert text.count("attnfuse.attention") == 3


def test_the_report_says_what_is_skipped() -> None:
    """Of a mask that indices decide, by its map; of one that reads leaves, what the indices alone exclude."""

    def skipped(name: str) -> float:
        (remark,) = report_of(attention(DENSE_MASKS[name]), operand(), *DENSE_MASKS[name].inputs()).remarks
        return float(remark.facts["tiles_skipped"])  # type: ignore[arg-type]

    # a diagonal with a column of sinks: 8 x 8 tiles of 32
    assert skipped("sinks and window") == pytest.approx(1 - (8 + 7 + 6) / 64, abs=1e-4)
    assert skipped("Longformer") == 0.0
    # above the diagonal, in tiles of the template's own
    assert skipped("packed documents") > 0.3
