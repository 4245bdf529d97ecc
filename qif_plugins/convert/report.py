"""Report of :func:`~qif_plugins.swap`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..support.text import text_table

LONGEST = 60
"""Characters of the reasons after the first that are written into the table and not below it."""


class Terms(NamedTuple):
    """Names of the choices, as the user of ``swap`` or of ``qif run`` knows them.

    Attributes:
        example: The input that the model is followed with.
        choice: Template for a choice, of its ``name`` and ``value``.
        command: Template for the call or command with a ``choice``.
        passes_arguments: Whether the user can pass arguments of the QIF neurons.
    """

    example: str
    choice: str
    command: str
    passes_arguments: bool

    def choose(self, name: str, value: str) -> str:
        """Write the choice alone."""
        return self.choice.format(name=name, value=value)

    def call(self, name: str, value: str) -> str:
        """Write the call or command with the choice."""
        return self.command.format(choice=self.choose(name, value))

    def measures(self, what: str) -> str:
        """Write that an example would measure ``what``; nothing where the user cannot pass one."""
        return f"; {self.example}=... measures {what}" if self.passes_arguments else ""


SWAP = Terms("example_input", "{name}='{value}'", "swap(model, {choice})", passes_arguments=True)
RUN = Terms("the first input", "--{name} {value}", "qif run {choice}", passes_arguments=False)


@dataclass(frozen=True)
class Reason:
    """A clause of a reason with what is special to one neuron, such as its rate.

    Attributes:
        text: The whole clause.
        shared: The clause without what the table's columns have, so that several rows can share a note.
    """

    text: str
    shared: str

    def __str__(self) -> str:
        return self.text


def shared(reason: str | Reason) -> str:
    """Return the wording that rows can share."""
    return reason.shared if isinstance(reason, Reason) else reason


@dataclass(frozen=True)
class Row:
    """Result for one module.

    Attributes:
        name: Its name in the model; empty for the model itself.
        was: Its class before.
        now: Its class now; the same if it was left alone.
        reasons: The reason, and what else changed, clause by clause.
        changed: Whether it was changed.
        rate: Expected spikes per neuron and step, before and after; ``None`` if they are unknown.
    """

    name: str
    was: str
    now: str
    reasons: tuple[str | Reason, ...]
    changed: bool
    rate: tuple[float, float] | None = None

    @property
    def why(self) -> str:
        """All reasons in one sentence."""
        return "; ".join(map(str, self.reasons))


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
        notes: dict[tuple[str, ...], int] = {}
        rows = [
            (
                row.name or "(the model)", row.was, row.now if row.changed else "left alone",
                "" if row.rate is None else "{:.2g} -> {:.2g}".format(*row.rate), _short(row, notes),
            )
            for row in self.rows
        ]  # fmt: skip
        table = text_table(("module", "was", "is now", "spikes/step", "why"), rows, left=5)
        explained = [f"[{number}] " + "\n    ".join(note) for note, number in notes.items()]
        return "\n".join([table, *([""] if explained else []), *explained])


def _short(row: Row, notes: dict[tuple[str, ...], int]) -> str:
    """Shorten the reasons to the first and the number of a note with the others, which rows share.

    Args:
        row: The row.
        notes: Numbers of the notes, by their clauses; receives a new one.
    """
    first, *others = row.reasons
    if len("; ".join(map(str, others))) <= LONGEST:
        return row.why
    note = tuple(map(shared, others))
    number = notes.setdefault(note, len(notes) + 1)
    return f"{first} [{number}{': WARNING' if any('WARNING' in clause for clause in note) else ''}]"
