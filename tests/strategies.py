"""Hypothesis strategies for the score language: expressions of every type, masks, and whole attentions with their tensors.

`expressions` builds trees of every operation; `cases` builds attentions that a kernel can be held to (bodies without poles,
loads inside their leaves), whose tensors come from a seed so that a failing case prints as one line.  (`one_of(…).map(f)` would weigh `f` by the number of
alternatives, so functions of alternatives are built.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnfuse.score import FILLS, Call, Const, Expr, Load, Program, Tier, Var, call, loads, parse_expr
from attnfuse.spec import AttentionSpec, Leaf, Shape


class _Table(NamedTuple):
    """A leaf that random programs may load from; `dims` and `values` are given the shape."""

    dtype: str
    dims: Callable[[Shape], tuple[int, ...]]
    values: Callable[[Shape], tuple[int, int]] = lambda _: (0, 1)  # integers: least and greatest


TABLES = {
    "pad": _Table("bool", lambda x: (x.B, x.N)),
    "dense": _Table("bool", lambda x: (x.B, 1, x.M, x.N)),
    "query": _Table("bool", lambda x: (x.B, x.M)),
    "doc": _Table("i64", lambda x: (x.B, max(x.M, x.N)), lambda x: (0, 2)),
    "pos": _Table("i64", lambda x: (x.B, x.M), lambda x: (-2, x.N + 1)),
    "length": _Table("i32", lambda x: (x.B,), lambda x: (0, x.N + 1)),
    "bucket": _Table("i64", lambda x: (x.M + x.N - 1,), lambda x: (0, 4)),
    "slope": _Table("f32", lambda x: (x.H,)),
    "table": _Table("f32", lambda x: (5, x.H)),
    "bias": _Table("f32", lambda x: (x.B, x.H, x.M, x.N)),
    "sinks": _Table("f32", lambda x: (x.H,)),
}


def leaf_of(name: str) -> Leaf:
    """The declaration of a leaf of `TABLES`."""
    return Leaf(name, TABLES[name].dtype, len(TABLES[name].dims(Shape(1, 1, 1, 1, 1, 1, 1))))


ALL_LEAVES = tuple(map(leaf_of, TABLES))

shapes = st.builds(
    lambda B, Hkv, group, M, N, D, Dv: Shape(B, Hkv * group, Hkv, M, N, D, Dv),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 13),
    st.integers(1, 17),
    st.sampled_from((4, 8)),
    st.sampled_from((4, 6)),
)

# --- every operation, as raw trees -----------------------------------------------------------------------------------

INDEX_NAMES = ("b", "h", "m", "n", "B", "H", "Hkv", "M", "N")
INT_LOADS = tuple(map(parse_expr, ("doc[b, m]", "doc[b, n]", "pos[b, m]", "length[b]", "bucket[n - m + M - 1]")))
BOOL_LOADS = tuple(map(parse_expr, ("pad[b, n]", "dense[b, 0, m, n]", "query[b, m]")))
FLOAT_LOADS = tuple(map(parse_expr, ("slope[h]", "bias[b, h, m, n]", "table[doc[b, n], h]", "sinks[h]")))
COMPARE = ("le", "lt", "ge", "gt", "eq", "ne")
# Whole numbers, halves and the like: constant folding has to meet both exact and inexact sums.
FLOATS = (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.0, -2.0, 0.125, 0.1, 1e-3, 1e4, -1e4)


def ints(depth: int = 2, *, load: bool = True, small: bool = False) -> st.SearchStrategy[Expr]:
    """Integer expressions; `small` leaves out what has no value at every index (division by anything but a literal)."""
    atoms = [st.sampled_from(INDEX_NAMES).map(Var), st.integers(-6, 6).map(Const)]
    if load:
        atoms.append(st.sampled_from(INT_LOADS))
    if depth == 0:
        return st.one_of(atoms)
    inner = ints(depth - 1, load=load, small=small)
    divisor = st.sampled_from((-4, -3, -2, -1, 1, 2, 3, 5)).map(Const)
    by = [divisor] if small else [divisor, inner]
    return st.one_of(
        *atoms,
        st.builds(
            lambda op, a, b: Call(op, (a, b)), st.sampled_from(("add", "sub", "add", "sub", "mul")), inner, inner
        ),
        st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(("min", "max")), inner, inner),
        st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(("floordiv", "mod")), inner, st.one_of(by)),
        st.builds(lambda op, a: Call(op, (a,)), st.sampled_from(("neg", "abs")), inner),
        st.builds(
            lambda c, a, b: Call("where", (c, a, b)),
            bools(depth - 1, load=load, small=small, floats=False),
            inner,
            inner,
        ),
    )


def bools(depth: int = 2, *, load: bool = True, small: bool = False, floats: bool = True) -> st.SearchStrategy[Expr]:
    """Truth values: comparisons of integers and floats, logic, choices, loads."""
    number = ints(max(depth - 1, 0), load=load, small=small)
    atoms: list[st.SearchStrategy[Expr]] = [
        st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(COMPARE), number, number)
    ]
    if load:
        atoms.append(st.sampled_from(BOOL_LOADS))
    if depth == 0:
        return st.one_of(*atoms, st.booleans().map(Const))
    inner = bools(depth - 1, load=load, small=small, floats=floats)
    real = float_expressions(depth - 1, load=load, score=False)
    if floats:
        atoms.append(st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(COMPARE), real, real))
    return st.one_of(
        *atoms,
        st.builds(
            lambda op, a, b: Call(op, (a, b)), st.sampled_from(("and", "or", "and", "or", "eq", "ne")), inner, inner
        ),
        st.builds(lambda a: Call("not", (a,)), inner),
        st.builds(lambda c, a, b: Call("where", (c, a, b)), inner, inner, inner),
    )


def float_expressions(depth: int = 2, *, load: bool = True, score: bool = True) -> st.SearchStrategy[Expr]:
    """Floats: arithmetic with integers mixed in, functions, choices; `score` lets them hold `s`."""
    atoms: list[st.SearchStrategy[Expr]] = [st.sampled_from(FLOATS).map(Const)]
    if score:
        atoms.append(st.just(Var("s")))
    if load:
        atoms.append(st.sampled_from(FLOAT_LOADS))
    if depth == 0:
        return st.one_of(atoms)
    inner = float_expressions(depth - 1, load=load, score=score)
    either = st.one_of(inner, inner, ints(depth - 1, load=load, small=True))
    mask = bools(depth - 1, load=load, small=True, floats=False)
    arithmetic = st.sampled_from(("add", "sub", "mul", "min", "max"))
    functions = st.sampled_from(("tanh", "exp", "sigmoid", "neg", "abs", "float", "bf16", "f16"))
    return st.one_of(
        *atoms,
        st.builds(lambda op, a, b: Call(op, (a, b)), arithmetic, inner, either),
        st.builds(lambda op, a, b: Call(op, (a, b)), arithmetic, either, inner),
        st.builds(lambda a, b: Call("div", (a, b)), either, st.sampled_from(FLOATS[1:]).map(Const)),
        st.builds(lambda op, a: Call(op, (a,)), functions, inner),
        st.builds(lambda a: Call("float", (a,)), st.one_of(either, mask)),
        st.builds(
            lambda c, a, b: Call("where", (c, a, b)),
            mask,
            inner,
            st.one_of(inner, ints(depth - 1, load=False, small=True)),
        ),
    )


def rebuilt(expr: Expr) -> Expr:
    """`expr` built anew through `call`, from the leaves up."""
    if isinstance(expr, Load):
        return Load(expr.leaf, tuple(rebuilt(i) for i in expr.indices))
    return call(expr.op, *(rebuilt(a) for a in expr.args)) if isinstance(expr, Call) else expr


# --- attentions ------------------------------------------------------------------------------------------------------

MASKS = tuple(
    map(
        parse_expr,
        (
            "n <= m",
            "n <= m + N - M",
            "n > m - 4",
            "abs(m - n) <= 3",
            "n // 4 == m // 4",
            "(n - m) % 3 == 0",
            "n < 2",
            "n <= pos[b, m]",
            "n < length[b]",
            "doc[b, m] == doc[b, n]",
            "pad[b, n]",
            "query[b, m]",
            "dense[b, 0, m, n]",
            "h < 1",
        ),
    )
)
BODIES = tuple(
    map(
        parse_expr,
        (
            "s",
            "s*0.125",
            "s/2.0",
            "5.0*tanh(s*0.5/5.0)",
            "where(n < m, s, s*0.5)",
            "max(s, -1.5)",
            "s*slope[h]",
            "sigmoid(s)",
        ),
    )
)
TERMS = tuple(
    map(
        parse_expr,
        (
            "slope[h]*n",
            "slope[h]*float(n - m)",
            "bias[b, h, m, n]",
            "table[bucket[n - m + M - 1], h]",
            "where(pad[b, n], 0.0, -10000.0)",
            "abs(bias[b, h, m, n])*0.5",
        ),
    )
)


def masks(depth: int = 2) -> st.SearchStrategy[Expr]:
    """What attentions mask by, joined by logic, sometimes any truth value."""
    plain = st.one_of(st.sampled_from(MASKS), st.sampled_from(MASKS), bools(1, small=True, floats=False))
    if depth == 0:
        return plain
    inner = masks(depth - 1)
    return st.one_of(
        plain,
        st.builds(lambda a, b: call("and", a, b), inner, inner),
        st.builds(lambda a, b: call("and", a, b), inner, inner),
        st.builds(lambda a, b: call("or", a, b), inner, inner),
        st.builds(lambda a: call("not", a), inner),
    )


bodies = st.one_of(
    st.sampled_from(BODIES),
    st.builds(lambda a, b: call("add", a, b), st.sampled_from(BODIES), st.sampled_from(TERMS)),
)
tiers = st.builds(Tier, masks(), st.sampled_from(FILLS))
programs = st.builds(
    lambda body, tiers, sink: Program(body, tuple(tiers), sink),
    bodies,
    st.lists(tiers, max_size=2),
    st.sampled_from((None, None, parse_expr("sinks[h]"))),
)


def spec_of(program: Program, dropout: float = 0.0) -> AttentionSpec:
    """The spec of a program over `TABLES`, declaring the leaves that it loads, in the order in which they appear."""
    used = dict.fromkeys(load.leaf for expr in program.expressions() for load in loads(expr))
    return AttentionSpec(program, tuple(leaf_of(name) for name in used), dropout)


class Tensors(NamedTuple):
    """Operands of one attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    leaves: list[Tensor]
    dout: Tensor
    keep: Tensor | None


