"""From a softmax (or a scaled_dot_product_attention call) to a `Site`: what the attention means and which nodes hold its operands.

Anchor at the softmax, lift its input to a score program (claiming the score matmul on the way), descend to the value matmul,
then lay out q, k and v.  A site that is not understood becomes a `missed` remark with the node that stopped it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnfuse.passes.check import check
from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.dependent import dependent
from attnfuse.passes.graph import between, bound, fake, is_tensor, packet, shape
from attnfuse.passes.held import fills_of
from attnfuse.passes.index import Digit, Index, Size, Unliftable, index_of, product, same
from attnfuse.passes.learned import greatest_of
from attnfuse.passes.lift import Scope
from attnfuse.passes.magnitude import most
from attnfuse.passes.mixed import mixed_heads
from attnfuse.passes.peel import (
    Beside,
    Descent,
    Miss,
    Valued,
    check_respelled,
    descend,
    emptied,
    program_of,
    score_input,
    scores_of,
    valued,
)
from attnfuse.passes.respell import CAUTION
from attnfuse.passes.rounding import autocast_at, rounded_by, rounded_mask
from attnfuse.passes.rules import as_float
from attnfuse.passes.site import Operand, Site, Sizes, shallowest
from attnfuse.passes.views import broadcast, cuts_gradient
from attnfuse.score import (
    TRUE,
    Call,
    Const,
    Expr,
    Program,
    S,
    Tier,
    Var,
    call,
    free_vars,
    loads,
    walk,
)


@dataclass
class _Claim:
    """The variables of one softmax, and the contraction that was claimed as its score."""

    queries: Index
    keys: Index
    found: Contraction | None = None
    at: tuple[Index, ...] = ()

    def claim(self, found: Contraction, index: Sequence[Index]) -> bool:
        if self.found is not None:
            return found.node is self.found.node and tuple(index) == self.at
        values = dict(zip(found.out_labels, index, strict=True))
        key_labels = [x for x in found.out_labels if "n" in _variables(values[x])]
        query_labels = [x for x in found.out_labels if "m" in _variables(values[x])]
        if self.keys and (len(key_labels) != 1 or values[key_labels[0]] != self.keys):
            return False
        # heads may be folded into the rows
        if self.queries and (len(query_labels) != 1 or not {*self.queries} <= {*values[query_labels[0]]}):
            return False
        sides = [labels for _, labels in found.sides()]
        if self.keys and sum(key_labels[0] in labels for labels in sides) != 1:
            return False
        if self.queries and sum(query_labels[0] in labels for labels in sides) != 1:
            return False
        if self.keys and self.queries and any(key_labels[0] in x and query_labels[0] in x for x in sides):
            return False
        self.found, self.at = found, tuple(index)
        return True

    def state(self) -> Any:
        return self.found, self.at

    def restore(self, state: Any) -> None:
        self.found, self.at = state


def _variables(index: Index) -> frozenset[str]:
    return frozenset().union(*(free_vars(digit.expr) for digit in index))


@dataclass(frozen=True)
class _Axes:
    """The dimensions of the weights as variables: which is n, which is m, and the batch dimensions as digits of b and h."""

    index: tuple[Index, ...]
    queries: Index
    keys: Index
    B: Size
    H: Size


def _axes(sizes: Sequence[Size], n_dim: int, m_dim: int, heads: int | None) -> _Axes:
    """Names the dimensions: the last batch dimension is h and the ones before it make up b.

    Args:
        heads: the number of heads that a single flattened batch dimension holds, if that is known.
    """
    batch = [d for d in range(len(sizes)) if d not in (n_dim, m_dim)]
    index: list[Index] = [()] * len(sizes)
    index[n_dim] = index_of(Var("n"), sizes[n_dim])
    index[m_dim] = index_of(Var("m"), sizes[m_dim])
    h_size: Size = 1
    outer = batch
    if len(batch) >= 2:
        h_size, outer = sizes[batch[-1]], batch[:-1]
        index[batch[-1]] = index_of(Var("h"), h_size)
    elif len(batch) == 1 and heads:
        rest = _over(sizes[batch[0]], heads)
        index[batch[0]] = (*index_of(Var("b"), rest), *index_of(Var("h"), heads))
        return _Axes(tuple(index), index[m_dim], index[n_dim], rest, heads)
    stride: Size = 1
    for at in range(len(outer) - 1, -1, -1):
        dim, size = outer[at], sizes[outer[at]]
        if not same(size, 1):
            if not isinstance(stride, int):
                raise Miss("AF033", None, "several batch dimensions of symbolic size")
            expr = call("floordiv", Var("b"), Const(stride))
            if any(not same(sizes[d], 1) for d in outer[:at]):
                if not isinstance(size, int):
                    raise Miss("AF033", None, "several batch dimensions of symbolic size")
                expr = call("mod", expr, Const(size))
            index[dim] = (Digit(expr, size),)
        stride = stride * size
    return _Axes(tuple(index), index[m_dim], index[n_dim], product([sizes[d] for d in outer]), h_size)


def _over(size: Size, heads: int) -> Size:
    if isinstance(size, int):
        if size % heads:
            raise Miss("AF027", None, f"{size} does not hold {heads} heads a batch row")
        return size // heads
    quotient = size / heads
    return int(quotient) if quotient.is_Integer else quotient


def anchors(scope: Scope) -> Iterator[fx.Node]:
    """The nodes at which an attention may sit, in graph order."""
    for node in scope.module.graph.nodes:
        if packet(node) in ("softmax", "_softmax", "scaled_dot_product_attention"):
            yield node


def recognise(scope: Scope, anchor: fx.Node) -> Site:
    """The attention at an anchor; raises Miss."""
    scope.lifter.stopped = scope.lifter.refused = None
    scope.table.no_grad = cuts_gradient(anchor)
    scope.table.computed_in = torch.promote_types(fake(anchor).dtype, torch.float32)
    if packet(anchor) == "scaled_dot_product_attention":
        site = _from_sdpa(scope, anchor)
    else:
        try:
            site = _from_softmax(scope, anchor)
        except Miss as miss:
            raise mixed_heads(anchor) or miss from None
    check(site)
    return site


def _from_softmax(scope: Scope, softmax: fx.Node) -> Site:
    given, n_dim = score_input(softmax)
    source, beside = scores_of(given, n_dim)
    sizes = shape(source)
    if len(sizes) < 2:
        raise Miss("AF020", softmax, f"a softmax over a tensor of {len(sizes)} dimensions")
    others = sorted((d for d in range(len(sizes)) if d != n_dim), key=lambda d: (abs(d - n_dim), -d))
    for m_dim in others:
        site = _with_queries(scope, softmax, source, beside, n_dim, m_dim, None)
        if site is not None:
            break
    else:
        raise _no_score(scope, softmax, source)
    return site


def _no_score(scope: Scope, softmax: fx.Node, source: fx.Node) -> Miss:
    """Why no product above the softmax could be taken as the score."""
    if scope.lifter.stopped is not None:
        node, why = scope.lifter.stopped
        return Miss("AF024", node, why)
    if scope.lifter.refused is not None:
        joined = [x for x in between(scope.lifter.refused, source) if packet(x) == "cat"]
        if joined:
            return Miss("AF024", joined[0], "scores joined to other ones")
        return Miss(
            "AF022",
            softmax,
            f"the product `{scope.lifter.refused.name}` has the softmax's dimension in both operands or in none",
        )
    found = _product_above(source)
    if found is None:
        given = _input_above(source)
        return Miss("AF020", source, packet(source) or source.op) if given is None else Miss("AF035", given, given.name)
    product_node, last = found
    writes = scope.storage.writes(product_node)
    if writes:
        written = next(n for n, at in scope.storage.position.items() if at == writes[0])
        return Miss("AF024", written, f"{packet(written)} writes to the scores")
    return Miss("AF034" if cuts_gradient(last) else "AF024", last, packet(last) or last.op)


def _input_above(source: fx.Node) -> fx.Node | None:
    """The graph's input of the scores' own size that goes into `source`, if there is one that the model computed."""
    todo, seen = [source], set()
    while todo:
        node = todo.pop()
        if node in seen or not is_tensor(node) or not fake(node).dtype.is_floating_point:
            continue
        seen.add(node)
        alike = len(shape(node)) == len(shape(source)) and all(map(same, shape(node), shape(source)))
        if node.op == "placeholder" and alike and fake(node).dim() > 2:
            return node
        todo.extend(node.all_input_nodes if alike else ())
    return None


def _product_above(source: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The nearest product that goes into `source` through tensors of its rank, and the first node on the way down from it."""
    todo = [(source, source)]
    seen = set()
    while todo:
        node, below = todo.pop(0)
        if contraction(node) is not None:
            return node, below
        if node in seen or not is_tensor(node):
            continue
        seen.add(node)
        todo.extend((x, node) for x in node.all_input_nodes if is_tensor(x) and len(shape(x)) == len(shape(source)))
    return None


