"""A spec's meaning as Triton device functions: the ten lines that a kernel calls for each tile.

`functions_for` writes one function for each question that a kernel asks (score, mask, key range, slope, …), as source text
with one statement a subexpression, and compiles the text once.  Kernels take the functions as constexpr arguments, so that
Triton's own cache knows their meaning by their source.

Functions take b, h, m, n (scalars, vectors or tiles that broadcast), the sizes `Z` and the leaves `L`, a flat tuple: for each
leaf its pointer, its strides and its greatest indices.  Values are fp32; integers are 32 bits wide where interval arithmetic
shows that this is enough, else 64.  Indices of loads are clamped to the leaf, so that no load leaves it.
"""

from __future__ import annotations

import linecache
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

from attnfuse.score import (
    BOOLEANS,
    ROUNDINGS,
    SIZES,
    Call,
    Const,
    Expr,
    Load,
    S,
    Var,
    call,
    derivative,
    free_vars,
    loads,
)
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates.affine import affine, constant
from attnfuse.templates.evaluate import named_sizes
from attnfuse.tiles import Bounds, Env, Range, bounds, interval, row_bounds

_INT32: Final = (-(2**31), 2**31 - 1)
_INT64: Final = (-(2**63), 2**63 - 1)
_OF_DTYPE: Final = {"u8": (0, 255), "i8": (-128, 127), "i16": (-(2**15), 2**15 - 1), "i32": _INT32, "i64": _INT64}
_LOG2E: Final = 1.4426950408889634
_FP32_MAX: Final = 3.4028234663852886e38
_FP32_TINY: Final = 2.0**-126
_MOST_POWER: Final = 8


class Unsupported(Exception):
    """What has no device code, as a clause that names it and its limit."""


class LeafForm(NamedTuple):
    """A leaf's number of dimensions, and whether offsets in it take more than 32 bits."""

    rank: int
    wide: bool

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[int]) -> LeafForm:
        """The form of a tensor of that shape and those strides."""
        reach = sum((size - 1) * abs(stride) for size, stride in zip(shape, strides, strict=True))
        return cls(len(shape), reach > _INT32[1])


class Limits(NamedTuple):
    """Ranges of sizes: what the text of a function may depend on, so that one text serves many lengths."""

    B: Range
    H: Range
    Hkv: Range
    M: Range
    N: Range
    more: tuple[Range, ...] = ()

    @classmethod
    def of(cls, shape: Shape, sizes: Sequence[int] = ()) -> Limits:
        """Ranges up to the next power of two."""

        def up(size: int) -> int:
            return 1 << max(0, size - 1).bit_length()

        B, H, Hkv, M, N, *_ = ((1, up(size)) for size in shape)
        return cls(B, H, Hkv, M, N, tuple((0, up(x)) if x >= 0 else (-up(-x), -1) for x in sizes))


@dataclass(frozen=True, slots=True)
class Functions:
    """What kernels ask of a spec; None where the answer is trivial.

    Args:
        scale: what takes the score, or its difference from another, to base 2: log2(e), times c where it is `s*c` with c > 0.
        score: `score(s, b, h, m, n, Z, L)`; None where it is `s*c`.
        slope: its derivative by s, as a number or as a function of the arguments of `score`.
        allowed: `allowed(b, h, m, n, Z, L)`, whether every tier allows a cell.
        residual, row_residual: the part of it that is asked in tiles inside the bounds of `keys`, of `rows`.
        keys: `keys(b, h, m, Z, L)`, first and past-the-end key of each row.
        rows: `rows(b, h, n, Z, L)`, first and past-the-end row of each key.
        minimal: `minimal(b, h, m, n, Z, L)`: keys filled with `min` alone, and those of them whose score gets a gradient.
        sink: `sink(b, h, m, Z, L)`, one score a row.
        by_load: the derivative of the score by each of the loads asked for, with the arguments of `score`.
    """

    scale: float
    score: Any
    slope: Any
    allowed: Any
    residual: Any
    row_residual: Any
    keys: Any
    rows: Any
    minimal: Any
    sink: Any
    by_load: tuple[Any, ...]


