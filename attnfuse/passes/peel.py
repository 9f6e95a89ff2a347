"""The layers around a softmax, one small function a layer.

`program_of` peels masks off the lifted score until the score arithmetic remains; `descend` goes from the weights through casts,
dropout and views to the value matmul.  Each step either gives the next layer or raises `Miss` with the node that stopped it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import bound, fake, is_tensor, packet, shape
from attnfuse.passes.index import Digit, Index, Misaligned, Size, Unliftable, regroup, same
from attnfuse.passes.magnitude import most
from attnfuse.passes.respell import CAUTION
from attnfuse.passes.views import PERMUTATIONS, broadcast, permutation
from attnfuse.score import (
    BOOLEANS,
    ROUNDINGS,
    TRUE,
    Call,
    Const,
    Expr,
    Load,
    Program,
    Tier,
    Var,
    added_loads,
    call,
    free_vars,
    loads,
    walk,
)
from attnfuse.templates.affine import MINIMA, added_mask, constant


class Miss(Exception):
    """A site that is left alone, with the code of its remark, the node that stopped the match and what else is known."""

    def __init__(self, code: str, node: fx.Node | None = None, why: str = "", **facts: object) -> None:
        super().__init__(f"{code} at {node}: {why}")
        self.code = code
        self.node = node
        self.facts: dict[str, object] = {**({"why": why} if why else {}), **facts}


# The finite fills that are masks, by the type of the scores; bfloat16's also where they were cast to float32 since.
_MINIMA: Final = {
    torch.float64: (MINIMA[torch.float64],),
    torch.float32: (MINIMA[torch.float32], MINIMA[torch.bfloat16]),
    torch.bfloat16: (MINIMA[torch.bfloat16],),
}


def _fill(expr: Expr, dtype: torch.dtype) -> str:
    """`-inf` or `min` where the constant is a mask's fill for scores of that type, else an empty string."""
    if not isinstance(expr, Const) or type(expr.value) is not float:
        return ""
    if expr.value == float("-inf"):
        return "-inf"
    return "min" if expr.value in _MINIMA.get(dtype, ()) else ""


def _is_zero(expr: Expr) -> bool:
    return isinstance(expr, Const) and type(expr.value) is float and expr.value == 0.0


def _added_mask(expr: Expr, dtype: torch.dtype) -> tuple[Expr, str] | None:
    """(allowed, fill) of an addend that is 0 where allowed and a fill elsewhere."""
    if not (isinstance(expr, Call) and expr.op == "where") or "s" in free_vars(expr):
        return None
    condition, a, b = expr.args
    if _is_zero(a):
        if fill := _fill(b, dtype):
            return condition, fill
        inner = _added_mask(b, dtype)
        return (call("or", condition, inner[0]), inner[1]) if inner else None
    if _is_zero(b):
        if fill := _fill(a, dtype):
            return call("not", condition), fill
        inner = _added_mask(a, dtype)
        return (call("or", call("not", condition), inner[0]), inner[1]) if inner else None
    for arm, other, allowed in ((a, b, condition), (b, a, call("not", condition))):
        fill, inner = _fill(other, dtype), _added_mask(arm, dtype)
        if fill and inner and inner[1] == fill:
            return call("and", allowed, inner[0]), fill
    return None


Holds = Callable[[Load], frozenset[float]]
"""Which of -inf and its type's finfo.min an added leaf holds, as far as is known."""


def _holds_none(load: Load) -> frozenset[float]:
    return frozenset()


