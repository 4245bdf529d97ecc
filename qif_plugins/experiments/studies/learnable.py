"""Study 3: a, u1 and u2 learned, per layer and per channel, from the paper's values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ...diagnostics.spiking import spiking_layers
from ...neuron.parameters import QIFParameters
from ...support.text import mean_pm
from ..figures import COLOURS, errorbars, figure, integer_ticks, legend_below
from ..records import Records, Result, Setting, Trial, by_seed
from .page import Body, table
from .runner import Options
from .stats import LEVEL, Interval, ends, in_common, paired, sign
from .trial import LEARNING as TRAINING
from .trial import perceptrons, train

TITLE = "Learnable a, u1 and u2"
QUESTION = (
    "The third open question of [J] (arXiv 2510.05168): what does a network learn if the three parameters of its QIF "
    "neurons are learned with the weights, from the paper's values, and what does that gain?"
)

VARIANTS = {
    "fixed": ("qif", {}),
    "per layer": ("parametric_qif", {}),
    "per channel": ("parametric_qif", {"per_channel": True}),
}
LEARNED = ("a", "u1", "u2")
DEPTHS = (2, 5)
LEARNING = ("per layer", "per channel")

Results = dict[tuple[str, int], dict[int, Result]]
"""By variant and depth, then by seed."""


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a training for every variant, depth and seed."""
    common = {**perceptrons(options.quick), **TRAINING}
    return [
        {**common, "neuron": neuron, "neuron_args": arguments, "layers": layers, "seed": seed}
        for seed in options.seeds_of(5)
        for layers in DEPTHS
        for neuron, arguments in VARIANTS.values()
    ]


def run(setting: Setting) -> Result:
    """Train a network; the result also has the mean and spread over channels of each layer's parameters."""
    learned: list[dict[str, Any]] = []

    def observe(model: nn.Module, epoch: int) -> None:
        if epoch == setting["epochs"]:
            learned.extend(_numbers(node) for node in spiking_layers(model).values())

    return {**train(setting, observe), "learned": learned}


