"""What `make gpu` measures, most important first, and the targets that it is held to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import stats
from benchmarks.cases import Outcome, Row
from benchmarks.gpu import attention, timing
from benchmarks.gpu.attention import KINDS, Call, Kind, Size
from benchmarks.gpu.models import MODELS, Model
from benchmarks.stats import Target

SAMPLES = 15


@cache
def roof() -> float:
    """FLOP/s of a large bf16 matrix product here."""
    return timing.matmul_flops()


@cache
def bandwidth() -> float:
    """Bytes a second of a large copy here."""
    return timing.copy_bandwidth()


def _peers(kind: Kind, size: Size, *, slow: bool) -> Iterator[tuple[str, Callable[[], Call | None]]]:
    yield "attnfuse", lambda: attention.ours(kind, size)
    yield "library", lambda: attention.sdpa(kind, size, None)
    yield "cudnn", lambda: attention.sdpa(kind, size, SDPBackend.CUDNN_ATTENTION)
    yield "flash", lambda: attention.sdpa(kind, size, SDPBackend.FLASH_ATTENTION)
    yield "efficient", lambda: attention.sdpa(kind, size, SDPBackend.EFFICIENT_ATTENTION)
    yield "flex", lambda: attention.flex(kind, size)
    yield "stock-sdpa", lambda: attention.stock_sdpa(kind, size)
    if slow:
        yield "eager", lambda: attention.eager(kind, size)


@dataclass(frozen=True)
class Kernels:
    """Attention alone: a forward, or a backward, of each way to compute it.

    Args:
        flops: target for attnfuse's FLOP/s in TFLOP/s.
        ratios: targets for attnfuse's speed over peers, by their name.
        share: target for the share of a copy's bandwidth, in decoding.
    """

    kind: str
    size: Size
    backward: bool = False
    flops: float | None = None
    ratios: tuple[tuple[str, float], ...] = ()
    share: float | None = None

    @property
    def about(self) -> str:
        what = "backward" if self.backward else "decode" if self.size.M == 1 else "forward"
        return f"{self.kind} attention, {what}, {self.size}, bf16"

    @property
    def name(self) -> str:
        what = "backward" if self.backward else "decode" if self.size.M == 1 else "forward"
        return f"{what}-{self.kind}-{str(self.size).replace(' ', '-').replace('/', 'over')}".lower()

    def measure(self) -> Outcome:
        kind, size = KINDS[self.kind], self.size
        small = replace(
            size, B=min(size.B, 2), M=min(size.M, 512), N=min(size.N, 512), H=min(size.H, 2 * size.H // size.Hkv)
        )
        small = replace(small, Hkv=small.H * size.Hkv // size.H)
        fault = attention.wrong(attention.ours(kind, small), kind, small)
        if fault:
            return Outcome((Row("attnfuse", "TFLOP/s", None, None, "wrong results", fault),))
        tensors = size.tensors(grad=self.backward)
        runs: dict[str, Callable[[], object]] = {}
        for name, make in _peers(kind, size, slow=size.M * size.N * size.H * size.B <= 1 << 32):
            run = _ready(make, tensors, backward=self.backward)
            if run is not None:
                runs[name] = run
        samples = timing.seconds(runs, SAMPLES, graphs=not self.backward)
        work = attention.flops(kind, size) * (2.5 if self.backward else 1.0)
        rows = []
        for name, times in samples.items():
            target = Target("at least", self.flops) if name == "attnfuse" and self.flops else None
            rate = stats.median([work / t / 1e12 for t in times])
            note = f"{timing.median(times) * 1e3:.3f} ms, {rate.value * 1e12 / roof():.0%} of a matrix product"
            rows.append(replace(Row.of(name, "TFLOP/s", rate, target), note=note))
        for peer, least in self.ratios:
            if peer in samples:
                ratio = stats.speed_up(samples["attnfuse"], samples[peer])
                rows.append(Row.of(f"attnfuse over {peer}", "x", ratio, Target("at least", least)))
        if "library" in samples and "cudnn" in samples:
            # what plain attention becomes in a compiled graph
            ratio = stats.speed_up(samples["library"], samples["cudnn"])
            rows.append(Row.of("library over cudnn", "x", ratio, Target("at least", 0.97)))
        if size.M == 1:
            moved = 2.0 * 2 * size.B * size.Hkv * size.N * size.D
            share = stats.median([moved / t / bandwidth() for t in samples["attnfuse"]])
            target = Target("at least", self.share) if self.share else None
            rows.append(Row.of("attnfuse, share of a copy's bandwidth", "x", share, target))
        return Outcome(tuple(rows), samples)


def _ready(make: Callable[[], Call | None], tensors: list[Tensor], *, backward: bool) -> Callable[[], object] | None:
    """A forward, or a backward, to time; None where a peer does not take the case."""
    try:
        call = make()
        if call is None:
            return None
        if not backward:

            def forward() -> Tensor:
                with torch.no_grad():
                    return call(*tensors)

            forward()
            return forward
        out = call(*tensors)
        dout = torch.randn_like(out)
        run = lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)  # noqa: E731
        run()
        return run
    except (RuntimeError, NotImplementedError, torch.OutOfMemoryError):
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
        return None


@dataclass(frozen=True)
class Memory:
    """Most memory of a causal, padded attention, forward and backward, against eager's."""

    tokens: int
    least: float

    @property
    def name(self) -> str:
        return f"memory-n{self.tokens}"

    @property
    def about(self) -> str:
        return f"padded attention, forward and backward, B1 H16 N{self.tokens} D64, bf16, peak memory"

    def measure(self) -> Outcome:
        kind, size = KINDS["padded"], Size(1, 16, 16, self.tokens, self.tokens, 64)
        tensors = size.tensors(grad=True)

        def bytes_of(call: Call) -> float:
            return float(timing.peak_bytes(lambda: torch.autograd.grad(call(*tensors).sum(), tensors)))

        samples = {"attnfuse": [bytes_of(attention.ours(kind, size))], "eager": [bytes_of(attention.eager(kind, size))]}
        ratio = stats.speed_up(samples["attnfuse"], samples["eager"])
        return Outcome((Row.of("memory of eager over attnfuse", "x", ratio, Target("at least", self.least)),), samples)


