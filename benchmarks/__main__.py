"""`python -m benchmarks`: measures the cases, writes each result as soon as it is there, prints all of them as a table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks import machine, results
from benchmarks.cases import CASES, Outcome, Say, Setting, Speed
from benchmarks.results import Result

PAIRS, QUICK = 15, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where results are wrong or a target is failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="only cases whose name holds TEXT (may be given several times)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK} pairs for {PAIRS}; nothing is written without --out"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure also what has a result of this commit and machine"
    )
    parser.add_argument(
        "--starts", type=int, metavar="N", help="start the processes of a case at most N times: faster, and less sure"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default: benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--show", action="store_true", help="print the results that there are and stop")
    chosen = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 132
    names = [name for name in CASES if not chosen.only or any(part in name for part in chosen.only)]
    if not names:
        parser.error(f"no case holds {' or '.join(map(repr, chosen.only))}; there are {', '.join(CASES)}")
    if chosen.starts is not None and chosen.starts < 1:
        parser.error(f"--starts {chosen.starts}: at least 1")
    if chosen.list:
        for name in names:
            console.print(f"{name}\n    {CASES[name].about}", highlight=False, soft_wrap=True)
        return 0
    folder = chosen.out or (None if chosen.quick else results.FOLDER)
    if chosen.show:
        files = sorted((folder or results.FOLDER).glob("*/*.json"))
        for place in dict.fromkeys(file.parent for file in files):
            found = [result for name in names if (result := results.load(place / f"{name}.json"))]
            print_table(console, found)
        return 0
    found = list(measured(names, chosen.quick, chosen.again, folder, console, chosen.starts))
    print_table(console, found)
    bad = ("wrong results", "fail")
    return int(any(row.verdict in bad for result in found for row in result.outcome.rows))


def measured(
    names: Sequence[str],
    quick: bool,
    again: bool,
    folder: Path | None,
    console: Console,
    most_starts: int | None = None,
) -> Iterator[Result]:
    where, versions, commit = machine.machine(), machine.versions(), machine.commit()
    today = datetime.date.today().isoformat()
    for number, name in enumerate(names):
        case = CASES[name]
        starts = case.starts if isinstance(case, Speed) else 1
        starts = min(starts, most_starts or starts)
        plan = Result(name, case.about, Outcome(()), QUICK if quick else PAIRS, today, commit, where, versions, starts)
        file = results.path(folder, where, name) if folder else None
        known = results.load(file) if file and not again else None
        title = f"{number + 1}/{len(names)} {name}"
        if known is not None and known.still_holds(plan):
            console.print(f"{title}: measured on {known.date}", highlight=False)
            yield known
            continue
        with tempfile.TemporaryDirectory(prefix="attnfuse-benchmarks-") as scratch, progress(title) as say:
            outcome = case.measure(name, Setting(plan.pairs, plan.starts, Path(scratch), say))
        result = replace(plan, outcome=outcome)
        for row in outcome.rows:
            console.print(f"{title}: {'  '.join(results.cells(row))}", highlight=False, soft_wrap=True)
            if row.note:
                console.print(f"    {row.note}", highlight=False, markup=False, soft_wrap=True)
        if file:
            results.save(result, file)
        yield result


@contextlib.contextmanager
def progress(title: str) -> Iterator[Say]:
    """Says what is going on: in a line that changes on a terminal, in one line each in a pipe."""
    console, start = Console(stderr=True), time.monotonic()

    def text(step: str) -> str:
        return f"{title}  {time.monotonic() - start:4.0f} s  {step}"

    if console.is_terminal:
        with console.status(title) as status:
            yield lambda step: status.update(text(step))
    else:
        yield lambda step: console.print(text(step), highlight=False, soft_wrap=True)


def print_table(console: Console, found: Sequence[Result]) -> None:
    if not found:
        return
    first = found[0]
    facts = ", ".join(f"{name} {value}" for name, value in {**first.machine, **first.versions}.items())
    commits = ", ".join(dict.fromkeys(result.commit or "unknown" for result in found))
    console.print(results.table(found))
    console.print(
        f"{facts}; commit {commits}; {first.pairs} pairs (compile with empty caches: 5, passes: 3)", highlight=False
    )


if __name__ == "__main__":
    sys.exit(main())
