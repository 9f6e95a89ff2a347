"""Specs that a plain `scaled_dot_product_attention` without a mask computes, at every size.

The passes emit that node instead of the operator, so that the library's own kernels, random numbers and sharding rules serve
it.  `Library` never runs in the operator.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from attnfuse.score import parse_expr
from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates.affine import affine, constant
from attnfuse.templates.base import Target, Tiles
from attnfuse.templates.inline import most_scores
from attnfuse.tiles import Bounds, bounds

_CAUSAL: Final = Bounds(upper=(parse_expr("m + 1"),))


class Call(NamedTuple):
    """Arguments of `scaled_dot_product_attention(q, k, v, dropout_p=, is_causal=, scale=, enable_gqa=H != Hkv)`."""

    scale: float
    is_causal: bool
    dropout_p: float


@lru_cache(maxsize=4096)
def call_for(spec: AttentionSpec) -> Call | None:
    """The call that computes this spec at every size, if there is one.

    With `n <= m`, which is what `is_causal` means whatever M and N are, each row has key 0: the fill never shows.
    """
    form = affine(spec.program.body)
    if form is None or form.bias is not None or spec.program.sink is not None:
        return None
    scale = constant(form.scale)
    known = bounds(spec)
    if scale is None or known not in (Bounds(), _CAUSAL) or (known == _CAUSAL and not scale > 0):
        # the library masks before it scales, so that a negative scale turns -inf round
        return None
    return Call(scale, known == _CAUSAL, spec.dropout)


class Library:
    """A `scaled_dot_product_attention` node."""

    name = "library"

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """Score, mask and sink that the call cannot say; on the CPU operands without a flash kernel, types for which attnfuse has a
        faster one, and sizes at which it is slower than plain operators in training (1.1 to 1.2 times at 128 rows, float32)."""
        reasons = []
        if call_for(spec) is None:
            reasons.append(f"{spec.program}, takes only s*constant, over all keys or where n <= m")
        if target.lse:
            reasons.append("lse asked for, the call returns none")
        if target.dtype != target.v_dtype:
            reasons.append(f"q is {target.dtype} and v {target.v_dtype}, takes one type")
        if target.device == "cpu":
            if target.native:
                reasons.append(f"{target.dtype} on this cpu, attnfuse's kernel is faster")
            scores, most = shape.M * shape.N, most_scores(shape, target)
            if scores <= most and target.training:
                reasons.append(f"{scores} scores a head in training on cpu, written out up to {most}")
            if spec.dropout:
                reasons.append(f"dropout {spec.dropout} on cpu, its flash kernel takes 0")
            if shape.D != shape.Dv:
                reasons.append(f"D {shape.D} and Dv {shape.Dv} on cpu, its flash kernel takes D = Dv")
            if not target.unit_stride:
                reasons.append("last axis of q, k or v not dense on cpu, its flash kernel takes a stride of 1")
        elif max(shape.D, shape.Dv) > 256:
            reasons.append(f"D {shape.D} and Dv {shape.Dv} on {target.device}, its fused kernels take up to 256")
        elif shape.H != shape.Hkv and target.dtype not in ("f16", "bf16"):
            reasons.append(f"{target.dtype} with H {shape.H} and Hkv {shape.Hkv} on {target.device}, takes f16 or bf16")
        return tuple(reasons)

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """The library's own; as the CPU kernel cuts them."""
        return Tiles(256 if shape.M >= 768 else 64 if shape.M >= 192 else 32, 512)
