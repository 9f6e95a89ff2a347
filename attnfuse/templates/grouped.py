"""Equality masks on ids in no order: rows and keys are put in the order of their ids, where each id is a block of its own.

`id[b, m] == id[b, n]` leaves keys to a row that are scattered over the call, which neither ranges nor tiles say.  A stable sort
puts them side by side and keeps them ascending, so that what else bounds the keys of a row (`n <= m`) leaves a range of them.
Only operands and results are copied: masks, biases, dropout and gradients of leaves are computed at the cells' own indices.

`order_of` says in each call whether that pays; `Ordered` is the call in that order.  Keys that the conditions on (b, n) exclude
stand at the end, so that nothing asks them again.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache, reduce
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import Call, Expr, loads
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import tile_lists
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.cover import Mask, Rows, Run, Segment, block_of, mask_of, segments_of
from attnfuse.templates.evaluate import Block, Evaluator, Value, named_sizes, varies
from attnfuse.templates.work import Gradients, Work, laid_out

# What an order costs beside its cells, in cells of one head.  Measured with H 8 and D 64 as CPU time of one thread of an AMD EPYC
# with AVX-512 that others used too: sorted and unsorted in turn, the least of up to 30 runs each, N 256 to 2,048, 4 to 32 ids, fp32
# and bf16, forward and backward.  A cell took 4 ns in the forward.
# A row of D elements that is copied, of q, k, v or the result: 13 ns in the caches, 90 ns outside of them.
_ROW: Final = 20
# A part of its own: of eight heads 60 us, but 400 to 600 us in the backward in bf16; of one head 45 us (8 ms for 128 parts of 64
# rows).
_CALL: Final = 6_000
_CALL_OF_HEAD: Final = 6_000
# Ids, sorts and ranges: 0.7 ms.
_SORT: Final = 200_000
# Rows of a block where segments are too many to be told apart.
_BLOCK: Final = 128
_LARGEST: Final = torch.iinfo(torch.int64).max


def pays(shape: Shape, cells: int, in_order: int, calls: int, heads: int) -> bool:
    """Whether sorting is the cheaper way.

    Args:
        cells: those that are computed without, over all batches and heads.
        in_order: those that are computed in the order of ids.
        calls: into how many parts these fall, each of so many `heads`, those of all its batches.
    """
    copied = 2 * shape.B * (shape.H * shape.M + shape.Hkv * shape.N)
    return in_order + _ROW * copied + (_CALL + _CALL_OF_HEAD * heads) * calls + _SORT < cells


class Order(NamedTuple):
    """How the rows and keys of a call are put, and what is to be computed then.

    Args:
        runs: as in `cover`; rows and keys are places in the order.
        rows: the row at each place, int64 [B or 1, Hkv or 1, M].
        keys: the key at each place, int64 [B or 1, Hkv or 1, N].
    """

    runs: tuple[Run, ...]
    rows: Tensor
    keys: Tensor


class _Ids:
    """The conditions of a mask that say `of row == of key`, between integers of which neither depends on the other's index."""

    def __init__(self, spec: AttentionSpec, mask: Mask) -> None:
        found = [(e, pair) for e in mask.residual if (pair := _equality(spec, e)) is not None]
        self.any = bool(found)
        self.all = len(found) == len(mask.residual)
        self.of_rows = Evaluator(spec, [row for _, (row, _) in found])
        self.of_keys = Evaluator(spec, [key for _, (_, key) in found])
        self.from_sizes = not any(loads(tier.allowed) for tier in spec.program.tiers)


def _equality(spec: AttentionSpec, expr: Expr) -> tuple[Expr, Expr] | None:
    if not isinstance(expr, Call) or expr.op != "eq" or any(spec.type_of(a) != "int" for a in expr.args):
        return None
    for row, key in (expr.args, expr.args[::-1]):
        if "n" not in varies(row) and "m" not in varies(key) and "n" in varies(key):
            return row, key
    return None


