"""The inner step that is a call of our own kernels (`native`): rows that see the keys from one number to another.

The score is `s*scale + bias` or `cap*tanh(s*scale) + bias`.  A bias that is a leaf, read by indices or along diagonals, is read
where it is; another one is computed for some rows at a time, the gradient of every bias for some batches, heads and rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnfuse.score import Expr, Load
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import diagonals, native
from attnfuse.templates.affine import affine, as_load, capped, constant, numbers, where_allowed
from attnfuse.templates.base import Inputs
from attnfuse.templates.cover import Run, Segment
from attnfuse.templates.evaluate import Evaluator, axes_of, named_sizes, varies
from attnfuse.templates.flash_kernel import has_digits, is_ours, unit_stride
from attnfuse.templates.plain_step import Rows
from attnfuse.templates.work import BLOCK_CELLS, Gradients, Work, tensor_of

# Rows of whose bias all keys are in memory at a time, at least: keys are packed anew for each such block.
_FEWEST_ROWS: Final = 192

_Memory = TypeVar("_Memory", Tensor, Tensor | None)


class _Plan(NamedTuple):
    """The score as the kernel takes it.

    Args:
        load: the bias, where it is no more than that.
        leaf: which of the leaves it loads.
        offset: of a load along diagonals.
    """

    scale: float
    cap: float
    bias: Expr | None
    evaluator: Evaluator | None = None
    load: Load | None = None
    leaf: int = 0
    offset: int = 0


@lru_cache(maxsize=1024)
def _plan(text: str, shape: Shape, sizes: tuple[int, ...]) -> _Plan | None:
    spec = parse_spec(text)
    named = named_sizes(shape, sizes)
    found = numbers(where_allowed(spec.program), named)
    if found is None or shape.D == 0:
        return None
    scale, cap, bias = found
    if bias is None:
        return _Plan(scale, cap, None)
    evaluator = Evaluator(spec, [bias])
    load = as_load(spec, bias)
    if load is not None:
        leaf = [leaf.name for leaf in spec.leaves].index(load.leaf)
        along = diagonals.along(load)
        offset = None if along is None else constant(along.offset, named)
        if axes_of(load) is not None or offset is not None:
            return _Plan(scale, cap, bias, evaluator, load, leaf, int(offset or 0))
    return _Plan(scale, cap, bias, evaluator)


def takes(spec: AttentionSpec) -> bool:
    """Whether the kernels compute the score of a spec, where each row sees whole intervals of keys."""
    body = where_allowed(spec.program)
    return (affine(body) or capped(body)) is not None


def _plan_for(inputs: Inputs) -> _Plan | None:
    if inputs.q.dtype != inputs.v.dtype or not is_ours(inputs):
        return None
    return _plan(inputs.text, inputs.shape, inputs.sizes)


def serves(work: Work, run: Run, segment: Segment) -> bool:
    """Whether the kernel computes a segment."""
    if run.holes or not (segment.exact or not (run.rows.loose or run.rows.asked)):
        return False
    return _plan_for(work.inputs) is not None


def differentiates(grads: Gradients, run: Run, segment: Segment) -> bool:
    """Whether the kernel gives the wanted gradients of a segment.

    Not from that of lse beside a sink, which is none of its keys, nor where beside one a bias leaves lse too few digits.
    """
    work = grads.work
    if (
        (grads.dlse is not None and work.sink is not None)
        or not native.differentiates(work.inputs.q.dtype)
        or not serves(work, run, segment)
    ):
        return False
    plan = _plan_for(work.inputs)
    assert plan is not None
    lse = grads.lse[run.b0 : run.b1, run.h0 : run.h1, segment.m0 : segment.m1]
    return plan.bias is None or work.sink is None or has_digits(lse, grads.out)


def forward(work: Work, run: Run, segment: Segment, out: Tensor, lse: Tensor) -> Iterator[Rows]:
    """Writes the rows of a segment; yields those that have no key."""
    inputs = work.inputs
    plan = _plan_for(inputs)
    assert plan is not None
    k, v = (unit_stride(x[_keys_of(work, run)]) for x in (inputs.k, inputs.v))
    for m0, m1, bias in _biases(work, run, segment, plan):
        rows = slice(run.b0, run.b1), slice(run.h0, run.h1), slice(m0, m1)
        q, score = unit_stride(inputs.q[rows]), _score(work, run, (m0, m1), plan, bias)
        with _dense(out[rows]) as values:
            native.forward(q, k, v, values, lse[rows], score, _keys(run, segment, m0, m1))
    yield from _empty(run, segment)


def backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> Iterator[Rows]:
    """Adds what the rows of a segment give to the gradients; yields those that have no key."""
    for part in grads.parts(run):
        _backward(work, part, segment, grads)
    yield from _empty(run, segment)


def _backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> None:
    inputs = work.inputs
    plan = _plan_for(inputs)
    assert plan is not None
    some = _keys_of(work, run)
    k, v = (unit_stride(x[some]) for x in (inputs.k, inputs.v))
    dk, dv = (None if x is None else x[some] for x in (grads.dk, grads.dv))
    for m0, m1, bias in _biases(work, run, segment, plan, grads.most_rows(run)):
        rows = slice(run.b0, run.b1), slice(run.h0, run.h1), slice(m0, m1)
        dout, q, out = (unit_stride(x[rows]) for x in (grads.dout, inputs.q, grads.out))
        lse, dlse = unit_stride(grads.row_lse[rows]), None if grads.dlse is None else grads.dlse[rows]
        score, keys = _score(work, run, (m0, m1), plan, bias), _keys(run, segment, m0, m1)
        dscores = grads.of_scores(q, k)
        with _dense(None if grads.dq is None else grads.dq[rows]) as dq:
            native.backward(
                *(dout, q, k, v, out, lse, dq, dk, dv, score, keys),
                dlse=dlse,
                dscores=dscores,
                adds=True,
                whole=work.sink is None,
            )
        if dscores is not None:
            grads.add_of_scores(work.block((run.b0, run.b1), (run.h0, run.h1), (m0, m1), (run.lo, run.hi)), dscores)


def _keys_of(work: Work, run: Run) -> tuple[slice, slice, slice]:
    """The batches, KV heads and keys of a run."""
    return slice(run.b0, run.b1), slice(run.h0 // work.group, run.h1 // work.group), slice(run.lo, run.hi)


def _score(work: Work, run: Run, rows: tuple[int, int], plan: _Plan, bias: native.Cells | None) -> native.Score:
    """What becomes of the products of some rows of a run."""
    dropped = None
    if work.dropout:
        block = work.block((run.b0, run.b1), (run.h0, run.h1), rows, (run.lo, run.hi))
        dropped = native.Dropout(work.dropout, *work.hashes(block))
    return native.Score(plan.scale, plan.cap, bias, dropout=dropped)


def _empty(run: Run, segment: Segment) -> Iterator[Rows]:
    """The rows of a segment that see no key."""
    if segment.exact:
        return
    first, last = _ends(run, segment.m0, segment.m1)
    empty = first >= last
    if bool(empty.any()):
        of_all = empty.expand(run.b1 - run.b0, run.h1 - run.h0, -1)
        yield Rows((run.b0, run.b1), (run.h0, run.h1), (segment.m0, segment.m1), of_all)


@contextmanager
def _dense(x: _Memory) -> Iterator[_Memory]:
    """Memory with a dense last axis, whose contents are those of `x` in the end."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        yield x
        return
    dense = torch.empty_like(x, memory_format=torch.contiguous_format)
    yield dense
    x.copy_(dense)


