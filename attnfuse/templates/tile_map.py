"""Which tiles of a call hold an allowed cell: its mask on a grid of tiles, by interval arithmetic on tensors.

What depends on rows alone, or on keys alone, is computed cell by cell and reduced to its least and greatest value in each
tile; what depends on both is bounded from these, and loads by the least and greatest element that they may read.  EMPTY and
FULL are proven so; what is not decided is PARTIAL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import product
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import COMPARISONS, Call, Expr, Linear, Load, Program, S, Var, call, linear, loads
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates.base import Tiles
from attnfuse.templates.evaluate import Block, Evaluator, Ranges, Value, named_sizes, varies

EMPTY: Final = 0
PARTIAL: Final = 1
FULL: Final = 2

# Elements of a leaf, and tiles, that are looked at at once.
_CELLS: Final = 1 << 22
_TILES: Final = 1 << 18
# A load of several indices is bounded by reading every element that it may read, up to this many.
_MOST_READS: Final = 16
# Integers up to here, their sums and their quotients are exact in fp64; beyond nothing is claimed.
_EXACT: Final = 2.0**52


class Bound(NamedTuple):
    """Least and greatest value in each tile, fp64, broadcast to [b, h, row tiles, key tiles]; NaN where it is not known.

    Truth values are 0 and 1, and always known to lie between.
    """

    low: Tensor
    high: Tensor


class _Grid(NamedTuple):
    """Tiles of a call: all batches and heads, some rows, all keys.

    Args:
        block: their cells.
        tiles: rows and keys of one tile.
    """

    block: Block
    tiles: Tiles

    @property
    def rows(self) -> Block:
        """The rows of the grid, beside its first key."""
        b, h, m, n = self.block.ranges
        return self.block.part((b, h, m, (n[0], n[0] + 1)))

    @property
    def keys(self) -> Block:
        """The keys of the grid, beside its first row."""
        b, h, m, n = self.block.ranges
        return self.block.part((b, h, (m[0], m[0] + 1), n))

    def constant(self, low: float, high: float) -> Bound:
        """The same bound in every tile."""
        return Bound(*(torch.full((1, 1, 1, 1), x, dtype=torch.float64, device=self.block.device) for x in (low, high)))

    def unknown(self, kind: str) -> Bound:
        """What is known of any value of a type."""
        return self.constant(0.0, 1.0) if kind == "bool" else self.constant(torch.nan, torch.nan)


@dataclass(frozen=True, slots=True)
class _Step:
    """`registers[out] = run(grid, *registers[args])`."""

    run: Callable[..., Bound]
    args: tuple[int, ...]
    out: int


# Terms with their factors.
_Sum = tuple[tuple[Expr, int], ...]


class _Side:
    """What depends on rows alone, or on keys alone: sums of terms, computed cell by cell before they are bounded."""

    def __init__(self) -> None:
        self.sums: list[_Sum] = []
        self._terms: dict[Expr, int] = {}

    def finish(self, spec: AttentionSpec) -> None:
        """Compiles the terms."""
        for terms in self.sums:
            for term, _ in terms:
                self._terms.setdefault(term, len(self._terms))
        self._values = Evaluator(spec, list(self._terms))

    def bounds(self, block: Block, along: tuple[int, int]) -> list[Bound]:
        """The bounds of the sums in tiles of some width along an axis of the block."""
        values = self._values(block)
        out = []
        for terms in self.sums:
            found = [(values[self._terms[term]], factor) for term, factor in terms]
            if len(found) == 1 and found[0][1] == 1:
                out.append(_reduced(found[0][0], block, along))
                continue
            # in fp64, where a sum of integers does not wrap around
            total = torch.zeros((1, 1, 1, 1), dtype=torch.float64, device=block.device)
            for value, factor in found:
                x = value if isinstance(value, Tensor) else torch.full_like(total, value)
                total = _certain(total + _certain(_exactly(x) * factor))
            out.append(Bound(*_least_and_greatest(total, along)))
        return out


class TileBounds:
    """A truth value of a spec, bounded in every tile."""

    def __init__(self, spec: AttentionSpec, expr: Expr) -> None:
        self._spec = spec
        self._steps: list[_Step] = []
        self._registers: dict[Expr | _Sum, int] = {}
        self._sides = (_Side(), _Side())
        self.reads_cells = False
        self._out = self._compile(expr)
        for side in self._sides:
            side.finish(spec)

    def keys(self, grid: _Grid) -> list[Bound]:
        """What depends on keys alone: the same for all rows."""
        return self._sides[1].bounds(grid.keys, (3, grid.tiles.block_n))

    def __call__(self, grid: _Grid, keys: list[Bound]) -> Bound:
        """The bound on some rows."""
        registers: list[Bound | None] = [None] * len(self._registers)
        rows = self._sides[0].bounds(grid.rows, (2, grid.tiles.block_m))
        for side, found in zip(self._sides, (rows, keys), strict=True):
            for sum_, bound in zip(side.sums, found, strict=True):
                registers[self._registers[sum_]] = bound
        for step in self._steps:
            registers[step.out] = step.run(grid, *(registers[a] for a in step.args))
        out = registers[self._out]
        assert out is not None
        return out

    def _on_side(self, name: str, terms: _Sum) -> int:
        """A sum of terms that depend on rows alone, or on keys alone."""
        if terms not in self._registers:
            self._sides[name == "n"].sums.append(terms)
            self._registers[terms] = len(self._registers)
        return self._registers[terms]

    def _compile(self, expr: Expr) -> int:
        if expr in self._registers:
            return self._registers[expr]
        axes = varies(expr)
        if not {"m", "n"} <= axes:
            return self._on_side("n" if "n" in axes else "m", ((expr, 1),))
        args: tuple[int, ...]
        if isinstance(expr, Load):
            args, run = self._load(expr)
        else:
            assert isinstance(expr, Call)
            args, run = self._call(expr)
        out = self._registers[expr] = len(self._registers)
        self._steps.append(_Step(run, args, out))
        return out

    def _call(self, expr: Call) -> tuple[tuple[int, ...], Callable[..., Bound]]:
        ints = all(self._spec.type_of(a) == "int" for a in expr.args)
        if ints and expr.op in ("add", "sub", "mul", "neg"):
            form = linear(expr, loads_are_int=True)
            if form is not None and expr not in form.terms:
                return self._sum(form)
        if ints and expr.op in COMPARISONS:
            form = linear(Call("sub", expr.args), loads_are_int=True)
            if form is not None:
                args, difference = self._sum(form)
                op = _COMPARE[expr.op]
                return args, lambda grid, *terms: op(difference(grid, *terms), grid.constant(0.0, 0.0))
        args = tuple([self._compile(a) for a in expr.args])
        if expr.op in COMPARISONS:
            compare = _COMPARE[expr.op]
            mixed = len({self._spec.type_of(a) for a in expr.args}) > 1
            return args, lambda grid, a, b: compare(*(map(_in_fp32, (a, b)) if mixed else (a, b)))
        if expr.op == "where":
            return args, lambda grid, *parts: _where(*parts)
        if expr.op in _OPERATIONS and (expr.op in ("and", "or", "not") or ints):
            operation = _OPERATIONS[expr.op]
            return args, lambda grid, *parts: operation(*parts)
        kind = self._spec.type_of(expr)
        return (), lambda grid: grid.unknown(kind)

    def _sum(self, form: Linear) -> tuple[tuple[int, ...], Callable[..., Bound]]:
        """A sum whose terms of rows alone, and of keys alone, are added up before they are bounded."""
        parts: dict[str, _Sum] = {}
        both: list[tuple[Expr, int]] = []
        for atom, factor in form.terms.items():
            axes = varies(atom)
            if {"m", "n"} <= axes:
                both.append((atom, factor))
                continue
            side = "n" if "n" in axes else "m"
            parts[side] = (*parts.get(side, ()), (atom, factor))
        factors = [1] * len(parts) + [factor for _, factor in both]
        args = [self._on_side(*part) for part in parts.items()] + [self._compile(atom) for atom, _ in both]

        def run(grid: _Grid, *terms: Bound) -> Bound:
            out = grid.constant(form.constant, form.constant)
            for term, factor in zip(terms, factors, strict=True):
                out = _added(out, term if factor == 1 else _scaled(term, factor))
            return out

        return tuple(args), run

    def _load(self, load: Load) -> tuple[tuple[int, ...], Callable[..., Bound]]:
        kind = self._spec.leaf(load.leaf).kind
        placed = _placed(load)
        if placed is not None:
            self.reads_cells = True
            axes, offsets = placed
            offset_of = Evaluator(self._spec, offsets)
            return (), lambda grid: _of_cells(grid, load.leaf, kind, axes, [int(x) for x in offset_of(grid.rows)])
        if len(load.indices) > 1 and any(loads(index) for index in load.indices):
            # how many elements it may read is not known without a look at the indices
            return (), lambda grid: grid.unknown(kind)
        args = tuple([self._compile(index) for index in load.indices])
        if len(args) == 1:
            return args, lambda grid, index: _of_range(grid, load.leaf, kind, index)
        return args, lambda grid, *indices: _of_box(grid, load, kind, *indices)


def _placed(load: Load) -> tuple[tuple[int, ...], list[Expr]] | None:
    """The axis that each index runs along and where it starts, for indices that are distinct variables plus a size."""
    axes, offsets = [], []
    for index in load.indices:
        form = linear(index, loads_are_int=True)
        used = varies(index)
        if form is None or len(used) != 1:
            return None
        (name,) = used
        if form.coefficient(Var(name)) != 1 or loads(index):
            return None
        offset = form.without(Var(name))
        if any(varies(atom) for atom in offset.terms):
            return None
        axes.append("bhmn".index(name))
        offsets.append(offset.expr())
    return (tuple(axes), offsets) if len(set(axes)) == len(axes) else None


def _exactly(x: Tensor) -> Tensor:
    """Values in fp64, NaN where that is not certain for an integer."""
    out = x.to(torch.float64)
    return out if x.is_floating_point() or x.dtype.itemsize < 8 else _certain(out)


def _in_fp32(x: Bound) -> Bound:
    """What an integer is compared with a float as, NaN where fp32 may round it."""
    return Bound(*(part.masked_fill((part.abs() > 2.0**24) & part.isfinite(), torch.nan) for part in x))


def _certain(x: Tensor) -> Tensor:
    return x.masked_fill(x.abs() > _EXACT, torch.nan)


def _reduced(x: Value, block: Block, *along: tuple[int, int]) -> Bound:
    """The bound of values in tiles of some width along some axes of [b, h, m, n]."""
    if not isinstance(x, Tensor):
        x = torch.full((1, 1, 1, 1), x, dtype=block.dtype if isinstance(x, float) else torch.int64, device=block.device)
    low, high = _least_and_greatest(x.view(torch.uint8) if x.dtype == torch.bool else x, *along)
    if x.is_floating_point():
        # as the score reads it
        low, high = low.to(block.dtype), high.to(block.dtype)
    return Bound(_exactly(low), _exactly(high))


def _least_and_greatest(x: Tensor, *along: tuple[int, int]) -> tuple[Tensor, Tensor]:
    low = high = x
    for dim, width in along:
        if x.shape[dim] > 1:
            low, high = (_in_tiles(part, dim, width, f) for part, f in ((low, torch.amin), (high, torch.amax)))
    return low, high


def _in_tiles(x: Tensor, dim: int, width: int, function: Callable[..., Tensor]) -> Tensor:
    whole = x.shape[dim] // width * width
    parts = []
    if whole:
        size = (*x.shape[:dim], whole // width, width, *x.shape[dim + 1 :])
        parts.append(function(x.narrow(dim, 0, whole).reshape(size), dim + 1))
    if whole < x.shape[dim]:
        parts.append(function(x.narrow(dim, whole, x.shape[dim] - whole), dim, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _of_cells(grid: _Grid, leaf: str, kind: str, axes: tuple[int, ...], offsets: Sequence[int]) -> Bound:
    """The elements of a leaf with a row and a key of its own for each of the call's."""
    x = grid.block.leaves[leaf]
    for at, (axis, offset) in enumerate(zip(axes, offsets, strict=True)):
        first, last = (end + offset for end in grid.block.ranges[axis])
        if first < 0 or last > x.shape[at]:
            return grid.unknown(kind)
        x = x.narrow(at, first, last - first)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    x = x.permute(order)[tuple(slice(None) if axis in axes else None for axis in range(4))]
    return _reduced(x, grid.block, (3, grid.tiles.block_n), (2, grid.tiles.block_m))


