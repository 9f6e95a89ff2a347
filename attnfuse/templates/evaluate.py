"""Score expressions on a block of cells, as torch values.

`evaluator(text, …)` compiles expressions of a spec once to a short list of steps, shared subexpressions once; `Block` is what
they run on: the index vectors of some batches, heads, rows and keys.  A value is a Python number or a tensor that broadcasts
to [b, h, m, n] of the block; floating-point leaves are converted to the accumulator's type when they are read.

Indices of loads are clamped to the leaf: a load outside it, which only a cell that some guard excludes may hold, reads
something of no meaning, never foreign memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from attnfuse.score import BOOLEANS, ROUNDINGS, Call, Const, Expr, Load, Var, free_vars
from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import diagonals, tables

Value = Tensor | float  # float stands for int and bool too, as in typing's numeric tower

_DIMS: Final = {"b": 0, "h": 1, "m": 2, "n": 3}


Ranges = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]
Copies = dict[str | tuple[str, int], Tensor]


class Block:
    """The cells [b0, b1) × [h0, h1) × [m0, m1) × [n0, n1) of one call.

    Args:
        keys: where not all keys of [n0, n1) are meant, or in another order, those that are, int64.
        rows: the same of [m0, m1).
        copies: where leaves are kept that are read along diagonals (`diagonals.repeated`), by their names, or as tables
            (`tables.laid_out`), by name and place of the index, for all blocks of the call.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        ranges: Ranges,
        device: torch.device,
        dtype: torch.dtype,
        keys: Tensor | None = None,
        rows: Tensor | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.leaves = leaves
        self.sizes = sizes
        self.ranges = ranges
        self.device = device
        self.dtype = dtype
        self.keys = keys
        self.copies = copies
        self.rows = rows
        self._indices: list[Tensor | None] = [None] * 4
        for dim, chosen in ((2, rows), (3, keys)):
            if chosen is not None:
                self._indices[dim] = chosen.view([-1 if at == dim else 1 for at in range(4)])

    def part(self, ranges: Ranges) -> Block:
        """Other cells of the same call."""
        return Block(self.leaves, self.sizes, ranges, self.device, self.dtype, copies=self.copies)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """How many batches, heads, rows and keys."""
        b, h, m, n = (last - first for first, last in self.ranges)
        return b, h, m if self.rows is None else len(self.rows), n if self.keys is None else len(self.keys)

    def chosen(self, dim: int) -> Tensor | None:
        """`rows` or `keys` as the axis they belong to."""
        return self.rows if dim == 2 else self.keys if dim == 3 else None

    def index(self, dim: int) -> Tensor:
        """The index vector of one axis, int64, shaped to broadcast."""
        found = self._indices[dim]
        if found is None:
            shape = [1, 1, 1, 1]
            shape[dim] = -1
            found = self._indices[dim] = torch.arange(*self.ranges[dim], device=self.device).view(shape)
        return found


@dataclass(frozen=True, slots=True)
class _Step:
    """`registers[out] = run(block, *registers[args])`, or, in the memory of the first of `args`, `in_place(*registers[args])`."""

    run: Callable[..., Value]
    args: tuple[int, ...]
    out: int
    in_place: Callable[..., Tensor] | None = None


