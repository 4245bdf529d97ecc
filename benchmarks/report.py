"""Plots and tables from the results of ``qif bench``.

    python benchmarks/report.py [RESULTS.json ...]

For each results file (default: all in ``benchmarks/results``) a figure ``docs/benchmarks-*.png``, cost per neuron-step
against N and against T; ``docs/speed.png``, LIF beside QIF at one size, of the first file from a CPU; and
``docs/benchmarks.md`` with the tables of all of them, and the profile of the machine where
``benchmarks/profile_cpu.py`` has left one, and of whole networks where ``qif bench --networks`` has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qif_plugins.experiments.bench.harness import QUICK_GPU
from qif_plugins.experiments.bench.network_table import HEADER, rows
from qif_plugins.experiments.bench.peers import FLOOR_NEW, FLOOR_THERE, OURS
from qif_plugins.experiments.bench.runner import PASSES
from qif_plugins.experiments.figures import COLOURS, colours_of, figure
from qif_plugins.experiments.studies.page import table
from qif_plugins.support.files import replacing

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
SUMMARY = PAGE.with_name("speed.png")
PAIRS = {
    "SpikingJelly": ("SpikingJelly LIFNode", "qif in SpikingJelly"),
    "snnTorch": ("snnTorch Leaky", "qif in snnTorch"),
}
"""The neurons of the summary: in each host its LIF and our QIF."""

OLD_FLOOR = "three copies"
"""In files from before the floor was split: into memory as PyTorch allocates it, mapped anew or there already."""
FLOORS = {FLOOR_NEW: "0.35", FLOOR_THERE: "0.6", OLD_FLOOR: "0.75"}
"""With the greys that draw them."""

# What the CPU is held to, at these sizes in float32: peer, our least advantage (or most disadvantage), in words.
TARGETS = (
    ((4, 2**21), (16, 2**19)),
    (
        ("SpikingJelly LIFNode", 5.0),
        ("snnTorch Leaky", 5.0),
        ("SpikingJelly's own QIFNode", 10.0),
        (FLOOR_NEW, 1 / 1.5),
        (OLD_FLOOR, 1 / 1.5),
    ),
)

# What a GPU is held to: a share of the bandwidth of three copies, from so many neurons up; and our least advantage
# over these neurons, by both clocks, at every size, with less peak memory.
BANDWIDTH, BUSY = 0.85, 2**22
GPU_PEERS = (("SpikingJelly LIFNode", 1.0), ("SpikingJelly LIFNode, cupy, 0.0.0.0.14", 2.0))

FLOORS_TEXT = (
    "\n\nThe floors are three copies of the tensor, which in float32 move as many bytes as forward and backward do:\n\n"
    "- *newly mapped memory*: the operating system provides it page by page, at the cost of a fault for every 4 KiB;\n"
    "- *reused memory*: it was allocated and used before.\n\n"
    "The C library's allocator decides which of the two the hosts' large tensors get, so their ratios differ from "
    "process to process. `qif_multi_step` asks for huge pages, and may be faster than copies into newly mapped memory. "
    "In bfloat16 the kernels move 16 bytes per neuron-step and three copies 12, since h is saved in float32."
)
OLD_FLOOR_TEXT = (
    "Plain *three copies*, in files from before that distinction, went into memory as PyTorch allocates it, which may "
    "be either."
)
GPU_TEXT = (
    "On a GPU there are two clocks. *Call time* is the caller's waiting time, from an idle GPU until it is idle again, "
    "with Python and launches. *Device time* is measured on the GPU: the pass is queued behind a delay, so that events "
    "before and after it see no gaps. The share of the copy bandwidth is judged by device time and by the bytes that "
    "each must move (bfloat16: QIF 16 per neuron-step and the last membrane, three copies 12). The comparison with "
    "other neurons is judged by call time and by device time. The figure shows device time."
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plots and tables from the results of qif bench.")
    parser.add_argument("results", nargs="*", type=Path, help="results files (default: all in benchmarks/results)")
    # The folder holds the results of other scripts, too; those of `qif bench` have cases.
    chosen = parser.parse_args().results or [
        path for path in sorted((HERE / "results").glob("*.json")) if json.loads(path.read_text()).get("cases")
    ]
    if not chosen:
        parser.error("no results yet; run `qif bench` first")
    files = [json.loads(path.read_text()) for path in chosen]
    old = any(OLD_FLOOR in case["peers"] for results in files for case in results["cases"])
    on_gpu = any(map(_on_gpu, files))
    pages = [
        "# Benchmarks\n\nWritten by `python benchmarks/report.py` from the files in `benchmarks/results`, which "
        "`qif bench` writes. Every repetition runs all peers one after another on the same input; times are medians "
        "over the repetitions, and ratios are medians of the ratio within a repetition."
        + " ".join([FLOORS_TEXT, *([OLD_FLOOR_TEXT] if old else []), *([GPU_TEXT] if on_gpu else [])])
        + "\n"
    ]
    for path, results in zip(chosen, files, strict=True):
        figure = PAGE.with_name(f"benchmarks-{path.stem}.png")
        draw(results, figure)
        pages.append(page(results, figure))
        print(f"wrote {figure}")
    wholes = sorted((HERE / "results").glob("networks-*.json"))
    pages.extend(_networks_page(json.loads(path.read_text())) for path in wholes)
    if measured := next((results for results in files if not _on_gpu(results)), None):
        draw_summary(measured, SUMMARY)
        print(f"wrote {SUMMARY}")
    with replacing(PAGE) as beside:
        beside.write_text("\n".join(pages), encoding="utf-8")
    print(f"wrote {PAGE}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Nanoseconds per neuron-step of forward and backward together, against N and against T."""
    cases = [case for case in results["cases"] if case["dtype"] == "float32"]
    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    colours = colours_of(name for name in names if name not in FLOORS) | FLOORS
    with figure(path, (17, 4.4), grid=True) as drawn:
        _draw(results, cases, names, colours, drawn)


