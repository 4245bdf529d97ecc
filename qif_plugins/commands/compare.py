"""``qif compare``: LIF and QIF in the same network, in every installed host."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..experiments.checkpoints import COMPARE, load_checkpoint
from ..experiments.compare.hosts import BETA, DYNAMICS, WIDTHS, host_version, installed_hosts
from ..experiments.compare.report import print_table, summarise, write_figure, write_json
from ..experiments.compare.training import Epoch, Hyperparameters, Training, save, train
from ..experiments.data.images import load_images
from ..experiments.figures import require_matplotlib
from ..experiments.names import HOSTS
from ..neuron.names import WINDOWS
from ..support.files import occupied, read_json
from .objects import device, one_of

Key = tuple[str, str | None, int]
"""A training of the plan: host, window of QIF or ``None`` for LIF, seed."""


def run(arguments: argparse.Namespace) -> int:
    """Run the trainings that are not there yet, print the table, and write the files."""
    hosts = _hosts(arguments.hosts)
    windows = one_of("window", arguments.windows, WINDOWS)
    where = device(arguments.device)
    require_matplotlib()  # before hours of training, not after
    with occupied(arguments.out):
        return _run(arguments, hosts, windows, where)


def _run(arguments: argparse.Namespace, hosts: tuple[str, ...], windows: tuple[str, ...], where: torch.device) -> int:
    path = arguments.out / "compare.json"
    plan = [(host, window, seed) for seed in range(arguments.seeds) for host in hosts for window in (None, *windows)]
    header = _header(arguments, hosts, windows)
    done: dict[Key, Training] = {}
    before = 0.0
    if path.exists():
        if arguments.resume:
            done, before = _done(path, header, plan)
        else:
            _check_finished(path)
    images = load_images(
        arguments.data, arguments.data_folder, arguments.download, "pass --data-folder where it lies, or --download"
    )
    settings = Hyperparameters(arguments.epochs, arguments.steps, arguments.batch_size, arguments.lr, where)
    print(
        f"{images.name}: {len(images.train)} training and {len(images.test)} test images; T = {settings.steps}, "
        f"epochs {settings.epochs}, seeds 0 to {arguments.seeds - 1}; {len(plan)} trainings"
        + (f", {len(done)} of them in {path} already" if done else "")
    )
    if arguments.save:
        done = {key: training for key, training in done.items() if _saved(arguments.out, training)}
    began = time.perf_counter()

    def finished() -> list[Training]:
        return [done[key] for key in plan if key in done]

    with _reproducible(arguments.threads):
        images = images.to(where)
        for number, key in enumerate(plan, 1):
            if key in done:
                continue
            progress = _Progress(f"[{number}/{len(plan)}]", settings.epochs)
            training, network = train(images, *key, settings, progress)
            progress.close()
            if arguments.save:
                save(arguments.out / f"{training.name}.pt", network, training, images, settings)
            done[key] = training
            # Complete after every training, so that a call that is killed can be resumed.
            seconds = before + time.perf_counter() - began
            write_json(path, {**header, "seconds": seconds, "trainings_left": len(plan) - len(done)}, finished())
    seconds = before + time.perf_counter() - began
    print()
    print_table(summarise(finished()))
    title = f"{images.name}, T = {settings.steps}, mean ± deviation over {arguments.seeds} seed"
    write_figure(arguments.out / "compare.png", title + "s" * (arguments.seeds > 1), finished())
    print(f"\n{seconds:.0f} s; wrote {path} and {arguments.out / 'compare.png'}")
    return 0


def _check_finished(path: Path) -> None:
    """Raise ``ValueError`` if the file belongs to an interrupted call, whose trainings would be lost."""
    try:
        left = read_json(path, "no file of 'qif compare'", {"trainings_left": int})["trainings_left"]
    except ValueError:  # an earlier version's, or another program's, which is overwritten
        return
    if left:
        raise ValueError(
            f"{path} is of a call that was interrupted, with {left} trainings left; pass --resume to go on, or another "
            "--out"
        )


def _done(path: Path, header: dict[str, Any], plan: list[Key]) -> tuple[dict[Key, Training], float]:
    """Read the trainings in the file of an earlier call, and the seconds that they took.

    Raises:
        ValueError: It is another kind of file, or its trainings were made with other options or are not asked for.
    """
    way_out = "take another copy, leave out --resume to begin anew, or pass another --out"
    content = read_json(path, "no file of 'qif compare'", _FILE, way_out)
    wanted = json.loads(json.dumps(header))
    for part in ("versions", "config"):
        for name in sorted({*wanted[part], *content[part]} - {"hosts", "windows", "seeds"}):
            here, there = (one[part].get(name) for one in (wanted, content))
            # The version of a host that only one of the two calls compares is in that call alone.
            if here != there and not (part == "versions" and None in (here, there)):
                raise ValueError(f"{path} holds trainings with {name} {there}, and here it is {here}; {way_out}")
    done: dict[Key, Training] = {}
    for row in content["trainings"]:
        epochs = [
            Epoch(math.nan if epoch["loss"] is None else epoch["loss"], epoch["accuracy"], epoch["spikes"])
            for epoch in row["epochs"]
        ]
        key = row["host"], None if row["neuron"] == "LIF" else row["window"], row["seed"]
        if key not in plan or len(epochs) != wanted["config"]["epochs"]:
            what = f"{row['host']}, {row['neuron']} {row['window']}, seed {row['seed']}, {len(epochs)} epochs"
            raise ValueError(
                f"{path} holds a training that is not asked for ({what}); pass the same options, or more hosts, "
                "windows or seeds, or another --out"
            )
        done[key] = Training(row["host"], row["neuron"], row["window"], row["seed"], epochs, row["step_ms"])
    return done, content["seconds"]


_FILE = {
    "versions": {str: str},
    "config": {str: object},
    "seconds": float,
    "trainings": [
        {
            "host": str, "neuron": str, "window": str, "seed": int, "step_ms": float,
            "epochs": [{"loss": (float, type(None)), "accuracy": float, "spikes": float}],
        }
    ],
}  # fmt: skip


def _saved(folder: Path, training: Training) -> bool:
    """Tell whether the trained network was saved.

    Raises:
        ValueError: The file is damaged, or holds another network.
    """
    path = folder / f"{training.name}.pt"
    if not path.exists():
        return False
    load_checkpoint(path, COMPARE, way_out="remove it to train that network again")
    return True


def _hosts(text: str | None) -> tuple[str, ...]:
    installed = installed_hosts()
    wanted = installed if text is None else one_of("host", text, HOSTS)
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
    """Make a seed give the same numbers each time: a fixed number of threads, and cuDNN's deterministic algorithms."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def _header(arguments: argparse.Namespace, hosts: tuple[str, ...], windows: tuple[str, ...]) -> dict[str, Any]:
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
            "T": arguments.steps,
            "batch_size": arguments.batch_size,
            "lr": arguments.lr,
            "device": arguments.device,
            "threads": arguments.threads,
            "widths": WIDTHS,
            "lif_beta": BETA,
            "qif_dynamics": DYNAMICS,
        },
    }


class _Progress:
    """One line on stderr for each training, rewritten after every epoch where stderr is a terminal."""

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
