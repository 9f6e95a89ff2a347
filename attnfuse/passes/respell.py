"""Softmax in the one form that recognition anchors at.

Softmax written out becomes the operator.  Known forms, E being `exp(x)`, with masked entries set to zero or not: `E / sum(E)`,
`E * (1 / sum(E))`, `exp(x - logsumexp(x))`, `exp(log_softmax(x))`, and `(E @ v) / sum(E)`, which is normalised after the product.
All are the softmax of x, where masked entries are -inf; only the range of x in which they do not overflow differs.

Then what softmax does not see is taken away above it: a maximum that was subtracted, and a view that joins rows.

In a row of which all exponentials are zero, or all scores as large as masks are, these are not the same: `CAUTION` tells
recognition where it has to prove that there is no such row.  A softmax that is not fused in the end is not respelled: `RESPELLED`
tells which ones were.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.contraction import contraction
from attnfuse.passes.graph import Storage, aten, bound, erase, fake, is_tensor, mark_no_grad, packet, shape
from attnfuse.passes.index import same
from attnfuse.passes.views import cuts_gradient

RESPELLED: Final = "attnfuse_respelled"
"""In a node's meta: the name, in the normalised graph, of what was respelled."""
CAUTION: Final = "attnfuse_caution"
"""In a softmax's meta: what it stands for is no softmax in every row.

`unshifted`: exponentials, which are all zero where all scores of a row are as large as masks are; `logarithm`: a log-sum-exp was
taken off, which has no digits left beside the least number; `scaled`: a maximum was taken off before further steps, in which scores
of a mask may overflow without that."""


def respell(graph: fx.Graph, leave: Container[str] = ()) -> int:
    """Rewrites every softmax that is written out, but for those named in `leave`; returns how many there were."""
    mark_no_grad(graph)
    storage = Storage(graph)
    count = _written_out(graph, leave, storage)
    if count:
        storage = Storage(graph)
    for node in list(graph.nodes):
        if packet(node) in ("softmax", "_softmax") and node.name not in leave:
            changed = _unshifted(node, storage) + _split_into_rows(node)
            if changed and RESPELLED not in node.meta:
                node.meta[RESPELLED] = node.name
            count += changed
    return count


def _written_out(graph: fx.Graph, leave: Container[str], storage: Storage) -> int:
    count = 0
    for node in list(graph.nodes):
        if node.name in leave:
            continue
        form = _FORMS.get(packet(node))
        found = form(node) if form is not None and is_tensor(node) else None
        if found is None or any(storage.writes(x) for x in (node, *found.nodes, *_maximum_of(found))):
            continue
        if any(cuts_gradient(x) != cuts_gradient(node) for x in found.made):
            continue
        with graph.inserting_before(node):
            new = found.write(graph, node)
        if new is not None:
            node.replace_all_uses_with(new)
            count += 1
            erase(graph, [node])
    return count


def _maximum_of(found: _Softmax) -> tuple[fx.Node, ...]:
    source = _without_maximum(found.of.x, found.dim)
    return () if source is None else (source,)


@dataclass(frozen=True)
class _Exponentials:
    """`exp(x)`, zero where `masked` (or where not `allowed`)."""

    x: fx.Node
    masked: fx.Node | None = None
    allowed: fx.Node | None = None
    triangle: fx.Node | None = None
    """The `tril` or `triu` that masks."""


