"""Attention whose heads are mixed, by a matrix over the heads' scores, their weights, or both (talking heads): `mixed_heads`.

Asked of a softmax that is no attention by itself. From it up to the product of queries and keys, and down to the product with the
values, there may be nothing but what mixes heads and what works on each score or weight by itself.
"""

from __future__ import annotations

from torch import fx

from attnfuse.passes.contraction import contraction
from attnfuse.passes.graph import bound, fake, is_tensor, packet, shape
from attnfuse.passes.index import same
from attnfuse.passes.peel import Miss, score_input
from attnfuse.passes.views import PERMUTATIONS, permutation

__all__ = ["mixed_heads"]

Axes = tuple[str, ...]
"""What the dimensions of a tensor are: `keys`, `mixed` if a matrix sums over it or made it, else a name of its own."""

_SAME = frozenset({"to", "_to_copy", "contiguous", "clone", "alias", "dropout"})
_POINTWISE = frozenset({"add", "sub", "mul", "div", "masked_fill", "where"})


def mixed_heads(softmax: fx.Node) -> Miss | None:
    """AF038 at the first operator that mixes heads, if the softmax is an attention's but for such operators; else None."""
    source, dim = score_input(softmax)
    axes = tuple("keys" if d == dim else str(d) for d in range(len(shape(source))))
    above = _above(source, axes)
    if above is None:
        return None
    scores, queries = above
    weights = _below(softmax, axes, queries)
    if weights is None or not (scores or weights):
        return None
    first = (scores[::-1] + weights)[0]
    mixed = [what for what, found in (("scores", scores), ("weights", weights)) if found]
    return Miss("AF038", first, " and ".join(mixed))


def _above(node: fx.Node, axes: Axes) -> tuple[list[fx.Node], str] | None:
    """What mixes heads above a tensor with these axes, from below, and the queries' axis in the product that it comes from."""
    found: list[fx.Node] = []
    while True:
        mix = _mix(node)
        if mix is not None and axes[mix[2]] != "keys":
            source, own, out = mix
            if "mixed" in axes and axes[out] != "mixed":
                return None
            found.append(node)
            axes = tuple("mixed" if d == own else axes[_place(d, own, out)] for d in range(len(axes)))
            node = source
        elif contraction(node) is not None:
            queries = _queries(node, axes)
            return (found, queries) if queries else None
        else:
            step = _above_each(node)
            if step is None:
                return None
            node, order = step
            axes = tuple(axes[order.index(d)] for d in range(len(axes)))


def _below(node: fx.Node, axes: Axes, queries: str) -> list[fx.Node] | None:
    """What mixes heads between weights with these axes and their product with the values; None if there is no such product."""
    found: list[fx.Node] = []
    while True:
        users = [u for u in node.users if u.users or u.op == "output" or packet(u).endswith("_")]
        if len(users) != 1:
            return None
        (user,) = users
        mix, product = _mix(user), contraction(user)
        if mix is not None and mix[0] is node and axes[mix[1]] != "keys":
            _, own, out = mix
            if axes[own] == queries:
                return None
            found.append(user)
            axes = tuple("mixed" if d == out else axes[_place(d, out, own)] for d in range(len(axes)))
        elif product is not None:
            own_labels = [labels for operand, labels in product.sides() if operand is node]
            if len(own_labels) != 1 or (product.added is not None and product.beta != 0):
                return None
            (labels,) = own_labels
            value_labels = next(labels for operand, labels in product.sides() if operand is not node)
            over_keys = axes[labels.index(product.summed)] == "keys"
            return found if over_keys and labels[axes.index(queries)] not in value_labels else None
        else:
            step = _above_each(user)
            if step is None or step[0] is not node or packet(user) in _POINTWISE:
                return None
            axes = tuple(axes[d] for d in step[1])
        node = user


def _queries(node: fx.Node, axes: Axes) -> str:
    """The axis of the queries, if the node is a product with the keys on one side only and what is mixed on both; else nothing."""
    product = contraction(node)
    assert product is not None
    names = dict(zip(product.out_labels, axes, strict=True))
    sides = [{names[x] for x in labels if x in names} for _, labels in product.sides()]
    if sum("keys" in side for side in sides) != 1:
        return ""
    keys, other = sorted(sides, key=lambda side: "keys" not in side)
    if "mixed" in names.values() and not ("mixed" in keys and "mixed" in other):
        return ""
    rows = other - keys
    return rows.pop() if len(rows) == 1 else ""


def _place(d: int, gone: int, new: int) -> int:
    """Where dimension d of a tensor stands in another, which has dimension `gone` at `new`."""
    rest = d - (d > gone)
    return rest + (rest >= new)


def _mix(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What is multiplied with a matrix, along which of its dimensions, and which of the result's takes that one's place."""
    name = packet(node)
    if name == "linear":
        source = bound(node)["input"]
        return source, len(shape(source)) - 1, len(shape(node)) - 1
    if name == "conv2d":
        args = bound(node)
        alone = all(same(x, 1) for x in shape(args["weight"])[2:]) and args["groups"] == 1
        whole = all(x == 0 for x in args["padding"]) and all(x == 1 for x in args["stride"])
        return (args["input"], 1, 1) if alone and whole and len(shape(node)) == 4 else None
    product = contraction(node)
    if product is None or (product.added is not None and product.beta != 0):
        return None
    for (_, matrix), (source, labels) in (product.sides(), product.sides()[::-1]):
        if len(matrix) != 2 or len(labels) < 3 or "" in (*matrix, *labels):
            continue
        new = next(x for x in matrix if x != product.summed)
        if [x for x in labels if x != product.summed] == [x for x in product.out_labels if x != new]:
            return source, labels.index(product.summed), product.out_labels.index(new)
    return None


def _above_each(node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """The operand whose elements a node gives, each by itself, and which of its dimensions each of the node's is."""
    name = packet(node)
    if name in PERMUTATIONS or name in _SAME:
        source = node.args[0]
        order = permutation(node) if name in PERMUTATIONS else list(range(len(shape(node))))
        return (source, order) if isinstance(source, fx.Node) else None
    if name in _POINTWISE:
        wide = [x for x in node.all_input_nodes if is_tensor(x) and _is_alike(x, node)]
        return (wide[0], list(range(len(shape(node))))) if len(wide) == 1 else None
    return None


def _is_alike(x: fx.Node, node: fx.Node) -> bool:
    """Whether a tensor holds a number for each of a node's elements."""
    sizes = shape(x), shape(node)
    return fake(x).dtype.is_floating_point and len(sizes[0]) == len(sizes[1]) and all(map(same, *sizes))
