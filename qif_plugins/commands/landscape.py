"""``qif landscape``: loss and gradient of trained networks along directions in parameter space."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..experiments.figures import require_matplotlib
from ..experiments.landscape import (
    EVENTS,
    Jump,
    Line,
    Plane,
    along,
    between,
    fragmentation,
    gradient_direction,
    locate_jumps,
    over_plane,
    plane_angle,
    random_direction,
)
from ..experiments.landscape.figures import Column, draw_lines, draw_planes
from ..experiments.landscape.lines import Direction
from ..experiments.landscape.subjects import Subject, load_subject
from ..support.files import occupied, write_json
from ..support.text import mean_pm, text_table

_BEYOND = 0.25
"""Reach of a line beyond the two networks that it joins, in units of their distance."""


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, and write the files."""
    _check(arguments)
    require_matplotlib()
    with occupied(arguments.out):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    subjects = [load_subject(source, arguments.data_folder) for source in arguments.networks]
    other = load_subject(arguments.to, arguments.data_folder).network.state_dict() if arguments.to else None
    if other is not None:
        for subject in subjects:
            between(subject.network, other)
    results: list[_Result] = []
    for number, subject in enumerate(subjects, 1):
        drawn = subject.title not in {result.subject.title for result in results}
        results.append(_measure(subject, other, drawn, arguments))
        print(f"[{number}/{len(subjects)}] {subject.source}: measured", flush=True)
    print()
    print(_table(results))
    unit = "(× norm of the weights)"
    x_label = (
        "from the first network (0) to the second (1)" if arguments.to else f"{arguments.direction} direction {unit}"
    )
    figures = [arguments.out / f"lines.{arguments.format}"]
    draw_lines(
        figures[0], [result.column(result.zoom) for result in results if result.zoom], x_label, arguments.smallest
    )
    if arguments.grid:
        figures.append(arguments.out / f"plane.{arguments.format}")
        planes = [(result.subject.title, result.plane) for result in results if result.plane]
        draw_planes(figures[1], planes, (x_label, f"random direction {unit}"), arguments.smallest)
    options = {name: getattr(arguments, name) for name in _RECORDED}
    content = {"options": options, "networks": [result.as_json() for result in results]}
    write_json(arguments.out / "landscape.json", content)
    print(f"\nwrote {', '.join(map(str, [arguments.out / 'landscape.json', *figures]))}")
    return 0


_RECORDED = (
    "direction", "to", "directions", "samples", "single", "points", "grid", "radius", "smallest", "jumps", "seed",
)  # fmt: skip


@dataclass
class _Measured:
    """A line, its numbers, and the jumps found on it."""

    name: str
    samples: list[int]
    single: bool
    line: Line
    numbers: dict[str, float]
    jumps: list[Jump]


@dataclass
class _Result:
    """The measurements of one network; ``zoom`` and ``plane`` for the first network of a title, which is drawn."""

    subject: Subject
    lines: list[_Measured] = field(default_factory=list)
    zoom: Line | None = None
    plane: Plane | None = None

    def column(self, zoom: Line) -> Column:
        """Return its part of the figure: the batch and the first sample along the first direction."""
        sample = next((measured for measured in self.lines if measured.single), None)
        jumps = sample.jumps if sample else []
        return Column(self.subject.title, self.lines[0].line, zoom, sample.line if sample else None, jumps)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        content: dict[str, Any] = {"source": self.subject.source, "title": self.subject.title, **self.subject.about}
        content["lines"] = [
            {
                "direction": measured.name,
                "samples": measured.samples,
                "numbers": measured.numbers,
                "jumps": [asdict(jump) for jump in measured.jumps],
                "positions": [float(measured.line.positions[0]), float(measured.line.positions[-1])],
                "loss": measured.line.loss.tolist(),
                "slope": measured.line.slope.tolist(),
            }
            for measured in self.lines
        ]
        if self.plane is not None:
            ends = [[float(line[0]), float(line[-1])] for line in self.plane.positions]
            content["plane"] = {"angle": plane_angle(self.plane), "positions": ends, "loss": self.plane.loss.tolist()}
        return content


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("points", 13), ("grid", 9)):
        value = getattr(arguments, name)
        if (value or name == "points") and (value % 4 != 1 or value < least):
            raise ValueError(f"--{name} must be 4n + 1 and at least {least}, got {value}")
    if arguments.directions > 1 and (arguments.to or arguments.direction == "gradient"):
        raise ValueError("--directions is for random ones; there is one gradient, and one line to a network")


