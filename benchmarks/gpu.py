"""Run all that waits for a CUDA card, in the order of its worth, within some minutes.

    python benchmarks/gpu.py [--wheels FOLDER] [--minutes 8] [--out benchmarks/results/gpu.json]

Needs Python, PyTorch, NumPy and what runs the tests (pytest, pytest-timeout, hypothesis). Whatever else the machine
lacks, both versions of SpikingJelly and snnTorch for example, comes from FOLDER, which ``make wheels`` fills elsewhere:
no network, installer or ``make`` is needed. Each part runs in a process of its own with a limit of its own. What it
finds is in the file, and on the page beside it (``.md``), while it runs and before the next part begins. Parts that ran
out of time go on where they stopped when all others have had their turn, and when the same command is given again.

``--rehearse`` runs the same parts on the CPU: Triton's kernels interpreted, those of ``qif.cu`` compiled by g++ behind
``tests/helpers/cuda_shim.h``, and everything small. A rehearsal cannot show

- that a card takes the launches, and that its arithmetic has the reference's bits: no machine code of a card runs
  (``benchmarks/gpu_kernels.py`` compiles and reads it);
- streams, graphs, waiting for the device, the allocator, more than 2^31 elements, NCCL, CUDA's autocast, and Inductor's
  code for CUDA: the CPU has none of them (in ``tests/test_gpu.py`` each such test says so);
- times, memory, and the hosts' own GPU kernels, which need a card to run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OLD = "0.0.0.0.14"
BANDWIDTH, LAUNCH = 4.3e12, 3e-6
"""Of the card that the table predicts: bytes a second, read and written; seconds before a kernel does anything."""
SIZES = ("4x4194304", "1x4194304", "16x4194304", "4x2097152", "16x1024", "4x262144", "64x131072", "4x33554432")
FLEX = "SpikingJelly FlexSN, our equations"  # compiles for an unknown time: measured in the whole grid only
PATH = (
    "fused_backends_come_first", "public_entry", "no_host_synchronisation", "cuda_graph", "runs_on_the_current_stream",
    "threads_with_streams_of_their_own", "one_launch_a_pass", "spikingjelly_node", "snntorch_neuron", "memory",
    "no_synchronisation_in_a_host", "training_under_autocast", "compiles_without_graph_break",
    "networks_of_a_host_learn",
)  # fmt: skip
LARGE = "tests/test_gpu.py::test_more_than_2_31_elements"  # alone: several at once would not fit
BENCH = ("cases", "networks")
"""The books that ``qif bench`` writes."""
NEEDED, USEFUL = ("torch", "numpy", "pytest", "pytest_timeout", "hypothesis"), ("triton", "cupy", "snntorch", "xdist")


class Part(NamedTuple):
    """A step of the run: ``seconds`` are its limit in a run of eight minutes, ``book`` the results that it adds to."""

    name: str
    seconds: float
    command: list[str]
    book: str
    old: bool = False


def parts(rehearse: bool, old: Path) -> list[Part]:
    """List the parts, most valuable first; ``old`` is the folder with the older SpikingJelly, if it exists."""
    python = [sys.executable, "-u"]
    own = [*python, str(HERE / "gpu.py"), *(["--rehearse"] if rehearse else []), "--child"]
    workers = min(8, (os.cpu_count() or 1) // 2) if find_spec("xdist") else 1
    pytest = [*python, "-m", "pytest", "-q", "-p", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    pytest += ["-c", str(ROOT / "pyproject.toml")]
    parallel = [*pytest, *(["-n", str(workers)] if workers > 1 else [])]
    file = str(ROOT / "tests" / "test_gpu.py")
    measure = [*python, "-m", "qif_plugins.cli", "bench", "--resume", "--device", "cpu" if rehearse else "cuda"]
    measure += ["--seconds", "0.02" if rehearse else "1"]
    bench = [*measure, *(["--old-spikingjelly", str(old)] if old.exists() else [])]
    small = ["recurrent", "--eager", "--dtypes", "float32", "--batch-size", "2"]
    networks = [*measure, "--networks", *(small if rehearse else ["--batch-size", "64"])]
    sizes = [f"--size={size}" for size in (("4x1024",) if rehearse else SIZES)]
    return [
        Part("machine", 45, [*own, "machine"], "machine"),
        Part("kernels against the reference", 60, [*parallel, f"{file}::test_short_list"], "tests"),
        Part("public path", 90, [*parallel, *(f"{file}::test_{name}" for name in PATH)], "tests"),
        Part(f"hosts, SpikingJelly {OLD}", 35, [*parallel, "-m", "not host_independent", file], "old tests", old=True),
        Part("speed and memory", 120, [*bench, *sizes, "--leave-out", FLEX], "cases"),
        Part("all other GPU tests", 60, [*parallel, file, "--deselect", LARGE], "tests"),
        Part("more than 2^31 elements", 20, [*pytest, str(ROOT / LARGE)], "tests"),
        Part("whole grid", 25, [*bench, *(["--size=2x512"] if rehearse else ["--full"])], "cases"),
        Part("whole networks", 25, networks, "networks"),
    ]


def run(
    todo: list[Part],
    results: dict[str, Any],
    minutes: float,
    execute: Callable[[Part, float], dict[str, Any]],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Give every part its turn, and then what is left of the time to those that ran out of it.

    ``execute`` runs a part for so many seconds at most and returns its row of ``results["parts"]``. Parts that an
    earlier run has done are left out, except the first, which finds out whether this is the same machine.
    """
    end = clock() + 60 * minutes
    for turn in (1, 2):
        for part in todo:
            status = results["parts"].get(part.name, {"status": "not begun"})["status"]
            again = status == "out of time" if turn == 2 else status != "done" or part is todo[0]
            left = end - clock()
            if again and left >= 5:
                limit = left if turn == 2 else min(left, part.seconds * minutes / 8)
                results["parts"][part.name] = execute(part, limit)


