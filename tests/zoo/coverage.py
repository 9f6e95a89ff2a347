"""How many of the zoo's attentions are understood, cell by cell, with stock Inductor beside it.

    python -m tests.zoo.coverage [NAME ...]      every cell that has no row yet, or those of the models named
    python -m tests.zoo.coverage --sample        one cell of each model, compared with the rows; writes nothing
    python -m tests.zoo.coverage --table         the totals of the rows, as Markdown

A row is one line of JSON in benchmarks/results/coverage: a model, an implementation, a mode, a type, a mask or none; how many
attentions were expected and how many were fused, kept, declined or missed, with their codes; whether outputs and gradients are
right; the graphs, and how often each ran in one forward; and how many of the attentions stock Inductor's patterns matched. An
attention counts as often as it ran. Stopped, a run goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from attnfuse.remark import CODES

from .cells import Cell, Graph, cells, sample
from .entry import MissingArchitecture

ROWS: Final = Path(__file__).parents[2] / "benchmarks" / "results" / "coverage" / "rows.jsonl"
UNDERSTOOD, TAKEN = 0.98, 0.95
# The codes of attentions that are left alone because that was measured to be faster.
MEASURED: Final = frozenset({"AF031", "AF037", "AF038"})
LIMIT_S: Final = 600
PART: Final = 24

Row = dict[str, Any]


def row(cell: Cell, *, with_stock: bool) -> Row:
    """Runs a cell; what it raises stands in the row."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_S)
    start = time.monotonic()
    found: Row = {
        "name": cell.name,
        "model": cell.model,
        "column": list(cell.column),
        "expected": cell.entry.attentions,
    }
    try:
        found |= _outcome(cell)
        if with_stock:
            found |= _stock(cell)
    except MissingArchitecture as error:
        return {"name": cell.name, "missing": str(error)}
    except TooLongError:
        counts = dict.fromkeys(("fused", "kept", "declined", "missed", "failed", "graphs"), 0)
        found |= {"correct": False, "error": f"longer than {LIMIT_S} s", "codes": {}, **counts}
    finally:
        signal.alarm(0)
    return found | {"seconds": round(time.monotonic() - start, 1)}


class TooLongError(BaseException):
    """No Exception, which a compiler may catch on the way."""


def _too_long(number: int, frame: object) -> None:
    raise TooLongError


def _outcome(cell: Cell) -> Row:
    from . import cells as ways

    found: Row = {}
    graphs: list[ways.Graph] = []
    # some graphs run as Inductor's code and not operator by operator, with attnfuse and without
    for downstream in ("aot_eager", "inductor"):
        found = {"correct": False, "downstream": downstream}
        try:
            graphs, found["draws"] = ways.compared(cell, downstream)
            if cell.mode == "dropout":
                graphs = ways.found_in(cell, downstream)
            found["correct"] = True
            break
        except MissingArchitecture:
            raise
        except AssertionError as error:
            found["error"] = _first_line(error)
            with contextlib.suppress(Exception):
                graphs = ways.found_in(cell, downstream)
            break
        except Exception as error:
            found["error"] = found["raised"] = _first_line(error)
    return found | _remarks(graphs)


