"""Mixed-radix indices: a reshape is the same digits grouped anew, or it is refused."""

import itertools
import math

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from attnfuse.passes.index import (
    Digit,
    Index,
    Misaligned,
    Size,
    index_of,
    joined,
    piece,
    product,
    regroup,
    same,
    size_of,
    value,
)
from attnfuse.score import Const, Var, call
from tests.scalar import evaluate

NAMES = ("b", "h", "m", "n")
Shape = tuple[int, ...]


def index_into(shape: tuple[Size, ...]) -> tuple[Index, ...]:
    return tuple(index_of(Var(name), size) for name, size in zip(NAMES, shape, strict=False))


def number(index: Index, env: dict[str, int]) -> int:
    total = 0
    for digit in index:
        at = evaluate(digit.expr, env, _no_leaf)
        assert isinstance(digit.size, int)
        assert 0 <= at < digit.size
        total = total * digit.size + int(at)
    return total


def _no_leaf(leaf: str, at: tuple[int, ...]) -> int:
    raise AssertionError(f"{leaf} is read")


def aligned(*shapes: Shape) -> bool:
    """Whether the boundaries between the dimensions of all shapes lie at sizes of which each divides the next."""
    cuts = sorted({math.prod(shape[at:]) for shape in shapes for at in range(len(shape) + 1)})
    return all(large % small == 0 for small, large in itertools.pairwise(cuts))


@st.composite
def shapes_of_one_size(draw: st.DrawFn, count: int) -> tuple[Shape, ...]:
    """Groupings of the same prime factors, in the same order or in another one."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=5))
    shapes = []
    for _ in range(count):
        mixed = draw(st.permutations(factors)) if draw(st.booleans()) else factors
        cuts = sorted(draw(st.lists(st.integers(0, len(mixed)), max_size=3)))
        bounds = [0, *cuts, len(mixed)]
        shapes.append(tuple(math.prod(mixed[a:b]) for a, b in itertools.pairwise(bounds)))
    return tuple(shapes)


@given(shapes_of_one_size(2))
@example(((6, 4), (4, 6)))
@example(((2, 3, 4), (6, 4)))
@example(((24,), (2, 3, 4)))
@example(((1, 5, 1), (5,)))
def test_regroup_is_reshape(shapes: tuple[Shape, Shape]) -> None:
    shape, other = shapes
    if not aligned(*shapes):
        with pytest.raises(Misaligned):
            regroup(index_into(shape), other)
        return
    found = regroup(index_into(shape), other)
    elements = torch.arange(math.prod(shape))
    for at in itertools.product(*map(range, shape)):
        env = dict(zip(NAMES, at, strict=False))
        there = tuple(number(dim, env) for dim in found)
        assert elements.view(shape)[at] == elements.view(other)[there]


@given(shapes_of_one_size(3))
def test_digits_join_again(shapes: tuple[Shape, Shape, Shape]) -> None:
    """Through any number of shapes that align with it, the index comes back as it was."""
    shape, *others = shapes
    index = index_into(shape)
    for other in others:
        if not aligned(*shapes):
            return
        index = regroup(index, other)
    assert regroup(index, shape) == index_into(shape)


@given(shapes_of_one_size(2))
def test_value_of_an_index_is_its_number(shapes: tuple[Shape, Shape]) -> None:
    shape, other = shapes
    if not aligned(*shapes):
        return
    for dim in regroup(index_into(shape), other):
        expr = value(dim)
        for at in itertools.product(*map(range, shape)):
            env = dict(zip(NAMES, at, strict=False))
            assert evaluate(expr, env, _no_leaf) == number(dim, env)


def texts(index: tuple[Index, ...]) -> list[list[tuple[str, object]]]:
    return [[(str(digit.expr), digit.size) for digit in dim] for dim in index]


def test_heads_split_and_joined() -> None:
    b, h = index_into((2, 6))
    assert texts(regroup([b, h], (12,))) == [[("b", 2), ("h", 6)]]
    assert texts(regroup([h], (2, 3))) == [[("h // 3", 2)], [("h % 3", 3)]]
    assert regroup(regroup([h], (2, 3)), (6,)) == (h,)
    # three digits of one value, of which the last two or the first two join
    split = regroup([index_of(Var("n"), 24)], (2, 3, 4))
    assert texts(split) == [[("n // 12", 2)], [("n // 4 % 3", 3)], [("n % 4", 4)]]
    assert texts(regroup(split, (2, 12))) == [[("n // 12", 2)], [("n % 12", 12)]]
    assert texts(regroup(split, (6, 4))) == [[("n // 4", 6)], [("n % 4", 4)]]


def test_pieces_of_other_order_do_not_join() -> None:
    high, low = regroup([index_of(Var("h"), 6)], (2, 3))
    assert joined([*low, *high]) == (*low, *high)
    assert joined([*high, *index_of(Var("n"), 3)]) == (*high, *index_of(Var("n"), 3))


def test_symbolic_sizes() -> None:
    s, t = sympy.symbols("s t", integer=True, positive=True)
    b, h, n = Digit(Var("b"), s), Digit(Var("h"), 4), Digit(Var("n"), t)
    assert regroup([(b,), (h,)], (4 * s,)) == ((b, h),)
    assert regroup([(b, h)], (s, 4)) == ((b,), (h,))
    assert regroup([(b,), (h,), (n,)], (4 * s, t)) == ((b, h), (n,))
    assert texts(regroup([(Digit(Var("m"), 4 * s),)], (s, 4))) == [[("m // 4", s)], [("m % 4", 4)]]
    for index, shape in (([(b,)], (2, 2)), ([(b,), (n,)], (t, s)), ([(b, h)], (4, s)), ([(n,)], (s,))):
        with pytest.raises(Misaligned):
            regroup(index, shape)


def test_no_value_with_a_symbolic_radix() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)
    b, n = Digit(Var("b"), 2), Digit(Var("n"), s)
    assert value((n,)) == Var("n")
    assert value((n, Digit(Var("h"), 3))) == call("add", call("mul", Var("n"), Const(3)), Var("h"))
    with pytest.raises(Misaligned, match="symbolic"):
        value((b, n))


def test_sizes_are_compared_for_all_values() -> None:
    s, t = sympy.symbols("s t", integer=True, positive=True)
    assert same(s * (t + 1), s * t + s)
    assert not same(s, t)
    assert not same(s, 4)
    assert same(3, 3)
    assert product([2, s, 3]) == 6 * s
    assert index_of(Var("n"), 1) == ()


def test_sizes_of_symbolic_integers_carry_no_needless_rounding() -> None:
    found: list[Size] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[object]) -> object:
        out = gm.graph.output_node().args[0][0].meta["example_value"]
        found.extend(map(size_of, out.shape))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.flatten().view(x.shape[0], -1) * 2, backend=backend, dynamic=True)(torch.zeros(6, 4))
    rows, columns = found
    assert isinstance(columns, sympy.Symbol)
    assert isinstance(rows, sympy.Symbol)


def test_pieces() -> None:
    assert piece(Digit(Var("h"), 6)) is not None
    (high,), (low,) = regroup([index_of(Var("h"), 6)], (2, 3))
    found = [piece(x) for x in (high, low)]
    assert [(x.var, x.stride, x.size) for x in found if x is not None] == [("h", 3, 2), ("h", 1, 3)]
    assert piece(Digit(call("add", Var("n"), Const(1)), 6)) is None
