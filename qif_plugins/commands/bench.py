"""``qif bench``: our kernels beside the hosts' neurons, interleaved in one run."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from ..bench import FULL, QUICK, machine_name
from ..bench import run as measure_all
from .options import at_least, device, positive

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--device", default="cpu", help="device to measure on")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: as PyTorch sets them)")
    parser.add_argument("--full", action="store_true", help="T in 1, 4, 16, 64 and N from 2^10 to 2^25")
    parser.add_argument("--size", action="append", help="only this size, as TxN, e.g. 4x2097152; may be repeated")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--seconds", type=positive, default=10.0, help="time for each size; three repetitions at least")
    parser.add_argument("--most", type=at_least(1), default=2**25, help="largest T times N")
    parser.add_argument(
        "--old-spikingjelly", type=Path, help="folder with a second SpikingJelly (pip install --target FOLDER ...)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the results file holds and measure only what it lacks"
    )
    parser.add_argument("--minutes", type=positive, default=math.inf, help="begin no further size after this time")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/MACHINE.json)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print each size as it is done, and write the results."""
    where = device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    sizes = [_size(text) for text in arguments.size] if arguments.size else FULL if arguments.full else QUICK
    sizes = tuple((steps, neurons) for steps, neurons in sizes if steps * neurons <= arguments.most)
    if not sizes:
        raise ValueError(f"no size has T times N of at most --most {arguments.most}; raise it")
    path = arguments.out or Path("benchmarks/results") / f"{machine_name(where)}.json"
    command = " ".join(["qif", *sys.argv[1:]])
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    left = measure_all(
        sizes, dtypes, where, path, command, arguments.old_spikingjelly, arguments.seconds,
        lambda text: print(text, flush=True), arguments.resume, arguments.minutes,
    )  # fmt: skip
    print(f"\nwrote {path}")
    if left:
        print(f"{left} cases are left; the same command with --resume goes on")
    return 0


def _size(text: str) -> tuple[int, int]:
    try:
        steps, neurons = (int(part) for part in text.split("x"))
        if steps < 1 or neurons < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--size {text!r} is not of the form TxN, e.g. 4x2097152") from None
    return steps, neurons
