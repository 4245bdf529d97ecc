"""Study 9: deep perceptrons with tdBN: the gradient's norm by layer, and the accuracy by depth and number of steps."""

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
from ..figures import COLOURS, MARKERS, errorbars, figure, legend_below
from ..records import Records, Result, Setting, Trial, by_seed
from .chain import GradientChain
from .page import Body, table
from .runner import Options
from .stats import difference, points
from .trial import LEARNING, LIF_TAU, as_map, data_of, outputs, perceptrons, surrogate_named, train

TITLE = "Gradients and accuracy by depth and T"
QUESTION = (
    "How does the norm of the gradient change from layer to layer in a deep perceptron with tdBN before training, "
    "as predicted from the neuron and its surrogate, and as measured? And which accuracy does it reach, of how many "
    "layers and at how many steps T of the same image: does a neuron without memory gain from more steps at all?"
)
STEPS = (1, 4)
"""T at which gradients are measured for every window."""
ALL_STEPS = (1, 2, 4, 8, 16)
DEPTHS = (3, 9, 17)
"""Layers of the perceptrons that are trained at :data:`ALL_STEPS`."""
MOST = 150
"""Largest product of layers and steps that is trained."""
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
ARMS: dict[str, dict[str, Any] | None] = {
    "LIF": None,
    "QIF, swap": {},
    "QIF, paper's parameters": {"dynamics": "paper"},
}
"""Arguments of ``swap`` for the networks that are trained, by label; ``None`` leaves the network LIF."""

Results = dict[tuple[int, int, str], dict[int, Result]]
"""By layers, T and arm, then by seed."""


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a network for every window, number of steps and seed, then a training for every arm, depth and T."""
    size = {"layers": 5, "width": 32, "samples": 64} if options.quick else {"layers": 33, "width": 256, "samples": 256}
    drawn: list[Setting] = [
        {"data": "digits", **size, "window": label, "steps": steps, "seed": seed}
        for seed in options.seeds_of(3)
        for steps in STEPS
        for label in WINDOWS
    ]
    return drawn + [
        {**perceptrons(options.quick, 4), **LEARNING, "layers": layers, "arm": arm, "steps": steps, "seed": seed}
        for seed in options.seeds_of(3)
        for layers in (DEPTHS[:1] if options.quick else DEPTHS)
        for steps in (ALL_STEPS[:2] if options.quick else ALL_STEPS)
        if layers * steps <= MOST
        for arm in ARMS
    ]


def run(setting: Setting) -> Result:
    """Measure the gradients of a network as it is drawn, in training mode, or train it where the setting has an arm.

    Returns:
        Of a training, what :func:`~.trial.train` returns. Otherwise ``norms``: root mean square of the loss's gradient
        with respect to the input of each layer of neurons, over neurons, steps and samples, the first layer first;
        ``rates``: its spikes per neuron-step.
    """
    data = data_of(setting["data"])
    samples = setting.get("samples", 8)
    x, y = data.x[:samples], data.y[:samples]
    torch.manual_seed(setting["seed"])
    model = build(
        "perceptron", data.shape, data.classes, "lif", layers=setting["layers"], width=setting["width"], norm="tdbn",
        surrogate_function=surrogate_named("atan", 1.0, MATCHED),
    )  # fmt: skip
    arguments = _arguments(setting)
    if arguments is not None:
        swap(model, example_input=x.expand(setting["steps"], *x.shape), **arguments)
    if "arm" in setting:
        return train(setting, model=model)
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


def _arguments(setting: Setting) -> dict[str, Any] | None:
    """Arguments of ``swap``; ``None`` leaves the network LIF."""
    if "arm" in setting:
        return ARMS[setting["arm"]]
    window = WINDOWS[setting["window"]]
    return None if window is None else {"window": window}


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
    """Write up the growth of the gradient and the accuracies, and draw norms by layer and accuracies by T."""
    drawn = [trial for trial in trials if "window" in trial.setting]
    trained = [trial for trial in trials if "arm" in trial.setting]
    results = by_seed(drawn, lambda setting: (setting["window"], setting["steps"]))
    accuracies: Results = by_seed(trained, lambda setting: (setting["layers"], setting["steps"], setting["arm"]))
    setting = drawn[0].setting
    layers = setting["layers"] - 1
    labels = [label for label in WINDOWS if any(found == label for found, _ in results)]
    predicted = {key: predict(*key, layers) for key in results}
    measured = {
        key: [[norm / result["norms"][-1] for norm in result["norms"]] for result in by_seeds.values()]
        for key, by_seeds in results.items()
    }
    _draw(predicted, measured, labels, accuracies, picture)
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
    finding = (
        f"Predicted and measured growth of the mean square gradient a layer differ by at most {percent(error, '.0f')}."
    )
    sections = [table(["growth a layer", *header], rows)]
    method = (
        f"Gradients: perceptrons of {setting['layers']} layers of {setting['width']} neurons with tdBN "
        "(`qif_plugins.models`, LIF with a leak of 1/2 and ATan(2), then `swap`, which chooses the map without "
        f"rebound), as they are drawn, in training mode, with {setting['samples']} images of {setting['data']} that "
        "are shown at every step, and the cross-entropy of the output averaged over time. "
        "The gradient's norm is the root mean square over neurons, steps and samples of the gradient with respect to "
        "the input of a layer of neurons. The table gives the factor by which its square changes from a layer to the "
        f"one below, the geometric mean over {layers} layers of neurons. Predictions are those of "
        "`qif_plugins.experiments.studies.chain`: nothing in them is measured or fitted; the input of a neuron is "
        "taken as normal and as independent from step to step. At T = 1 every membrane starts from rest."
    )
    if trained:
        accuracy, gained = _accuracies(accuracies)
        setting = trained[0].setting
        finding += f" {gained}"
        sections.insert(0, accuracy)
        method += (
            f" Accuracy: perceptrons of {setting['width']} neurons a layer on {setting['data']}, the same image at "
            f"every step; {setting['epochs']} epochs of Adam at {setting['lr']:g}, which a cosine takes to 0, in "
            f"batches of {setting['batch_size']}. QIF is what `swap()` and `swap(dynamics='paper')` make of the LIF "
            "network, from the same weights, both with the isometric surrogate; the first raises the input gain above "
            "12 layers. At T = 1 neurons start from rest, so that their maps make no difference. Networks "
            f"whose layers times steps are above {MOST} were left out. Intervals are Student's, paired by seed."
        )
    return Body(finding, sections, method)


def _accuracies(accuracies: Results) -> tuple[str, str]:
    """Tabulate the accuracies of each depth and arm and their means over depths; say what these gain by more steps."""
    depths, steps = sorted({key[0] for key in accuracies}), sorted({key[1] for key in accuracies})
    last = max(each for each in steps if all((depth, each, "LIF") in accuracies for depth in depths))
    rows, gains = [], []
    for name, of in [*((f"{depth} layers", [depth]) for depth in depths), ("mean", depths)]:
        for arm in ARMS:
            by_steps = {each: _mean(accuracies, of, each, arm) for each in steps}
            gain = points(difference(by_steps[steps[0]], by_steps[last]))
            cells = [mean_pm([r["accuracy"] for r in found.values()], ".1f", 100) for found in by_steps.values()]
            rows.append([name, arm, *cells, gain])
            gains += [f"{gain} points with {arm}"] if name == "mean" else []
    header = ["accuracy, %", "", *(f"T = {each}" for each in steps), f"T = {last} less T = {steps[0]}, points"]
    return table(
        header, rows, 2
    ), f"From T = {steps[0]} to {last}, accuracy changes on average over depths by {', '.join(gains)}."


def _mean(accuracies: Results, depths: Sequence[int], steps: int, arm: str) -> dict[int, Result]:
    """Accuracy by seed, the mean over depths, of the seeds that have all of them."""
    found = [accuracies.get((depth, steps, arm), {}) for depth in depths]
    seeds = set.intersection(*map(set, found))
    return {seed: {"accuracy": fmean(result[seed]["accuracy"] for result in found)} for seed in sorted(seeds)}


def _growth(norms: Sequence[float]) -> float:
    """Factor on the mean square from a layer to the one below, the first layer's norm first."""
    return float((norms[0] / norms[-1]) ** (2 / (len(norms) - 1)))


