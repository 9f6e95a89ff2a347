"""Differential attention, (w1 - c·w2) @ v under a causal mask: as a model has it, compiled by stock Inductor and by attnfuse.

    python -m benchmarks.summed

Why a sum of weights is made an attention for each of them, and from which size on (AF031). Prints the median times, in turn, and
the speed relative to stock's.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.weights import seconds

HEADS, DEPTH = 8, 64
TOKENS = (128, 256, 512, 1024, 2048)


def difference(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> tuple[Tensor]:
    """q and k [B, 2·H, N, D], the heads of a pair side by side; v [B, H, N, 2·D]."""
    B, H, N, D = q.shape
    scores = (q @ k.mT * D**-0.5).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1).view(B, H // 2, 2, N, N)
    return ((weights[:, :, 0] - factor * weights[:, :, 1]) @ v,)


def main() -> None:
    table = Table("type", "tokens", "pass", "stock, ms", "attnfuse, ms", "speed")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            for training in (False, True):
                q, k = (torch.randn(1, 2 * HEADS, tokens, DEPTH, dtype=dtype) for _ in range(2))
                v, factor = torch.randn(1, HEADS, tokens, 2 * DEPTH, dtype=dtype), torch.tensor(0.8, dtype=dtype)
                given = tuple(x.requires_grad_(training) for x in (q, k, v, factor))
                torch._dynamo.reset()
                ways = [
                    torch.compile(difference, dynamic=False),
                    # whatever the size
                    torch.compile(difference, dynamic=False, backend="attnfuse", options={"inline_scores": 0}),
                ]
                with torch.set_grad_enabled(training):
                    stock, own = (way(*given)[0] for way in ways)
                    torch.testing.assert_close(own, stock, rtol=0.05, atol=0.05)
                    times = seconds(ways, given, training)
                name = str(dtype).removeprefix("torch.")
                shown = [f"{1000 * x:.1f}" for x in times]
                table.add_row(
                    name, str(tokens), "train" if training else "infer", *shown, f"{times[0] / times[1]:.2f}x"
                )
    Console().print(table)


if __name__ == "__main__":
    main()
