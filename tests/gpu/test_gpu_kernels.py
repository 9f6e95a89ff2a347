"""The Triton kernels on a GPU against the oracle: every family, type and template; layouts; long and wide inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnfuse import ops
from attnfuse.ops import _kernel, _Kind
from attnfuse.spec import Shape
from attnfuse.templates.flash import Decode, Flash
from tests.families import FAMILIES, LAYOUTS, SHAPES, Call, Leaves, hold_to_oracle, made
from tests.sparse_masks import SPARSE_MASKS, SparseMask

TYPES = [torch.bfloat16, torch.float16, torch.float32]
# Several tiles of every size in the tables, with tails.
LONG = Shape(2, 6, 2, 333, 333, 64, 64)
WIDE = Shape(1, 4, 2, 300, 420, 128, 128)
DEEP = Shape(1, 2, 1, 200, 200, 256, 256)
ROW = Shape(2, 8, 2, 1, 3000, 128, 128)


def kernel_of(call: Call) -> str:
    kinds = tuple((x.dtype, x.dim(), torch.device("cuda")) for x in call.leaves)
    dtypes, devices = (call.q.dtype, call.k.dtype, call.v.dtype), (torch.device("cuda"),) * 3
    shapes = tuple(call.q.shape), tuple(call.k.shape), tuple(call.v.shape)
    kind = _Kind(str(call.spec), *shapes, dtypes, devices, kinds, len(call.sizes), (), True, call.order, ops.ABI)
    return type(_kernel(kind, "cuda", False)[0]).__name__


# Every kernel of every shape has to be compiled first: one shape will do for the types beside bf16.
BY_TYPE = {torch.bfloat16: (LONG, WIDE, *SHAPES.values()), torch.float16: (LONG,), torch.float32: (LONG,)}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("text", "leaves"), FAMILIES.values(), ids=FAMILIES.keys())
def test_families(text: str, leaves: Leaves, dtype: torch.dtype) -> None:
    for shape in BY_TYPE[dtype]:
        call = made(text, shape, leaves(shape), dtype)
        assert kernel_of(call) in ("Flash", "Decode")
        hold_to_oracle(call, device="cuda")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mask", SPARSE_MASKS.values(), ids=SPARSE_MASKS.keys())
def test_tile_maps(mask: SparseMask, dtype: torch.dtype) -> None:
    shape = Shape(2, 4, 2, 700, 700, 64, 64)
    call = made(f"{mask.declared}s*0.125 where {mask.mask} else -inf", shape, mask.leaves(shape), dtype)
    hold_to_oracle(call, device="cuda")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "left padding", "softcap", "dropout", "dense bias"])
def test_deep_heads_and_single_rows(name: str, dtype: torch.dtype) -> None:
    text, leaves = FAMILIES[name]
    hold_to_oracle(made(text, DEEP, leaves(DEEP), dtype), device="cuda")
    call = made(text.replace("n <= m", "n <= m + N - M"), ROW, leaves(ROW), dtype)
    assert kernel_of(call) == "Decode"
    hold_to_oracle(call, device="cuda")


@pytest.mark.parametrize("depth", [(1, 1), (5, 3), (40, 80), (96, 96), (100, 100), (192, 128)], ids=str)
def test_head_dimensions(depth: tuple[int, int]) -> None:
    for name in ("causal", "softcap"):
        hold_to_oracle(made(FAMILIES[name][0], Shape(1, 4, 2, 150, 150, *depth), (), torch.bfloat16), device="cuda")


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    plain = made(FAMILIES["causal"][0], LONG, (), torch.bfloat16).on("cuda")
    q, k, v = (layout(x.detach()).requires_grad_() for x in (plain.q, plain.k, plain.v))
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)):
        hold_to_oracle(plain._replace(q=q, k=k, v=v, order=order), device="cuda")


@pytest.mark.parametrize("name", ["causal", "left padding", "nested", "softcap", "dense bias", "sinks", "dropout"])
def test_the_log_sum_exp_is_differentiable(name: str) -> None:
    text, leaves = FAMILIES[name]
    hold_to_oracle(made(text, LONG, leaves(LONG)), with_lse=True, device="cuda")


def test_more_heads_than_a_grid_axis_has() -> None:
    shape = Shape(70_000, 1, 1, 3, 3, 16, 16)
    hold_to_oracle(made("s*0.25 where n <= m else -inf", shape, (), torch.bfloat16), device="cuda")


def test_offsets_beyond_32_bits() -> None:
    """q alone has more than 2³¹ elements: the last batch is compared with the same batch by itself."""
    q = torch.randn(9, 32, 65_536, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(9, 1, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def call(*x: Tensor) -> Tensor:
        out: Tensor = torch.ops.attnfuse.attention(
            *x, [], [], [], None, "s*0.1 where n < 60 else -inf", [0, 1, 2, 3], ops.ABI
        )[0]
        return out

    assert q.numel() > 2**31
    assert torch.equal(call(q, k, v)[-1:], call(q[-1:], k[-1:], v[-1:]))


def test_gradients_are_the_same_in_every_run() -> None:
    text, leaves = FAMILIES["dense bias"]
    call = made(text, LONG, tuple(x.requires_grad_() for x in leaves(LONG)), torch.bfloat16).on("cuda")
    inputs = (call.q, call.k, call.v, *call.leaves)
    dout = torch.randn(call.run()[0].shape, device="cuda").bfloat16()
    first, second = (torch.autograd.grad(call.run()[0], inputs, dout) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_every_template_is_reached() -> None:
    call = made("s*0.125", ROW, (), torch.bfloat16)
    assert kernel_of(call) == Decode.__name__
    assert kernel_of(made("s*0.125", LONG, (), torch.bfloat16)) == Flash.__name__
