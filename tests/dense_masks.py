"""Masks of the literature as model code builds them: dense tensors made of comparisons, triangles, gathers, outer products.

Each function takes the length and what the model has besides q, k and v, and gives a mask: truth values, or floats to add.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

N = 256
B, H, D = 2, 4, 16


class DenseMask(NamedTuple):
    """How a mask is built, from what, and the program that it is proven to be."""

    build: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    program: str


def attention(mask: DenseMask) -> Callable[..., Tensor]:
    """Attention under the mask, of q, k and v in one projection [B, N, 3·H·D] and of what the mask is built from."""

    def run(x: Tensor, *given: Tensor) -> Tensor:
        q, k, v = x.view(x.shape[0], -1, 3, H, D).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.build(x.shape[1], *given))

    return run


def _nothing() -> tuple[Tensor, ...]:
    return ()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _flags() -> tuple[Tensor, ...]:
    """Attention masks as Longformer takes them: 2 for global tokens, 1 for others."""
    flags = torch.ones(B, N, dtype=torch.long)
    flags[:, :3] = 2
    flags[1, 100] = 2
    return (flags,)


def _tokens() -> tuple[Tensor, ...]:
    """Token ids with an end of text here and there."""
    tokens = torch.randint(5, 50, (B, N), generator=_generator())
    tokens[0, [40, 90, 200]] = 2
    tokens[1, [10, 180]] = 2
    return (tokens,)


def _hidden() -> tuple[Tensor, ...]:
    """Hidden states, and the rotations of two rounds of hashing."""
    x = torch.randn(B, N, 16, generator=_generator()).cumsum(1)
    return x, torch.randn(16, 2, 4, generator=_generator())


def _positions() -> tuple[Tensor, ...]:
    return (torch.arange(N) // 2,)


def _padding() -> tuple[Tensor, ...]:
    """1 for tokens, 0 for padding, on the left."""
    return ((torch.arange(N) >= torch.tensor([[0], [60]])).long(),)


def _lengths() -> tuple[Tensor, ...]:
    return (torch.tensor([N // 2, 30]),)


def _bools() -> tuple[Tensor, ...]:
    return ((torch.arange(N)[:, None] - torch.arange(N)).abs() < 50,)


def _floats() -> tuple[Tensor, ...]:
    near = (torch.arange(N)[:, None] - torch.arange(N)).abs() < 50
    return (torch.zeros(N, N).masked_fill(~near, -torch.inf),)


def _blocks() -> tuple[Tensor, ...]:
    return (torch.rand(H, N // 32, N // 32, generator=_generator()) < 0.2,)


def sliding_window(length: int) -> Tensor:
    return torch.ones(length, length).tril().bool() & ~torch.ones(length, length).tril(-64).bool()


def additive_window(length: int) -> Tensor:
    i = torch.arange(length)
    outside = (i[None] > i[:, None]) | (i[:, None] - i[None] >= 64)
    return torch.full((length, length), -torch.inf).masked_fill(~outside, 0.0)


def longformer(length: int, flags: Tensor) -> Tensor:
    i = torch.arange(length)
    band = (i[:, None] - i[None]).abs() <= 32
    everywhere = flags == 2
    return (band | everywhere[:, None] | everywhere[:, :, None])[:, None]


def dilated(length: int) -> Tensor:
    i = torch.arange(length)
    distance = i[:, None] - i[None]
    step = torch.arange(1, H + 1)[:, None, None]
    return (distance.abs() <= 16 * step) & (distance % step == 0)


def big_bird(length: int, chosen: Tensor) -> Tensor:
    block = torch.arange(length) // 32
    row, key = block[:, None], block[None]
    last = length // 32 - 1
    ends = (row == 0) | (key == 0) | (row == last) | (key == last)
    drawn = chosen.repeat_interleave(32, 1).repeat_interleave(32, 2)
    return ((row - key).abs() <= 1) | ends | drawn


def strided(length: int) -> Tensor:
    i = torch.arange(length)
    distance = i[:, None] - i[None]
    return (distance >= 0) & ((distance < 32) | (distance % 32 == 0))


def fixed(length: int) -> Tensor:
    i = torch.arange(length)
    row, key = i.unsqueeze(1), i.unsqueeze(0)
    return (key <= row) & ((torch.div(row, 64, rounding_mode="floor") == key // 64) | (key % 64 >= 56))


def hashed(length: int, x: Tensor, rotations: Tensor) -> Tensor:
    turned = torch.einsum("bnd,drk->brnk", x, rotations)
    buckets = torch.cat((turned, -turned), -1).argmax(-1)
    same = buckets[:, :, :, None] == buckets[:, :, None, :]
    return same.any(1)[:, None] & torch.ones(length, length, dtype=torch.bool).tril()


def prefix(length: int, ends: Tensor) -> Tensor:
    i = torch.arange(length)
    return ((i[None] <= i[:, None]) | (i < ends[:, None, None]))[:, None]


def packed(length: int, tokens: Tensor) -> Tensor:
    ends = tokens == 2
    document = ends.cumsum(-1) - ends.long()
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def chunked(length: int) -> Tensor:
    i = torch.arange(length)
    return (i // 64 == (i // 64)[:, None]) & (i <= i[:, None])


def sinks_and_window(length: int) -> Tensor:
    i = torch.arange(length)
    causal = i[None] <= i[:, None]
    return causal & ((i[None] < 4) | (i[None] > i[:, None] - 32))


def static_cache(length: int, position: Tensor) -> Tensor:
    mask = torch.full((length, length), torch.finfo(torch.float32).min)
    mask = mask * (torch.arange(length) > position.reshape(-1, 1))
    return mask[None, None].expand(B, 1, -1, -1)


def left_padding(length: int, mask: Tensor) -> Tensor:
    outer = mask[:, None, :, None] * mask[:, None, None, :]
    return (outer > 0) & torch.ones(length, length, dtype=torch.bool).tril()


def given_bools(length: int, mask: Tensor) -> Tensor:
    return mask


def given_floats(length: int, mask: Tensor) -> Tensor:
    return mask


DENSE_MASKS: dict[str, DenseMask] = {
    "sliding window": DenseMask(sliding_window, _nothing, "s*0.25 where n <= m & n > m - 64 else 0row"),
    "additive window": DenseMask(additive_window, _nothing, "s*0.25 where ~(n > m | n <= m - 64) else 0row"),
    "Longformer": DenseMask(longformer, _flags, "s*0.25 where abs(m - n) <= 32 | pad[b, n] | pad[b, m] else 0row"),
    "Longformer, dilated": DenseMask(
        dilated, _nothing, "s*0.25 where abs(m - n) <= h*16 + 16 & (m - n) % (h + 1) == 0 else 0row"
    ),
    "BigBird": DenseMask(
        big_bird,
        _blocks,
        "s*0.25 where abs(m // 32 - n // 32) <= 1 | (m // 32 == 0 | n // 32 == 0 | m // 32 == 7 | n // 32 == 7) | mask[h, m // 32, n // 32] else 0row",
    ),
    "strided": DenseMask(strided, _nothing, "s*0.25 where n <= m & (n > m - 32 | (m - n) % 32 == 0) else 0row"),
    "fixed": DenseMask(fixed, _nothing, "s*0.25 where n <= m & (m // 64 == n // 64 | n % 64 >= 56) else 0row"),
    "LSH, two rounds": DenseMask(
        hashed, _hidden, "s*0.25 where (pos[b, 0, m] == pos[b, 0, n] | pos[b, 1, m] == pos[b, 1, n]) & n <= m else 0row"
    ),
    "prefix": DenseMask(prefix, _lengths, "s*0.25 where n <= m | n < pos[b] else 0row"),
    "packed documents": DenseMask(packed, _tokens, "s*0.25 where pos[b, m] == pos[b, n] & n <= m else 0row"),
    "chunks": DenseMask(chunked, _nothing, "s*0.25 where n // 64 == m // 64 & n <= m else 0row"),
    "sinks and window": DenseMask(sinks_and_window, _nothing, "s*0.25 where n <= m & (n < 4 | n > m - 32) else 0row"),
    "static cache": DenseMask(static_cache, _positions, "s*0.25 where ~n > pos[m] else +min"),
    "left padding": DenseMask(left_padding, _padding, "s*0.25 where pos[b, m]*pos[b, n] > 0 & n <= m else 0row"),
    "dense bool": DenseMask(given_bools, _bools, "s*0.25 where mask[m, n] else 0row"),
    "dense additive": DenseMask(given_floats, _floats, "s*0.25 + bias[m, n] where bias[m, n] != -inf else 0row"),
}
