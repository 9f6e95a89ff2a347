"""Biases that depend on q or k: their products with something else, gathered by distance (DeBERTa, SEW-D)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from torch import fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.peel import LARGE_FACTOR
from attnfuse.passes.views import VIEWS
from attnfuse.score import Load
from attnfuse.templates.affine import constant

__all__ = ["dependent"]

_VIEWED: Final = (*VIEWS, "to", "_to_copy", "contiguous", "clone")
_MOVES: Final = (*_VIEWED, "gather", "index", "index_select", "take_along_dim")


def dependent(scope: Scope, score: Contraction) -> Callable[[Load], bool]:
    """Whether a leaf is made of products of q or k, whose numbers are taken for as common as the scores: none is finfo.min."""
    factors = {_origin(score.lhs, scope), _origin(score.rhs, scope)}

    def made(node: fx.Node) -> bool:
        todo = [node]
        for at in todo:
            found, name = contraction(at), packet(at)
            if found is not None:
                if not factors & {_origin(found.lhs, scope), _origin(found.rhs, scope)} or found.added is not None:
                    return False
            elif name in _MOVES or _scales(at, scope):
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
        return source.scope is scope and not scope.storage.writes(source.node) and made(source.node)

    return of_leaf


def _origin(node: fx.Node, scope: Scope) -> fx.Node:
    """What a factor is a view or a multiple of."""
    while packet(node) in _VIEWED or _scales(node, scope):
        above = node.args[0]
        assert isinstance(above, fx.Node)
        node = above
    return node


def _scales(node: fx.Node, scope: Scope) -> bool:
    """Whether a node multiplies by, or divides by, a known number of common size."""
    if packet(node) not in ("mul", "div") or not is_tensor(node.args[0]):
        return False
    arg = node.args[1]
    if isinstance(arg, fx.Node):
        known = constant(scope.lifter.lift(arg, ())) if is_tensor(arg) and not fake(arg).dim() else None
    else:
        known = float(arg) if isinstance(arg, int | float) else None
    if known is None or not math.isfinite(known) or known == 0:
        return False
    return abs(known if packet(node) == "mul" else 1 / known) <= LARGE_FACTOR
