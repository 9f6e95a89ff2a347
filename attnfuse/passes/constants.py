"""The values of tensors that no input of the graph goes into, computed when it is compiled."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx

from attnfuse.passes.graph import Storage, fake, is_tensor, packet

_MOST_STEPS: Final = 64


def constant(storage: Storage, node: fx.Node, most: int, *, held: bool = True) -> Tensor | None:
    """The node's tensor on the CPU; None where an input, memory or chance goes into it, or a step has more elements than `most`.

    Args:
        held: whether tensors that the graph's module holds count, which may be written to once the graph is compiled; numbers
            that stand in the program count always.
    """
    try:
        steps = _steps_to(storage, node, most, held=held)
        return None if steps is None else _value(steps[0])
    except Exception:
        # a constant that cannot be had here is not known
        return None


def _steps_to(storage: Storage, node: fx.Node, most: int, *, held: bool) -> list[fx.Node] | None:
    """The nodes that a tensor is made by, the last first."""
    steps: list[fx.Node] = []
    todo = [node]
    while todo:
        at = todo.pop()
        if at in steps:
            continue
        overload = at.target
        plain = (at.op == "get_attr" and (held or _is_literal(at))) or (
            isinstance(overload, torch._ops.OpOverload)
            # what somebody else's does is known to nobody else
            and overload.namespace in ("aten", "prims")
            and not overload._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in overload.tags
            and "empty" not in packet(at)
        )
        large = is_tensor(at) and not _is_small(at, most)
        if not plain or large or len(steps) == _MOST_STEPS or (is_tensor(at) and storage.writes(at)):
            return None
        steps.append(at)
        todo.extend(at.all_input_nodes)
    return steps


def _is_literal(node: fx.Node) -> bool:
    """Whether a tensor that the module holds is one that tracing made of numbers: nothing else has it."""
    return all(packet(user) in ("lift_fresh", "lift_fresh_copy") for user in node.users)


def _is_small(node: fx.Node, most: int) -> bool:
    return all(isinstance(size, int) for size in fake(node).shape) and fake(node).numel() <= most


def _value(node: fx.Node) -> Tensor:
    values: dict[fx.Node, Any] = {}

    def value(at: fx.Node) -> Any:
        if at not in values:
            for above in at.all_input_nodes:
                value(above)
            values[at] = _computed(at, values)
        return values[at]

    found = value(node)
    assert isinstance(found, Tensor)
    return found


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        held: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            held = getattr(held, name)
        if isinstance(held, torch.nn.Parameter) or not isinstance(held, torch.Tensor):
            raise LookupError(node.target)
        return held.detach().cpu()
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    args, kwargs = torch.utils._pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
