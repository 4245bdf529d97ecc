"""Study 9: norm of the gradient by layer in deep perceptrons with tdBN, predicted and measured, for every window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import swap
from ...diagnostics.spiking import spiking_layers
from ...models import build
from ...neuron.parameters import QIFParameters
from ...neuron.surrogate import ATan, Window
from ...support.text import mean_pm, percent
from ..figures import COLOURS, MARKERS, figure, legend_below
from ..records import Records, Result, Setting, Trial, by_seed
from .chain import GradientChain
from .page import Body, table
from .runner import Options
from .trial import LIF_TAU, as_map, data_of, outputs, surrogate_named

TITLE = "Gradients by depth"
QUESTION = (
    "How does the norm of the gradient change from layer to layer in a deep perceptron with tdBN before training, "
    "as predicted from the neuron and its surrogate, and as measured? For the map without rebound, which `swap` "
    "chooses, with every window, and for LIF with ATan(2)."
)
STEPS = (1, 4)
MATCHED = QIFParameters.matching_lif(1 - 1 / LIF_TAU, rebound=False)
"""The neuron that ``swap`` puts in place of LIF."""
WINDOWS: dict[str, Any] = {
    "isometric, Gaussian": "isometric",
    "isometric, rectangle": Window.isometric(MATCHED),
    "unbiased, κ = 1/2": "unbiased",
    "paper": "paper",
    "heuristic, width 1": "heuristic",
    "LIF, ATan(2)": None,
}
"""Window that ``swap`` is given, by label; ``None`` leaves the network LIF."""


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a network for every window, number of steps and seed."""
    size = {"layers": 5, "width": 32, "samples": 64} if options.quick else {"layers": 33, "width": 256, "samples": 256}
    return [
        {"data": "digits", **size, "window": label, "steps": steps, "seed": seed}
        for seed in options.seeds_of(3)
        for steps in STEPS
        for label in WINDOWS
    ]


def run(setting: Setting) -> Result:
    """Measure the gradients of a network as it is drawn, in training mode.

    Returns:
        ``norms``: root mean square of the loss's gradient with respect to the input of each layer of neurons, over
        neurons, steps and samples, the first layer first; ``rates``: its spikes per neuron-step.
    """
    data = data_of(setting["data"])
    x, y = data.x[: setting["samples"]], data.y[: setting["samples"]]
    torch.manual_seed(setting["seed"])
    model = build(
        "perceptron", data.shape, data.classes, "lif", layers=setting["layers"], width=setting["width"], norm="tdbn",
        surrogate_function=surrogate_named("atan", 1.0, MATCHED),
    )  # fmt: skip
    window = WINDOWS[setting["window"]]
    if window is not None:
        swap(model, example_input=x.expand(setting["steps"], *x.shape), window=window)
    inputs: list[Tensor] = []
    rates: list[float] = []

    def watch(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])
        rates.append(out.detach().mean().item())

    for neuron in spiking_layers(model).values():
        neuron.register_forward_hook(watch)
    model.train()
    nn.functional.cross_entropy(outputs(model, x, setting["steps"]), y).backward()
    squares = [seen.grad.square().mean().item() for seen in inputs if seen.grad is not None]
    return {"norms": [math.sqrt(square) for square in squares], "rates": rates}