def program_of(
    expr: Expr,
    dtype: torch.dtype,
    greatest: Callable[[Load], float] = lambda load: math.inf,
    holds: Holds = _holds_none,
) -> Program:
    """The lifted input of the softmax as body and tiers.

    Args:
        expr: the score in `s`.
        dtype: the element type of the scores where masks are applied; finfo.min is a mask only for that type or a wider one.
        greatest: the greatest magnitude that a leaf of floating-point numbers holds, 0 for one of other numbers.
        holds: which leaves are masks; they stay in the body too.

    Raises:
        Miss: AF024 if an infinity or NaN is left in the score arithmetic, where gradients depend on the order of operations.
    """
    read = Counter(e for e in walk(expr) if isinstance(e, Load))

    def of_once(load: Load) -> frozenset[float]:
        return holds(load) if read[load] == 1 else frozenset()

    attempts: list[Holds] = [_holds_none]
    if any(map(of_once, read)):
        attempts = [of_once, lambda load: of_once(load) & {-math.inf}, _holds_none]
    for masks in attempts:
        body, tiers = _peeled(expr, dtype, masks)
        if tiers and _min_is_least(expr, body, tiers, dtype, greatest):
            return Program(only_finite(body), tuple(tiers))
    return Program(only_finite(expr))


def only_finite(body: Expr) -> Expr:
    """The body; raises Miss AF024 if an infinity or NaN is written into it."""
    for e in walk(body):
        if isinstance(e, Const) and type(e.value) is float and not math.isfinite(e.value):
            raise Miss("AF024", None, f"a fill of {e.value} goes into further arithmetic")
    return body


def _min_is_least(
    expr: Expr, body: Expr, tiers: Sequence[Tier], dtype: torch.dtype, greatest: Callable[[Load], float]
) -> bool:
    """Whether keys filled with finfo.min are certainly the least of a row: one fill for all of them, and nothing in the body that
    may be as low or lower (a dense additive mask, -inf by rounding).

    An added leaf that is itself the mask is greater than finfo.min in other cells, by more than scores are. Beside another mask it
    might make -inf of that one's finfo.min.
    """
    minimal = [tier for tier in tiers if tier.fill in ("+min", "=min")]
    if not minimal:
        return True
    masks = {mask for tier in minimal if (mask := added_mask(tier)) is not None and mask in walk(body)}
    if masks and (len(minimal) > 1 or sum(e in masks for e in walk(expr)) > 1):
        return False
    given = (e for x in (expr, *(tier.allowed for tier in tiers)) for e in walk(x))
    fills = {e.value for e in given if isinstance(e, Const) and e.value in _MINIMA.get(dtype, ())}
    inside = [*walk(body)]
    low = any(isinstance(e, Const) and abs(e.value) > _ABSORBED for e in inside)
    rounded = any(isinstance(e, Call) and e.op in ROUNDINGS for e in inside)
    # what is added to whole rows masks no key, unless their masked ones are replaced, or their mask is a sum with it
    by_row = not masks and all(tier.fill != "=min" for tier in tiers)

    def beside(load: Load) -> float:
        return 0.0 if load in masks else greatest(load)

    return len(fills) == 1 and not low and not rounded and _stays_common(body, beside, by_row=by_row)


# Factors up to this make nothing of a score that finfo.min would be lost among.
LARGE_FACTOR: Final = 2.0**20


def _stays_common(expr: Expr, greatest: Callable[[Load], float], *, by_row: bool) -> bool:
    """Whether arithmetic on scores, and on data like them, gives nothing of another magnitude.

    Args:
        greatest: as in `program_of`.
        by_row: whether anything may be added that is the same for all keys.
    """
    if "s" not in free_vars(expr) and most(expr, greatest) <= _ABSORBED:
        return True
    if isinstance(expr, Load):
        return by_row and "n" not in free_vars(expr)
    if not isinstance(expr, Call) or expr.op in BOOLEANS or not loads(expr) or expr.op == "float":
        return True
    if expr.op in ("mul", "div"):
        if not any("n" in free_vars(load) for load in loads(expr)) and "s" in free_vars(expr):
            # a temperature
            return True
        known = constant(expr.args[1])
        factor = 0.0 if not known else abs(known) if expr.op == "mul" else 1 / abs(known)
        return 0 < factor <= LARGE_FACTOR and _stays_common(expr.args[0], greatest, by_row=by_row)
    if expr.op == "where":
        return all(_stays_common(x, greatest, by_row=False) for x in expr.args[1:])
    if expr.op in ("tanh", "sigmoid"):
        return True
    return expr.op in ("add", "sub", "neg") and all(_stays_common(x, greatest, by_row=by_row) for x in expr.args)