def _with_queries(
    scope: Scope,
    softmax: fx.Node,
    source: fx.Node,
    beside: Beside | None,
    n_dim: int,
    m_dim: int,
    heads: int | None,
) -> Site | None:
    """The site with `m_dim` as its queries, or None if no score matmul has them so."""
    axes = _axes(shape(source), n_dim, m_dim, heads)
    claim = _Claim(axes.queries, axes.keys)
    expr = scope.lifter.lift(source, axes.index, claim)
    if claim.found is None:
        return None
    program = program_of(expr, fake(source).dtype, greatest_of(scope, dependent(scope, claim.found)), fills_of(scope))
    program = rounded_by(softmax, source, claim.found.node, expr, program, scope)
    if beside is not None:
        program = replace(program, sink=_sink(scope, beside, axes))
    leaves = scope.table.leaves

    def element(node: fx.Node, index: tuple[Index, ...]) -> Expr:
        found = scope.lifter.lift(node, index)
        if any(leaves[x.leaf].scope.storage.writes(leaves[x.leaf].node) for x in loads(found)):
            raise Unliftable("a mask that is written to")
        return found

    down, matmul = descend(softmax, axes.index, beside, element, lambda x: bool(scope.storage.writes(x)))
    check_respelled(softmax, program, lambda name: leaves[name].scope.may_require_grad(leaves[name].node))
    if down.kept and CAUTION in softmax.meta:
        raise Miss("AF024", softmax, "exponentials that are set to zero after they were normalised")
    program = emptied(program, down)
    value = valued(down, matmul, axes.keys[0] if axes.keys else None)
    q, k, depth = _query_and_key(claim)
    v = Operand(value.value, value.value_index, (value.found.node,))
    if heads is None and same(axes.H, 1):
        held = _heads_within((q.index, k.index, v.index), program, scope)
        if held is not None:
            return _with_queries(scope, softmax, source, beside, n_dim, m_dim, held)
    return _assembled(scope, softmax, source, n_dim, claim, down, value, axes, program, (q, k, v), depth)


