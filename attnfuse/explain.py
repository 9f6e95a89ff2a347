"""`explain(fn, *args, **kwargs)`: what becomes of every attention of a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnfuse import passes
from attnfuse.backend import device_name, versions
from attnfuse.options import Options
from attnfuse.remark import Report


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Runs `fn(*args, **kwargs)` once under Dynamo and reports on every softmax and SDPA call that it meets.

    Each graph is analysed and then run as it is, so no kernel is generated and no cache can hide a pass.  Like
    `torch._dynamo.explain` this resets Dynamo: what was compiled before is compiled again at its next call.

    Args:
        fn: a module or function; grad mode and autocast are those of the caller.

    Returns:
        The remarks of all graphs, in the order in which they were met.
    """
    options = Options.parse(None, None)
    report = Report((), versions(), "")

    def analyse(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal report
        _, found = passes.run(gm, options)
        report = report.merge(Report(found.remarks, {}, device_name(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=analyse)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    return report


__all__ = ["explain"]
