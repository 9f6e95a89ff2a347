"""One small rule an operator: how an element of its output is an expression of elements of its inputs.

`RULES` maps the operator's name to its rule; a new operator is one function.  What a rule cannot say exactly it refuses with
`Unliftable`, and the node becomes a leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from attnfuse import score
from attnfuse.passes.graph import SHORT_DTYPES, bound, fake, is_tensor, packet, shape
from attnfuse.passes.index import Digit, Index, Size, Unliftable, same, value
from attnfuse.passes.magnitude import most
from attnfuse.passes.views import VIEWS, through
from attnfuse.score import COMPARISONS, Call, Const, Expr, Load, Var, added_loads, call, free_vars, loads, walk
from attnfuse.tiles import Env, interval

if TYPE_CHECKING:
    from attnfuse.passes.lift import Claimant, Lifter

_LOW_PRECISION: Final = (torch.float16, torch.bfloat16)
_WIDE: Final = (torch.int64, torch.int32)
"""Integer types in which sums and differences of positions do not wrap around."""


@dataclass(frozen=True)
class At:
    """One element under the lifter: a node and the index into its output."""

    lifter: Lifter
    node: fx.Node
    index: tuple[Index, ...]
    claimant: Claimant

    @property
    def name(self) -> str:
        """The operator."""
        return packet(self.node)

    @property
    def args(self) -> dict[str, Any]:
        """The operator's arguments by name."""
        return bound(self.node)

    @property
    def kind(self) -> str:
        """The language's type of the element."""
        return kind(self.node)

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the output."""
        return fake(self.node).dtype

    def lift(self, node: fx.Node, index: Sequence[Index] | None = None) -> Expr:
        """An input of the same shape at this index, or at another one."""
        return self.lifter.lift(node, self.index if index is None else index, self.claimant)

    def operand(self, arg: Any, index: Sequence[Index] | None = None) -> Expr:
        """An input that is broadcast, or a scalar."""
        return self.lifter.operand(arg, self.index if index is None else index, self.claimant)


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
    return as_float(expr) if source == "int" else call("where", expr, Const(1.0), Const(0.0))


def as_float(expr: Expr) -> Expr:
    return call("float", expr) if not isinstance(expr, Const) or type(expr.value) is not float else expr


# Positions are below this, so that sums of a few of them and of smaller constants do not wrap around in int32.
_LARGE: Final = 2**28


def check_type(expr: Expr, dtype: torch.dtype, computed_in: torch.dtype) -> None:
    """Refuses arithmetic that has another result in the node's type than in the one that templates compute in: integers that may
    wrap around, floats that are rounded otherwise.  Scores are free of this, they are approximate anyway."""
    if isinstance(expr, Const) or _is_choice(expr):
        if any(Const(c) != rounded(Const(c), dtype) for c in _choices(expr)) and dtype != computed_in:
            raise Unliftable(f"constants that {dtype} cannot hold")
        return
    if isinstance(expr, Load | Var) or "s" in free_vars(expr):
        return
    if dtype.is_floating_point:
        if dtype != computed_in and not _exact(expr, dtype):
            raise Unliftable(f"arithmetic in {dtype}, which rounds otherwise than {computed_in}")
    elif dtype not in (torch.bool, torch.int64) and (dtype != torch.int32 or loads(expr) or _is_large(expr)):
        raise Unliftable(f"arithmetic in {dtype}, which may wrap around")


def _is_large(expr: Expr) -> bool:
    """Whether an expression of positions may be beyond the range of int32."""
    return any(
        (isinstance(e, Call) and e.op == "mul") or (isinstance(e, Const) and abs(e.value) > _LARGE) for e in walk(expr)
    )


def _exact(expr: Expr, dtype: torch.dtype) -> bool:
    """Whether no step of an expression is rounded in a floating-point type."""
    if isinstance(expr, Const | Load | Var):
        return True
    parts = expr.args
    if expr.op == "float":
        return dtype not in _LOW_PRECISION and not loads(expr)
    if expr.op == "add":
        # nothing is added, or what leaves no digit of the other; float16 has nothing that large
        huge = torch.finfo(dtype).max / 2 if dtype != torch.float16 else math.inf
        kept = any(_is_choice(a) and all(c == 0 or abs(c) >= huge for c in _choices(a)) for a in parts)
        return kept and all(_exact(a, dtype) for a in parts)
    if expr.op == "where":
        return all(_exact(a, dtype) for a in parts[1:])
    return expr.op in ("neg", "abs", "min", "max") and all(_exact(a, dtype) for a in parts)


def _choices(expr: Expr) -> list[bool | int | float]:
    """The constants that a choice is between."""
    if isinstance(expr, Const):
        return [expr.value]
    return [c for arm in expr.args[1:] for c in _choices(arm)] if isinstance(expr, Call) else []


def rounded(expr: Expr, dtype: torch.dtype) -> Expr:
    """Constants as they are after a cast: rounded to a low precision, infinite beyond any type's range (finfo(float32).min is -inf
    in bfloat16), wrapped around in a narrow integer type."""
    if isinstance(expr, Const) and type(expr.value) is int and not dtype.is_floating_point and dtype != torch.bool:
        info = torch.iinfo(dtype)
        return Const((expr.value - info.min) % 2**info.bits + info.min)
    if isinstance(expr, Const) and type(expr.value) is float:
        cast = float(torch.tensor(expr.value, dtype=torch.float64).to(dtype))
        return Const(cast) if dtype in _LOW_PRECISION or math.isinf(cast) else expr
    if isinstance(expr, Call) and expr.op == "where":
        return call("where", expr.args[0], *(rounded(a, dtype) for a in expr.args[1:]))
    return expr


def _is_choice(expr: Expr) -> bool:
    """Whether an expression is a choice, however nested, between constants."""
    return (
        isinstance(expr, Call)
        and expr.op == "where"
        and all(isinstance(a, Const) or _is_choice(a) for a in expr.args[1:])
    )


Rule = Callable[[At], Expr]
RULES: Final[dict[str, Rule]] = {}
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


@_rule(*VIEWS, moves=True)
def _view(at: At) -> Expr:
    return at.lift(*through(at.node, at.index))


_ARITHMETIC: Final = {"add": "add", "sub": "sub", "mul": "mul", "minimum": "min", "maximum": "max"}


def _binary(at: At, op: str, a: Any, b: Any) -> Expr:
    result = at.kind
    if result == "bool":
        raise Unliftable("arithmetic on truth values")
    left, right = (converted(at.operand(x), kind(x), result) for x in (a, b))
    return call(op, left, right)


@_rule(*_ARITHMETIC, "rsub")
def _arithmetic(at: At) -> Expr:
    args = at.args
    name = at.name
    a, b = args["self"], args["other"]
    alpha = args.get("alpha", 1)
    if name == "rsub":
        a, b, name = b, a, "sub"
        if alpha != 1:
            raise Unliftable("rsub with alpha")
    if alpha != 1:
        if name not in ("add", "sub") or not isinstance(alpha, int | float) or at.kind == "bool":
            raise Unliftable("symbolic alpha")
        result = at.kind
        left, right = (converted(at.operand(x), kind(x), result) for x in (a, b))
        factor = Const(alpha) if result == "int" else Const(float(alpha))
        return call(name, left, call("mul", right, factor))
    return _binary(at, _ARITHMETIC[name], a, b)


@_rule("div")
def _div(at: At) -> Expr:
    args = at.args
    mode = args.get("rounding_mode")
    if mode == "floor" and at.kind == "int":
        return _binary(at, "floordiv", args["self"], args["other"])
    if mode is not None:
        raise Unliftable(f"division rounded by {mode}")
    return _binary(at, "div", args["self"], args["other"])


@_rule("floor_divide", "remainder")
def _whole(at: At) -> Expr:
    if at.kind != "int":
        raise Unliftable("rounded division of floats")
    args = at.args
    op = "mod" if at.name == "remainder" else "floordiv"
    return _binary(at, op, args["self"], args["other"])


@_rule("neg", "abs", "tanh", "exp", "log", "sqrt", "rsqrt", "sigmoid")
def _unary(at: At) -> Expr:
    source = at.args["self"]
    return _applied(at.name, converted(at.operand(source), kind(source), at.kind), at.dtype)


def _applied(name: str, expr: Expr, dtype: torch.dtype) -> Expr:
    """A function of an element; of constants the value that the operator gives in its type."""
    if isinstance(expr, Const) and type(expr.value) is float:
        return Const(float(getattr(torch, name)(torch.tensor(expr.value, dtype=dtype))))
    if isinstance(expr, Call) and expr.op == "where" and all(isinstance(arm, Const) for arm in expr.args[1:]):
        return call("where", expr.args[0], *(_applied(name, arm, dtype) for arm in expr.args[1:]))
    return call(name, expr)


@_rule("pow")
def _pow(at: At) -> Expr:
    args = at.args
    if isinstance(args["self"], fx.Node) and args["exponent"] in (2, 2.0) and at.kind == kind(args["self"]):
        base = at.operand(args["self"])
        return call("mul", base, base)
    raise Unliftable("a power other than 2")


@_rule("clamp", "clamp_min", "clamp_max")
def _clamp(at: At) -> Expr:
    args = at.args
    result = at.kind
    out = converted(at.operand(args["self"]), kind(args["self"]), result)
    # written as choices: at a tie the gradient of clamp passes whole, that of min and max is halved
    for name, op in (("min", "lt"), ("max", "gt")):
        if args.get(name) is not None:
            limit = rounded(converted(at.operand(args[name]), kind(args[name]), result), at.dtype)
            out = call("where", call(op, out, limit), limit, out)
    return out


@_rule(*COMPARISONS)
def _compare(at: At) -> Expr:
    args = at.args
    sides = (args["self"], args["other"])
    kinds = [kind(x) for x in sides]
    common = max(kinds, key=("bool", "int", "float").index)
    operands = [at.operand(x) for x in sides]
    if common == "float":
        operands = _compared_as(at, sides, operands)
    elif common == "int":
        _check_integers(sides, operands)
    left, right = (converted(e, k, common) for e, k in zip(operands, kinds, strict=True))
    if common == "bool":
        if at.name in ("eq", "ne"):
            return _unequal(left, right) if at.name == "ne" else call("not", _unequal(left, right))
        raise Unliftable("truth values compared by size")
    return call(at.name, left, right)


def _result_type(sides: Sequence[Any]) -> torch.dtype:
    """The type in which an operation on tensors and numbers is done."""
    a, b = (fake(x) if is_tensor(x) else x.meta["val"] if isinstance(x, fx.Node) else x for x in sides)
    return torch.result_type(a, b)


def _check_integers(sides: Sequence[Any], operands: Sequence[Expr]) -> None:
    """Refuses a comparison of integers that wraps one of them around: a tensor's type wins over that of a number."""
    dtype = _result_type(sides)
    for x, e in zip(sides, operands, strict=True):
        if isinstance(e, Const):
            fits = rounded(Const(int(e.value)), dtype) == Const(int(e.value))
        else:
            fits = dtype == torch.int64 or (is_tensor(x) and torch.promote_types(fake(x).dtype, dtype) == dtype)
        if not fits:
            raise Unliftable(f"a comparison in {dtype}, which may wrap around")