def _elements(grid: _Grid, leaf: str) -> Tensor:
    x = grid.block.leaves[leaf]
    return _exactly(x.to(grid.block.dtype) if x.is_floating_point() else x)


def _indices(size: int, index: Bound) -> tuple[Tensor, Tensor, Tensor]:
    """First and last index inside a leaf, as loads clamp them, and where they are not known."""
    unknown = index.low.isnan() | index.high.isnan()
    low, high = (torch.where(unknown, 0.0, part).clamp(0, size - 1).long() for part in index)
    return low, high, unknown


def _of_range(grid: _Grid, leaf: str, kind: str, index: Bound) -> Bound:
    """The least and greatest element of a vector between two indices, by a table of those of 1, 2, 4, … elements."""
    x = _elements(grid, leaf)
    if x.numel() == 0:
        return grid.unknown(kind)
    first, last, nowhere = _indices(len(x), index)
    level = torch.frexp((last - first + 1).double())[1].long() - 1
    ends = torch.stack((first, last - (1 << level) + 1))
    found = []
    for function in (torch.minimum, torch.maximum):
        rows = [x]
        for at in range(1, len(x).bit_length()):
            step = 1 << (at - 1)
            # what reaches over the end is never asked for
            beyond = rows[-1][-1:].expand(step)
            rows.append(function(rows[-1], torch.cat((rows[-1][step:], beyond))))
        found.append(function(*torch.stack(rows)[level, ends]))
    return _known(Bound(*found), nowhere, grid.unknown(kind))


