"""``qif exact``: train with exact gradients, compare neurons, or draw the demonstrations."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..files import finite, replacing, write_json
from ..training.checkpoint import Checkpoints, load_checkpoint
from .data import DATASETS, load
from .demo import DEMOS
from .search import Comparison, Runs, compare, draw, summarise
from .train import DEFAULTS, LAYERS, LIF_IMAGES, LOSSES, Settings, build, fit

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    modes = parser.add_subparsers(dest="mode", required=True, metavar="mode")
    train = modes.add_parser("train", help="train on a data set")
    _add_data(train)
    train.add_argument("--neuron", choices=tuple(LAYERS), default="qif", help="neuron (default: qif)")
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
        ("clip", float, "largest norm of a gradient, beyond which it is scaled down; None: any"),
        ("pseudo_scale", float, "scale of the pseudospikes' drive; None: the neuron's own"),
    ):
        train.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            help=f"{text} (default: {getattr(Settings(), name)}, or the data set's or neuron's)",
        )
    train.add_argument("--resume", action="store_true", help="go on from the last epoch of the run in --out")
    train.add_argument(
        "--out", type=Path, default=Path("runs/exact"), help="folder of the results (default: runs/exact)"
    )
    search = modes.add_parser("compare", help="search hyperparameters equally for several neurons, then test the best")
    _add_data(search)
    search.add_argument(
        "--neurons", choices=tuple(LAYERS), nargs="+", default=["lif", "qif"], help="neurons (default: lif qif)"
    )
    search.add_argument("--trials", type=int, default=40, help="trials of the search for each neuron (default: 40)")
    search.add_argument("--finalists", type=int, default=5, help="best trials, which are trained again (default: 5)")
    search.add_argument("--seeds", type=int, default=5, help="seeds of the test (default: 5)")
    search.add_argument("--epochs", type=int, default=8, help="epochs of every run (default: 8)")
    search.add_argument("--batch", type=int, default=50, help="batch size (default: 50)")
    search.add_argument(
        "--out",
        type=Path,
        default=Path("runs/exact-compare"),
        help="folder of the results; runs that are there are not done again (default: runs/exact-compare)",
    )
    demo = modes.add_parser("demo", help="move, add and remove spikes by gradient, and learn from silence")
    demo.add_argument("names", nargs="*", metavar="NAME", help=f"which ones, of {', '.join(DEMOS)} (default: all)")
    demo.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/exact"), help="folder of the figures (default: runs/exact)"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="what to learn (default: digits)")
    parser.add_argument("--root", type=Path, help="folder of shd_train.h5 and shd_test.h5, or SpikingJelly's SHD root")
    parser.add_argument("--limit", type=int, help="use so many samples of the training and of the test set at most")
    parser.add_argument("--hidden", type=int, nargs="*", help="sizes of the hidden layers (default: the data set's)")
    parser.add_argument("--recurrent", action="store_true", help="make the hidden layers recurrent")


def run(arguments: argparse.Namespace) -> int:
    """Do it; 0 after success."""
    return {"train": _train, "compare": _compare, "demo": _demo}[arguments.mode](arguments)


def settings(arguments: argparse.Namespace) -> Settings:
    """The run that the options ask for.

    Raises:
        ValueError: A number out of range.
    """
    chosen = Settings(neuron=arguments.neuron, recurrent=arguments.recurrent)
    chosen = replace(chosen, **DEFAULTS[arguments.dataset])
    if chosen.neuron == "lif" and arguments.dataset != "shd":
        chosen = replace(chosen, **LIF_IMAGES)
    names = (
        "loss",
        "duration",
        "tau",
        "latest",
        "scale",
        "rate",
        "epochs",
        "batch",
        "lr",
        "seed",
        "clip",
        "pseudo_scale",
    )
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.hidden is not None:
        given["hidden"] = tuple(arguments.hidden)
    chosen = replace(chosen, **given)
    for name in ("duration", "tau", "latest", "scale", "rate", "batch", "lr", "clip", "pseudo_scale", "limit"):
        value = getattr(arguments if name == "limit" else chosen, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
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
    source = {"name": arguments.dataset, "root": arguments.root and str(arguments.root), "limit": arguments.limit}
    checkpoints = Checkpoints(arguments.out, asdict(chosen), {"source": source})
    resumed = _saved(checkpoints) if arguments.resume else None
    print(f"{arguments.dataset}: {len(data.train_labels)} samples to train, {len(data.test_labels)} to test; {chosen}")
    if resumed is not None:
        print(f"{checkpoints.last} has {resumed['state']['epoch']} of {chosen.epochs} epochs")

    def report(record: dict[str, float]) -> None:
        print(
            f"epoch {record['epoch']:3.0f}  loss {record['loss']:.4f}  accuracy {record['accuracy']:.4f}  silent "
            f"{record['silent']:.3f}  rate {record['rate']:.3f}  gradient {record['grad_norm']:.3g}"
        )

    history = fit(network, data, chosen, report, checkpoints=checkpoints, resumed=resumed)
    # JSON has no NaN: what epoch 0 lacks is left out.
    records = [{key: value for key, value in record.items() if math.isfinite(value)} for record in history]
    content = {"dataset": arguments.dataset, "settings": asdict(chosen), "history": records}
    write_json(arguments.out / "exact.json", content)
    with replacing(arguments.out / "exact.pt") as beside:
        torch.save({"settings": asdict(chosen), "data": source, "network": network.state_dict()}, beside)
    print(f"written: {arguments.out / 'exact.json'}, {arguments.out / 'exact.pt'}")
    return 0


def _saved(checkpoints: Checkpoints) -> dict[str, Any]:
    """The state to go on from, if it is the same run's."""
    content = load_checkpoint(checkpoints.last)
    wanted = {**checkpoints.config, **checkpoints.data["source"]}
    found = {**content["config"], **content["data"].get("source", {})}
    for name, value in wanted.items():
        if name not in found or found[name] != value:
            raise ValueError(
                f"{checkpoints.last} is of a run with {name}={found.get(name)}, not {value}; pass the same options, or "
                f"leave out --resume to start anew"
            )
    return content


