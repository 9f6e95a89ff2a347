"""Tile maps as lists: for each block of rows, and for each block of keys, the tiles that hold an allowed cell.

A list is int32: how many tiles are FULL, how many are PARTIAL, then the numbers of the FULL ones, ascending, those of the
PARTIAL ones, ascending, and the rest, of no meaning.  Its length is that of a row of the map: nothing depends on what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from attnfuse.score import Program, S, Tier, loads
from attnfuse.spec import AttentionSpec, parse_spec
from attnfuse.templates.base import Tiles
from attnfuse.templates.evaluate import varies
from attnfuse.templates.tile_map import EMPTY, FULL, PARTIAL, classes_of_cells
from attnfuse.tiles import bounds

# Rows and keys of the tiles of every map: as many of each, and a multiple of what kernels take.
TILES: Final = Tiles(128, 128)
# Fewer tiles are not worth a map.
_FEWEST: Final = 16


@lru_cache(maxsize=1024)
def has_no_ranges(spec: AttentionSpec) -> bool:
    """Whether the mask allows keys that are no range for each row, as far as it can be told without the leaves."""
    return any({"m", "n"} <= varies(e) for e in bounds(spec).residual)


def worth_a_map(rows: int, keys: int) -> bool:
    """Whether M rows and N keys are enough tiles."""
    across = -(-keys // TILES.block_n)
    return -(-rows // TILES.block_m) * across >= _FEWEST and across > 2


@lru_cache(maxsize=1024)
def reads_leaves(spec: AttentionSpec) -> bool:
    """Whether the mask depends on leaves, which a map has to be made anew for in each call."""
    return any(loads(tier.allowed) for tier in spec.program.tiers)


@lru_cache(maxsize=1024)
def mask_text(text: str) -> str:
    """The mask alone of the spec with that text: what attentions that differ in their scores may have in common."""
    spec = parse_spec(text)
    tiers = tuple(Tier(tier.allowed, "-inf") for tier in spec.program.tiers)
    read = {load.leaf for tier in tiers for load in loads(tier.allowed)}
    return str(AttentionSpec(Program(S, tiers), tuple(leaf for leaf in spec.leaves if leaf.name in read)))


@lru_cache(maxsize=1024)
def _axes(text: str) -> frozenset[str]:
    return frozenset().union(*(varies(tier.allowed) for tier in parse_spec(text).program.tiers))


def list_shapes(text: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of the lists of rows and of keys, for B, H, Hkv, M, N."""
    B, H, _, M, N = shape
    axes = _axes(text)
    outer = (B if "b" in axes else 1, H if "h" in axes else 1)
    rows, keys = (M + TILES.block_m - 1) // TILES.block_m, (N + TILES.block_n - 1) // TILES.block_n
    return (*outer, rows, 2 + keys), (*outer, keys, 2 + rows)


def lists_of(
    text: str, leaves: Sequence[Tensor], sizes: tuple[int, ...], shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tile map of the mask of the spec with that text: the lists of rows and of keys.

    Args:
        shape: B, H, Hkv, M, N.
    """
    *_, M, N = shape
    named = {leaf.name: x for leaf, x in zip(parse_spec(text).leaves, leaves, strict=True)}
    kinds = classes_of_cells(text, named, sizes, shape, TILES, device)
    kinds = kinds.expand(*list_shapes(text, shape)[0][:2], -1, -1)
    return _listed(kinds, whole=N % TILES.block_n == 0), _listed(kinds.mT, whole=M % TILES.block_m == 0)


@lru_cache(maxsize=1024)
def share_skipped(text: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> float:
    """The fraction of the tiles of a map that no cell is allowed in, where indices and sizes decide that.

    Args:
        shape: B, H, Hkv, M, N.
    """
    rows, _ = lists_of(text, (), sizes, shape, torch.device("cpu"))
    return 1.0 - float(rows[..., :2].sum()) / (rows[..., 2:].numel() or 1)


def _listed(kinds: Tensor, *, whole: bool) -> Tensor:
    """The lists of the tiles in each row; the last tile, where it is not whole, has cells beyond the end."""
    if not whole:
        kinds = torch.cat((kinds[..., :-1], kinds[..., -1:].clamp(max=PARTIAL)), -1)
    order = kinds.sort(dim=-1, descending=True, stable=True).indices
    counts = torch.stack([(kinds == kind).sum(-1) for kind in (FULL, PARTIAL)], -1)
    return torch.cat((counts, order), -1).to(torch.int32)


def of_groups(lists: tuple[Tensor, ...], kv_heads: int) -> tuple[Tensor, ...]:
    """The lists of rows that the query heads of each KV head have together."""
    if lists[0].shape[1] == 1:
        return lists
    return (_listed(of_kv_heads(classes_of(lists[0]), kv_heads), whole=True),)


def of_kv_heads(kinds: Tensor, kv_heads: int) -> Tensor:
    """The classes [b, h, …] for the query heads of each KV head together."""
    return kinds if kinds.shape[1] == 1 else together(kinds.reshape(len(kinds), kv_heads, -1, *kinds.shape[2:]), 2)


def together(kinds: Tensor, dim: int) -> Tensor:
    """The classes of tiles joined along an axis."""
    if kinds.shape[dim] == 1:
        return kinds.squeeze(dim)
    least, greatest = kinds.aminmax(dim=dim)
    joined = torch.where(least == FULL, FULL, torch.where(greatest == EMPTY, EMPTY, PARTIAL))
    return joined.to(torch.uint8)


def classes_of(lists: Tensor) -> Tensor:
    """The tiles in each row as they were before they were listed: uint8."""
    counts, order = lists[..., :2].long(), lists[..., 2:].long()
    at = torch.arange(order.shape[-1], device=lists.device)
    full, some = counts[..., :1], counts.sum(-1, keepdim=True)
    kinds = torch.where(at < full, FULL, torch.where(at < some, PARTIAL, EMPTY)).to(torch.uint8)
    return torch.zeros_like(kinds).scatter_(-1, order, kinds)
