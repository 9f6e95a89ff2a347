"""What people do with transformers: the Trainer and `generate`, with the backend and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import attnfuse
from attnfuse.backend import listening
from attnfuse.remark import Report
from tests import models

STEPS = 6


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same four random sequences again and again, some of them padded on the left, to be learnt by heart."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(at % 4)
        tokens = torch.randint(1, models.VOCABULARY, (24,), generator=generator)
        mask = torch.ones(24, dtype=torch.long)
        mask[: at % 4 * 3] = 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def losses(folder: Path, implementation: str, *, compiled: bool, **more: Any) -> list[float]:
    model = models.build("llama", implementation)
    backend = {"torch_compile": True, "torch_compile_backend": "attnfuse"} if compiled else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **backend,
        **more,
    )
    torch._dynamo.reset()
    attnfuse.register_with_accelerate()
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("implementation", "more"),
    [("eager", {}), ("sdpa", {"bf16": True}), ("eager", {"gradient_checkpointing": True})],
    ids=["plain", "bf16", "checkpointed"],
)
def test_trainer(implementation: str, more: dict[str, Any], tmp_path: Path) -> None:
    """The loss falls as in eager, to 1e-4 of it in float32 and to 2e-2 in bfloat16, where steps amplify the rounding."""
    reports: list[Report] = []
    with listening(reports.append):
        actual = losses(tmp_path, implementation, compiled=True, **more)
    expected = losses(tmp_path, implementation, compiled=False, **more)
    assert len(actual) == STEPS
    assert actual[-1] < 0.95 * actual[0]
    assert actual == pytest.approx(expected, rel=2e-2 if "bf16" in more else 1e-4)
    remarks = [remark for report in reports for remark in report.remarks]
    assert remarks
    assert {remark.kind for remark in remarks} <= {"fused", "kept"}, [str(r) for r in remarks]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_generate(family: str, implementation: str, cache: str) -> None:
    """The greedy tokens are eager's, from prompts padded on the left."""
    model: Any = models.build(family, implementation)
    given = models.inputs("left", length=9)
    how = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
    }
    expected = model.generate(**given, **how)
    reports: list[Report] = []
    torch._dynamo.reset()
    forward = model.forward
    model.forward = torch.compile(forward, backend="attnfuse", options={"downstream": "aot_eager"})
    with listening(reports.append):
        actual = model.generate(**given, **how)
    assert torch.equal(actual, expected)
    remarks = [remark for report in reports for remark in report.remarks]
    assert len(remarks) >= 4
    assert {remark.kind for remark in remarks} <= {"fused", "kept"}, [str(r) for r in remarks]


def test_generate_reads_the_cache_no_further_than_its_content() -> None:
    """A static cache of 64 places of which 12 are filled: the loop over keys ends by the mask."""
    model: nn.Module = models.build("llama", "eager")
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=64)
    given = models.inputs("none", length=12)
    with torch.no_grad():
        model(**given, past_key_values=cache)
        reports: list[Report] = []
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager"})
        with listening(reports.append):
            compiled(given["input_ids"][:, :1], past_key_values=cache)
    (report,) = reports
    assert len(report.fused) == 2, str(report)
