"""What is added to scores: learned and constant numbers beside masks, dense tensors in any order, and what must not be taken for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.harness import check, qkv, randn, report_of, spec_of
from tests.numerics import assert_close

M = 6
MIN = torch.finfo(torch.float32).min
PAD = torch.arange(M) >= torch.tensor([[0], [2]])
INDEX = (torch.arange(M)[:, None] - torch.arange(M)).clamp(-2, 2) + 2


class Learned(torch.nn.Module):
    """A function of q, k, v, a table and padding, whose table is a parameter."""

    def __init__(self, fn: Callable[..., Tensor], table: Tensor, *, frozen: bool = False) -> None:
        super().__init__()
        self.fn = fn
        self.table = torch.nn.Parameter(table, requires_grad=not frozen)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return self.fn(q, k, v, self.table.to(q.dtype), pad)

    def gradient(self, run: Callable[..., Tensor], pad: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table's, of a sum of squares."""
        self.table.grad = None
        run(*(x.to(dtype) for x in qkv()), pad).square().sum().backward()
        assert self.table.grad is not None
        return self.table.grad.clone()


def check_learned(fn: Callable[..., Tensor], pad: Tensor = PAD) -> str:
    """The score of the attention, after a comparison with eager: output, gradients of q, k, v and of the table."""
    module = Learned(fn, randn(5, 4, seed=9))
    (remark,) = check(module, *qkv(), pad).remarks
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="attnfuse", options={"downstream": "aot_eager"})
    actual, original = module.gradient(compiled, pad), module.gradient(module, pad)
    exact = Learned(fn, randn(5, 4, seed=9).double())
    assert_close(actual, original, exact.gradient(exact, pad, torch.float64), what="the table's gradient")
    return str(remark.score)


def added(pad: Tensor) -> Tensor:
    """0 for keys, finfo.min for padding."""
    return torch.where(pad, 0.0, MIN)[:, None, None, :]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.5 + bias).softmax(-1) @ v


def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, table[INDEX].permute(2, 0, 1)[None] + added(pad))


def embedded(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, torch.nn.functional.embedding(INDEX, table).permute(2, 0, 1)[None] + added(pad))


def joined(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    bias = torch.cat((table[:2], table[2:]))[INDEX.flatten()].view(M, M, -1).permute(2, 0, 1).contiguous()
    return attention(q, k, v, bias[None] + added(pad))


@pytest.mark.parametrize("fn", [gathered, embedded, joined])
def test_learned_tables_are_no_masks(fn: Callable[..., Tensor]) -> None:
    assert check_learned(fn) == "s*0.5 + bias[h, m, n] where pad[b, n] else +min"


def with_a_mask_in_the_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    masked = table + torch.where(torch.arange(5) == 3, MIN, 0.0)[:, None]
    return gathered(q, k, v, masked, pad)


def overwritten(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    copy = table.clone()
    copy[3] = MIN
    return gathered(q, k, v, copy, pad)


@pytest.mark.parametrize("fn", [with_a_mask_in_the_table, overwritten])
def test_tables_that_may_hold_a_mask(fn: Callable[..., Tensor]) -> None:
    assert "else +min" not in check_learned(fn)


@pytest.mark.parametrize("masked", [-torch.inf, MIN], ids=str)
def test_tables_that_are_no_parameters_that_learn(masked: float) -> None:
    """Frozen parameters, and tensors that ask for a gradient for another reason, may be masks."""
    table = randn(5, 4, seed=9).masked_fill(torch.arange(5)[:, None] == 3, masked)
    (remark,) = check(Learned(gathered, table, frozen=True), *qkv(), PAD).remarks
    assert "else +min" not in str(remark.score)
    (remark,) = check(gathered, *qkv(), table, PAD).remarks
    assert "else +min" not in str(remark.score)


def test_a_table_without_gradient_may_be_a_mask() -> None:
    table = randn(5, 4, seed=9).masked_fill(torch.arange(5)[:, None] == 3, MIN)
    (remark,) = check(gathered, *qkv(), table, PAD, gradients=False).remarks
    assert "else +min" not in str(remark.score)


def chosen(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """As the masks that transformers makes for scaled_dot_product_attention."""
    mask = torch.where(pad[:, None, None, :], table[INDEX].permute(2, 0, 1)[None], MIN)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)


def test_a_bias_that_is_chosen_by_the_mask() -> None:
    """What is masked gives the bias no gradient, also in rows that are uniform."""
    none = PAD & (torch.arange(2) > 0)[:, None]
    for pad in (PAD, none):
        assert check_learned(chosen, pad) == "s*0.5 + where(pad[b, n], bias[h, m, n], 0.0) where pad[b, n] else +min"


def sloped(base: float, large: float = 1.0) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        slopes = torch.pow(torch.tensor(base), torch.arange(1, 5)) * large
        position = (pad.long().cumsum(-1) - 1) * pad
        return attention(q, k, v, slopes[:, None, None] * position[:, None, None, :] + added(pad))

    return run


def test_constants_that_are_computed_in_the_graph() -> None:
    (remark,) = check(sloped(0.5), *qkv(), PAD).remarks
    assert remark.score == "s*0.5 + bias[h]*float(ids[b, n]) where pad[b, n] else +min"


@pytest.mark.parametrize("large", [1e20, -1e37], ids=str)
def test_constants_that_are_too_large(large: float) -> None:
    (remark,) = check(sloped(0.5, large), *qkv(), PAD).remarks
    assert "else +min" not in str(remark.score)


def test_random_numbers_are_no_constants() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return attention(q, k, v, torch.rand(4)[:, None, None] * torch.arange(M) + added(pad))

    (remark,) = report_of(run, *qkv(), PAD).remarks
    assert "else +min" not in str(remark.score)


# --- dense tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0)], ids=str)
def test_dense_biases_in_any_order(order: tuple[int, ...]) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias.permute([order.index(i) for i in range(4)]))

    bias = randn(2, 4, M, M, seed=5).permute(order).contiguous()
    (remark,) = check(run, *qkv(), bias).remarks
    assert remark.score == "s*0.5 + bias[b, h, m, n]"


def test_dense_biases_with_joined_axes() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias.view(2, 4, M, M))

    for shape in ((8, M, M), (2, 4 * M, M), (8, M * M)):
        (remark,) = check(run, *qkv(), randn(*shape, seed=5)).remarks
        assert remark.score == "s*0.5 + bias[b, h, m, n]"


