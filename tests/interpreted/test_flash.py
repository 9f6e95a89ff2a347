"""The Triton kernels against the oracle, in the interpreter: families by shape, type and layout, random programs, every branch."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from triton.runtime.errors import OutOfResources

from attnfuse.reference import attention as reference
from attnfuse.score import Load
from attnfuse.spec import Shape
from attnfuse.templates import dropout, flash_gradients, launch, score_function, tuning
from attnfuse.templates.base import Cotangents, Inputs, Kernel
from attnfuse.templates.evaluate import Block
from attnfuse.templates.flash import Decode, Flash
from attnfuse.templates.kernels import backward, empty_rows, forward
from attnfuse.templates.tuning import Config
from tests.families import (
    FAMILIES,
    LAYOUTS,
    SEED,
    SHAPES,
    Call,
    Leaves,
    hold_to_oracle,
    in_types,
    made,
    values_of,
)
from tests.numerics import assert_close
from tests.sparse_masks import tiles_of
from tests.strategies import Case, cases

DECODED = {name: shape for name, shape in SHAPES.items() if shape.M * shape.H // shape.Hkv <= 64}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("text", "leaves"), FAMILIES.values(), ids=FAMILIES.keys())
def test_families_fp32(text: str, leaves: Leaves, shape: Shape) -> None:
    hold_to_oracle(made(text, shape, leaves(shape)))


@pytest.mark.parametrize("shape", DECODED.values(), ids=DECODED.keys())
@pytest.mark.parametrize(("text", "leaves"), FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("kernel", ["decode"], indirect=True)
def test_families_of_few_rows(text: str, leaves: Leaves, shape: Shape, kernel: Kernel) -> None:
    hold_to_oracle(made(text, shape, leaves(shape)))


@pytest.mark.parametrize(("text", "leaves", "dtype"), in_types(FAMILIES, torch.float16))
def test_families_fp16(text: str, leaves: Leaves, dtype: torch.dtype) -> None:
    shape = SHAPES["grouped"]
    hold_to_oracle(made(text, shape, leaves(shape), dtype))


@pytest.mark.parametrize("name", ["causal", "left padding", "nested", "softcap", "dense bias", "sinks", "dropout"])
def test_the_log_sum_exp_is_differentiable(name: str) -> None:
    text, leaves = FAMILIES[name]
    hold_to_oracle(made(text, SHAPES["grouped"], leaves(SHAPES["grouped"])), with_lse=True)


@pytest.mark.parametrize("size", [(16, 64), (64, 16)], ids=str)
@pytest.mark.parametrize(
    "name", ["causal", "window", "left padding", "lengths", "static cache", "softcap", "dense bias", "diagonals"]
)
def test_tiles_of_other_shapes(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_INTERPRETER", dict.fromkeys(tuning.KERNELS, Config(*size, 4, 1)))
    tuning.configs.cache_clear()
    text, leaves = FAMILIES[name]
    for shape in (Shape(2, 4, 2, 100, 100, 16, 16), Shape(1, 2, 1, 70, 130, 32, 16)):
        hold_to_oracle(made(text, shape, leaves(shape)))
    tuning.configs.cache_clear()


@pytest.mark.parametrize("name", ["two dimensions", "table by batch"])
def test_gradients_of_tables_in_slabs_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added up in the table before those of the next rows are computed."""
    monkeypatch.setattr(flash_gradients, "_SLAB", 64)
    made_of: list[tuple[int, ...]] = []
    add = flash_gradients.add_gradient

    def added(total: Tensor, load: Load, indices: object, block: Block, grad: Tensor) -> None:
        made_of.append(tuple(grad.shape))
        add(total, load, indices, block, grad)  # type: ignore[arg-type]

    monkeypatch.setattr(flash_gradients, "add_gradient", added)
    text, leaves = FAMILIES[name]
    shape = Shape(2, 2, 1, 150, 150, 16, 16)
    hold_to_oracle(made(text, shape, leaves(shape)))
    assert [size[2] for size in made_of] == [64, 64, 22] * (1 if name == "two dimensions" else 2)


