"""Running means over the samples of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Means:
    """Running means by name, each over the samples that it was measured on."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.totals: dict[str, Any] = {}

    @classmethod
    def merged(cls, parts: Iterable[Mapping[str, Sequence[float]]]) -> Means:
        """Merge several running means, each as :meth:`plain` returns it."""
        means = cls()
        for part in parts:
            for name, (count, total) in part.items():
                means.counts[name] = means.counts.get(name, 0) + count
                means.totals[name] = means.totals.get(name, 0.0) + total
        return means

    def add(self, count: float, means: Mapping[str, Any]) -> None:
        """Add the means over ``count`` further samples, as numbers or as scalar tensors, which stay on their device."""
        for name, mean in means.items():
            self.counts[name] = self.counts.get(name, 0) + count
            self.totals[name] = self.totals.get(name, 0.0) + mean * count

    def plain(self) -> dict[str, list[float]]:
        """Return the count and the total by name."""
        return {name: [count, float(self.totals[name])] for name, count in self.counts.items()}

    def values(self) -> dict[str, float]:
        """Return the means by name."""
        return {name: total / count for name, (count, total) in self.plain().items()}
