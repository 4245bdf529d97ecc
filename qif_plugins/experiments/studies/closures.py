"""Study 2: moments of the membrane as the closures predict them, and as measured in networks while they train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...diagnostics.spiking import LayerStatistics, measured, qif_layers
from ...neuron.moments import MomentClosureError, firing_rate, membrane_moments
from ...neuron.names import CLOSURES, ClosureName
from ...neuron.observe import Observation
from ...neuron.parameters import QIFParameters
from ...support.text import mean_pm, percent
from ..figures import COLOURS, figure, integer_ticks, legend_below
from ..records import Records, Result, Setting, Trial
from .page import Body, table
from .runner import Options
from .trial import LEARNING, data_of, outputs, perceptrons, train

TITLE = "Moment closures"
QUESTION = (
    "The windows are derived from mean μ and standard deviation σ of the membrane, which a closure predicts from those "
    "of the input: `reset`, this package's, and `free`, which leaves the reset out, as [J] (arXiv 2510.05168) does. "
    "How far are they, and the firing rate that follows, from what is measured, layer by layer, over training, under "
    "tdBN and under plain batch norm?"
)

QUANTITIES = ("μ", "σ", "rate")
NORMS = (("tdbn", 1.0), ("tdbn", 0.5), ("batch", 0.5), ("tdbn", 2.0), ("batch", 2.0))
"""Norm and threshold θ. tdBN brings the input to standard deviation θ, batch norm to 1; at θ = 1 they are the same."""


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a training for every norm, threshold and seed."""
    common = {"neuron": "qif", "layers": 3 if options.quick else 5, **perceptrons(options.quick), **LEARNING}
    return [
        {**common, "neuron_args": {"v_threshold": threshold}, "norm": norm, "seed": seed}
        for seed in options.seeds_of(3)
        for norm, threshold in NORMS
    ]


def run(setting: Setting) -> Result:
    """Train a network, and measure its membranes before it and after every epoch."""
    x = data_of(setting["data"]).test_x[:500]
    epochs: list[list[dict[str, Any]]] = []
    result = train(setting, observe=lambda model, epoch: epochs.append(measure(model, x, setting["steps"])))
    return {"accuracy": result["accuracy"], "epochs": epochs}


class _Statistics(LayerStatistics):
    """Statistics of one layer, with the correlation of its input between successive steps."""

    correlation = math.nan

    def add(self, seen: Observation) -> None:
        super().add(seen)
        pairs = torch.stack([seen.x_seq[:-1].flatten(), seen.x_seq[1:].flatten()])
        self.correlation = torch.corrcoef(pairs)[0, 1].item()


def measure(model: nn.Module, x: Tensor, steps: int) -> list[dict[str, Any]]:
    """Measure input, membrane and firing rate of every QIF layer, as training sees them.

    The model runs in training mode, normalized by these samples, and is restored afterwards.

    Returns:
        A row for each layer, in order: ``input_mean`` and ``input_std`` of g·x, ``input_correlation`` between
        successive steps, ``mean`` and ``std`` of the membrane before its reset, ``rate`` in spikes per neuron-step.
    """
    layers = qif_layers(model)
    statistics = {name: _Statistics() for name in layers}
    with measured(model, layers, statistics), torch.no_grad():
        model.train()
        outputs(model, x, steps)
    return [
        {
            "layer": name, "input_mean": seen.input.mean.item(), "input_std": seen.input.std.item(),
            "input_correlation": seen.correlation, "mean": seen.membrane.mean.item(), "std": seen.membrane.std.item(),
            "rate": seen.spikes / seen.input.n,
        }
        for name, seen in statistics.items()
    ]  # fmt: skip


def predict(
    threshold: float, input_mean: float, input_std: float, closure: ClosureName
) -> tuple[float, float, float] | None:
    """Predict μ, σ and rate by a closure; ``None`` where it does not converge."""
    params = QIFParameters(v_threshold=threshold)
    try:
        mean, std = membrane_moments(params, input_std, input_mean, closure)
    except MomentClosureError:
        return None
    return float(mean), float(std), float(firing_rate(params, mean, std))


