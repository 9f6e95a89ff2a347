"""Masks as key ranges: every bound against brute force, on masks of every form and leaves of any value."""

import math
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar import NoValueError, Scalar, evaluate
from strategies import ALL_LEAVES, COMPARE, bools, ints, masks

from attnfuse.score import Call, Const, Expr, Load, Program, S, Tier, Var, call, free_vars, parse_expr, substitute
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.tiles import (
    Bounds,
    Extent,
    RowRange,
    bounds,
    index_extent,
    interval,
    needs_every_key,
    never_empty,
    row_bounds,
    row_range,
    tiles_skipped,
)

LEAVES = "pos: i64[:, :]; length: i32[:]; pad: bool[:, :]; query: bool[:, :]; doc: i64[:, :]; bias: f32[:, :]; "
SMALL = st.builds(
    Shape, st.just(1), st.integers(1, 2), st.just(1), st.integers(1, 7), st.integers(1, 7), *[st.just(4)] * 2
)
RUNS = settings(max_examples=300)


def spec_of(*masks: Expr) -> AttentionSpec:
    return AttentionSpec(Program(S, tuple(Tier(mask, "-inf") for mask in masks)), ALL_LEAVES)


class Values:
    """Leaves whose every element, inside or outside, is a pseudo-random value of its type; `interval` knows nothing of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, leaf: str, indices: tuple[int, ...]) -> Scalar:
        mixed = hash((self.seed, len(leaf), ord(leaf[0]), *indices))
        kind = next(x.kind for x in ALL_LEAVES if x.name == leaf)
        return mixed % 3 > 0 if kind == "bool" else mixed % 11 - 3 if kind == "int" else float(mixed % 7 - 3)


def cells(shape: Shape) -> Iterator[dict[str, int]]:
    named = {"B": shape.B, "H": shape.H, "Hkv": shape.Hkv, "M": shape.M, "N": shape.N}
    for b, h, m, n in product(range(shape.B), range(shape.H), range(shape.M), range(shape.N)):
        yield {**named, "b": b, "h": h, "m": m, "n": n}


def holds(known: Bounds, env: dict[str, int], read: Values) -> bool:
    n = env["n"]
    return (
        all(n >= evaluate(e, env, read) for e in known.lower)
        and all(n < evaluate(e, env, read) for e in known.upper)
        and all(evaluate(e, env, read) for e in known.residual)
    )


defined_masks = st.one_of(masks(), bools(2, small=True), bools(3, small=True, floats=False))
# One comparison linear in n, with coefficients, divisions and the like on both sides.
linear_masks = st.builds(
    lambda op, a, b: Call(op, (a, b)), st.sampled_from(COMPARE), ints(2, small=True), ints(1, small=True)
)


@RUNS
@given(st.lists(st.one_of(defined_masks, linear_masks), min_size=1, max_size=2), SMALL, st.integers(0, 99))
def test_bounds_and_residual_are_the_mask(tiers: list[Expr], shape: Shape, seed: int) -> None:
    known, read = bounds(spec_of(*tiers)), Values(seed)
    for bound in (*known.lower, *known.upper):
        assert not free_vars(bound) & {"n", "s"}
    for env in cells(shape):
        assert holds(known, env, read) == all(evaluate(mask, env, read) for mask in tiers), f"{known} at {env}"


def exact_extent(shape: Shape, read: Values) -> Extent:
    """Bounds as a kernel sees them: their values at each row, with the leaves' values."""

    def extent(expr: Expr, rows: tuple[int, int]) -> tuple[float, float]:
        of_rows = [env for env in cells(shape) if env["n"] == 0 and rows[0] <= env["m"] < rows[1]]
        found = [evaluate(expr, env, read) for env in of_rows]
        return min(found), max(found)

    return extent


@RUNS
@given(st.lists(st.one_of(defined_masks, linear_masks), min_size=1, max_size=2), SMALL, st.integers(0, 99))
def test_the_map_turned_round_is_the_mask_too(tiers: list[Expr], shape: Shape, seed: int) -> None:
    known, read = row_bounds(spec_of(*tiers)), Values(seed)
    assert not any("m" in free_vars(e) for e in (*known.lower, *known.upper))
    for env in cells(shape):
        try:
            allowed = all(evaluate(mask, env, read) for mask in tiers)
            found = (
                all(env["m"] >= evaluate(e, env, read) for e in known.lower)
                and all(env["m"] < evaluate(e, env, read) for e in known.upper)
                and all(evaluate(e, env, read) for e in known.residual)
            )
        except NoValueError:
            continue
        assert found == allowed, (known, env)