_CELL: Final = ("b", "h", "m", "n")


@lru_cache(maxsize=1024)
def functions_for(
    text: str, scale: float | None, limits: Limits, leaves: tuple[LeafForm, ...], by_load: tuple[Load, ...] = ()
) -> Functions:
    """The device functions of the spec with that text.  Raises Unsupported.

    Args:
        scale: what `scale_of` says.
    """
    spec = parse_spec(text)
    program = spec.program
    writer = _Writer(spec, limits, leaves)
    known, across = bounds(spec), row_bounds(spec)
    form = affine(program.body)
    pure = form is not None and form.bias is None and scale is not None and scale > 0
    score = None if pure else writer.function("score", ("s", *_CELL), [program.body], floating=True)
    slope: Any = scale
    if scale is None:
        slope = writer.function("slope", ("s", *_CELL), [derivative(program.body, S)], floating=True)
    return Functions(
        scale=_LOG2E * scale if pure and scale is not None else _LOG2E,
        score=score,
        slope=slope,
        allowed=writer.condition("allowed", [*_edges(known), *known.residual]),
        residual=writer.condition("residual", known.residual),
        row_residual=writer.condition("row_residual", across.residual),
        keys=writer.range("keys", known, "m"),
        rows=writer.range("rows", across, "n"),
        minimal=writer.function("minimal", _CELL, list(_minimal(spec))),
        sink=None if program.sink is None else writer.sink(program.sink),
        by_load=tuple(
            writer.function("slope_of_load", ("s", *_CELL), [derivative(program.body, load)], floating=True)
            for load in by_load
        ),
    )


@lru_cache(maxsize=4096)
def scale_of(text: str, shape: Shape, sizes: tuple[int, ...]) -> float | None:
    """The factor of s in a score that is linear in it, where that is the same everywhere."""
    form = affine(parse_spec(text).program.body)
    return None if form is None else constant(form.scale, named_sizes(shape, sizes))


@lru_cache(maxsize=1024)
def problem(text: str) -> str | None:
    """Why the spec with that text has no device code at any size; None if it has."""
    spec = parse_spec(text)
    shape, sizes = Shape(1, 1, 1, 1, 1, 1, 1), (1,) * spec.size_count()
    forms = tuple(LeafForm(leaf.rank, wide=False) for leaf in spec.leaves)
    try:
        functions_for(text, scale_of(text, shape, sizes), Limits.of(shape, sizes), forms)
    except Unsupported as error:
        return str(error)
    return None


def _edges(known: Bounds) -> list[Expr]:
    n = Var("n")
    return [*(call("ge", n, e) for e in known.lower), *(call("lt", n, e) for e in known.upper)]


def _minimal(spec: AttentionSpec) -> tuple[Expr, Expr, Expr]:
    """Whether a cell's score is fp32's least one, whether it passes a gradient on, and whether the cell is allowed."""
    normal: Expr = Const(True)
    minimal: Expr = Const(False)
    attached: Expr = Const(True)
    for tier in spec.program.tiers:
        allowed, masked = tier.allowed, call("not", tier.allowed)
        if tier.fill == "=min":
            minimal, attached = call("or", minimal, masked), call("and", attached, allowed)
        elif tier.fill == "+min":
            minimal = call("or", call("and", minimal, allowed), call("and", normal, masked))
        else:
            minimal = call("and", minimal, allowed)
        normal = call("and", normal, allowed)
    return minimal, call("and", minimal, attached), normal


