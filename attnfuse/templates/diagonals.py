"""Leaves that are read at `n - m`: their elements for a block of rows and keys as a view, and the way back.

A vector of L elements, repeated for each of some rows, is read with a step of L - 1 from row to row: row i of the view begins
one element earlier in the vector than row i - 1, as the diagonals of a matrix want it, and its keys stand side by side in memory.
What is added to such a view is added to one of the copies of each element, no two cells of it to the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import INDICES, Expr, Load, Var, free_vars, linear, loads

# Copies of a vector, and most rows of a view.
_ROWS: Final = 128


class Along(NamedTuple):
    """A load whose last index is `n - m + offset`, after indices that run along the axes `lead` of batches and heads."""

    lead: tuple[int, ...]
    offset: Expr


@lru_cache(maxsize=1024)
def along(load: Load) -> Along | None:
    """How a load runs along diagonals, if it does."""
    if not load.indices:
        return None
    *lead, last = load.indices
    if not all(x in (Var("b"), Var("h")) for x in lead) or len({*lead}) < len(lead):
        return None
    form = linear(last)
    if form is None or (form.coefficient(Var("n")), form.coefficient(Var("m"))) != (1, -1):
        return None
    offset = form.without(Var("n")).without(Var("m")).expr()
    if loads(offset) or free_vars(offset) & {*INDICES}:
        return None
    return Along(tuple(INDICES.index(str(x)) for x in lead), offset)


def repeated(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[..., L] as [..., copies, L] for views of blocks of `rows` rows in all, in that type."""
    copies = min(rows, _ROWS)
    return x.to(dtype)[..., None, :].expand(*x.shape[:-1], copies, -1).contiguous()


Ranges = tuple[tuple[int, int], ...]


def view(copies: Tensor, lead: tuple[int, ...], ranges: Ranges, offset: int) -> Tensor | None:
    """The elements `[..., n - m + offset]` of a block of cells, [lead axes in their order, rows, keys]; None where the copies are
    too few, or the block is larger than the vector.

    Args:
        copies: what `repeated` gives.
        ranges: the batches, heads, rows and keys of the block.
    """
    (m0, m1), (n0, n1) = ranges[2:]
    first, length = n0 - m0 + offset, copies.shape[-1]
    if m1 - m0 > copies.shape[-2] or first - (m1 - 1 - m0) < 0 or first + n1 - n0 > length:
        return None
    if any(ranges[dim][1] > size for dim, size in zip(lead, copies.shape, strict=False)):
        return None
    for at, dim in enumerate(lead):
        copies = copies.narrow(at, ranges[dim][0], ranges[dim][1] - ranges[dim][0])
    size = (*copies.shape[:-2], m1 - m0, n1 - n0)
    stride = (*copies.stride()[:-2], length - 1, 1)
    return copies.as_strided(size, stride, int(copies.storage_offset()) + first)


def add(copies: Tensor, lead: tuple[int, ...], ranges: Ranges, offset: int, grad: Tensor, keys: Tensor | None) -> bool:
    """Adds a gradient of a block of cells to copies of the vector's; False, with nothing done, where `view` gives none.

    Args:
        grad: [b, h, m, n], summed already along an axis of size 1.
        keys: where not all keys of the block are meant, those that are.
    """
    (m0, m1), (n0, _) = ranges[2:]
    height = copies.shape[-2]
    blocks = [(m, min(m + height, m1)) for m in range(m0, m1, height)]
    views = [view(copies, lead, (*ranges[:2], rows, ranges[3]), offset) for rows in blocks]
    if any(x is None for x in views):
        return False
    missing = [dim for dim in (0, 1) if dim not in lead]
    if missing:
        grad = grad.sum(missing)
    if lead == (1, 0):
        grad = grad.transpose(0, 1)
    for (first, last), part in zip(blocks, views, strict=True):
        assert part is not None
        rows = grad.narrow(-2, first - m0, last - first)
        if keys is None:
            part.add_(rows)
        else:
            part.index_add_(part.dim() - 1, keys - n0, rows)
    return True


def add_tiles(total: Tensor, lead: tuple[int, ...], tiles: Tensor, offset: int) -> None:
    """Adds tiles of gradients to the vector's; what lies beyond its ends is added there, as it is read there.

    Args:
        tiles: [B or 1, H or 1, tiles, rows, keys]; cell (i, j) of tile t is that of the element `t * keys + j - i + offset`.
    """
    number, rows, keys = tiles.shape[2:]
    # row i moves to the right by the number of rows below it, so that diagonals become columns
    moved = torch.nn.functional.pad(tiles.flip(-2), (0, rows)).flatten(-2)[..., :-rows]
    sums = moved.reshape(*tiles.shape[:3], rows, keys + rows - 1).sum(-2)
    parts = -(-sums.shape[-1] // keys)
    sums = torch.nn.functional.pad(sums, (0, parts * keys - sums.shape[-1])).view(*tiles.shape[:3], parts, keys)
    out = sums.new_zeros((*sums.shape[:2], number + parts - 1, keys))
    for part in range(parts):
        out[:, :, part : part + number] += sums[..., part, :]
    for dim in (1, 0):
        out = out if dim in lead else out.squeeze(dim)
    out = (out.transpose(0, 1) if lead == (1, 0) else out).flatten(-2)
    first = offset - (rows - 1)
    length, last = out.shape[-1], total.shape[-1] - first
    before, after = min(max(-first, 0), length), min(max(last, 0), length)
    total[..., 0] += out[..., :before].sum(-1)
    total[..., -1] += out[..., after:].sum(-1)
    if before < after:
        total[..., before + first : after + first] += out[..., before:after]