# Well below 2**103, half a unit in the last place of float32's least value: what is smaller is lost when added to it.
_ABSORBED: Final = 2.0**100


def _peeled(expr: Expr, dtype: torch.dtype, holds: Holds) -> tuple[Expr, list[Tier]]:
    if not isinstance(expr, Call):
        return expr, []
    if expr.op == "where" and "s" not in free_vars(expr.args[0]):
        condition, a, b = expr.args
        for kept, filled, allowed in ((a, b, condition), (b, a, call("not", condition))):
            fill = _fill(filled, dtype)
            if fill and "s" in free_vars(kept):
                body, tiers = _peeled(kept, dtype, holds)
                return body, [*tiers, Tier(allowed, "-inf" if fill == "-inf" else "=min")]
        if "s" in free_vars(a) and "s" in free_vars(b):
            # scores that are joined, each part under masks of its own
            (first, some), (second, more) = (_peeled(x, dtype, holds) for x in (a, b))
            tiers = [Tier(call("or", call("not", condition), tier.allowed), tier.fill) for tier in some]
            tiers += [Tier(call("or", condition, tier.allowed), tier.fill) for tier in more]
            return call("where", condition, first, second), tiers
    for kept, other in _operands(expr):
        found = _combined(expr.op, kept, other, dtype, holds)
        if found is not None:
            return found
    return expr, []


def _operands(expr: Call) -> list[tuple[Expr, Expr]]:
    """Of a sum, difference, product or quotient: the operand with the score, and the one without."""
    if expr.op not in ("add", "sub", "mul", "div"):
        return []
    a, b = expr.args
    pairs = [(a, b), (b, a)] if expr.op in ("add", "mul") else [(a, b)]
    return [(x, y) for x, y in pairs if "s" in free_vars(x) and "s" not in free_vars(y)]


def _combined(op: str, kept: Expr, other: Expr, dtype: torch.dtype, holds: Holds) -> tuple[Expr, list[Tier]] | None:
    """`kept op other` as one body under the tiers of both, or None where it has none or the tiers would not stay what they are."""
    rest, masks = _addend(other, dtype, holds) if op == "add" else (other, [])
    body, tiers = _peeled(kept, dtype, holds)
    fills = {tier.fill for tier in tiers}
    if op in ("mul", "div"):
        positive = isinstance(other, Const) and 0 < other.value < math.inf
        return (call(op, body, other), tiers) if tiers and positive and fills == {"-inf"} else None
    if not tiers and not masks:
        return None
    if rest is not None:
        # an addend of common size does not move -inf or finfo.min; under =min its gradient would get lost
        if "=min" in fills and loads(rest):
            return None
        of_min = any(fill != "-inf" for fill in (*fills, *(fill for _, fill in masks)))
        if of_min and any(isinstance(e, Const) and abs(e.value) > _ABSORBED for e in walk(rest)):
            return None
        body = call(op, body, rest)
    return body, tiers + [Tier(c, "-inf" if fill == "-inf" else "+min") for c, fill in masks]


def _addend(expr: Expr, dtype: torch.dtype, holds: Holds) -> tuple[Expr | None, list[tuple[Expr, str]]]:
    """What an addend adds where it masks nothing (None: zero), and its masks."""
    mask = _added_mask(expr, dtype)
    if mask is not None:
        return None, [mask]
    if isinstance(expr, Load):
        return expr, _masks_of(expr, holds(expr), dtype)
    if isinstance(expr, Call) and expr.op == "where":
        condition, a, b = expr.args
        for kept, filled, allowed in ((a, b, condition), (b, a, call("not", condition))):
            fill = _fill(filled, dtype)
            if fill == "-inf" or (fill and not loads(kept)):
                rest, masks = _addend(kept, dtype, holds)
                if not masks or fill == "-inf":
                    return rest, [*masks, (allowed, fill)]
            elif fill:
                # what is not added gets no gradient, in rows that are uniform either
                return call("where", allowed, kept, Const(0.0)), [(allowed, fill)]
    if isinstance(expr, Call) and expr.op == "add":
        (first, some), (second, more) = (_addend(a, dtype, holds) for a in expr.args)
        if some or more:
            return second if first is None else first if second is None else call("add", first, second), some + more
    return expr, []


