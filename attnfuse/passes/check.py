"""What has to hold for a site before it is rewritten: types, devices, modes, and no write between a read and its new place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import fx

from attnfuse.passes.graph import between, fake, packet, shape
from attnfuse.passes.index import same
from attnfuse.passes.lift import Scope
from attnfuse.passes.peel import Miss
from attnfuse.passes.site import Site
from attnfuse.passes.views import cuts_gradient, through_view
from attnfuse.score import BOOLEANS, Call, Const, Expr, Load, S, added_loads, loads, substitute, walk

__all__ = ["check", "check_rounding"]

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MODE_SWITCHES: Final = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


def check(site: Site) -> None:
    """What has to hold for every site before it is rewritten; raises Miss."""
    for operand, role in ((site.q, "q"), (site.k, "k"), (site.v, "v")):
        if fake(operand.node).dtype not in _FLOATS:
            raise Miss("AF029", operand.node, f"{role} is {fake(operand.node).dtype}")
    if len({fake(x.node).device for x in (site.q, site.k, site.v)}) != 1:
        raise Miss("AF027", site.out, "q, k and v are on different devices")
    for size in (site.sizes.B, site.sizes.H, site.sizes.M, site.sizes.N, site.sizes.D, site.sizes.Dv):
        if same(size, 0):
            raise Miss("AF033", site.out, "an empty dimension")
    position = site.scope.storage.position
    first = min(position[x] for x in site.nodes)
    last = position[site.out]
    for node, at in position.items():
        if first < at < last and getattr(node.target, "__name__", "") in _MODE_SWITCHES:
            raise Miss("AF034", node, str(getattr(node.target, "__name__", "")))
    _check_writes(site, last)
    _check_returned(site)
    if site.lse is not None:
        leaves = {site.scope.table.leaves[x.leaf] for top in site.program.expressions() for x in loads(top)}
        needed = {site.q.node, site.k.node, site.v.node, *(x.node for x in leaves if x.scope is site.scope)}
        if any(position[x] > position[site.place] for x in needed):
            raise Miss("AF025", site.lse, f"by `{site.lse.name}`, before v is known")


def _check_returned(site: Site) -> None:
    """Raises Miss AF036 if a body that `invoke_subgraph` calls returns an attention with gradient, or a view of it.

    The operator keeps its output for the backward, as scaled_dot_product_attention does. Inductor does not know that the two
    are one tensor, and may write to the returned one (torch 2.13).
    """
    if not any(call.target is torch.ops.higher_order.invoke_subgraph for call in site.scope.calls):
        return
    leaves = (site.scope.table.leaves[x.leaf] for top in site.program.expressions() for x in loads(top))
    given = [*((site.scope, x.node) for x in (site.q, site.k, site.v)), *((x.scope, x.node) for x in leaves)]
    wanted = any(scope.may_require_grad(node) for scope, node in given)
    if cuts_gradient(site.anchor) or not torch.is_grad_enabled() or not wanted:
        return
    storage = site.scope.storage
    kept = [x for x in (site.out, site.lse) if x is not None]
    if any(storage.may_share(x, y) for x in site.scope.module.graph.output_node().all_input_nodes for y in kept):
        raise Miss("AF036", site.out, "invoke_subgraph, which returns it")


def _check_writes(site: Site, last: int) -> None:
    """Raises Miss AF026 if an operand is written between its first read in the original graph and the op's place."""
    storage = site.scope.storage
    for operand in (site.q, site.k, site.v):
        first = min(storage.position[x] for x in operand.read)
        late = [w for w in storage.writes(operand.node) if first < w < last]
        if late:
            written = next(n for n, at in storage.position.items() if at == late[0])
            raise Miss("AF026", written, f"writes to `{operand.node.name}`")
    for expr in site.program.expressions():
        for load in loads(expr):
            source = site.scope.table.leaves[load.leaf]
            inner = source.scope.storage
            same_scope = source.scope is site.scope
            used = set(between(source.node, site.anchor)) if same_scope else set(source.node.users)
            readers = [inner.position[u] for u in source.node.users if u in used]
            end = last if same_scope else _position_within(site.scope, source.scope)
            late = [w for w in inner.writes(source.node) if min(readers, default=0) < w < end]
            if late:
                written = next(n for n, at in inner.position.items() if at == late[0])
                elsewhere = cuts_gradient(written) != cuts_gradient(site.anchor) or inner.position[site.place] < late[0]
                if max(readers) > late[0] or not same_scope or elsewhere:
                    raise Miss("AF026", written, f"writes to the mask's `{source.node.name}`")
                site.overwritten[source] = written


