"""Tile maps: what is called EMPTY or FULL against brute force, how few tiles are left, and the results of what is computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from attnfuse.reference import Evaluator as Reference
from attnfuse.score import Expr, Program, S, Tier
from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import cover, flash_step, tile_lists
from attnfuse.templates.base import Tiles
from attnfuse.templates.cover import block_of
from attnfuse.templates.tile_map import EMPTY, FULL, classes
from tests.families import Call, hold_to_oracle, made, values_of
from tests.sparse_masks import SPARSE_MASKS, SparseMask
from tests.strategies import Case, bools, cases, masks, shapes, spec_of
from tests.test_blocked import Largest, forward_and_backward

SIZES = (Tiles(1, 1), Tiles(2, 3), Tiles(4, 4), Tiles(5, 2), Tiles(16, 16))


def dense(call: Call) -> Tensor:
    """Which cells every tier allows, [B, H, M, N], by the oracle."""
    spec, shape = call.spec, call.shape
    scores = torch.zeros(shape.B, shape.H, shape.M, shape.N, dtype=torch.float64)
    reference = Reference(spec, call.leaves, call.sizes, scores, shape.Hkv, torch.float32)
    out = torch.ones_like(scores, dtype=torch.bool)
    for tier in spec.program.tiers:
        out = out & reference.of(tier.allowed, torch.zeros_like(out))
    return out


def tiled(x: Tensor, tiles: Tiles, fill: bool) -> Tensor:
    """[…, M, N] as […, row tiles, key tiles, cells], filled up."""
    M, N = x.shape[-2:]
    x = pad(x, (0, -N % tiles.block_n, 0, -M % tiles.block_m), value=fill)
    x = x.unflatten(-1, (-1, tiles.block_n)).unflatten(-3, (-1, tiles.block_m))
    return x.transpose(-3, -2).flatten(-2)


def classes_of(call: Call, tiles: Tiles) -> Tensor:
    shape = call.shape
    found = classes(
        str(call.spec), block_of(inputs_of(call), *((0, x) for x in (shape.B, shape.H, shape.M, shape.N))), tiles
    )
    return found.expand(shape.B, shape.H, -1, -1)


def inputs_of(call: Call) -> cover.Inputs:
    return cover.Inputs(
        call.spec, str(call.spec), call.shape, call.q, call.k, call.v, call.leaves, call.sizes, None, call.order
    )


def hold_to_brute_force(call: Call, tiles: Tiles) -> None:
    allowed = dense(call)
    found = classes_of(call, tiles)
    assert found.shape == tiled(allowed, tiles, False).shape[:-1]
    assert not (tiled(allowed, tiles, False).any(-1) & (found == EMPTY)).any(), (
        f"{call.spec}: an EMPTY tile hides a cell"
    )
    assert not (~tiled(allowed, tiles, True).all(-1) & (found == FULL)).any(), f"{call.spec}: a FULL tile covers a hole"


predicates = st.one_of(masks(), masks(3), bools(2), bools(3))


def masked(mask: Expr) -> AttentionSpec:
    return spec_of(Program(S, (Tier(mask, "-inf"),)))


def hold_mask_to_brute_force(mask: Expr, shape: Shape, tiles: Tiles, seed: int) -> None:
    hold_to_brute_force(values_of(Case(masked(mask), shape, seed)), tiles)


@given(predicates, shapes, st.sampled_from(SIZES), st.integers(0, 999))
@settings(max_examples=500)
def test_empty_tiles_hide_nothing_and_full_tiles_cover_no_hole(
    mask: Expr, shape: Shape, tiles: Tiles, seed: int
) -> None:
    hold_mask_to_brute_force(mask, shape, tiles, seed)


@pytest.mark.slow
@given(predicates, shapes, st.sampled_from(SIZES), st.integers(0, 9999))
@settings(max_examples=10_000)
def test_empty_and_full_tiles_of_ten_thousand_masks(mask: Expr, shape: Shape, tiles: Tiles, seed: int) -> None:
    hold_mask_to_brute_force(mask, shape, tiles, seed)


# --- masks of the literature -----------------------------------------------------------------------------------------


def attention_with(mask: SparseMask, shape: Shape, score: str = "s*0.125", fill: str = "-inf") -> Call:
    return made(f"{mask.declared}{score} where {mask.mask} else {fill}", shape, mask.leaves(shape))


@pytest.mark.parametrize("mask", SPARSE_MASKS.values(), ids=SPARSE_MASKS.keys())
def test_few_tiles_are_visited_in_vain(mask: SparseMask) -> None:
    call = attention_with(mask, Shape(2, 2, 2, 1024, 1024, 4, 4))
    hold_to_brute_force(call, tiles := Tiles(64, 64))
    some = tiled(dense(call), tiles, False).any(-1)
    visited = classes_of(call, tiles) != EMPTY
    assert visited.sum() <= 1.1 * some.sum(), f"{visited.float().mean():.3f} of the tiles for {some.float().mean():.3f}"


@contextmanager
def small_tiles(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_lists, "TILES", Tiles(size, size))
        patch.setattr(tile_lists, "_FEWEST", 4)
        patch.setattr("attnfuse.templates.flash_step._ROWS", size)
        for cached in (cover._index_parts, cover.index_rows):
            cached.cache_clear()
        yield
    for cached in (cover._index_parts, cover.index_rows):
        cached.cache_clear()


# A score that goes to the library's kernel, one that goes to matrix products, one with gradients of its leaves.
SCORES = {
    "scaled": ("s*0.125", ""),
    "softcap": ("5*tanh(s*0.125/5)", ""),
    "dropout": ("s*0.125", "dropout 0.2; "),
    "biased": ("s*0.125 + bias[h, n]", "bias: f32[:, :]; "),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("mask", SPARSE_MASKS.values(), ids=SPARSE_MASKS.keys())
def test_results_and_gradients(mask: SparseMask, score: tuple[str, str]) -> None:
    shape = Shape(2, 4, 2, 160, 160, 8, 8)
    leaves = mask.leaves(shape)
    if "bias" in score[1]:
        leaves = (torch.randn((shape.H, shape.N), generator=torch.Generator().manual_seed(2)), *leaves)
    with small_tiles(16):
        hold_to_oracle(made(f"{score[1]}{mask.declared}{score[0]} where {mask.mask} else -inf", shape, leaves))


@pytest.mark.parametrize("fill", ["+min", "=min", "0row", "-inf"])
@pytest.mark.parametrize("name", ["packed documents", "unsorted documents", "BigBird", "LSH, two rounds"])
def test_rows_without_a_key(name: str, fill: str) -> None:
    mask = SPARSE_MASKS[name]
    for left_out in ("m % 50 > 2", "m < 70 | m > 110"):
        with small_tiles(16):
            strict = mask._replace(mask=f"({mask.mask}) & {left_out}")
            hold_to_oracle(attention_with(strict, Shape(2, 2, 1, 160, 160, 8, 8), fill=fill), with_lse=True)


@given(cases(dropout=st.just(0.0)), st.sampled_from((3, 4, 16)), st.booleans())
@settings(max_examples=150)
def test_random_programs_in_tiles(case: Case, size: int, any_number: bool) -> None:
    with small_tiles(size), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_lists, "worth_a_map", lambda rows, keys: any_number or keys > size)
        hold_to_oracle(values_of(case))


@pytest.mark.parametrize("score", ["s*0.125", "5*tanh(s/5)"])
def test_only_the_tiles_that_are_left_are_computed(score: str) -> None:
    """No block holds more keys than the window and the global tokens of some rows have."""
    shape = Shape(1, 2, 2, 2048, 2048, 8, 8)
    call = attention_with(SPARSE_MASKS["Longformer"]._replace(mask="abs(m - n) <= 32 | g[b, n]"), shape, score)
    with Largest() as seen:
        forward_and_backward(call)
    # three tiles of the window and two with global tokens, for 128 rows of both heads
    assert seen.floats <= 5 * 128 * 128 * 2


def test_one_document_after_the_other_needs_no_mask() -> None:
    """Sorted documents are causal squares, whatever their ids are."""
    shape = Shape(2, 2, 2, 512, 512, 8, 8)
    ids = torch.tensor([7, -2, 1000, 3]).repeat_interleave(torch.tensor([100, 112, 200, 100]))
    doc = torch.stack((ids, ids.flip(0)))
    call = made("doc: i64[:, :]; s*0.125 where n <= m & doc[b, m] == doc[b, n] else -inf", shape, (doc,))
    runs = cover.cover(inputs_of(call))
    assert [(x.m0, x.m1, x.first) for x in runs[0].segments] == [
        (0, 100, 0),
        (100, 212, 100),
        (212, 412, 212),
        (412, 512, 412),
    ]
    assert [(x.m0, x.m1) for x in runs[1].segments] == [(0, 100), (100, 300), (300, 412), (412, 512)]
    hold_to_oracle(call)


def test_a_document_that_comes_back_is_one() -> None:
    shape = Shape(1, 2, 2, 512, 512, 8, 8)
    doc = torch.tensor([0, 1, 0, 2]).repeat_interleave(128)[None]
    call = made("doc: i64[:, :]; s*0.125 where n <= m & doc[b, m] == doc[b, n] else -inf", shape, (doc,))
    (run,) = cover.cover(inputs_of(call))
    assert run.rows.keys(256, 384).spans == ((0, 128), (256, 384))
    assert run.rows.keys(256, 384).masked == ((256, 384),)
    hold_to_oracle(call)


def test_heads_with_other_tiles_are_computed_apart() -> None:
    shape = Shape(1, 4, 2, 1024, 1024, 8, 8)
    call = made("s*0.125 where abs(m - n) <= 32 | (n < 200 & h >= 2) else -inf", shape)
    runs = cover.cover(inputs_of(call))
    assert [(run.h0, run.h1) for run in runs] == [(0, 2), (2, 4)]
    assert runs[0].rows.keys(768, 896).spans == ((640, 1024),)
    assert runs[1].rows.keys(768, 896).spans == ((0, 256), (640, 1024))
    hold_to_oracle(call)


def test_what_indices_decide_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    call = made("s*0.125 where abs(m - n) <= 32 | n % 200 == 0 else -inf", Shape(1, 2, 2, 512, 512, 8, 8))
    first, _ = call.run()
    monkeypatch.setattr(cover, "classes", lambda *_: pytest.fail("the tile map was computed again"))
    assert torch.equal(call.run()[0], first)


@pytest.mark.parametrize("value", [2**53 + 1, -(2**60), 2**62], ids=["beyond fp64", "far below", "whose sums overflow"])
def test_ids_without_an_exact_fp64_value(value: int) -> None:
    doc = torch.tensor([value, value - 1, value, value - 2]).repeat_interleave(128)[None]
    call = made("doc: i64[:, :]; s where doc[b, m] == doc[b, n] else -inf", Shape(1, 1, 1, 512, 512, 4, 4), (doc,))
    hold_to_brute_force(call, Tiles(64, 64))
    hold_to_oracle(call)


def test_not_a_number_decides_nothing() -> None:
    x = torch.randn(1, 256).masked_fill(torch.arange(256) % 100 == 50, torch.nan)
    for mask in ("x[b, n] < 3.0", "x[b, n] >= x[b, m]", "~(x[b, n] < x[b, m])", "x[b, n] <= inf"):
        call = made(f"x: f32[:, :]; s where {mask} else 0row", Shape(1, 1, 1, 256, 256, 4, 4), (x,))
        hold_to_brute_force(call, Tiles(16, 16))


def test_an_index_outside_its_leaf_is_clamped_as_in_the_kernel() -> None:
    for mask in ("near[n - m]", "near[m + n]", "given[m + 9, n]", "given[m, n - 20]"):
        leaf = torch.arange(100) % 40 < 30
        given_ = leaf if "near" in mask else leaf & leaf[:, None]
        declared = "near: bool[:]; " if "near" in mask else "given: bool[:, :]; "
        call = made(f"{declared}s where {mask} else 0row", Shape(1, 1, 1, 100, 100, 4, 4), (given_,))
        hold_to_brute_force(call, Tiles(16, 16))


def test_the_tile_map_of_a_long_sequence_is_small() -> None:
    call = made("s where abs(m - n) <= 256 | n % 4096 == 0 | m % 4096 == 0 else -inf", Shape(1, 1, 1, 8192, 8192, 4, 4))
    with Largest() as seen:
        classes_of(call, Tiles(128, 128))
    assert seen.any <= 8192 * 8


def test_masks_of_blocks_are_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = flash_step._Kept(1 << 24)
    monkeypatch.setattr(flash_step, "_KEPT", kept)
    calls = [
        made(f"s*{scale} where abs(m - n) <= 32 | n % 200 == 0 else -inf", Shape(1, 2, 2, 512, 512, 8, 8))
        for scale in (0.5, 0.25, 0.125)
    ]
    hold_to_oracle(calls[0])
    # room for two of the three
    kept.most = 5 * kept.elements // 2
    for call in (*calls, calls[0]):
        hold_to_oracle(call)
        assert 0 < kept.elements <= kept.most
        assert kept.elements == sum(made.elements for made in kept.segments.values())
    small = made("s where n <= m & n > m - 40 else -inf", Shape(1, 1, 1, 128, 128, 8, 8))
    monkeypatch.undo()
    first, _ = small.run()
    monkeypatch.setattr(flash_step, "_masked", lambda *_, **__: pytest.fail("a mask was made again"))
    assert torch.equal(small.run()[0], first)
