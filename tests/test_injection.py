"""An exception in any function of the passes, or of what they ask, costs an attention or a graph and never the user's program."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import attnfuse
from attnfuse import passes
from attnfuse.options import Options
from tests import models
from tests.test_backend import attention, tensors

pytestmark = pytest.mark.lenient

Captured = tuple[fx.GraphModule, list[Any]]


@contextmanager
def raising_in(target: CodeType) -> Iterator[list[int]]:
    """Raises at the first call of a function, from inside it."""
    hits: list[int] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is target and not hits:
            hits.append(1)
            raise ZeroDivisionError("injected")

    sys.setprofile(profile)
    try:
        yield hits
    finally:
        sys.setprofile(None)


def functions_called(step: Callable[[], object]) -> list[CodeType]:
    """The functions of the passes and of what they ask (score, spec, tiles, templates) that `step` calls."""
    package = str(Path(attnfuse.__file__).parent)
    wanted = tuple(f"{package}/{part}" for part in ("passes", "score.py", "spec.py", "tiles.py", "templates"))
    found: dict[CodeType, None] = {}
    main = threading.get_ident()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        ours = code.co_filename.startswith(wanted) and threading.get_ident() == main
        # an exception in a generator's or comprehension's frame surfaces in the function around it
        if event == "call" and ours and not code.co_name.startswith("<"):
            found[code] = None

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return list(found)


def forget() -> None:
    """Empties the caches of pure functions, so that each run goes through all of them."""
    from attnfuse import spec, tiles
    from attnfuse.templates import choose, inline, library, tile_lists

    for module in (spec, tiles, choose, inline, library, tile_lists):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def captured(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
    """The graph of `fn` as Dynamo hands it to a backend, and its inputs."""
    found: list[Captured] = []
    torch._dynamo.reset()
    torch.compile(fn, fullgraph=True, backend=lambda gm, inputs: (found.append((gm, inputs)), gm.forward)[1])(
        *args, **kwargs
    )
    ((gm, inputs),) = found
    return gm, inputs


def global_state() -> tuple[object, ...]:
    """What a pass switches while it runs."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_rng_state().sum(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.fx.traceback.has_preserved_node_meta(),
        torch._C._functorch.get_inplace_requires_grad_allowed(),
    )


def inject(gm: fx.GraphModule, options: Options, every: int, check: Callable[[Any, str], None]) -> None:
    """Raises in each `every`-th function that the passes call, and has the program that is left checked."""
    before = gm.print_readable(print_output=False)
    forget()
    functions = functions_called(lambda: passes.run(gm, options))
    assert len(functions) > 100
    state = global_state()
    chosen = [code for code in functions[::every] if code is not passes.run.__code__]
    failed = 0
    for code in chosen:
        forget()
        with raising_in(code) as hits:
            graph, report = passes.run(gm, options)
        assert hits, code
        assert global_state() == state, code.co_qualname
        if graph is not None:
            check(graph, code.co_qualname)
        assert report.failed or graph is not None or report.remarks, code.co_qualname
        failed += bool(report.failed)
    assert failed > 0.8 * len(chosen)
    # nothing is left behind that the next graph would find
    forget()
    graph, report = passes.run(gm, options)
    assert report.fused
    assert report.fused == report.remarks
    assert gm.print_readable(print_output=False) == before
    check(gm, "as it came")


@pytest.mark.parametrize("inline_scores", [0, 1 << 14])
def test_in_a_function(inline_scores: int) -> None:
    args = tensors()
    gm, inputs = captured(attention, *args)
    expected = attention(*args)

    def check(graph: Any, what: str) -> None:
        torch.testing.assert_close(graph(*inputs)[0], expected, msg=f"after an exception in {what}")

    inject(gm, Options.parse(None, {"downstream": "eager", "inline_scores": inline_scores}), 1, check)


def _model(family: str, implementation: str, checkpointed: bool) -> Any:
    model: Any = models.build(family, implementation, layers=1).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "implementation", "checkpointed"),
    [("llama", "eager", True), ("gpt2", "sdpa", False), ("bert", "eager", False)],
)
def test_in_a_model(family: str, implementation: str, checkpointed: bool, every: int) -> None:
    """Outputs and gradients are those of the graph as it came."""
    model = _model(family, implementation, checkpointed)
    gm, inputs = captured(lambda **given: models.call(model, given), **models.inputs("left"))
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def results(graph: Any) -> list[Tensor | None]:
        (out, *_) = graph(*inputs)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)]

    expected = results(gm)

    def check(graph: Any, what: str) -> None:
        for mine, theirs in zip(results(graph), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=f"after an exception in {what}")

    inject(gm, Options.parse(None, {"downstream": "eager", "inline_scores": 0}), every, check)


@pytest.mark.parametrize("name", ["join", "unband"])
def test_in_a_pass_that_other_sites_do_not_need(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, inputs = captured(attention, *tensors())
    expected = attention(*tensors())

    def raising(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(passes, name, raising)
    given = {"downstream": "eager", "inline_scores": 0}
    graph, report = passes.run(gm, Options.parse(None, given))
    assert graph is not None
    (failed,) = report.failed
    assert failed.code == "AF040"
    assert "injected" in str(failed)
    assert (*report.fused, failed) == report.remarks
    torch.testing.assert_close(graph(*inputs)[0], expected)
    with pytest.raises(RuntimeError, match="injected"):
        passes.run(gm, Options.parse(None, {**given, "strict": True}))
