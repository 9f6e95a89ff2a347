"""Leaves that are tables: read at one index that is worked out for each row and key, such as `table[ids[m, n], h]`.

The table is laid out with that index last, [lead axes, entries], so that a block reads whole runs of it head by head; its
gradient is added up in the same layout.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import Expr, Load, Var, free_vars

Ranges = tuple[tuple[int, int], ...]

_LEAD: Final = {Var("b"): 0, Var("h"): 1}


class Lookup(NamedTuple):
    """A load of which the index at `place` is computed for each row and key; the others run along the axes `lead`."""

    place: int
    entry: Expr
    lead: tuple[int, ...]


@lru_cache(maxsize=1024)
def lookup(load: Load) -> Lookup | None:
    """How a load reads a table, if it does."""
    computed = [place for place, x in enumerate(load.indices) if x not in _LEAD]
    lead = tuple(_LEAD[x] for x in load.indices if isinstance(x, Var) and x in _LEAD)
    if len(computed) != 1 or len({*lead}) < len(lead):
        return None
    entry = load.indices[computed[0]]
    used = free_vars(entry)
    if (
        isinstance(entry, Var)
        or not {"m", "n"} <= used
        or any(axis in used for axis in ("b", "h") if Var(axis) in load.indices)
    ):
        return None
    return Lookup(computed[0], entry, lead)


def laid_out(table: Tensor, how: Lookup, dtype: torch.dtype) -> Tensor:
    """The table as [lead axes, entries], contiguous, in that type."""
    return table.movedim(how.place, -1).to(dtype).contiguous()


def given_back(total: Tensor, how: Lookup) -> Tensor:
    """What `laid_out` gave, in the order of the leaf's dimensions."""
    return total.movedim(-1, how.place)


def read(table: Tensor, how: Lookup, entry: Tensor, ranges: Ranges) -> Tensor | None:
    """The elements for a block of cells, [b or 1, h or 1, m, n]; None where the table is empty or lacks batches or heads of it.

    Args:
        table: what `laid_out` gives.
        entry: int64, [b or 1, h or 1, m, n]; clamped to the table.
        ranges: the batches, heads, rows and keys of the block.
    """
    part = _part(table, how, ranges)
    if part is None:
        return None
    order = _order(how)
    entry = entry.permute(order)
    found = part.index_select(-1, entry.reshape(-1).clamp(0, table.shape[-1] - 1))
    size = (*part.shape[:-1], *entry.shape[len(how.lead) :])
    return found.view(size).permute(sorted(range(4), key=order.__getitem__))


def add(total: Tensor, how: Lookup, entry: Tensor, ranges: Ranges, grad: Tensor) -> bool:
    """Adds the gradient of a block of cells, [b, h, m, n], to a table's; False, with nothing done, where `read` gives none.

    Args:
        total: in the layout of `laid_out`.
    """
    part = _part(total, how, ranges)
    if part is None:
        return False
    order = _order(how)
    same = [dim for dim in order[len(how.lead) :] if entry.shape[dim] == 1 and grad.shape[dim] > 1]
    grad = (grad.sum(same, keepdim=True) if same else grad).permute(order)
    entry = entry.permute(order).reshape(-1).clamp(0, total.shape[-1] - 1)
    lead = part.shape[:-1]
    part.scatter_add_(-1, entry.expand(*lead, -1), grad.reshape(*lead, -1).to(total.dtype))
    return True


def _order(how: Lookup) -> list[int]:
    """The axes of a block, those of the table first."""
    return [*how.lead, *(dim for dim in range(4) if dim not in how.lead)]


def _part(table: Tensor, how: Lookup, ranges: Ranges) -> Tensor | None:
    """The batches and heads of a block."""
    if not table.shape[-1] or any(ranges[dim][1] > size for dim, size in zip(how.lead, table.shape, strict=False)):
        return None
    for at, dim in enumerate(how.lead):
        first, last = ranges[dim]
        table = table.narrow(at, first, last - first)
    return table
