"""Times, memory and ceilings of a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

Run = Callable[[], object]
# Where one of the runs is shorter than this, all are timed as CUDA graphs, so that launches do not count.
_SHORT = 1e-3
_FLUSH_BYTES = 256 << 20
_SAMPLE = 3e-3


def _events(run: Run, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def _graphed(run: Run) -> Run:
    """The work as a CUDA graph; as it is where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def _warm(run: Run) -> float:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return statistics.median(_events(run, 1) for _ in range(3))


def seconds(runs: Mapping[str, Run], samples: int, *, graphs: bool = False) -> dict[str, list[float]]:
    """`samples` times of each, taken in turn so that the clock's moods meet all of them; each begins with a cold L2 cache.

    Args:
        graphs: run all of them as CUDA graphs if one is short.  Not for backwards, which run on their forwards' stream.
    """
    once = {name: _warm(run) for name, run in runs.items()}
    if graphs and min(once.values()) < _SHORT:
        runs = {name: _graphed(run) for name, run in runs.items()}
        once = {name: _warm(run) for name, run in runs.items()}
    ready = {name: (run, max(1, round(_SAMPLE / max(once[name], 1e-6)))) for name, run in runs.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(samples):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            run, calls = ready[name]
            flush.zero_()
            found[name].append(_events(run, calls))
    return found


def peak_bytes(run: Run) -> int:
    """Most memory at once beyond what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matmul_flops() -> float:
    """bf16 FLOP/s of an 8192³ matrix product on random data: the roof that shares are given of."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = seconds({"matmul": lambda: a @ b}, 7)["matmul"]
    return 2 * 8192**3 / statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = seconds({"copy": lambda: target.copy_(source)}, 7)["copy"]
    return 2 * source.numel() / statistics.median(times)


def median(times: Sequence[float]) -> float:
    return statistics.median(times)
