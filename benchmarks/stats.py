"""Medians of paired samples with bootstrap intervals, and what they say about a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Verdict = Literal["pass", "fail", "not shown", "wrong results", ""]

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A median and the ends of its interval."""

    value: float
    lower: float
    upper: float


def median(samples: Sequence[float]) -> Estimate:
    """The median with its 95 % bootstrap interval (percentiles of resampled medians); the same samples give the same interval.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a median needs at least one sample")
    values = torch.tensor(samples, dtype=torch.float64)
    draws = torch.randint(len(samples), (RESAMPLES, len(samples)), generator=torch.Generator().manual_seed(0))
    medians = values[draws].quantile(0.5, dim=1)
    tail = (1 - CONFIDENCE) / 2
    lower, upper = (float(medians.quantile(part)) for part in (tail, 1 - tail))
    return Estimate(float(values.quantile(0.5)), lower, upper)


def speed_up(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """theirs/ours over pairs of times: above 1 where ours is faster."""
    return median([other / own for own, other in zip(ours, theirs, strict=True)])


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """ours - theirs over pairs."""
    return median([own - other for own, other in zip(ours, theirs, strict=True)])


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power of sizes that fits values best, by least squares of their logarithms."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def share(part: Sequence[float], whole: Sequence[float]) -> Estimate:
    """part/whole over pairs, in percent."""
    return median([100 * some / all_ for some, all_ in zip(part, whole, strict=True)])


@dataclass(frozen=True)
class Target:
    """A bound that a figure has to keep: at least or at most `bound`."""

    sense: Literal["at least", "at most"]
    bound: float

    def verdict(self, estimate: Estimate) -> Verdict:
        """pass where the whole interval keeps the bound, fail where none of it does, else not shown."""
        sign = 1 if self.sense == "at least" else -1
        ends = sorted((sign * estimate.lower, sign * estimate.upper))
        if ends[0] >= sign * self.bound:
            return "pass"
        return "fail" if ends[1] < sign * self.bound else "not shown"
