"""The inner step that calls a flash kernel, which takes grouped heads as they are, for blocks of rows (`flash_kernel`).

The library's computes `s*scale + bias` without dropout, ours softcapped scores and dropout too, and gradients of biases.

A segment whose rows all start at one key is a rectangle, a causal square, or one beside the other, merged by their
log-sum-exps: no mask is needed.  Other rows go block by block under a small additive mask, blocks that are alike together
(`bands`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache, reduce
from threading import Lock
from typing import Final, NamedTuple, TypedDict

import torch
from torch import Tensor

from attnfuse.score import loads
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import diagonals, flash_kernel, native
from attnfuse.templates.affine import numbers, where_allowed
from attnfuse.templates.bands import Band
from attnfuse.templates.base import Inputs
from attnfuse.templates.cover import Run, Segment, columns_of
from attnfuse.templates.evaluate import Block, Evaluator, named_sizes, varies
from attnfuse.templates.flash_kernel import unit_stride
from attnfuse.templates.keys import Keys
from attnfuse.templates.plain_step import Rows
from attnfuse.templates.tile_map import EMPTY
from attnfuse.templates.work import Gradients, Work, tensor_of

_ROWS: Final = 128
# The same where the rows of a block have the same keys, and no mask leaves out tiles of them: the kernel makes larger products of
# more rows. A mask or bias of that many rows is in memory, for each head that has its own.
_ROWS_OF_RECTANGLE: Final = 256
# Blocks whose keys move on with each row have fewer rows, where each row has no more keys than that: fewer cells that no row
# needs, against larger products.  Time a row of the kernel on one core, in us, of 32, 64, 128 rows (float32, D 64, 8 heads):
# 128 keys 5.6, 6.3, 8.0 forward and 18, 13, 16 backward; 512 keys 14.8, 15.6, 17.2 and 57, 47, 44; 2,048 keys 55, 57, 59 and
# 238, 178, 155.
_MOVING_FORWARD: Final = ((2048, 32),)
_MOVING_BACKWARD: Final = ((256, 64),)
# Keys of which the kernel's products are whole vectors: blocks of 543 take 5 % longer than blocks of 544.
_VECTOR: Final = 16
_FEWEST: Final = 128
# A smaller share of empty tiles is not worth the blocks that leave them out: these take 4 to 16 % longer than one call under a mask
# that is in memory (dense float masks, 576 to 2,048 tokens, one core).
EMPTY_SHARE: Final = 1 / 16


class Plan(NamedTuple):
    """The score as the kernel takes it.

    Args:
        scale, cap: see `affine.Numbers`.
        copied: whether the bias is read along diagonals, of which there is a copy for each row of a block.
    """

    scale: float
    cap: float
    bias: Evaluator | None
    bias_by_row: bool = False
    copied: bool = False

    @property
    def rows(self) -> int:
        """Most rows of a block of rows that have the same keys."""
        return _ROWS_OF_RECTANGLE if self.bias_by_row and not self.copied else _ROWS


@lru_cache(maxsize=1024)
def plan_at(text: str, shape: Shape, sizes: tuple[int, ...], *, ours: bool = False) -> Plan | None:
    """The score of calls of these sizes, whatever their types are, if the library's kernel, or ours, computes it."""
    spec = parse_spec(text)
    found = numbers(where_allowed(spec.program), named_sizes(shape, sizes))
    if found is None or shape.D == 0:
        return None
    if not ours and (found.cap or spec.dropout or shape.D != shape.Dv):
        return None
    if found.bias is None:
        return Plan(found.scale, found.cap, None)
    copied = any(diagonals.along(load) is not None for load in loads(found.bias))
    return Plan(found.scale, found.cap, Evaluator(spec, [found.bias]), "m" in varies(found.bias), copied)


def fits(inputs: Inputs) -> bool:
    """Whether the kernel takes the types and heads of a call."""
    return inputs.q.dtype == inputs.v.dtype and (inputs.shape.H == inputs.shape.Hkv or flash_kernel.takes_groups())