@pytest.mark.parametrize("depth", [(1, 1), (5, 3), (20, 40), (64, 64), (80, 80), (128, 96), (256, 256)], ids=str)
def test_head_dimensions(depth: tuple[int, int]) -> None:
    text, _ = FAMILIES["causal"]
    hold_to_oracle(made(text, Shape(1, 2, 1, 40, 40, *depth)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["causal", "softcap", "dropout"])
def test_layouts(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    plain = made(FAMILIES[name][0], SHAPES["grouped"])
    q, k, v = (layout(x.detach()).requires_grad_() for x in (plain.q, plain.k, plain.v))
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)):
        hold_to_oracle(plain._replace(q=q, k=k, v=v, order=order))


def test_operands_that_are_not_aligned_are_read_by_pointers() -> None:
    plain = made(FAMILIES["causal"][0], SHAPES["grouped"])

    def shifted(x: Tensor) -> Tensor:
        wide = torch.zeros(x.numel() + 1)
        wide[1:] = x.detach().flatten()
        return wide[1:].view(x.shape).requires_grad_()

    call = plain._replace(q=shifted(plain.q), k=shifted(plain.k), v=shifted(plain.v))
    assert not launch._describable(call.k)
    assert launch._describable(plain.k)
    hold_to_oracle(call)


def test_more_heads_than_a_grid_axis_has() -> None:
    call = made("s*0.25 where n <= m else -inf", Shape(70_000, 1, 1, 1, 2, 1, 1))
    q, k, v = (x.detach() for x in (call.q, call.k, call.v))
    programs: list[int] = []

    class Counter:
        arch = "interpreter"

        def launch(self, kernel: Any, arguments: dict[str, Any], config: Config) -> None:
            programs.append(arguments["row_tiles"])

    inputs = Inputs(call.spec, str(call.spec), call.shape, q, k, v, (), (), None, call.order)
    with launch.rehearsing(Counter()):
        Flash().forward(inputs)
    # one axis of the grid holds all tiles of all heads, and it takes 2³¹ - 1
    assert programs == [1]


@pytest.mark.parametrize("text", ["dropout 0.4; s", "dropout 0.4; 5*tanh(s/5) where n <= m else -inf"])
def test_the_dropout_mask_is_the_one_of_every_device(text: str, kernel: Kernel) -> None:
    shape = Shape(2, 4, 2, 30, 61, 8, 61)
    call = made(text, shape)
    eye = torch.eye(61).expand(2, 2, 61, 61)
    kept = dropout.keep(SEED, 0.4, (2, 4, 30, 61))
    weights, _ = call._replace(v=eye).run()
    assert not weights[~kept].any(), "a dropped weight was used"
    allowed = weights.new_ones(30, 61).tril().bool() if "where" in text else weights.new_ones(30, 61).bool()
    assert (weights != 0)[kept & allowed].all(), "a kept weight was dropped"


@given(cases())
@settings(max_examples=40)
def test_random_programs(case: Case) -> None:
    call = values_of(case)
    if score_function.problem(str(call.spec)) is None:
        hold_to_oracle(call)


@pytest.mark.parametrize("tier", ["", " where n <= m + 20 else -inf"])
def test_a_bias_of_the_least_number_is_uniform(tier: str) -> None:
    """As a dense mask of a left-padded batch has it: every key of a row carries fp32's least number."""
    shape = SHAPES["grouped"]
    bias = torch.zeros(shape.B, 1, shape.M, shape.N)
    bias[1, :, :5] = torch.finfo(torch.float32).min
    call = made(f"bias: f32[:, :, :, :]; s*0.25 + bias[b, 0, m, n]{tier}", shape, (bias,))
    out, _ = call.run()
    exact, _ = reference(call.spec, call.q, call.k, call.v, call.leaves)
    original, _ = reference(call.spec, call.q, call.k, call.v, call.leaves, dtype=torch.float32)
    assert_close(out, original, exact)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (dv,), (same,), (precise,) = (torch.autograd.grad(x, (call.v,), dout.to(x.dtype)) for x in (out, original, exact))
    assert_close(dv, same, precise.double(), float(dout.abs().sum(2).max()))


