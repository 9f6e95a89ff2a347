"""The backend as users call it, with Inductor behind it: held against stock `torch.compile` on a tiny Llama.

What fusing must not change: for which inputs a compiled program is used again, which inputs are static, what the caches keep
for the next process, and which numbers a recomputed layer draws.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_first_risk import LENGTHS, _described, batch, llama
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as inductor
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.numerics import assert_close

SPELLINGS = ("eager", "sdpa")
FORMS = {"operator": {"inline_scores": 0}, "written out": {"inline_scores": 1 << 14}}
"""How a small attention is fused: as one operator, or in operators that Inductor fuses."""

# Guards, static inputs, recompiles


@dataclass
class Seen:
    """What one backend compiled, one entry a graph, and what came out, one a length."""

    static: list[tuple[bool, list[int]]] = field(default_factory=list)
    metadata: list[list[int]] = field(default_factory=list)
    shape_guards: list[list[str]] = field(default_factory=list)
    guards: list[set[str]] = field(default_factory=list)
    operators: list[tuple[bool, int]] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)


@contextlib.contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Inductor without C++ and without caches, and notes of what it is given."""
    compile_inner, compile_outer = inductor.compile_fx_inner, inductor.compile_fx

    def inner(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        backward = bool(kwargs.get("is_backward"))
        seen.static.append((backward, list(kwargs["static_input_idxs"])))
        seen.operators.append((backward, sum(str(n.target).startswith("attnfuse.attention.") for n in gm.graph.nodes)))
        return compile_inner(gm, inputs, **kwargs)

    def outer(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        # the one that it calls for itself, to set the config, is not counted
        compiled = compile_outer(gm, inputs, **{"inner_compile": inner, **kwargs})
        if "inner_compile" not in kwargs:
            context = torch._guards.TracingContext.get()
            assert context.fw_metadata is not None
            assert context.fake_mode is not None
            seen.metadata.append(list(context.fw_metadata.static_input_indices))
            seen.shape_guards.append([str(guard.expr) for guard in context.fake_mode.shape_env.guards])
        return compiled

    with (
        mock.patch.object(inductor, "compile_fx", outer),
        listening(seen.reports.append),
        inductor_config.patch(fx_graph_cache=False, disable_cpp_codegen=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def run(model: nn.Module, backend: str, options: dict[str, int] | None, *, training: bool) -> Seen:
    """The model over three lengths, compiled whole."""
    seen = Seen()

    def step(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits

    torch._dynamo.reset()
    forward = torch.compile(step, backend=backend, options=options)
    with watched(seen), torch.set_grad_enabled(training):
        for length in LENGTHS:
            model.zero_grad()
            logits = forward(**batch(length))
            seen.logits.append(logits.detach())
            if training:
                logits.square().mean().backward()
                seen.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(step.__code__)
    seen.guards = [_described(entry.guard_manager) for entry in entries]
    return seen


FAST = (("eager", True, "operator"), ("sdpa", False, "written out"))


@pytest.mark.parametrize(
    ("spelling", "training", "form"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(SPELLINGS, (False, True), FORMS)
    ],
)
def test_guards_recompiles_and_static_inputs_equal_stock(spelling: str, training: bool, form: str) -> None:
    """Fusing adds no guard and no recompile, and AOTAutograd and Inductor know the same inputs for static."""
    model = llama(spelling, layers=1).train(training)
    stock = run(model, "inductor", None, training=training)
    fused = run(model, "attnfuse", FORMS[form], training=training)
    # only what is known to be small is written out, and the second graph has symbolic sizes
    expected = [1, 1] if form == "operator" else [0, 1]
    assert [count for backward, count in fused.operators if not backward] == expected
    assert [len(report.fused) for report in fused.reports] == [1, 1], "\n".join(map(str, fused.reports))
    assert len(stock.metadata) == 2, "one static graph, one for all other lengths"
    assert all(stock.metadata)
    assert stock.shape_guards[1], "the second length is compiled with symbolic sizes"
    assert fused.metadata == stock.metadata
    assert fused.shape_guards == stock.shape_guards
    assert fused.guards == stock.guards
    # what a backward is given depends on what the forward saved, which fusing is there to change
    assert [s for backward, s in fused.static if not backward] == [s for backward, s in stock.static if not backward]
    assert [backward for backward, _ in fused.static] == [backward for backward, _ in stock.static]
    assert [x.stride() for x in fused.logits] == [x.stride() for x in stock.logits]
    for mine, theirs in zip(fused.gradients, stock.gradients, strict=True):
        assert [x.stride() for x in mine] == [x.stride() for x in theirs]


# Caches


def _step(model: nn.Module, forward: Any, *, training: bool) -> list[Tensor]:
    """The logits of one batch and, in training, the gradients of all parameters."""
    model.zero_grad()
    with torch.set_grad_enabled(training):
        logits = forward(**batch(16)).logits
    if training:
        logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _child(form: str) -> None:
    """One process of `test_caches_hit_in_a_second_process`: prints counters and remarks of inference and training as JSON."""
    result: dict[str, Any] = {}
    for training in (False, True):
        torch._dynamo.reset()
        counters.clear()
        reports: list[Report] = []
        model = llama(layers=1).train(training)
        options = {"strict": True, "disable_cpp_codegen": True, **FORMS[form]}
        with listening(reports.append):
            actual = _step(model, torch.compile(model, backend="attnfuse", options=options), training=training)
        found = counters["aot_autograd"], counters["inductor"]
        result["training" if training else "inference"] = {
            "counters": [{name: n for name, n in counter.items() if CACHE.search(name)} for counter in found],
            "report": json.loads(Report(()).merge(*reports).to_json()),
        }
        original = _step(model, model, training=training)
        model = model.double()
        exact = _step(model, model, training=training)
        assert len(actual) == len(original) == (1 + len(list(model.parameters())) if training else 1)
        for at, tensors in enumerate(zip(actual, original, exact, strict=True)):
            assert_close(*tensors, what=f"result {at}")
    print(json.dumps(result))


CACHE = re.compile("cache_(hit|miss|bypass)$")


@pytest.mark.parametrize("form", FORMS)
def test_caches_hit_in_a_second_process(form: str, tmp_path: Path) -> None:
    """The second process takes both graphs from the caches, computes the same, and reports the same: the passes do run there."""
    tests = Path(__file__).parent
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{tests}:{tests.parent}"}
    command = [sys.executable, "-W", "ignore", "-c", f"import test_whole_backend; test_whole_backend._child({form!r})"]
    first, second = (
        json.loads(
            subprocess.run(
                command, cwd=tests, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    for kind, graphs in (("inference", 1), ("training", 2)):
        assert first[kind]["counters"] == [{"autograd_cache_miss": 1}, {"fxgraph_cache_miss": graphs}]
        assert second[kind]["counters"] == [{"autograd_cache_hit": 1}, {"fxgraph_cache_hit": graphs}]
        assert [remark["kind"] for remark in first[kind]["report"]["remarks"]] == ["fused"]
        assert second[kind]["report"] == first[kind]["report"]


# Dropout in a checkpoint


def _averaged(x: Tensor, spelling: str) -> Tensor:
    """The mean of the rows with dropped weights: linear in x, as its scores are all zero."""
    q = torch.zeros_like(x) * x
    if spelling == "sdpa":
        return F.scaled_dot_product_attention(q, q, x, dropout_p=0.5)
    return F.dropout((q @ q.mT).softmax(-1), 0.5, training=True) @ x


DOWNSTREAMS: dict[str, dict[str, object]] = {
    "aot_eager": {"downstream": "aot_eager"},
    "inductor": {"disable_cpp_codegen": True},
    "fallback_random": {"disable_cpp_codegen": True, "fallback_random": True},
}


@pytest.mark.parametrize("downstream", DOWNSTREAMS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_checkpoint_draws_the_mask_of_its_forward_again(spelling: str, layers: int, downstream: str) -> None:
    """Given its masks the output is linear in x, so that gradient and x multiply to it, if both passes had the same masks."""

    def fn(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = checkpoint(_averaged, x, spelling, use_reentrant=False)
        return x

    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="attnfuse", options=DOWNSTREAMS[downstream])
    outputs: list[Tensor] = []
    for seed in (1, 2, 1):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=generator).requires_grad_()
        weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        torch.manual_seed(seed)
        with listening(reports.append):
            out = compiled(x)
        (out * weights).sum().backward()
        assert x.grad is not None
        total, terms = (out * weights).sum().detach(), (x.grad * x).detach()
        assert_close(terms.sum(), total, total, float(terms.abs().sum()), what="gradient times x")
        outputs.append(out.detach())
    assert [[remark.kind for remark in report.remarks] for report in reports] == [["fused"] * layers]
    assert not torch.equal(outputs[0], outputs[1]), "each step has its own masks"
    assert torch.equal(outputs[0], outputs[2]), "the seed of the program decides on them"
