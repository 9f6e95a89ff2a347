"""Programs that `torch.export` made, and checkpointing by a policy."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests import models
from tests.numerics import assert_close
from tests.test_models import check_gradients, compiled, expected_score


class Logits(nn.Module):
    """A model whose call takes tensors and gives one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return models.call(self.model, {"input_ids": input_ids, "attention_mask": attention_mask})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_exported_program(family: str, implementation: str) -> None:
    """An exported program is fused as the model is."""
    model = Logits(models.build(family, implementation))
    given = models.inputs("left")
    program = torch.export.export(model, (given["input_ids"], given["attention_mask"]))
    reports: list[Report] = []
    with torch.no_grad(), listening(reports.append):
        actual = compiled(program.module())(**given)
        original = model(**given)
        exact = models.exact(model, lambda m: m(**given))
    assert_close(actual, original, exact)
    (report,) = reports
    assert {r.score for r in report.fused} == {expected_score(family, implementation, "left")}
    assert len(report.fused) == len(report.remarks) == 2


def _keeps_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def _keeps_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op == torch.ops.attnfuse.attention.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", [_keeps_products, _keeps_attention], ids=["products", "attention"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_checkpointing_by_a_policy(implementation: str, policy: Any) -> None:
    """Right, and read as without; the operator can be named in a policy."""
    model: Any = models.build("llama", implementation).train()
    selective = copy.deepcopy(model)
    for layer in selective.model.layers:
        forward = layer.forward

        def recomputed(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        layer.forward = recomputed
    reports: list[Report] = []
    with listening(reports.append):
        torch._dynamo.reset()
        fused: Any = torch.compile(selective, backend="attnfuse", options={"downstream": "aot_eager"})
        check_gradients(model, fused, models.inputs("left"))
    scores = {r.score for report in reports for r in report.fused}
    assert scores == {expected_score("llama", implementation, "left")}
