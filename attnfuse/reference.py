"""The oracle: any `AttentionSpec` in plain PyTorch, dense, in float64 unless told otherwise, differentiable.

It defines what every template has to compute and shares nothing with them but the spec.  Entry point: `attention`.

A key has a class in its row.  It starts NORMAL, its score being the body.  Per tier, in order, where `allowed` is
false: `-inf` and `0row` make it excluded; `=min` makes it MIN and cuts its body off from the gradient; `+min` makes
NORMAL MIN, and MIN excluded (finfo.min was added twice).  A row with a NORMAL key is the softmax over its NORMAL keys;
one without is uniform over its MIN keys; one without these too is NaN, or zeros if a tier says `0row`, and gives the
bodies of its keys no gradient.  A sink is one more NORMAL score in each row that has no value: beside it, MIN keys have
no weight.

A load outside its leaf and an integer division by zero have no value.  `where`, `&`, `|` and the tiers may guard them:
where the guard excludes them they are never read and get no gradient, where it does not they are an IndexError.
Negative indices do not count from the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import ALWAYS_FLOAT, ROUNDINGS, Call, Const, Expr, Load, Var, walk
from attnfuse.spec import AttentionSpec


def attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor],
    sizes: Sequence[int] = (),
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What `spec` means for these tensors.

    Args:
        q: [B, H, M, D].
        k: [B, Hkv, N, D], with H a multiple of Hkv; query head h reads KV head h // (H // Hkv).
        v: [B, Hkv, N, Dv].
        leaves: the tensors of `spec.leaves`, in that order; of any precision.
        sizes: the values of `i0, i1, …`.
        keep: bool [B, H, M, N], the weights that dropout keeps, scaled by 1 / (1 - spec.dropout).  None: no dropout.
        dtype: what everything is computed in; floating-point inputs and leaves are converted to it.

    Returns:
        out [B, H, M, Dv] and lse [B, H, M], both in `dtype`.  lse is the natural log-sum-exp of the scores without the
        sink; float32's least finite value in a row of MIN keys, -inf in a row of none.

    Raises:
        ValueError: shapes or leaves that do not fit the spec.
        IndexError: a load outside its leaf, or a division by zero, that no guard excludes.
    """
    _check(spec, q, k, v, leaves, sizes)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1)
    values = Evaluator(spec, leaves, sizes, scores, k.shape[1] // heads, dtype)

    normal = torch.ones_like(scores, dtype=torch.bool)  # [B, H, M, N], as all that follow
    minimal = torch.zeros_like(normal)
    attached = torch.ones_like(normal)  # the body gets this key's gradient
    for tier in spec.program.tiers:
        matters = None if tier.fill == "=min" else normal | minimal
        allowed = values.of(tier.allowed, matters)
        if tier.fill == "=min":
            minimal = minimal | ~allowed
            attached = attached & allowed
        elif tier.fill == "+min":
            minimal = (minimal & allowed) | (normal & ~allowed)
        else:
            minimal = minimal & allowed
        normal = normal & allowed

    has_normal = normal.any(-1, keepdim=True)
    decided = has_normal
    sink = None
    if spec.program.sink is not None:
        sink = values.of(spec.program.sink)[..., :1].to(dtype)
        decided = decided | (sink > -torch.inf)
    chosen = torch.where(decided, normal, minimal)
    empty = ~chosen.any(-1, keepdim=True)

    body = values.of(spec.program.body, chosen & attached).to(dtype)
    uniform = torch.where(attached, body - body.detach(), 0.0)  # finfo.min absorbs the score, not its gradient
    scores = torch.where(chosen, torch.where(normal, body, uniform), -torch.inf)

    def softmax(scores: Tensor) -> Tensor:
        if sink is None:
            return torch.softmax(scores, -1)
        return torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]

    if any(tier.fill == "0row" for tier in spec.program.tiers):
        weights = torch.where(empty, 0.0, softmax(torch.where(empty, 0.0, scores)))
    else:
        weights = softmax(scores)
    if keep is not None:
        weights = weights * keep / (1 - spec.dropout)

    without = torch.where(empty, -torch.inf, torch.finfo(torch.float32).min).to(dtype)
    lse = torch.where(has_normal, torch.where(has_normal, scores, 0.0).logsumexp(-1, keepdim=True), without)
    return weights @ v, lse.squeeze(-1)


