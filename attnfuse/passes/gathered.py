"""Biases that are read from a table by an index for each row and key: relative positions in two dimensions (BEiT, Swin, LeViT).

A model gathers them into a tensor [H, M, N]. Where that is large, kernels read the table by the index themselves, and add the
gradient to the table; what is left of the size M x N is the index, which is the same for all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from attnfuse.passes.graph import bound, fake, packet, shape
from attnfuse.passes.index import Digit, Index, Unliftable, same
from attnfuse.passes.rules import is_natural
from attnfuse.passes.views import cuts_gradient
from attnfuse.score import Const, Expr, Load, call, free_vars, loads

if TYPE_CHECKING:
    from attnfuse.passes.lift import Lifter, Scope

__all__ = ["gathered"]

# A tensor of fewer elements is no memory to speak of, and a graph that makes it once is as fast. Symbolic sizes may be large.
_SMALL: Final = 1 << 16


def gathered(lifter: Lifter, node: fx.Node, index: Sequence[Index]) -> Expr | None:
    """The element of a gather as one of its table, where the tensor that is gathered is large; None for what is none."""
    known = _operands(node)
    if known is None or not fake(node).dtype.is_floating_point:
        return None
    if cuts_gradient(node) and not lifter.scope.table.no_grad:
        return None
    table, chosen, dim = known
    storage = lifter.scope.storage
    if node not in storage.position or storage.writes(node) or storage.writes(table):
        return None
    # where nobody learns it, the bias may be a mask, which is read more than once
    if not lifter.scope.may_require_grad(table):
        return None
    after = dim + len(shape(chosen))
    size = shape(table)[dim]
    elements = math.prod(digit.size if isinstance(digit.size, int) else math.inf for at in index for digit in at)
    if not isinstance(size, int) or elements <= _SMALL:
        return None
    try:
        where = lifter.lift(chosen, index[dim:after])
        if not {"m", "n"} <= free_vars(where):
            return None
        if packet(node) == "index" and not is_natural(where, index[dim:after]):
            # negative numbers count from the end
            where = call("where", call("lt", where, Const(0)), call("add", where, Const(size)), where)
        element = lifter.lift(table, (*index[:dim], () if same(size, 1) else (Digit(where, size),), *index[after:]))
    except Unliftable:
        return None
    sources = [lifter.scope.table.leaves[load.leaf] for load in loads(element)]
    settled = all(_is_settled(lifter, source.scope, x, node) for source in sources for x in source.given)
    return element if isinstance(element, Load) and settled else None


def _is_settled(lifter: Lifter, scope: Scope, source: fx.Node, node: fx.Node) -> bool:
    """Whether what is read at the attention is what the gather reads: nobody writes to it, or somebody to a fresh tensor before."""
    writes = scope.storage.writes(source)
    fresh = scope is lifter.scope and scope.storage.root(source).op == "call_function"
    return not writes or (fresh and max(writes) < scope.storage.position[node])


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """The table, the integers that choose from it, and the dimension that they choose along."""
    name = packet(node)
    if name not in ("embedding", "index_select", "index"):
        return None
    args = bound(node)
    if name == "embedding":
        # else the gradient is not the sum over the elements read, or a sparse tensor
        plain = args.get("padding_idx", -1) < 0 and not args.get("scale_grad_by_freq") and not args.get("sparse")
        return (args["weight"], args["indices"], 0) if plain else None
    if name == "index_select":
        return args["self"], args["index"], args["dim"] % len(shape(args["self"]))
    chosen = [(dim, x) for dim, x in enumerate(args["indices"]) if x is not None]
    # a mask of bytes or truth values chooses in another way
    whole = len(chosen) == 1 and fake(chosen[0][1]).dtype in (torch.int64, torch.int32)
    return (args["self"], chosen[0][1], chosen[0][0]) if whole else None
