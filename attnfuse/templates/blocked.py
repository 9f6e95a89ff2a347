"""The CPU template: row blocks over the key range that the mask leaves, for every spec, forward and backward.

`cover` says which cells a call needs; each segment of rows goes through `plain_step`, matrix products and a softmax over a
block.  Rows without any allowed key are `degenerate`'s.

Scores, softmax and accumulators are fp32 (fp64 for fp64 inputs).  Memory beyond operands and results: a few blocks of rows
times keys, and the accumulators of the gradients of k and v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import degenerate, plain_step
from attnfuse.templates.base import Cotangents, Inputs, Target, Tiles
from attnfuse.templates.cover import cover
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
        work = Work(inputs)
        out, lse = work.results()
        if _nothing_to_do(inputs.shape):
            return out.zero_(), lse.fill_(-torch.inf)
        for run in cover(inputs):
            for segment in run.segments:
                if segment.empty:
                    rows = Rows((run.b0, run.b1), (0, inputs.shape.H), (segment.m0, segment.m1))
                    degenerate.forward(work, rows, out, lse)
                    continue
                for rows in plain_step.forward(work, run, segment, out, lse):
                    degenerate.forward(work, rows, out, lse)
        if work.sink is not None:
            beside_sink = torch.sigmoid(lse - work.sink)
            out.mul_(beside_sink[..., None]).masked_fill_((beside_sink == 0)[..., None], 0.0)
        return out, lse

    def backward(self, inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
        """The wanted gradients, see `Kernel.backward`."""
        work = Work(inputs)
        grads = Gradients(work, cotangents)
        if _nothing_to_do(inputs.shape):
            return grads.results()
        for run in cover(inputs):
            for segment in run.segments:
                if segment.empty:
                    rows = Rows((run.b0, run.b1), (0, inputs.shape.H), (segment.m0, segment.m1))
                    degenerate.backward(work, rows, grads)
                    continue
                for rows in plain_step.backward(work, run, segment, grads):
                    degenerate.backward(work, rows, grads)
        grads.finish_sink()
        return grads.results()


def _nothing_to_do(shape: Shape) -> bool:
    """No row, or no key: rows without keys are zeros, whatever the program says."""
    return 0 in (shape.B, shape.H, shape.M, shape.N)