@pytest.mark.parametrize(
    ("mask", "lower", "upper", "residual"),
    [
        ("n <= m", "n", "", ""),
        ("n <= m & n > m - 9", "n", "n + 9", ""),
        ("n <= m + N - M", "n + M - N", "", ""),
        ("n < 40", "", "where(n < 40, M, 0)", ""),
        ("n <= m & pad[0, n]", "n", "where(pad[0, n], M, 0)", ""),
        ("doc[0, m] == doc[0, n]", "", "", "doc[0, m] == doc[0, n]"),
        ("n <= pos[0, m]", "", "", "n <= pos[0, m]"),
    ],
)
def test_rows_that_see_a_key(mask: str, lower: str, upper: str, residual: str) -> None:
    found = row_bounds(spec_of(parse_expr(mask)))
    assert [" ".join(map(str, side)) for side in (found.lower, found.upper, found.residual)] == [lower, upper, residual]


@RUNS
@given(
    st.lists(st.one_of(defined_masks, linear_masks), min_size=1, max_size=2),
    SMALL,
    st.data(),
    st.integers(0, 99),
    st.booleans(),
)
def test_row_range_hides_no_key_and_its_full_range_covers_none_that_is_masked(
    tiers: list[Expr], shape: Shape, data: st.DataObject, seed: int, exact: bool
) -> None:
    known, read = bounds(spec_of(*tiers)), Values(seed)
    start = data.draw(st.integers(0, shape.M - 1))
    rows = (start, data.draw(st.integers(start + 1, shape.M)))
    found = row_range(known, rows, shape.N, exact_extent(shape, read) if exact else index_extent(shape))
    assert 0 <= found.first <= found.full_first <= found.full_last <= found.last <= shape.N
    for env in cells(shape):
        if rows[0] <= env["m"] < rows[1]:
            allowed = all(evaluate(mask, env, read) for mask in tiers)
            assert not allowed or found.first <= env["n"] < found.last, f"{found} hides {env}"
            if found.full_first <= env["n"] < found.full_last and not known.residual:
                assert allowed, f"{found} covers {env}"


def test_row_range_of_a_causal_window() -> None:
    known = bounds(parse_spec("s where n <= m & n > m - 8 else -inf"))
    extent = index_extent(Shape(1, 1, 1, 64, 64, 8, 8))
    assert row_range(known, (32, 36), 64, extent) == RowRange(25, 36, 28, 33)
    assert row_range(known, (0, 4), 64, extent) == RowRange(0, 4, 0, 1)
    assert row_range(known, (32, 64), 64, extent) == RowRange(25, 64, 64, 64), (
        "no key is in the window of all of these rows"
    )


def test_row_range_of_rows_without_keys_is_empty() -> None:
    known = bounds(parse_spec("s where n < m - 8 else -inf"))
    assert row_range(known, (0, 8), 64, index_extent(Shape(1, 1, 1, 64, 64, 8, 8))) == RowRange(0, 0, 0, 0)


def test_row_range_with_bounds_that_nothing_is_known_of_visits_all() -> None:
    known = bounds(parse_spec(LEAVES + "s where n <= pos[b, m] & n > pos[b, m] - 5 else -inf"))
    found = row_range(known, (0, 8), 64, index_extent(Shape(1, 1, 1, 64, 64, 8, 8)))
    assert found == RowRange(0, 64, 64, 64)


