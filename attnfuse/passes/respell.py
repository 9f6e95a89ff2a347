"""Softmax in the one form that recognition anchors at.

Softmax written out becomes the operator.  Known forms, E being `exp(x)`, with masked entries set to zero or not: `E / sum(E)`,
`E * (1 / sum(E))`, `exp(x - logsumexp(x))`, `exp(log_softmax(x))`, and `(E @ v) / sum(E)`, which is normalised after the product.
All are the softmax of x, where masked entries are -inf; only the range of x in which they do not overflow differs.

Then what softmax does not see is taken away above it: a maximum that was subtracted, and a view that joins rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.contraction import contraction
from attnfuse.passes.graph import Storage, aten, bound, erase, fake, is_tensor, packet, shape
from attnfuse.passes.index import same


def respell(graph: fx.Graph) -> int:
    """Rewrites every softmax that is written out; returns how many there were."""
    count = _written_out(graph)
    storage = Storage(graph)
    for node in list(graph.nodes):
        if packet(node) in ("softmax", "_softmax"):
            count += _unshifted(node, storage) + _split_into_rows(node)
    return count


def _written_out(graph: fx.Graph) -> int:
    storage = Storage(graph)
    count = 0
    for node in list(graph.nodes):
        form = _FORMS.get(packet(node))
        found = form(node) if form is not None and is_tensor(node) else None
        if found is None or any(storage.writes(x) for x in (node, *found.nodes)):
            continue
        with graph.inserting_before(node):
            new = found.write(graph, node)
        if new is not None:
            node.replace_all_uses_with(new)
            count += 1
            erase(graph, [node])
    return count


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
    """A softmax over `dim`; `value` is the product that is normalised after it was taken."""

    of: _Exponentials
    dim: int
    nodes: tuple[fx.Node, ...]
    value: fx.Node | None = None

    def write(self, graph: fx.Graph, old: fx.Node) -> fx.Node | None:
        """The nodes that stand for `old`, or None if types forbid it."""
        source = self.of.x
        weights_like = old if self.value is None else self.value.args[0]
        assert isinstance(weights_like, fx.Node)
        if fake(source).dtype != fake(weights_like).dtype or fake(old).dtype != fake(weights_like).dtype:
            return None

        def emit(target: torch._ops.OpOverload, *args: Any, like: fx.Node) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta = {**old.meta, "val": like.meta["val"]}
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
        weights = emit(aten._softmax.default, source, self.dim, False, like=weights_like)
        if self.value is None:
            return weights
        target = self.value.target
        assert isinstance(target, torch._ops.OpOverload)
        return emit(target, weights, *self.value.args[1:], like=self.value)


def _unshifted(softmax: fx.Node, storage: Storage) -> int:
    """Takes off nothing where the scores' own maximum was taken off, in between being only steps that scale or add."""
    args = bound(softmax)
    node, below = args["self"], softmax
    dim = args["dim"] % len(shape(node))
    count = 0
    while isinstance(node, fx.Node) and is_tensor(node) and not storage.writes(node):
        source = _without_maximum(node, dim)
        if source is not None:
            below.replace_input_with(node, source)
            erase(softmax.graph, [node])
            count += 1
            node = source
            continue
        step = _LINEAR.get(packet(node))
        if step is None or len(node.users) != 1 or not step(node):
            break
        below, node = node, node.args[0]
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
        rows = graph.call_function(aten.reshape.default, (new, list(fake(view).shape)))
        rows.meta = dict(softmax.meta)
    softmax.replace_all_uses_with(rows)
    erase(graph, [softmax])
    return 1


def _without_maximum(node: fx.Node, dim: int) -> fx.Node | None:
    """`x` where the node is `x - max(x)`, the maximum being taken over `dim` at least, or `x - logsumexp(x)`.

    Softmax is the same for both, and what is taken off gets a gradient of zero.
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
        return source if len(args) == 1 and restored is None else None
    dims = args["dim"] if isinstance(args["dim"], list | tuple) else [args["dim"]]
    rank = len(shape(source))
    over = {d % rank for d in dims} or set(range(rank))
    if restored is not None:
        return source if over == {dim} == {restored} and not args["keepdim"] else None
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
    return _Exponentials(x, masked, allowed), (node, inner, x, condition)  # type: ignore[arg-type]


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
    source, dims = args["self"], args["dim"]
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if not is_tensor(source) or len(dims) != 1 or None in dims or args.get("dtype") not in (None, fake(source).dtype):
        return None
    dim = dims[0] % len(shape(source))
    kept = bool(args["keepdim"])
    return (source, dim) if kept != (restored is not None) and restored in (None, dim) else None


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
    if _alike(numerator, source):
        return _Softmax(of, dim, (source, *nodes))
    # normalised after the product with the values
    if isinstance(numerator, fx.Node) and packet(numerator) in ("matmul", "bmm"):
        product = contraction(numerator)
        last = len(shape(source)) - 1
        if product is not None and _alike(product.lhs, source) and dim == last and len(shape(over)) == last + 1:
            return _Softmax(of, dim, (source, numerator, *nodes), numerator)
    return None


def _quotient(node: fx.Node) -> _Softmax | None:
    args = bound(node)
    return None if args.get("rounding_mode") is not None else _normalised(node, args["self"], args["other"])


def _times_reciprocal(node: fx.Node) -> _Softmax | None:
    args = bound(node)
    for a, b in ((args["self"], args["other"]), (args["other"], args["self"])):
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
        return _Softmax(_Exponentials(source), args["dim"] % len(shape(source)), (inner, source))
    if packet(inner) == "sub" and args.get("alpha", 1) == 1 and is_tensor(args["self"]):
        reduced = _reduced(args["other"], "logsumexp")
        if reduced is not None and _alike(reduced[0], args["self"]):
            return _Softmax(_Exponentials(args["self"]), reduced[1], (inner, args["self"]))
    return None


_FORMS: Final[dict[str, Callable[[fx.Node], _Softmax | None]]] = {
    "div": _quotient,
    "mul": _times_reciprocal,
    "exp": _of_logarithm,
}