def _ends(run: Run, m0: int, m1: int) -> Tensor:
    """The first key of each row and the one after its last, in the run's interval."""
    ends = torch.stack((run.rows.first[0, m0:m1], run.rows.last[0, m0:m1]))
    return ends.clamp_(run.lo, run.hi)


def _keys(run: Run, segment: Segment, m0: int, m1: int) -> native.Keys:
    """The keys of the rows [m0, m1) of a segment, counted from the run's first."""
    if not segment.exact:
        return native.Keys(0, 0, rows=_ends(run, m0, m1) - run.lo)
    down, right, rows = segment.down, segment.right, m0 - segment.m0
    return native.Keys(segment.first + down * rows - run.lo, segment.last + right * rows - run.lo, down, right)


def _biases(
    work: Work, run: Run, segment: Segment, plan: _Plan, most: int | None = None
) -> Iterator[tuple[int, int, native.Cells | None]]:
    """The rows of a segment in parts, of up to `most` rows, with the bias of each for the keys of the run."""
    batches, heads, keys = (run.b0, run.b1), (run.h0, run.h1), (run.lo, run.hi)
    axes = set() if plan.bias is None else varies(plan.bias)
    computed = plan.bias is not None and _in_memory(work, run, (segment.m0, segment.m1), plan) is None
    height = segment.m1 - segment.m0 if most is None else most
    if computed and "m" in axes:
        of_axes = (last - first if axis in axes else 1 for axis, (first, last) in (("b", batches), ("h", heads)))
        height = min(height, max(_FEWEST_ROWS, BLOCK_CELLS // max(1, math.prod((*of_axes, keys[1] - keys[0])))))
    for first in range(segment.m0, segment.m1, height):
        last = min(first + height, segment.m1)
        if not computed:
            yield first, last, _where_it_is(work, run, (first, last), plan)
            continue
        assert plan.evaluator is not None
        asked = (first, last) if "m" in axes else (first, first + 1)
        value = tensor_of(plan.evaluator(work.block(batches, heads, asked, keys))[0], torch.float32)
        yield first, last, native.Cells.of(value)


def _in_memory(work: Work, run: Run, rows: tuple[int, int], plan: _Plan) -> Tensor | None:
    """The part of a leaf that is the bias of some rows, where the kernel reads it as it is, or once it is float32."""
    if plan.load is None or work.reordered:
        return None
    x = work.inputs.leaves[plan.leaf]
    ranges = (run.b0, run.b1), (run.h0, run.h1), rows, (run.lo, run.hi)
    for place, axis in enumerate(_lead(plan.load)):
        first, last = ranges[axis]
        if last > x.shape[place]:
            return None
        x = x.narrow(place, first, last - first)
        if axis == 3 and not _is_converted(work, x) and x.stride(place) not in (0, 1):
            return None
    if _is_converted(work, x) and 0 in x.stride():
        # it would be larger
        return None
    if diagonals.along(plan.load) is not None:
        (m0, m1), (n0, n1) = ranges[2:]
        if x.stride(-1) != 1 or n0 - (m1 - 1) + plan.offset < 0 or n1 - 1 - m0 + plan.offset >= x.shape[-1]:
            return None
    return x


def _lead(load: Load) -> tuple[int, ...]:
    """The axes that the dimensions of a leaf run along, but for the last one of diagonals."""
    along = diagonals.along(load)
    lead = axes_of(load) if along is None else along.lead
    assert lead is not None
    return lead


def _is_converted(work: Work, x: Tensor) -> bool:
    return x.dtype not in (torch.float32, work.inputs.q.dtype)


def _where_it_is(work: Work, run: Run, rows: tuple[int, int], plan: _Plan) -> native.Cells | None:
    """A bias that is a leaf as it is in memory, of some rows."""
    x = _in_memory(work, run, rows, plan)
    if x is None or plan.load is None:
        return None
    lead = _lead(plan.load)
    if _is_converted(work, x):
        keys = lead.index(3) if 3 in lead else -1
        x = x.movedim(keys, -1).to(torch.float32, memory_format=torch.contiguous_format).movedim(-1, keys)
    strides = [0, 0, 0, 0]
    for place, axis in enumerate(lead):
        strides[axis] = x.stride(place)
    offset = 0
    if diagonals.along(plan.load) is not None:
        strides[2:] = -1, 1
        offset = run.lo - rows[0] + plan.offset
    return native.Cells(x, (strides[0], strides[1], strides[2], strides[3]), offset)
