"""Masks of the literature in the score language, with the leaves that they read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attnfuse.spec import Shape
from attnfuse.templates import launch, tile_lists
from attnfuse.templates.base import Tiles


class SparseMask(NamedTuple):
    """A mask and what it reads.

    Args:
        declared: its leaves, as a spec declares them.
        proven: whether tiles are expected to be as few as brute force finds; else bounds are known to be looser.
    """

    mask: str
    declared: str = ""
    leaves: Callable[[Shape], tuple[Tensor, ...]] = lambda _: ()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _global(shape: Shape) -> tuple[Tensor, ...]:
    """A few global tokens at the start and one in the middle."""
    chosen = torch.zeros(shape.B, shape.N, dtype=torch.bool)
    chosen[:, :2] = True
    chosen[:, shape.N // 2] = True
    return (chosen,)


def _random_blocks(shape: Shape) -> tuple[Tensor, ...]:
    """Each block of 32 rows looks at two blocks of keys of its own in every head."""
    blocks = -(-shape.N // 32)
    scores = torch.rand((shape.H, blocks, blocks), generator=_generator())
    return (scores >= scores.topk(2, -1).values[..., -1:],)


def _documents(shape: Shape) -> tuple[Tensor, ...]:
    """Sorted ids of documents of uneven lengths, others in each batch."""
    ends = torch.rand((shape.B, shape.N), generator=_generator()) < 8 / shape.N
    return (ends.long().cumsum(1),)


def _groups(shape: Shape) -> tuple[Tensor, ...]:
    """Ids in no order."""
    return (torch.randint(4, (shape.B, shape.N), generator=_generator()),)


def _buckets(shape: Shape) -> tuple[Tensor, ...]:
    """Two rounds of LSH buckets, argmax of [xR; -xR], of tokens whose neighbours are alike."""
    x = torch.randn((shape.B, shape.N, 16), generator=_generator()).cumsum(1)
    rounds = []
    for _ in range(2):
        turned = x @ torch.randn((16, 4), generator=_generator())
        rounds.append(torch.cat((turned, -turned), -1).argmax(-1))
    return tuple(rounds)


def _left(shape: Shape) -> tuple[Tensor, ...]:
    return (torch.arange(shape.N) >= torch.arange(shape.B)[:, None] * shape.N // 3,)


def _dense(shape: Shape) -> tuple[Tensor, ...]:
    """A band and a corner, from nowhere that a compiler could see."""
    m, n = torch.arange(shape.M)[:, None], torch.arange(shape.N)
    return (((m - n).abs() < 40) | ((m > 9 * shape.M // 10) & (n < 20)),)


def _prefix(shape: Shape) -> tuple[Tensor, ...]:
    return (torch.tensor([shape.N // 4, shape.N // 3])[: shape.B],)


SPARSE_MASKS: dict[str, SparseMask] = {
    "sliding window": SparseMask("n <= m & n > m - 64"),
    "Longformer": SparseMask("abs(m - n) <= 32 | g[b, m] | g[b, n]", "g: bool[:, :]; ", _global),
    "Longformer, dilated": SparseMask("abs(m - n) <= 32*(h + 1) & (m - n) % (h + 1) == 0"),
    "BigBird": SparseMask(
        "abs(m // 32 - n // 32) <= 1 | m // 32 == 0 | n // 32 == 0 | m // 32 == (N - 1) // 32 | n // 32 == (N - 1) // 32 "
        "| random[h, m // 32, n // 32]",
        "random: bool[:, :, :]; ",
        _random_blocks,
    ),
    "strided": SparseMask("n <= m & (n > m - 32 | (m - n) % 128 == 0)"),
    "fixed": SparseMask("n <= m & (n // 128 == m // 128 | n % 128 >= 120)"),
    "LSH, two rounds": SparseMask(
        "n <= m & (first[b, m] == first[b, n] | second[b, m] == second[b, n])",
        "first: i64[:, :]; second: i64[:, :]; ",
        _buckets,
    ),
    "prefix": SparseMask("n <= m | n < prefix[b]", "prefix: i64[:]; ", _prefix),
    "packed documents": SparseMask("n <= m & doc[b, m] == doc[b, n]", "doc: i64[:, :]; ", _documents),
    "unsorted documents": SparseMask("n <= m & doc[b, m] == doc[b, n]", "doc: i64[:, :]; ", _groups),
    "chunks": SparseMask("n <= m & n // 128 == m // 128"),
    "sinks and window": SparseMask("n <= m & (n > m - 64 | n < 4)"),
    "static cache": SparseMask("n <= pos[m]", "pos: i64[:]; ", lambda x: (torch.arange(x.M) // 2,)),
    "left padding": SparseMask("n <= m & pad[b, n]", "pad: bool[:, :]; ", _left),
    "dense bool": SparseMask("given[m, n]", "given: bool[:, :]; ", _dense),
    "dense bool, shifted": SparseMask("n <= m & given[m, n + N - M]", "given: bool[:, :]; ", _dense),
    "band by distance": SparseMask("near[abs(m - n)]", "near: bool[:]; ", lambda x: (torch.arange(x.N) % 200 < 30,)),
    "window but for one document": SparseMask("abs(m - n) < 32 & ~(doc[b, n] == 3)", "doc: i64[:, :]; ", _documents),
}


@contextmanager
def tiles_of(size: int) -> Iterator[None]:
    """Maps of the Triton kernels have tiles of that size, and are made of few of them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_lists, "TILES", Tiles(size, size))
        patch.setattr(tile_lists, "_FEWEST", 1)
        launch._index_lists.cache_clear()
        yield
    launch._index_lists.cache_clear()
