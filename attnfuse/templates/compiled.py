"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory and matrix instructions by architecture.

Triton compiles for any target; NVIDIA's assembler, which comes with it, says what a program takes.  The kernels are those that a
call launches, with its tiles: the call is rehearsed on tensors without data.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import tuning
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.flash import Decode, Flash
from attnfuse.templates.launch import rehearsing
from attnfuse.templates.tuning import Config

ARCHITECTURES: Final = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES: Final = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class Case(NamedTuple):
    """A spec at a size; leaves are bool, int or float tensors of these shapes."""

    name: str
    text: str
    leaves: tuple[tuple[torch.dtype, tuple[int, ...]], ...] = ()


_B, _H, _HKV, _N = 2, 8, 2, 2048
CASES: Final = (
    Case("full", "s*0.125"),
    Case("causal", "s*0.125 where n <= m else -inf"),
    Case("window", "s*0.125 where n <= m & n > m - 256 else -inf"),
    Case("padded", "pad: bool[:, :]; s*0.125 where n <= m & pad[b, n] else +min", ((torch.bool, (_B, _N)),)),
    Case("softcap", "50*tanh(s*0.125/50) where n <= m else -inf"),
    Case("longformer", "s*0.125 where abs(m - n) <= 256 | n < 64 | m < 64 else -inf"),
    Case("hashed", "id: i64[:, :]; s*0.125 where id[b, m] == id[b, n] else -inf", ((torch.int64, (_B, _N)),)),
    Case("alibi", "slope: f32[:]; s*0.125 + slope[h]*n where n <= m else -inf", ((torch.float32, (_H,)),)),
)


class Row(NamedTuple):
    """One kernel, compiled.

    Args:
        spills: bytes that registers spill to memory.
        shared: bytes of shared memory; `limit` is what the architecture has.
        instruction: the matrix instruction in the code: `wgmma`, `tcgen05`, `mma.sync`, `mfma`; empty if it has none.
    """

    arch: str
    template: str
    kernel: str
    case: str
    dtype: str
    depth: int
    config: Config
    registers: int
    spills: int
    shared: int
    limit: int
    instruction: str


class _Compiler:
    """Compiles what is launched for one architecture, and notes it."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.found: list[tuple[str, Config, Any]] = []

    def launch(self, kernel: Any, arguments: dict[str, Any], config: Config) -> None:
        """Compiles a kernel for these arguments."""
        kernel.device_caches.clear()
        compiled = kernel.warmup(**arguments, grid=(1,), num_warps=config.warps, num_stages=config.stages)
        self.found.append((kernel.fn.__name__, config, compiled))


@contextmanager
def _target(arch: str) -> Iterator[None]:
    """Triton compiles for `arch`, whatever device there is."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver as drivers

    driver: Any = drivers

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return target

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    before = driver._active
    driver.set_active(Driver())
    try:
        yield
    finally:
        driver._active = before


def compile_case(arch: str, case: Case, dtype: str, depth: int, *, decode: bool = False) -> list[Row]:
    """The kernels of a forward and a backward; of a forward alone with `decode`.

    Args:
        arch: one of `ARCHITECTURES`.
        depth: D and Dv.
    """
    rows = 1 if decode else _N
    shape = Shape(_B, _H, _HKV, rows, _N, depth, depth)

    def made(heads: int, length: int) -> Tensor:
        return torch.empty((_B, length, heads, depth), dtype=DTYPES[dtype], device="meta").transpose(1, 2)

    q, k, v = made(_H, rows), made(_HKV, _N), made(_HKV, _N)
    leaves = [torch.empty(size, dtype=kind, device="meta") for kind, size in case.leaves]
    inputs = Inputs(parse_spec(case.text), case.text, shape, q, k, v, leaves, (), None, (0, 2, 1, 3))
    found = compile_call(arch, inputs, decode=decode, training=not decode)
    template = "decode" if decode else "flash"
    return [_row(arch, template, case, dtype, depth, *one) for one in found]


def compile_call(
    arch: str, inputs: Inputs, *, decode: bool = False, training: bool = True, with_lse: bool = False
) -> list[tuple[str, Config, Any]]:
    """Names, tiles and compiled code of the kernels that a call on meta tensors launches.

    Args:
        training: its backward too, for every operand that can have a gradient.
        with_lse: the log-sum-exp has a gradient.
    """
    template = Decode() if decode else Flash()
    compiler = _Compiler(arch)
    with _target(arch), rehearsing(compiler):
        out, lse = template.forward(inputs)
        if training:
            needs = (True, True, True, *(x.is_floating_point() for x in inputs.leaves))
            template.backward(inputs, Cotangents(out, lse, torch.empty_like(out), lse if with_lse else None, needs))
    return compiler.found


def _row(
    arch: str, template: str, case: Case, dtype: str, depth: int, kernel: str, config: Config, compiled: Any
) -> Row:
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spills = _from_ptxas(arch, assembly) if arch.startswith("sm_") else _from_amdgcn(assembly)
    marks = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma.sync", "v_mfma": "mfma"}
    instruction = next((name for mark, name in marks.items() if mark in assembly), "")
    limit = tuning.SHARED[arch]
    shared = int(compiled.metadata.shared)
    return Row(arch, template, kernel, case.name, dtype, depth, config, registers, spills, shared, limit, instruction)


def _from_ptxas(arch: str, ptx: str) -> tuple[int, int]:
    """Registers and bytes of spill stores, as the assembler reports them."""
    from triton import knobs

    number = int(arch[3:])
    tool = (knobs.nvidia.ptxas_blackwell if number >= 100 else knobs.nvidia.ptxas).path
    name = f"{arch}a" if number >= 90 else arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [tool, "-v", f"--gpu-name={name}", str(source), "-o", str(Path(folder, "kernel.cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    used = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill stores", done.stderr)
    return max(map(int, used)), max(map(int, spilled))


def _from_amdgcn(text: str) -> tuple[int, int]:
    """Vector registers, accumulators among them, and spilled ones times the 4 bytes of each."""
    found = [int(x) for x in re.findall(r"\.vgpr_count:\s*(\d+)", text)]
    spilled = [int(x) for x in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
    return max(found), 4 * max(spilled)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = ("arch", "template", "kernel", "case", "dtype", "D", "tile", "warps", "stages", "regs", "spills", "shared")
    lines = [(*head, "of", "matrix")]
    for row in rows:
        config = row.config
        lines.append(
            (
                *(row.arch, row.template, row.kernel, row.case, row.dtype, str(row.depth)),
                *(f"{config.block_m}x{config.block_n}", str(config.warps), str(config.stages), str(row.registers)),
                *(
                    str(row.spills),
                    str(row.shared),
                    str(row.limit),
                    row.instruction or "-",
                ),
            )
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    text = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join((*text, f"tiles: {tuning.ORIGIN}"))
