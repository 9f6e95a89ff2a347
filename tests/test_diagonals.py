"""Biases that depend on `n - m` alone: they are computed and read for each `n - m`, in no graph for each row and key."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import T5Config, T5Model

from attnfuse import passes
from attnfuse.backend import listening
from attnfuse.options import Options
from attnfuse.passes import diagonal
from attnfuse.remark import Report
from attnfuse.spec import Shape
from attnfuse.templates import diagonals
from tests.families import SHAPES, floats, hold_to_oracle, made
from tests.harness import check, randn, report_of
from tests.models import exact
from tests.numerics import assert_close
from tests.terms import Terms
from tests.test_biases import Learned, added, attention

M, H, D, BUCKETS = 136, 2, 8, 8


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors for M rows and keys are large."""
    monkeypatch.setattr(diagonal, "_SMALL", 1 << 14)


MIN = torch.finfo(torch.float32).min


def operands(M: int = M, N: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and padding of two sequences."""
    pad = torch.arange(N) >= torch.tensor([[0], [11]])
    return randn(2, H, M, D, seed=1), randn(2, H, N, D, seed=2), randn(2, H, N, D, seed=3), pad


def bucket(relative: Tensor, *, causal: bool = False) -> Tensor:
    """Half of the buckets are exact, the others logarithmic."""
    half = BUCKETS // 2
    offset = torch.zeros_like(relative) if causal else (relative > 0).long() * half
    distance = -relative.clamp(max=0) if causal else relative.abs()
    far = 2 + (torch.log(distance.float() / 2) / math.log(64) * (half - 2)).long()
    return offset + torch.where(distance < 2, distance, far.clamp(max=half - 1))


def relative(q: Tensor, k: Tensor) -> Tensor:
    """n - m, the last query at the last key."""
    M, N = q.shape[2], k.shape[2]
    return torch.arange(N) - torch.arange(N - M, N)[:, None]


def embedded(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, embedding(bucket(relative(q, k)), table).permute(2, 0, 1)[None] + added(pad))


def causal(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    mask = (relative(q, k) <= 0) & pad[:, None, None, :]
    bias = table[bucket(relative(q, k), causal=True)].permute(2, 0, 1).unsqueeze(0)
    return scaled_dot_product_attention(q, k, v, attn_mask=torch.where(mask, bias, MIN).contiguous(), scale=0.5)


def turned(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """Computed for keys and rows, and of m - n."""
    rows = torch.arange(q.shape[2], dtype=torch.int32)
    distance = rows - torch.arange(k.shape[2], dtype=torch.int32)[:, None]
    return attention(q, k, v, table.mT.contiguous()[:, bucket(distance * 2 + 1)].mT + added(pad))


SCORES: dict[Callable[..., Tensor], str] = {
    embedded: "s*0.5 + bias[h, n - m + 135] where pad[b, n] else +min",
    causal: "s*0.5 + where(n <= m & pad[b, n], bias[h, n - m + 135], 0.0) where n <= m & pad[b, n] else +min",
    turned: "s*0.5 + bias[h, n - m + 135] where pad[b, n] else +min",
}


def final_graph(fn: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> fx.GraphModule:
    """The graph that is handed on to Inductor."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., Any]:
        graph, report = passes.run(gm, Options.parse(None, {"strict": True}))
        assert graph is not None, str(report)
        found.append(graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    (graph,) = found
    return graph


def most_elements(graph: fx.GraphModule) -> int:
    """Of one tensor in the graph."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    mode = next(x.fake_mode for x in values if isinstance(x, torch.Tensor))
    assert isinstance(mode, FakeTensorMode)
    flat = [y for x in values for y in (x if isinstance(x, tuple) else (x,)) if isinstance(y, torch.Tensor)]
    sizes = [math.prod(x if isinstance(x, int) else x.node.hint for x in y.shape) for y in flat]
    return max(sizes)


# the scale of the call in `causal` would be made of a symbol
CASES = [(embedded, False), (embedded, True), (causal, False), (turned, False)]


@pytest.mark.parametrize(("fn", "dynamic"), CASES)
def test_no_tensor_for_each_row_and_key(fn: Callable[..., Tensor], dynamic: bool) -> None:
    q, k, v, pad = operands()
    graph = final_graph(Learned(fn, randn(BUCKETS, H, seed=9)), q, k, v, pad, dynamic=dynamic)
    assert most_elements(graph) < M * M


@pytest.mark.parametrize("fn", SCORES, ids=lambda fn: fn.__name__)
def test_values_and_gradients(fn: Callable[..., Tensor]) -> None:
    """The table's too: first as a parameter, then as an input that asks for a gradient."""
    q, k, v, pad = operands()
    (remark,) = check(Learned(fn, randn(BUCKETS, H, seed=9)), q, k, v, pad, options={"verify": True}).remarks
    assert remark.score == SCORES[fn]
    check(fn, q, k, v, randn(BUCKETS, H, seed=9), pad)


def test_symbolic_sizes() -> None:
    q, k, v, pad = operands()
    (remark,) = check(Learned(turned, randn(BUCKETS, H, seed=9)), q, k, v, pad, dynamic=True).remarks
    assert remark.score == "s*0.5 + bias[h, n + M - m - 1] where pad[b, n] else +min"


@pytest.mark.parametrize(("fn", "dynamic"), CASES[:3])
def test_fewer_queries_than_keys(fn: Callable[..., Tensor], dynamic: bool) -> None:
    """The bias is that of the last rows, as behind a cache."""
    q, k, v, pad = operands(100, 300)
    (remark,) = check(fn, q, k, v, randn(BUCKETS, H, seed=9), pad, dynamic=dynamic).remarks
    assert f"bias[h, {'n + M - m - 1' if dynamic else 'n - m + 99'}]" in str(remark.score)


def test_a_low_precision() -> None:
    q, k, v, _ = operands()

    def sloped(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return attention(q, k, v, slopes[:, None, None] * relative(q, k).to(q.dtype))

    args = [x.bfloat16() for x in (q, k, v, randn(H, seed=9) / 16)]
    (remark,) = check(sloped, *args).remarks
    assert remark.score == "s*0.5 + bias[h, n - m + 135]"


def beside_others(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    bias = table[bucket(relative(q, k))] * torch.linspace(0, 1, M)[:, None, None]
    return attention(q, k, v, bias.permute(2, 0, 1) + torch.linspace(0, 1, M * M).view(M, M))


def test_beside_what_is_read_for_each_row_and_key() -> None:
    q, k, v, pad = operands()
    (remark,) = check(beside_others, q, k, v, randn(BUCKETS, H, seed=9), pad).remarks
    assert remark.score == "s*0.5 + (bias[h, n - m + 135]*bias2[m] + bias3[m, n])"


def by_row(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    distance = relative(q, k) * torch.arange(M)[:, None]
    return attention(q, k, v, table[bucket(distance)].permute(2, 0, 1))


def by_half_steps(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    distance = torch.arange(0, 2 * M, 2) - torch.arange(M)[:, None]
    return attention(q, k, v, table[bucket(distance)].permute(2, 0, 1))


def by_sum(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    return attention(q, k, v, table[bucket(torch.arange(M) + torch.arange(M)[:, None])].permute(2, 0, 1))


def of_given_positions(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    position = pad.long().cumsum(-1)[0]
    return attention(q, k, v, table[bucket(position - position[:, None])].permute(2, 0, 1))


def with_a_number_for_each_row(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    bias = table[bucket(relative(q, k))] * torch.linspace(0, 1, M)[:, None, None]
    return attention(q, k, v, bias.sin().permute(2, 0, 1))


def both_ways(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """n - m and m - n of one tensor."""
    bias = table[:, 0][bucket(relative(q, k))]
    return attention(q, k, v, (bias * bias.mT).sin())


def with_frequencies(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    bias = embedding(bucket(relative(q, k)), table, scale_grad_by_freq=True)
    return attention(q, k, v, bias.permute(2, 0, 1))


def overwritten(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """In a cell that has another value than its diagonal."""
    bias = table[bucket(relative(q, k))].permute(2, 0, 1).contiguous()
    bias[:, 3, 4] = 2.0
    return attention(q, k, v, bias)


def with_another_table_later(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    copy = table.clone()
    bias = copy[bucket(relative(q, k))].permute(2, 0, 1)
    copy[3] = 2.0
    return attention(q, k, v, bias) + copy.sum()


def hashed(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
    """By a multiple that wraps around."""
    bucket = ((relative(q, k) * -7046029254386353131) >> 61) + 4
    return attention(q, k, v, table[bucket].permute(2, 0, 1))


@pytest.mark.parametrize(
    "fn",
    [
        by_row,
        by_half_steps,
        by_sum,
        of_given_positions,
        with_a_number_for_each_row,
        both_ways,
        with_frequencies,
        overwritten,
        with_another_table_later,
    ],
    ids=lambda fn: fn.__name__,
)
def test_other_biases_are_read_for_each_row_and_key(fn: Callable[..., Tensor]) -> None:
    q, k, v, pad = operands()
    (remark,) = check(fn, q, k, v, randn(BUCKETS, H, seed=9), pad).remarks
    assert "n - m" not in str(remark.score)
    assert "m, n]" in str(remark.score)


@pytest.mark.parametrize("dynamic", [False, True])
def test_multiples_that_wrap_around(dynamic: bool) -> None:
    """They are computed by the model's operator, and in no bound of an arange."""
    q, k, v, pad = operands()
    (remark,) = check(hashed, q, k, v, randn(BUCKETS, H, seed=9), pad, dynamic=dynamic).remarks
    assert remark.score == ("s*0.5 + bias[h, n + M - m - 1]" if dynamic else "s*0.5 + bias[h, n - m + 135]")


def test_small_ones_are_read_for_each_row_and_key() -> None:
    q, k, v, pad = operands(32, 32)
    (remark,) = report_of(embedded, q, k, v, randn(BUCKETS, H, seed=9), pad).remarks
    assert "bias[h, m, n]" in str(remark.score)


def test_one_for_all_layers_and_in_regions() -> None:
    """Attentions that share a bias share what is computed of it, inside a checkpoint too."""

    def layers(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pad: Tensor) -> Tensor:
        bias = embedding(bucket(relative(q, k)), table).permute(2, 0, 1)[None] + added(pad)
        x = attention(q, k, v, bias)
        return torch.utils.checkpoint.checkpoint(attention, x, k, v, bias, use_reentrant=False)

    q, k, v, pad = operands()
    table = randn(BUCKETS, H, seed=9)
    report = check(layers, q, k, v, table, pad)
    assert [remark.code for remark in report.remarks] == ["AF000", "AF000"]
    graph = final_graph(layers, q, k, v, table.requires_grad_(), pad)
    assert most_elements(graph) < M * M
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("aten.embedding.default") == 1


def test_the_values_are_those_of_the_model() -> None:
    """One key of weight 1 in each row shows the bias: bit by bit what the model adds to the score."""
    q, k, v, pad = operands()
    table = randn(BUCKETS, H, seed=9)
    graph = final_graph(embedded, q, k, v, table, pad)
    (call,) = [node for node in graph.graph.nodes if node.target is torch.ops.attnfuse.attention.default]
    names = [part.partition(":")[0].strip() for part in str(call.args[7]).split(";")[:-1]]
    leaf = call.args[3][names.index("bias")]
    seen: list[Tensor] = []

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n is leaf:
                seen.append(value)
            return value

    given = dict(zip("qkv", (q, k, v), strict=True)) | {"table": table, "pad": pad}
    order = [
        next(x for key, x in given.items() if f"_{key}_" in node.name)
        for node in graph.graph.find_nodes(op="placeholder")
    ]
    Reader(graph).run(*order)
    (bias,) = seen
    rows = torch.arange(M)
    expected = embedding(bucket(rows - rows[:, None]), table).permute(2, 0, 1)
    assert_close(bias[:, rows - rows[:, None] + M - 1], expected, expected.double())
    assert torch.equal(bias[:, rows - rows[:, None] + M - 1], expected)


OTHERS: dict[str, Callable[[Shape], tuple[Tensor, ...]]] = {
    # some tiles are left out, the columns of the others stand side by side
    "bias: f32[:, :]; s*0.125 + bias[b, n - m + M + 2]*h where (n - m) // 160 % 2 == 0 else -inf": lambda x: (
        floats(x.B, x.M + x.N + 4),
    ),
    # what the mask excludes lies beyond the leaf
    "bias: f32[:]; s*0.125 + where(n <= m, bias[n - m + M - 1], 0.5) where n <= m + 3 else -inf": lambda x: (
        floats(x.M),
    ),
    # heads before batches, two places of one leaf, rows without a key
    "bias: f32[:, :, :]; s*0.125 + bias[h, b, n - m + M] - bias[h, b, n - m + M - 1] where n > m else =min": lambda x: (
        floats(x.H, x.B, x.M + x.N),
    ),
    # a bias that is -inf for all keys of some rows
    "bias: f32[:, :]; s + bias[h, n - m + M - 1]": lambda x: (
        floats(x.H, x.M + x.N - 1).masked_fill(torch.arange(x.M + x.N - 1) > x.M - 9, -torch.inf),
    ),
}


@pytest.mark.parametrize("shape", [SHAPES["grouped"], Shape(2, 4, 2, 330, 500, 8, 8)], ids=str)
@pytest.mark.parametrize("text", OTHERS)
def test_kernels_of_the_cpu(text: str, shape: Shape) -> None:
    hold_to_oracle(made(text, shape, OTHERS[text](shape)))


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("offset", [-60, -7, 20])
@pytest.mark.parametrize("lead", [(1,), (1, 0), ()], ids=str)
def test_gradients_in_tiles(lead: tuple[int, ...], offset: int, size: tuple[int, int]) -> None:
    tiles = randn(2 if 0 in lead else 1, 3 if 1 in lead else 1, 4, *size, seed=1).double()
    total = torch.zeros(*((2, 3)[dim] for dim in lead), 50, dtype=torch.float64)
    expected = total.clone()
    b, h, t, i, j = torch.meshgrid(*map(torch.arange, tiles.shape), indexing="ij")
    at = (t * size[1] + j - i + offset).clamp(0, 49)
    expected.index_put_((*((b, h)[dim] for dim in lead), at), tiles, accumulate=True)
    diagonals.add_tiles(total, lead, tiles, offset)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_whose_bias_it_is(implementation: str) -> None:
    """Encoder, causal decoder and cross-attention, with padding, in training and inference, and with frozen tables."""
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, dropout_rate=0.0, use_cache=False, attn_implementation=implementation)
    torch.manual_seed(0)
    model = T5Model(config)
    ids = torch.randint(32, (2, M), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": (torch.arange(M) < torch.tensor([[M], [M - 9]])).long()}
    given["decoder_input_ids"] = ids.flip(1)[:, :130]
    dout = randn(2, 130, 16, seed=2)

    def results(run: Callable[..., Any], module: torch.nn.Module) -> dict[str, Tensor]:
        module.zero_grad()
        out = run(**given)[0]
        (out * dout.to(out.dtype)).sum().backward()
        tables = {name: x.grad for name, x in module.named_parameters() if "relative" in name}
        return {"output": out.detach(), **tables}

    reports: list[Report] = []
    torch._dynamo.reset()
    options = {"downstream": "aot_eager"}
    compiled = torch.compile(model, backend="attnfuse", options=options)
    with listening(reports.append):
        actual = results(compiled, model)
    with Terms() as terms:
        true = exact(model, lambda twin: results(twin, twin))
    for name, original in results(model, model).items():
        scale = terms.greatest(true[name]) if name != "output" else None
        assert_close(actual[name], original, true[name], scale, what=name)
    model.requires_grad_(False)
    torch._dynamo.reset()
    with listening(reports.append):
        out = torch.compile(model, backend="attnfuse", options=options)(**given)[0]
    assert_close(out, model(**given)[0], true["output"])
    remarks = Report(()).merge(*reports).remarks
    assert len(remarks) == 6
    assert all(remark.kind == "fused" and "m, n]" not in str(remark.score) for remark in remarks)
    assert sum("n - m + " in str(remark.score) for remark in remarks) == 4
