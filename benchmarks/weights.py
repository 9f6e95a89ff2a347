"""Attention whose weights are asked for too: as the model has it, against a kernel with the weights computed beside it.

    python -m benchmarks.weights

Why AF037 declines. Prints the median time of both, and the speed of the second relative to the first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

TOKENS: Final = (256, 1024, 2048)
ROUNDS: Final = 15
Attention = Callable[..., tuple[Tensor, ...]]


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT * 0.125).softmax(-1)
    return weights @ v, weights


def beside(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The fused output with its log-sum-exp, and what the weights are by that."""
    out, lse = _fused(q, k, v)
    return out, _weights(q, k, lse)


@torch.compile(backend="attnfuse")
def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.125
    return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)


@torch.compile
def _weights(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    return torch.exp(q @ k.mT * 0.125 - lse)


def seconds(attentions: Sequence[Attention], given: tuple[Tensor, ...], training: bool) -> list[float]:
    """The median time of each, of rounds in turn."""
    samples: list[list[float]] = [[] for _ in attentions]
    for turn in range(ROUNDS + 2):
        for attention, times in zip(attentions, samples, strict=True):
            start = time.perf_counter()
            out, *_ = attention(*given)
            if training:
                torch.autograd.backward(out.sum())
            if turn > 1:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in samples]


def main() -> None:
    table = Table("type", "tokens", "pass", "plain, ms", "with a kernel, ms", "speed")
    compiled = torch.compile(plain)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            for training in (False, True):
                given = tuple(torch.randn(1, 8, tokens, 64, dtype=dtype, requires_grad=training) for _ in range(3))
                with torch.set_grad_enabled(training):
                    one, other = seconds((compiled, beside), given, training)
                name = str(dtype).removeprefix("torch.")
                times = (f"{1000 * one:.1f}", f"{1000 * other:.1f}", f"{one / other:.2f}x")
                table.add_row(name, str(tokens), "training" if training else "inference", *times)
    Console().print(table)


if __name__ == "__main__":
    main()
