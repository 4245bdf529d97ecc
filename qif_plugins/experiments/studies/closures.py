"""Study 2: what the moment closures predict of a membrane, and what is measured in networks while they train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...diagnostics.observing import LayerStatistics, measured, qif_layers
from ...neuron.moments import CLOSURES, MomentClosureError, firing_rate, membrane_moments
from ...neuron.observe import Observation
from ...neuron.parameters import QIFParameters
from ...support.text import mean_pm
from ..figures import COLOURS, figure
from ..records import Records, Result, Setting, Trial
from .page import Body, table
from .runner import Options
from .trial import data_of, outputs, train

__all__ = ["QUESTION", "TITLE", "plan", "report", "run"]

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
    """Every norm and threshold, every seed."""
    size = (
        {"data": "digits", "layers": 3, "width": 32, "epochs": 1}
        if options.quick
        else {"data": "mnist5k", "layers": 5, "width": 128, "epochs": 6}
    )
    return [
        {
            "neuron": "qif", "neuron_args": {"v_threshold": threshold}, "norm": norm, "seed": seed, **size, "steps": 4,
            "batch_size": 64, "optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0, "detach_reset": False,
        }
        for seed in range(options.seeds or (1 if options.quick else 3))
        for norm, threshold in NORMS
    ]  # fmt: skip


def run(setting: Setting) -> Result:
    """One training, its membranes measured before it and after every epoch."""
    x = data_of(setting["data"]).test_x[:500]
    epochs: list[list[dict[str, Any]]] = []
    result = train(setting, observe=lambda model, epoch: epochs.append(measure(model, x, setting["steps"])))
    return {"accuracy": result["accuracy"], "epochs": epochs}


class _Statistics(LayerStatistics):
    """The same with the correlation of the input between successive steps."""

    correlation = math.nan

    def add(self, seen: Observation) -> None:
        super().add(seen)
        pairs = torch.stack([seen.x_seq[:-1].flatten(), seen.x_seq[1:].flatten()])
        self.correlation = torch.corrcoef(pairs)[0, 1].item()


def measure(model: nn.Module, x: Tensor, steps: int) -> list[dict[str, Any]]:
    """Measure input, membrane and firing rate of every QIF layer, as training sees them.

    The model runs in training mode, normalized by these samples, and is left as it was.

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


def predict(threshold: float, input_mean: float, input_std: float, closure: str) -> tuple[float, float, float] | None:
    """μ, σ and rate by a closure; ``None`` where it does not converge."""
    params = QIFParameters(v_threshold=threshold)
    try:
        mean, std = membrane_moments(params, input_std, input_mean, closure)
    except MomentClosureError:
        return None
    return float(mean), float(std), float(firing_rate(params, mean, std))