def _remarks(graphs: Sequence[Graph]) -> Row:
    """What was said of the graphs: of an attention as often as it ran, of a graph once."""
    kinds: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    for graph in graphs:
        for remark in graph.report.remarks:
            times = graph.runs if CODES[remark.code].scope == "site" else 1
            kinds[remark.kind] += times
            codes[remark.code] += times
    found: Row = {kind: kinds[kind] for kind in ("fused", "kept", "declined", "missed", "failed")}
    return found | {
        "codes": dict(sorted(codes.items())),
        "graphs": len(graphs),
        "runs": [graph.runs for graph in graphs],
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _stock(cell: Cell) -> Row:
    """The attentions that Inductor's patterns match, and the graphs that it compiles; nothing is generated."""
    import torch
    from functorch.compile import make_boxed_func
    from torch._dynamo.utils import counters
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    from . import cells as ways

    # of each graph: runs, attentions that a pattern matched, kernels
    graphs: list[Counter[str]] = []
    training = cell.mode != "inference"

    def backend(gm: Any, example_inputs: Sequence[Any]) -> Any:
        graphs.append(graph := Counter())

        def counted(gm: Any, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            targets = [str(n.target) for n in gm.graph.nodes]
            graph["kernels"] += sum("_scaled_dot_product" in name and "backward" not in name for name in targets)
            return make_boxed_func(gm.forward)

        counters.clear()
        run = compile_fx(gm, example_inputs, inner_compile=counted)
        matched = counters["inductor"]["fuse_attention"]
        # in training the replacement is traced twice
        graph["matched"] = matched // 2 if training else matched

        def running(*args: Any) -> Any:
            graph["runs"] += 1
            return run(*args)

        return running

    torch._dynamo.reset()
    try:
        with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            model = torch.compile(ways.build(cell, ways.PROBABILITY), backend=backend)
            ways.results(model, cell.entry.inputs(cell.masked), training, cell.entry.dynamo)
    except Exception as error:
        return {"stock_error": _first_line(error)}
    found = {
        key: sum(graph["runs"] * graph[name] for graph in graphs)
        for key, name in (("stock", "matched"), ("stock_kernels", "kernels"))
    }
    return found | {"stock_graphs": len(graphs)}


def read() -> dict[str, Row]:
    """The rows so far, by name; a later one counts."""
    if not ROWS.exists():
        return {}
    # the last line may have been cut off
    rows = (json.loads(line) for line in ROWS.read_text().splitlines() if line.endswith("}"))
    return {found["name"]: found for found in rows}


def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[Row]:
    """The rows of cells as they come, each computed in a process that does a few and leaves: a compiler's memory does not shrink."""
    context = multiprocessing.get_context("spawn")
    # max_tasks_per_child hangs in Python 3.11 (python/cpython#115634)
    for start in range(0, len(chosen), PART * jobs):
        with ProcessPoolExecutor(jobs, context, _alone) as pool:
            tasks = [pool.submit(row, cell, with_stock=with_stock) for cell in chosen[start : start + PART * jobs]]
            # a process that is killed leaves cells without a row, for the next run
            with contextlib.suppress(BrokenProcessPool):
                for task in as_completed(tasks):
                    yield task.result()


def _alone() -> None:
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    # graph breaks and the kernels that a model would rather have, for hundreds of cells
    torch._logging.set_logs(all=logging.CRITICAL)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")


def surplus(rows: Sequence[Row]) -> list[str]:
    """The cells in which more was fused or kept than the model has attentions: what is too much may hide one that was missed."""
    return [one["name"] for one in rows if one["fused"] + one["kept"] > one["expected"]]


def counted(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of cells that torch.compile cannot run, with stock Inductor either."""
    return [one for one in rows if not ("raised" in one and "stock_error" in one)]


def _runs(one: Row) -> int:
    """How often each attention of an older row ran, of those that do not count it: alike layers run the same code."""
    if "runs" in one:
        return 1
    seen, expected = sum(one[kind] for kind in ("fused", "kept", "declined", "missed")), one["expected"]
    alike = one["graphs"] > 1 and not one["failed"] and 0 < seen < expected and expected % seen == 0
    return expected // seen if alike else 1


def totals(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """Sums by column, of the rows that are counted; no cell counts more attentions than it has."""
    found: dict[tuple[str, ...], Row] = defaultdict(lambda: defaultdict(int))
    for one in counted(rows):
        total, expected = found[tuple(one["column"])], one["expected"]
        runs = _runs(one)
        taken = min((one["fused"] + one["kept"]) * runs, expected)
        measured = sum(count for code, count in one["codes"].items() if code in MEASURED) * runs
        total["models"] += 1
        total["expected"] += expected
        total["taken"] += taken
        total["understood"] += min(taken + measured, expected)
        total["right"] += one["correct"]
        for key in ("stock", "stock_kernels"):
            total[key] += min(one.get(key, 0) * runs, expected)
    return dict(sorted(found.items()))


def table(rows: Sequence[Row]) -> str:
    """The totals as Markdown."""
    lines = [
        "| implementation | mode | type | mask | models | attentions | fused or kept | understood | models right | stock Inductor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for column, total in totals(rows).items():
        share = [f"{total[key]} ({100 * total[key] / total['expected']:.1f} %)" for key in ("taken", "understood")]
        stock = total["stock"] if column[0] == "eager" else total["stock_kernels"]
        cells_ = [
            *column,
            total["models"],
            total["expected"],
            *share,
            total["right"],
            f"{100 * stock / total['expected']:.1f} %",
        ]
        lines.append("| " + " | ".join(map(str, cells_)) + " |")
    if drawn := sum(one["correct"] and one.get("draws", 1) > 1 for one in rows):
        lines += [
            "",
            f"{drawn} of the models that are right are so by the medians of their gradients with several weights.",
        ]
    out = {one["name"] for one in rows} - {one["name"] for one in counted(rows)}
    if out:
        lines += ["", f"Not counted, as stock torch.compile fails as well: {', '.join(sorted(out))}."]
    return "\n".join(lines)


def worse(new: Row, old: Row | None) -> str:
    """Why a row is worse than the one on file, or nothing."""
    if "raised" in new and old is not None and not counted([old]):
        return ""
    if not new["correct"] and (old is None or old["correct"]):
        return new.get("error", "wrong")
    taken = (new["fused"] + new["kept"]) * _runs(new)
    before = min((old["fused"] + old["kept"]) * _runs(old), new["expected"]) if old is not None else new["expected"]
    return f"{taken} attentions fused or kept, {before} before" if taken < before else ""


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="How many of the zoo's attentions are understood.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model (default: all of them)")
    parser.add_argument("--sample", action="store_true", help="one cell of each model, compared with the rows on file")
    parser.add_argument("--table", action="store_true", help="print the totals of the rows on file")
    parser.add_argument("--again", action="store_true", help="also the cells that have a row")
    parser.add_argument(
        "--same-stock",
        action="store_true",
        help="take what stock does from the row on file, where it ran: made with the same torch",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    arguments = parser.parse_args()
    stored = read()
    if arguments.table:
        print(table(list(stored.values())))
        return 0
    from . import ENTRIES

    for name in arguments.names:
        if name not in ENTRIES:
            parser.error(f"there is no model {name}")
    names = set(arguments.names or ENTRIES)
    # the sample first, so that a run that is stopped has seen every model
    every = (
        sample()
        if arguments.sample
        else list(dict.fromkeys((*sample(), *(c for name in ENTRIES for c in cells(name)))))
    )
    chosen = [cell for cell in every if cell.model in names]
    if not arguments.sample and not arguments.again:
        chosen = [cell for cell in chosen if cell.name not in stored]
    console, complaints, missing = Console(), [], []
    commit = _commit()
    with Progress(console=console) as progress:
        task = progress.add_task("cells", total=len(chosen))
        known = {name for name, one in stored.items() if arguments.same_stock and "stock" in one}
        same = [cell for cell in chosen if cell.name in known]
        others = [cell for cell in chosen if cell.name not in known]
        rows = itertools.chain(
            run(same, arguments.jobs, with_stock=False), run(others, arguments.jobs, with_stock=not arguments.sample)
        )
        for found in rows:
            progress.advance(task)
            if "missing" in found:
                missing.append(found["missing"])
                continue
            if arguments.sample:
                if why := worse(found, stored.get(found["name"])):
                    complaints.append((found["name"], why))
                continue
            if "stock" not in found and "stock_error" not in found:
                found |= {key: value for key, value in stored[found["name"]].items() if key.startswith("stock")}
            ROWS.parent.mkdir(parents=True, exist_ok=True)
            with ROWS.open("a") as file:
                file.write(json.dumps(found | {"commit": commit}) + "\n")
    for text in sorted(set(missing)):
        console.print(f"not run: {text}")
    if arguments.sample:
        for name, why in complaints:
            console.print(f"[red]{name}[/]: {why}", highlight=False)
        console.print(f"{len(chosen) - len(missing)} cells run, {len(complaints)} worse than the rows on file")
        return 1 if complaints or missing else 0
    return _judge(list(read().values()), console)


def _judge(rows: Sequence[Row], console: Console) -> int:
    """Prints the totals; 1 where a target is missed."""
    shown = Table(
        "implementation", "mode", "type", "mask", "models", "attentions", "fused or kept", "understood", "right"
    )
    missed = False
    for column, total in totals(rows).items():
        shares = total["taken"] / total["expected"], total["understood"] / total["expected"]
        missed |= shares[0] < TAKEN or shares[1] < UNDERSTOOD or total["right"] < total["models"]
        shown.add_row(
            *column,
            str(total["models"]),
            str(total["expected"]),
            *(f"{100 * x:.1f} %" for x in shares),
            str(total["right"]),
        )
    console.print(shown)
    for name in (more := surplus(rows)):
        console.print(f"[red]{name}[/]: more fused or kept than there are attentions", highlight=False)
    return int(missed or bool(more))


if __name__ == "__main__":
    sys.exit(main())
