"""``qif exact``: train a network with exact gradients, draw the demonstrations, or measure loss landscapes."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..files import replacing
from .data import DATASETS, load, select
from .demo import DEMOS
from .landscape import along, classify_jumps, fragmentation, random_direction, surface
from .spikes import Spikes
from .train import DEFAULTS, LAYERS, LOSSES, Settings, build, classification_loss, fit

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="mode")
    train = modes.add_parser("train", help="train on a data set")
    train.add_argument("--dataset", choices=DATASETS, default="digits", help="what to learn (default: digits)")
    train.add_argument("--root", type=Path, help="folder of shd_train.h5 and shd_test.h5, or SpikingJelly's SHD root")
    train.add_argument("--limit", type=int, help="use so many samples of the training and of the test set at most")
    train.add_argument("--neuron", choices=tuple(LAYERS), default="qif", help="neuron (default: qif)")
    train.add_argument("--hidden", type=int, nargs="*", help="sizes of the hidden layers")
    train.add_argument("--recurrent", action="store_true", help="make the hidden layers recurrent")
    train.add_argument("--loss", choices=LOSSES, help="the neuron that spikes first wins, or the one that spikes most")
    for name, kind, text in (
        ("duration", float, "trial length, in the unit of the spike times (SHD: seconds)"),
        ("tau", float, "membrane time constant"),
        ("latest", float, "time at which a black pixel would spike"),
        ("scale", float, "time, or number of spikes, that counts as one logit"),
        ("rate", float, "mean number of spikes of a neuron at the start"),
        ("epochs", int, "epochs"),
        ("batch", int, "batch size"),
        ("lr", float, "learning rate"),
        ("seed", int, "seed of weights and batches"),
    ):
        train.add_argument(
            f"--{name}", type=kind, help=f"{text} (default: {getattr(Settings(), name)}, or the data set's)"
        )
    train.add_argument(
        "--out", type=Path, default=Path("runs/exact"), help="folder of the results (default: runs/exact)"
    )
    landscape = modes.add_parser("landscape", help="loss and gradient of trained networks along random directions")
    landscape.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that 'qif exact train' wrote")
    landscape.add_argument("--samples", type=int, default=20, help="training samples in the loss (default: 20)")
    landscape.add_argument("--points", type=int, default=401, help="positions on the line, 4n + 1 (default: 401)")
    landscape.add_argument("--grid", type=int, default=0, help="also a plane of so many positions squared (default: 0)")
    landscape.add_argument("--radius", type=float, default=0.2, help="in units of the weights' norms (default: 0.2)")
    landscape.add_argument("--seed", type=int, default=0, help="seed of the directions (default: 0)")
    landscape.add_argument("--out", type=Path, default=Path("runs/landscape"), help="(default: runs/landscape)")
    demo = modes.add_parser("demo", help="move, add and remove spikes by gradient, and learn from silence")
    demo.add_argument("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(DEMOS)} (default: all)")
    demo.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/exact"), help="folder of the figures (default: runs/exact)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it; 0 after success."""
    return {"train": _train, "demo": _demo, "landscape": _landscape}[arguments.mode](arguments)