@pytest.mark.parametrize(
    ("mask", "lower", "upper", "residual"),
    [
        ("n <= m", "", "m + 1", ""),
        ("m >= n", "", "m + 1", ""),
        ("~(n > m)", "", "m + 1", ""),
        ("n - m < 1", "", "m + 1", ""),
        ("n <= m + N - M", "", "m + N - M + 1", ""),
        ("n <= m & n > m - 4096", "m - 4095", "m + 1", ""),
        ("n <= m & n < m + 5", "", "m + 1", ""),
        ("n >= 0 & n < N", "", "", ""),
        ("n == m", "m", "m + 1", ""),
        ("n != m", "", "", "n != m"),
        ("abs(m - n) <= 256", "m - 256", "m + 257", ""),
        ("abs(m - n) > 256", "", "", "abs(m - n) > 256"),
        ("3*n + 2 <= 2*m", "", "(m*2 + 1) // 3", ""),
        ("3*n + 2 >= 2*m", "m*2 // 3", "", ""),
        ("2*m - 3*n < 7", "(m*2 - 4) // 3", "", ""),
        ("n // 64 == m // 64", "m // 64*64", "m // 64*64 + 64", ""),
        ("n // 64 <= m // 64", "", "m // 64*64 + 64", ""),
        ("n // -4 >= m", "", "m*-4 + 1", ""),
        ("n % 4 == 0", "", "", "n % 4 == 0"),
        ("min(n, 9) < 5 & max(n, 2) <= m", "", "where(2 < m + 1, N, 0), m + 1, 5", ""),
        ("n <= pos[b, m]", "", "pos[b, m] + 1", ""),
        ("n <= pos[b, m] // 2 & n < length[b] & pad[b, n]", "", "pos[b, m] // 2 + 1, length[b]", "pad[b, n]"),
        ("n <= pos[b, n]", "", "", "n <= pos[b, n]"),
        ("~(n > pos[b, m] | pad[b, n])", "", "pos[b, m] + 1", "~pad[b, n]"),
        ("query[b, m] & n <= m", "", "where(query[b, m], N, 0), m + 1", ""),
        ("n <= m | n < length[b]", "", "max(m + 1, length[b])", ""),
        ("n >= m | n >= 5", "min(m, 5)", "", ""),
        ("n <= m | n >= 5", "", "", "n <= m | n >= 5"),
        ("n <= m | pad[b, n]", "", "", "n <= m | pad[b, n]"),
        ("abs(m - n) <= 2 | query[b, m]", "where(query[b, m], 0, m - 2)", "where(query[b, m], N, m + 3)", ""),
        ("where(h < 4, n <= m, abs(n - m) < 7)", "where(h < 4, 0, m - 6)", "where(h < 4, m + 1, m + 7)", ""),
        ("where(pad[b, n], n <= m, False)", "", "m + 1", "pad[b, n]"),
        ("doc[b, m] == doc[b, n] & n <= m", "", "m + 1", "doc[b, m] == doc[b, n]"),
        ("float(n) < 3.5", "", "", "float(n) < 3.5"),
        ("n < bias[b, m]", "", "", "n < bias[b, m]"),
        ("~(bias[b, m] < 0.5 | n > m)", "", "where(~bias[b, m] < 0.5, N, 0), m + 1", ""),
        ("~(bias[b, n] < 0.5)", "", "", "~bias[b, n] < 0.5"),
        ("False", "", "0", ""),
        ("True", "", "", ""),
    ],
)
def test_bounds_of_masks(mask: str, lower: str, upper: str, residual: str) -> None:
    known = bounds(parse_spec(f"{LEAVES}s where {mask} else -inf"))
    found = [", ".join(map(str, side)) for side in (known.lower, known.upper, known.residual)]
    assert sorted(found[1].split(", ")) == sorted(upper.split(", "))
    assert (found[0], found[2]) == (lower, residual)


def test_bounds_join_the_tiers() -> None:
    known = bounds(parse_spec(f"{LEAVES}s where n <= m & n > m - 9 else =min where pad[b, n] & n <= m else +min"))
    assert tuple(map(str, (*known.lower, *known.upper, *known.residual))) == ("m - 8", "m + 1", "pad[b, n]")


# --- intervals -------------------------------------------------------------------------------------------------------


