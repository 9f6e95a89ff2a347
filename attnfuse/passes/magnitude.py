"""How large a number an expression may give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from attnfuse.score import BOOLEANS, Call, Const, Expr, Load, S

__all__ = ["ORDINARY", "most"]

# Magnitudes below are lost beside the least number, in every type of its range.
ORDINARY: Final = 2.0**100
_INTEGERS: Final = 2.0**63
_SCORE: Final = 2.0**10


def most(expr: Expr, greatest: Callable[[Load], float], score: float = _SCORE) -> float:
    """A bound of the magnitude.

    Args:
        greatest: what a leaf of floating-point numbers can hold at most; 0 for one of other numbers.
        score: what products of q and k are taken to be at most.
    """
    if isinstance(expr, Const):
        return abs(expr.value)
    if isinstance(expr, Load):
        return greatest(expr) or _INTEGERS
    if not isinstance(expr, Call):
        return score if expr == S else _INTEGERS
    if expr.op in BOOLEANS or expr.op in ("tanh", "sigmoid"):
        return 1.0
    parts = [most(x, greatest, score) for x in (expr.args[1:] if expr.op == "where" else expr.args)]
    if expr.op in ("add", "sub"):
        return sum(parts)
    if expr.op == "mul":
        return 0.0 if 0.0 in parts else math.prod(parts)
    if expr.op == "div" and isinstance(expr.args[1], Const) and expr.args[1].value:
        return parts[0] / abs(expr.args[1].value)
    return max(parts) if expr.op in ("where", "neg", "abs", "min", "max", "float") else math.inf