class _Writer:
    """Writes and compiles functions of one spec."""

    def __init__(self, spec: AttentionSpec, limits: Limits, leaves: Sequence[LeafForm]) -> None:
        self.spec = spec
        self.sizes = {name: f"Z[{at}]" for at, name in enumerate(SIZES)}
        self.sizes |= {f"i{at}": f"Z[{len(SIZES) + at}]" for at in range(len(limits.more))}
        self.forms = {leaf.name: form for leaf, form in zip(spec.leaves, leaves, strict=True)}
        self.starts: dict[str, int] = {}
        at = 0
        for leaf in spec.leaves:
            self.starts[leaf.name] = at
            at += 1 + 2 * leaf.rank
        env: dict[str | Load, tuple[float, float]] = {name: getattr(limits, name) for name in SIZES}
        env |= {name.lower(): (0, getattr(limits, name)[1] - 1) for name in ("B", "H", "M", "N")}
        env |= {f"i{i}": found for i, found in enumerate(limits.more)}
        for expr in spec.program.expressions():
            for load in loads(expr):
                dtype = spec.leaf(load.leaf).dtype
                if dtype in _OF_DTYPE:
                    env[load] = _OF_DTYPE[dtype]
        self.env: Env = env

    def condition(self, name: str, terms: Sequence[Expr]) -> Any:
        """A function of a cell that says whether every term holds; None if there is no term."""
        out: Expr | None = None
        for term in dict.fromkeys(terms):
            out = term if out is None else call("and", out, term)
        return None if out is None or out == Const(True) else self.function(name, _CELL, [out])

    def range(self, name: str, known: Bounds, at: str) -> Any:
        """First and past-the-end index for each of a vector `at`; None if nothing bounds it."""
        if not known.lower and not known.upper:
            return None
        low: Expr = Const(0)
        for e in known.lower:
            low = e if low == Const(0) else call("max", low, e)
        size = Var("N" if at == "m" else "M")
        high: Expr = size
        for e in known.upper:
            high = e if high == size else call("min", high, e)
        text = _Body(self)
        found = [text.integer(e) for e in (low, high)]
        # one value for each of `at`, also where all are the same
        text.lines.append(f"return {at} * 0 + {found[0]}, {at} * 0 + {found[1]}")
        return _compile(name, ("b", "h", at, "Z", "L"), tuple(text.lines))

    def sink(self, expr: Expr) -> Any:
        """A function of rows that gives one score for each of a vector `m`."""
        text = _Body(self)
        value = text.floating(expr)
        text.lines.append(f"return m * 0.0 + {value}")
        return _compile("sink", ("b", "h", "m", "Z", "L"), tuple(text.lines))

    def function(self, name: str, args: Sequence[str], exprs: Sequence[Expr], *, floating: bool = False) -> Any:
        """A function of those arguments that returns the values of the expressions."""
        text = _Body(self)
        values = [text.tensor(e) if floating else text.value(e) for e in exprs]
        if args[0] == "s":
            # a tile even where the expression does not hold s
            values = [
                v if "s" in free_vars(e) else f"tl.broadcast_to({v}, s.shape)"
                for v, e in zip(values, exprs, strict=True)
            ]
        text.lines.append(f"return {', '.join(values)}")
        return _compile(name, (*args, "Z", "L"), tuple(text.lines))


