"""Keys and values that come in parts, joined: one product then makes the scores, and one the output.

    cat([q @ k1.mT, q @ k2.mT], -1)             q @ cat([k1, k2], -2).mT, of which each part is a slice
    w[..., :n] @ v1 + w[..., n:] @ v2           w @ cat([v1, v2], -2)

What is done to the scores of each part before they are joined stays (scales, masks). A softmax that is not fused in the end is
not joined: `JOINED` tells which ones were.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import MODE_SWITCHES, Storage, aten, between, bound, erase, fake, is_tensor, packet, shape
from attnfuse.passes.views import cuts_gradient

__all__ = ["JOINED", "Maker", "Part", "above", "aligned", "cast", "join", "may_move"]

JOINED: Final = "attnfuse_joined"
"""In a softmax's meta: its name, if its keys or its values were joined, or its product was made by itself (see `distribute`)."""

_AFTER_THE_SOFTMAX: Final = ("to", "_to_copy", "dropout")


def join(graph: fx.Graph, leave: Container[str] = ()) -> int:
    """Joins the keys and the values of each softmax over the last dimension, but for those named in `leave`; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if packet(node) not in ("softmax", "_softmax") or node.name in leave:
            continue
        last = len(shape(node)) - 1
        if last < 2 or bound(node)["dim"] % (last + 1) != last or not _is_static(node):
            continue
        if _join_keys(node) + _join_values(node):
            node.meta[JOINED] = node.name
            count += 1
    return count


@dataclass(frozen=True)
class Part:
    """A product with one part of the keys, or of the values, `start` being the place of its first key."""

    found: Contraction
    one: fx.Node
    """q or the weights: [batch ..., queries, summed]."""
    other: fx.Node
    """The part: of the keys or of the values."""
    labels: tuple[str, ...]
    of_values: bool = False
    start: int = 0

    @property
    def joinable(self) -> tuple[str, ...]:
        """The labels of the part as [batch ..., keys, depth]."""
        *batch, _, last = self.found.out_labels
        return (*batch, self.found.summed, last) if self.of_values else (*batch, last, self.found.summed)


def _join_keys(softmax: fx.Node) -> bool:
    cat = _joined_scores(softmax)
    if cat is None:
        return False
    parts = []
    for scores in bound(cat)["tensors"]:
        products = [x for x in above(scores) if contraction(x) is not None]
        part = _key_part(products[0]) if len(products) == 1 else None
        if part is None:
            return False
        parts.append(part)
    if any(shape(part.found.node)[-1] == 1 for part in parts):
        # the place of a dimension of size 1 is not seen further up
        return False
    first = parts[0]
    chains = [between(part.found.node, cat) for part in parts]
    moved = sorted({x for chain in chains for x in chain} - {cat})
    operands = {x for part in parts for x in (part.one, part.other)}
    if operands & {*moved, *(part.found.node for part in parts)}:
        # one part is made of the scores of another
        return False
    alike = len({fake(part.found.node).dtype for part in parts}) == 1
    if (
        not alike
        or any(part.one is not first.one for part in parts)
        or not may_move((*moved, *(p.found.node for p in parts)), cat)
    ):
        return False
    for node in moved:
        cat.prepend(node)
    graph = softmax.graph
    with graph.inserting_before(moved[0] if moved else cat):
        make = Maker(graph, first.found.node)
        keys = make(aten.cat.default, [aligned(make, p) for p in parts], -2)
        scores = make(aten.matmul.default, cast(make, first.one), make(aten.transpose.int, keys, -2, -1))
        start = 0
        for part in parts:
            size = shape(part.found.node)[-1]
            assert isinstance(size, int)
            own = make(aten.slice.Tensor, scores, -1, start, start + size)
            part.found.node.replace_all_uses_with(own)
            start += size
    erase(graph, [part.found.node for part in parts])
    return True


def _join_values(softmax: fx.Node) -> bool:
    weights = softmax
    while True:
        parts = [part for user in weights.users for part in _value_parts(user, weights)]
        below = [x for x in weights.users if packet(x) in _AFTER_THE_SOFTMAX and x.args[0] is weights]
        if parts or len(below) != 1:
            break
        weights = below[0]
    parts.sort(key=lambda part: part.start)
    total = _total([part.found.node for part in parts])
    ends = [part.start + int(shape(part.one)[-1]) for part in parts]
    tiled = [part.start for part in parts] == [0, *ends[:-1]]
    if total is None or not tiled or ends[-1] != shape(weights)[-1]:
        return False
    nodes = [x for part in parts for x in (part.found.node, *between(part.found.node, total))]
    if not may_move(nodes, total):
        return False
    graph = softmax.graph
    with graph.inserting_before(total):
        make = Maker(graph, total)
        values = make(aten.cat.default, [aligned(make, part) for part in parts], -2)
        out = make(aten.matmul.default, cast(make, weights), values)
    total.replace_all_uses_with(out)
    erase(graph, [total])
    return True


class Maker:
    """Makes nodes that stand for another one, with their values."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.like = graph, like

    def __call__(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), fake)
        with fake(self.like).fake_mode, torch._C._DisableAutocast():  # type: ignore[attr-defined]
            value = target(*values[0], **values[1])
        node.meta = {**self.like.meta, "val": value}
        return node


def _is_static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in shape(node))