def _compared_as(at: At, sides: Sequence[Any], operands: Sequence[Expr]) -> list[Expr]:
    """The sides of a comparison of floats in the type in which it is done; refused where templates cannot compare in it."""
    dtype = _result_type(sides)
    low = dtype in _LOW_PRECISION
    for x, e in zip(sides, operands, strict=True):
        if isinstance(e, Const) or _is_choice(e):
            continue
        if low and not (isinstance(e, Load) and is_tensor(x) and fake(x).dtype == dtype):
            raise Unliftable("a comparison of values that were rounded to a low precision")
        if torch.promote_types(dtype, at.lifter.computed_in) != at.lifter.computed_in and (
            loads(e) or "s" in free_vars(e)
        ):
            raise Unliftable(f"a comparison in {dtype}, which has more digits than {at.lifter.computed_in}")
    return [
        Const(float(torch.tensor(float(e.value), dtype=torch.float64).to(dtype))) if isinstance(e, Const) else e
        for e in operands
    ]


def _unequal(a: Expr, b: Expr) -> Expr:
    """Exclusive or."""
    return call("or", call("and", a, call("not", b)), call("and", call("not", a), b))


def _truth(at: At, arg: Any) -> Expr:
    """An operand as a truth value."""
    _check_truth(at, arg)
    return converted(at.operand(arg), kind(arg), "bool")


