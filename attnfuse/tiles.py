"""Which keys a block of rows has to look at: masks as key ranges, by interval arithmetic that is sound by construction.

`bounds(spec)` turns the conjunction of all tiers into lower and upper bounds on the key index `n` plus what has no such
form; `row_range` gives the key range of a block of rows from them; `never_empty` proves that every row has a key;
`interval` bounds any expression over ranges of its variables, so that `interval(allowed, tile)` is (0, 0) for an EMPTY
tile and (1, 1) for a FULL one.

An expression whose value is not defined (a load outside its leaf, a division by zero) may take any value: where a guard
excludes it, the guard is a bound or a residual of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product
from typing import Final, NamedTuple

from attnfuse.score import (
    BOOLEANS,
    COMPARISONS,
    FALSE,
    SIZES,
    TRUE,
    Call,
    Const,
    Expr,
    Linear,
    Load,
    Program,
    S,
    Var,
    call,
    conjuncts,
    free_vars,
    linear,
    loads,
    simplify,
)
from attnfuse.spec import AttentionSpec, Shape

Range = tuple[float, float]  # least and greatest value, both included; integers, or ±inf where nothing is known
Env = Mapping[str | Load, Range]
Extent = Callable[[Expr, tuple[int, int]], Range]

ANY: Final[Range] = (-math.inf, math.inf)
_ZERO: Final = Const(0)
_N: Final = Var("n")
_KEYS: Final = Var("N")


@dataclass(frozen=True, slots=True)
class Bounds:
    """A key is allowed by every tier <=> `n >= l` for each lower, `n < u` for each upper, and each residual holds.

    `lower` and `upper` are integer expressions without `n` and `s`; they may load at indices without `n`.
    """

    lower: tuple[Expr, ...] = ()
    upper: tuple[Expr, ...] = ()
    residual: tuple[Expr, ...] = ()

    def expressions(self) -> tuple[Expr, ...]:
        """The bounds and the residual in one tuple."""
        return (*self.lower, *self.upper, *self.residual)


class RowRange(NamedTuple):
    """Keys of a block of rows, `0 <= first <= full_first <= full_last <= last <= keys`.

    Outside `[first, last)` no row has an allowed key; in `[full_first, full_last)` the bounds allow every key in every
    row (the residual still has to be asked).
    """

    first: int
    last: int
    full_first: int
    full_last: int


@lru_cache(maxsize=4096)
def bounds(spec: AttentionSpec) -> Bounds:
    """The conjunction of the spec's tiers as bounds on `n`."""
    lower: list[Expr] = []
    upper: list[Expr] = []
    residual: list[Expr] = []
    for tier in spec.program.tiers:
        for term in conjuncts(_push_not(simplify(tier.allowed), spec)):
            found = _key_range(term, spec)
            if found is None:
                residual.append(term)
            else:
                lower += found[0]
                upper += found[1]
    return Bounds(
        _strongest(lower, lambda kept, other: call("sub", kept, other), lambda bound: call("neg", bound)),
        _strongest(upper, lambda kept, other: call("sub", other, kept), lambda bound: call("sub", bound, _KEYS)),
        tuple(dict.fromkeys(residual)),
    )


_SWAP: Final = {"m": "n", "n": "m", "M": "N", "N": "M"}


def _swapped(expr: Expr) -> Expr:
    """`expr` with rows and keys exchanged."""
    if isinstance(expr, Var):
        return Var(_SWAP.get(expr.name, expr.name))
    if isinstance(expr, Load):
        return Load(expr.leaf, tuple(map(_swapped, expr.indices)))
    if isinstance(expr, Call):
        return Call(expr.op, tuple(map(_swapped, expr.args)))
    return expr


@lru_cache(maxsize=4096)
def row_bounds(spec: AttentionSpec) -> Bounds:
    """The map the other way round: a row sees key n <=> `m >= l` for each lower, `m < u` for each upper, and each residual holds.

    The bounds are integer expressions without `m` and `s`.
    """
    tiers = tuple(replace(tier, allowed=_swapped(tier.allowed)) for tier in spec.program.tiers)
    found = bounds(AttentionSpec(Program(S, tiers), spec.leaves))
    return Bounds(*(tuple(map(_swapped, side)) for side in (found.lower, found.upper, found.residual)))