@dataclass(frozen=True)
class Case:
    """One attention: `tensors` makes its operands, always the same ones."""

    spec: AttentionSpec
    shape: Shape
    seed: int

    def tensors(self, dtype: torch.dtype = torch.float32) -> Tensors:
        """q, k, v and dout in `dtype`, the leaves of the spec (float leaves in float32, rounded to `dtype`), a keep mask.

        Only the leaves of floating-point type, q, k and v require grad.
        """
        x = self.shape
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        q, k, v = normal(x.B, x.H, x.M, x.D), normal(x.B, x.Hkv, x.N, x.D), normal(x.B, x.Hkv, x.N, x.Dv)
        dout = normal(x.B, x.H, x.M, x.Dv)
        keep = torch.rand(x.B, x.H, x.M, x.N, generator=generator) >= self.spec.dropout if self.spec.dropout else None
        leaves = []
        for leaf in self.spec.leaves:
            table = TABLES[leaf.name]
            dims = table.dims(x)
            if leaf.kind == "float":
                leaves.append(normal(*dims).float().requires_grad_())
            elif leaf.kind == "bool":
                leaves.append(torch.rand(dims, generator=generator) < 0.7)
            else:
                low, high = table.values(x)
                made = torch.randint(low, high + 1, dims, generator=generator)
                leaves.append(made.to({"i64": torch.int64, "i32": torch.int32}[leaf.dtype]))
        return Tensors(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), leaves, dout, keep)


def cases(
    programs: st.SearchStrategy[Program] = programs,
    shapes: st.SearchStrategy[Shape] = shapes,
    dropout: st.SearchStrategy[float] | None = None,
) -> st.SearchStrategy[Case]:
    """Attentions over `TABLES`."""
    rates = st.sampled_from((0.0, 0.0, 0.3)) if dropout is None else dropout
    specs = st.builds(spec_of, programs, rates)
    return st.builds(Case, specs, shapes, st.integers(0, 2**16))