class Points:
    """Predicted beside measured moments, a point for each layer, epoch, network and seed."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.points = [
            _point(trial.setting, epoch, depth, row)
            for trial in trials
            for epoch, rows in enumerate(trial.result["epochs"])
            for depth, row in enumerate(rows, 1)
        ]

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        return [point for point in self.points if all(point[name] == value for name, value in wanted.items())]

    def values(self, name: str) -> list[Any]:
        return sorted({point[name] for point in self.points})


def _point(setting: Setting, epoch: int, layer: int, row: dict[str, Any]) -> dict[str, Any]:
    threshold = setting["neuron_args"]["v_threshold"]
    return {
        "norm": setting["norm"], "threshold": threshold, "seed": setting["seed"], "epoch": epoch, "layer": layer,
        "input": (row["input_mean"], row["input_std"], row["input_correlation"]),
        "measured": (row["mean"], row["std"], row["rate"]),
        **{closure: predict(threshold, row["input_mean"], row["input_std"], closure) for closure in CLOSURES},
        "assumed": predict(threshold, 0.0, threshold, "reset"),
    }  # fmt: skip


def errors(points: Sequence[dict[str, Any]], source: str, quantity: int) -> list[float]:
    """List predicted less measured, μ and σ in units of the threshold, where there is a prediction."""
    return [
        (point[source][quantity] - point["measured"][quantity]) / _unit(point, quantity)
        for point in points
        if point[source] is not None
    ]


def _unit(point: dict[str, Any], quantity: int) -> float:
    return 1.0 if QUANTITIES[quantity] == "rate" else float(point["threshold"])


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the errors of the closures, with the moments of every layer of each network."""
    points = Points(trials)
    first, last = points.values("epoch")[0], points.values("epoch")[-1]
    _draw(points, picture)
    norms = [at for at in NORMS if points.where(norm=at[0], threshold=at[1])]
    sections = [
        _errors("", points, {}, (first, last)),
        "Root-mean-square errors over networks, layers and seeds, of μ and σ in units of the threshold θ. `reset` and "
        "`free` are given the measured mean and standard deviation of each layer's input; `assumed` is the reset "
        "closure given what an uncalibrated window assumes, mean 0 and standard deviation θ. The free closure counts "
        "where it converges; a dash: at no layer.",
    ]
    for norm, threshold in norms:
        some = {"norm": norm, "threshold": threshold}
        sections += [
            f"## {_name(norm, threshold)}",
            _errors("root-mean-square error", points, some, (first, last)),
            _layers(points, norm, threshold, last),
        ]
    setting = trials[0].setting
    method = (
        f"QIF with the paper's a, u1 and u2, perceptrons of {setting['layers']} layers, {setting['width']} neurons "
        f"each, on {setting['data']}, T = {setting['steps']}, {setting['epochs']} epochs of Adam, unbiased window. "
        "Measured on 500 test images before training and after every epoch, the network in training mode, so "
        "normalized as training normalizes it; moments over neurons, images and steps together. Input correlation is "
        "that between successive steps, which both closures take to be 0."
    )
    return Body(_finding(points), sections, method)


def _errors(title: str, points: Points, wanted: dict[str, Any], epochs: tuple[int, int]) -> str:
    """Tabulate the root-mean-square errors before and after training."""
    sources = (*CLOSURES, "assumed")
    rows = [
        [
            "before training" if epoch == 0 else f"after epoch {epoch}",
            *(
                _rms(errors(points.where(epoch=epoch, **wanted), source, quantity))
                for quantity, source in itertools.product(range(3), sources)
            ),
        ]
        for epoch in epochs
    ]
    return table([title, *(f"{q}, {source}" for q, source in itertools.product(QUANTITIES, sources))], rows)


