"""Equality masks on unsorted ids, computed in the order of their ids: values, gradients, cells, and when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from attnfuse.score import FILLS, Program, Tier, parse_expr
from attnfuse.spec import Shape
from attnfuse.templates import grouped
from attnfuse.templates.base import Cotangents, Inputs
from attnfuse.templates.blocked import Blocked
from tests.families import Call, floats, hold_to_oracle, made, scattered, values_of
from tests.harness import check
from tests.strategies import Case, cases, programs
from tests.test_blocked import blocks, peak_bytes


@contextmanager
def sorting(always: bool | None) -> Iterator[list[bool]]:
    """Sorts wherever that can be done, never, or (None) where it pays; gives for each call whether it was done."""
    found: list[bool] = []
    order_of = grouped.order_of

    def watched(inputs: Inputs) -> grouped.Order | None:
        order = order_of(inputs)
        found.append(order is not None)
        return order

    grouped._index_order.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if always is not None:
            patch.setattr(grouped, "pays", lambda *_: always)
        patch.setattr(grouped, "order_of", watched)
        yield found
    grouped._index_order.cache_clear()


def hold_sorted(call: Call, **more: Any) -> None:
    """The call agrees with the oracle, and was sorted in the forward and in the backward."""
    with sorting(True) as found:
        hold_to_oracle(call, **more)
    assert found == [True, True]


def random_ids(*size: int, of: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(of, size, generator=torch.Generator().manual_seed(seed))


def by_doc(text: str, shape: Shape, doc: Tensor, *leaves: Tensor, declared: str = "", **more: Any) -> Call:
    """A call whose mask reads doc [b, n] and more leaves."""
    return made(f"doc: i64[:, :]; {declared}{text}", shape, (doc, *leaves), **more)


SHAPE = Shape(2, 4, 2, 40, 40, 8, 8)
SAME = "doc[b, m] == doc[b, n]"
IDS = {
    "a few": random_ids(2, 40),
    "most alone": random_ids(2, 40, of=200),
    "one comes back": torch.stack((torch.tensor([0, 1, 0, 2]), torch.tensor([3, 4, 5, 3]))).repeat_interleave(10, 1),
    "one batch sorted": torch.stack((torch.arange(40) // 9, random_ids(40))),
    "far apart": random_ids(2, 40) * (2**61) - 2**62,
    "least and greatest": torch.tensor([-(2**63), 2**63 - 1])[random_ids(2, 40, of=2)],
}
MASKS = {
    "full": SAME,
    "causal": f"n <= m & {SAME}",
    "window": f"{SAME} & n <= m & n > m - 9",
    "strict": f"{SAME} & n < m",
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_ids(ids: Tensor, mask: str) -> None:
    hold_sorted(by_doc(f"s*0.125 where {mask} else 0row", SHAPE, ids), with_lse=True)


SCORES = {
    "softcap": ("5*tanh(s*0.125/5)", "", ()),
    "dropout": ("s*0.125", "dropout 0.3; ", ()),
    "a bias of keys": ("s*0.125 + bias[h, n]", "bias: f32[:, :]; ", (floats(4, 40),)),
    "a dense bias": ("s*0.125 + bias[b, 0, m, n]", "bias: f32[:, :, :, :]; ", (floats(2, 1, 40, 40),)),
    "a dense bias, turned": ("s*0.125 + bias[n, m]", "bias: f32[:, :]; ", (floats(40, 40),)),
    "a bias along diagonals": ("s*0.125 + bias[h, n - m + 39]", "bias: f32[:, :]; ", (floats(4, 79),)),
    "a bias of rows": ("s*0.125 * scale[b, m]", "scale: f32[:, :]; ", (floats(2, 40),)),
    "by distance": ("s*0.125 - slope[h]*abs(n - m)", "slope: f32[:]; ", (floats(4).abs(),)),
    "relative": ("s*0.125 + table[n - m + M - 1, h]", "table: f32[:, :]; ", (floats(79, 4),)),
}


@pytest.mark.parametrize("fill", ["-inf", "+min", "=min", "0row"])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES.keys())
def test_scores_and_rows_without_a_key(score: tuple[str, str, tuple[Tensor, ...]], fill: str) -> None:
    """Rows without a key are like all others' keys: uniform over all of them, zeros, or NaN."""
    text, declared, leaves = score
    call = made(
        f"doc: i64[:, :]; {declared}{text} where n < m & {SAME} else {fill}", SHAPE, (random_ids(2, 40), *leaves)
    )
    hold_sorted(call, with_lse=True)


