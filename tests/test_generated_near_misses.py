"""Attentions with one fact changed, generated: whatever becomes of one, it computes what it did before."""

from __future__ import annotations

import pytest

from tests.harness import check, verdict
from tests.near_miss_axes import CHANGES, EMPTY, NearMiss, near_misses, one_of_each

QUICK = {*one_of_each(), *(case for case in near_misses() if case.base in EMPTY)}


def judge(case: NearMiss) -> None:
    """Raises AssertionError if a near miss is computed wrongly, or taken for the attention that it is not."""
    change = CHANGES[case.change]
    report = check(case.function(), *case.inputs(), gradients=change.gradients)
    assert report.remarks, "no remark about the attention beside it"
    *found, beside = report.remarks
    assert verdict(beside) == "tanh(s)"
    if change.miss:
        assert [verdict(remark) for remark in found if remark.kind in ("fused", "kept")] == []


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case in QUICK else pytest.mark.slow) for case in near_misses()],
)
def test_near_miss(case: NearMiss) -> None:
    try:
        judge(case)
    except AssertionError as error:
        raise AssertionError(f"{error}\n\n{case.source()}") from None
