"""The dropout mask as a function of a seed and a cell's coordinates (b, h, m, n).

The mask of a cell does not depend on sizes, on blocking or on the order of computation, so that the backward, a checkpoint's
recomputation and every tiling see the same one.  Two 32-bit hashes of the row and two of the key are multiplied together;
a cell is dropped where the product, as a signed number, is below a threshold.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_GOLDEN: Final = -0x61C8864680B583EB
_MIX: Final = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


def threshold(p: float) -> int:
    """A product below this, of all the 2³² signed ones, is dropped."""
    return min(round(p * 2**32) - 2**31, 2**31 - 1)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of int64 in which every bit of the argument changes half of the bits of the result."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of int64 as int32."""
    pair = x.contiguous().view(torch.int32).view(*x.shape, 2)
    return pair[..., 0], pair[..., 1]


def rows(seed: Tensor, b: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The hashes of rows: the first even, the second any; int32 in the broadcast shape of the index tensors."""
    x = _mixed(seed.reshape(()) + _GOLDEN)
    for index in (b, h, m):
        x = _mixed(x + (index + 1) * _GOLDEN)
    low, high = _halves(x)
    return low & ~1, high


def keys(seed: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The hashes of keys: the first odd, the second any; int32 in the shape of `n`."""
    low, high = _halves(_mixed(_mixed(seed.reshape(()) ^ _GOLDEN) - (n + 1) * _GOLDEN))
    return low | 1, high


def dropped(row: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], p: float) -> Tensor:
    """Which cells are dropped: bool, in the broadcast shape of row and key hashes."""
    product = (row[0] ^ key[0]).mul_(row[1] + key[1])
    return product < threshold(p)


def keep(seed: Tensor, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """The cells that are kept of a whole attention of shape (B, H, M, N); for the reference and for tests."""
    b, h, m, n = (
        torch.arange(size, device=seed.device).view([-1 if at == dim else 1 for dim in range(4)])
        for at, size in enumerate(shape)
    )
    return ~dropped(rows(seed, b, h, m), keys(seed, n), p)
