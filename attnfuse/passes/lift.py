"""Lifting: the element of a tensor at symbolic indices, as an expression of the score language.

`Lifter.lift(node, index)` walks from a node towards the inputs, one small rule an operator, carrying the index through views:
`arange` becomes its index, comparisons become comparisons, `mask[batch, key]` becomes a composition.  What has no rule is a
`Load` of a leaf, which is always right.  The score matmul itself is offered to the site, which may claim it as `s`.

A node whose storage is written anywhere is never looked through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import sympy
import torch
from torch import fx

from attnfuse import score
from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import Storage, bound, fake, is_tensor, packet, shape
from attnfuse.passes.index import Digit, Index, Misaligned, Size, index_of, regroup, same, size_of, value
from attnfuse.score import COMPARISONS, S, Call, Const, Expr, Load, Var, call, free_vars, loads, walk

_MAX_NODES: Final = 400
_LOW_PRECISION: Final = (torch.float16, torch.bfloat16)


class Unliftable(Exception):
    """An operator or a use of it that has no expression; the node becomes a leaf."""


class Claimant(Protocol):
    """Who may take a contraction as the raw score `s` (a site under recognition)."""

    def claim(self, found: Contraction, index: Sequence[Index]) -> bool:
        """Whether this contraction, at this index of its output, is the score."""

    def state(self) -> Any:
        """What `restore` needs to take claims back."""

    def restore(self, state: Any) -> None:
        """Takes back the claims made since `state`."""


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
    """Where a leaf's values come from: a node of a scope, of which the dimensions `dims` are indexed (the others have size 1)."""

    scope: Scope
    node: fx.Node
    dims: tuple[int, ...]


@dataclass
class Table:
    """What lifting has met, shared by all scopes of one compile: leaves and symbolic integers by their internal names."""

    leaves: dict[str, LeafSource] = field(default_factory=dict)
    symbols: dict[str, tuple[sympy.Expr, Scope, fx.Node]] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)

    def leaf(self, source: LeafSource) -> str:
        key = (id(source.scope), source.node, source.dims)
        if key not in self._names:
            self._names[key] = f"leaf{len(self.leaves)}"
            self.leaves[self._names[key]] = source
        return self._names[key]

    def symbol(self, expr: sympy.Expr, scope: Scope, node: fx.Node) -> str:
        if expr not in self._names:
            self._names[expr] = f"i{len(self.symbols)}"
            self.symbols[self._names[expr]] = (expr, scope, node)
        return self._names[expr]


class Scope:
    """One graph with its storage, and for the body of a higher-order operator the graph around it."""

    def __init__(
        self,
        module: fx.GraphModule,
        table: Table | None = None,
        outer: Scope | None = None,
        bindings: Mapping[fx.Node, fx.Node] | None = None,
        call: fx.Node | None = None,
    ) -> None:
        self.module = module
        self.storage = Storage(module.graph)
        self.table = table if table is not None else Table()
        self.outer = outer
        self.bindings = dict(bindings or {})
        self.call = call
        self.lifter = Lifter(self)

    def imported(self, scope: Scope, node: fx.Node) -> fx.Node:
        """A node of an enclosing scope as a placeholder here; where it is not one yet it becomes one more operand of the
        higher-order operator."""
        assert self.outer is not None and self.call is not None, f"{node} is in no enclosing graph"
        held = node if scope is self.outer else self.outer.imported(scope, node)
        for placeholder, operand in self.bindings.items():
            if operand is held:
                return placeholder
        graph = self.module.graph
        last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
        with graph.inserting_after(last):
            placeholder = graph.placeholder(f"{held.name}_outer")
        placeholder.meta.update({k: v for k, v in held.meta.items() if k in ("val", "example_value", "stack_trace")})
        self.call.args = (*self.call.args, held)
        self.bindings[placeholder] = held
        return placeholder


