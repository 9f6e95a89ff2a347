"""A `Site`: one attention's meaning and the nodes that hold its operands, with the `Layout` of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from attnfuse.passes.graph import shape
from attnfuse.passes.index import Index, Size, piece, product, same
from attnfuse.passes.lift import LeafSource, Scope
from attnfuse.passes.peel import Miss
from attnfuse.passes.views import through_view
from attnfuse.score import Program

__all__ = ["Layout", "Operand", "Site", "Sizes", "layout", "shallowest"]


@dataclass(frozen=True)
class Operand:
    """A tensor and what its dimensions are: one Index each, in the site's variables (b, h, m, n, and d or e for the depth)."""

    node: fx.Node
    index: tuple[Index, ...]
    read: tuple[fx.Node, ...] = ()
    """The nodes of the original graph between this tensor and the product: the first of them reads it."""


@dataclass(frozen=True)
class Sizes:
    """B, H, M and N of a site, D and Dv, as ints or sympy expressions."""

    B: Size
    H: Size
    M: Size
    N: Size
    D: Size
    Dv: Size


@dataclass
class Site:
    """One attention: its meaning (`program`, `dropout`) over leaves of the scope's table, and where its operands are."""

    scope: Scope
    anchor: fx.Node
    out: fx.Node
    q: Operand
    k: Operand
    v: Operand
    out_index: tuple[Index, ...]
    sizes: Sizes
    program: Program
    dropout: float
    dtype: torch.dtype
    nodes: tuple[fx.Node, ...]
    seen: tuple[str, ...] = ()
    is_sdpa: bool = False
    rounded: bool = False
    """Whether the model itself rounds q·kᵀ, with nothing multiplied or added before, to `dtype`."""
    lse: fx.Node | None = None
    """The log-sum-exp of the scores, where the model computes one beside the softmax, at `lse_index`."""
    lse_index: tuple[Index, ...] = ()
    elsewhere: Miss | None = None
    """What reads the weights too."""
    overwritten: dict[LeafSource, fx.Node] = field(default_factory=dict)
    """Leaves that are written to before the replacement reads them, each with the first such write: a copy is read."""

    @property
    def place(self) -> fx.Node:
        """The node before which the replacement stands: the first whose value it gives."""
        position = self.scope.storage.position
        return self.out if self.lse is None else min(self.out, self.lse, key=position.__getitem__)


@dataclass(frozen=True)
class Layout:
    """How a tensor becomes [B, heads, rows, depth]: split dimensions, permute, join.

    Attributes:
        split: for each dimension the sizes of its digits.
        order: the digits in the order batch, heads, rows, depth.
        groups: how many digits each of these four has (0: absent, of size 1 or broadcast).
        heads: the number of heads (Hkv for k and v).
    """

    split: tuple[tuple[Size, ...], ...]
    order: tuple[int, ...]
    groups: tuple[int, int, int, int]
    heads: Size


def layout(operand: Operand, sizes: Sizes, role: str) -> Layout | None:
    """The layout of q, k or v, or None if its dimensions are no whole batch, heads, rows and depth."""
    rows = "m" if role == "q" else "n"
    depth = "e" if role == "v" else "d"
    extent = {"b": sizes.B, "h": sizes.H, "m": sizes.M, "n": sizes.N, "d": sizes.D, "e": sizes.Dv}
    digits: list[tuple[str, int, Size]] = []
    for dim in operand.index:
        for digit in dim:
            part = piece(digit)
            if part is None:
                return None
            digits.append((part.var, part.stride, part.size))
    order: list[int] = []
    groups = []
    heads: Size = 1
    for var in ("b", "h", rows, depth):
        mine = sorted((at for at, d in enumerate(digits) if d[0] == var), key=lambda at: -digits[at][1])
        whole = _tiled([digits[at] for at in mine], extent[var], grouped=var == "h" and role != "q")
        if whole is None or (not mine and var in (rows, depth) and not same(extent[var], 1)):
            return None
        if var == "h":
            heads = whole
        order.extend(mine)
        groups.append(len(mine))
    if len(order) != len(digits):
        return None
    split = tuple(tuple(digit.size for digit in dim) for dim in operand.index)
    return Layout(split, tuple(order), (groups[0], groups[1], groups[2], groups[3]), heads)


def _tiled(digits: Sequence[tuple[str, int, Size]], extent: Size, grouped: bool) -> Size | None:
    """The number of values that digits of one variable take together, if they make up all of it.

    Args:
        grouped: the least significant part may be missing (query heads that share a KV head).
    """
    if not digits:
        return 1
    stride: Size = 1
    if grouped:
        stride = digits[-1][1]
    total: Size = 1
    for _, at, size in reversed(digits):
        if not same(at, stride):
            return None
        stride, total = stride * size, total * size
    return total if same(stride, extent) else None


def shallowest(scope: Scope, operand: Operand, sizes: Sizes, role: str) -> Operand:
    """The operand itself, or what stands behind its views if that is smaller: `repeat_kv` and expands are never computed."""
    best = operand
    at = operand
    size = product(shape(operand.node))
    while True:
        step = through_view(at.node, at.index, no_grad=scope.table.no_grad)
        if step is None or (scope.storage.writes(at.node)):
            # a copy that was written to is another tensor than its source
            break
        at = Operand(step[0], step[1], (*at.read, at.node))
        if layout(at, sizes, role) is not None and _smaller(product(shape(at.node)), size):
            best, size = at, product(shape(at.node))
    if layout(best, sizes, role) is None:
        raise Miss("AF027", operand.node, f"{role} has no layout [batch, heads, rows, depth]")
    return best


def _smaller(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    ratio = b / a
    return bool(getattr(ratio, "is_Integer", False) and ratio > 1)
