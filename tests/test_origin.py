"""Where elements come from, against what the operators do: every rule, with tables for all dimensions and with variables."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import pad

from attnfuse.passes.graph import Storage
from attnfuse.passes.origin import ZERO, Case, Element, Number, Origins, Place, SplitError, Unproven

Move = Callable[[Tensor], Tensor]
MOVES: list[Move] = []
X = torch.arange(1.0, 145.0).view(2, 3, 4, 6)


def move(fn: Move) -> Move:
    MOVES.append(fn)
    return fn


@move
def views(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(8, 18).view(2, 4, 3, 6).permute(0, 2, 1, 3).flatten(1, 2).unsqueeze(1)


@move
def cuts(x: Tensor) -> Tensor:
    return x[:, 1:, ::2].select(2, -1).squeeze(1).narrow(-1, 1, 3)[..., -2:]


@move
def expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(2, 5, 4, 6).flip(1, 3)


@move
def chunks(x: Tensor) -> Tensor:
    return x.flatten(1, 2).contiguous().as_strided((2, 5, 4, 6), (72, 12, 6, 1))


@move
def chunks_of_a_transposed_tensor(x: Tensor) -> Tensor:
    return x.as_strided((3, 2, 3, 6), (24, 72, 6, 1))


@move
def windows(x: Tensor) -> Tensor:
    return pad(x, (0, 0, 1, 2), value=7.0).unfold(2, 3, 2)


@move
def cropped(x: Tensor) -> Tensor:
    return pad(x, (-1, 2, 1, -2))


@move
def concatenated(x: Tensor) -> Tensor:
    return torch.cat([x[..., :2], x.new_ones(2, 3, 4, 1), x[..., 3:]], -1)


@move
def triangles(x: Tensor) -> Tensor:
    return torch.cat([x.tril(1), x.triu(-1), x.tril(-2)], 1)


@move
def skewed(x: Tensor) -> Tensor:
    return pad(x, (0, 5)).flatten(2)[..., :-4].view(2, 3, 4, 10)[..., :-1]


@move
def chosen(x: Tensor) -> Tensor:
    rows, columns = torch.arange(4)[:, None], torch.arange(6)
    return torch.where((rows - columns).abs() < 2, x, x.new_full((), 5.0)).masked_fill(columns == 3, -1.0)


@move
def written(x: Tensor) -> Tensor:
    out = x.new_zeros(2, 3, 8, 6)
    out[:, :, 1:5] = x
    out[:, 0, 3:7] = x[:, 1]
    out[:, -1, :, 2:].fill_(9.0)
    out.view(2, 3, 2, 24)[:, 1, 0, 5:11] = x[:, 0, 0]
    out.transpose(1, 3)[:, 0, 2].masked_fill_(torch.arange(3) == 1, -3.0)
    return out


@move
def written_after_it_was_read(x: Tensor) -> Tensor:
    out = x.clone()
    before = out[:, :, :2].clone()
    out[:, :, :2] = 4.0
    out[:, :, 2:] = before
    return torch.cat([out, before], 2)


@move
def rounded_numbers(x: Tensor) -> Tensor:
    ones = x.new_full((4, 6), 0.1, dtype=torch.bfloat16).float()
    return torch.where(ones.bool(), ones * 3 + ones, x)


def found(fn: Move) -> tuple[fx.GraphModule, fx.Node]:
    module = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(X)
    (out,) = module.graph.output_node().all_input_nodes
    return module, out


def filled(cases: list[Case], cells: torch.Size, at: dict[str, int]) -> Tensor:
    """The tensor that the cases describe; NaN where none does."""
    out = torch.full(cells, torch.nan)
    for case in cases:
        if isinstance(case.value, Number):
            value = torch.tensor(float(case.value.number))
        else:
            assert isinstance(case.value, Element)
            assert case.value.node.op == "placeholder"
            places = [p.table + sum(at[name] * step for name, step in p.steps) for p in case.value.places]
            value = X[tuple(p.clamp(0, size - 1) for p, size in zip(places, X.shape, strict=True))]
        assert not (case.where & ~out.isnan()).any(), "two cases of one cell"
        out = torch.where(case.where, value, out)
    return out


@pytest.mark.parametrize("fn", MOVES)
def test_tables(fn: Move) -> None:
    module, out = found(fn)
    expected = fn(X)
    places = tuple(
        Place(torch.arange(s).view(-1, *[1] * (expected.dim() - 1 - d))) for d, s in enumerate(expected.shape)
    )
    everywhere = torch.ones(expected.shape, dtype=torch.bool)
    cases = Origins(Storage(module.graph), {}).at(out, places, everywhere, len(module.graph.nodes))
    assert torch.equal(filled(cases, expected.shape, {}), expected)


@pytest.mark.parametrize("fn", MOVES)
def test_variables(fn: Move) -> None:
    """With any one or two dimensions as variables the same, or nothing."""
    module, out = found(fn)
    expected = fn(X)
    known = 0
    for names in [*itertools.combinations(range(expected.dim()), 1), *itertools.combinations(range(expected.dim()), 2)]:
        extents = {f"x{dim}": expected.shape[dim] for dim in names}
        tabled = [dim for dim in range(expected.dim()) if dim not in names]
        cells = torch.Size(expected.shape[dim] for dim in tabled)
        places = [ZERO] * expected.dim()
        for at, dim in enumerate(tabled):
            places[dim] = Place(torch.arange(expected.shape[dim]).view(-1, *[1] * (len(tabled) - 1 - at)))
        for dim in names:
            places[dim] = Place(ZERO.table, ((f"x{dim}", 1),))
        everywhere = torch.ones(cells, dtype=torch.bool)
        try:
            cases = Origins(Storage(module.graph), extents).at(out, tuple(places), everywhere, len(module.graph.nodes))
        except Unproven:
            continue
        if any(isinstance(case.value, Element) and case.value.node.op != "placeholder" for case in cases):
            continue
        known += 1
        for values in itertools.product(*(range(expected.shape[dim]) for dim in names)):
            at_values = {f"x{dim}": value for dim, value in zip(names, values, strict=True)}
            index = tuple(at_values.get(f"x{dim}", slice(None)) for dim in range(expected.dim()))
            assert torch.equal(filled(cases, cells, at_values), expected[index])
    assert known, "nothing was followed"


def test_a_variable_splits() -> None:
    module, out = found(lambda x: x.flatten(0, 1))
    places = Place(ZERO.table, (("x", 1),)), Place(torch.arange(4)[:, None]), Place(torch.arange(6))
    with pytest.raises(SplitError) as error:
        Origins(Storage(module.graph), {"x": 6}).at(out, places, torch.ones(4, 6, dtype=torch.bool), 99)
    assert (error.value.name, error.value.low) == ("x", 3)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.clone().copy_(x.to(torch.bfloat16)),
        lambda x: x.clone().as_strided((2, 3, 4, 6), (72, 24, 6, 1)).mul_(x),
        lambda x: pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x[..., ::2].as_strided((2, 3, 4, 3), (72, 24, 6, 1)),
        lambda x: x.clone().masked_fill_(x > 3, 0.0),
    ],
    ids=["rounded", "arithmetic on data in place", "reflected", "not dense", "a mask of data"],
)
def test_refused(fn: Move) -> None:
    module, out = found(fn)
    shape = fn(X).shape
    places = tuple(Place(torch.arange(s).view(-1, *[1] * (len(shape) - 1 - d))) for d, s in enumerate(shape))
    with pytest.raises(Unproven):
        Origins(Storage(module.graph), {}).at(out, places, torch.ones(shape, dtype=torch.bool), len(module.graph.nodes))


@pytest.mark.parametrize("held", [False, True])
def test_a_tensor_that_may_be_written_to_later_is_no_constant(held: bool) -> None:
    """The module of a graph holds it, as a buffer for example."""
    module, out = found(lambda x: torch.where(torch.arange(6) < 3, x, 0.0))
    if held:
        (mask,) = [node for node in module.graph.nodes if str(node.target).startswith("aten.lt")]
        module.register_buffer("mask", torch.arange(6) < 3)
        with module.graph.inserting_before(mask):
            buffer = module.graph.get_attr("mask")
        buffer.meta = dict(mask.meta)
        mask.replace_all_uses_with(buffer)
    places = tuple(Place(torch.arange(s).view(-1, *[1] * (3 - d))) for d, s in enumerate(X.shape))
    cases = Origins(Storage(module.graph), {}).at(out, places, torch.ones(X.shape, dtype=torch.bool), 99)
    ops = {case.value.node.op for case in cases if isinstance(case.value, Element)}
    assert ops == ({"call_function"} if held else {"placeholder"})
    assert (Number(0.0) in [case.value for case in cases]) is not held