class Evaluator:
    """Some expressions of one spec, compiled together; a `pure` one never writes into the memory of `s`."""

    def __init__(self, spec: AttentionSpec, exprs: Sequence[Expr], *, pure: bool = False) -> None:
        self._spec = spec
        self._steps: list[_Step] = []
        self._registers: dict[Expr, int] = {}
        self._fresh: set[int] = set()
        self._s = -1
        self._outputs = [self._compile(e) for e in exprs]
        if not pure:
            self._reuse_memory()

    def __call__(self, block: Block, s: Tensor | None = None) -> list[Value]:
        """The values of the expressions, in order; one of them may be `s`, and the memory of `s` may be overwritten."""
        registers: list[Value] = [0.0] * len(self._registers)
        if self._s >= 0:
            assert s is not None
            registers[self._s] = s
        for step in self._steps:
            args = [registers[a] for a in step.args]
            first = args[0] if step.in_place is not None else None
            if isinstance(first, Tensor) and s is not None and first.shape == s.shape and first.dtype == block.dtype:
                assert step.in_place is not None
                registers[step.out] = step.in_place(*args)
            else:
                registers[step.out] = step.run(block, *args)
        return [registers[out] for out in self._outputs]

    def _reuse_memory(self) -> None:
        """Lets a step write into its first operand where nothing needs that any more."""
        last_use = {register: at for at, step in enumerate(self._steps) for register in step.args}
        ops = {register: expr for expr, register in self._registers.items()}
        for at, step in enumerate(self._steps):
            expr = ops[step.out]
            if not isinstance(expr, Call) or expr.op not in _IN_PLACE or self._spec.type_of(expr) != "float":
                continue
            args = step.args
            orders = [args, args[::-1]] if expr.op in ("add", "mul") else [args]
            for first, *others in orders:
                free = first in self._fresh and first not in self._outputs and first not in others
                if free and last_use[first] == at:
                    self._steps[at] = _Step(step.run, (first, *others), step.out, _IN_PLACE[expr.op])
                    break

    def _compile(self, expr: Expr) -> int:
        if expr in self._registers:
            return self._registers[expr]
        args: tuple[int, ...] = ()
        run: Callable[..., Value] | None
        if isinstance(expr, Const):
            value = expr.value
            run = lambda block: value  # noqa: E731
        elif isinstance(expr, Var):
            run = None if expr.name == "s" else _variable(expr.name)
        elif isinstance(expr, Load):
            kind = self._spec.leaf(expr.leaf).kind
            sliced, along = axes_of(expr), diagonals.along(expr)
            if along is not None and kind == "float":
                args = tuple(self._compile(i) for i in (along.offset, *expr.indices[:-1]))
                run = _diagonal(expr.leaf, along.lead)
            elif sliced is None:
                args = tuple(self._compile(i) for i in expr.indices)
                how = tables.lookup(expr) if kind == "float" else None
                run = _gather(expr.leaf, kind) if how is None else _lookup(expr.leaf, how)
            else:
                run = _slice(expr.leaf, sliced, kind)
        else:
            args = tuple([self._compile(a) for a in expr.args])
            types = [self._spec.type_of(a) for a in expr.args]
            run = _operation(expr.op, types, self._spec.type_of(expr))
        out = self._registers[expr] = len(self._registers)
        if run is None:
            self._s = out
        else:
            self._steps.append(_Step(run, args, out))
        if run is None or (isinstance(expr, Call) and expr.op in _NEW):
            self._fresh.add(out)
        return out


def _variable(name: str) -> Callable[[Block], Value]:
    if name in _DIMS:
        dim = _DIMS[name]
        return lambda block: block.index(dim)
    return lambda block: block.sizes[name]


def axes_of(load: Load) -> tuple[int, ...] | None:
    """The axis that each index of a load runs along, or None where its indices are not distinct index variables."""
    names = [i.name for i in load.indices if isinstance(i, Var) and i.name in _DIMS]
    if len(names) < len(load.indices) or len(set(names)) < len(names):
        return None
    return tuple(_DIMS[name] for name in names)


def _slice(leaf: str, dims: tuple[int, ...], kind: str) -> Callable[[Block], Value]:
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    in_order = order == list(range(len(dims)))
    placed = tuple(slice(None) if dim in dims else None for dim in range(4))

    def run(block: Block) -> Value:
        x = block.leaves[leaf]
        for at, dim in enumerate(dims):
            first, last = block.ranges[dim]
            if last > x.shape[at]:
                return _read(block, leaf, kind, *(block.index(dim) for dim in dims))
            chosen = block.chosen(dim)
            if chosen is not None:
                x = x.index_select(at, chosen)
            elif last - first < x.shape[at]:
                x = x.narrow(at, first, last - first)
        x = x if in_order else x.permute(order)
        return _element(x[placed], block, kind)

    return run


