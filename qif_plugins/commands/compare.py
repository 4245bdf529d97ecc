"""``qif compare``: LIF and QIF in the same network, in every installed host."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..compare.checkpoint import checkpoint_name, save
from ..compare.hosts import BETA, HOSTS, WIDTHS, host_version, installed_hosts
from ..compare.report import print_table, summarise, write_figure, write_json
from ..compare.training import Settings, Training, train
from ..data import DATA_SETS, load_images
from ..plot import require_matplotlib
from ..surrogate import WINDOWS
from .options import at_least, device, one_of, positive

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--data", default="digits", help=f"data set: {', '.join(DATA_SETS)}")
    parser.add_argument("--data-folder", type=Path, default=Path("data"), help="where torchvision's data sets lie")
    parser.add_argument("--download", action="store_true", help="fetch a missing data set of torchvision's")
    parser.add_argument("--hosts", help=f"comma-separated, of {', '.join(HOSTS)} (default: those installed)")
    parser.add_argument("--windows", default=",".join(WINDOWS), help="windows of QIF, comma-separated")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many seeds, 0 first")
    parser.add_argument("--epochs", type=at_least(1), default=5, help="passes over the training images")
    parser.add_argument("--T", type=at_least(1), default=4, help="time steps")
    parser.add_argument("--batch-size", type=at_least(2), default=32, help="images a training step")
    parser.add_argument("--lr", type=positive, default=4e-3, help="learning rate of Adam, taken to 0 by a cosine")
    parser.add_argument("--device", default="cpu", help="device to train on")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads; more slow so small a network down")
    parser.add_argument("--save", action="store_true", help="also write every trained network, for 'qif landscape'")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of compare.json and compare.png")


def run(arguments: argparse.Namespace) -> int:
    """Train everything asked for, print the table, write the files."""
    hosts = _hosts(arguments.hosts)
    windows = one_of("window", arguments.windows, WINDOWS)
    where = device(arguments.device)
    # Before hours of training, not after.
    arguments.out.mkdir(parents=True, exist_ok=True)
    require_matplotlib()
    images = load_images(
        arguments.data, arguments.data_folder, arguments.download, "pass --data-folder where it lies, or --download"
    )
    settings = Settings(arguments.epochs, arguments.T, arguments.batch_size, arguments.lr, where)
    plan = [(host, window, seed) for seed in range(arguments.seeds) for host in hosts for window in (None, *windows)]
    print(
        f"{images.name}: {len(images.train)} training and {len(images.test)} test images; T = {settings.steps}, "
        f"epochs {settings.epochs}, seeds 0 to {arguments.seeds - 1}; {len(plan)} trainings"
    )
    began = time.perf_counter()

    def keep(training: Training, network: nn.Module) -> None:
        if arguments.save:
            save(arguments.out / f"{checkpoint_name(training)}.pt", network, training, images, settings)

    with _reproducible(arguments.threads):
        images = images.to(where)
        trainings = []
        for number, (host, window, seed) in enumerate(plan, 1):
            progress = _Progress(f"[{number}/{len(plan)}]", settings.epochs)
            trainings.append(train(images, host, window, seed, settings, progress, keep))
            progress.close()
    seconds = time.perf_counter() - began
    summaries = summarise(trainings)
    print()
    print_table(summaries)
    write_json(arguments.out / "compare.json", _header(arguments, hosts, windows, seconds), trainings)
    title = f"{images.name}, T = {settings.steps}, mean ± deviation over {arguments.seeds} seed"
    write_figure(arguments.out / "compare.png", title + "s" * (arguments.seeds > 1), trainings)
    print(f"\n{seconds:.0f} s; wrote {arguments.out / 'compare.json'} and {arguments.out / 'compare.png'}")
    return 0


def _hosts(text: str | None) -> tuple[str, ...]:
    installed = installed_hosts()
    wanted = installed if text is None else one_of("host", text, tuple(HOSTS))
    missing = [name for name in wanted if name not in installed]
    if missing or not wanted:
        names = missing or list(HOSTS)
        have = f"; installed: {', '.join(installed)}" if installed else ""
        raise ImportError(
            f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not installed{have}. "
            f"Install with: pip install 'qif-plugins[{','.join(names)}]'"
        )
    return wanted


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """The same seed gives the same numbers: a fixed number of threads, and cuDNN's deterministic algorithms."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def _header(
    arguments: argparse.Namespace, hosts: tuple[str, ...], windows: tuple[str, ...], seconds: float
) -> dict[str, Any]:
    return {
        "versions": {
            "qif-plugins": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{host: host_version(host) for host in hosts},
        },
        "config": {
            "data": arguments.data,
            "hosts": hosts,
            "windows": windows,
            "seeds": list(range(arguments.seeds)),
            "epochs": arguments.epochs,
            "T": arguments.T,
            "batch_size": arguments.batch_size,
            "lr": arguments.lr,
            "device": arguments.device,
            "threads": arguments.threads,
            "widths": WIDTHS,
            "lif_beta": BETA,
        },
        "seconds": seconds,
    }


class _Progress:
    """One line a training on stderr, rewritten after every epoch where stderr is a terminal."""

    def __init__(self, prefix: str, epochs: int) -> None:
        self.prefix, self.epochs, self.line = prefix, epochs, ""

    def __call__(self, training: Training) -> None:
        name = "LIF" if training.neuron == "LIF" else f"QIF {training.window}"
        self.line = (
            f"{self.prefix} {training.host}, {name}, seed {training.seed}: epoch {len(training.epochs)}/{self.epochs}, "
            f"test accuracy {training.epochs[-1].accuracy:.1%}"
        )
        if sys.stderr.isatty():
            print(f"\r\x1b[K{self.line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        print("" if sys.stderr.isatty() else self.line, file=sys.stderr, flush=True)
