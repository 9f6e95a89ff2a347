"""Attention alone under sparse masks: dense PyTorch masks as a model builds them, and FlexAttention with the same mask by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.subjects import Variant

B, H, D = 1, 8, 64


def window(document: Tensor) -> Tensor:
    """The last 512 keys."""
    i = torch.arange(document.shape[1])
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < 512)


def packed(document: Tensor) -> Tensor:
    """Causal within a document."""
    i = torch.arange(document.shape[1])
    return ((document[:, :, None] == document[:, None, :]) & (i[None] <= i[:, None]))[:, None]


def longformer(document: Tensor) -> Tensor:
    """A window of 256 to both sides, and the first 64 tokens everywhere."""
    i = torch.arange(document.shape[1])
    return ((i[:, None] - i[None]).abs() <= 256) | (i[None] < 64) | (i[:, None] < 64)


def documents(length: int) -> Tensor:
    """Ids of documents of 100 to 2,000 tokens, in order."""
    lengths = torch.randint(100, 2000, (length // 100,), generator=torch.Generator().manual_seed(3))
    return torch.arange(len(lengths)).repeat_interleave(lengths)[:length][None]


def unsorted(document: Tensor) -> Tensor:
    """Causal among the tokens of one of 16 ids at random."""
    return packed(document)


def unsorted_full(document: Tensor) -> Tensor:
    """All tokens of one of 64 ids at random."""
    return (document[:, :, None] == document[:, None, :])[:, None]


def _at_random(count: int) -> Callable[[int], Tensor]:
    return lambda length: torch.randint(count, (1, length), generator=torch.Generator().manual_seed(3))


def _window_mod(document: Tensor) -> Any:
    return lambda b, h, m, n: (n <= m) & (m - n < 512)


def _packed_mod(document: Tensor) -> Any:
    return lambda b, h, m, n: (document[b, m] == document[b, n]) & (n <= m)


def _longformer_mod(document: Tensor) -> Any:
    return lambda b, h, m, n: ((m - n).abs() <= 256) | (n < 64) | (m < 64)


def _same_mod(document: Tensor) -> Any:
    return lambda b, h, m, n: document[b, m] == document[b, n]


class Mask(NamedTuple):
    """A mask as a dense tensor of the ids of documents, as FlexAttention takes it, and the ids for a length."""

    build: Callable[[Tensor], Tensor]
    by_index: Callable[[Tensor], Any]
    ids: Callable[[int], Tensor] = documents


MASKS = {
    "window": Mask(window, _window_mod),
    "packed": Mask(packed, _packed_mod),
    "longformer": Mask(longformer, _longformer_mod),
    "unsorted": Mask(unsorted, _packed_mod, _at_random(16)),
    "unsorted-full": Mask(unsorted_full, _same_mod, _at_random(64)),
}


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q @ k.mT * D**-0.5).masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(q.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass(frozen=True)
class Sparse:
    """Attention under one of `MASKS`, its mask built in the call; FlexAttention's block mask is built once before.

    Args:
        training: the gradients of q, k and v too.
    """

    mask: str
    length: int
    training: bool
    dtype: torch.dtype
    attentions: ClassVar = ("eager", "sdpa")

    checked: ClassVar = 1024
    """The length at which results are compared: a dense one in float64 takes gigabytes at the others."""

    def start(self, variant: Variant) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
        """What to time, and what gives the results to compare."""
        results = replace(self, length=self.checked).step(variant)
        names = ("out", "dq", "dk", "dv")

        def named() -> dict[str, Tensor]:
            return {name: x.detach() for name, x in zip(names, results(), strict=False)}

        return (results if variant.exact else self.step(variant)), named

    def step(self, variant: Variant) -> Callable[[], list[Tensor]]:
        """The output, and the gradients where they are wanted."""
        dtype = torch.float64 if variant.exact else self.dtype
        q, k, v = (x.to(dtype).requires_grad_(self.training) for x in self.operands())
        call = self.call(variant)

        def run() -> list[Tensor]:
            out = call(q, k, v)
            return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))] if self.training else [out]

        return run

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, N, D]."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, self.length, H, D, generator=generator).to(self.dtype) for _ in range(3))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def some(self, rows: Tensor, keys: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Rows of the output and of the gradient of q, and keys of those of k and v, for a gradient of ones of the output: by plain
        operators in that type, from the mask by index.
        """
        q, k, v = (x.to(dtype) for x in self.operands())
        _, by_index, ids = MASKS[self.mask]
        allowed, every = by_index(ids(self.length)), torch.arange(self.length)

        def attend(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Of rows: the weights, the output, the gradient of the scores."""
            cells = allowed(0, 0, m[:, None], every).expand(len(m), -1)
            weights = (q[:, :, m] @ k.mT * D**-0.5).masked_fill(~cells, -torch.inf).softmax(-1)
            out = weights @ v
            return weights, out, weights * (v.sum(-1)[:, :, None] - out.sum(-1, keepdim=True)) * D**-0.5

        _, out, scores = attend(rows)
        dk, dv = [], []
        for key in keys:
            m = every[allowed(0, 0, every, key).expand(self.length)]
            weights, _, of_scores = attend(m)
            column = of_scores[..., key]
            dk.append((column[..., None] * q[:, :, m]).sum(2))
            dv.append(weights[..., key].sum(2, keepdim=True).expand(-1, -1, D))
        return {"out": out, "dq": scores @ k, "dk": torch.stack(dk, 2), "dv": torch.stack(dv, 2)}

    def call(self, variant: Variant) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of q, k and v as a variant computes it."""
        build, _, ids = MASKS[self.mask]
        document = ids(self.length)
        if variant.attention == "flex":
            blocks = self.block_mask()
            compiled = torch.compile(flex_attention, dynamic=False)
            return lambda q, k, v: compiled(q, k, v, block_mask=blocks)  # type: ignore[return-value]
        spelled = eager if variant.attention == "eager" else sdpa

        def attention(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
            return spelled(q, k, v, build(document))

        run = attention if variant.backend is None else torch.compile(attention, backend=variant.backend, dynamic=False)
        return lambda q, k, v: run(q, k, v, document)

    def block_mask(self) -> BlockMask:
        """FlexAttention's description of the mask."""
        _, by_index, ids = MASKS[self.mask]
        return create_block_mask(by_index(ids(self.length)), B, None, self.length, self.length, device="cpu")

    def seconds_of_block_mask(self) -> float:
        """What that takes; it is not in the times of the calls."""
        start = time.perf_counter()
        self.block_mask()
        return time.perf_counter() - start
