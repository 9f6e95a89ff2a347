"""Small attentions written out as plain operators, which Inductor fuses with what stands around them.

The passes emit the nodes of `written_out` instead of the operator.  Below some ten thousand scores a head a call of any kernel
costs more than the memory traffic that it saves, and where a bias is made for each score it saves less (`most_scores`).  `Inline`
never runs in the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from attnfuse.score import Const, Expr, call, substitute
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates.affine import added_mask, is_sum
from attnfuse.templates.base import Target, Tiles
from attnfuse.templates.evaluate import Block, Evaluator, Value
from attnfuse.templates.native import MANY_SCORES


def most_scores(shape: Shape, target: Target) -> int:
    """Up to how many scores a head attentions are written out, those of `inline_scores` being for PyTorch's kernels.

    Ours are faster from less on: of 8 x 8 heads of 64 rows (D 64, 2 cores of an AMD EPYC) a call of SDPA takes 0.36 ms in float32
    and 0.30 in bfloat16, written out 0.54 and 0.46; of 32 rows both take as long.  Where there are many heads, the call itself
    costs less than the scores' way through memory: 64 x 4 windows of 7 x 7 take 1.37 ms and 1.44 written out, in training 4.5 and
    3.9.  A model's own products in bfloat16, which round the scores, are another matter: of 197 rows 2.4 ms by our kernel and 2.1
    written out, of 256 rows 3.2 and 3.5.

    On those of Intel plain operators are faster in float32, and ours are asked for only where there are many heads
    (`native.suits`): Swin takes 148 ms with them and 195 written out, in training 422 and 461.  In bfloat16 ours are faster whoever
    rounds the scores: of 32 rows 0.42 ms and 0.49 written out, of 64 rows 0.77 and 1.05 (2 cores of a Xeon).  A bias that the model
    gathers for each score of one attention goes through memory for any kernel and not written out: DeBERTa with 2 x 512 tokens
    takes 278 ms with ours and 268 written out in float32, in training 744 and 764.  An attention alone, 1 x 8 to 2 x 8
    heads of 192 to 512 tokens, takes 0.85 to 0.98 times as long written out, but 1.3 to 1.4 times under a causal mask.  A bias
    that is a product of matrices goes through memory either way (0.94 times at 384 tokens, 1.25 at 512), one that is computed by
    element costs less to write than the scores do (1.11 and 1.20).
    """
    if target.processor == "Intel" and target.gathers and target.dtype == "f32" and not target.training:
        return 16 * target.inline_scores
    if not target.native:
        return target.inline_scores
    if target.native == "Intel":
        return target.inline_scores // 32
    if target.dtype == "bf16" and target.rounded:
        return 4 * target.inline_scores
    many = shape.B * shape.H * shape.M * shape.N > MANY_SCORES
    return target.inline_scores // (16 if many and not target.training else 4)


class Inline:
    """Matrix products and a softmax; no key is skipped."""

    name = "inline"

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """More scores than `most_scores`, sinks, other devices than the CPU."""
        reasons = []
        most = most_scores(shape, target)
        if shape.M * shape.N > most:
            reasons.append(f"{shape.M * shape.N} scores a head, written out up to {most}")
        if target.device != "cpu":
            reasons.append(f"device {target.device}, written out on cpu")
        if target.lse:
            reasons.append("lse asked for, the nodes give none")
        if spec.program.sink is not None:
            reasons.append("a sink, written out without")
        return tuple(reasons)

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """One tile."""
        return Tiles(max(1, shape.M), max(1, shape.N))


class _Compiled(NamedTuple):
    body: Evaluator
    fills: tuple[str, ...]
    allowed: Evaluator


@lru_cache(maxsize=1024)
def _compiled(text: str) -> _Compiled:
    spec = parse_spec(text)
    tiers = [tier for tier in spec.program.tiers if not is_sum(tier, spec.program.body)]
    # what is added once more below is left out: two times finfo.min is -inf
    masks = [(tier.allowed, mask) for tier in tiers if (mask := added_mask(tier)) is not None]
    twice: dict[Expr, Expr] = {mask: call("where", allowed, mask, Const(0.0)) for allowed, mask in masks}
    body = substitute(spec.program.body, twice)
    allowed = Evaluator(spec, [tier.allowed for tier in tiers], pure=True)
    return _Compiled(Evaluator(spec, [body], pure=True), tuple(tier.fill for tier in tiers), allowed)


def written_out(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, leaves: Sequence[Tensor], *, rounded: bool = False
) -> Tensor:
    """The attention in plain operators, none of them in place.

    Args:
        q: [B, H, M, D].
        k: [B, Hkv, N, D]; query heads of one KV head are folded into rows, k and v are not expanded.
        v: [B, Hkv, N, Dv].
        leaves: the tensors of `spec.leaves`.
        rounded: whether q·kᵀ is rounded to q's type, as by a matmul of the model's own; it saves the products in fp32.

    Returns:
        [B, H, M, Dv] in v's type; scores otherwise, and the softmax, are fp32 (fp64 where q is).
    """
    B, H, M, D = q.shape
    Hkv, N = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = H // Hkv * M
    operands = (q, k) if rounded else (q.to(dtype), k.to(dtype))
    scores = (operands[0].reshape(B, Hkv, rows, D) @ operands[1].mT).to(dtype).view(B, H, M, N)
    sizes = {"B": B, "H": H, "Hkv": Hkv, "M": M, "N": N}
    named = {leaf.name: x for leaf, x in zip(spec.leaves, leaves, strict=True)}
    block = Block(named, sizes, ((0, B), (0, H), (0, M), (0, N)), q.device, dtype)
    compiled = _compiled(str(spec))
    x = _cells(compiled.body(block, scores)[0], scores).to(dtype)
    if x.shape != scores.shape:
        x = x.expand(scores.shape)
    least = torch.finfo(dtype).min
    for fill, value in zip(compiled.fills, compiled.allowed(block), strict=True):
        allowed = _cells(value, scores, torch.bool)
        if fill == "+min":
            # added, so that the score keeps its gradient where a whole row is masked
            x = x + torch.where(allowed, 0.0, _cells(least, scores))
        else:
            x = torch.where(allowed, x, least if fill == "=min" else -torch.inf)
    if any(tier.fill == "0row" for tier in spec.program.tiers):
        empty = (x == -torch.inf).all(-1, keepdim=True)
        weights = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, x), -1))
    else:
        weights = torch.softmax(x, -1)
    if spec.dropout:
        weights = torch.dropout(weights, spec.dropout, train=True)
    return (weights.to(v.dtype).reshape(B, Hkv, rows, N) @ v).view(B, H, M, v.shape[3])


def _cells(value: Value, scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((1, 1, 1, 1), value, dtype=dtype or scores.dtype, device=scores.device)
