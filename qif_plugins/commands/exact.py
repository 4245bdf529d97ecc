"""``qif exact``: train with exact gradients, compare neurons, or draw the demonstrations."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..exact.adjoint import EventBudgetError
from ..experiments.checkpoints import EXACT, EXACT_NETWORK, Checkpoints, differences, load_checkpoint, save_checkpoint
from ..experiments.exact.data import load
from ..experiments.exact.demo import DEMOS
from ..experiments.exact.search import Comparison, Runs, compare, draw, summarise
from ..experiments.exact.settings import DEFAULTS, LIF_IMAGES, TIMED, Settings
from ..experiments.exact.train import build, fit
from ..experiments.figures import require_matplotlib
from ..experiments.records import Trial
from ..support.files import finite, occupied, write_json
from ..support.names import check_known
from .options import NUMBERS


def run(arguments: argparse.Namespace) -> int:
    """Run the mode that was asked for; return 0 after success.

    Raises:
        ValueError: Options contradict each other, a run lies in ``--out`` already, or a layer spikes without end.
    """
    try:
        return {"train": _train, "compare": _compare, "demo": _demo}[arguments.mode](arguments)
    except EventBudgetError as error:
        raise ValueError(
            f"a layer emits more than {error.max_spikes} spikes in one sample; lower --rate or --lr, shorten "
            f"--duration, or limit the gradient with --clip"
        ) from error


def settings(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the options ask for.

    Raises:
        ValueError: Input spikes would come after the trial's end.
    """
    chosen = Settings(neuron=arguments.neuron, recurrent=arguments.recurrent)
    chosen = replace(chosen, **DEFAULTS[arguments.data])
    if chosen.neuron == "lif" and arguments.data not in TIMED:
        chosen = replace(chosen, **LIF_IMAGES)
    names = ("loss", *(name for name, _, _ in NUMBERS))
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.hidden is not None:
        given["hidden"] = tuple(arguments.hidden)
    chosen = replace(chosen, **given)
    if arguments.data not in TIMED and chosen.latest > chosen.duration:
        raise ValueError(
            f"--latest {chosen.latest:g} lies after the trial's end; at most --duration {chosen.duration:g}"
        )
    return chosen


def _train(arguments: argparse.Namespace) -> int:
    chosen = settings(arguments)
    out: Path = arguments.out or Path("runs") / f"exact-{arguments.data}-{chosen.neuron}"
    with occupied(out):
        return _train_in(out, chosen, arguments)


def _train_in(out: Path, chosen: Settings, arguments: argparse.Namespace) -> int:
    folder = arguments.data_folder and str(arguments.data_folder)
    source = {"name": arguments.data, "root": folder, "limit": arguments.limit, "split": arguments.split}
    checkpoints = Checkpoints(out, asdict(chosen), {"source": source}, EXACT)
    resumed = _saved(checkpoints, arguments.resume)
    data = load(arguments.data, chosen.duration, chosen.latest, arguments.data_folder, arguments.limit, arguments.split)
    network = build(chosen, data.train.channels, data.classes)
    print(f"{arguments.data}: {len(data.train_labels)} samples to train, {len(data.test_labels)} to test; {chosen}")
    if resumed is not None:
        print(f"{checkpoints.last} has {resumed['state']['epoch']} of {chosen.epochs} epochs")

    def report(record: dict[str, float]) -> None:
        # Epoch 0, before training, has no loss and no gradient.
        parts = [f"{text} {record[name]:{form}}" for name, text, form in _SHOWN if name in record]
        print(f"epoch {record['epoch']:3.0f}  {'  '.join(parts)}")

    history = fit(network, data, chosen, report, checkpoints=checkpoints, resumed=resumed)
    content = {"dataset": arguments.data, "settings": asdict(chosen), "history": finite(history)}
    write_json(out / "exact.json", content)
    saved = {"settings": asdict(chosen), "data": source, "network": network.state_dict()}
    save_checkpoint(out / "exact.pt", EXACT_NETWORK, saved)
    print(f"written: {out / 'exact.json'}, {out / 'exact.pt'}")
    return 0


_SHOWN = (
    ("loss", "loss", ".4f"), ("accuracy", "accuracy", ".4f"), ("silent", "silent", ".3f"), ("rate", "rate", ".3f"),
    ("grad_norm", "gradient", ".3g"),
)  # fmt: skip
"""Measurements in the line of an epoch: name, text and format."""


def _saved(checkpoints: Checkpoints, resume: bool) -> dict[str, Any] | None:
    """Load the state of a run with the same options, to continue from; ``None`` if there is none.

    Raises:
        ValueError: The folder has a run that is not to be resumed, or that was made with other options.
    """
    finished = checkpoints.folder / "exact.pt"
    if not resume:
        for path in (checkpoints.last, finished):
            if path.exists():
                raise ValueError(f"{path} exists; pass --resume to go on from it, or another --out")
    if not checkpoints.last.exists():
        return None
    content = load_checkpoint(checkpoints.last, EXACT)
    was = {**content["config"], **content["data"]["source"]}
    now = {**checkpoints.config, **checkpoints.data["source"]}
    if different := differences(was, now).values():
        raise ValueError(
            f"the run in {checkpoints.folder} was made with other options: {'; '.join(different)}. Pass the same to "
            f"continue, or another --out for a new run"
        )
    return content


def _compare(arguments: argparse.Namespace) -> int:
    default = DEFAULTS[arguments.data].get("hidden", Settings().hidden)
    hidden = default if arguments.hidden is None else tuple(arguments.hidden)
    comparison = Comparison(
        arguments.data,
        arguments.data_folder and str(arguments.data_folder),
        arguments.limit,
        hidden,
        arguments.recurrent,
        arguments.epochs,
        arguments.batch,
        arguments.split,
    )
    require_matplotlib()  # before the search, not after
    with occupied(arguments.out):
        return _compare_in(comparison, arguments)


def _compare_in(comparison: Comparison, arguments: argparse.Namespace) -> int:
    neurons = list(dict.fromkeys(arguments.neurons or ("lif", "qif")))
    runs = Runs(arguments.out / "runs.json", comparison)
    if len(runs):
        print(f"{runs.path} has {len(runs)} finished runs, which are not done again")

    def report(run: Trial) -> None:
        at, found = run.setting, run.result
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in at["sampled"].items())
        print(
            f"{at['part']:7s} {at['neuron']:5s} trial {at['number']:3d} seed {at['seed']:3d}  accuracy "
            f"{found['accuracy']:.4f}  {found.get('failed', shown)}",
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
    check_known("demonstration", DEMOS, *arguments.names)
    require_matplotlib()
    results = {}
    with occupied(arguments.out):
        for name in arguments.names or DEMOS:
            results[name] = DEMOS[name](arguments.out, seed=arguments.seed)
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in results[name].items()))
        write_json(arguments.out / "demo.json", finite({"seed": arguments.seed, **results}))
    print(f"written: {arguments.out}")
    return 0
