"""`torch.compile(model, backend="attnfuse")` on a Llama-type model: what is fused, how exact it is, what it costs and saves.

    python examples/demo.py                  the whole demonstration, under five minutes on two cores
    python examples/demo.py --variant NAME   one variant alone, as lines of JSON: its first call, then one for each line of
                                             standard input ("time", "memory" or "logits FILE")

Every variant lives in a process and a cache folder of its own.  Each starts twice, with an empty cache and with a filled one;
then all of them run in turn, so that a slow second of the machine hits them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import attnfuse
from benchmarks.machine import machine
from benchmarks.memory import peak_bytes
from benchmarks.process import Answer, Process, serve

BATCH, TOKENS, PADDED = 2, 2048, 512  # the first sequence begins with PADDED positions of padding
POSITIONS = range(31, TOKENS, 32)  # those whose logits are computed
CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": TOKENS,
    "use_cache": False,
}
SECONDS = 240  # no further round begins after this
LEAST_ROUNDS, MOST_ROUNDS = 3, 15


class Variant(NamedTuple):
    attention: str  # transformers' attn_implementation
    backend: str | None  # torch.compile's; None: not compiled


VARIANTS = {
    "eager": Variant("eager", None),
    "stock-eager": Variant("eager", "inductor"),
    "stock-sdpa": Variant("sdpa", "inductor"),
    "attnfuse": Variant("eager", "attnfuse"),
}
STOCK = ("stock-eager", "stock-sdpa")
REFERENCE = "reference"  # eager in a wider type


def usual_type(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32."""
    if device == "cuda":
        return torch.bfloat16
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def build(attention: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation=attention))
    return model.to(device, dtype).eval()


