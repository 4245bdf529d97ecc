"""Study 1: surrogate windows, by what they train and by how far their gradient is from the true one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from ...diagnostics.observing import spiking_layers
from ...support.text import mean_pm
from ..figures import COLOURS, figure
from ..records import Records, Result, Setting, Trial
from .mismatch import agreement, score_gradients, surrogate_gradients
from .page import Body, table
from .runner import Options
from .stats import Interval, deviation, interval, paired, sign
from .trial import GOAL, data_of, make, outputs, train

__all__ = ["QUESTION", "TITLE", "plan", "report", "run"]

TITLE = "Surrogate windows"
QUESTION = (
    "Which surrogate trains a spiking network best, LIF or QIF, shallow or deep, under Adam or SGD, with the reset "
    "attached or detached? And how far is its gradient from the gradient of the noise-smoothed loss? [J] (arXiv "
    "2510.05168) derives its window, `paper`, from the membrane's moments, to reduce the gradient mismatch."
)

SURROGATES = {
    "paper": ("paper", 1.0),
    "unbiased": ("unbiased", 1.0),
    "unbiased, κ = 1": ("unbiased", 2.0),
    "heuristic 0.5": ("heuristic", 0.5),
    "heuristic 1": ("heuristic", 1.0),
    "heuristic 2": ("heuristic", 2.0),
    "atan": ("atan", 1.0),
}
"""Label -> surrogate and width."""
NEURONS = ("lif", "qif")
REFERENCE = "heuristic 1"
DEFAULT = "unbiased"
DEPTHS = (2, 3, 5, 9)
THIN_DEPTHS = (2, 5)
THIN_SURROGATES = ("paper", "unbiased", "heuristic 1", "atan")
VARIANTS = {
    "Adam": ("adam", 2e-3, False),
    "Adam, reset detached": ("adam", 2e-3, True),
    "SGD": ("sgd", 0.2, False),
}
"""Label -> optimizer, learning rate, detach_reset. All but the first at THIN_DEPTHS and with THIN_SURROGATES only."""
NOISES = (0.25, 0.5)
STATES = ("initial", "trained")


def plan(options: Options, done: Records) -> list[Setting]:
    """Trainings of every surrogate, and the gradient mismatch at a few networks of each depth."""
    seeds = range(options.seeds or (1 if options.quick else 3))
    trainings = [
        {
            "kind": "training", "neuron": neuron, "surrogate": SURROGATES[label][0],
            "surrogate_width": SURROGATES[label][1], "optimizer": optimizer, "lr": lr, "detach_reset": detach,
            "layers": layers, "seed": seed, **_network(options.quick),
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


def _network(quick: bool) -> Setting:
    size = {"data": "digits", "width": 32, "epochs": 1} if quick else {"data": "mnist5k", "width": 128, "epochs": 4}
    return {**size, "norm": "tdbn", "steps": 4, "batch_size": 64, "weight_decay": 0.0}


def _variants(quick: bool) -> Sequence[tuple[str, tuple[str, float, bool]]]:
    return list(VARIANTS.items())[: 2 if quick else None]


def _depths(variant: str, quick: bool) -> Sequence[int]:
    return (2,) if quick else DEPTHS if variant == "Adam" else THIN_DEPTHS


def run(setting: Setting) -> Result:
    """One training, or one network whose gradients are compared."""
    return train(setting) if setting["kind"] == "training" else _mismatch(setting)


# -- the gradient mismatch -----------------------------------------------------------------------------------------


def _mismatch(setting: Setting) -> Result:
    """Cosine and norm ratio of every surrogate's gradient at one network, before and after training it."""
    data = data_of(setting["data"])
    x, labels = data.test_x[: setting["samples"]], data.test_y[: setting["samples"]]
    network = make(setting)
    states = {"initial": copy.deepcopy(network.state_dict())}
    accuracy = train(setting, model=network)["accuracy"]
    states["trained"] = copy.deepcopy(network.state_dict())
    rows: list[dict[str, Any]] = []
    for (state, weights), noise in itertools.product(states.items(), setting["noises"]):
        network.load_state_dict(weights)
        _normalize_under_noise(network, x, setting, noise)
        rows += [{"state": state, "noise": noise, **row} for row in _compare(network, x, labels, setting, noise)]
    return {"accuracy": accuracy, "rows": rows}