class _Body:
    """The statements of one function: one for each subexpression, shared ones once."""

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer
        self.spec = writer.spec
        self.lines: list[str] = []
        self.known: dict[tuple[Expr, str], str] = {}

    @staticmethod
    def is_literal(text: str) -> bool:
        """Whether a value is a number in the source."""
        return text[0] in "-0123456789." or text.startswith("float(")

    def _let(self, expr: Expr, kind: str, text: str) -> str:
        name = f"t{len(self.known)}"
        self.known[expr, kind] = name
        self.lines.append(f"{name} = {text}")
        return name

    def value(self, expr: Expr) -> str:
        """The value in its own type: truth value, integer, or float."""
        kind = self.spec.type_of(expr)
        return self.floating(expr) if kind == "float" else self.integer(expr) if kind == "int" else self.truth(expr)

    def floating(self, expr: Expr) -> str:
        """The value as fp32."""
        if isinstance(expr, Const):
            return _literal(float(expr.value))
        if expr == S:
            return "s"
        if (expr, "float") in self.known:
            return self.known[expr, "float"]
        if self.spec.type_of(expr) != "float":
            return self._let(expr, "float", f"tl.cast({self.value(expr)}, tl.float32)")
        if isinstance(expr, Load):
            return self._let(expr, "float", f"tl.cast({self._load(expr)}, tl.float32)")
        assert isinstance(expr, Call)
        return self._let(expr, "float", self._operation(expr))

    def tensor(self, expr: Expr) -> str:
        """The value as fp32, no literal."""
        text = self.floating(expr)
        return f"tl.full([], {text}, tl.float32)" if self.is_literal(text) else text

    def _operation(self, expr: Call) -> str:
        op = expr.op
        if op == "where":
            condition = self.truth(expr.args[0])
            return f"tl.where({condition}, {self.tensor(expr.args[1])}, {self.floating(expr.args[2])})"
        if op == "pow":
            return self._power(expr)
        args = [self.floating(a) for a in expr.args]
        if op in _FUNCTIONS or op in ("float", *ROUNDINGS) or all(map(self.is_literal, args)):
            args[0] = self.tensor(expr.args[0])
        if op == "float":
            return args[0]
        if op in _FUNCTIONS:
            return f"{_FUNCTIONS[op]}({args[0]})"
        if op in ROUNDINGS:
            x = args[0]
            return f"tl.where(tl.abs({x}) >= {_literal(ROUNDINGS[op])}, {x} * float('inf'), {x})"
        if op in ("min", "max"):
            return f"tl.{op}imum({args[0]}, {args[1]}, propagate_nan=tl.PropagateNan.ALL)"
        if op == "neg":
            return f"-{args[0]}"
        if op in _SIGNS:
            return f"{args[0]} {_SIGNS[op]} {args[1]}"
        raise Unsupported(f"{op} has no device code")

    def _power(self, expr: Call) -> str:
        """Products, quotients and square roots: whole and half exponents."""
        base, exponent = expr.args
        power = constant(exponent)
        if power is None or not float(2 * power).is_integer() or abs(power) > _MOST_POWER:
            raise Unsupported(f"{expr}: takes exponents that are constant multiples of 0.5, up to {_MOST_POWER}")
        x, whole = self.tensor(base), int(abs(power))
        factors = [x] * whole
        if abs(power) > whole:
            factors.append(f"tl.sqrt_rn({x})")
        product = " * ".join(factors) or "tl.full([], 1.0, tl.float32)"
        return product if power >= 0 else f"1.0 / ({product})"

    def integer(self, expr: Expr) -> str:
        """The value as an integer that is wide enough."""
        if isinstance(expr, Const):
            if not _INT64[0] <= expr.value <= _INT64[1]:
                raise Unsupported(f"integer {expr.value}: takes integers of 64 bits")
            return repr(int(expr.value))
        if isinstance(expr, Var):
            return self.writer.sizes.get(expr.name, expr.name)
        if (expr, "int") in self.known:
            return self.known[expr, "int"]
        if isinstance(expr, Load):
            dtype = self.spec.leaf(expr.leaf).dtype
            wide = "tl.int64" if dtype == "i64" else "tl.int32"
            return self._let(expr, "int", f"tl.cast({self._load(expr)}, {wide})")
        assert isinstance(expr, Call)
        if expr.op == "where":
            condition = self.truth(expr.args[0])
            return self._let(expr, "int", f"tl.where({condition}, {', '.join(map(self.integer, expr.args[1:]))})")
        args = [self.integer(a) for a in expr.args]
        if not self._fits_32(expr):
            args = [f"tl.cast({a}, tl.int64)" for a in args]
        if expr.op in ("min", "max"):
            return self._let(expr, "int", f"tl.{expr.op}imum({args[0]}, {args[1]})")
        if expr.op in ("neg", "abs"):
            return self._let(expr, "int", f"-{args[0]}" if expr.op == "neg" else f"tl.abs({args[0]})")
        if expr.op in ("floordiv", "mod"):
            (low, _), (divisor, _) = (interval(a, self.writer.env) for a in expr.args)
            if low >= 0 and divisor > 0:
                return self._let(expr, "int", f"{args[0]} {'//' if expr.op == 'floordiv' else '%'} {args[1]}")
            return self._let(expr, "int", f"floor_{'div' if expr.op == 'floordiv' else 'mod'}({args[0]}, {args[1]})")
        return self._let(expr, "int", f"{args[0]} {_SIGNS[expr.op]} {args[1]}")

    def _fits_32(self, expr: Call) -> bool:
        for e in (expr, *expr.args):
            low, high = interval(e, self.writer.env)
            if not _INT32[0] <= low <= high <= _INT32[1]:
                return False
        return True

    def truth(self, expr: Expr) -> str:
        """The value as a truth value."""
        if isinstance(expr, Const):
            return f"tl.full([], {bool(expr.value)}, tl.int1)"
        if (expr, "bool") in self.known:
            return self.known[expr, "bool"]
        if isinstance(expr, Load):
            return self._let(expr, "bool", f"{self._load(expr)} != 0")
        assert isinstance(expr, Call)
        op = expr.op
        if op in ("and", "or"):
            a, b = map(self.truth, expr.args)
            return self._let(expr, "bool", f"{a} {'&' if op == 'and' else '|'} {b}")
        if op == "not":
            return self._let(expr, "bool", f"{self.truth(expr.args[0])} == 0")
        if op == "where":
            condition, a, b = map(self.truth, expr.args)
            return self._let(expr, "bool", f"({condition} & {a}) | (({condition} == 0) & {b})")
        assert op in BOOLEANS
        types = [self.spec.type_of(a) for a in expr.args]
        if types[0] == "bool":
            a, b = map(self.truth, expr.args)
        elif "float" in types:
            a, b = map(self.floating, expr.args)
        else:
            a, b = map(self.integer, expr.args)
        if all(map(self.is_literal, (a, b))):
            a = f"tl.full([], {a}, {'tl.float32' if 'float' in types else 'tl.int64'})"
        return self._let(expr, "bool", f"{a} {_COMPARE[op]} {b}")

    def _load(self, load: Load) -> str:
        """The element, at indices clamped to the leaf; offsets of rows and keys are 32 bits wide where the leaf is small."""
        start, form = self.writer.starts[load.leaf], self.writer.forms[load.leaf]
        offsets = []
        for axis, index in enumerate(load.indices):
            at = f"tl.minimum(tl.maximum({self.integer(index)}, 0), L[{start + 1 + form.rank + axis}])"
            wide = form.wide or free_vars(index) <= {"b", "h"}
            offsets.append(f"tl.cast({at}, tl.int{64 if wide else 32}) * L[{start + 1 + axis}]")
        # what is the same for a tile is added to the pointer first
        pointer = " + ".join((f"L[{start}]", *sorted(offsets, key=lambda text: "int64" not in text)))
        return f"tl.load({pointer})"


