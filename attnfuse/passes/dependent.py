"""Biases that depend on q or k: their products with something else, gathered by distance (DeBERTa, SEW-D)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.peel import LARGE_FACTOR
from attnfuse.passes.views import VIEWS
from attnfuse.score import Load

__all__ = ["dependent"]

_VIEWED: Final = (*VIEWS, "to", "_to_copy", "contiguous", "clone")
_MOVES: Final = (*_VIEWED, "gather", "index", "index_select", "take_along_dim")


def dependent(scope: Scope, score: Contraction) -> Callable[[Load], bool]:
    """Whether a leaf is made of products of q or k, whose numbers are taken for as common as the scores: none is finfo.min."""
    factors = {_origin(score.lhs), _origin(score.rhs)}

    def made(node: fx.Node) -> bool:
        todo = [node]
        for at in todo:
            found, name = contraction(at), packet(at)
            if scope.storage.writes(at):
                return False
            if found is not None:
                if not factors & {_origin(found.lhs), _origin(found.rhs)} or found.added is not None:
                    return False
            elif name in _MOVES or _scales(at):
                todo.append(at.args[0])  # type: ignore[arg-type]
            elif name in ("add", "sub"):
                terms = [x for x in at.args[:2] if x != 0]
                if not all(map(is_tensor, terms)):
                    return False
                todo.extend(terms)  # type: ignore[arg-type]
            else:
                return False
        return True

    def of_leaf(load: Load) -> bool:
        source = scope.table.leaves[load.leaf]
        return source.scope is scope and made(source.node)

    return of_leaf


def _origin(node: fx.Node) -> fx.Node:
    """What a factor is a view or a multiple of."""
    while packet(node) in _VIEWED or _scales(node):
        above = node.args[0]
        assert isinstance(above, fx.Node)
        node = above
    return node


def _scales(node: fx.Node) -> bool:
    """Whether a node multiplies by, or divides by, a known number of common size."""
    if packet(node) not in ("mul", "div") or not is_tensor(node.args[0]):
        return False
    arg = node.args[1]
    try:
        known = float(_value(arg)) if isinstance(arg, fx.Node) else float(arg)  # type: ignore[arg-type]
    except (LookupError, TypeError):
        return False
    if not math.isfinite(known) or known == 0:
        return False
    return abs(known if packet(node) == "mul" else 1 / known) <= LARGE_FACTOR


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