@dataclass(frozen=True)
class GPT2Attention:
    """Forward and backward together on GPT-2's shape against eager: FlashAttention's own headline."""

    name = "gpt2-attention"
    about = "causal attention, forward and backward, B16 H16 N1024 D64, bf16"

    def measure(self) -> Outcome:
        kind, size = KINDS["causal"], Size(16, 16, 16, 1024, 1024, 64)
        tensors = size.tensors(grad=True)
        dout = torch.randn(16, 16, 1024, 64, device="cuda", dtype=torch.bfloat16)

        def both(call: Call) -> Callable[[], object]:
            return lambda: torch.autograd.grad(call(*tensors), tensors, dout)

        runs = {"attnfuse": both(attention.ours(kind, size)), "eager": both(attention.eager(kind, size))}
        samples = timing.seconds(runs, SAMPLES)
        ratio = stats.speed_up(samples["attnfuse"], samples["eager"])
        return Outcome((Row.of("attnfuse over eager", "x", ratio, Target("at least", 7.6)),), samples)


@dataclass(frozen=True)
class WholeModel:
    """A model's pass against eager and stock `torch.compile`, each with both of transformers' attentions."""

    model: Model
    over_eager: float | None = None

    @property
    def name(self) -> str:
        kind = "training" if self.model.training else "prefill"
        return f"model-{kind}-{self.model.name.partition(',')[0].replace(' ', '-')}".lower()

    @property
    def about(self) -> str:
        return self.model.about

    def measure(self) -> Outcome:
        from attnfuse.backend import attnfuse

        variants: dict[str, tuple[str, object]] = {
            "eager": ("eager", None),
            "eager-sdpa": ("sdpa", None),
            "stock-eager": ("eager", "inductor"),
            "stock-sdpa": ("sdpa", "inductor"),
            "attnfuse": ("eager", attnfuse),
            "attnfuse-sdpa": ("sdpa", attnfuse),
        }
        started = {name: self.model.start(*variants[name]) for name in ("eager", "attnfuse")}
        found = {name: results() for name, (_, results) in started.items()}
        for name, original in found["eager"].items():
            # both are in bf16: an error of the same kind, not of another size
            allowed = 32 * torch.finfo(torch.bfloat16).eps * float(original.abs().max())
            worst = float((found["attnfuse"][name].double() - original.double()).abs().max())
            if not worst <= allowed:
                note = f"{name}: differs from eager by {worst:.3g}, allowed is {allowed:.3g}"
                return Outcome((Row("attnfuse", "x", None, None, "wrong results", note),))
        samples: dict[str, list[float]] = {}
        for name, variant in variants.items():
            try:
                run, _ = started.pop(name, None) or self.model.start(*variant)
                samples |= timing.seconds({name: run}, SAMPLES)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        rows = [Row.of(name, "ms", stats.median([t * 1e3 for t in times]), None) for name, times in samples.items()]
        ours = min(("attnfuse", "attnfuse-sdpa"), key=lambda name: timing.median(samples[name]))
        for peer, least in (("eager", self.over_eager), ("stock-eager", None), ("stock-sdpa", None)):
            if peer in samples:
                ratio = stats.speed_up(samples[ours], samples[peer])
                rows.append(Row.of(f"{ours} over {peer}", "x", ratio, Target("at least", least) if least else None))
        return Outcome(tuple(rows), samples)


Case = Kernels | Memory | GPT2Attention | WholeModel

_MASKED = (("flex", 1.3), ("stock-sdpa", 3.0))


def _cases() -> Iterator[Case]:
    wide = Size(2, 16, 16, 8192, 8192, 128)
    yield Kernels("full", wide, flops=460)
    yield Kernels("causal", wide, flops=400)
    yield Kernels("full", wide, backward=True, flops=340)
    yield Kernels("causal", wide, backward=True)
    grouped = Size(2, 32, 8, 8192, 8192, 64)
    for kind in ("window", "document", "alibi", "softcap", "padded"):
        yield Kernels(kind, grouped, ratios=_MASKED)
    for length, batch in ((16384, 4), (65536, 1), (32768, 8)):
        yield Kernels("causal", Size(batch, 32, 8, 1, length, 128), share=0.8)
    yield GPT2Attention()
    yield WholeModel(MODELS[0], over_eager=3.0)
    yield Memory(2048, 10.0)
    yield Memory(4096, 20.0)
    yield WholeModel(MODELS[1])
    yield WholeModel(MODELS[2])
    for kind in ("window", "padded", "softcap"):
        yield Kernels(kind, grouped, backward=True, ratios=(("flex", 1.3),))
    for model in MODELS[3:]:
        yield WholeModel(model)
    for depth in (64, 256):
        for kind in ("full", "causal"):
            yield Kernels(kind, Size(2, 2048 // depth, 2048 // depth, 8192, 8192, depth))
    for length in (1024, 2048, 4096, 16384):
        for kind in ("full", "causal"):
            yield Kernels(kind, Size(16384 // length, 16, 16, length, length, 128))


CASES: dict[str, Case] = {case.name: case for case in _cases()}
