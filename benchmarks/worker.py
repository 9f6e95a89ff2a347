"""One variant of one case: `python -m benchmarks.worker CASE VARIANT`, see `process.serve`.

Commands: `time` (mean seconds of a call, over as many calls as make a fifth of a second), `results FILE`, `memory N`.  The
variants of a case of growth are its lengths, and its `memory` is that of the whole process.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnfuse.backend import attnfuse
from benchmarks.cases import CASES, Growth, Memory, Overhead, Passes, Speed
from benchmarks.memory import peak_bytes
from benchmarks.process import Answer, serve
from benchmarks.subjects import VARIANTS

SAMPLE = 0.2  # seconds

Commands = Mapping[str, Callable[[str], Answer]]


def speed(case: Speed | Passes, variant: str) -> tuple[Answer, Commands]:
    run, results = case.subject.start(VARIANTS[variant])

    def save(file: str) -> Answer:
        torch.save(results(), file)
        return {}

    first = _seconds(run, 1)
    if VARIANTS[variant].exact:
        return {"seconds": first}, {"results": save}
    run()
    calls = max(1, round(SAMPLE / _seconds(run, 1)))
    return {"seconds": first}, {"results": save, "time": lambda _: {"seconds": _seconds(run, calls) / calls}}


def passes(case: Passes, variant: str) -> tuple[Answer, Commands]:
    """Its answer is the time in the backend, with nothing behind it."""
    spent: list[float] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        compiled = attnfuse(gm, inputs, options={"downstream": "eager"})
        spent.append(time.perf_counter() - start)
        return compiled

    run, _ = case.subject.start(VARIANTS[variant]._replace(backend=backend))
    run()
    return {"seconds": sum(spent)}, {}


def memory(case: Memory, variant: str) -> tuple[Answer, Commands]:
    backend = VARIANTS[variant].backend

    def measure(N: str) -> Answer:
        call = case.call(backend, int(N), case.dtype, case.training)
        call()
        return {"bytes": peak_bytes(call)}

    return {}, {"memory": measure}


def overhead(case: Overhead, variant: str) -> tuple[Answer, Commands]:
    import attnfuse.ops  # registers the operator

    q, k, v = (torch.randn(1, 1, case.tokens, 16) for _ in range(3))
    for x in (q, k, v):
        x.requires_grad_(case.training)
    out_order, abi = [0, 1, 2, 3], attnfuse.ops.ABI
    spec = "s*0.25"

    def ours() -> object:
        return torch.ops.attnfuse.attention(q, k, v, [], [], [], None, spec, out_order, abi)

    def plain() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    call = ours if variant == "attnfuse" else plain
    first = _seconds(call, 1)
    calls = max(1, round(SAMPLE / (_seconds(call, 100) / 100)))
    return {"seconds": first}, {"time": lambda _: {"seconds": _seconds(call, calls) / calls}}


def growth(case: Growth, length: str) -> tuple[Answer, Commands]:
    subject = replace(case.subject, length=int(length))
    run = subject.step(VARIANTS["attnfuse-eager"])

    def save(file: str) -> Answer:
        rows = torch.arange(0, subject.length, case.every)
        keys = torch.tensor([key for key in case.keys if key < subject.length])
        out, dq, dk, dv = run()
        ours = {"out": out[:, :, rows], "dq": dq[:, :, rows], "dk": dk[:, :, keys], "dv": dv[:, :, keys]}
        plain = (subject.some(rows, keys, dtype) for dtype in (subject.dtype, torch.float64))
        torch.save(({name: x.detach() for name, x in ours.items()}, *plain), file)
        return {}

    first = _seconds(run, 1)
    calls = max(1, round(SAMPLE / _seconds(run, 1)))
    # before anything else needs memory; Linux counts it in KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": first}, {
        "time": lambda _: {"seconds": _seconds(run, calls) / calls},
        "memory": lambda _: {"bytes": peak},
        "results": save,
    }


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def main(name: str, variant: str) -> None:
    def start() -> tuple[Answer, Commands]:
        case = CASES[name]
        match case:
            case Passes() if VARIANTS[variant].backend == "attnfuse":
                return passes(case, variant)
            case Speed() | Passes():
                return speed(case, variant)
            case Memory():
                return memory(case, variant)
            case Overhead():
                return overhead(case, variant)
            case Growth():
                return growth(case, variant)
        raise SystemExit(f"case {name!r} has no variants of its own")

    serve(start)


if __name__ == "__main__":
    main(*sys.argv[1:])
