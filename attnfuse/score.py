"""The score language: what an attention computes between its dot product and its softmax, as a value and as a text.

A `Program` is a scalar expression of the raw dot product `s` and of the indices `b, h, m, n`, a sequence of mask tiers, and
an optional sink.  `parse(str(program)) == program`; the text is the program's serialisation everywhere (operator argument,
cache keys, reports, goldens):

    s*0.125 where n <= m & pad[b, n] else +min

Build expressions with `call`, which folds constants and integer arithmetic; `Call(...)` and `parse` keep what they are given.
Floating-point arithmetic is never reassociated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

INDICES: Final = ("b", "h", "m", "n")
SIZES: Final = ("B", "H", "Hkv", "M", "N")
FILLS: Final = ("-inf", "+min", "=min", "0row")


@dataclass(frozen=True, slots=True)
class Const:
    """A literal; its Python type (bool, int, float) is its type in the language."""

    value: bool | int | float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Const) or type(self.value) is not type(other.value):
            return NotImplemented if not isinstance(other, Const) else False
        return repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash((type(self.value), repr(self.value)))

    def __str__(self) -> str:
        return _print(self, 0)


@dataclass(frozen=True, slots=True)
class Var:
    """`s` (float); an index `b h m n`; a size `B H Hkv M N`; or `i0, i1, …`, an entry of the operator's `sizes` (ints)."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Load:
    """The element of a tensor operand at integer indices."""

    leaf: str
    indices: tuple[Expr, ...]

    def __str__(self) -> str:
        return _print(self, 0)


@dataclass(frozen=True, slots=True)
class Call:
    """An operation of `OPS` on expressions."""

    op: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return _print(self, 0)


Expr = Const | Var | Load | Call

TRUE: Final = Const(True)
FALSE: Final = Const(False)
S: Final = Var("s")


@dataclass(frozen=True, slots=True)
class Tier:
    """One mask: keys where `allowed` is false are filled.

    How the fill entered decides the rows in which no key is allowed, in value and gradient:
    `-inf` gives NaN as eager does; `+min` (finfo.min was added) uniform weights whose gradient flows on to the score;
    `=min` (finfo.min replaced the score) uniform weights and no gradient to the score; `0row` a row of zeros.
    """

    allowed: Expr
    fill: str

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ValueError(f"fill {self.fill!r}: expected one of {', '.join(FILLS)}")


@dataclass(frozen=True, slots=True)
class Program:
    """`body`, then the tiers in order, then a sink (a score that takes weight and gives no value)."""

    body: Expr
    tiers: tuple[Tier, ...] = ()
    sink: Expr | None = None

    def __str__(self) -> str:
        text = str(self.body)
        for tier in self.tiers:
            text += f" where {tier.allowed} else {tier.fill}"
        if self.sink is not None:
            text += f" sink {self.sink}"
        return text

    def expressions(self) -> tuple[Expr, ...]:
        """Every top-level expression of the program."""
        sink = () if self.sink is None else (self.sink,)
        return (self.body, *(tier.allowed for tier in self.tiers), *sink)


class ScoreSyntaxError(ValueError):
    """A score text that does not parse; `position` is the 0-based column of the fault in `text`."""

    def __init__(self, message: str, text: str, position: int) -> None:
        super().__init__(f"{message} at column {position + 1}\n  {text}\n  {' ' * position}^")
        self.text = text
        self.position = position