@dataclass(frozen=True)
class _Softmax:
    """A softmax over `dim`."""

    of: _Exponentials
    dim: int
    nodes: tuple[fx.Node, ...]
    made: tuple[fx.Node, ...]
    """What the softmax takes the place of: all of it under no_grad, or none."""
    after: tuple[fx.Node, ...] = ()
    """From what reads the exponentials to the product with the values, where that is normalised after it was taken."""
    caution: str = "unshifted"

    def write(self, graph: fx.Graph, old: fx.Node) -> fx.Node | None:
        """The nodes that stand for `old`, or None if types forbid it."""
        source = self.of.x
        weights_like = self.made[0] if self.after else old
        if fake(old).dtype != fake(weights_like).dtype:
            return None
        if fake(source).dtype != fake(weights_like).dtype and self.caution == "unshifted":
            return None

        def emit(target: torch._ops.OpOverload, *args: Any, like: fx.Node) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta = {**old.meta, "val": like.meta["val"], RESPELLED: old.name}
            return node

        masked, allowed = self.of.masked, self.of.allowed
        if self.of.triangle is not None:
            cells = list(fake(self.of.triangle).shape[-2:])
            with fake(source).fake_mode:  # type: ignore[attr-defined]
                ones = torch.ones(cells, dtype=torch.bool, device=fake(source).device)
            allowed = graph.call_function(aten.ones.default, (cells,), {"dtype": torch.bool, "device": ones.device})
            allowed.meta = {**old.meta, "val": ones}
            target = self.of.triangle.target
            assert isinstance(target, torch._ops.OpOverload)
            allowed = emit(target, allowed, *self.of.triangle.args[1:], like=allowed)
        if allowed is not None:
            masked = emit(aten.logical_not.default, allowed, like=allowed)
        if masked is not None:
            bare = _without_maximum(source, self.dim)
            source = emit(aten.masked_fill.Scalar, bare or source, masked, float("-inf"), like=source)
        shifted = _without_maximum(self.of.x, self.dim, exactly=True) is not None
        if fake(source).dtype != fake(weights_like).dtype:
            source = emit(aten.to.dtype, source, fake(weights_like).dtype, like=weights_like)
        weights = emit(aten._softmax.default, source, self.dim, False, like=weights_like)
        if not shifted and self.caution:
            weights.meta[CAUTION] = self.caution
        before, now = self.made[0], weights
        for node in self.after:
            new = graph.node_copy(node, lambda x: x)
            new.meta = {**node.meta}
            new.replace_input_with(before, now)
            before, now = node, new
        return now


def _unshifted(softmax: fx.Node, storage: Storage) -> int:
    """Takes off nothing where the scores' own maximum was taken off, in between being only steps that scale or add."""
    args = bound(softmax)
    node, below = args["self"], softmax
    dim = args["dim"] % len(shape(node))
    count = steps = 0
    while isinstance(node, fx.Node) and is_tensor(node) and not storage.writes(node):
        if cuts_gradient(node) != cuts_gradient(softmax):
            break
        source = _without_maximum(node, dim)
        if source is not None and storage.writes(source):
            break
        if source is not None:
            below.replace_input_with(node, source)
            erase(softmax.graph, [node])
            count += 1
            node = source
            if steps:
                softmax.meta.setdefault(CAUTION, "scaled")
            continue
        step = _LINEAR.get(packet(node))
        if step is None or len(node.users) != 1 or not step(node):
            break
        below, node = node, node.args[0]
        steps += packet(below) in ("mul", "div", "add")
    return count


def _is_constant(arg: object) -> bool:
    return isinstance(arg, int | float) or (is_tensor(arg) and fake(arg).dim() == 0)  # type: ignore[arg-type]


def _widens(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return torch.promote_types(fake(source).dtype, fake(node).dtype) == fake(node).dtype


def _keeps_shape(node: fx.Node) -> bool:
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and is_tensor(source)
        and list(map(str, shape(source))) == list(map(str, shape(node)))
    )


_LINEAR: Final[dict[str, Callable[[fx.Node], bool]]] = {
    "mul": lambda node: _keeps_shape(node) and _is_constant(node.args[1]),
    "div": lambda node: _keeps_shape(node) and _is_constant(node.args[1]) and "rounding_mode" not in node.kwargs,
    "add": _keeps_shape,
    "to": _widens,
    "_to_copy": _widens,
    "contiguous": _widens,
    "clone": _widens,
}
"""Steps after which the softmax of `x` is that of `x - c`, c being the same for all keys of a row."""


