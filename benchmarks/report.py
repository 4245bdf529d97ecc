"""Plots and tables from the results of ``qif bench``.

    python benchmarks/report.py [RESULTS.json ...]

For each results file (default: all in ``benchmarks/results``) a figure ``docs/benchmarks-*.png``, cost per neuron-step
against N and against T; and ``docs/benchmarks.md`` with the tables of all of them, and the profile of the machine where
``benchmarks/profile_cpu.py`` has left one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qif_plugins.bench import QUICK
from qif_plugins.bench_peers import FLOOR, OURS
from qif_plugins.files import replacing
from qif_plugins.plot import COLOURS, require_matplotlib

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"

# What the CPU is held to, at these sizes in float32: peer, our least advantage (or most disadvantage), in words.
TARGETS = (
    ((4, 2**21), (16, 2**19)),
    (
        ("SpikingJelly LIFNode", 5.0),
        ("snnTorch Leaky", 5.0),
        ("SpikingJelly's own QIFNode", 10.0),
        (FLOOR, 1 / 1.5),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plots and tables from the results of qif bench.")
    parser.add_argument("results", nargs="*", type=Path, help="results files (default: all in benchmarks/results)")
    # The folder holds the results of other scripts, too; those of `qif bench` have cases.
    chosen = parser.parse_args().results or [
        path for path in sorted((HERE / "results").glob("*.json")) if "cases" in json.loads(path.read_text())
    ]
    if not chosen:
        parser.error("no results yet; run `qif bench` first")
    pages = [
        "# Benchmarks\n\nWritten by `python benchmarks/report.py` from the files in `benchmarks/results`, which "
        "`qif bench` writes. Every repetition runs all peers one after another on the same input; times are medians "
        "over the repetitions, and ratios are medians of the ratio within a repetition. *Three copies* is the floor: "
        "the tensor copied three times into memory as PyTorch allocates it, as many bytes as forward and backward "
        "move. New memory comes page by page, and each page of 4 KiB costs a fault on its first touch; ours keeps "
        "the memory of large tensors for the next ones (up to an eighth of main memory, which the system may take back "
        "when it runs short; the environment variable QIF_PLUGINS_KEEP_MEMORY=0 turns that off), writes the gradient "
        "over h where nothing else can see it, and "
        "so may stay below the floor. In "
        "bfloat16 it cannot: h is saved in float32, so that the kernels move 16 bytes a neuron-step where three copies "
        "move 12. Whether a host's large tensors cause "
        "those faults depends on what the C library's allocator has free, and so differs from process to process; so "
        "do the ratios.\n"
    ]
    for path in chosen:
        results = json.loads(path.read_text())
        figure = PAGE.with_name(f"benchmarks-{path.stem}.png")
        draw(results, figure)
        pages.append(page(results, figure))
        print(f"wrote {figure}")
    with replacing(PAGE) as beside:
        beside.write_text("\n".join(pages))
    print(f"wrote {PAGE}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Nanoseconds per neuron-step of forward and backward together, against N and against T."""
    require_matplotlib()
    from matplotlib.figure import Figure

    cases = [case for case in results["cases"] if case["dtype"] == "float32"]
    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    figure = Figure(figsize=(17, 4.4), layout="constrained")
    *panels, flat = figure.subplots(1, 3, sharey=True)
    all_steps = sorted({case["T"] for case in cases})
    steps = 4 if 4 in all_steps else all_steps[0]
    products = _commonest(case["T"] * case["N"] for case in cases)
    shown = (
        ("N", f"neurons N, T = {steps}", [case for case in cases if case["T"] == steps]),
        ("T", f"time steps T, T N = {products}", [case for case in cases if case["T"] * case["N"] == products]),
    )
    for axes, (key, label, some) in zip(panels, shown, strict=True):
        for index, name in enumerate(names):
            points = sorted((case[key], _cost(case, name)) for case in some if "both" in case["peers"].get(name, {}))
            if points:
                axes.loglog(
                    *zip(*points, strict=True), label=name, marker="o", markersize=3.5, base=2,
                    color="0.6" if name == FLOOR else COLOURS[index % len(COLOURS)],
                    linewidth=2.5 if name == OURS else 1.2, linestyle="--" if index >= len(COLOURS) else "-",
                )  # fmt: skip
        axes.set_yscale("log", base=10)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    for index, some_steps in enumerate(all_steps):
        points = sorted((case["N"], _cost(case, OURS)) for case in cases if case["T"] == some_steps)
        flat.loglog(
            *zip(*points, strict=True), label=f"T = {some_steps}", marker="o", markersize=3.5, base=2,
            color=COLOURS[index % len(COLOURS)],
        )  # fmt: skip
    flat.set_yscale("log", base=10)
    flat.set_xlabel(f"neurons N, {OURS} alone")
    flat.grid(alpha=0.3)
    flat.legend(fontsize="small")
    panels[0].set_ylabel("forward + backward, ns a neuron-step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(f"{_machine(results)}, float32", fontsize="medium")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)


def _cost(case: dict[str, Any], name: str) -> float:
    return float(case["peers"][name]["both"]["seconds"] / (case["T"] * case["N"]) * 1e9)


def page(results: dict[str, Any], figure: Path) -> str:
    """One machine: what it is, the targets, every case."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load"]
    busy = load is not None and load > 1.5
    warning = f"**The machine was busy: load average {load} at the start.** Ratios mean more than milliseconds; a peer "
    warning += "that waits for all its threads in every operation suffers more from that than one that does not.\n"
    lines = [
        f"## {_machine(results)}",
        "",
        *([warning] if busy else []),
        f"{machine['system']}, Python {machine['python']}, {versions}; {results['date']}; `{results['command']}`.",
        "",
        f"![cost per neuron-step]({figure.name})",
        "",
        *_targets(results),
        *_profile(results),
        *_overview(results),
    ]
    for case in results["cases"]:
        if (case["T"], case["N"]) not in QUICK:
            continue
        lines += [
            f"### T = {case['T']}, N = {case['N']}, {case['dtype']} ({case['repeats']} repetitions)",
            "",
            "| | forward, ms | backward, ms | both, ms | time over qif | peak memory, MiB |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, result in case["peers"].items():
            if "error" in result:
                lines.append(f"| {name} | {result['error']} | | | | |")
                continue
            passes = " | ".join(f"{result[which]['seconds'] * 1e3:.3g}" for which in ("forward", "backward", "both"))
            memory = f"{result['peak_bytes'] / 2**20:.3g}"
            lines.append(f"| {name} | {passes} | {result['both']['ratio']:.2f} | {memory} |")
        lines.append("")
    return "\n".join(lines)


def _targets(results: dict[str, Any]) -> list[str]:
    if results["machine"]["device"] != "cpu":
        return []
    sizes, bounds = TARGETS
    lines = [
        "| forward + backward, float32 | peer | times qif's | target | |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for case in results["cases"]:
        if case["dtype"] != "float32" or (case["T"], case["N"]) not in sizes:
            continue
        for peer, least in bounds:
            if "both" in case["peers"].get(peer, {}):
                ratio = case["peers"][peer]["both"]["ratio"]
                verdict = "met" if ratio >= least else f"missed by {100 * (1 - ratio / least):.0f} %"
                lines.append(f"| T = {case['T']}, N = {case['N']} | {peer} | {ratio:.2f} | ≥ {least:.2f} | {verdict} |")
    return [*lines, "", *_misses(results)] if len(lines) > 2 else []


def _misses(results: dict[str, Any]) -> list[str]:
    """What the missed targets would take in milliseconds, beside what the profile says is there to be had."""
    _, bounds = TARGETS
    path = HERE / "results" / f"profile-{results['machine']['name']}.json"
    if not path.exists():
        return []
    profile = json.loads(path.read_text())["profile"]
    took = {row["what"]: row["ms"] for row in profile["rows"]}
    lines = []
    for case in results["cases"]:
        if case["dtype"] != "float32" or (case["T"], case["N"]) != (profile["T"], profile["N"]):
            continue
        ours = case["peers"][OURS]["both"]["seconds"] * 1e3
        for peer, least in bounds:
            ratio = case["peers"].get(peer, {}).get("both", {}).get("ratio", least)
            if ratio < least:
                lines.append(
                    f"{least:g} times {peer} would be {ours * ratio / least:.1f} ms at T = {case['T']}, "
                    f"N = {case['N']}, where the call takes {ours:.1f} ms."
                )
    if not lines:
        return []
    there, new = took["kernels, memory that is there"], took["kernels, recycled memory, gradient over h"]
    return [
        *lines,
        f"In the profile below the two kernels alone take {there:.1f} ms on memory that is there and {new:.1f} ms on "
        f"recycled memory; three copies, {took['three copies, memory that is there']:.1f} ms and "
        f"{took['three copies, new memory']:.1f} ms. What is left is the memory's own speed: the forward pass reads 4 "
        "bytes a neuron-step and writes 8, the backward pass reads 8 and writes 4.",
        "",
    ]


def _profile(results: dict[str, Any]) -> list[str]:
    """Where the time goes on this machine, if ``profile_cpu.py`` has measured it."""
    path = HERE / "results" / f"profile-{results['machine']['name']}.json"
    if not path.exists():
        return []
    profile = json.loads(path.read_text())["profile"]
    rows = [
        f"| {row['what']} | {row['ms']:.3g} | {row['faults']:.0f} | {row['system']:.3g} |" for row in profile["rows"]
    ]
    return [
        f"Where the time goes at T = {profile['T']}, N = {profile['N']} (`python benchmarks/profile_cpu.py`; medians, "
        "all parts interleaved):",
        "",
        "| forward + backward, float32 | ms | page faults | of it in the system, ms |",
        "| --- | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _overview(results: dict[str, Any]) -> list[str]:
    """Every size in a line, where there are more than the tables below show."""
    if all((case["T"], case["N"]) in QUICK for case in results["cases"]):
        return []
    names = [FLOOR, OURS, "SpikingJelly LIFNode", "SpikingJelly's own QIFNode", "snnTorch Leaky"]
    lines = [
        "Every size, forward + backward, nanoseconds a neuron-step, and peak memory in bytes a neuron-step:",
        "",
        "| | " + " | ".join(f"{name}, ns" for name in names) + " | qif, bytes | LIFNode, bytes |",
        "| --- |" + " ---: |" * (len(names) + 2),
    ]
    for case in results["cases"]:
        work = case["T"] * case["N"]
        costs = [f"{_cost(case, name):.3g}" if "both" in case["peers"].get(name, {}) else "" for name in names]
        memory = [
            f"{case['peers'][name]['peak_bytes'] / work:.3g}" if "both" in case["peers"].get(name, {}) else ""
            for name in (OURS, "SpikingJelly LIFNode")
        ]
        lines.append(f"| T = {case['T']}, N = {case['N']}, {case['dtype']} | " + " | ".join([*costs, *memory]) + " |")
    return [*lines, ""]


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return str(machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads")


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


if __name__ == "__main__":
    main()