def row_range(bounds: Bounds, rows: tuple[int, int], keys: int, extent: Extent) -> RowRange:
    """The keys that rows `[rows[0], rows[1])` need.

    Args:
        keys: N, the number of keys.
        extent: `extent(expr, rows)` gives the least and the greatest value of a bound over those rows (and over the
            batches and heads that the block holds); -inf and inf where it is not known.
    """
    lower = [extent(bound, rows) for bound in bounds.lower]
    upper = [extent(bound, rows) for bound in bounds.upper]

    def within(value: float) -> int:
        return int(min(max(value, 0), keys))

    first = within(max((low for low, _ in lower), default=0))
    last = within(min((high for _, high in upper), default=keys))
    full_first = within(max((high for _, high in lower), default=0))
    full_last = within(min((low for low, _ in upper), default=keys))
    if first >= last:
        return RowRange(0, 0, 0, 0)
    if full_first >= full_last:
        return RowRange(first, last, last, last)
    return RowRange(first, last, full_first, full_last)


def index_extent(shape: Shape, sizes: tuple[int, ...] = ()) -> Extent:
    """An `extent` for `row_range` over every batch and head, from indices and sizes alone: loads may have any value."""
    env = _env(shape, sizes)

    def extent(expr: Expr, rows: tuple[int, int]) -> Range:
        return interval(expr, {**env, "m": (rows[0], rows[1] - 1)})

    return extent


def needs_every_key(program: Program) -> bool:
    """Whether a row in which no key is allowed looks at every key: its weights are uniform over its `min` keys."""
    return program.sink is None and any(tier.fill in ("+min", "=min") for tier in program.tiers)


def never_empty(bounds: Bounds, shape: Shape | None = None, *, queries_within_keys: bool = False) -> bool:
    """Whether it is proven that every row has an allowed key, for all sizes of at least 1, or for `shape`.

    A load may have any value, so a residual or a load that could empty a row is never proven away.

    Args:
        queries_within_keys: the caller knows that M <= N.
    """
    if bounds.residual:
        return False
    proof = _Proof(shape, queries_within_keys)
    pairs = product((_ZERO, *bounds.lower), (_KEYS, *bounds.upper))
    return all(proof.at_least(call("sub", upper, lower), 1) for lower, upper in pairs)


@lru_cache(maxsize=1024)
def tiles_skipped(spec: AttentionSpec, shape: Shape, block_m: int, block_n: int, sizes: tuple[int, ...] = ()) -> float:
    """The fraction of (block_m × block_n) tiles that no row block visits, as far as indices and sizes decide.

    What leaves decide counts as visited, except that a row which only leaves can empty counts as a row with keys.
    """
    known = bounds(spec)
    known = Bounds(*(tuple(e for e in side if not loads(e)) for side in (known.lower, known.upper)))
    extent = index_extent(shape, sizes)
    check_rows = needs_every_key(spec.program) and not never_empty(known, shape)
    tiles = math.ceil(shape.N / block_n)
    visited = total = 0
    for start in range(0, shape.M, block_m):
        rows = (start, min(start + block_m, shape.M))
        first, last, _, _ = row_range(known, rows, shape.N, extent)
        if check_rows and _may_hold_empty_row(known, rows, shape.N, extent):
            first, last = 0, shape.N
        visited += math.ceil(last / block_n) - first // block_n if first < last else 0
        total += tiles
    return 1 - visited / total if total else 0.0


def _may_hold_empty_row(known: Bounds, rows: tuple[int, int], keys: int, extent: Extent) -> bool:
    def crossed(rows: tuple[int, int]) -> bool:
        lower = max((extent(e, rows)[1] for e in known.lower), default=0)
        upper = min((extent(e, rows)[0] for e in known.upper), default=keys)
        return max(lower, 0) >= min(upper, keys)

    return crossed(rows) and any(crossed((m, m + 1)) for m in range(*rows))


