"""Report of :func:`~qif_plugins.swap`."""

from __future__ import annotations

from dataclasses import dataclass

from ..support.text import text_table


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
        rows = [
            (
                row.name or "(the model)", row.was, row.now if row.changed else "left alone",
                "" if row.rate is None else "{:.2g} -> {:.2g}".format(*row.rate), why,
            )
            for row, why in zip(self.rows, self._reasons(), strict=True)
        ]  # fmt: skip
        return text_table(("module", "was", "is now", "spikes/step", "why"), rows, left=5)

    def _reasons(self) -> list[str]:
        """Shorten a reason that repeats an earlier one but for the names of the norms."""
        first: dict[str, str] = {}
        reasons = []
        for row in self.rows:
            place, _, rest = row.why.partition("; ")
            earlier = first.setdefault(rest.replace(f"moments of {', '.join(row.norms)}", "moments"), row.name)
            known = earlier != row.name and len(rest) > len(f"the rest as for {earlier}")
            reasons.append(f"{place}; the rest as for {earlier}" if known else row.why)
        return reasons