@lru_cache(maxsize=1024)
def _ids_of(text: str) -> _Ids:
    return _Ids(parse_spec(text), mask_of(text))


@lru_cache(maxsize=1024)
def _asked(text: str) -> Mask:
    """The mask of a call in order: indices and sizes do not decide which cells stand in a block."""
    mask = copy(mask_of(text))
    mask.from_sizes = False
    return mask


def order_of(inputs: Inputs) -> Order | None:
    """The order in which to compute a call, or None where it is to be computed as it stands; its sizes are at least 1."""
    ids, shape = _ids_of(inputs.text), inputs.shape
    if not ids.any or not pays(shape, shape.B * shape.H * shape.M * shape.N, 0, 1, 1):
        return None
    if ids.from_sizes:
        return _index_order(inputs.text, shape, inputs.sizes)
    return _order(inputs.text, block_of(inputs, (0, shape.B), (0, shape.H), (0, shape.M), (0, shape.N)), shape)


@lru_cache(maxsize=16)
def _index_order(text: str, shape: Shape, sizes: tuple[int, ...]) -> Order | None:
    """The order where indices and sizes decide it."""
    cells = ((0, shape.B), (0, shape.H), (0, shape.M), (0, shape.N))
    return _order(text, Block({}, named_sizes(shape, sizes), cells, torch.device("cpu"), torch.float32), shape)


class _Known(NamedTuple):
    """What is known of the rows and keys of a call, int64 or bool [batches, KV heads, rows or keys], as they stand.

    Args:
        rows, keys: their ids.
        low, high: beside its id, a row may see keys from `low` on and before `high`.
        live: the keys that are not excluded for all rows.
        exact: whether nothing else decides.
    """

    rows: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor
    live: Tensor
    exact: bool


def _order(text: str, block: Block, shape: Shape) -> Order | None:
    known = _known(text, block, shape)
    if known is None:
        return None
    key_ids = known.keys.masked_fill(~known.live, _LARGEST)
    key_ids, keys = key_ids.sort(dim=-1, stable=True)
    count = known.live.sum(-1, keepdim=True)
    if bool((count < shape.N).any()):
        # behind those of the greatest id
        at = (~known.live).gather(-1, keys).to(torch.uint8).sort(dim=-1, stable=True).indices
        key_ids, keys = key_ids.gather(-1, at), keys.gather(-1, at)
    row_ids, rows = known.rows.sort(dim=-1, stable=True)
    first, last = _ranges(known, key_ids, keys, row_ids, rows, count)
    # by heads, or batches, that share an order
    times = shape.B // len(first) * (shape.H // first.shape[1])
    cells = times * _cells_as_they_stand(known)
    if not pays(shape, cells, times * int((last - first).sum()), len(first) * first.shape[1], times):
        return None
    runs = _runs(first, last, count[..., 0].tolist(), known.exact, shape)
    in_order, calls = _cost(first, last, runs)
    return Order(runs, rows, keys) if pays(shape, cells, times * in_order, calls, times) else None


def _known(text: str, block: Block, shape: Shape) -> _Known | None:
    """None where ids stand together, and where heads that share keys differ in them."""
    mask, ids = mask_of(text), _ids_of(text)
    b, h, m, n = block.ranges
    beside, above = block.part((b, h, m, (0, 1))), block.part((b, h, (0, 1), n))
    of_rows = [_of_groups(_lined(x, shape.M), shape.Hkv) for x in ids.of_rows(beside)]
    of_keys = [_of_groups(_lined(x, shape.N), shape.Hkv) for x in ids.of_keys(above)]
    rows, keys = [x for x in of_rows if x is not None], [x for x in of_keys if x is not None]
    if len(rows) < len(of_rows) or len(keys) < len(of_keys):
        return None
    row_ids, key_ids = _joined(rows, keys)
    if row_ids.shape[1] == 1 and key_ids.shape[1] == 1 and _side_by_side(key_ids) and _side_by_side(row_ids):
        return None
    bounds = [_lined(x, shape.M) for x in mask.rows_of(beside)]
    between = len(mask.rows.lower)
    zero = torch.zeros((1, 1, 1), dtype=torch.int64)
    # what differs by head is asked in each cell
    low = reduce(torch.maximum, (x for x in bounds[:between] if x.shape[1] == 1), zero)
    high = reduce(torch.minimum, (x for x in bounds[between:] if x.shape[1] == 1), zero + shape.N)
    exact = ids.all and all(x.shape[1] == 1 for x in bounds)
    parts = (row_ids, key_ids, low, high, _live(mask, block))
    outer = [max(x.shape[axis] for x in parts) for axis in range(2)]
    lengths = (shape.M, shape.N, shape.M, shape.M, shape.N)
    row_ids, key_ids, low, high, live = (
        x.expand(*outer, length).contiguous() for x, length in zip(parts, lengths, strict=True)
    )
    return _Known(row_ids, key_ids, low.clamp(0, shape.N), high.clamp(0, shape.N), live, exact)


