"""DDP and FSDP2 over two gloo processes, each layer compiled by itself, as large models are trained."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from attnfuse.backend import listening
from attnfuse.remark import Report
from tests import models

WORLD = 2
PATIENCE = timedelta(seconds=120)


def _step(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    out = models.call(model, given)
    out.square().mean().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is not None:
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            grads[name.replace("_orig_mod.", "").removeprefix("module.")] = whole.detach().clone()
    return grads


def _part(rank: int) -> dict[str, Tensor]:
    given = models.inputs("left", batch=2 * WORLD)
    return {name: x[2 * rank : 2 * rank + 2] for name, x in given.items()}


def _work(rank: int, kind: str, folder: str) -> None:
    """One process: a step with compiled layers, its gradients and remarks written to `folder`."""
    torch.set_num_threads(1)
    # they meet in a file: a port that was free may be taken by the time it is used
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=PATIENCE)
    try:
        model: Any = models.build("llama", "eager").train()
        reports: list[Report] = []
        for layer in model.model.layers:
            layer.compile(backend="attnfuse", options={"downstream": "aot_eager"})
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        with listening(reports.append):
            grads = _step(model, _part(rank))
        remarks = [r for report in reports for r in report.remarks]
        if rank == 0:
            torch.save(grads, Path(folder, "gradients.pt"))
            facts = [(r.kind, r.score, list(r.facts.get("notes", ()))) for r in remarks]  # type: ignore[call-overload]
            Path(folder, "remarks.json").write_text(json.dumps(facts))
        # nobody leaves while another still asks for something
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """The gradients are the mean of those that eager gives for each process's part; the mask, which comes from outside the
    compiled layers, is a leaf with a note."""
    started: Any = multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _work, args=(kind, str(tmp_path)), nprocs=WORLD, join=False, start_method="spawn"
    )
    end = time.monotonic() + 2 * PATIENCE.total_seconds()
    while not started.join(timeout=5):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    actual = torch.load(tmp_path / "gradients.pt")
    model = models.build("llama", "eager").train()
    expected: dict[str, Tensor] = {}
    for rank in range(WORLD):
        model.zero_grad()
        for name, grad in _step(model, _part(rank)).items():
            expected[name] = expected.get(name, 0.0) + grad / WORLD
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=lambda m, name=name: f"{name}: {m}")
    remarks = json.loads((tmp_path / "remarks.json").read_text())
    assert remarks
    for found, score, notes in remarks:
        assert found == "fused", remarks
        assert "mask" in score or "bias" in score, score
        assert "AF050" in notes, remarks
