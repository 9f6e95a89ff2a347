"""Tile maps of remarks: as text, as pictures, and what they need."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnfuse
from attnfuse.pictures import TileMap
from attnfuse.remark import Remark
from attnfuse.templates.tile_map import EMPTY, FULL, PARTIAL
from tests.dense_masks import DENSE_MASKS, B, D, H, N, attention
from tests.harness import report_of


def remark_of(name: str) -> Remark:
    x = torch.randn(B, N, 3 * H * D, generator=torch.Generator().manual_seed(0))
    (remark,) = report_of(attention(DENSE_MASKS[name]), x, *DENSE_MASKS[name].inputs()).remarks
    return remark


def test_as_text() -> None:
    found = attnfuse.tile_map(remark_of("sinks and window"), tiles=(32, 32))
    assert (
        str(found)
        == """\
s*0.25 where n <= m & (n < 4 | n > m - 32) else 0row
▒·······
▒▒······
▒▒▒·····
▒·▒▒····
▒··▒▒···
▒···▒▒··
▒····▒▒·
▒·····▒▒
█ 0% full, ▒ 33% partial, · 67% empty of tiles of 32 x 32"""
    )


def test_of_a_mask_that_reads_leaves() -> None:
    remark = remark_of("Longformer")
    (flags,) = DENSE_MASKS["Longformer"].inputs()
    found = attnfuse.tile_map(remark, tiles=(32, 32), pad=flags == 2)
    assert found.classes.shape == (B, 1, 8, 8)
    # the token in the middle of the second sequence
    assert found.text(0).splitlines()[7] == "▒·····▒█"
    assert found.text(1).splitlines()[7] == "▒··▒··▒█"
    with pytest.raises(ValueError, match=r"the mask reads pad: bool\[:, :\]: give it by name, pad=…"):
        attnfuse.tile_map(remark)


def test_without_a_mask() -> None:
    (remark,) = report_of(lambda q: scaled_dot_product_attention(q, q.exp(), q), torch.randn(1, 2, 300, 16)).remarks
    found = attnfuse.tile_map(remark)
    assert found.text() == "███\n███\n███"
    assert (found.share(FULL), found.share(PARTIAL), found.share(EMPTY)) == (1.0, 0.0, 0.0)


def test_of_a_remark_without_a_score() -> None:
    with pytest.raises(ValueError, match="a remark of code AF020 has no tile map"):
        attnfuse.tile_map(Remark.of("AF020"))


def test_as_a_picture() -> None:
    import matplotlib

    matplotlib.use("agg")
    found = attnfuse.tile_map(remark_of("fixed"), tiles=(32, 32))
    axes = found.plot()
    (image,) = axes.get_images()
    assert image.get_array().tolist() == found.classes[0, 0].tolist()
    assert tuple(image.get_extent()) == (0, N, N, 0)
    assert axes.get_title().replace("\n", " ") == found.score


def test_text_needs_no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    found = TileMap("s", (2, 2), torch.ones(1, 1, 1, 1, dtype=torch.uint8))
    assert found.text() == "▒"
    with pytest.raises(ImportError):
        found.plot()
