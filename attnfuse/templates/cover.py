"""Which cells of a call have to be computed: batches, row segments and their key ranges, from the mask and the real data.

Conditions on (b, n) alone (padding, lengths) become an interval of keys for each batch where their true cells are one run;
the bounds of `tiles` then give each row a range of keys; rows whose ranges follow one another alike are one `Segment`.  What
indices and sizes decide is computed once and kept; what leaves decide is looked at in every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import Expr, Var, call, loads
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates.base import Inputs
from attnfuse.templates.evaluate import Block, Evaluator, varies
from attnfuse.tiles import Bounds, RowRange, bounds, row_range

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
        exact: False where ranges have another form: `Rows.range` bounds them, the mask has the last word, rows may be empty.
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
    """The bounds that depend on the row: the least and the greatest value of each in each row, [2, M]."""

    known: Bounds
    extents: dict[Expr, Tensor]
    lo: int
    hi: int
    _ranges: dict[tuple[int, int], RowRange] = field(default_factory=dict)

    def range(self, m0: int, m1: int) -> RowRange:
        """The keys that rows [m0, m1) look at."""
        found = self._ranges.get((m0, m1))
        if found is None:
            found = self._ranges[m0, m1] = self._clipped(row_range(self.known, (m0, m1), self.hi, self._extent))
        return found

    def _extent(self, expr: Expr, rows: tuple[int, int]) -> tuple[int, int]:
        least, greatest = self.extents[expr][:, rows[0] : rows[1]]
        return int(least.min()), int(greatest.max())

    def _clipped(self, found: RowRange) -> RowRange:
        if found.last <= self.lo:
            return RowRange(0, 0, 0, 0)
        return RowRange(*(max(x, self.lo) for x in found))


class Run(NamedTuple):
    """Batches [b0, b1) with one cover.

    Args:
        lo, hi: keys outside are allowed in no row.
        holes: whether the conditions on (b, n) still have to be asked inside.
        segments: all rows, in order.
    """

    b0: int
    b1: int
    lo: int
    hi: int
    holes: bool
    segments: tuple[Segment, ...]
    rows: Rows


def columns_of(allowed: Tensor) -> tuple[int, int]:
    """The columns between the first and the last that have an allowed cell; (0, 0) if none has."""
    first, last, _ = _true_runs(allowed.flatten(0, 2).any(0)[None])[0]
    return first, last


class Mask:
    """The conditions of one spec, sorted by what they depend on."""

    def __init__(self, spec: AttentionSpec) -> None:
        known = bounds(spec)
        self.padding = tuple(e for e in known.residual if varies(e) <= {"b", "n"})
        self.residual = tuple(e for e in known.residual if e not in self.padding)
        sides = [[e for e in side if varies(e) <= {"b"}] for side in (known.lower, known.upper)]
        self.starts, self.ends = map(tuple, sides)
        self.rows = Bounds(*(tuple(e for e in s if not varies(e) <= {"b"}) for s in (known.lower, known.upper)))
        moving = (*self.rows.lower, *self.rows.upper)
        self.by_batch = any("b" in varies(e) for e in (*moving, *self.residual))
        self.rows_by_batch = any("b" in varies(e) for e in moving)
        self.from_indices = not any(loads(e) for e in moving)
        asked = (*moving, *self.residual)
        self.from_sizes = not any(loads(e) or "b" in varies(e) for e in asked)
        self.padding_of = Evaluator(spec, self.padding)
        self.interval_of = Evaluator(spec, [*self.starts, *self.ends])
        self.rows_of = Evaluator(spec, moving)
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


@lru_cache(maxsize=1024)
def named_sizes(shape: Shape, sizes: tuple[int, ...]) -> dict[str, int]:
    """Sizes by their names in the score language."""
    named = {"B": shape.B, "H": shape.H, "Hkv": shape.Hkv, "M": shape.M, "N": shape.N}
    return named | {f"i{at}": size for at, size in enumerate(sizes)}


def block_of(inputs: Inputs, b: tuple[int, int], h: tuple[int, int], m: tuple[int, int], n: tuple[int, int]) -> Block:
    """Cells of a call, for expressions in fp32 (fp64 where q is)."""
    leaves = {leaf.name: x for leaf, x in zip(inputs.spec.leaves, inputs.leaves, strict=True)}
    dtype = torch.promote_types(inputs.q.dtype, torch.float32)
    return Block(leaves, named_sizes(inputs.shape, inputs.sizes), (b, h, m, n), inputs.q.device, dtype)


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
            block = block_of(inputs, (b0, b1), (0, shape.H), (0, shape.M), (0, 1))
            segments, rows = _rows(mask, block, shape, lo, hi)
        out.append(Run(b0, b1, lo, hi, holes, segments, rows))
    return out


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
    ranges = ((0, 1), (0, shape.H), (0, shape.M), (0, 1))
    block = Block({}, named_sizes(shape, sizes), ranges, torch.device("cpu"), torch.float32)
    return _rows(mask_of(text), block, shape, lo, hi)


def _rows(mask: Mask, block: Block, shape: Shape, lo: int, hi: int) -> tuple[tuple[Segment, ...], Rows]:
    extents = {}
    exact = not mask.residual
    for expr, value in zip((*mask.rows.lower, *mask.rows.upper), mask.rows_of(block), strict=True):
        x = value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), int(value))
        x = x.expand(-1, -1, shape.M, -1).transpose(0, 2).flatten(1)
        exact = exact and x.shape[1] == 1
        extents[expr] = torch.stack((x.amin(1), x.amax(1))).cpu()
    rows = Rows(mask.rows, extents, lo, hi)
    general = (Segment(0, shape.M, lo, hi, 0, 0, exact=False),)
    if lo >= hi:
        return (Segment(0, shape.M, 0, 0, 0, 0),), rows
    if not exact:
        return general, rows
    first = torch.full((shape.M,), lo)
    last = torch.full((shape.M,), hi)
    for expr in mask.rows.lower:
        first = torch.maximum(first, extents[expr][0])
    for expr in mask.rows.upper:
        last = torch.minimum(last, extents[expr][0])
    return _segments(first.clamp_(max=hi), last.clamp_(min=lo)) or general, rows


def _segments(first: Tensor, last: Tensor) -> tuple[Segment, ...] | None:
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
