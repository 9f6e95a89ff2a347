"""Whole models on a GPU against eager: inference and training, bf16 and fp32, CUDA graphs; memory errors looked for."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import attnfuse
from attnfuse.backend import listening
from attnfuse.remark import Report
from tests.models import VOCABULARY, build, call, exact
from tests.numerics import assert_close

FAMILIES = ["llama", "gpt2", "bert"]
LENGTH = 48


def given(padding: bool) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1)).cuda()
    out = {"input_ids": ids}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        out["attention_mask"] = mask
    return out


def compiled(model: torch.nn.Module, **options: object) -> tuple[torch.nn.Module, list[Report]]:
    reports: list[Report] = []
    return torch.compile(model, backend="attnfuse", **options), reports  # type: ignore[call-overload]


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inference(family: str, implementation: str, dtype: torch.dtype, padding: bool) -> None:
    model = build(family, implementation, dtype).cuda()
    inputs = given(padding)
    with torch.no_grad():
        original = call(model, inputs)
        precise = exact(model, lambda twin: call(twin, inputs))
        fast, reports = compiled(model)
        with listening(reports.append):
            out = call(fast, inputs)
    kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert_close(out[kept], original[kept], precise[kept], what=f"{family} {implementation}")
    report = Report(()).merge(*reports)
    assert len(report.fused) + len(report.kept) == 2, str(report)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: str, implementation: str) -> None:
    model = build(family, implementation).cuda()
    inputs = given(True)
    kept = inputs["attention_mask"].bool()

    def gradients(run: torch.nn.Module, of: torch.nn.Module) -> dict[str, Tensor]:
        of.zero_grad()
        call(run, inputs)[kept].square().sum().backward()
        return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}

    original = gradients(model, model)
    precise = exact(model, lambda twin: gradients(twin, twin))
    fast, _ = compiled(model)
    found = gradients(fast, model)
    assert found.keys() == original.keys()
    for name, grad in found.items():
        # the sum of absolute terms is at least the greatest gradient; biases of keys have none but rounding
        scale = max(float(precise[name].abs().max()), float(original[name].abs().max()), 1.0)
        assert_close(grad, original[name], precise[name], scale, what=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs(family: str) -> None:
    model = build(family, "eager", torch.bfloat16).cuda()
    inputs = given(True)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        original = call(model, inputs)[kept]
        precise = exact(model, lambda twin: call(twin, inputs))[kept]
        fast, _ = compiled(model, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            out = call(fast, inputs)[kept].clone()
            assert_close(out, original, precise, what=family)


def test_dropout_draws_anew_in_every_replay() -> None:
    q, k, v = (torch.randn(1, 2, 64, 16, device="cuda") for _ in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT * 0.25 + torch.arange(64, device="cuda"), -1)
        return torch.dropout(weights, 0.5, True) @ v

    fast = torch.compile(attention, backend="attnfuse", mode="reduce-overhead")
    results = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        results.append(fast(q, k, v).clone())
    assert not torch.equal(results[-1], results[-2])


SMALL = """
import torch, attnfuse
q, k, v = (torch.randn(1, 4, 70, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
pad = torch.rand(1, 70, device="cuda") < 0.7
out = attnfuse.attention(q, k, v, "s*0.1 where n <= m & pad[b, n] else +min", pad=pad, dropout=0.1)
out.sum().backward()
torch.cuda.synchronize()
print("done")
"""


def test_no_memory_error_is_found() -> None:
    tool = shutil.which("compute-sanitizer")
    command = [sys.executable, "-c", SMALL]
    done = subprocess.run(
        [tool, "--error-exitcode", "9", *command] if tool else command, capture_output=True, text=True, timeout=240
    )
    if tool and done.returncode != 0 and "not supported" in (done.stdout + done.stderr).lower():
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "done" in done.stdout


def test_attention_by_hand() -> None:
    q, k, v = (torch.randn(2, 4, 130, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(130, 130, device="cuda", dtype=torch.bool).triu(1)
        return (q @ k.mT * 0.125).masked_fill(future, -torch.inf).softmax(-1) @ v

    out = attnfuse.attention(q, k, v, "s*0.125 where n <= m else -inf")
    assert_close(out, plain(q, k, v), plain(*(x.double() for x in (q, k, v))))
