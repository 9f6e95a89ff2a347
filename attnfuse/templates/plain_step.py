"""The inner step that takes any spec: two matrix products and a softmax over a block of rows and all keys of its range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnfuse.score import S
from attnfuse.spec import Shape
from attnfuse.templates.cover import Run, Segment
from attnfuse.templates.work import BLOCK_CELLS, Gradients, Work, slopes_of, tensor_of


class Rows(NamedTuple):
    """Some rows of some batches and heads; `which` of them is bool [b, h, m], None for all."""

    b: tuple[int, int]
    h: tuple[int, int]
    m: tuple[int, int]
    which: Tensor | None = None


class _Tile(NamedTuple):
    """Whole KV groups of some batches, a block of rows, its keys; the mask is asked for the columns in `masked`."""

    b: tuple[int, int]
    kv: tuple[int, int]
    h: tuple[int, int]
    m: tuple[int, int]
    n: tuple[int, int]
    masked: tuple[tuple[int, int], ...]


def rows_of_block(shape: Shape) -> int:
    """Rows of one block: multiples of 16 that keep the scores of one KV head's group in the caches."""
    fitting = BLOCK_CELLS // max(1, shape.N * (shape.H // shape.Hkv))
    return min(128, max(16, fitting // 16 * 16))


def _tiles(work: Work, run: Run, segment: Segment) -> Iterator[_Tile]:
    shape, group = work.shape, work.group
    height = rows_of_block(shape)
    for m0 in range(segment.m0, segment.m1, height):
        m1 = min(m0 + height, segment.m1)
        first, last, full_first, full_last = run.rows.range(m0, m1)
        masked: tuple[tuple[int, int], ...] = ((first, last),)
        if not run.holes and not work.mask.residual:
            masked = tuple(edge for edge in ((first, full_first), (full_last, last)) if edge[0] < edge[1])
        cells = group * (m1 - m0) * max(1, last - first)
        heads = max(1, min(shape.Hkv, BLOCK_CELLS // cells))
        batches = max(1, BLOCK_CELLS // (cells * shape.Hkv))
        for b in range(run.b0, run.b1, batches):
            for kv in range(0, shape.Hkv, heads):
                end = min(kv + heads, shape.Hkv)
                whole = (kv * group, end * group)
                yield _Tile((b, min(b + batches, run.b1)), (kv, end), whole, (m0, m1), (first, last), masked)


def folded(x: Tensor, kv_heads: int) -> Tensor:
    """[b, h, m, d] as [b·kv, h / kv·m, d]."""
    b, h, m, d = x.shape
    return x.reshape(b * kv_heads, h // kv_heads * m, d)


class _Scores:
    """The scores of one tile, masked, and the operands they came from."""

    def __init__(self, work: Work, run: Run, tile: _Tile, may_be_empty: bool) -> None:
        inputs = work.inputs
        (b0, b1), (kv0, kv1), (h0, h1), (m0, m1), (n0, n1), _ = tile
        self.kv_heads = kv1 - kv0
        self.shape = (b1 - b0, h1 - h0, m1 - m0, n1 - n0)
        self.q = folded(inputs.q[b0:b1, h0:h1, m0:m1].to(work.dtype), self.kv_heads)
        self.k = work.k[b0:b1, kv0:kv1, n0:n1].reshape(-1, n1 - n0, inputs.shape.D)
        self.v = work.v[b0:b1, kv0:kv1, n0:n1].reshape(-1, n1 - n0, inputs.shape.Dv)
        self.block = work.block(tile.b, tile.h, tile.m, tile.n)
        self.raw = torch.bmm(self.q, self.k.mT).view(self.shape)
        self.masks = [
            (c0 - n0, c1 - n0, mask)
            for c0, c1 in tile.masked
            if (mask := self._mask(work, run, tile, (c0, c1))) is not None
        ]
        unmasked = sum(c1 - c0 for c0, c1, _ in self.masks) < n1 - n0
        self.empty: Tensor | None = None
        if may_be_empty and not unmasked:
            allowed = [mask.any(-1) for _, _, mask in self.masks]
            empty = ~allowed[0] if len(allowed) == 1 else ~(allowed[0] | allowed[1])
            self.empty = empty.expand(self.shape[:3]) if bool(empty.any()) else None

    @staticmethod
    def _mask(work: Work, run: Run, tile: _Tile, columns: tuple[int, int]) -> Tensor | None:
        return work.mask.allowed(work.block(tile.b, tile.h, tile.m, columns), edge=True, holes=run.holes)

    def fill(self, x: Tensor, value: float) -> Tensor:
        """`x` with `value` in the cells that are not allowed."""
        for c0, c1, mask in self.masks:
            x[..., c0:c1].masked_fill_(~mask, value)
        return x

    def owned(self, value: Tensor) -> Tensor:
        """A value as a tensor of all cells that may be written."""
        if value.shape != self.shape or value is self.raw:
            return value.expand(self.shape).clone()
        return value

    def matrices(self, x: Tensor) -> Tensor:
        """Cells as a batch of matrices, one for each KV head."""
        b, h, m, n = self.shape
        return x.reshape(b * self.kv_heads, h // self.kv_heads * m, n)


def forward(work: Work, run: Run, segment: Segment, out: Tensor, lse: Tensor) -> Iterator[Rows]:
    """Writes the rows of a segment; yields those that turn out to have no key."""
    may_be_empty = run.holes or not segment.exact
    for tile in _tiles(work, run, segment):
        (b0, b1), _, (h0, h1), (m0, m1), (n0, n1), _ = tile
        if n0 >= n1:
            yield Rows(tile.b, tile.h, tile.m)
            continue
        scores = _Scores(work, run, tile, may_be_empty)
        x = scores.raw
        if work.inputs.spec.program.body != S:
            x = scores.owned(tensor_of(work.meaning.body(scores.block, x)[0], work.dtype))
        scores.fill(x, -torch.inf)
        weights = torch.softmax(x, -1)
        greatest = x.amax(-1)
        # the weight of the greatest score is exp(greatest - lse)
        rows = torch.sub(greatest, weights.amax(-1).log_()).masked_fill_(greatest == -torch.inf, -torch.inf)
        lse[b0:b1, h0:h1, m0:m1] = rows
        if work.dropout:
            weights.masked_fill_(work.dropped(scores.block), 0.0)
        values = torch.bmm(scores.matrices(weights), scores.v)
        if work.dropout:
            values.mul_(1 / (1 - work.dropout))
        out[b0:b1, h0:h1, m0:m1] = values.view(*scores.shape[:3], -1)
        if scores.empty is not None:
            yield Rows(tile.b, tile.h, tile.m, scores.empty)


def backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> Iterator[Rows]:
    """Adds what the rows of a segment give to the gradients; yields those that turn out to have no key."""
    may_be_empty = run.holes or not segment.exact
    for tile in _tiles(work, run, segment):
        if tile.n[0] >= tile.n[1]:
            yield Rows(tile.b, tile.h, tile.m)
            continue
        scores = _Scores(work, run, tile, may_be_empty)
        _backward(work, scores, tile, grads)
        if scores.empty is not None:
            yield Rows(tile.b, tile.h, tile.m, scores.empty)


def _backward(work: Work, scores: _Scores, tile: _Tile, grads: Gradients) -> None:
    (b0, b1), (kv0, kv1), (h0, h1), (m0, m1), (n0, n1), _ = tile
    slopes = slopes_of(work.inputs.text, grads.from_body)
    body, by_s, *by_load = slopes.values(scores.block, scores.raw)
    lse, lse_alone = (x[b0:b1, h0:h1, m0:m1, None] for x in (grads.row_lse, grads.lse))
    if scores.empty is not None:
        # no weight in this pass
        lse, lse_alone = (x.masked_fill(scores.empty[..., None], torch.inf) for x in (lse, lse_alone))
    x = scores.fill(scores.owned(tensor_of(body, work.dtype)), -torch.inf)
    weights = torch.exp(x - lse)
    dout = folded(grads.dout[b0:b1, h0:h1, m0:m1].to(work.dtype), scores.kv_heads)
    dropped = work.dropped(scores.block) if work.dropout else None
    if grads.dv is not None:
        kept = weights if dropped is None else weights.masked_fill(dropped, 0.0).mul_(1 / (1 - work.dropout))
        add_product(grads.dv[b0:b1, kv0:kv1, n0:n1], scores.matrices(kept).mT, dout)
    if not grads.scores_needed:
        return
    dx = torch.bmm(dout, scores.v.mT).view(scores.shape)
    if dropped is not None:
        dx.masked_fill_(dropped, 0.0).mul_(1 / (1 - work.dropout))
    dx.sub_(grads.delta[b0:b1, h0:h1, m0:m1, None]).mul_(weights)
    if grads.dlse is not None:
        alone = weights if work.sink is None else torch.exp(x - lse_alone)
        dx.addcmul_(alone, grads.dlse[b0:b1, h0:h1, m0:m1, None].to(work.dtype))
    for load, indices, slope in zip(slopes.loads, slopes.indices, by_load, strict=True):
        grads.add(load, indices, scores.block, scores.fill(dx * slope, 0.0))
    if grads.dq is None and grads.dk is None:
        return
    ds = scores.matrices(scores.fill(dx.mul_(by_s), 0.0))
    if grads.dq is not None:
        grads.dq[b0:b1, h0:h1, m0:m1] = torch.bmm(ds, scores.k).view(*scores.shape[:3], -1)
    if grads.dk is not None:
        add_product(grads.dk[b0:b1, kv0:kv1, n0:n1], ds.mT, scores.q)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds the products of two batches of matrices to `total` [b, kv, n, d], whose first two axes are the batch."""
    total.add_(torch.bmm(a, b).view(total.shape))
