"""Dynamo's graphs: what their nodes are called and hold, what in them runs under `vmap`, and what no retrace would keep."""

from __future__ import annotations

from typing import Final

import torch
from torch import fx
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["VMAP_OUT", "NormaliseError", "batched", "called", "module_of", "name_of", "outdates", "recorded", "refuse"]

# Between the first two of these a graph runs under vmap; a result comes out by the last.
_VMAP_ENTER, _VMAP_EXIT, _VMAP_IN, VMAP_OUT = (
    predispatch._vmap_increment_nesting,
    predispatch._vmap_decrement_nesting,
    predispatch._add_batch_dim,
    predispatch._remove_batch_dim,
)
_VMAP: Final = (_VMAP_ENTER, _VMAP_EXIT, _VMAP_IN, VMAP_OUT, predispatch.lazy_load_decompositions)

_STORAGE_WRITES: Final = frozenset({"set_", "resize_", "resize_as_", "resize_storage_bytes_"})
_METADATA_WRITES: Final = frozenset(
    {
        "as_strided_",
        "detach_",
        "rename_",
        "requires_grad_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    }
)


class NormaliseError(Exception):
    """The graph cannot be retraced exactly and has to be compiled as it stands.

    `code` is AF042 if a tensor subclass stands in the way, else AF041; `reason` is a clause that says what does.
    """

    def __init__(self, reason: str, code: str = "AF041") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


def outdates(gm: fx.GraphModule) -> bool:
    """Whether something in the graph or in a body says by its name that it outdates what Dynamo recorded, or that no retrace
    makes what Dynamo recorded (tensors of inference mode)."""
    bodies = (module for module in gm.modules() if isinstance(module, fx.GraphModule))
    names = (_METADATA_WRITES - {"requires_grad_"}) | {"_enter_inference_mode"}
    return any(name_of(n) in names for body in bodies for n in body.graph.nodes)


def refuse(gm: fx.GraphModule) -> None:
    """Raise for what is known to be lost or changed by a retrace, in the graph or in a body."""
    # Their records show them as they are at the end, and nothing computes them anew. An in-place operator returns the same tensor.
    fixed: set[int] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or isinstance(node.target, HigherOrderOperator):
            fixed.update(id(x) for x in pytree.tree_leaves(recorded(node)) if isinstance(x, torch.Tensor))
        for value in pytree.tree_leaves(recorded(node)):
            if isinstance(value, torch.Tensor) and (is_traceable_wrapper_subclass(value) or value.is_nested):
                raise NormaliseError(f"`{node}` is a {type(value).__name__}", code="AF042")
        name = name_of(node)
        if node.op == "call_module":
            raise NormaliseError(f"`{node}` calls a module that Dynamo did not look into")
        if node.op == "get_attr" and isinstance(body := getattr(gm, node.target, None), fx.GraphModule):
            refuse(body)
        elif node.target in _VMAP:
            continue
        elif not isinstance(node.target, HigherOrderOperator) and module_of(node.target).startswith("torch._functorch"):
            raise NormaliseError(f"`{node}` is part of a function transform")
        elif name in _STORAGE_WRITES:
            raise NormaliseError(f"`{node}` changes the storage of a tensor")
        elif name in _METADATA_WRITES and any(id(recorded(x)) in fixed for x in node.all_input_nodes[:1]):
            raise NormaliseError(f"`{node}` changes an input's shape or autograd state")


def batched(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes that run under vmap, those that enter and leave it among them.

    Raises NormaliseError where copying them would not do: what they switch, or give, shows outside of them.
    """
    found: set[fx.Node] = set()
    nesting = 0
    for node in gm.graph.nodes:
        nesting += node.target is _VMAP_ENTER
        if nesting or node.target in _VMAP:
            found.add(node)
        nesting -= node.target is _VMAP_EXIT
    for node in found:
        name = name_of(node)
        if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator):
            raise NormaliseError(f"`{node}` stands under vmap")
        if name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "set_inplace_requires_grad_allowed"):
            raise NormaliseError(f"`{node}` switches a mode under vmap")
        if node.target is not VMAP_OUT and any(user not in found for user in node.users):
            raise NormaliseError(f"`{node}` is read outside of vmap")
    return frozenset(found)


def recorded(node: fx.Node) -> object:
    """What Dynamo computed for the node."""
    return node.meta.get("example_value")


def name_of(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return target._opname
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def called(node: fx.Node) -> str:
    """The name of what a node calls, or nothing: an input may be named after anything."""
    return name_of(node) if node.op in ("call_function", "call_method") else ""


def module_of(target: object) -> str:
    return getattr(target, "__module__", None) or ""