def predict(label: str, steps: int, layers: int) -> list[float]:
    """Predict the norms of :func:`run` relative to that of the last layer, whose spikes the loss averages over time."""
    window = WINDOWS[label]
    params = as_map("lif", {}) if window is None else MATCHED
    if window is None:
        window = ATan()
    elif isinstance(window, str):
        window = Window.named(window, params)  # type: ignore[arg-type]
    chain = GradientChain(params, window, steps)
    return [math.sqrt(value) for value in chain.mean_squares(layers, torch.ones(steps, steps, dtype=torch.float64))]


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the growth of the gradient, and draw its norm by layer."""
    results = by_seed(trials, lambda setting: (setting["window"], setting["steps"]))
    setting = trials[0].setting
    layers = setting["layers"] - 1
    labels = [label for label in WINDOWS if any(found == label for found, _ in results)]
    predicted = {key: predict(*key, layers) for key in results}
    measured = {
        key: [[norm / result["norms"][-1] for norm in result["norms"]] for result in by_seeds.values()]
        for key, by_seeds in results.items()
    }
    _draw(predicted, measured, labels, picture)
    rows = []
    for label in labels:
        cells = []
        for steps in STEPS:
            key = label, steps
            cells += [
                f"{_growth(predicted[key]):.3f}" if key in predicted else "–",
                mean_pm([_growth(norms) for norms in measured.get(key, [])], ".3f"),
                mean_pm([fmean(result["rates"]) for result in results.get(key, {}).values()], ".3f"),
            ]
        rows.append([label, *cells])
    header = [f"T = {steps}: {name}" for steps in STEPS for name in ("predicted", "measured", "spikes a neuron-step")]
    grows = {key: fmean(map(_growth, norms)) for key, norms in measured.items()}
    error = max(abs(_growth(predicted[key]) / found - 1) for key, found in grows.items())
    ranges = "; ".join(f"{label} {_range([f for key, f in grows.items() if key[0] == label])}" for label in labels)
    finding = (
        "Predicted and measured growth of the mean square gradient a layer differ by at most "
        f"{percent(error, '.0f')}. Measured over T = {' and '.join(map(str, STEPS))}: {ranges}."
    )
    method = (
        f"Perceptrons of {setting['layers']} layers of {setting['width']} neurons with tdBN (`qif_plugins.models`, "
        f"LIF with a leak of 1/2, then `swap`), as they are drawn, in training mode, with {setting['samples']} images "
        f"of {setting['data']} that are shown at every step, and the cross-entropy of the output averaged over time. "
        "The gradient's norm is the root mean square over neurons, steps and samples of the gradient with respect to "
        "the input of a layer of neurons. The table gives the factor by which its square changes from a layer to the "
        f"one below, the geometric mean over {layers} layers of neurons. Predictions are those of "
        "`qif_plugins.experiments.studies.chain`: nothing in them is measured or fitted; the input of a neuron is "
        "taken as normal and as independent from step to step. At T = 1 every membrane starts from rest."
    )
    return Body(finding, [table(["growth a layer", *header], rows)], method)


def _growth(norms: Sequence[float]) -> float:
    """Factor on the mean square from a layer to the one below, the first layer's norm first."""
    return float((norms[0] / norms[-1]) ** (2 / (len(norms) - 1)))


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _draw(
    predicted: dict[tuple[str, int], list[float]], measured: dict[tuple[str, int], list[list[float]]],
    labels: Sequence[str], path: Path,
) -> None:  # fmt: skip
    """Draw the norm by layer, relative to the last layer's: predictions as lines, measurements as marks."""
    with figure(path, (11, 5.5), dpi=110, grid=True) as drawn:
        panels = drawn.subplots(1, len(STEPS), sharey=True)
        for axes, steps in zip(panels, STEPS, strict=True):
            for label, colour, marker in zip(labels, COLOURS, MARKERS, strict=False):
                key = label, steps
                if key not in predicted:
                    continue
                layers = range(1, len(predicted[key]) + 1)
                axes.plot(layers, predicted[key], color=colour, linewidth=1)
                means = [math.exp(fmean(map(math.log, norms))) for norms in zip(*measured[key], strict=True)]
                axes.plot(layers, means, marker, color=colour, markersize=4, linestyle="", label=label)
            axes.set(title=f"T = {steps}", xlabel="layer", yscale="log")
        panels[0].set_ylabel("norm over the last layer's")
        drawn.suptitle("Norm of the gradient by layer: lines predicted, marks measured")
        legend_below(drawn, panels[0])
