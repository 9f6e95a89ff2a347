"""The list of what is measured, each case with its target, and how a case becomes rows of a result."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks import gate, stats
from benchmarks.machine import ROOT
from benchmarks.models import FORWARD, TRAINED, Forward
from benchmarks.process import Process
from benchmarks.sparse import MASKS, Sparse
from benchmarks.stats import Estimate, Target, Verdict
from benchmarks.subjects import LLAMA_TEXT, VARIANTS, Pass, bare_call, beit_call, t5_call

Samples = dict[str, list[float]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One figure. Without an estimate the verdict says why there is none."""

    figure: str
    unit: str
    estimate: Estimate | None
    target: Target | None = None
    verdict: Verdict = ""
    note: str = ""

    @classmethod
    def of(cls, figure: str, unit: str, estimate: Estimate, target: Target | None) -> Row:
        return cls(figure, unit, estimate, target, target.verdict(estimate) if target else "")


@dataclass(frozen=True)
class Outcome:
    """What a case found: its rows, and the samples that they come from (in seconds or bytes)."""

    rows: tuple[Row, ...]
    samples: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """How a case is run: pairs of samples, starts of the processes, a folder for caches and results, and where progress goes."""

    pairs: int
    starts: int
    folder: Path
    say: Say


def _worker(setting: Setting, name: str, variant: str) -> Process:
    return Process(["-m", "benchmarks.worker", name, variant], setting.folder / "caches")


def _in_turn(processes: Mapping[str, Process], setting: Setting) -> Samples:
    """Samples of every process, `setting.pairs` rounds; each round begins with the next one."""
    names = list(processes)
    samples: Samples = {name: [] for name in names}
    for turn in range(setting.pairs):
        setting.say(f"round {turn + 1} of {setting.pairs}")
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(processes[name].ask("time")["seconds"])
    return samples


def _best(samples: Samples, names: Sequence[str]) -> str:
    return min(names, key=lambda name: statistics.median(samples[name]))


@dataclass(frozen=True)
class Speed:
    """Time of a pass against the better of stock `torch.compile` with eager and with sdpa attention."""

    subject: Pass | Forward | Sparse
    target: Target | None
    about: str
    rounds: int = 1
    """Rounds for each pair that is asked for: of short passes, where a difference of a few percent is judged, many more."""
    starts: int = 1
    """How often the processes are started anew, each time for a part of the rounds: where its code and data happen to lie makes a
    process a few percent faster or slower for as long as it lives."""
    peers: Mapping[str, Target] = field(default_factory=dict)
    """Other variants to be compared with, and what is asked of that."""
    uncompiled: bool = True
    """Whether eager is timed too."""

    def measure(self, name: str, setting: Setting) -> Outcome:
        wrong = self.faults(name, setting)
        right = [ours for ours in self.ours if not wrong[ours]]
        variants = (*(("eager",) if self.uncompiled else ()), *self.stock, *self.peers, *right)
        samples: Samples = {variant: [] for variant in variants}
        for start in range(setting.starts):
            with ExitStack() as stack:
                processes = {}
                # what is started later has the memory that is left
                for variant in variants[::-1] if start % 2 else variants:
                    setting.say(f"start {start + 1} of {setting.starts}: {variant}")
                    processes[variant] = stack.enter_context(_worker(setting, name, variant))
                rounds = setting.pairs * self.rounds
                part = rounds * (start + 1) // setting.starts - rounds * start // setting.starts
                for variant, found in _in_turn(processes, replace(setting, pairs=part)).items():
                    samples[variant].extend(found)
        best = _best(samples, self.stock)
        rows = []
        for ours in self.ours:
            if wrong[ours]:
                rows.append(Row(f"{ours} over {best}", "x", None, self.target, "wrong results", wrong[ours]))
            else:
                for other, target in {best: self.target, **self.peers}.items():
                    ratio = stats.speed_up(samples[ours], samples[other])
                    rows.append(Row.of(f"{ours} over {other}", "x", ratio, target))
        if isinstance(self.subject, Sparse):
            times = samples["flex mask"] = [self.subject.seconds_of_block_mask() for _ in range(3)]
            rows.append(Row.of("FlexAttention's block mask, made beforehand", "s", stats.median(times), None))
        return Outcome(tuple(rows), samples)

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(f"attnfuse-{attention}" for attention in self.subject.attentions)

    @property
    def stock(self) -> tuple[str, ...]:
        return tuple(f"stock-{attention}" for attention in self.subject.attentions)

    def faults(self, name: str, setting: Setting) -> dict[str, str]:
        """What is wrong with the results of each of our variants, "" where they are right."""
        needed = {ours: (VARIANTS[ours].attention, f"{VARIANTS[ours].attention}-float64", ours) for ours in self.ours}
        found: dict[str, gate.Results] = {}
        for variant in dict.fromkeys(variant for group in needed.values() for variant in group):
            setting.say(f"{variant}: results")
            file = setting.folder / f"{variant}.pt"
            with _worker(setting, name, variant) as process:
                process.ask(f"results {file}")
            found[variant] = torch.load(file)
            file.unlink()
        return {
            ours: gate.fault(found[ours], found[original], found[exact])
            for ours, (original, exact, _) in needed.items()
        }