class Points:
    """Predicted beside measured, one point a layer, epoch, network and seed."""

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
    """Predicted less measured, μ and σ in units of the threshold, where there is a prediction."""
    found = []
    for point in points:
        if point[source] is not None:
            unit = 1.0 if QUANTITIES[quantity] == "rate" else point["threshold"]
            found.append((point[source][quantity] - point["measured"][quantity]) / unit)
    return found


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Root-mean-square errors of the closures, and a table a network of what each layer does."""
    points = Points(trials)
    first, last = points.values("epoch")[0], points.values("epoch")[-1]
    _draw(points, picture)
    sources = (*CLOSURES, "assumed")
    norms = [at for at in NORMS if points.where(norm=at[0], threshold=at[1])]
    rows = [
        [
            f"{_name(norm, threshold)}, {'before training' if epoch == first else f'epoch {epoch}'}",
            *(
                _rms(errors(points.where(norm=norm, threshold=threshold, epoch=epoch), source, quantity))
                for quantity, source in itertools.product(range(3), sources)
            ),
        ]
        for norm, threshold in norms
        for epoch in (first, last)
    ]
    header = ["root mean square error", *(f"{q}, {source}" for q, source in itertools.product(QUANTITIES, sources))]
    sections = [
        "Errors over layers and seeds, of μ and σ in units of the threshold θ. `reset` and `free` are given the "
        "measured mean and standard deviation of each layer's input; `assumed` is the reset closure given what an "
        "uncalibrated window assumes, mean 0 and standard deviation θ. A dash: the closure does not converge at "
        "any layer.",
        table(header, rows),
        *itertools.chain.from_iterable(
            (f"## {_name(norm, threshold)}", _layers(points, norm, threshold, last)) for norm, threshold in norms
        ),
    ]
    setting = trials[0].setting
    method = (
        f"QIF with the paper's a, u1 and u2, perceptrons of {setting['layers']} layers, {setting['width']} neurons "
        f"each, on {setting['data']}, T = {setting['steps']}, {setting['epochs']} epochs of Adam, unbiased window. "
        "Measured on 500 test images before training and after every epoch, the network in training mode, so "
        "normalized as training normalizes it; moments over neurons, images and steps together. Input correlation is "
        "that between successive steps, which both closures take to be 0."
    )
    return Body(_finding(points, first, last), sections, points.values("seed"), method)


def _finding(points: Points, first: int, last: int) -> str:
    sentences = []
    for epoch, when in ((first, "before training"), (last, f"after epoch {last}")):
        some = points.where(epoch=epoch)
        parts = [
            f"{q} {_rms(errors(some, 'reset', k))} (reset), {_rms(errors(some, 'free', k))} (free, where it "
            f"converges), {_rms(errors(some, 'assumed', k))} (assumed input)"
            for k, q in enumerate(QUANTITIES)
        ]
        sentences.append(f"Root-mean-square error {when}, over all layers and networks: {'; '.join(parts)}.")
    both = [point for point in points.points if point["reset"] is not None and point["free"] is not None]
    if both:
        shares = ", ".join(f"of {q} at {_share(both, k, _nearer)}" for k, q in enumerate(QUANTITIES))
        sentences.append(
            f"Given the measured input, the reset closure is nearer to the measurement than the free one {shares} of "
            f"the {len(both)} points where both converge (a layer of a network at an epoch)."
        )
    for closure in CLOSURES:
        missing = [point for point in points.points if point[closure] is None]
        if missing:
            where = ", ".join(sorted({_name(point["norm"], point["threshold"]) for point in missing}))
            sentences.append(
                f"The {closure} closure does not converge at {len(missing)} of {len(points.points)} points ({where})."
            )
    settled = [point for point in points.points if point["reset"] is not None]
    correlation = fmean(point["input"][2] for point in points.points)
    above = ", ".join(f"of {q} at {_share(settled, k, _above)}" for k, q in enumerate(QUANTITIES))
    sentences.append(
        f"The input of one step and the next are correlated by {correlation:.2f} on average, where closures take 0. "
        f"The reset closure is above the measurement {above} of its points."
    )
    return " ".join(sentences)


def _nearer(point: dict[str, Any], quantity: int) -> bool:
    return abs(errors([point], "reset", quantity)[0]) < abs(errors([point], "free", quantity)[0])


def _above(point: dict[str, Any], quantity: int) -> bool:
    return errors([point], "reset", quantity)[0] > 0


def _share(points: Sequence[dict[str, Any]], quantity: int, holds: Callable[[dict[str, Any], int], bool]) -> str:
    return f"{100 * fmean(holds(point, quantity) for point in points):.0f} %"


def _layers(points: Points, norm: str, threshold: float, last: int) -> str:
    """Measured and predicted of every layer, before training and after the last epoch."""
    rows = []
    for epoch, layer in itertools.product((0, last), points.values("layer")):
        some = points.where(norm=norm, threshold=threshold, epoch=epoch, layer=layer)
        if some:
            rows.append(
                [
                    f"epoch {epoch}, layer {layer}",
                    *(mean_pm([point["input"][k] for point in some], ".2f") for k in range(3)),
                    *itertools.chain.from_iterable(
                        (
                            mean_pm([point["measured"][k] for point in some], ".3f"),
                            *(_mean(some, source, k) for source in CLOSURES),
                        )
                        for k in range(3)
                    ),
                ]
            )
    header = ["", "input mean", "input standard deviation", "input correlation"]
    for q in QUANTITIES:
        header += [f"{q}, measured", f"{q}, reset", f"{q}, free"]
    return table(header, rows)


def _mean(points: Sequence[dict[str, Any]], source: str, quantity: int) -> str:
    found = [point[source][quantity] for point in points if point[source] is not None]
    return f"{fmean(found):.3f}" if found else "–"


def _number(values: Sequence[float]) -> float:
    return math.sqrt(fmean(value * value for value in values)) if values else math.inf


def _rms(values: Sequence[float]) -> str:
    return f"{_number(values):.3f}" if values else "–"


def _name(norm: str, threshold: float) -> str:
    return f"{'tdBN' if norm == 'tdbn' else 'batch norm'}, θ = {threshold:g}"


def _draw(points: Points, path: Path) -> None:
    """Above, measured against predicted; below, the error over training."""
    with figure(path, (11, 7), dpi=110) as drawn:
        panels = drawn.subplots(2, 3)
        epochs = points.values("epoch")
        for k, q in enumerate(QUANTITIES):
            above, below = panels[0, k], panels[1, k]
            for index, closure in enumerate(CLOSURES):
                pairs = [(p[closure][k], p["measured"][k]) for p in points.points if p[closure] is not None]
                above.plot(
                    *zip(*pairs, strict=True), linestyle="", marker="o^"[index], markersize=3, alpha=0.6,
                    color=COLOURS[index], label=closure,
                )  # fmt: skip
            for index, source in enumerate((*CLOSURES, "assumed")):
                series = [_number(errors(points.where(epoch=epoch), source, k)) for epoch in epochs]
                below.plot(epochs, series, marker="o^s"[index], color=COLOURS[index], label=source)
            measured = [point["measured"][k] for point in points.points]
            above.plot([min(measured), max(measured)], [min(measured), max(measured)], color="0.5", linewidth=1)
            above.set_xlabel(f"{q}, predicted from the measured input")
            above.set_ylabel(f"{q}, measured")
            below.set_xlabel("epoch")
            below.set_ylabel(f"root mean square error of {q}")
            below.set_ylim(bottom=0)
            for axes in (above, below):
                axes.grid(alpha=0.3)
        panels[0, 0].legend()
        panels[1, 0].legend()