# Binding strength of the infix operators, loosest first; calls by name are listed with their number of arguments.
_INFIX: Final[Mapping[str, tuple[str, int]]] = {
    "|": ("or", 1),
    "&": ("and", 2),
    "<=": ("le", 4),
    "<": ("lt", 4),
    ">=": ("ge", 4),
    ">": ("gt", 4),
    "==": ("eq", 4),
    "!=": ("ne", 4),
    "+": ("add", 5),
    "-": ("sub", 5),
    "*": ("mul", 6),
    "/": ("div", 6),
    "//": ("floordiv", 6),
    "%": ("mod", 6),
}
_NOT, _NEG, _ATOM = 3, 7, 9
_MAX_DIGITS: Final = 1000
_SYMBOL: Final = {op: (symbol, strength) for symbol, (op, strength) in _INFIX.items()}
FUNCTIONS: Final[Mapping[str, int]] = {
    "where": 3,
    "min": 2,
    "max": 2,
    "pow": 2,
    "abs": 1,
    "tanh": 1,
    "exp": 1,
    "log": 1,
    "sqrt": 1,
    "rsqrt": 1,
    "sigmoid": 1,
    "float": 1,
    "bf16": 1,
    "f16": 1,
}
OPS: Final = (*(op for op, _ in _INFIX.values()), "not", "neg", *FUNCTIONS)
COMPARISONS: Final = ("le", "lt", "ge", "gt", "eq", "ne")
BOOLEANS: Final = (*COMPARISONS, "and", "or", "not")
ROUNDINGS: Final[Mapping[str, float]] = {"bf16": 2.0**128 - 2.0**119, "f16": 2.0**16 - 2.0**4}
"""Rounding to a narrower type, which is an error of the computation but for what it makes of numbers beyond the type's range:
from these magnitudes on, infinities. That alone is what these functions compute; their derivative is 1."""
ALWAYS_FLOAT: Final = ("div", "pow", "tanh", "exp", "log", "sqrt", "rsqrt", "sigmoid", "float", *ROUNDINGS)

_TOKEN: Final = re.compile(
    r"\s*(?:(?P<fill>-inf\b|\+min\b|=min\b|0row\b)|(?P<float>(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?)|(?P<int>\d+)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<sign><=|>=|==|!=|//|[-+*/%&|~<>()\[\],]))"
)


def _spaced(symbol: str) -> str:
    return symbol if symbol in "*/" else f" {symbol} "


def _print(expr: Expr, outer: int) -> str:
    if isinstance(expr, Var):
        return expr.name
    if isinstance(expr, Load):
        return f"{expr.leaf}[{', '.join(_print(i, 0) for i in expr.indices)}]"
    if isinstance(expr, Const):
        text = repr(expr.value)
        negative = text.startswith("-")
        return f"({text})" if negative and outer > _NEG else text
    if expr.op in FUNCTIONS:
        return f"{expr.op}({', '.join(_print(a, 0) for a in expr.args)})"
    if expr.op in ("not", "neg"):
        sign, strength = ("~", _NOT) if expr.op == "not" else ("-", _NEG)
        inner = expr.args[0]
        # "-1.0" is read as a literal, so a negated literal keeps its parentheses
        text = f"({inner})" if expr.op == "neg" and isinstance(inner, Const) else _print(inner, strength)
        text = sign + text
    else:
        symbol, strength = _SYMBOL[expr.op]
        left, right = expr.args
        # comparisons do not chain: both sides bind tighter
        text = _print(left, strength + (strength == 4)) + _spaced(symbol) + _print(right, strength + 1)
    return f"({text})" if strength < outer else text