def _of_box(grid: _Grid, load: Load, kind: str, *indices: Bound) -> Bound:
    """The least and greatest element of a leaf in a small box of indices."""
    x = _elements(grid, load.leaf)
    if x.numel() == 0:
        return grid.unknown(kind)
    spans = [_indices(size, index) for size, index in zip(x.shape, indices, strict=True)]
    b, h, m, n = grid.block.ranges
    # no index reads a leaf, so that sizes alone decide how far it reaches
    sizes = tuple(grid.block.sizes.items())
    widths = [
        _most(index, sizes, (b, h, m, n), grid.tiles, size) for index, size in zip(load.indices, x.shape, strict=True)
    ]
    if math.prod(widths) > _MOST_READS:
        return grid.unknown(kind)
    reads = [
        x[tuple(torch.minimum(first + step, last) for (first, last, _), step in zip(spans, at, strict=True))]
        for at in product(*map(range, widths))
    ]
    nowhere = reduce(torch.logical_or, (unknown for _, _, unknown in spans))
    found = Bound(reduce(torch.minimum, reads), reduce(torch.maximum, reads))
    return _known(found, nowhere, grid.unknown(kind))


@lru_cache(maxsize=1024)
def _most(index: Expr, sizes: tuple[tuple[str, int], ...], ranges: Ranges, tiles: Tiles, elements: int) -> int:
    """How many elements a tile reads along an index that depends on indices and sizes alone, at most."""
    grid = _Grid(Block({}, dict(sizes), ranges, torch.device("cpu"), torch.float32), tiles)
    bounds = TileBounds(AttentionSpec(Program(S)), index)
    first, last, _ = _indices(elements, bounds(grid, bounds.keys(grid)))
    return int((last - first).max()) + 1