def _env(shape: Shape, sizes: tuple[int, ...]) -> dict[str | Load, Range]:
    env: dict[str | Load, Range] = {name: (getattr(shape, name),) * 2 for name in SIZES}
    env |= {name.lower(): (0, getattr(shape, name) - 1) for name in ("B", "H", "M", "N")}
    return env | {f"i{at}": (size, size) for at, size in enumerate(sizes)}


def interval(expr: Expr, env: Env) -> Range:
    """The least and greatest value that an integer or truth value (0 or 1) can have while its variables stay in `env`.

    Args:
        env: ranges of variables by name, and of loads by the load; what it lacks, and every float, may have any value.
    """
    if isinstance(expr, Const):
        return ANY if isinstance(expr.value, float) else (int(expr.value), int(expr.value))
    if isinstance(expr, Var):
        return env.get(expr.name, ANY)
    if isinstance(expr, Load):
        return env.get(expr, ANY)
    if expr.op in ("add", "sub", "mul", "neg"):
        form = linear(expr)
        if form is not None and expr not in form.terms:
            return _interval_of_form(form, env)
    if expr.op in COMPARISONS:
        form = linear(Call("sub", expr.args))
        parts = [interval(a, env) for a in expr.args] if form is None else [_interval_of_form(form, env), (0, 0)]
        return _compare(expr.op, *parts)
    parts = [interval(a, env) for a in expr.args]
    if expr.op == "where":
        truth = _truth(parts[0])
        if truth[0] == truth[1]:
            return parts[1] if truth[0] else parts[2]
        return min(parts[1][0], parts[2][0]), max(parts[1][1], parts[2][1])
    if expr.op not in _INTERVALS:
        return ANY
    return _INTERVALS[expr.op](*parts)


def _interval_of_form(form: Linear, env: Env) -> Range:
    low: float = form.constant
    high: float = form.constant
    for atom, factor in form.terms.items():
        term = _times(interval(atom, env), (factor, factor))
        low, high = low + term[0], high + term[1]
    return low, high


def _compare(op: str, a: Range, b: Range) -> Range:
    if op in ("gt", "ge"):
        return _compare("lt" if op == "gt" else "le", b, a)
    below, above = a[1] < b[0], a[0] > b[1]
    if op in ("lt", "le"):
        yes, no = below, above
        if op == "lt":
            no = no or a[0] == b[1]
        else:
            yes = yes or a[1] == b[0]
    else:
        yes, no = a[0] == a[1] == b[0] == b[1], below or above
        if op == "ne":
            yes, no = no, yes
    return int(yes), int(not no)


def _truth(a: Range) -> Range:
    return max(a[0], 0), min(a[1], 1)


def _product(x: float, y: float) -> float:
    return 0 if 0 in (x, y) else x * y


def _times(a: Range, b: Range) -> Range:
    corners = [_product(x, y) for x in a for y in b]
    return min(corners), max(corners)


def _floor(x: float, y: float) -> float:
    if math.isinf(x):
        return x if y > 0 else -x
    if math.isinf(y):
        return 0 if x == 0 or (x > 0) == (y > 0) else -1
    return x // y


def _floordiv(a: Range, b: Range) -> Range:
    if b[0] <= 0 <= b[1]:
        return ANY
    corners = [_floor(x, y) for x in a for y in b]
    return min(corners), max(corners)


def _mod(a: Range, b: Range) -> Range:
    if b[0] <= 0 <= b[1]:
        return ANY
    if b[0] == b[1] and all(map(math.isfinite, a)) and a[0] // b[0] == a[1] // b[0]:
        return a[0] % b[0], a[1] % b[0]
    if b[1] < 0:
        return b[0] + 1, 0
    return 0, min(b[1] - 1, a[1]) if a[0] >= 0 else b[1] - 1


