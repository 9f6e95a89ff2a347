"""The inner step for `s*scale + bias` without dropout: the library's flash kernel, which takes grouped heads as they are.

A segment whose rows all start at one key is a rectangle, a causal square, or one beside the other, merged by their
log-sum-exps: no mask is needed.  Other rows go block by block under a small additive mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.spec import Shape, parse_spec
from attnfuse.templates.affine import affine, constant
from attnfuse.templates.cover import Run, Segment, named_sizes
from attnfuse.templates.evaluate import Evaluator, varies
from attnfuse.templates.plain_step import Rows
from attnfuse.templates.work import Gradients, Work, tensor_of

_FORWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ROWS: Final = 256


class _Score(NamedTuple):
    scale: float
    bias: Evaluator | None
    bias_by_row: bool


@lru_cache(maxsize=1024)
def _score(text: str, shape: Shape, sizes: tuple[int, ...]) -> _Score | None:
    """The score as the kernel takes it, or None where it has another form."""
    spec = parse_spec(text)
    form = affine(spec.program.body)
    scale = None if form is None else constant(form.scale, named_sizes(shape, sizes))
    if form is None or scale is None or spec.dropout or not shape.D == shape.Dv > 0:
        return None
    if form.bias is None:
        return _Score(scale, None, bias_by_row=False)
    return _Score(scale, Evaluator(spec, [form.bias]), "m" in varies(form.bias))


def serves(work: Work) -> bool:
    """Whether the kernel computes this call."""
    inputs = work.inputs
    return inputs.q.dtype == inputs.v.dtype and _score(inputs.text, inputs.shape, inputs.sizes) is not None


def differentiates(grads: Gradients) -> bool:
    """Whether the kernel's backward gives the wanted gradients: it has none of lse and of its mask."""
    return grads.dlse is None and not grads.from_body


class _Part(NamedTuple):
    """One call of the kernel."""

    m: tuple[int, int]
    n: tuple[int, int]
    causal: bool = False
    mask: Tensor | None = None


class _Group(NamedTuple):
    """Parts that share their rows; `empty` are the rows without a key."""

    parts: tuple[_Part, ...]
    empty: Tensor | None = None


def _groups(work: Work, run: Run, segment: Segment) -> Iterator[_Group]:
    """The calls that a segment needs."""
    score = _score(work.inputs.text, work.shape, work.inputs.sizes)
    assert score is not None
    one_start = segment.exact and segment.down == 0 and not (score.bias is not None and score.bias_by_row)
    if one_start and (not run.holes or segment.first == run.lo):
        # the first key of a batch's interval is allowed, so no row is empty
        m0, m1, first, last, _, right, _ = segment
        if m1 - m0 == 1 or not right:
            ranges = [((first, last), False)]
        else:
            ranges = [((last - 1, last - 1 + m1 - m0), True)]
            if first < last - 1:
                ranges.append(((first, last - 1), False))
        parts = [
            _Part((m0, m1), n, causal, _mask(work, run, score, (m0, m1), n, edge=False)[0]) for n, causal in ranges
        ]
        yield _Group(tuple(parts))
        return
    may_be_empty = run.holes or not segment.exact
    for m0 in range(segment.m0, segment.m1, _ROWS):
        rows = (m0, min(m0 + _ROWS, segment.m1))
        first, last, full_first, full_last = run.rows.range(*rows)
        if first >= last:
            yield _Group((_Part(rows, (0, 0)),))
            continue
        edge = (first, last) != (full_first, full_last)
        mask, allowed = _mask(work, run, score, rows, (first, last), edge=edge)
        empty = None
        if may_be_empty and allowed is not None:
            empty = ~allowed.any(-1)
            empty = empty.expand(run.b1 - run.b0, work.shape.H, rows[1] - rows[0]) if bool(empty.any()) else None
        yield _Group((_Part(rows, (first, last), mask=mask),), empty)