def _masks_of(leaf: Load, held: frozenset[float], dtype: torch.dtype) -> list[tuple[Expr, str]]:
    """What an added leaf masks. Where finfo.min is told apart -inf has to be too: it is less, and the next mask may hold it."""
    least = [Const(x) for x in held if _fill(Const(x), dtype) == "min"]
    if not least and -math.inf not in held:
        return []
    masks: list[tuple[Expr, str]] = [(call("ne", leaf, Const(-math.inf)), "-inf")]
    return [*masks, *((call("ne", leaf, x), "min") for x in least)]


@dataclass
class Descent:
    """The way from the weights to the value matmul.

    Attributes:
        sink_at: where along the keys a column stands that has no value and is still to be cut off: 0 or the number of keys.
        lift: the element of a tensor of the graph that is not written to, at an index.
        written: whether something writes to a tensor.
        kept: where weights were not set to zero, and whether that made zeros of NaN too.
        elsewhere: what reads the weights too, at any step.
    """

    node: fx.Node
    index: tuple[Index, ...]
    dropout: float = 0.0
    sink_at: Size | None = None
    keys: int = -1
    lift: Callable[[fx.Node, tuple[Index, ...]], Expr] | None = None
    written: Callable[[fx.Node], bool] = bool
    kept: list[tuple[Expr, bool]] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    elsewhere: Miss | None = None


@dataclass(frozen=True)
class Valued:
    """The value matmul: its operand v and output, each with its index in the site's variables (`e` runs over Dv)."""

    found: Contraction
    value: fx.Node
    value_index: tuple[Index, ...]
    out_index: tuple[Index, ...]
    summed: Index


def _next_user(at: Descent) -> fx.Node:
    """The live user of the node on the way down; another one is noted, or Miss AF021 names it where both might be the way."""
    node = at.node
    users = [u for u in node.users if u.op == "output" or u.users or _has_effect(u)]
    if not users:
        raise Miss("AF028", node, "the weights are not used")
    if len(users) > 1:
        products = [u for u in users if contraction(u) is not None]
        ways = products or [u for u in users if packet(u) in _BELOW]
        wanted = (ways or users)[0]
        other = next(u for u in users if u is not wanted)
        named = "the graph's output" if other.op == "output" else f"`{other.name}`"
        seen = Miss("AF021", other, f"by `{wanted.name}` and by {named}")
        if len(ways) != 1:
            raise at.elsewhere or seen
        at.elsewhere = at.elsewhere or seen
        return wanted
    if users[0].op == "output":
        raise Miss("AF021", users[0], "by the graph's output")
    return users[0]


