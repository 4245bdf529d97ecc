"""Study 5: LIF against QIF, each after the same number of trials of the same search."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...support.text import mean_pm
from ..figures import COLOURS, errorbars, figure
from ..records import Records, Result, Setting, Trial
from ..tuning import search
from .page import Body, table
from .runner import Options
from .stats import interval, paired, sign, welch
from .trial import perceptrons, train

try:
    import optuna
except ImportError as error:
    raise ImportError("the budget study needs optuna: pip install 'qif-plugins[study]'") from error

TITLE = "LIF against QIF at equal budget"
QUESTION = (
    "Both neurons are tuned alike, with the same number of trials over the same ranges; the best setting of each is "
    "then trained anew with seeds that the search has not used, on all training images. Which is more accurate on the "
    "test images, which no trial of the search has seen?"
)

NEURONS = ("lif", "qif")
STARTUP = 8
"""Trials that are drawn at random before the sampler models their results."""
FINAL_SEED = 100
"""First seed of the final trainings; the search uses 0."""
VERDICTS = {1: "QIF is more accurate", 0: "the two cannot be told apart", -1: "LIF is more accurate"}


def space(neuron: str) -> dict[str, optuna.distributions.BaseDistribution]:
    """Define the search space: seven dimensions for each neuron, six of which both share."""
    d = optuna.distributions
    return {
        "lr": d.FloatDistribution(3e-4, 2e-2, log=True),
        "weight_decay": d.FloatDistribution(1e-5, 1e-1, log=True),
        "surrogate": d.CategoricalDistribution(("unbiased", "heuristic", "atan", "paper")),
        "surrogate_width": d.FloatDistribution(0.5, 2.0, log=True),
        "detach_reset": d.CategoricalDistribution((False, True)),
        "tau": d.FloatDistribution(1.1, 4.0, log=True),
        **(
            {"decay_input": d.CategoricalDistribution((False, True))}
            if neuron == "lif"
            else {"dynamics": d.CategoricalDistribution(("paper", "lif", "lif, decayed input"))}
        ),
    }


def plan(options: Options, done: Records) -> list[Setting]:
    """List each neuron's trials so far and the next; once its search is over, the final trainings of the best."""
    trials = 3 if options.quick else 30
    settings = []
    for neuron in NEURONS:
        common = {
            "kind": "search", "validation": True, "seed": 0, "neuron": neuron, "layers": 2 if options.quick else 3,
            **perceptrons(options.quick),
        }  # fmt: skip
        searched = search(space(neuron), common, partial(_as_setting, neuron), done, trials, STARTUP)
        settings += searched
        finished = [trial for trial in map(done.get, searched) if trial is not None]
        if len(finished) == trials:
            best = _best(finished).setting
            kept = {name: value for name, value in best.items() if name not in ("kind", "number", "validation", "seed")}
            settings += [
                {"kind": "final", "validation": False, "seed": FINAL_SEED + seed, **kept}
                for seed in options.seeds_of(10, quick=2)
            ]
    return settings


def run(setting: Setting) -> Result:
    """Train a network."""
    return train(setting)