def _abs(a: Range) -> Range:
    return max(a[0], -a[1], 0), max(-a[0], a[1])


_INTERVALS: Final[Mapping[str, Callable[..., Range]]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _times,
    "neg": lambda a: (-a[1], -a[0]),
    "floordiv": _floordiv,
    "mod": _mod,
    "abs": _abs,
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "not": lambda a: (1 - _truth(a)[1], 1 - _truth(a)[0]),
    "and": lambda a, b: (min(_truth(a)[0], _truth(b)[0]), min(_truth(a)[1], _truth(b)[1])),
    "or": lambda a, b: (max(_truth(a)[0], _truth(b)[0]), max(_truth(a)[1], _truth(b)[1])),
}


# From a condition to bounds on n: ([n >= each], [n < each]), or None where it is no single range.
_Bounded = tuple[list[Expr], list[Expr]] | None


def _ints(spec: AttentionSpec, exprs: Iterable[Expr]) -> bool:
    return all(spec.type_of(e) == "int" for e in exprs)


def _push_not(expr: Expr, spec: AttentionSpec, negate: bool = False) -> Expr:
    """`expr`, or its negation, with `not` moved inwards and choices with a literal arm written with `and` and `or`."""
    if not isinstance(expr, Call) or expr.op not in (*BOOLEANS, "where"):
        return call("not", expr) if negate else expr
    if expr.op == "not":
        return _push_not(expr.args[0], spec, not negate)
    if expr.op in ("and", "or"):
        op = expr.op if not negate else "or" if expr.op == "and" else "and"
        return call(op, *(_push_not(a, spec, negate) for a in expr.args))
    if expr.op == "where":
        condition, first, second = expr.args
        chosen, other = (_push_not(a, spec, negate) for a in (first, second))
        if TRUE in (chosen, other) or FALSE in (chosen, other):
            holds, fails = (_push_not(condition, spec, flip) for flip in (False, True))
            return call("or", call("and", holds, chosen), call("and", fails, other))
        return call("where", condition, chosen, other)
    if negate and (expr.op in ("eq", "ne") or _ints(spec, expr.args)):
        return call(_INVERSE[expr.op], *expr.args)
    return call("not", expr) if negate else expr


_INVERSE: Final = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


def _key_range(expr: Expr, spec: AttentionSpec) -> _Bounded:
    if "n" not in free_vars(expr):
        return [], [] if expr == TRUE else [call("where", expr, _KEYS, _ZERO)]
    if not isinstance(expr, Call):
        return None
    if expr.op == "and":
        return _all(_key_range(a, spec) for a in expr.args)
    if expr.op == "or":
        terms = _disjuncts(expr)
        free = [t for t in terms if "n" not in free_vars(t)]
        found = _any(_key_range(t, spec) for t in terms if t not in free)
        return _choice(reduce(lambda a, b: call("or", a, b), free), ([], []), found) if free else found
    if expr.op == "where" and "n" not in free_vars(expr.args[0]):
        return _choice(expr.args[0], *(_key_range(a, spec) for a in expr.args[1:]))
    if expr.op in COMPARISONS and expr.op != "ne" and _ints(spec, expr.args):
        difference = _integer("sub", *expr.args)
        if expr.op in ("ge", "gt"):
            return _solve(difference, "ge", Const(int(expr.op == "gt")), spec)
        if expr.op in ("lt", "le"):
            return _solve(difference, "lt", Const(int(expr.op == "le")), spec)
        return _all((_solve(difference, "ge", _ZERO, spec), _solve(difference, "lt", Const(1), spec)))
    return None