def _check_truth(at: At, arg: Any) -> None:
    """Refuses to ask whether a float is zero that a template would read in fewer digits."""
    if is_tensor(arg) and kind(arg) == "float":
        dtype, computed_in = fake(arg).dtype, at.lifter.computed_in
        if torch.promote_types(dtype, computed_in) != computed_in:
            raise Unliftable(f"the truth of {dtype}, which has more digits than {computed_in}")


_LOGIC: Final = {
    "logical_and": "and",
    "bitwise_and": "and",
    "logical_or": "or",
    "bitwise_or": "or",
}


@_rule(*_LOGIC)
def _logic(at: At) -> Expr:
    args = at.args
    sides = (args["self"], args["other"])
    if at.kind != "bool" or ("logical" not in at.name and any(kind(x) != "bool" for x in sides)):
        raise Unliftable("bits of integers")
    left, right = (_truth(at, x) for x in sides)
    return call(_LOGIC[at.name], left, right)


@_rule("logical_xor", "bitwise_xor")
def _exclusive(at: At) -> Expr:
    args = at.args
    sides = (args["self"], args["other"])
    if at.kind != "bool" or ("logical" not in at.name and any(kind(x) != "bool" for x in sides)):
        raise Unliftable("bits of integers")
    left, right = (_truth(at, x) for x in sides)
    return _unequal(left, right)