def test_a_row_of_least_scores_is_not_taken_for_one_without_keys() -> None:
    """Both have fp32's least number for their log-sum-exp; here row 0 has no key, and all rows of head 1 have such scores."""
    shape = SHAPES["grouped"]
    bias = torch.zeros(shape.H, shape.N)
    bias[1] = torch.finfo(torch.float32).min
    bias.requires_grad_()
    call = made("bias: f32[:, :]; s*0.125 + bias[h, n] where n < m else +min", shape, (bias,))
    out = call.run()[0]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    exact, original = (
        reference(call.spec, call.q, call.k, call.v, (bias,), dtype=kind)[0] for kind in (torch.float64, torch.float32)
    )
    found, same, precise = (torch.autograd.grad(x, bias, dout.to(x.dtype))[0] for x in (out, original, exact))
    assert_close(found, same, precise.double(), float((dout.abs() @ call.v.abs().amax((0, 1)).T).sum()))


def test_a_kernel_that_cannot_be_made_costs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    call = made(FAMILIES["softcap"][0], SHAPES["grouped"])
    expected = call.run()[0]
    grads = torch.autograd.grad(expected.sum(), (call.q, call.k, call.v))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(launch.Call, "launch", fails)
    with pytest.warns(RuntimeWarning, match="no Triton kernel for .*OutOfResources: out of resource: shared memory"):
        out = call.run()[0]
    torch.testing.assert_close(out, expected)
    with pytest.warns(RuntimeWarning, match="computed densely"):
        torch.testing.assert_close(torch.autograd.grad(out.sum(), (call.q, call.k, call.v)), grads)


def test_one_text_serves_many_lengths() -> None:
    """A cache that grows by a key a step must not make new code at each."""
    text = "pad: bool[:, :]; s*0.125 where n <= m + N - M & n // 8 != m + i0 & pad[b, n] else +min"

    def functions(N: int) -> score_function.Functions:
        shape, form = Shape(1, 4, 2, 1, N, 64, 64), score_function.LeafForm.of((1, N), (N, 1))
        return launch._plan(text, shape, (N,), (form,)).functions

    assert functions(2049) is functions(4096)
    assert functions(2048) is not functions(2049)
    assert functions(2048).allowed is functions(2049).allowed


LONG = Shape(2, 4, 2, 1, 1200, 16, 16)


@pytest.mark.parametrize(
    "name",
    ["full", "static cache", "left padding", "window", "sinks", "sinks, empty rows", "dropout", "softcap", "holes"],
)
@pytest.mark.parametrize("kernel", ["decode"], indirect=True)
def test_rows_split_over_their_keys(name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    real = launch.Call.launch

    def counted(self: Any, kernel: Any, table: str, programs: Any, arguments: Any, rows: int | None = None) -> Config:
        if table == "decode":
            parts.append(arguments(tuning.configs("decode", "interpreter", 4, 16)[0])["splits"])
        used: Config = real(self, kernel, table, programs, arguments, rows)
        return used

    monkeypatch.setattr(launch.Call, "launch", counted)
    text, leaves = FAMILIES[name]
    text = text.replace("n <= m", "n <= m + N - M").replace("n > m", "n > m + N - M")
    hold_to_oracle(made(text, LONG, leaves(LONG)))
    assert parts[0] > 1


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("s*0.25 where n <= m else -inf", lambda n: n >= 64),
        ("s*0.25 where n <= m & n > m - 9 else -inf", lambda n: n >= 64),
        ("s*0.25 where n < 40 else -inf", lambda n: n >= 64),
        ("stop: i64[:]; s*0.25 where n < stop[b] else -inf", lambda n: n >= 64),
    ],
)
def test_tiles_outside_of_the_mask_are_not_read(text: str, unread: Callable[[Tensor], Tensor]) -> None:
    """Keys from the first tile that no row needs on hold NaN, which would reach every row whose tile they share."""
    shape = Shape(1, 2, 1, 64, 128, 16, 16)
    call = made(text, shape, (torch.tensor([50]),) if "stop" in text else ())
    expected, _ = call.run()
    where = unread(torch.arange(128))[:, None]
    k, v = (torch.where(where, torch.nan, x.detach()).requires_grad_() for x in (call.k, call.v))
    out, _ = call._replace(k=k, v=v).run()
    assert torch.equal(out, expected)
    dq, dk, dv = torch.autograd.grad(out.sum(), (call.q, k, v))
    assert not any(x.isnan().any() for x in (dq, dk, dv))


