"""Whole models through the backend, with the Triton kernels in the interpreter in the operator's place."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.models import build, call, exact, gradient_scales, inputs
from tests.numerics import assert_close


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_forward_and_gradients(family: str, implementation: str) -> None:
    model = build(family, implementation)
    given = inputs("left")
    kept = given["attention_mask"].bool()

    def run(of: Any, parameters: Any) -> dict[str, Tensor]:
        out = call(of, given)[kept]
        parameters.zero_grad()
        out.square().sum().backward()
        return {"out": out, **{name: p.grad.clone() for name, p in parameters.named_parameters() if p.grad is not None}}

    reports: list[Report] = []
    with listening(reports.append):
        found = run(torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager"}), model)
    with gradient_scales(model) as scales:
        original = run(model, model)
    precise = exact(model, lambda twin: run(twin, twin))
    assert len(Report(()).merge(*reports).fused) == 2
    assert found.keys() == original.keys()
    for name, x in found.items():
        if name == "out" or name in scales:
            assert_close(x, original[name], precise[name], scales.get(name), what=name)
