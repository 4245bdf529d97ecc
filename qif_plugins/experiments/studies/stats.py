"""Means, standard deviations and intervals over seeds."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["LEVEL", "Interval", "deviation", "interval", "paired", "sign", "welch"]

LEVEL = 0.95
"""What share of all intervals covers the true difference."""
Interval = tuple[float, float, float]
"""Difference of two means, and the ends of its interval; NaN where too few values give none."""


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds, n - 1; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def interval(found: Interval, digits: int = 2) -> str:
    """A difference of accuracies in points with its interval, as text."""
    mean, low, high = (100 * value for value in found)
    if math.isnan(low):
        return f"{mean:+.{digits}f} points (too few seeds for an interval)"
    return f"{mean:+.{digits}f} points (95 % interval {low:+.{digits}f} to {high:+.{digits}f})"


def sign(found: Interval) -> int:
    """1 or -1 where the interval lies above or below 0, 0 where it says neither."""
    _, low, high = found
    return int(low > 0) - int(high < 0)


def paired(first: Sequence[float], second: Sequence[float], comparisons: int = 1) -> Interval:
    """Mean of ``second - first``, seed by seed, with the interval of Student's t.

    Args:
        first: Values of some seeds.
        second: Values of the same seeds.
        comparisons: How many such intervals hold together with 95 % (Bonferroni). Default 1.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values need the same seeds, got {len(first)} and {len(second)}")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    quantile = _quantile(len(differences) - 1, 1 - (1 - LEVEL) / comparisons)
    half = quantile * deviation(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def welch(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Difference of the means, ``second`` less ``first``, with Welch's interval at 95 %."""
    mean = statistics.fmean(second) - statistics.fmean(first)
    if len(first) < 2 or len(second) < 2:
        return mean, math.nan, math.nan
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if not sum(parts):
        return mean, mean, mean
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    half = _quantile(freedom) * math.sqrt(sum(parts))
    return mean, mean - half, mean + half


def _quantile(freedom: float, level: float = LEVEL) -> float:
    try:
        stats: Any = importlib.import_module("scipy.stats")
    except ImportError as error:
        raise ImportError("intervals over seeds need SciPy: pip install 'qif-plugins[study]'") from error
    return float(stats.t.ppf(0.5 + level / 2, freedom))