_Read = TypeVar("_Read")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            kind = match.lastgroup if match else None
            if match and kind == "fill" and not self._after_else():
                # "-inf" and "+min" are fills only behind `else`; elsewhere the sign is an operator
                match = re.compile(r"\s*(?:(?P<sign>[-+])|(?P<int>0))").match(text, at)
                kind = match.lastgroup if match else None
            if match is None or kind is None:
                column = at + len(text[at:]) - len(text[at:].lstrip())
                raise ScoreSyntaxError(f"unexpected {text[column]!r}", text, column)
            self.tokens.append((kind, match[kind], match.start(kind)))
            at = match.end()
        self.tokens.append(("end", "", end))
        self.at = 0

    def _after_else(self) -> bool:
        return bool(self.tokens) and self.tokens[-1][:2] == ("name", "else")

    @property
    def now(self) -> tuple[str, str, int]:
        return self.tokens[self.at]

    @property
    def found(self) -> str:
        return repr(self.now[1]) if self.now[1] else "the end"

    def fail(self, message: str) -> NoReturn:
        raise ScoreSyntaxError(message, self.text, self.now[2])

    def take(self, word: str) -> bool:
        if self.now[0] in ("sign", "name") and self.now[1] == word:
            self.at += 1
            return True
        return False

    def expect(self, word: str) -> None:
        if not self.take(word):
            self.fail(f"expected {word!r}, found {self.found}")

    def read(self, rule: Callable[[_Parser], _Read]) -> _Read:
        try:
            return rule(self)
        except RecursionError:
            pass
        self.fail("nested too deeply")

    def single(self) -> Expr:
        expr = self.expression(0)
        self.end()
        return expr

    def program(self) -> Program:
        body = self.expression(0)
        tiers = []
        while self.take("where"):
            allowed = self.expression(0)
            self.expect("else")
            kind, fill, _ = self.now
            if kind != "fill":
                self.fail(f"expected a fill ({', '.join(FILLS)}), found {self.found}")
            self.at += 1
            tiers.append(Tier(allowed, fill))
        sink = self.expression(0) if self.take("sink") else None
        self.end()
        return Program(body, tuple(tiers), sink)

    def end(self) -> None:
        if self.now[0] != "end":
            self.fail(f"unexpected {self.now[1]!r}")

    def expression(self, strength: int) -> Expr:
        left = self.operand()
        while True:
            op, binds = _INFIX.get(self.now[1], ("", -1)) if self.now[0] == "sign" else ("", -1)
            if binds < 0 or binds < strength:
                return left
            self.at += 1
            left = Call(op, (left, self.expression(binds + 1)))
            if binds == 4 and _INFIX.get(self.now[1], ("", -1))[1] == 4:
                self.fail("comparisons do not chain: join them with &")

    def operand(self) -> Expr:
        kind, text, _ = self.now
        if kind == "end":
            self.fail("expected an expression, found the end")
        self.at += 1
        if kind == "float":
            return Const(float(text))
        if kind == "int":
            if len(text) > _MAX_DIGITS:
                self.at -= 1
                self.fail(f"an integer of {len(text)} digits, at most {_MAX_DIGITS} are read")
            return Const(int(text))
        if text == "(":
            inner = self.expression(0)
            self.expect(")")
            return inner
        if text == "-":
            literal = self.now[0] in ("int", "float") or self.now[1] in ("inf", "nan")
            inner = self.expression(_NEG)
            return Const(-inner.value) if literal and isinstance(inner, Const) else Call("neg", (inner,))
        if text == "~":
            return Call("not", (self.expression(_NOT),))
        if kind == "name":
            return self.named(text)
        self.at -= 1
        self.fail(f"expected an expression, found {text!r}")

    def named(self, name: str) -> Expr:
        if name in ("True", "False"):
            return Const(name == "True")
        if name in ("inf", "nan"):
            return Const(float(name))
        if self.take("["):
            return Load(name, self.arguments("]"))
        if name in FUNCTIONS:
            self.expect("(")
            args = self.arguments(")")
            if len(args) != FUNCTIONS[name]:
                self.fail(f"{name} takes {FUNCTIONS[name]} arguments, found {len(args)}")
            return Call(name, args)
        if name == "s" or name in INDICES or name in SIZES or re.fullmatch(r"i\d+", name):
            return Var(name)
        self.at -= 1
        self.fail(f"unknown name {name!r}: expected s, {', '.join((*INDICES, *SIZES))}, i0…, or a leaf with indices")

    def arguments(self, closing: str) -> tuple[Expr, ...]:
        args: list[Expr] = []
        while not self.take(closing):
            if args:
                self.expect(",")
            args.append(self.expression(0))
        return tuple(args)


def parse(text: str) -> Program:
    """The program that `text` spells.  Raises ScoreSyntaxError with the position of the first fault."""
    return _Parser(text).read(_Parser.program)


def parse_expr(text: str) -> Expr:
    """The single expression that `text` spells.  Raises ScoreSyntaxError."""
    return _Parser(text).read(_Parser.single)


def walk(expr: Expr) -> Iterator[Expr]:
    """`expr` and every expression in it, parents first."""
    yield expr
    if isinstance(expr, Load | Call):
        for child in expr.indices if isinstance(expr, Load) else expr.args:
            yield from walk(child)