def _position_within(inner: Scope, outer: Scope) -> int:
    """Where, in an enclosing graph, the last call stands of the body that holds `inner`."""
    while inner.outer is not None and inner.outer is not outer:
        inner = inner.outer
    return max(outer.storage.position[call] for call in inner.calls)


# Magnitudes below are lost beside the least number, in every type of its range.
_ORDINARY: Final = 2.0**100
_INTEGERS: Final = 2.0**63
# The part of the scores that is computed in bfloat16: any number of it.
_NARROW: Final = Load("narrow", ())


def check_rounding(
    scope: Scope, softmax: fx.Node, source: fx.Node, product: fx.Node, expr: Expr, lift: Callable[[fx.Node], Expr]
) -> None:
    """Raises Miss AF024 where the softmax runs in a type in which scores are rounded, or become infinite.

    Allowed are scores of bfloat16 operands that were float32 in between, where none can be rounded to -inf: bfloat16 has float32's
    range but for its greatest values, so that a fill of finfo(bfloat16).min stays what it is, if nothing makes it larger.

    Args:
        expr: what `source`, the input of the softmax, is.
        lift: what a node of the layout of `source` is.
    """
    dtype, before = fake(softmax).dtype, fake(source).dtype
    if torch.finfo(dtype).max >= torch.finfo(before).max:
        return
    low = (before, dtype, fake(product).dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    if low and (widened := _widened(product, source)) is not None:
        before_cast = lift(widened)
        expr = substitute(expr, {before_cast: _NARROW}) if loads(before_cast) else expr

    def type_of(load: Load) -> torch.dtype:
        return torch.bfloat16 if load == _NARROW else fake(scope.table.leaves[load.leaf].node).dtype

    added = [found for load in added_loads(expr) if (found := type_of(load)).is_floating_point]
    narrow = len(added) < 2 and all(x.itemsize < 4 for x in added)
    if not (low and narrow and all(_is_no_larger(part, type_of) for part in walk(expr))):
        raise Miss("AF024", softmax, f"the scores are rounded from {before} to {dtype}")


def _widened(product: fx.Node, source: fx.Node) -> fx.Node | None:
    """The scores as they were before their cast to float32, if what follows leaves each element in its place."""
    chain = between(product, source)
    casts = [
        x for x in chain if packet(x) in ("to", "_to_copy") and fake(x.all_input_nodes[0]).dtype == fake(product).dtype
    ]
    if len(casts) != 1:
        return None
    (cast,) = casts
    after = (cast, *between(cast, source))
    in_place = all(len(shape(x)) == len(shape(source)) and all(map(same, shape(x), shape(source))) for x in after)
    return (
        cast.all_input_nodes[0]
        if in_place and all(through_view(x, (), no_grad=False) is None for x in after[1:])
        else None
    )


def _is_no_larger(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> bool:
    """Whether a step makes nothing of finfo(bfloat16).min that is larger still."""
    if isinstance(expr, Const):
        return abs(expr.value) <= _ORDINARY or expr.value in (torch.finfo(torch.bfloat16).min, -math.inf)
    if not isinstance(expr, Call) or _most(expr, type_of) <= _ORDINARY:
        return True
    if expr.op in ("mul", "div"):
        factor = next((float(x.value) for x in expr.args[::-1] if isinstance(x, Const)), 0.0)
        return 0 < factor <= 1 if expr.op == "mul" else factor >= 1
    if expr.op == "sub":
        return _most(expr.args[1], type_of) <= _ORDINARY
    return expr.op in ("add", "where", *BOOLEANS)


def _most(expr: Expr, type_of: Callable[[Load], torch.dtype]) -> float:
    """A bound of the magnitude; products of q and k are taken for ordinary."""
    if isinstance(expr, Const):
        return abs(expr.value)
    if isinstance(expr, Load):
        return math.inf if type_of(expr).is_floating_point else _INTEGERS
    if not isinstance(expr, Call):
        return 0.0 if expr == S else _INTEGERS
    if expr.op in BOOLEANS:
        return 1.0
    parts = [_most(x, type_of) for x in (expr.args[1:] if expr.op == "where" else expr.args)]
    if expr.op in ("add", "sub"):
        return sum(parts)
    if expr.op == "mul":
        return 0.0 if 0.0 in parts else math.prod(parts)
    return max(parts) if expr.op in ("where", "neg", "abs", "min", "max", "float") or max(parts) > _ORDINARY else 0.0