def above(scores: fx.Node) -> Iterator[fx.Node]:
    """The node and what goes into it through tensors of its shape, as far as the products among them."""
    todo, seen = [scores], set()
    while todo:
        node = todo.pop()
        if node in seen or not is_tensor(node) or shape(node) != shape(scores):
            continue
        seen.add(node)
        yield node
        if contraction(node) is None:
            todo.extend(node.all_input_nodes)


def _joined_scores(softmax: fx.Node) -> fx.Node | None:
    """The one node above the softmax that joins, along the keys, tensors that products go into."""
    source = bound(softmax)["self"]
    found = [
        x for x in above(source) if packet(x) == "cat" and bound(x)["dim"] % len(shape(x)) == len(shape(source)) - 1
    ]
    found = [x for x in found if any(contraction(y) is not None for part in bound(x)["tensors"] for y in above(part))]
    return found[0] if len(found) == 1 else None


def _key_part(product: fx.Node) -> Part | None:
    found = contraction(product)
    assert found is not None
    keys = found.out_labels[-1]
    for (one, labels), (other, other_labels) in (found.sides(), found.sides()[::-1]):
        if keys in other_labels and labels == (*found.out_labels[:-1], found.summed):
            return _checked(Part(found, one, other, other_labels))
    return None


def _value_parts(user: fx.Node, weights: fx.Node) -> Iterator[Part]:
    """The products with values of a slice of the weights."""
    args = bound(user) if packet(user) == "slice" else {}
    if not args or args["self"] is not weights or args["dim"] % len(shape(user)) != len(shape(user)) - 1:
        return
    size, start = shape(weights)[-1], args["start"] or 0
    if args["step"] != 1 or not isinstance(start, int) or not isinstance(size, int):
        return
    for product in user.users:
        found = contraction(product)
        if found is None:
            continue
        for (one, labels), (other, other_labels) in (found.sides(), found.sides()[::-1]):
            if one is user and other is not user and labels == (*found.out_labels[:-1], found.summed):
                part = _checked(
                    Part(found, one, other, other_labels, True, min(start + size if start < 0 else start, size))
                )
                if part is not None:
                    yield part


def _checked(part: Part) -> Part | None:
    """The part, if it is a plain product and static."""
    plain = part.found.alpha == 1 and (part.found.added is None or part.found.beta == 0)
    static = all(map(_is_static, (part.one, part.other, part.found.node)))
    return part if plain and static and {*part.labels} <= {*part.joinable, ""} else None


def aligned(make: Maker, part: Part) -> fx.Node:
    """The part as [batch ..., keys, depth], expanded where it has no dimension of its own, in the type of its product."""
    node, own, labels = cast(make, part.other), list(part.labels), part.joinable
    sizes = dict(zip(part.found.out_labels, shape(part.found.node), strict=True))
    for at in reversed([at for at, label in enumerate(own) if label not in labels]):
        node = make(aten.squeeze.dim, node, at)
        del own[at]
    order = [own.index(label) for label in labels if label in own]
    if order != sorted(order):
        node = make(aten.permute.default, node, order)
    for at, label in enumerate(labels):
        if label not in own:
            node = make(aten.unsqueeze.default, node, at)
    full = [sizes.get(label, size) for label, size in zip(labels, shape(node), strict=True)]
    return node if list(shape(node)) == full else make(aten.expand.default, node, full)


def cast(make: Maker, node: fx.Node) -> fx.Node:
    """A factor in the type of the product, to which only autocast casts."""
    dtype = fake(make.like).dtype
    return node if fake(node).dtype == dtype else make(aten.to.dtype, node, dtype)


def _total(products: Sequence[fx.Node]) -> fx.Node | None:
    """The sum of all products, if each has no other use."""
    if len(products) < 2 or len(set(products)) != len(products) or len({shape(x) for x in products}) > 1:
        return None
    sums: dict[Any, set[fx.Node]] = {product: {product} for product in products}
    todo = list(products)
    for node in todo:
        if len(sums[node]) == len(products):
            return node
        for user in node.users:
            args = bound(user) if packet(user) == "add" else {}
            a, b = (sums.get(x, set()) for x in (args.get("self"), args.get("other")))
            alike = shape(user) == shape(node) and fake(user).dtype == fake(node).dtype if a and b else False
            if alike and args["alpha"] == 1 and user not in sums and not a & b:
                sums[user] = a | b
                todo.append(user)
        if len(node.users) != 1:
            return None
    return None


def may_move(nodes: Sequence[fx.Node], place: fx.Node) -> bool:
    """Whether pure nodes, read by nothing but each other and `place`, may be computed right before it."""
    inside = {*nodes, place}
    storage = Storage(place.graph)
    first, last = min(storage.position[x] for x in nodes), storage.position[place]
    for node, at in storage.position.items():
        if first < at < last and getattr(node.target, "__name__", "") in MODE_SWITCHES:
            return False
    read = {x for node in nodes for x in (node, *node.all_input_nodes)}
    written = any(first < at < last for x in read for at in storage.writes(x))
    pure = all(packet(x) and not x.target._schema.is_mutable for x in nodes)  # type: ignore[union-attr]
    alike = all(cuts_gradient(x) == cuts_gradient(place) for x in nodes)
    return pure and alike and not written and all(set(x.users) <= inside for x in nodes if x is not place)
