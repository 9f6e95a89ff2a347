"""Scores that a softmax in a narrower type rounds: which of them that makes infinite, written into the program where any can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import fx

from attnfuse.passes.graph import SHORT_DTYPES, fake
from attnfuse.passes.lift import Scope
from attnfuse.passes.peel import Miss, only_finite
from attnfuse.score import BOOLEANS, ROUNDINGS, Call, Const, Expr, Load, Program, S, added_loads, call, walk

__all__ = ["rounded_by"]

# Magnitudes below are lost beside the least number, in every type of its range.
_ORDINARY: Final = 2.0**100
_INTEGERS: Final = 2.0**63


def rounded_by(
    softmax: fx.Node, source: fx.Node, product: fx.Node, expr: Expr, program: Program, scope: Scope
) -> Program:
    """The program of scores that go into a softmax of another type.

    Rounding is an error like any other but where it gives infinities: their row is NaN, or their key has no weight.

    Args:
        expr: what `source`, the input of the softmax, is.
        program: the same as body and tiers.

    Raises:
        Miss: AF024 where what q and k give is wider than that type, so that rounding is what the model means.
    """
    dtype, before = fake(softmax).dtype, fake(source).dtype
    if torch.finfo(dtype).max >= torch.finfo(before).max:
        return program
    name = SHORT_DTYPES[dtype]
    if name not in ROUNDINGS or fake(product).dtype.itemsize > dtype.itemsize:
        raise Miss("AF024", softmax, f"the scores are rounded from {before} to {dtype}")

    def type_of(load: Load) -> torch.dtype:
        return fake(scope.table.leaves[load.leaf].node).dtype

    if (before, dtype, fake(product).dtype) == (torch.float32, torch.bfloat16, torch.bfloat16) and _stays(
        expr, type_of
    ):
        return program
    # what is finfo.min for a wider type is -inf for this one
    least = {e.value for e in walk(expr) if isinstance(e, Const) and e.value < -_ORDINARY}
    if all(t.fill == "-inf" for t in program.tiers) or (least == {torch.finfo(torch.bfloat16).min} and name == "bf16"):
        return replace(program, body=call(name, program.body))
    return Program(only_finite(call(name, expr)))


def _stays(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> bool:
    """Whether no score of bfloat16 operands, in float32, is beyond bfloat16's range, which is float32's but for its greatest
    values: a fill of finfo(bfloat16).min stays what it is, if nothing makes it larger."""
    added = [dtype for load in added_loads(expr) if (dtype := type_of(load)).is_floating_point]
    narrow = len(added) < 2 and all(dtype.itemsize < 4 for dtype in added)
    return narrow and all(_is_no_larger(part, type_of) for part in walk(expr))


def _is_no_larger(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> bool:
    """Whether a step makes nothing of finfo(bfloat16).min that is larger still."""
    if isinstance(expr, Const):
        return abs(expr.value) <= _ORDINARY or expr.value in (torch.finfo(torch.bfloat16).min, -math.inf)
    if not isinstance(expr, Call) or _most(expr, type_of) <= _ORDINARY:
        return True
    if expr.op in ("mul", "div"):
        factor = next((float(x.value) for x in expr.args[::-1] if isinstance(x, Const)), 0.0)
        return 0 < factor <= 1 if expr.op == "mul" else factor >= 1
    if expr.op == "sub":
        return _most(expr.args[1], type_of) <= _ORDINARY
    return expr.op in ("add", "where", *BOOLEANS)


def _most(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> float:
    """A bound of the magnitude; products of q and k are taken for ordinary."""
    if isinstance(expr, Const):
        return abs(expr.value)
    if isinstance(expr, Load):
        return math.inf if type_of(expr).is_floating_point else _INTEGERS
    if not isinstance(expr, Call):
        return 0.0 if expr == S else _INTEGERS
    if expr.op in BOOLEANS:
        return 1.0
    parts = [_most(x, type_of) for x in (expr.args[1:] if expr.op == "where" else expr.args)]
    if expr.op in ("add", "sub"):
        return sum(parts)
    if expr.op == "mul":
        return 0.0 if 0.0 in parts else math.prod(parts)
    return max(parts) if expr.op in ("where", "neg", "abs", "min", "max", "float") or max(parts) > _ORDINARY else 0.0