def test_gradients_are_the_same_in_every_run() -> None:
    text, leaves = FAMILIES["dense bias"]
    call = made(text, SHAPES["grouped"], tuple(x.requires_grad_() for x in leaves(SHAPES["grouped"])))
    inputs = (call.q, call.k, call.v, *call.leaves)
    first, second = (torch.autograd.grad(call.run()[0].square().sum(), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def _branches(function: Any) -> set[str]:
    """Names of the constexpr parameters that a kernel, or what it calls, decides on."""
    names: set[str] = set()
    tree = ast.parse(inspect.getsource(function.fn))
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            names |= {x.id for x in ast.walk(node.test) if isinstance(x, ast.Name) and x.id.isupper() and len(x.id) > 1}
    return names


def test_every_branch_of_every_kernel_is_reached() -> None:
    """Each constexpr that a kernel decides on is both there and not there, on and off, somewhere in these calls."""
    seen: dict[str, dict[str, set[bool]]] = {}

    class Recorder:
        arch = "interpreter"

        def launch(self, kernel: Any, arguments: dict[str, Any], config: Config) -> None:
            of_kernel = seen.setdefault(kernel.fn.__name__, {})
            for name, value in arguments.items():
                if name.isupper() and len(name) > 1:
                    of_kernel.setdefault(name, set()).add(value is not None and value is not False)

    def rehearse(call: Call, shape: Shape, layout: Callable[[Tensor], Tensor]) -> None:
        q, k, v = (layout(x.detach()).requires_grad_() for x in (call.q, call.k, call.v))
        for template in (Flash(), Decode()):
            inputs = Inputs(call.spec, str(call.spec), shape, q, k, v, call.leaves, (), SEED, call.order)
            with launch.rehearsing(Recorder()):
                out, lse = template.forward(inputs)
                for needs in ((True, True, True), (True, False, True), (False, True, False)):
                    wanted = (*needs, *(x.requires_grad for x in call.leaves))
                    given_ = Cotangents(out, lse, out, lse if needs[0] else None, wanted)
                    template.backward(inputs, given_)

    for (text, leaves), shape, layout in (
        (family, shape, layout)
        for family in FAMILIES.values()
        for shape in (*SHAPES.values(), LONG, Shape(1, 2, 2, 64, 64, 16, 16))
        for layout in (LAYOUTS["contiguous"], LAYOUTS["every other element"])
    ):
        wanted = tuple(x.requires_grad_(x.is_floating_point()) for x in leaves(shape))
        rehearse(made(text, shape, wanted), shape, layout)
    with tiles_of(32):
        for shape in (Shape(1, 2, 2, 96, 96, 16, 16), Shape(1, 2, 2, 100, 100, 16, 16)):
            rehearse(made("s*0.25 where abs(m - n) < 9 | n < 5 else -inf", shape), shape, LAYOUTS["contiguous"])
    kernels = {
        name: fn
        for module in (forward, backward, empty_rows)
        for name, fn in vars(module).items()
        if name in seen and hasattr(fn, "fn")
    }
    assert len(kernels) == 10, sorted(seen)
    missing = {
        (name, flag) for name, fn in kernels.items() for flag in _branches(fn) if seen[name].get(flag) != {True, False}
    }
    # D and BLOCK_D are compared with each other, which head dimensions decide
    assert {pair for pair in missing if pair[1] not in ("D", "DV", "WIDTH", "BLOCK_D", "BLOCK_DV")} == set()