def _live(mask: Mask, block: Block) -> Tensor:
    """The keys that the conditions on (b, n) leave: bool [batches, 1, 1 or N]."""
    b, _, _, n = block.ranges
    ends = [_lined(x, 1) for x in mask.interval_of(block.part((b, (0, 1), (0, 1), (0, 1))))]
    keys, between = torch.arange(*n), len(mask.starts)
    live = torch.ones((1, 1, 1), dtype=torch.bool)
    for at, end in enumerate(ends):
        live = live & (keys >= end if at < between else keys < end)
    for value in mask.padding_of(block.part((b, (0, 1), (0, 1), n))):
        live = live & _lined(value, len(keys)).bool()
    return live


def _lined(value: Value, length: int) -> Tensor:
    """A value along the rows, or the keys: int64 [batches, heads, length]."""
    x = value.long() if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), int(value))
    x = x.view((1,) * (4 - x.dim()) + x.shape).flatten(2)
    return x.expand(-1, -1, length)


def _of_groups(x: Tensor, kv_heads: int) -> Tensor | None:
    """What the query heads of each KV head have in common: None where they differ."""
    if x.shape[1] == 1:
        return x
    x = x.reshape(len(x), kv_heads, -1, x.shape[-1])
    return x[:, :, 0] if bool((x == x[:, :, :1]).all()) else None


