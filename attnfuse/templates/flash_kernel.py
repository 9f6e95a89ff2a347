"""Calls of a flash kernel on the CPU: ours where it is built and faster (`native`), else the library's.

Both take grouped heads as they are, where the library's of this torch does.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from attnfuse.templates import native
from attnfuse.templates.base import Inputs

_FORWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_LSE_MOST: Final = 2**8
_LSE_MOST_IN_HALF: Final = 2**13


@cache
def takes_groups() -> bool:
    """Whether this torch's kernel reads KV head h // group for query head h, and sums their gradients; it is not documented."""
    try:
        q = torch.linspace(-1, 1, 1 * 4 * 3 * 8, dtype=torch.float32, device="cpu").view(1, 4, 3, 8)
        k, v = q[:, :2] * 0.5, q[:, 2:].flip(2)
        expanded = [x.repeat_interleave(2, 1) for x in (k, v)]
        out, lse = _FORWARD(q, k, v)
        grads = _BACKWARD(q, q, k, v, out, lse, 0.0, False)
    except RuntimeError:
        return False
    same, same_lse = _FORWARD(q, *expanded)
    dq, *dkv = _BACKWARD(q, q, *expanded, same, same_lse, 0.0, False)
    expected = (same, same_lse, dq, *(x.view(1, 2, 2, 3, 8).sum(2) for x in dkv))
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip((out, lse, *grads), expected, strict=True))


def is_ours(inputs: Inputs, *, backward: bool = False) -> bool:
    """Whether a call, or its backward, goes to our kernel.

    All of it does, so that the scores of the backward are rounded as those that the log-sum-exp was made of.
    """
    shape, dtype = inputs.shape, inputs.q.dtype
    rows = shape.M * shape.H // max(1, shape.Hkv)
    return native.serves(dtype, rows) and (not backward or native.differentiates(dtype))


def is_slow(inputs: Inputs, *, backward: bool) -> bool:
    """Whether the library's kernel is called, and so slow in its type that operands are converted to float32 for it.

    It multiplies float16 without vectors where the processor has no instructions for it: causal squares of 512 rows, 8 heads, D 64,
    take 11 ns a cell forward and 139 backward on one core, in float32 5.6 and 14, in bfloat16 5.8 and 11.
    """
    if inputs.q.dtype != torch.float16 or native.multiplies_float16():
        return False
    return not is_ours(inputs, backward=backward)


def unit_stride(x: Tensor) -> Tensor:
    """The kernel takes every stride but one: a last axis that is not dense is read wrongly."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def has_digits(lse: Tensor, out: Tensor) -> bool:
    """Whether exp(score - lse) keeps the digits of the type of `out`."""
    most = lse.masked_fill(lse == -torch.inf, 0.0).abs().max()
    return bool(most <= (_LSE_MOST if out.dtype.itemsize >= 4 else _LSE_MOST_IN_HALF))


def _without_the_dead(
    values: Tensor, sums: Tensor, mask: Tensor, *, causal: bool, value: float
) -> tuple[Tensor, Tensor]:
    """NaN, or `value`, and -inf where every score is -inf; the kernel leaves zeros, as the log-sum-exp too."""
    if causal:
        visible = torch.ones((values.shape[-2], mask.shape[-1]), dtype=torch.bool).tril_()
        mask = torch.where(visible, mask, -torch.inf)
    dead = mask.amax(-1) == -torch.inf
    return values.masked_fill(dead[..., None], value), sums.masked_fill(dead, -torch.inf)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    ours: bool,
    causal: bool = False,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
    cap: float = 0.0,
    dropout: native.Dropout | None = None,
    dead: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, M, Dv] and lse [B, H, M]; zeros, and -inf or 0, in rows whose every score is -inf.

    Args:
        q, k, v: [B, H, M, D], [B, Hkv, N, D] and [B, Hkv, N, Dv], of one type; Dv is D but for our kernel.
        ours: whether it is our kernel (`is_ours`).
        causal: row m sees the keys up to m.
        mask: [B, H, M, N], added to the scores, fp32 or of the operands' type.
        allowed: bool, as `mask`: the keys that a row sees.
        cap, dropout: see `native.Score`; of our kernel only.
        dead: where there may be rows whose every score is -inf, what they are; their lse is -inf then.
    """
    q, k, v = map(unit_stride, (q, k, v))
    if ours:
        B, H, M, _ = q.shape
        out = torch.empty_permuted((B, H, M, v.shape[3]), (0, 2, 1, 3), dtype=q.dtype)
        lse = torch.empty((B, H, M), dtype=torch.float32)
        score, keys = _score(scale, mask, allowed, cap, dropout), _seen(k, causal=causal)
        native.forward(q, k, v, out, lse, score, keys, 0.0 if dead is None else dead)
        return out, lse
    mask = _together(mask, allowed, q)
    out, lse = _FORWARD(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if dead is not None and mask is not None and bool((lse == 0).any()):
        return _without_the_dead(out, lse, mask, causal=causal, value=dead)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    ours: bool,
    causal: bool = False,
    mask: Tensor | None = None,
    allowed: Tensor | None = None,
    cap: float = 0.0,
    dropout: native.Dropout | None = None,
    dlse: Tensor | None = None,
    dscores: Tensor | None = None,
    whole: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; arguments as in `forward`, and what it returned, lse +inf in rows that have no weight.

    Args:
        dlse, dscores, whole: see `native.backward`; of our kernel only.
    """
    dout, q, k, v, out = map(unit_stride, (dout, q, k, v, out))
    if ours:
        dq, dk, dv = (torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype) for x in (q, k, v))
        score, keys = _score(scale, mask, allowed, cap, dropout), _seen(k, causal=causal)
        native.backward(
            *(dout, q, k, v, out, unit_stride(lse), dq, dk, dv, score, keys), dlse=dlse, dscores=dscores, whole=whole
        )
        return dq, dk, dv
    mask = _together(mask, allowed, q)
    dq, dk, dv = _BACKWARD(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq, dk, dv


def _score(
    scale: float, mask: Tensor | None, allowed: Tensor | None, cap: float, dropout: native.Dropout | None
) -> native.Score:
    bias, some = (None if x is None else native.Cells.of(x) for x in (mask, allowed))
    return native.Score(scale, cap, bias, some, dropout)


def _together(mask: Tensor | None, allowed: Tensor | None, q: Tensor) -> Tensor | None:
    """Mask and conditions as the library's kernel takes them."""
    if allowed is None:
        return mask
    added = q.new_zeros((), dtype=torch.promote_types(q.dtype, torch.float32)) if mask is None else mask
    return torch.where(allowed, added, -torch.inf)


def _seen(k: Tensor, *, causal: bool) -> native.Keys:
    return native.Keys(0, 1, 0, 1) if causal else native.Keys(0, k.shape[2])