def _split_into_rows(softmax: fx.Node) -> int:
    """A softmax of a matrix whose rows are several dimensions becomes one of these dimensions, and the view stands behind it."""
    args = bound(softmax)
    view = args["self"]
    if (
        packet(view) not in ("view", "reshape", "_unsafe_view", "flatten")
        or len(shape(view)) != 2
        or args["dim"] not in (1, -1)
    ):
        return 0
    source = view.args[0]
    if len(shape(source)) < 3 or not same(shape(source)[-1], shape(view)[-1]):
        return 0
    graph = softmax.graph
    with graph.inserting_before(softmax):
        new = graph.call_function(softmax.target, (source, -1, *softmax.args[2:]), softmax.kwargs)  # type: ignore[arg-type]
        new.meta = {**softmax.meta, "val": fake(source).to(fake(softmax).dtype)}
        new.meta.setdefault(RESPELLED, softmax.name)
        rows = graph.call_function(aten.reshape.default, (new, list(fake(view).shape)))
        rows.meta = dict(softmax.meta)
    softmax.replace_all_uses_with(rows)
    erase(graph, [softmax])
    return 1


def _without_maximum(node: fx.Node, dim: int, *, exactly: bool = False) -> fx.Node | None:
    """`x` where the node is `x - max(x)`, the maximum being taken over `dim` at least, or `x - logsumexp(x)`.

    Softmax is the same for both, and what is taken off gets a gradient of zero.

    Args:
        exactly: the maximum is taken over `dim` alone, so that no row has only exponentials of zero.
    """
    if packet(node) != "sub":
        return None
    args = bound(node)
    source, shift = args["self"], args["other"]
    if args.get("alpha", 1) != 1 or not (is_tensor(source) and is_tensor(shift)):
        return None
    while packet(shift) in ("detach", "expand", "alias"):
        shift = shift.args[0]
    restored = None
    if packet(shift) == "unsqueeze":
        restored = bound(shift)["dim"] % len(shape(shift))
        shift = shift.args[0]
    if getattr(shift.target, "__name__", "") == "getitem" and shift.args[1] == 0 and packet(shift.args[0]) == "max":
        shift = shift.args[0]
    elif packet(shift) not in ("amax", "max", "logsumexp"):
        return None
    args = bound(shift)
    if args["self"] is not source:
        return None
    if "dim" not in args:
        return source if len(args) == 1 and restored is None and not exactly else None
    dims = args["dim"] if isinstance(args["dim"], list | tuple) else [args["dim"]]
    rank = len(shape(source))
    over = {d % rank for d in dims} or set(range(rank))
    if restored is not None:
        return source if over == {dim} == {restored} and not args["keepdim"] else None
    if exactly and over != {dim}:
        return None
    return source if dim in over and args["keepdim"] else None


_POSITIVE: Final = ("exp", "softmax", "_softmax")
"""What is normalised; a softmax is so already, but for what a mask took from it."""


def _exponentials(node: object) -> tuple[_Exponentials, tuple[fx.Node, ...]] | None:
    """`node` as exponentials, and the nodes that were looked through."""
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    name, args = packet(node), node.args
    if name in _POSITIVE:
        x = args[0]
        return (_Exponentials(x), (node, x)) if isinstance(x, fx.Node) else None
    masked = allowed = None
    if name in ("tril", "triu"):
        inner, static = args[0], all(isinstance(size, int) for size in shape(node)[-2:])
        if not isinstance(inner, fx.Node) or packet(inner) not in _POSITIVE or not static:
            return None
        x = inner.args[0]
        return (_Exponentials(x, triangle=node), (node, inner, x)) if isinstance(x, fx.Node) else None
    if name == "masked_fill" and _is_zero(args[2]):
        inner, masked = args[0], args[1]
    elif name == "where" and _is_zero(args[2]):
        inner, allowed = args[1], args[0]
    elif name == "mul":
        pairs = [(args[0], args[1]), (args[1], args[0])]
        inner, allowed = next(((a, _truth(b)) for a, b in pairs if packet(a) in _POSITIVE), (None, None))  # type: ignore[arg-type]
        if allowed is None:
            return None
    else:
        return None
    if (
        not isinstance(inner, fx.Node)
        or packet(inner) not in _POSITIVE
        or not all(map(same, shape(inner), shape(node)))
    ):
        return None
    x = inner.args[0]
    condition = masked if masked is not None else allowed
    if not isinstance(x, fx.Node) or not isinstance(condition, fx.Node) or fake(condition).dtype != torch.bool:
        return None
    zero = (args[2],) if name != "mul" and isinstance(args[2], fx.Node) else ()
    return _Exponentials(x, masked, allowed), (node, inner, x, condition, *zero)  # type: ignore[arg-type]