def _check(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, leaves: Sequence[Tensor], sizes: Sequence[int]
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: expected a floating-point tensor of 4 dimensions")
    B, H, _, D = q.shape
    if k.shape != (B, k.shape[1], k.shape[2], D) or v.shape[:3] != k.shape[:3] or k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [B, H, M, D], [B, Hkv, N, D] and "
            f"[B, Hkv, N, Dv] with H a multiple of Hkv"
        )
    if len(leaves) != len(spec.leaves):
        raise ValueError(f"{len(leaves)} leaves given, the spec declares {len(spec.leaves)}: {spec}")
    for leaf, x in zip(spec.leaves, leaves, strict=True):
        kind = "bool" if x.dtype == torch.bool else "float" if x.is_floating_point() else "int"
        if x.dim() != leaf.rank or kind != leaf.kind:
            raise ValueError(f"leaf {leaf} was given a {x.dtype} tensor of shape {list(x.shape)}")
    if len(sizes) < spec.size_count():
        raise ValueError(f"{len(sizes)} sizes given, the program uses i0 to i{spec.size_count() - 1}")


class _Value(NamedTuple):
    """A tensor that broadcasts to [B, H, M, N], and where it has a value (None: everywhere)."""

    data: Tensor
    defined: Tensor | None = None


class Evaluator:
    """Expressions over all of [B, H, M, N] at once; `scores` is `s`."""

    def __init__(
        self,
        spec: AttentionSpec,
        leaves: Sequence[Tensor],
        sizes: Sequence[int],
        scores: Tensor,
        kv_heads: int,
        dtype: torch.dtype,
    ) -> None:
        self.shape = scores.shape
        self.device = scores.device
        self.dtype = dtype
        self.leaves = {
            leaf.name: x.to(dtype) if x.is_floating_point() else x if x.dtype == torch.bool else x.long()
            for leaf, x in zip(spec.leaves, leaves, strict=True)
        }
        self.known: dict[Expr, _Value] = {Var("s"): _Value(scores)}
        for at, name in enumerate("bhmn"):
            index = torch.arange(self.shape[at], device=self.device)
            self.known[Var(name)] = _Value(index.view([-1 if at == dim else 1 for dim in range(4)]))
        B, H, M, N = self.shape
        named = {"B": B, "H": H, "Hkv": kv_heads, "M": M, "N": N, **{f"i{at}": size for at, size in enumerate(sizes)}}
        self.known |= {Var(name): _Value(torch.tensor(size, device=self.device)) for name, size in named.items()}
        self.faults: dict[Expr, str] = {}

    def of(self, expr: Expr, matters: Tensor | None = None) -> Tensor:
        """`expr` over [B, H, M, N]; IndexError if it has no value where it `matters` (None: everywhere)."""
        data, defined = self._evaluate(expr)
        if defined is not None:
            fault = ~defined.expand(self.shape) if matters is None else ~defined & matters
            if bool(fault.any()):
                seen = "; ".join(self.faults[e] for e in dict.fromkeys(walk(expr)) if e in self.faults)
                raise IndexError(
                    f"{expr} has no value where it is needed: {seen}. "
                    f"Guard it with where(…), or clamp the index with max(…) and min(…)"
                )
        return data.expand(self.shape)

    def _evaluate(self, expr: Expr) -> _Value:
        if expr not in self.known:
            self.known[expr] = self._compute(expr)
        return self.known[expr]

    def _compute(self, expr: Expr) -> _Value:
        if isinstance(expr, Const):
            return _Value(torch.tensor(expr.value, device=self.device, dtype=_const_dtype(expr.value, self.dtype)))
        if isinstance(expr, Load):
            return self._load(expr)
        assert isinstance(expr, Call)
        args = [self._evaluate(a) for a in expr.args]
        if expr.op in ("and", "or"):
            return _logic(expr.op, *args)
        if expr.op == "where":
            condition, a, b = args
            first, second = self._promoted((a.data, b.data))
            arms = _where(condition.data, a.defined, b.defined)
            return _Value(torch.where(condition.data, first, second), _both(condition.defined, arms))
        defined = None
        for arg in args:
            defined = _both(defined, arg.defined)
        data = self._promoted([arg.data for arg in args])
        if expr.op in ("floordiv", "mod"):
            divides = data[1] != 0
            if not bool(divides.all()):
                self.faults[expr] = f"{expr} divides by zero"
                defined = _both(defined, divides)
                data[1] = torch.where(divides, data[1], 1)
        if expr.op in ALWAYS_FLOAT:
            data = [x.to(self.dtype) for x in data]
        return _Value(_OPERATIONS[expr.op](*data), defined)

    def _promoted(self, args: Sequence[Tensor]) -> list[Tensor]:
        floating = any(x.is_floating_point() for x in args)
        return [x.to(self.dtype) if floating else x for x in args]

    def _load(self, expr: Load) -> _Value:
        leaf = self.leaves[expr.leaf]
        defined = None
        indices = []
        for dim, index in enumerate(expr.indices):
            at, inner = self._evaluate(index)
            size = leaf.shape[dim]
            inside = (at >= 0) & (at < size)
            defined = _both(defined, inner)
            if not bool(inside.all()):
                reached = f"{int(at.min())} to {int(at.max())}"
                self.faults[expr] = f"{expr} reads dimension {dim} of {expr.leaf} {list(leaf.shape)} at {reached}"
                defined = _both(defined, inside)
            indices.append(at.clamp(0, max(size - 1, 0)))
        if 0 in leaf.shape:
            empty = torch.zeros((), device=self.device, dtype=leaf.dtype)
            return _Value(empty, torch.zeros((), device=self.device, dtype=torch.bool))
        data = leaf[tuple(indices)] if indices else leaf
        return _Value(data, defined)


