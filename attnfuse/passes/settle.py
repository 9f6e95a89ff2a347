"""The graph without what hides its meaning: what nobody reads, operators that only ask a tensor for its type, and in-place
arithmetic on a fresh tensor that nothing else aliases (`scores += mask` reads as a sum).

That changes no value and no gradient.  Any other write stays as it is, and the passes keep clear of what it touches.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.graph import Storage, aten, bound, fake, is_tensor, mark_no_grad, packet
from attnfuse.passes.rules import RULES
from attnfuse.passes.views import cuts_gradient

_SETTLED: Final = ("add_", "sub_", "mul_", "div_", "masked_fill_", "tril_", "triu_", "copy_")
"""The arithmetic of scores and masks; autocast leaves all of these alone."""


def settle(graph: fx.Graph) -> int:
    """Rewrites what can be rewritten, in graph order; returns how many writes that were."""
    mark_no_grad(graph)
    _take_out_idle_dropout(graph)
    _take_out_idle_views(graph)
    _name_likes(graph)
    _drop_unread(graph)
    replaced = 0
    written = [node for node in graph.nodes if _functional(node) is not None]
    if not written:
        return 0
    storage = Storage(graph)
    for node in written:
        functional = _functional(node)
        if functional is None:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        root = storage.root(source)
        family = storage.members[root]
        # a view that was taken before a write shows it; one taken after all of them is a view of the result
        last = max(storage.writes(root), default=-1)
        if root.op != "call_function" or not is_tensor(root) or storage.entangled(root):
            continue
        if cuts_gradient(node) != cuts_gradient(root):
            # a write under no_grad keeps the gradient of what it writes to
            continue
        behind = _views_behind(source, root)
        early = (m for m in family if m is not root and m not in behind and storage.position[m] < last)
        if any(_functional(m) is None and not _is_read_only(m, storage) for m in early):
            continue
        same = [m for m in family if m is source or (m is root and not behind) or _functional(m) is not None]
        late = [u for m in same for u in m.users if u is not node and storage.position[u] > storage.position[node]]
        with graph.inserting_before(node):
            args = (node.args[1],) if functional is aten.clone.default else node.args
            new = graph.call_function(functional, args, node.kwargs)
        new.meta = dict(node.meta)
        wide = _computed_in(node, source)
        if wide is not None and wide != fake(node).dtype:
            new.meta["val"] = fake(node).to(wide)
            storage.include(new, storage.position[node])
            with graph.inserting_before(node):
                new = graph.call_function(aten.to.dtype, (new, fake(node).dtype))
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        for user in late:
            for member in same:
                user.replace_input_with(member, new)
        graph.erase_node(node)
        storage.renew(node, new)
        replaced += 1
    return replaced


def _is_read_only(view: fx.Node, storage: Storage) -> bool:
    """Whether a view is only read, and before the next write, so that it never shows one. Views of it are asked by themselves."""
    at = storage.position[view]
    next_write = next((w for w in storage.writes(view) if w > at), None)
    return next_write is not None and all(storage.position[user] < next_write for user in view.users)


def _views_behind(source: fx.Node, root: fx.Node) -> list[fx.Node]:
    """The views from the tensor that is written back to the one that owns the storage, if nobody else reads what they are of."""
    behind, at = [], source
    while at is not root and _functional(at) is None:
        above = at.args[0] if at.args else None
        if not isinstance(above, fx.Node) or set(above.users) != {at} or not _is_whole(at, above):
            return []
        behind.append(at)
        at = above
    return behind if at is root else []


def _is_whole(view: fx.Node, source: fx.Node) -> bool:
    """Whether a view shows all elements of a dense tensor, so that a result of its layout is as large as the tensor."""
    if not is_tensor(view) or not is_tensor(source):
        return False
    a, b = fake(view), fake(source)
    if any(not isinstance(x, int) for t in (a, b) for x in (*t.shape, *t.stride(), t.storage_offset())):
        return False
    return a.numel() == b.numel() and _is_dense(a) and _is_dense(b)


def _is_dense(x: torch.Tensor) -> bool:
    step = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _functional(node: fx.Node) -> Any | None:
    """The operator without the write, if the node writes its first argument and the result has that argument's type and shape."""
    name = packet(node)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable or not name.endswith("_"):
        return None
    if name not in _SETTLED or not node.args or not is_tensor(node.args[0]):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if name == "copy_":
        # a copy of the same layout is another tensor with the same elements
        alike = len(node.args) == 2 and not node.kwargs and _same_layout(source, node.args[1])
        return aten.clone.default if alike and _keeps_gradient(source, node.args[1]) else None
    overload = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    if overload is None or _computed_in(node, source) is None:
        return None
    return overload


def _keeps_gradient(written: fx.Node, copied: Any) -> bool:
    """Whether what is copied was made of the tensor that it is written to, so that it asks for a gradient if that does.

    The result of a write asks for one if the tensor did; without that path, it and what the tensor was made of would get none.
    """
    if not fake(written).dtype.is_floating_point:
        return True
    todo, seen = [copied], set()
    while todo:
        node = todo.pop()
        if node is written:
            return True
        if node in seen or not is_tensor(node) or not fake(node).dtype.is_floating_point:
            continue
        seen.add(node)
        if node.op == "call_function" and packet(node) not in ("", "detach", "detach_") and not cuts_gradient(node):
            todo.extend(node.all_input_nodes)
    return False