@torch.no_grad()
def _numbers(node: Any) -> dict[str, Any]:
    params = node.qif_parameters
    numbers = {
        name: torch.as_tensor(getattr(params, name), dtype=torch.float64, device="cpu").flatten() for name in LEARNED
    }
    return {name: [value.mean().item(), value.std(correction=0).item()] for name, value in numbers.items()}


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up accuracies, gains over fixed parameters, and the parameters learned."""
    results: Results = by_seed(trials, lambda setting: (_variant(setting), setting["layers"]))
    depths = sorted({layers for _, layers in results})
    _draw(results, depths, picture)
    compared = [key for key in itertools.product(LEARNING, depths) if _gain(results, *key) is not None]
    together = f"95 % interval of all {len(compared)} together"
    header = ["", "test accuracy, %", "gain over fixed, points", "95 % interval", together, "spikes a neuron-step"]
    rows = []
    for layers, variant in itertools.product(depths, VARIANTS):
        trained = results.get((variant, layers), {}).values()
        alone, all_of_them = _gain(results, variant, layers), _gain(results, variant, layers, len(compared))
        gain = ["–"] * 3
        if alone and all_of_them:
            gain = [f"{100 * alone[0]:+.2f}", ends(alone), ends(all_of_them)]
        rows.append(
            [
                f"{layers} layers, {variant}",
                mean_pm([result["accuracy"] for result in trained], ".2f", 100),
                *gain,
                mean_pm([result["rate"] for result in trained if "rate" in result], ".3f"),
            ]
        )
    learned = [
        _learned_row(f"{layers} layers, {variant}, layer {index}", found)
        for layers, variant in itertools.product(depths, LEARNING)
        for index, found in _by_layer(results.get((variant, layers), {}))
    ]
    learned += [_learned_row(f"all layers, {name}", every) for name in LEARNING if (every := _all(results, name))]
    names = [f"{name} (from {getattr(QIFParameters(), name):g})" for name in LEARNED]
    sections = [
        table(header, rows),
        "Learned parameters: mean ± standard deviation over seeds, and the mean standard deviation between the "
        "channels of a layer.",
        table(["", *itertools.chain.from_iterable((name, "over channels") for name in names)], learned),
    ]
    setting = trials[0].setting
    method = (
        f"Perceptrons of {setting['width']} neurons a layer under tdBN on {setting['data']}, T = {setting['steps']}, "
        f"{setting['epochs']} epochs of Adam at {setting['lr']:g}, which a cosine takes to 0, for weights and "
        "a, u1, u2 alike. The window is `unbiased` and follows a, u1, u2 as they are learned. Gains are paired: "
        "variants of one seed share their initial weights and the order of the images. Each interval stands for its "
        "own comparison, and a wider one for all of them together (Bonferroni): without any effect, one or more of "
        f"{len(compared)} intervals for themselves would exclude 0 with a probability of up to "
        f"{100 * len(compared) * (1 - LEVEL):.0f} %."
    )
    return Body(_finding(results, compared), sections, method)


def _learned_row(name: str, found: Sequence[dict[str, Any]]) -> list[str]:
    numbers = ((mean_pm([r[n][0] for r in found], ".3f"), f"{fmean(r[n][1] for r in found):.3f}") for n in LEARNED)
    return [name, *itertools.chain.from_iterable(numbers)]


def _gain(results: Results, variant: str, layers: int, comparisons: int = 1) -> Interval | None:
    """Compare the accuracy of a variant with that of fixed parameters; ``None`` for these themselves."""
    fixed, other = in_common(results.get(("fixed", layers), {}), results.get((variant, layers), {}))
    return paired(fixed, other, comparisons) if fixed and variant != "fixed" else None


def _finding(results: Results, compared: Sequence[tuple[str, int]]) -> str:
    alone = [sign(gain) for key in compared if (gain := _gain(results, *key))]
    together = [sign(gain) for key in compared if (gain := _gain(results, *key, len(compared)))]
    return (
        f"Significant gains over fixed parameters: {alone.count(1)} of {len(compared)} comparisons with an interval "
        f"for each, {together.count(1)} with intervals that hold for all of them together. Significant losses: "
        f"{alone.count(-1)} and {together.count(-1)}."
    )


def _all(results: Results, variant: str) -> list[dict[str, Any]]:
    """List what every layer of a variant's networks learned."""
    return [
        row for (which, _), found in results.items() if which == variant for r in found.values() for row in r["learned"]
    ]


def _by_layer(by_seed: dict[int, Result]) -> list[tuple[int, list[dict[str, Any]]]]:
    lists = [result["learned"] for result in by_seed.values() if result["learned"]]
    return [(index, list(rows)) for index, rows in enumerate(zip(*lists, strict=True), 1)]


def _variant(setting: Setting) -> str:
    return next(name for name, value in VARIANTS.items() if value == (setting["neuron"], setting["neuron_args"]))


def _draw(results: Results, depths: Sequence[int], path: Path) -> None:
    """Draw the accuracy of every variant, and what each layer of the deepest network learned."""
    with figure(path, (13, 4.2), dpi=110, grid=True) as drawn:
        panels = drawn.subplots(1, 4)
        for index, variant in enumerate(VARIANTS):
            style = {"color": COLOURS[1 + index], "label": variant}
            accuracies = {
                place + 0.15 * (index - 1): [100 * r["accuracy"] for r in results.get((variant, layers), {}).values()]
                for place, layers in enumerate(depths)
            }
            errorbars(panels[0], accuracies, linestyle="", **style)
            layers = _by_layer(results.get((variant, max(depths)), {}))
            for axes, name in zip(panels[1:], LEARNED, strict=True):
                errorbars(axes, {at: [row[name][0] for row in rows] for at, rows in layers}, **style)
        panels[0].set_xticks(range(len(depths)), [f"{layers} layers" for layers in depths])
        panels[0].set_ylabel("test accuracy (%)")
        for axes, name in zip(panels[1:], LEARNED, strict=True):
            axes.set(xlabel="layer", ylabel=f"{name}, {max(depths)} layers")
            integer_ticks(axes.xaxis)
        legend_below(drawn, panels[0])