def test_dense_terms_are_added_up_by_the_graph() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return attention(q, k, v, a / 3.0 + b.mT / 2.0)

    (remark,) = check(run, *qkv(), randn(2, 4, M, M, seed=5), randn(2, 4, M, M, seed=6)).remarks
    assert remark.score == "s*0.5 + bias[b, h, m, n]"


def test_a_term_that_is_smaller_stays_by_itself() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return attention(q, k, v, a + b)

    (remark,) = check(run, *qkv(), randn(2, 4, M, M, seed=5), randn(4, 1, M, seed=6)).remarks
    assert remark.score == "s*0.5 + (bias[b, h, m, n] + bias2[h, n])"


def test_a_copy_is_shared_only_while_nothing_writes() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        bias = given.clone()
        first = attention(q, k, v, bias.mT)
        bias.mul_(2.0)
        return first, attention(q, k, v, bias.mT)

    check(run, *qkv(), randn(2, 4, M, M, seed=5))


def test_scores_that_are_minus_infinity_all_along_a_row() -> None:
    """In a bias that says nothing of it; a row whose log-sum-exp is zero is another thing."""
    bias = torch.zeros(M, M)
    bias[2] = -torch.inf
    bias[3, 1:] = -torch.inf
    q, k, v = qkv()
    q[:, :, 3] = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        given = (x.to(dtype) for x in (q, k, v, bias))
        check(lambda q, k, v, bias: attention(q, k, v, bias), *given, options={"inline_scores": 0}, gradients=False)


def test_a_copy_is_not_shared_across_a_write_that_nothing_read_before() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        bias = given.clone()
        first = attention(q, k, v, bias.mT)
        bias.mul_(-0.5)
        return first, attention(q.exp(), k, v, bias.mT)

    for options in ({}, {"inline_scores": 0}):
        check(run, *qkv(), randn(2, 4, M, M, seed=5), options=options)


def test_a_copy_that_is_made_without_gradient_is_not_shared() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = attention(q, k, v, bias.mT)
        return attention(teacher + q, k, v, bias.mT)

    check(run, *qkv(), randn(2, 4, M, M, seed=5), options={"inline_scores": 0})


def test_rows_of_minus_infinity_in_what_is_learned() -> None:
    """A parameter that asks for a gradient, as one made of a mask does by default."""
    table = torch.zeros(5, 4)
    table[:3] = -torch.inf
    for fn in (chosen, gathered):
        check(Learned(fn, table), *qkv(), PAD, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_biases_may_be_infinite(dtype: torch.dtype) -> None:
    """Beside padding, where nothing but the type bounds them."""
    bias = torch.zeros(M, M)
    bias[:, 0] = -torch.inf
    bias[2] = -torch.inf

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, pad: Tensor) -> Tensor:
        mask = torch.where(pad, 0.0, torch.finfo(dtype).min)[:, None, None, :]
        return attention(q, k, v, bias.to(dtype).to(q.dtype) + mask.to(q.dtype))

    (remark,) = check(run, *qkv(dtype=dtype), bias, PAD, gradients=False).remarks
    assert "else +min" not in str(remark.score)


# --- alternatives ----------------------------------------------------------------------------------------------------


def same_bucket(buckets: Tensor) -> Tensor:
    return buckets[:, :, :, None] == buckets[:, :, None, :]


@pytest.mark.parametrize(("name", "sign"), [("any", "|"), ("all", "&")])
@pytest.mark.parametrize("keepdim", [False, True])
def test_rounds_are_written_out(name: str, sign: str, keepdim: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
        mask = getattr(same_bucket(buckets), name)(1, keepdim=keepdim)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask if keepdim else mask[:, None])

    buckets = torch.randint(3, (2, 2, M), generator=torch.Generator().manual_seed(1))
    (remark,) = check(run, *qkv(), buckets).remarks
    rounds = [f"pos[b, {i}, m] == pos[b, {i}, n]" for i in range(2)]
    assert remark.score == f"s*0.5 where {f' {sign} '.join(rounds)} else 0row"


def test_many_rounds_are_left_to_the_graph() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=same_bucket(buckets).any(1)[:, None])

    buckets = torch.randint(40, (2, 17, M), generator=torch.Generator().manual_seed(1))
    assert "mask[b, m, n]" in spec_of(run, *qkv(), buckets)
    check(run, *qkv(), buckets)
