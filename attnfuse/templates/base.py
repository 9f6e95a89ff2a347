"""What a template is, and what it is asked and told.

A template serves some specs on some targets.  It says why it does not serve the others, picks its tile sizes, and, unless the
passes emit a library node for it, runs: `Kernel.forward` and `Kernel.backward` on real tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from attnfuse.spec import AttentionSpec, Shape


class Target(NamedTuple):
    """What a template has to run on, apart from sizes.

    Args:
        device: a torch device type, `cpu` or `cuda`.
        dtype: element type of q and k, by its name in leaves (`f32`, `bf16`, …).
        v_dtype: element type of v and of the output.
        training: whether gradients will be asked for.
        lse: whether the log-sum-exp is asked for too, as the operator does.
        unit_stride: whether the last axes of q, k and v are dense, as far as known.
        arch: compute architecture of the device (`sm_90`), empty where it does not matter.
        inline_scores: up to how many scores a head (M·N) an attention may be written out; 0 where it may not, as where sizes
            are symbolic.
        processor: the kind of CPU, `AMD` or `Intel`, where it is one that was measured, see `native.processor`.
        native: the same, where attnfuse's own kernels for the CPU should serve, see `native.suits`.
        rounded: whether the model rounds q·kᵀ to that type.
        gathers: whether the model gathers a number for each score, for this attention alone.
    """

    device: str
    dtype: str = "f32"
    v_dtype: str = "f32"
    training: bool = False
    lse: bool = False
    unit_stride: bool = True
    arch: str = ""
    inline_scores: int = 0
    processor: str = ""
    native: str = ""
    rounded: bool = False
    gathers: bool = False


class Tiles(NamedTuple):
    """Rows and keys of one tile; the granularity at which masked-out work is skipped."""

    block_m: int
    block_n: int


class Inputs(NamedTuple):
    """The operands of one call, checked against the spec.

    Args:
        text: the spec's text, the key of every cache.
        tiles: the tile map of rows and of keys (`tile_lists.lists_of`), or nothing.
    """

    spec: AttentionSpec
    text: str
    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    leaves: Sequence[Tensor]
    sizes: tuple[int, ...]
    seed: Tensor | None
    out_order: tuple[int, ...]
    tiles: Sequence[Tensor] = ()


class Cotangents(NamedTuple):
    """What the backward needs beside the inputs; `needs` says for q, k, v and each leaf whether its gradient is wanted."""

    out: Tensor
    lse: Tensor
    dout: Tensor | None
    dlse: Tensor | None
    needs: tuple[bool, ...]


class Template(Protocol):
    """Serves the specs for which `reasons_against` is empty."""

    @property
    def name(self) -> str: ...

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """Why this template does not serve `spec` there: short texts with the value and the limit; pure."""
        ...

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """The tile sizes it uses there; pure."""
        ...


@runtime_checkable
class Kernel(Template, Protocol):
    """A template that runs."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """out [B, H, M, Dv] of v's type, dense in `out_order`, and lse [B, H, M], contiguous, fp32 (fp64 where q is)."""
        ...

    def backward(self, inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
        """The wanted gradients, those of q, k, v dense in `out_order` and those of leaves contiguous."""
        ...
