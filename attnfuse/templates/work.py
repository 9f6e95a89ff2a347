"""One call of the CPU template: its operands, what is derived from its spec once, and the gradients it adds up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import torch
from torch import Tensor

from attnfuse.score import Expr, Load, S, derivative, loads
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import diagonals, dropout, tables
from attnfuse.templates.affine import affine, capped, constant, where_allowed
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.cover import Mask, Run, block_of, mask_of
from attnfuse.templates.evaluate import Block, Copies, Evaluator, Value, axes_of, clamped, named_sizes

# Scores of a block: what keeps it and its temporaries in the caches of one or two cores.
BLOCK_CELLS: Final = 1 << 20
# Cells whose gradients leave a kernel at a time, to be added to those of leaves, and rows of them at least.
GRADIENT_CELLS: Final = 1 << 22
GRADIENT_ROWS: Final = 192


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a spec's program says, compiled: its body in cells that the mask allows."""

    spec: AttentionSpec
    body: Evaluator
    tiers: Evaluator
    sink: Evaluator | None


@lru_cache(maxsize=1024)
def meaning_of(text: str) -> Meaning:
    """The program of the spec with that text, compiled."""
    spec = parse_spec(text)
    program = spec.program
    return Meaning(
        spec,
        Evaluator(spec, [where_allowed(program)]),
        Evaluator(spec, [tier.allowed for tier in program.tiers]),
        None if program.sink is None else Evaluator(spec, [program.sink]),
    )


@dataclass(frozen=True, slots=True)
class Slopes:
    """Derivatives of one expression of a spec: values come as [expression, d/ds, d/dload of each load of `loads`], or less."""

    loads: tuple[Load, ...]
    values: Evaluator
    indices: tuple[Evaluator, ...]


@lru_cache(maxsize=1024)
def slopes_of(text: str, wanted: frozenset[str], of: Literal["body", "allowed", "sink"] = "body") -> Slopes:
    """The derivatives of the body, of the body in cells that the mask allows, or of the sink, by s and by every load of the
    leaves `wanted`."""
    spec = parse_spec(text)
    program = spec.program
    expr = program.sink if of == "sink" else program.body if of == "body" else where_allowed(program)
    assert expr is not None
    found = tuple(load for load in loads(expr) if load.leaf in wanted)
    by: list[Expr] = [S, *found]
    exprs = [expr, *(derivative(expr, x) for x in by)]
    return Slopes(found, Evaluator(spec, exprs), tuple(Evaluator(spec, load.indices) for load in found))


@lru_cache(maxsize=1024)
def bias_slopes_of(text: str, wanted: frozenset[str]) -> Slopes:
    """The derivatives of the bias of `s*scale + bias` or `cap*tanh(s*scale) + bias` by every load of the leaves `wanted`, alone."""
    spec = parse_spec(text)
    body = where_allowed(spec.program)
    form = affine(body) or capped(body)
    assert form is not None
    bias = form.bias
    found = () if bias is None else tuple(load for load in loads(bias) if load.leaf in wanted)
    by_load = [] if bias is None else [derivative(bias, load) for load in found]
    return Slopes(found, Evaluator(spec, by_load), tuple(Evaluator(spec, load.indices) for load in found))


# Masks of blocks that indices alone decide are kept up to this many cells each.
_KEPT_MASK: Final = 1 << 15


@lru_cache(maxsize=256)
def _index_mask(
    text: str, shape: Shape, sizes: tuple[int, ...], h: tuple[int, int], m: tuple[int, int], n: tuple[int, int]
) -> Tensor | None:
    block = Block({}, named_sizes(shape, sizes), ((0, 1), h, m, n), torch.device("cpu"), torch.float32)
    return mask_of(text).allowed(block, edge=True, holes=False)