def settings(arguments: argparse.Namespace) -> Settings:
    """The run that the options ask for.

    Raises:
        ValueError: A number out of range.
    """
    chosen = Settings(**{**DEFAULTS[arguments.dataset], "neuron": arguments.neuron, "recurrent": arguments.recurrent})
    names = ("loss", "duration", "tau", "latest", "scale", "rate", "epochs", "batch", "lr", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.hidden is not None:
        given["hidden"] = tuple(arguments.hidden)
    chosen = replace(chosen, **given)
    for name in ("duration", "tau", "latest", "scale", "rate", "batch", "lr", *(["limit"] if arguments.limit else [])):
        value = getattr(arguments if name == "limit" else chosen, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive and finite, got {value}")
    if chosen.epochs < 0 or any(size < 1 for size in chosen.hidden):
        raise ValueError(
            f"--epochs must not be negative and --hidden at least 1, got {chosen.epochs} and {chosen.hidden}"
        )
    if arguments.dataset != "shd" and chosen.latest > chosen.duration:
        raise ValueError(
            f"--latest {chosen.latest:g} lies after the trial's end; at most --duration {chosen.duration:g}"
        )
    return chosen


def _train(arguments: argparse.Namespace) -> int:
    chosen = settings(arguments)
    data = load(arguments.dataset, chosen.duration, chosen.latest, arguments.root, arguments.limit)
    network = build(chosen, data.train.channels, data.classes)
    print(f"{arguments.dataset}: {len(data.train_labels)} samples to train, {len(data.test_labels)} to test; {chosen}")

    def report(record: dict[str, float]) -> None:
        print(
            f"epoch {record['epoch']:3.0f}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.4f}  silent "
            f"{record['silent']:.3f}  rate {record['rate']:.3f}  gradient {record['grad_norm']:.3g}"
        )

    history = fit(network, data, chosen, report)
    with replacing(arguments.out / "exact.json") as beside:
        # JSON has no NaN: what epoch 0 lacks is left out.
        records = [{key: value for key, value in record.items() if math.isfinite(value)} for record in history]
        beside.write_text(
            json.dumps({"dataset": arguments.dataset, "settings": asdict(chosen), "history": records}, indent=1)
        )
    with replacing(arguments.out / "exact.pt") as beside:
        source = {"name": arguments.dataset, "root": arguments.root and str(arguments.root), "limit": arguments.limit}
        torch.save({"settings": asdict(chosen), "data": source, "network": network.state_dict()}, beside)
    print(f"written: {arguments.out / 'exact.json'}, {arguments.out / 'exact.pt'}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    unknown = [name for name in arguments.names if name not in DEMOS]
    if unknown:
        raise ValueError(f"unknown demonstration {unknown[0]!r}; there are {', '.join(DEMOS)}")
    results = {}
    for name in arguments.names or DEMOS:
        results[name] = DEMOS[name](arguments.out, seed=arguments.seed)
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in results[name].items()))
    with replacing(arguments.out / "demo.json") as beside:
        beside.write_text(json.dumps({"seed": arguments.seed, **results}, indent=1))
    print(f"written: {arguments.out}")
    return 0


def _landscape(arguments: argparse.Namespace) -> int:
    import matplotlib.pyplot as plt

    if arguments.points % 4 != 1 or arguments.points < 13:
        raise ValueError(f"--points must be 4n + 1 and at least 13, got {arguments.points}")
    if not (arguments.samples > 0 and 0 < arguments.radius < math.inf and arguments.grid >= 0):
        raise ValueError("--samples and --radius must be positive and --grid not negative")
    missing = [run for run in arguments.runs if not (run / "exact.pt").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0] / 'exact.pt'} does not exist; make it with 'qif exact train --out {missing[0]}'"
        )
    columns = 3 if arguments.grid else 2
    figure, axes = plt.subplots(
        len(arguments.runs),
        columns,
        figsize=(3.6 * columns, 2.8 * len(arguments.runs)),
        layout="constrained",
        squeeze=False,
    )
    numbers = {}
    ends = torch.linspace(-arguments.radius, arguments.radius, arguments.points, dtype=torch.float64)
    for row, run_folder in zip(axes, arguments.runs, strict=True):
        saved = torch.load(run_folder / "exact.pt")
        chosen = Settings(**saved["settings"])
        source = {**saved["data"], "root": saved["data"]["root"] and Path(saved["data"]["root"])}
        data = load(source["name"], chosen.duration, chosen.latest, source["root"], source["limit"])
        network = build(chosen, data.train.channels, data.classes)
        network.load_state_dict(saved["network"])
        directions = [random_direction(network, arguments.seed), random_direction(network, arguments.seed + 1)]
        found: dict[str, object] = {"settings": saved["settings"]}
        for name, size in (("batch", arguments.samples), ("sample", 1)):
            samples = torch.arange(min(size, len(data.train_labels)))
            inputs, labels = select(data.train, samples), data.train_labels[samples]

            def loss(inputs: Spikes = inputs, labels: torch.Tensor = labels) -> torch.Tensor:
                return classification_loss(network(inputs), labels, chosen)  # noqa: B023

            line = along(network, loss, directions[0], ends)
            found[name] = fragmentation(line)
            row[0].plot(line.positions, line.loss, label=name)
            row[1].plot(line.positions, line.slope, label=name)
            if name == "sample":
                found["jumps of the sample"] = classify_jumps(network, inputs, directions[0], line, smallest=1e-3)
            elif arguments.grid:
                grid = torch.linspace(-arguments.radius, arguments.radius, arguments.grid, dtype=torch.float64)
                values, _ = surface(network, loss, directions[0], directions[1], grid)
                row[2].contourf(grid, grid, values.t(), levels=30)
                row[2].set(title=f"{chosen.neuron}: loss of the batch", xlabel="direction 1", ylabel="direction 2")
        for axis, what in zip(row, ("loss", "slope"), strict=False):
            axis.set(title=f"{chosen.neuron}: {what}", xlabel="direction 1")
            axis.legend()
        numbers[str(run_folder)] = found
        print(f"{run_folder} ({chosen.neuron}): " + json.dumps({key: found[key] for key in found if key != "settings"}))
    with replacing(arguments.out / "landscape.png") as beside:
        figure.savefig(beside, dpi=150)
    plt.close(figure)
    with replacing(arguments.out / "landscape.json") as beside:
        beside.write_text(json.dumps({"seed": arguments.seed, "radius": arguments.radius, "runs": numbers}, indent=1))
    print(f"written: {arguments.out}")
    return 0
