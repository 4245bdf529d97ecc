"""Study 1: surrogate windows, by the accuracy that they train and by how far their gradient is from the true one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, geometric_mean

from ...support.text import mean_pm
from ..figures import COLOURS, MARKERS, errorbars, figure, legend_below
from ..records import Records, Result, Setting, Trial, by_seed
from .gradients import METHOD, NEURONS, NOISES, SURROGATES, Comparisons, compare_gradients, mean_of
from .page import Body, table
from .runner import Options
from .stats import Interval, ends, in_common, paired, sign
from .trial import GOAL, perceptrons, train

TITLE = "Surrogate windows"
QUESTION = (
    "Which surrogate trains a spiking network best, LIF or QIF, shallow or deep, under Adam or SGD, with the reset "
    "attached or detached? And how far is its gradient from the gradient of the noise-smoothed loss? [J] (arXiv "
    "2510.05168) derives its window, `paper`, from the membrane's moments, to reduce the gradient mismatch."
)

REFERENCE = "heuristic 1"
BASELINE = "unbiased"
"""The package's default when the study was recorded, which the other surrogates are compared with."""
DEPTHS = (2, 3, 5, 9)
THIN_DEPTHS = (2, 5)
THIN_SURROGATES = ("paper", "unbiased", "heuristic 1", "atan")
VARIANTS = {
    "Adam": ("adam", 2e-3, False),
    "Adam, reset detached": ("adam", 2e-3, True),
    "SGD": ("sgd", 0.2, False),
}
"""Label -> optimizer, learning rate, detach_reset. All but the first at THIN_DEPTHS and with THIN_SURROGATES only."""


def plan(options: Options, done: Records) -> list[Setting]:
    """Name trainings with every surrogate, and gradient comparisons at a few networks of each depth."""
    seeds = options.seeds_of(3)
    trainings = [
        {
            **perceptrons(options.quick, epochs=4), "kind": "training", "neuron": neuron,
            "surrogate": SURROGATES[label][0], "surrogate_width": SURROGATES[label][1], "optimizer": optimizer,
            "lr": lr, "weight_decay": 0.0, "detach_reset": detach, "layers": layers, "seed": seed,
        }
        for seed, (variant, (optimizer, lr, detach)) in itertools.product(seeds, _variants(options.quick))
        for layers in _depths(variant, options.quick)
        for neuron, label in itertools.product(NEURONS, SURROGATES if variant == "Adam" else THIN_SURROGATES)
    ]  # fmt: skip
    mismatches = [
        {
            "kind": "mismatch", "neuron": neuron, "layers": layers, "seed": seed, "data": "digits", "width": 64,
            "norm": "tdbn", "steps": 4, "epochs": 1 if options.quick else 20, "batch_size": 64, "optimizer": "adam",
            "lr": 2e-3, "detach_reset": False, "surrogate": "heuristic", "surrogate_width": 1.0,
            "noises": list(NOISES), "compared": list(SURROGATES),
            "samples": 16, "repeats": 20 if options.quick else 50 * min(layers, 8),
            "replicates": 4 if options.quick else 10,
        }
        for seed, layers, neuron in itertools.product(seeds, _depths("Adam", options.quick), NEURONS)
    ]  # fmt: skip
    return sorted([*mismatches, *trainings], key=lambda setting: setting["seed"])  # a whole grid first


def _variants(quick: bool) -> Sequence[tuple[str, tuple[str, float, bool]]]:
    return list(VARIANTS.items())[: 2 if quick else None]


def _depths(variant: str, quick: bool) -> Sequence[int]:
    return (2,) if quick else DEPTHS if variant == "Adam" else THIN_DEPTHS


def run(setting: Setting) -> Result:
    """Train a network, or compare the gradients of one."""
    return train(setting) if setting["kind"] == "training" else compare_gradients(setting)


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up accuracies, epochs to the goal and gradients, for [J]'s window and for the baseline."""
    trained, compared = Trainings(trials), Comparisons(trials)
    _draw(trained, compared, picture)
    sections = [
        _summary(trained, compared),
        f"Accuracy is the mean over the networks and seeds that have all surrogates. Better and worse count the cells "
        f"of the tables below whose difference from `{BASELINE}`, the default when this was recorded, is significant. "
        "Cosine and norm ratio are those of the surrogate gradient to the true one, over the networks where every "
        "surrogate's is resolved; the last column has the cosine of the gradient without noise, as training uses it.",
        f"[J]'s window, `paper`, compared with `{REFERENCE}`:",
        _against_reference(trained, compared),
    ]
    for variant in trained.variants:
        sections += [f"## {variant}", *trained.tables(variant)]
    sections += ["## Gradient mismatch", METHOD, *compared.tables()]
    network = perceptrons(options.quick, epochs=4)
    method = (
        f"Perceptrons of {network['width']} neurons a layer under tdBN on {network['data']}, T = {network['steps']}, "
        f"{network['epochs']} epochs, batches of {network['batch_size']}, a learning rate that a cosine takes to 0: "
        + "; ".join(
            f"{name}: {lr:g}, {', '.join(map(str, _depths(name, options.quick)))} layers"
            for name, (_, lr, _) in _variants(options.quick)
        )
        + ". Only Adam with the reset attached has every depth and surrogate. The readout counts as a layer. LIF is "
        "SpikingJelly's LIFNode with τ = 2 and input that is not decayed; its windows are derived as QIF's are, from "
        "the map of vanishing curvature. Accuracies are those after the last epoch; differences are paired by network "
        "and seed, and each interval stands for its own comparison."
    )
    return Body(_finding(trained, compared), sections, method)


