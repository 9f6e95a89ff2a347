"""The inner step that takes any spec: two matrix products and a softmax over a block of rows and all keys of its range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attnfuse.spec import Shape
from attnfuse.templates.cover import Run, Segment, columns_of
from attnfuse.templates.evaluate import Value
from attnfuse.templates.keys import Keys
from attnfuse.templates.work import BLOCK_CELLS, Gradients, Work, slopes_of, tensor_of


class Rows(NamedTuple):
    """Some rows of some batches and heads; `which` of them is bool [b, h, m], None for all."""

    b: tuple[int, int]
    h: tuple[int, int]
    m: tuple[int, int]
    which: Tensor | None = None


class _Tile(NamedTuple):
    """Whole KV groups of some batches, a block of rows, its keys; `masks` are columns of them with their allowed cells."""

    b: tuple[int, int]
    kv: tuple[int, int]
    h: tuple[int, int]
    m: tuple[int, int]
    keys: Keys
    masks: tuple[tuple[int, int, Tensor], ...]


def rows_of_block(shape: Shape) -> int:
    """Rows of one block: multiples of 16 that keep the scores of one KV head's group in the caches."""
    fitting = BLOCK_CELLS // max(1, shape.N * (shape.H // shape.Hkv))
    return min(64, max(16, fitting // 16 * 16))


def _tiles(work: Work, run: Run, segment: Segment) -> Iterator[_Tile]:
    shape, group = work.shape, work.group
    height = rows_of_block(shape)
    kv0, kv1 = run.h0 // group, run.h1 // group
    for m0 in range(segment.m0, segment.m1, height):
        rows = (m0, min(m0 + height, segment.m1))
        keys, masks = _keys(work, run, rows)
        cells = group * (rows[1] - m0) * max(1, keys.count)
        heads = max(1, min(kv1 - kv0, BLOCK_CELLS // cells))
        batches = max(1, BLOCK_CELLS // (cells * (kv1 - kv0)))
        for b in range(run.b0, run.b1, batches):
            some = (b, min(b + batches, run.b1))
            for kv in range(kv0, kv1, heads):
                end = min(kv + heads, kv1)
                whole = (kv * group, end * group)
                within = (b - run.b0, some[1] - run.b0), (whole[0] - run.h0, whole[1] - run.h0)
                parts = [(c0, c1, _part(x, *within)) for c0, c1, x in masks]
                yield _Tile(some, (kv, end), whole, rows, keys, tuple(parts))


def _keys(work: Work, run: Run, rows: tuple[int, int]) -> tuple[Keys, list[tuple[int, int, Tensor]]]:
    """The keys that a block of rows needs, and the columns of them in which some cells are not allowed."""
    keys = run.rows.keys(*rows)
    found = [(part, work.allowed((run.b0, run.b1), (run.h0, run.h1), rows, part, run.holes)) for part in keys.masked]
    if len(keys.spans) == 1 and keys.masked == keys.spans and found[0][1] is not None:
        allowed = found[0][1].expand(-1, -1, -1, keys.count)
        c0, c1 = columns_of(allowed)
        return keys.cut(c0, c1), [(0, c1 - c0, allowed[..., c0:c1])] * (c0 < c1)
    return keys, [(*keys.columns(part), x) for part, x in found if x is not None]


def _part(x: Tensor, b: tuple[int, int], h: tuple[int, int]) -> Tensor:
    """Some batches and heads of a mask that may not vary with them."""
    x = x if x.shape[0] == 1 else x[b[0] : b[1]]
    return x if x.shape[1] == 1 else x[:, h[0] : h[1]]


def folded(x: Tensor, kv_heads: int) -> Tensor:
    """[b, h, m, d] as [b·kv, h / kv·m, d]."""
    b, h, m, d = x.shape
    return x.reshape(b * kv_heads, h // kv_heads * m, d)


class _Scores:
    """The scores of one tile before the score program, their mask, and the operands they came from."""

    def __init__(self, work: Work, run: Run, tile: _Tile, may_be_empty: bool) -> None:
        inputs = work.inputs
        (b0, b1), (kv0, kv1), (h0, h1), (m0, m1), keys, _ = tile
        self.kv_heads = kv1 - kv0
        self.shape = (b1 - b0, h1 - h0, m1 - m0, keys.count)
        self.q = folded(inputs.q[b0:b1, h0:h1, m0:m1].to(work.dtype), self.kv_heads)
        self.k = keys.of(work.k[b0:b1, kv0:kv1]).flatten(0, 1)
        self.v = keys.of(work.v[b0:b1, kv0:kv1]).flatten(0, 1)
        self.block = work.block(tile.b, tile.h, tile.m, keys.hull, keys.indices)
        self.raw = torch.bmm(self.q, self.k.mT).view(self.shape)
        self.masked = [(c0, c1, ~allowed) for c0, c1, allowed in tile.masks]
        self.empty: Tensor | None = None
        if may_be_empty and sum(c1 - c0 for c0, c1, _ in tile.masks) == keys.count:
            some = torch.zeros((1, 1, 1), dtype=torch.bool)
            for _, _, allowed in tile.masks:
                some = some | allowed.any(-1)
            self.empty = (~some).expand(self.shape[:3]) if not bool(some.all()) else None

    def fill(self, x: Tensor, value: float) -> Tensor:
        """`x` with `value` in the cells that are not allowed."""
        for c0, c1, masked in self.masked:
            part = x if c1 - c0 == x.shape[-1] else x[..., c0:c1]
            part.masked_fill_(masked, value)
        return x

    def writable(self, value: Value, *others: Value) -> Tensor:
        """A value, none of `others`, as a tensor of all cells that may be written."""
        x = tensor_of(value, self.block.dtype)
        if x.shape != self.shape or not x.is_contiguous() or any(value is other for other in others):
            return x.expand(self.shape).clone(memory_format=torch.contiguous_format)
        return x

    def matrices(self, x: Tensor) -> Tensor:
        """Cells as a batch of matrices, one for each KV head."""
        b, h, m, n = self.shape
        return x.reshape(b * self.kv_heads, h // self.kv_heads * m, n)


def forward(work: Work, run: Run, segment: Segment, out: Tensor, lse: Tensor) -> Iterator[Rows]:
    """Writes the rows of a segment; yields those that turn out to have no key."""
    may_be_empty = run.holes or not segment.exact
    for tile in _tiles(work, run, segment):
        (b0, b1), _, (h0, h1), (m0, m1), keys, _ = tile
        if not keys.count:
            yield Rows(tile.b, tile.h, tile.m)
            continue
        scores = _Scores(work, run, tile, may_be_empty)
        x = scores.fill(scores.writable(*work.meaning.body(scores.block, scores.raw)), -torch.inf)
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
        out[b0:b1, h0:h1, m0:m1] = values.view(*scores.shape[:3], work.shape.Dv)
        if scores.empty is not None:
            yield Rows(tile.b, tile.h, tile.m, scores.empty)


def backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> Iterator[Rows]:
    """Adds what the rows of a segment give to the gradients; yields those that turn out to have no key."""
    may_be_empty = run.holes or not segment.exact
    for tile in _tiles(work, run, segment):
        if not tile.keys.count:
            yield Rows(tile.b, tile.h, tile.m)
            continue
        scores = _Scores(work, run, tile, may_be_empty)
        _backward(work, scores, tile, grads)
        if scores.empty is not None:
            yield Rows(tile.b, tile.h, tile.m, scores.empty)


def _backward(work: Work, scores: _Scores, tile: _Tile, grads: Gradients) -> None:
    (b0, b1), (kv0, kv1), (h0, h1), (m0, m1), keys, _ = tile
    slopes = slopes_of(work.inputs.text, grads.from_body, "allowed")
    body, by_s, *by_load = slopes.values(scores.block, scores.raw)
    x = scores.fill(scores.writable(body, by_s, *by_load), -torch.inf)
    # not exp(x - lse): where all scores of a row are about -1e9, lse has no digits left for their number
    weights = torch.softmax(x, -1)
    delta = grads.delta[b0:b1, h0:h1, m0:m1, None]
    if scores.empty is not None:
        # no weight in this pass, and no NaN
        empty = scores.empty[..., None]
        weights, delta = weights.masked_fill_(empty, 0.0), delta.masked_fill(empty, 0.0)
    alone = weights
    if work.sink is not None:
        share = torch.sigmoid(grads.lse[b0:b1, h0:h1, m0:m1] - work.sink[b0:b1, h0:h1, m0:m1])[..., None]
        # beside a sink, a row of scores that are all -inf has no weight
        weights = (weights * share).masked_fill_(share == 0, 0.0)
    dout = folded(grads.dout[b0:b1, h0:h1, m0:m1].to(work.dtype), scores.kv_heads)
    dropped = work.dropped(scores.block) if work.dropout else None
    if grads.dv is not None:
        kept = weights if dropped is None else weights.masked_fill(dropped, 0.0).mul_(1 / (1 - work.dropout))
        _add_to_keys(grads.dv[b0:b1, kv0:kv1], keys, scores.matrices(kept).mT, dout)
    if not grads.scores_needed:
        return
    dx = torch.bmm(dout, scores.v.mT).view(scores.shape)
    if dropped is not None:
        dx.masked_fill_(dropped, 0.0).mul_(1 / (1 - work.dropout))
    dx.sub_(delta).mul_(weights)
    if grads.dlse is not None:
        dx.addcmul_(alone, grads.dlse[b0:b1, h0:h1, m0:m1, None].to(work.dtype))
    for load, indices, slope in zip(slopes.loads, slopes.indices, by_load, strict=True):
        grads.add(load, indices, scores.block, scores.fill(dx * slope, 0.0))
    if grads.dq is None and grads.dk is None:
        return
    if isinstance(by_s, Tensor):
        # a slope that is not finite where nothing is allowed makes no gradient
        dx = scores.fill(dx.mul_(by_s), 0.0)
        by_s = 1.0
    ds = scores.matrices(dx)
    if grads.dq is not None:
        grads.dq[b0:b1, h0:h1, m0:m1] = torch.bmm(ds, scores.k).mul_(by_s).view(*scores.shape[:3], work.shape.D)
    if grads.dk is not None:
        _add_to_keys(grads.dk[b0:b1, kv0:kv1], keys, ds.mT, scores.q, by_s)


def _add_to_keys(total: Tensor, keys: Keys, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """Adds the products of two batches of matrices to the part of `total` [b, kv, N, d] that belongs to some keys."""
    if len(keys.spans) == 1:
        add_product(keys.of(total), a, b, factor)
    else:
        keys.add(total, torch.bmm(a, b).mul_(factor).view(*total.shape[:2], keys.count, -1))


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """Adds the products of two batches of matrices to `total` [b, kv, n, d], whose first two axes are the batch."""
    total.add_(torch.bmm(a, b).view(total.shape), alpha=factor)