@dataclass(frozen=True)
class Compile:
    """Compile time on the model of examples/demo.py: the first call of a process less a later one, caches empty and filled.

    Every sample is a process of its own, so that a few pairs with empty caches have to do; each fills the caches for several of
    the others, whose difference is small beside the time that a process takes to start.
    """

    cold: Target
    warm: Target
    about: str
    variants: ClassVar = ("attnfuse", "stock-eager")
    pairs: ClassVar = 5
    warm_pairs: ClassVar = 7

    def measure(self, name: str, setting: Setting) -> Outcome:
        samples: Samples = {f"{variant} {state}": [] for variant in self.variants for state in ("cold", "warm")}
        torch.compile(torch.cos)(
            torch.ones(64)
        )  # Inductor's C++ header is compiled once on a machine, not once a model
        pairs = min(setting.pairs, self.pairs)
        for turn in range(pairs):
            for part in range(1 + self.warm_pairs):
                state = "warm" if part else "cold"
                for variant in self.variants if (turn + part) % 2 else self.variants[::-1]:
                    setting.say(f"pair {turn + 1} of {pairs}: {variant}, {state}")
                    samples[f"{variant} {state}"].append(self.sample(variant, setting.folder / f"{variant}-{turn}"))
        ours, stock = self.variants
        cold = stats.speed_up(samples[f"{stock} cold"], samples[f"{ours} cold"])
        warm = stats.difference(samples[f"{ours} warm"], samples[f"{stock} warm"])
        rows = (
            Row.of("compile time cold, attnfuse over stock", "x", cold, self.cold),
            Row.of("compile time warm, attnfuse less stock", "s", warm, self.warm),
        )
        return Outcome(rows, samples)

    def sample(self, variant: str, caches: Path) -> float:
        with Process([str(ROOT / "examples" / "demo.py"), "--variant", variant], caches) as process:
            later = [process.ask("time")["seconds"] for _ in range(2)]
            first: float = process.first["seconds"]
            return first - min(later)


