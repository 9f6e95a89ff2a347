"""The CUDA templates: `Flash`, blocks of rows over the key tiles that the mask leaves, and `Decode`, few rows, split over keys.

This file says what they take and launches the kernels of the forward; `flash_gradients` launches those of the backward.  The
kernels are in `kernels`; `score_function` writes what they call for each tile; `launch` is how they get onto a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import tuning
from attnfuse.templates.base import Cotangents, Inputs, Target, Tiles
from attnfuse.templates.dense import Dense
from attnfuse.templates.flash_gradients import gradients
from attnfuse.templates.launch import (
    Call,
    arch_of,
    described,
    has_triton,
    interpreted,
    power_of_two,
    processors,
    tiles_of,
)
from attnfuse.templates.score_function import problem
from attnfuse.templates.tuning import Config

_DTYPES: Final = ("f16", "bf16", "f32")
_MOST_DEPTH: Final = 256
_PACKED_ROWS: Final = 64
# Keys of one part of a split row, at least: below that the parts cost more than they give.
_SPLIT_KEYS: Final = 256
_MOST_SPLITS: Final = 64


@cache
def _failures() -> tuple[type[Exception], ...]:
    """What Triton raises where it, or the assembler, cannot make a kernel."""
    if not has_triton():
        return ()
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (CompilationError, OutOfResources, PTXASError)


def _warn(inputs: Inputs, error: Exception) -> None:
    text = str(error).strip().splitlines()
    warnings.warn(
        f"no Triton kernel for `{inputs.text}` at {inputs.shape} on {arch_of(inputs.q.device)}: {type(error).__name__}: "
        f"{text[-1].rstrip('.') if text else ''}. It is computed densely, with memory for all scores; please report it",
        RuntimeWarning,
        stacklevel=3,
    )


class Flash:
    """Blocks of rows over the key tiles that the mask leaves, on CUDA."""

    name = "flash"

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """Devices, types and depths without a kernel, and arithmetic without device code."""
        if target.device != "cuda" and not (target.device == "cpu" and interpreted()):
            return (f"device {target.device}, runs on cuda",)
        if not has_triton():
            return ("triton is not installed",)
        reasons = []
        if target.arch.startswith("sm_") and int(target.arch[3:]) < 80:
            reasons.append(f"{target.arch}, runs on sm_80 and later")
        reasons += [
            f"{name} is {dtype}, takes {', '.join(_DTYPES)}"
            for name, dtype in (("q", target.dtype), ("v", target.v_dtype))
            if dtype not in _DTYPES
        ]
        reasons += [
            f"{name} {size}, takes 1 to {_MOST_DEPTH}"
            for name, size in (("D", shape.D), ("Dv", shape.Dv))
            if not 1 <= size <= _MOST_DEPTH
        ]
        found = problem(str(spec))
        return (*reasons, found) if found else tuple(reasons)

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """The best config's."""
        depth = max(power_of_two(shape.D), power_of_two(shape.Dv))
        config = tuning.configs("attend", target.arch or "sm_80", 4 if target.dtype == "f32" else 2, depth)[0]
        return Tiles(config.block_m, config.block_n)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """out and lse, see `Kernel.forward`."""
        try:
            return self._forward(inputs)
        except _failures() as error:
            _warn(inputs, error)
            return Dense().forward(inputs)

    def backward(self, inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
        """The wanted gradients, see `Kernel.backward`."""
        try:
            return gradients(inputs, cotangents)
        except _failures() as error:
            _warn(inputs, error)
            return Dense().backward(inputs, cotangents)

    def _forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        shape, device = inputs.shape, inputs.q.device
        out = torch.empty_permuted(
            (shape.B, shape.H, shape.M, shape.Dv), inputs.out_order, dtype=inputs.v.dtype, device=device
        )
        lse = torch.empty((shape.B, shape.H, shape.M), dtype=torch.float32, device=device)
        if 0 in (shape.B, shape.H, shape.M, shape.N):
            return out.zero_(), lse.fill_(-torch.inf)
        call = Call(inputs)
        self._attend(call, out, lse)
        plan = call.plan
        beside_sink = plan.functions.sink is not None
        if plan.may_be_empty and (plan.uniform or (plan.zero and (plan.dead or beside_sink))):
            _fill_empty_rows(call, out, lse)
        return out, lse

    def _attend(self, call: Call, out: Tensor, lse: Tensor) -> None:
        heads = call.shape.B * call.shape.H
        _attend(call, out, lse, "attend", packed=False, rows=None, splits=lambda config: 1, heads=heads)


class Decode(Flash):
    """Few rows: the query heads of a KV head side by side in one tile, their keys split over programs."""

    name = "decode"

    def reasons_against(self, spec: AttentionSpec, shape: Shape, target: Target) -> tuple[str, ...]:
        """What `Flash` does not take, and more rows than one tile has."""
        reasons = super().reasons_against(spec, shape, target)
        rows = shape.M * (shape.H // max(1, shape.Hkv))
        if rows > _PACKED_ROWS:
            reasons += (f"{rows} rows of a KV head (M·H / Hkv), takes up to {_PACKED_ROWS}",)
        return reasons

    def tiles(self, spec: AttentionSpec, shape: Shape, target: Target) -> Tiles:
        """All rows, and the best config's keys."""
        depth = max(power_of_two(shape.D), power_of_two(shape.Dv))
        config = tuning.configs("decode", target.arch or "sm_80", 4 if target.dtype == "f32" else 2, depth)[0]
        return Tiles(max(1, shape.M), config.block_n)

    def _attend(self, call: Call, out: Tensor, lse: Tensor) -> None:
        shape = call.shape
        heads = shape.B * shape.Hkv

        def splits(config: Config) -> int:
            wanted = 2 * processors(call.device) // heads
            return max(1, min(wanted, shape.N // max(_SPLIT_KEYS, config.block_n), _MOST_SPLITS))

        rows = power_of_two(call.group * shape.M)
        _attend(call, out, lse, "decode", packed=True, rows=rows, splits=splits, heads=heads)


def _attend(
    call: Call,
    out: Tensor,
    lse: Tensor,
    table: str,
    *,
    packed: bool,
    rows: int | None,
    splits: Callable[[Config], int],
    heads: int,
) -> None:
    from attnfuse.templates.kernels.forward import attend, combine

    inputs, shape, plan, functions = call.inputs, call.shape, call.plan, call.plan.functions
    total = shape.B * shape.H * shape.M
    depth, depth_v = call.of_q["BLOCK_D"], call.of_v["BLOCK_DV"]
    tma = call.describable(inputs.k, inputs.v)
    zero = {"ZERO": plan.zero and not plan.uniform and not plan.dead}
    last: dict[str, Any] = {}

    def tiles(config: Config) -> int:
        return tiles_of(shape.M * call.group if packed else shape.M, config.block_m)

    def arguments(config: Config) -> dict[str, Any]:
        parts = splits(config)
        last.update(parts=None, lse=lse, count=parts)
        if parts > 1:
            last["parts"] = torch.empty((parts, total, depth_v), dtype=torch.float32, device=call.device)
            last["lse"] = torch.empty((parts, total), dtype=torch.float32, device=call.device)
        read = {**call.operands}
        if tma:
            read["K"] = described(inputs.k, config.block_n, depth)
            read["V"] = described(inputs.v, config.block_n, depth_v)
        group = 1 if packed else call.group
        swizzle = call.swizzle(shape.N * (shape.D + shape.Dv) * call.itemsize, heads, group)
        found = call.tile_map("rows", packed=packed)
        return {
            **read,
            "Out": out,
            "Lse": last["lse"],
            "Parts": last["parts"],
            "OS": out.stride(),
            "row_tiles": tiles(config),
            "splits": parts,
            "swizzle": swizzle,
            **call.score,
            **call.mask,
            # full tiles of a map are full in every respect
            "RESIDUAL": functions.residual if found["MAP"] is None else None,
            "KEYS": functions.keys,
            "SINK": functions.sink,
            **zero,
            **call.dropout,
            "KEEP": call.keep,
            "PACKED": packed,
            "SPLIT": parts > 1,
            **found,
            "TMA": tma,
            "TAIL": bool(shape.N % (found["MAP"] or config.block_n)),
            **call.precision,
            **call.of_q,
            **call.of_v,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }

    call.launch(attend, table, lambda config: tiles(config) * heads * splits(config), arguments, rows)
    if last["count"] > 1:
        call.launch(
            combine,
            "combine",
            lambda config: total,
            lambda config: {
                "Parts": last["parts"],
                "PartLse": last["lse"],
                "Out": out,
                "Lse": lse,
                "OS": out.stride(),
                "splits": last["count"],
                "SINK": functions.sink,
                "KEEP": call.keep,
                **zero,
                **call.of_v,
                "BLOCK_S": power_of_two(last["count"], 2),
            },
        )


def _fill_empty_rows(call: Call, out: Tensor, lse: Tensor) -> None:
    from attnfuse.templates.kernels.empty_rows import empty_rows

    shape, plan = call.shape, call.plan
    functions = plan.functions
    call.launch(
        empty_rows,
        "uniform",
        lambda config: tiles_of(shape.M, config.block_m) * shape.B * shape.H,
        lambda config: {
            **call.pick("V", "VS"),
            "Out": out,
            "Lse": lse,
            "OS": out.stride(),
            "row_tiles": tiles_of(shape.M, config.block_m),
            "MINIMAL": functions.minimal,
            "SINK": functions.sink,
            "ZERO": plan.zero,
            "KEEP": call.keep,
            **call.dropout,
            **call.precision,
            **call.of_v,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
    )
