"""Biases that depend on q or k: their products with something else, gathered by distance (DeBERTa, SEW-D)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.peel import LARGE_FACTOR
from attnfuse.passes.views import GATHERS, MOVES
from attnfuse.score import Load

__all__ = ["dependent"]


def dependent(scope: Scope, score: Contraction) -> Callable[[Load], bool]:
    """Whether a leaf is made of products of q or k with what is a product too, all taken for numbers as common as the scores: a
    table that is given might hold finfo.min."""
    factors = {_origin(score.lhs, scope)[0], _origin(score.rhs, scope)[0]}

    def is_common(found: Contraction) -> bool:
        (a, scale), (b, other) = _origin(found.lhs, scope), _origin(found.rhs, scope)
        others = [x for x in (a, b) if x not in factors]
        plain = found.added is None and scale * other <= LARGE_FACTOR
        plain &= not any(scope.storage.writes(x) for x in (a, b))
        return plain and len(others) < 2 and all(map(_is_product, others))

    def made(node: fx.Node) -> bool:
        todo = [(node, 1.0)]
        for at, factor in todo:
            name, scale = packet(at), _scale(at)
            if scope.storage.writes(at) or not factor <= LARGE_FACTOR:
                return False
            if (found := contraction(at)) is not None:
                if not is_common(found):
                    return False
            elif name in (*MOVES, *GATHERS) or scale is not None:
                todo.append((at.args[0], factor * (scale or 1.0)))  # type: ignore[arg-type]
            elif name in ("add", "sub") and at.kwargs.get("alpha", 1) == 1:
                terms = [x for x in at.args[:2] if x != 0]
                if not all(map(is_tensor, terms)):
                    return False
                todo.extend((x, factor) for x in terms)  # type: ignore[misc]
            else:
                return False
        return True

    def of_leaf(load: Load) -> bool:
        source = scope.table.leaves[load.leaf]
        return source.scope is scope and made(source.node)

    return of_leaf


def _origin(node: fx.Node, scope: Scope) -> tuple[fx.Node, float]:
    """What a factor is a view, a copy or a multiple of, as far as nothing writes to it, and the greatest multiple."""
    factor = 1.0
    while not scope.storage.writes(node) and (packet(node) in MOVES or (scale := _scale(node)) is not None):
        factor *= 1.0 if packet(node) in MOVES else scale or 1.0
        above = node.args[0]
        assert isinstance(above, fx.Node)
        node = above
    return node, factor


def _is_product(node: fx.Node) -> bool:
    """Whether a factor comes out of a linear layer or another product."""
    return contraction(node) is not None or packet(node) == "linear"


def _scale(node: fx.Node) -> float | None:
    """The known number that a node multiplies by, as a magnitude."""
    if packet(node) not in ("mul", "div") or not is_tensor(node.args[0]):
        return None
    arg = node.args[1]
    try:
        known = abs(float(_value(arg)) if isinstance(arg, fx.Node) else float(arg))  # type: ignore[arg-type]
    except (LookupError, TypeError):
        return None
    if not math.isfinite(known) or known == 0:
        return None
    return known if packet(node) == "mul" else 1 / known


def _value(node: fx.Node) -> torch.Tensor:
    """A tensor of one element that is made of numbers alone, computed; raises LookupError for any other."""
    pure = packet(node) in (
        "scalar_tensor",
        "full",
        "to",
        "_to_copy",
        "mul",
        "div",
        "sqrt",
        "rsqrt",
        "pow",
        "reciprocal",
    )
    if not pure or not is_tensor(node) or fake(node).dim():
        raise LookupError
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
    made: torch.Tensor = node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})  # type: ignore[operator]
    return made
