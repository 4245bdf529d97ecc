"""Measure peers side by side on one input, and write medians and ratios to one results file for each machine.

Every repetition runs each peer once, one after another, so that other work on the machine slows all of them alike. What
counts are the ratios to our own neuron within a run; the milliseconds are those of one machine.

``seconds`` and ``ratio`` are call time, which the caller waits for. On a GPU there are also ``device_seconds`` and
``device_ratio``, the GPU's own time without Python's, and ``queued``, the share of repetitions in which that worked
(:mod:`.runner` says how). The share of the copy bandwidth is judged by device time, a comparison with another neuron by
both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...support.files import finite, occupied, read_json, write_json
from ...support.text import one_line, text_table
from .machine import installed, machine
from .old_host import OldHost, OldRunner
from .peers import OURS, draw, dtype_name, moved_bytes, peers_for
from .runner import PASSES, Runner, Times, release

QUICK = (
    (4, 2**10), (4, 2**14), (4, 2**18), (4, 2**21), (1, 2**21), (16, 2**10), (16, 2**15), (16, 2**19), (64, 2**17),
)  # fmt: skip
"""(T, N) that show cost against N, cost against T, and the sizes that the targets name."""
QUICK_GPU = (*QUICK, (1, 2**22), (4, 2**22), (16, 2**22), (4, 2**25))
"""The same for a GPU, whose memory is busy from 2^22 neurons up."""
FULL = tuple((steps, 2**power) for steps in (1, 4, 16, 64) for power in range(10, 26))
"""(T, N), as far as memory allows."""
LEAST = 3
"""Repetitions, however long they take."""


def measure(
    steps: int,
    neurons: int,
    dtype: torch.dtype,
    device: torch.device,
    hosts: tuple[str, ...],
    old: OldHost | None = None,
    seconds: float = 10.0,
    repeats: int = 100,
    leave_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure every peer on one input.

    Args:
        steps: T.
        neurons: N.
        dtype: Type of the input.
        device: Device to measure on.
        hosts: The hosts whose neurons to measure, ``"spikingjelly"`` and ``"snntorch"``.
        old: A second version of SpikingJelly. Default: none.
        seconds: Time to spend; at least three repetitions are made. Default 10.
        repeats: Largest number of repetitions. Default 100.
        leave_out: Peers not to measure. Default: none.

    Returns:
        T, N, dtype, the number of repetitions, and for each peer median seconds and median ratio to ours of each pass,
        its peak memory, and where it is known how many bytes it must move; or why it could not run.

    Raises:
        ValueError: The input does not fit, or our own neuron cannot run it.
    """
    runners: dict[str, Runner | OldRunner] = {}
    results: dict[str, dict[str, Any]] = {}
    release()  # what the last case held
    if old is not None:
        old.forget()
    shape = (steps, neurons, dtype, device)
    try:
        x, gradient = draw(*shape)
    except RuntimeError as error:
        raise _cannot(shape, one_line(error, 200)) from error
    plans: dict[str, Callable[[], Runner | OldRunner]] = {
        name: partial(Runner, name, x, gradient) for name in peers_for(device, hosts) if name not in leave_out
    }
    if old is not None:
        for name in ("SpikingJelly LIFNode", *(["SpikingJelly LIFNode, cupy"] if device.type == "cuda" else [])):
            plans[f"{name}, {old.version}"] = partial(OldRunner, old, name, *shape)
    for name, build in plans.items():
        started = _start(build)
        if isinstance(started, str):  # a peer that cannot run this input says so in the table
            results[name] = {"error": started}
        else:
            runners[name], peak = started
            moved = moved_bytes(name, x)
            results[name] = {"peak_bytes": peak, **({} if moved is None else {"moved_bytes": moved})}
    if OURS not in runners:
        raise _cannot(shape, results[OURS]["error"])

    times: dict[str, list[Times]] = {name: [] for name in runners}
    gc.collect()
    began = time.perf_counter()
    while len(times[OURS]) < LEAST or (len(times[OURS]) < repeats and time.perf_counter() - began < seconds):
        for name, runner in runners.items():
            times[name].append(runner.repeat())
    for name, rows in times.items():
        results[name] |= {which: _medians(rows, times[OURS], which) for which in PASSES}
    return {
        "T": steps,
        "N": neurons,
        "dtype": dtype_name(dtype),
        "repeats": len(times[OURS]),
        "peers": results,
    }


