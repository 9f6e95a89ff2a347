"""In-place arithmetic on a fresh tensor that nothing else aliases, written out of place: `scores += mask` reads as a sum.

That changes no value and no gradient.  Any other write stays as it is, and the passes keep clear of what it touches.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.graph import Storage, aten, fake, is_tensor, packet

_SETTLED: Final = ("add_", "sub_", "mul_", "div_", "masked_fill_", "tril_", "triu_")
"""The arithmetic of scores and masks; autocast leaves all of these alone."""


def settle(graph: fx.Graph) -> int:
    """Rewrites what can be rewritten, in graph order; returns how many writes that were."""
    storage = Storage(graph)
    replaced = 0
    for node in list(graph.nodes):
        functional = _functional(node)
        if functional is None:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        root = storage.root(source)
        family = storage.members[root]
        if root.op != "call_function" or any(m is not root and _functional(m) is None for m in family):
            continue
        late = [u for m in family for u in m.users if u is not node and storage.position[u] > storage.position[node]]
        with graph.inserting_before(node):
            new = graph.call_function(functional, node.args, node.kwargs)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        for user in late:
            for member in family:
                user.replace_input_with(member, new)
        graph.erase_node(node)
        storage.renew(node, new)
        replaced += 1
    return replaced


def _functional(node: fx.Node) -> Any | None:
    """The operator without the write, if the node writes its first argument and the result has that argument's type and shape."""
    name = packet(node)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable or not name.endswith("_"):
        return None
    if name not in _SETTLED or not node.args or not is_tensor(node.args[0]):
        return None
    overload = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if overload is None or not _keeps_type(node, source):
        return None
    return overload


def _keeps_type(node: fx.Node, source: fx.Node) -> bool:
    """Whether promotion and broadcasting leave the first argument's type and shape as they are."""
    own = fake(source)
    for arg in (*node.args[1:], *node.kwargs.values()):
        if is_tensor(arg):
            assert isinstance(arg, fx.Node)
            other = fake(arg)
            if other.dim() > own.dim() or (other.dtype != torch.bool and torch.result_type(own, other) != own.dtype):
                return False
        elif isinstance(arg, int | float) and torch.result_type(own, arg) != own.dtype:
            return False
    return True
