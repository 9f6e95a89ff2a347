"""What has to hold for a site before it is rewritten: types, devices, modes, and no write between a read and its new place."""

from __future__ import annotations

from typing import Final

import torch

from attnfuse.passes.graph import MODE_SWITCHES, between, fake
from attnfuse.passes.index import same
from attnfuse.passes.lift import Scope
from attnfuse.passes.peel import Miss
from attnfuse.passes.site import Site
from attnfuse.passes.views import cuts_gradient
from attnfuse.score import loads

__all__ = ["check"]

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        if first < at < last and getattr(node.target, "__name__", "") in MODE_SWITCHES:
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
            if inner.is_input(source.node) and inner.writes(source.node) and _wants_gradients(site):
                # the graph writes to it in the end, and the backward, which reads it, comes later still (torch 2.13)
                raise Miss("AF026", source.node, f"writes to the input `{source.node.name}`, which the backward reads")
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


def _wants_gradients(site: Site) -> bool:
    operands = (site.q.node, site.k.node, site.v.node)
    return (
        torch.is_grad_enabled() and any(map(site.scope.may_require_grad, operands)) and not cuts_gradient(site.anchor)
    )


def _position_within(inner: Scope, outer: Scope) -> int:
    """Where, in an enclosing graph, the last call stands of the body that holds `inner`."""
    while inner.outer is not None and inner.outer is not outer:
        inner = inner.outer
    return max(outer.storage.position[call] for call in inner.calls)