def _computed_in(node: fx.Node, source: fx.Node) -> torch.dtype | None:
    """The type in which an in-place operator computes before it casts to its first argument's, or None where that is no wider
    floating-point type, or broadcasting would give another shape."""
    own = fake(source)
    found = own.dtype
    for arg in (*node.args[1:], *node.kwargs.values()):
        if is_tensor(arg):
            assert isinstance(arg, fx.Node)
            other = fake(arg)
            if other.dim() > own.dim():
                return None
            found = torch.promote_types(found, torch.result_type(own, other)) if other.dtype != torch.bool else found
        elif isinstance(arg, int | float):
            found = torch.promote_types(found, torch.result_type(own, arg))
    return found if found == own.dtype or own.dtype.is_floating_point else None


def _drop_unread(graph: fx.Graph) -> None:
    """Takes out tensors that nothing reads, with the writes to them: statistics of the weights that were not asked for."""
    if not any(_is_statistic(n) and not n.users for n in graph.nodes):
        return
    storage = Storage(graph)
    live: set[fx.Node] = set()
    todo = [n for n in graph.nodes if not _may_be_dropped(n, storage)]
    while todo:
        node = todo.pop()
        if node in live:
            continue
        live.add(node)
        todo.extend(node.all_input_nodes)
        if is_tensor(node):
            # what is written to a storage that is read counts as read
            todo.extend(_written_by(storage, node))
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)


def _written_by(storage: Storage, node: fx.Node) -> list[fx.Node]:
    places = set(storage.writes(node))
    return [n for n, at in storage.position.items() if at in places] if places else []


def _is_statistic(node: fx.Node) -> bool:
    """Whether a node is of the kind that may be dropped, or takes a result of such a node apart."""
    if node.op != "call_function":
        return False
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    if packet(node).rstrip("_") not in _STATISTICS:
        return False
    values = node.meta.get("val")
    values = values if isinstance(values, tuple | list) else (values,)
    return bool(values) and all(isinstance(x, torch.Tensor) for x in values)


def _may_be_dropped(node: fx.Node, storage: Storage) -> bool:
    """Whether a node has no effect but on storage that is made in this graph, and draws no random numbers."""
    if not _is_statistic(node) or not isinstance(node.target, torch._ops.OpOverload):
        return _is_statistic(node)
    target = node.target
    written = [
        node.args[i]
        for i, arg in enumerate(target._schema.arguments)
        if arg.alias_info is not None and arg.alias_info.is_write and i < len(node.args)
    ]
    if not target._schema.is_mutable:
        return True
    return bool(written) and all(isinstance(x, fx.Node) and storage.root(x).op == "call_function" for x in written)


_STATISTICS: Final = frozenset(
    {
        *RULES,
        *(
            "softmax",
            "_softmax",
            "log_softmax",
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "std",
            "var",
            "logsumexp",
            "norm",
        ),
        *("matmul", "bmm", "baddbmm", "cat", "stack", "copy", "empty", "new_empty", "empty_like", "fill", "zero"),
        *("gather", "scatter", "scatter_add", "index_put", "index_copy", "index_add", "index_fill", "masked_scatter"),
    }
)
"""Of what people compute beside an attention and do not read: operators that do nothing else than to give their result."""


def _take_out_idle_dropout(graph: fx.Graph) -> None:
    """Dropout that drops nothing is its operand, the same tensor: what is written to the one is seen in the other."""
    for node in list(graph.nodes):
        if packet(node) in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
            args = bound(node)
            if args["train"] is False or (isinstance(args["p"], int | float) and args["p"] == 0):
                node.replace_all_uses_with(args["input"])
                graph.erase_node(node)


def _take_out_idle_views(graph: fx.Graph) -> None:
    """A slice that is all of a tensor is the tensor, `x[:, 0:]`, unless something in the graph changes a shape in place."""
    slices = graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    if not slices or any(_changes_metadata(node) for node in graph.nodes):
        return
    for node in slices:
        source = node.args[0]
        # what is returned, and an input, are things that the caller tells apart
        returned = any(user.op == "output" for x in (node, source) for user in x.users)
        if source.op == "call_function" and not returned and not cuts_gradient(node) and _same_layout(node, source):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _changes_metadata(node: fx.Node) -> bool:
    target = node.target
    return node.op == "call_method" or (
        isinstance(target, torch._ops.OpOverload) and torch.Tag.inplace_view in target.tags
    )


def _same_layout(a: object, b: object) -> bool:
    """Whether two tensors have the same type, sizes and strides, all of them numbers."""
    if not (is_tensor(a) and is_tensor(b)):
        return False
    x, y = fake(a), fake(b)  # type: ignore[arg-type]
    numbers = all(isinstance(n, int) for z in (x, y) for n in (*z.shape, *z.stride(), z.storage_offset()))
    if not numbers or x.dtype != y.dtype or x.device != y.device:
        return False
    return x.shape == y.shape and x.stride() == y.stride() and _is_dense(x)


def _name_likes(graph: fx.Graph) -> None:
    """`x.type_as(y)` and `x.view_as(y)` read no element of y: they become operators that name the type or the sizes."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _LIKES or not packet(node):
            continue
        source, like = node.args
        if node.target is aten.type_as.default:
            arg: Any = fake(like).dtype
            known = fake(source).device == fake(like).device
        else:
            arg = list(fake(like).shape)
            known = all(isinstance(size, int) for size in arg)
        if not known:
            continue
        with graph.inserting_before(node):
            new = graph.call_function(_LIKES[node.target], (source, arg))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


_LIKES: Final[dict[Any, Any]] = {
    aten.type_as.default: aten.to.dtype,
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}