def test_a_leaf_that_is_shorter_than_the_rows() -> None:
    hold_sorted(
        by_doc(
            f"s + table[m] where {SAME} & m < 31 else 0row",
            SHAPE,
            random_ids(2, 40),
            floats(31),
            declared="table: f32[:]; ",
        )
    )


@pytest.mark.parametrize(
    "text", ["s*0.125 where n < m & {} else +min sink sinks[h]", "s where {} else 0row sink sinks[h]"]
)
def test_sinks(text: str) -> None:
    sinks = floats(4).masked_fill(torch.arange(4) == 1, -torch.inf)
    hold_sorted(by_doc(text.format(SAME), SHAPE, random_ids(2, 40), sinks, declared="sinks: f32[:]; "))


def test_a_sink_of_each_row() -> None:
    call = by_doc(
        f"s where {SAME} else -inf sink sinks[b, m]",
        SHAPE,
        random_ids(2, 40),
        floats(2, 40),
        declared="sinks: f32[:, :]; ",
    )
    hold_sorted(call)


PADDINGS = {
    "left": torch.arange(40) >= torch.tensor([[7], [0]]),
    "right": torch.arange(40) < torch.tensor([[31], [40]]),
    "holes": scattered(2, 40),
    "a batch of none": torch.tensor([[False], [True]]).expand(2, 40),
}


@pytest.mark.parametrize("fill", ["+min", "0row"])
@pytest.mark.parametrize("pad", PADDINGS.values(), ids=PADDINGS.keys())
def test_padding(pad: Tensor, fill: str) -> None:
    for ids in (random_ids(2, 40), IDS["least and greatest"]):
        text = f"s*0.125 where n <= m & {SAME} & pad[b, n] else {fill}"
        hold_sorted(by_doc(text, SHAPE, ids, pad, declared="pad: bool[:, :]; "))


@pytest.mark.parametrize(
    "mask",
    [
        f"{SAME} & n < stop[b] & n >= start[b]",
        f"{SAME} & n <= m & stop[b] > 9 & start[b] < 4",
        f"{SAME} & (n - m) % 3 == 0 & n < stop[b] & n >= start[b]",
        f"{SAME} & n > m - 5*(h + 1) & n <= m + start[b] + stop[b]",
    ],
)
def test_what_else_a_mask_says(mask: str) -> None:
    ends = torch.tensor([2, 5]), torch.tensor([40, 20])
    hold_sorted(
        by_doc(f"s where {mask} else 0row", SHAPE, random_ids(2, 40), *ends, declared="start: i64[:]; stop: i64[:]; ")
    )


def test_several_ids() -> None:
    for mask in (
        "doc[b, m] == doc[b, n] & part[m] == part[n]",
        "doc[b, m] == doc[b, n] & part[m] == part[n] & doc[b, n] == part[m]",
    ):
        call = by_doc(
            f"s where n <= m & {mask} else 0row",
            SHAPE,
            random_ids(2, 40),
            random_ids(40, of=3),
            declared="part: i64[:]; ",
        )
        hold_sorted(call)


def test_tiers() -> None:
    text = f"s*0.125 where n <= m else =min where {SAME} else +min"
    hold_sorted(by_doc(text, SHAPE, random_ids(2, 40)))


