"""Study 8: accuracy against synaptic operations and energy, LIF beside QIF, on sequences that users have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy

from ...support.text import mean_pm
from ..figures import COLOURS, deviation, figure, legend_below
from ..records import Records, Result, Setting, Trial, by_seed
from . import sequences
from .page import Body, table
from .runner import Options
from .sequences import COUNTED, KINDS, available, costs_of, described, settings_of
from .stats import Interval, ends, paired, sign

TITLE = "Accuracy against spikes"
QUESTION = (
    "Which accuracy does a LIF and a QIF network reach at the same number of synaptic operations, and at the same "
    "energy? Two ways to save spikes, a penalty on firing and a higher threshold of either neuron, and QIF with LIF's "
    "surrogate show whether a difference is QIF's, its threshold's or its surrogate's."
)
CONVOLUTIONAL: dict[str, Setting] = {"nmnist": {}, "cifar10": {"steps": 2, "widths": [16, 32, 64], "epochs": 1}}
"""Data sets whose networks are convolutional, with the entries of their settings that are not those of the study of
sequences; they have every second penalty and the first two thresholds."""
FOLDERS = ("spoken-digits", *CONVOLUTIONAL)
"""Data sets that the study reads from the user's folders."""

ARMS = {
    "LIF": "LIF",
    "QIF, swap": "QIF, as `swap` gives it",
    "QIF, LIF's surrogate": "QIF with LIF's surrogate",
}
"""Arms of the study of sequences, LIF first, with their names here."""
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
THRESHOLDS = (0.5, 2.0, 4.0)
PLACES = 20
"""Places, evenly spaced on a logarithmic axis, at which two curves are compared."""
SWEEPS = {"penalty": "penalty on firing", "threshold": "threshold"}
COSTS = {"synops": "SynOps", "picojoules": "energy"}
COMPARED = [*((arm, sweep) for sweep in SWEEPS for arm in list(ARMS)[1:]), ("LIF", "threshold")]
"""Arms and sweeps that are compared with LIF of the same sweep, and LIF's thresholds, which are with its penalties."""

Key = tuple[str, str, float, float]
"""Data, arm, penalty and threshold."""
Results = dict[Key, dict[int, Result]]


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a training for every seed, penalty or threshold, and neuron.

    Raises:
        ValueError: There is neither a folder of data nor a finished trial.
    """
    penalties: list[Setting] = [{"penalty": penalty} for penalty in PENALTIES]
    thresholds: list[Setting] = [{"threshold": threshold} for threshold in THRESHOLDS]
    settings = [
        settings_of(name, arm=arm, seed=seed, **CONVOLUTIONAL.get(name, {}), **entries)
        for seed in options.seeds_of(3)
        for name in (("digits",) if options.quick else FOLDERS)
        for entries in ({}, *(penalties[::2] + thresholds[:2] if name in CONVOLUTIONAL else penalties + thresholds))
        for arm in ARMS
    ]
    return available(settings, options, done)


def run(setting: Setting, folders: Mapping[str, Path]) -> Result:
    """Train and test one network, as in the study of sequences."""
    return sequences.run(setting, folders)


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the differences at equal cost and the costs of every setting, and draw accuracy against both costs."""
    results: Results = by_seed(
        trials, lambda setting: (setting["data"], setting["arm"], setting["penalty"], setting["threshold"])
    )
    names = [name for name in KINDS if any(key[0] == name for key in results)]
    found = {
        (name, arm, sweep, cost): _at_equal_cost(results, name, arm, sweep, cost)
        for name in names
        for arm, sweep in COMPARED
        for cost in COSTS
    }
    _draw(results, names, picture)
    rows = [
        [
            f"{KINDS[name].name}, {SWEEPS[sweep]}",
            ARMS[arm] if arm != "LIF" else "LIF, less LIF with the penalty",
            *(cell for cost in COSTS for cell in _cells(found[name, arm, sweep, cost], cost)),
        ]
        for name in names
        for arm, sweep in COMPARED
    ]
    header = ["", "less LIF"]
    for what in COSTS.values():
        header += [f"at equal {what}, points", "95 % interval", f"over {what} a sample"]
    costs = [
        [
            KINDS[name].name, ARMS[arm], f"{penalty:g}", f"{threshold:g}", str(len(trained)),
            mean_pm([result["accuracy"] for result in trained], ".1f", 100), *costs_of(trained),
        ]
        for name, arm, penalty, threshold in sorted(
            results, key=lambda key: (names.index(key[0]), list(ARMS).index(key[1]), *key[2:])
        )
        for trained in (list(results[name, arm, penalty, threshold].values()),)
    ]  # fmt: skip
    header_of_costs = [
        "", "", "penalty", "threshold", "seeds", "accuracy, %", "spikes a neuron-step", "SynOps a sample",
        "MACs a sample", "nJ a sample",
    ]  # fmt: skip
    method = (
        f"{described(trials)} Feed-forward with batch norm before the neurons; QIF is what `swap` with its defaults "
        "makes of the LIF network, from the same weights, or with `window='keep'`, which leaves LIF's surrogate, ATan. "
        "The penalty is the given number times the mean over layers of the spikes a neuron-step, added to the "
        "cross-entropy; the threshold is that of the LIF neurons, which `swap` keeps, with the surrogate at it and an "
        "input gain of 1. For every seed the accuracy of each neuron is interpolated between its settings over the "
        "logarithm of the cost, and the difference averaged over the range of costs that both "
        f"have; intervals are Student's over the seeds. {COUNTED}"
    )
    return Body(_finding(found), [table(header, rows, 2), table(header_of_costs, costs, 2)], method)


