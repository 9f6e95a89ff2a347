"""The coverage of the zoo: rows, totals, what counts as worse, and that a run goes on where the last one stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnfuse.remark import Remark, Report
from tests import zoo
from tests.numerics import Errors
from tests.zoo import cells as ways
from tests.zoo import coverage
from tests.zoo.cells import Cell, Graph, cells, compiled, sample

LLAMA = Cell("llama", "eager", "training", "bf16", True)


def row(cell: Cell, fused: int, **more: Any) -> coverage.Row:
    found = {
        "name": cell.name,
        "model": cell.model,
        "column": list(cell.column),
        "expected": 4,
        "codes": {"AF000": fused},
    }
    counts = {
        "fused": fused,
        "kept": 0,
        "declined": 0,
        "missed": 4 - fused,
        "failed": 0,
        "stock": 1,
        "stock_kernels": 0,
    }
    return found | counts | {"correct": True, "graphs": 1} | more


def test_totals() -> None:
    other = Cell("bert", *LLAMA.column[:3], masked=True)
    rows = [row(LLAMA, 4), row(other, 2, codes={"AF000": 2, "AF031": 1, "AF024": 1}), row(LLAMA, 9, correct=False)]
    (total,) = coverage.totals(rows).values()
    # the last has more than there are
    assert total == {
        "models": 3,
        "expected": 12,
        "taken": 10,
        "understood": 11,
        "right": 2,
        "stock": 3,
        "stock_kernels": 0,
    }
    text = coverage.table(rows)
    assert "| eager | training | bf16 | mask | 3 | 12 | 10 (83.3 %) | 11 (91.7 %) | 2 | 25.0 % |" in text


def test_what_stock_cannot_run_is_not_counted() -> None:
    failing = row(LLAMA, 0, correct=False, raised="KeyError", stock_error="KeyError")
    (total,) = coverage.totals([failing, row(LLAMA, 4)]).values()
    assert (total["models"], total["right"], total["expected"]) == (1, 1, 4)
    assert f"stock torch.compile fails as well: {LLAMA.name}." in coverage.table([failing])
    assert coverage.worse(failing, failing) == ""
    assert (
        coverage.worse(row(LLAMA, 0, correct=False, raised="KeyError", error="KeyError"), row(LLAMA, 4)) == "KeyError"
    )
    # what only attnfuse cannot run counts
    (total,) = coverage.totals([row(LLAMA, 0, correct=False, raised="KeyError")]).values()
    assert (total["models"], total["right"]) == (1, 0)


def test_layers_that_run_the_same_code_count_each() -> None:
    broken = row(LLAMA, 2, missed=0, graphs=7)
    assert coverage.totals([broken])[LLAMA.column]["taken"] == 4
    assert coverage.totals([broken | {"missed": 2}])[LLAMA.column]["taken"] == 2
    # something else may hide there
    for hidden in ({"failed": 1}, {"graphs": 1}, {"missed": 1}):
        assert coverage.totals([broken | hidden])[LLAMA.column]["taken"] == 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        torch._dynamo.graph_break()
        return (q @ k.mT).softmax(-1) @ v


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class Model(nn.Module):
    """Three alike layers, each of which breaks the graph, and an attention that runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.last = Last()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


@pytest.mark.parametrize("training", [False, True])
def test_runs_are_counted(training: bool) -> None:
    found, graphs = compiled(Model(), {"x": torch.ones(2, 4, 8)}, training, {}, "aot_eager")
    assert found["output 0"].shape == (2, 4, 8)
    assert sorted(graph.runs for graph in graphs if graph.report.fused) == [1, 3]
    one = row(LLAMA, 0) | coverage._remarks(graphs)
    assert (one["fused"], one["missed"], sum(one["codes"].values())) == (4, 0, 4)
    assert one["runs"] == [graph.runs for graph in graphs]
    assert coverage.totals([one])[LLAMA.column]["taken"] == 4


def test_remarks_on_a_graph_count_once() -> None:
    remarks = Remark.of("AF041", reason="it is so"), Remark.of("AF024")
    found = coverage._remarks([Graph([Report(remarks)], runs=3), Graph([Report(remarks)], runs=0)])
    assert found["codes"] == {"AF024": 3, "AF041": 2}
    assert found["missed"] == 3


