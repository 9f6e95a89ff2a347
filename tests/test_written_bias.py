"""Biases of small attentions that the graph computes before the operator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnfuse.passes import decide
from attnfuse.reference import attention as reference
from attnfuse.remark import Report
from attnfuse.spec import Shape, parse_spec
from attnfuse.templates import written_bias as module
from attnfuse.templates.written_bias import values, written_bias
from tests.families import floats, made
from tests.harness import check, qkv, randn

SHAPE = Shape(2, 4, 2, 13, 17, 8, 8)
WRITTEN = [
    "a: f32[:, :, :]; s*0.5 + a[h, m, n]*2.0",
    "a: f32[:, :, :]; c: f32[:, :, :]; s*0.5 + (a[h, m, n] + c[b, m, n])",
    "a: f32[:, :]; s - a[m, n]*a[m, n]",
    "a: f32[:]; (s + a[h]*float(n - m))*0.25 where n <= m else =min",
    "a: f32[:, :]; pad: bool[:, :]; s + 2.0*a[m, n] where pad[b, n] else 0row",
    "a: f32[:, :]; 3.0*tanh(s*0.5) + sigmoid(a[m, n])",
    "a: f32[:, :]; mask: bool[:, :]; s + where(mask[m, n], a[m, n], -5.0)",
    "a: f32[:, :]; s*0.25 + a[(m + n*n) % 7, h]",
]


def _leaves(text: str) -> tuple[Tensor, ...]:
    sizes = {"b": 2, "h": 4, "m": 13, "n": 17}
    found = []
    for leaf in parse_spec(text).leaves:
        indices = text.split(f"{leaf.name}[")[1].split("]")[0].split(", ")
        x = floats(*(sizes.get(i, 7) for i in indices))
        found.append(x > -0.5 if leaf.kind == "bool" else x)
    return tuple(found)


@pytest.mark.parametrize("text", WRITTEN)
def test_it_means_the_same(text: str) -> None:
    """In value and gradient, with one leaf in place of the expression."""
    call = made(text, SHAPE, _leaves(text))
    form = written_bias(call.spec, SHAPE)
    assert form is not None
    assert parse_spec(str(form.spec)) == form.spec
    floating = [x.requires_grad_() for x in call.leaves if x.is_floating_point()]
    named = dict(zip((leaf.name for leaf in call.spec.leaves), call.leaves, strict=True))
    bias = values(form, call.leaves, SHAPE)
    leaves = (*(named[leaf.name] for leaf in form.spec.leaves[:-1]), bias)
    expected, _ = reference(call.spec, call.q, call.k, call.v, call.leaves)
    found, _ = reference(form.spec, call.q, call.k, call.v, leaves)
    torch.testing.assert_close(found, expected, equal_nan=True)
    given = [call.q, call.k, call.v, *floating]
    grads = (torch.autograd.grad(x.nansum(), given, allow_unused=True) for x in (found, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "s*0.5",
        "a: f32[:, :, :]; s*0.5 + a[h, m, n]",
        "a: f32[:, :]; s*0.5 + a[h, n - m + M - 1]",
        "a: f32[:, :]; s + 2.0*a[b, n]",
        "s*0.5 + float(n - m)",
        "a: f32[:, :]; s + 2.0*a[m, n] where a[m, n] != -inf else -inf",
        "a: f32[:, :]; s*a[m, n] + 1.0",
        "a: f32[:, :]; tanh(s + a[m, n])",
        "a: f32[:, :]; bf16(s + a[m, n])",
    ],
)
def test_what_stays_as_it_is(text: str) -> None:
    """A leaf alone, what does not differ by row and key or reads nothing, the mask of its own leaf, what is no addend."""
    assert written_bias(parse_spec(text), SHAPE) is None


def test_no_large_bias_is_made_of_small_ones() -> None:
    pairs = parse_spec("a: f32[:, :, :]; pad: bool[:, :]; s + (a[h, m, n] + where(pad[b, n], 0.0, -5.0))")
    whole = parse_spec("a: f32[:, :, :, :]; s + 2.0*a[b, h, m, n]")
    table = parse_spec("a: f32[:, :]; ids: i64[:, :]; s + a[(ids[b, m] - ids[b, n]) % 7, h]")
    small, large = Shape(8, 12, 12, 128, 128, 64, 64), Shape(32, 12, 12, 128, 128, 64, 64)
    assert written_bias(pairs, small) is not None
    assert written_bias(pairs, large) is None
    assert written_bias(table, large) is None
    assert written_bias(whole, large) is not None


M = 70


def spelled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.5 + bias).softmax(-1) @ v


def sum_of_two(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return spelled(q, k, v, a + c)


def read_twice(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return spelled(q, k, v, a * a.mT + c.exp())


def softcapped(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return (3 * torch.tanh((q @ k.mT) * 0.2) + a * 2).softmax(-1) @ v


def two_layers(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return spelled(q, k, v, a * 2) + spelled(k, q, v, a * 2)


def in_a_checkpoint(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return checkpoint(lambda *x: spelled(*x[:3], x[3] * 2 + x[4]), q, k, v, a, c, use_reentrant=False)  # type: ignore[no-any-return]


def with_a_log_sum_exp(q: Tensor, k: Tensor, v: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    s = (q @ k.mT) * 0.5 + a * 2
    return s.softmax(-1) @ v, s.logsumexp(-1)


def compiled(fn: Callable[..., Any], *inputs: Tensor, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Report:
    monkeypatch.setattr(sys.modules[decide.__module__], "suits", lambda *_: "AMD")
    return check(fn, *inputs, **how)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
@pytest.mark.parametrize("fn", [sum_of_two, read_twice, softcapped, two_layers, in_a_checkpoint, with_a_log_sum_exp])
def test_in_a_graph(fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and all gradients, through the nodes that compute it."""
    report = compiled(fn, *qkv(M=M), randn(4, M, M), randn(2, 1, 1, M), monkeypatch=monkeypatch)
    assert {remark.code for remark in report.remarks} == {"AF000"}
    assert all(remark.facts["written_out"] for remark in report.remarks)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_not_in_sizes_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    report = compiled(sum_of_two, *qkv(M=M), randn(4, M, M), randn(2, 1, 1, M), dynamic=True, monkeypatch=monkeypatch)
    assert not any("written_out" in remark.facts for remark in report.remarks)


@pytest.mark.parametrize("small", ["inline"], indirect=True)
def test_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as the model computes it."""
    seen: list[Tensor] = []
    original = module.values

    def watched(*args: Any) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr("attnfuse.passes.rewrite.values", watched)

    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ((q @ k.mT).to(a.dtype) * 0.5 + a * 2).softmax(-1).to(v.dtype) @ v

    monkeypatch.setattr("attnfuse.templates.inline.most_scores", lambda *_: 0)
    report = compiled(fn, *qkv(M=M), randn(4, M, M), gradients=False, monkeypatch=monkeypatch)
    assert [remark.code for remark in report.remarks] == ["AF000"]
    assert [x.dtype for x in seen] == [torch.float32]