def _swept(results: Results, name: str, arm: str, sweep: str) -> list[dict[int, Result]]:
    """List the results of one sweep, the setting without penalty and of threshold 1 among them."""
    return [
        found
        for (data, of_arm, penalty, threshold), found in sorted(results.items())
        if (data, of_arm) == (name, arm) and (threshold == 1 if sweep == "penalty" else penalty == 0)
    ]


def _at_equal_cost(
    results: Results, name: str, other: str, sweep: str, cost: str
) -> tuple[Interval, tuple[float, float]] | None:
    """Difference of an arm from LIF over the costs that both reach, with its interval, and the range of these costs."""
    differences, ranges = [], []
    lif = _swept(results, name, "LIF", sweep if other != "LIF" else "penalty")
    qif = _swept(results, name, other, sweep)
    for seed in sorted({seed for found in lif for seed in found}):
        curves = [
            sorted((math.log(r[cost]), r["accuracy"]) for found in of_arm if (r := found.get(seed)) and r.get(cost))
            for of_arm in (lif, qif)
        ]
        if min(map(len, curves)) < 2:
            continue
        low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
        if low < high:
            places = [low + (high - low) * place / (PLACES - 1) for place in range(PLACES)]
            differences.append(fmean(_at(curves[1], place) - _at(curves[0], place) for place in places))
            ranges.append((math.exp(low), math.exp(high)))
    if not differences:
        return None
    return paired([0.0] * len(differences), differences), (min(r[0] for r in ranges), max(r[1] for r in ranges))


def _at(curve: Sequence[tuple[float, float]], place: float) -> float:
    """Interpolate a curve linearly."""
    costs, values = zip(*curve, strict=True)
    return float(numpy.interp(place, costs, values))


def _cells(found: tuple[Interval, tuple[float, float]] | None, cost: str) -> list[str]:
    if found is None:
        return ["–"] * 3
    difference, (low, high) = found
    over = f"{low:,.0f} to {high:,.0f}" if cost == "synops" else f"{low / 1000:,.0f} to {high / 1000:,.0f} nJ"
    return [f"{100 * difference[0]:+.1f}", ends(difference, 1), over]


def _finding(found: Mapping[tuple[str, str, str, str], tuple[Interval, tuple[float, float]] | None]) -> str:
    def points(arm: str, sweep: str, cost: str) -> str:
        values = [
            f"{100 * each[0][0]:+.1f}{'*' if sign(each[0]) else ''} ({KINDS[key[0]].name})"
            for key, each in found.items()
            if key[1:] == (arm, sweep, cost) and each is not None
        ]
        return " and ".join([", ".join(values[:-1]), values[-1]] if values[1:] else values) or "not known"

    def both(arm: str, cost: str) -> str:
        return ", and ".join(f"with the {sweep} {points(arm, sweep, cost)}" for sweep in SWEEPS)

    if not any(found.values()):
        return "The study is under way: no two curves can be compared yet."
    by_cost = "; ".join(f"at equal {what}, {both('QIF, swap', cost)}" for cost, what in COSTS.items())
    return (
        f"Points of QIF's accuracy less LIF's (* where the 95 % interval excludes 0): {by_cost}. At equal SynOps QIF "
        f"with LIF's surrogate has, {both(list(ARMS)[-1], 'synops')}; LIF with higher thresholds in place of penalties "
        f"has {points('LIF', 'threshold', 'synops')}."
    )


def _draw(results: Results, names: Sequence[str], path: Path) -> None:
    """Draw accuracy against SynOps on the left and against energy on the right, a row for each data set."""
    with figure(path, (10, 1 + 3.8 * len(names)), dpi=110) as drawn:
        all_axes = drawn.subplots(len(names), 2, squeeze=False)
        for name, row in zip(names, all_axes, strict=True):
            for axes, (cost, what) in zip(row, COSTS.items(), strict=True):
                for arm, colour in zip(ARMS, COLOURS, strict=False):
                    for sweep, style in zip(SWEEPS, ("o-", "s--"), strict=True):
                        points = [
                            (
                                fmean(r[cost] for r in known) / (1 if cost == "synops" else 1000),
                                100 * fmean(r["accuracy"] for r in known),
                                100 * deviation([r["accuracy"] for r in known]),
                            )
                            for found in _swept(results, name, arm, sweep)
                            if (known := [r for r in found.values() if cost in r])
                        ]
                        if points:
                            x, y, spread = zip(*sorted(points), strict=True)
                            axes.errorbar(
                                x, y, spread, fmt=style, color=colour, markersize=4, capsize=2, linewidth=1,
                                label=f"{ARMS[arm].replace('`', '')}, {SWEEPS[sweep]}",
                            )  # fmt: skip
                axes.set_xscale("log" if cost == "synops" else "linear")
                axes.set_xlabel(f"{what} a test sample{'' if cost == 'synops' else ' (nJ)'}")
                axes.set_ylabel(f"{KINDS[name].name}: test accuracy (%)")
                axes.grid(alpha=0.3, which="both")
        legend_below(drawn, all_axes[0][0], 2)
