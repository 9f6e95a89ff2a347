"""Blocks of rows that are alike go through the library's kernel together: results, gradients, how often it is called."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.spec import Shape
from attnfuse.templates import cover, flash_kernel, flash_step, tile_lists
from attnfuse.templates.bands import Band
from attnfuse.templates.base import Tiles
from attnfuse.templates.keys import Keys
from tests.families import Call, hold_to_oracle, made
from tests.test_blocked import Largest, forward_and_backward

WINDOW = "s*0.25 where n <= m & n > m - 40 else -inf"
MASKS = {
    "window": WINDOW,
    "window to both sides": "s*0.25 where abs(m - n) <= 40 else 0row",
    "window and global keys": "s*0.25 where abs(m - n) <= 24 | n < 20 else -inf",
    "window and global keys and rows": "s*0.25 where abs(m - n) <= 24 | n < 20 | m < 20 else +min",
    "chunks": "s*0.25 where m // 64 == n // 64 & n <= m else -inf",
    "strided": "s*0.25 where (m - n) % 64 < 4 & n <= m else -inf",
    "dilated": "s*0.25 where (n - m) % 8 == 0 else -inf",
    "keys that move on more slowly": "s*0.25 where n <= m // 2 & n > m // 2 - 20 else -inf",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of q in the calls of the library's forward kernel, over small blocks and tiles."""
    seen: list[tuple[int, ...]] = []
    forward = flash_kernel._FORWARD

    def counted(q: Tensor, *others: Any, **named: Any) -> Any:
        seen.append(tuple(q.shape))
        return forward(q, *others, **named)

    monkeypatch.setattr(flash_kernel, "_FORWARD", counted)
    return seen


@pytest.fixture(autouse=True)
def _small(library: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tile_lists, "TILES", Tiles(32, 32))
    monkeypatch.setattr(tile_lists, "_FEWEST", 4)
    monkeypatch.setattr(flash_step, "_ROWS", 32)
    monkeypatch.setattr(flash_step, "_ROWS_OF_RECTANGLE", 64)
    monkeypatch.setattr(flash_step, "_MOVING_FORWARD", ((64, 16),))
    monkeypatch.setattr(flash_step, "_MOVING_BACKWARD", ((64, 8),))
    monkeypatch.setattr(flash_step, "_KEPT", flash_step._Kept(1 << 24))
    caches = cover._index_parts, cover.index_rows
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("batches", [1, 2, 9])
@pytest.mark.parametrize("text", MASKS.values(), ids=MASKS.keys())
def test_results_and_gradients(text: str, batches: int) -> None:
    call = made(text, Shape(batches, 4, 2, 256, 256, 16, 16))
    hold_to_oracle(call)
    # what was kept gives the same
    assert torch.equal(call.run()[0], call.run()[0])


def test_lengths_that_are_no_multiples_of_a_block() -> None:
    for M, N in ((203, 203), (100, 203), (203, 150)):
        for name in ("window", "window and global keys"):
            hold_to_oracle(made(MASKS[name], Shape(1, 2, 1, M, N, 16, 16)))


@pytest.mark.parametrize("name", ["window", "window and global keys"])
def test_blocks_that_are_alike_are_one_call(name: str, calls: list[tuple[int, ...]]) -> None:
    made(MASKS[name], Shape(1, 2, 2, 1024, 1024, 16, 16)).run()
    rows = sum(size[0] * size[2] for size in calls)
    assert rows == 1024
    assert len(calls) <= 12, calls