def _is_plain_in_empty_rows(lse: fx.Node, program: Program, down: Descent) -> bool:
    """Whether the log-sum-exp of a row without an allowed key is the operator's: -inf, or something that only a sigmoid sees."""
    if not any(tier.fill in ("+min", "=min") for tier in program.tiers) and not down.kept:
        return True
    todo = [(user, lse) for user in lse.users]
    while todo:
        user, given = todo.pop()
        name = packet(user)
        scaled = name in ("mul", "div") and isinstance(user.args[1], int | float) and user.args[1] > 0
        if name in ("to", "_to_copy", "unsqueeze", "view") or ((scaled or name == "sub") and user.args[0] is given):
            todo.extend((next_one, user) for next_one in user.users)
        elif name != "sigmoid":
            return False
    return not down.kept


# Beside larger sinks a row's log-sum-exp has no digits left.
_LARGEST_SINK = 1e4


def _sink(scope: Scope, beside: Beside, axes: _Axes) -> Expr:
    """The score of a column that has no value, which may depend on batch, head and query."""
    if isinstance(beside.column, float):
        if abs(beside.column) > _LARGEST_SINK:
            raise Miss("AF024", None, f"a sink of {beside.column}")
        return Const(beside.column)
    index = tuple(() if dim == beside.dim else at for dim, at in enumerate(axes.index))
    try:
        expr = scope.lifter.lift(beside.column, index)
    except Unliftable as error:
        raise Miss("AF024", beside.column, str(error)) from error
    if any(isinstance(e, Const) and abs(e.value) > _LARGEST_SINK for e in walk(expr)):
        raise Miss("AF024", beside.column, f"a sink of {expr}")
    return as_float(expr) if isinstance(expr, Const) else expr