@dataclass(frozen=True)
class Passes:
    """Time in attnfuse's backend until it hands a graph on, as a share of stock's compile time for the same model.

    Every sample is a process of its own. Stock's is the first call less a later one, with empty caches, then with those that
    it filled; the passes keep no cache between processes.
    """

    subject: Forward
    about: str
    target: ClassVar = Target("at most", 10.0)
    pairs: ClassVar = 3

    def measure(self, name: str, setting: Setting) -> Outcome:
        # Inductor's C++ header is compiled once on a machine, not once a model
        torch.compile(torch.cos)(torch.ones(64))
        samples: Samples = {}
        rows = []
        pairs = min(setting.pairs, self.pairs)
        for attention in self.subject.attentions:
            ours, stock = f"attnfuse-{attention}", f"stock-{attention}"
            for turn in range(pairs):
                caches = replace(setting, folder=setting.folder / f"{attention}-{turn}")
                for state in ("cold", "warm"):
                    for variant in (ours, stock) if turn % 2 else (stock, ours):
                        setting.say(f"pair {turn + 1} of {pairs}: {variant}, {state}")
                        samples.setdefault(f"{variant} {state}", []).append(self.sample(name, variant, caches))
            for state, target in (("cold", self.target), ("warm", None)):
                share = stats.share(samples[f"{ours} {state}"], samples[f"{stock} {state}"])
                rows.append(Row.of(f"passes in {stock}'s compile time, {state}", "%", share, target))
        return Outcome(tuple(rows), samples)

    def sample(self, name: str, variant: str, setting: Setting) -> float:
        with _worker(setting, name, variant) as process:
            first: float = process.first["seconds"]
            if VARIANTS[variant].backend == "attnfuse":
                return first
            return first - min(process.ask("time")["seconds"] for _ in range(2))


@dataclass(frozen=True)
class Memory:
    """Most bytes alive at once in a call, against eager's at N 4,096, and how they grow to 8,192."""

    dtype: torch.dtype
    training: bool
    about: str
    call: Callable[[str | None, int, torch.dtype, bool], Callable[[], object]] = bare_call
    judged: bool = True
    """Whether less memory than eager's and linear growth are asked for; else both are told."""
    lengths: ClassVar = (1024, 2048, 4096, 8192)
    eighth: ClassVar = Target("at least", 8.0)
    linear: ClassVar = Target("at most", 2.1)

    def measure(self, name: str, setting: Setting) -> Outcome:
        samples: Samples = {}
        for variant in ("eager", "stock-eager", "attnfuse-eager"):
            with _worker(setting, name, variant) as process:
                for N in self.lengths:
                    if variant != "attnfuse-eager" and N > 4096:
                        continue
                    setting.say(f"{variant}: {N} keys")
                    samples[f"{variant} {N}"] = [process.ask(f"memory {N}")["bytes"]]
        against = stats.speed_up(samples["attnfuse-eager 4096"], samples["eager 4096"])
        stock = stats.speed_up(samples["attnfuse-eager 4096"], samples["stock-eager 4096"])
        growth = stats.speed_up(samples["attnfuse-eager 4096"], samples["attnfuse-eager 8192"])
        rows = (
            Row.of("memory of eager over attnfuse, N 4096", "x", against, self.eighth if self.judged else None),
            Row.of("memory of stock over attnfuse, N 4096", "x", stock, None),
            Row.of("memory at N 8192 over N 4096", "x", growth, self.linear if self.judged else None),
        )
        return Outcome(rows, samples)


@dataclass(frozen=True)
class Overhead:
    """Time of a call of the bare operator on next to no data, beyond plain scaled_dot_product_attention's."""

    training: bool
    about: str
    tokens: ClassVar = 16

    def measure(self, name: str, setting: Setting) -> Outcome:
        with ExitStack() as stack:
            processes = {
                variant: stack.enter_context(_worker(setting, name, variant)) for variant in ("sdpa", "attnfuse")
            }
            samples = _in_turn(processes, setting)
        microseconds = {variant: [1e6 * x for x in values] for variant, values in samples.items()}
        beyond = stats.difference(microseconds["attnfuse"], microseconds["sdpa"])
        return Outcome((Row.of("a call of attnfuse less one of sdpa", "us", beyond, None),), samples)


