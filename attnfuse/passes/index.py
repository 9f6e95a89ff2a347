"""Indices of tensor dimensions as mixed-radix digits, so that views keep their meaning.

The index of one dimension is a tuple of digits, most significant first: flattening [B, H] gives `(b, h)`, splitting H into
[Hkv, G] gives `(h // G,)` and `(h % G,)`, and joining those two again gives `(h,)`.  A reshape is the same digits grouped anew;
one that does not align is refused (`Misaligned`), never approximated.

Sizes are ints or sympy expressions and are compared symbolically, so no guard is ever added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv

from attnfuse.score import Call, Const, Expr, Var, call

Size: TypeAlias = "int | sympy.Expr"

# What sympy is asked about sizes is asked anew at every layer. Expressions are values; the answers hold in every graph.
_KEPT: Final = 4096


class Unliftable(Exception):
    """An operator, or a use of it, that has no exact expression."""


class Misaligned(Unliftable):
    """A reshape whose groups of dimensions do not line up with the digits at hand."""


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of an index: its value as an expression and the size of its range."""

    expr: Expr
    size: Size


Index = tuple[Digit, ...]
"""The index of one dimension; the empty tuple is the index 0."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The digit `(var // stride) % size` of a variable."""

    var: str
    stride: int
    size: Size


def size_of(value: Any) -> Size:
    """An int or SymInt as a Size."""
    if isinstance(value, int):
        return value
    return _simple(value.node.expr)


@lru_cache(maxsize=_KEPT)
def _simple(expr: sympy.Expr) -> Size:
    expr = expr.replace(FloorDiv, _quotient_of)
    return int(expr) if expr.is_Integer else expr


def _quotient_of(whole: sympy.Expr, part: sympy.Expr) -> sympy.Expr:
    """`whole // part`, without the rounding where it divides evenly whatever the (positive) symbols are."""
    ratio = sympy.cancel(whole / part)
    exact = ratio.is_polynomial() and all(c.is_Integer for c in sympy.Poly(ratio, *ratio.free_symbols).coeffs())
    return ratio if ratio.is_Integer or (ratio.free_symbols and exact) else FloorDiv(whole, part)


def sizes_of(shape: Sequence[Any]) -> tuple[Size, ...]:
    """A shape as Sizes."""
    return tuple(size_of(x) for x in shape)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return bool(a == b) or (not (isinstance(a, int) and isinstance(b, int)) and _vanishes(a - b))


@lru_cache(maxsize=_KEPT)
def _vanishes(difference: sympy.Expr) -> bool:
    return bool(sympy.expand(difference) == 0)