def _known(found: Bound, nowhere: Tensor, unknown: Bound) -> Bound:
    """A bound with gaps."""
    return Bound(*(torch.where(nowhere, y, x) for x, y in zip(found, unknown, strict=True)))


def _added(a: Bound, b: Bound) -> Bound:
    return Bound(_certain(a.low + b.low), _certain(a.high + b.high))


def _scaled(x: Bound, factor: float) -> Bound:
    low, high = x if factor > 0 else (x.high, x.low)
    return Bound(_certain(low * factor), _certain(high * factor))


def _truth(yes: Tensor, no: Tensor) -> Bound:
    return Bound(yes.to(torch.float64), (~no).to(torch.float64))


def _inverted(x: Bound) -> Bound:
    return Bound(1 - x.high, 1 - x.low)


# A comparison with NaN is false, and so decides nothing here.
def _less(a: Bound, b: Bound) -> Bound:
    return _truth(a.high < b.low, a.low >= b.high)


def _less_or_equal(a: Bound, b: Bound) -> Bound:
    return _truth(a.high <= b.low, a.low > b.high)


def _equal(a: Bound, b: Bound) -> Bound:
    one_value = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return _truth(one_value, (a.high < b.low) | (a.low > b.high))


_COMPARE: Final[dict[str, Callable[[Bound, Bound], Bound]]] = {
    "lt": _less,
    "le": _less_or_equal,
    "gt": lambda a, b: _less(b, a),
    "ge": lambda a, b: _less_or_equal(b, a),
    "eq": _equal,
    "ne": lambda a, b: _inverted(_equal(a, b)),
}


def _where(condition: Bound, a: Bound, b: Bound) -> Bound:
    either = Bound(torch.minimum(a.low, b.low), torch.maximum(a.high, b.high))
    return Bound(
        *(
            torch.where(condition.low == 1, x, torch.where(condition.high == 0, y, z))
            for x, y, z in zip(a, b, either, strict=True)
        )
    )


