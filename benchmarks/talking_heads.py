"""Talking heads, scores and weights mixed over heads by a matrix each: as a model has them, against two ways to keep memory linear.

    python -m benchmarks.talking_heads

Why AF038 declines. `wide` is an IO-aware kernel over heads of H·D: a sum over heads of scores is one product of the heads side by
side, and mixed weights times v are a sum of all H² products of weights and values. `in blocks` is the model's own arithmetic over
blocks of rows. Prints the median times, in turn, and the speed relative to the model's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.weights import seconds

HEADS, DEPTH = 8, 48
TOKENS = (196, 576, 1024)
ROWS = 64


def plain(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor]:
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), before).permute(0, 3, 1, 2)
    weights = F.linear(scores.softmax(-1).permute(0, 2, 3, 1), after).permute(0, 3, 1, 2)
    return (weights @ v,)


def wide(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor]:
    B, H, N, D = q.shape
    mixed = (before[:, :, None, None] * q[:, None]).transpose(2, 3).reshape(B, H, N, H * D)
    keys, values = (x.transpose(1, 2).reshape(B, 1, N, H * D).expand(B, H, N, H * D) for x in (k, v))
    out = F.scaled_dot_product_attention(mixed, keys, values, scale=1.0)
    return (torch.einsum("hg,bgnhd->bhnd", after, out.view(B, H, N, H, D)),)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor]:
    return (torch.cat([plain(rows, k, v, before, after)[0] for rows in q.split(ROWS, 2)], 2),)


def main() -> None:
    table = Table("type", "tokens", "pass", "plain, ms", "wide, ms", "speed", "in blocks, ms", "speed")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            for training in (False, True):
                qkv = tuple(torch.randn(1, HEADS, tokens, DEPTH, dtype=dtype) for _ in range(3))
                mixing = tuple(torch.randn(HEADS, HEADS, dtype=dtype) / HEADS**0.5 for _ in range(2))
                qkv[0].mul_(DEPTH**-0.5)
                given = tuple(x.requires_grad_(training) for x in (*qkv, *mixing))
                torch._dynamo.reset()
                ways = [torch.compile(way, dynamic=False) for way in (plain, wide, in_blocks)]
                with torch.set_grad_enabled(training):
                    results = [way(*given)[0] for way in ways]
                    for other in results[1:]:
                        torch.testing.assert_close(other, results[0], rtol=0.05, atol=0.05)
                    own, *others = seconds(ways, given, training)
                more = [text for x in others for text in (f"{1000 * x:.1f}", f"{own / x:.2f}x")]
                name = str(dtype).removeprefix("torch.")
                table.add_row(name, str(tokens), "train" if training else "infer", f"{1000 * own:.1f}", *more)
    Console().print(table)


if __name__ == "__main__":
    main()
