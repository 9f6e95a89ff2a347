"""The last resort: the reference's dense arithmetic on any device, for operators that are called directly.

It needs memory for several [B, H, M, N] tensors, so it is in no list of templates and `choose` never offers it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnfuse import reference
from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import dropout
from attnfuse.templates.base import Cotangents, Inputs, Target, Tiles


class Dense:
    """Any spec, anywhere."""

    name = "dense"

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """None."""
        return ()

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """One tile."""
        return Tiles(max(1, shape.M), max(1, shape.N))

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """out and lse, see `Kernel.forward`."""
        values, lse = _attention(inputs, inputs.q, inputs.k, inputs.v, inputs.leaves)
        out = torch.empty_permuted(values.shape, inputs.out_order, dtype=inputs.v.dtype, device=values.device)
        return out.copy_(values), lse.contiguous()

    def backward(self, inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
        """The wanted gradients, see `Kernel.backward`."""
        with _autograd(), torch.enable_grad():
            q, k, v, *leaves = (
                x.detach().requires_grad_(needed)
                for x, needed in zip((inputs.q, inputs.k, inputs.v, *inputs.leaves), cotangents.needs, strict=True)
            )
            results = _attention(inputs, q, k, v, leaves)
        wanted = [x for x in (q, k, v, *leaves) if x.requires_grad]
        given = [
            (result, cotangent.to(result.dtype))
            for result, cotangent in zip(results, (cotangents.dout, cotangents.dlse), strict=True)
            if cotangent is not None
        ]
        grads = None
        if given:
            ends, starts = ([pair[side] for pair in given] for side in (0, 1))
            grads = torch.autograd.grad(ends, wanted, starts, materialize_grads=True)
        out = []
        for at, x in enumerate(wanted):
            grad = torch.zeros_like(x) if grads is None else grads[at]
            order = inputs.out_order if x is q or x is k or x is v else tuple(range(x.dim()))
            dense = torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)
            out.append(dense.copy_(grad))
        return out


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd, which the operator's kernels run below; autocast stays off."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() & torch._C._after_autograd_keyset
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch._C._DisableAutocast():
        yield


def _attention(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    spec, shape = inputs.spec, inputs.shape
    keep = None
    if spec.dropout:
        assert inputs.seed is not None
        keep = dropout.keep(inputs.seed, spec.dropout, (shape.B, shape.H, shape.M, shape.N))
    dtype = torch.promote_types(q.dtype, torch.float32)
    return reference.attention(spec, q, k, v, leaves, inputs.sizes, keep, dtype)
