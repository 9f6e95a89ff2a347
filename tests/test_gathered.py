"""Biases that are gathered from a table for each row and key: kernels read the table, no graph makes the tensor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import BeitConfig, BeitModel

from attnfuse.backend import listening
from attnfuse.passes import gathered
from attnfuse.remark import Report
from attnfuse.spec import Shape
from tests.families import FAMILIES, hold_to_oracle, made
from tests.harness import check, randn, report_of
from tests.models import exact
from tests.numerics import assert_close
from tests.terms import Terms
from tests.test_biases import Learned, added, attention
from tests.test_diagonals import final_graph, most_elements

SIDE, H, D = 9, 3, 8
M = SIDE * SIDE
ENTRIES = (2 * SIDE - 1) ** 2


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors for M rows, keys and heads are large."""
    monkeypatch.setattr(gathered, "_SMALL", 1 << 12)


def positions() -> Tensor:
    """The entry for each row and key of a square of tokens."""
    at = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None, :] + SIDE - 1
    return apart[0] * (2 * SIDE - 1) + apart[1]


IDS = positions()


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and padding of two sequences."""
    pad = torch.arange(M) >= torch.tensor([[0], [11]])
    return randn(2, H, M, D, seed=1), randn(2, H, M, D, seed=2), randn(2, H, M, D, seed=3), pad


def flat(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """As Swin does it."""
    bias = table[IDS.view(-1)].view(M, M, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
    return attention(q, k, v, bias)


def by_head(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """As LeViT does it, under padding."""
    return attention(q, k, v, table.mT[:, IDS] + added(pad))


def embedded(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, embedding(IDS, table).permute(2, 0, 1) * 0.5)


def selected(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, table.index_select(0, IDS.int().view(-1)).view(M, M, H).permute(2, 0, 1))


def from_the_end(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, table[IDS - ENTRIES].permute(2, 0, 1))


def of_each_sequence(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """Entries that depend on data, and are no negative numbers."""
    number = pad.long().cumsum(-1)
    ids = (number[:, :, None] - number[:, None, :]).abs()
    return attention(q, k, v, table[ids].permute(0, 3, 1, 2))


SCORES: dict[Callable[..., Tensor], str] = {
    flat: "s*0.5 + bias[where(ids[m, n] < 0, ids[m, n] + 289, ids[m, n]), h]",
    by_head: "s*0.5 + bias[where(ids[m, n] < 0, ids[m, n] + 289, ids[m, n]), h] where pad[b, n] else +min",
    embedded: "s*0.5 + bias[ids[m, n], h]*0.5",
    selected: "s*0.5 + bias[ids[m, n], h]",
    from_the_end: "s*0.5 + bias[where(ids[m, n] - 289 < 0, ids[m, n] - 289 + 289, ids[m, n] - 289), h]",
    of_each_sequence: "s*0.5 + bias[abs(pos[b, m] - pos[b, n]), h]",
}


@pytest.mark.parametrize("fn", SCORES, ids=lambda fn: fn.__name__)
def test_values_and_gradients(fn: Callable[..., Tensor]) -> None:
    """The table's too: first as a parameter, then as an input that asks for a gradient."""
    q, k, v, pad = operands()
    (remark,) = check(Learned(fn, randn(ENTRIES, H, seed=9)), q, k, v, pad, options={"verify": True}).remarks
    assert remark.score == SCORES[fn]
    check(fn, q, k, v, randn(ENTRIES, H, seed=9), pad)


@pytest.mark.parametrize("fn", [flat, by_head, embedded, selected, from_the_end], ids=lambda fn: fn.__name__)
def test_no_tensor_for_each_head_row_and_key(fn: Callable[..., Tensor]) -> None:
    graph = final_graph(Learned(fn, randn(ENTRIES, H, seed=9)), *operands())
    assert most_elements(graph) == M * M


def with_frequencies(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, embedding(IDS, table, scale_grad_by_freq=True).permute(2, 0, 1))