@pytest.mark.parametrize("lengths", [(30, 50), (50, 30), (1, 40), (40, 1)])
def test_ids_of_rows_and_of_keys(lengths: tuple[int, int]) -> None:
    """Rows of ids that no key has, keys of ids that no row has, in two leaves of unlike types."""
    M, N = lengths
    shape = SHAPE._replace(M=M, N=N)
    for mask in ("mine[m, b] == theirs[b, n]", "theirs[b, n] == mine[m, b] & n <= m + N - M"):
        leaves = (random_ids(M, 2, of=7).int(), random_ids(2, N, of=5, seed=1) * 2)
        hold_sorted(made(f"mine: i32[:, :]; theirs: i64[:, :]; s where {mask} else +min", shape, leaves))


def test_rows_in_no_order_of_keys_that_stand_together() -> None:
    leaves = (random_ids(2, 40, of=7), torch.tensor([5, 3, 0, 4, 9]).repeat_interleave(8).expand(2, 40))
    hold_sorted(made("mine: i64[:, :]; theirs: i64[:, :]; s where mine[b, m] == theirs[b, n] else 0row", SHAPE, leaves))


def test_every_head_its_ids() -> None:
    for shape, text in (
        (SHAPE._replace(Hkv=4), "doc[b, h, m] == doc[b, h, n]"),
        (SHAPE, "doc[b, h // 2, m] == doc[b, h // 2, n]"),
        (SHAPE._replace(Hkv=1), "doc[b, 0, m] == doc[b, 0, n]"),
    ):
        ids = random_ids(2, 4, 40)
        for score, mask in (("s", f"n <= m & {text}"), ("5*tanh(s/5)", text), ("s", f"{text} & n > m - 5*(h + 1)")):
            hold_sorted(made(f"doc: i64[:, :, :]; {score} where {mask} else +min", shape, (ids,)))
    # the rows of a head are all of one id
    text = "doc: i64[:, :]; part: i64[:]; s where doc[b, n] == part[h] & n <= m else +min"
    hold_sorted(made(text, SHAPE._replace(Hkv=4), (random_ids(2, 40), random_ids(4))))
    bias = floats(2, 4, 40, 40)
    text = "doc: i64[:, :, :]; bias: f32[:, :, :, :]; dropout 0.2; s + bias[b, h, m, n] where doc[b, h, m] == doc[b, h, n] else 0row"
    hold_sorted(made(text, SHAPE._replace(Hkv=4), (random_ids(2, 4, 40), bias)))


def test_heads_that_share_keys_but_not_ids_are_not_sorted() -> None:
    call = made("doc: i64[:, :, :]; s where doc[b, h, m] == doc[b, h, n] else 0row", SHAPE, (random_ids(2, 4, 40),))
    with sorting(True) as found:
        hold_to_oracle(call)
    assert found == [False, False]


def test_ids_of_indices() -> None:
    """Residues of positions are ids too, and their order is made once."""
    call = made("s*0.125 where m % 4 == n % 4 & n <= m & n > m - 17 else -inf", SHAPE)
    hold_sorted(call)
    with sorting(True):
        call.run()
        call.run()
        assert grouped._index_order.cache_info().hits == 1


@pytest.mark.parametrize("score", ["s*0.125", "5*tanh(s/5)"])
def test_masks_that_are_kept_are_not_those_of_the_other_order(score: str) -> None:
    call = made(f"{score} where m % 4 == n % 4 & (n - m) % 3 == 0 else -inf", SHAPE)
    with sorting(False):
        hold_to_oracle(call)
    hold_sorted(call)
    with sorting(False):
        hold_to_oracle(call)


