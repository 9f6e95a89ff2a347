"""The launches of the backward of `flash`: what each row needs, then the gradients of keys, of queries and of leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import Load, S, loads
from attnfuse.templates import diagonals
from attnfuse.templates.affine import constant
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.cover import block_of
from attnfuse.templates.evaluate import axes_of, varies
from attnfuse.templates.launch import Call, described, tiles_of
from attnfuse.templates.score_function import Limits, functions_for, scale_of
from attnfuse.templates.tuning import Config
from attnfuse.templates.work import add_gradient, meaning_of, slopes_of, tensor_of

# Log-sum-exps up to which exp(x - lse) keeps the digits that a type has.
_LSE_MOST: Final = 2.0**4
_LSE_MOST_IN_HALF: Final = 2.0**13
# Rows of which the gradients for each key are in memory before they are added up: a multiple of every tile.
_SLAB: Final = 256


class _Rows(NamedTuple):
    """What the kernels of the backward know of each row, fp32 [B, H, M]; see `row_facts`, `row_norms`, `uniform_queries`."""

    lse2: Tensor
    delta: Tensor
    norm: Tensor | None
    filled: Tensor | None


def gradients(inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
    """The wanted gradients, see `Kernel.backward`."""
    shape, device = inputs.shape, inputs.q.device
    needs_q, needs_k, needs_v, *needs_leaves = cotangents.needs

    def like(x: Tensor) -> Tensor:
        return torch.empty_permuted(x.shape, inputs.out_order, dtype=x.dtype, device=device)

    dq, dk, dv = (
        like(x) if needed else None for x, needed in ((inputs.q, needs_q), (inputs.k, needs_k), (inputs.v, needs_v))
    )
    totals = {
        leaf.name: torch.zeros(x.shape, dtype=torch.float32, device=device)
        for leaf, x, needed in zip(inputs.spec.leaves, inputs.leaves, needs_leaves, strict=True)
        if needed
    }
    if 0 in (shape.B, shape.H, shape.M, shape.N):
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
    else:
        dout = cotangents.dout
        if dout is None:
            dout = torch.zeros((), dtype=inputs.v.dtype, device=device).expand(cotangents.out.shape)
        _Backward(Call(inputs), cotangents, dout).run(dq, dk, dv, totals)
    grads = [x for x in (dq, dk, dv) if x is not None]
    named = zip(inputs.spec.leaves, inputs.leaves, strict=True)
    return grads + [totals[leaf.name].to(x.dtype) for leaf, x in named if leaf.name in totals]


class _Backward:
    """The launches of one backward."""

    def __init__(self, call: Call, cotangents: Cotangents, dout: Tensor) -> None:
        from attnfuse.templates.kernels import backward, empty_rows

        self.kernels = backward
        self.of_empty_rows = empty_rows
        self.call = call
        self.shape = call.shape
        self.functions = call.plan.functions
        self.cotangents = cotangents
        self.dout = dout
        constant = isinstance(self.functions.slope, float)
        self.slope = {
            "SLOPE": None if constant else self.functions.slope,
            "FACTOR": float(self.functions.slope) if constant else 1.0,
        }
        self.gradient = {"Dout": dout, "DS": dout.stride()}
        self.keep = {"KEEP": call.keep if call.seed is not None else None}

    def run(self, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, totals: dict[str, Tensor]) -> None:
        """Writes the wanted gradients; adds those of leaves to `totals`."""
        rows = self._rows()
        facts = {"Lse2": rows.lse2, "Delta": rows.delta, "Norm": rows.norm, "NORM": rows.norm is not None}
        if dk is not None or dv is not None:
            self._keys(facts, dk, dv)
        if dq is not None:
            self._queries(facts, dq)
        plan = self.call.plan
        if plan.may_be_empty and (plan.uniform or not plan.zero):
            rows = rows._replace(filled=self._uniform(rows.delta, dq, dk, dv))
        body = {load.leaf for load in loads(self.call.inputs.spec.program.body)}
        if totals.keys() & body:
            self._leaves(facts, rows.filled, {name: x for name, x in totals.items() if name in body})
        if totals and self.functions.sink is not None:
            self._sink(totals)

    def _grid(self, heads: int) -> Callable[[Config], int]:
        return lambda config: tiles_of(self.shape.M, config.block_m) * heads

    def _per_row(self, config: Config) -> dict[str, Any]:
        return {"row_tiles": tiles_of(self.shape.M, config.block_m), "BLOCK_M": config.block_m}

    def _rows(self) -> _Rows:
        call, shape, functions = self.call, self.shape, self.functions
        lse2, delta = (
            torch.empty((shape.B, shape.H, shape.M), dtype=torch.float32, device=call.device) for _ in range(2)
        )
        dlse = self.cotangents.dlse
        out = self.cotangents.out
        call.launch(
            self.kernels.row_facts,
            "uniform",
            self._grid(shape.B * shape.H),
            lambda config: {
                "Out": out,
                "OS": out.stride(),
                "Lse": self.cotangents.lse.contiguous(),
                "Dlse": None if dlse is None else dlse.contiguous(),
                "HAS_DLSE": dlse is not None,
                "BASE_2": functions.score is None,
                "Lse2": lse2,
                "Delta": delta,
                "SINK": functions.sink,
                **self.gradient,
                **call.of_v,
                **self._per_row(config),
            },
        )
        if call.plan.exact:
            return _Rows(lse2, delta, None, None)
        norm = torch.empty_like(lse2)
        call.launch(
            self.kernels.row_norms,
            "uniform",
            self._grid(shape.B * shape.H),
            lambda config: {
                **call.pick("Q", "K", "QS", "KS"),
                "Lse2": lse2,
                "Norm": norm,
                "KEYS": functions.keys,
                "SINK": functions.sink,
                "MOST": _LSE_MOST if call.itemsize > 2 else _LSE_MOST_IN_HALF,
                **call.score,
                **call.mask,
                **call.precision,
                **call.of_q,
                **self._per_row(config),
                "BLOCK_N": config.block_n,
            },
        )
        return _Rows(lse2, delta, norm, None)

    def _keys(self, facts: dict[str, Any], dk: Tensor | None, dv: Tensor | None) -> None:
        call, shape, functions = self.call, self.shape, self.functions
        tma = call.describable(call.inputs.q, self.dout)

        def arguments(config: Config) -> dict[str, Any]:
            read = {**call.operands, **self.gradient}
            found = call.tile_map("keys")
            if tma:
                read["Q"] = described(call.inputs.q, config.block_m, call.of_q["BLOCK_D"])
                read["Dout"] = described(self.dout, config.block_m, call.of_v["BLOCK_DV"])
            return {
                **read,
                **facts,
                **_kv_gradients(dk, dv),
                "key_tiles": tiles_of(shape.N, config.block_n),
                "swizzle": call.swizzle(
                    call.group * shape.M * (shape.D + shape.Dv) * call.itemsize, shape.B * shape.Hkv
                ),
                **call.score,
                **self.slope,
                **call.mask,
                "RESIDUAL": functions.row_residual if found["MAP"] is None else None,
                "ROWS": functions.rows,
                **found,
                **call.dropout,
                **self.keep,
                "TMA": tma,
                "TAIL": bool(shape.M % (found["MAP"] or config.block_m)),
                **call.precision,
                **call.of_q,
                **call.of_v,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            }

        heads = shape.B * shape.Hkv
        call.launch(self.kernels.gradient_of_keys, "keys", lambda c: tiles_of(shape.N, c.block_n) * heads, arguments)

    def _queries(self, facts: dict[str, Any], dq: Tensor) -> None:
        call, shape, functions = self.call, self.shape, self.functions
        tma = call.describable(call.inputs.k, call.inputs.v)

        def arguments(config: Config) -> dict[str, Any]:
            read = {**call.operands, **self.gradient}
            found = call.tile_map("rows")
            if tma:
                read["K"] = described(call.inputs.k, config.block_n, call.of_q["BLOCK_D"])
                read["V"] = described(call.inputs.v, config.block_n, call.of_v["BLOCK_DV"])
            return {
                **read,
                **facts,
                "Dq": dq,
                "DQS": dq.stride(),
                "swizzle": call.swizzle(shape.N * (shape.D + shape.Dv) * call.itemsize, shape.B * shape.H, call.group),
                **call.score,
                **self.slope,
                **call.mask,
                "RESIDUAL": functions.residual if found["MAP"] is None else None,
                "KEYS": functions.keys,
                **found,
                **call.dropout,
                **self.keep,
                "TMA": tma,
                "TAIL": bool(shape.N % (found["MAP"] or config.block_n)),
                **call.precision,
                **call.of_q,
                **call.of_v,
                **self._per_row(config),
                "BLOCK_N": config.block_n,
            }

        call.launch(self.kernels.gradient_of_queries, "queries", self._grid(shape.B * shape.H), arguments)

    def _uniform(self, delta: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> Tensor:
        """Adds what rows without an allowed key give; how many keys each of them is uniform over."""
        call, shape, functions = self.call, self.shape, self.functions
        count = torch.empty_like(delta)
        # one entry for each tile of rows, however small they are
        found = torch.empty(tiles_of(shape.M, 16) * shape.B * shape.H, dtype=torch.int32, device=call.device)
        shared = {
            **call.operands,
            **self.gradient,
            "Delta": delta,
            "Count": count,
            "Found": found,
            "MINIMAL": functions.minimal,
            **self.slope,
            **call.dropout,
            "KEEP": call.keep,
            **call.precision,
            **call.of_q,
            **call.of_v,
        }
        used = call.launch(
            self.of_empty_rows.uniform_queries,
            "uniform",
            self._grid(shape.B * shape.H),
            lambda config: {
                **shared,
                "Lse": self.cotangents.lse.contiguous(),
                "SINK": functions.sink,
                "ZERO": call.plan.zero,
                "Dq": dq,
                "DQS": (0, 0, 0, 0) if dq is None else dq.stride(),
                "WANTS_Q": dq is not None,
                **self._per_row(config),
                "BLOCK_N": config.block_n,
            },
        )
        if dk is not None or dv is not None:
            call.launch(
                self.of_empty_rows.uniform_keys,
                "uniform",
                lambda config: tiles_of(shape.N, config.block_n) * shape.B * shape.Hkv,
                lambda config: {
                    **shared,
                    **_kv_gradients(dk, dv),
                    "key_tiles": tiles_of(shape.N, config.block_n),
                    **self._per_row(config),
                    "BLOCK_N": config.block_n,
                },
                used.block_m,
            )
        return count

    def _leaves(self, facts: dict[str, Any], count: Tensor | None, totals: dict[str, Tensor]) -> None:
        """Adds the gradients of the leaves that the score reads, load by load."""
        call, shape, inputs = self.call, self.shape, self.call.inputs
        wanted = frozenset(totals)
        slopes = slopes_of(inputs.text, wanted)
        scale, limits = scale_of(inputs.text, shape, inputs.sizes), Limits.of(shape, inputs.sizes)
        functions = functions_for(inputs.text, scale, limits, call.forms, slopes.loads)
        block = block_of(inputs, (0, shape.B), (0, shape.H), (0, shape.M), (0, shape.N))
        for load, by_load, indices in zip(slopes.loads, functions.by_load, slopes.indices, strict=True):
            along = diagonals.along(load)
            if along is not None:
                offset = constant(along.offset, dict(block.sizes))
                assert offset is not None
                found, before = self._along(facts, count, along, by_load)
                diagonals.add_tiles(totals[load.leaf], along.lead, found, int(offset) - before)
                continue
            whole = {"m", "n"} <= varies(load)
            # what is added up in a table need not be there for all rows at once
            height = _SLAB if whole and axes_of(load) is None else shape.M
            for first in range(0, shape.M, height):
                rows = first, min(first + height, shape.M)
                grad = self._of_load(facts, count, load, by_load, rows)
                part = block if height >= shape.M else block.part((*block.ranges[:2], rows, block.ranges[3]))
                add_gradient(totals[load.leaf], load, indices, part, grad)

    def _of_load(
        self, facts: dict[str, Any], count: Tensor | None, load: Load, by_load: Any, rows: tuple[int, int]
    ) -> Tensor:
        """The gradient of what a load reads, [B or 1, H or 1, rows or 1, N or 1]: an axis of 1 is summed over.

        Args:
            rows: where the load depends on rows and keys, some of the rows, from a multiple of `_SLAB` on; else all of them.
        """
        call, shape = self.call, self.shape
        axes = varies(load)
        of_keys = "n" in axes
        of_rows = "m" in axes or not of_keys
        # where a tile is one of rows and keys, the sum over batches and heads is made in the kernel
        whole = of_rows and of_keys
        batches = shape.B if not whole or "b" in axes else 1
        heads = shape.H if not whole or "h" in axes else 1
        size = (batches, heads, rows[1] - rows[0] if of_rows else 1, shape.N if of_keys else 1)
        grad = torch.empty(size, dtype=torch.float32, device=call.device)

        def tiles(config: Config) -> tuple[int, int]:
            assert rows[0] % config.block_m == 0, config
            row_tiles = tiles_of(rows[1] - rows[0], config.block_m) if of_rows else 1
            return row_tiles, tiles_of(shape.N, config.block_n) if of_keys else 1

        def programs(config: Config) -> int:
            row_tiles, key_tiles = tiles(config)
            return batches * heads * row_tiles * key_tiles

        call.launch(
            self.kernels.gradient_of_leaf,
            "uniform",
            programs,
            lambda config: {
                **self._of_leaf(facts, count, by_load, config),
                "Grad": grad,
                "GS": grad.stride(),
                "batches": batches,
                "heads": heads,
                **dict(zip(("row_tiles", "key_tiles"), tiles(config), strict=True)),
                "before": 0,
                "above": rows[0] // config.block_m,
                "OF_ROWS": of_rows,
                "OF_KEYS": of_keys,
                "ALONG": False,
            },
        )
        return grad

    def _along(
        self, facts: dict[str, Any], count: Tensor | None, along: diagonals.Along, by_load: Any
    ) -> tuple[Tensor, int]:
        """The gradient of what a load reads along diagonals, as `diagonals.add_tiles` takes it, in memory that is linear in M and
        N; and by how much the first key of the first tile lies before key 0 in the first row tile."""
        call, shape = self.call, self.shape
        batches, heads = (size if dim in along.lead else 1 for dim, size in enumerate(shape[:2]))
        made: list[Tensor] = []

        def tiles(config: Config) -> tuple[int, int]:
            before = tiles_of((tiles_of(shape.M, config.block_m) - 1) * config.block_m, config.block_n)
            return before + tiles_of(shape.N, config.block_n), before

        def arguments(config: Config) -> dict[str, Any]:
            number, before = tiles(config)
            size = (batches, heads, number * config.block_m, config.block_n)
            made[:] = [torch.empty(size, dtype=torch.float32, device=call.device)]
            return {
                **self._of_leaf(facts, count, by_load, config),
                "Grad": made[0],
                "GS": made[0].stride(),
                "batches": batches,
                "heads": heads,
                "row_tiles": 1,
                "key_tiles": number,
                "before": before,
                "above": 0,
                "OF_ROWS": False,
                "OF_KEYS": True,
                "ALONG": True,
            }

        used = call.launch(self.kernels.gradient_of_leaf, "uniform", lambda c: batches * heads * tiles(c)[0], arguments)
        return made[0].view(batches, heads, -1, used.block_m, used.block_n), tiles(used)[1] * used.block_n

    def _of_leaf(self, facts: dict[str, Any], count: Tensor | None, by_load: Any, config: Config) -> dict[str, Any]:
        call, functions = self.call, self.functions
        return {
            **call.operands,
            **self.gradient,
            **{name: facts[name] for name in ("Lse2", "Delta", "Norm")},
            "Count": count,
            **call.score,
            **call.mask,
            "BY_LOAD": by_load,
            "KEYS": functions.keys,
            "MINIMAL": functions.minimal if count is not None else None,
            **call.dropout,
            **self.keep,
            **call.precision,
            **call.of_q,
            **call.of_v,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }

    def _sink(self, totals: dict[str, Tensor]) -> None:
        """Adds the gradients of the leaves that the sink reads."""
        inputs, shape = self.call.inputs, self.shape
        meaning = meaning_of(inputs.text)
        wanted = frozenset(totals) & {load.leaf for load in loads(inputs.spec.program.sink or S)}
        if meaning.sink is None or not wanted:
            return
        block = block_of(inputs, (0, shape.B), (0, shape.H), (0, shape.M), (0, 1))
        sink = meaning.sink(block)[0]
        if not isinstance(sink, Tensor):
            return
        sink = tensor_of(sink, torch.float32)
        delta = (self.dout.float() * self.cotangents.out).sum(-1)
        lse = self.cotangents.lse
        dsink = (-torch.sigmoid(sink[..., 0] - lse) * delta)[..., None]
        slopes = slopes_of(inputs.text, wanted, of="sink")
        for load, indices, slope in zip(slopes.loads, slopes.indices, slopes.values(block)[2:], strict=True):
            add_gradient(totals[load.leaf], load, indices, block, dsink * slope)


def _kv_gradients(dk: Tensor | None, dv: Tensor | None) -> dict[str, Any]:
    none = (0, 0, 0, 0)
    return {
        "Dk": dk,
        "DKS": none if dk is None else dk.stride(),
        "WANTS_K": dk is not None,
        "Dv": dv,
        "DVS": none if dv is None else dv.stride(),
        "WANTS_V": dv is not None,
    }