def execute(part: Part, limit: float, results: dict[str, Any], work: Path, save: Callable[[], None]) -> dict[str, Any]:
    """Run a part in a process group that is killed at the limit; take over and save what it finds, as it comes."""
    log, found, old = work / "log", work / "found", work / "old"
    if part.old and not old.exists():
        return {"status": "failed", "seconds": 0, "why": f"there is no SpikingJelly {OLD}; add its wheel to --wheels"}
    # Without those of a pytest that may have started this script: the parts' own would take themselves for its workers.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command, environment = part.command, {**inherited, "QIF_FOUND": str(found), "QIF_DONE": str(work / "done")}
    environment["PYTHONPATH"] = os.pathsep.join([*([str(old)] if part.old else []), *_paths(work)])
    if "--rehearse" in sys.argv:
        environment |= {"TRITON_INTERPRET": "1", "QIF_REHEARSAL": str(work)}
    found.unlink(missing_ok=True)
    if part.book in BENCH:
        command = [*command, "--out", str(found)]
        if results[part.book]:
            _write(found, {key: results[key] for key in ("machine", "command", "date", part.book)})
    elif part.book != "machine":
        _write(work / "done", [name for name, row in results[part.book].items() if row["outcome"] != "failed"])
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while process.poll() is None and (left := limit - (time.monotonic() - began)) > 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(left, 5.0))
            _take_over(part.book, found, results)
            save()
    finally:
        ended = process.poll()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    _take_over(part.book, found, results)
    good = (0, 5) if "pytest" in command else (0,)  # 5: nothing was left to run
    status = "out of time" if ended is None else "done" if ended in good else "failed"
    row = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    return row if status == "done" else {**row, "log": log.read_text(errors="replace")[-4000:]}


def _take_over(book: str, found: Path, results: dict[str, Any]) -> None:
    lines = found.read_text().splitlines(keepends=True) if found.exists() else []
    if book in BENCH and lines:
        new = json.loads("".join(lines))
        results.update({key: new[key] for key in ("command", "date", book)})
        results["machine"] = results["machine"] or new["machine"]  # under --only, which a resumed run needs
        return
    for new in (json.loads(line) for line in lines if line.endswith("\n")):  # the last may be cut short
        was, now = (some.get("name") if book == "machine" else None for some in (results[book], new))
        if was and now and was != now:
            raise ValueError(f"the results in --out are of {was}, and this is {now}; name another file")
        results[book].update(new)


def _write(path: Path, content: Any) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _paths(work: Path) -> list[str]:
    there = os.environ.get("PYTHONPATH")
    return [str(work / "code"), str(work / "site"), str(HERE), *([there] if there else [])]