def _is_zero(arg: object) -> bool:
    if isinstance(arg, fx.Node):
        return packet(arg) in ("zeros", "zeros_like") or (packet(arg) == "scalar_tensor" and _is_zero(arg.args[0]))
    return isinstance(arg, int | float) and float(arg) == 0


def _truth(arg: object) -> fx.Node | None:
    """The truth values that were cast to the numbers 0 and 1."""
    if isinstance(arg, fx.Node) and packet(arg) in ("to", "_to_copy", "type_as"):
        source = arg.args[0]
        if isinstance(source, fx.Node) and is_tensor(source) and fake(source).dtype == torch.bool:
            return source
    return arg if isinstance(arg, fx.Node) and is_tensor(arg) and fake(arg).dtype == torch.bool else None


def _reduced(node: object, name: str) -> tuple[fx.Node, int] | None:
    """What a reduction over one dimension, which is kept, reduces, and the dimension."""
    while isinstance(node, fx.Node) and packet(node) in ("expand", "detach"):
        node = node.args[0] if packet(node) != "detach" else None
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    restored = None
    if packet(node) == "unsqueeze":
        restored = bound(node)["dim"] % len(shape(node))
        node = node.args[0]
    if not isinstance(node, fx.Node) or packet(node) != name:
        return None
    args = bound(node)
    source, dims = args["self"], args.get("dim")
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if not is_tensor(source) or len(dims) != 1 or None in dims or args.get("dtype") not in (None, fake(source).dtype):
        return None
    dim = dims[0] % len(shape(source))
    kept = bool(args["keepdim"])
    return (source, dim) if kept != (restored is not None) and restored in (None, dim) else None


def _compared(a: object, b: object) -> tuple[fx.Node, ...]:
    """What two nodes that compute the same read, if they are two: a write in between would make them differ."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return ()
    return (a, b, *a.all_input_nodes)


def _path(node: object, source: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes between a reduction's result, as it is broadcast, and what it reduces."""
    passed = []
    while isinstance(node, fx.Node) and node is not source and node.args:
        passed.append(node)
        node = node.args[0]
    return tuple(passed)


def _alike(a: object, b: object) -> bool:
    """Whether two nodes compute the same from the same."""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a.op != "call_function" or a.target is not b.target:
        return False
    pure = isinstance(a.target, torch._ops.OpOverload) and not a.target._schema.is_mutable
    plain = pure and torch.Tag.nondeterministic_seeded not in a.target.tags  # type: ignore[union-attr]
    return (
        plain
        and len(a.args) == len(b.args)
        and a.kwargs == b.kwargs
        and all(x is y or (not isinstance(x, fx.Node) and x == y) for x, y in zip(a.args, b.args, strict=True))
    )