def _compare(network: nn.Module, x: Tensor, labels: Tensor, setting: Setting, noise: float) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(setting["seed"])
    common = (x, labels, _losses, noise)

    def gradients(estimate: Callable[..., Tensor], model: nn.Module, repeats: int) -> Tensor:
        forward = _forward(model, setting["steps"])
        neurons = list(spiking_layers(model).values())
        return estimate(
            forward, neurons, _hidden(model), *common, repeats, setting["replicates"], generator
        )  # fmt: skip

    true = gradients(score_gradients, network, setting["repeats"])
    first = _hidden(network)[0].numel()
    rows = []
    for label, detach in itertools.product(setting["compared"], (False, True)):
        surrogate, width = SURROGATES[label]
        model = make({**setting, "surrogate": surrogate, "surrogate_width": width, "detach_reset": detach})
        model.load_state_dict(network.state_dict())
        model.eval()
        for neuron in spiking_layers(model).values():
            neuron.train()  # in evaluation mode SpikingJelly 0.0.0.0.14's pass no gradient
        averaged = gradients(surrogate_gradients, model, max(2, setting["repeats"] // 20))
        loss = _losses(_forward(model, setting["steps"])(x), labels).mean()
        plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, _hidden(model))])
        for part, cut in (("hidden", slice(None)), ("first", slice(first))):
            rows.append(
                {
                    "surrogate": label, "detach_reset": detach, "part": part,
                    **vars(agreement(true[:, cut], averaged[:, cut])),
                    "plain_cosine": agreement(true[:, cut], plain[cut]).cosine,
                }
            )  # fmt: skip
    return rows


def _normalize_under_noise(network: nn.Module, x: Tensor, setting: Setting, noise: float) -> None:
    """Running statistics of the norms from these samples under this noise; leaves evaluation mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches seen
    network.train()
    torch.manual_seed(setting["seed"])
    handles = [
        neuron.register_forward_pre_hook(lambda _, inputs: (inputs[0] + noise * torch.randn_like(inputs[0]),))
        for neuron in spiking_layers(network).values()
    ]
    with torch.no_grad():
        outputs(network, x.repeat(20, 1), setting["steps"])
    for handle in handles:
        handle.remove()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def _hidden(model: nn.Module) -> list[Tensor]:
    """The hidden layers' parameters, the first layer's weights first; the readout's gradient needs no surrogate."""
    return list(model.get_submodule("hidden").parameters())


def _forward(model: nn.Module, steps: int) -> Callable[[Tensor], Tensor]:
    return lambda x: outputs(model, x, steps)


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, labels, reduction="none")


# -- the page --------------------------------------------------------------------------------------------------------


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Accuracies, epochs to the goal, mismatch, and what they say about [J]'s window and about the default."""
    trained = Trainings(trials)
    compared = Comparisons(trials)
    _draw(trained, compared, picture)
    sections = []
    for variant in trained.variants:
        sections += [f"## {variant}", *trained.tables(variant)]
    sections += ["## Gradient mismatch", MISMATCH, *compared.tables()]
    finding = " ".join([*_on_accuracy(trained), *_on_mismatch(compared)]) or "No comparison is complete yet."
    seeds = sorted({trial.setting["seed"] for trial in trials})
    network = _network(options.quick)
    method = (
        f"Perceptrons of {network['width']} neurons a layer under tdBN on {network['data']}, T = {network['steps']}, "
        f"{network['epochs']} epochs, batches of {network['batch_size']}, a learning rate that a cosine takes to 0: "
        + "; ".join(
            f"{name}: {lr:g}, {', '.join(map(str, _depths(name, options.quick)))} layers"
            for name, (_, lr, _) in _variants(options.quick)
        )
        + ". The grid is thinned so: only Adam with the reset attached has every depth and surrogate. The readout "
        "counts as a layer. LIF is SpikingJelly's LIFNode with τ = 2 and input that is not decayed; its windows are "
        "derived as QIF's are, from the map of vanishing curvature. Accuracies are those after the last "
        "epoch; differences are paired by network and seed, and each interval stands for its own comparison."
    )
    return Body(finding, sections, seeds, method)


