"""Report of :func:`~qif_plugins.swap`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..support.text import text_table

LONGEST = 60
"""Characters of a reason, the first clause aside, that is written into the table and not below it."""
_RATES = re.compile(r"expected firing rate \S+ instead of \S+ a step, so it")
_SILENT = re.compile(r"\(\S+ and \S+ spikes a step, ")
"""The rates of one row, which its column has."""
_CLAUSE = re.compile(r"; (?!\w+[=(])")
"""The end of a clause; what to write instead, such as ``window='keep'``, stays beside it."""


@dataclass(frozen=True)
class Row:
    """Result for one module.

    Attributes:
        name: Its name in the model; empty for the model itself.
        was: Its class before.
        now: Its class now; the same if it was left alone.
        why: The reason, and what else changed.
        changed: Whether it was changed.
        rate: Expected spikes per neuron and step, before and after; ``None`` if they are unknown.
        norms: Names of the normalizations that feed it.
    """

    name: str
    was: str
    now: str
    why: str
    changed: bool
    rate: tuple[float, float] | None = None
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class SwapReport:
    """Modules that were changed, modules that were left, and the reasons. ``print`` shows it as a table.

    Attributes:
        rows: The model's neurons, in order, and with ``norm="tdbn"`` its norms.
    """

    rows: tuple[Row, ...]

    @property
    def changed(self) -> tuple[Row, ...]:
        """The modules that were changed."""
        return tuple(row for row in self.rows if row.changed)

    @property
    def left(self) -> tuple[Row, ...]:
        """The modules that were left alone."""
        return tuple(row for row in self.rows if not row.changed)

    def __str__(self) -> str:
        notes: dict[str, int] = {}
        rows = [
            (
                row.name or "(the model)", row.was, row.now if row.changed else "left alone",
                "" if row.rate is None else "{:.2g} -> {:.2g}".format(*row.rate), _short(row, notes),
            )
            for row in self.rows
        ]  # fmt: skip
        table = text_table(("module", "was", "is now", "spikes/step", "why"), rows, left=5)
        explained = [f"[{number}] " + _CLAUSE.sub("\n    ", note) for note, number in notes.items()]
        return "\n".join([table, *([""] if explained else []), *explained])


def _short(row: Row, notes: dict[str, int]) -> str:
    """Shorten a reason to its first clause and the number of a note with the others, which rows share.

    Args:
        row: The row.
        notes: Numbers of the notes, by text; receives a new one.
    """
    place, _, rest = row.why.partition("; ")
    if len(rest) <= LONGEST:
        return row.why
    note = _RATES.sub("it", _SILENT.sub("(", rest)).replace(f"moments of {', '.join(row.norms)}", "norm's moments")
    number = notes.setdefault(note, len(notes) + 1)
    return f"{place} [{number}{': WARNING' if 'WARNING' in note else ''}]"
