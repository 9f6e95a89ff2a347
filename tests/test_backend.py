"""The backend around the passes: registration, options, fallbacks, dumps, logs; a defect never reaches the user's program."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from attnfuse import backend, passes
from attnfuse.backend import listening
from attnfuse.options import Options, OptionsError
from attnfuse.passes import verify
from attnfuse.remark import Report
from attnfuse.spec import parse_spec


def attention(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    """Causal with padding, spelled out; scores are scaled in place."""
    m = torch.arange(q.shape[2])
    allowed = (m[None, :] <= m[:, None]) & pad[:, None, None, :]
    scores = q @ k.transpose(-1, -2)
    scores *= 0.25
    scores = scores + torch.where(allowed, 0.0, torch.finfo(q.dtype).min)
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous()


def tensors(length: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, length, 16, generator=generator) for _ in range(3))
    pad = torch.ones(2, length, dtype=torch.bool)
    pad[1, :5] = False
    return q, k, v, pad


def run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Report]:
    """The compiled function's result and the report of its graphs."""
    reports: list[Report] = []
    torch._dynamo.reset()
    with listening(reports.append):
        out = torch.compile(fn, backend="attnfuse", **kwargs)(*args)
    return out, Report(()).merge(*reports)


def test_the_backend_is_listed_without_an_import() -> None:
    text = "import torch, sys; print('attnfuse' in torch.compiler.list_backends(), 'attnfuse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_inductor_runs_the_rewritten_graph_with_every_entry_option() -> None:
    args = tensors()
    expected = attention(*args)
    for kwargs in (
        {},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"max_autotune": False}, "fullgraph": True},
        {"dynamic": True},
    ):
        out, report = run(attention, *args, **kwargs)
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()
        assert [r.code for r in report.remarks] == ["AF000"]


def test_a_reset_of_dynamo_drops_recorded_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    trees = ModuleType("cudagraph_trees")
    trees.reset_cudagraph_trees = lambda: called.append(1)  # type: ignore[attr-defined]
    run(attention, *tensors(), options={"downstream": "eager"})
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    torch._dynamo.reset()
    assert called


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(Exception, match="OptionsError: unknown option 'strictt' \\(did you mean 'strict'"):
        torch.compile(attention, backend="attnfuse", options={"strictt": True})(*tensors())
    with pytest.raises(OptionsError, match="max_autotune"):
        Options.parse(None, {"max_autotun": True})


def test_off_compiles_as_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNFUSE", "off")
    args = tensors()
    out, report = run(attention, *args)
    torch.testing.assert_close(out, attention(*args))
    assert report.remarks == ()


def test_a_graph_with_nothing_fused_is_handed_on_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple[object, object]] = []

    def passed_on(gm: Any, example_inputs: Any, options: Options, *, analysed: bool) -> Any:
        handed.append((gm, gm.graph))
        return gm.forward

    given: list[object] = []
    inner = passes.run
    monkeypatch.setattr(backend, "_downstream", passed_on)
    monkeypatch.setattr(passes, "run", lambda gm, options: (given.append((gm, gm.graph)), inner(gm, options))[1])
    run(lambda x: torch.softmax(x, -1) * 2, torch.randn(4, 8))
    assert handed == given
    assert len(handed) == 1


@pytest.mark.lenient
def test_what_raises_downstream_compiles_from_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    args = tensors()
    real = backend._inductor

    def fails_on_ours(gm: torch.fx.GraphModule, *args: Any) -> Any:
        if any("attnfuse" in str(n.target) for n in gm.graph.nodes):
            real(gm, *args)  # so that the graph is used up, as it is after a failure inside Inductor
            raise RuntimeError("injected downstream")
        return real(gm, *args)

    monkeypatch.setattr(backend, "_inductor", fails_on_ours)
    out, report = run(attention, *args, options={"inline_scores": 0})
    torch.testing.assert_close(out, attention(*args))
    assert [r.code for r in report.remarks] == ["AF043"]
    assert "injected downstream" in str(report)


