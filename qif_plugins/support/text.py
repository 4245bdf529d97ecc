"""Format means, shares, values, errors and tables as plain text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def percent(share: float, form: str = ".1f") -> str:
    """Format a share of 1 in percent; a dash for NaN, a share that is not known."""
    return "–" if math.isnan(share) else f"{100 * share:{form}} %"


def plus_minus(mean: float, std: float, form: str = ".3g", unit: str = "") -> str:
    """Format a mean and a standard deviation."""
    return f"{mean:{form}} ± {std:{form}}{unit}"


def mean_pm(values: Sequence[float], form: str = ".1f", scale: float = 1.0, unit: str = "") -> str:
    """Format the mean of ``scale`` times the values and their standard deviation (n - 1); a dash without values."""
    if not values:
        return "–"
    mean = scale * statistics.fmean(values)
    return (
        f"{mean:{form}}{unit}" if len(values) == 1 else plus_minus(mean, scale * statistics.stdev(values), form, unit)
    )


def shown(value: Any) -> str:
    """Return the ``repr`` of a value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def one_line(error: BaseException, most: int | None = None) -> str:
    """Return an error's message on one line, cut after ``most`` characters; its type where it has no message."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table with columns as wide as they need to be, the first ``left`` flush left and the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