def _assembled(
    scope: Scope,
    softmax: fx.Node,
    source: fx.Node,
    n_dim: int,
    claim: _Claim,
    down: Descent,
    value: Valued,
    axes: _Axes,
    program: Program,
    operands: tuple[Operand, Operand, Operand],
    depth: Size,
) -> Site:
    found = claim.found
    assert found is not None
    if torch.promote_types(fake(found.node).dtype, torch.float32) != scope.table.computed_in:
        raise Miss("AF024", softmax, f"scores of {fake(found.node).dtype} go into a softmax in {fake(softmax).dtype}")
    n_size: Size = axes.keys[0].size if axes.keys else 1
    m_size: Size = axes.queries[0].size if axes.queries else 1
    value_depth = product([d.size for dim in value.out_index for d in dim if d.expr == Var("e")])
    sizes = Sizes(axes.B, axes.H, m_size, n_size, depth, value_depth)
    chain = between(found.node, score_input(softmax)[0])
    lse, passed = _log_sum_exp(source, n_dim)
    for node in (*chain, found.node):
        _only_inside(node, {*chain, softmax, found.node, *passed})
    inside = {*chain, found.node}
    for load in (x for top in program.expressions() for x in loads(top)):
        leaf = scope.table.leaves[load.leaf].node
        if leaf in inside:
            raise Miss("AF024", leaf, f"{packet(leaf)} of all the scores goes into each")
    q, k, v = (shallowest(scope, op, sizes, role) for op, role in zip(operands, "qkv", strict=True))
    seen = ("q@k.T", "softmax", *down.seen, *(("logsumexp",) if lse is not None else ()), "@v")
    lse_index: tuple[Index, ...] = ()
    if lse is not None and not _is_plain_in_empty_rows(lse, program, down):
        raise Miss("AF025", source, f"by `{lse.name}`, whose rows without a key have a gradient of their own")
    if lse is not None:
        # v is read earlier than in the original
        v = replace(v, read=(*v.read, lse))
        kept: tuple[Index, ...] = ((),) if bound(lse)["keepdim"] else ()
        lse_index = (*axes.index[:n_dim], *kept, *axes.index[n_dim + 1 :])
    return Site(
        scope,
        softmax,
        value.found.node,
        q,
        k,
        v,
        value.out_index,
        sizes,
        program,
        down.dropout,
        fake(found.node).dtype,
        (found.node, *chain, *down.nodes, *passed, value.found.node),
        seen,
        rounded=found.alpha == 1 and (found.added is None or found.beta == 0),
        lse=lse,
        lse_index=lse_index,
        elsewhere=down.elsewhere,
    )


