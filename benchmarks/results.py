"""Results as JSON, one file a case in a folder a machine, and as a table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from benchmarks.cases import Outcome, Row
from benchmarks.stats import Estimate, Target

FOLDER = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """A case's outcome and where it comes from.

    Args:
        pairs: asked for; compile times with empty caches have five, or three beside those of the passes, and a figure that is
            counted, not timed, has one sample.
        commit: with "+" where the tree differed from it.
        starts: how often the processes were started anew; 0 where it was not recorded.
    """

    case: str
    about: str
    outcome: Outcome
    pairs: int
    date: str
    commit: str
    machine: Mapping[str, str | int]
    versions: Mapping[str, str]
    starts: int = 0

    def to_json(self) -> str:
        data = {"schema": SCHEMA, **asdict(self)}
        rows = [{**asdict(row), "estimate": row.estimate and row.estimate._asdict()} for row in self.outcome.rows]
        data["outcome"] = {"rows": rows, "samples": self.outcome.samples}
        text = json.dumps(data, indent=1, allow_nan=False)
        # One line for a list of numbers.
        return re.sub(r"\[[-\d.e,\s]*\]", lambda found: " ".join(found[0].split()), text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError where the text is no result of this schema."""
        data: dict[str, Any] = json.loads(text)
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"not a result of schema {SCHEMA}")
        rows = []
        for row in data["outcome"]["rows"]:
            estimate, target = row.pop("estimate"), row.pop("target")
            rows.append(
                Row(
                    **row,
                    estimate=Estimate(**estimate) if estimate else None,
                    target=Target(**target) if target else None,
                )
            )
        return cls(**{**data, "outcome": Outcome(tuple(rows), data["outcome"]["samples"])})

    def still_holds(self, other: Self) -> bool:
        """Whether measuring what `other` describes would measure the same again."""
        same = ("case", "about", "pairs", "starts", "commit", "machine", "versions")
        return bool(self.commit) and "+" not in self.commit and all(getattr(self, x) == getattr(other, x) for x in same)


def path(folder: Path, machine: Mapping[str, str | int], case: str) -> Path:
    words = f"{machine.get('gpu', machine['cpu'])} {machine['cores']} cores".lower()
    return folder / re.sub(r"[^a-z0-9]+", "-", words).strip("-") / f"{case}.json"


def save(result: Result, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    draft.write_text(result.to_json(), encoding="utf-8")
    os.replace(draft, file)


def load(file: Path) -> Result | None:
    """None where there is no such result, or one of another schema."""
    try:
        return Result.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


COLOURS = {"pass": "green", "fail": "red", "wrong results": "bold red", "not shown": "yellow", "": ""}


def table(results: Iterable[Result]) -> Table:
    shown = Table("case", "figure", "median", "95 % interval", "target", "")
    for column in (2, 3, 4):
        shown.columns[column].justify = "right"
    for result in results:
        for number, row in enumerate(result.outcome.rows):
            shown.add_row("" if number else result.case, *cells(row), style=COLOURS[row.verdict])
    return shown


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """figure, median, interval, target and verdict as texts."""
    unit = "x" if row.unit == "x" else f" {row.unit}"
    value, interval = "-", "-"
    if row.estimate is not None:
        value = f"{row.estimate.value:.2f}{unit}"
        if row.estimate.lower != row.estimate.upper:
            interval = f"{row.estimate.lower:.2f} to {row.estimate.upper:.2f}"
    target = f"{row.target.sense} {row.target.bound:g}{unit}" if row.target else "-"
    return row.figure, value, interval, target, row.verdict