def loads(expr: Expr) -> tuple[Load, ...]:
    """The distinct loads in `expr`, in order of first appearance."""
    return tuple(dict.fromkeys(e for e in walk(expr) if isinstance(e, Load)))


def added_loads(expr: Expr) -> list[Load]:
    """The loads whose values, and not only whose truth, go into an expression."""
    if isinstance(expr, Load):
        return [expr]
    if not isinstance(expr, Call) or expr.op in BOOLEANS:
        return []
    parts = expr.args[1:] if expr.op == "where" else expr.args
    return [load for part in parts for load in added_loads(part)]


def free_vars(expr: Expr) -> frozenset[str]:
    """Names of the variables in `expr`, those in indices of loads included."""
    return frozenset(e.name for e in walk(expr) if isinstance(e, Var))


def substitute(expr: Expr, values: Mapping[Expr, Expr]) -> Expr:
    """`expr` with every occurrence of a key of `values` replaced, simplified on the way up."""
    if expr in values:
        return values[expr]
    if isinstance(expr, Load):
        return Load(expr.leaf, tuple(substitute(i, values) for i in expr.indices))
    if isinstance(expr, Call):
        return call(expr.op, *(substitute(a, values) for a in expr.args))
    return expr


def simplify(expr: Expr) -> Expr:
    """`expr` rebuilt through `call`."""
    return substitute(expr, {})


def is_int(expr: Expr) -> bool:
    """Whether `expr` is known to be an integer (a load's type is not known here)."""
    if isinstance(expr, Const):
        return type(expr.value) is int
    if isinstance(expr, Var):
        return expr.name != "s"
    if isinstance(expr, Load) or expr.op in BOOLEANS:
        return False
    if expr.op == "where":
        return all(is_int(a) for a in expr.args[1:])
    return expr.op in ("add", "sub", "mul", "neg", "floordiv", "mod", "min", "max", "abs") and all(
        map(is_int, expr.args)
    )


def is_float(expr: Expr) -> bool:
    """Whether `expr` is known to be a floating-point number (a load's type is not known here)."""
    if isinstance(expr, Const):
        return type(expr.value) is float
    if isinstance(expr, Var | Load):
        return expr == S
    if expr.op in ("add", "sub", "mul", "neg", "abs", "min", "max", "where"):
        return any(map(is_float, expr.args[1:] if expr.op == "where" else expr.args))
    return expr.op in ALWAYS_FLOAT


def is_bool(expr: Expr) -> bool:
    """Whether `expr` is known to be a truth value."""
    if isinstance(expr, Const):
        return type(expr.value) is bool
    if isinstance(expr, Call):
        return expr.op in BOOLEANS or (expr.op == "where" and all(is_bool(a) for a in expr.args[1:]))
    return False


_INT_FOLD: Final[Mapping[str, Callable[..., object]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "abs": abs,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
# Results of these are the same in every precision that the operands have been written in.
_FLOAT_FOLD: Final = ("neg", "abs", "min", "max", *COMPARISONS)
_MIRROR: Final = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}
_INVERSE: Final = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}


def _fold(op: str, values: list[bool | int | float]) -> Expr | None:
    """The constant that `op` gives on constants, where that is exact."""
    if op in ("floordiv", "mod") and values[1] == 0:
        return None
    if all(type(v) is int for v in values) and op in _INT_FOLD:
        return Const(_INT_FOLD[op](*values))  # type: ignore[arg-type]
    if any(type(v) is float and not math.isfinite(v) for v in values):
        return None
    floating = any(type(v) is float for v in values)
    if op in _FLOAT_FOLD:
        chosen: bool | int | float = _INT_FOLD[op](*values)  # type: ignore[assignment]
        return Const(float(chosen) if floating and op in ("min", "max") else chosen)
    if op in ("add", "sub", "mul") and floating:
        # exact where integers are small or one operand is neutral
        result = float(_INT_FOLD[op](*values))  # type: ignore[arg-type]
        small = all(float(v).is_integer() and abs(v) <= 1 for v in values)
        return Const(result) if small or 0 in values or (op == "mul" and any(abs(v) == 1 for v in values)) else None
    return None


