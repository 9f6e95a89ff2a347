"""Lifting: the element of a tensor at symbolic indices, as an expression of the score language.

`Lifter.lift(node, index)` walks from a node towards the inputs, one small rule an operator, carrying the index through views:
`arange` becomes its index, comparisons become comparisons, `mask[batch, key]` becomes a composition.  What has no rule, or is
computed in a type that rounds, wraps or overflows otherwise than a template would (`rules.check_type`), is a `Load` of a leaf:
the value that the model itself computes.  The score matmul itself is offered to the site, which may claim it as `s`.

A node whose storage is written anywhere is never looked through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import sympy
import torch
from torch import fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.diagonal import Diagonal, along, is_worth_it
from attnfuse.passes.gathered import gathered
from attnfuse.passes.graph import SHORT_DTYPES, Storage, fake, is_tensor, mark_no_grad, packet, shape
from attnfuse.passes.index import Index, Size, Unliftable, same, size_of, value
from attnfuse.passes.normalise import NORMALISED, NORMALISED_BODIES
from attnfuse.passes.rules import MOVES, RULES, At, as_float, check_type
from attnfuse.passes.views import broadcast, cuts_gradient
from attnfuse.score import Call, Const, Expr, Load, S, Var, call, free_vars, loads, walk

_MAX_NODES: Final = 400


class Claimant(Protocol):
    """Who may take a contraction as the raw score `s` (a site under recognition)."""

    def claim(self, found: Contraction, index: Sequence[Index]) -> bool:
        """Whether this contraction, at this index of its output, is the score."""

    def state(self) -> Any:
        """What `restore` needs to take claims back."""

    def restore(self, state: Any) -> None:
        """Takes back the claims made since `state`."""


_AXES: Final = ("b", "h", "m", "n")
# Arithmetic that is no mask.
_DENSE: Final = ("add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "float")
_LARGE: Final = 1e4


class _Nobody:
    def claim(self, found: Contraction, index: Sequence[Index]) -> bool:
        return False

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        pass


NOBODY: Final[Claimant] = _Nobody()


@dataclass(frozen=True)
class LeafSource:
    """Where a leaf's values come from: a node of a scope, of which the dimensions `dims` are indexed (the others have size 1).

    Args:
        parts: where an element is read for each row and key, the sizes that each of `dims` is split into; else nothing.
        order: the permutation of what results that puts b, h, m and n in order.
        diagonal: where the element depends on `n - m` alone, how; then it is read for each `n - m`, which comes last in `order`.
    """

    scope: Scope
    node: fx.Node
    dims: tuple[int, ...]
    parts: tuple[tuple[Size, ...], ...] = ()
    order: tuple[int, ...] = ()
    diagonal: Diagonal | None = None

    @property
    def rank(self) -> int:
        """How many indices its loads have."""
        return len(self.order) or len(self.dims)

    @property
    def given(self) -> tuple[fx.Node, ...]:
        """The nodes whose values decide the leaf's."""
        return (self.node,) if self.diagonal is None else self.diagonal.given


@dataclass
class Table:
    """What lifting has met, shared by all scopes of one compile: leaves and symbolic integers by their internal names."""

    leaves: dict[str, LeafSource] = field(default_factory=dict)
    symbols: dict[str, tuple[sympy.Expr, Scope, fx.Node]] = field(default_factory=dict)
    computed_in: torch.dtype = torch.float32
    """The type in which a template computes what is lifted at present; other arithmetic on data is read, not repeated."""
    no_grad: bool = False
    """Whether the attention that is lifted at present runs under no_grad itself, so that no gradient can end within it."""
    fills: dict[tuple[fx.Node, torch.dtype], frozenset[float]] = field(default_factory=dict)
    """Which fills of masks an input holds, cast to a type; see `held`."""
    _names: dict[Any, str] = field(default_factory=dict)

    def leaf(self, source: LeafSource) -> str:
        key = (id(source.scope), source.node, source.dims, source.parts, source.order, source.diagonal)
        if key not in self._names:
            self._names[key] = f"leaf{len(self.leaves)}"
            self.leaves[self._names[key]] = source
        return self._names[key]

    def symbol(self, expr: sympy.Expr, scope: Scope, node: fx.Node) -> str:
        key = (expr, id(scope))
        if key not in self._names:
            self._names[key] = f"i{len(self.symbols)}"
            self.symbols[self._names[key]] = (expr, scope, node)
        return self._names[key]