class Lifter:
    """Lifts nodes of one scope; results are memoised, so that a mask shared by all layers is read once."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.memo: dict[Any, Expr] = {}
        self.unlifted: fx.Node | None = None
        self.offered = 0

    def lift(self, node: fx.Node, index: Sequence[Index], claimant: Claimant = NOBODY) -> Expr:
        """The element of `node` at `index` (one Index a dimension).

        Raises Misaligned if not even a load can be written down at this index.
        """
        key = (node, tuple(index))
        if key in self.memo:
            return self.memo[key]
        state, offered = claimant.state(), self.offered
        try:
            expr = self._lift(node, tuple(index), claimant)
            if sum(1 for _ in walk(expr)) > _MAX_NODES:
                raise Unliftable("expression too large")
        except (Unliftable, Misaligned):
            claimant.restore(state)
            self.unlifted = self.unlifted or node
            expr = self.leaf(node, index)
        if self.offered == offered:
            self.memo[key] = expr
        return expr

    def leaf(self, node: fx.Node, index: Sequence[Index]) -> Expr:
        """A load of the node itself."""
        dims = tuple(at for at, dim in enumerate(index) if dim)
        name = self.scope.table.leaf(LeafSource(self.scope, node, dims))
        return Load(name, tuple(value(index[at]) for at in dims))

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
        if node in self.scope.bindings and self.scope.outer is not None:
            return self.scope.outer.lifter.lift(self.scope.bindings[node], index)
        if node.op == "get_attr":
            return Const(_constant(self.scope.module, node))
        found = contraction(node)
        if found is not None:
            self.offered += 1
            return self._score(found, index, claimant)
        rule = RULES.get(packet(node))
        if rule is None:
            raise Unliftable(packet(node) or str(node.target))
        expr = rule(self, node, index, claimant)
        return expr if packet(node) in MOVES else self._collapsed(node, index, expr)

    def _score(self, found: Contraction, index: tuple[Index, ...], claimant: Claimant) -> Expr:
        if not claimant.claim(found, index):
            raise Unliftable("a product that is not the score")
        expr: Expr = S
        if found.alpha != 1:
            expr = call("mul", expr, _as_float(self.scalar(found.alpha)))
        if found.added is not None and found.beta != 0:
            added = self.operand(found.added, index, claimant)
            if found.beta != 1:
                added = call("mul", added, _as_float(self.scalar(found.beta)))
            expr = call("add", expr, added)
        return expr

    def _collapsed(self, node: fx.Node, index: tuple[Index, ...], expr: Expr) -> Expr:
        """A computation on data that does not grow to queries × keys is left to the graph: the node itself is the leaf."""
        used = free_vars(expr)
        if isinstance(expr, Load) or not loads(expr) or "s" in used or {"m", "n"} <= used:
            return expr
        if not frozenset().union(*(free_vars(digit.expr) for dim in index for digit in dim)) <= used:
            return expr
        if fake(node).dtype.is_floating_point and any(isinstance(e, Call) and e.op == "where" for e in walk(expr)):
            return expr
        return self.leaf(node, index)


def broadcast(node: fx.Node, index: Sequence[Index]) -> tuple[Index, ...]:
    """The index of an operand that is broadcast to the shape that `index` belongs to."""
    sizes = shape(node)
    tail = index[len(index) - len(sizes) :]
    return tuple(() if same(size, 1) else dim for size, dim in zip(sizes, tail, strict=True))


def _constant(module: fx.GraphModule, node: fx.Node) -> bool | int | float:
    held = module
    for name in str(node.target).split("."):
        held = getattr(held, name)
    if isinstance(held, torch.Tensor) and type(held) is torch.Tensor and held.numel() == 1 and held.device.type == "cpu":
        item = held.item()
        assert isinstance(item, bool | int | float)
        return item
    raise Unliftable("a constant tensor")


def kind(arg: Any) -> str:
    """`bool`, `int` or `float`: the language's type of a tensor's elements or of a scalar."""
    val = arg.meta.get("val") if isinstance(arg, fx.Node) else arg
    if isinstance(val, torch.Tensor):
        if val.dtype == torch.bool:
            return "bool"
        if val.dtype.is_complex:
            raise Unliftable("complex numbers")
        return "float" if val.dtype.is_floating_point else "int"
    if isinstance(val, bool | torch.SymBool):
        return "bool"
    return "int" if isinstance(val, int | torch.SymInt) else "float"


def converted(expr: Expr, source: str, target: str) -> Expr:
    """`expr` of one type as an expression of another, as PyTorch promotes or casts."""
    if source == target:
        return expr
    if target == "bool":
        return call("ne", expr, Const(0) if source == "int" else Const(0.0))
    if target == "int":
        if source == "bool":
            return call("where", expr, Const(1), Const(0))
        raise Unliftable("a float cast to an integer")
    return _as_float(expr) if source == "int" else call("where", expr, Const(1.0), Const(0.0))


def _as_float(expr: Expr) -> Expr:
    return call("float", expr) if not isinstance(expr, Const) or type(expr.value) is not float else expr


def _rounded(expr: Expr, dtype: torch.dtype) -> Expr:
    """Constants as they are after a cast to a low precision (finfo(float32).min is -inf in bfloat16)."""
    if dtype not in _LOW_PRECISION:
        return expr
    if isinstance(expr, Const) and type(expr.value) is float:
        return Const(float(torch.tensor(expr.value, dtype=torch.float64).to(dtype)))
    if isinstance(expr, Call) and expr.op == "where":
        return call("where", expr.args[0], *(_rounded(a, dtype) for a in expr.args[1:]))
    return expr


Rule = Callable[[Lifter, fx.Node, tuple[Index, ...], Claimant], Expr]
RULES: Final[dict[str, Rule]] = {}
"""Operator name → rule; a new operator is one entry."""
MOVES: Final[set[str]] = set()
"""Operators that only move elements; a leaf is looked for behind them."""


def _rule(*names: str, moves: bool = False) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
            if moves:
                MOVES.add(name)
        return function

    return register


_ARITHMETIC: Final = {"add": "add", "sub": "sub", "mul": "mul", "minimum": "min", "maximum": "max"}


def _binary(op: str, lifter: Lifter, node: fx.Node, a: Any, b: Any, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    result = kind(node)
    if result == "bool":
        raise Unliftable("arithmetic on truth values")
    left, right = (converted(lifter.operand(x, index, claimant), kind(x), result) for x in (a, b))
    return call(op, left, right)


@_rule(*_ARITHMETIC, "rsub")
def _arithmetic(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    name = packet(node)
    a, b = args["self"], args["other"]
    alpha = args.get("alpha", 1)
    if name == "rsub":
        a, b, name = b, a, "sub"
        if alpha != 1:
            raise Unliftable("rsub with alpha")
    if alpha != 1:
        if name not in ("add", "sub") or not isinstance(alpha, int | float):
            raise Unliftable("symbolic alpha")
        result = kind(node)
        left, right = (converted(lifter.operand(x, index, claimant), kind(x), result) for x in (a, b))
        factor = Const(alpha) if result == "int" else Const(float(alpha))
        return call(name, left, call("mul", right, factor))
    return _binary(_ARITHMETIC[name], lifter, node, a, b, index, claimant)


@_rule("div", "true_divide")
def _div(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    mode = args.get("rounding_mode")
    if mode == "floor" and kind(node) == "int":
        return _binary("floordiv", lifter, node, args["self"], args["other"], index, claimant)
    if mode is not None:
        raise Unliftable(f"division rounded by {mode}")
    return _binary("div", lifter, node, args["self"], args["other"], index, claimant)


@_rule("floor_divide", "remainder")
def _whole(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    if kind(node) != "int":
        raise Unliftable("rounded division of floats")
    args = bound(node)
    op = "mod" if packet(node) == "remainder" else "floordiv"
    return _binary(op, lifter, node, args["self"], args["other"], index, claimant)


@_rule("neg", "abs", "tanh", "exp", "log", "sqrt", "rsqrt", "sigmoid")
def _unary(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    source = bound(node)["self"]
    return call(packet(node), converted(lifter.operand(source, index, claimant), kind(source), kind(node)))


@_rule("pow")
def _pow(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    if isinstance(args["self"], fx.Node) and args["exponent"] in (2, 2.0) and kind(node) == kind(args["self"]):
        base = lifter.operand(args["self"], index, claimant)
        return call("mul", base, base)
    raise Unliftable("a power other than 2")


@_rule("clamp", "clamp_min", "clamp_max")
def _clamp(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    result = kind(node)
    out = converted(lifter.operand(args["self"], index, claimant), kind(args["self"]), result)
    # written as choices: at a tie the gradient of clamp passes whole, that of min and max is halved
    for name, op in (("min", "lt"), ("max", "gt")):
        if args.get(name) is not None:
            limit = converted(lifter.operand(args[name], index, claimant), kind(args[name]), result)
            out = call("where", call(op, out, limit), limit, out)
    return out


@_rule(*COMPARISONS)
def _compare(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    sides = (args["self"], args["other"])
    kinds = [kind(x) for x in sides]
    common = max(kinds, key=("bool", "int", "float").index)
    if any(is_tensor(x) and fake(x).dtype in _LOW_PRECISION for x in sides):
        # a comparison after rounding is not the comparison of the exact values
        if not all(loads(e) and not free_vars(e) & {"s"} or isinstance(e, Const) for e in _both(lifter, sides, index)):
            raise Unliftable("a comparison in low precision")
    left, right = (
        converted(lifter.operand(x, index, claimant), k, common) for x, k in zip(sides, kinds, strict=True)
    )
    if common == "bool":
        same_value = call("or", call("and", left, right), call("and", call("not", left), call("not", right)))
        if packet(node) in ("eq", "ne"):
            return same_value if packet(node) == "eq" else call("not", same_value)
        raise Unliftable("truth values compared by size")
    return call(packet(node), left, right)


def _both(lifter: Lifter, sides: Sequence[Any], index: tuple[Index, ...]) -> list[Expr]:
    return [lifter.operand(x, index, NOBODY) for x in sides]


_LOGIC: Final = {
    "logical_and": "and",
    "bitwise_and": "and",
    "__and__": "and",
    "logical_or": "or",
    "bitwise_or": "or",
    "__or__": "or",
}


@_rule(*_LOGIC)
def _logic(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    sides = (args["self"], args["other"])
    if kind(node) != "bool" or ("logical" not in packet(node) and any(kind(x) != "bool" for x in sides)):
        raise Unliftable("bits of integers")
    left, right = (converted(lifter.operand(x, index, claimant), kind(x), "bool") for x in sides)
    return call(_LOGIC[packet(node)], left, right)


@_rule("logical_not", "bitwise_not")
def _not(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    source = bound(node)["self"]
    if packet(node) == "bitwise_not" and kind(source) != "bool":
        raise Unliftable("bits of integers")
    return call("not", converted(lifter.operand(source, index, claimant), kind(source), "bool"))


def _choice(
    lifter: Lifter, node: fx.Node, condition: Any, a: Any, b: Any, index: tuple[Index, ...], claimant: Claimant
) -> Expr:
    if kind(condition) != "bool":
        raise Unliftable("a condition that is no truth value")
    chosen = lifter.operand(condition, index, claimant)
    result, dtype = kind(node), fake(node).dtype
    arms = [_rounded(converted(lifter.operand(x, index, claimant), kind(x), result), dtype) for x in (a, b)]
    return call("where", chosen, *arms)


@_rule("where")
def _where(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    return _choice(lifter, node, args["condition"], args["self"], args["other"], index, claimant)


@_rule("masked_fill")
def _masked_fill(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    return _choice(lifter, node, args["mask"], args["value"], args["self"], index, claimant)


@_rule("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "detach")
def _cast(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if packet(node) == "detach" and fake(node).dtype.is_floating_point:
        raise Unliftable("a detached value")
    if fake(source).dtype == fake(node).dtype:
        return lifter.lift(source, index, claimant)
    expr = converted(lifter.lift(source, index, claimant), kind(source), kind(node))
    return lifter._collapsed(node, index, _rounded(expr, fake(node).dtype))


MOVES.update(("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "detach"))


@_rule("arange")
def _arange(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    start, step = args.get("start") or 0, args.get("step") or 1
    if any(isinstance(x, float) for x in (start, step)) or fake(node).dtype in _LOW_PRECISION:
        raise Unliftable("a range of fractions or in low precision")
    offset = call("mul", value(index[0]), lifter.scalar(step))
    expr = call("add", offset, lifter.scalar(start))
    return _as_float(expr) if fake(node).dtype.is_floating_point else expr


_FILLED: Final[Mapping[str, str]] = {
    "zeros": "0",
    "new_zeros": "0",
    "zeros_like": "0",
    "ones": "1",
    "new_ones": "1",
    "ones_like": "1",
    "full": "fill_value",
    "new_full": "fill_value",
    "full_like": "fill_value",
    "scalar_tensor": "s",
}


@_rule(*_FILLED)
def _filled(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    name = _FILLED[packet(node)]
    given: Any = int(name) if name in "01" else bound(node)[name]
    dtype = fake(node).dtype
    constant = lifter.scalar(given)
    if not isinstance(constant, Const):
        return converted(constant, kind(given), kind(node))
    if dtype == torch.bool:
        return Const(bool(constant.value))
    return _rounded(Const(float(constant.value)), dtype) if dtype.is_floating_point else Const(int(constant.value))


@_rule("tril", "triu")
def _triangle(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    row, column = value(index[-2]), value(index[-1])
    edge = call("add", row, lifter.scalar(args["diagonal"]))
    inside = call("le" if packet(node) == "tril" else "ge", column, edge)
    zero = {"bool": Const(False), "int": Const(0), "float": Const(0.0)}[kind(node)]
    inner = lifter.lift(args["self"], index, claimant)
    return call("and", inside, inner) if kind(node) == "bool" else call("where", inside, inner, zero)


@_rule("diff")
def _diff(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    source, head = args["self"], args["prepend"]
    if args["n"] != 1 or args["append"] is not None or kind(node) != "int":
        raise Unliftable("a difference of this form")
    dim = args["dim"] % len(index)
    at = value(index[dim])
    heads: Size = shape(head)[dim] if head is not None else 0
    if not isinstance(heads, int) or heads > 1:
        raise Unliftable("a difference of this form")

    def element(position: Expr) -> Expr:
        def moved(tensor: fx.Node, where: Expr) -> Expr:
            digit: Index = (Digit(where, shape(tensor)[dim]),) if not same(shape(tensor)[dim], 1) else ()
            return lifter.lift(tensor, (*index[:dim], digit, *index[dim + 1 :]), claimant)

        tail = moved(source, call("sub", position, Const(heads)))
        if not heads:
            return tail
        return call("where", call("lt", position, Const(1)), moved(head, Const(0)), tail)

    expr = call("sub", element(call("add", at, Const(1))), element(at))
    if loads(expr):
        raise Unliftable("a difference of data")
    return expr


@_rule("cumsum")
def _cumsum(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    dim = args["dim"] % len(index)
    element = lifter.lift(args["self"], index, claimant)
    if isinstance(element, Const) and kind(node) == "int":
        return call("mul", Const(int(element.value)), call("add", value(index[dim]), Const(1)))
    raise Unliftable("a running sum of data")


@_rule("unsqueeze", moves=True)
def _unsqueeze(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    return lifter.lift(*_through(node, index), claimant)


_VIEWS: Final = (
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "expand",
    "expand_as",
    "broadcast_to",
    "transpose",
    "permute",
    "t",
    "movedim",
    "select",
    "slice",
    "narrow",
)
for _name in _VIEWS:
    _rule(_name, moves=True)(_unsqueeze)


@_rule("index", moves=True)
def _index(lifter: Lifter, node: fx.Node, index: tuple[Index, ...], claimant: Claimant) -> Expr:
    args = bound(node)
    source, chosen = args["self"], args["indices"]
    given = [x for x in chosen if x is not None]
    places = [at for at, x in enumerate(chosen) if x is not None]
    if any(kind(x) != "int" for x in given) or places != list(range(places[0], places[0] + len(places))):
        raise Unliftable("indexing by a mask, or by tensors that do not stand together")
    rank = max(len(shape(x)) for x in given)
    middle = index[places[0] : places[0] + rank]
    out = list(index[: places[0]])
    for tensor, dim in zip(given, places, strict=True):
        where = lifter.operand(tensor, middle, claimant)
        if loads(where) and {"m", "n"} <= free_vars(where):
            raise Unliftable("a gather by data over queries and keys")
        size = shape(source)[dim]
        if not _in_range(where, size):
            raise Unliftable("an index that may be negative")
        out.append(() if same(size, 1) else (Digit(where, size),))
    out.extend(index[places[0] + rank :])
    return lifter.lift(source, out, claimant)


def _in_range(where: Expr, size: Size) -> bool:
    """Whether an index is certainly not negative (PyTorch would count it from the end)."""
    form = score.linear(where)
    bound_ = score.lower_bound(form) if form is not None else None
    return bound_ is not None and bound_ >= 0


def _through(node: fx.Node, index: Sequence[Index]) -> tuple[fx.Node, tuple[Index, ...]]:
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
    if name in ("transpose", "t", "permute", "movedim"):
        return source, _permuted(name, args, index, rank)
    if name in ("select", "slice", "narrow"):
        return source, _sliced(name, args, index, sizes)
    return source, regroup(index, sizes)


def _permuted(name: str, args: dict[str, Any], index: Sequence[Index], rank: int) -> tuple[Index, ...]:
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in args["dims"]]
    elif name == "movedim":
        sources, targets = args["source"], args["destination"]
        sources, targets = ([x] if isinstance(x, int) else list(x) for x in (sources, targets))
        moved = {t % rank: s % rank for s, t in zip(sources, targets, strict=True)}
        rest = iter(d for d in range(rank) if d not in moved.values())
        order = [moved[d] if d in moved else next(rest) for d in range(rank)]
    elif rank > 1:
        a, b = (args["dim0"] % rank, args["dim1"] % rank) if name == "transpose" else (0, 1)
        order[a], order[b] = order[b], order[a]
    out: list[Index] = [()] * rank
    for at, dim in enumerate(order):
        out[dim] = index[at]
    return tuple(out)


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
        if len(kept) > 1 and not same(kept[0].size, size):
            kept = (Digit(value(kept), size),)
        return (*index[:dim], kept if not same(size, 1) else (), *index[dim + 1 :])
    moved = call("add", call("mul", value(index[dim]), Const(step)), Const(first))
    return (*index[:dim], (Digit(moved, size),), *index[dim + 1 :])


def through_view(node: fx.Node, index: Sequence[Index]) -> tuple[fx.Node, tuple[Index, ...]] | None:
    """One step from a view-like node (views, copies and casts that change nothing) to its source, or None at anything else.

    A step that drops elements (a slice) is not taken: what stands behind it is a different operand.
    """
    name = packet(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source):
        return None
    if name in ("contiguous", "clone", "alias") or (name in ("to", "_to_copy", "type_as") and _same_kind(source, node)):
        return source, tuple(index)
    if name in _VIEWS + ("unsqueeze",) and name not in ("select", "slice", "narrow"):
        try:
            return _through(node, index)
        except (Unliftable, Misaligned):
            return None
    return None


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    return fake(a).dtype == fake(b).dtype and fake(a).device == fake(b).device


def plain_index(sizes: Sequence[Size], names: Sequence[str]) -> tuple[Index, ...]:
    """One variable a dimension."""
    return tuple(index_of(Var(name), size) for name, size in zip(names, sizes, strict=True))


__all__ = [
    "NOBODY",
    "Claimant",
    "LeafSource",
    "Lifter",
    "Scope",
    "Table",
    "Unliftable",
    "plain_index",
    "through_view",
]
