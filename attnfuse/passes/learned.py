"""How large the numbers of a leaf are: what is learned, and what is made of constants.

A parameter that asks for a gradient and holds common numbers when it is looked at, and what is gathered or interpolated from it
(position tables, slopes), is taken to stay as common as the scores, which come out of parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from attnfuse.passes.constants import constant
from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.views import GATHERS, MOVES
from attnfuse.score import Load

__all__ = ["COMMON", "greatest_of"]

# What scores, and numbers as common as they, are taken to be at most; it fits float16.
COMMON: Final = 2.0**15
_PICKS: Final = (*MOVES, *GATHERS, "cat")
_MEANS: Final = ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
# Constants of more elements, or of more steps, are not computed.
_MOST_ELEMENTS: Final = 1 << 14


def greatest_of(scope: Scope, is_common: Callable[[Load], bool] = lambda load: False) -> Callable[[Load], float]:
    """The greatest magnitude that a leaf of floating-point numbers holds, inf where it is not known; 0 for one of other numbers.

    Args:
        is_common: whether a leaf is known to be as common as the scores for another reason.
    """

    def greatest(load: Load) -> float:
        source = scope.table.leaves[load.leaf]
        if not fake(source.node).dtype.is_floating_point:
            return 0.0
        if is_common(load) or _is_learned(source.scope, source.node):
            return COMMON
        known = _largest_constant(source.scope, source.node)
        # what is not known may be infinite, whatever its type
        return math.inf if known is None or math.isnan(known) else known

    return greatest


def _is_learned(scope: Scope, node: fx.Node) -> bool:
    """Whether a tensor is made of elements of parameters that ask for a gradient, and nothing writes to it."""
    todo = [node]
    for at in todo:
        if scope.storage.writes(at):
            return False
        name = packet(at)
        if at.op == "placeholder" and scope.outer is None:
            if not _learns(at):
                return False
        elif name in _PICKS or name in _MEANS or name == "embedding":
            moved = at.args[0] if name == "cat" else at.args[:1]
            if not all(map(is_tensor, moved)):  # type: ignore[arg-type]
                return False
            todo.extend(x for x in moved if x not in todo)  # type: ignore[union-attr,misc]
        else:
            return False
    return True


def _learns(placeholder: fx.Node) -> bool:
    """Whether an input is a parameter that asks for a gradient, of common numbers: someone may have made one of a mask."""
    given = placeholder.meta.get("example_value")
    if not isinstance(given, torch.nn.Parameter) or not given.requires_grad:
        return False
    held = getattr(placeholder.meta.get("grapharg"), "example", None)
    if not isinstance(held, torch.Tensor) or isinstance(held, FakeTensor) or held.is_meta:
        return False
    return not held.numel() or bool((held.detach().abs() <= COMMON).all())


def _largest_constant(scope: Scope, node: fx.Node) -> float | None:
    """The greatest magnitude in a tensor that no input of the graph goes into; None where it is not made so, or large."""
    known = scope.constants
    if node not in known:
        found = constant(scope.storage, node, _MOST_ELEMENTS)
        known[node] = None if found is None else float(found.abs().max()) if found.numel() else 0.0
    return known[node]