MISMATCH = (
    "At networks of 64 neurons a layer on digits (16 test images), freshly drawn and trained with `heuristic 1`, the "
    "surrogate gradient of the hidden layers, averaged over noise of deviation σ on every neuron's charge at every "
    "step, beside an unbiased likelihood-ratio estimate of the gradient of the loss averaged over the same noise "
    "(`qif_plugins.experiments.studies.mismatch`). Each cell: cosine, then norm of the surrogate gradient over that of "
    "the true one, mean ± deviation over seeds. A network counts where the estimate resolves both gradients (squared "
    "norms above three times their standard errors); a dash stands where no seed does, a number in brackets says how "
    "many do."
)


class Trainings:
    """The trainings by variant, neuron, depth and surrogate."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.cells: dict[tuple[str, str, int, str], dict[int, Result]] = {}
        for trial in trials:
            setting = trial.setting
            if setting["kind"] == "training":
                key = (_variant(setting), setting["neuron"], setting["layers"], _label(setting))
                self.cells.setdefault(key, {})[setting["seed"]] = trial.result
        self.variants = [name for name in VARIANTS if any(key[0] == name for key in self.cells)]

    def depths(self, variant: str, neuron: str) -> list[int]:
        return sorted({key[2] for key in self.cells if key[:2] == (variant, neuron)})

    def values(self, key: tuple[str, str, int, str], name: str = "accuracy") -> list[float]:
        return [result[name] for _, result in sorted(self.cells.get(key, {}).items()) if result[name] is not None]

    def columns(self, variant: str) -> list[tuple[str, int]]:
        return [(neuron, layers) for neuron in NEURONS for layers in self.depths(variant, neuron)]

    def tables(self, variant: str) -> list[str]:
        """Test accuracy, and epochs to the goal."""
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
        """Accuracy of surrogate ``second`` less that of ``first`` in the same networks and seeds, of one variant and
        depth or of all; ``None`` where they have none in common."""
        pairs = [
            (one[seed]["accuracy"], other[seed]["accuracy"])
            for (variant, which, layers, label), one in self.cells.items()
            if (which, label) == (neuron, first) and cell in (None, (variant, layers))
            for other in [self.cells.get((variant, which, layers, second), {})]
            for seed in sorted(one.keys() & other.keys())
        ]
        return paired([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None

    def verdicts(self, neuron: str, first: str, second: str) -> tuple[list[str], list[str], int]:
        """Cells where ``second`` is significantly better than ``first``, and worse; and how many cells have both."""
        better, worse, cells = [], [], 0
        for variant in self.variants:
            for layers in self.depths(variant, neuron):
                found = self.difference(neuron, first, second, (variant, layers))
                if found is not None:
                    cells += 1
                    better += [f"{variant}, {layers} layers"] if sign(found) > 0 else []
                    worse += [f"{variant}, {layers} layers"] if sign(found) < 0 else []
        return better, worse, cells

    def means(self, neuron: str, cell: tuple[str, int] | None = None) -> dict[str, float]:
        """Mean accuracy of each surrogate over the networks and seeds that have all of them, of one cell or of all."""
        networks = {key[:3] for key in self.cells if key[1] == neuron and cell in (None, (key[0], key[2]))}
        found: dict[str, list[float]] = {label: [] for label in SURROGATES}
        for network in networks:
            cells = [self.cells.get((*network, label), {}) for label in SURROGATES]
            for seed in set.intersection(*(set(cell) for cell in cells)):
                for label, results in zip(SURROGATES, cells, strict=True):
                    found[label].append(results[seed]["accuracy"])
        return {label: fmean(values) for label, values in found.items() if values}


class Comparisons:
    """The gradient comparisons by network and surrogate, those that are resolved."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.networks: dict[tuple[str, int], int] = {}
        for trial in trials:
            setting = trial.setting
            if setting["kind"] == "mismatch":
                column = (setting["neuron"], setting["layers"])
                self.networks[column] = self.networks.get(column, 0) + 1
                self.rows += [{**row, "column": column, "seed": setting["seed"]} for row in trial.result["rows"]]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """Resolved rows with these entries."""
        return [
            row for row in self.rows if row["resolved"] and all(row[name] == value for name, value in wanted.items())
        ]

    def tables(self) -> list[str]:
        """Cosine and ratio, and what the reset, the depth of the layer and the averaging change."""
        columns = sorted(self.networks)
        names = [f"{neuron.upper()}, {layers} layers" for neuron, layers in columns]
        parts = []
        for state, noise in itertools.product(STATES, NOISES):
            rows = [
                [label, *(self._cell(column, surrogate=label, state=state, noise=noise) for column in columns)]
                for label in SURROGATES
            ]
            parts.append(table([f"{state}, σ = {noise:g}", *names], rows))
        rows = [
            [f"{neuron.upper()}, {label}", *self._means(neuron, label)] for neuron in NEURONS for label in SURROGATES
        ]
        parts += [
            "The mean cosine over all resolved networks, of the hidden layers, of the first layer alone, of the hidden "
            "layers with the reset detached, and of the surrogate gradient without noise, as training uses it:",
            table(["", "hidden layers", "first layer", "reset detached", "without noise"], rows),
        ]
        return parts

    def _cell(self, column: tuple[str, int], **wanted: Any) -> str:
        rows = self.find(column=column, part="hidden", detach_reset=False, **wanted)
        if not rows:
            return "–"
        partly = "" if len(rows) == self.networks[column] else f" ({len(rows)})"
        cosine, ratio = mean_pm([row["cosine"] for row in rows], ".2f"), mean_pm([row["ratio"] for row in rows], ".3g")
        return f"{cosine}, × {ratio}{partly}"

    def _means(self, neuron: str, label: str) -> list[str]:
        def mean(name: str, **wanted: Any) -> str:
            found = [row for row in self.find(surrogate=label, **wanted) if row["column"][0] == neuron]
            return f"{fmean(row[name] for row in found):.2f}" if found else "–"

        return [
            mean("cosine", part="hidden", detach_reset=False),
            mean("cosine", part="first", detach_reset=False),
            mean("cosine", part="hidden", detach_reset=True),
            mean("plain_cosine", part="hidden", detach_reset=False),
        ]


