"""Models of transformers in which attention is written in every usual way: all of it found, and what comes out right.

`tests/zoo` holds the models; here stand those whose attention is one of a kind, in a sample that covers every pair of
implementation, type, mode and mask.  The rest of the zoo, and every combination, is run by `pytest -m slow tests/test_zoo.py`.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests import models, zoo
from tests.numerics import assert_close

OF_A_KIND = (
    *(
        "gemma2",
        "t5gemma",
        "gpt_oss",
        "gpt_bigcode",
        "falcon_mqa",
        "falcon_alibi",
        "t5",
        "bloom",
        "mpt",
        "whisper",
        "bart",
    ),
    *(
        "vit",
        "deepseek_v3",
        "diffllama",
        "gpt_neo",
        "granite_swa",
        "modernbert",
        "llama4",
        "xglm",
        "openai_gpt",
        "wav2vec2",
    ),
    *("clip", "swin"),
)
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def cells(name: str) -> list[tuple[str, str, bool, bool]]:
    """Implementation, type, training and mask: all combinations that the model takes."""
    entry = zoo.ENTRIES[name]
    masks = (True, False) if entry.takes_mask else (False,)
    return list(itertools.product(entry.implementations, TYPES, (False, True), masks))


def sample(number: int, name: str) -> list[tuple[str, str, bool, bool]]:
    """Two of a model's cells, other ones for each model."""
    every = cells(name)
    return [every[(5 * number) % len(every)], every[(5 * number + len(every) // 2 + 1) % len(every)]]


def parameters(names: Any, cells_of: Any) -> list[Any]:
    found = []
    for number, name in enumerate(names):
        for implementation, dtype, training, masked in cells_of(number, name):
            mode = "training" if training else "inference"
            id_ = f"{name}-{implementation}-{dtype}-{mode}-{'mask' if masked else 'none'}"
            found.append(pytest.param(name, implementation, dtype, training, masked, id=id_))
    return found


SAMPLE = parameters(OF_A_KIND, sample)
EVERY = parameters(OF_A_KIND, lambda number, name: [x for x in cells(name) if x not in sample(number, name)])


def outputs(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out = zoo.call(model, given)
    return out if isinstance(out, tuple) else (out,)


def results(model: nn.Module, given: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """Outputs and, in training, the gradients of a weighted sum of them."""
    model.zero_grad()
    with torch.set_grad_enabled(training):
        outs = outputs(model, given)
        found = {f"output {at}": out.detach() for at, out in enumerate(outs)}
        if training:
            total = torch.zeros((), dtype=torch.float64)
            for out in outs:
                if out.requires_grad:
                    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
                    total = total + (out * weight).double().sum()
            total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("_orig_mod.")] = parameter.grad.clone()
    return found


def run(name: str, implementation: str, dtype: str, training: bool, masked: bool) -> Report:
    """Compiles a model, compares it with eager and with float64, and returns what was found in it."""
    entry = zoo.ENTRIES[name]
    model = entry.build(implementation, 0.0).to(TYPES[dtype])
    given = entry.inputs(masked)
    reports: list[Report] = []
    torch._dynamo.reset()
    fused: Any = torch.compile(copy.deepcopy(model), backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        actual = results(fused, given, training)
    original = results(model, given, training)

    def exactly(double: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
        if hasattr(double, "set_experts_implementation"):
            # the fused product of experts takes no float64
            double.set_experts_implementation("batched_mm")
        with models.gradient_scales(double) as scales:
            return results(double, given, training), scales

    exact, scales = models.exact(model, exactly)
    assert actual.keys() == original.keys() == exact.keys()
    for key, value in exact.items():
        scale = max(scales.get(key, 0.0), float(value.abs().max()))
        assert_close(actual[key], original[key], value, scale, what=f"{name} {key}")
    return Report(()).merge(*reports)


def check(name: str, implementation: str, dtype: str, training: bool, masked: bool) -> None:
    report = run(name, implementation, dtype, training, masked)
    assert len(report.fused) + len(report.kept) == zoo.ENTRIES[name].attentions, str(report)


@pytest.mark.parametrize(("name", "implementation", "dtype", "training", "masked"), SAMPLE)
def test_of_a_kind(name: str, implementation: str, dtype: str, training: bool, masked: bool) -> None:
    check(name, implementation, dtype, training, masked)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation", "dtype", "training", "masked"), EVERY)
def test_every_combination(name: str, implementation: str, dtype: str, training: bool, masked: bool) -> None:
    check(name, implementation, dtype, training, masked)
