"""Format numbers and plain-text tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["percent", "plus_minus", "text_table"]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need to be, the first ``left`` flush left and the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plus_minus(mean: float, std: float) -> str:
    """A mean and a deviation in three digits."""
    return f"{mean:.3g} ± {std:.3g}"


def percent(share: float) -> str:
    """Format a share as a percentage with one digit after the point; ``"none"`` for NaN."""
    return "none" if math.isnan(share) else f"{100 * share:.1f} %"
