"""`options={"dump": DIR}`: the graph after each pass, as numbered files that a person can read."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from torch import fx


def dump(folder: str | None, at: int, name: str, graph: fx.GraphModule | None, original: fx.GraphModule) -> None:
    """Writes the graph after pass number `at` (and before the first, Dynamo's graph) below `folder`.

    Every compiled graph gets a folder of its own, `graph_0`, `graph_1`, …, also when several processes write.
    """
    if folder is None or graph is None:
        return
    if at == 1:
        target = _new_folder(Path(folder))
        original.meta["attnfuse_dump"] = target
        _write(target / "0_dynamo.py", original)
    _write(original.meta["attnfuse_dump"] / f"{at}_{name}.py", graph)


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        target = parent / f"graph_{number}"
        try:
            os.mkdir(target)
        except FileExistsError:
            continue
        return target
    raise AssertionError


def _write(path: Path, graph: fx.GraphModule) -> None:
    path.write_text(graph.print_readable(print_output=False) + "\n")
