"""The Triton kernels over the lists of a tile map, in the interpreter: results, what is not read, tiles of any size."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attnfuse.spec import Shape
from attnfuse.templates import tuning
from attnfuse.templates.base import Kernel
from attnfuse.templates.tuning import Config
from tests.families import Call, hold_to_oracle, made
from tests.sparse_masks import SPARSE_MASKS, SparseMask, tiles_of

SHAPE = Shape(2, 4, 2, 160, 160, 16, 16)


@pytest.fixture(autouse=True)
def _tiles() -> Iterator[None]:
    """Maps of tiles as wide as those of the kernels."""
    with tiles_of(32):
        yield


def call_of(mask: SparseMask, shape: Shape = SHAPE, score: str = "s*0.25", fill: str = "-inf") -> Call:
    return made(f"{mask.declared}{score} where {mask.mask} else {fill}", shape, mask.leaves(shape))


@pytest.mark.parametrize("mask", SPARSE_MASKS.values(), ids=SPARSE_MASKS.keys())
def test_masks_of_the_literature(mask: SparseMask) -> None:
    hold_to_oracle(call_of(mask))


@pytest.mark.parametrize("name", ["Longformer", "BigBird", "unsorted documents"])
def test_tiles_twice_as_wide_as_those_of_the_kernels(name: str) -> None:
    with tiles_of(64):
        hold_to_oracle(call_of(SPARSE_MASKS[name]))


@pytest.mark.parametrize("kernel", ["decode"], indirect=True)
@pytest.mark.parametrize("name", ["Longformer, dilated", "BigBird", "packed documents", "dense bool, shifted"])
def test_few_rows(name: str, kernel: Kernel) -> None:
    mask = SPARSE_MASKS[name]
    # the last rows of longer sequences: heads of a KV head go through one list
    late = mask._replace(mask=mask.mask.replace("(m ", "(m + 140 ").replace("m // 32", "(m + 140) // 32"))
    leaves = tuple(x[:, 140:144] if name == "dense" else x for x in mask.leaves(SHAPE))
    shape = SHAPE._replace(M=4)
    hold_to_oracle(made(f"{late.declared}s*0.25 where {late.mask} else +min", shape, leaves))


@pytest.mark.parametrize("fill", ["+min", "0row", "-inf"])
@pytest.mark.parametrize("score", ["s*0.25", "5*tanh(s*0.25/5)"])
def test_rows_without_a_key(score: str, fill: str) -> None:
    mask = SPARSE_MASKS["BigBird"]
    strict = mask._replace(mask=f"({mask.mask}) & m % 50 > 2")
    hold_to_oracle(call_of(strict, score=score, fill=fill), with_lse=True)


@pytest.mark.parametrize("size", [(16, 32), (32, 16)], ids=str)
def test_tiles_of_other_shapes(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_INTERPRETER", dict.fromkeys(tuning.KERNELS, Config(*size, 4, 1)))
    tuning.configs.cache_clear()
    # lengths that are no multiples of anything
    hold_to_oracle(call_of(SPARSE_MASKS["unsorted documents"], Shape(2, 4, 2, 131, 131, 16, 16)))
    hold_to_oracle(made("s where (m - n) % 70 < 9 else -inf", Shape(1, 2, 1, 100, 150, 16, 16)))
    tuning.configs.cache_clear()


def test_keys_of_empty_tiles_are_not_read() -> None:
    """In the forward, and in the backward for queries; rows of empty tiles in that for keys."""
    call = made("s*0.25 where abs(m - n) < 10 | n < 5 else -inf", Shape(1, 2, 1, 256, 256, 16, 16))
    far = (torch.arange(256) >= 64) & (torch.arange(256) < 128)

    def poisoned(x: Tensor, where: Tensor) -> Tensor:
        return x.detach().masked_fill(where[:, None], torch.nan).requires_grad_()

    read = call._replace(k=poisoned(call.k, far), v=poisoned(call.v, far))
    out, _ = read.run()
    assert out[:, :, 192:].isfinite().all()
    (dq,) = torch.autograd.grad(out[:, :, 192:].sum(), call.q)
    assert dq[:, :, 192:].isfinite().all()
    asked = call._replace(q=poisoned(call.q, far))
    out, _ = asked.run()
    dk, dv = torch.autograd.grad(out.sum(), (call.k, call.v))
    assert dk[:, :, 192:].isfinite().all()
    assert dv[:, :, 192:].isfinite().all()
