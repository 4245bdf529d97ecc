"""Comparison of LIF and QIF whose hyperparameters are searched alike: ``qif exact compare``.

A comparison has three parts, each the same for every neuron:

    search    Optuna's TPE sampler proposes settings from one space. Each trial trains on four fifths of the training
              set and is judged by its accuracy on the last fifth. The test set is not used.
    confirm   The best trials are trained with further seeds, and the best on average is chosen.
    test      The chosen settings are trained on the whole training set, with seeds that no search used, and measured
              on the test set.

Every finished run is recorded at once, and recorded runs are not done again: a comparison that was killed continues
where it was.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...exact.adjoint import EventBudgetError
from ...exact.initialisation import InactiveError
from ..figures import colours_of, deviation, figure, integer_ticks, legend_below
from ..records import Records, Result, Setting, Trial
from ..training import NonFiniteError
from ..tuning import search
from .data import SpikeData, load, select
from .settings import DEFAULTS, TIMED, Settings
from .train import build, fit

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST_SPIKES = 200
"""Spikes in a sample, for each neuron of the largest hidden layer, at which a run counts as failed."""

TEST_SEEDS = 100
"""The first seed of the test; the search and its confirmation count up from 0."""


_SETTING = {"part": str, "neuron": str, "number": int, "seed": int, "sampled": {str: (float, str)}}
_RESULT = {"accuracy": float, "history": [{"silent": float, "unanswered": float, "accuracy": float, str: float}]}


@dataclass(frozen=True)
class Comparison:
    """The task and the networks of a comparison.

    Attributes:
        dataset: One of :data:`~qif_plugins.experiments.exact.settings.DATA_SETS`.
        root: Folder of ``"shd"`` or of the recordings.
        limit: Samples of the training and of the test set at most; ``None``: all.
        hidden: Sizes of the hidden layers.
        recurrent: Whether hidden layers are recurrent.
        epochs: Epochs of every run.
        batch: Samples in a batch of every run.
        split: Test samples of spoken digits, see :func:`~qif_plugins.experiments.exact.data.load`.
    """

    dataset: str = "digits"
    root: str | None = None
    limit: int | None = None
    hidden: tuple[int, ...] = (100,)
    recurrent: bool = False
    epochs: int = 8
    batch: int = 50
    split: str = "speaker"

    def entries(self) -> dict[str, Any]:
        """Return all attributes in plain JSON values."""
        return {**asdict(self), "hidden": list(self.hidden)}

    def settings(self, neuron: str, params: Mapping[str, Any], seed: int) -> Settings:
        """Make the settings of a run of ``neuron`` with ``params`` from :func:`space`."""
        base = Settings(**{**DEFAULTS[self.dataset], "neuron": neuron, "recurrent": self.recurrent})
        base = replace(base, epochs=self.epochs, batch=self.batch, hidden=self.hidden, seed=seed)
        chosen = replace(base, **params, max_spikes=MOST_SPIKES * max(self.hidden, default=10))
        if "latest" in params:
            chosen = replace(chosen, latest=chosen.latest * chosen.duration)
        return replace(chosen, scale=chosen.scale * chosen.tau) if chosen.loss == "first" else chosen


def space(dataset: str) -> dict[str, BaseDistribution]:
    """Define the search space, which is the same for every neuron.

    Args:
        dataset: One of :data:`~qif_plugins.experiments.exact.settings.DATA_SETS`.

    Returns:
        Distributions by name. ``latest`` is a fraction of ``duration``, and ``scale`` with the loss ``"first"`` is in
        units of ``tau``. Images have no unit of time, so their trial length is searched at tau 1; recorded events have
        one, and tau is searched up to 2.5 trial lengths, the range that the code of arXiv 2606.03935's authors has for
        theta neurons (github.com/carlowenig/spikegd-carlo). Their constant current of 5/4 is a theta neuron's here,
        and such neurons do not read ``rate``.

    Raises:
        ImportError: Optuna is missing.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution
    except ImportError as error:
        raise ImportError("the search needs Optuna: pip install 'qif-plugins[study]'") from error
    if dataset in TIMED:
        longest = 2.5 * DEFAULTS[dataset]["duration"]
        timing: dict[str, BaseDistribution] = {"tau": FloatDistribution(0.02, longest, log=True)}
    else:
        timing = {"duration": FloatDistribution(0.5, 8, log=True), "latest": FloatDistribution(0.2, 1)}
    return {
        **timing,
        "loss": CategoricalDistribution(("first", "count")),
        "scale": FloatDistribution(0.02, 2, log=True),
        "rate": FloatDistribution(0.3, 5, log=True),
        "pseudo_scale": FloatDistribution(0.1, 30, log=True),
        "lr": FloatDistribution(1e-4, 1e-1, log=True),
        "clip": FloatDistribution(1e-2, 1e2, log=True),
    }