def test_blocks_have_whole_vectors_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that many keys lie before those that are needed, and the batch's interval of keys goes as far."""
    rows: Counter[int] = Counter()
    kernel = flash_kernel._FORWARD

    def run(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows[k.shape[2]] += q.shape[0] * q.shape[2]
        return kernel(q, k, *args, **kwargs)

    monkeypatch.setattr(flash_kernel, "_FORWARD", run)
    padded = "s*0.125 where n <= m & n > m - 200 & pad[b, n] else =min"
    for text, leaves in (("s*0.125 where n <= m & n > m - 200 else -inf", ()), (f"pad: bool[:, :]; {padded}", None)):
        shape = Shape(2, 2, 2, 1024, 1024, 16, 16)
        pad = torch.arange(1024) >= torch.tensor([[0], [501]])
        rows.clear()
        call = made(text, shape, (pad,) if leaves is None else leaves)
        call.run()
        # but for the first blocks of a sequence
        assert sum(count for size, count in rows.items() if size % 16 == 0) > 2 / 3 * rows.total()
        hold_to_oracle(call)


def test_batches_go_through_one_call_where_they_are_more_than_the_blocks(calls: list[tuple[int, ...]]) -> None:
    made(WINDOW, Shape(32, 1, 1, 128, 128, 16, 16)).run()
    assert {size[0] for size in calls} == {32}


def test_a_band_is_no_longer_than_a_few_thousand_rows_and_copied_keys(calls: list[tuple[int, ...]]) -> None:
    made(MASKS["window"], Shape(1, 1, 1, 10_000, 10_000, 8, 8)).run()
    assert max(size[0] * size[2] for size in calls) <= 4096
    calls.clear()
    made(MASKS["window and global keys"], Shape(1, 1, 1, 10_000, 10_000, 8, 8)).run()
    # 32 rows, whose keys are four tiles, in two spans
    assert max(size[0] for size in calls) <= 8192 // (4 * 32)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["window", "window and global keys and rows", "dilated"])
def test_no_tensor_is_larger_than_the_operands_and_a_few_blocks(name: str, dense: bool) -> None:
    shape = Shape(1, 2, 2, 8192, 8192, 8, 8)
    call = made(MASKS[name], shape)
    if not dense:
        call = call_with(*(x.detach().mT.contiguous().mT for x in (call.k, call.v)), call)
    with Largest() as seen:
        forward_and_backward(call)
    # gradients of the keys of a band of blocks
    assert seen.floats <= (1 << 15) * shape.Hkv * shape.D
    assert seen.any <= shape.N * 256


def call_with(k: Tensor, v: Tensor, call: Call) -> Call:
    return call._replace(k=k.requires_grad_(), v=v.requires_grad_())


def test_keys_and_values_of_any_strides() -> None:
    call = made(WINDOW, Shape(1, 2, 2, 256, 256, 16, 16))
    k, v = call.k.detach(), call.v.detach()
    hold_to_oracle(call_with(k.mT.contiguous().mT, torch.stack((v, v), -1)[..., 0], call))
    hold_to_oracle(call_with(k[:, :1].expand(k.shape).detach(), v[:, :, :1].expand(v.shape).detach(), call))


def test_what_is_no_band() -> None:
    mask = torch.zeros(1, 1, 32, 64)
    band = Band((0, 32), 1, Keys([(0, 64)], []), (0,), mask)
    follows = band.longer((32, 64), Keys([(32, 96)], []), mask.clone())
    assert follows is not None
    assert (follows.blocks, follows.steps) == (2, (32,))
    assert follows.longer((64, 96), Keys([(64, 128)], []), mask) is not None
    # other rows, keys, masks, steps
    assert band.longer((40, 72), Keys([(32, 96)], []), mask) is None
    assert band.longer((32, 60), Keys([(32, 96)], []), mask) is None
    assert band.longer((32, 64), Keys([(32, 95)], []), mask) is None
    assert band.longer((32, 64), Keys([(0, 10), (32, 86)], []), mask) is None
    assert band.longer((32, 64), Keys([(32, 96)], []), mask + 1) is None
    assert band.longer((32, 64), Keys([(32, 96)], []), None) is None
    assert follows.longer((64, 96), Keys([(65, 129)], []), mask) is None