def _log_sum_exp(scores: fx.Node, dim: int) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """The log-sum-exp that is taken of the scores over `dim`; it and the cast before it, if that has no other use."""
    for user in scores.users:
        steps: tuple[fx.Node, ...] = (user,)
        if packet(user) in ("to", "_to_copy") and len(user.users) == 1:
            wider = torch.promote_types(fake(user).dtype, fake(scores).dtype) == fake(user).dtype
            steps = (user, next(iter(user.users))) if wider else steps
        last = steps[-1]
        if packet(last) == "logsumexp" and [d % len(shape(scores)) for d in bound(last)["dim"]] == [dim]:
            return last, steps
    return None, ()


def _only_inside(node: fx.Node, inside: set[fx.Node]) -> None:
    """Raises Miss AF025 if a score is read by anything outside the site."""
    for user in node.users:
        if user not in inside and not _is_dead(user):
            named = "the graph's output" if user.op == "output" else f"`{user.name}`"
            raise Miss("AF025", node, f"by {named}")


def _is_dead(node: fx.Node) -> bool:
    """Whether nothing reads a node's value and computing it has no effect."""
    if node.op == "output" or node.users:
        return False
    if packet(node):
        return not node.target._schema.is_mutable  # type: ignore[union-attr]
    return getattr(node.target, "__name__", "") == "getitem"


def _query_and_key(claim: _Claim) -> tuple[Operand, Operand, Size]:
    """q and k of the claimed product, with d as the summed dimension."""
    found = claim.found
    assert found is not None
    values = dict(zip(found.out_labels, claim.at, strict=True))
    (lhs, lhs_labels), (rhs, rhs_labels) = found.sides()
    depth = shape(lhs)[lhs_labels.index(found.summed)]
    values[found.summed] = index_of(Var("d"), depth)
    key_side = next(
        (labels for labels in (rhs_labels, lhs_labels) if any("n" in _variables(values[x]) for x in labels if x)), None
    )
    if key_side is None:
        # one key only: the side with the queries is q; with one query too, the left one
        query_side = next(
            (x for x in (lhs_labels, rhs_labels) if any("m" in _variables(values[y]) for y in x if y)), lhs_labels
        )
        key_side = rhs_labels if query_side is lhs_labels else lhs_labels
    left = Operand(lhs, found.index(lhs_labels, values), (found.node,))
    right = Operand(rhs, found.index(rhs_labels, values), (found.node,))
    return (right, left, depth) if key_side is lhs_labels else (left, right, depth)


def _heads_within(indices: Sequence[Sequence[Index]], program: Program, scope: Scope) -> int | None:
    """How many heads a flattened batch dimension holds, read off the way it is split behind q, k, v or in the mask."""
    exprs: list[Expr] = [digit.expr for index in indices for dim in index for digit in dim]
    exprs += [e for top in program.expressions() for e in walk(top)]
    strides = {
        int(e.args[1].value)
        for e in exprs
        if isinstance(e, Call) and e.op == "floordiv" and e.args[0] == Var("b") and isinstance(e.args[1], Const)
    }
    return max(strides, default=None)