def call(op: str, *args: Expr) -> Expr:
    """`Call(op, args)` after local simplification that changes no value: constants, neutral elements, truth values, linear
    integer comparisons (kept as `n <= …` where `n` can stand alone).

    Types stay too, but two loads that a choice is between are taken to have one type."""
    constants = [a.value for a in args if isinstance(a, Const)]
    if len(constants) == len(args) and op not in ("where", "not", "and", "or", "float"):
        folded = _fold(op, constants)
        if folded is not None:
            return folded
    if op in _LOCAL:
        return _LOCAL[op](*args)
    if op in COMPARISONS:
        return _comparison(op, *args)
    return Call(op, args)


def _is(expr: Expr, value: float) -> bool:
    return isinstance(expr, Const) and type(expr.value) is not bool and expr.value == value


def _neutral(expr: Expr, value: int, other: Expr) -> bool:
    """Whether `expr` is a literal `value` that can be left out beside `other` without changing the type of the result."""
    return _is(expr, value) and (is_int(expr) or is_float(other))


def _arms(expr: Expr) -> bool:
    """Whether `expr` is a choice between two constants."""
    return isinstance(expr, Call) and expr.op == "where" and all(isinstance(a, Const) for a in expr.args[1:])


def _into_arms(op: str, *args: Expr) -> Expr | None:
    """`op` moved into a choice between constants when the other operands are constants (each arm must fold)."""
    for at, arg in enumerate(args):
        if _arms(arg) and all(isinstance(a, Const) for i, a in enumerate(args) if i != at):
            assert isinstance(arg, Call)
            arms = [call(op, *(arm if i == at else a for i, a in enumerate(args))) for arm in arg.args[1:]]
            if all(isinstance(a, Const) for a in arms):
                return call("where", arg.args[0], *arms)
    return None


def _int_where(op: str, left: Expr, right: Expr) -> Expr | None:
    """Arithmetic of two integers moved into a choice, so that `where(n < 1, n + 1, 1)` and the like can be resolved."""
    for at, arg in enumerate((left, right)):
        if isinstance(arg, Call) and arg.op == "where" and is_int(arg):
            other = right if at == 0 else left
            first, second = ((call(op, arm, other) if at == 0 else call(op, other, arm)) for arm in arg.args[1:])
            return call("where", arg.args[0], first, second)
    return None


def _add(a: Expr, b: Expr) -> Expr:
    if _neutral(a, 0, b):
        return b
    if _neutral(b, 0, a):
        return a
    if is_int(a) and is_int(b):
        return _int_where("add", a, b) or _linear_sum("add", a, b)
    return _into_arms("add", a, b) or Call("add", (a, b))


def _sub(a: Expr, b: Expr) -> Expr:
    if _neutral(b, 0, a):
        return a
    if is_int(a) and is_int(b):
        return _int_where("sub", a, b) or _linear_sum("sub", a, b)
    return _into_arms("sub", a, b) or Call("sub", (a, b))


def _mul(a: Expr, b: Expr) -> Expr:
    if _neutral(a, 1, b):
        return b
    if _neutral(b, 1, a):
        return a
    if is_int(a) and is_int(b):
        if _is(a, 0) or _is(b, 0):
            return Const(0)
        if isinstance(a, Const) or isinstance(b, Const):
            return _int_where("mul", a, b) or _linear_sum("mul", a, b)
    return _into_arms("mul", a, b) or Call("mul", (a, b))


def _div(a: Expr, b: Expr) -> Expr:
    return a if _is(b, 1) and is_float(a) else Call("div", (a, b))


def _floordiv(a: Expr, b: Expr) -> Expr:
    if _is(b, 1):
        return a
    return Const(0) if _is(a, 0) and not _is(b, 0) else Call("floordiv", (a, b))


def _mod(a: Expr, b: Expr) -> Expr:
    return Const(0) if _is(b, 1) or (_is(a, 0) and not _is(b, 0)) else Call("mod", (a, b))


def _neg(a: Expr) -> Expr:
    if isinstance(a, Call) and a.op == "neg":
        return a.args[0]
    return call("mul", Const(-1), a) if is_int(a) else Call("neg", (a,))


