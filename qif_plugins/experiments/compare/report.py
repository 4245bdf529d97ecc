"""Results of a comparison as a table, a JSON file and a figure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from ...support import files
from ...support.text import text_table
from ..figures import MARKERS, colours_of, deviation, errorbars, figure, integer_ticks, legend_below
from .training import Training

GOAL = 0.9
"""Test accuracy; the first epoch that reaches it is reported."""


@dataclass(frozen=True)
class Summary:
    """Summary of one neuron in one host over all seeds.

    Attributes:
        host: Name of the host.
        neuron: ``"LIF"`` or ``"QIF"``.
        window: The window, or the surrogate of the host's LIF neuron.
        accuracy: Mean test accuracy after the last epoch.
        accuracy_deviation: Its standard deviation over seeds (n - 1); 0 for one seed.
        seeds: Number of seeds.
        epochs_to_goal: Mean of the first epochs at which :data:`GOAL` was reached, over the seeds that reached it.
        seeds_at_goal: Number of seeds that reached it.
        spikes: Mean spikes per neuron-step on the test images.
        step_ms: Median over seeds of the time of a training step in milliseconds.
    """

    host: str
    neuron: str
    window: str
    accuracy: float
    accuracy_deviation: float
    seeds: int
    epochs_to_goal: float | None
    seeds_at_goal: int
    spikes: float
    step_ms: float


def summarise(trainings: Iterable[Training]) -> list[Summary]:
    """Summarise the trainings of each host and neuron, in the order of their first appearance."""
    return [_summary(group) for group in _groups(trainings)]


def print_table(summaries: Sequence[Summary]) -> None:
    """Print the table of the comparison."""
    seeds = summaries[0].seeds
    header = (
        "host", "neuron", "window", "test accuracy", f"epochs to {GOAL:.0%}", "spikes per neuron-step",
        "ms per training step",
    )  # fmt: skip
    rows = [
        (
            row.host,
            row.neuron,
            f"({row.window})" if row.neuron == "LIF" else row.window,
            f"{100 * row.accuracy:.2f} %" + (f" ± {100 * row.accuracy_deviation:.2f}" if seeds > 1 else ""),
            _epochs(row),
            f"{row.spikes:.3f}",
            f"{row.step_ms:.1f}",
        )
        for row in summaries
    ]
    print(text_table(header, rows, left=3))
    print("(LIF: its host's default surrogate instead of a window)")


def write_json(path: Path, header: dict[str, Any], trainings: Sequence[Training]) -> None:
    """Write ``header``, the table's rows and every training with its curves; a loss that is not finite as null."""
    content = {
        **header,
        "summary": [asdict(row) for row in summarise(trainings)],
        "trainings": [asdict(training) for training in trainings],
    }
    files.write_json(path, files.finite(content))


def write_figure(path: Path, title: str, trainings: Sequence[Training]) -> None:
    """Draw the test accuracy by epoch, mean and standard deviation over seeds, with one panel for each host."""
    groups = {
        (group[0].host, "LIF" if group[0].neuron == "LIF" else f"QIF, {group[0].window}"): group
        for group in _groups(trainings)
    }
    hosts, labels = (list(dict.fromkeys(key[place] for key in groups)) for place in (0, 1))
    styles = {
        label: {"color": colour, "marker": marker, "markersize": 4, "label": label}
        for (label, colour), marker in zip(colours_of(labels).items(), itertools.cycle(MARKERS), strict=False)
    }
    with figure(path, (1.2 + 4.4 * len(hosts), 4.6), grid=True) as drawn:
        panels = dict(zip(hosts, drawn.subplots(1, len(hosts), sharey=True, squeeze=False)[0], strict=True))
        for (host, label), group in groups.items():
            by_epoch = zip(*([100 * epoch.accuracy for epoch in training.epochs] for training in group), strict=True)
            errorbars(panels[host], dict(enumerate(by_epoch, 1)), **styles[label])
        for host, axes in panels.items():
            axes.set(title=host, xlabel="epoch")
            integer_ticks(axes.xaxis)
        panels[hosts[0]].set_ylabel("test accuracy (%)")
        legend_below(drawn, panels[hosts[-1]])
        drawn.suptitle(title)


def _groups(trainings: Iterable[Training]) -> list[list[Training]]:
    groups: dict[tuple[str, str, str], list[Training]] = {}
    for training in trainings:
        groups.setdefault((training.host, training.neuron, training.window), []).append(training)
    return list(groups.values())


def _summary(group: Sequence[Training]) -> Summary:
    accuracies = [training.epochs[-1].accuracy for training in group]
    reached = [
        next(index for index, epoch in enumerate(training.epochs, 1) if epoch.accuracy >= GOAL)
        for training in group
        if any(epoch.accuracy >= GOAL for epoch in training.epochs)
    ]
    return Summary(
        host=group[0].host, neuron=group[0].neuron, window=group[0].window, accuracy=mean(accuracies),
        accuracy_deviation=deviation(accuracies), seeds=len(group), epochs_to_goal=mean(reached) if reached else None,
        seeds_at_goal=len(reached), spikes=mean(training.epochs[-1].spikes for training in group),
        step_ms=median(training.step_ms for training in group),
    )  # fmt: skip


def _epochs(row: Summary) -> str:
    if row.epochs_to_goal is None:
        return "not reached"
    partly = "" if row.seeds_at_goal == row.seeds else f" ({row.seeds_at_goal} of {row.seeds} seeds)"
    return f"{row.epochs_to_goal:.1f}{partly}"
