"""`python -m benchmarks.gpu`: measures, most important first, until the time is used up; goes on where an earlier run stopped."""

from __future__ import annotations

import argparse
import datetime
import sys
import tarfile
import time
import traceback
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine, results
from benchmarks.cases import Outcome, Row
from benchmarks.gpu.cases import CASES, SAMPLES
from benchmarks.results import Result


def main() -> int:
    """Runs the command line; returns 1 where results are wrong or a target is failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", action="append", help="only cases whose name holds TEXT")
    parser.add_argument("--seconds", type=float, default=360, help="no case is begun after this time (default: 360)")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="keep this tar.gz of all results up to date; begin with what is in it"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    chosen = parser.parse_args()
    names = [name for name in CASES if not chosen.only or any(part in name for part in chosen.only)]
    if not names:
        parser.error(f"no case holds {' or '.join(map(repr, chosen.only))}; there are {', '.join(CASES)}")
    console = Console(width=132)
    if chosen.list:
        for name in names:
            console.print(f"{name}\n    {CASES[name].about}", highlight=False, soft_wrap=True)
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these cases run on one; `python -m benchmarks` has those of the CPU")
    if chosen.pack and chosen.pack.exists():
        with tarfile.open(chosen.pack) as archive:
            archive.extractall(results.FOLDER, filter="data")
    start = time.monotonic()
    where, versions, commit = machine.machine(), machine.versions(), machine.commit() or machine.tree()
    found = []
    for name in names:
        case = CASES[name]
        plan = Result(
            name, case.about, Outcome(()), SAMPLES, datetime.date.today().isoformat(), commit, where, versions
        )
        file = results.path(results.FOLDER, where, name)
        known = results.load(file)
        if known is not None and known.still_holds(plan):
            found.append(known)
            continue
        if time.monotonic() - start > chosen.seconds:
            console.print(
                f"{name}: not begun, {chosen.seconds:.0f} s are used up; the next run goes on here", highlight=False
            )
            continue
        console.print(f"{time.monotonic() - start:4.0f} s  {name}", highlight=False)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        try:
            outcome = case.measure()
        except Exception as error:
            # one case that does not run must not cost the others
            traceback.print_exc()
            outcome = Outcome((Row("attnfuse", "x", None, None, "wrong results", f"{type(error).__name__}: {error}"),))
        result = Result(name, case.about, outcome, SAMPLES, plan.date, commit, where, versions)
        for row in outcome.rows:
            console.print(
                f"        {'  '.join(results.cells(row))}  {row.note}", highlight=False, markup=False, soft_wrap=True
            )
        results.save(result, file)
        if chosen.pack:
            with tarfile.open(chosen.pack, "w:gz") as archive:
                archive.add(file.parent, arcname=file.parent.name)
        found.append(result)
    console.print(results.table(found))
    bad = ("wrong results", "fail")
    return int(any(row.verdict in bad for result in found for row in result.outcome.rows))


if __name__ == "__main__":
    sys.exit(main())