@RUNS
@given(st.one_of(ints(3), bools(3)), SMALL, st.data(), st.integers(0, 99))
def test_interval_holds_every_value(expr: Expr, shape: Shape, data: st.DataObject, seed: int) -> None:
    env = {name: (size, size) for name, size in zip(("B", "H", "Hkv", "M", "N"), shape, strict=False)}
    for index, size in (("b", shape.B), ("h", shape.H), ("m", shape.M), ("n", shape.N)):
        low = data.draw(st.integers(0, size - 1))
        env[index] = (low, data.draw(st.integers(low, size - 1)))
    low, high = interval(expr, env)
    read = Values(seed)
    for cell in cells(shape):
        if all(env[name][0] <= value <= env[name][1] for name, value in cell.items()):
            try:
                value = evaluate(expr, cell, read)
            except NoValueError:
                continue
            assert low <= value <= high, f"{value} at {cell} is outside [{low}, {high}]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n <= m", (0, 0)),
        ("m <= n", (1, 1)),
        ("n - m", (2, 11)),
        ("m - n + n", (0, 3)),
        ("abs(m - n) <= 11", (1, 1)),
        ("abs(m - n) < 2", (0, 0)),
        ("(m - n) // 4", (-3, -1)),
        ("n // -4", (-3, -2)),
        ("n % 4", (0, 3)),
        ("m % 4", (0, 3)),
        ("(m + 4) % 8", (4, 7)),
        ("m % -4", (-3, 0)),
        ("m*n", (0, 33)),
        ("m*pos[b, m]", (-math.inf, math.inf)),
        ("abs(n - 7)", (0, 4)),
        ("(m - 2) % 8", (0, 7)),
        ("n // max(pos[b, m], 1)", (0, 11)),
        ("-n // max(pos[b, m], 1)", (-11, -1)),
        ("m < 4 & n > 4", (1, 1)),
        ("m > 4 | n < 4", (0, 0)),
        ("~(m < 4)", (0, 0)),
        ("where(m < 4, 1, n)", (1, 1)),
        ("where(m < 2, 1, n)", (1, 11)),
        ("max(min(m, n), 2)", (2, 3)),
        ("pad[b, n] & m > 4", (0, 0)),
        ("pad[b, n] | m < 4", (1, 1)),
        ("pos[b, m] > n", (0, 1)),
        ("m // (n - 7)", (-math.inf, math.inf)),
        ("bias[b, m] <= inf", (0, 1)),
        ("bias[b, m] - bias[b, m] <= 0.0", (0, 1)),
    ],
)
def test_interval_is_tight_where_it_can_be(text: str, expected: tuple[float, float]) -> None:
    assert interval(parse_expr(text), {"m": (0, 3), "n": (5, 11), "b": (0, 0)}) == expected


def test_interval_takes_ranges_of_loads() -> None:
    load = parse_expr("pos[b, m]")
    assert isinstance(load, Load)
    assert interval(parse_expr("n <= pos[b, m]"), {"n": (0, 7), load: (7, 9)}) == (1, 1)


# --- rows without keys -----------------------------------------------------------------------------------------------


@RUNS
@given(
    st.lists(st.one_of(masks(1), linear_masks), min_size=1, max_size=2),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
)
def test_never_empty_is_never_wrong(tiers: list[Expr], seed: int, within: bool, sized: bool) -> None:
    known, read = bounds(spec_of(*tiers)), Values(seed)
    for M, N in product((1, 2, 5, 9), repeat=2):
        shape = Shape(1, 2, 1, M, N, 4, 4)
        if (M > N and within) or not never_empty(known, shape if sized else None, queries_within_keys=within):
            continue
        rows_with_keys = {
            (env["h"], env["m"]) for env in cells(shape) if all(evaluate(mask, env, read) for mask in tiers)
        }
        assert len(rows_with_keys) == 2 * M


@settings(max_examples=600)
@given(
    ints(3, load=False, small=True).map(lambda e: substitute(e, {Var("n"): Var("m")})),
    st.integers(-2, 40),
    st.booleans(),
    st.booleans(),
)
def test_what_never_empty_proves_of_one_bound_is_true(bound: Expr, more: int, within: bool, lower: bool) -> None:
    """`n < bound + more`, or `n >= N - bound - more`: rows have keys where `bound + more >= 1`."""
    shifted = call("add", bound, Const(more))
    known = Bounds((call("sub", Var("N"), shifted),)) if lower else Bounds((), (shifted,))
    sizes = [shape for shape in product((1, 2, 6), (1, 3), (1, 4, 9), (1, 5, 9)) if not within or shape[2] <= shape[3]]
    if never_empty(known, queries_within_keys=within):
        for B, H, M, N in sizes:
            for b, h, m in product((0, B - 1), (0, H - 1), range(M)):
                env = {"B": B, "H": H, "Hkv": 1, "M": M, "N": N, "b": b, "h": h, "m": m}
                assert evaluate(shifted, env, Values(0)) >= 1, env


