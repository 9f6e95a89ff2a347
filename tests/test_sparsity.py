"""Dense masks of the literature through the backend: what they are proven to be, one map for all layers, results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnfuse.spec import Shape
from attnfuse.templates import cover, tile_lists
from attnfuse.templates.base import Tiles
from attnfuse.templates.cover import Run
from tests.dense_masks import DENSE_MASKS, B, D, DenseMask, H, N, attention, big_bird, longformer
from tests.families import hold_to_oracle, made
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


# --- what must not be shared -----------------------------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> Tensor:
    return a[:, None] == b[None]


def plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def heads(seed: int, length: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
    return q, k, v


def unsorted(length: int = N) -> Tensor:
    return torch.randint(4, (length,), generator=torch.Generator().manual_seed(4))


def test_a_map_is_not_shared_across_a_write() -> None:
    """Also where the second attention reads nothing of the first."""

    def run(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, v2: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        mine = ids.clone()
        first = plain(q, k, v, same(mine, mine))
        mine.copy_(mine.roll(40) + (mine == 1))
        return first, plain(q2, k2, v2, same(mine, mine))

    check(run, *heads(1), *heads(2), unsorted())


def test_a_map_is_not_shared_by_lengths_that_happen_to_agree() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, v2: Tensor, a: Tensor, b: Tensor) -> Any:
        mask = same(a, a)
        return plain(q, k, v, mask[: q.shape[2], : k.shape[2]]), plain(q2, k2, v2, mask[: q2.shape[2], : k2.shape[2]])

    compiled = torch.compile(run, backend="attnfuse", dynamic=True, options={"downstream": "aot_eager"})
    for first, second in ((200, 200), (200, 256), (256, 160)):
        given = (*heads(1, first), *heads(2, second), unsorted(300), unsorted(300))
        for actual, expected in zip(compiled(*given), run(*given), strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_map_is_made_in_the_type_of_the_call() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, limit: Tensor, ids: Tensor) -> Tensor:
        later = (torch.arange(N, dtype=torch.float64) * 0.1)[:, None] > limit[None]
        return plain(q, k, v, later | same(ids, ids))

    q, k, v = (x.double() for x in heads(1))
    limit = (torch.arange(N) * 0.1).float()
    compiled = torch.compile(run, backend="attnfuse", options={"downstream": "aot_eager"})
    torch.testing.assert_close(compiled(q, k, v, limit, unsorted()), run(q, k, v, limit, unsorted()))


def test_an_input_that_is_written_to_is_not_read_by_the_backward() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask.logical_xor_(torch.ones_like(mask))
        return out

    mask = (unsorted()[:, None] == unsorted()) | torch.eye(N, dtype=torch.bool)
    (remark,) = check(run, *heads(1), mask).remarks
    assert remark.code == "AF026"
    (remark,) = check(run, *heads(1), mask, gradients=False).remarks
    assert remark.kind == "fused"


@pytest.mark.parametrize("mask", ["(n - m) % 3 == 0 & pad[b, n]", "(n - m) % 3 == 0 & n < stop[b]"])
def test_a_mask_of_indices_beside_padding(mask: str) -> None:
    shape = Shape(2, 2, 2, N, N, 8, 8)
    pad = torch.arange(N) >= torch.tensor([[0], [60]])
    leaves = (pad,) if "pad" in mask else (torch.tensor([N, 77]),)
    declared = "pad: bool[:, :]; " if "pad" in mask else "stop: i64[:]; "
    hold_to_oracle(made(f"{declared}s*0.125 where {mask} else +min", shape, leaves))