def _compare(arguments: argparse.Namespace) -> int:
    for name in ("trials", "finalists", "seeds", "epochs", "batch", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if any(size < 1 for size in arguments.hidden or ()):
        raise ValueError(f"--hidden must be at least 1, got {arguments.hidden}")
    default = DEFAULTS[arguments.dataset].get("hidden", Settings().hidden)
    hidden = default if arguments.hidden is None else tuple(arguments.hidden)
    comparison = Comparison(
        arguments.dataset,
        arguments.root and str(arguments.root),
        arguments.limit,
        hidden,
        arguments.recurrent,
        arguments.epochs,
        arguments.batch,
    )
    neurons = list(dict.fromkeys(arguments.neurons))
    runs = Runs(arguments.out / "runs.json", comparison)
    if runs.records:
        print(f"{runs.path} has {len(runs.records)} finished runs, which are not done again")

    def report(record: dict[str, Any]) -> None:
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in record["params"].items())
        print(
            f"{record['part']:7s} {record['neuron']:5s} trial {record['trial']:3d} seed {record['seed']:3d}  accuracy "
            f"{record['accuracy']:.4f}  {record.get('failed', shown)}",
            flush=True,
        )

    compare(runs, neurons, arguments.trials, arguments.finalists, seeds=arguments.seeds, report=report)
    summary = summarise(runs, neurons)
    for neuron, found in summary.items():
        print(
            f"{neuron}: test {found['test mean']:.4f} ± {found['test deviation']:.4f} over {len(found['test'])} seeds, "
            f"validation {found['validation']:.4f}; silent neurons {found['silent at first']:.3f} at first, "
            f"{found['silent at worst']:.3f} at worst, {found['silent at last']:.3f} at last; gradient "
            f"{found['gradient']:.3g}, largest over mean {found['gradient largest over mean']:.3g}"
        )
    write_json(arguments.out / "compare.json", finite({"comparison": asdict(comparison), "neurons": summary}))
    draw(runs, neurons, arguments.out / "compare.png")
    print(f"written: {arguments.out / 'compare.json'}, {arguments.out / 'compare.png'}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    unknown = [name for name in arguments.names if name not in DEMOS]
    if unknown:
        raise ValueError(f"unknown demonstration {unknown[0]!r}; there are {', '.join(DEMOS)}")
    results = {}
    for name in arguments.names or DEMOS:
        results[name] = DEMOS[name](arguments.out, seed=arguments.seed)
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in results[name].items()))
    write_json(arguments.out / "demo.json", finite({"seed": arguments.seed, **results}))
    print(f"written: {arguments.out}")
    return 0
