"""Spelling a site out: its program under final names, with the tensors and numbers that the names stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnfuse.passes.graph import SHORT_DTYPES, fake
from attnfuse.passes.index import Size, same
from attnfuse.passes.lift import LeafSource, Scope
from attnfuse.passes.peel import Miss
from attnfuse.passes.site import Site, layout
from attnfuse.score import Call, Expr, Load, Program, Var, free_vars, loads, substitute, walk
from attnfuse.spec import AttentionSpec, Leaf, Shape


@dataclass(frozen=True)
class Meaning:
    """A site's spec with the tensors and numbers that its names stand for, in order."""

    spec: AttentionSpec
    leaves: tuple[LeafSource, ...]
    sizes: tuple[tuple[Any, Scope, fx.Node], ...]
    shape: Shape


def meaning(site: Site) -> Meaning:
    """The spec of a site, its leaves and symbols under their final names.

    Raises Miss where a size that has to be known is a symbol without a value to look at.
    """
    table = site.scope.table
    by_size = {"M": site.sizes.M, "N": site.sizes.N, "B": site.sizes.B, "H": site.sizes.H}
    names: dict[Expr, Expr] = {}
    numbers: list[tuple[Any, Scope, fx.Node]] = []
    sources: list[LeafSource] = []
    declared: list[Leaf] = []
    used = [e for top in site.program.expressions() for e in walk(top)]
    for var in dict.fromkeys(e.name for e in used if isinstance(e, Var) and e.name in table.symbols):
        expr, scope, node = table.symbols[var]
        known = next((name for name, size in by_size.items() if same(size, expr)), None)
        if known is None:
            names[Var(var)] = Var(f"i{len(numbers)}")
            numbers.append((expr, scope, node))
        else:
            names[Var(var)] = Var(known)
    # two steps: a symbol may already be called i0
    program = renamed(
        renamed(site.program, {k: Var(f"_{k}") for k in names}), {Var(f"_{k}"): v for k, v in names.items()}
    )
    for load in dict.fromkeys(x for top in program.expressions() for x in loads(top)):
        source = table.leaves[load.leaf]
        if source in sources:
            continue
        sources.append(source)
        of_sink = program.sink is not None and load in loads(program.sink)
        name = _leaf_name(source, load, declared, of_sink=of_sink)
        declared.append(Leaf(name, SHORT_DTYPES[fake(source.node).dtype], source.rank))
    final = {table.leaf(s): leaf.name for s, leaf in zip(sources, declared, strict=True)}
    spec = AttentionSpec(_leaves_renamed(program, final), tuple(declared), site.dropout)
    return Meaning(spec, tuple(sources), tuple(numbers), _hints(site))


def _leaf_name(source: LeafSource, load: Load, taken: Sequence[Leaf], *, of_sink: bool) -> str:
    dtype = fake(source.node).dtype
    used = frozenset().union(*(free_vars(i) for i in load.indices))
    if of_sink:
        name = "sinks"
    elif dtype == torch.bool:
        name = "pad" if used <= {"b", "n"} else "mask"
    elif not dtype.is_floating_point:
        name = "pos" if not used & {"n"} else "ids"
    else:
        name = "scale" if not load.indices else "bias"
    count = sum(leaf.name.rstrip("0123456789") == name for leaf in taken)
    return f"{name}{count + 1}" if count else name


def _leaves_renamed(program: Program, names: dict[str, str]) -> Program:
    swaps: dict[Expr, Expr] = {}

    def swap(load: Load) -> Load:
        indices = tuple(_rebuilt(i, swap) for i in load.indices)
        return Load(names[load.leaf], indices)

    for top in program.expressions():
        for load in loads(top):
            swaps[load] = swap(load)
    return renamed(program, swaps)


def _rebuilt(expr: Expr, swap: Callable[[Load], Load]) -> Expr:
    if isinstance(expr, Load):
        return swap(expr)
    if isinstance(expr, Call):
        return Call(expr.op, tuple(_rebuilt(a, swap) for a in expr.args))
    return expr


def hint(size: Size, node: fx.Node) -> int:
    """The size in this compile; for a symbol, the value that it was traced with.

    Raises:
        Miss: only the values of tensors tell it.
    """
    if isinstance(size, int):
        return size
    env = fake(node).fake_mode.shape_env  # type: ignore[attr-defined]
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    found = size.xreplace(known)
    if not found.is_number:
        raise Miss("AF033", node, f"only the values of tensors tell the size {found}")
    return int(found)


def _hints(site: Site) -> Shape:
    """The sizes as they are in this compile; symbols by their hints."""
    s = site.sizes
    layouts = layout(site.k, s, "k"), layout(site.v, s, "v")
    kv = max(hint(x.heads, site.out) for x in layouts if x is not None)
    b, h, m, n, d, e = (hint(x, site.out) for x in (s.B, s.H, s.M, s.N, s.D, s.Dv))
    return Shape(b, h, kv, m, n, d, e)


def renamed(program: Program, names: dict[Expr, Expr]) -> Program:
    """The program with leaves and symbols under other names."""
    tiers = tuple(replace(t, allowed=substitute(t.allowed, names)) for t in program.tiers)
    return Program(
        substitute(program.body, names), tiers, None if program.sink is None else substitute(program.sink, names)
    )