def _normalised(over: fx.Node, numerator: object, denominator: object) -> _Softmax | None:
    summed = _reduced(denominator, "sum")
    if summed is None:
        return None
    source, dim = summed
    found = _exponentials(source)
    if found is None:
        return None
    of, nodes = found
    for passed in nodes:
        # a softmax over another dimension is not the exponential but for a factor
        if packet(passed) in ("softmax", "_softmax") and bound(passed)["dim"] % len(shape(passed)) != dim:
            return None
    made = (source, *_path(denominator, source), *(x for x in (numerator,) if isinstance(x, fx.Node)))
    made += tuple(
        x for x in nodes if x is not of.x and packet(x) in (*_POSITIVE, "masked_fill", "where", "mul", "tril", "triu")
    )
    if _alike(numerator, source):
        return _Softmax(of, dim, (source, *nodes, *_compared(numerator, source)), made)
    after = _to_the_product(numerator, source) if dim == len(shape(source)) - 1 else ()
    if after and [*map(str, shape(over)[:-1])] == [*map(str, shape(source)[:-1])]:
        return _Softmax(of, dim, (source, *after, *nodes), (*made, *after), after)
    return None


def _to_the_product(numerator: object, source: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes from the exponentials through dropout, casts and views, which keep the order of rows, and one product with the
    values, to what is divided by the sum; none if there is anything else."""
    found = _steps(numerator, source, products=1)
    return found if found is not None else ()


def _steps(node: object, source: fx.Node, products: int) -> tuple[fx.Node, ...] | None:
    if node is source:
        return () if not products else None
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    product = contraction(node)
    if product is None:
        above = _steps(node.args[0], source, products) if packet(node) in _ROWS_IN_ORDER else None
        return None if above is None else (*above, node)
    if not products or (product.added is not None and product.beta != 0):
        return None
    for side, labels in product.sides():
        rows_stay = labels[:-1] == product.out_labels[:-1] and labels[-1] == product.summed
        above = _steps(side, source, products - 1) if rows_stay and same(shape(side)[-1], shape(source)[-1]) else None
        if above is not None:
            return (*above, node)
    return None


_ROWS_IN_ORDER: Final = (
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "dropout",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
)


def _quotient(node: fx.Node) -> _Softmax | None:
    args = bound(node)
    return None if args.get("rounding_mode") is not None else _normalised(node, args["self"], args["other"])


def _times_reciprocal(node: fx.Node) -> _Softmax | None:
    args = bound(node)
    for a, b in ((args["self"], args["other"]), (args["other"], args["self"])):
        if isinstance(b, fx.Node) and packet(b) == "mul" and b.args[1] == 1:
            # 1 / x
            b = b.args[0]
        inverse = b.args[0] if isinstance(b, fx.Node) and packet(b) == "reciprocal" else None
        if isinstance(b, fx.Node) and packet(b) == "pow" and b.args[1] in (-1, -1.0):
            inverse = b.args[0]
        found = _normalised(node, a, inverse) if inverse is not None else None
        if found is not None:
            return found
    return None


def _of_logarithm(node: fx.Node) -> _Softmax | None:
    inner = node.args[0]
    if not isinstance(inner, fx.Node):
        return None
    args = bound(inner) if packet(inner) in ("log_softmax", "_log_softmax", "sub") else {}
    if packet(inner) in ("log_softmax", "_log_softmax"):
        source = args["self"]
        return _Softmax(_Exponentials(source), args["dim"] % len(shape(source)), (inner, source), (inner,), caution="")
    if packet(inner) == "sub" and args.get("alpha", 1) == 1 and is_tensor(args["self"]):
        reduced = _reduced(args["other"], "logsumexp")
        if reduced is not None and _alike(reduced[0], args["self"]):
            made = (inner, *_path(args["other"], reduced[0]))
            nodes = (inner, args["self"], *_compared(reduced[0], args["self"]))
            return _Softmax(_Exponentials(args["self"]), reduced[1], nodes, made, caution="logarithm")
    return None


_FORMS: Final[dict[str, Callable[[fx.Node], _Softmax | None]]] = {
    "div": _quotient,
    "mul": _times_reciprocal,
    "exp": _of_logarithm,
}
