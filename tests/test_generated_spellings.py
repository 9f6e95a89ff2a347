"""Attentions spelled in generated ways: each has to be understood, and right in value, strides and gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from attnfuse.backend import listening
from attnfuse.remark import Remark, Report
from tests.harness import check
from tests.spelling_axes import AXES, Case, P, all_pairs, pairs_of, pairwise, sample

CHUNKS, CHUNK = 40, 50


@dataclass(frozen=True)
class Known:
    """Cases with these choices may be missed, with this code, or without a remark where there is no softmax operator."""

    choices: Mapping[str, str]
    code: str
    reason: str


KNOWN: tuple[Known, ...] = (
    Known(
        {"softmax": "exp-minus-logsumexp", "fill": "min"},
        "AF024",
        "finfo.min has no digits for the logarithm of a number of keys: a row without a key has other weights than softmax's",
    ),
    Known(
        {"softmax": "exp-minus-logsumexp", "application": "add-one-minus-mask"},
        "AF024",
        "a mask that is computed in bfloat16 is data that may hold finfo.min",
    ),
    *(
        Known(
            {"softmax": "normalised-after-product", "matmul": matmul},
            "",
            "the product that is divided has its dimensions in another order than the sum",
        )
        for matmul in ("keys-by-queries", "einsum-heads-third")
    ),
)


ROUNDING = (
    # Eager takes the maximum off before its softmax. Autograd gives the sum of the gradients of a row's scores, which is rounding and
    # nothing else, back to the greatest score, so that eager is more exact here than any softmax.
    "heads-third documents einsum-k-q s*learned where exp-times-reciprocal einsum-out dropout-not-training -1e4",
    "sequence-first-flat matmul-permute s*learned shifted-softmax sequence-first-out repeat-interleave dropout-training upcast-scores",
    "heads-third lengths bmm q*c add-log exp-over-sum contiguous-view broadcast-groups dropout-not-training alibi -inf longer",
    # the same, where MKL takes AVX-512's vectors: 1.09 times the limit
    "fused lengths einsum-k-q q/c masked_fill exp-times-reciprocal contiguous-view repeat-kv nn.Dropout-eval upcast-masked-scores "
    "-inf equal",
    # In a row all of whose keys are excluded by -1e4, scores have three decimals left, in eager as in a kernel. What is lost is
    # the same size, but not the same number; with few such rows eager's may be the smaller one by more than the half.
    "causal-and-left-padding einsum-k-q q*c add-one-minus-mask exp-minus-logsumexp contiguous-view one-kv-head dropout-0 "
    "upcast-operands alibi -1e4 equal",
    "heads-third causal-and-left-padding matmul-permute add-one-minus-mask exp-times-reciprocal sequence-first-out "
    "repeat-interleave dropout-not-training upcast-operands dense-bias -1e4 equal",
    "fused causal-and-left-padding baddbmm s/c add-one-minus-mask F.softmax dropout-training upcast-operands alibi -1e4",
    "heads-third causal-and-left-padding q*c add-zeros-filled normalised-after-product sequence-first-out dropout-not-training "
    "alibi -1e4",
)
"""Cases of the sweep with a result above the limit, by less than its double."""


def known_of(case: Case) -> Known | None:
    return next((known for known in KNOWN if known.choices.items() <= case.choices.items()), None)


def judge(case: Case) -> None:
    """Raises AssertionError if a case is wrong, or not understood."""
    times = 2.0 if case.name in ROUNDING else 1.0
    report = trained(case, times) if case.training else check(case.function(), *case.inputs(), times=times)
    known = known_of(case)
    if known is not None and not report.fused:
        assert [remark.code for remark in report.remarks] == ([known.code] if known.code else []), str(report)
        return
    assert len(report.remarks) == 1, f"{len(report.remarks)} attentions"
    (remark,) = report.remarks
    assert remark.kind in ("fused", "kept", "declined"), described(remark)
    if case.training:
        assert remark.kind == "fused", described(remark)
        assert f"dropout {P}; " in str(remark.facts["spec"]), described(remark)


def described(remark: Remark) -> str:
    return "\n".join([f"{remark.kind} {remark.text}", *(f"{label}: {text}" for label, text in remark.details)])


def trained(case: Case, times: float) -> Report:
    """Compiles a case with dropout, whose values no other run has; without dropout it has to be right."""
    without = replace(case, dropout="dropout-not-training")
    check(without.function(), *without.inputs(), times=times)
    expected = without.function()(*without.inputs())
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(case.function(), backend="attnfuse", options={"downstream": "aot_eager"})
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in case.inputs()]
    with listening(reports.append):
        out = compiled(*inputs)
        out.sum().backward()
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert torch.equal(out.isfinite(), expected.isfinite())
    if bool(expected.isfinite().all()):
        assert all(bool(x.grad.isfinite().all()) for x in inputs if x.grad is not None)
    return Report(()).merge(*reports)


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: case.name)
def test_every_pair_of_choices(case: Case) -> None:
    try:
        judge(case)
    except AssertionError as error:
        raise AssertionError(f"{error}\n\n{case.source()}") from None


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_many_spellings(chunk: int) -> None:
    failures = []
    for case in sample(CHUNKS * CHUNK, seed=0)[chunk * CHUNK : (chunk + 1) * CHUNK]:
        try:
            judge(case)
        except Exception as error:
            failures.append(f"{case.name}\n{type(error).__name__}: {error}\n\n{case.source()}")
    assert not failures, f"{len(failures)} of {CHUNK} spellings:\n\n" + "\n\n".join(failures)


def test_cases_are_valid_and_repeatable() -> None:
    cases = [*pairwise(), *sample(200, seed=1)]
    assert all(case.valid() for case in cases)
    assert len({case.name for case in cases}) == len(set(cases))
    assert sample(200, seed=1) == sample(200, seed=1) != sample(200, seed=2)


def test_pairs_are_covered() -> None:
    covered = {pair for case in pairwise() for pair in pairs_of(case.choices)}
    assert covered == set(all_pairs())
    assert {choice for pair in covered for choice in pair} == {(a, x) for a, choices in AXES.items() for x in choices}


def test_known_misses_are_of_the_axes() -> None:
    for known in KNOWN:
        assert all(choice in AXES[axis] for axis, choice in known.choices.items()), known
