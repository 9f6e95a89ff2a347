"""attnfuse's own kernels for the CPU beside PyTorch's flash kernel, on the same operands.

    python -m benchmarks.kernels

Why attention goes to ours where it does (`attnfuse.templates.native.processor`). Prints the median times, in turn, and the speed
relative to PyTorch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnfuse.templates import flash_kernel, native

ROUNDS: Final = 15


class Size(NamedTuple):
    """Batches, heads, KV heads, tokens, depth, and whether the mask is causal."""

    B: int
    H: int
    Hkv: int
    N: int
    D: int
    causal: bool


SIZES: Final = (
    Size(8, 8, 8, 128, 64, False),
    Size(8, 8, 8, 197, 64, False),
    Size(8, 8, 8, 512, 64, False),
    Size(1, 8, 8, 1500, 64, False),
    Size(1, 8, 2, 2048, 64, True),
    Size(1, 8, 8, 1024, 128, False),
)


def _medians(ways: Sequence[Callable[[], object]]) -> list[float]:
    samples: list[list[float]] = [[] for _ in ways]
    for turn in range(ROUNDS + 2):
        for way, times in zip(ways, samples, strict=True):
            start = time.perf_counter()
            way()
            if turn > 1:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in samples]


def measured(size: Size, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Seconds of PyTorch's kernel and of ours, forward and backward."""

    def normal(heads: int) -> Tensor:
        return torch.randn(size.B, size.N, heads, size.D).to(dtype).transpose(1, 2)

    q, k, v, dout = normal(size.H), normal(size.Hkv), normal(size.Hkv), normal(size.H)
    scale = size.D**-0.5

    def forward(ours: bool) -> tuple[Tensor, Tensor]:
        return flash_kernel.forward(q, k, v, scale, ours=ours, causal=size.causal)

    out, lse = forward(True)

    def backward(ours: bool) -> tuple[Tensor, ...]:
        return flash_kernel.backward(dout, q, k, v, out, lse, scale, ours=ours, causal=size.causal)

    for run in (forward, backward):
        for a, b in zip(run(False), run(True), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    forwards, backwards = ([partial(run, ours) for ours in (False, True)] for run in (forward, backward))
    return _medians(forwards), _medians(backwards)


def main() -> None:
    table = Table(
        "type", "sizes", "forward, ms: PyTorch's", "ours", "speed", "backward, ms: PyTorch's", "ours", "speed"
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if not native.differentiates(dtype):
            continue
        for size in SIZES:
            cells = [
                cell
                for library, ours in measured(size, dtype)
                for cell in (f"{1000 * library:.1f}", f"{1000 * ours:.1f}", f"{library / ours:.2f}x")
            ]
            heads = f"{size.H}" if size.H == size.Hkv else f"{size.H} on {size.Hkv}"
            about = f"{size.B} x {heads} heads, {size.N} tokens, D {size.D}{', causal' if size.causal else ''}"
            name = str(dtype).removeprefix("torch.")
            table.add_row(name, about, *cells)
    console = Console(width=132)
    console.print(table)
    console.print(
        f"attention on this machine: {native.about()}; {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