@pytest.mark.parametrize(
    ("declared", "mask", "ids"),
    [
        ("doc: i64[:, :]", "doc[b, m] != doc[b, n]", random_ids(2, 40)),
        ("doc: i64[:, :]", "doc[b, m] <= doc[b, n]", random_ids(2, 40)),
        ("doc: i64[:, :]", "doc[b, m] == doc[b, n] | n < 4", random_ids(2, 40)),
        ("doc: i64[:, :]", "doc[b, m] == doc[b, n] + m", random_ids(2, 40)),
        (
            "doc: f32[:, :]",
            "doc[b, m] == doc[b, n]",
            random_ids(2, 40).float().masked_fill(scattered(2, 40), torch.nan),
        ),
        ("doc: i64[:, :]", "doc[b, m] == doc[b, n] | doc[b, m + 1] == doc[b, n + 1]", random_ids(2, 41)),
        ("doc: i64[:, :]", "doc[b, m] == doc[b, n]", random_ids(2, 40).sort(1, descending=True).values),
        ("doc: i64[:, :]", "doc[b, m] == doc[b, n]", random_ids(2, 40, of=1)),
        ("doc: i64[:, :]", "doc[b, m] == doc[b, n]", torch.randperm(40, generator=torch.Generator()).expand(2, 40)),
    ],
    ids=["not equal", "at most", "or", "of both", "floats", "rounds", "in descending order", "one id", "all alone"],
)
def test_what_is_not_sorted(declared: str, mask: str, ids: Tensor) -> None:
    with sorting(True) as found:
        hold_to_oracle(made(f"{declared}; s*0.125 where {mask} else 0row", SHAPE, (ids,)))
    assert found == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    hold_sorted(by_doc(f"s*0.125 where n <= m & {SAME} else +min", SHAPE, random_ids(2, 40), dtype=dtype))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)], ids=str)
def test_layouts(order: tuple[int, ...]) -> None:
    plain = by_doc(f"s*0.125 where n <= m & {SAME} else 0row", SHAPE, random_ids(2, 40), order=order)
    for layout in (Tensor.contiguous, lambda x: x.mT.contiguous().mT, lambda x: x[:, :1].expand(x.shape)):
        q, k, v = (layout(x.detach()).requires_grad_() for x in (plain.q, plain.k, plain.v))
        call = plain._replace(q=q, k=k, v=v)
        with sorting(True):
            out, lse = call.run()
            grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert lse.is_contiguous()
        assert all(x.permute(order).is_contiguous() for x in (out, *grads))
        hold_sorted(call)


@pytest.mark.parametrize("empty", ["B", "M", "N", "D", "Dv"])
def test_nothing_of_one_size(empty: str) -> None:
    shape = SHAPE._replace(**{empty: 0})
    call = by_doc(f"s where {SAME} else +min", shape, random_ids(shape.B, 40))
    with sorting(True):
        out, _ = call.run()
        grads = torch.autograd.grad(out.sum(), (call.q, call.k, call.v))
    assert out.shape == (shape.B, 4, shape.M, shape.Dv)
    assert not any(x.isnan().any() for x in (out, *grads))


equalities = st.builds(
    Tier,
    st.sampled_from(tuple(map(parse_expr, (SAME, f"{SAME} & n <= m", "pos[b, m] % 3 == doc[b, n]")))),
    st.sampled_from(FILLS),
)
programs_of_ids = st.builds(
    lambda program, tier, first: Program(
        program.body, (tier, *program.tiers) if first else (*program.tiers, tier), program.sink
    ),
    programs,
    equalities,
    st.booleans(),
)


def test_random_programs() -> None:
    """In blocks of any size, one equality among the conditions."""
    sorted_calls: list[bool] = []

    @given(cases(programs_of_ids), st.sampled_from(((3, 16), (64, 1 << 20))))
    @settings(max_examples=200)
    def hold(case: Case, size: tuple[int, int]) -> None:
        with sorting(True) as found, blocks(*size):
            hold_to_oracle(values_of(case))
        sorted_calls.extend(found)

    hold()
    assert sum(sorted_calls) > len(sorted_calls) / 3


