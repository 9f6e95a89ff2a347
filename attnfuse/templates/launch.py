"""How a Triton kernel gets onto a device: the operands as kernels take them, tensor descriptors, a config that fits, the launch.

Triton is imported at the first call.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from attnfuse.score import Const, Expr, loads, walk
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import dropout, tile_lists, tuning
from attnfuse.templates.base import Inputs
from attnfuse.templates.score_function import Functions, LeafForm, Limits, functions_for, scale_of
from attnfuse.templates.tuning import Config
from attnfuse.tiles import bounds, never_empty

_MOST_PROGRAMS: Final = 2**31 - 1


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
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of the interpreter, enough to split rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def _cache_bytes(device: torch.device) -> int:
    found = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0
    return int(found) or 40 << 20


def power_of_two(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


class Plan(NamedTuple):
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
def _plan(text: str, shape: Shape, sizes: tuple[int, ...], leaves: tuple[LeafForm, ...]) -> Plan:
    spec = parse_spec(text)
    fills = {tier.fill for tier in spec.program.tiers}
    data = [load for load in loads(spec.program.body) if spec.leaf(load.leaf).kind == "float"]
    functions = functions_for(text, scale_of(text, shape, sizes), Limits.of(shape, sizes), leaves)
    return Plan(
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


class Call:
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
        self.depth = max(power_of_two(shape.D), power_of_two(shape.Dv))
        self.itemsize = max(inputs.q.element_size(), inputs.v.element_size())
        self.seed = inputs.seed if p else None
        self._found: tuple[Tensor, ...] | None = None
        self.mask = {"ALLOWED": functions.allowed}
        self.score = {"SCALE": functions.scale, "SCORE": functions.score}
        self.sizes_and_leaves = {
            "Z": (shape.B, shape.H, shape.Hkv, shape.M, shape.N, *inputs.sizes),
            "L": tuple(part for x in leaves for part in (x, *x.stride(), *(size - 1 for size in x.shape))),
        }
        self.dropout = {"Seed": self.seed, "THRESHOLD": dropout.threshold(p) if p else None}
        self.keep = 1 / (1 - p)
        self.precision = {"PRECISION": _precision(self.arch)}
        self.of_q = {"D": shape.D, "BLOCK_D": power_of_two(shape.D)}
        self.of_v = {"DV": shape.Dv, "BLOCK_DV": power_of_two(shape.Dv)}
        self.operands = {
            "Q": inputs.q,
            "K": inputs.k,
            "V": inputs.v,
            "QS": inputs.q.stride(),
            "KS": inputs.k.stride(),
            "VS": inputs.v.stride(),
        }

    def tile_map(self, of: str, *, packed: bool = False) -> dict[str, Any]:
        """The tile map as kernels take it, its lists of `rows` or of `keys`; its tiles are multiples of theirs.

        Args:
            packed: for the query heads of a KV head together.
        """
        lists = self._lists(packed)
        if lists is None:
            return {"Map": None, "MS": (0, 0, 0), "MAP": None}
        found = lists[of == "keys"]
        # what does not vary has one list for all
        strides = [stride if size > 1 else 0 for size, stride in zip(found.shape[:2], found.stride()[:2], strict=True)]
        return {"Map": found, "MS": (*strides, found.stride(2)), "MAP": tile_lists.TILES.block_n}

    def _lists(self, packed: bool) -> tuple[Tensor, ...] | None:
        shape, inputs = self.shape, self.inputs
        if not tile_lists.has_no_ranges(inputs.spec) or not tile_lists.worth_a_map(shape.M, shape.N):
            return None
        lists = self._found or tuple(inputs.tiles) or None
        if lists is None and not tile_lists.reads_leaves(inputs.spec):
            lists = _index_lists(tile_lists.mask_text(inputs.text), inputs.sizes, shape[:5], self.device)
        elif lists is None:
            lists = tile_lists.lists_of(inputs.text, inputs.leaves, inputs.sizes, shape[:5], self.device)
        self._found = lists
        return tile_lists.of_groups(lists, shape.Hkv) if packed else lists

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
        block_m = power_of_two(self.shape.M) if rows is None else rows
        return config._replace(
            block_m=block_m if rows is not None else min(config.block_m, block_m),
            block_n=min(config.block_n, power_of_two(self.shape.N)),
        )


# Where a config did not fit the device, the number of the one to begin with.
_first_config: dict[tuple[Any, ...], int] = {}
# Where tensor descriptors are hardware; the interpreter takes both ways.
_DESCRIPTORS: Final = ("sm_90", "sm_100", "sm_103", "interpreter")


@lru_cache(maxsize=64)
def _index_lists(
    text: str, sizes: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    return tile_lists.lists_of(text, (), sizes, shape, device)


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


def described(x: Tensor, rows: int, depth: int) -> Any:
    """A descriptor of tiles [rows, depth] of one batch and head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    even = 16 // x.element_size()
    strides = [even if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, depth])


def tiles_of(size: int, block: int) -> int:
    return -(-size // block)
