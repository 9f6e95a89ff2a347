"""Llama, Mistral, GPT-2 and BERT, unmodified: what is found in them, and that outputs and gradients are right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnfuse
from attnfuse.backend import listening
from attnfuse.remark import Report
from tests import models
from tests.numerics import assert_close

pytestmark = pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)

IMPLEMENTATIONS = ("eager", "sdpa")
CAUSAL = {
    "llama": "n <= m",
    "mistral": "n > m - 7 & n <= m",
    "gpt2": "n <= m",
    "bert": "",
}


def compiled(model: nn.Module, **kwargs: Any) -> nn.Module:
    torch._dynamo.reset()
    kwargs.setdefault("options", {"downstream": "aot_eager"})
    module: nn.Module = torch.compile(copy.deepcopy(model), backend="attnfuse", **kwargs)  # type: ignore[assignment]
    return module


def expected_score(family: str, implementation: str, padding: str) -> str:
    """The program's text for head dimension 8."""
    mask = " & ".join(x for x in (CAUSAL[family], "" if padding == "none" else "pad[b, n]") if x)
    fill = "+min" if implementation == "eager" else "0row"
    return f"s*{8**-0.5!r}" + (f" where {mask} else {fill}" if mask else "")


@pytest.mark.parametrize("padding", ["none", "left", "right", "rows"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_inference(family: str, implementation: str, padding: str) -> None:
    given = models.inputs(padding)
    reports: list[Report] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = models.build(family, implementation, dtype)
        fused = compiled(model)
        with torch.no_grad(), listening(reports.append):
            actual = models.call(fused, given)
            original = models.call(model, given)
            exact = models.exact(model, lambda m: models.call(m, given))
        assert_close(actual, original, exact, what=f"{family} {dtype}")
    for report in reports:
        assert len(report.remarks) == len(report.fused) + len(report.kept) == 2, str(report)
        assert {r.score for r in report.remarks} == {expected_score(family, implementation, padding)}
        assert [r.module.rpartition(".")[0] != "" for r in report.remarks] == [True, True]


def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = models.call(model, given)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weight).sum().backward()
    return {
        name.removeprefix("_orig_mod."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def check_gradients(model: nn.Module, fused: nn.Module, given: dict[str, Tensor]) -> None:
    actual, original = gradients(fused, given), gradients(model, given)

    def run(double: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
        with models.gradient_scales(double) as scales:
            return gradients(double, given), scales

    exact, scales = models.exact(model, run)
    assert actual.keys() == original.keys() == exact.keys()
    for name, value in exact.items():
        scale = max(scales.get(name, 0.0), float(value.abs().max()))
        assert_close(actual[name], original[name], value, scale, what=name)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_gradient(family: str, implementation: str, padding: str) -> None:
    given = models.inputs(padding)
    for dtype in (torch.float32, torch.bfloat16):
        model = models.build(family, implementation, dtype)
        check_gradients(model, compiled(model), given)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inductor_compiles_what_was_rewritten(implementation: str) -> None:
    model = models.build("llama", implementation)
    check_gradients(model, compiled(model, options={}), models.inputs("left"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_autocast_and_two_lengths(implementation: str) -> None:
    model = models.build("llama", implementation)
    model.gradient_checkpointing_enable()
    model.train()
    reports: list[Report] = []
    fused = compiled(model)
    for length in (20, 26):
        given = models.inputs("left", length=length)
        with torch.autocast("cpu", torch.bfloat16), listening(reports.append):
            actual, original = gradients(fused, given), gradients(model, given)
        plain = copy.deepcopy(model)
        plain.gradient_checkpointing_disable()

        def run(double: nn.Module, given: dict[str, Tensor] = given) -> tuple[dict[str, Tensor], dict[str, float]]:
            with models.gradient_scales(double) as scales:
                return gradients(double, given), scales

        exact, scales = models.exact(plain, run)
        for name, value in exact.items():
            # autocast rounds activations to bfloat16, so that is the precision the contract is about
            scale = max(scales.get(name, 0.0), float(value.abs().max()))
            assert_close(actual[name].bfloat16(), original[name].bfloat16(), value, scale, what=name)
    assert len(reports) == 2
    without = attnfuse.explain(models.build("llama", implementation), **models.inputs("left"), use_cache=False)
    assert {r.score for report in reports for r in report.fused} == {r.score for r in without.fused}


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_dropout_is_drawn_anew_and_repeats_with_the_seed(family: str) -> None:
    model = models.build(family, "eager").train()
    fused = compiled(model)
    given = models.inputs("right")

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return models.call(fused, given).detach()

    first = seeded(3)
    assert torch.equal(first, seeded(3))
    assert not torch.equal(first, seeded(4))


def test_one_compile_serves_many_lengths() -> None:
    model = models.build("llama", "eager")
    reports: list[Report] = []
    fused = compiled(model, dynamic=True)
    with torch.no_grad(), listening(reports.append):
        for length in (17, 23, 31):
            given = models.inputs("left", length=length)
            exact = models.exact(model, lambda m, given=given: models.call(m, given))
            assert_close(models.call(fused, given), models.call(model, given), exact)
    assert len(reports) == 1
    assert len(reports[0].fused) == 2
