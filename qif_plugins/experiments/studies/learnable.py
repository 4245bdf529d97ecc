"""Study 3: a, u1 and u2 learned, per layer and per channel, from the paper's values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ...diagnostics.observing import spiking_layers
from ...neuron.parameters import QIFParameters
from ...support.text import mean_pm
from ..figures import COLOURS, figure
from ..records import Records, Result, Setting, Trial
from .page import Body, table
from .runner import Options
from .stats import LEVEL, Interval, deviation, interval, paired, sign
from .trial import train

__all__ = ["QUESTION", "TITLE", "plan", "report", "run"]

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
VERDICTS = {1: "a gain", 0: "no significant difference", -1: "a loss"}


def plan(options: Options, done: Records) -> list[Setting]:
    """Every variant at every depth and seed."""
    size = (
        {"data": "digits", "width": 32, "epochs": 1}
        if options.quick
        else {"data": "mnist5k", "width": 128, "epochs": 6}
    )
    return [
        {
            "neuron": VARIANTS[variant][0], "neuron_args": VARIANTS[variant][1], "layers": layers, "seed": seed, **size,
            "norm": "tdbn", "steps": 4, "batch_size": 64, "optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0,
            "detach_reset": False,
        }
        for seed in range(options.seeds or (1 if options.quick else 5))
        for layers in DEPTHS
        for variant in VARIANTS
    ]  # fmt: skip


def run(setting: Setting) -> Result:
    """One training; besides its accuracy, what each layer's parameters became: mean and spread over channels."""
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
    """Accuracies, what is gained over fixed parameters, and what these became."""
    results: dict[tuple[str, int], dict[int, Result]] = {}
    for trial in trials:
        key = (_variant(trial.setting), trial.setting["layers"])
        results.setdefault(key, {})[trial.setting["seed"]] = trial.result
    depths = sorted({layers for _, layers in results})
    _draw(results, depths, picture)
    gains = {
        (layers, variant): gain
        for layers, variant in itertools.product(depths, list(VARIANTS)[1:])
        if (gain := _gain(results, layers, variant)) is not None
    }
    rows = [
        [
            f"{layers} layers, {variant}",
            mean_pm([r["accuracy"] for r in results.get((variant, layers), {}).values()], ".2f", 100),
            interval(gains[layers, variant]) if (layers, variant) in gains else "",
            mean_pm([r["rate"] for r in results.get((variant, layers), {}).values() if "rate" in r], ".3f"),
        ]
        for layers, variant in itertools.product(depths, VARIANTS)
    ]
    learned = [
        [
            f"{layers} layers, {variant}, layer {index}",
            *itertools.chain.from_iterable(
                (mean_pm([row[name][0] for row in found], ".3f"), f"{fmean(row[name][1] for row in found):.3f}")
                for name in LEARNED
            ),
        ]
        for layers, variant in itertools.product(depths, list(VARIANTS)[1:])
        for index, found in _by_layer(results.get((variant, layers), {}))
    ]
    header = [""]
    for name in LEARNED:
        header += [f"{name} (from {getattr(QIFParameters(), name):g})", f"{name}, over channels"]
    sections = [
        table(["", "test accuracy, %", "gain over fixed", "spikes a neuron-step"], rows),
        "What was learned: mean ± standard deviation over seeds, and the mean standard deviation between the channels "
        "of a layer.",
        table(header, learned),
    ]
    setting = trials[0].setting
    method = (
        f"Perceptrons of {setting['width']} neurons a layer under tdBN on {setting['data']}, T = {setting['steps']}, "
        f"{setting['epochs']} epochs of Adam at {setting['lr']:g}, which a cosine takes to 0, for weights and "
        "a, u1, u2 alike. The window is `unbiased` and follows a, u1, u2 as they are learned. Gains are paired: "
        "variants of one seed share their initial weights and the order of the images. Each interval stands for its "
        "own comparison; the finding also says what is left with intervals that hold for all of them together "
        "(Bonferroni)."
    )
    seeds = sorted({trial.setting["seed"] for trial in trials})
    return Body(_finding(gains, results), sections, seeds, method)


