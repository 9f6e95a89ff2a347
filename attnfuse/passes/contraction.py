"""Every spelling of a product of two tensors as one value: a label a dimension, as in einsum.

`matmul`, `mm`, `bmm`, `baddbmm`, `addmm` and two-operand `einsum` become a `Contraction`; matchers see nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnfuse.passes.graph import bound, is_tensor, packet, shape
from attnfuse.passes.index import Index, same

Labels = tuple[str, ...]
"""One label a dimension; an empty label marks a dimension of size 1 that is broadcast."""


@dataclass(frozen=True)
class Contraction:
    """`alpha·(lhs × rhs) + beta·added`: the sum over `summed` of products; labels that stand in `out` are free."""

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    lhs_labels: Labels
    rhs_labels: Labels
    out_labels: Labels
    summed: str
    added: fx.Node | None = None
    alpha: Any = 1
    beta: Any = 1

    def sides(self) -> tuple[tuple[fx.Node, Labels], tuple[fx.Node, Labels]]:
        """Both operands with their labels."""
        return (self.lhs, self.lhs_labels), (self.rhs, self.rhs_labels)

    def index(self, labels: Labels, values: dict[str, Index]) -> tuple[Index, ...]:
        """The index of an operand (or of the output), given the index of each label."""
        return tuple(values.get(label, ()) for label in labels)


def contraction(node: fx.Node) -> Contraction | None:
    """The node as a Contraction over exactly one label, or None if it is none."""
    build = _FORMS.get(packet(node))
    return build(node) if build else None


def _matmul(node: fx.Node) -> Contraction | None:
    args = bound(node)
    lhs, rhs = args["self"], args["other" if "other" in args else "mat2"]
    return _product(node, lhs, rhs)


def _product(node: fx.Node, lhs: fx.Node, rhs: fx.Node, **extra: Any) -> Contraction | None:
    left, right, out = shape(lhs), shape(rhs), shape(node)
    if len(left) < 2 or len(right) < 2:
        return None
    batch = [f"x{i}" for i in range(len(out) - 2)]

    def labels(sizes: tuple[Any, ...], last: tuple[str, str]) -> Labels:
        names = []
        for at, size in enumerate(sizes[:-2]):
            dim = at + len(batch) - (len(sizes) - 2)
            names.append("" if same(size, 1) and not same(out[dim], 1) else batch[dim])
        return (*names, *last)

    return Contraction(
        node,
        lhs,
        rhs,
        labels(left, ("row", "sum")),
        labels(right, ("sum", "column")),
        (*batch, "row", "column"),
        "sum",
        **extra,
    )


def _badd(node: fx.Node) -> Contraction | None:
    args = bound(node)
    first, second = ("batch1", "batch2") if "batch1" in args else ("mat1", "mat2")
    return _product(node, args[first], args[second], added=args["self"], alpha=args["alpha"], beta=args["beta"])


def _einsum(node: fx.Node) -> Contraction | None:
    args = bound(node)
    equation, tensors = args["equation"].replace(" ", ""), args["tensors"]
    if len(tensors) != 2 or "->" not in equation or not all(map(is_tensor, tensors)):
        return None
    inputs, out = equation.split("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    ranks = [len(shape(t)) for t in tensors]
    # an ellipsis stands for the same trailing batch labels everywhere
    width = max((r - len(t) + 3 for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    dots = [f"x{i}" for i in range(width)]
    expanded: list[list[str]] = []
    for term, rank in zip((*terms, out), (*ranks, len(shape(node))), strict=True):
        head, _, tail = term.partition("...")
        middle = dots[width - (rank - len(head) - len(tail)) :] if "..." in term else []
        expanded.append([*head, *middle, *tail])
    lhs, rhs, result = expanded
    if any(len(set(x)) != len(x) for x in expanded):
        return None
    summed = [x for x in dict.fromkeys((*lhs, *rhs)) if x not in result]
    if len(summed) != 1 or summed[0] not in lhs or summed[0] not in rhs:
        return None
    left_sum, right_sum = (shape(t)[x.index(summed[0])] for t, x in zip(tensors, (lhs, rhs), strict=True))
    if not same(left_sum, right_sum):
        return None
    out_sizes = dict(zip(result, shape(node), strict=True))

    def marked(labels: list[str], tensor: fx.Node) -> Labels:
        return tuple(
            "" if same(size, 1) and label in out_sizes and not same(out_sizes[label], 1) else label
            for label, size in zip(labels, shape(tensor), strict=True)
        )

    return Contraction(
        node, tensors[0], tensors[1], marked(lhs, tensors[0]), marked(rhs, tensors[1]), tuple(result), summed[0]
    )


_FORMS = {"matmul": _matmul, "mm": _matmul, "bmm": _matmul, "baddbmm": _badd, "addmm": _badd, "einsum": _einsum}
