"""Draw figures, with one colour for each neuron. Matplotlib is imported when one is drawn, and needs no display."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..neuron.parameters import QIFParameters
from ..neuron.phase import fixed_points, regions, trajectory
from ..support.files import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that stay apart for colour-blind readers and in grey (Okabe and Ito). LIF has the first, QIF the second."""
MARKERS = "osD^vP*"
_REGION_COLOURS = {"rebound": "#CC79A7", "rest": "#009E73", "fire": "#E69F00", "runaway": "#D55E00"}


def plot_differences(
    path: Path, rows: Sequence[str], differences: Mapping[str, Mapping[str, tuple[float, float, float]]], main: str
) -> None:
    """Draw differences from LIF's accuracy with their intervals, a row for each network and a colour for each arm.

    Args:
        path: The file to write.
        rows: Names of the networks, from top to bottom.
        differences: By arm and network, the difference and the ends of its interval; NaN draws no interval.
        main: The arm that has QIF's colour.
    """
    differences = {arm: found for arm, found in differences.items() if found}
    others = itertools.cycle(COLOURS[2:])
    with figure(path, (8, 1.8 + max(0.28, 0.16 * len(differences)) * len(rows)), dpi=110, grid=True) as drawn:
        axes = drawn.subplots()
        for index, (arm, found) in enumerate(differences.items()):
            places = [rows.index(name) + 0.14 * (index - (len(differences) - 1) / 2) for name in found]
            points = [100 * mean for mean, _, _ in found.values()]
            sides = [(mean - low, high - mean) for mean, low, high in found.values()]
            spread = [[100 * max(0.0, side) for side in each] for each in zip(*sides, strict=True)]  # max of a NaN is 0
            style = {"linestyle": "", "marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar(
                points, places, xerr=spread, color=COLOURS[1] if arm == main else next(others), label=arm, **style
            )
        axes.axvline(0, color=COLOURS[0], linewidth=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel("accuracy less LIF's (points)")
        if differences:
            legend_below(drawn, axes, 3)


def colours_of(labels: Iterable[str]) -> dict[str, str]:
    """Choose a colour for each label: LIF has its own in every figure, QIF its own, further labels those after them.

    Args:
        labels: Names such as ``"LIF"``, ``"QIF, unbiased"`` and ``"QIF, paper"``. The first that names a neuron has
            that neuron's colour.
    """
    neurons, others = {"lif": COLOURS[0], "qif": COLOURS[1]}, itertools.cycle(COLOURS[2:])
    named = {label: next((name for name in ("qif", "lif") if name in label.lower()), "") for label in labels}
    return {label: neurons.pop(name, "") or next(others) for label, name in named.items()}


def errorbars(axes: Any, values: Mapping[Any, Sequence[float]], **style: Any) -> None:
    """Draw mean and standard deviation of the values, such as those of several seeds, at each place that has some."""
    found = {place: some for place, some in values.items() if some}
    if found:
        means = [statistics.fmean(some) for some in found.values()]
        axes.errorbar(list(found), means, list(map(deviation, found.values())), **{"capsize": 3, "marker": "o"} | style)


def deviation(values: Sequence[float]) -> float:
    """Compute the standard deviation over seeds (n - 1), 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def integer_ticks(axis: Any) -> None:
    """Put ticks of an axis that counts, such as epochs or layers, at whole numbers only."""
    axis.get_major_locator().set_params(integer=True)


def legend_below(drawn: Any, axes: Any, columns: int = 4) -> None:
    """Put the legend of ``axes`` below the whole figure, off the data."""
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), frameon=False)


def plot_phase(
    path: Path,
    params: QIFParameters,
    starts: Sequence[float],
    steps: int = 12,
    current: float = 0.0,
) -> None:
    """Draw the cobweb plot of v -> f(v) + I with fixed points, threshold, regions and trajectories, to a PNG.

    Args:
        path: The file to write.
        params: The neuron; every number a float.
        starts: Membrane potentials at which trajectories start.
        steps: Steps of each trajectory. Default 12.
        current: The constant input I. Default 0.
    """
    points = fixed_points(params, current)
    theta = float(params.v_threshold)
    # Without fixed points: where the map comes closest to the diagonal.
    closest = (params.u1 + params.u2 + 1 / params.a) / 2
    passage = [] if points else [closest, params.map(closest) + current]
    shown = [*starts, theta, *passage, *(point.v for point in points)]
    span = max(shown) - min(shown) or 1.0
    lo, hi = min(shown) - 0.5 * span, max(shown) + 0.15 * span
    with figure(path, (8.4, 7.6)) as drawn:
        axes = drawn.subplots()
        grid = [lo + (hi - lo) * k / 400 for k in range(401)]
        images = [params.map(v) + current for v in grid]
        axes.plot(grid, images, color="black", linewidth=2, label=f"h = f(v) {current:+g}" if current else "h = f(v)")
        axes.plot(grid, grid, color="0.5", linewidth=1, label="h = v")
        axes.axvline(theta, color="0.2", linewidth=1.2, linestyle="--", label=f"threshold {theta:g}")
        axes.axhline(theta, color="0.2", linewidth=1.2, linestyle="--")
        for index, start in enumerate(starts):
            _draw_cobweb(axes, trajectory(params, start, steps, current), COLOURS[index % len(COLOURS)])
        for point in points:
            kind, fill = ("stable", "black") if point.stable else ("unstable", "white")
            axes.plot(
                point.v, point.v, "o", markersize=9, color="black", markerfacecolor=fill, zorder=6,
                label=f"{kind} fixed point {point.v:.4g}, slope {point.slope:.4g}",
            )  # fmt: skip
        named: set[str] = set()
        for region in regions(params, current):
            if max(region.lo, lo) < min(region.hi, hi):
                axes.axvspan(
                    max(region.lo, lo), min(region.hi, hi), color=_REGION_COLOURS[region.name], alpha=0.15, linewidth=0,
                    label=f"_{region.meaning}" if region.meaning in named else region.meaning,
                )  # fmt: skip
                named.add(region.meaning)
        axes.set(xlim=(lo, hi), ylim=(min(*images, *shown) - 0.1 * span, hi))
        axes.set(xlabel="membrane before the step, v", ylabel="membrane after the step, h")
        axes.set_title(f"Map of the QIF neuron, a = {params.a:g}, u1 = {params.u1:g}, u2 = {params.u2:g}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)


def plot_overhead(
    path: Path,
    rates: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    points: Sequence[tuple[float, float]],
    reported: tuple[float, float],
    title: str,
) -> None:
    """Draw the energy of QIF over LIF against the firing rate, to a PNG.

    Args:
        path: The file to write.
        rates: Spikes per connection.
        curves: Overhead at each rate, as a fraction, by label.
        points: Measured rates and overheads.
        reported: The range of overheads that the paper reports.
        title: Title of the figure.
    """
    with figure(path, (7.2, 5.4)) as drawn:
        axes = drawn.subplots()
        axes.axhspan(
            *(100 * value for value in reported), color="0.5", alpha=0.2, linewidth=0, label="arXiv 2510.05168 reports"
        )
        for index, (label, overheads) in enumerate(curves.items()):
            axes.plot(rates, [100 * value for value in overheads], color=COLOURS[index % len(COLOURS)], label=label)
        axes.plot(
            *zip(*((rate, 100 * overhead) for rate, overhead in points), strict=True), "o", markersize=5,
            color=COLOURS[-1], markerfacecolor="none", label="arithmetic, measured",
        )  # fmt: skip
        axes.set(title=title, xlabel="spikes per connection and time step", ylabel="energy of QIF over LIF (%)")
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        legend_below(drawn, axes, 2)


def require_matplotlib(*paths: Path) -> None:
    """Raise an error if figures cannot be drawn to ``paths``; call it before the work that they show.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: Matplotlib does not write the format of a path's suffix.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("drawing a figure needs matplotlib; install it with: pip install 'qif-plugins[run]'")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    for path in paths:
        if path.suffix[1:].lower() not in formats:
            raise ValueError(
                f"cannot draw to {path}; give it one of the suffixes {', '.join(f'.{f}' for f in formats)}"
            )


def plot_sample(path: Path, x: Any, title: str, rows: bool) -> None:
    """Draw a sample ``[T, C, H, W]`` as the network gets it; of images, at most ten steps that are evenly spaced.

    Args:
        path: The file to write.
        x: The sample, a CPU tensor.
        title: Title.
        rows: Whether a step is a row of bands: then time is drawn from left to right, a panel for each channel.
            Otherwise each step is an image, three channels in colour, two as red (channel 1) and blue (channel 0).
    """
    steps, channels = x.shape[:2]
    shown = [round(i * (steps - 1) / 9) for i in range(10)] if steps > 10 else list(range(steps))
    panels = channels if rows else len(shown)
    with figure(path, (7, 0.8 + 2.4 * panels) if rows else (max(4, 1.5 * panels), 2.6)) as drawn:
        all_axes = drawn.subplots(*((panels, 1) if rows else (1, panels)), squeeze=False).flat
        for i, axes in enumerate(all_axes):
            if rows:
                axes.imshow(
                    x[:, i].flatten(1).T.numpy(), origin="lower", aspect="auto", cmap="Greys", interpolation="nearest"
                )
                axes.set(xlabel="time step", ylabel="band" if channels == 1 else f"band, {('up', 'down')[i]}")
                continue
            image = x[shown[i]]
            image = (image - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
            if channels == 2:
                image = image[[1, 0, 0]] * image.new_tensor([1, 0, 1])[:, None, None]
            axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=f"step {shown[i]}" if steps > 1 else "")
        drawn.suptitle(title, fontsize="small")


@contextmanager
def figure(path: Path, size: tuple[float, float], dpi: int = 150, grid: bool = False) -> Iterator[Any]:
    """Provide an empty Matplotlib figure, and write it to ``path`` in the format of its suffix if the block succeeds.

    Needs no display and leaves ``matplotlib.pyplot`` alone. A PDF or SVG holds no date.

    Args:
        path: The file to write.
        size: Width and height in inches.
        dpi: Pixels an inch. Default 150.
        grid: Whether axes have a faint grid. Default False.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: Matplotlib does not write the format of the suffix.
    """
    require_matplotlib(path)
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(drawn)
    form = path.suffix[1:].lower()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(form)
    with rc_context({"axes.grid": grid, "grid.alpha": 0.3}):
        yield drawn
        with replacing(path) as beside:
            drawn.savefig(beside, format=form, metadata=undated)


def _draw_cobweb(axes: Any, path: Sequence[float], colour: str) -> None:
    """Draw a path from the diagonal vertically to the map and horizontally back; a square marks the start."""
    corners = [(path[0], path[0])]
    for v, h in itertools.pairwise(path):
        corners += [(v, h), (h, h)]
    axes.plot(*zip(*corners, strict=True), color=colour, linewidth=1.4, label=f"without reset, from v = {path[0]:.4g}")
    axes.plot(*corners[0], marker="s", markersize=6, color=colour, zorder=5)