def test_what_ran_once_counts_once() -> None:
    """Half of the attentions of a model in which graphs break, each of them run once: no others ran the same code."""
    broken = row(LLAMA, 2, missed=0, graphs=7, runs=[1] * 7)
    assert coverage.totals([broken])[LLAMA.column]["taken"] == 2


def test_worse_than_a_row_without_runs() -> None:
    before = row(LLAMA, 2, missed=0, graphs=7)
    assert coverage.worse(row(LLAMA, 4, runs=[2]), before) == ""
    assert "3 attentions fused or kept, 4 before" in coverage.worse(row(LLAMA, 3, runs=[1]), before)


def test_worse() -> None:
    before = row(LLAMA, 3)
    assert coverage.worse(row(LLAMA, 3), before) == ""
    assert coverage.worse(row(LLAMA, 4), before) == ""
    assert "2 attentions fused or kept, 3 before" in coverage.worse(row(LLAMA, 2), before)
    assert "4 before" in coverage.worse(row(LLAMA, 3), None)
    assert coverage.worse(row(LLAMA, 3, correct=False, error="off by one"), before) == "off by one"
    assert coverage.worse(row(LLAMA, 3, correct=False), row(LLAMA, 3, correct=False)) == ""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the cells that are run, without running them; rows go to a folder of their own."""
    names: list[str] = []

    def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[coverage.Row]:
        for cell in chosen:
            names.append(cell.name)
            yield row(cell, 4)

    monkeypatch.setattr(coverage, "run", run)
    monkeypatch.setattr(coverage, "ROWS", tmp_path / "coverage" / "rows.jsonl")
    return names


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["coverage", *arguments])
    return coverage.main()


def test_a_run_goes_on_where_the_last_one_stopped(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = [cell.name for cell in cells("llama")]
    assert command(monkeypatch, "llama") == 0
    assert ran == llama
    assert [json.loads(line)["name"] for line in coverage.ROWS.read_text().splitlines()] == llama
    lines = coverage.ROWS.read_text().splitlines(keepends=True)
    coverage.ROWS.write_text("".join(lines[:-2]))
    ran.clear()
    assert command(monkeypatch, "llama") == 0
    assert ran == llama[-2:]
    assert command(monkeypatch, "llama", "--again") == 0
    assert ran == llama[-2:] + llama
    assert set(coverage.read()) == set(llama)


def test_what_stock_does_may_be_taken_from_the_rows(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "llama") == 0
    before = coverage.read()

    def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[coverage.Row]:
        for cell in chosen:
            assert not with_stock
            found = row(cell, 4, seconds=1.0)
            yield {key: value for key, value in found.items() if not key.startswith("stock")}

    monkeypatch.setattr(coverage, "run", run)
    assert command(monkeypatch, "llama", "--again", "--same-stock") == 0
    after = coverage.read()
    assert {name: {**one, "seconds": 1.0} for name, one in before.items()} == after


def test_stock_runs_where_it_failed_before(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    coverage.ROWS.parent.mkdir()
    first, *rest = cells("llama")
    stored = [row(cell, 4) for cell in rest]
    failed = {key: value for key, value in row(first, 4, stock_error="no").items() if not key.startswith("stock_k")}
    del failed["stock"]
    coverage.ROWS.write_text("".join(json.dumps(one) + "\n" for one in (failed, *stored)))
    asked: dict[str, bool] = {}

    def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[coverage.Row]:
        for cell in chosen:
            asked[cell.name] = with_stock
            yield row(cell, 4)

    monkeypatch.setattr(coverage, "run", run)
    assert command(monkeypatch, "llama", "--again", "--same-stock") == 0
    assert asked == {first.name: True} | {cell.name: False for cell in rest}
    assert "stock_error" not in coverage.read()[first.name]


def test_cells_judged_by_several_weights_are_named() -> None:
    rows = [row(LLAMA, 4, draws=15), row(Cell("bert", *LLAMA.column[:3], masked=True), 4, draws=1)]
    assert "1 of the models that are right are so by the medians" in coverage.table(rows)
    assert "medians" not in coverage.table(rows[1:])


class TestDraws:
    """A cell with a result beyond the limit is judged with other weights too."""

    WITHIN, BEYOND = Errors(0.1, 0.1, 1.0, 0.01), Errors(0.9, 0.1, 1.0, 0.01)

    def compare(self, monkeypatch: pytest.MonkeyPatch, *found: Errors, key: str = "weight", cell: Cell = LLAMA) -> int:
        """The number of draws."""
        given = iter(found)
        drawn: list[nn.Module] = []

        def measured(cell: Cell, model: nn.Module, downstream: str) -> tuple[dict[str, Errors], list[Graph]]:
            drawn.append(model)
            return {"output 0": self.WITHIN, key: next(given)}, [Graph(runs=len(drawn))]

        monkeypatch.setattr(ways, "_measured", measured)
        graphs, draws = ways.compared(cell)
        assert [graph.runs for graph in graphs] == [1]
        assert draws == len(drawn)
        weights = [next(model.parameters()) for model in drawn]
        assert all(torch.allclose(x, weights[0], rtol=0.13) for x in weights)
        assert len({float(x.detach().double().sum()) for x in weights}) == len(drawn)
        return len(drawn)

    def test_one_is_enough_within_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.compare(monkeypatch, self.WITHIN) == 1

    def test_one_beyond_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.compare(monkeypatch, self.BEYOND, *[self.WITHIN] * (ways.DRAWS - 1)) == ways.DRAWS

    @pytest.mark.parametrize(
        ("key", "cell"), [("output 1", LLAMA), ("weight", Cell("llama", "eager", "training", "f32", True))]
    )
    def test_only_gradients_in_bfloat16(self, key: str, cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(AssertionError, match=f"{cell.name} {key}: error 9.000e-01 is above the limit"):
            self.compare(monkeypatch, self.BEYOND, *[self.WITHIN] * (ways.DRAWS - 1), key=key, cell=cell)

    def test_wrong_in_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        some = ways.DRAWS // 2 + 1
        with pytest.raises(AssertionError, match=f"{LLAMA.name} weight: of {ways.DRAWS} draws"):
            self.compare(monkeypatch, *[self.BEYOND] * some, *[self.WITHIN] * (ways.DRAWS - some))


def test_a_target_that_is_missed_fails(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[coverage.Row]:
        return (row(cell, 3) for cell in chosen)

    monkeypatch.setattr(coverage, "run", run)
    assert command(monkeypatch, "llama") == 1


def test_more_than_there_is_fails(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would hide a miss in another graph of the model."""

    def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[coverage.Row]:
        return (row(cell, 5 if number == 0 else 4) for number, cell in enumerate(chosen))

    monkeypatch.setattr(coverage, "run", run)
    assert command(monkeypatch, "llama") == 1
    assert f"{cells('llama')[0].name}: more fused or kept than there are attentions" in capsys.readouterr().out


def test_the_sample_is_compared_with_the_rows(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = sample()
    coverage.ROWS.parent.mkdir()
    before = "".join(json.dumps(row(cell, 4)) + "\n" for cell in chosen)
    coverage.ROWS.write_text(before)
    assert command(monkeypatch, "--sample") == 0
    assert ran == [cell.name for cell in chosen]
    assert f"{len(chosen)} cells run, 0 worse" in capsys.readouterr().out

    def run(chosen: Sequence[Cell], jobs: int, *, with_stock: bool) -> Iterator[coverage.Row]:
        return (row(cell, 3 if number == 7 else 4) for number, cell in enumerate(chosen))

    monkeypatch.setattr(coverage, "run", run)
    assert command(monkeypatch, "--sample") == 1
    assert f"{chosen[7].name}: 3 attentions fused or kept, 4 before" in capsys.readouterr().out
    assert coverage.ROWS.read_text() == before


def test_the_rows_on_file_are_of_the_zoo() -> None:
    known = {cell.name: cell for name in zoo.ENTRIES for cell in cells(name)}
    for name, found in coverage.read().items():
        assert found["expected"] == known[name].entry.attentions, name
        assert tuple(found["column"]) == known[name].column