@pytest.mark.parametrize(
    ("mask", "always", "within", "sized"),
    [
        ("True", True, True, True),
        ("n <= m", True, True, True),
        ("n <= m + N - M", False, True, True),
        ("n <= m & n > m - 4", False, True, True),
        ("n <= m & n > m - 1", False, True, True),
        ("n <= m & n > m", False, False, False),
        ("n < m", False, False, False),
        ("n // 4 == m // 4 & n <= m", False, True, True),
        ("n // 4 < m // 4", False, False, False),
        ("abs(n - m) <= 3", False, True, True),
        ("n < 2", True, True, True),
        ("n >= 2", False, False, True),
        ("n == 0", True, True, True),
        ("n <= m | n < length[b]", True, True, True),
        ("n < length[b]", False, False, False),
        ("n <= m & pad[b, n]", False, False, False),
        ("query[b, m]", False, False, False),
        ("where(h < 1, n <= m, n <= m + 2)", True, True, True),
        ("n <= m*2 & n >= m - m % 3", False, True, True),
        ("n >= i0", False, False, False),
        ("n < m // 4*4 - m + 4", True, True, True),
        ("n < m // 4*4 - m + 3", False, False, False),
        ("n < m // 5*3 + 1", True, True, True),
        ("n < (m - 9) // 5*3 + 1", False, False, False),
        ("n < m - m // 5*3 + 1", True, True, True),
        ("n < -m // 5*3 + m + 1", False, False, False),
        ("n < -m // 2 + 1", False, False, False),
        ("n < 7 - abs(m - 5)", False, False, True),
        ("n < 5 - abs(m - 5)", False, False, False),
        ("n <= abs(m - 5)", True, True, True),
        ("n <= m*h", True, True, True),
        ("n <= -(m*h)", False, False, False),
        ("n <= H - Hkv", True, True, True),
        ("n <= Hkv - H", False, False, False),
    ],
)
def test_never_empty_of_masks(mask: str, always: bool, within: bool, sized: bool) -> None:
    known = bounds(parse_spec(f"{LEAVES}s where {mask} else -inf"))
    assert never_empty(known) == always
    assert never_empty(known, queries_within_keys=True) == within
    assert never_empty(known, Shape(1, 2, 1, 7, 9, 4, 4)) == sized


def test_more_queries_than_keys_can_empty_rows() -> None:
    known = bounds(parse_spec("s where n <= m + N - M else -inf"))
    assert not never_empty(known, Shape(1, 2, 1, 9, 7, 4, 4))


@pytest.mark.parametrize(
    ("program", "needed"),
    [
        ("s", False),
        ("s where n <= m else -inf", False),
        ("s where n <= m else 0row", False),
        ("s where n <= m else +min", True),
        ("s where n <= m else -inf where pad[b, n] else =min", True),
        ("s where n <= m else +min sink 1.0", False),
    ],
)
def test_only_min_fills_need_every_key(program: str, needed: bool) -> None:
    assert needs_every_key(parse_spec(LEAVES + program).program) == needed


# --- what is skipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "skipped"),
    [
        ("s", 0),
        ("s where n <= m else -inf", 6 / 16),
        ("s where n <= m & n > m - 16 else -inf", 9 / 16),
        ("s where n <= m & n > m - 17 else -inf", 9 / 16),
        ("s where n <= m & n > m - 18 else -inf", 9 / 16 - 2 / 16),
        ("s where n <= m & pad[b, n] else +min", 6 / 16),
        ("s where n <= m & n < length[b] else +min", 6 / 16),
        ("s where n < length[b] else -inf", 0),
        ("s where n < m else -inf", 6 / 16),
        ("s where n < m else +min", 3 / 16),
        ("s where n < m else +min sink 1.0", 6 / 16),
        ("s where n // 16 == m // 16 & n <= m else =min", 12 / 16),
        ("s where n < i0 else -inf", 3 / 4),
        ("s where n < i1 else -inf", 0),
        ("s where n < 0 else -inf", 1),
        ("s where n < 0 else =min", 0),
    ],
)
def test_tiles_skipped(program: str, skipped: float) -> None:
    spec, shape = parse_spec(LEAVES + program), Shape(1, 1, 1, 64, 64, 8, 8)
    assert tiles_skipped(spec, shape, 16, 16, (16,)) == pytest.approx(skipped)


@RUNS
@given(st.one_of(masks(1), linear_masks), SMALL, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_tiles_skipped_counts_no_tile_with_an_allowed_key(
    mask: Expr, shape: Shape, block_m: int, block_n: int, seed: int
) -> None:
    read = Values(seed)
    needed = {(env["m"] // block_m, env["n"] // block_n) for env in cells(shape) if evaluate(mask, env, read)}
    total = math.ceil(shape.M / block_m) * math.ceil(shape.N / block_n)
    assert round(tiles_skipped(spec_of(mask), shape, block_m, block_n) * total) <= total - len(needed)
