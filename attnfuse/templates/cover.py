"""Which cells of a call have to be computed: batches, heads, row segments and their keys, from the mask and the real data.

Conditions on (b, n) alone (padding, lengths) become an interval of keys for each batch where their true cells are one run;
the bounds of `tiles` then give each row a range of keys, and so does an equality with a value whose keys are one run
(documents, blocks); rows whose ranges follow one another alike are one `Segment`.  Where a mask has no such form, a tile map
says which keys a block of rows looks at.  What indices and sizes decide is computed once and kept; what leaves decide is
looked at in every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import Call, Expr, Var, call, loads
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import tile_lists
from attnfuse.templates.base import Inputs
from attnfuse.templates.evaluate import Block, Copies, Evaluator, Value, named_sizes, varies
from attnfuse.templates.keys import Keys
from attnfuse.templates.tile_lists import classes_of, of_kv_heads, together
from attnfuse.templates.tile_map import classes
from attnfuse.tiles import Bounds, bounds

# More segments than this, and fewer rows in each than that on average, are not worth telling apart.
_SEGMENTS: Final = 6
_ROWS_A_SEGMENT: Final = 32
# Masks of this many elements are looked at in Python rather than by several calls of torch.
_SMALL: Final = 2048


class Segment(NamedTuple):
    """Rows [m0, m1) whose keys [first, last) start and end on a straight line each.

    Args:
        first, last: the keys of row m0.
        down, right: by how much first and last grow from row to row, 0 or 1.
        exact: False where ranges have another form: `Rows.keys` bounds them, the mask has the last word, rows may be empty.
    """

    m0: int
    m1: int
    first: int
    last: int
    down: int
    right: int
    exact: bool = True

    @property
    def empty(self) -> bool:
        """Whether no row has a key."""
        return self.exact and self.first >= self.last


@dataclass(frozen=True, slots=True)
class Rows:
    """The keys of each row, as far as ranges and tiles tell them.

    Args:
        first, last: the least and the greatest value in each row of what bounds its keys, int64 [2, M].
        lo, hi: keys outside are allowed in no row.
        loose: whether heads differ in them, or the mask has conditions beside them.
        asked: whether the mask has to be asked inside of the bounds too.
        classes: of the tiles of the mask, uint8 [row tiles, key tiles].
    """

    first: Tensor
    last: Tensor
    lo: int
    hi: int
    loose: bool
    asked: bool
    classes: Tensor | None = None
    _keys: dict[tuple[int, int], Keys] = field(default_factory=dict)

    def keys(self, m0: int, m1: int) -> Keys:
        """The keys that rows [m0, m1) look at."""
        found = self._keys.get((m0, m1))
        if found is None:
            found = self._keys[m0, m1] = self._in_range(m0, m1) if self.classes is None else self._in_tiles(m0, m1)
        return found

    def _in_range(self, m0: int, m1: int) -> Keys:
        def within(x: Tensor) -> int:
            return min(max(int(x), self.lo), self.hi)

        first, last = within(self.first[0, m0:m1].min()), within(self.last[1, m0:m1].max())
        full_first, full_last = within(self.first[1, m0:m1].max()), within(self.last[0, m0:m1].min())
        if self.asked or full_first >= full_last:
            full_first = full_last = last
        return Keys.of_range(first, last, full_first, full_last)

    def _in_tiles(self, m0: int, m1: int) -> Keys:
        assert self.classes is not None
        height = tile_lists.TILES.block_m
        some = together(self.classes[m0 // height : (m1 - 1) // height + 1], 0)
        return Keys.of_tiles(some.tolist(), tile_lists.TILES.block_n, self.lo, self.hi)


class Run(NamedTuple):
    """Batches [b0, b1) and heads [h0, h1), whole groups of a KV head, with one cover.

    Args:
        lo, hi: keys outside are allowed in no row.
        holes: whether the conditions on (b, n) still have to be asked inside.
        segments: all rows, in order.
    """

    b0: int
    b1: int
    h0: int
    h1: int
    lo: int
    hi: int
    holes: bool
    segments: tuple[Segment, ...]
    rows: Rows

    def parts(self, group: int, most: int) -> Iterator[Run]:
        """The run in parts of up to `most` pairs of a batch and a head, but the `group` of a KV head at least."""
        heads = max(group, min(most, self.h1 - self.h0) // group * group)
        batches = max(1, most // max(1, self.h1 - self.h0))
        for b in range(self.b0, self.b1, batches):
            for h in range(self.h0, self.h1, heads):
                yield self._replace(b0=b, b1=min(b + batches, self.b1), h0=h, h1=min(h + heads, self.h1))


def columns_of(allowed: Tensor) -> tuple[int, int]:
    """The columns between the first and the last that have an allowed cell; (0, 0) if none has."""
    first, last, _ = _true_runs(allowed.flatten(0, 2).any(0)[None])[0]
    return first, last


class _Equality(NamedTuple):
    """`row == key`: integers of which one does not depend on keys, the other not on rows, and none on heads."""

    row: Expr
    key: Expr


def _equality(spec: AttentionSpec, expr: Expr) -> _Equality | None:
    if not isinstance(expr, Call) or expr.op != "eq" or any(spec.type_of(a) != "int" for a in expr.args):
        return None
    for row, key in (expr.args, expr.args[::-1]):
        if varies(row) <= {"b", "m"} and "n" in varies(key) <= {"b", "n"}:
            return _Equality(row, key)
    return None


class Mask:
    """The conditions of one spec, sorted by what they depend on."""

    def __init__(self, spec: AttentionSpec) -> None:
        known = bounds(spec)
        self.padding = tuple(e for e in known.residual if varies(e) <= {"b", "n"})
        self.residual = tuple(e for e in known.residual if e not in self.padding)
        sides = [[e for e in side if varies(e) <= {"b"}] for side in (known.lower, known.upper)]
        self.starts, self.ends = map(tuple, sides)
        self.rows = Bounds(*(tuple(e for e in s if not varies(e) <= {"b"}) for s in (known.lower, known.upper)))
        self.equal = tuple(pair for e in self.residual if (pair := _equality(spec, e)) is not None)
        moving = (*self.rows.lower, *self.rows.upper)
        decisive = (*moving, *(e for pair in self.equal for e in pair))
        self.by_batch = any("b" in varies(e) for e in (*moving, *self.residual))
        self.rows_by_batch = any("b" in varies(e) for e in decisive)
        self.from_indices = not any(loads(e) for e in decisive)
        asked = (*moving, *self.residual)
        self.from_sizes = not any(loads(e) or "b" in varies(e) for e in asked)
        self.padding_of = Evaluator(spec, self.padding)
        self.interval_of = Evaluator(spec, [*self.starts, *self.ends])
        self.rows_of = Evaluator(spec, moving)
        self.equal_of = Evaluator(spec, [e.row for e in self.equal]), Evaluator(spec, [e.key for e in self.equal])
        n = Var("n")
        edges = [*(call("ge", n, e) for e in self.rows.lower), *(call("lt", n, e) for e in self.rows.upper)]
        self._conditions = {
            (edge, holes): Evaluator(spec, [*(edges * edge), *self.residual, *(self.padding * holes)])
            for edge in (False, True)
            for holes in (False, True)
        }

    def allowed(self, block: Block, *, edge: bool, holes: bool) -> Tensor | None:
        """The cells of a block, inside its run's interval of keys, that every tier allows; None: all of them.

        Args:
            edge: ask the bounds of the rows.
            holes: ask the conditions on (b, n).
        """
        out: Tensor | None = None
        for value in self._conditions[edge, holes](block):
            if not isinstance(value, Tensor):
                if value:
                    continue
                value = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=block.device)
            out = value if out is None else out & value
        return out


@lru_cache(maxsize=1024)
def mask_of(text: str) -> Mask:
    """The conditions of the spec with that text."""
    return Mask(parse_spec(text))


def block_of(
    inputs: Inputs,
    b: tuple[int, int],
    h: tuple[int, int],
    m: tuple[int, int],
    n: tuple[int, int],
    keys: Tensor | None = None,
    copies: Copies | None = None,
) -> Block:
    """Cells of a call, for expressions in fp32 (fp64 where q is); `keys` and `copies` as in `Block`."""
    leaves = {leaf.name: x for leaf, x in zip(inputs.spec.leaves, inputs.leaves, strict=True)}
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    return Block(
        leaves, named_sizes(inputs.shape, inputs.sizes), (b, h, m, n), inputs.q.device, dtype, keys, copies=copies
    )


def cover(inputs: Inputs) -> list[Run]:
    """The runs of a call, in order of batches; its sizes are at least 1."""
    mask = mask_of(inputs.text)
    shape = inputs.shape
    intervals = _intervals(mask, inputs) if mask.padding or mask.starts or mask.ends else [(0, shape.N, False)]
    if mask.by_batch and len(intervals) < shape.B:
        intervals = intervals * shape.B
    out = []
    for b0, b1 in _equal(intervals, shape.B, alone=mask.by_batch):
        lo, hi, holes = intervals[b0]
        if mask.from_indices and not mask.rows_by_batch:
            segments, rows = index_rows(inputs.text, shape, inputs.sizes, lo, hi)
        else:
            block = block_of(inputs, (b0, b1), (0, shape.H), (0, shape.M), (0, shape.N))
            segments, rows = _rows(mask, block, shape, lo, hi)
        if holes and not rows.asked:
            rows = replace(rows, asked=True, _keys={})
        whole = Run(b0, b1, 0, shape.H, lo, hi, holes, segments, rows)
        if rows.loose and lo < hi and tile_lists.worth_a_map(shape.M, shape.N):
            out += _in_tiles(inputs, whole)
        else:
            out.append(whole)
    return out


def _in_tiles(inputs: Inputs, whole: Run) -> list[Run]:
    """A run with the tile map of its mask, in parts where heads or batches differ."""
    shape = inputs.shape
    if inputs.tiles:
        kinds = classes_of(inputs.tiles[0])
        some = kinds[whole.b0 : whole.b1] if len(kinds) > 1 else kinds
        parts = _parts(some, whole.rows, shape.Hkv)
    elif not tile_lists.reads_leaves(inputs.spec):
        parts = _index_parts(inputs.text, shape, inputs.sizes, whole.lo, whole.hi)
    else:
        cells = ((whole.b0, whole.b1), (0, shape.H), (0, shape.M), (0, shape.N))
        kinds = classes(inputs.text, block_of(inputs, *cells), tile_lists.TILES)
        parts = _parts(kinds, whole.rows, shape.Hkv)
    group = shape.H // shape.Hkv
    out = []
    for (b0, b1), (kv0, kv1), rows in parts:
        batches = (whole.b0, whole.b1) if b1 == 0 else (whole.b0 + b0, whole.b0 + b1)
        heads = (0, shape.H) if kv1 == 0 else (kv0 * group, kv1 * group)
        out.append(whole._replace(b0=batches[0], b1=batches[1], h0=heads[0], h1=heads[1], rows=rows))
    return out


# Batches and KV heads, (0, 0) for all of them, and their keys.
_Parts = tuple[tuple[tuple[int, int], tuple[int, int], Rows], ...]


def _parts(found: Tensor, rows: Rows, kv_heads: int) -> _Parts:
    """The batches and KV heads whose tiles [b, h, row tiles, key tiles] are of the same classes."""
    found = of_kv_heads(found.cpu(), kv_heads)
    return tuple(
        (b, kv, replace(rows, classes=found[b[0], kv[0]], _keys={}))
        for b in _alike(found)
        for kv in _alike(found[b[0]])
    )


def _alike(found: Tensor) -> Iterator[tuple[int, int]]:
    """Neighbours along the first axis with the same values; (0, 0) where it has one element."""
    if len(found) == 1:
        yield 0, 0
        return
    start = 0
    for at in range(1, len(found) + 1):
        if at == len(found) or not torch.equal(found[at], found[start]):
            yield start, at
            start = at


@lru_cache(maxsize=64)
def _index_parts(text: str, shape: Shape, sizes: tuple[int, ...], lo: int, hi: int) -> _Parts:
    """The parts of a run where indices and sizes decide the mask."""
    _, rows = index_rows(text, shape, sizes, lo, hi)
    cells = ((0, 1), (0, shape.H), (0, shape.M), (0, shape.N))
    block = Block({}, named_sizes(shape, sizes), cells, torch.device("cpu"), torch.float32)
    return _parts(classes(text, block, tile_lists.TILES), rows, shape.Hkv)


def _equal(intervals: list[tuple[int, int, bool]], batches: int, *, alone: bool) -> Iterator[tuple[int, int]]:
    """Consecutive batches with the same interval."""
    if len(intervals) == 1:
        yield 0, batches
        return
    start = 0
    for b in range(1, batches + 1):
        if b == batches or alone or intervals[b] != intervals[start]:
            yield start, b
            start = b


def _intervals(mask: Mask, inputs: Inputs) -> list[tuple[int, int, bool]]:
    """For each batch, or once for all, the interval of keys outside of which nothing is allowed, and whether it has holes."""
    B, N = inputs.shape.B, inputs.shape.N
    out = [(0, N, False)]
    if mask.padding:
        block = block_of(inputs, (0, B), (0, 1), (0, 1), (0, N))
        allowed = None
        for value in mask.padding_of(block):
            value = value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), bool(value))
            allowed = value if allowed is None else allowed & value
        assert allowed is not None
        out = _true_runs(allowed[:, 0, 0].expand(-1, N))
    if mask.starts or mask.ends:
        values = mask.interval_of(block_of(inputs, (0, B), (0, 1), (0, 1), (0, 1)))
        columns = [x.reshape(-1).tolist() if isinstance(x, Tensor) else [int(x)] for x in values]
        batches = max(len(out), *map(len, columns))
        out *= batches // len(out)
        columns = [column * (batches // len(column)) for column in columns]
        for b in range(batches):
            lo = max((column[b] for column in columns[: len(mask.starts)]), default=0)
            hi = min((column[b] for column in columns[len(mask.starts) :]), default=N)
            lo, hi = max(lo, out[b][0]), min(hi, out[b][1])
            out[b] = (lo, hi, out[b][2]) if lo < hi else (0, 0, False)
    return out


def _true_runs(allowed: Tensor) -> list[tuple[int, int, bool]]:
    """First and last true element of each row, and whether there are false ones between."""
    out = []
    if allowed.numel() <= _SMALL:
        for row in allowed.tolist():
            count = sum(row)
            first, last = (row.index(True), len(row) - row[::-1].index(True)) if count else (0, 0)
            out.append((first, last, count < last - first))
        return out
    small = allowed.to(torch.uint8)
    firsts, lasts, counts = torch.stack((small.argmax(1), small.flip(1).argmax(1), small.sum(1))).tolist()
    for first, after, count in zip(firsts, lasts, counts, strict=True):
        last = allowed.shape[1] - after
        out.append((first, last, count < last - first) if count else (0, 0, False))
    return out


@lru_cache(maxsize=256)
def index_rows(text: str, shape: Shape, sizes: tuple[int, ...], lo: int, hi: int) -> tuple[tuple[Segment, ...], Rows]:
    """All rows, and their bounds, where indices and sizes decide them within keys [lo, hi)."""
    cells = ((0, 1), (0, shape.H), (0, shape.M), (0, shape.N))
    block = Block({}, named_sizes(shape, sizes), cells, torch.device("cpu"), torch.float32)
    return _rows(mask_of(text), block, shape, lo, hi)


def _rows(mask: Mask, block: Block, shape: Shape, lo: int, hi: int) -> tuple[tuple[Segment, ...], Rows]:
    b, h, m, n = block.ranges
    beside = block.part((b, h, m, (0, 1)))
    bounds_of_rows = [_by_row(value, shape.M) for value in mask.rows_of(beside)]
    lower, upper = bounds_of_rows[: len(mask.rows.lower)], bounds_of_rows[len(mask.rows.lower) :]
    left = len(mask.residual)
    sides = mask.equal_of[0](beside), mask.equal_of[1](block.part((b, h, (0, 1), n)))
    for of_row, of_key in zip(*sides, strict=True):
        ends = _run_of_keys(_by_row(of_row, shape.M), _by_row(of_key, shape.N))
        if ends is not None:
            lower, upper, left = [*lower, ends[0]], [*upper, ends[1]], left - 1
    first, last = torch.full((2, shape.M), lo), torch.full((2, shape.M), hi)
    for x in lower:
        first = torch.maximum(first, torch.stack(x.aminmax(dim=1)))
    for x in upper:
        last = torch.minimum(last, torch.stack(x.aminmax(dim=1)))
    loose = left > 0 or any(x.shape[1] > 1 for x in (*lower, *upper))
    rows = Rows(first, last, lo, hi, loose=loose, asked=left > 0)
    if lo >= hi:
        return (Segment(0, shape.M, 0, 0, 0, 0),), rows
    general = (Segment(0, shape.M, lo, hi, 0, 0, exact=False),)
    if loose:
        return general, rows
    return segments_of(first[0].clamp(max=hi), last[0].clamp(min=lo)) or general, rows


def _by_row(value: Value, length: int) -> Tensor:
    """Values for each row, or key, and what else they depend on: int64 [rows, others], on the CPU."""
    x = value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), int(value))
    x = x.flatten(2)
    return x.expand(-1, -1, length).permute(2, 0, 1).flatten(1).cpu()


def _run_of_keys(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """For each row the run of keys [rows, 1] that have its value, 0 to 0 if none has; None where a value has several runs."""
    if rows.shape[1] > 1 or keys.shape[1] > 1:
        return None
    rows, keys = rows[:, 0].contiguous(), keys[:, 0]
    values, counts = torch.unique_consecutive(keys, return_counts=True)
    ordered, order = values.sort()
    if bool((ordered[1:] == ordered[:-1]).any()):
        return None
    ends = counts.cumsum(0)
    at = torch.searchsorted(ordered, rows).clamp_(max=len(ordered) - 1)
    found = ordered[at] == rows
    run = order[at]
    return (ends - counts)[run].where(found, 0)[:, None], ends[run].where(found, 0)[:, None]


def segments_of(first: Tensor, last: Tensor) -> tuple[Segment, ...] | None:
    """Rows with their key ranges as segments, or None where that is too many to be worth it."""
    M = len(first)
    empty = first >= last
    first, last = first.masked_fill(empty, 0), last.masked_fill(empty, 0)
    down, right = first.diff(), last.diff()
    irregular = (down < 0) | (down > 1) | (right < 0) | (right > 1) | (empty[1:] != empty[:-1])
    steps, counts = torch.unique_consecutive(torch.where(irregular, -1, 2 * down + right), return_counts=True)
    most = max(_SEGMENTS, M // _ROWS_A_SEGMENT)
    if len(steps) > 2 * most:
        return None
    parts: list[tuple[int, int, int]] = []
    m0 = end = 0
    for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
        # the steps from row `end - count` on to row `end` are alike
        end += count
        if step < 0:
            parts += [(m, m + 1, 0) for m in range(m0, end)]
            m0 = end
        elif m0 < end:
            parts.append((m0, end + 1, step))
            m0 = end + 1
    if m0 < M:
        parts.append((m0, M, 0))
    if len(parts) > most:
        return None
    firsts, lasts = first.tolist(), last.tolist()
    return tuple(Segment(m0, m1, firsts[m0], lasts[m0], step >> 1, step & 1) for m0, m1, step in parts)
