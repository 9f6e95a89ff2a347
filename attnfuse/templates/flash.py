"""The CUDA templates: `Flash`, blocks of rows over the key tiles that the mask leaves, and `Decode`, few rows, split over keys.

This file decides what is launched and with which tiles; `flash_forward` and `flash_backward` are the kernels, `score_function`
writes what they call for each tile.  Triton is imported at the first call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from attnfuse.score import Const, Expr, Load, S, loads, walk
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import dropout, tuning
from attnfuse.templates.base import Cotangents, Inputs, Target, Tiles
from attnfuse.templates.cover import block_of
from attnfuse.templates.dense import Dense
from attnfuse.templates.evaluate import varies
from attnfuse.templates.score_function import Functions, LeafForm, Limits, functions_for, problem, scale_of
from attnfuse.templates.tuning import Config
from attnfuse.templates.work import add_gradient, meaning_of, slopes_of, tensor_of
from attnfuse.tiles import bounds, never_empty

_DTYPES: Final = ("f16", "bf16", "f32")
_MOST_DEPTH: Final = 256
_PACKED_ROWS: Final = 64
# Keys of one part of a split row, at least: below that the parts cost more than they give.
_SPLIT_KEYS: Final = 256
_MOST_SPLITS: Final = 64
_MOST_PROGRAMS: Final = 2**31 - 1
# Log-sum-exps up to which exp(x - lse) keeps the digits that a type has.
_LSE_MOST: Final = 2.0**4
_LSE_MOST_IN_HALF: Final = 2.0**13


@cache
def has_triton() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on the CPU."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


class Rehearsal(Protocol):
    """Takes the place of a device: is told of every launch instead of it."""

    arch: str

    def launch(self, kernel: Any, arguments: dict[str, Any], config: Config) -> None:
        """One launch."""
        ...


_rehearsal: ContextVar[Rehearsal | None] = ContextVar("attnfuse_rehearsal", default=None)


@contextlib.contextmanager
def rehearsing(rehearsal: Rehearsal) -> Iterator[None]:
    """While the context is open, kernels are not run; `rehearsal` gets them. Operands may be meta tensors."""
    token = _rehearsal.set(rehearsal)
    try:
        yield
    finally:
        _rehearsal.reset(token)


def arch_of(device: torch.device) -> str:
    """`sm_90` and the like, `gfx942` and the like, or `interpreter`."""
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        return rehearsal.arch
    if device.type != "cuda":
        return "interpreter"
    return _arch(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _arch(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; of the interpreter, enough to split rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _cache_bytes(device: torch.device) -> int:
    found = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0
    return int(found) or 40 << 20


def _power_of_two(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


class _Plan(NamedTuple):
    """What is known of a call before its tensors: the device functions, and constants of the kernels.

    Args:
        may_be_empty: rows without an allowed key are not ruled out.
        uniform: such rows are uniform over keys filled with `min`.
        zero: such rows are zeros.
        dead: a row with allowed keys can have scores that are all -inf.
        exact: log-sum-exps keep the digits of the sum (`row_norms` is not needed).
    """

    functions: Functions
    may_be_empty: bool
    uniform: bool
    zero: bool
    dead: bool
    exact: bool


@lru_cache(maxsize=1024)
def _plan(text: str, shape: Shape, sizes: tuple[int, ...], leaves: tuple[LeafForm, ...]) -> _Plan:
    spec = parse_spec(text)
    fills = {tier.fill for tier in spec.program.tiers}
    data = [load for load in loads(spec.program.body) if spec.leaf(load.leaf).kind == "float"]
    functions = functions_for(text, scale_of(text, shape, sizes), Limits.of(shape, sizes), leaves)
    return _Plan(
        functions,
        may_be_empty=not never_empty(bounds(spec), shape),
        uniform=bool(fills & {"+min", "=min"}),
        zero="0row" in fills,
        dead=bool(data) or any(_is_large(e) for e in walk(spec.program.body)),
        exact=functions.score is None,
    )


def _is_large(expr: Expr) -> bool:
    return isinstance(expr, Const) and not abs(expr.value) < 1e30


def _precision(arch: str) -> str:
    """How float32 operands are multiplied: on tensor cores, in three products that keep their digits unless the user said less."""
    if not arch.startswith("sm_"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _Call:
    """The operands of one call as kernels take them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.shape = shape = inputs.shape
        self.device = inputs.q.device
        self.arch = arch_of(self.device)
        leaves = [_readable(x) for x in inputs.leaves]
        self.forms = tuple(LeafForm.of(x.shape, x.stride()) for x in leaves)
        self.plan = _plan(inputs.text, shape, inputs.sizes, self.forms)
        functions, p = self.plan.functions, inputs.spec.dropout
        self.group = shape.H // shape.Hkv
        self.depth = max(_power_of_two(shape.D), _power_of_two(shape.Dv))
        self.itemsize = max(inputs.q.element_size(), inputs.v.element_size())
        self.seed = inputs.seed if p else None
        self.mask = {"ALLOWED": functions.allowed}
        self.score = {"SCALE": functions.scale, "SCORE": functions.score}
        self.sizes_and_leaves = {
            "Z": (shape.B, shape.H, shape.Hkv, shape.M, shape.N, *inputs.sizes),
            "L": tuple(part for x in leaves for part in (x, *x.stride(), *(size - 1 for size in x.shape))),
        }
        self.dropout = {"Seed": self.seed, "THRESHOLD": dropout.threshold(p) if p else None}
        self.keep = 1 / (1 - p)
        self.precision = {"PRECISION": _precision(self.arch)}
        self.of_q = {"D": shape.D, "BLOCK_D": _power_of_two(shape.D)}
        self.of_v = {"DV": shape.Dv, "BLOCK_DV": _power_of_two(shape.Dv)}
        self.operands = {
            "Q": inputs.q,
            "K": inputs.k,
            "V": inputs.v,
            "QS": inputs.q.stride(),
            "KS": inputs.k.stride(),
            "VS": inputs.v.stride(),
        }

    def pick(self, *names: str) -> dict[str, Any]:
        """Some of the operands."""
        return {name: self.operands[name] for name in names}

    def swizzle(self, bytes_a_head: int, heads: int, group: int = 1) -> int:
        """How many of a grid's heads run side by side: a power of two of KV heads whose operands fit the L2 cache, or all."""
        fitting = 1 << (max(1, _cache_bytes(self.device) // max(1, bytes_a_head)).bit_length() - 1)
        return min(fitting * group, heads)

    def describable(self, *tensors: Tensor) -> bool:
        """Whether these operands are read through tensor descriptors: where the hardware has them and their layout allows it."""
        return self.arch in _DESCRIPTORS and all(map(_describable, tensors))

    def launch(
        self,
        kernel: Any,
        name: str,
        programs: Callable[[Config], int],
        arguments: Callable[[Config], dict[str, Any]],
        rows: int | None = None,
    ) -> Config:
        """Runs a kernel with the first config that the device has room for; returns that.

        Args:
            name: the kernel's table in `tuning`.
            programs: the grid's size.
            rows: rows of a tile where they are not the table's.
        """
        from triton.runtime.errors import OutOfResources, PTXASError

        rehearsal = _rehearsal.get()
        found = tuning.configs(name, self.arch, self.itemsize, self.depth)
        key = (kernel, self.inputs.text, self.arch, self.itemsize, self.depth)
        for at in range(_first_config.get(key, 0), len(found)):
            config = self._shortened(found[at], rows)
            given = {**arguments(config), **self.sizes_and_leaves}
            count = programs(config)
            if rehearsal is not None:
                rehearsal.launch(kernel, given, config)
                return config
            if count > _MOST_PROGRAMS:
                raise ValueError(
                    f"{count} tiles of {config.block_m} rows: a launch takes {_MOST_PROGRAMS}; split the batch"
                )
            try:
                with _on(self.device):
                    kernel[(count,)](**given, num_warps=config.warps, num_stages=config.stages)
            except (OutOfResources, PTXASError):
                # the assembler gives up on loops that fold away, of large tiles; smaller ones are other instructions
                if at + 1 == len(found):
                    raise
                _first_config[key] = at + 1
            else:
                return config
        raise AssertionError(f"{name} has no config")

    def _shortened(self, config: Config, rows: int | None) -> Config:
        """No larger than the operands are."""
        block_m = _power_of_two(self.shape.M) if rows is None else rows
        return config._replace(
            block_m=block_m if rows is not None else min(config.block_m, block_m),
            block_n=min(config.block_n, _power_of_two(self.shape.N)),
        )


# Where a config did not fit the device, the number of the one to begin with.
_first_config: dict[tuple[Any, ...], int] = {}
# Where tensor descriptors are hardware; the interpreter takes both ways.
_DESCRIPTORS: Final = ("sm_90", "sm_100", "sm_103", "interpreter")


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _readable(leaf: Tensor) -> Tensor:
    """A leaf as kernels read it: truth values as bytes; one element, of no meaning, where it has none."""
    x = leaf.view(torch.uint8) if leaf.dtype == torch.bool else leaf
    return x if x.numel() else x.new_zeros((1,) * x.dim())


def _describable(x: Tensor) -> bool:
    if x.stride(3) != 1 or x.data_ptr() % 16 or x.element_size() > 4:
        return False
    return all(
        size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0)
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )


def _described(x: Tensor, rows: int, depth: int) -> Any:
    """A descriptor of tiles [rows, depth] of one batch and head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    even = 16 // x.element_size()
    strides = [even if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, depth])


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


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


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
        depth = max(_power_of_two(shape.D), _power_of_two(shape.Dv))
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
            return _backward(inputs, cotangents)
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
        call = _Call(inputs)
        self._attend(call, out, lse)
        plan = call.plan
        beside_sink = plan.functions.sink is not None
        if plan.may_be_empty and (plan.uniform or (plan.zero and (plan.dead or beside_sink))):
            _fill_empty_rows(call, out, lse)
        return out, lse

    def _attend(self, call: _Call, out: Tensor, lse: Tensor) -> None:
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
        depth = max(_power_of_two(shape.D), _power_of_two(shape.Dv))
        config = tuning.configs("decode", target.arch or "sm_80", 4 if target.dtype == "f32" else 2, depth)[0]
        return Tiles(max(1, shape.M), config.block_n)

    def _attend(self, call: _Call, out: Tensor, lse: Tensor) -> None:
        shape = call.shape
        heads = shape.B * shape.Hkv

        def splits(config: Config) -> int:
            wanted = 2 * _processors(call.device) // heads
            return max(1, min(wanted, shape.N // max(_SPLIT_KEYS, config.block_n), _MOST_SPLITS))

        rows = _power_of_two(call.group * shape.M)
        _attend(call, out, lse, "decode", packed=True, rows=rows, splits=splits, heads=heads)


def _attend(
    call: _Call,
    out: Tensor,
    lse: Tensor,
    table: str,
    *,
    packed: bool,
    rows: int | None,
    splits: Callable[[Config], int],
    heads: int,
) -> None:
    from attnfuse.templates.flash_forward import attend, combine

    inputs, shape, plan, functions = call.inputs, call.shape, call.plan, call.plan.functions
    total = shape.B * shape.H * shape.M
    depth, depth_v = call.of_q["BLOCK_D"], call.of_v["BLOCK_DV"]
    tma = call.describable(inputs.k, inputs.v)
    zero = {"ZERO": plan.zero and not plan.uniform and not plan.dead}
    last: dict[str, Any] = {}

    def tiles(config: Config) -> int:
        return _tiles(shape.M * call.group if packed else shape.M, config.block_m)

    def arguments(config: Config) -> dict[str, Any]:
        parts = splits(config)
        last.update(parts=None, lse=lse, count=parts)
        if parts > 1:
            last["parts"] = torch.empty((parts, total, depth_v), dtype=torch.float32, device=call.device)
            last["lse"] = torch.empty((parts, total), dtype=torch.float32, device=call.device)
        read = {**call.operands}
        if tma:
            read["K"] = _described(inputs.k, config.block_n, depth)
            read["V"] = _described(inputs.v, config.block_n, depth_v)
        group = 1 if packed else call.group
        swizzle = call.swizzle(shape.N * (shape.D + shape.Dv) * call.itemsize, heads, group)
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
            "RESIDUAL": functions.residual,
            "KEYS": functions.keys,
            "SINK": functions.sink,
            **zero,
            **call.dropout,
            "KEEP": call.keep,
            "PACKED": packed,
            "SPLIT": parts > 1,
            "TMA": tma,
            "TAIL": bool(shape.N % config.block_n),
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
                "BLOCK_S": _power_of_two(last["count"], 2),
            },
        )


def _fill_empty_rows(call: _Call, out: Tensor, lse: Tensor) -> None:
    from attnfuse.templates.flash_forward import empty_rows

    shape, plan = call.shape, call.plan
    functions = plan.functions
    call.launch(
        empty_rows,
        "uniform",
        lambda config: _tiles(shape.M, config.block_m) * shape.B * shape.H,
        lambda config: {
            **call.pick("V", "VS"),
            "Out": out,
            "Lse": lse,
            "OS": out.stride(),
            "row_tiles": _tiles(shape.M, config.block_m),
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


class _Rows(NamedTuple):
    """What the kernels of the backward know of each row, fp32 [B, H, M]; see `row_facts`, `row_norms`, `uniform_queries`."""

    lse2: Tensor
    delta: Tensor
    norm: Tensor | None
    filled: Tensor | None


def _backward(inputs: Inputs, cotangents: Cotangents) -> list[Tensor]:
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
        _Backward(_Call(inputs), cotangents, dout).run(dq, dk, dv, totals)
    grads = [x for x in (dq, dk, dv) if x is not None]
    named = zip(inputs.spec.leaves, inputs.leaves, strict=True)
    return grads + [totals[leaf.name].to(x.dtype) for leaf, x in named if leaf.name in totals]


class _Backward:
    """The launches of one backward."""

    def __init__(self, call: _Call, cotangents: Cotangents, dout: Tensor) -> None:
        from attnfuse.templates import flash_backward

        self.kernels = flash_backward
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
        return lambda config: _tiles(self.shape.M, config.block_m) * heads

    def _per_row(self, config: Config) -> dict[str, Any]:
        return {"row_tiles": _tiles(self.shape.M, config.block_m), "BLOCK_M": config.block_m}

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
            if tma:
                read["Q"] = _described(call.inputs.q, config.block_m, call.of_q["BLOCK_D"])
                read["Dout"] = _described(self.dout, config.block_m, call.of_v["BLOCK_DV"])
            return {
                **read,
                **facts,
                **_kv_gradients(dk, dv),
                "key_tiles": _tiles(shape.N, config.block_n),
                "swizzle": call.swizzle(
                    call.group * shape.M * (shape.D + shape.Dv) * call.itemsize, shape.B * shape.Hkv
                ),
                **call.score,
                **self.slope,
                **call.mask,
                "RESIDUAL": functions.row_residual,
                "ROWS": functions.rows,
                **call.dropout,
                **self.keep,
                "TMA": tma,
                "TAIL": bool(shape.M % config.block_m),
                **call.precision,
                **call.of_q,
                **call.of_v,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            }

        heads = shape.B * shape.Hkv
        call.launch(self.kernels.gradient_of_keys, "keys", lambda c: _tiles(shape.N, c.block_n) * heads, arguments)

    def _queries(self, facts: dict[str, Any], dq: Tensor) -> None:
        call, shape, functions = self.call, self.shape, self.functions
        tma = call.describable(call.inputs.k, call.inputs.v)

        def arguments(config: Config) -> dict[str, Any]:
            read = {**call.operands, **self.gradient}
            if tma:
                read["K"] = _described(call.inputs.k, config.block_n, call.of_q["BLOCK_D"])
                read["V"] = _described(call.inputs.v, config.block_n, call.of_v["BLOCK_DV"])
            return {
                **read,
                **facts,
                "Dq": dq,
                "DQS": dq.stride(),
                "swizzle": call.swizzle(shape.N * (shape.D + shape.Dv) * call.itemsize, shape.B * shape.H, call.group),
                **call.score,
                **self.slope,
                **call.mask,
                "RESIDUAL": functions.residual,
                "KEYS": functions.keys,
                **call.dropout,
                **self.keep,
                "TMA": tma,
                "TAIL": bool(shape.N % config.block_n),
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
        found = torch.empty(_tiles(shape.M, 16) * shape.B * shape.H, dtype=torch.int32, device=call.device)
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
            self.kernels.uniform_queries,
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
                self.kernels.uniform_keys,
                "uniform",
                lambda config: _tiles(shape.N, config.block_n) * shape.B * shape.Hkv,
                lambda config: {
                    **shared,
                    **_kv_gradients(dk, dv),
                    "key_tiles": _tiles(shape.N, config.block_n),
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
            grad = self._of_load(facts, count, load, by_load)
            add_gradient(totals[load.leaf], load, indices, block, grad)

    def _of_load(self, facts: dict[str, Any], count: Tensor | None, load: Load, by_load: Any) -> Tensor:
        """The gradient of what a load reads, [B or 1, H or 1, M or 1, N or 1]: an axis of 1 is summed over."""
        call, shape, functions = self.call, self.shape, self.functions
        axes = varies(load)
        of_keys = "n" in axes
        of_rows = "m" in axes or not of_keys
        # where a tile is one of rows and keys, the sum over batches and heads is made in the kernel
        whole = of_rows and of_keys
        batches = shape.B if not whole or "b" in axes else 1
        heads = shape.H if not whole or "h" in axes else 1
        size = (batches, heads, shape.M if of_rows else 1, shape.N if of_keys else 1)
        grad = torch.empty(size, dtype=torch.float32, device=call.device)

        def tiles(config: Config) -> tuple[int, int]:
            rows = _tiles(shape.M, config.block_m) if of_rows else 1
            return rows, _tiles(shape.N, config.block_n) if of_keys else 1

        def programs(config: Config) -> int:
            row_tiles, key_tiles = tiles(config)
            return batches * heads * row_tiles * key_tiles

        call.launch(
            self.kernels.gradient_of_leaf,
            "uniform",
            programs,
            lambda config: {
                **call.operands,
                **self.gradient,
                **{name: facts[name] for name in ("Lse2", "Delta", "Norm")},
                "Count": count,
                "Grad": grad,
                "GS": grad.stride(),
                "batches": batches,
                "heads": heads,
                **dict(zip(("row_tiles", "key_tiles"), tiles(config), strict=True)),
                **call.score,
                **call.mask,
                "BY_LOAD": by_load,
                "KEYS": functions.keys,
                "MINIMAL": functions.minimal if count is not None else None,
                **call.dropout,
                **self.keep,
                "OF_ROWS": of_rows,
                "OF_KEYS": of_keys,
                **call.precision,
                **call.of_q,
                **call.of_v,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
            },
        )
        return grad

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
        slopes = slopes_of(inputs.text, wanted, of_sink=True)
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
