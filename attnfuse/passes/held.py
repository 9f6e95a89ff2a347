"""The fills of masks that an input of the graph holds where it is looked at, when the graph is compiled.

An additive mask that comes from outside is an addend like any other, until somebody looks: where it holds -inf or finfo.min, a
tier `bias[m, n] != -inf` says what adding it does to a score, and tiles of nothing else are skipped.  What is seen decides only
whether the tier is worth writing; it is true of whatever numbers the next call may pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import fx

from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.views import MOVES
from attnfuse.score import Load, free_vars

__all__ = ["fills_of"]

_PLAIN: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def fills_of(scope: Scope) -> Callable[[Load], frozenset[float]]:
    """Which of -inf and its type's finfo.min a leaf holds that is read by key and gets no gradient; none of those not known."""

    def fills(load: Load) -> frozenset[float]:
        source = scope.table.leaves[load.leaf]
        dtype = fake(source.node).dtype
        read_by_key = "n" in free_vars(load) and source.diagonal is None and dtype.is_floating_point
        if not read_by_key or source.scope.may_require_grad(source.node):
            return frozenset()
        given = _given(source.scope, source.node)
        if given is None:
            return frozenset()
        known = scope.table.fills
        if (given, dtype) not in known:
            known[given, dtype] = _held_by(given, dtype)
        return known[given, dtype]

    return fills


def _given(scope: Scope, node: fx.Node) -> fx.Node | None:
    """The input of the whole graph whose elements a tensor has, if nothing writes to it."""
    while not scope.storage.writes(node):
        if node.op == "placeholder":
            if scope.outer is None:
                return node
            passed = scope.passed(node)
            if passed is None:
                return None
            scope, node = scope.outer, passed
        elif packet(node) in MOVES and is_tensor(node.args[0]):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None
    return None


def _held_by(placeholder: fx.Node, dtype: torch.dtype) -> frozenset[float]:
    """The fills among the elements that the graph is compiled for, as they are in a type."""
    held = getattr(placeholder.meta.get("grapharg"), "example", None)
    if not isinstance(held, torch.Tensor) or type(held) not in _PLAIN or held.is_meta or not held.is_floating_point():
        return frozenset()
    cast = held.detach().to(dtype)
    return frozenset(fill for fill in (-math.inf, torch.finfo(dtype).min) if bool((cast == fill).any()))
