"""How large the numbers of a leaf are: what is learned, and what is made of constants.

A parameter that asks for a gradient, and what is gathered or interpolated from it (position tables, slopes), is taken to be as
common as the scores, which come out of parameters too; a mask has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.graph import fake, is_tensor, packet
from attnfuse.passes.lift import Scope
from attnfuse.passes.views import VIEWS
from attnfuse.score import Load

__all__ = ["COMMON", "greatest_of"]

# What scores, and numbers as common as they, are taken to be at most.
COMMON: Final = 2.0**20
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
    """The greatest magnitude that a leaf of floating-point numbers holds; 0 for one of other numbers.

    Args:
        is_common: whether a leaf is known to be as common as the scores for another reason.
    """

    def greatest(load: Load) -> float:
        source = scope.table.leaves[load.leaf]
        if not fake(source.node).dtype.is_floating_point:
            return 0.0
        if is_common(load) or _is_learned(source.scope, source.node):
            return COMMON
        known = _constant(source.scope, source.node)
        return scope.lifter.greatest(load) if known is None else float(known.abs().max()) if known.numel() else 0.0

    return greatest


def _is_learned(scope: Scope, node: fx.Node) -> bool:
    """Whether a tensor is made of elements of parameters that ask for a gradient, and nothing writes to it."""
    todo = [node]
    for at in todo:
        if scope.storage.writes(at):
            return False
        name = packet(at)
        if at.op == "placeholder" and scope.outer is None:
            given = at.meta.get("example_value")
            if not isinstance(given, torch.nn.Parameter) or not given.requires_grad:
                return False
        elif name in _MOVES or name in _MEANS or name == "embedding":
            moved = at.args[0] if name == "cat" else at.args[:1]
            if not all(map(is_tensor, moved)):  # type: ignore[arg-type]
                return False
            todo.extend(x for x in moved if x not in todo)  # type: ignore[union-attr,misc]
        else:
            return False
    return True


def _constant(scope: Scope, node: fx.Node) -> torch.Tensor | None:
    """The values of a tensor that no input of the graph goes into, on the CPU; None where it is not made so, or large."""
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
        )
        large = is_tensor(at) and not _is_small(at)
        if not plain or large or len(steps) == _MOST_STEPS or (is_tensor(at) and scope.storage.writes(at)):
            return None
        steps.append(at)
        todo.extend(at.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    order = {at: place for place, at in enumerate(scope.module.graph.nodes)}
    try:
        for at in sorted(steps, key=order.__getitem__):
            values[at] = _computed(scope, at, values)
    except Exception:
        # a constant that cannot be had here is not known
        return None
    found = values[node]
    return found if isinstance(found, torch.Tensor) else None


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
