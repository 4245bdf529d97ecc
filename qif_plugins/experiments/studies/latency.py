"""Study 4: QIF against LIF in time, per backend, from the files that ``qif bench`` wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from ...support.files import read_json
from ..bench.harness import read_results
from ..bench.peers import OURS
from ..figures import COLOURS, MARKERS, figure, legend_below
from ..records import Records, Setting, Trial
from .page import Body, table
from .runner import Options

TITLE = "Latency"
QUESTION = (
    "The second open question of [J] (arXiv 2510.05168): what does a QIF layer cost in time where there was a LIF "
    "layer, on each backend?"
)


def plan(options: Options, done: Records) -> list[Setting]:
    """Name no trial: ``qif bench`` measures, and its files are read."""
    return []


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the time of QIF over LIF inside each host, and of every backend over the fastest LIF layer.

    Raises:
        ValueError: No file of ``qif bench`` in the folder.
    """
    files = [content for path in sorted(options.results.glob("*.json")) if (content := _bench_file(path))]
    if not files:
        raise ValueError(
            f"{options.results} holds no file of qif bench; run qif bench first, or name the folder with --results"
        )
    summary, sections = [], []
    for content in files:
        sections += [f"## {_machine(content)}", _about(content)]
        for dtype in _dtypes(content):
            hosts, backends = _ratios(content, dtype, _in_hosts), _ratios(content, dtype, _backends)
            sections += [f"{dtype}, inside the hosts:", _table(hosts), f"{dtype}, each backend:", _table(backends)]
            summary += [
                (f"{_machine(content)}, {dtype}", *pair, values)
                for pair, values in [*_by_pair(hosts).items(), *_by_pair(backends, FASTEST).items()]
            ]
    rows = [
        [where, f"`{ours}`", lif, f"{geometric_mean(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]
        for where, ours, lif, values in summary
    ]
    header = ["", "QIF", "compared with", "time over LIF's, mean", "least", "largest"]
    _draw(files, picture)
    method = (
        "`qif bench` repeats all peers one after another on the same input. Times are medians over the repetitions; a "
        "ratio is the quotient of two median ratios to `qif` within a repetition. The benchmark has no seeds, and its "
        "medians carry no standard deviation; the first column has the number of repetitions. Below 1 QIF is "
        "faster. `qif` runs the backend that the machine's line names; averages over sizes are geometric, with the "
        "least and the largest."
    )
    return Body(_finding(summary), [table(header, rows, left=3), *sections], method)


def _finding(summary: Sequence[tuple[str, str, str, list[float]]]) -> str:
    inside = [values for _, ours, lif, values in summary if (ours, lif) in IN_HOSTS]
    if not inside:
        return "No machine here has measured a host."
    means, faster = [geometric_mean(values) for values in inside], [ratio < 1 for values in inside for ratio in values]
    return (
        f"Forward and backward of a QIF layer inside a host take {min(means):.2f} to {max(means):.2f} of the time of "
        f"that host's LIF layer, on average over sizes, for each machine, host and type of number. QIF is faster in "
        f"{sum(faster)} of {len(faster)} measurements."
    )


IN_HOSTS = (("qif in SpikingJelly", "SpikingJelly LIFNode"), ("qif in snnTorch", "snnTorch Leaky"))
"""Our neuron in a host beside that host's own LIF neuron."""
FASTEST = "the fastest LIF layer"


def _bench_file(path: Path) -> dict[str, Any] | None:
    content = read_json(path, "no JSON file", object, "take it out of the folder of results")
    if not isinstance(content, dict) or "cases" not in content:
        return None
    checked: dict[str, Any] = read_results(path)
    return checked


def _dtypes(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(case["dtype"] for case in content["cases"]))


def _in_hosts(timed: dict[str, Any]) -> Iterable[tuple[str, str]]:
    return [(ours, lif) for ours, lif in IN_HOSTS if ours in timed and lif in timed]


def _backends(timed: dict[str, Any]) -> Iterable[tuple[str, str]]:
    lif = [name for name in timed if not name.startswith("qif") and ("LIF" in name or "Leaky" in name)]
    fastest = min(lif, key=lambda name: timed[name]["ratio"], default=None)
    ours = [name for name in timed if name.startswith(OURS) and " in " not in name]
    return [] if fastest is None else [(name, fastest) for name in ours]


def _ratios(
    content: dict[str, Any], dtype: str, pairs: Callable[[dict[str, Any]], Iterable[tuple[str, str]]]
) -> list[dict[str, Any]]:
    """Divide the time of one peer by that of another for each pair, size by size."""
    rows = []
    for case in content["cases"]:
        if case["dtype"] != dtype:
            continue
        timed = {name: peer["both"] for name, peer in case["peers"].items() if "both" in peer}
        size = case["T"] * case["N"]
        rows += [
            {
                "case": f"T = {case['T']}, N = {case['N']}, {case['repeats']} repetitions", "size": size,
                "ours": ours, "lif": lif, "ratio": timed[ours]["ratio"] / timed[lif]["ratio"],
                "lif_ns": timed[lif]["seconds"] / size * 1e9,
            }
            for ours, lif in pairs(timed)
        ]  # fmt: skip
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Tabulate each LIF layer's time and QIF's as a multiple of it, a row for each size."""
    ours = list(dict.fromkeys(row["ours"] for row in rows))
    cells = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["ours"]: row for row in rows if row["case"] == case}
        line = [case]
        for name in ours:
            row = found.get(name)
            line += ["–", "–"] if row is None else [f"{row['lif']}, {row['lif_ns']:.3g}", f"{row['ratio']:.2f}"]
        cells.append(line)
    header = ["size"]
    for name in ours:
        header += ["LIF, ns a neuron-step", f"{name}, times that"]
    return table(header, cells)


def _by_pair(rows: Sequence[dict[str, Any]], lif: str | None = None) -> dict[tuple[str, str], list[float]]:
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["ours"], lif or row["lif"]), []).append(row["ratio"])
    return groups


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    return str(machine["gpu"] or re.sub(r"\((R|TM)\)", "", f"{machine['cpu']}, {machine['threads']} threads"))


def _about(content: dict[str, Any]) -> str:
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = f"; load average {machine['load']} at the start" if machine["load"] is not None else ""
    return (
        f"{machine['system']}, Python {machine['python']}, {versions}; `qif` is the backend {machine['backend']}; "
        f"{content['date']}; `{content['command']}`{load}."
    )


def _draw(files: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratio against the size of the input, a panel for each machine and type of number."""
    from matplotlib.ticker import LogLocator

    panels = [(content, dtype) for content in files for dtype in _dtypes(content)]
    with figure(path, (1.5 + 5.5 * len(panels), 5), dpi=110, grid=True) as drawn:
        for axes, (content, dtype) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            rows = _ratios(content, dtype, _in_hosts), _ratios(content, dtype, _backends)
            for index, (ours, lif) in enumerate((*_by_pair(rows[0]), *_by_pair(rows[1], FASTEST))):
                points = sorted((row["size"], row["ratio"]) for some in rows for row in some if row["ours"] == ours)
                axes.loglog(
                    *zip(*points, strict=True), label=f"{ours} / {lif}", marker=MARKERS[index % len(MARKERS)],
                    markersize=4, linestyle="", color=COLOURS[(1 + index) % len(COLOURS)],
                )  # fmt: skip
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:.2g}")
            axes.yaxis.set_minor_formatter("")
            axes.axhline(1, color=COLOURS[0], linewidth=1, label="LIF")
            axes.set_title(f"{_machine(content)}, {dtype}", fontsize="medium")
            axes.set(xlabel="neuron-steps T N", ylabel="time of QIF over that of LIF")
        legend_below(drawn, axes, 3)