def _medians(rows: list[Times], ours: list[Times], which: str) -> dict[str, float]:
    """Compute the medians of one pass, seconds and ratio to ours, by each clock."""
    medians = {}
    for clock, prefix in (("call", ""), ("device", "device_")):
        if clock in rows[0]:
            taken, own = ([row[clock][which] for row in some] for some in (rows, ours))
            medians[f"{prefix}seconds"] = statistics.median(taken)
            medians[f"{prefix}ratio"] = statistics.median(a / b for a, b in zip(taken, own, strict=True))
    if "queued" in rows[0]:
        medians["queued"] = statistics.mean(row["queued"][which] for row in rows)
    return medians


def _cannot(shape: tuple[int, int, torch.dtype, torch.device], why: str) -> ValueError:
    steps, neurons, dtype, device = shape
    return ValueError(
        f"our own neuron cannot run T = {steps}, N = {neurons}, {dtype_name(dtype)} on {device}: {why}; choose a "
        "smaller --size or --most if memory ran out, and see what qif doctor says of the backends otherwise"
    )


def _start(build: Callable[[], Runner | OldRunner]) -> tuple[Runner | OldRunner, int] | str:
    """Build a peer and run it once, which compiles and loads; return it with its peak memory, or why it cannot run."""
    try:
        runner = build()
        return runner, runner.peak_bytes()
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 200)}"


def run(
    sizes: Iterable[tuple[int, int]],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
    path: Path,
    command: str,
    old_folder: Path | None = None,
    seconds: float = 10.0,
    report: Callable[[str], None] = print,
    resume: bool = False,
    minutes: float = float("inf"),
    leave_out: Sequence[str] = (),
) -> int:
    """Measure all sizes, and write the results file after each.

    Args:
        sizes: (T, N).
        dtypes: Types of the input.
        device: Device to measure on.
        path: Results file.
        command: The command that was typed, for the file.
        old_folder: Folder with a second SpikingJelly. Default: none.
        seconds: Time for each size, see :func:`measure`. Default 10.
        report: Called with each case as text.
        resume: Whether to keep the cases in ``path`` and to measure only the missing ones. Default False.
        minutes: Time after which no further size is begun; at least one is measured. Default: no limit.
        leave_out: Peers not to measure. Default: none.

    Returns:
        The number of cases that are left to measure.

    Raises:
        ValueError: ``path`` is of another machine or of other versions, or no results file at all; or our own neuron
            cannot run a size.
    """
    wanted = [(steps, neurons, dtype_name(dtype)) for dtype in dtypes for steps, neurons in sizes]
    hosts = tuple(host for host in ("spikingjelly", "snntorch") if installed(host) is not None)
    started: list[OldHost] = []

    def one(size: tuple[int, int, str]) -> dict[str, Any]:
        if old_folder is not None and not started:
            started.append(OldHost(old_folder))
        steps, neurons, dtype = size
        old = started[0] if started else None
        return measure(steps, neurons, getattr(torch, dtype), device, hosts, old, seconds, leave_out=leave_out)

    try:
        return complete(wanted, one, BOOK, device, path, command, report, resume, minutes)
    finally:
        for old in started:
            old.close()


class Book(NamedTuple):
    """A kind of results file.

    Attributes:
        name: The entry that has the cases.
        parts: The parts of a case, see :func:`qif_plugins.support.files.check_parts`.
        key: Returns what a case is told apart by.
        order: Returns what cases are sorted by.
        text: Formats a case.
    """

    name: str
    parts: dict[str, Any]
    key: Callable[[dict[str, Any]], Any]
    order: Callable[[dict[str, Any]], Any]
    text: Callable[[dict[str, Any]], str]