def batch(device: str) -> dict[str, Tensor]:
    """Padded on the left, as `generate` is given it."""
    ids = torch.randint(CONFIG["vocab_size"], (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    tensors = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": torch.tensor(POSITIONS)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def added_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager adds to its scores [B, 1, N, N], filled with float32's minimum: its softmax is float32 even in a float64 model."""
    position = torch.arange(allowed.shape[1], device=allowed.device)
    seen = (position <= position[:, None]) & allowed.bool()[:, None, None, :]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(dtype)


def start(name: str) -> tuple[Answer, Mapping[str, Callable[[str], Answer]]]:
    """Builds, compiles and calls a variant, in a process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, variant = usual_type(device), VARIANTS["eager" if name == REFERENCE else name]
    if name == REFERENCE:
        dtype = torch.float64 if dtype == torch.float32 else torch.float32
    model, inputs = build(variant.attention, dtype, device), batch(device)
    if name == REFERENCE:
        inputs["attention_mask"] = added_mask(inputs["attention_mask"], dtype)
    call = model if variant.backend is None else torch.compile(model, backend=variant.backend)

    @torch.no_grad()
    def forward() -> Tensor:
        logits: Tensor = call(**inputs).logits
        if device == "cuda":
            torch.cuda.synchronize()
        return logits

    def timed() -> Answer:
        begin = time.perf_counter()
        forward()
        return {"seconds": time.perf_counter() - begin}

    def save(file: str) -> Answer:
        torch.save(forward().cpu(), file)
        return {}

    memory = {"memory": lambda _: {"bytes": peak_bytes(forward, device)}}
    return timed(), {"time": lambda _: timed(), "logits": save, **memory}


class Progress:
    """Says what is going on: in one line on a terminal, in one line for each step in a pipe."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.begin = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        stamped = f"{self.elapsed:4.0f} s  {text}"
        if self.console.is_terminal:
            with self.console.status(stamped):
                yield
        else:
            self.console.print(stamped, highlight=False, soft_wrap=True)
            yield


class Measured(NamedTuple):
    times: list[float]  # seconds
    peak: int  # bytes
    logits: Tensor
    cold: float | None  # seconds, None where nothing is compiled
    warm: float | None


def main() -> int:
    """Returns 1 where attnfuse fused nothing or its logits are above the error limit, else 0."""
    console, progress = Console(), Progress()
    if not console.is_terminal:
        console.width = 120
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = usual_type(device)
    with progress.step("building the model"):
        model, inputs = build("eager", dtype, device), batch(device)
    where = machine()
    console.print(
        f"Llama with {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {type_text(dtype)}: "
        f"{CONFIG['num_hidden_layers']} layers, {CONFIG['num_attention_heads']} query heads on "
        f"{CONFIG['num_key_value_heads']} key-value heads\n"
        f"{BATCH} x {TOKENS} tokens, {PADDED} of them left padding\n"
        f"{where.get('gpu') or where['cpu']}, {where['cores']} CPU cores; torch {torch.__version__}\n",
        highlight=False,
    )
    with progress.step("attnfuse.explain, with one eager run of the model"), torch.no_grad():
        report = attnfuse.explain(model, **inputs)
    console.print(str(report) + "\n", highlight=False, markup=False, soft_wrap=True)
    del model
    with tempfile.TemporaryDirectory(prefix="attnfuse-demo-") as folder:
        measured, reference = measure(progress, Path(folder))
    within = show_errors(console, measured, reference)
    show_times(console, measured)
    console.print(f"{progress.elapsed:.0f} s in all", highlight=False)
    return 0 if within and report.fused else 1


def measure(progress: Progress, folder: Path) -> tuple[dict[str, Measured], Tensor]:
    """Every variant's figures, and the logits of the reference."""

    def process(name: str) -> Process:
        return Process([__file__, "--variant", name], folder / name)

    def logits(served: Process) -> Tensor:
        served.ask(f"logits {folder / 'logits.pt'}")
        return torch.load(folder / "logits.pt")

    with progress.step("Inductor's C++ header, compiled once on a machine"):
        torch.compile(torch.cos)(torch.ones(64))
    first_cold: dict[str, float] = {}
    for name, variant in VARIANTS.items():
        if variant.backend is not None:
            with progress.step(f"{name}: first call, caches empty"), process(name) as served:
                first_cold[name] = served.first["seconds"]
    with contextlib.ExitStack() as stack:
        served_by: dict[str, Process] = {}
        for name in VARIANTS:
            with progress.step(f"{name}: first call{', caches filled' if name in first_cold else ''}"):
                served_by[name] = stack.enter_context(process(name))
        with progress.step("peak memory and logits"):
            peaks = {name: int(served.ask("memory")["bytes"]) for name, served in served_by.items()}
            results = {name: logits(served) for name, served in served_by.items()}
        with progress.step("reference: eager in a wider type"), process(REFERENCE) as served:
            reference = logits(served)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for turn in range(MOST_ROUNDS):
            if turn >= LEAST_ROUNDS and progress.elapsed > SECONDS:
                break
            with progress.step(f"round {turn + 1}: every variant once"):
                for name, served in served_by.items():
                    times[name].append(served.ask("time")["seconds"])
    measured = {}
    for name, taken in times.items():
        usual = statistics.median(taken)
        cold, warm = (
            (first_cold[name] - usual, served_by[name].first["seconds"] - usual) if name in first_cold else (None, None)
        )
        measured[name] = Measured(taken, peaks[name], results[name], cold, warm)
    return measured, reference


def show_errors(console: Console, measured: Mapping[str, Measured], reference: Tensor) -> bool:
    """Prints every variant's error; returns whether attnfuse is below the limit."""
    exact, eager = reference.double(), measured["eager"].logits.double()
    padding = torch.zeros(exact.shape[:2], dtype=torch.bool)
    padding[0] = torch.tensor(POSITIONS) < PADDED
    largest = float(exact.abs().max())
    table = Table(title=f"Greatest error of a logit (the largest logit is {largest:.2f})", title_justify="left")
    for heading in ("", "to the reference", "at padding", "to eager", "at padding"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, figures in measured.items():
        differences = ((figures.logits.double() - other).abs() for other in (exact, eager))
        table.add_row(name, *(f"{float(x[where].max()):.1e}" for x in differences for where in (~padding, padding)))
    console.print(table)
    ours = measured["attnfuse"].logits
    error = float((ours.double() - exact).abs().max())
    limit = 2 * float((eager - exact).abs().max()) + 4 * torch.finfo(ours.dtype).eps * largest
    within = error <= limit
    console.print(
        f"attnfuse's error {error:.1e} is {'within' if within else 'ABOVE'} the limit {limit:.1e} "
        "(twice eager's error plus 4 eps of the largest logit).\n"
        f"Reference: eager in {type_text(reference.dtype)}; logits of {len(POSITIONS)} positions in each sequence. A query "
        "at padding has no key\nthat it may see, and nobody reads what comes out: eager then weighs all keys alike, as does "
        "attnfuse, which\ncompiles this same model; sdpa gives zeros.\n",
        highlight=False,
        style="" if within else "bold red",
    )
    return within


def show_times(console: Console, measured: Mapping[str, Measured]) -> None:
    median = {name: statistics.median(figures.times) for name, figures in measured.items()}
    best = min(STOCK, key=median.__getitem__)
    rounds = len(measured["eager"].times)
    table = Table(title=f"One forward pass, median of {rounds} rounds", title_justify="left")
    for heading in ("", "time", f"faster than {best}", "peak memory", "compile time, cold", "warm"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, figures in measured.items():
        ratio = statistics.median(x / y for x, y in zip(measured[best].times, figures.times, strict=True))
        table.add_row(
            name,
            f"{median[name] * 1e3:,.0f} ms",
            f"{ratio:.2f}x",
            f"{figures.peak / 2**20:,.0f} MiB",
            *("-" if seconds is None else f"{seconds:.1f} s" for seconds in (figures.cold, figures.warm)),
        )
    console.print(table)
    console.print(
        "stock is torch.compile's own backend, with attn_implementation eager and sdpa. Peak memory: most bytes of tensors "
        "alive at\nonce in the call, beyond model and inputs. Compile time: a process's first call less the median, with empty "
        "and filled caches.",
        highlight=False,
    )


def type_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile a Llama-type model with attnfuse, check it and measure it.")
    parser.add_argument(
        "--variant",
        choices=[*VARIANTS, REFERENCE],
        help="one variant alone, as lines of JSON (see the file's first lines)",
    )
    chosen = parser.parse_args()
    if chosen.variant:
        serve(lambda: start(chosen.variant))
    else:
        sys.exit(main())
