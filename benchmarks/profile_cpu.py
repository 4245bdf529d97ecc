"""Where the time of a forward and a backward pass goes on a CPU: the kernels, the memory, the call.

    python benchmarks/profile_cpu.py [--size 4x2097152] [--threads 2]

Prints, for one size, what the kernels take on memory that is already there, what the page faults of new memory add,
what huge pages save of them, the same for three copies of the tensor, and what a call on a small layer costs.
``benchmarks/report.py`` puts the results file that it writes onto ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qif_plugins import QIFParameters, Window, qif_multi_step
from qif_plugins.experiments.bench.harness import write
from qif_plugins.experiments.bench.machine import machine_name
from qif_plugins.ops import numba_backend
from qif_plugins.ops.contract import Coefficient, Coefficients, Kind, Shape
from qif_plugins.ops.shortcuts.memory import on_huge_pages
from qif_plugins.support.text import text_table

PARAMS = QIFParameters()
WINDOW = Window.unbiased(PARAMS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time goes on a CPU.")
    parser.add_argument("--size", default="4x2097152", help="TxN")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/profile-MACHINE.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps, neurons = map(int, arguments.size.split("x"))
    rows = profile(steps, neurons, arguments.repeats)
    print(f"T = {steps}, N = {neurons}, float32, {arguments.threads} threads, medians of {arguments.repeats}")
    header = ["", "ms", "page faults", "system ms"]
    cells = [[row["what"], *(f"{row[key]:.3g}" for key in ("ms", "faults", "system"))] for row in rows]
    print(text_table(header, cells))
    name = machine_name(torch.device("cpu"))
    path = arguments.out or Path(__file__).parent / "results" / f"profile-{name}.json"
    write(path, {"profile": {"machine": name, "T": steps, "N": neurons, "rows": rows}})
    print(f"wrote {path}")


def profile(steps: int, neurons: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each part, all of them interleaved."""
    x, gradient = torch.randn(steps, neurons), torch.randn(steps, neurons)
    v = torch.empty(neurons)
    warm = [torch.zeros_like(x) for _ in range(3)]
    c = Coefficients(*map(Coefficient, (0.25, 0.0, 0.5, 1.0, 0.0, 1.0, WINDOW.lo, WINDOW.hi, WINDOW.height)))
    kind = Kind(soft=False, detach_reset=False, strict=False, shape=Shape.WINDOW, pre_reset=False)
    leaf, small = x.clone().requires_grad_(), torch.randn(4, 64, requires_grad=True)
    small_gradient = torch.randn(4, 64)

    def kernels(spike: torch.Tensor, h: torch.Tensor, grad_x: torch.Tensor) -> None:
        numba_backend.forward(x, 0.0, c, kind, spike, v, None, h)
        numba_backend.backward(gradient, None, None, h, 0.0, None, c, kind, grad_x, None, (False,) * 6)

    def new() -> torch.Tensor:
        return torch.empty_like(x)

    def huge() -> torch.Tensor:
        return on_huge_pages(torch.empty_like(x))

    def call(x: torch.Tensor, gradient: torch.Tensor) -> None:
        x.grad = None
        qif_multi_step(x, 0.0, PARAMS, WINDOW)[0].backward(gradient)

    parts: dict[str, Callable[[], Any]] = {
        "three copies, reused memory": lambda: [tensor.copy_(x) for tensor in warm],
        "three copies, new memory": lambda: [x.clone() for _ in range(3)],
        "kernels, reused memory": lambda: kernels(*warm),
        "kernels, new memory": lambda: kernels(new(), new(), new()),
        "kernels, new memory on huge pages": lambda: kernels(huge(), huge(), huge()),
        "qif_multi_step, forward and backward": lambda: call(leaf, gradient),
        "the same, T = 4, N = 64": lambda: call(small, small_gradient),
    }
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in parts}
    for repeat in range(repeats + 2):
        for name, run in parts.items():
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            run()
            took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            if repeat >= 2:
                system = after.ru_stime - before.ru_stime
                measured[name].append((took * 1e3, after.ru_minflt - before.ru_minflt, system * 1e3))
    keys = ("ms", "faults", "system")
    return [
        {"what": name, **dict(zip(keys, map(statistics.median, zip(*some, strict=True)), strict=True))}
        for name, some in measured.items()
    ]


if __name__ == "__main__":
    main()