def _draw(
    results: dict[str, Any], cases: list[dict[str, Any]], names: list[str], colours: dict[str, str], drawn: Any
) -> None:
    *panels, flat = drawn.subplots(1, 3, sharey=True)
    all_steps = sorted({case["T"] for case in cases})
    steps = 4 if 4 in all_steps else all_steps[0]
    products = _commonest(case["T"] * case["N"] for case in cases)
    shown = (
        ("N", f"neurons N, T = {steps}", [case for case in cases if case["T"] == steps]),
        ("T", f"time steps T, T N = {products}", [case for case in cases if case["T"] * case["N"] == products]),
    )
    for axes, (key, label, some) in zip(panels, shown, strict=True):
        for name in names:
            points = sorted((case[key], _cost(case, name)) for case in some if "both" in case["peers"].get(name, {}))
            if points:
                axes.loglog(
                    *zip(*points, strict=True), label=name, marker="o", markersize=3.5, base=2,
                    color=colours[name], linewidth=2.5 if name == OURS else 1.2,
                    linestyle="--" if colours[name] in [colours[n] for n in names[: names.index(name)]] else "-",
                )  # fmt: skip
        axes.set_yscale("log", base=10)
        axes.set_xlabel(label)
    for index, some_steps in enumerate(all_steps):
        points = sorted((case["N"], _cost(case, OURS)) for case in cases if case["T"] == some_steps)
        flat.loglog(
            *zip(*points, strict=True), label=f"T = {some_steps}", marker="o", markersize=3.5, base=2,
            color=COLOURS[2 + index % 5],
        )  # fmt: skip
    flat.set_yscale("log", base=10)
    flat.set_xlabel(f"neurons N, {OURS} alone")
    panels[0].set_ylabel("forward + backward, ns per neuron-step")
    for axes, place in ((panels[0], "outside right upper"), (flat, "outside right lower")):
        drawn.legend(*axes.get_legend_handles_labels(), loc=place, fontsize="small")
    clock = ", device time" if _on_gpu(results) else ""
    drawn.suptitle(f"{_machine(results)}, float32{clock}", fontsize="medium")


def draw_summary(results: dict[str, Any], path: Path) -> None:
    """Milliseconds of forward and backward together, LIF beside QIF in each host, at one T and N in float32."""
    size = 4, 2**21
    case = next(case for case in results["cases"] if (case["T"], case["N"]) == size and case["dtype"] == "float32")
    with figure(path, (7, 2.2)) as drawn:
        axes = drawn.subplots()
        for index, (neuron, colour) in enumerate(colours_of(("LIF", "QIF")).items()):
            times = [case["peers"][names[index]]["both"]["seconds"] * 1e3 for names in PAIRS.values()]
            places = [row + 0.4 * index for row in range(len(PAIRS))]
            bars = axes.barh(places, times, height=0.38, color=colour, label=neuron)
            axes.bar_label(bars, fmt="%.0f ms", padding=3)
        axes.set_yticks([row + 0.2 for row in range(len(PAIRS))], list(PAIRS))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"forward and backward of {size[1] / 2**20:.0f} million neurons over {size[0]} time steps, ms")
        axes.spines[["top", "right"]].set_visible(False)
        drawn.legend(loc="outside right center", frameon=False)


def _on_gpu(results: dict[str, Any]) -> bool:
    return bool(results["machine"]["device"] == "cuda")


