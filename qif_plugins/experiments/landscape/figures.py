"""Draw landscapes, as PNG, PDF or SVG by the file's suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..figures import COLOURS, colours_of, figure
from .jumps import EVENTS, Jump
from .lines import Line, Plane
from .numbers import candidates

_MARKERS = dict(zip(EVENTS, "os^x", strict=True))


@dataclass(frozen=True)
class Column:
    """The part of one network in :func:`draw_lines`.

    Attributes:
        title: Title of the column, which begins with the neuron's name.
        line: The loss of a batch.
        zoom: The same about its largest unexplained change, on a finer grid.
        sample: The loss of one sample; ``None`` if there is none.
        jumps: The jumps of ``sample``.
    """

    title: str
    line: Line
    zoom: Line
    sample: Line | None
    jumps: Sequence[Jump]


def draw_lines(path: Path, columns: Sequence[Column], x_label: str, smallest: float) -> None:
    """Draw a column for each network: loss of the batch with a zoom, its slope beside differences, loss of one sample.

    The zoom draws changes of the loss above ``smallest`` as jumps.
    """
    rows = 3 if any(column.sample for column in columns) else 2
    with figure(path, (0.6 + 3.2 * len(columns), 0.5 + 2.5 * rows)) as drawn:
        axes = drawn.subplots(rows, len(columns), squeeze=False)
        for place, column in enumerate(columns):
            colour = colours_of([column.title])[column.title]
            _draw_loss(axes[0][place], column, smallest, colour)
            _draw_slope(axes[1][place], column.line, colour)
            if column.sample is not None:
                _draw_sample(axes[2][place], column.sample, column.jumps, colour)
            axes[0][place].set_title(column.title)
        labels = ("loss of the batch (nats)", "slope of the batch's loss", "loss of one sample (nats)")
        for row, label in zip(axes, labels, strict=False):
            row[0].set_ylabel(label)
        drawn.supxlabel(x_label, fontsize="medium")  # once, since it is wider than a column


def draw_planes(path: Path, planes: Sequence[tuple[str, Plane]], labels: tuple[str, str], smallest: float) -> None:
    """Draw the loss over planes as contours, a column for each network, with a dot where the grid may have a jump.

    Jumps below ``smallest`` are not marked.
    """
    with figure(path, (0.6 + 3.2 * len(planes), 2.8)) as drawn:
        axes = drawn.subplots(1, len(planes), squeeze=False)[0]
        for axis, (title, plane) in zip(axes, planes, strict=True):
            x, y = plane.positions
            filled = axis.contourf(x, y, plane.loss.t(), levels=24, cmap="viridis")
            drawn.colorbar(filled, ax=axis, shrink=0.9, label="loss (nats)")
            axis.contour(x, y, plane.loss.t(), levels=12, colors="black", linewidths=0.3)
            for along in (0, 1):
                middles = (plane.positions[along][1:] + plane.positions[along][:-1]) / 2
                for other, line in zip(plane.positions[1 - along].tolist(), plane.lines(along), strict=True):
                    jumping = middles[candidates(line, smallest)]
                    fixed = torch.full_like(jumping, other)
                    pair = (jumping, fixed) if along == 0 else (fixed, jumping)
                    axis.plot(*pair, ".", color=COLOURS[3], markersize=1.5, zorder=5)
            axis.set_title(title)
        drawn.supxlabel(labels[0], fontsize="medium")
        axes[0].set_ylabel(labels[1].replace(" (", "\n("))


def _draw_loss(axes: Any, column: Column, smallest: float, colour: str) -> None:
    line, zoom = column.line, column.zoom
    axes.plot(line.positions, line.loss, color=colour, linewidth=1)
    low, high = float(line.loss.min()), float(line.loss.max())
    # Room for the inset over the curve.
    axes.set_ylim(low - 0.05 * (high - low), high + 1.1 * (high - low) + 1e-12)
    inset = axes.inset_axes((0.3, 0.56, 0.66, 0.4))
    for place in candidates(zoom, smallest).nonzero()[:, 0].tolist():
        inset.plot(zoom.positions[place : place + 2], zoom.loss[place : place + 2], ":", color="0.5", linewidth=0.8)
    inset.plot(zoom.positions, zoom.loss, ".", color=colour, markersize=2)
    inset.tick_params(labelsize=6)
    inset.locator_params(nbins=3)
    inset.ticklabel_format(useOffset=True)
    inset.xaxis.get_offset_text().set_fontsize(6)
    inset.yaxis.get_offset_text().set_fontsize(6)
    axes.indicate_inset_zoom(inset, edgecolor="0.3")


def _draw_slope(axes: Any, line: Line, colour: str) -> None:
    difference = (line.loss[2:] - line.loss[:-2]) / (line.positions[2:] - line.positions[:-2])
    axes.plot(line.positions[1:-1], difference, color="0.6", linewidth=0.7, label="central difference")
    axes.plot(line.positions, line.slope, color=colour, linewidth=1, label="gradient")
    # The difference at a jump is its height over the step, beside which everything else would look flat.
    ends = torch.tensor([0.02, 0.98], dtype=torch.float64, device="cpu")
    least, most = torch.quantile(torch.cat([difference, line.slope]), ends).tolist()
    low, high = min(least, float(line.slope.min())), max(most, float(line.slope.max()))
    margin = 0.2 * (high - low) + 1e-12
    axes.set_ylim(low - margin, high + margin)
    _legend_above(axes)


def _draw_sample(axes: Any, line: Line, jumps: Sequence[Jump], colour: str) -> None:
    axes.plot(line.positions, line.loss, color=colour, linewidth=1)
    for event, mark in zip(EVENTS, COLOURS[2:], strict=False):
        places = [jump.position for jump in jumps if jump.event == event]
        if places:
            nearest = [int((line.positions - place).abs().argmin()) for place in places]
            label = f"{event if event != EVENTS[-1] else 'no spike changes'}: {len(places)}"
            axes.plot(places, line.loss[nearest], _MARKERS[event], color=mark, markersize=4, label=label)
    if jumps:
        _legend_above(axes)


def _legend_above(axes: Any) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=7, frameon=False)