def _solve(expr: Expr, op: str, bound: Expr, spec: AttentionSpec) -> _Bounded:
    """`expr >= bound` (op "ge") or `expr < bound` (op "lt") solved for n, which one term of the integer `expr` holds."""
    if "n" not in free_vars(expr):
        return _key_range(call(op, expr, bound), spec)
    form = linear(expr, loads_are_int=True)
    holding = [] if form is None else [atom for atom in form.terms if "n" in free_vars(atom)]
    if form is None or len(holding) != 1:
        return None
    atom = holding[0]
    factor = form.coefficient(atom)
    bound = _integer("sub", bound, form.without(atom).expr())
    if factor < 0:
        # -f·x >= c is f·x < 1 - c
        factor, op, bound = -factor, "lt" if op == "ge" else "ge", _integer("sub", Const(1), bound)
    if factor > 1:
        bound = call("floordiv", _integer("add", bound, Const(factor - 1)), Const(factor))
    if atom == _N:
        return ([bound], []) if op == "ge" else ([], [bound])
    return _solve_term(atom, op, bound, spec) if isinstance(atom, Call) else None


def _solve_term(term: Call, op: str, bound: Expr, spec: AttentionSpec) -> _Bounded:
    if term.op == "floordiv":
        x, step = term.args
        if isinstance(step, Const) and step.value < 0:
            x, step = _integer("neg", x), Const(-step.value)
        if (isinstance(step, Const) and step.value > 0) or (isinstance(step, Var) and step.name in SIZES):
            return _solve(x, op, _integer("mul", bound, step), spec)
    if term.op == "abs" and op == "lt":
        above = _integer("sub", Const(1), bound)
        return _all((_solve(term.args[0], "lt", bound, spec), _solve(term.args[0], "ge", above, spec)))
    if term.op in ("min", "max"):
        join = _all if (term.op == "min") == (op == "ge") else _any
        return join(_solve(x, op, bound, spec) for x in term.args)
    if term.op == "where" and "n" not in free_vars(term.args[0]):
        return _choice(term.args[0], *(_solve(x, op, bound, spec) for x in term.args[1:]))
    return None


def _integer(op: str, *args: Expr) -> Expr:
    """`call(op, ...)` for operands known to be integers, loads included, as a sorted sum."""
    form = linear(Call(op, args), loads_are_int=True)
    return call(op, *args) if form is None else form.expr()


def _disjuncts(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Call) and expr.op == "or":
        return (*_disjuncts(expr.args[0]), *_disjuncts(expr.args[1]))
    return (expr,)


def _all(parts: Iterable[_Bounded]) -> _Bounded:
    """Every part."""
    lower: list[Expr] = []
    upper: list[Expr] = []
    for part in parts:
        if part is None:
            return None
        lower, upper = lower + part[0], upper + part[1]
    return lower, upper


def _any(parts: Iterable[_Bounded]) -> _Bounded:
    """At least one part: one range if there is one part, or if all are open on the same side."""
    known: list[tuple[list[Expr], list[Expr]]] = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    if len(known) == 1:
        return known[0]
    if all(not upper for _, upper in known):
        return [reduce(_smaller, (_tightest(lower, _larger, _ZERO) for lower, _ in known))], []
    if all(not lower for lower, _ in known):
        return [], [reduce(_larger, (_tightest(upper, _smaller, _KEYS) for _, upper in known))]
    return None


def _choice(condition: Expr, chosen: _Bounded, other: _Bounded) -> _Bounded:
    """`chosen` where a condition without n holds, `other` elsewhere."""
    if chosen is None or other is None:
        return None
    sides: list[list[Expr]] = []
    for a, b, join, default in ((chosen[0], other[0], _larger, _ZERO), (chosen[1], other[1], _smaller, _KEYS)):
        arms = (_tightest(a, join, default), _tightest(b, join, default))
        sides.append([call("where", condition, *arms)] if a or b else [])
    return sides[0], sides[1]


def _larger(a: Expr, b: Expr) -> Expr:
    return call("max", a, b)


def _smaller(a: Expr, b: Expr) -> Expr:
    return call("min", a, b)


def _tightest(side: list[Expr], join: Callable[[Expr, Expr], Expr], default: Expr) -> Expr:
    return reduce(join, side) if side else default