def _not(a: Expr) -> Expr:
    if isinstance(a, Const):
        return Const(not a.value)
    if isinstance(a, Call):
        if a.op == "not":
            return a.args[0]
        if a.op in ("eq", "ne") or (a.op in COMPARISONS and all(is_int(x) for x in a.args)):
            return Call(_INVERSE[a.op], a.args)
        if _arms(a):
            return call("where", a.args[0], _not(a.args[1]), _not(a.args[2]))
    return Call("not", (a,))


def _and(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const):
        return b if a.value else FALSE
    if isinstance(b, Const):
        return a if b.value else FALSE
    terms = list(dict.fromkeys((*conjuncts(a), *conjuncts(b))))
    if not terms:
        return TRUE
    out = terms[0]
    for term in terms[1:]:
        out = Call("and", (out, term))
    return out


def _or(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Const):
        return TRUE if a.value else b
    if isinstance(b, Const):
        return TRUE if b.value else a
    return a if a == b else Call("or", (a, b))


def _where(c: Expr, a: Expr, b: Expr) -> Expr:
    if a == b:
        return a
    if isinstance(c, Const):
        chosen, other = (a, b) if c.value else (b, a)
        if is_float(other) and not is_float(chosen):
            return call("float", chosen)
        if is_int(other) or not is_int(chosen):
            return chosen
    if isinstance(a, Const) and isinstance(b, Const) and type(a.value) is bool and type(b.value) is bool:
        return c if a.value else _not(c)
    if TRUE in (a, b) or FALSE in (a, b):
        inside, other = (c, b) if a in (TRUE, FALSE) else (_not(c), a)
        return _or(inside, other) if TRUE in (a, b) else _and(_not(inside), other)
    pinned = _pinned(c)
    if pinned is not None:
        a = substitute(a, pinned)
        if a == b or (a == substitute(b, pinned) and isinstance(b, Const)):
            return b
    return Call("where", (c, a, b))


def _pinned(c: Expr) -> dict[Expr, Expr] | None:
    """`{n: 0}` for a condition such as `n < 1` or `n == 0`: the only value that an index can have where it holds."""
    if (
        isinstance(c, Call)
        and c.op in ("lt", "le", "eq")
        and isinstance(c.args[0], Var)
        and isinstance(c.args[1], Const)
    ):
        var, bound = c.args[0], c.args[1].value
        if var.name in INDICES and ((c.op == "lt" and bound == 1) or (c.op != "lt" and bound == 0)):
            return {var: Const(0)}
    return None


def _minmax(op: str) -> Callable[[Expr, Expr], Expr]:
    def build(a: Expr, b: Expr) -> Expr:
        return a if a == b else Call(op, (a, b))

    return build


def _float(a: Expr) -> Expr:
    if isinstance(a, Const):
        return Const(float(a.value))
    if is_float(a):
        return a
    if is_bool(a):
        return call("where", a, Const(1.0), Const(0.0))
    if _arms(a) and isinstance(a, Call):
        return call("where", a.args[0], _float(a.args[1]), _float(a.args[2]))
    return Call("float", (a,))


_LOCAL: Final[Mapping[str, Callable[..., Expr]]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "neg": _neg,
    "not": _not,
    "and": _and,
    "or": _or,
    "where": _where,
    "min": _minmax("min"),
    "max": _minmax("max"),
    "float": _float,
}


@dataclass(frozen=True, slots=True)
class Linear:
    """`constant + Σ coefficient·atom`; atoms are variables or any other integer expression that is no sum."""

    terms: Mapping[Expr, int]
    constant: int

    def coefficient(self, atom: Expr) -> int:
        return self.terms.get(atom, 0)

    def without(self, atom: Expr) -> Linear:
        return Linear({a: c for a, c in self.terms.items() if a != atom}, self.constant)

    def scaled(self, factor: int) -> Linear:
        return Linear({a: c * factor for a, c in self.terms.items() if c * factor}, self.constant * factor)

    def plus(self, other: Linear) -> Linear:
        terms = dict(self.terms)
        for atom, c in other.terms.items():
            terms[atom] = terms.get(atom, 0) + c
        return Linear({a: c for a, c in terms.items() if c}, self.constant + other.constant)

    def expr(self) -> Expr:
        """The sum as an expression: positive terms first, the constant last."""
        out: Expr | None = None
        for atom, c in sorted(self.terms.items(), key=lambda item: item[1] < 0):
            term = atom if abs(c) == 1 else Call("mul", (atom, Const(abs(c))))
            if out is None:
                out = term if c > 0 else Call("mul", (atom, Const(c)))
            else:
                out = Call("add" if c > 0 else "sub", (out, term))
        if out is None:
            return Const(self.constant)
        if self.constant:
            out = Call("add" if self.constant > 0 else "sub", (out, Const(abs(self.constant))))
        return out


