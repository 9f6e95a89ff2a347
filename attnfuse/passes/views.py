"""Views as maps of indices: from an element that a view shows to the element of its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torch import fx

from attnfuse.passes.graph import bound, fake, is_tensor, packet, shape
from attnfuse.passes.index import Digit, Index, Size, Unliftable, product, regroup, same, size_of, value
from attnfuse.score import Const, call

PERMUTATIONS: Final = ("transpose", "permute", "t", "movedim", "mT", "numpy_T")
VIEWS: Final = (
    "unsqueeze",
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "expand",
    "view_as",
    "reshape_as",
    "ravel",
    "expand_as",
    "broadcast_to",
    "repeat",
    "tile",
    "repeat_interleave",
    *PERMUTATIONS,
    "select",
    "slice",
    "narrow",
)
# What gives elements as they are: views, copies and other types of them.
MOVES: Final = (*VIEWS, "to", "_to_copy", "contiguous", "clone")
# What gives elements that a tensor of indices picks.
GATHERS: Final = ("gather", "index", "index_select", "take_along_dim")


def broadcast(node: fx.Node, index: Sequence[Index]) -> tuple[Index, ...]:
    """The index of an operand that is broadcast to the shape that `index` belongs to."""
    sizes = shape(node)
    tail = index[len(index) - len(sizes) :]
    return tuple(() if same(size, 1) else dim for size, dim in zip(sizes, tail, strict=True))


def through(node: fx.Node, index: Sequence[Index]) -> tuple[fx.Node, tuple[Index, ...]]:
    """The source of a view, and the index there of the element that the view shows at `index`."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source):
        raise Unliftable("a view of no tensor")
    args, name = bound(node), packet(node)
    sizes = shape(source)
    rank = len(sizes)
    if name == "unsqueeze":
        dim = args["dim"] % (rank + 1)
        return source, (*index[:dim], *index[dim + 1 :])
    if name in ("expand", "expand_as", "broadcast_to"):
        return source, broadcast(source, index)
    if name in ("repeat", "tile", "repeat_interleave"):
        return source, _unrepeated(name, args, index, sizes)
    if name in PERMUTATIONS:
        return source, permuted(permutation(node), index)
    if name in ("select", "slice", "narrow"):
        return source, _sliced(name, args, index, sizes)
    return source, regroup(index, sizes)


def permutation(node: fx.Node) -> list[int]:
    """Which dimension of its source each dimension of a permuted tensor is."""
    args, name = bound(node), packet(node)
    rank = len(shape(node))
    if name == "permute":
        return [d % rank for d in args["dims"]]
    order = list(range(rank))
    if name == "numpy_T":
        return order[::-1]
    if name == "movedim":
        sources, targets = args["source"], args["destination"]
        sources, targets = ([x] if isinstance(x, int) else list(x) for x in (sources, targets))
        moved = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
        rest = iter(d for d in range(rank) if d not in moved.values())
        return [moved[d] if d in moved else next(rest) for d in range(rank)]
    if rank > 1:
        a, b = {"mT": (-2, -1), "t": (0, 1)}.get(name) or _swapped(args)
        order[a], order[b] = order[b], order[a]
    return order


def _swapped(args: dict[str, Any]) -> tuple[int, int]:
    first, second = ("axis0", "axis1") if "axis0" in args else ("dim0", "dim1")
    return args[first], args[second]


def permuted(order: Sequence[int], index: Sequence[Index]) -> tuple[Index, ...]:
    """The index in the source of a permutation."""
    out: list[Index] = [()] * len(order)
    for at, dim in enumerate(order):
        out[dim] = index[at]
    return tuple(out)


def _unrepeated(name: str, args: dict[str, Any], index: Sequence[Index], sizes: Sequence[Size]) -> tuple[Index, ...]:
    """The index of the element that was copied."""
    if name == "repeat_interleave":
        times, dim = args["repeats"], args["dim"]
        if not isinstance(times, int) or dim is None:
            raise Unliftable("repeats that differ")
        dim %= len(sizes)
        kept = regroup([index[dim]], (sizes[dim], times))[0]
        return (*index[:dim], kept, *index[dim + 1 :])
    counts = [size_of(x) for x in args["repeats" if name == "repeat" else "dims"]]
    counts = [1] * (len(index) - len(counts)) + counts
    own = len(index) - len(sizes)
    pairs = zip(index[own:], counts[own:], sizes, strict=True)
    return tuple(regroup([dim], (times, size))[1] for dim, times, size in pairs)


def _sliced(name: str, args: dict[str, Any], index: Sequence[Index], sizes: Sequence[Size]) -> tuple[Index, ...]:
    dim = args["dim"] % len(sizes)
    size = sizes[dim]
    first = args["index"] if name == "select" else args["start"]
    first = 0 if first is None else first
    step = args.get("step") or 1
    if not isinstance(first, int) or not isinstance(step, int):
        raise Unliftable("a symbolic slice")
    if first < 0:
        if not isinstance(size, int):
            raise Unliftable("a slice counted from a symbolic end")
        first = max(0, first + size)
    if name == "select":
        at: Index = (Digit(Const(first), size),) if not same(size, 1) else ()
        return (*index[:dim], at, *index[dim:])
    if first == 0 and step == 1:
        # the index stays itself; only the range behind it is longer
        kept = index[dim]
        if not kept and not same(size, 1):
            kept = (Digit(Const(0), size),)
        elif kept and not same(product([digit.size for digit in kept]), size):
            kept = (Digit(value(kept), size),)
        return (*index[:dim], kept if not same(size, 1) else (), *index[dim + 1 :])
    moved = call("add", call("mul", value(index[dim]), Const(step)), Const(first))
    return (*index[:dim], (Digit(moved, size),), *index[dim + 1 :])


def through_view(node: fx.Node, index: Sequence[Index], *, no_grad: bool) -> tuple[fx.Node, tuple[Index, ...]] | None:
    """One step from a view-like node (views, copies and casts that change nothing) to its source, or None at anything else.

    A step that drops elements (a slice) is not taken: what stands behind it is a different operand.

    Args:
        no_grad: whether what reads it runs under no_grad as well.
    """
    name = packet(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return None
    if cuts_gradient(node) and not no_grad:
        return None
    if name in ("contiguous", "clone", "alias") or (name in ("to", "_to_copy", "type_as") and _same_kind(source, node)):
        return source, tuple(index)
    if name in VIEWS and name not in ("select", "slice", "narrow"):
        try:
            return through(node, index)
        except Unliftable:
            return None
    return None


def cuts_gradient(node: fx.Node) -> bool:
    """Whether gradients end at the node because it is computed under no_grad, in a graph that is not under no_grad as a whole
    (`graph.mark_no_grad`; fake values of a retrace do not say)."""
    return bool(node.meta.get("attnfuse_no_grad")) and fake(node).dtype.is_floating_point


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    return fake(a).dtype == fake(b).dtype and fake(a).device == fake(b).device