def _const_dtype(value: bool | int | float, dtype: torch.dtype) -> torch.dtype:
    return torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else dtype


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b


def _where(condition: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None and b is None:
        return None
    everywhere = torch.ones_like(condition)
    return torch.where(condition, everywhere if a is None else a, everywhere if b is None else b)


def _logic(op: str, a: _Value, b: _Value) -> _Value:
    """`and` and `or`, which have a value as soon as one defined side decides."""
    decided_by_a, decided_by_b = (~a.data, ~b.data) if op == "and" else (a.data, b.data)
    data = a.data & b.data if op == "and" else a.data | b.data
    if a.defined is None and b.defined is None:
        return _Value(data)
    first = torch.ones_like(a.data) if a.defined is None else a.defined
    second = torch.ones_like(b.data) if b.defined is None else b.defined
    return _Value(data, (first & decided_by_a) | (second & decided_by_b) | (first & second))


def _beyond(limit: float) -> Callable[[Tensor], Tensor]:
    def rounded(x: Tensor) -> Tensor:
        # the derivative is 1 where the result is infinite too
        return x + torch.where(x.abs() >= limit, x * torch.inf, 0.0).detach()

    return rounded


_OPERATIONS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "neg": torch.neg,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "pow": torch.pow,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "float": lambda a: a,
    "le": torch.le,
    "lt": torch.lt,
    "ge": torch.ge,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
    "not": torch.logical_not,
    **{name: _beyond(limit) for name, limit in ROUNDINGS.items()},
}
