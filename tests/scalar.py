"""A score expression at one index, in plain Python: the independent reading that simplification and bounds are held to."""

from collections.abc import Callable, Mapping

import numpy as np

from attnfuse.score import Const, Expr, Load, Var

Scalar = bool | int | np.float64
Reader = Callable[[str, tuple[int, ...]], Scalar]


class NoValueError(Exception):
    """The expression reads outside a leaf or divides by zero here."""


def evaluate(expr: Expr, env: Mapping[str, Scalar], read: Reader) -> Scalar:
    """The value of `expr`: integers exact, floats in float64.

    Args:
        env: values of the variables.
        read: `read(leaf, indices)` gives an element of a leaf, or raises NoValueError.
    """
    if isinstance(expr, Const):
        return np.float64(expr.value) if isinstance(expr.value, float) else expr.value
    if isinstance(expr, Var):
        return env[expr.name]
    if isinstance(expr, Load):
        return read(expr.leaf, tuple(int(evaluate(i, env, read)) for i in expr.indices))
    if expr.op == "where":
        condition, *arms = expr.args
        floating = any(isinstance(_attempt(a, env, read), np.float64) for a in arms)
        value = evaluate(arms[0] if evaluate(condition, env, read) else arms[1], env, read)
        return np.float64(value) if floating else value
    if expr.op in ("and", "or"):
        sides = [_attempt(a, env, read) for a in expr.args]
        decides = expr.op == "or"
        if any(x is decides for x in sides):
            return decides
        if None in sides:
            raise NoValueError
        return not decides
    args = [evaluate(a, env, read) for a in expr.args]
    with np.errstate(all="ignore"):
        return _apply(expr.op, *args)


def _attempt(expr: Expr, env: Mapping[str, Scalar], read: Reader) -> Scalar | None:
    try:
        return evaluate(expr, env, read)
    except NoValueError:
        return None


def _apply(op: str, *args: Scalar) -> Scalar:
    if op in ("floordiv", "mod") and args[1] == 0:
        raise NoValueError
    if any(isinstance(x, np.float64) for x in args) or op in _IN_FLOAT:
        args = tuple(np.float64(x) for x in args)
    value = _OPERATIONS[op](*args)
    return bool(value) if isinstance(value, bool | np.bool_) else value


def _least(a: Scalar, b: Scalar) -> Scalar:
    return np.minimum(a, b) if isinstance(a, np.float64) else min(a, b)


def _greatest(a: Scalar, b: Scalar) -> Scalar:
    return np.maximum(a, b) if isinstance(a, np.float64) else max(a, b)


_IN_FLOAT = ("div", "pow", "tanh", "exp", "log", "sqrt", "rsqrt", "sigmoid", "float", "bf16", "f16")
_OPERATIONS: Mapping[str, Callable[..., Scalar]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "neg": lambda a: -a,
    "abs": abs,
    "min": _least,
    "max": _greatest,
    "pow": lambda a, b: a**b,
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "float": lambda a: a,
    "bf16": lambda a: a if abs(a) < 2.0**128 - 2.0**119 or np.isnan(a) else a * np.inf,
    "f16": lambda a: a if abs(a) < 65520 or np.isnan(a) else a * np.inf,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
}
