"""`tile_map(remark)`: which tiles of an attention its mask leaves, as text and as a picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from attnfuse.remark import Remark
from attnfuse.score import loads
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates.base import Tiles
from attnfuse.templates.tile_lists import TILES, mask_text
from attnfuse.templates.tile_map import EMPTY, FULL, PARTIAL, classes_of_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIGNS: Final = {EMPTY: "·", PARTIAL: "▒", FULL: "█"}
_COLOURS: Final = {EMPTY: "#f2f2f2", PARTIAL: "#8ab6e0", FULL: "#1f4e79"}
_SHAPE: Final = re.compile(r"B(\d+) H(\d+)(?:/(\d+))? M(\d+) N(\d+) D(\d+)(?:/(\d+))?")


@dataclass(frozen=True)
class TileMap:
    """The tiles of an attention: EMPTY ones are not computed, FULL ones without asking the mask.

    Args:
        score: the program.
        tiles: rows and keys of one tile.
        classes: 0 EMPTY, 1 PARTIAL, 2 FULL: uint8 [B or 1, H or 1, row tiles, key tiles].
    """

    score: str
    tiles: tuple[int, int]
    classes: Tensor

    def share(self, kind: int) -> float:
        """The fraction of the tiles that are of a class."""
        return float((self.classes == kind).float().mean())

    def text(self, batch: int = 0, head: int = 0) -> str:
        """A line for each block of rows, a sign for each tile."""
        return "\n".join("".join(_SIGNS[kind] for kind in row) for row in self._of(batch, head).tolist())

    def plot(self, batch: int = 0, head: int = 0, axes: Axes | None = None) -> Axes:
        """Draws the tiles of one batch and head with matplotlib, on `axes` or on new ones.

        Raises:
            ImportError: matplotlib is not installed; `text` needs none.
        """
        import matplotlib.pyplot
        from matplotlib.colors import ListedColormap

        axes = matplotlib.pyplot.subplots()[1] if axes is None else axes
        kinds = self._of(batch, head)
        height, width = self.tiles
        axes.imshow(
            kinds.numpy(),
            cmap=ListedColormap([_COLOURS[kind] for kind in (EMPTY, PARTIAL, FULL)]),
            vmin=EMPTY,
            vmax=FULL,
            extent=(0, kinds.shape[1] * width, kinds.shape[0] * height, 0),
            interpolation="none",
        )
        axes.set(xlabel="keys n", ylabel="queries m", title=textwrap.fill(self.score, 36))
        return axes

    def _of(self, batch: int, head: int) -> Tensor:
        B, H, *_ = self.classes.shape
        return self.classes[batch if B > 1 else 0, head if H > 1 else 0]

    def __str__(self) -> str:
        shares = ", ".join(
            f"{_SIGNS[kind]} {self.share(kind):.0%} {name}"
            for kind, name in ((FULL, "full"), (PARTIAL, "partial"), (EMPTY, "empty"))
        )
        return f"{self.score}\n{self.text()}\n{shares} of tiles of {self.tiles[0]} x {self.tiles[1]}"


def tile_map(remark: Remark, *, tiles: tuple[int, int] = TILES, sizes: Sequence[int] = (), **leaves: Tensor) -> TileMap:
    """The tiles that the mask of a fused attention leaves, from its remark in a report.

    Args:
        tiles: rows and keys of one tile.
        sizes: i0 … where the score uses them.
        leaves: the tensors that the mask reads, by the names that the score has for them.

    Raises:
        ValueError: the remark has no score, or leaves or sizes are missing.
    """
    found = _SHAPE.fullmatch(str(remark.facts.get("shape", "")))
    if not remark.score or found is None or "spec" not in remark.facts:
        raise ValueError(f"a remark of code {remark.code} has no tile map: it is of an attention that was not read")
    B, H, Hkv, M, N, D, Dv = (int(x or 0) for x in found.groups())
    shape = Shape(B, H, Hkv or H, M, N, D, Dv or D)
    text = mask_text(str(remark.facts["spec"]))
    spec = parse_spec(text)
    read = {load.leaf for tier in spec.program.tiers for load in loads(tier.allowed)}
    if missing := [leaf for leaf in spec.leaves if leaf.name in read and leaf.name not in leaves]:
        raise ValueError(f"the mask reads {', '.join(map(str, missing))}: give it by name, {missing[0].name}=…")
    if len(sizes) < spec.size_count():
        raise ValueError(f"the mask uses i0 to i{spec.size_count() - 1}: give them as sizes=")
    if not spec.program.tiers:
        rows, keys = -(-M // tiles[0]), -(-N // tiles[1])
        return TileMap(remark.score, tiles, torch.full((1, 1, rows, keys), FULL, dtype=torch.uint8))
    return TileMap(remark.score, tiles, classes_of_cells(text, leaves, tuple(sizes), shape[:5], Tiles(*tiles)))


__all__ = ["TileMap", "tile_map"]
