"""`torch.compile(..., backend="attnfuse")`: run the passes, hand the graph on, never break a user's program.

The only file that touches Inductor.  A graph in which nothing was rewritten is handed on as Dynamo's original object; one whose
rewritten form raises downstream is compiled from the original, with a remark.  A backward is compiled when it is first needed,
after its forward ran; where that raises, the backward graph is run operator by operator.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from importlib import metadata
from typing import Any, cast

import torch
from torch import fx
from torch._logging._internal import trace_structured

from attnfuse import __version__, passes
from attnfuse.options import Options
from attnfuse.remark import Remark, Report

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]

_listeners: ContextVar[tuple[Callable[[Report], None], ...]] = ContextVar("attnfuse_listeners", default=())


@contextlib.contextmanager
def listening(receive: Callable[[Report], None]) -> Iterator[None]:
    """While the context is open, `receive` gets the report of every graph that this thread compiles."""
    token = _listeners.set((*_listeners.get(), receive))
    try:
        yield
    finally:
        _listeners.reset(token)


def attnfuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Compiled:
    """The backend, as Dynamo calls it.

    Args:
        gm: the graph; it is not changed before it is known what is compiled.
        example_inputs: the real inputs.
        mode: one of Inductor's modes.
        options: attnfuse's own keys and Inductor config keys, see `attnfuse.options.Options`.

    Raises:
        OptionsError: an unknown mode or key, or a value of the wrong type.
    """
    chosen = Options.parse(mode, options)
    if not chosen.enabled:
        return _inductor(gm, example_inputs, dict(chosen.inductor))
    graph, report = passes.run(gm, chosen)
    report = Report(report.remarks, versions(), device_name(example_inputs))
    analysed = not any(remark.code in ("AF041", "AF042") for remark in report.remarks)
    if graph is None:
        _publish(report, chosen)
        return _downstream(gm, example_inputs, chosen, analysed=analysed)
    try:
        compiled = _downstream(graph, example_inputs, chosen, analysed=True, rewritten=True)
    except torch._dynamo.exc.RestartAnalysis:
        raise
    except Exception as error:
        if chosen.strict:
            raise
        log.debug("the rewritten graph raised downstream", exc_info=True)
        failed = Remark.of("AF043", error=_described(error))
        _publish(Report((failed,), report.versions, report.device), chosen)
        return _downstream(gm, example_inputs, chosen, analysed=True)
    _publish(report, chosen)
    return compiled


def _described(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _reset() -> None:
    """What `torch._dynamo.reset` asks of a backend: recorded CUDA graphs are dropped, however they were asked for."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


attnfuse.reset = _reset  # type: ignore[attr-defined]


def versions() -> dict[str, str]:
    """Versions for the head of a report: attnfuse, torch and, where it is installed, triton."""
    found = {"attnfuse": __version__, "torch": str(torch.__version__)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return found


def device_name(example_inputs: Sequence[Any]) -> str:
    """`cpu`, or the architecture of the first input that lies on an accelerator."""
    for value in example_inputs:
        if isinstance(value, torch.Tensor) and value.device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(value.device)
            return f"sm_{major}{minor}" if torch.version.hip is None else "rocm"
    return next((x.device.type for x in example_inputs if isinstance(x, torch.Tensor)), "cpu")


def _publish(report: Report, options: Options) -> None:
    """Hands the report on; what goes wrong with that is no reason to stop a compile."""
    try:
        _hand_out(report, options)
    except Exception:
        if options.strict:
            raise
        log.debug("the report could not be handed out", exc_info=True)


def _hand_out(report: Report, options: Options) -> None:
    """To listeners, the log and the structured trace."""
    for receive in _listeners.get():
        receive(report)
    if options.explain:
        print(report, file=sys.stderr)
    log.info("%s", report)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "attnfuse_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(json.loads(report.to_json()), indent=1),
        expect_trace_id=False,
    )