def _corners(function: Callable[[Tensor, Tensor], Tensor], a: Bound, b: Bound) -> Bound:
    corners = [function(x, y) for x in a for y in b]
    return Bound(reduce(torch.minimum, corners), reduce(torch.maximum, corners))


def _floordiv(a: Bound, b: Bound) -> Bound:
    return _divided(_corners(lambda x, y: torch.floor(x / y), a, b), b)


def _divided(found: Bound, by: Bound) -> Bound:
    nowhere = ~((by.low > 0) | (by.high < 0))
    return Bound(*(torch.where(nowhere, torch.nan, x) for x in found))


def _mod(a: Bound, b: Bound) -> Bound:
    whole = torch.floor(a.low / b.low)
    # one divisor, and no multiple of it in between: no turn
    straight = (b.low == b.high) & (whole == torch.floor(a.high / b.low))
    zero = torch.zeros_like(b.low)
    above = torch.where(a.low >= 0, torch.minimum(b.high - 1, a.high), b.high - 1)
    low = torch.where(straight, a.low - whole * b.low, torch.where(b.low > 0, zero, b.low + 1))
    high = torch.where(straight, a.high - whole * b.low, torch.where(b.low > 0, above, zero))
    return _divided(Bound(low, high), b)


def _abs(a: Bound) -> Bound:
    across = torch.maximum(a.low, -a.high)
    return Bound(torch.maximum(across, torch.zeros_like(across)), torch.maximum(-a.low, a.high))


_OPERATIONS: Final[dict[str, Callable[..., Bound]]] = {
    "mul": lambda a, b: _corners(lambda x, y: _certain(x * y), a, b),
    "neg": lambda a: Bound(-a.high, -a.low),
    "floordiv": _floordiv,
    "mod": _mod,
    "abs": _abs,
    "min": lambda a, b: Bound(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high)),
    "max": lambda a, b: Bound(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
    "not": _inverted,
    "and": lambda a, b: Bound(a.low * b.low, a.high * b.high),
    "or": lambda a, b: Bound(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high)),
}


@lru_cache(maxsize=1024)
def _mask_bounds(text: str) -> TileBounds:
    spec = parse_spec(text)
    allowed = reduce(lambda a, b: call("and", a, b), (tier.allowed for tier in spec.program.tiers))
    return TileBounds(spec, allowed)


def classes(text: str, block: Block, tiles: Tiles) -> Tensor:
    """EMPTY, PARTIAL or FULL for each tile of a call: uint8 [B or 1, H or 1, row tiles, key tiles].

    FULL: every tier of the spec with that text allows all cells; EMPTY: there is no cell that all tiers allow.

    Args:
        block: all cells of the call; it has rows and keys.
    """
    mask = _mask_bounds(text)
    b, h, (m0, m1), n = block.ranges
    keys = mask.keys(_Grid(block, tiles))
    height = -(-(m1 - m0) // tiles.block_m)
    width = -(-(n[1] - n[0]) // tiles.block_n)
    heads = (b[1] - b[0]) * (h[1] - h[0])
    at_once = _TILES // (heads * width)
    if mask.reads_cells:
        at_once = min(at_once, _CELLS // (heads * tiles.block_m * (n[1] - n[0])))
    step = max(1, at_once) * tiles.block_m
    found = []
    for first in range(m0, m1, step):
        rows = (first, min(first + step, m1))
        low, high = mask(_Grid(block.part((b, h, rows, n)), tiles), keys)
        found.append((low + high).to(torch.uint8).expand(-1, -1, -(-(rows[1] - first) // tiles.block_m), width))
    assert sum(x.shape[2] for x in found) == height
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def classes_of_cells(
    text: str,
    leaves: Mapping[str, Tensor],
    sizes: tuple[int, ...],
    shape: Sequence[int],
    tiles: Tiles,
    device: torch.device | None = None,
) -> Tensor:
    """`classes` of all cells of B, H, Hkv, M, N, for expressions in fp32; on the CPU unless told otherwise."""
    B, H, Hkv, M, N = shape
    named = named_sizes(Shape(B, H, Hkv, M, N, 0, 0), sizes)
    cells = ((0, B), (0, H), (0, M), (0, N))
    return classes(text, Block(leaves, named, cells, device or torch.device("cpu"), torch.float32), tiles)
