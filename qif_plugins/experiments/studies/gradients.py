"""Compare surrogate gradients with the true one at a network, before and after it is trained.

The true gradient is that of the noise-smoothed loss, estimated without bias, see :mod:`.mismatch`. This is the second
kind of trial of the study of :mod:`.windows`, with its tables.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ...convert.trial import reset_state
from ...diagnostics.spiking import spiking_layers
from ...support.text import mean_pm
from ..records import Result, Setting, Trial
from .mismatch import SmoothedLoss, agreement, changed_inputs
from .page import table
from .trial import data_of, make, outputs, train

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
NOISES = (0.25, 0.5)
STATES = ("initial", "trained")
METHOD = (
    "At networks of 64 neurons a layer on digits (16 test images), freshly drawn and trained with `heuristic 1`, the "
    "surrogate gradient of the hidden layers, averaged over noise of deviation σ on every neuron's charge at every "
    "step, beside an unbiased likelihood-ratio estimate of the gradient of the loss averaged over the same noise "
    "(`qif_plugins.experiments.studies.mismatch`). Each cell: cosine, then norm of the surrogate gradient over that of "
    "the true one, mean ± deviation over seeds. A network counts where the estimate resolves both gradients (squared "
    "norms above three times their standard errors); a dash stands where no seed does, a number in brackets says how "
    "many do."
)


def compare_gradients(setting: Setting) -> Result:
    """Compute cosine and norm ratio of every surrogate's gradient at one network, before and after training it."""
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

    def smoothed(model: nn.Module) -> SmoothedLoss:
        neurons = list(spiking_layers(model).values())
        return SmoothedLoss(_forward(model, setting["steps"]), neurons, _hidden(model), x, labels, _losses, noise)

    true = smoothed(network).score_gradients(setting["repeats"], setting["replicates"], generator)
    first = _hidden(network)[0].numel()
    rows = []
    for label, detach in itertools.product(setting["compared"], (False, True)):
        surrogate, width = SURROGATES[label]
        model = make({**setting, "surrogate": surrogate, "surrogate_width": width, "detach_reset": detach})
        model.load_state_dict(network.state_dict())
        model.eval()
        for neuron in spiking_layers(model).values():
            neuron.train()  # in evaluation mode SpikingJelly 0.0.0.0.14's pass no gradient
        repeats = max(2, setting["repeats"] // 20)
        averaged = smoothed(model).surrogate_gradients(repeats, setting["replicates"], generator)
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
    """Set the norms' running statistics to those of these samples under this noise; switch to evaluation mode."""
    torch.manual_seed(setting["seed"])
    reset_state(network)
    with changed_inputs(spiking_layers(network).values(), lambda x_seq: x_seq + noise * torch.randn_like(x_seq)):
        update_bn([x.repeat(20, 1).expand(setting["steps"], -1, -1)], network)
    network.eval()


def _hidden(model: nn.Module) -> list[Tensor]:
    """List the hidden layers' parameters, the first layer's weights first; the readout's need no surrogate."""
    return list(model.get_submodule("hidden").parameters())


def _forward(model: nn.Module, steps: int) -> Callable[[Tensor], Tensor]:
    return lambda x: outputs(model, x, steps)


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores, labels, reduction="none")


class Comparisons:
    """Finished comparisons of gradients, by network and surrogate."""

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
        """List the resolved comparisons with these entries."""
        return [
            row for row in self.rows if row["resolved"] and all(row[name] == value for name, value in wanted.items())
        ]

    def tables(self) -> list[str]:
        """Return tables of cosine and ratio, and of what the reset, the depth of the layer and the noise change."""
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
            "Mean cosine over all resolved networks, of the hidden layers, of the first layer alone, of the hidden "
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

    def common(self, neuron: str) -> dict[str, list[dict[str, Any]]]:
        """List by surrogate the comparisons of hidden layers where every surrogate's gradient is resolved, in order."""
        found: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {label: {} for label in SURROGATES}
        for row in self.find(part="hidden", detach_reset=False):
            if row["column"][0] == neuron:
                found[row["surrogate"]][row["column"], row["seed"], row["state"], row["noise"]] = row
        keys = sorted(set.intersection(*(set(rows) for rows in found.values())))
        return {label: [rows[key] for key in keys] for label, rows in found.items()}

    def _means(self, neuron: str, label: str) -> list[str]:
        def mean(name: str, **wanted: Any) -> str:
            return mean_of([r for r in self.find(surrogate=label, **wanted) if r["column"][0] == neuron], name)

        return [
            mean("cosine", part="hidden", detach_reset=False),
            mean("cosine", part="first", detach_reset=False),
            mean("cosine", part="hidden", detach_reset=True),
            mean("plain_cosine", part="hidden", detach_reset=False),
        ]


def mean_of(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Format the mean of an entry of comparisons; a dash without any."""
    return f"{fmean(row[name] for row in rows):.2f}" if rows else "–"