def with_a_row_that_learns_nothing(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, embedding(IDS, table, padding_idx=3).permute(2, 0, 1))


def without_gradient(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    with torch.no_grad():
        bias = table[IDS].permute(2, 0, 1)
    return attention(q, k, v, bias)


def with_another_table_later(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    copy = table.clone()
    bias = copy[IDS].permute(2, 0, 1)
    copy[3] = 2.0
    return attention(q, k, v, bias) + copy.sum()


def with_other_entries_later(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    ids = IDS.clone()
    bias = table[ids].permute(2, 0, 1)
    ids[3] = 2
    return attention(q, k, v, bias) + ids.sum()


def overwritten(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    bias = table[IDS]
    bias[3, 4] = 2.0
    return attention(q, k, v, bias.permute(2, 0, 1))


def by_two(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """Entries that say which head, too."""
    return attention(q, k, v, table[IDS, IDS % H])


@pytest.mark.parametrize(
    "fn",
    [
        with_frequencies,
        with_a_row_that_learns_nothing,
        without_gradient,
        with_another_table_later,
        overwritten,
        by_two,
    ],
    ids=lambda fn: fn.__name__,
)
def test_other_biases_are_read_for_each_row_and_key(fn: Callable[..., Tensor]) -> None:
    q, k, v, pad = operands()
    (remark,) = check(fn, q, k, v, randn(ENTRIES, H, seed=9), pad).remarks
    assert "ids" not in str(remark.score)
    assert "m, n]" in str(remark.score)


def sparse(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, embedding(IDS, table, sparse=True).permute(2, 0, 1))


def test_a_gradient_that_is_sparse() -> None:
    q, k, v, pad = operands()
    table = randn(ENTRIES, H, seed=9).requires_grad_()
    (remark,) = report_of(sparse, q, k, v, table, pad).remarks
    assert remark.score == "s*0.5 + bias[h, m, n]"
    sparse(q, k, v, table, pad).sum().backward()
    expected = table.grad
    table.grad = None
    torch._dynamo.reset()
    torch.compile(sparse, backend="attnfuse", options={"downstream": "aot_eager"})(q, k, v, table, pad).sum().backward()
    assert table.grad is not None
    assert expected is not None
    assert table.grad.is_sparse == expected.is_sparse is True


def of_a_copy_whose_source_changes(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    out = attention(q, k, v, table[(ids * 2) // 2].permute(2, 0, 1))
    ids.add_(1)
    return out


def of_what_was_written_to(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return attention(q, k, v, table[ids.add_(1).clamp_(max=ENTRIES - 1)].permute(2, 0, 1))


@pytest.mark.parametrize("fn", [of_a_copy_whose_source_changes, of_what_was_written_to], ids=lambda fn: fn.__name__)
def test_entries_of_an_input_that_is_written_to(fn: Callable[..., Tensor]) -> None:
    """The gathered tensor is read, and the attention is fused."""
    q, k, v, _ = operands()
    (remark,) = check(Learned(fn, randn(ENTRIES, H, seed=9)), q, k, v, IDS.clone(), gradients=False).remarks
    assert remark.score == "s*0.5 + bias[h, m, n]"


def in_a_region(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    own = ids.clone()

    def region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, table[own].permute(2, 0, 1))

    out = torch.utils.checkpoint.checkpoint(region, q, k, v, use_reentrant=False)
    own.zero_()
    return out + own.sum()


def test_entries_of_a_region_that_the_graph_around_it_writes_to() -> None:
    """The region's own graph shows no write."""
    q, k, v, _ = operands()
    (remark,) = report_of(in_a_region, q, k, v, randn(ENTRIES, H, seed=9).requires_grad_(), IDS).remarks
    assert remark.score == "s*0.5 + bias[h, m, n]"


def test_a_choice_that_sizes_make_is_no_index_of_cells() -> None:
    """`where(M < 90, ids[m, n], 0)` is a number for a greater M."""

    def chosen(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        M = q.shape[2]
        ids = (torch.arange(M)[:, None] * 3 + torch.arange(M)) % ENTRIES
        return attention(q, k, v, table[torch.where(torch.full((), M) < 90, ids, 0)].permute(2, 0, 1))

    module = torch.compile(chosen, backend="attnfuse", dynamic=True, options={"downstream": "aot_eager"})
    torch._dynamo.reset()
    table = randn(ENTRIES, H, seed=9).requires_grad_()
    for length in (80, 110):
        q, k, v = (randn(1, H, length, D, seed=at) for at in range(3))
        exact = chosen(q.double(), k.double(), v.double(), table.double())
        assert_close(module(q, k, v, table), chosen(q, k, v, table), exact)


def test_frozen_tables_may_be_masks() -> None:
    q, k, v, pad = operands()
    (remark,) = report_of(Learned(flat, randn(ENTRIES, H, seed=9), frozen=True), q, k, v, pad).remarks
    assert remark.score == "s*0.5 + bias[h, m, n]"


def test_entries_that_are_written_to_later() -> None:
    """Without gradients, for which eager keeps the entries and refuses others."""
    q, k, v, pad = operands()
    table = randn(ENTRIES, H, seed=9)
    (remark,) = check(Learned(with_other_entries_later, table), q, k, v, pad, gradients=False).remarks
    assert remark.score == "s*0.5 + bias[h, m, n]"


def test_small_ones_are_read_for_each_row_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "_SMALL", M * M * H)
    q, k, v, pad = operands()
    (remark,) = report_of(Learned(flat, randn(ENTRIES, H, seed=9)), q, k, v, pad).remarks
    assert remark.score == "s*0.5 + bias[h, m, n]"


def test_entries_are_no_mask_from_outside() -> None:
    def given(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return attention(q, k, v, table[ids].permute(2, 0, 1))

    report = report_of(given, *operands()[:3], randn(ENTRIES, H, seed=9).requires_grad_(), IDS)
    (remark,) = report.remarks
    assert "ids[m, n]" in str(remark.score)
    assert "AF050" not in str(report)


@pytest.mark.parametrize("name", ["two dimensions", "table by batch"])
@pytest.mark.parametrize("shape", [Shape(2, 4, 2, 330, 500, 8, 8), Shape(1, 2, 1, 1, 70, 8, 8)], ids=str)
def test_kernels_of_the_cpu(name: str, shape: Shape) -> None:
    """In blocks of rows, and of fewer rows than keys."""
    text, leaves = FAMILIES[name]
    hold_to_oracle(made(text, shape, leaves(shape)))


def test_a_model_whose_bias_it_is() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BeitConfig(image_size=32, patch_size=4, use_relative_position_bias=True, **sizes)
    torch.manual_seed(0)
    model = BeitModel(config).eval()
    for name, x in model.named_parameters():
        if "relative" in name:
            torch.nn.init.normal_(x)
    pixels, dout = randn(1, 3, 32, 32, seed=1), randn(1, 65, 16, seed=2)

    def results(run: Callable[..., object], module: torch.nn.Module) -> dict[str, Tensor]:
        module.zero_grad()
        out = run(pixels.to(next(module.parameters()).dtype))[0]  # type: ignore[index]
        (out * dout.to(out.dtype)).sum().backward()
        tables = {name: x.grad for name, x in module.named_parameters() if "relative" in name}
        return {"output": out.detach(), **tables}

    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        actual = results(compiled, model)
    with Terms() as terms:
        true = exact(model, lambda twin: results(twin, twin))
    for name, original in results(model, model).items():
        scale = terms.greatest(true[name]) if name != "output" else None
        assert_close(actual[name], original, true[name], scale, what=name)
    remarks = Report(()).merge(*reports).remarks
    assert [remark.kind for remark in remarks] == ["fused"] * 2
    assert all("ids[m, n]" in str(remark.score) for remark in remarks)