class Scope:
    """One graph with its storage, and for the body of a higher-order operator the graph around it and the calls there."""

    def __init__(
        self,
        module: fx.GraphModule,
        table: Table | None = None,
        outer: Scope | None = None,
        calls: Sequence[fx.Node] = (),
    ) -> None:
        self.module = module
        mark_no_grad(module.graph)
        self.storage = Storage(module.graph)
        self.table = table if table is not None else Table()
        self.outer = outer
        self.calls = tuple(calls)
        inputs = module.graph.find_nodes(op="placeholder") if calls else []
        self.given: dict[fx.Node, tuple[object, ...]] = dict(
            zip(inputs, zip(*map(passed_by, calls), strict=True), strict=True)
        )
        """For each input of a body what the calls pass for it, one operand a call."""
        self.replaced: dict[fx.Node, fx.Node] = {}
        """Outputs of attentions that have been rewritten, with what stands in their place."""
        self.written: dict[object, list[fx.Node]] = {}
        """What has been written into the graph for several attentions: tile maps by their masks, leaves in the order of axes."""
        self.traced: dict[object, fx.GraphModule] = {}
        """Attentions in plain operators, by their meaning and all that is known of their operands: layers are alike."""
        self.constants: dict[fx.Node, float | None] = {}
        """The greatest magnitude in tensors that are made of constants; see `learned`."""
        self._may_require_grad: dict[fx.Node, bool] = {}
        self.lifter = Lifter(self)

    def may_require_grad(self, node: fx.Node) -> bool:
        """Whether a tensor may ask for a gradient, as far as the graph's inputs say (fake values of a retrace do not)."""
        if not is_tensor(node) or not fake(node).dtype.is_floating_point:
            return False
        todo = [node]
        while todo:
            at = todo[-1]
            if at in self._may_require_grad:
                todo.pop()
                continue
            inputs = [x for x in at.all_input_nodes if is_tensor(x) and fake(x).dtype.is_floating_point]
            known = self._asks_for_grad(at)
            if known is None:
                unknown = [x for x in inputs if x not in self._may_require_grad]
                if unknown:
                    todo.extend(unknown)
                    continue
                known = any(self._may_require_grad[x] for x in inputs)
            self._may_require_grad[todo.pop()] = known
        return self._may_require_grad[node]

    def _asks_for_grad(self, node: fx.Node) -> bool | None:
        """What a node says of itself; None if its inputs decide."""
        if node in self.given and self.outer is not None:
            return any(isinstance(x, fx.Node) and self.outer.may_require_grad(x) for x in self.given[node])
        if node.op == "placeholder":
            given = node.meta.get("example_value")
            return not isinstance(given, torch.Tensor) or given.requires_grad
        if node.op == "get_attr":
            held: Any = self.module
            for name in str(node.target).split("."):
                held = getattr(held, name)
            return not isinstance(held, torch.Tensor) or held.requires_grad
        plain = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        return None if plain else True

    def passed(self, node: fx.Node) -> fx.Node | None:
        """The one node around a body that all calls pass for this input of it."""
        given = self.given.get(node, ())
        first = given[0] if given else None
        return first if isinstance(first, fx.Node) and all(x is first for x in given) else None

    def current(self, node: fx.Node) -> fx.Node:
        """The node, or what has taken its place."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def imported(self, scope: Scope, node: fx.Node) -> fx.Node:
        """A node of an enclosing scope as a placeholder here; where it is not one yet it becomes one more operand of each call.

        What is lifted through an input comes before it, so that it stands before the first call that passes it.
        """
        assert self.outer is not None, f"{node} is in no enclosing graph"
        held = node if scope is self.outer else self.outer.imported(scope, node)
        for placeholder in self.given:
            if self.passed(placeholder) is held:
                return placeholder
        graph = self.module.graph
        last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
        with graph.inserting_after(last):
            placeholder = graph.placeholder(f"{held.name}_outer")
        placeholder.meta.update({k: v for k, v in held.meta.items() if k in ("val", "example_value", "stack_trace")})
        for at in self.calls:
            at.args = (*at.args, held)
        self.given[placeholder] = (held,) * len(self.calls)
        return placeholder


class Lifter:
    """Lifts nodes of one scope; results are memoised, so that a mask shared by all layers is read once."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.memo: dict[Any, Expr] = {}
        self.stopped: tuple[fx.Node, str] | None = None
        """The last operator that a claimed score went into and that has no expression."""
        self.refused: fx.Node | None = None
        """The last product that was offered as the score and not claimed."""
        self.offered = 0

    @property
    def computed_in(self) -> torch.dtype:
        """See `Table.computed_in`."""
        return self.scope.table.computed_in

    def lift(self, node: fx.Node, index: Sequence[Index], claimant: Claimant = NOBODY) -> Expr:
        """The element of `node` at `index` (one Index a dimension).

        Raises Misaligned if not even a load can be written down at this index.
        """
        key = (node, tuple(index), self.computed_in, self.scope.table.no_grad)
        if key in self.memo:
            return self.memo[key]
        state, offered = claimant.state(), self.offered
        try:
            expr = self._lift(node, tuple(index), claimant)
            if sum(1 for _ in walk(expr)) > _MAX_NODES:
                raise Unliftable("expression too large")
        except Unliftable as error:
            if claimant.state() != state:
                self.stopped = node, str(error)
                claimant.restore(state)
            expr = self.leaf(node, index)
        if self.offered == offered:
            self.memo[key] = expr
        return expr

    def greatest(self, load: Load) -> float:
        """The greatest number that a leaf of floating-point numbers can hold; 0 for any other."""
        dtype = fake(self.scope.table.leaves[load.leaf].node).dtype
        return torch.finfo(dtype).max if dtype.is_floating_point else 0.0

    def leaf(self, node: fx.Node, index: Sequence[Index]) -> Expr:
        """A load of the node itself, or where it has an element for each row and key, of what those are read from."""
        if fake(node).dtype not in SHORT_DTYPES:
            raise Unliftable(f"a tensor of {fake(node).dtype}")
        dims = tuple(at for at, dim in enumerate(index) if dim)
        digits = [digit for at in dims for digit in index[at]]
        names = [str(digit.expr) for digit in digits]
        parts = tuple(tuple(digit.size for digit in index[at]) for at in dims)
        symbols = max((sum(not isinstance(size, int) for size in sizes) for sizes in parts), default=0)
        if {"m", "n"} <= {*names} <= {*_AXES} and len({*names}) == len(names) and symbols < 2:
            found = self._along(node, index) or gathered(self, node, index)
            if found is not None:
                return found
            order = tuple(sorted(range(len(names)), key=lambda at: _AXES.index(names[at])))
            name = self.scope.table.leaf(LeafSource(self.scope, node, dims, parts, order))
            return Load(name, tuple(digits[at].expr for at in order))
        name = self.scope.table.leaf(LeafSource(self.scope, node, dims))
        return Load(name, tuple(value(index[at]) for at in dims))

    def _along(self, node: fx.Node, index: Sequence[Index]) -> Expr | None:
        """A load of a floating-point node that has the same elements along each diagonal, for one row after the other."""
        places = {str(dim[0].expr): at for at, dim in enumerate(index) if len(dim) == 1}
        if not {"m", "n"} <= {*places} or any(len(dim) > 1 for dim in index) or not fake(node).dtype.is_floating_point:
            return None
        rows, keys = places["m"], places["n"]
        sizes = shape(node)[rows], shape(node)[keys]
        if not is_worth_it(*sizes) or not all(
            same(x, index[at][0].size) for x, at in zip(sizes, (rows, keys), strict=True)
        ):
            return None
        diagonal = along(self, node, rows, keys)
        if diagonal is None:
            return None
        dims = tuple(sorted(places.values()))
        names = sorted({*places} - {"m", "n"}, key=_AXES.index)
        kept = [at for at in dims if at != rows]
        order = tuple(kept.index(places[name]) for name in (*names, "n"))
        name = self.scope.table.leaf(LeafSource(self.scope, node, dims, (), order, diagonal))
        size = sizes[0]
        most = Const(size) if isinstance(size, int) else Var(self.scope.table.symbol(size, self.scope, node))
        offset = call("sub", call("add", call("sub", Var("n"), Var("m")), most), Const(1))
        return Load(name, (*map(Var, names), offset))

    def scalar(self, arg: Any) -> Expr:
        """A number, a symbolic number or a 0-d tensor's item as an expression."""
        if isinstance(arg, bool | int | float):
            return Const(arg)
        if isinstance(arg, fx.Node):
            val = arg.meta.get("val")
            if isinstance(val, bool | int | float):
                return Const(val)
            if isinstance(val, torch.SymInt):
                size = size_of(val)
                return Const(size) if isinstance(size, int) else Var(self.scope.table.symbol(size, self.scope, arg))
            if packet(arg) == "item" and is_tensor(arg.args[0]):
                source = arg.args[0]
                assert isinstance(source, fx.Node)
                if self.scope.may_require_grad(source):
                    raise Unliftable("a number taken out of a tensor, at which its gradient ends")
                return self.leaf(source, ((),) * fake(source).dim())
        raise Unliftable(f"scalar {arg}")

    def operand(self, arg: Any, index: Sequence[Index], claimant: Claimant) -> Expr:
        """An operand of a pointwise operator whose output is read at `index`, broadcast."""
        if not is_tensor(arg):
            return self.scalar(arg)
        return self.lift(arg, broadcast(arg, index), claimant)

    def _lift(self, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
        if not is_tensor(node):
            raise Unliftable("no tensor")
        if node not in self.scope.storage.position or self.scope.storage.writes(node):
            raise Unliftable("written in place")
        passed = self.scope.passed(node)
        if passed is not None and self.scope.outer is not None:
            return self._around(passed, index)
        if node.op == "get_attr":
            return Const(_constant(self.scope.module, node))
        found = contraction(node)
        if found is not None:
            self.offered += 1
            return self._score(found, index, claimant)
        if cuts_gradient(node) and not self.scope.table.no_grad:
            raise Unliftable("a gradient ends here")
        rule = RULES.get(packet(node))
        if rule is None:
            raise Unliftable(packet(node) or str(node.target))
        expr = rule(At(self, node, index, claimant))
        if packet(node) in MOVES:
            return expr
        check_type(expr, fake(node).dtype, self.computed_in)
        return self.collapsed(node, index, expr)

    def _around(self, passed: fx.Node, index: tuple[Index, ...]) -> Expr:
        """The element of an input of a body, as the graph around it computes it."""
        assert self.scope.outer is not None
        expr = self.scope.outer.lifter.lift(passed, index)
        # its operands are kept for the backward, by a node of autograd that refuses what was written to since
        if any(call.target is torch.ops.higher_order.invoke_subgraph for call in self.scope.calls):
            sources = (self.scope.table.leaves[load.leaf] for load in loads(expr))
            if any(source.scope.storage.writes(source.node) for source in sources):
                raise Unliftable("made of what is written to")
        return expr

    def _score(self, found: Contraction, index: tuple[Index, ...], claimant: Claimant) -> Expr:
        if not claimant.claim(found, index):
            self.refused = found.node
            raise Unliftable("a product that is not the score")
        expr: Expr = S
        if found.alpha != 1:
            expr = call("mul", expr, as_float(self.scalar(found.alpha)))
        if found.added is not None and found.beta != 0:
            added = self.operand(found.added, index, claimant)
            if found.beta != 1:
                added = call("mul", added, as_float(self.scalar(found.beta)))
            expr = call("add", expr, added)
        return expr

    def collapsed(self, node: fx.Node, index: tuple[Index, ...], expr: Expr) -> Expr:
        """A computation on data that does not grow to queries × keys is left to the graph: the node itself is the leaf."""
        used = free_vars(expr)
        if isinstance(expr, Load) or not loads(expr) or "s" in used:
            return expr
        if {"m", "n"} <= used:
            return self.leaf(node, index) if self._is_dense_sum(node, expr, used) else expr
        if isinstance(expr, Call) and expr.op == "not" and isinstance(expr.args[0], Load):
            return expr
        if not any(used <= free_vars(load) for load in loads(expr)):
            # larger than the data it is made of, such as `n < lengths[b]`
            return expr
        if not frozenset().union(*(free_vars(digit.expr) for dim in index for digit in dim)) <= used:
            return expr
        if fake(node).dtype.is_floating_point and any(isinstance(e, Call) and e.op == "where" for e in walk(expr)):
            return expr
        return self.leaf(node, index)

    def _is_dense_sum(self, node: fx.Node, expr: Expr, used: frozenset[str]) -> bool:
        """Whether arithmetic on tensors with an element for each row and key gives no larger one: it is read once, not twice."""
        if not fake(node).dtype.is_floating_point or packet(node) not in ("add", "sub") or not used <= {*_AXES}:
            return False
        terms = loads(expr)
        dense = [load for load in terms if {str(i) for i in load.indices} == used]
        plain = all(not isinstance(e, Call) or e.op in _DENSE for e in walk(expr))
        large = any(isinstance(e, Const) and abs(e.value) > _LARGE for e in walk(expr))
        return len(dense) > 1 and len(dense) == len(terms) and plain and not large


def _constant(module: fx.GraphModule, node: fx.Node) -> bool | int | float:
    held = module
    for name in str(node.target).split("."):
        held = getattr(held, name)
    if (
        isinstance(held, torch.Tensor)
        and type(held) is torch.Tensor
        and held.numel() == 1
        and held.device.type == "cpu"
    ):
        item = held.item()
        assert isinstance(item, bool | int | float)
        return item
    raise Unliftable("a constant tensor")


def passed_by(call: fx.Node) -> tuple[Any, ...]:
    """What a call of a higher-order operator passes to its body."""
    return call.args[NORMALISED_BODIES[str(call.target)] :]


def _bodies(graph: fx.GraphModule) -> list[tuple[str, list[fx.Node]]]:
    """The normalised bodies in a graph by name, in the order in which they are first called, with their calls."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if NORMALISED in node.meta:
            found.setdefault(str(node.args[0].target), []).append(node)
    return list(found.items())


def graphs(graph: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and the bodies in it that are rewritten like it."""
    yield graph
    for name, _ in _bodies(graph):
        yield from graphs(getattr(graph, name))


def scopes(
    graph: fx.GraphModule, table: Table | None = None, outer: Scope | None = None, calls: Sequence[fx.Node] = ()
) -> Iterator[Scope]:
    """A scope for the graph and one for each body in it, outer ones first, which share one table."""
    scope = Scope(graph, table if table is not None else Table(), outer, calls)
    yield scope
    for name, called in _bodies(graph):
        yield from scopes(getattr(graph, name), scope.table, scope, called)