def _has_effect(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def descend(
    weights: fx.Node,
    index: tuple[Index, ...],
    beside: Beside | None,
    lift: Callable[[fx.Node, tuple[Index, ...]], Expr],
    written: Callable[[fx.Node], bool],
) -> tuple[Descent, fx.Node]:
    """Peels casts, dropout and views below the softmax; returns what was passed and the value matmul.

    Args:
        index: of the keys' part of the weights.
        beside: the sink's column in them.
        lift: see `Descent`.
        written: see `Descent`.
    """
    at = Descent(weights, index, lift=lift, written=written, nodes=[weights])
    if beside is not None:
        at.sink_at, at.keys = beside.at, beside.dim
    try:
        return at, _down(at)
    except Miss as miss:
        raise at.elsewhere or miss from None


def _down(at: Descent) -> fx.Node:
    """Goes down to the value matmul."""
    while True:
        user = _next_user(at)
        if contraction(user) is not None:
            if at.sink_at is not None:
                raise Miss("AF023", user, "the column beside the keys has a value")
            return user
        layer = _BELOW.get(packet(user))
        if layer is None:
            raise Miss("AF023", user, packet(user) or str(user.target))
        layer(at, user)
        at.node = user
        at.nodes.append(user)


def _below_cast(at: Descent, user: fx.Node) -> None:
    if user.args[0] is not at.node:
        raise Miss("AF023", user, "the weights only lend their type")
    if not fake(user).dtype.is_floating_point:
        raise Miss("AF023", user, f"cast to {fake(user).dtype}")


def _below_dropout(at: Descent, user: fx.Node) -> None:
    args = bound(user)
    if not args["train"] or args["p"] == 0:
        return
    p = args["p"].meta.get("val") if isinstance(args["p"], fx.Node) else args["p"]
    if not isinstance(p, float) or not 0 < p < 1 or at.dropout:
        raise Miss("AF023", user, f"dropout({p}) that is no constant in (0, 1), or the second one")
    at.dropout = p
    at.seen.append(f"dropout {p}")


def _below_zeros(at: Descent, user: fx.Node) -> None:
    """Weights set to zero, by `masked_fill`, `where` or a factor of zeros and ones."""
    _no_sink(at, user)
    args, name = bound(user), packet(user)
    if name == "masked_fill":
        weights, condition, other = args["self"], args["mask"], args["value"]
    elif name == "where":
        condition, weights, other = args["condition"], args["self"], args["other"]
    else:
        weights, condition = (args["self"], args["other"]) if args["self"] is at.node else (args["other"], args["self"])
        other = 0
    is_tensors = is_tensor(condition) and weights is at.node and condition is not at.node
    if isinstance(other, fx.Node) and at.written(other):
        raise Miss("AF023", user, "zeros that are written to")
    if isinstance(other, fx.Node) and packet(other) in ("scalar_tensor", "zeros", "zeros_like", "new_zeros", "full"):
        given = bound(other)
        other = given.get("s", given.get("fill_value", 0))
    if not is_tensors or not isinstance(other, int | float) or other != 0 or at.dropout:
        raise Miss("AF023", user, name)
    if len(shape(user)) != len(at.index) or not all(map(same, shape(user), shape(at.node))):
        raise Miss("AF023", user, "the weights are expanded")
    assert at.lift is not None
    try:
        expr = at.lift(condition, broadcast(condition, at.index))
    except Unliftable as error:
        raise Miss("AF023", user, str(error)) from error
    if name == "mul":
        if not (isinstance(expr, Call) and expr.op == "where" and expr.args[1:] == (Const(1.0), Const(0.0))):
            raise Miss("AF023", user, "multiplied by what is no mask of zeros and ones")
        expr = expr.args[0]
    at.kept.append((call("not", expr) if name == "masked_fill" else expr, name != "mul"))
    at.seen.append("zeros where masked")


def emptied(program: Program, down: Descent) -> Program:
    """The program of weights that were set to zero where no key is allowed: rows without one give zeros.

    Raises:
        Miss: AF023 where that changes other weights than those of keys that the scores' mask excludes.
    """
    for kept, of_nan in down.kept:
        if kept == TRUE:
            continue
        joined: Expr | None = None
        for tier in program.tiers:
            joined = tier.allowed if joined is None else call("and", joined, tier.allowed)
        if kept != joined or (not of_nan and any(tier.fill == "-inf" for tier in program.tiers)):
            raise Miss("AF023", down.nodes[0], "weights are set to zero that the mask of the scores leaves")
        program = Program(program.body, tuple(Tier(tier.allowed, "0row") for tier in program.tiers), program.sink)
    return program


# Scores below this have no exponential; what people add as a mask is far below.
_NO_EXPONENTIAL: Final = 80.0
# The logarithm of a number of keys is lost beside this, even in float64.
_NO_DIGITS: Final = 1e12


def check_respelled(softmax: fx.Node, program: Program, learned: Callable[[str], bool]) -> None:
    """Raises Miss AF024 where what stood in the softmax's place may have been something else in rows without an allowed key.

    Args:
        learned: whether a leaf has a gradient, so that it is no mask.
    """
    caution = softmax.meta.get(CAUTION)
    minima = [tier for tier in program.tiers if tier.fill in ("+min", "=min")]
    causal = all(tier.allowed == call("le", Var("n"), Var("m")) for tier in minima)
    if caution in ("unshifted", "logarithm"):
        data = [x for x in added_loads(program.body) if "n" in free_vars(x) and not learned(x.leaf)]
        limit = _NO_EXPONENTIAL if caution == "unshifted" else _NO_DIGITS
        large = [e for e in walk(program.body) if isinstance(e, Const) and abs(e.value) > limit]
        if not causal or data or large:
            raise Miss("AF024", softmax, "exponentials without a maximum taken off, of scores that may all be masked")
    elif caution == "scaled":
        least = _least(program.body)
        if (len(minima) > 1 and not causal) or least is None or least < torch.finfo(torch.float32).min:
            raise Miss("AF024", softmax, "a maximum is taken off scores that would overflow without that")


def _least(expr: Expr) -> float | None:
    """The least that constants add up to where scores and data are zero; None if that is not known."""
    found = _extremes(expr)
    return None if found is None else found[0]


def _extremes(expr: Expr) -> tuple[float, float] | None:
    if isinstance(expr, Const):
        return float(expr.value), float(expr.value)
    if isinstance(expr, Load | Var):
        return 0.0, 0.0
    parts = [_extremes(arg) for arg in (expr.args[1:] if expr.op == "where" else expr.args)]
    if expr.op == "where":
        known = [x for x in parts if x is not None]
        return (min(x[0] for x in known), max(x[1] for x in known)) if len(known) == len(parts) else None
    if expr.op == "float":
        return parts[0]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    (a, b), (c, d) = parts[0], parts[1]
    if expr.op == "add":
        return a + c, b + d
    if expr.op == "sub":
        return a - d, b - c
    if expr.op in ("mul", "div") and c == d and (c or expr.op == "mul"):
        scaled = (a * c, b * c) if expr.op == "mul" else (a / c, b / c)
        return min(scaled), max(scaled)
    return None


def _below_slice(at: Descent, user: fx.Node) -> None:
    """Cuts the sink's column off."""
    args = bound(user)
    dim = args["dim"] % len(at.index)
    first = args["start"] or 0
    kept = at.index[dim][0].size if at.index[dim] else 1
    if at.sink_at is None or dim != at.keys or args.get("step", 1) != 1 or not isinstance(first, int):
        raise Miss("AF023", user, packet(user))
    if not same(shape(user)[dim], kept) or not same(first, 0 if at.sink_at else 1):
        raise Miss("AF023", user, "weights of keys are cut off")
    at.sink_at = None


def _below_view(at: Descent, user: fx.Node) -> None:
    _no_sink(at, user)
    try:
        at.index = regroup(at.index, shape(user))
    except Misaligned as error:
        raise Miss("AF023", user, str(error)) from error


def _no_sink(at: Descent, user: fx.Node) -> None:
    if at.sink_at is not None:
        raise Miss("AF023", user, f"{packet(user)} with the column of a sink")


def _below_expand(at: Descent, user: fx.Node) -> None:
    _no_sink(at, user)
    before, after = shape(at.node), shape(user)
    if len(before) != len(after) or not all(map(same, before, after)):
        raise Miss("AF023", user, "the weights are expanded")


def _below_permutation(at: Descent, user: fx.Node) -> None:
    _no_sink(at, user)
    at.index = tuple(at.index[d] for d in permutation(user))


_BELOW: Final[Mapping[str, Callable[[Descent, fx.Node], None]]] = {
    **dict.fromkeys(("to", "_to_copy", "type_as"), _below_cast),
    **dict.fromkeys(("contiguous", "clone", "alias"), lambda at, user: None),
    **dict.fromkeys(("slice", "narrow"), _below_slice),
    **dict.fromkeys(("masked_fill", "where", "mul"), _below_zeros),
    "dropout": _below_dropout,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"), _below_view),
    **dict.fromkeys(("expand", "expand_as"), _below_expand),
    **dict.fromkeys(PERMUTATIONS, _below_permutation),
}


def valued(at: Descent, matmul: fx.Node, keys: Digit | None) -> Valued:
    """The value matmul as an attention's: it sums over the keys, and its other operand adds one dimension, Dv.

    Args:
        keys: the digit of the softmax dimension; None where it has size 1.
    """
    found = contraction(matmul)
    assert found is not None
    if found.added is not None and found.beta != 0:
        raise Miss("AF023", matmul, "the product is added to something")
    if found.alpha != 1:
        raise Miss("AF023", matmul, f"the product is scaled by {found.alpha}")
    sides = [side for side in found.sides() if side[0] is at.node]
    if len(sides) != 1:
        raise Miss("AF021", matmul, "both operands of one product")
    labels = sides[0][1]
    value, value_labels = next(side for side in found.sides() if side[0] is not at.node)
    known: dict[str, Index] = dict(zip(labels, at.index, strict=True))
    expected: Index = (keys,) if keys is not None else ()
    if known[found.summed] != expected:
        raise Miss("AF022", at.nodes[0], f"`{matmul.name}` sums over another dimension")
    added = [x for x in value_labels if x and x not in labels]
    if len(added) != 1 or added[0] not in found.out_labels:
        raise Miss("AF027", matmul, f"v has {len(added)} dimensions of its own, expected one (Dv)")
    depth = shape(value)[value_labels.index(added[0])]
    known[added[0]] = () if same(depth, 1) else (Digit(Var("e"), depth),)
    return Valued(found, value, found.index(value_labels, known), found.index(found.out_labels, known), expected)


@dataclass(frozen=True)
class Beside:
    """A column, or a number all along it, beside the scores of the keys: at `at` along dimension `dim`."""

    column: fx.Node | float
    dim: int
    at: Size


def score_input(softmax: fx.Node) -> tuple[fx.Node, int]:
    """The softmax's operand and its dimension, counted from the front."""
    args: dict[str, Any] = bound(softmax)
    source = args["self"]
    if not is_tensor(source):
        raise Miss("AF020", softmax, "no tensor goes in")
    return source, args["dim"] % max(len(shape(source)), 1)


def scores_of(source: fx.Node, dim: int) -> tuple[fx.Node, Beside | None]:
    """The scores within what a softmax over `dim` reads, and the column that stands beside them."""
    below = source
    while packet(below) in ("to", "_to_copy", "contiguous", "clone"):
        above = below.args[0]
        assert isinstance(above, fx.Node)
        if torch.promote_types(fake(above).dtype, fake(below).dtype) != fake(below).dtype:
            break
        below = above
    found = _split_off(below, dim)
    return found if found is not None else (source, None)


def _split_off(node: fx.Node, dim: int) -> tuple[fx.Node, Beside] | None:
    """The two parts of a concatenation along `dim` of scores and one column."""
    if packet(node) in ("pad", "constant_pad_nd"):
        return _padded(node, dim)
    if packet(node) != "cat":
        return None
    args = bound(node)
    parts = args["tensors"]
    if len(parts) != 2 or args["dim"] % len(shape(node)) != dim:
        return None
    for column, scores, at in ((parts[1], parts[0], shape(parts[0])[dim]), (parts[0], parts[1], 0)):
        if same(shape(column)[dim], 1) and not same(shape(scores)[dim], 1) and fake(scores).dtype == fake(node).dtype:
            return scores, Beside(column, dim, at)
    return None


def _padded(node: fx.Node, dim: int) -> tuple[fx.Node, Beside] | None:
    """The scores that one column of a constant was added to."""
    args = bound(node)
    scores, value = args["self"], args["value"]
    if (
        dim != len(shape(node)) - 1
        or args.get("mode", "constant") != "constant"
        or list(args["pad"]) not in ([1, 0], [0, 1])
    ):
        return None
    if value is not None and not isinstance(value, int | float):
        return None
    return scores, Beside(float(value or 0), dim, 0 if args["pad"][0] else shape(scores)[dim])