def _on_accuracy(trained: Trainings) -> list[str]:
    """Sentences on [J]'s window and on the default, as the accuracies have it."""
    sentences = []
    for neuron in reversed(NEURONS):
        means = trained.means(neuron)
        overall = trained.difference(neuron, REFERENCE, "paper")
        if not means or overall is None:
            continue
        better, worse, cells = trained.verdicts(neuron, REFERENCE, "paper")
        sentences.append(
            f"**{neuron.upper()}:** accuracy with [J]'s window less that with `{REFERENCE}`: {interval(overall, 1)} "
            f"over all networks; it is significantly better in {_named(better, cells)} of {cells} cells of the tables "
            f"and worse in {_named(worse, cells)}."
        )
        order = sorted(means, key=lambda label: -means[label])
        listed = ", ".join(f"{label} {100 * means[label]:.1f} %" for label in order)
        sentences.append(f"Mean accuracies where all were tried: {listed}.")
        by_depth = [
            (layers, max(rows, key=lambda label: rows[label]), rows)
            for layers in trained.depths("Adam", neuron)
            if (rows := trained.means(neuron, ("Adam", layers)))
        ]
        best = ", ".join(
            f"{label} with {layers} layers ({100 * rows[label]:.1f} %)" for layers, label, rows in by_depth
        )
        sentences.append(f"Best under Adam: {best}.")
        if neuron == "qif":
            sentences.append(_on_default(trained, order))
    return sentences


def _on_default(trained: Trainings, order: Sequence[str]) -> str:
    """Every surrogate against the default, the most accurate first."""
    parts, gains = [], []
    for label in order:
        if label == DEFAULT:
            continue
        better, worse, cells = trained.verdicts("qif", DEFAULT, label)
        parts.append(f"{label} better in {_named(better, cells)} and worse in {_named(worse, cells)} of {cells} cells")
        gains += [f"`{label}`"] if better and not worse else []
    text = f"Against the default, `{DEFAULT}`: {'; '.join(parts)}."
    if gains:
        return f"{text} Better somewhere and significantly worse nowhere: {', '.join(gains)}."
    return f"{text} None is better somewhere without being worse elsewhere, so `{DEFAULT}` stays the default."


