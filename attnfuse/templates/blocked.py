"""The CPU template: row blocks over the key range that the mask leaves, for every spec, forward and backward.

A call that a flash kernel computes as it stands is `whole_call`'s.  Of others `cover` says which cells they need; `grouped` does
where rows and keys are sorted first.  Each segment of rows goes through one of three inner steps: `native_step`, one call of our
kernel, where it is built and rows see whole intervals of keys; `flash_step`, blocks for a flash kernel, where one computes the
score; else `plain_step`, matrix products and a softmax over a block.  Rows without any allowed key are `degenerate`'s.

Scores, softmax and accumulators are fp32 (fp64 for fp64 inputs).  Memory beyond operands and results: a few blocks of rows
times keys, packed keys and values of some heads, and the accumulators of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import degenerate, flash_step, grouped, native_step, plain_step, whole_call
from attnfuse.templates.base import Cotangents, Inputs, Target, Tiles
from attnfuse.templates.cover import Run, cover
from attnfuse.templates.plain_step import Rows
from attnfuse.templates.work import Gradients, Work


class Blocked:
    """Row blocks on the CPU."""

    name = "blocked"

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """Every spec in every floating-point type, on the CPU only."""
        return () if target.device == "cpu" else (f"device {target.device}, runs on cpu",)

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """Blocks of rows; masked-out keys are skipped one by one."""
        return Tiles(plain_step.rows_of_block(shape), 1)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """out and lse, see `Kernel.forward`."""
        found = whole_call.forward(inputs)
        if found is not None:
            return found
        work = Work(inputs)
        if _nothing_to_do(inputs.shape):
            out, lse = work.results()
            return out.zero_(), lse.fill_(-torch.inf)
        order = grouped.order_of(inputs)
        if order is None:
            out, lse = _forward(work, cover(inputs))
        else:
            ordered = grouped.Ordered(work, order)
            out, lse = ordered.put_back(*_forward(ordered, order.runs))
        if work.sink is not None:
            # beside a sink, rows whose scores are all -inf or that have no key are zeros
            share = torch.sigmoid(lse - work.sink)[..., None]
            out.mul_(share).masked_fill_(share == 0, 0.0)
        return out, lse

    def backward(self, inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
        """The wanted gradients, see `Kernel.backward`."""
        found = whole_call.backward(inputs, cotangents)
        if found is not None:
            return found
        work = Work(inputs)
        if _nothing_to_do(inputs.shape):
            return Gradients(work, cotangents).results()
        order = grouped.order_of(inputs)
        if order is not None:
            ordered = grouped.Ordered(work, order)
            grads = ordered.gradients(cotangents)
            _backward(ordered, order.runs, grads)
            return ordered.results_of(grads, cotangents)
        grads = Gradients(work, cotangents)
        _backward(work, cover(inputs), grads)
        grads.finish_sink()
        return grads.results()


def _forward(work: Work, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """out, as it is without a sink, and lse."""
    out, lse = work.results()
    other = plain_step if flash_step.plan_for(work.inputs) is None else flash_step
    for run in runs:
        for segment in run.segments:
            if segment.empty:
                rows = Rows((run.b0, run.b1), (run.h0, run.h1), (segment.m0, segment.m1))
                degenerate.forward(work, rows, out, lse)
                continue
            step = native_step if native_step.serves(work, run, segment) else other
            for rows in step.forward(work, run, segment, out, lse):
                degenerate.forward(work, rows, out, lse)
    return out, lse


def _backward(work: Work, runs: Sequence[Run], grads: Gradients) -> None:
    """Adds what all rows give to the gradients, but for those of the sink."""
    for run in runs:
        for segment in run.segments:
            if segment.empty:
                rows = Rows((run.b0, run.b1), (run.h0, run.h1), (segment.m0, segment.m1))
                degenerate.backward(work, rows, grads)
                continue
            for step in (native_step, flash_step):
                if step.differentiates(grads, run, segment):
                    break
            else:
                step = plain_step
            for rows in step.backward(work, run, segment, grads):
                degenerate.backward(work, rows, grads)


def _nothing_to_do(shape: Shape) -> bool:
    """No row, or no key: rows without keys are zeros, whatever the program says."""
    return 0 in (shape.B, shape.H, shape.M, shape.N)