def _detailed(results: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """The sizes that have a table of their own."""
    return QUICK_GPU if _on_gpu(results) else TARGETS[0]


def _cost(case: dict[str, Any], name: str) -> float:
    """Nanoseconds a neuron-step, on a GPU the GPU's own."""
    both = case["peers"][name]["both"]
    return float(both.get("device_seconds", both["seconds"]) / (case["T"] * case["N"]) * 1e9)


def page(results: dict[str, Any], figure: Path) -> str:
    """One machine: what it is, the targets, every case."""
    machine = results["machine"]
    on_gpu = _on_gpu(results)
    detailed = _detailed(results)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = machine["load"]
    busy = load is not None and load > 1.5
    warning = f"**The machine was busy: load average {load} at the start.** Ratios mean more than milliseconds. A peer "
    warning += "that waits for all its threads in every operation is slowed down more by this than others.\n"
    lines = [
        f"## {_machine(results)}",
        "",
        *([warning] if busy else []),
        f"{machine['system']}, Python {machine['python']}, {versions}; {results['date']}; `{results['command']}`.",
        "",
        *([results["note"], ""] if "note" in results else []),
        f"![cost per neuron-step]({figure.name})",
        "",
        *(gpu_targets(results) if on_gpu else _targets(results)),
        *_profile(results),
        *_overview(results),
    ]
    for case in results["cases"]:
        if (case["T"], case["N"]) not in detailed:
            continue
        device = ["device, ms", "device time over qif"] if on_gpu else []
        header = ["", "forward, ms", "backward, ms", "both, ms", "time over qif", *device, "peak memory, MiB"]
        cells = []
        for name, result in case["peers"].items():
            if "error" in result:
                cells.append([name, result["error"], *[""] * (len(header) - 2)])
                continue
            both = result["both"]
            row = [name, *(f"{result[which]['seconds'] * 1e3:.3g}" for which in PASSES), f"{both['ratio']:.2f}"]
            row += [f"{both['device_seconds'] * 1e3:.3g}", f"{both['device_ratio']:.2f}"] if on_gpu else []
            cells.append([*row, f"{result['peak_bytes'] / 2**20:.3g}"])
        title = f"### T = {case['T']}, N = {case['N']}, {case['dtype']} ({case['repeats']} repetitions)"
        lines += [title, "", table(header, cells), ""]
    return "\n".join(lines)


def _targets(results: dict[str, Any]) -> list[str]:
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
        if "both" in case["peers"].get(FLOOR_THERE, {}):
            ratio = case["peers"][FLOOR_THERE]["both"]["ratio"]
            lines.append(f"| T = {case['T']}, N = {case['N']} | {FLOOR_THERE} | {ratio:.2f} | | for comparison |")
    return [*lines, "", *_misses(results)] if len(lines) > 2 else []


def gpu_targets(results: dict[str, Any]) -> list[str]:
    """For each target and dtype the worst size, and where Python may be in the device time."""
    lines = [
        "| forward + backward | peer | judged by | worst | at | target | |",
        "| --- | --- | --- | ---: | --- | --- | --- |",
    ]
    mixed = []
    for dtype in dict.fromkeys(case["dtype"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["dtype"] == dtype]
        shares = [
            (_share_of_bandwidth(case), case)
            for case in cases
            if case["N"] >= BUSY and "both" in case["peers"].get(FLOOR_THERE, {})
        ]
        rows = [("share of the copy bandwidth", FLOOR_THERE, "device time, bytes moved", BANDWIDTH, shares)]
        for peer, least in GPU_PEERS:
            timed = [(case["peers"][peer], case) for case in cases if "both" in case["peers"].get(peer, {})]
            for key, clock in (("ratio", "call time"), ("device_ratio", "device time")):
                rows.append(("times qif's", peer, clock, least, [(row["both"][key], case) for row, case in timed]))
            memory = [(row["peak_bytes"] / case["peers"][OURS]["peak_bytes"], case) for row, case in timed]
            rows.append(("times qif's", peer, "peak memory", 1.0, memory))
        for what, peer, judged, least, values in rows:
            if not values:
                continue
            strictly = judged == "peak memory"
            missed = sum(value < least or (strictly and value == least) for value, _ in values)
            worst, case = min(values, key=lambda pair: pair[0])
            verdict = f"missed at {missed} of {len(values)} sizes" if missed else f"met at all {len(values)} sizes"
            lines.append(
                f"| {what}, {dtype} | {peer} | {judged} | {worst:.2f} | T = {case['T']}, N = {case['N']} | "
                f"{'>' if strictly else '≥'} {least:.2f} | {verdict} |"
            )
        mixed += [
            f"{name} at T = {case['T']}, N = {case['N']}, {dtype} ({result['both']['queued']:.0%} queued in time)"
            for case in cases
            for name, result in case["peers"].items()
            if result.get("both", {}).get("queued", 1.0) < 0.5
        ]
    if len(lines) == 2:
        return []
    note = "In these cases the GPU began before everything was queued, so device time includes some of Python's: "
    note += f"{'; '.join(mixed)}."
    return [*lines, "", *([note, ""] if mixed else [])]


def _share_of_bandwidth(case: dict[str, Any]) -> float:
    """Our bytes a second over those of three copies of the same tensor, both by the GPU's clock."""
    ours, floor = case["peers"][OURS], case["peers"][FLOOR_THERE]
    return float(floor["both"]["device_ratio"] * ours["moved_bytes"] / floor["moved_bytes"])


def _misses(results: dict[str, Any]) -> list[str]:
    """Compare the milliseconds that the missed targets need with those that the profile leaves to gain."""
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
    there, new = took["kernels, reused memory"], took["kernels, new memory on huge pages"]
    return [
        *lines,
        f"In the profile below the two kernels alone take {there:.1f} ms on reused memory and {new:.1f} ms on "
        f"new memory on huge pages; three copies, {took['three copies, reused memory']:.1f} ms and "
        f"{took['three copies, new memory']:.1f} ms. The rest is the speed of the memory: the forward pass reads 4 "
        "bytes per neuron-step and writes 8, the backward pass reads 8 and writes 4.",
        "",
    ]


def _profile(results: dict[str, Any]) -> list[str]:
    """Where the time goes on this machine, if ``profile_cpu.py`` has measured it."""
    path = HERE / "results" / f"profile-{results['machine']['name']}.json"
    if not path.exists():
        return []
    profile = json.loads(path.read_text())["profile"]
    header = ["forward + backward, float32", "ms", "page faults", "of it in the system, ms"]
    cells = [
        [row["what"], f"{row['ms']:.3g}", f"{row['faults']:.0f}", f"{row['system']:.3g}"] for row in profile["rows"]
    ]
    title = f"Where the time goes at T = {profile['T']}, N = {profile['N']} (`python benchmarks/profile_cpu.py`; "
    return [f"{title}medians, all parts interleaved):", "", table(header, cells), ""]


NETWORKS_TEXT = (
    "Each row times a training step (forward, backward, optimizer) of a whole network, all peers in turn: with its "
    "host's LIF, after `qif_plugins.swap`, and with an identity in place of every neuron that was swapped. Numbers are "
    "medians over the repetitions, with their quartiles in brackets, which show the noise.\n\n"
    "- *LIF over QIF* is the ratio of the two times.\n"
    "- The *share* is (QIF − identity) / (LIF − identity): the neurons' own time with QIF as a part of that with LIF. "
    "It is left out if LIF took no longer than the identity.\n"
    "- The *target* is a share of at most 0.25 if the neurons take all steps in a call (`m`), and of 0.7 if they take "
    "one step per call (`s`, as in snnTorch's own loops)."
)


def networks(cases: list[dict[str, Any]]) -> list[str]:
    """Tabulate whole networks, where some were measured."""
    return [NETWORKS_TEXT, "", table(HEADER, rows(cases), left=5), ""] if cases else []


def _networks_page(results: dict[str, Any]) -> str:
    """Whole networks on one machine."""
    machine = results["machine"]
    return "\n".join([
        f"## Whole networks: {_machine(results)}", "",
        f"{results['date']}; load average {machine['load']} at the start; `{results['command']}`.", "",
        *([results["note"], ""] if "note" in results else []), *networks(results["networks"]),
        *([results["details"], ""] if "details" in results else []),
    ])  # fmt: skip


def _overview(results: dict[str, Any]) -> list[str]:
    """Every size in a line, where there are more than the tables below show."""
    on_gpu = _on_gpu(results)
    if all((case["T"], case["N"]) in _detailed(results) for case in results["cases"]):
        return []
    floors = [name for name in FLOORS if any(name in case["peers"] for case in results["cases"])]
    names = [*floors, OURS, "SpikingJelly LIFNode", "SpikingJelly's own QIFNode", "snnTorch Leaky"]
    clock = "device time in " if on_gpu else ""
    title = f"Every size, forward + backward, {clock}nanoseconds and peak memory in bytes per neuron-step:"
    cells = []
    for case in results["cases"]:
        work = case["T"] * case["N"]
        costs = [f"{_cost(case, name):.3g}" if "both" in case["peers"].get(name, {}) else "" for name in names]
        memory = [
            f"{case['peers'][name]['peak_bytes'] / work:.3g}" if "both" in case["peers"].get(name, {}) else ""
            for name in (OURS, "SpikingJelly LIFNode")
        ]
        cells.append([f"T = {case['T']}, N = {case['N']}, {case['dtype']}", *costs, *memory])
    header = ["", *(f"{name}, ns" for name in names), "qif, bytes", "LIFNode, bytes"]
    return [title, "", table(header, cells), ""]


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return str(machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads")


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


if __name__ == "__main__":
    main()
