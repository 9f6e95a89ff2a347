"""Calls that are one call of a flash kernel: one rectangle or one causal square, all of its keys real ones, or a given mask."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import flash_kernel, tile_lists
from attnfuse.templates.affine import affine, as_load, is_sum, least_added, where_allowed
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.cover import block_of, index_rows, mask_of
from attnfuse.templates.evaluate import Evaluator, axes_of
from attnfuse.templates.flash_step import EMPTY_SHARE, fits, plan_at, share_of_empty, spans_of
from attnfuse.templates.tile_lists import classes_of
from attnfuse.templates.tile_map import classes
from attnfuse.templates.work import laid_out, tensor_of


class _Direct(NamedTuple):
    """One call of the kernel.

    Args:
        padded: only where the conditions on (b, n) hold for every key.
        bias: what is evaluated for all cells.
        given: instead, which leaf is the bias as it stands, and its axes.
        masks: whether that leaf is the mask too.
        dead: what rows are in which every score is -inf.
        least: the finfo.min that the mask may hold.
    """

    scale: float
    causal: bool
    padded: bool
    bias: Evaluator | None
    given: tuple[int, tuple[int, ...]] | None = None
    masks: bool = False
    dead: float = math.nan
    least: float | None = None


@lru_cache(maxsize=1024)
def _direct(text: str, shape: Shape, sizes: tuple[int, ...]) -> _Direct | None:
    """How one call of the kernel serves calls of these sizes, if it does."""
    spec = parse_spec(text)
    mask = mask_of(text)
    plan = plan_at(text, shape, sizes)
    if plan is None or 0 in shape or spec.program.sink is not None:
        return None
    given = _given(spec)
    if given is not None and all(is_sum(tier, where_allowed(spec.program)) for tier in spec.program.tiers):
        dead = 0.0 if any(tier.fill == "0row" for tier in spec.program.tiers) else math.nan
        least = [fill for tier in spec.program.tiers if (fill := least_added(tier)) is not None]
        return _Direct(
            plan.scale,
            False,
            False,
            None,
            given,
            masks=bool(spec.program.tiers),
            dead=dead,
            least=min(least, default=None),
        )
    if mask.starts or mask.ends or mask.by_batch or not mask.from_indices:
        return None
    if plan.bias is not None and shape.M > plan.rows:
        return None
    segments, _ = index_rows(text, shape, sizes, 0, shape.N)
    spans = spans_of(segments[0], plan.scale)
    if len(segments) > 1 or segments[0].empty or spans is None or len(spans) > 1 or spans[0].n1 > shape.N:
        return None
    (n0, n1, causal) = spans[0]
    if n0 != 0 or not (causal or n1 == shape.N):
        return None
    return _Direct(plan.scale, causal, bool(mask.padding), plan.bias)


def _given(spec: AttentionSpec) -> tuple[int, tuple[int, ...]] | None:
    """The leaf that is the bias of each row and key, and its axes."""
    form = affine(where_allowed(spec.program))
    load = None if form is None else as_load(spec, form.bias)
    if load is None:
        return None
    axes = axes_of(load)
    if axes is None or not {2, 3} <= {*axes} or list(axes) != sorted(axes):
        return None
    return [leaf.name for leaf in spec.leaves].index(load.leaf), axes


class _Whole(NamedTuple):
    """The arguments of one call of the kernel, what rows get in which every score is -inf, and the finfo.min of the mask."""

    scale: float
    causal: bool
    mask: Tensor | None
    dead: float
    least: float | None = None


def _serves(inputs: Inputs, *, backward: bool) -> _Whole | None:
    found = _direct(inputs.text, inputs.shape, inputs.sizes)
    if found is None or not fits(inputs) or flash_kernel.is_slow(inputs, backward=backward):
        return None
    B, H, _, M, N, _, _ = inputs.shape
    cells = (0, B), (0, H), (0, M), (0, N)
    if found.given is not None:
        at, axes = found.given
        mask = inputs.leaves[at]
        # the kernel reads a mask of another type than float32 or its operands' as if it were theirs, float32 beside float64 too
        wide = torch.float32 if inputs.q.dtype.itemsize < 4 else inputs.q.dtype
        if mask.dtype not in (inputs.q.dtype, wide) or any(
            size < cells[axis][1] for size, axis in zip(mask.shape, axes, strict=True)
        ):
            return None
        for place, axis in enumerate(axes):
            mask = mask.narrow(place, 0, cells[axis][1])
        if found.masks and tile_lists.worth_a_map(M, N):
            # a mask that leaves out whole tiles is faster block by block
            tiles = tile_lists.TILES
            known = inputs.tiles[0] if inputs.tiles else None
            kinds = classes(inputs.text, block_of(inputs, *cells), tiles) if known is None else classes_of(known)
            if share_of_empty(kinds) > EMPTY_SHARE:
                return None
        mask = mask[tuple(slice(None) if axis in axes else None for axis in range(4))].expand(B, H, M, N)
        return _Whole(found.scale, False, mask, found.dead, found.least)
    if found.padded:
        for value in mask_of(inputs.text).padding_of(block_of(inputs, cells[0], (0, 1), (0, 1), cells[3])):
            if not (bool(value.all()) if isinstance(value, Tensor) else value):
                return None
    if found.bias is None:
        return _Whole(found.scale, found.causal, None, torch.nan)
    value = found.bias(block_of(inputs, *cells))[0]
    bias = tensor_of(value, torch.promote_types(inputs.q.dtype, torch.float32)).expand(B, H, M, N)
    return _Whole(found.scale, found.causal, bias, torch.nan)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """out and lse by one call of the kernel, where that is the whole call."""
    found = _serves(inputs, backward=False)
    if found is None:
        return None
    given = (inputs.q, inputs.k, inputs.v, found.scale)
    ours = flash_kernel.is_ours(inputs)
    out, lse = flash_kernel.forward(*given, ours=ours, causal=found.causal, mask=found.mask, dead=found.dead)
    if found.least is not None:
        # rows of nothing else, whose log-sum-exp is what was added
        lse = lse.masked_fill(lse == found.least, torch.finfo(torch.float32).min)
    return laid_out(out, out.dtype, inputs.out_order), lse.contiguous()


def backward(inputs: Inputs, cotangents: Cotangents) -> list[Tensor] | None:
    """The wanted gradients by one call of the kernel, where that is the whole call."""
    if cotangents.dlse is not None or cotangents.dout is None or any(cotangents.needs[3:]):
        return None
    found = _serves(inputs, backward=True)
    if found is None:
        return None
    ours = flash_kernel.is_ours(inputs, backward=True)
    # ours sums large rows once more, if lse is not that of another mask
    exact = found.mask is None or (ours and found.least is None)
    if not exact and not flash_kernel.has_digits(cotangents.lse, cotangents.out):
        return None
    lse = cotangents.lse
    if found.dead == 0.0:
        # no weight, and no NaN
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    given = (cotangents.dout, inputs.q, inputs.k, inputs.v, cotangents.out, lse, found.scale)
    grads = flash_kernel.backward(*given, ours=ours, causal=found.causal, mask=found.mask)
    return [
        laid_out(x, x.dtype, inputs.out_order) for x, needed in zip(grads, cotangents.needs, strict=False) if needed
    ]