def _training_step(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    q, k, v, pad = args
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    fn(*leaves, pad).square().sum().backward()
    return [cast(Tensor, x.grad) for x in leaves]


def _backward_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, Inductor raises on every backward, after its passes have changed the graph."""
    real = compile_fx._compile_fx_inner

    def inner(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        done = real(gm, inputs, **kwargs)
        if kwargs.get("is_backward"):
            raise RuntimeError("injected into the backward")
        return done

    monkeypatch.setattr(compile_fx, "_compile_fx_inner", inner)


@pytest.mark.lenient
@pytest.mark.parametrize("inline_scores", [0, 16384])
@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_backward_that_raises_downstream_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, inline_scores: int, bundled: bool, dynamic: bool, tmp_path: Path
) -> None:
    expected = _training_step(attention, tensors())
    _backward_that_fails(monkeypatch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    reports: list[Report] = []
    with listening(reports.append), torch._functorch.config.patch(bundled_autograd_cache=bundled):
        compiled = torch.compile(
            attention, backend="attnfuse", dynamic=dynamic, options={"inline_scores": inline_scores}
        )
        for _ in range(2):
            for got, want in zip(_training_step(compiled, tensors()), expected, strict=True):
                torch.testing.assert_close(got, want)
    report = Report(()).merge(*reports)
    assert {r.code for r in report.remarks} == {"AF045", "AF011" if inline_scores and not dynamic else "AF000"}
    assert "injected into the backward" in str(report)


def test_a_backward_that_raises_is_the_users_own_where_nothing_was_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    _backward_that_fails(monkeypatch)
    compiled = torch.compile(lambda q, k, v, pad: torch.sin(q @ k.transpose(-1, -2)) @ v, backend="attnfuse")
    with pytest.raises(Exception, match="injected into the backward"):
        _training_step(compiled, tensors())


def test_strict_raises_on_a_failing_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    _backward_that_fails(monkeypatch)
    with pytest.raises(Exception, match="injected into the backward"):
        _training_step(torch.compile(attention, backend="attnfuse", options={"strict": True}), tensors())


def test_strict_raises_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(passes, "decide", broken)
    with pytest.raises(Exception, match="injected"):
        run(attention, *tensors(), options={"strict": True, "downstream": "eager"})


def test_inductors_attention_patterns_have_no_say() -> None:
    def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2)) / 4.0).softmax(-2) @ v

    q, k, v, _ = tensors()
    with torch.no_grad():
        expected = over_queries(q, k, v)
        counters.clear()
        out, report = run(over_queries, q, k, v)
        assert counters["inductor"]["fuse_attention"] == 0
        torch.testing.assert_close(out, expected)
        assert [r.code for r in report.remarks] == ["AF022"]
        # the option lets them loose; on this function they are wrong, which is why they are off
        wrong, _ = run(over_queries, q, k, v, options={"inductor_attention_patterns": True})
        assert counters["inductor"]["fuse_attention"] == 1
        assert not torch.allclose(wrong, expected, atol=1e-2)


def test_dump_writes_each_graph_after_each_pass(tmp_path: Path) -> None:
    run(attention, *tensors(), options={"dump": str(tmp_path), "downstream": "eager"})
    run(attention, *tensors(), options={"dump": str(tmp_path), "downstream": "eager"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph_0", "graph_1"]
    files = {p.name: p.read_text() for p in (tmp_path / "graph_0").iterdir()}
    assert sorted(files) == ["0_dynamo.py", "1_normalised.py", "2_recognised.py", "3_rewritten.py"]
    assert "torch.ops.aten.softmax.int" in files["1_normalised.py"]
    assert "attnfuse.attention" in files["3_rewritten.py"]
    assert "aten.softmax" not in files["3_rewritten.py"]


def test_verify_accepts_what_is_right_and_takes_out_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    args = tensors()
    _, report = run(attention, *args, options={"verify": True, "downstream": "eager"})
    assert [r.facts["verified"] for r in report.fused] == ["3 sets of inputs"]

    deciding = sys.modules["attnfuse.passes.decide"]
    meaning = deciding.meaning

    def wrong(site: Any) -> Any:
        what = meaning(site)
        return replace(what, spec=parse_spec(str(what.spec).replace("0.25", "0.26")))

    monkeypatch.setattr(deciding, "meaning", wrong)
    out, report = run(attention, *args, options={"verify": True, "downstream": "eager"})
    assert [r.code for r in report.remarks] == ["AF044"]
    torch.testing.assert_close(out, attention(*args))


def test_verify_tries_data_that_casts_change() -> None:
    graph = torch.fx.Graph()
    leaves = {graph.placeholder(name) for name in ("ids", "times")}
    with FakeTensorMode():
        for node in leaves:
            node.meta["val"] = torch.empty(64, dtype=torch.int64 if node.name == "ids" else torch.float32)
    small, large = ({node.name: value for node, value in trial.items()} for trial in verify._trials(leaves, set()))
    assert set(small["ids"].tolist()) <= {0, 1}
    assert len(large["ids"].unique()) > len(large["ids"].to(torch.uint8).unique())
    assert len(large["ids"].unique()) > len(large["ids"].int().unique())
    assert len(large["times"].bfloat16().unique()) < len(small["times"].bfloat16().unique())


def test_the_report_is_logged_and_traced(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, logger="attnfuse"):
        run(attention, *tensors(), options={"downstream": "eager"})
    assert "1 attention: 1 fused" in caplog.text
    script = (
        "import torch, sys\nsys.path.insert(0, '.')\nfrom tests.test_backend import attention, tensors\n"
        "torch.compile(attention, backend='attnfuse', options={'downstream': 'eager', 'strict': True})(*tensors())"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+attnfuse"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert "1 attention: 1 fused" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    assert '"artifact": {"name": "attnfuse_report", "encoding": "json"}' in trace.read_text()
