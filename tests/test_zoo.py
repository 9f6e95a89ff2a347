"""The models of `tests/zoo`: all of their attentions found, and what comes out right.

Here run the models of transformers whose attention is one of a kind, two cells of each, and every cell of them with
`pytest -m slow tests/test_zoo.py`. The whole zoo is run by `make coverage`, and one cell of each model by `make coverage ARGS=--sample`.
"""

from __future__ import annotations

import pytest

from attnfuse.remark import Report
from tests import zoo
from tests.zoo.cells import Cell, cells, compared, found_in, pairs, sample

OF_A_KIND = (
    *("gemma2", "t5gemma", "gpt_oss", "gpt_bigcode", "falcon_mqa", "falcon_alibi", "t5", "bloom", "mpt", "whisper"),
    *("bart", "vit", "deepseek_v3", "diffllama", "gpt_neo", "granite_swa", "modernbert", "llama4", "xglm"),
    *("openai_gpt", "wav2vec2", "clip", "swin"),
)


def some(number: int, name: str) -> list[Cell]:
    """Two of a model's cells, other ones for each model."""
    every = cells(name)
    return [every[(5 * number) % len(every)], every[(5 * number + len(every) // 2 + 1) % len(every)]]


SOME = [cell for number, name in enumerate(OF_A_KIND) for cell in some(number, name)]
OTHERS = [cell for name in OF_A_KIND for cell in cells(name) if cell not in SOME]


def check(cell: Cell) -> None:
    graphs = compared(cell).graphs
    report = Report(()).merge(*(graph.report for graph in graphs))
    taken = sum(graph.runs * (len(graph.report.fused) + len(graph.report.kept)) for graph in graphs)
    assert taken == cell.entry.attentions, str(report)
    if cell.mode == "dropout":
        dropping = Report(()).merge(*(graph.report for graph in found_in(cell)))
        assert [r.score for r in dropping.remarks] == [r.score for r in report.remarks]


@pytest.mark.parametrize("cell", SOME, ids=lambda cell: cell.name)
def test_of_a_kind(cell: Cell) -> None:
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", OTHERS, ids=lambda cell: cell.name)
def test_every_combination(cell: Cell) -> None:
    check(cell)


def test_the_sample_holds_every_pair() -> None:
    """Of implementation, mode, type and mask; and every model."""
    every = {pair for name in zoo.ENTRIES for pair in pairs(cells(name))}
    assert set(pairs(sample())) == every
    assert [cell.model for cell in sample()] == list(zoo.ENTRIES)