def plan_for(inputs: Inputs, *, backward: bool = False) -> Plan | None:
    """The score of a call, or its backward, that the kernel computes, else None."""
    ours = flash_kernel.is_ours(inputs, backward=backward)
    return plan_at(inputs.text, inputs.shape, inputs.sizes, ours=ours) if fits(inputs) else None


def differentiates(grads: Gradients, run: Run, segment: Segment) -> bool:
    """Whether the kernel's backward gives the wanted gradients of a segment: the library's has none of lse and of its mask.

    It takes weights as exp(score - lse).  Where a bias makes lse large, they lose digits: all of them in a row whose keys all
    have -1e9 added.  Ours adds them up once more there, if they are those of all keys that lse is of.
    """
    work = grads.work
    plan = plan_for(work.inputs, backward=True)
    if plan is None:
        return False
    if flash_kernel.is_ours(work.inputs, backward=True):
        if work.sink is None:
            return True
        if grads.dlse is not None:
            return False
    elif grads.dlse is not None or grads.from_body:
        return False
    if plan.bias is None:
        return True
    # a row without a key that a fill of `min` makes uniform is not the kernel's, but lse alone does not tell it from others
    return flash_kernel.has_digits(grads.lse[run.b0 : run.b1, run.h0 : run.h1, segment.m0 : segment.m1], grads.out)


class Span(NamedTuple):
    """Keys [n0, n1) for all rows of a segment, or for row i of them the first i + 1 of these keys."""

    n0: int
    n1: int
    causal: bool


def spans_of(segment: Segment, scale: float) -> tuple[Span, ...] | None:
    """The keys of a segment without a mask, where that can be said to the kernel."""
    m0, m1, first, last, down, right, exact = segment
    if not exact or (down and m1 - m0 > 1):
        return None
    if not right or m1 - m0 == 1:
        return (Span(first, last, causal=False),)
    if not scale > 0:
        # the kernel scales the -inf that it puts above the diagonal
        return None
    square = Span(last - 1, last - 1 + m1 - m0, causal=True)
    return (square,) if first == square.n0 else (square, Span(first, square.n0, causal=False))


class _Part(NamedTuple):
    """One call of the kernel; `mask` [b, h, m, keys] is added to the scores, of keys that are not `allowed` -inf."""

    keys: Keys
    causal: bool = False
    mask: Tensor | None = None
    allowed: Tensor | None = None


class _Group(NamedTuple):
    """The parts of some rows, none where no row has a key.

    Args:
        empty: rows without a key, bool [b, h, m].
        may_be_dead: whether there may be rows in which the score of each key is -inf; the kernel gives zeros there.
    """

    m: tuple[int, int]
    parts: tuple[_Part, ...]
    empty: Tensor | None = None
    may_be_dead: bool = False


def _height(run: Run, segment: Segment, plan: Plan, moving: Sequence[tuple[int, int]]) -> int:
    """Rows of a block of a segment; `moving` says how many where the keys of a row are up to a number."""
    if not segment.down and not segment.right:
        kinds = run.rows.classes
        dense = kinds is not None and share_of_empty(kinds) <= EMPTY_SHARE
        return _ROWS_OF_RECTANGLE if dense and not plan.copied else plan.rows
    if segment.exact and segment.down and segment.right:
        return min([_ROWS, *(rows for keys, rows in moving if segment.last - segment.first <= keys)])
    return _ROWS


def share_of_empty(kinds: Tensor) -> float:
    """The share of tiles, of these classes, that are empty."""
    return float((kinds == EMPTY).sum()) / max(kinds.numel(), 1)


