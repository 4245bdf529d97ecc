"""Confidence intervals of differences over seeds, by SciPy."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

LEVEL = 0.95
"""Share of all intervals that cover the true difference."""
Key = TypeVar("Key")
Interval = tuple[float, float, float]
"""Difference of two means, and the ends of its interval; these are NaN where there are too few values."""


class Difference(NamedTuple):
    """A difference of accuracies, paired by seed, and the p-value of Student's paired t-test."""

    interval: Interval
    p: float


def difference(first: Mapping[int, Any], second: Mapping[int, Any]) -> Difference | None:
    """Compare the accuracies of two sets of results by seed, ``second`` less ``first``; ``None`` without common seeds.

    Raises:
        ImportError: SciPy is not installed.
    """
    before, after = in_common(first, second)
    return Difference(paired(before, after), p_value(before, after)) if before else None


def adjusted(differences: Mapping[Key, Difference]) -> dict[Key, float]:
    """Adjust the p-values of differences for their number, see :func:`holm`."""
    return dict(zip(differences, holm([found.p for found in differences.values()]), strict=True))


def p_text(value: float | None) -> str:
    """Format a p-value; a dash where it is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.2g}"


def interval(found: Interval) -> str:
    """Format a difference of accuracies with its interval, in points."""
    known = "too few seeds for an interval" if math.isnan(found[1]) else f"95 % interval {ends(found)}"
    return f"{100 * found[0]:+.2f} points ({known})"


def ends(found: Interval, digits: int = 2) -> str:
    """Format the ends of an interval of accuracies, in points; a dash where it is not known."""
    _, low, high = found
    return "–" if math.isnan(low) else f"{100 * low:+.{digits}f} to {100 * high:+.{digits}f}"


def points(found: Difference | None) -> str:
    """Format a difference with the ends of its interval in brackets, in points; a dash where there is none."""
    return "–" if found is None else f"{100 * found.interval[0]:+.1f} ({ends(found.interval, 1)})"


def sign(found: Interval) -> int:
    """Return 1 or -1 where the interval lies above or below 0, and 0 where it includes it or is not known."""
    _, low, high = found
    return int(low > 0) - int(high < 0)


def paired(first: Sequence[float], second: Sequence[float], comparisons: int = 1) -> Interval:
    """Mean of ``second - first``, seed by seed, with the interval of Student's t.

    Args:
        first: Values of some seeds.
        second: Values of the same seeds.
        comparisons: Number of such intervals that are to hold together with 95 % confidence (Bonferroni). Default 1.

    Raises:
        ValueError: The two have different lengths.
        ImportError: SciPy is not installed.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values need the same seeds, got {len(first)} and {len(second)}")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    level = 1 - (1 - LEVEL) / comparisons
    return _interval(statistics.fmean(differences), [differences], level, "ttest_1samp", differences, 0)


def in_common(first: Mapping[int, Any], second: Mapping[int, Any]) -> tuple[list[float], list[float]]:
    """Return the accuracies of two sets of results by seed, for the seeds that both have."""
    seeds = sorted(first.keys() & second.keys())
    return [first[seed]["accuracy"] for seed in seeds], [second[seed]["accuracy"] for seed in seeds]


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of Student's paired t-test; NaN for a single pair, 0 or 1 where the differences do not vary.

    Raises:
        ImportError: SciPy is not installed.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    if len(differences) < 2:
        return math.nan
    if len(set(differences)) == 1:
        return float(differences[0] == 0)
    return float(_scipy().ttest_1samp(differences, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979, *Scandinavian Journal of Statistics* 6); NaN stays, uncounted."""
    adjusted = list(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    least = 0.0
    for rank, (p, index) in enumerate(known):
        least = adjusted[index] = max(least, min(1.0, p * (len(known) - rank)))
    return adjusted


def welch(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Difference of the means, ``second`` less ``first``, with Welch's interval.

    Raises:
        ImportError: SciPy is not installed.
    """
    mean = statistics.fmean(second) - statistics.fmean(first)
    return _interval(mean, [first, second], LEVEL, "ttest_ind", second, first, equal_var=False)


def _interval(
    mean: float, samples: Sequence[Sequence[float]], level: float, test: str, *values: Any, **options: Any
) -> Interval:
    """Compute the interval by the SciPy test of this name; both ends are the mean where no sample varies."""
    if min(map(len, samples)) < 2:
        return mean, math.nan, math.nan
    if all(len(set(sample)) == 1 for sample in samples):
        return mean, mean, mean
    found = getattr(_scipy(), test)(*values, **options).confidence_interval(level)
    return mean, float(found.low), float(found.high)


def _scipy() -> Any:
    try:
        return importlib.import_module("scipy.stats")
    except ImportError as error:
        raise ImportError("intervals over seeds need SciPy: pip install 'qif-plugins[study]'") from error
