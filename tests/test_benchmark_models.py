"""The twelve models of the benchmarks: what is written about them is so, and each runs."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
import torch
import transformers

from benchmarks.models import FORWARD, Forward
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
