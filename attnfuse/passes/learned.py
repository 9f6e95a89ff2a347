"""How large the numbers of a leaf are: what is learned, and what is made of constants.

A parameter that asks for a gradient and holds common numbers when it is looked at, and what is gathered or interpolated from it
(position tables, slopes), is taken to stay as common as the scores, which come out of parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.views import VIEWS
from attnfuse.score import Load

__all__ = ["COMMON", "greatest_of"]

# What scores, and numbers as common as they, are taken to be at most; it fits float16.
COMMON: Final = 2.0**15
_MOVES: Final = (
    *VIEWS,
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "gather",
    "index",
    "index_select",
    "take_along_dim",
    "cat",
)
_MEANS: Final = ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
# Constants of more elements, or of more steps, are not computed.
_MOST_ELEMENTS: Final = 1 << 14
_MOST_STEPS: Final = 64


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
        elif name in _MOVES or name in _MEANS or name == "embedding":
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
        steps = _steps_to(scope, node)
        try:
            known[node] = None if steps is None else _largest(scope, steps)
        except Exception:
            # a constant that cannot be had here is not known
            known[node] = None
    return known[node]


def _steps_to(scope: Scope, node: fx.Node) -> list[fx.Node] | None:
    """The nodes that a tensor is made by, the last first, where no input, no memory and no chance goes into it."""
    steps: list[fx.Node] = []
    todo = [node]
    while todo:
        at = todo.pop()
        if at in steps:
            continue
        overload = at.target
        plain = at.op == "get_attr" or (
            isinstance(overload, torch._ops.OpOverload)
            and not overload._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in overload.tags
            and "empty" not in packet(at)
        )
        large = is_tensor(at) and not _is_small(at)
        if not plain or large or len(steps) == _MOST_STEPS or (is_tensor(at) and scope.storage.writes(at)):
            return None
        steps.append(at)
        todo.extend(at.all_input_nodes)
    return steps


def _largest(scope: Scope, steps: list[fx.Node]) -> float:
    values: dict[fx.Node, Any] = {}

    def value(at: fx.Node) -> Any:
        if at not in values:
            for above in at.all_input_nodes:
                value(above)
            values[at] = _computed(scope, at, values)
        return values[at]

    found = value(steps[0])
    return float(found.abs().max()) if found.numel() else 0.0


def _is_small(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in fake(node).shape) and fake(node).numel() <= _MOST_ELEMENTS


def _computed(scope: Scope, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        held: Any = scope.module
        for name in str(node.target).split("."):
            held = getattr(held, name)
        if isinstance(held, torch.nn.Parameter) or not isinstance(held, torch.Tensor):
            raise LookupError(node.target)
        return held.detach().cpu()
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