def complete(
    wanted: Iterable[Any], measure: Callable[[Any], dict[str, Any]], book: Book, device: torch.device, path: Path,
    command: str, report: Callable[[str], None] = print, resume: bool = False, minutes: float = float("inf"),
) -> int:  # fmt: skip
    """Measure the cases that a results file lacks, and write the file after each.

    Args:
        wanted: Keys of the cases, in the order in which to measure them.
        measure: Measures the case of a key.
        book: The kind of results file.
        device: Device to measure on.
        path: Results file; ``command``, ``report``, ``resume`` and ``minutes`` are those of :func:`run`.

    Returns:
        The number of cases that are left to measure.

    Raises:
        ValueError: As :func:`run`.
    """
    with occupied(path.parent, path.name):
        began = time.monotonic()
        results = _begun(path, device, command, book) if resume and path.exists() else _new(device, command, book)
        cases = results[book.name]
        done = {book.key(case) for case in cases}
        left = [key for key in wanted if key not in done]
        first = True
        while left and (first or time.monotonic() - began < 60 * minutes):
            first = False
            case = measure(left.pop(0))
            cases.append(case)
            cases.sort(key=book.order)
            write(path, results)
            report(book.text(case))
        return len(left)


def _new(device: torch.device, command: str, book: Book) -> dict[str, Any]:
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {"machine": machine(device), "command": command, "date": date, book.name: []}


def _begun(path: Path, device: torch.device, command: str, book: Book) -> dict[str, Any]:
    """Read the results in ``path``, which are to be continued."""
    here, results = machine(device), read_results(path, book)
    there = results["machine"]
    other = [key for key in ("name", "versions", "backend") if here[key] != there[key]]
    results[book.name].sort(key=book.order)
    if other:
        raise ValueError(
            f"{path} cannot be resumed: its {other[0]} is {there[other[0]]}, here it is {here[other[0]]}; leave out "
            "--resume, or name another file with --out"
        )
    if command not in results["command"].split("; "):
        results["command"] += f"; {command}"
    return results


def read_results(path: Path, book: Book | None = None) -> dict[str, Any]:
    """Read a results file, by default one of sizes.

    Raises:
        ValueError: It is not a results file, or a damaged one.
    """
    book = book or BOOK
    parts = {"machine": {"name": str, "backend": str, "versions": {str: str}}, "command": str, book.name: [book.parts]}
    results: dict[str, Any] = read_json(
        path, "no results file of qif bench", parts, "take another copy, name another file with --out, or move it away"
    )
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` as JSON; the file is complete or the one before."""
    write_json(path, finite(results))


def format_case(case: dict[str, Any]) -> str:
    """Format one case as a table: milliseconds, time over ours, memory; on a GPU also the GPU's own time."""
    on_gpu = "device_seconds" in case["peers"][OURS]["both"]
    rows = []
    for name, result in case["peers"].items():
        if "error" in result:
            rows.append([name, *["-"] * (6 if on_gpu else 4), result["error"][:40]])
            continue
        both = result["both"]
        passes = [f"{result[which]['seconds'] * 1e3:.3g}" for which in PASSES]
        device = [f"{both['device_seconds'] * 1e3:.3g}", f"{both['device_ratio']:.2f}"] if on_gpu else []
        rows.append([name, *passes, f"{both['ratio']:.2f}", *device, f"{result['peak_bytes'] / 2**20:.3g}"])
    device = ["device ms", "over qif"] if on_gpu else []
    header = ["", "forward ms", "backward ms", "both ms", "over qif", *device, "peak MiB"]
    title = f"T = {case['T']}, N = {case['N']}, {case['dtype']}, median of {case['repeats']}"
    return f"\n{title}\n{text_table(header, rows)}"


BOOK = Book(
    "cases",
    {"T": int, "N": int, "dtype": str, "repeats": int, "peers": {str: {str: object}}},
    lambda case: (case["T"], case["N"], case["dtype"]),
    lambda case: (case["dtype"] != "float32", case["dtype"], case["T"], case["N"]),
    format_case,
)
"""Results by size."""
