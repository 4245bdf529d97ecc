"""``qif bench``: our kernels beside the hosts' neurons, or whole networks with either, interleaved in one run."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from ..experiments.bench.harness import FULL, QUICK, QUICK_GPU
from ..experiments.bench.harness import run as measure_sizes
from ..experiments.bench.machine import machine_name
from ..experiments.bench.peers import OURS, PEERS
from ..support.names import check_known
from .objects import device


def run(arguments: argparse.Namespace) -> int:
    """Measure, print each size as it is done, and write the results."""
    where = device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    stem = machine_name(where) if arguments.networks is None else f"networks-{machine_name(where)}"
    path = arguments.out or Path("benchmarks/results") / f"{stem}.json"
    command = " ".join(["qif", *sys.argv[1:]])
    dtypes = [getattr(torch, name) for name in arguments.dtypes or ("float32", "bfloat16")]
    minutes = math.inf if arguments.minutes is None else arguments.minutes
    measure = _sizes if arguments.networks is None else _networks
    left = measure(arguments, where, dtypes, path, command, minutes)
    print(f"\nwrote {path}")
    if left:
        print(f"{left} cases are left; the same command with --resume measures them")
    return 0


def _networks(
    arguments: argparse.Namespace, where: torch.device, dtypes: list[torch.dtype], path: Path, command: str,
    minutes: float,
) -> int:  # fmt: skip
    """Measure whole networks; return the number of cases that are left."""
    for option in ("full", "size", "most", "old_spikingjelly", "leave_out"):
        if getattr(arguments, option):
            raise ValueError(
                f"--networks takes no --{option.replace('_', '-')}, which is about single neurons; leave it out"
            )
    from ..experiments.bench import networks  # needs both hosts

    check_known("network", networks.NETWORKS, *arguments.networks)
    return networks.run(
        arguments.networks or list(networks.NETWORKS), dtypes, not arguments.eager, arguments.batch_size, where, path,
        command, arguments.seconds or 10.0, _say, arguments.resume, minutes,
    )  # fmt: skip


def _sizes(
    arguments: argparse.Namespace, where: torch.device, dtypes: list[torch.dtype], path: Path, command: str,
    minutes: float,
) -> int:  # fmt: skip
    """Measure single neurons; return the number of cases that are left."""
    if arguments.batch_size or arguments.eager:
        raise ValueError("--batch-size and --eager are about --networks; add it, or leave them out")
    on_gpu = where.type == "cuda"
    usual = FULL if arguments.full else QUICK_GPU if on_gpu else QUICK
    most = arguments.most or (2**28 if on_gpu else 2**25)
    wanted = [_size(text) for text in arguments.size] if arguments.size else usual
    sizes = tuple((steps, neurons) for steps, neurons in wanted if steps * neurons <= most)
    if not sizes:
        raise ValueError(f"no size has T times N of at most --most {most}; raise it")
    check_known("neuron to --leave-out", [name for name in PEERS if name != OURS], *arguments.leave_out)
    seconds = arguments.seconds or (2.0 if arguments.full and not arguments.size else 10.0)
    return measure_sizes(
        sizes, dtypes, where, path, command, arguments.old_spikingjelly, seconds, _say, arguments.resume, minutes,
        arguments.leave_out,
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, flush=True)


def _size(text: str) -> tuple[int, int]:
    try:
        steps, neurons = (int(part) for part in text.split("x"))
        if steps < 1 or neurons < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--size {text!r} is not of the form TxN, e.g. 4x2097152") from None
    return steps, neurons