def linear(expr: Expr, *, loads_are_int: bool = False) -> Linear | None:
    """`expr` as a linear form over its atoms, or None if it is not known to be an integer.

    Args:
        loads_are_int: the caller knows that `expr` is an integer, and so are the loads that it adds up.
    """
    if isinstance(expr, Const):
        return Linear({}, expr.value) if type(expr.value) is int else None
    if isinstance(expr, Var) or (isinstance(expr, Load) and loads_are_int):
        return None if expr == S else Linear({expr: 1}, 0)
    if isinstance(expr, Call):
        if expr.op in ("add", "sub", "mul", "neg"):
            parts = [linear(a, loads_are_int=loads_are_int) for a in expr.args]
            left = parts[0]
            if left is None or any(p is None for p in parts):
                return None
            if expr.op == "neg":
                return left.scaled(-1)
            right = parts[1]
            assert right is not None
            if expr.op == "mul":
                if not right.terms:
                    return left.scaled(right.constant)
                return right.scaled(left.constant) if not left.terms else Linear({expr: 1}, 0)
            return left.plus(right if expr.op == "add" else right.scaled(-1))
        if loads_are_int or is_int(expr):
            return Linear({expr: 1}, 0)
    return None


def _linear_sum(op: str, a: Expr, b: Expr) -> Expr:
    form = linear(Call(op, (a, b)))
    assert form is not None
    return form.expr()


_N: Final = Var("n")


def _comparison(op: str, a: Expr, b: Expr) -> Expr:
    moved = _into_arms(op, a, b)
    if moved is not None:
        return moved
    if a == b and is_int(a):
        return Const(op in ("le", "ge", "eq"))
    if not (is_int(a) and is_int(b)):
        return Call(op, (a, b))
    for x, y, name in ((a, b, op), (b, a, _MIRROR[op])):
        if isinstance(x, Call) and x.op == "where":
            arms = [call(name, arm, y) for arm in x.args[1:]]
            if all(isinstance(arm, Const) for arm in arms):
                return call("where", x.args[0], *arms)
    difference = linear(Call("sub", (a, b)))
    assert difference is not None
    truth = _truth(op, difference)
    if truth is not None:
        return Const(truth)
    c = difference.coefficient(_N)
    if abs(c) == 1 and not any(_N in walk(atom) for atom in difference.terms if atom != _N):
        rest = difference.without(_N).scaled(-c)
        return Call(op if c > 0 else _MIRROR[op], (_N, rest.expr()))
    return Call(op, (a, b))


def lower_bound(form: Linear) -> int | None:
    """The least value of a linear form over all indices in range (`0 <= n <= N - 1`, sizes at least 1), if it has one here."""
    bound = form
    for index, size in (("b", "B"), ("h", "H"), ("m", "M"), ("n", "N")):
        c = bound.coefficient(Var(index))
        bound = bound.without(Var(index))
        if c < 0:
            bound = bound.plus(Linear({Var(size): 1}, -1).scaled(c))
    total = bound.constant
    for atom, c in bound.terms.items():
        if c < 0 or not (isinstance(atom, Var) and atom.name in SIZES):
            return None
        total += c
    return total


def _at_least(form: Linear, value: int) -> bool:
    bound = lower_bound(form)
    return bound is not None and bound >= value


