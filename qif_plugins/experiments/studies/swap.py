"""Study 6: small published LIF networks, each against the same network after ``swap``, trained alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import swap
from ...convert.trial import reset_state
from ...diagnostics.running import preserved
from ...diagnostics.spiking import spiking_layers
from ...support.names import check_known
from ...support.text import mean_pm
from ..figures import plot_differences
from ..records import Records, Result, Setting, Trial, by_seed
from ..training.firing import FiringRates
from . import networks
from .page import Body, table
from .runner import Options
from .stats import LEVEL, Difference, Interval, adjusted, difference, ends, interval, p_text, paired

TITLE = "Swapped networks"
QUESTION = (
    "Does a network of LIF neurons train as well after `swap(model)`, with nothing else changed? Small versions of "
    "networks that people publish, in both hosts, each with the optimizer, learning rate and loss of its LIF version."
)

ARMS: dict[str, dict[str, Any] | None] = {
    "lif": None,
    "default": {},
    "paper": {"dynamics": "paper", "window": "paper"},
    "matched": {"dynamics": "lif", "window": "keep"},
    "isometric": {"dynamics": "lif", "window": "isometric"},
}
"""Arguments of ``swap`` by arm; ``None`` leaves the network LIF."""
QUICK = ("perceptron 2, tdBN", "snnTorch recurrent")
"""Networks of the quick version."""
TEST_BATCH = 250

Results = dict[tuple[str, str, float], dict[int, Result]]
"""By network, arm and factor on the learning rate, then by seed."""


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a training for every network, arm, learning rate and seed; all networks of a seed come first.

    Raises:
        ValueError: An unknown network or arm.
    """
    names = options.networks or (QUICK if options.quick else tuple(networks.NETWORKS))
    check_known("network", networks.NETWORKS, *names)
    check_known("arm", ARMS, *options.arms)
    return [
        {
            "network": name, "arm": arm, "lr": networks.NETWORKS[name].lr * factor, "factor": factor, "seed": seed,
            "epochs": 1 if options.quick else networks.NETWORKS[name].epochs,
            "samples": 128 if options.quick else networks.NETWORKS[name].samples,
        }
        for seed in options.seeds_of(5)
        for factor in options.factors
        for arm in dict.fromkeys(("lif", *options.arms))
        for name in names
    ]  # fmt: skip


