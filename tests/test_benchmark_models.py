"""The twelve models of the benchmarks: what is written about them is so, and each runs."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
import torch
import transformers

from benchmarks import gate
from benchmarks.models import FORWARD, Forward, Step
from benchmarks.subjects import Variant

NAMES = pytest.mark.parametrize("forward", FORWARD.values(), ids=FORWARD.keys())


@NAMES
def test_implementations_and_fields_are_the_models(forward: Forward) -> None:
    model = getattr(transformers, forward.model)
    assert ("sdpa" in forward.attentions) == model._supports_sdpa
    config = getattr(transformers, forward.config)()
    # DeBERTa's configuration does not declare all that its model reads
    source = inspect.getsource(sys.modules[model.__module__])
    known = {*config.attribute_map, *dir(config), *re.findall(r"""getattr\(config, ["'](\w+)["']""", source)}
    unknown = forward.fields.keys() - known
    assert not unknown, f"{forward.config} knows no {unknown}: it would be taken and not read"


@pytest.mark.slow
@NAMES
def test_each_gives_its_hidden_states(forward: Forward) -> None:
    for attention in forward.attentions:
        run, results = forward.start(Variant(attention, None))
        assert run() is not None
        assert torch.isfinite(results()["hidden"]).all()


def test_gradients_come_with_their_scales() -> None:
    """In float64: the greatest sum of the absolute terms of each, which may cancel."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    ids = torch.arange(12).view(2, 6) % 8
    step = Step("BertConfig", "BertModel", lambda: {"input_ids": ids}, "2 x 6 tokens", small)
    exact, original = (step.start(Variant("eager", None, exact))[1]() for exact in (True, False))
    assert gate.fault(original, original, exact) == ""
    names = [name for name in original if name != "hidden"]
    assert len(names) > 10
    assert exact.keys() == {"hidden", *names, *(gate.SCALE + name for name in names)}
    for name in names:
        assert float(exact[gate.SCALE + name]) >= float(exact[name].abs().max()) * (1 - 1e-12)
    # a softmax has the same value for scores that are all more: terms that cancel
    cancels = "encoder.layer.0.attention.self.key.bias"
    assert float(exact[gate.SCALE + cancels]) > 1e6 * float(exact[cancels].abs().max())