def _joined(rows: list[Tensor], keys: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One id of rows and of keys that agree where all of them do."""
    pairs = list(zip(rows, keys, strict=True))
    if len(pairs) == 1:
        return pairs[0]
    row, key = pairs[0]
    for pair in pairs[1:]:
        (row, key), _ = _ranked(row, key)
        (other_row, other_key), count = _ranked(*pair)
        row, key = row * count + other_row, key * count + other_key
    return row, key


def _ranked(row: Tensor, key: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """Small numbers in place of ids, and how many there are."""
    values, found = torch.unique(torch.cat((row.flatten(), key.flatten())), return_inverse=True)
    parts = found.split((row.numel(), key.numel()))
    return (parts[0].view(row.shape), parts[1].view(key.shape)), len(values)


def _side_by_side(keys: Tensor) -> bool:
    """Whether the keys, or rows, of each id stand side by side in every batch."""
    if bool((keys[..., 1:] >= keys[..., :-1]).all()):
        return True
    changes = keys[..., 1:] != keys[..., :-1]
    ordered = keys.sort(dim=-1).values
    return torch.equal(changes.sum(-1), (ordered[..., 1:] != ordered[..., :-1]).sum(-1))


def _ranges(
    known: _Known, key_ids: Tensor, keys: Tensor, row_ids: Tensor, rows: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The places of the keys, from the first to before the last, of the rows in order."""
    N = keys.shape[-1]
    at = torch.searchsorted(key_ids, row_ids)
    at = at.clamp_(max=N - 1)
    found = key_ids.gather(-1, at) == row_ids
    # a key as its id and its index in one number
    starts = torch.zeros_like(key_ids)
    starts[..., 1:] = key_ids[..., 1:] != key_ids[..., :-1]
    of_id = starts.cumsum(-1)
    place = torch.arange(N) < count
    numbers = torch.where(place, of_id * (N + 1) + keys, (N + 1) * (N + 1))
    base = of_id.gather(-1, at) * (N + 1)
    first, last = (
        # a row whose id no key has is empty where its keys would stand, so that it widens no block
        torch.searchsorted(numbers, base + end.gather(-1, rows)).where(found, at)
        for end in (known.low, known.high)
    )
    return first, torch.maximum(first, last)


def _runs(first: Tensor, last: Tensor, count: list[list[int]], exact: bool, shape: Shape) -> tuple[Run, ...]:
    batches, heads, _ = first.shape
    b_step, h_step = shape.B // batches, shape.H // heads
    out = []
    for b in range(batches):
        for h in range(heads):
            ends, keys = (first[b, h], last[b, h]), count[b][h]
            firsts, lasts = (torch.stack((x, x)) for x in ends)
            rows = Rows(firsts, lasts, 0, keys, loose=not exact, asked=not exact)
            whole = (Segment(0, shape.M, 0, keys, 0, 0, exact=False),)
            segments = (segments_of(*ends) or whole) if exact else whole
            span = (b * b_step, (b + 1) * b_step, h * h_step, (h + 1) * h_step)
            out.append(Run(*span, 0, keys, False, segments, rows))
    return tuple(out)


def _cost(first: Tensor, last: Tensor, runs: tuple[Run, ...]) -> tuple[int, int]:
    """How many cells the runs have, heads and batches that share an order counted once, and into how many parts they fall."""
    cells = calls = 0
    for run, firsts, lasts in zip(runs, first.flatten(0, 1), last.flatten(0, 1), strict=True):
        if run.segments[0].exact:
            cells += int((lasts - firsts).sum())
            calls += len(run.segments)
        else:
            least, greatest = _in_tiles(firsts, _BLOCK)[0], _in_tiles(lasts, _BLOCK)[1]
            cells += int((greatest - least).sum()) * _BLOCK
            calls += len(least)
    return cells, calls


def _in_tiles(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest value in each tile along the last axis."""
    rest = x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % size)
    found = torch.cat((x, rest), -1).view(*x.shape[:-1], -1, size).aminmax(dim=-1)
    return found.min, found.max


def _cells_as_they_stand(known: _Known) -> int:
    """The cells of the tiles that ids and bounds leave, heads and batches that share an order counted once."""
    M, N = known.rows.shape[-1], known.keys.shape[-1]
    height, width = tile_lists.TILES
    low, high = _in_tiles(known.low, height)[0][..., None], _in_tiles(known.high, height)[1][..., None]
    start = torch.arange(0, N, width)
    visited = (start < high) & (start + width > low) & _in_tiles(known.live.long(), width)[1].bool()[..., None, :]
    if tile_lists.worth_a_map(M, N):
        (least, greatest), (first, last) = _in_tiles(known.rows, height), _in_tiles(known.keys, width)
        visited = visited & (least[..., None] <= last[..., None, :]) & (greatest[..., None] >= first[..., None, :])
    return int(visited.sum()) * min(height, M) * min(width, N)


class Ordered(Work):
    """A call whose rows and keys stand in the order of their ids; ranges of rows and keys are places in it."""

    reordered = True

    def __init__(self, work: Work, order: Order) -> None:
        inputs = work.inputs
        q = _taken(inputs.q, order.rows)
        k, v = (_taken(x, order.keys) for x in (inputs.k, inputs.v))
        super().__init__(inputs._replace(q=q, k=k, v=v, tiles=()))
        self.mask = _asked(inputs.text)
        self.order = order
        self._as_it_stands = work

    @property
    def sink(self) -> Tensor | None:
        """The sink of each row, broadcast to [B, H, M]."""
        if self._sink is None and self._as_it_stands.sink is not None:
            self._sink = self._as_it_stands.sink.gather(2, self._rows)
        return self._sink

    @property
    def _rows(self) -> Tensor:
        return _by_head(self.order.rows, self.shape.B, self.shape.H)

    def block(
        self, b: tuple[int, int], h: tuple[int, int], m: tuple[int, int], n: tuple[int, int], keys: Tensor | None = None
    ) -> Block:
        """Cells of this call, of batches and heads that share an order, at their own indices."""
        rows, ordered = (x[b[0] % len(x), h[0] // self.group % x.shape[1]] for x in (self.order.rows, self.order.keys))
        inputs = self.inputs
        leaves = {leaf.name: x for leaf, x in zip(inputs.spec.leaves, inputs.leaves, strict=True)}
        chosen = ordered[slice(*n) if keys is None else keys]
        cells = (b, h, (0, self.shape.M), (0, self.shape.N))
        sizes = named_sizes(self.shape, inputs.sizes)
        return Block(leaves, sizes, cells, inputs.q.device, self.dtype, chosen, rows[slice(*m)])

    def put_back(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Results in the order of the call."""
        back = _inverse(self.order.rows)
        values = laid_out(_taken(out, back), out.dtype, self.inputs.out_order)
        return values, lse.gather(2, _by_head(back, self.shape.B, self.shape.H))

    def gradients(self, cotangents: Cotangents) -> Gradients:
        """Gradients of the call, rows and keys in order."""
        out, dout = (None if x is None else _taken(x, self.order.rows) for x in (cotangents.out, cotangents.dout))
        lse, dlse = (None if x is None else x.gather(2, self._rows) for x in (cotangents.lse, cotangents.dlse))
        assert out is not None
        assert lse is not None
        return Gradients(self, Cotangents(out, lse, dout, dlse, cotangents.needs))

    def results_of(self, grads: Gradients, cotangents: Cotangents) -> list[Tensor]:
        """The wanted gradients in the order of the call."""
        if self._as_it_stands.sink is not None:
            # it is a row's alone
            of_sink = Gradients(self._as_it_stands, cotangents._replace(needs=(False,) * 3 + cotangents.needs[3:]))
            of_sink.leaves = grads.leaves
            of_sink.finish_sink()
        rows, keys = _inverse(self.order.rows), _inverse(self.order.keys)
        if grads.dq is not None:
            grads.dq = laid_out(_taken(grads.dq, rows), grads.dq.dtype, self.inputs.out_order)
        grads.dk, grads.dv = (None if x is None else _taken(x, keys) for x in (grads.dk, grads.dv))
        return grads.results()


def _by_head(order: Tensor, batches: int, heads: int) -> Tensor:
    """An order for each batch and head: int64 [B, heads, length]."""
    if order.shape[1] > 1:
        order = order.repeat_interleave(heads // order.shape[1], 1)
    return order.expand(batches, heads, -1)


def _inverse(order: Tensor) -> Tensor:
    """The place of each row, or key."""
    places = torch.arange(order.shape[-1]).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x [B, heads, length, d] with its rows in an order; heads stay inside or outside of rows in memory."""
    B, heads, length, d = x.shape
    inside = x.stride(1) < x.stride(2)
    if inside and order.shape[1] == 1:
        # rows of all heads lie side by side
        rows = x.transpose(1, 2).reshape(B * length, heads * d)
        at = order[:, 0] + torch.arange(0, B * length, length)[:, None]
        return rows.index_select(0, at.flatten()).view(B, length, heads, d).transpose(1, 2)
    at = _by_head(order, B, heads)
    b, h = torch.arange(B)[:, None, None], torch.arange(heads)[:, None]
    if inside:
        at = ((b * length + at) * heads + h).transpose(1, 2)
        rows = x.transpose(1, 2).reshape(B * length * heads, d)
        return rows.index_select(0, at.flatten()).view(B, length, heads, d).transpose(1, 2)
    at = (b * heads + h) * length + at
    return x.reshape(B * heads * length, d).index_select(0, at.flatten()).view(B, heads, length, d)