def validation_split(data: SpikeData) -> SpikeData:
    """Divide the training set into four fifths to train on and a fifth to test on, the same in every call.

    Raises:
        ValueError: One of the parts would be empty.
    """
    count = len(data.train_labels)
    held_out = round(count / 5)
    if not 0 < held_out < count:
        raise ValueError(f"{count} samples to train are too few to hold out a fifth of them for validation")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
    kept, rest = order[held_out:], order[:held_out]
    return SpikeData(
        select(data.train, kept), data.train_labels[kept], select(data.train, rest), data.train_labels[rest],
        data.classes,
    )  # fmt: skip


class Runs(Records):
    """The finished runs of a comparison.

    Args:
        path: The file, see :class:`~qif_plugins.experiments.records.Records`.
        comparison: The comparison that the runs belong to.

    Raises:
        ValueError: The file holds runs of another comparison, or no runs at all.
    """

    def __init__(self, path: Path, comparison: Comparison) -> None:
        super().__init__(path, _SETTING, _RESULT, "not a file of 'qif exact compare'")
        self.comparison = comparison
        for trial in self:
            for name, value in comparison.entries().items():
                if trial.setting.get(name) != value:
                    raise ValueError(
                        f"{path} holds runs with {name}={trial.setting.get(name)}, not {value}; pass another --out, or "
                        "the same options to continue"
                    )

    def of(self, part: str, neuron: str, **entries: Any) -> list[Trial]:
        """Return the runs of ``"search"``, ``"confirm"`` or ``"test"`` in order; ``entries`` are further settings.

        A setting has the trial's number, its seed, and its hyperparameters as ``"sampled"``. A result has accuracy and
        history, and, for a run that failed, the reason as ``"failed"``.
        """
        return self.matching({"part": part, "neuron": neuron, **entries})


def compare(
    runs: Runs, neurons: Sequence[str] = ("lif", "qif"), trials: int = 40, finalists: int = 5, confirmations: int = 2,
    seeds: int = 5, report: Callable[[Trial], None] = lambda run: None,
) -> None:  # fmt: skip
    """Run everything that is not recorded in ``runs`` yet, and record it there.

    Args:
        runs: The finished runs.
        neurons: Names of the neurons.
        trials: Trials of the search for each neuron.
        finalists: Number of best trials that are trained again.
        confirmations: Further seeds for each of them.
        seeds: Seeds of the test.
        report: Called with every run once it is done.

    Raises:
        ImportError: Optuna is missing.
        FileNotFoundError: The data set's files are missing.
    """
    comparison = runs.comparison
    root = None if comparison.root is None else Path(comparison.root)

    @lru_cache(maxsize=1)
    def whole(duration: float, latest: float) -> SpikeData:
        return load(comparison.dataset, duration, latest, root, comparison.limit, comparison.split)

    def run(setting: Setting) -> None:
        if setting in runs:
            return
        began = time.process_time()
        settings = comparison.settings(setting["neuron"], setting["sampled"], setting["seed"])
        data = whole(settings.duration, settings.latest)
        result = _train(settings, data if setting["part"] == "test" else validation_split(data))
        report(runs.add(setting, result, time.process_time() - began))

    for trial in range(trials):
        for neuron in neurons:
            common = {**comparison.entries(), "part": "search", "neuron": neuron, "seed": 0}
            run(search(space(comparison.dataset), common, lambda values: {}, runs, trial + 1)[-1])
    for neuron in neurons:
        for best in _best_first(runs, neuron)[:finalists]:
            for seed in range(1, confirmations + 1):
                run({**best.setting, "part": "confirm", "seed": seed})
    for seed in range(TEST_SEEDS, TEST_SEEDS + seeds):
        for neuron in neurons:
            run({**chosen(runs, neuron).setting, "part": "test", "seed": seed})


def chosen(runs: Runs, neuron: str) -> Trial:
    """Choose the trial with the best mean validation accuracy among the confirmed ones, or among all if none is."""
    ranked = _best_first(runs, neuron)
    confirmed = [trial for trial in ranked if runs.of("confirm", neuron, number=trial.setting["number"])]
    return max(confirmed or ranked, key=lambda trial: validation(runs, trial))


def validation(runs: Runs, trial: Trial) -> float:
    """Average the validation accuracy of a trial over its seeds."""
    again = runs.of("confirm", trial.setting["neuron"], number=trial.setting["number"])
    return statistics.fmean(run.result["accuracy"] for run in (trial, *again))


def _best_first(runs: Runs, neuron: str) -> list[Trial]:
    return sorted(runs.of("search", neuron), key=lambda trial: -trial.result["accuracy"])


