"""Rows in which no key is allowed: uniform over the keys that were filled with `min`; NaN or zeros where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from attnfuse.templates.evaluate import Block
from attnfuse.templates.plain_step import Rows, add_product, folded
from attnfuse.templates.work import BLOCK_CELLS, Gradients, Work, slopes_of

_MIN: Final = torch.finfo(torch.float32).min


def forward(work: Work, rows: Rows, out: Tensor, lse: Tensor) -> None:
    """Writes out, as it is without a sink, and lse of rows without a key."""
    if not _has_minimal(work):
        _write(rows, out, 0.0 if "0row" in work.fills else torch.nan)
        _write(rows, lse, -torch.inf)
    elif len(work.inputs.spec.program.tiers) == 1 and not work.dropout:
        mean = _heads(work, rows, work.inputs.v).mean(2, keepdim=True, dtype=work.dtype)
        _write(rows, out, mean if work.group == 1 else mean.repeat_interleave(work.group, 1))
        _write(rows, lse, _MIN)
    else:
        for part in _parts(work, rows):
            weights, count, _ = _weights(work, part)
            v = _heads(work, part, work.v).flatten(0, 1)
            kept = _kept(work, _block(work, part), weights)
            values = torch.bmm(folded(kept, v.shape[0] // kept.shape[0]), v)
            _write(part, out, values.view(*kept.shape[:3], work.shape.Dv))
            _write(part, lse, torch.where(count > 0, torch.tensor(_MIN), -torch.inf))
    if work.sink is not None:
        # beside a sink, a key that was filled with `min` has no weight
        where = _slices(rows)
        decided = work.sink[where] > -torch.inf
        lse[where] = lse[where].masked_fill(decided if rows.which is None else decided & rows.which, -torch.inf)


def backward(work: Work, rows: Rows, grads: Gradients) -> None:
    """Adds what rows without a key give to the gradients."""
    if not _has_minimal(work) and "0row" in work.fills:
        return
    for part in _parts(work, rows):
        which = part.which
        if work.sink is not None:
            lonely = work.sink[_slices(part)] == -torch.inf
            which = lonely if which is None else lonely & which
        if which is None or bool(which.any()):
            _backward(work, part._replace(which=which), grads)


def _backward(work: Work, rows: Rows, grads: Gradients) -> None:
    where = _slices(rows)
    dout = grads.dout[where].to(work.dtype)
    weights, count, attached = _weights(work, rows)
    finite = "0row" in work.fills or bool((count > 0).all())
    if finite and not bool((dout if rows.which is None else dout[rows.which]).any()):
        return
    if rows.which is not None:
        weights = torch.where(rows.which[..., None], weights, 0.0)
    block = _block(work, rows)
    k, v = (_heads(work, rows, x).flatten(0, 1) for x in (work.k, work.v))
    kv_heads = v.shape[0] // weights.shape[0]
    folded_dout = folded(dout, kv_heads)
    if grads.dv is not None:
        kept = _kept(work, block, weights)
        add_product(_heads(work, rows, grads.dv), folded(kept, kv_heads).mT, folded_dout)
    if not grads.scores_needed or not _has_minimal(work):
        return
    dx = torch.bmm(folded_dout, v.mT).view(weights.shape)
    dx = _kept(work, block, dx).sub_(grads.delta[where][..., None]).mul_(weights)
    if rows.which is not None:
        attached = attached & rows.which[..., None]
    slopes = slopes_of(work.inputs.text, grads.from_body)
    q = folded(work.inputs.q[where].to(work.dtype), kv_heads)
    _, by_s, *by_load = slopes.values(block, torch.bmm(q, k.mT).view(weights.shape))
    for load, indices, slope in zip(slopes.loads, slopes.indices, by_load, strict=True):
        grads.add(load, indices, block, (dx * slope).masked_fill(~attached, 0.0))
    ds = folded((dx * by_s).masked_fill(~attached, 0.0), kv_heads)
    if grads.dq is not None:
        grads.dq[where] += torch.bmm(ds, k).view(*weights.shape[:3], work.shape.D)
    if grads.dk is not None:
        add_product(_heads(work, rows, grads.dk), ds.mT, q)


def _has_minimal(work: Work) -> bool:
    return bool(work.fills & {"+min", "=min"})


def _slices(rows: Rows) -> tuple[slice, slice, slice]:
    return slice(*rows.b), slice(*rows.h), slice(*rows.m)


def _heads(work: Work, rows: Rows, x: Tensor) -> Tensor:
    """The KV heads of some rows."""
    return x[rows.b[0] : rows.b[1], rows.h[0] // work.group : rows.h[1] // work.group]


def _block(work: Work, rows: Rows) -> Block:
    return work.block(rows.b, rows.h, rows.m, (0, work.shape.N))


def _write(rows: Rows, target: Tensor, values: Tensor | float) -> None:
    where = _slices(rows)
    if rows.which is not None:
        which = rows.which if target.dim() == 3 else rows.which[..., None]
        values = torch.where(which, values, target[where])
    target[where] = values


def _parts(work: Work, rows: Rows) -> Iterator[Rows]:
    """The rows in parts whose weights over all keys fit a block: whole batches and groups, then rows."""
    (b0, b1), (h0, h1), (m0, m1), which = rows
    height = max(1, min(m1 - m0, BLOCK_CELLS // (work.group * work.shape.N)))
    for b in range(b0, b1):
        for h in range(h0, h1, work.group):
            for m in range(m0, m1, height):
                end = min(m + height, m1)
                some = None
                if which is not None:
                    some = which[b - b0 : b - b0 + 1, h - h0 : h - h0 + work.group, m - m0 : end - m0]
                    if not bool(some.any()):
                        continue
                yield Rows((b, b + 1), (h, h + work.group), (m, end), some)


def _weights(work: Work, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """For rows without a key: their weights [b, h, m, N], how many keys share them [b, h, m], and which keys' scores get a
    gradient."""
    block = _block(work, rows)
    shape = block.shape
    true, false = (torch.full((1, 1, 1, 1), x) for x in (True, False))
    normal, minimal, attached = true, false, true
    for tier, value in zip(work.inputs.spec.program.tiers, work.meaning.tiers(block), strict=True):
        allowed = value if isinstance(value, Tensor) else torch.full((1, 1, 1, 1), bool(value))
        if tier.fill == "=min":
            minimal, attached = minimal | ~allowed, attached & allowed
        elif tier.fill == "+min":
            minimal = (minimal & allowed) | (normal & ~allowed)
        else:
            minimal = minimal & allowed
        normal = normal & allowed
    minimal = minimal.expand(shape)
    count = minimal.sum(-1)
    weights = minimal.to(work.dtype) / count[..., None]
    if "0row" in work.fills:
        weights = weights.nan_to_num_(0.0)
    return weights, count, attached & minimal


def _kept(work: Work, block: Block, x: Tensor) -> Tensor:
    """`x` after dropout."""
    if not work.dropout:
        return x
    # a weight of NaN stays NaN where it is dropped
    return x * ((~work.dropped(block)).to(x.dtype) * (1 / (1 - work.dropout)))