def _mask(
    work: Work, run: Run, score: _Score, rows: tuple[int, int], keys: tuple[int, int], *, edge: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores, [b, h, m, n] by strides of 0 where it does not vary, and the cells that are allowed."""
    allowed = None
    block = work.block((run.b0, run.b1), (0, work.shape.H), rows, keys)
    if edge or run.holes or work.mask.residual:
        allowed = work.mask.allowed(block, edge=edge, holes=run.holes)
    if allowed is None and score.bias is None:
        return None, None
    mask = torch.zeros((), dtype=work.dtype)
    if score.bias is not None:
        mask = tensor_of(score.bias(block)[0], work.dtype)
    if allowed is not None:
        mask = mask.masked_fill(~allowed, -torch.inf)
    size = (run.b1 - run.b0, work.shape.H, rows[1] - rows[0], keys[1] - keys[0])
    return mask.expand(size), allowed


def _slices(run: Run, part: _Part) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the part's rows and keys are in q, out, lse and in k, v."""
    b, every = slice(run.b0, run.b1), slice(None)
    return (b, every, slice(*part.m)), (b, every, slice(*part.n))


def _unit_stride(x: Tensor) -> Tensor:
    """The kernel takes every stride but one: a last axis that is not dense is read wrongly."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def whole(work: Work, run: Run) -> tuple[Tensor, Tensor] | None:
    """out and lse of a call whose only run is one rectangle or one causal square, as the kernel gives them."""
    segment = run.segments[0]
    rows = (0, work.shape.M)
    if len(run.segments) > 1 or run.b1 - run.b0 < work.shape.B or segment.empty or not segment.exact:
        return None
    groups = _groups(work, run, segment)
    group = next(groups)
    if len(group.parts) > 1 or group.parts[0].m != rows or group.empty is not None:
        return None
    return _call(work, run, group.parts[0])


def _call(work: Work, run: Run, part: _Part) -> tuple[Tensor, Tensor]:
    inputs = work.inputs
    score = _score(inputs.text, inputs.shape, inputs.sizes)
    assert score is not None
    rows, keys = _slices(run, part)
    q, k, v = (_unit_stride(x[at]) for x, at in ((inputs.q, rows), (inputs.k, keys), (inputs.v, keys)))
    return _FORWARD(q, k, v, 0.0, part.causal, attn_mask=part.mask, scale=score.scale)  # type: ignore[no-any-return]


def forward(work: Work, run: Run, segment: Segment, out: Tensor, lse: Tensor) -> Iterator[Rows]:
    """Writes the rows of a segment; yields those that turn out to have no key."""
    heads = (0, work.shape.H)
    for group in _groups(work, run, segment):
        part, *others = group.parts
        if part.n[0] >= part.n[1]:
            yield Rows((run.b0, run.b1), heads, part.m)
            continue
        values, sums = _call(work, run, part)
        for other in others:
            values, sums = _merged(values, sums, *_call(work, run, other))
        rows, _ = _slices(run, part)
        out[rows], lse[rows] = values, sums
        if group.empty is not None:
            yield Rows((run.b0, run.b1), heads, part.m, group.empty)


def _merged(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each."""
    share = torch.sigmoid(lse_b - lse_a)[..., None]
    return torch.lerp(a.to(share.dtype), b.to(share.dtype), share), torch.logaddexp(lse_a, lse_b)


def backward(work: Work, run: Run, segment: Segment, grads: Gradients) -> Iterator[Rows]:
    """Adds what the rows of a segment give to the gradients; yields those that turn out to have no key."""
    inputs, heads = work.inputs, (0, work.shape.H)
    score = _score(inputs.text, inputs.shape, inputs.sizes)
    assert score is not None
    for group in _groups(work, run, segment):
        dq: Tensor | None = None
        for part in group.parts:
            rows, keys = _slices(run, part)
            if part.n[0] >= part.n[1]:
                yield Rows((run.b0, run.b1), heads, part.m)
                break
            out, lse = grads.out[rows], grads.row_lse[rows]
            if group.empty is not None:
                # no weight in this pass, and no NaN
                out, lse = out.masked_fill(group.empty[..., None], 0.0), lse.masked_fill(group.empty, torch.inf)
            q, k, v = (_unit_stride(x[at]) for x, at in ((inputs.q, rows), (inputs.k, keys), (inputs.v, keys)))
            dq_part, dk, dv = _BACKWARD(
                grads.dout[rows],
                q,
                k,
                v,
                out,
                lse,
                0.0,
                part.causal,
                attn_mask=part.mask,
                scale=score.scale,
            )
            dq = dq_part if dq is None else dq.to(work.dtype) + dq_part
            if grads.dk is not None:
                grads.dk[keys] += dk
            if grads.dv is not None:
                grads.dv[keys] += dv
        else:
            if grads.dq is not None and dq is not None:
                grads.dq[_slices(run, group.parts[0])[0]] = dq
            if group.empty is not None:
                yield Rows((run.b0, run.b1), heads, group.parts[0].m, group.empty)