def _train(settings: Settings, data: SpikeData) -> Result:
    """Train, and return the final accuracy (0 if the run failed), the history and the reason of a failure."""
    history: list[dict[str, float]] = []
    result: Result = {}
    try:
        fit(build(settings, data.train.channels, data.classes), data, settings, history.append)
    except (EventBudgetError, InactiveError, NonFiniteError) as error:
        result["failed"] = str(error)
    accuracy = 0.0 if "failed" in result else history[-1]["accuracy"]
    return {**result, "accuracy": accuracy, "history": history}


def summarise(runs: Runs, neurons: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Summarise a finished comparison by neuron.

    Returns:
        For each its settings, the validation accuracy that chose them, how many of the trials failed and the median
        accuracy of all, the test accuracies with mean and sample standard deviation, and over epochs and seeds of the
        test the silent neurons (mean at the start, at the end and at the worst epoch), and the gradient's norm (mean
        over epochs and seeds; largest batch over mean, the median of epochs and seeds).
    """
    summary = {}
    for neuron in neurons:
        best, trials = chosen(runs, neuron), [trial.result for trial in runs.of("search", neuron)]
        tests = [run.result for run in runs.of("test", neuron, number=best.setting["number"])]
        sound = [result["history"] for result in tests if "failed" not in result]
        epochs = [row for history in sound for row in history[1:]]
        accuracies = [result["accuracy"] for result in tests]
        summary[neuron] = {
            "params": best.setting["sampled"],
            "validation": validation(runs, best),
            "trials": len(trials),
            "trials failed": sum("failed" in result for result in trials),
            "trials median": statistics.median(result["accuracy"] for result in trials),
            "trials above 0.9": sum(result["accuracy"] > 0.9 for result in trials),
            "test": accuracies,
            "test mean": statistics.fmean(accuracies),
            "test deviation": deviation(accuracies),
            "silent at first": _mean(history[0]["silent"] for history in sound),
            "silent at last": _mean(history[-1]["silent"] for history in sound),
            "silent at worst": _mean(max(row["silent"] for row in history) for history in sound),
            "unanswered at last": _mean(history[-1]["unanswered"] for history in sound),
            "gradient": _mean(row["grad_norm"] for row in epochs),
            "gradient largest over mean": statistics.median(
                [row["grad_norm_max"] / row["grad_norm"] for row in epochs if row["grad_norm"]] or [0.0]
            ),
            "seconds an epoch": _mean(row["seconds"] for row in epochs),
        }
    return summary


def _mean(values: Any) -> float:
    listed = list(values)
    return statistics.fmean(listed) if listed else 0.0


def draw(runs: Runs, neurons: Sequence[str], path: Path) -> None:
    """Draw the trials' accuracies, and the test's error, silent neurons and gradient norms by epoch.

    Bands reach from the least to the largest value over seeds; the dotted line is the largest gradient of a batch.
    """
    with figure(path, (14, 3.4), dpi=130) as drawn:
        axes = drawn.subplots(1, 4)
        _draw(runs, neurons, axes)
        legend_below(drawn, axes[0])


def _draw(runs: Runs, neurons: Sequence[str], axes: Any) -> None:
    for neuron, colour in colours_of(neurons).items():
        trials = [trial.result["accuracy"] for trial in _best_first(runs, neuron)]
        axes[0].plot(range(1, len(trials) + 1), trials, ".-", color=colour, label=neuron.upper())
        tests = runs.of("test", neuron, number=chosen(runs, neuron).setting["number"])
        histories = [run.result["history"] for run in tests if "failed" not in run.result]
        for axis, name, style in (
            (axes[1], "accuracy", ".-"), (axes[2], "silent", ".-"), (axes[3], "grad_norm", ".-"),
            (axes[3], "grad_norm_max", ".:"),
        ):  # fmt: skip
            rows = np.array([[row.get(name, math.nan) for row in history] for history in histories])
            rows = 1 - rows if name == "accuracy" else rows[:, 1:] if name.startswith("grad") else rows
            if not rows.size:
                continue
            epochs = np.arange(runs.comparison.epochs + 1)[-rows.shape[1] :]
            axis.plot(epochs, rows.mean(0), style, color=colour, label=neuron.upper() if style == ".-" else None)
            if style == ".-":
                axis.fill_between(epochs, rows.min(0), rows.max(0), color=colour, alpha=0.2, linewidth=0)
    axes[0].set(title="search", xlabel="trial, best first", ylabel="validation accuracy", ylim=(0, 1))
    axes[1].set(title="test error", xlabel="epoch", yscale="log")
    axes[2].set(title="silent hidden neurons", xlabel="epoch", ylim=(0, None))
    axes[3].set(title="gradient norm (dotted: largest)", xlabel="epoch", yscale="log")
    for axis in axes:
        integer_ticks(axis.xaxis)
