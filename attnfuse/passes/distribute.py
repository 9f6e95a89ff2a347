"""Values under a sum of weights, and under weights times what all keys share: the products come first.

    (w1 - c * w2) @ v                           w1 @ v - c * (w2 @ v)
    (w[:, :, 0] - c * w[:, :, 1]) @ v           out = w @ v[:, :, None];  out[:, :, 0] - c * out[:, :, 1]

Each softmax is then an attention by itself (differential attention, Ye et al. 2024; gates of heads and rows).  `c` is a number, or
a finite tensor that does not depend on the key.  A softmax that is not fused in the end is left as it was, see `join`, among them
small ones: a product more costs more than it saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import fx

from attnfuse.passes.contraction import contraction
from attnfuse.passes.graph import aten, bound, erase, fake, is_tensor, packet, shape
from attnfuse.passes.join import JOINED, Maker, Part, above, aligned, cast, may_move
from attnfuse.passes.views import VIEWS

__all__ = ["SUMMED", "distribute"]

SUMMED: Final = "attnfuse_summed"
"""In a softmax's meta where its weights were added to others': a product more was made for it."""

_WEIGHTS: Final = (*VIEWS, "to", "_to_copy", "dropout", "select", "contiguous", "clone")


@dataclass(frozen=True)
class _Term:
    """Weights, or one entry `at` along `dim` of them, and what is done to them: (operator, factor) from the inside out."""

    weights: fx.Node
    dim: int | None = None
    at: int = 0
    steps: tuple[tuple[str, Any], ...] = ()

    def then(self, name: str, factor: Any = None) -> _Term:
        return _Term(self.weights, self.dim, self.at, (*self.steps, (name, factor)))


def distribute(graph: fx.Graph, leave: Container[str] = ()) -> int:
    """Makes a product of each term of the weights, but for softmaxes named in `leave`; returns how many sums that were."""
    count = 0
    for node in list(graph.nodes):
        found = contraction(node)
        if found is None or found.alpha != 1 or (found.added is not None and found.beta != 0):
            continue
        for (weights, labels), (values, value_labels) in (found.sides(), found.sides()[::-1]):
            part = Part(found, weights, values, value_labels, of_values=True)
            of_weights = labels == (*found.out_labels[:-1], found.summed) and set(weights.users) == {node}
            if of_weights and weights is not values and {*value_labels} <= {*part.joinable, ""}:
                count += _distributed(part, leave)
                break
    return count


def _distributed(part: Part, leave: Container[str]) -> bool:
    product = part.found.node
    inner: list[fx.Node] = []
    terms = list(_terms(part.one, inner))
    if not inner or not all(isinstance(size, int) for x in (part.one, part.other, product) for size in shape(x)):
        return False
    softmaxes = {x for term in terms if (x := _softmax(term.weights)) is not None and _has_scores(x)}
    if (
        not softmaxes
        or any(x.name in leave for x in softmaxes)
        or not _are_whole(terms)
        or not may_move(inner, product)
    ):
        return False
    graph = product.graph
    products: dict[tuple[fx.Node, int | None], fx.Node] = {}
    total: fx.Node | None = None
    with graph.inserting_before(product):
        make = Maker(graph, product)
        values = aligned(make, part)
        for term in terms:
            key = term.weights, term.dim
            if key not in products:
                of = values if term.dim is None else make(aten.unsqueeze.default, values, term.dim)
                products[key] = make(aten.matmul.default, cast(make, term.weights), of)
            out = products[key] if term.dim is None else make(aten.select.int, products[key], term.dim, term.at)
            negative = sum(name == "neg" for name, _ in term.steps) % 2 == 1
            for name, factor in term.steps:
                if name != "neg":
                    out = make(_STEPS[name, isinstance(factor, fx.Node)], out, factor)
            if total is None:
                total = make(aten.neg.default, out) if negative else out
            else:
                total = make(aten.sub.Tensor if negative else aten.add.Tensor, total, out)
    assert total is not None
    if fake(total).stride() != fake(product).stride():
        # somebody may see them
        erase(graph, [total])
        return False
    product.replace_all_uses_with(total)
    erase(graph, [product])
    for softmax in softmaxes:
        softmax.meta[JOINED] = softmax.name
        if len(products) > 1 or any(term.dim is not None for term in terms):
            softmax.meta[SUMMED] = True
    return True


def _are_whole(terms: Sequence[_Term]) -> bool:
    """Whether of each tensor of which entries are summed all entries are, along one dimension, and nobody else reads one."""
    reads = Counter(term.weights for term in terms if term.dim is not None)
    entries = {weights: {(t.dim, t.at) for t in terms if t.weights is weights} for weights in reads}
    return all(
        len(weights.users) == count and entries[weights] == {(dim, at) for at in range(int(shape(weights)[dim]))}
        for weights, count in reads.items()
        for dim in (next(t.dim for t in terms if t.weights is weights and t.dim is not None),)
    )


_STEPS: Final = {
    ("mul", True): aten.mul.Tensor,
    ("mul", False): aten.mul.Scalar,
    ("div", True): aten.div.Tensor,
    ("div", False): aten.div.Scalar,
}


def _terms(node: fx.Node, inner: list[fx.Node]) -> Iterator[_Term]:
    """The terms of a sum whose parts nobody else reads; notes its operators in `inner`."""
    name = packet(node)
    args = bound(node) if name in ("add", "sub", "mul", "div", "neg", "select") else {}
    if args and (len(node.users) > 1 or not fake(node).dtype.is_floating_point):
        yield _Term(node)
    elif name in ("add", "sub") and args["alpha"] == 1 and all(_is_alike(args[x], node) for x in ("self", "other")):
        inner.append(node)
        yield from _terms(args["self"], inner)
        for term in _terms(args["other"], inner):
            yield term.then("neg") if name == "sub" else term
    elif name == "neg":
        inner.append(node)
        for term in _terms(args["self"], inner):
            yield term.then("neg")
    elif name in ("mul", "div") and (pair := _factor(node, args)) is not None:
        inner.append(node)
        for term in _terms(pair[0], inner):
            yield term.then(name, pair[1])
    elif name == "select" and (entry := _entry(args)) is not None:
        inner.append(node)
        yield entry
    else:
        yield _Term(node)


def _entry(args: dict[str, Any]) -> _Term | None:
    """One entry along a dimension before those of rows and keys, of a tensor that nothing but selections read."""
    source, at = args["self"], args["index"]
    dim = args["dim"] % len(shape(source))
    size = shape(source)[dim]
    known = dim < len(shape(source)) - 2 and isinstance(at, int) and isinstance(size, int)
    return _Term(source, dim, at % size) if known and all(packet(x) == "select" for x in source.users) else None


def _is_alike(arg: object, node: fx.Node) -> bool:
    return is_tensor(arg) and shape(arg) == shape(node) and fake(arg).dtype == fake(node).dtype  # type: ignore[arg-type]


def _factor(node: fx.Node, args: dict[str, Any]) -> tuple[fx.Node, Any] | None:
    """The weights, and the factor or divisor that is the same for all keys."""
    pairs = [(args["self"], args["other"]), (args["other"], args["self"])]
    for weights, factor in pairs[:1] if packet(node) == "div" else pairs:
        if args.get("rounding_mode") is not None or not _is_alike(weights, node):
            continue
        if not is_tensor(factor):
            return (weights, factor) if isinstance(factor, int | float) else None
        if not shape(factor) or shape(factor)[-1] == 1:
            return weights, factor
    return None


def _has_scores(softmax: fx.Node) -> bool:
    """Whether a product goes into a softmax over pairs of rows and keys, of any shape."""
    source = bound(softmax)["self"]
    while len(shape(source)) > 2:
        if any(contraction(x) is not None for x in above(source)):
            return True
        if packet(source) not in VIEWS:
            return False
        source = source.args[0]
    return False


def _softmax(weights: fx.Node) -> fx.Node | None:
    """The softmax over the last dimension that weights are the result of."""
    while packet(weights) in _WEIGHTS and is_tensor(weights.args[0]):
        weights = weights.args[0]  # type: ignore[assignment]
    if packet(weights) not in ("softmax", "_softmax"):
        return None
    last = len(shape(weights)) - 1
    return weights if bound(weights)["dim"] % (last + 1) == last else None
