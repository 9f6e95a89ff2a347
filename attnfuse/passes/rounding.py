"""Scores that a softmax in a narrower type rounds, and masks that autocast rounds: which of their elements that makes infinite,
written into the program where any can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx
from torch.amp import autocast_mode

from attnfuse.passes.graph import SHORT_DTYPES, fake
from attnfuse.passes.lift import Scope
from attnfuse.passes.magnitude import ORDINARY, most
from attnfuse.passes.peel import Miss, only_finite
from attnfuse.score import BOOLEANS, ROUNDINGS, Call, Const, Expr, Load, Program, added_loads, call, walk

__all__ = ["autocast_at", "rounded_by", "rounded_mask"]


def rounded_by(
    softmax: fx.Node, source: fx.Node, product: fx.Node, expr: Expr, program: Program, scope: Scope
) -> Program:
    """The program of scores that go into a softmax of another type.

    Rounding is an error like any other but where it gives infinities: their row is NaN, or their key has no weight.

    Args:
        expr: what `source`, the input of the softmax, is.
        program: the same as body and tiers.

    Raises:
        Miss: AF024 where what q and k give is wider than that type, so that rounding is what the model means.
    """
    dtype, before = fake(softmax).dtype, fake(source).dtype
    if torch.finfo(dtype).max >= torch.finfo(before).max:
        return program
    name = SHORT_DTYPES[dtype]
    if name not in ROUNDINGS or fake(product).dtype.itemsize > dtype.itemsize:
        raise Miss("AF024", softmax, f"the scores are rounded from {before} to {dtype}")

    def type_of(load: Load) -> torch.dtype:
        return fake(scope.table.leaves[load.leaf].node).dtype

    if (before, dtype, fake(product).dtype) == (torch.float32, torch.bfloat16, torch.bfloat16) and _stays(
        expr, type_of
    ):
        return program
    given = (e for x in (expr, *(tier.allowed for tier in program.tiers)) for e in walk(x))
    least = {e.value for e in given if isinstance(e, Const) and e.value < -ORDINARY}
    if all(value <= -ROUNDINGS[name] for value in least):
        # what is finfo.min for a wider type is -inf for this one
        return Program(call(name, program.body), tuple(replace(tier, fill="-inf") for tier in program.tiers))
    return Program(only_finite(call(name, expr)))


def rounded_mask(
    mask: fx.Node, element: Expr, program: Program, dtype: torch.dtype, greatest: Callable[[Load], float]
) -> Program:
    """The program of scores to which autocast adds a mask in a narrower type.

    Args:
        element: of the mask, as it is added.
        program: the scores with that element, as body and tiers.

    Raises:
        Miss: AF024 where rounding may make elements infinite that the tiers do not tell.
    """
    name = SHORT_DTYPES[dtype]
    limit = ROUNDINGS.get(name, 0.0)
    fills = {e.value for e in walk(element) if isinstance(e, Const) and e.value < -ORDINARY}
    infinite = all(value <= -limit for value in fills)
    if not most(program.body, greatest) < limit or not (infinite or min(fills) >= torch.finfo(dtype).min):
        raise Miss("AF024", mask, f"autocast rounds the mask to {dtype}")
    if not infinite:
        return program
    return replace(program, tiers=tuple(replace(tier, fill="-inf") for tier in program.tiers))


def autocast_at(scope: Scope, node: fx.Node) -> torch.dtype | None:
    """The type to which autocast rounds the operands of a node of a scope, None where it is off."""
    device = fake(node).device.type
    at: fx.Node = node
    here: Scope | None = scope
    while here is not None:
        regions: list[fx.Node] = []
        for before in here.module.graph.nodes:
            if before is at:
                break
            if before.target is autocast_mode._enter_autocast:
                regions.append(before)
            elif before.target is autocast_mode._exit_autocast:
                regions.remove(before.args[0])
        for region in regions[::-1]:
            of, dtype, enabled, *_ = region.args
            if of == device:
                given = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(device)
                return given if enabled else None
        if here.outer is not None:
            # all calls of a body run in the same modes
            at = here.calls[0]
        here = here.outer
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _stays(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> bool:
    """Whether no score of bfloat16 operands, in float32, is beyond bfloat16's range, which is float32's but for its greatest
    values: a fill of finfo(bfloat16).min stays what it is, if nothing makes it larger."""
    added = [dtype for load in added_loads(expr) if (dtype := type_of(load)).is_floating_point]
    narrow = len(added) < 2 and all(dtype.itemsize < 4 for dtype in added)
    return narrow and all(_is_no_larger(part, type_of) for part in walk(expr))


def _is_no_larger(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> bool:
    """Whether a step makes nothing of finfo(bfloat16).min that is larger still."""
    if isinstance(expr, Const):
        return abs(expr.value) <= ORDINARY or expr.value in (torch.finfo(torch.bfloat16).min, -math.inf)

    def greatest(load: Load) -> float:
        return math.inf if type_of(load).is_floating_point else 0.0

    if not isinstance(expr, Call) or most(expr, greatest) <= ORDINARY:
        return True
    if expr.op in ("mul", "div"):
        factor = next((float(x.value) for x in expr.args[::-1] if isinstance(x, Const)), 0.0)
        return 0 < factor <= 1 if expr.op == "mul" else factor >= 1
    if expr.op == "sub":
        return most(expr.args[1], greatest) <= ORDINARY
    return expr.op in ("add", "where", *BOOLEANS)