class Trainings:
    """Finished trainings, by variant, neuron, depth and surrogate."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.cells: dict[tuple[str, str, int, str], dict[int, Result]] = by_seed(
            [trial for trial in trials if trial.setting["kind"] == "training"],
            lambda setting: (_variant(setting), setting["neuron"], setting["layers"], _label(setting)),
        )
        self.variants = [name for name in VARIANTS if any(key[0] == name for key in self.cells)]

    def depths(self, variant: str, neuron: str) -> list[int]:
        return sorted({key[2] for key in self.cells if key[:2] == (variant, neuron)})

    def values(self, key: tuple[str, str, int, str], name: str = "accuracy") -> list[float]:
        return [result[name] for _, result in sorted(self.cells.get(key, {}).items()) if result[name] is not None]

    def columns(self, variant: str) -> list[tuple[str, int]]:
        return [(neuron, layers) for neuron in NEURONS for layers in self.depths(variant, neuron)]

    def tables(self, variant: str) -> list[str]:
        """Return the tables of test accuracy and of epochs to the goal, a row for each surrogate."""
        columns = self.columns(variant)
        names = [f"{neuron.upper()}, {layers} layers" for neuron, layers in columns]
        tried = [label for label in SURROGATES if any(self.cells.get((variant, *at, label)) for at in columns)]
        accuracy = [
            [label, *(mean_pm(self.values((variant, *column, label)), ".1f", 100) for column in columns)]
            for label in tried
        ]
        epochs = [[label, *(self._epochs((variant, *column, label)) for column in columns)] for label in tried]
        return [
            table(["test accuracy, %", *names], accuracy),
            table([f"epochs to {GOAL:.0%}", *names], epochs),
        ]

    def _epochs(self, key: tuple[str, str, int, str]) -> str:
        seeds, reached = len(self.cells.get(key, {})), self.values(key, "epochs_to_goal")
        partly = "" if len(reached) == seeds or not reached else f" ({len(reached)} of {seeds})"
        return mean_pm(reached) + partly

    def difference(self, neuron: str, first: str, second: str, cell: tuple[str, int] | None = None) -> Interval | None:
        """Compare the accuracy of surrogate ``second`` with that of ``first`` in the same networks and seeds.

        Args:
            neuron: The neuron.
            first: A surrogate.
            second: Another.
            cell: Variant and depth. Default: all of them.

        Returns:
            The difference, ``second`` less ``first``; ``None`` where the two have no network and seed in common.
        """
        found = [
            in_common(one, self.cells.get((variant, which, layers, second), {}))
            for (variant, which, layers, label), one in self.cells.items()
            if (which, label) == (neuron, first) and cell in (None, (variant, layers))
        ]
        before, after = ([value for pair in found for value in pair[side]] for side in (0, 1))
        return paired(before, after) if before else None

    def verdicts(self, neuron: str, first: str, second: str) -> tuple[list[str], list[str], int]:
        """List the cells where ``second`` is significantly better than ``first``, and worse; count those with both."""
        better, worse, cells = [], [], 0
        for variant in self.variants:
            for layers in self.depths(variant, neuron):
                found = self.difference(neuron, first, second, (variant, layers))
                if found is not None:
                    cells += 1
                    better += [f"{variant}, {layers} layers"] if sign(found) > 0 else []
                    worse += [f"{variant}, {layers} layers"] if sign(found) < 0 else []
        return better, worse, cells

    def means(self, neuron: str) -> dict[str, float]:
        """Average the accuracy of each surrogate over the networks and seeds that have all of them."""
        found: dict[str, list[float]] = {label: [] for label in SURROGATES}
        for network in {key[:3] for key in self.cells if key[1] == neuron}:
            cells = [self.cells.get((*network, label), {}) for label in SURROGATES]
            for seed in set.intersection(*(set(cell) for cell in cells)):
                for label, results in zip(SURROGATES, cells, strict=True):
                    found[label].append(results[seed]["accuracy"])
        return {label: fmean(values) for label, values in found.items() if values}


def _finding(trained: Trainings, compared: Comparisons) -> str:
    gains, losses, closer = [], [], []
    for neuron in reversed(NEURONS):
        verdicts = {label: trained.verdicts(neuron, BASELINE, label) for label in SURROGATES if label != BASELINE}
        better = [f"`{label}`" for label, (better, worse, _) in verdicts.items() if better and not worse]
        gains.append(f"{' and '.join(better) or 'none'} for {neuron.upper()}")
        _, worse, cells = trained.verdicts(neuron, REFERENCE, "paper")
        losses.append(f"{len(worse)} of {cells} cells with {neuron.upper()}")
        closer += _closer(compared, neuron)
    return (
        f"Better than `{BASELINE}`, the default when this was recorded (significantly more accurate in some cells of "
        f"the tables below, and less accurate in none): {', '.join(gains)}. The paper's window is significantly less "
        f"accurate than `{REFERENCE}` in {' and '.join(losses)}; its gradient is closer to the true one in "
        f"{sum(closer)} of {len(closer)} comparisons."
    )


def _summary(trained: Trainings, compared: Comparisons) -> str:
    """Tabulate every neuron and surrogate: accuracy, verdicts against the baseline, gradient."""
    rows = []
    for neuron in reversed(NEURONS):
        means, gradients = trained.means(neuron), compared.common(neuron)
        for label in SURROGATES:
            better, worse, cells = trained.verdicts(neuron, BASELINE, label)
            verdicts = ["–"] * 2 if label == BASELINE else [f"{len(some)} of {cells}" for some in (better, worse)]
            found = gradients[label]
            rows.append(
                [
                    f"{neuron.upper()}, {label}", f"{100 * means[label]:.1f}" if means else "–", *verdicts,
                    mean_of(found, "cosine"), f"{geometric_mean(row['ratio'] for row in found):.2g}" if found else "–",
                    mean_of(found, "plain_cosine"),
                ]
            )  # fmt: skip
    return table(
        ["", "accuracy, %", f"better than `{BASELINE}`", "worse", "cosine", "norm ratio", "cosine without noise"], rows
    )


def _against_reference(trained: Trainings, compared: Comparisons) -> str:
    rows = []
    for neuron in reversed(NEURONS):
        overall = trained.difference(neuron, REFERENCE, "paper")
        better, worse, _ = trained.verdicts(neuron, REFERENCE, "paper")
        closer = _closer(compared, neuron)
        difference = ["–"] * 2 if overall is None else [f"{100 * overall[0]:+.1f}", ends(overall, 1)]
        named = ["; ".join(cells) or "–" for cells in (better, worse)]
        rows.append([neuron.upper(), *difference, *named, f"{sum(closer)} of {len(closer)}"])
    header = ["", "points", "95 % interval", "significantly better", "significantly worse", "closer gradient"]
    return table(header, rows)


def _closer(compared: Comparisons, neuron: str) -> list[bool]:
    """Tell for each comparison whether the gradient of [J]'s window is closer to the true one than the reference's."""
    found = compared.common(neuron)
    return [a["cosine"] > b["cosine"] for a, b in zip(found["paper"], found[REFERENCE], strict=True)]


def _variant(setting: Setting) -> str:
    which = setting["optimizer"], setting["lr"], setting["detach_reset"]
    return next(name for name, value in VARIANTS.items() if value == which)


def _label(setting: Setting) -> str:
    which = setting["surrogate"], setting["surrogate_width"]
    return next(label for label, value in SURROGATES.items() if value == which)


def _draw(trained: Trainings, compared: Comparisons, path: Path) -> None:
    """Draw accuracy and cosine against depth, a column for each neuron."""
    with figure(path, (10, 7), dpi=110, grid=True) as drawn:
        panels = drawn.subplots(2, 2, sharex=True, sharey="row")
        for column, neuron in enumerate(NEURONS):
            depths = trained.depths("Adam", neuron)
            for index, label in enumerate(SURROGATES):
                style = {"color": COLOURS[index], "marker": MARKERS[index], "label": label}
                style["linestyle"] = "-" if label == "paper" or label.startswith("unbiased") else "--"
                accuracies = {d: [100 * v for v in trained.values(("Adam", neuron, d, label))] for d in depths}
                errorbars(panels[0, column], accuracies, **style)
                wanted = {"surrogate": label, "part": "hidden", "detach_reset": False, "state": "trained"}
                cosines = {
                    layers: [r["cosine"] for r in compared.find(column=(which, layers), noise=NOISES[0], **wanted)]
                    for which, layers in sorted(compared.networks)
                    if which == neuron
                }
                errorbars(panels[1, column], cosines, **style)
            panels[0, column].set_title(f"{neuron.upper()}, Adam")
            panels[1, column].set(xlabel="layers", xticks=depths)
        panels[0, 0].set_ylabel("test accuracy (%)")
        panels[1, 0].set_ylabel(f"cosine to the true gradient\n(trained, σ = {NOISES[0]:g})")
        legend_below(drawn, panels[0, 0])