@dataclass(frozen=True)
class Growth:
    """A training step of attention alone from 4,096 to 65,536 tokens: how its time grows, and what its process needs at most.

    Results are compared at the greatest length: rows of the output and of the gradient of q, keys of those of k and v.
    """

    subject: Sparse
    about: str
    lengths: ClassVar = (4096, 8192, 16384, 32768, 65536)
    # no multiple of it is one of a block's rows
    every: ClassVar = 1021
    keys: ClassVar = (100, 40_077, 65_535)
    """Few rows look at these."""
    exponent: ClassVar = Target("at most", 1.15)
    memory: ClassVar = Target("at most", 24.0)

    def measure(self, name: str, setting: Setting) -> Outcome:
        longest = str(self.lengths[-1])
        with ExitStack() as stack:
            processes = {}
            for length in map(str, self.lengths):
                setting.say(f"{length} tokens")
                processes[length] = stack.enter_context(_worker(setting, name, length))
            file = setting.folder / "rows.pt"
            processes[longest].ask(f"results {file}")
            wrong = gate.fault(*torch.load(file))
            if wrong:
                return Outcome((Row("exponent of the time", "", None, self.exponent, "wrong results", wrong),))
            times = _in_turn(processes, setting)
            most = processes[longest].ask("memory")["bytes"] / 2**30
        slopes = [
            stats.slope(self.lengths, [times[str(length)][at] for length in self.lengths])
            for at in range(setting.pairs)
        ]
        rows = (
            Row.of("exponent of the time, 4,096 to 65,536 tokens", "", stats.median(slopes), self.exponent),
            Row.of("time at 65,536 tokens", "s", stats.median(times[longest]), None),
            Row.of("memory of its process, at most", "GiB", stats.median([most]), self.memory),
        )
        return Outcome(rows, times)


Case = Speed | Compile | Passes | Memory | Overhead | Growth


def _llama() -> Iterator[tuple[str, Case]]:
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    plain = Pass(training=False, batch=1, tokens=2048, padded=0, mask=True, dtype=torch.float32)
    for dtype, bound in ((torch.bfloat16, 1.25), (torch.float32, 1.15)):
        causal = replace(plain, dtype=dtype)
        for form, subject in (("causal", causal), ("padded", replace(causal, batch=2, padded=512))):
            yield f"prefill-{form}-{short[dtype]}", Speed(subject, Target("at least", bound), _about(subject))
    for dtype in short:
        subject = replace(plain, mask=False, dtype=dtype)
        yield f"prefill-no-mask-{short[dtype]}", Speed(subject, Target("at least", 0.97), _about(subject))
    step = replace(plain, training=True)
    for dtype, form, subject in (
        (torch.bfloat16, "causal", step),
        (torch.bfloat16, "padded", replace(step, batch=2, padded=512)),
        (torch.float32, "causal", step),
    ):
        subject = replace(subject, dtype=dtype)
        yield f"training-{form}-{short[dtype]}", Speed(subject, Target("at least", 1.1), _about(subject))
    for dtype in short:
        subject = replace(step, batch=2, tokens=1024, dtype=dtype)
        yield f"training-1024-{short[dtype]}", Speed(subject, None, _about(subject))
    for training, name in ((False, "prefill"), (True, "training")):
        for dtype in short:
            subject = replace(plain, training=training, tokens=128, dtype=dtype)
            yield (
                f"short-{name}-{short[dtype]}",
                Speed(subject, Target("at least", 0.97), _about(subject), rounds=4, starts=10 if training else 5),
            )


def _models() -> Iterator[tuple[str, Case]]:
    for name, subject in FORWARD.items():
        yield f"model-{name}", Speed(subject, Target("at least", 0.97), _about_model(subject), starts=2)
    for name, subject in FORWARD.items():
        half = replace(subject, dtype=torch.bfloat16)
        yield f"model-{name}-bf16", Speed(half, Target("at least", 0.97), _about_model(half))
    for name, step in TRAINED.items():
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            subject = replace(step, dtype=dtype)
            yield f"step-{name}-{short}", Speed(subject, Target("at least", 0.97), _about_model(subject))
    for name, subject in FORWARD.items():
        yield (
            f"passes-{name}",
            Passes(subject, f"{subject.model}, the passes beside stock's compile time, {subject.about}"),
        )