# --- how much is computed --------------------------------------------------------------------------------------------


class Cells(TorchDispatchMode):
    """The scores that operators compute, those of a causal square all counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("aten::_scaled_dot_product_flash"):
            q, k = args[1:3] if name.endswith("backward") else args[:2]
            self.count += q.shape[:3].numel() * k.shape[2]
        elif name == "aten::_softmax":
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("score", ["s*0.125", "5*tanh(s/5)"])
@pytest.mark.parametrize("by_head", [False, True], ids=["by batch", "by head"])
def test_only_cells_of_one_id_are_computed(score: str, by_head: bool) -> None:
    shape = Shape(1, 2, 2, 1024, 1024, 8, 8)
    ids = random_ids(1, 2 if by_head else 1, 1024, of=8)
    head = "h" if by_head else "0"
    call = made(
        f"doc: i64[:, :, :]; {score} where n <= m & doc[b, {head}, m] == doc[b, {head}, n] else -inf", shape, (ids,)
    )
    squares = sum(int(x.bincount().square().sum()) for x in ids.expand(1, 2, -1).flatten(0, 1))
    inputs = Inputs(call.spec, str(call.spec), shape, *(x.detach() for x in call[1:4]), (ids,), (), None, call.order)
    # a mode sees the operator, but nothing inside of it
    with sorting(True), Cells() as seen:
        out, lse = Blocked().forward(inputs)
    # matrix products leave out what is above the diagonal, block by block
    assert seen.count == squares if score == "s*0.125" else squares / 2 < seen.count < squares
    with sorting(True), Cells() as again:
        Blocked().backward(inputs, Cotangents(out, lse, torch.ones_like(out), None, (True,) * 3 + (False,)))
    assert again.count == seen.count
    with sorting(False), Cells() as seen:
        Blocked().forward(inputs)
    assert seen.count > 4 * squares


def test_memory_is_linear() -> None:
    def peak(length: int) -> int:
        ids = random_ids(1, length, of=length // 64)
        call = by_doc(f"s*0.125 where n <= m & {SAME} else +min", Shape(1, 2, 1, length, length, 16, 16), ids)
        with sorting(True):
            return peak_bytes(lambda: torch.autograd.grad(call.run()[0].sum(), (call.q, call.k, call.v)))

    assert peak(4096) <= 5 * peak(1024)


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["s*0.125", "5*tanh(s/5)"])
def test_results_do_not_depend_on_the_choice(text: str) -> None:
    """Nor does the dropout mask."""
    shape = Shape(2, 2, 1, 300, 300, 8, 300)
    for dropout in ("", "dropout 0.4; "):
        call = by_doc(f"{dropout}{text} where n <= m & {SAME} else +min", shape, random_ids(2, 300))
        call = call._replace(v=torch.eye(300).expand(2, 1, 300, 300))
        weights = []
        for always in (True, False):
            with sorting(always) as found:
                weights.append(call.run()[0])
            assert found == [always]
        assert torch.equal(weights[0] == 0, weights[1] == 0)
        torch.testing.assert_close(*weights)


def chosen(N: int, ids: Tensor, mask: str = f"n <= m & {SAME}", M: int | None = None, H: int = 8) -> bool:
    call = by_doc(f"s where {mask} else -inf", Shape(1, H, H, M or N, N, 8, 8), ids[None])
    with sorting(None) as found, torch.no_grad():
        call.run()
    return found[0]


def test_sorting_is_chosen_where_it_saves_more_than_it_costs() -> None:
    assert chosen(1024, random_ids(1024, of=16))
    assert chosen(1024, random_ids(1024, of=16), SAME)
    assert chosen(2048, random_ids(2048, of=4), H=2)
    # one token, a short sequence, hardly anything to leave out
    assert not chosen(2048, random_ids(2048, of=16), M=1)
    assert not chosen(64, random_ids(64, of=4))
    assert not chosen(1024, (torch.arange(1024) % 100 == 7).long())
    # far groups, which the tile map leaves out as well
    blocks = torch.arange(2048) // 256
    assert not chosen(2048, torch.where(blocks == 7, 0, blocks))


def test_sorting_is_chosen_for_ids_of_each_head() -> None:
    ids = random_ids(1, 8, 1024, of=16)
    call = made(
        "doc: i64[:, :, :]; s where n <= m & doc[b, h, m] == doc[b, h, n] else -inf",
        Shape(1, 8, 8, 1024, 1024, 8, 8),
        (ids,),
    )
    with sorting(None) as found, torch.no_grad():
        call.run()
    assert found == [True]


def test_a_row_whose_id_no_key_has_widens_no_block() -> None:
    """Of half of the rows, in one block with the others."""
    N = 1024
    mine, theirs = random_ids(1, N, of=32), random_ids(1, N, of=32) // 2 * 2
    call = made(
        "mine: i64[:, :]; theirs: i64[:, :]; s where (n - m) % 2 == 0 & mine[b, m] == theirs[b, n] else 0row",
        Shape(1, 1, 1, N, N, 8, 8),
        (mine, theirs),
    )
    q, k, v, *leaves = (x.detach() for x in (call.q, call.k, call.v, *call.leaves))
    inputs = Inputs(call.spec, str(call.spec), call.shape, q, k, v, leaves, (), None, call.order)
    with sorting(True), Cells() as seen:
        Blocked().forward(inputs)
    # a block of 128 rows has about four ids, of two of which there are keys, 64 each
    assert seen.count < N * 512
    hold_sorted(call)


def test_what_pays_is_a_matter_of_sizes() -> None:
    shape = Shape(1, 8, 8, 1024, 1024, 64, 64)
    cells = 8 * 1024 * 1024
    assert grouped.pays(shape, cells, cells // 8, 8, 8)
    assert not grouped.pays(shape, cells, cells // 8, 1000, 8)
    assert not grouped.pays(shape, cells, cells, 1, 8)
    # as many parts of one head are less than parts of eight
    assert grouped.pays(shape, cells, cells // 8, 400, 1)
    assert not grouped.pays(shape, cells, cells // 8, 400, 8)
    assert not grouped.pays(shape._replace(B=100), cells, cells // 8, 8, 8)


# --- through the backend ---------------------------------------------------------------------------------------------


def reformer(x: Tensor, rotations: Tensor) -> Tensor:
    """One round of hashing: each head looks at what falls into its bucket, before it and itself."""
    q, v = (y.view(*y.shape[:2], 2, 16).transpose(1, 2) for y in x.chunk(2, -1))
    turned = q.detach() @ rotations
    buckets = torch.cat((turned, -turned), -1).argmax(-1)
    i = torch.arange(x.shape[1])
    allowed = (buckets[..., :, None] == buckets[..., None, :]) & (i <= i[:, None])
    return (q @ q.mT * 0.25).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def unsorted_documents(x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = x.view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=same)


MODELS = {
    "hashed heads": (reformer, floats(2, 192, 64), floats(16, 4)),
    "documents": (unsorted_documents, floats(2, 192, 192), random_ids(2, 192)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "any length"])
@pytest.mark.parametrize(("fn", "x", "other"), MODELS.values(), ids=MODELS.keys())
def test_models(fn: Callable[..., Tensor], x: Tensor, other: Tensor, dynamic: bool) -> None:
    x, other = x.clone(), other.clone()
    if dynamic:
        for given_ in (x, other)[: 1 + (other.dtype == torch.int64)]:
            torch._dynamo.mark_dynamic(given_, 1)
    with sorting(True) as found:
        (remark,) = check(fn, x, other).remarks
    assert remark.kind == "fused"
    assert found == [True, True]
