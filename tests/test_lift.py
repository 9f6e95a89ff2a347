"""Lifting, rule by rule: the expression at each index against the element of the real tensor there."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnfuse.passes.index import index_of
from attnfuse.passes.lift import LeafSource, Scope, scopes
from attnfuse.passes.normalise import normalise
from attnfuse.score import Call, Expr, Load, Var
from tests.harness import randn
from tests.scalar import NoValueError, evaluate

LIFTED: list[Any] = []


def lifted(text: str, *inputs: Tensor) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a function with the expression of an element of its result; the last dimension is n, then m, h and b."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LIFTED.append(pytest.param(fn, inputs or (randn(3, 5),), text, id=fn.__name__))
        return fn

    return register


@pytest.mark.parametrize(("fn", "inputs", "text"), LIFTED)
def test_lifted(fn: Callable[..., Tensor], inputs: Sequence[Tensor], text: str) -> None:
    values: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    found: list[tuple[Expr, Scope]] = []
    names = ("b", "h", "m", "n")

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = normalise(gm)
        scope = next(scopes(graph))
        out = graph.graph.output_node().args[0][0].args[0]
        variables = names[4 - out.meta["val"].dim() :]
        index = [index_of(Var(x), size) for x, size in zip(variables, out.meta["val"].shape, strict=True)]
        found.append((scope.lifter.lift(out, index), scope))
        return Recorder(graph).run

    def with_inputs(*xs: Tensor) -> tuple[Tensor, ...]:
        # every input in use, the result computed in the graph
        return (fn(*xs).clone(), *(x.clone() for x in xs))

    torch._dynamo.reset()
    result = torch.compile(with_inputs, backend=backend)(*inputs)[0]
    ((expr, scope),) = found
    assert str(_named(expr, scope)) == text

    def read(leaf: str, at: tuple[int, ...]) -> Any:
        source = scope.table.leaves[leaf]
        at = _of_dims(source, at)
        full = [0] * values[source.node].dim()
        for dim, place in zip(source.dims, at, strict=True):
            full[dim] = place
        if any(place >= size for place, size in zip(full, values[source.node].shape, strict=True)):
            raise NoValueError
        item = values[source.node][tuple(full)].item()
        return np.float64(item) if isinstance(item, float) else item

    variables = names[4 - result.dim() :]
    for at in itertools.product(*map(range, result.shape)):
        actual, expected = evaluate(expr, dict(zip(variables, at, strict=True)), read), result[at].item()
        assert type(expected) is (float if isinstance(actual, np.float64) else type(actual))
        assert actual == pytest.approx(expected, rel=1e-6, nan_ok=True), at


def _of_dims(source: LeafSource, at: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element of a leaf in the dimensions of its node."""
    if not source.order:
        return at
    digits = [at[source.order.index(place)] for place in range(source.rank)]
    out = []
    for sizes in source.parts:
        index = 0
        for size in sizes:
            index = index * int(size) + digits.pop(0)
        out.append(index)
    return tuple(out)


def _named(expr: Expr, scope: Scope) -> Expr:
    """With the names of nodes for leaves."""
    if isinstance(expr, Load):
        name = scope.table.leaves[expr.leaf].node.name
        return Load({"l_xs_0_": "x", "l_xs_1_": "y"}.get(name, name), tuple(_named(i, scope) for i in expr.indices))
    return Call(expr.op, tuple(_named(a, scope) for a in expr.args)) if isinstance(expr, Call) else expr


# Ranges and constants