def _sparse() -> Iterator[tuple[str, Case]]:
    for mask, (build, *_) in MASKS.items():
        for training in (False, True):
            for dtype, short, flex in ((torch.float32, "fp32", 0.9), (torch.bfloat16, "bf16", 1.5)):
                subject = Sparse(mask, 8192, training, dtype)
                kind = "forward and gradients of q, k and v" if training else "forward"
                about = f"{(build.__doc__ or '').rstrip('.')}: attention alone, {kind}, B 1, H 8, N 8192, D 64, {dtype}"
                # FlexAttention has no backward on a CPU
                peers = {} if training else {"flex": Target("at least", flex)}
                name = f"sparse-{mask}-{'training' if training else 'forward'}-{short}"
                yield name, Speed(subject, Target("at least", 3.0), about, peers=peers, uncompiled=False)


def _about_model(subject: Forward) -> str:
    dtype = str(subject.dtype).removeprefix("torch.")
    return f"{subject.model}, {subject.kind}, {subject.about}, {dtype}, few layers, random weights"


def _about(subject: Pass) -> str:
    kind = "training step (forward, backward, AdamW)" if subject.training else "prefill (fills a cache, no head)"
    dtype = str(subject.dtype).removeprefix("torch.")
    if subject.training and subject.dtype != torch.float32:
        dtype = f"float32 under {dtype} autocast"
    mask = "attention_mask given" if subject.mask else "no attention_mask"
    padding = f", {subject.padded} positions of left padding in one sequence" if subject.padded else ""
    return f"{kind}, {subject.batch} x {subject.tokens} tokens, {mask}{padding}, {dtype}; {LLAMA_TEXT}"


def _cases() -> dict[str, Case]:
    t5 = "one layer of a T5 encoder, 4 heads, D 64, an eighth of the keys padded"
    beit = (
        "one layer of a BEiT, 8 heads, D 64, a relative position for each row and key (the model's index of them stays)"
    )
    alone = "attention alone, B 1, H 8, Hkv 2, D 64, an eighth of the keys padded"
    return {
        **dict(_llama()),
        **dict(_models()),
        **dict(_sparse()),
        "growth-longformer": Growth(
            Sparse("longformer", Growth.lengths[-1], training=True, dtype=torch.float32),
            "A window of 256 to both sides, and the first 64 tokens everywhere: attention alone, forward and gradients of q, k, v, "
            "B 1, H 8, D 64, torch.float32; eager's scores would take 128 GiB at 65,536 tokens",
        ),
        "compile": Compile(Target("at most", 1.15), Target("at most", 0.5), "the model of examples/demo.py"),
        "memory-forward-fp32": Memory(torch.float32, False, f"{alone}, forward, float32"),
        "memory-forward-bf16": Memory(torch.bfloat16, False, f"{alone}, forward, bfloat16"),
        "memory-training-fp32": Memory(torch.float32, True, f"{alone}, forward and backward, float32"),
        "memory-t5-forward": Memory(torch.float32, False, f"{t5}, forward, float32", t5_call),
        "memory-t5-training": Memory(torch.float32, True, f"{t5}, forward and backward, float32", t5_call),
        "memory-beit-forward": Memory(torch.float32, False, f"{beit}, forward, float32", beit_call, judged=False),
        "memory-beit-training": Memory(
            torch.float32, True, f"{beit}, forward and backward, float32", beit_call, judged=False
        ),
        "overhead-forward": Overhead(False, "operator alone, B 1, H 1, N 16, D 16, forward"),
        "overhead-training": Overhead(True, "operator alone, B 1, H 1, N 16, D 16, forward, recorded for backward"),
    }


CASES = _cases()