@_rule("logical_not", "bitwise_not")
def _not(at: At) -> Expr:
    source = at.args["self"]
    if at.name == "bitwise_not" and kind(source) != "bool":
        raise Unliftable("bits of integers")
    return call("not", _truth(at, source))


def _choice(at: At, condition: Any, a: Any, b: Any) -> Expr:
    if kind(condition) != "bool":
        raise Unliftable("a condition that is no truth value")
    chosen = at.operand(condition)
    result, dtype = at.kind, at.dtype
    arms = [rounded(converted(at.operand(x), kind(x), result), dtype) for x in (a, b)]
    if chosen == call("ne", arms[1], Const(0.0)) and not (is_tensor(b) and at.lifter.scope.may_require_grad(b)):
        # `x.masked_fill(x.bool(), c)`: what is left of x is zero
        arms[1] = Const(0.0)
    return call("where", chosen, *arms)


@_rule("where")
def _where(at: At) -> Expr:
    args = at.args
    return _choice(at, args["condition"], args["self"], args["other"])


@_rule("masked_fill")
def _masked_fill(at: At) -> Expr:
    args = at.args
    return _choice(at, args["mask"], args["value"], args["self"])


@_rule("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "detach")
def _cast(at: At) -> Expr:
    source = at.node.args[0]
    assert isinstance(source, fx.Node)
    if at.name == "detach" and at.dtype.is_floating_point:
        raise Unliftable("a detached value")
    if fake(source).device != fake(at.node).device:
        raise Unliftable(f"a copy from {fake(source).device}")
    if fake(source).dtype == at.dtype:
        return at.lift(source)
    expr = converted(at.lift(source), kind(source), at.kind)
    if not isinstance(expr, Const) and not _is_choice(expr):
        before = fake(source).dtype
        widened = before == torch.bool or torch.promote_types(before, at.dtype) == at.dtype
        if at.kind == "int" and not widened and (at.dtype != torch.int32 or loads(expr) or _is_large(expr)):
            raise Unliftable(f"a cast to {at.dtype}, which may wrap around")
        if at.kind == "bool":
            _check_truth(at, source)
        if at.kind == "float" and "s" not in free_vars(expr):
            if not widened or (at.dtype in _LOW_PRECISION and not before.is_floating_point):
                raise Unliftable(f"a value rounded to {at.dtype}")
            check_type(expr, at.dtype, at.lifter.computed_in)
        if at.dtype in _LOW_PRECISION and not _within(expr, at):
            if "s" not in free_vars(expr):
                raise Unliftable(f"a value that may be beyond the range of {at.dtype}")
            expr = _narrowed(expr, at)
    return at.lifter.collapsed(at.node, at.index, rounded(expr, at.dtype))


MOVES.update(("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "detach"))


def _narrowed(expr: Expr, at: At) -> Expr:
    """A score rounded to a narrower type, each arm of a choice by itself: a fill beyond its range is an infinity."""
    if isinstance(expr, Const):
        return rounded(expr, at.dtype)
    if isinstance(expr, Call) and expr.op == "where" and "s" not in free_vars(expr.args[0]):
        return call("where", expr.args[0], *(_narrowed(x, at) for x in expr.args[1:]))
    return expr if _within(expr, at) else call(SHORT_DTYPES[at.dtype], expr)


def _within(expr: Expr, at: At) -> bool:
    """Whether a narrower type holds whatever an expression gives, infinities apart, scores being of common size."""
    greatest = torch.finfo(at.dtype).max
    finite = score.substitute(expr, {Const(-math.inf): Const(0.0)})
    if "s" in free_vars(expr) and at.dtype == torch.float16:
        return most(finite, at.lifter.greatest) < greatest / 2
    fills = [abs(e.value) for e in walk(finite) if isinstance(e, Const)]
    return max((*fills, *map(at.lifter.greatest, added_loads(expr))), default=0.0) <= greatest


@_rule("arange")
def _arange(at: At) -> Expr:
    args = at.args
    start, step = args.get("start") or 0, args.get("step") or 1
    narrow = at.kind == "int" and at.dtype not in _WIDE
    if any(isinstance(x, float) for x in (start, step)) or at.dtype in _LOW_PRECISION or narrow:
        raise Unliftable("a range of fractions or in low precision")
    offset = call("mul", value(at.index[0]), at.lifter.scalar(step))
    expr = call("add", offset, at.lifter.scalar(start))
    return as_float(expr) if at.dtype.is_floating_point else expr


FILLED: Final[Mapping[str, str]] = {
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


@_rule(*FILLED)
def _filled(at: At) -> Expr:
    name = FILLED[at.name]
    given: Any = int(name) if name in "01" else at.args[name]
    dtype = at.dtype
    constant = at.lifter.scalar(given)
    if not isinstance(constant, Const):
        if dtype not in (torch.int64, at.lifter.computed_in):
            raise Unliftable(f"a number filled into {dtype}, which may round or wrap around")
        return converted(constant, kind(given), at.kind)
    if dtype == torch.bool:
        return Const(bool(constant.value))
    return rounded(Const(float(constant.value)), dtype) if dtype.is_floating_point else Const(int(constant.value))


@_rule("tril", "triu")
def _triangle(at: At) -> Expr:
    args = at.args
    row, column = value(at.index[-2]), value(at.index[-1])
    edge = call("add", row, at.lifter.scalar(args["diagonal"]))
    inside = call("le" if at.name == "tril" else "ge", column, edge)
    zero = {"bool": Const(False), "int": Const(0), "float": Const(0.0)}[at.kind]
    inner = at.lift(args["self"])
    if at.kind == "bool":
        return call("and", inside, inner)
    if isinstance(inner, Call) and inner.op == "where" and inner.args[2] == zero:
        return call("where", call("and", inside, inner.args[0]), inner.args[1], zero)
    return call("where", inside, inner, zero)


@_rule("eye")
def _diagonal(at: At) -> Expr:
    row, column = (value(dim) for dim in at.index)
    return converted(call("eq", column, row), "bool", at.kind)


@_rule("cat")
def _joined(at: At) -> Expr:
    """A choice by the position along the dimension; of data alone the tensor is as good."""
    dim = at.args["dim"] % len(at.index)
    parts = [x for x in at.args["tensors"] if len(shape(x)) == len(at.index) and not same(shape(x)[dim], 0)]
    if not parts:
        raise Unliftable("nothing joined")
    here = value(at.index[dim])
    start = 0
    found: list[tuple[Expr, int]] = []
    for part in parts:
        size = shape(part)[dim]
        if not isinstance(size, int) and part is not parts[-1]:
            raise Unliftable("joined at a size that is not known")
        digit: Index = () if same(size, 1) else (Digit(call("sub", here, Const(start)), size),)
        element = at.lift(part, (*at.index[:dim], digit, *at.index[dim + 1 :]))
        start += size if isinstance(size, int) else 0
        found.append((converted(element, kind(part), at.kind), start))
    with_score = ["s" in free_vars(element) for element, _ in found]
    if any(with_score) and not all(with_score):
        raise Unliftable("scores joined to other ones")
    expr, _ = found.pop()
    for element, end in reversed(found):
        expr = call("where", call("lt", here, Const(end)), element, expr)
    if "s" not in free_vars(expr) and any({"m", "n"} <= free_vars(x) for x in loads(expr)):
        raise Unliftable("joined data")
    return expr


_MOST_ALTERNATIVES: Final = 16


@_rule("any", "all")
def _quantified(at: At) -> Expr:
    """One alternative, or condition, for each element along a short dimension: rounds of hashing, several windows."""
    args = at.args
    source = args["self"]
    if not isinstance(args.get("dim"), int) or at.kind != "bool" or kind(source) != "bool":
        raise Unliftable(f"{at.name} of this form")
    dim = args["dim"] % len(shape(source))
    size = shape(source)[dim]
    if not isinstance(size, int) or not 1 <= size <= _MOST_ALTERNATIVES:
        raise Unliftable(f"{at.name} over {size} elements, at most {_MOST_ALTERNATIVES} are written out")
    kept = list(at.index)
    if args["keepdim"]:
        kept.pop(dim)
    digits: list[Index] = [(Digit(Const(i), size),) if size > 1 else () for i in range(size)]
    elements = [at.lift(source, (*kept[:dim], digit, *kept[dim:])) for digit in digits]
    return reduce(lambda a, b: call("or" if at.name == "any" else "and", a, b), elements)


@_rule("diff")
def _diff(at: At) -> Expr:
    args = at.args
    source, head = args["self"], args["prepend"]
    if args["n"] != 1 or args["append"] is not None or at.kind != "int":
        raise Unliftable("a difference of this form")
    dim = args["dim"] % len(at.index)
    here = value(at.index[dim])
    heads: Size = shape(head)[dim] if head is not None else 0
    if not isinstance(heads, int) or heads > 1:
        raise Unliftable("a difference of this form")

    def element(position: Expr) -> Expr:
        def moved(tensor: fx.Node, where: Expr) -> Expr:
            digit: Index = (Digit(where, shape(tensor)[dim]),) if not same(shape(tensor)[dim], 1) else ()
            return at.lift(tensor, (*at.index[:dim], digit, *at.index[dim + 1 :]))

        tail = moved(source, call("sub", position, Const(heads)))
        if not heads:
            return tail
        return call("where", call("lt", position, Const(1)), moved(head, Const(0)), tail)

    expr = call("sub", element(call("add", here, Const(1))), element(here))
    if loads(expr):
        raise Unliftable("a difference of data")
    return expr


@_rule("cumsum")
def _cumsum(at: At) -> Expr:
    args = at.args
    dim = args["dim"] % len(at.index)
    element = at.lift(args["self"])
    if isinstance(element, Const) and at.dtype == torch.int64:
        return call("mul", Const(int(element.value)), call("add", value(at.index[dim]), Const(1)))
    raise Unliftable("a running sum of data")


@_rule("index", moves=True)
def _index(at: At) -> Expr:
    args = at.args
    source, chosen = args["self"], args["indices"]
    given = [x for x in chosen if x is not None]
    places = [dim for dim, x in enumerate(chosen) if x is not None]
    if any(kind(x) != "int" for x in given) or places != list(range(places[0], places[0] + len(places))):
        raise Unliftable("indexing by a mask, or by tensors that do not stand together")
    rank = max(len(shape(x)) for x in given)
    middle = at.index[places[0] : places[0] + rank]
    out = list(at.index[: places[0]])
    for tensor, dim in zip(given, places, strict=True):
        where = at.operand(tensor, middle)
        if loads(where) and {"m", "n"} <= free_vars(where):
            raise Unliftable("a gather by data over queries and keys")
        size = shape(source)[dim]
        if not is_natural(where, middle):
            raise Unliftable("an index that may be negative")
        out.append(() if same(size, 1) else (Digit(where, size),))
    out.extend(at.index[places[0] + rank :])
    return at.lift(source, out)


@_rule("embedding", "index_select", moves=True)
def _rows(at: At) -> Expr:
    args = at.args
    source, chosen = (args["weight"], args["indices"]) if at.name == "embedding" else (args["self"], args["index"])
    dim = 0 if at.name == "embedding" else args["dim"] % len(shape(source))
    rank = len(shape(chosen))
    if not rank:
        raise Unliftable("one row")
    if args.get("padding_idx", -1) >= 0 or args.get("scale_grad_by_freq") or args.get("sparse"):
        raise Unliftable("a gradient that is not the sum over the rows read, or sparse")
    where = at.operand(chosen, at.index[dim : dim + rank])
    if loads(where) and {"m", "n"} <= free_vars(where):
        raise Unliftable("a gather by data over queries and keys")
    size = shape(source)[dim]
    row: Index = () if same(size, 1) else (Digit(where, size),)
    return at.lift(source, (*at.index[:dim], row, *at.index[dim + rank :]))


def is_natural(where: Expr, index: Sequence[Index]) -> bool:
    """Whether an index is certainly not negative (PyTorch would count it from the end)."""
    form = score.linear(where)
    least = score.lower_bound(form) if form is not None else None
    if least is not None and least >= 0:
        return True
    digits = [digit for dim in index for digit in dim if isinstance(digit.expr, Var)]
    ranges: Env = {str(x.expr): (0, x.size - 1 if isinstance(x.size, int) else math.inf) for x in digits}
    return interval(where, ranges)[0] >= 0