def _diagonal(leaf: str, lead: tuple[int, ...]) -> Callable[..., Value]:
    placed = tuple(slice(None) if dim in lead or dim > 1 else None for dim in range(4))

    def run(block: Block, offset: Value, *indices: Value) -> Value:
        assert not isinstance(offset, Tensor)
        found = None
        if block.copies is not None:
            if leaf not in block.copies:
                block.copies[leaf] = diagonals.repeated(block.leaves[leaf], block.sizes["M"], block.dtype)
            found = diagonals.view(block.copies[leaf], lead, block.ranges, int(offset))
        if found is None:
            return _read(block, leaf, "float", *indices, block.index(3) - block.index(2) + offset)
        if block.keys is not None:
            found = found.index_select(-1, block.keys - block.ranges[3][0])
        return (found.transpose(0, 1) if lead == (1, 0) else found)[placed]

    return run


def _lookup(leaf: str, how: tables.Lookup) -> Callable[..., Value]:
    def run(block: Block, *indices: Value) -> Value:
        copies = {} if block.copies is None else block.copies
        table = copies.get((leaf, how.place))
        if table is None:
            table = copies[leaf, how.place] = tables.laid_out(block.leaves[leaf], how, block.dtype)
        entry = indices[how.place]
        found = tables.read(table, how, entry, block.ranges) if isinstance(entry, Tensor) else None
        return _read(block, leaf, "float", *indices) if found is None else found

    return run


def _gather(leaf: str, kind: str) -> Callable[..., Value]:
    return lambda block, *indices: _read(block, leaf, kind, *indices)


def _element(x: Tensor, block: Block, kind: str) -> Tensor:
    return x if kind == "bool" else x.to(block.dtype if kind == "float" else torch.int64)


def clamped(x: Tensor, indices: Sequence[Value]) -> tuple[Tensor, ...]:
    """Indices as int64 tensors inside `x`."""
    return tuple(
        (i.long() if isinstance(i, Tensor) else _scalar(int(i), torch.int64, x.device)).clamp(0, max(size - 1, 0))
        for i, size in zip(indices, x.shape, strict=True)
    )


def _read(block: Block, leaf: str, kind: str, *indices: Value) -> Value:
    x = block.leaves[leaf]
    if 0 in x.shape:
        x = torch.zeros((), dtype=x.dtype, device=x.device)
    elif indices:
        x = x[clamped(x, indices)]
    return _element(x, block, kind)


def _floating(x: Value, dtype: torch.dtype) -> Value:
    return x.to(dtype) if isinstance(x, Tensor) else float(x)


def _tensor(x: Value, block: Block) -> Tensor:
    return x if isinstance(x, Tensor) else _scalar(x, block.dtype, block.device)