def _from_sdpa(scope: Scope, node: fx.Node) -> Site:
    args = bound(node)
    q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
    out = shape(node)
    rank = len(out)
    if rank < 3:
        raise Miss("AF020", node, f"a call on tensors of {rank} dimensions")
    weights = (*out[:-1], shape(k)[-2])
    axes = _axes(weights, rank - 1, rank - 2, None)
    batch = axes.index[:-2]
    depth = shape(q)[-1]
    if not isinstance(depth, int):
        raise Miss("AF033", node, f"a head dimension of symbolic size {depth}")
    scale = args["scale"]
    scale = 1 / math.sqrt(depth) if scale is None else scale
    try:
        factor = scope.lifter.scalar(float(scale) if isinstance(scale, int | float) else scale)
    except Unliftable as error:
        raise Miss("AF024", node, f"the scale is {error}") from error
    body = call("mul", S, factor)
    program = _sdpa_program(scope, node, body, mask, axes, args["is_causal"])
    p = args["dropout_p"]
    p = p.meta.get("val") if isinstance(p, fx.Node) else p
    if not isinstance(p, float | int) or not 0 <= p < 1:
        raise Miss("AF024", node, f"dropout_p={p} is no constant in [0, 1)")
    sizes = Sizes(axes.B, axes.H, out[-2], weights[-1], depth, out[-1])
    q_index = (*batch, axes.queries, index_of(Var("d"), depth))
    key_batch = batch
    if args["enable_gqa"]:
        key_batch = (*batch[:-1], _grouped(batch[-1], shape(k)[-3], axes.H, node))
        if not same(shape(k)[-3], shape(v)[-3]):
            raise Miss("AF027", node, "k and v have different numbers of heads")
    k_index = (*key_batch, axes.keys, index_of(Var("d"), depth))
    v_index = (*key_batch, axes.keys, index_of(Var("e"), out[-1]))
    operands = [
        shallowest(scope, Operand(x, broadcast(x, index), (node,)), sizes, role)
        for x, index, role in ((q, q_index, "q"), (k, k_index, "k"), (v, v_index, "v"))
    ]
    seen = (
        "scaled_dot_product_attention",
        *(("is_causal",) if args["is_causal"] else ()),
        *((f"mask {fake(mask).dtype}".replace("torch.", ""),) if mask is not None else ()),
    )
    out_index = (*batch, axes.queries, index_of(Var("e"), out[-1]))
    return Site(
        scope,
        node,
        node,
        operands[0],
        operands[1],
        operands[2],
        out_index,
        sizes,
        program,
        float(p),
        fake(node).dtype,
        (node,),
        seen,
        is_sdpa=True,
    )


def _grouped(heads: Index, kv_heads: Size, size: Size, node: fx.Node) -> Index:
    if not isinstance(size, int) or not isinstance(kv_heads, int) or size % kv_heads:
        raise Miss("AF027", node, f"{size} query heads do not share {kv_heads} KV heads evenly")
    return index_of(call("floordiv", heads[0].expr, Const(size // kv_heads)), kv_heads) if heads else ()


def _sdpa_program(scope: Scope, node: fx.Node, body: Expr, mask: Any, axes: _Axes, causal: bool) -> Program:
    """SDPA's softmax is safe: a row in which every score is -inf gives zeros, whatever excluded its keys."""
    dtype = fake(node).dtype
    tiers = [Tier(call("le", Var("n"), Var("m")), "0row")] if causal else []
    if mask is None:
        return Program(body, tuple(tiers))
    element = scope.lifter.lift(mask, broadcast(mask, axes.index))
    if fake(mask).dtype == torch.bool:
        return Program(body, (*tiers, *(() if element == TRUE else (Tier(element, "0row"),))))
    greatest = greatest_of(scope)
    program = program_of(call("add", body, element), fake(mask).dtype, greatest, fills_of(scope))
    if fake(mask).dtype != dtype:
        if autocast_at(scope, node) != dtype:
            raise Miss("AF024", mask, f"the mask is {fake(mask).dtype}, the operands are {dtype}")
        program = rounded_mask(mask, element, program, dtype, greatest)
    tiers += [Tier(t.allowed, "0row") if t.fill == "-inf" else t for t in program.tiers]
    added = [tier.allowed for tier in tiers if tier.fill == "+min"]
    # twice the least number is -inf
    tiers += [Tier(call("or", a, b), "0row") for a, b in itertools.combinations(added, 2)]
    infinite = Tier(call("ne", element, Const(float("-inf"))), "0row")
    if loads(element) and infinite not in tiers and not most(program.body, greatest) <= torch.finfo(dtype).max:
        # a dense mask may itself hold -inf, or arithmetic on data give it; NaN stays NaN
        tiers.append(infinite)
    return Program(program.body, tuple(tiers))


__all__ = ["anchors", "recognise"]