_SIGNS: Final[Mapping[str, str]] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE: Final[Mapping[str, str]] = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}
_FUNCTIONS: Final[Mapping[str, str]] = {
    "tanh": "tanh",
    "exp": "tl.exp",
    "log": "tl.log",
    "sqrt": "tl.sqrt_rn",
    "rsqrt": "tl.rsqrt",
    "sigmoid": "tl.sigmoid",
    "abs": "tl.abs",
}


def _literal(value: float) -> str:
    """A number as Triton reads it: as fp32, which it takes for fp64 outside of fp32's normal range."""
    if math.isfinite(value) and abs(value) > _FP32_MAX:
        value = math.copysign(math.inf, value)
    text = repr(value)
    if not math.isfinite(value):
        return f'float("{text}")'
    return text if value == 0 or abs(value) >= _FP32_TINY else f"tl.full([], {text}, tl.float32)"


@lru_cache(maxsize=4096)
def _compile(name: str, args: tuple[str, ...], lines: tuple[str, ...]) -> Any:
    """A Triton device function; the same text is the same function."""
    import triton
    import triton.language as tl

    from attnfuse.templates.kernels import tile

    source = "\n    ".join((f"def {name}({', '.join(args)}):", *lines)) + "\n"
    file = f"<attnfuse {name} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {
        "tl": tl,
        "tanh": tile.tanh,
        "floor_div": tile.floor_div,
        "floor_mod": tile.floor_mod,
        "__name__": "attnfuse.score_functions",
    }
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[name])