class Work:
    """One call.  Axes that are folded: query heads of one KV head go into rows, [b, Hkv, H / Hkv · rows, D]."""

    reordered = False
    """Whether ranges of rows and keys are places in an order, not their indices."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.shape = inputs.shape
        self.group = inputs.shape.H // inputs.shape.Hkv
        self.meaning = meaning_of(inputs.text)
        self.mask: Mask = mask_of(inputs.text)
        self.dtype = torch.promote_types(inputs.q.dtype, torch.float32)
        self.dropout = inputs.spec.dropout
        self.fills = frozenset(tier.fill for tier in inputs.spec.program.tiers)
        self._copies: Copies = {}
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._sink: Tensor | None = None

    @property
    def k(self) -> Tensor:
        """k in the accumulator's type."""
        if self._k is None:
            self._k = self.inputs.k.to(self.dtype)
        return self._k

    @property
    def v(self) -> Tensor:
        """v in the accumulator's type."""
        if self._v is None:
            self._v = self.inputs.v.to(self.dtype)
        return self._v

    @property
    def sink(self) -> Tensor | None:
        """The sink of each row, broadcast to [B, H, M]."""
        if self.meaning.sink is None:
            return None
        if self._sink is None:
            B, H, M = self.shape.B, self.shape.H, self.shape.M
            value = self.meaning.sink(self.block((0, B), (0, H), (0, M), (0, 1)))[0]
            self._sink = tensor_of(value, self.dtype).expand(B, H, M, 1)[..., 0]
        return self._sink

    def block(
        self, b: tuple[int, int], h: tuple[int, int], m: tuple[int, int], n: tuple[int, int], keys: Tensor | None = None
    ) -> Block:
        """Cells of this call; `keys` as in `Block`."""
        return block_of(self.inputs, b, h, m, n, keys, self._copies)

    def allowed(
        self, b: tuple[int, int], h: tuple[int, int], m: tuple[int, int], n: tuple[int, int], holes: bool
    ) -> Tensor | None:
        """The cells inside their run's interval of keys that every tier allows; None: all of them."""
        if not holes and self.mask.from_sizes and (m[1] - m[0]) * (n[1] - n[0]) <= _KEPT_MASK:
            return _index_mask(self.inputs.text, self.shape, self.inputs.sizes, h, m, n)
        return self.mask.allowed(self.block(b, h, m, n), edge=True, holes=holes)

    def _hashes(self, block: Block) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        seed = self.inputs.seed
        assert seed is not None
        return dropout.rows(seed, *(block.index(dim) for dim in range(3))), dropout.keys(seed, block.index(3))

    def dropped(self, block: Block) -> Tensor:
        """The cells of a block that dropout drops."""
        return dropout.dropped(*self._hashes(block), self.dropout)

    def hashes(self, block: Block) -> tuple[Tensor, Tensor]:
        """The hashes of the rows and of the keys of a block, contiguous int32 [2, b, h, m] and [2, n]."""
        rows, keys = self._hashes(block)
        return torch.stack(rows)[..., 0], torch.stack(keys).flatten(1)

    def empty(self, size: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
        """A tensor that is dense in the call's output order."""
        return torch.empty_permuted(size, self.inputs.out_order, dtype=dtype)

    def results(self) -> tuple[Tensor, Tensor]:
        """Memory for out and lse."""
        B, H, M, Dv = self.shape.B, self.shape.H, self.shape.M, self.shape.Dv
        return self.empty((B, H, M, Dv), self.inputs.v.dtype), torch.empty((B, H, M), dtype=self.dtype)


@lru_cache(maxsize=1024)
def dense_strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose axes are in that order from slowest to fastest."""
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


def laid_out(x: Tensor, dtype: torch.dtype, order: tuple[int, ...]) -> Tensor:
    """`x` in that type, dense in that order of its axes."""
    if x.dtype == dtype and (x.stride() == dense_strides(x.shape, order) or x.permute(order).is_contiguous()):
        return x
    return torch.empty_permuted(x.shape, order, dtype=dtype).copy_(x)


def tensor_of(value: Value, dtype: torch.dtype) -> Tensor:
    """A value as a tensor of that type and four dimensions."""
    if isinstance(value, Tensor):
        return value.to(dtype).view((1,) * (4 - value.dim()) + value.shape)
    return torch.full((1, 1, 1, 1), float(value), dtype=dtype)


def add_gradient(total: Tensor, load: Load, indices: Evaluator, block: Block, grad: Tensor) -> None:
    """Adds the gradient of the elements that `load` reads in a block to the gradient of its leaf.

    Args:
        grad: for each cell, [b, h, m, n]; summed already along an axis of size 1 that the load does not depend on.
    """
    dims = axes_of(load)
    inside = dims is not None and all(block.ranges[d][1] <= size for d, size in zip(dims, total.shape, strict=True))
    if dims is not None and inside and all(block.chosen(d) is None for d in dims):
        missing = [d for d in range(4) if d not in dims]
        if missing:
            grad = grad.sum(missing, keepdim=True)
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        part = total
        for place, d in enumerate(dims):
            part = part.narrow(place, block.ranges[d][0], block.ranges[d][1] - block.ranges[d][0])
        part.permute(order).add_(grad.squeeze(missing) if missing else grad)
        return
    if dims == ():
        total.add_(grad.sum())
        return
    at = torch.broadcast_tensors(*clamped(total, indices(block)))  # type: ignore[no-untyped-call]
    shape = (1,) * (4 - at[0].dim()) + at[0].shape
    missing = [d for d in range(4) if shape[d] == 1 and grad.shape[d] > 1]
    if missing:
        grad = grad.sum(missing, keepdim=True)
    total.index_put_(tuple(i.view(shape) for i in at), grad, accumulate=True)


class Gradients:
    """Gradients under construction; accumulators are of the accumulator's type, dq is written row by row."""

    def __init__(self, work: Work, cotangents: Cotangents) -> None:
        shape, inputs = work.shape, work.inputs
        self.work = work
        self.needs = cotangents.needs
        self.out, self.lse, self.dlse = cotangents.out, cotangents.lse, cotangents.dlse
        zero = torch.zeros((), dtype=inputs.v.dtype)
        self.dout = zero.expand(cotangents.out.shape) if cotangents.dout is None else cotangents.dout
        q, k, v = self.needs[:3]
        self.dq = work.empty((shape.B, shape.H, shape.M, shape.D), inputs.q.dtype).zero_() if q else None
        kv = (shape.B, shape.Hkv, shape.N)
        self.dk = torch.zeros((*kv, shape.D), dtype=work.dtype) if k else None
        self.dv = torch.zeros((*kv, shape.Dv), dtype=work.dtype) if v else None
        self.leaves = {
            leaf.name: torch.zeros(x.shape, dtype=work.dtype)
            for leaf, x, needed in zip(inputs.spec.leaves, inputs.leaves, self.needs[3:], strict=True)
            if needed
        }
        self.wanted = frozenset(self.leaves)
        body = {load.leaf for load in loads(inputs.spec.program.body)}
        self.from_body = self.wanted & body
        self._copies: dict[str, Tensor] = {}
        self._tables: dict[tuple[str, tables.Lookup], Tensor] = {}
        self._delta: Tensor | None = None
        self._row_lse: Tensor | None = None

    @property
    def scores_needed(self) -> bool:
        """Whether any gradient flows through the scores."""
        return self.dq is not None or self.dk is not None or bool(self.from_body)

    @property
    def delta(self) -> Tensor:
        """Σ dout·out of each row, [B, H, M]."""
        if self._delta is None:
            self._delta = (self.dout.to(self.work.dtype) * self.out).sum(-1)
        return self._delta

    @property
    def row_lse(self) -> Tensor:
        """The log-sum-exp of each row with the sink, [B, H, M]."""
        if self._row_lse is None:
            sink = self.work.sink
            self._row_lse = self.lse if sink is None else torch.logaddexp(self.lse.to(self.work.dtype), sink)
        return self._row_lse

    def add(self, load: Load, indices: Evaluator, block: Block, grad: Tensor) -> None:
        """Adds the gradient of the elements that `load` reads in a block, given for each cell."""
        along, total = diagonals.along(load), self.leaves[load.leaf]
        # rows in another order are no diagonals
        if along is not None and block.rows is None:
            offset = constant(along.offset, dict(block.sizes))
            assert offset is not None
            if load.leaf not in self._copies:
                self._copies[load.leaf] = diagonals.repeated(torch.zeros_like(total), self.work.shape.M, total.dtype)
            copies = self._copies[load.leaf]
            if diagonals.add(copies, along.lead, block.ranges, int(offset), grad, block.keys):
                return
        how = tables.lookup(load)
        if how is not None:
            if (load.leaf, how) not in self._tables:
                self._tables[load.leaf, how] = tables.laid_out(torch.zeros_like(total), how, total.dtype)
            entry = indices(block)[how.place]
            if isinstance(entry, Tensor) and tables.add(self._tables[load.leaf, how], how, entry, block.ranges, grad):
                return
        add_gradient(total, load, indices, block, grad)

    @property
    def from_bias(self) -> bool:
        """Whether the bias of scores that are `f(s) + bias` gives gradients to leaves."""
        return bool(self.from_body and bias_slopes_of(self.work.inputs.text, self.from_body).loads)

    def parts(self, run: Run) -> Iterable[Run]:
        """A run for some of its batches and heads at a time, as many as the gradients of their scores may be in memory."""
        return run.parts(self.work.group, self._most_cells(run) // GRADIENT_ROWS) if self.from_bias else (run,)

    def most_rows(self, run: Run) -> int | None:
        """Rows of a run whose gradients of scores may be in memory, None where these are not wanted."""
        if not self.from_bias:
            return None
        return max(GRADIENT_ROWS, self._most_cells(run) // ((run.b1 - run.b0) * (run.h1 - run.h0)))

    @staticmethod
    def _most_cells(run: Run) -> int:
        """Cells for each key of a run."""
        return GRADIENT_CELLS // max(1, run.hi - run.lo)

    def of_scores(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Memory for the gradient of each score of some rows q and keys k, where it is wanted."""
        return torch.empty((*q.shape[:3], k.shape[2]), dtype=torch.float32) if self.from_bias else None

    def add_of_scores(self, block: Block, grad: Tensor) -> None:
        """Adds the gradient of scores, of the form `f(s) + bias`, to that of the bias's leaves; [b, h, m, n], for each cell."""
        slopes = bias_slopes_of(self.work.inputs.text, self.from_body)
        for load, indices, slope in zip(slopes.loads, slopes.indices, slopes.values(block), strict=True):
            one = not isinstance(slope, Tensor) and slope == 1
            self.add(load, indices, block, grad if one else grad * slope)

    def finish_sink(self) -> None:
        """Adds the gradient of the sink's leaves."""
        work = self.work
        wanted = self.wanted & {load.leaf for load in loads(work.inputs.spec.program.sink or S)}
        sink = work.sink
        if sink is None or not wanted:
            return
        slopes = slopes_of(work.inputs.text, wanted, of="sink")
        shape = work.shape
        block = work.block((0, shape.B), (0, shape.H), (0, shape.M), (0, 1))
        dsink = (-torch.sigmoid(sink - self.lse) * self.delta)[..., None]
        for load, indices, slope in zip(slopes.loads, slopes.indices, slopes.values(block)[2:], strict=True):
            self.add(load, indices, block, dsink * slope)

    def results(self) -> list[Tensor]:
        """The wanted gradients in the order of the operands."""
        inputs = self.work.inputs
        for name, copies in self._copies.items():
            self.leaves[name] += copies.sum(-2)
        self._copies.clear()
        for (name, how), table in self._tables.items():
            self.leaves[name] += tables.given_back(table, how)
        self._tables.clear()
        out = [] if self.dq is None else [self.dq]
        for total, x in ((self.dk, inputs.k), (self.dv, inputs.v)):
            if total is not None:
                out.append(laid_out(total, x.dtype, inputs.out_order))
        named = zip(inputs.spec.leaves, inputs.leaves, strict=True)
        return out + [self.leaves[leaf.name].to(x.dtype) for leaf, x in named if leaf.name in self.leaves]
