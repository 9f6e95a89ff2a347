"""What the passes cost, counted and not timed: a layer more costs a little more, and what layers share is worked out once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor

from attnfuse import passes
from attnfuse.backend import listening
from attnfuse.passes import graph, index, lift
from attnfuse.remark import Report

FEW, MANY = 2, 6


class Layer(nn.Module):
    """An attention that is written out, and a network behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = (y.view(B, N, 4, 8).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        weights = (q @ k.mT * 8**-0.5 + mask).softmax(-1)
        out: Tensor = x + self.out((weights @ v).transpose(1, 2).reshape(B, N, 32)).relu()
        return out


class Model(nn.Module):
    """Layers under one mask, a window with padding."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        near = (at <= at[:, None]) & (at > at[:, None] - 16)
        allowed = near[None, None] & padding[:, None, None, :].bool()
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, mask)
        return x


Count = Callable[[int, int, bool], Counter[str]]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """What the passes do, and how often, to a model of so many layers and tokens, its sizes symbols or not."""
    counts: Counter[str] = Counter()
    inside = False

    def watch(owner: Any, name: str, label: str) -> None:
        called = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[label] += inside
            return called(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    algebra = SimpleNamespace(**vars(sympy))
    monkeypatch.setattr(index, "sympy", algebra)
    watch(algebra, "cancel", "simplifications")
    watch(algebra, "expand", "simplifications")
    watch(proxy_tensor._MakefxTracer, "trace", "traces")
    watch(FakeTensorMode, "dispatch", "operators run")
    watch(graph.Storage, "__init__", "walks")
    watch(lift.Lifter, "_lift", "lifted")
    run = passes.run

    def only_here(*args: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return run(*args)
        finally:
            inside = False

    monkeypatch.setattr(passes, "run", only_here)

    def compiled(layers: int, tokens: int, dynamic: bool) -> Counter[str]:
        torch._dynamo.reset()
        counts.clear()
        for function in vars(index).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
        options = {"downstream": "eager", "inline_scores": 1 << 14}
        model = torch.compile(Model(layers), backend="attnfuse", dynamic=dynamic, options=options)
        reports: list[Report] = []
        with torch.no_grad(), listening(reports.append):
            model(torch.randn(2, tokens, 32), torch.ones(2, tokens, dtype=torch.int64))
        kinds = [remark.kind for report in reports for remark in report.remarks]
        assert kinds == ["fused"] * layers
        return counts.copy()

    return compiled


@pytest.mark.parametrize(
    ("tokens", "dynamic"), [(32, False), (512, False), (512, True)], ids=["inline", "static", "dynamic"]
)
def test_layers_that_are_alike_cost_next_to_nothing(count: Count, tokens: int, dynamic: bool) -> None:
    few, many = count(FEW, tokens, dynamic), count(MANY, tokens, dynamic)
    more = {what: (many[what] - few[what]) / (MANY - FEW) for what in many}
    # once a graph, and once for the nodes of small attentions
    assert few["traces"] == (2 if tokens == 32 else 1)
    assert more["traces"] == more["walks"] == more.get("simplifications", 0) == 0
    # the product, its scale and the sum, and nothing of the mask
    assert few["lifted"] > 20
    assert more["lifted"] <= 3
    # the new nodes; a layer has 23 of its own
    assert more["operators run"] <= 20