def _on_mismatch(compared: Comparisons) -> list[str]:
    """Sentences on the gradients, over the networks where every surrogate's is resolved."""
    sentences = []
    for neuron in reversed(NEURONS):
        found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {label: {} for label in SURROGATES}
        for row in compared.find(part="hidden", detach_reset=False):
            if row["column"][0] == neuron:
                found[row["surrogate"]][row["column"], row["seed"], row["state"], row["noise"]] = row
        keys = set.intersection(*(set(rows) for rows in found.values()))
        if not keys:
            continue
        closer = sum(found["paper"][key]["cosine"] > found[REFERENCE][key]["cosine"] for key in keys)
        means = ", ".join(
            f"{label} {fmean(rows[key]['cosine'] for key in keys):.2f} "
            f"(× {geometric_mean([rows[key]['ratio'] for key in keys]):.2g}; "
            f"{fmean(rows[key]['plain_cosine'] for key in keys):.2f})"
            for label, rows in found.items()
        )
        sentences.append(
            f"**Gradients, {neuron.upper()}:** [J]'s window is closer to the true gradient than `{REFERENCE}` in "
            f"{closer} of {len(keys)} comparisons; mean cosine (norm ratio; cosine of the gradient without noise): "
            f"{means}."
        )
    return sentences


def _named(cells: Sequence[str], of: int) -> str:
    return f"{len(cells)}" + (f" ({'; '.join(cells)})" if 0 < len(cells) < of else "")


def _variant(setting: Setting) -> str:
    which = setting["optimizer"], setting["lr"], setting["detach_reset"]
    return next(name for name, value in VARIANTS.items() if value == which)


def _label(setting: Setting) -> str:
    which = setting["surrogate"], setting["surrogate_width"]
    return next(label for label, value in SURROGATES.items() if value == which)


def _draw(trained: Trainings, compared: Comparisons, path: Path) -> None:
    """Accuracy and cosine against depth, a column for each neuron."""
    with figure(path, (10, 7), dpi=110) as drawn:
        panels = drawn.subplots(2, 2, sharex=True, sharey="row")
        for column, neuron in enumerate(NEURONS):
            for index, label in enumerate(SURROGATES):
                style: dict[str, Any] = {
                    "label": label, "color": COLOURS[index % len(COLOURS)], "marker": "os^Dv*P"[index], "capsize": 3,
                    "linestyle": "-" if label == "paper" or label.startswith("unbiased") else "--",
                }  # fmt: skip
                depths = trained.depths("Adam", neuron)
                values = {d: [100 * v for v in trained.values(("Adam", neuron, d, label))] for d in depths}
                _errorbar(panels[0, column], values, style)
                cosines = {
                    layers: [
                        row["cosine"]
                        for row in compared.find(
                            column=(which, layers), surrogate=label, part="hidden", detach_reset=False,
                            state="trained", noise=NOISES[0],
                        )
                    ]
                    for which, layers in sorted(compared.networks)
                    if which == neuron
                }  # fmt: skip
                _errorbar(panels[1, column], cosines, style)
            panels[0, column].set_title(f"{neuron.upper()}, Adam")
            panels[1, column].set_xlabel("layers")
            for row in (0, 1):
                panels[row, column].grid(alpha=0.3)
        panels[0, 0].set_ylabel("test accuracy (%)")
        panels[1, 0].set_ylabel(f"cosine to the true gradient\n(trained, σ = {NOISES[0]:g})")
        panels[0, 0].legend(loc="lower left")


def _errorbar(axes: Any, values: dict[int, list[float]], style: dict[str, Any]) -> None:
    points = [(x, fmean(v), deviation(v) if len(v) > 1 else 0.0) for x, v in values.items() if v]
    if points:
        x, y, spread = zip(*points, strict=True)
        axes.errorbar(x, y, spread, **style)