def _scalar(x: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # torch.tensor would be a constant of the graph where the evaluation is traced, and an index without dimensions a number
    return torch.full((1, 1, 1, 1), x, dtype=dtype, device=device)


def _operation(op: str, types: Sequence[str], result: str) -> Callable[..., Value]:
    if op in _UNARY:
        unary = _UNARY[op]
        return lambda block, x: unary(_tensor(_floating(x, block.dtype), block))
    if op == "float":
        return lambda block, x: _floating(x, block.dtype)
    if op == "where":
        return _where(result == "float")
    if op in ("and", "or", "not") or (op in ("eq", "ne") and types[0] == "bool"):
        return _LOGIC[op]
    mixed = "float" in types if op in BOOLEANS else result == "float"
    if op in ("min", "max"):
        return _extremum(op, mixed)
    function = _ARITHMETIC[op]
    if not mixed:
        return lambda block, *args: function(*args)
    if op in ("div", "pow"):
        # numbers alone would raise where tensors give inf or nan
        return lambda block, a, b: function(
            _floating(a, block.dtype) if isinstance(a, Tensor) or isinstance(b, Tensor) else _tensor(float(a), block),
            _floating(b, block.dtype),
        )
    return lambda block, *args: function(*(_floating(a, block.dtype) for a in args))


def _where(floating: bool) -> Callable[..., Value]:
    def run(block: Block, condition: Value, a: Value, b: Value) -> Value:
        if not isinstance(condition, Tensor):
            chosen = a if condition else b
            return _floating(chosen, block.dtype) if floating else chosen
        if floating:
            a, b = _floating(a, block.dtype), _floating(b, block.dtype)
            if not isinstance(a, Tensor) and not isinstance(b, Tensor):
                a = _tensor(a, block)
        return torch.where(condition, a, b)

    return run


def _extremum(op: str, floating: bool) -> Callable[..., Value]:
    function = torch.minimum if op == "min" else torch.maximum
    numbers: Callable[..., float] = min if op == "min" else max

    def run(block: Block, a: Value, b: Value) -> Value:
        if floating:
            a, b = _floating(a, block.dtype), _floating(b, block.dtype)
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return numbers(a, b)
        known = a if isinstance(a, Tensor) else b
        assert isinstance(known, Tensor)
        a, b = (x if isinstance(x, Tensor) else _scalar(x, known.dtype, known.device) for x in (a, b))
        return function(a, b)

    return run


def _beyond(limit: float) -> Callable[[Tensor], Tensor]:
    def rounded(x: Tensor) -> Tensor:
        # the derivative is 1 where the result is infinite too
        return x + torch.where(x.abs() >= limit, x * torch.inf, 0.0).detach()

    return rounded


_UNARY: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    **{name: _beyond(limit) for name, limit in ROUNDINGS.items()},
}
_LOGIC: Final[Mapping[str, Callable[..., Value]]] = {
    "and": lambda block, a, b: a & b,
    "or": lambda block, a, b: a | b,
    "not": lambda block, a: ~a if isinstance(a, Tensor) else not a,
    "eq": lambda block, a, b: a == b,
    "ne": lambda block, a, b: a != b,
}
_ARITHMETIC: Final[Mapping[str, Callable[..., Value]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": lambda a, b: _integer_division(operator.floordiv, a, b),
    "mod": lambda a, b: _integer_division(operator.mod, a, b),
    "neg": operator.neg,
    "abs": abs,
    "pow": operator.pow,
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
}


_IN_PLACE: Final[Mapping[str, Callable[..., Tensor]]] = {
    "add": Tensor.add_,
    "sub": Tensor.sub_,
    "mul": Tensor.mul_,
    "div": Tensor.div_,
    "neg": Tensor.neg_,
    "tanh": Tensor.tanh_,
    "exp": Tensor.exp_,
    "log": Tensor.log_,
    "sqrt": Tensor.sqrt_,
    "rsqrt": Tensor.rsqrt_,
    "sigmoid": Tensor.sigmoid_,
}
# Operations whose result, if it is a tensor, is never one of their operands or a view of one.
_NEW: Final = (*_IN_PLACE, "pow", "abs", "min", "max")


def _integer_division(function: Callable[..., Value], a: Value, b: Value) -> Value:
    """Division by zero, which only a cell that some guard excludes may hold, gives something of no meaning."""
    if isinstance(b, Tensor):
        return function(a, b.masked_fill(b == 0, 1))
    return function(a, b or 1)


def varies(expr: Expr) -> frozenset[str]:
    """The index variables that `expr` depends on."""
    return free_vars(expr) & frozenset(_DIMS)


@lru_cache(maxsize=1024)
def named_sizes(shape: Shape, sizes: tuple[int, ...]) -> dict[str, int]:
    """Sizes by their names in the score language."""
    named = {"B": shape.B, "H": shape.H, "Hkv": shape.Hkv, "M": shape.M, "N": shape.N}
    return named | {f"i{at}": size for at, size in enumerate(sizes)}