def run(setting: Setting) -> Result:
    """Train a network, swapped before unless its arm is ``"lif"``.

    Returns:
        ``accuracy`` on the test data after the last epoch (of a regression the share of the variance that is
        explained), ``loss`` of the last epoch, ``rate``: spikes per neuron-step of each layer in the first batch, and
        ``swapped``: number of neurons that were. ``diverged`` where the loss stopped being finite.
    """
    network = networks.NETWORKS[setting["network"]]
    torch.manual_seed(setting["seed"])
    model = network.build()
    x, y, test_x, test_y = networks.data(network, setting["samples"])
    arguments = ARMS[setting["arm"]]
    swapped = 0
    if arguments is not None:
        report = swap(model, example_input=network.sequence(x[:8]), **arguments)
        swapped = len(report.changed)
    rates = _rates(model, network.sequence(x[: network.batch]))
    optimizer: Any = network.optimizer(model.parameters(), lr=setting["lr"])
    shuffled = torch.Generator().manual_seed(setting["seed"])
    loss = torch.zeros(())
    for _ in range(setting["epochs"]):
        model.train()
        losses = []
        for index in torch.randperm(len(x), generator=shuffled).split(network.batch):
            if len(index) < 2:
                continue  # a batch norm needs two samples
            reset_state(model)
            loss = network.loss(model(network.sequence(x[index])), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        if not loss.isfinite():
            break
    found = {"accuracy": _score(model, network, test_x, test_y), "loss": loss.item(), "rate": rates, "swapped": swapped}
    return found if loss.isfinite() else {**found, "loss": None, "diverged": True}


@torch.no_grad()
def _rates(model: nn.Module, x: Tensor) -> list[float]:
    """Spikes per neuron-step of each layer that spikes, in training mode; the model stays as it was."""
    rates = FiringRates(spiking_layers(model))
    with preserved(model), rates.measuring():
        model.train()
        reset_state(model)
        model(x)
    return list(rates.rates().values())


@torch.no_grad()
def _score(model: nn.Module, network: networks.Network, x: Tensor, y: Tensor) -> float:
    model.eval()
    outputs = []
    for part in x.split(TEST_BATCH):
        reset_state(model)
        outputs.append(model(network.sequence(part)))
    return network.score(torch.cat(outputs, 1), y)


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up accuracies, paired differences and firing rates, and draw the differences."""
    results: Results = by_seed(trials, lambda setting: (setting["network"], setting["arm"], setting["factor"]))
    names = list(dict.fromkeys(trial.setting["network"] for trial in trials))
    variants = list(dict.fromkeys((arm, factor) for _, arm, factor in results if arm != "lif"))
    main = next((v for v in (("default", 1.0), *variants) if v in variants), ("default", 1.0))
    differences = {
        (arm, factor): {
            name: each
            for name in names
            if (each := difference(results.get((name, "lif", factor), {}), results.get((name, arm, factor), {})))
        }
        for arm, factor in variants
    }
    drawn = {
        _label(*variant): {name: each.interval for name, each in by_name.items()}
        for variant, by_name in differences.items()
    }
    plot_differences(picture, names, drawn, _label(*main))
    found = differences.get(main, {})
    header = [
        "", "LIF, %", "swapped, %", "difference, points", "95 % interval", "p (Holm)", "spikes a neuron-step, LIF",
        "swapped",
    ]  # fmt: skip
    p_values = adjusted(found)
    rows = [
        [
            name, *(_accuracy(results, name, arm, main[1]) for arm in ("lif", main[0])),
            *_difference_cells(found.get(name), p_values.get(name)),
            *(_rate(results, name, arm, main[1]) for arm in ("lif", main[0])),
        ]
        for name in names
    ]  # fmt: skip
    over = _over_networks(found)
    if over is not None:
        rows.append(["mean over networks", "–", "–", f"{100 * over[0]:+.2f}", ends(over), "–", "–", "–"])
    sections = [table(header, rows)]
    if others := [variant for variant in variants if variant != main]:
        sections += [
            "Differences from LIF at the same learning rate, in points, of the other arms and learning rates.",
            table(["", *(_label(*variant) for variant in others)], _other_rows(differences, names, others)),
        ]
    method = (
        "The networks are in `qif_plugins/experiments/studies/networks.py`, with data, optimizer, learning rate and "
        "loss of each: small versions of SpikingJelly's zoo and tutorials and of snnTorch's tutorials, on "
        "scikit-learn's digits and on mnist5k, or on their rows one after the other. Both networks of a seed start "
        "from the same weights and see the same batches. `swap` gets `example_input`, so that it follows the data, and "
        f"further arguments by arm: {'; '.join(_arguments(arm) for arm in dict.fromkeys(a for a, _ in variants))}. "
        "Accuracy is that after the last epoch; of the regression, the share of the variance that is explained. "
        "Firing rates are the mean over layers in the first batch before training. Intervals are Student's over the "
        "differences by seed, each for its own network; p is adjusted by Holm for the number of networks. The last "
        "row takes the networks' mean differences as a sample."
    )
    return Body(_finding(found, p_values, over, main), sections, method)


def _over_networks(found: dict[str, Difference]) -> Interval | None:
    means = [each.interval[0] for each in found.values()]
    return paired([0.0] * len(means), means) if means else None


def _finding(
    found: dict[str, Difference], p_values: dict[str, float], over: Interval | None, main: tuple[str, float]
) -> str:
    if over is None:
        return "No network has been trained with LIF and swapped yet."
    lost, won = (
        [n for n, p in p_values.items() if p < 1 - LEVEL and found[n].interval[0] * side > 0] for side in (-1, 1)
    )  # fmt: skip
    tested = sum(not math.isnan(p) for p in p_values.values())
    by_network = (
        f"Significantly worse than LIF after Holm's adjustment: {len(lost)} of {tested}{_named(lost)}; significantly "
        f"better: {len(won)}{_named(won)}."
        if tested
        else "One seed allows no conclusion on a single network."
    )
    return (
        f"Accuracy of swapped networks ({_label(*main)}) relative to LIF, mean over {len(found)} networks: "
        f"{interval(over)}. {by_network}"
    )


def _named(names: Sequence[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def _label(arm: str, factor: float) -> str:
    return arm if factor == 1 else f"{arm}, rate × {factor:.3g}"


def _arguments(arm: str) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in (ARMS[arm] or {}).items())
    return f"{arm} {f'`{given}`' if given else 'none'}"


def _accuracy(results: Results, name: str, arm: str, factor: float) -> str:
    return mean_pm([result["accuracy"] for result in results.get((name, arm, factor), {}).values()], ".1f", 100)


def _rate(results: Results, name: str, arm: str, factor: float) -> str:
    rates = [fmean(r["rate"]) for r in results.get((name, arm, factor), {}).values() if r["rate"]]
    return f"{fmean(rates):.3f}" if rates else "–"


def _difference_cells(found: Difference | None, p: float | None) -> list[str]:
    return ["–"] * 3 if found is None else [f"{100 * found.interval[0]:+.1f}", ends(found.interval, 1), p_text(p)]


def _other_rows(
    differences: dict[tuple[str, float], dict[str, Difference]], names: Sequence[str],
    others: Sequence[tuple[str, float]],
) -> list[list[str]]:  # fmt: skip
    rows = [
        [name, *(_difference_cells(differences[variant].get(name), None)[0] for variant in others)] for name in names
    ]
    means = [_over_networks(differences[variant]) for variant in others]
    return [*rows, ["mean over networks", *("–" if m is None else f"{100 * m[0]:+.2f} ({ends(m)})" for m in means)]]