@lru_cache(maxsize=_KEPT)
def _ratio(whole: Size, part: Size) -> sympy.Expr:
    return sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes."""
    out: Size = 1
    for size in sizes:
        out = out * size
    return out


def index_of(expr: Expr, size: Size) -> Index:
    """The index with one digit."""
    return () if same(size, 1) else (Digit(expr, size),)


def value(index: Index) -> Expr:
    """The index as one integer expression; raises Misaligned where a symbolic radix would be needed."""
    out: Expr = Const(0)
    for digit in index:
        if not isinstance(digit.size, int) and out != Const(0):
            raise Misaligned(f"the radix {digit.size} is symbolic")
        scaled = call("mul", out, Const(digit.size)) if isinstance(digit.size, int) else out
        out = call("add", scaled, digit.expr)
    return out


def _divided(digit: Digit) -> tuple[Expr, int, bool]:
    """A digit as `x // stride`, possibly `% size`: x, stride and whether a modulus was there.

    A modulus that is not the digit's size is the user's own arithmetic: then x is the whole expression.
    """
    expr, has_mod = digit.expr, False
    if isinstance(expr, Call) and expr.op == "mod":
        if not (isinstance(expr.args[1], Const) and expr.args[1].value == digit.size):
            return expr, 1, False
        expr, has_mod = expr.args[0], True
    if isinstance(expr, Call) and expr.op == "floordiv" and isinstance(expr.args[1], Const):
        return expr.args[0], int(expr.args[1].value), has_mod
    return expr, 1, has_mod


def piece(digit: Digit) -> Piece | None:
    """The digit as a piece of one variable, or None if it is anything else."""
    expr, stride, _ = _divided(digit)
    return Piece(expr.name, stride, digit.size) if isinstance(expr, Var) else None


def joined(digits: Sequence[Digit]) -> Index:
    """`digits` with neighbours that are pieces of one value put together again."""
    out: list[Digit] = []
    for digit in digits:
        if same(digit.size, 1):
            continue
        if out:
            merged = _merge(out[-1], digit)
            if merged is not None:
                out[-1] = merged
                continue
        out.append(digit)
    return tuple(out)


def _merge(high: Digit, low: Digit) -> Digit | None:
    x, high_stride, high_mod = _divided(high)
    y, low_stride, low_mod = _divided(low)
    if x != y or not low_mod or not isinstance(low.size, int) or high_stride != low_stride * low.size:
        return None
    size = high.size * low.size
    expr = x if low_stride == 1 else call("floordiv", x, Const(low_stride))
    if high_mod:
        if not isinstance(size, int):
            return None
        expr = call("mod", expr, Const(size))
    return Digit(expr, size)


def _split(digit: Digit, low: Size) -> tuple[Digit, Digit]:
    """`digit` as two digits, the less significant of size `low`."""
    if not isinstance(low, int) or not isinstance(digit.size, int):
        quotient = _ratio(digit.size, low) if isinstance(low, int) else None
        if quotient is None or quotient.free_symbols == set() or sympy.denom(quotient) != 1:
            raise Misaligned(f"a dimension of {digit.size} does not split by {low}")
        high: Size = quotient
    else:
        if digit.size % low:
            raise Misaligned(f"a dimension of {digit.size} does not split by {low}")
        high = digit.size // low
    x, stride, has_mod = _divided(digit)
    assert isinstance(low, int)
    upper: Expr = call("floordiv", x, Const(stride * low))
    if has_mod:
        if not isinstance(high, int):
            raise Misaligned(f"a dimension of {digit.size} does not split by {low}")
        upper = call("mod", upper, Const(high))
    lower = call("mod", call("floordiv", x, Const(stride)) if stride > 1 else x, Const(low))
    return Digit(upper, high), Digit(lower, low)


def regroup(index: Sequence[Index], shape: Sequence[Size]) -> tuple[Index, ...]:
    """The digits of `index` (an element of one shape) grouped as the dimensions of `shape` (the same number of elements).

    Raises Misaligned where a group of `shape` ends inside a digit that cannot be split evenly.
    """
    digits = list(joined([digit for dim in index for digit in dim]))
    out: list[Index] = []
    for size in reversed(shape):
        group: list[Digit] = []
        have: Size = 1
        while not same(have, size):
            if not digits:
                raise Misaligned(f"no digit is left for a dimension of {size}")
            digit = digits.pop()
            total = have * digit.size
            if not same(total, size) and not _divides(total, size):
                need = _quotient(size, have)
                high, digit = _split(digit, need)
                digits.append(high)
                total = have * digit.size
            group.insert(0, digit)
            have = total
        out.insert(0, joined(group))
    if digits:
        raise Misaligned(f"{len(digits)} digits are left over")
    return tuple(out)


def _divides(part: Size, whole: Size) -> bool:
    """Whether `whole` is certainly a multiple of `part` greater than it."""
    if isinstance(part, int) and isinstance(whole, int):
        return whole % part == 0 and whole > part
    ratio = _ratio(whole, part)
    return bool(sympy.denom(ratio) == 1 and ratio != 1)


def _quotient(whole: Size, part: Size) -> Size:
    if isinstance(part, int) and isinstance(whole, int):
        if whole % part:
            raise Misaligned(f"a dimension of {whole} does not split by {part}")
        return whole // part
    ratio = _ratio(whole, part)
    if sympy.denom(ratio) != 1:
        raise Misaligned(f"a dimension of {whole} does not split by {part}")
    return int(ratio) if ratio.is_Integer else ratio