def _finding(points: Points) -> str:
    both = [point for point in points.points if point["reset"] is not None and point["free"] is not None]
    settled = [point for point in points.points if point["reset"] is not None]
    missing = sum(point["free"] is None for point in points.points)
    correlation = fmean(point["input"][2] for point in points.points)
    return (
        f"Given the measured input of a layer at an epoch, the reset closure is nearer to the measurement than the "
        f"free one in {_shares(both, lambda reset, free: abs(reset) < abs(free))} of the cases where both converge; "
        f"the free closure does not converge in {missing} of {len(points.points)} cases. The inputs of successive "
        f"steps have a mean correlation of {correlation:.2f}, where the closures assume 0, and the reset closure is "
        f"above the measurement in {_shares(settled, lambda reset, free: reset > 0)} of the cases."
    )


def _shares(points: Sequence[dict[str, Any]], holds: Callable[[float, float], bool]) -> str:
    """Format the share of points where the errors of the two closures compare so, for each quantity."""
    found = []
    for k, q in enumerate(QUANTITIES):
        pairs = itertools.zip_longest(errors(points, "reset", k), errors(points, "free", k), fillvalue=math.nan)
        found.append(f"{percent(fmean([holds(*pair) for pair in pairs] or [math.nan]), '.0f')} ({q})")
    return f"{', '.join(found[:-1])} and {found[-1]}"


def _layers(points: Points, norm: str, threshold: float, last: int) -> str:
    """Tabulate the measured and predicted moments of every layer, before training and after the last epoch."""
    rows = []
    for epoch, layer in itertools.product((0, last), points.values("layer")):
        some = points.where(norm=norm, threshold=threshold, epoch=epoch, layer=layer)
        cells = [mean_pm([point["input"][k] for point in some], ".2f") for k in range(3)]
        for k in range(3):
            cells.append(mean_pm([point["measured"][k] for point in some], ".3f"))
            for source in CLOSURES:
                found = [point[source][k] for point in some if point[source] is not None]
                cells.append(f"{fmean(found):.3f}" if found else "–")
        rows += [[f"epoch {epoch}, layer {layer}", *cells]] if some else []
    predicted = [f"{q}, {source}" for q in QUANTITIES for source in ("measured", *CLOSURES)]
    return table(["", "input mean", "input standard deviation", "input correlation", *predicted], rows)


def _number(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value * value for value in values)) if values else math.inf


def _rms(values: Sequence[float]) -> str:
    return f"{_number(values):.3f}" if values else "–"


def _name(norm: str, threshold: float) -> str:
    return f"{'tdBN' if norm == 'tdbn' else 'batch norm'}, θ = {threshold:g}"


def _draw(points: Points, path: Path) -> None:
    """Draw measured against predicted above, and the error over training below."""
    with figure(path, (11, 7), dpi=110, grid=True) as drawn:
        panels = drawn.subplots(2, 3)
        epochs = points.values("epoch")
        styles = dict(zip((*CLOSURES, "assumed"), zip(COLOURS[2:], "o^s", strict=False), strict=True))
        for k, (q, unit) in enumerate(zip(QUANTITIES, (" / θ", " / θ", ""), strict=True)):
            above, below = panels[0, k], panels[1, k]
            measured = [point["measured"][k] / _unit(point, k) for point in points.points]
            above.plot([min(measured), max(measured)], [min(measured), max(measured)], color="0.5", linewidth=1)
            for source, (colour, marker) in styles.items():
                style = {"color": colour, "marker": marker, "label": source}
                if source != "assumed":
                    at = [point for point in points.points if point[source] is not None]
                    x, y = ([point[name][k] / _unit(point, k) for point in at] for name in (source, "measured"))
                    above.plot(x, y, linestyle="", markersize=3, alpha=0.6, **style)
                below.plot(epochs, [_number(errors(points.where(epoch=e), source, k)) for e in epochs], **style)
            above.set(xlabel=f"{q}{unit}, predicted from the measured input", ylabel=f"{q}{unit}, measured")
            below.set(xlabel="epoch", ylabel=f"root-mean-square error of {q}{unit}", ylim=(0, None))
            integer_ticks(below.xaxis)
        legend_below(drawn, panels[1, 0])