def _draw(
    predicted: dict[tuple[str, int], list[float]], measured: dict[tuple[str, int], list[list[float]]],
    labels: Sequence[str], accuracies: Results, path: Path,
) -> None:  # fmt: skip
    """Draw norms by layer over the last layer's, predictions as lines and measurements as marks; below, accuracies."""
    with figure(path, (11, 10 if accuracies else 5.5), dpi=110, grid=True) as drawn:
        top, *below = drawn.subfigures(2 if accuracies else 1, 1, squeeze=False)[:, 0]
        panels = top.subplots(1, len(STEPS), sharey=True)
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
        top.suptitle("Norm of the gradient by layer: lines predicted, marks measured")
        legend_below(top, panels[0])
        for part in below:
            depths = sorted({key[0] for key in accuracies})
            panels = part.subplots(1, len(depths), sharey=True, squeeze=False)[0]
            for axes, depth in zip(panels, depths, strict=True):
                for arm, colour in zip(ARMS, COLOURS, strict=False):
                    values = {
                        steps: [100 * result["accuracy"] for result in found.values()]
                        for (layers, steps, of), found in sorted(accuracies.items())
                        if (layers, of) == (depth, arm)
                    }
                    errorbars(axes, values, color=colour, label=arm)
                axes.set_xscale("log", base=2)
                axes.set(title=f"{depth} layers", xlabel="T")
            panels[0].set_ylabel("test accuracy (%)")
            part.suptitle("Accuracy by number of steps of the same image")
            legend_below(part, panels[0])
