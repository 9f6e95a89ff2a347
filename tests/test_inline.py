"""Small attentions written out: against the oracle, where they are taken, and what the graph then holds."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor
from torch.nn import functional as F

from attnfuse.passes import decide
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates.base import Target
from attnfuse.templates.inline import Inline, written_out
from attnfuse.templates.native import AMD, INTEL, Processor
from tests.families import FAMILIES, SHAPES, Call, Leaves, hold_to_oracle, in_types, made, values_of
from tests.harness import check, qkv, report_of
from tests.strategies import Case, cases

WRITTEN_OUT = {
    # its dropout draws other numbers than the oracle's
    name: family
    for name, family in FAMILIES.items()
    if "sink" not in family[0] and "dropout" not in family[0]
}


class _WrittenOut(Call):
    def run(self) -> tuple[Tensor, Tensor]:
        """The nodes instead of the operator, which have no log-sum-exp of their own; the oracle's stands in for it."""
        out = written_out(self.spec, self.q, self.k, self.v, self.leaves)
        return out, super().run()[1]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("text", "leaves", "dtype"), in_types(WRITTEN_OUT, torch.float32, torch.bfloat16, torch.float16, torch.float64)
)
def test_families(text: str, leaves: Leaves, shape: Shape, dtype: torch.dtype) -> None:
    hold_to_oracle(_WrittenOut(*made(text, shape, leaves(shape), dtype)))


@given(cases())
@settings(max_examples=60)
def test_random_programs(case: Case) -> None:
    call = values_of(case)
    assume(call.spec.program.sink is None and not call.spec.dropout and not call.sizes)
    # rows of NaN have gradients of NaN here, as in eager, and of zero in the kernels
    assume(bool(call.run()[0].isfinite().all()))
    hold_to_oracle(_WrittenOut(*call))


def causal(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    M, N = q.shape[2], k.shape[2]
    allowed = (torch.arange(N) <= torch.arange(M)[:, None]) & pad[:, None, None]
    return (q @ k.mT * 0.5).masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) @ v


def padding(N: int) -> Tensor:
    return torch.arange(N).expand(2, N) >= torch.tensor([[0], [2]])


@pytest.mark.parametrize("small", ["inline"], indirect=True)
@pytest.mark.parametrize(
    ("length", "limit", "code"), [(8, 64, "AF011"), (8, 63, "AF000"), (128, None, "AF011"), (129, None, "AF000")]
)
def test_up_to_how_many_scores(length: int, limit: int | None, code: str) -> None:
    options = {} if limit is None else {"inline_scores": limit}
    report = check(causal, *qkv(M=length), padding(length), options=options)
    assert [r.code for r in report.remarks] == [code]


@pytest.mark.parametrize(
    ("text", "change", "reason"),
    [
        ("s", {"inline_scores": 35}, "36 scores a head, written out up to 35"),
        ("s", {"device": "cuda"}, "device cuda"),
        ("s", {"lse": True}, "lse asked for"),
        ("sinks: f32[:]; s sink sinks[h]", {}, "a sink"),
    ],
)
def test_what_is_not_written_out(text: str, change: dict[str, Any], reason: str) -> None:
    shape, target = Shape(1, 1, 1, 6, 6, 4, 4), Target("cpu", inline_scores=36)
    assert Inline().reasons_against(parse_spec("s"), shape, target) == ()
    (found,) = Inline().reasons_against(parse_spec(text), shape, target._replace(**change))
    assert found.startswith(reason)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_symbolic_sizes_become_operators() -> None:
    report = check(causal, *qkv(), padding(6), dynamic=True)
    assert [r.template for r in report.remarks] == ["blocked"]


