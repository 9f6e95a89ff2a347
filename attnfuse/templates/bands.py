"""Blocks of rows that look at keys alike, those of each a constant step after those of the block before: a band.

The kernel takes the blocks of a band as batches of one call: its threads are started once, and the keys of one span are a view
in which blocks overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.templates.keys import Keys

# Rows of a band, and keys of all its blocks: their gradients, and copies of them, are as long.
_ROWS: Final = 4096
_KEYS: Final = 1 << 15
# Keys of all its blocks where they are copied.
_COPIED: Final = 1 << 13


class Band(NamedTuple):
    """Blocks of one size under one mask.

    Args:
        m: the rows of all of them.
        blocks: how many.
        keys: those of the first block.
        steps: from block to block, of each span of keys.
        mask: [b, h, rows of a block, keys of a block], added to the scores.
    """

    m: tuple[int, int]
    blocks: int
    keys: Keys
    steps: tuple[int, ...]
    mask: Tensor | None

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of x [h, M, ...] by block, [blocks, h, rows, ...]: a view."""
        some = x[:, self.m[0] : self.m[1]]
        return some.view(len(some), self.blocks, -1, *some.shape[2:]).transpose(0, 1)

    def keys_of(self, x: Tensor) -> Tensor:
        """The keys of x [h, N, d] by block, [blocks, h, keys, d]: a view where they are one span."""
        heads, _, depth = x.shape
        of_head, of_key, of_depth = x.stride()
        parts = [
            x.as_strided(
                (self.blocks, heads, n1 - n0, depth),
                (step * of_key, of_head, of_key, of_depth),
                x.storage_offset() + n0 * of_key,
            )
            for (n0, n1), step in zip(self.keys.spans, self.steps, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        # much faster than `cat` of parts that are not contiguous
        out = x.new_empty((self.blocks, heads, self.keys.count, depth))
        at = 0
        for part in parts:
            out[:, :, at : at + part.shape[2]] = part
            at += part.shape[2]
        return out

    def add(self, total: Tensor, x: Tensor) -> None:
        """Adds x [blocks, h, keys, d] to the keys of `total` [h, N, d]."""
        at = 0
        for (n0, n1), step in zip(self.keys.spans, self.steps, strict=True):
            part = x[:, :, at : at + n1 - n0]
            at += n1 - n0
            if step == 0:
                total[:, n0:n1] += part.sum(0)
                continue
            # the keys that are as far from the start of their block are apart from each other
            for c0 in range(0, n1 - n0, step):
                c1 = min(c0 + step, n1 - n0)
                of_all = total.as_strided(
                    (self.blocks, len(total), c1 - c0, total.shape[2]),
                    (step * total.stride(1), *total.stride()),
                    total.storage_offset() + (n0 + c0) * total.stride(1),
                )
                of_all += part[:, :, c0:c1]

    def each(self) -> Iterator[tuple[tuple[int, int], Keys]]:
        """The rows and the keys of each block."""
        rows = (self.m[1] - self.m[0]) // self.blocks
        for at in range(self.blocks):
            m0 = self.m[0] + at * rows
            spans = [
                (n0 + at * step, n1 + at * step) for (n0, n1), step in zip(self.keys.spans, self.steps, strict=True)
            ]
            yield (m0, m0 + rows), Keys(spans, ())

    def longer(self, m: tuple[int, int], keys: Keys, mask: Tensor | None) -> Band | None:
        """The band with a block more, that of the rows that follow, where it is like the others."""
        rows = (self.m[1] - self.m[0]) // self.blocks
        if m != (self.m[1], self.m[1] + rows) or len(keys.spans) != len(self.steps):
            return None
        ahead = [(new[0] - old[0], new[1] - old[1]) for new, old in zip(keys.spans, self.keys.spans, strict=True)]
        steps = self.steps if self.blocks > 1 else tuple(start for start, _ in ahead)
        if any(
            step < 0 or start != end or start != self.blocks * step
            for (start, end), step in zip(ahead, steps, strict=True)
        ):
            return None
        most = _COPIED if len(steps) > 1 else _KEYS
        if m[1] - self.m[0] > _ROWS or (self.blocks + 1) * keys.count > most or not _same(mask, self.mask):
            return None
        return self._replace(m=(self.m[0], m[1]), blocks=self.blocks + 1, steps=steps)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(_once(a), _once(b))


def _once(x: Tensor) -> Tensor:
    """What broadcasts, once."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