def prepare(work: Path, wheels: Path | None, old: Path | None) -> None:
    """Lay out in ``work`` what the parts import: the package as a wheel has it, the wheels, the older SpikingJelly."""
    for source, target in (("qif_plugins", "qif_plugins"), ("adapters", "qif_plugins/adapters")):
        shutil.copytree(ROOT / source, work / "code" / target, ignore=shutil.ignore_patterns("__pycache__"))
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        target = work / ("old" if wheel.name.startswith(f"spikingjelly-{OLD}-") else "site")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
            for entry in archive.infolist():  # compilers among them
                (target / entry.filename).chmod((entry.external_attr >> 16) & 0o777 | 0o644)
    if old is not None:
        (work / "old").symlink_to(old.resolve())


def begin(out: Path) -> dict[str, Any]:
    """Read what an earlier run has left in ``out``, or begin."""
    digest = hashlib.sha256()
    for folder in ("qif_plugins", "adapters", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            digest.update(path.read_bytes() if path.suffix in (".py", ".cu", ".h") else b"")
    sources = digest.hexdigest()[:16]
    if not out.exists():
        books: dict[str, Any] = {book: {} for book in ("machine", "parts", "tests", "old tests")}
        return {"sources": sources, "command": "", "date": "", "cases": [], "networks": [], **books}
    results: dict[str, Any] = json.loads(out.read_text())
    if results.get("sources") != sources:
        raise ValueError(f"{out} has results of other sources; move it away, or name another file with --out")
    return results


def page(results: dict[str, Any]) -> str:
    """The report in Markdown."""
    import report  # beside this file; it imports the package, which prepare() has laid out

    machine = results["machine"]
    lines = [f"# {machine.get('gpu') or machine.get('cpu') or 'An unknown machine'}: all that needs a card", ""]
    lines += [f"Written by `python benchmarks/gpu.py`; sources {results['sources']}.", "", "| part | | seconds |"]
    lines += ["| --- | --- | ---: |"]
    for part in parts(False, ROOT):
        row = results["parts"].get(part.name, {"status": "not begun", "seconds": 0})
        lines.append(f"| {part.name} | {row['status']}{': ' + row['why'] if 'why' in row else ''} | {row['seconds']} |")
    lines.append("")
    for book, host in (("tests", "all tests"), ("old tests", f"with SpikingJelly {OLD}")):
        rows = results[book]
        counts = [f"{sum(row['outcome'] == o for row in rows.values())} {o}" for o in ("passed", "failed", "skipped")]
        lines += [f"Tests, {host}: {', '.join(counts)}.", ""]
        lines += [f"{name}\n\n{_fenced(row['why'])}" for name, row in rows.items() if row["outcome"] == "failed"]
    lines += report.gpu_targets(results) if machine.get("gpu") else []
    lines += predictions(results["cases"], machine.get("backend", "qif"))
    lines += report.networks(results["networks"])
    return "\n".join([*lines, _fenced(machine.get("about", ""))])


def _fenced(text: str) -> str:
    return f"```\n{text.strip()}\n```\n"


def bytes_and_launches(steps: int, neurons: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """Bytes and launches of each pass by ``qif_plugins.ops.contract``, with plain numbers and a plain start.

    Forward reads x and writes the spikes, h in float32 and the last membrane; backward reads h and the spikes' gradient
    and writes that of x.
    """
    both = steps * neurons * (2 * itemsize + 4)
    return {"forward": (both + neurons * itemsize, 1), "backward": (both, 1)}


def predictions(cases: list[dict[str, Any]], backend: str) -> list[str]:
    """Tabulate what the bytes predict on paper beside what was measured, where something was."""
    lines = [
        f"On paper: bytes over {BANDWIDTH / 1e12:g} TB/s, and {LAUNCH * 1e6:g} µs a launch. Measured: the GPU's clock. "
        "From 2^22 neurons up more than 1/0.85 of the paper's time is a miss.",
        "",
        "| T, N, dtype | kernels | pass | launches | MB | on paper, µs | measured, µs | over paper | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    known: dict[Any, Any] = {(*map(int, s.split("x")), d): {} for d in ("float32", "bfloat16") for s in SIZES}
    known |= {(case["T"], case["N"], case["dtype"]): case["peers"] for case in cases}
    for (steps, neurons, dtype), peers in known.items():
        kernels = {"qif": backend, "qif, triton": "triton", "qif, cupy": "cupy"}
        for peer in [name for name in kernels if name == "qif" or "both" in peers.get(name, {})]:
            for which, (count, launches) in bytes_and_launches(steps, neurons, 4 if dtype == "float32" else 2).items():
                paper = count / BANDWIDTH + launches * LAUNCH
                seconds = peers.get(peer, {}).get(which, {}).get("device_seconds")
                missed = seconds is not None and neurons >= 2**22 and seconds > paper / 0.85
                measured = "- | -" if seconds is None else f"{seconds * 1e6:.1f} | {seconds / paper:.2f}"
                lines.append(
                    f"| {steps}, {neurons}, {dtype} | {kernels[peer]} | {which} | {launches} | {count / 1e6:.3g} | "
                    f"{paper * 1e6:.1f} | {measured} | {'miss' if missed else ''} |"
                )
    return [*lines, ""]


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest: write each test's outcome as soon as it is known."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or report.outcome != "passed"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
        _found({report.nodeid: {"outcome": report.outcome, "seconds": round(report.duration, 2), "why": why}})


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """As a plugin of pytest: leave out what has passed already."""
    done = set(json.loads(Path(os.environ["QIF_DONE"]).read_text()))
    items[:] = [item for item in items if item.nodeid not in done]


def _found(row: dict[str, Any]) -> None:
    with Path(os.environ["QIF_FOUND"]).open("a") as file:
        file.write(json.dumps(row) + "\n")


def machine(rehearse: bool) -> None:
    """Find out what the machine is, whether every backend has the reference's bits, and how fast memory is copied."""
    import torch

    from qif_plugins.experiments.bench.machine import machine as describe
    from qif_plugins.experiments.bench.peers import FLOOR_THERE, draw, moved_bytes
    from qif_plugins.experiments.bench.runner import Runner

    device = torch.device("cpu" if rehearse else "cuda")
    _found(describe(device))
    x, gradient = draw(4, 2**10 if rehearse else 2**25, torch.float32, device)
    runner = Runner(FLOOR_THERE, x, gradient)
    seconds = sorted((times.get("device") or times["call"])["both"] for times in (runner.repeat() for _ in range(7)))[3]
    moved = moved_bytes(FLOOR_THERE, x) or 0
    about = [f"A copy moves {moved / seconds / 1e12:.3g} TB/s, read and written ({x.nbytes / 1e6:.3g} MB, thrice)."]
    missing = [name for name in (*USEFUL, "spikingjelly") if find_spec(name) is None]
    about += [f"Not installed: {', '.join(missing) or 'nothing'}."]
    for command in (["nvidia-smi"], [sys.executable, "-m", "qif_plugins.cli", "doctor"]):
        if shutil.which(command[0]):
            about.append(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
        _found({"about": "\n".join(about)})


def main() -> int:
    parser = argparse.ArgumentParser(description="Run all that waits for a CUDA card.")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of what this machine lacks")
    parser.add_argument("--old-spikingjelly", type=Path, help=f"folder with an unpacked SpikingJelly {OLD}")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "gpu.json", help="results; a page goes beside it"
    )
    parser.add_argument("--only", nargs="+", help="only these parts, by the beginnings of their names")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, interpreted and emulated")
    parser.add_argument("--child", choices=("machine",), help=argparse.SUPPRESS)
    arguments, began = parser.parse_args(), time.monotonic()
    if arguments.child:
        machine(arguments.rehearse)
        return 0
    try:
        return _all_parts(arguments, began)
    except ValueError as error:
        parser.error(str(error))


def _all_parts(arguments: argparse.Namespace, began: float) -> int:
    out = arguments.out.resolve()
    results = begin(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, arguments.wheels, arguments.old_spikingjelly)
        sys.path[:0] = _paths(work)
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise ValueError(f"not installed: {', '.join(missing)}; put their wheels into the folder of --wheels")
        page(results)  # imports what saving needs, before the first part begins

        def save() -> None:
            _write(out, results)
            _write(out.with_suffix(".md"), page(results))

        def do(part: Part, limit: float) -> dict[str, Any]:
            print(f"{part.name}, {limit:.0f} s at most", end=": ", flush=True)
            results["parts"][part.name] = row = execute(part, limit, results, work, save)
            save()
            print(f"{row['status']} after {row['seconds']} s", flush=True)
            if part.book == "machine" and not arguments.rehearse and results["machine"].get("device") != "cuda":
                raise ValueError(f"PyTorch runs on no CUDA card here; --rehearse does without. {row.get('log', '')}")
            return row

        chosen = [part for part in parts(arguments.rehearse, work / "old")
                  if any(part.name.startswith(name) for name in arguments.only or [""])]  # fmt: skip
        run(chosen, results, arguments.minutes - (time.monotonic() - began) / 60, do)
    print(f"wrote {out} and {out.with_suffix('.md')}")
    return 0 if all(row["status"] == "done" for row in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