def _strongest(
    side: list[Expr], slack: Callable[[Expr, Expr], Expr], beyond: Callable[[Expr], Expr]
) -> tuple[Expr, ...]:
    """The bounds of one side without those that another one, or the range of n, implies.

    Args:
        slack: `slack(a, b) >= 0` where bound `a` is at least as strong as `b`.
        beyond: `beyond(a) >= 0` where bound `a` allows every key.
    """
    proof = _Proof(None, False)
    kept: list[Expr] = []
    for bound in dict.fromkeys(side):
        if proof.at_least(beyond(bound), 0) or any(proof.at_least(slack(other, bound), 0) for other in kept):
            continue
        kept = [other for other in kept if not proof.at_least(slack(bound, other), 0)]
        kept.append(bound)
    return tuple(kept)


class _Proof:
    """Proves that an integer expression never goes below a value, for all index values and all sizes of at least 1."""

    def __init__(self, shape: Shape | None, queries_within_keys: bool) -> None:
        self.sizes = {} if shape is None else {Var(name): getattr(shape, name) for name in SIZES}
        self.queries_within_keys = queries_within_keys

    def at_least(self, expr: Expr, least: int) -> bool:
        form = linear(expr, loads_are_int=True)
        return form is not None and self._never_negative(form.plus(Linear({}, -least)))

    def _never_negative(self, form: Linear) -> bool:
        for atom, factor in form.terms.items():
            if isinstance(atom, Call):
                return self._without(atom, factor, form.without(atom))
        return self._sum_never_negative(form)

    def _without(self, atom: Call, factor: int, rest: Linear) -> bool:
        """Whether `factor·atom + rest >= 0`, by what is known of the operation."""
        x = atom.args[0]

        def replaced(value: Expr, factor: int = factor) -> bool:
            form = linear(value, loads_are_int=True)
            return form is not None and self._never_negative(rest.plus(form.scaled(factor)))

        if atom.op in ("max", "min"):
            one_is_enough = (atom.op == "max") == (factor > 0)
            return (any if one_is_enough else all)(replaced(a) for a in atom.args)
        if atom.op == "abs":
            if factor > 0:
                return self._never_negative(rest) or replaced(x) or replaced(x, -factor)
            return replaced(x) and replaced(x, -factor)
        if atom.op == "where":
            return all(replaced(a) for a in atom.args[1:])
        if atom.op == "mul":
            return factor > 0 and all(self.at_least(a, 0) for a in atom.args) and self._never_negative(rest)
        step = atom.args[1].value if len(atom.args) == 2 and isinstance(atom.args[1], Const) else 0
        if step <= 0:
            return False
        if atom.op == "mod":
            return replaced(_ZERO if factor > 0 else Const(int(step) - 1))
        if atom.op == "floordiv":
            # x - (step - 1) <= step·(x // step) <= x, and 0 <= x // step if 0 <= x
            whole, left = divmod(factor, int(step))
            if left == 0 and replaced(x if factor < 0 else Call("sub", (x, Const(int(step) - 1))), whole):
                return True
            return self.at_least(x, 0) and (self._never_negative(rest) if factor > 0 else replaced(x, whole))
        return False

    def _sum_never_negative(self, form: Linear) -> bool:
        for index, size in (("b", "B"), ("h", "H"), ("m", "M"), ("n", "N")):
            factor = form.coefficient(Var(index))
            form = form.without(Var(index))
            if factor < 0:
                form = form.plus(Linear({Var(size): 1}, -1).scaled(factor))
        constant, terms = form.constant, dict(form.terms)
        for size_of, value in self.sizes.items():
            constant += terms.pop(size_of, 0) * value
        orders = [("H", "Hkv")] + [("N", "M")] * self.queries_within_keys
        for more, less in orders:
            shared = min(terms.get(Var(more), 0), -terms.get(Var(less), 0))
            if shared > 0:
                terms[Var(more)] -= shared
                terms[Var(less)] += shared
        for atom, factor in terms.items():
            if factor and (factor < 0 or not (isinstance(atom, Var) and atom.name in SIZES)):
                return False
            constant += factor
        return constant >= 0