def _as_setting(neuron: str, values: dict[str, Any]) -> Setting:
    """Convert sampled values to entries of a setting, see :func:`~qif_plugins.experiments.studies.trial.train`."""
    setting = {name: value for name, value in values.items() if name not in ("tau", "decay_input", "dynamics")}
    if neuron == "lif":
        setting["neuron_args"] = {"tau": values["tau"], "decay_input": values["decay_input"]}
    elif values["dynamics"] == "paper":
        setting["neuron_args"] = {"dynamics": "paper"}
    else:
        setting["neuron_args"] = {"tau": values["tau"], "decay_input": values["dynamics"] == "lif, decayed input"}
    return setting


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: trial.result["accuracy"])


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the final accuracies with their intervals, the settings found, and the course of the search."""
    search = {n: [t for t in trials if t.setting["neuron"] == n and t.setting["kind"] == "search"] for n in NEURONS}
    final = {n: [t for t in trials if t.setting["neuron"] == n and t.setting["kind"] == "final"] for n in NEURONS}
    _draw(search, final, picture)
    accuracies = {n: [trial.result["accuracy"] for trial in final[n]] for n in NEURONS}
    rows = [
        [
            n.upper(), mean_pm(accuracies[n], ".2f", 100), str(len(final[n])),
            mean_pm([t.result["rate"] for t in final[n] if "rate" in t.result], ".3f"),
            f"{100 * _best(search[n]).result['accuracy']:.2f}" if search[n] else "–", str(len(search[n])),
        ]
        for n in NEURONS
    ]  # fmt: skip
    names = list(dict.fromkeys(name for n in NEURONS for name in space(n)))
    found = [
        [n.upper(), *(_value(_best(search[n]).setting["sampled"].get(name)) for name in names)]
        for n in NEURONS
        if search[n]
    ]
    sections = [
        table(["", "test accuracy, %", "seeds", "spikes a neuron-step", "best validation accuracy, %", "trials"], rows),
        "The settings found:",
        table(["", *names], found),
    ]
    if all(len(accuracies[n]) > 1 for n in NEURONS):
        sections.insert(1, _intervals(accuracies))
    setting = trials[0].setting
    method = (
        f"Perceptrons of {setting['layers']} layers, {setting['width']} neurons each, under tdBN on {setting['data']}, "
        f"T = {setting['steps']}, {setting['epochs']} epochs of Adam with decoupled weight decay, the learning rate "
        f"taken to 0 by a cosine. The search (Optuna's TPE, {STARTUP} trials at random first) trains on four fifths of "
        "the training images with seed 0 and is judged on the last fifth. Learning rate, weight decay, surrogate, its "
        "width, detached reset and τ have the same ranges for both; the seventh dimension is whether LIF decays its "
        "input; for QIF, whether it has the paper's parameters (which leave τ without effect), those matched to τ, or "
        "those with decayed input."
    )
    return Body(_finding(accuracies, search), sections, method)


def _intervals(accuracies: dict[str, list[float]]) -> str:
    lif, qif = accuracies["lif"], accuracies["qif"]
    same = len(lif) == len(qif)
    both = [("Welch", welch(lif, qif)), *([("paired by seed", paired(lif, qif))] if same else [])]
    return f"QIF less LIF: {'; '.join(f'{name} {interval(found)}' for name, found in both)}."


def _finding(accuracies: dict[str, list[float]], search: dict[str, list[Trial]]) -> str:
    counts = {n: len(search[n]) for n in NEURONS}
    if not all(len(accuracies[n]) > 1 for n in NEURONS):
        return f"The search is under way: {counts['lif']} trials of LIF and {counts['qif']} of QIF are done."
    found = welch(accuracies["lif"], accuracies["qif"])
    return (
        f"After {counts['lif']} trials of LIF and {counts['qif']} of QIF, {VERDICTS[sign(found)]}: LIF "
        f"{mean_pm(accuracies['lif'], '.2f', 100)} %, QIF {mean_pm(accuracies['qif'], '.2f', 100)} % over "
        f"{len(accuracies['lif'])} and {len(accuracies['qif'])} seeds, {interval(found)} by Welch."
    )


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "–" if value is None else str(value)


def _draw(search: dict[str, list[Trial]], final: dict[str, list[Trial]], path: Path) -> None:
    """Draw the best validation accuracy so far on the left, and the final test accuracies on the right."""
    with figure(path, (9, 4), dpi=110, grid=True) as drawn:
        left, right = drawn.subplots(1, 2)
        for index, neuron in enumerate(NEURONS):
            values = [100 * trial.result["accuracy"] for trial in search[neuron]]
            course = [max(values[: end + 1]) for end in range(len(values))]
            numbers = range(1, len(values) + 1)
            left.plot(numbers, values, linestyle="", marker=".", alpha=0.5, color=COLOURS[index])
            left.plot(numbers, course, color=COLOURS[index], label=neuron.upper())
            tested = [100 * trial.result["accuracy"] for trial in final[neuron]]
            right.plot([index] * len(tested), tested, linestyle="", marker="o", alpha=0.4, color=COLOURS[index])
            errorbars(right, {index + 0.15: tested}, marker="D", capsize=4, color=COLOURS[index])
        left.set(xlabel="trial of the search", ylabel="validation accuracy (%)")
        left.legend()
        right.set_xticks(range(len(NEURONS)), [neuron.upper() for neuron in NEURONS])
        right.set(xlim=(-0.5, len(NEURONS) - 0.5), ylabel="test accuracy of the best setting (%)")