@lifted("n")
def arange(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


@lifted("n + 2")
def arange_from(x: Tensor) -> Tensor:
    return torch.arange(2, 7)


@lifted("n*3 + 1")
def arange_by_step(x: Tensor) -> Tensor:
    return torch.arange(1, 12, 3)


@lifted("n*-2 + 9")
def arange_downwards(x: Tensor) -> Tensor:
    return torch.arange(9, 1, -2)


@lifted("float(n)")
def arange_of_floats(x: Tensor) -> Tensor:
    return torch.arange(5, dtype=torch.float32)


@lifted("arange[n]")
def arange_of_fractions(x: Tensor) -> Tensor:
    return torch.arange(0.0, 2.0, 0.5)


@lifted("arange[n]")
def arange_in_low_precision(x: Tensor) -> Tensor:
    return torch.arange(300, dtype=torch.bfloat16)


@lifted("1")
def ones_of_integers(x: Tensor) -> Tensor:
    return torch.ones(3, 5, dtype=torch.long)


@lifted("0.0")
def zeros_like(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@lifted("True")
def new_ones(x: Tensor) -> Tensor:
    return x.new_ones(3, 5, dtype=torch.bool)


@lifted("-inf")
def full(x: Tensor) -> Tensor:
    return torch.full((3, 5), -math.inf)


@lifted("-65504.0")
def full_like_rounds(x: Tensor) -> Tensor:
    return torch.full_like(x, -65500.0, dtype=torch.float16)


@lifted("-inf")
def minimum_that_overflows(x: Tensor) -> Tensor:
    return torch.full((2, 2), torch.finfo(torch.float32).min).bfloat16()


@lifted("0.5")
def tensor_of_a_number(x: Tensor) -> Tensor:
    return torch.tensor(0.5).expand(3, 5)


@lifted("where(n <= m - 1, 2, 0)")
def tril(x: Tensor) -> Tensor:
    return torch.full((4, 4), 2).tril(-1)


@lifted("n >= m + 2")
def triu_of_truth(x: Tensor) -> Tensor:
    return torch.ones(4, 4, dtype=torch.bool).triu(2)


@lifted("where(n <= m, x[m, n], 0.0)")
def tril_of_data(x: Tensor) -> Tensor:
    return x.tril()


@lifted("where(n <= m + 1 & n >= m - 1, 1.0, 0.0)")
def band(x: Tensor) -> Tensor:
    return torch.ones(4, 4).triu(-1).tril(1)


@lifted("n == m")
def identity(x: Tensor) -> Tensor:
    return torch.eye(4, dtype=torch.bool)


# Views


@lifted("x[m, n]")
def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


@lifted("x[m, n]")
def matrix_transposed(x: Tensor) -> Tensor:
    return x.mT


@lifted("x[m, n]")
def transposed_whole(x: Tensor) -> Tensor:
    return x.T


@lifted("x[m, n]")
def axes_swapped(x: Tensor) -> Tensor:
    return x.swapaxes(-1, 0)


@lifted("x[h, m, n]", randn(3, 5, 2))
def permuted(x: Tensor) -> Tensor:
    return x.permute(2, 0, -2)


@lifted("x[h, m, n]", randn(3, 5, 2))
def dimension_moved(x: Tensor) -> Tensor:
    return x.movedim(0, -1)


@lifted("x[m, n]")
def new_dimensions(x: Tensor) -> Tensor:
    return x[None, :, None][:, :, 0]


@lifted("x[n]", randn(5))
def expanded(x: Tensor) -> Tensor:
    return x[None, :].expand(3, -1)


@lifted("x[n]", randn(5))
def broadcast_to(x: Tensor) -> Tensor:
    return x.broadcast_to(3, 5)


@lifted("x[h, m, n]", randn(6, 5))
def dimension_split(x: Tensor) -> Tensor:
    return x.view(3, 2, 5)


@lifted("x[n // 5, n % 5]")
def dimensions_joined(x: Tensor) -> Tensor:
    return x.flatten()


@lifted("x[n // 2, n % 2, m]", randn(3, 2, 4))
def split_by_unflatten_and_permuted(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1).reshape(4, 6).unflatten(0, (4, 1)).squeeze(1)


@lifted("reshape[m, n]")
def reshape_that_does_not_align(x: Tensor) -> Tensor:
    return x.reshape(5, 3)


@lifted("x[m, n + 1]")
def slice_from(x: Tensor) -> Tensor:
    return x[:, 1:4]


@lifted("x[m, n + 3]")
def slice_from_the_end(x: Tensor) -> Tensor:
    return x[:, -2:]


@lifted("x[m*2 + 1, n*2]", randn(8, 5))
def slice_by_step(x: Tensor) -> Tensor:
    return x[1::2, ::2]


@lifted("n <= m + 2")
def slices_of_a_triangle(x: Tensor) -> Tensor:
    return torch.ones(9, 9, dtype=torch.bool).tril().view(1, 1, 9, 9)[0, 0, 2:6, :6]


@lifted("x[2, n]")
def selected(x: Tensor) -> Tensor:
    return x[2]


@lifted("x[2, n]")
def selected_from_the_end(x: Tensor) -> Tensor:
    return x.select(0, -1)


@lifted("x[m, n + 1]")
def narrowed(x: Tensor) -> Tensor:
    return x.narrow(1, 1, 3)


@lifted("x[m % 3, n]")
def repeated(x: Tensor) -> Tensor:
    return x.repeat(2, 1)


@lifted("x[m, n % 5]")
def repeated_with_a_new_dimension(x: Tensor) -> Tensor:
    return x.repeat(2, 1, 3)


@lifted("x[m, n % 5]")
def tiled(x: Tensor) -> Tensor:
    return x.tile(2)


@lifted("x[m // 2, n]")
def repeated_one_by_one(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=0)


@lifted("x[m, n]")
def copied(x: Tensor) -> Tensor:
    return x.clone().contiguous()


@lifted("x[m, n]", randn(3, 5).long())
def detached_integers(x: Tensor) -> Tensor:
    return x.detach()


@lifted("detach[m, n]")
def detached_floats_are_data(x: Tensor) -> Tensor:
    return x.detach()


# Arithmetic


@lifted("x[m, n] + y[n]", randn(3, 5), randn(5))
def sum_that_broadcasts(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@lifted("x[m, n] - y[n]*2.0", randn(3, 5), randn(5))
def difference_with_alpha(x: Tensor, y: Tensor) -> Tensor:
    return torch.sub(x, y, alpha=2)


@lifted("1.0 - float(m)*x[n]", randn(5))
def reversed_difference(x: Tensor) -> Tensor:
    return 1.0 - torch.arange(3)[:, None] * x


@lifted("x[n] + where(n >= m, 1.0, 0.0)", randn(5))
def truth_plus_float(x: Tensor) -> Tensor:
    return x + (torch.arange(3)[:, None] <= torch.arange(5))


@lifted("float(n - m)/2.0")
def integers_divided(x: Tensor) -> Tensor:
    return (torch.arange(5) - torch.arange(3)[:, None]) / 2


@lifted("(n - m) // 2")
def integers_divided_whole(x: Tensor) -> Tensor:
    return (torch.arange(5) - torch.arange(3)[:, None]) // 2


@lifted("(n - m) // 2")
def integers_divided_by_floor(x: Tensor) -> Tensor:
    return torch.div(torch.arange(5) - torch.arange(3)[:, None], 2, rounding_mode="floor")


@lifted("div[m, n]")
def integers_divided_by_trunc_are_data(x: Tensor) -> Tensor:
    return torch.div(torch.arange(5) - torch.arange(3)[:, None], 2, rounding_mode="trunc")


@lifted("(n - m) % 3")
def remainder(x: Tensor) -> Tensor:
    return (torch.arange(5) - torch.arange(3)[:, None]) % 3


@lifted("floor_divide[m, n]")
def floats_divided_whole_are_data(x: Tensor) -> Tensor:
    return x // 2


@lifted("abs(n - m)*-1")
def absolute_and_negative(x: Tensor) -> Tensor:
    return -(torch.arange(5) - torch.arange(3)[:, None]).abs()


@lifted("tanh(float(m)*x[n])", randn(5))
def hyperbolic_tangent(x: Tensor) -> Tensor:
    return torch.tanh(torch.arange(3)[:, None] * x)


@lifted("exp(float(n - m))")
def exponential_of_integers(x: Tensor) -> Tensor:
    return torch.exp(torch.arange(5) - torch.arange(3)[:, None])


@lifted("sigmoid(log(sqrt(float(n - m + 3))))")
def chain_of_functions(x: Tensor) -> Tensor:
    return torch.arange(5).sub(torch.arange(3)[:, None]).add(3).sqrt().log().sigmoid()


@lifted("n < 2 | n <= m + 2")
def joined_truth_values(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(3, 2).bool(), torch.ones(3, 3).tril().bool()], -1)


@lifted("where(m < 1, n, where(m < 2, 7, n + 5))")
def joined_rows_of_integers(x: Tensor) -> Tensor:
    first = torch.arange(5)[None]
    return torch.cat([first, torch.zeros(0, 5).long(), torch.full((1, 5), 7), first + 5])


@lifted("where(n < 2, x[n], float(n - 1))", randn(2))
def joined_data_and_numbers_of_another_type(x: Tensor) -> Tensor:
    return torch.cat([x, torch.arange(1, 4)])


@lifted("cat[m, n]", randn(3, 2), randn(3, 3))
def joined_data(x: Tensor, y: Tensor) -> Tensor:
    """One load of what the graph joins rather than a choice of two."""
    return torch.cat([x, y], 1)


@lifted("rsqrt(float(n + m + 1))")
def reciprocal_root(x: Tensor) -> Tensor:
    return torch.rsqrt(torch.arange(5) + torch.arange(3)[:, None] + 1)


@lifted("(n - m)*(n - m)")
def square(x: Tensor) -> Tensor:
    return (torch.arange(5) - torch.arange(3)[:, None]) ** 2


@lifted("where(where(n < m - 1, -1, n - m) > 2, 2, where(n < m - 1, -1, n - m))")
def clamped(x: Tensor) -> Tensor:
    return (torch.arange(5) - torch.arange(3)[:, None]).clamp(-1, 2)


@lifted("min(n, m)")
def minimum(x: Tensor) -> Tensor:
    return torch.minimum(torch.arange(5), torch.arange(3)[:, None])


@lifted("max(n, m)")
def maximum(x: Tensor) -> Tensor:
    return torch.maximum(torch.arange(5), torch.arange(3)[:, None])


@lifted("add[m, n]", randn(3, 5) > 0, randn(3, 5) > 0)
def sum_of_truths_is_data(x: Tensor, y: Tensor) -> Tensor:
    return x + y


# Comparisons, logic, choices


@lifted("n <= m")
def compared(x: Tensor) -> Tensor:
    return torch.arange(5) <= torch.arange(3)[:, None]


@lifted("n <= m")
def compared_the_other_way(x: Tensor) -> Tensor:
    return torch.arange(3)[:, None] >= torch.arange(5)


@lifted("float(n) < x[m]", randn(3))
def compared_with_floats(x: Tensor) -> Tensor:
    return torch.arange(5) < x[:, None]


@lifted("n < x[m]", torch.tensor([1, 4, 2]))
def compared_with_lengths(x: Tensor) -> Tensor:
    return torch.arange(5) < x[:, None]


@lifted("mul[m, n] < 1.0", randn(3, 1).bfloat16())
def compared_after_rounding_is_data(x: Tensor) -> Tensor:
    return torch.arange(5) * x < 1


@lifted("n <= m & n > m - 2")
def conjunction(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return (n <= m) & (n > m - 2)


@lifted("n <= m | n < 2")
def disjunction(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return torch.logical_or(n <= m, n < 2)


@lifted("n > m")
def negation(x: Tensor) -> Tensor:
    return ~(torch.arange(5) <= torch.arange(3)[:, None])


@lifted("n <= m & n >= 2 | n > m & n < 2")
def exclusive_or(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return (n <= m) ^ (n < 2)


@lifted("~(n <= m & n >= 2 | n > m & n < 2)")
def equal_truths(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return (n <= m) == (n < 2)


@lifted("and_1[m, n]", torch.arange(15).view(3, 5))
def bits_are_data(x: Tensor) -> Tensor:
    return x & 3


@lifted("n % 2 != 0 & n != m")
def logic_of_integers(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return torch.logical_and(n % 2, n - m)


@lifted("where(n <= m, 0.0, -inf)")
def choice(x: Tensor) -> Tensor:
    return torch.where(torch.arange(5) <= torch.arange(3)[:, None], 0.0, -math.inf)


@lifted("where(n <= m, float(n), x[m])", randn(3))
def choice_that_promotes(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return torch.where(n <= m, n, x[:, None])


@lifted("where(n > m, -2.0, x[m, n])")
def masked_fill(x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(5) > torch.arange(3)[:, None], -2)


@lifted("where(1.0 - float(x[m, n]) != 0.0, -1.0, 0.0)", (randn(3, 5) > 0).long())
def filled_where_not_zero(x: Tensor) -> Tensor:
    inverted = 1.0 - x
    return inverted.masked_fill(inverted.bool(), -1.0)


@lifted("where(n <= m, 1, 0)")
def truth_as_integer(x: Tensor) -> Tensor:
    return (torch.arange(5) <= torch.arange(3)[:, None]).long()


@lifted("n != m")
def integer_as_truth(x: Tensor) -> Tensor:
    return (torch.arange(5) - torch.arange(3)[:, None]).bool()


@lifted("to[m, n]")
def float_as_integer_is_data(x: Tensor) -> Tensor:
    return (x * torch.arange(5)).long()


# Gathers


@lifted("x[m, n - m + 2]", randn(3, 7))
def gather_by_position(x: Tensor) -> Tensor:
    m, n = torch.arange(3)[:, None], torch.arange(5)
    return x[m, n - m + 2]


@lifted("index[m, n]", randn(7))
def index_that_may_be_negative_is_data(x: Tensor) -> Tensor:
    return x[torch.arange(5) - torch.arange(3)[:, None]]


@lifted("x[m, n // 2]", randn(3, 3))
def gather_of_columns(x: Tensor) -> Tensor:
    return x[:, torch.arange(6) // 2]


@lifted("x[h, n]", randn(2, 5))
def gather_between_dimensions(x: Tensor) -> Tensor:
    b, n = torch.arange(2)[:, None, None], torch.arange(5)
    return x[b, n] & torch.ones(2, 3, 5, dtype=torch.bool) if x.dtype == torch.bool else x[b, n].expand(2, 3, 5)


@lifted("index[m, n]", randn(4), torch.tensor([[0, 3], [1, 2]]))
def gather_by_data_over_queries_and_keys_is_data(x: Tensor, y: Tensor) -> Tensor:
    return x[y]


@lifted("x[n // 2, m]", randn(3, 4))
def rows_by_embedding(x: Tensor) -> Tensor:
    return F.embedding(torch.arange(6) // 2, x).mT


@lifted("x[n // 2, m]", randn(3, 4))
def rows_by_index_select(x: Tensor) -> Tensor:
    return x.index_select(0, torch.arange(6) // 2).mT


@lifted("index[m, n]", randn(3, 4, 5))
def indices_that_do_not_stand_together_are_data(x: Tensor) -> Tensor:
    return x[torch.arange(2), :, torch.arange(2)]


# Differences and sums of ranges


@lifted("1")
def difference_of_a_range(x: Tensor) -> Tensor:
    return torch.arange(6).diff()


@lifted("1")
def difference_with_a_first_element(x: Tensor) -> Tensor:
    at = torch.arange(5)
    return at.diff(prepend=at[:1] - 1)


@lifted("diff[n]", torch.tensor([0, 1, 0, 1, 2]))
def difference_of_data(x: Tensor) -> Tensor:
    return x.diff()


@lifted("n*2 + 2")
def running_sum_of_a_constant(x: Tensor) -> Tensor:
    return torch.full((5,), 2).cumsum(0)


@lifted("cumsum[m, n]", (randn(3, 5) > 0).long())
def running_sum_of_data(x: Tensor) -> Tensor:
    return x.cumsum(-1)


# What becomes a leaf


@lifted("eq[n]", torch.arange(5) % 3)
def comparison_of_data_is_computed_once(x: Tensor) -> Tensor:
    return x == 0


@lifted("~x[m, n]", randn(3, 5) > 0)
def negation_of_data_is_not(x: Tensor) -> Tensor:
    return ~x


@lifted("eq[n]", torch.arange(5) % 3)
def comparison_of_data_is_computed_before_it_is_expanded(x: Tensor) -> Tensor:
    return (x == 0).expand(3, 5)


@lifted("x[n] == x[m]", torch.tensor([0, 0, 1, 1, 2]))
def comparison_that_grows_is_not(x: Tensor) -> Tensor:
    return x == x[:, None]


@lifted("add[m, n]")
def written_in_place_is_data(x: Tensor) -> Tensor:
    y = x + 1
    y[0] = 0
    return y


@lifted("msort[m, n]")
def unknown_operators_are_data(x: Tensor) -> Tensor:
    return x.msort()