def _gain(
    results: dict[tuple[str, int], dict[int, Result]], layers: int, variant: str, comparisons: int = 1
) -> Interval | None:
    fixed, other = results.get(("fixed", layers), {}), results.get((variant, layers), {})
    seeds = sorted(fixed.keys() & other.keys())
    if not seeds:
        return None
    return paired([fixed[seed]["accuracy"] for seed in seeds], [other[seed]["accuracy"] for seed in seeds], comparisons)


def _finding(gains: dict[tuple[int, str], Interval], results: dict[tuple[str, int], dict[int, Result]]) -> str:
    sentences = [
        f"{layers} layers, {variant}: {interval(gain)} over fixed parameters, {VERDICTS[sign(gain)]}."
        for (layers, variant), gain in gains.items()
    ]
    sentences += _together(gains, results)
    for variant in list(VARIANTS)[1:]:
        rows = [
            row
            for (which, _), by_seed in results.items()
            if which == variant
            for r in by_seed.values()
            for row in r["learned"]
        ]
        if rows:
            learned = ", ".join(
                f"{name} from {getattr(QIFParameters(), name):g} to {mean_pm([row[name][0] for row in rows], '.2f')}"
                for name in LEARNED
            )
            sentences.append(f"Learned {variant}: {learned}, over all layers and seeds.")
    return " ".join(sentences)


def _together(gains: dict[tuple[int, str], Interval], results: dict[tuple[str, int], dict[int, Result]]) -> list[str]:
    """What is left of the comparisons that are significant by themselves among all of them."""
    alone = [key for key, gain in gains.items() if sign(gain)]
    if not alone:
        return []
    count, left = len(gains), []
    for layers, variant in alone:
        gain = _gain(results, layers, variant, comparisons=count)
        if gain is not None:
            verdict = VERDICTS[sign(gain)]
            left.append(f"{layers} layers, {variant}, {100 * gain[1]:+.2f} to {100 * gain[2]:+.2f}, {verdict}")
    return [
        f"These are {count} comparisons: without any effect, one or more of their intervals would exclude 0 with a "
        f"probability of up to {100 * count * (1 - LEVEL):.0f} %. With intervals that hold for all {count} together "
        f"(Bonferroni): {'; '.join(left)}."
    ]


def _by_layer(by_seed: dict[int, Result]) -> list[tuple[int, list[dict[str, Any]]]]:
    lists = [result["learned"] for result in by_seed.values() if result["learned"]]
    return [(index, list(rows)) for index, rows in enumerate(zip(*lists, strict=True), 1)]


def _variant(setting: Setting) -> str:
    return next(name for name, value in VARIANTS.items() if value == (setting["neuron"], setting["neuron_args"]))


def _draw(results: dict[tuple[str, int], dict[int, Result]], depths: Sequence[int], path: Path) -> None:
    """Accuracy of every variant, then every number by layer."""
    with figure(path, (13, 3.8), dpi=110) as drawn:
        panels = drawn.subplots(1, 4)
        for index, variant in enumerate(VARIANTS):
            colour = COLOURS[index]
            accuracies = [
                [100 * r["accuracy"] for r in results.get((variant, layers), {}).values()] for layers in depths
            ]
            panels[0].errorbar(
                [place + 0.15 * (index - 1) for place in range(len(depths))], [fmean(v) for v in accuracies],
                [deviation(v) if len(v) > 1 else 0 for v in accuracies], linestyle="", marker="o", capsize=3,
                color=colour, label=variant,
            )  # fmt: skip
            for place, name in enumerate(LEARNED, 1):
                rows = _by_layer(results.get((variant, max(depths)), {}))
                means = [[row[name][0] for row in found] for _, found in rows]
                panels[place].errorbar(
                    [at for at, _ in rows], [fmean(v) for v in means],
                    [deviation(v) if len(v) > 1 else 0 for v in means], marker="o", capsize=3, color=colour,
                )  # fmt: skip
                panels[place].set_title(f"{name}, {max(depths)} layers")
                panels[place].set_xlabel("layer")
        panels[0].set_xticks(range(len(depths)), [f"{layers} layers" for layers in depths])
        panels[0].set_title("test accuracy (%)")
        panels[0].legend()
        for axes in panels:
            axes.grid(alpha=0.3)
