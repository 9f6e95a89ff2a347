"""Scores that are linear in the dot product: `s*scale + bias` with a scale that is the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

import torch

from attnfuse.score import (
    INDICES,
    SIZES,
    TRUE,
    Call,
    Const,
    Expr,
    Load,
    Program,
    S,
    Tier,
    call,
    conjuncts,
    free_vars,
    loads,
    substitute,
    walk,
)
from attnfuse.spec import AttentionSpec

MINIMA: Final = {x: torch.finfo(x).min for x in (torch.float64, torch.float32, torch.bfloat16)}
"""The finite fills that are masks, by type. float16's is not among them: scores move it."""
_ONE: Final = Const(1.0)
_MINUS_ONE: Final = Const(-1.0)


class Affine(NamedTuple):
    """`s*scale + bias`; the scale holds constants and sizes only."""

    scale: Expr
    bias: Expr | None


@lru_cache(maxsize=4096)
def where_allowed(program: Program) -> Expr:
    """The body in cells that every tier allows: choices by the mask are made, `where(pad[b, n], bias[m, n], 0.0)` is a bias."""
    known = {term: TRUE for tier in program.tiers for term in conjuncts(tier.allowed)}
    return substitute(program.body, known) if known else program.body


@lru_cache(maxsize=4096)
def affine(body: Expr) -> Affine | None:
    """`body` as `s*scale + bias`, or None if it has another form."""
    if body == S:
        return Affine(_ONE, None)
    if not isinstance(body, Call) or "s" not in free_vars(body):
        return None
    if body.op == "neg":
        inner = affine(body.args[0])
        return None if inner is None else _times(inner, _MINUS_ONE)
    if body.op in ("add", "sub", "mul", "div"):
        left, right = body.args
        if "s" in free_vars(right):
            if body.op == "div" or "s" in free_vars(left):
                return None
            if body.op == "sub":
                inner = affine(right)
                return None if inner is None else _plus(_times(inner, _MINUS_ONE), left)
            left, right = right, left
        inner = affine(left)
        if inner is None:
            return None
        if body.op in ("add", "sub"):
            return _plus(inner, right if body.op == "add" else call("neg", right))
        return _times(inner, right, body.op) if _same_everywhere(right) else None
    return None


class Capped(NamedTuple):
    """`cap*tanh(s*scale) + bias`; scale and cap hold constants and sizes only."""

    scale: Expr
    cap: Expr
    bias: Expr | None


@lru_cache(maxsize=4096)
def capped(body: Expr) -> Capped | None:
    """`body` as a softcapped score, or None if it has another form."""
    found = [x for x in {*walk(body)} if isinstance(x, Call) and x.op == "tanh" and "s" in free_vars(x)]
    inner = affine(found[0].args[0]) if len(found) == 1 else None
    if inner is None or inner.bias is not None:
        return None
    # where s stands outside too, the sum of both is not linear
    outer = affine(substitute(body, {found[0]: S}))
    return None if outer is None else Capped(inner.scale, outer.scale, outer.bias)


class Numbers(NamedTuple):
    """A score as kernels take it: `s*scale + bias`, or, with a cap that is not 0, `cap*tanh(s*scale / cap) + bias`."""

    scale: float
    cap: float
    bias: Expr | None


def numbers(body: Expr, sizes: dict[str, int]) -> Numbers | None:
    """`body` as such a score, or None if it has another form or numbers that are not known."""
    form = affine(body) or capped(body)
    scale = None if form is None else constant(form.scale, sizes)
    if form is None or scale is None:
        return None
    if isinstance(form, Affine):
        return Numbers(scale, 0.0, form.bias)
    cap = constant(form.cap, sizes)
    return Numbers(scale * cap, cap, form.bias) if cap else None


def as_load(spec: AttentionSpec, bias: Expr | None) -> Load | None:
    """A bias that is no more than a load of floating-point numbers."""
    while isinstance(bias, Call) and bias.op == "float":
        (bias,) = bias.args
    return bias if isinstance(bias, Load) and spec.leaf(bias.leaf).kind == "float" else None


def added_mask(tier: Tier) -> Load | None:
    """The load that a tier of `+min` tells apart from finfo.min: a mask that the body adds, see `peel.program_of`."""
    allowed = tier.allowed
    if tier.fill != "+min" or not isinstance(allowed, Call) or allowed.op != "ne":
        return None
    mask, fill = allowed.args
    return mask if isinstance(mask, Load) and any(fill == Const(x) for x in MINIMA.values()) else None


def least_added(tier: Tier) -> float | None:
    """The finfo.min that a tier tells apart, where it is such a mask."""
    if added_mask(tier) is None:
        return None
    assert isinstance(tier.allowed, Call)
    return constant(tier.allowed.args[1])


def is_sum(tier: Tier, body: Expr) -> bool:
    """Whether a tier says no more than what the body adds already, in float32: -inf, or finfo.min, of which no score is a digit."""
    form = affine(body)
    allowed = tier.allowed
    if form is None or not isinstance(allowed, Call) or allowed.op != "ne" or tier.fill == "=min":
        return False
    fills = (MINIMA[torch.float32], MINIMA[torch.bfloat16]) if tier.fill == "+min" else (-math.inf,)
    return allowed.args[0] in _terms(form.bias) and any(allowed.args[1] == Const(fill) for fill in fills)


def _terms(bias: Expr | None) -> list[Expr]:
    if isinstance(bias, Call) and bias.op == "add":
        return [*_terms(bias.args[0]), *_terms(bias.args[1])]
    return [] if bias is None else [bias]


def _same_everywhere(expr: Expr) -> bool:
    return not loads(expr) and not free_vars(expr) & set(INDICES)


def _times(form: Affine, factor: Expr, op: str = "mul") -> Affine:
    bias = None if form.bias is None else Call(op, (form.bias, factor))
    return Affine(Call(op, (form.scale, factor)), bias)


def _plus(form: Affine, term: Expr) -> Affine:
    return Affine(form.scale, term if form.bias is None else Call("add", (form.bias, term)))


_ARITHMETIC: Final[Mapping[str, Callable[..., float]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "float": lambda a: a,
}


def constant(expr: Expr, sizes: dict[str, int] | None = None) -> float | None:
    """The value of an expression of constants and `sizes` by name, or None where it has another term."""
    if isinstance(expr, Const):
        return float(expr.value)
    values = sizes or {}
    if not isinstance(expr, Call):
        name = str(expr)
        return float(values[name]) if name in values and (name in SIZES or name[0] == "i") else None
    args = [constant(a, sizes) for a in expr.args]
    known = [a for a in args if a is not None]
    if len(known) < len(args) or expr.op not in (*_ARITHMETIC, "sqrt", "rsqrt"):
        return None
    if expr.op == "sqrt" or expr.op == "rsqrt":
        if known[0] <= 0:
            return None
        return float(known[0] ** (0.5 if expr.op == "sqrt" else -0.5))
    if expr.op == "div" and known[1] == 0:
        return None
    return _ARITHMETIC[expr.op](*known)