def _truth(op: str, d: Linear) -> bool | None:
    """The truth of `d op 0` where it is the same for every index in range."""
    if op in ("lt", "gt"):
        strict = d if op == "gt" else d.scaled(-1)
        if _at_least(strict, 1):
            return True
        return False if _at_least(strict.scaled(-1), 0) else None
    if op in ("le", "ge"):
        form = d if op == "ge" else d.scaled(-1)
        if _at_least(form, 0):
            return True
        return False if _at_least(form.scaled(-1), 1) else None
    apart = _at_least(d, 1) or _at_least(d.scaled(-1), 1)
    return (op == "ne") if apart else None


def conjuncts(expr: Expr) -> tuple[Expr, ...]:
    """The terms of a conjunction, in order; nothing for a literal True."""
    if isinstance(expr, Call) and expr.op == "and":
        return (*conjuncts(expr.args[0]), *conjuncts(expr.args[1]))
    return () if expr == TRUE else (expr,)


def derivative(expr: Expr, wrt: Expr) -> Expr:
    """d expr / d wrt, with PyTorch's choices where it is not defined (0 for |x| at 0, halves where min and max tie).

    Args:
        wrt: `s`, or one Load of a floating-point leaf; every other load is constant, equal loads are the same variable.
    """
    if expr == wrt:
        return Const(1.0)
    if isinstance(expr, Const | Var | Load) or wrt not in walk(expr) or expr.op in BOOLEANS:
        return Const(0.0)
    a = expr.args[0]
    da = derivative(a, wrt)
    if expr.op in _CHAIN:
        return _product(_CHAIN[expr.op](expr, a), da)
    if expr.op == "neg":
        return call("neg", da)
    if expr.op == "where":
        return call("where", a, *(derivative(x, wrt) for x in expr.args[1:]))
    b = expr.args[1]
    db = derivative(b, wrt)
    if expr.op in ("add", "sub"):
        return _sum(expr.op, da, db)
    if expr.op == "mul":
        return _sum("add", _product(da, b), _product(a, db))
    if expr.op == "div":
        if _is(db, 0):
            return call("div", da, b)
        return call("div", _sum("sub", da, _product(expr, db)), b)
    if expr.op == "pow" and _is(db, 0):
        if _is(b, 0):
            return Const(0.0)
        return _product(call("mul", b, call("pow", a, call("sub", b, Const(1.0)))), da)
    if expr.op in ("min", "max"):
        first = call("lt" if expr.op == "min" else "gt", a, b)
        half = _product(Const(0.5), _sum("add", da, db))
        return call("where", first, da, call("where", call("eq", a, b), half, db))
    raise ValueError(f"{expr.op} has no derivative with respect to {wrt} in {expr}")


def _sum(op: str, a: Expr, b: Expr) -> Expr:
    """`a + b` or `a - b` of derivatives, where a literal zero means that the term is absent."""
    if _is(b, 0):
        return a
    if _is(a, 0):
        return b if op == "add" else call("neg", b)
    return call(op, a, b)


def _product(a: Expr, b: Expr) -> Expr:
    """A product of derivatives, where a literal zero factor means that the term is absent."""
    if _is(a, 0) or _is(b, 0):
        return Const(0.0)
    if _is(a, 1) or _is(b, 1):
        left = b if _is(a, 1) else a
        return call("float", left) if is_int(left) else left
    return call("mul", a, b)


_ONE: Final = Const(1.0)
_CHAIN: Final[Mapping[str, Callable[[Call, Expr], Expr]]] = {
    "tanh": lambda f, a: call("sub", _ONE, call("mul", f, f)),
    "exp": lambda f, a: f,
    "log": lambda f, a: call("div", _ONE, a),
    "sqrt": lambda f, a: call("div", Const(0.5), f),
    "rsqrt": lambda f, a: call("div", call("mul", Const(-0.5), f), a),
    "sigmoid": lambda f, a: call("mul", f, call("sub", _ONE, f)),
    "abs": lambda f, a: call(
        "where", call("gt", a, Const(0.0)), _ONE, call("where", call("lt", a, Const(0.0)), Const(-1.0), Const(0.0))
    ),
    "float": lambda f, a: _ONE,
    **dict.fromkeys(ROUNDINGS, lambda f, a: _ONE),
}