def _measure(subject: Subject, other: dict[str, Tensor] | None, drawn: bool, arguments: argparse.Namespace) -> _Result:
    batch = list(range(min(arguments.samples, subject.samples)))
    singles = [[sample] for sample in range(min(arguments.single, subject.samples))]
    radius: float = arguments.radius
    low, high = (-radius, radius) if other is None else (-_BEYOND, 1 + _BEYOND)
    positions = torch.linspace(low, high, arguments.points, dtype=torch.float64, device="cpu")
    result = _Result(subject)

    def loss_of(samples: list[int]) -> Callable[[], Tensor]:
        return lambda: subject.loss(samples)

    for number in range(arguments.directions):
        seed = arguments.seed + number
        direction: Direction
        if other is not None:
            name, direction = f"to {arguments.to}", between(subject.network, other)
        elif arguments.direction == "gradient":
            name, direction = "gradient", gradient_direction(subject.network, loss_of(batch))
        else:
            name, direction = f"random, seed {seed}", random_direction(subject.network, seed)
        for samples in (batch, *singles):
            line = along(subject.network, loss_of(samples), direction, positions)
            jumps = locate_jumps(
                subject.network, loss_of(samples), direction, line, smallest=arguments.smallest, most=arguments.jumps
            )
            numbers = fragmentation(line, arguments.smallest)
            result.lines.append(_Measured(name, samples, samples is not batch, line, numbers, jumps))
        if drawn and number == 0:
            result.zoom = _zoom(subject, loss_of(batch), direction, result.lines[0].line)
            if arguments.grid:
                across = torch.linspace(-radius, radius, arguments.grid, dtype=torch.float64, device="cpu")
                grid = (torch.linspace(low, high, arguments.grid, dtype=torch.float64, device="cpu"), across)
                second = random_direction(subject.network, arguments.seed + arguments.directions)
                result.plane = over_plane(subject.network, loss_of(batch), (direction, second), grid)
    return result


def _zoom(subject: Subject, loss: Callable[[], Tensor], direction: Direction, line: Line) -> Line:
    """Measure the loss again, on 41 positions over the five grid steps around the largest unexplained change."""
    place = min(max(int(line.unexplained().abs().argmax()), 2), len(line.positions) - 4)
    ends = float(line.positions[place - 2]), float(line.positions[place + 3])
    return along(subject.network, loss, direction, torch.linspace(*ends, 41, dtype=torch.float64, device="cpu"))


def _table(results: Sequence[_Result]) -> str:
    header = (
        "network", "lines", "accuracy", "largest", "of coarse", "steps with jump", "jumps' share", "variation",
        "angle", "opposite", "jumps a line", "where",
    )  # fmt: skip
    rows = []
    for title in dict.fromkeys(result.subject.title for result in results):
        group = [result for result in results if result.subject.title == title]
        accuracies = [result.subject.about["accuracy"] for result in group if "accuracy" in result.subject.about]
        for name, single in (("batch", False), ("sample", True)):
            measured = [line for result in group for line in result.lines if line.single == single]
            if not measured:
                continue
            numbers = {key: [line.numbers[key] for line in measured] for key in measured[0].numbers}
            found = [jump.event for line in measured for jump in line.jumps]
            where = ", ".join(f"{event}: {count}" for event, count in Counter(sorted(found, key=EVENTS.index)).items())
            rows.append(
                (
                    title,
                    f"{len(measured)} {name}",
                    mean_pm(accuracies, ".1f", 100, " %"),
                    f"{max(numbers['unexplained']):.2g}",
                    mean_pm(numbers["unexplained_ratio"], ".2f"),
                    mean_pm(numbers["steps_with_jump"], ".1f", 100, " %"),
                    mean_pm(numbers["jump_share"], ".1f", 100, " %"),
                    mean_pm(numbers["variation_ratio"], ".2f"),
                    mean_pm(numbers["angle"], ".3g", unit="°"),
                    mean_pm(numbers["opposite"], ".1f", 100, " %"),
                    f"{len(found) / len(measured):.1f}",
                    where,
                )
            )
    return text_table(header, rows, left=2)