@pytest.mark.parametrize("small", ["inline"], indirect=True)
@pytest.mark.parametrize("called", [False, True])
def test_dropout(called: bool) -> None:
    """A weight is dropped or scaled, and the backward drops the same ones."""
    q, k, _ = qkv(B=4, M=32)
    p, v = 0.25, torch.eye(32).expand(4, 4, 32, 32).clone().requires_grad_()

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if called:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=1.0)
        return F.dropout((q @ k.mT).softmax(-1), p) @ v

    assert [r.template for r in report_of(dropped, q, k, v).remarks] == ["inline"]
    torch._dynamo.reset()
    torch.manual_seed(3)
    out = torch.compile(dropped, backend="attnfuse")(q, k, v)
    weights = (q @ k.mT).softmax(-1)
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, weights / (1 - p), 0.0))
    # 16,384 weights: five standard deviations
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(out, v, given)
    torch.testing.assert_close(found, out.detach().mT @ given)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_where_attnfuse_has_a_kernel_fewer_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """But more of those whose scores the model rounds itself; and none is left to PyTorch's kernel."""

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    def code(fn: Callable[..., Tensor], length: int, dtype: torch.dtype) -> str:
        (remark,) = check(fn, *qkv(M=length, D=8, dtype=dtype), gradients=False).remarks
        return remark.code

    assert [code(called, 16, dtype) for dtype in (torch.bfloat16, torch.float32)] == ["AF001", "AF001"]
    monkeypatch.setattr(sys.modules[decide.__module__], "suits", lambda *_: "AMD")
    for dtype in (torch.bfloat16, torch.float32):
        assert [code(called, length, dtype) for length in (64, 65)] == ["AF011", "AF000"]
    assert [code(spelled, length, torch.float32) for length in (64, 65)] == ["AF011", "AF000"]
    assert [code(spelled, length, torch.bfloat16) for length in (256, 257)] == ["AF011", "AF000"]
    monkeypatch.setattr(sys.modules[decide.__module__], "suits", lambda *_: "Intel")
    for fn in (called, spelled):
        assert [code(fn, length, torch.bfloat16) for length in (22, 23)] == ["AF011", "AF000"]


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_biases_that_the_model_gathers_for_each_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out on processors whose plain operators are fast; other biases are not, nor where keys are skipped."""

    def distances(q: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        return (rows[:, None] - rows + len(rows)).expand(*q.shape[:2], -1, -1)

    def scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
        # w becomes a product, so that finfo.min is known to be less than the bias
        return q @ k.mT + torch.gather(q @ (w[:, :8] @ w), -1, distances(q)) / 8

    def gathered(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return scores(q, k, w).softmax(-1) @ v

    def every_key(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        allowed = (w[0, : k.shape[2]] > 0) & (q[:, :1, :, :1] > 0)
        return scores(q, k, w).masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) @ v

    def causal(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        return scores(q, k, w).masked_fill(rows[:, None] < rows, -math.inf).softmax(-1) @ v

    def added(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        mask = (w[0, : k.shape[2]] > 0).to(q.dtype) * torch.finfo(q.dtype).min
        return (scores(q, k, w) + mask).softmax(-1) @ v

    def causal_added(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[:, None] < rows).to(q.dtype) * torch.finfo(q.dtype).min
        return (scores(q, k, w) + mask).softmax(-1) @ v

    def padded(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return scores(q, k, w).masked_fill(w[0, : k.shape[2]] > 0, -math.inf).softmax(-1) @ v

    def shared(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        bias = torch.gather(q @ w, -1, distances(q))
        return (q @ k.mT + bias).softmax(-1) @ v, (k @ q.mT + bias).softmax(-1) @ v

    def product(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return (q @ k.mT + (q @ w[:, : k.shape[2]])).softmax(-1) @ v

    def by_element(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        # the gathered numbers are one for each key
        of_keys = w[0][torch.arange(k.shape[2]).flip(0)]
        return (q @ k.mT + torch.sin(q[..., :1] * of_keys) * torch.cos(k[..., 0])[:, :, None]).softmax(-1) @ v

    def given(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    def of_keys(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return (q @ k.mT + (k @ w[:, :1]).mT).softmax(-1) @ v

    def codes(
        fn: Callable[..., object],
        B: int = 2,
        H: int = 3,
        M: int = 200,
        dtype: torch.dtype = torch.float32,
        training: bool = False,
    ) -> set[str]:
        q, k, v = (x.requires_grad_(training) for x in qkv(B=B, H=H, M=M, D=8, dtype=dtype))
        last = torch.randn((*q.shape[:2], M, M) if fn is given else (8, 2 * M), dtype=dtype)
        return {remark.code for remark in report_of(fn, q, k, v, last).remarks}

    def on(processor: Processor) -> None:
        monkeypatch.setattr(sys.modules[decide.__module__], "processor", lambda: processor)
        monkeypatch.setattr(sys.modules[decide.__module__], "suits", lambda *_: processor.name)

    on(INTEL)
    for fn in (gathered, every_key, added):
        assert codes(fn) == codes(fn, B=1) == codes(fn, H=1) == {"AF011"}
    assert codes(gathered, M=513) == {"AF000"}
    assert codes(gathered, dtype=torch.bfloat16) == {"AF000"}
    assert codes(gathered, training=True) == {"AF000"}
    for fn in (causal, causal_added, padded, shared, product, by_element, given, of_keys):
        assert codes(fn) == {"AF000"}, fn.__name__
    on(AMD)
    assert codes(gathered) == {"AF000"}


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_a_plain_call_is_written_out_in_training() -> None:
    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert [r.code for r in check(called, *qkv()).remarks] == ["AF011"]
    assert [r.code for r in check(called, *qkv(), gradients=False).remarks] == ["AF001"]


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_only_attentions_that_are_alike_share_a_trace() -> None:
    """One that reads a tensor twice comes before one of the same sizes and strides that does not, and before one of other strides."""

    def several(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> list[Tensor]:
        strided = k.mT.contiguous().mT
        return [
            F.scaled_dot_product_attention(q, *keys_and_values, pad[:, None, None])
            for keys_and_values in ((k, k), (k, v), (v, k), (strided, v))
        ]

    report = check(several, *qkv(), padding(6))
    assert [r.template for r in report.remarks] == ["inline"] * 4


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_autocast_does_not_round_the_scores() -> None:
    """Inside an autocast region a call of SDPA keeps its scores in float32, and so does what takes its place."""

    def called(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, pad[:, None, None], scale=1.0)

    q, k, v = qkv(M=16, D=64)
    check(called, 4 * q, k, v, padding(16), gradients=False)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_grouped_heads_are_not_expanded(tmp_path: Path) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return causal(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), pad)

    check(grouped, *qkv(Hkv=2), padding(6), options={"dump": tmp_path})
    *_, after = sorted(tmp_path.rglob("*rewritten*"))
    assert re.findall("repeat_interleave|expand|attnfuse", after.read_text()) == []


@pytest.mark.parametrize("small", ["inline"], indirect=True)
@pytest.mark.parametrize(("called", "product"), [(False, "bf16"), (True, "f32")])
def test_scores_are_rounded_where_the_models_own_matmul_rounds_them(called: bool, product: str, tmp_path: Path) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, pad[:, None, None])

    check(call if called else causal, *qkv(dtype=torch.bfloat16), padding(6), options={"dump": tmp_path})
    *_, after = sorted(tmp_path.rglob("*rewritten*"))
    assert re.findall(r"(\w+)\[2, 4, 6, 6\]\" = torch.ops.aten.matmul", after.read_text()) == [product]


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_type_does_not_matter(default: torch.dtype) -> None:
    spec = parse_spec("pad: bool[:, :]; s where pad[b, n] else +min")
    q, k, v = qkv()
    pad = padding(6)
    pad[0] = False
    expected = written_out(spec, q, k, v, (pad,))
    torch.set_default_dtype(default)
    try:
        found = written_out(spec, q, k, v, (pad,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_added_minima_are_infinite(dtype: torch.dtype) -> None:
    spec = parse_spec("s where n < m else +min where n < m else +min")
    out = written_out(spec, *qkv(dtype=dtype), ())
    assert out[:, :, 0].isnan().all()
    assert out[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_a_leaf_of_symbolic_size_becomes_an_operators() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
        return (q @ k.mT + table[distance]).softmax(-1) @ v

    table = torch.linspace(-1, 1, 11)
    torch._dynamo.mark_dynamic(table, 0)
    report = check(biased, *qkv(), table)
    assert [r.template for r in report.remarks] == ["blocked"]


def test_nothing_is_written_in_place() -> None:
    spec = parse_spec("5*tanh(s*0.125/5) + 1 where n <= m else +min")
    q, k, v = qkv()
    x = q.clone().requires_grad_()
    written_out(spec, x, k, v, ()).sum().backward()
    assert x.grad is not None
