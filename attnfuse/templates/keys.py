"""The keys that a block of rows looks at: one span of them, or several that are put side by side in a copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from attnfuse.templates.tile_map import EMPTY, PARTIAL

Span = tuple[int, int]


class Keys:
    """Some of the keys of a call, ascending, as columns of a block of scores.

    Args:
        spans: the keys [n0, n1) of each span, apart from each other.
        masked: the parts of them in which not every cell may be allowed, ascending; each lies in one span.
    """

    def __init__(self, spans: Sequence[Span], masked: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self.masked = tuple(masked)

    @classmethod
    def of_range(cls, first: int, last: int, full_first: int, full_last: int) -> Keys:
        """The keys [first, last), all of them allowed in [full_first, full_last)."""
        if first >= last:
            return cls((), ())
        edges = ((first, full_first), (full_last, last))
        return cls(((first, last),), [edge for edge in edges if edge[0] < edge[1]])

    @classmethod
    def of_tiles(cls, classes: Sequence[int], width: int, lo: int, hi: int) -> Keys:
        """The keys of the tiles of one row of a tile map, those outside of [lo, hi) left out.

        Args:
            classes: EMPTY, PARTIAL or FULL for each tile.
            width: keys of a tile.
        """
        spans: list[Span] = []
        masked: list[Span] = []
        at = 0
        for kind, alike in groupby(classes):
            first, at = at, at + sum(1 for _ in alike)
            n0, n1 = max(first * width, lo), min(at * width, hi)
            if kind == EMPTY or n0 >= n1:
                continue
            if spans and spans[-1][1] == n0:
                spans[-1] = (spans[-1][0], n1)
            else:
                spans.append((n0, n1))
            if kind == PARTIAL:
                masked.append((n0, n1))
        return cls(spans, masked)

    @cached_property
    def count(self) -> int:
        """How many there are."""
        return sum(n1 - n0 for n0, n1 in self.spans)

    @property
    def hull(self) -> Span:
        """From the first to the last."""
        return (self.spans[0][0], self.spans[-1][1]) if self.spans else (0, 0)

    @cached_property
    def indices(self) -> Tensor | None:
        """They themselves, int64, where they are more than one span."""
        return torch.cat([torch.arange(*span) for span in self.spans]) if len(self.spans) > 1 else None

    def columns(self, part: Span) -> Span:
        """Where one of the masked parts lies among the columns."""
        before = 0
        for n0, n1 in self.spans:
            if n0 <= part[0] < n1:
                return before + part[0] - n0, before + part[1] - n0
            before += n1 - n0
        raise ValueError(f"{part} lies in none of {self.spans}")

    def cut(self, c0: int, c1: int) -> Keys:
        """The columns [c0, c1) of one span, all of them masked."""
        ((n0, _),) = self.spans
        return Keys(((n0 + c0, n0 + c1),), ((n0 + c0, n0 + c1),)) if c0 < c1 else Keys((), ())

    def of(self, x: Tensor) -> Tensor:
        """Their part of x [b, h, N, d]: a view where they are one span."""
        if len(self.spans) == 1:
            ((n0, n1),) = self.spans
            return x[:, :, n0:n1]
        # much faster than `cat` of parts that are not contiguous
        out = x.new_empty((*x.shape[:2], self.count, x.shape[3]))
        at = 0
        for n0, n1 in self.spans:
            out[:, :, at : at + n1 - n0] = x[:, :, n0:n1]
            at += n1 - n0
        return out

    def add(self, total: Tensor, x: Tensor) -> None:
        """Adds x [b, h, columns, d] to their part of `total`."""
        at = 0
        for n0, n1 in self.spans:
            total[:, :, n0:n1] += x[:, :, at : at + n1 - n0]
            at += n1 - n0