def _groups(
    work: Work, run: Run, segment: Segment, plan: Plan, height: int, most: int | None = None
) -> Iterator[_Group | Band]:
    """The rows of a segment in groups of `height` rows, or of all of them where no mask is needed for each and `most` is None."""
    rows = (segment.m0, segment.m1)
    spans = spans_of(segment, plan.scale)
    if spans is not None and plan.bias is None and not run.holes:
        yield _Group(rows, tuple(_Part(Keys([(n0, n1)], []), causal) for n0, n1, causal in spans))
        return
    alike = most is None and not plan.bias_by_row
    if alike and spans is not None and len(spans) == 1 and (not run.holes or segment.first == run.lo):
        # one mask for all rows; the first key of a batch's interval is allowed, so that no row is empty
        n0, n1, causal = spans[0]
        keys = Keys([(n0, n1)], [(n0, n1)] * run.holes)
        yield _masked(work, run, plan, rows, keys, causal=causal, edge=False, may_be_empty=False)
        return
    if plan.bias is not None or work.dropout or run.holes or not work.mask.from_sizes:
        yield from _blocks(work, run, segment, plan, height)
        return
    key = (work.inputs.text, work.shape, work.inputs.sizes, work.dtype, run[:7], rows, height)
    kept = _KEPT.get(key)
    if kept is not None:
        yield from kept
        return
    made = _Made(_KEPT.most)
    for group in _together(_blocks(work, run, segment, plan, height)):
        made.add(group)
        yield group
    _KEPT.put(key, made)


def _blocks(work: Work, run: Run, segment: Segment, plan: Plan, height: int) -> Iterator[_Group]:
    """The rows of a segment block by block."""
    may_be_empty = run.holes or not segment.exact
    for m0 in range(segment.m0, segment.m1, height):
        block = (m0, min(m0 + height, segment.m1))
        keys = run.rows.keys(*block)
        if keys.count:
            yield _masked(work, run, plan, block, keys, causal=False, edge=True, may_be_empty=may_be_empty)
        else:
            yield _Group(block, ())


def _together(groups: Iterator[_Group]) -> Iterator[_Group | Band]:
    """Neighbours that are alike as bands."""
    band: Band | None = None
    for group in groups:
        simple = len(group.parts) == 1 and group.empty is None and not group.may_be_dead
        longer = None
        if simple and band is not None:
            ((keys, _, mask, _),) = group.parts
            longer = band.longer(group.m, keys, mask)
        if longer is None and band is not None:
            yield band
        if simple:
            ((keys, _, mask, _),) = group.parts
            band = longer or Band(group.m, 1, keys, (0,) * len(keys.spans), mask)
        else:
            band = None
            yield group
    if band is not None:
        yield band


