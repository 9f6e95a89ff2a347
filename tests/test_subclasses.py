"""Tensors that give operators a meaning of their own: their graphs compile as stock's, and a remark says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.harness import qkv


def written_out(q: Any, k: Any, v: Any) -> Any:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v


def run(fn: Callable[..., Any], *args: Any) -> tuple[Any, Report]:
    reports: list[Report] = []
    torch._dynamo.reset()
    with listening(reports.append):
        out = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})(*args)
    return out, Report(()).merge(*reports)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process on its own."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield DeviceMesh("cpu", [0])
    finally:
        dist.destroy_process_group()


def test_distributed_tensors(mesh: DeviceMesh) -> None:
    given = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in qkv()]
    plain = [x.clone().requires_grad_() for x in qkv()]
    out, report = run(written_out, *given)
    expected = written_out(*plain)
    torch.testing.assert_close(out.full_tensor(), expected)
    assert [r.code for r in report.remarks] == ["AF042"]
    assert "DTensor" in str(report)
    out.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(given, plain, strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


def test_nested_tensors() -> None:
    rows = [torch.randn(length, 8, generator=torch.Generator().manual_seed(length)) for length in (3, 5)]

    def mixed(x: Tensor) -> Tensor:
        """Attention to a table: on the CPU Dynamo takes no attention between nested tensors into a graph."""
        table = torch.ones(8, 8).tril()
        return torch.softmax(x @ table, -1) @ table

    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    out, report = run(mixed, x)
    for mine, theirs in zip(out.unbind(), mixed(x).unbind(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert [r.code for r in report.remarks] == ["AF042"]


class Block(nn.Module):
    """One layer of self-attention with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(2, -1, 4, 4).transpose(1, 2) for part in self.project(x).split(16, -1))
        return self.out(written_out(q, k, v).transpose(1, 2).reshape(2, -1, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_quantised_model() -> None:
    torch.manual_seed(0)
    model = torch.ao.quantization.quantize_dynamic(Block().eval(), {nn.Linear}, torch.qint8)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        out, report = run(model, x)
        torch.testing.assert_close(out, model(x))
    # its linear layers are operators on packed weights; the attention between them sees plain tensors
    assert report.remarks
    assert not report.failed or {r.code for r in report.failed} == {"AF042"}


def test_quantised_operands() -> None:
    def attention(x: Tensor) -> Tensor:
        given = x.dequantize()
        return written_out(given, given, given)

    x = torch.quantize_per_tensor(torch.randn(2, 4, 6, 8), 0.1, 0, torch.qint8)
    out, report = run(attention, x)
    torch.testing.assert_close(out, attention(x))
    assert report.remarks