def _downstream(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, *, analysed: bool, rewritten: bool = False
) -> Compiled:
    """Compiles a graph with what `options.downstream` names.

    Args:
        analysed: attnfuse has judged every attention in the graph, so that Inductor's attention patterns, which ignore axes and
            fill values, have no more say in it.
        rewritten: the graph is not the user's, so that a failure of its backward is ours to mend.
    """
    if options.downstream == "eager":
        return gm.forward
    if options.downstream == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    patches = dict(options.inductor)
    if analysed and not options.inductor_attention_patterns:
        patches |= _without_attention_patterns(patches)
    if not rewritten or options.strict:
        return _inductor(gm, example_inputs, patches)

    def failed(error: Exception, inputs: Sequence[Any]) -> None:
        log.debug("the backward of the rewritten graph raised downstream", exc_info=True)
        remark = Remark.of("AF045", error=_described(error))
        _publish(Report((remark,), versions(), device_name(inputs)), options)

    return _inductor(gm, example_inputs, patches, failed)


def _inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    patches: dict[str, Any],
    backward_failed: Callable[[Exception, Sequence[Any]], None] | None = None,
) -> Compiled:
    """Compiles with Inductor; given `backward_failed`, it is told of a backward that raises, which then runs as it stands."""
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.output_code import OutputCode

    if backward_failed is None:
        return cast(Compiled, compile_fx(gm, example_inputs, config_patches=patches))

    class AsItStands(OutputCode):
        """What Inductor returns for a graph, but run operator by operator, and never cached."""

        def __init__(self, part: fx.GraphModule) -> None:
            self.part = part
            self._boxed_call = True

        def __call__(self, inputs: Sequence[Any]) -> Any:
            return self.part(*inputs)

        def prepare_for_serialization(self) -> None:
            raise BypassAOTAutogradCache("the backward is not compiled")

    def compile_part(part: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            return compile_fx_inner(part, inputs, **kwargs)
        untouched = fx.GraphModule(part, copy.deepcopy(part.graph))
        try:
            return compile_fx_inner(part, inputs, **kwargs)
        except Exception as error:
            backward_failed(error, inputs)
            return AsItStands(untouched)

    return cast(Compiled, compile_fx(gm, example_inputs, inner_compile=compile_part, config_patches=patches))


def _without_attention_patterns(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Config patches under which Inductor's attention patterns find nothing in the graph that is being compiled.

    Inductor has no switch for them alone.  Its hooks before and after the patterns hide the value products of what attnfuse left
    alone and show them again; both have a uuid, so the caches tell such graphs from stock's.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Hook(CustomGraphPass):
        def __init__(self, step: Callable[[fx.Graph], None], other: Any) -> None:
            self.step = step
            self.others = other if isinstance(other, list | tuple) else [other] if other is not None else []

        def __call__(self, graph: fx.Graph) -> None:
            for other in self.others:
                other(graph)
            self.step(graph)

        def uuid(self) -> Any:
            theirs = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
            # an unknown pass of the user's makes the graph uncacheable, as it does without attnfuse
            return None if None in theirs else ("attnfuse", __version__, self.step.__name__, *theirs)

    def before(name: str) -> Any:
        return patches[name] if name in patches else getattr(config, name)

    return {
        "joint_custom_pre_pass": Hook(_hide_value_products, before("joint_custom_pre_pass")),
        "joint_custom_post_pass": Hook(_show_value_products, before("joint_custom_post_pass")),
    }


def _hidden_bmm(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.bmm(weights, value)


def _hide_value_products(graph: fx.Graph) -> None:
    """Every product that reads a softmax becomes an operator that no pattern names."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        if _reads_softmax(node):
            node.target = _hidden_bmm


def _show_value_products(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=_hidden_bmm):
        node.target = torch.ops.aten.bmm.default


def _reads_softmax(node: fx.Node, reach: int = 12) -> bool:
    """Whether an exponential or a softmax stands above the node with no other product in between."""
    products = (torch.ops.aten.bmm.default, _hidden_bmm, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    softmaxes = (torch.ops.aten.exp.default, torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
    todo, seen = [(x, reach) for x in node.all_input_nodes], set()
    while todo:
        at, left = todo.pop()
        if at.target in softmaxes:
            return True
        if left and at not in seen and at.target not in products:
            seen.add(at)
            todo.extend((x, left - 1) for x in at.all_input_nodes)
    return False