class _Made:
    """The blocks of a segment as they are made, as long as they are few enough to be kept."""

    # what is counted for an entry beside its mask
    _ENTRY: Final = 256

    def __init__(self, most: int) -> None:
        self.most = most
        self.elements = 0
        self.groups: list[_Group | Band] = []

    def add(self, group: _Group | Band) -> None:
        masks = [group.mask] if isinstance(group, Band) else [part.mask for part in group.parts]
        # what broadcasts is in memory once
        of_masks = (x.untyped_storage().nbytes() // x.element_size() for x in masks if x is not None)
        self.elements += self._ENTRY + sum(of_masks)
        if self.elements <= self.most:
            self.groups.append(group)
        else:
            self.groups.clear()


class _Kept:
    """The blocks of segments that indices and sizes decide, the last ones used, up to a number of elements of masks in all."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.elements = 0
        self.segments: OrderedDict[Hashable, _Made] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> list[_Group | Band] | None:
        with self._lock:
            if key not in self.segments:
                return None
            self.segments.move_to_end(key)
            return self.segments[key].groups

    def put(self, key: Hashable, made: _Made) -> None:
        with self._lock:
            if key in self.segments or made.elements > self.most:
                return
            self.segments[key] = made
            self.elements += made.elements
            while self.elements > self.most:
                _, oldest = self.segments.popitem(last=False)
                self.elements -= oldest.elements


_KEPT: Final = _Kept(1 << 24)


def _masked(
    work: Work,
    run: Run,
    plan: Plan,
    rows: tuple[int, int],
    keys: Keys,
    *,
    causal: bool,
    edge: bool,
    may_be_empty: bool,
) -> _Group:
    batches, heads = (run.b0, run.b1), (run.h0, run.h1)
    shape = (run.b1 - run.b0, run.h1 - run.h0, rows[1] - rows[0])
    asked = rows if edge or work.mask.residual else (rows[0], rows[0] + 1)
    found = [
        (part, work.mask.allowed(work.block(batches, heads, asked, part), edge=edge, holes=run.holes))
        for part in keys.masked
    ]
    pieces = [(keys.columns(part), allowed) for part, allowed in found if allowed is not None]
    if plan.bias is None and not pieces:
        return _Group(rows, (_Part(keys, causal),))
    empty = None
    if may_be_empty and pieces and sum(c1 - c0 for (c0, c1), _ in pieces) == keys.count:
        some = reduce(torch.logical_or, (allowed.any(-1) for _, allowed in pieces))
        empty = _where(~some, shape)
    if plan.bias is None:
        mask = torch.zeros((*_dims(pieces), keys.count), dtype=work.dtype)
    else:
        m = rows if plan.bias_by_row else (rows[0], rows[0] + 1)
        value = plan.bias(work.block(batches, heads, m, keys.hull, keys.indices))[0]
        mask = tensor_of(value, work.dtype)
        if pieces and flash_kernel.is_ours(work.inputs):
            # our kernel takes conditions beside a bias, which stays where it is
            some = torch.ones((*_dims(pieces), keys.count), dtype=torch.bool)
            for (c0, c1), allowed in pieces:
                some[..., c0:c1] = allowed
            mask, some = mask.expand(*shape, keys.count), some.expand(*shape, keys.count)
            return _Group(rows, (_Part(keys, causal, mask, some),), empty, may_be_dead=True)
        dims = [max(a, b) for a, b in zip(mask.shape[:3], _dims(pieces), strict=True)]
        mask = mask.expand(*dims, keys.count)
        mask = mask.clone() if pieces else mask
    for (c0, c1), allowed in pieces:
        mask[..., c0:c1].masked_fill_(~allowed, -torch.inf)
    if keys.masked == keys.spans and len(pieces) == 1 and may_be_empty:
        c0, c1 = columns_of(pieces[0][1].expand(-1, -1, -1, keys.count))
        if c0 == c1:
            return _Group(rows, ())
        keys, mask = keys.cut(c0, c1), mask[..., c0:c1]
    if plan.bias is None and not causal and len(keys.spans) == 1:
        keys, mask = _rounded(keys, mask, run.lo)
    part = _Part(keys, causal, mask.expand(*shape, keys.count))
    return _Group(rows, (part,), empty, may_be_dead=plan.bias is not None)


def _dims(pieces: Sequence[tuple[tuple[int, int], Tensor]]) -> tuple[int, ...]:
    """Batches, heads and rows of conditions, 1 where they are the same."""
    return tuple(max((allowed.shape[dim] for _, allowed in pieces), default=1) for dim in range(3))


def _rounded(keys: Keys, mask: Tensor, lowest: int) -> tuple[Keys, Tensor]:
    """One span of keys and their mask, with keys before them that no row may see, so that they are a multiple of `_VECTOR`."""
    ((n0, n1),) = keys.spans
    more = -(n1 - n0) % _VECTOR
    if not more or n0 - more < lowest or n1 - n0 < _FEWEST:
        return keys, mask
    mask = torch.nn.functional.pad(mask, (more, 0), value=-torch.inf)
    return Keys([(n0 - more, n1)], []), mask


def _where(rows: Tensor, shape: tuple[int, int, int]) -> Tensor | None:
    return rows.expand(shape) if bool(rows.any()) else None


def _axes(work: Work, run: Run) -> tuple[int, int, int, int, int, int]:
    """The batches, heads and KV heads of a run."""
    return run.b0, run.b1, run.h0, run.h1, run.h0 // work.group, run.h1 // work.group


def _keys_and_values(work: Work, *, backward: bool) -> tuple[Tensor, Tensor]:
    """k and v as the kernel takes them, and q in their type."""
    slow = flash_kernel.is_slow(work.inputs, backward=backward)
    return (work.k, work.v) if slow else (work.inputs.k, work.inputs.v)


def _alone(groups: Iterator[_Group | Band], run: Run, together: Callable[[Band, int], None]) -> Iterator[_Group]:
    """The blocks that are no part of a band; `together` gets the bands, batch by batch.

    A band of no more blocks than there are batches is taken apart: these go through one call too.
    """
    for group in groups:
        if not isinstance(group, Band):
            yield group
        elif group.blocks > run.b1 - run.b0:
            for b in range(run.b0, run.b1):
                together(group, b)
        else:
            yield from (_Group(m, (_Part(keys, mask=group.mask),)) for m, keys in group.each())


def _for_blocks(band: Band) -> Tensor | None:
    """The mask of a band as the kernel takes it, for one batch."""
    return None if band.mask is None else band.mask[:1].expand(band.blocks, -1, -1, -1)


def forward(work: Work, run: Run, segment: Segment, out: Tensor, lse: Tensor) -> Iterator[Rows]:
    """Writes the rows of a segment; yields those that turn out to have no key."""
    inputs = work.inputs
    plan = plan_for(inputs)
    assert plan is not None
    b0, b1, h0, h1, kv0, kv1 = _axes(work, run)
    all_k, all_v = _keys_and_values(work, backward=False)
    ours = flash_kernel.is_ours(inputs)

    def forward_of_band(band: Band, b: int) -> None:
        q = band.rows_of(inputs.q[b, h0:h1]).to(all_k.dtype)
        k, v = (band.keys_of(unit_stride(x[b, kv0:kv1])) for x in (all_k, all_v))
        mask = _for_blocks(band)
        values, sums = flash_kernel.forward(q, k, v, plan.scale, ours=ours, mask=mask, cap=plan.cap)
        band.rows_of(out[b, h0:h1]).copy_(values)
        band.rows_of(lse[b, h0:h1]).copy_(sums)

    groups = _groups(work, run, segment, plan, _height(run, segment, plan, _MOVING_FORWARD))
    for (m0, m1), parts, empty, may_be_dead in _alone(groups, run, forward_of_band):
        if not parts:
            yield Rows((b0, b1), (h0, h1), (m0, m1))
            continue
        q = inputs.q[b0:b1, h0:h1, m0:m1].to(all_k.dtype)
        results = []
        for part in parts:
            k, v = (part.keys.of(x[b0:b1, kv0:kv1]) for x in (all_k, all_v))
            dead = math.nan if may_be_dead else None
            given = _arguments(work, run, (m0, m1), plan, part)
            results.append(flash_kernel.forward(q, k, v, plan.scale, ours=ours, dead=dead, **given))
        values, sums = results[0] if len(results) == 1 else _merged(*results)
        out[b0:b1, h0:h1, m0:m1] = values
        lse[b0:b1, h0:h1, m0:m1] = sums
        if empty is not None:
            yield Rows((b0, b1), (h0, h1), (m0, m1), empty)


class _Arguments(TypedDict):
    """Of a call of a kernel, as `flash_kernel.forward` has them."""

    causal: bool
    mask: Tensor | None
    allowed: Tensor | None
    cap: float
    dropout: native.Dropout | None


def _arguments(work: Work, run: Run, rows: tuple[int, int], plan: Plan, part: _Part) -> _Arguments:
    dropped = None
    if work.dropout:
        dropped = native.Dropout(work.dropout, *work.hashes(_block(work, run, rows, part)))
    return _Arguments(causal=part.causal, mask=part.mask, allowed=part.allowed, cap=plan.cap, dropout=dropped)


def _block(work: Work, run: Run, rows: tuple[int, int], part: _Part) -> Block:
    return work.block((run.b0, run.b1), (run.h0, run.h1), rows, part.keys.hull, part.keys.indices)


def _merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each."""
    share = torch.sigmoid(b[1] - a[1])[..., None]
    return torch.lerp(a[0].to(share.dtype), b[0].to(share.dtype), share), torch.logaddexp(a[1], b[1])


def backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> Iterator[Rows]:
    """Adds what the rows of a segment give to the gradients; yields those that turn out to have no key."""
    for part in grads.parts(run):
        yield from _backward(work, part, segment, grads)


def _backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> Iterator[Rows]:
    inputs = work.inputs
    plan = plan_for(inputs, backward=True)
    assert plan is not None
    b0, b1, h0, h1, kv0, kv1 = _axes(work, run)
    all_k, all_v = _keys_and_values(work, backward=True)
    ours = flash_kernel.is_ours(inputs, backward=True)

    def backward_of_band(band: Band, b: int) -> None:
        of_rows = (x[b, h0:h1] for x in (grads.dout, inputs.q, grads.out, grads.row_lse))
        dout, q, out, lse = map(band.rows_of, of_rows)
        k, v = (band.keys_of(unit_stride(x[b, kv0:kv1])) for x in (all_k, all_v))
        dout, q, out = (x.to(all_k.dtype) for x in (dout, q, out))
        mask = _for_blocks(band)
        dlse = None if grads.dlse is None else band.rows_of(grads.dlse[b, h0:h1])
        dq, dk, dv = flash_kernel.backward(
            dout, q, k, v, out, lse, plan.scale, ours=ours, mask=mask, cap=plan.cap, dlse=dlse, whole=work.sink is None
        )
        if grads.dk is not None:
            band.add(grads.dk[b, kv0:kv1], dk)
        if grads.dv is not None:
            band.add(grads.dv[b, kv0:kv1], dv)
        if grads.dq is not None:
            band.rows_of(grads.dq[b, h0:h1]).copy_(dq)

    most, height = grads.most_rows(run), _height(run, segment, plan, _MOVING_BACKWARD)
    groups = _groups(work, run, segment, plan, height if most is None else min(height, most), most)
    for (m0, m1), parts, empty, _ in _alone(groups, run, backward_of_band):
        rows = Rows((b0, b1), (h0, h1), (m0, m1), empty)
        if not parts:
            yield rows
            continue
        q, dout, out, lse = (x[b0:b1, h0:h1, m0:m1] for x in (inputs.q, grads.dout, grads.out, grads.row_lse))
        if empty is not None:
            # no weight in this pass, and no NaN
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, torch.inf)
        q, dout, out = (x.to(all_k.dtype) for x in (q, dout, out))
        dqs: list[Tensor] = []
        dlse = None if grads.dlse is None else grads.dlse[b0:b1, h0:h1, m0:m1]
        for part in parts:
            k, v = (part.keys.of(x[b0:b1, kv0:kv1]) for x in (all_k, all_v))
            given, dscores = _arguments(work, run, (m0, m1), plan, part), grads.of_scores(q, k)
            dq, dk, dv = flash_kernel.backward(
                *(dout, q, k, v, out, lse, plan.scale),
                ours=ours,
                dlse=dlse,
                dscores=dscores,
                whole=work.sink is None and len(parts) == 1,
                **given,
            )
            dqs.append(dq)
            if grads.dk is not None:
                part.keys.add(grads.dk[b0:b1, kv0:kv1], dk)
            if grads.dv is not None:
                part.keys.add(grads.dv[b0:b1, kv0:kv1], dv)
            if dscores is not None:
                grads.add_of_scores(_block(work, run, (m0, m1), part), dscores)
        if grads.dq is not None:
            grads.dq[b0:b1, h0:h1, m0:m1] = dqs[0] if len(dqs) == 1 else sum(dq.to(work.dtype) for dq in dqs)
        if empty is not None:
            yield rows
