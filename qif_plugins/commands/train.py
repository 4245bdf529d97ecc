"""``qif train``: train a model from a configuration."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from ..experiments.checkpoints import Checkpoints, differences, load_checkpoint
from ..experiments.names import configurations
from ..experiments.training import Trainer
from ..experiments.training.config import Config, from_dict, load_config
from ..experiments.training.progress import Progress, tensorboard_writer
from ..experiments.training.session import follow_schedule, make_trainer, prepare
from ..support.checkpoints import load_weights
from ..support.files import occupied

MAY_CHANGE = ("data.folder", "data.download", "data.workers", "training.save_every")
"""Keys that a resumed run may change, since no result depends on them."""
EPOCHS = "training.epochs"
"""Key that a resumed run may raise, to train longer; the learning rate then follows the schedule of the new number."""
ADVICE = "name their folder with --data-folder", "pass --set data.download=true"


def run(arguments: argparse.Namespace) -> int:
    """Train, saving the best and the last state.

    Returns:
        0 when all epochs are done; 128 plus the signal's number after SIGINT or SIGTERM, with the state saved.
    """
    if arguments.config is None and not (arguments.resume and arguments.out):
        hint = "; --resume takes the one of the run in --out, if that is given" if arguments.resume else ""
        raise ValueError(f"--config is missing: a TOML file, or one of {', '.join(configurations())}{hint}")
    arguments.changes = [*(arguments.changes or ()), *_of_data(arguments)]
    out = arguments.out or Path("runs") / Path(arguments.config).stem
    if arguments.show:
        _show(_config(arguments, out, _earlier(arguments, out)))
        return 0
    # Of several processes, only one writes.
    alone = occupied(out) if os.environ.get("RANK", "0") == "0" else contextlib.nullcontext()
    with alone:
        return _run(arguments, out)


def _of_data(arguments: argparse.Namespace) -> list[str]:
    """Write ``--data`` and ``--data-folder`` as ``--set`` would have them."""
    given = {"name": arguments.data, "folder": arguments.data_folder}
    # As a string of TOML, so that a folder named 2024 is not taken for a number.
    return [f"data.{key}={json.dumps(str(value))}" for key, value in given.items() if value is not None]


def _run(arguments: argparse.Namespace, out: Path) -> int:
    earlier = _earlier(arguments, out)
    config = _config(arguments, out, earlier)
    last = out / "last.pt"
    if last.exists() and earlier is None:
        raise ValueError(f"{last} exists; pass --resume to go on from it, or another --out")
    record = earlier["data"] if earlier else None
    weights = None if earlier or arguments.init_from is None else load_checkpoint(arguments.init_from)
    model, task = prepare(config, record, ADVICE)
    said = [] if weights is None else [_initialise(model, weights["state"]["model"], arguments.init_from)]
    store = Checkpoints(out, config.to_dict(), task.record)
    trainer = make_trainer(config, model, task, store=store)
    if earlier:
        trainer.load_state(earlier["state"], str(last))
        said.append(f"resumed at epoch {trainer.epoch + 1}, step {trainer.step} of {trainer.steps}")
        before = earlier["config"]["training"]["epochs"]
        if before != config.training.epochs:
            said.append(_reschedule(trainer, config, before))
    return _train(trainer, store, out, arguments, said)


def _earlier(arguments: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    last = out / "last.pt"
    return load_checkpoint(last) if arguments.resume and last.exists() else None


def _initialise(model: nn.Module, saved: dict[str, Any], path: Path) -> str:
    """Load the weights of another run that have the same names and shapes; return what to print about it.

    Raises:
        ValueError: There are no such weights.
    """
    own = model.state_dict()
    taken = {name: saved[name] for name in own if getattr(saved.get(name), "shape", None) == own[name].shape}
    if not taken:
        raise ValueError(f"{path} has no weights of this model: none of them has the name and shape of one here")
    load_weights(model, {**own, **taken}, str(path))
    said = [f"begins with {len(taken)} of {len(own)} tensors of the model from {path}"]
    for what, names in (("as drawn", own.keys() - taken.keys()), ("not taken of the file", saved.keys() - own.keys())):
        if names:
            said.append(f"{what}: {', '.join(sorted(names))}")
    return "; ".join(said)


def _reschedule(trainer: Trainer, config: Config, before: int) -> str:
    """Move the learning rate to the schedule over another number of epochs; return what to print about it."""
    old, new = follow_schedule(trainer)
    name = config.optimizer.schedule
    text = f"{EPOCHS} was {before} and is {config.training.epochs}: "
    if old == new:
        return f"{text}the schedule {name!r} goes on as it was, with a learning rate of {new:.3g}"
    return (
        f"{text}the schedule {name!r} is now that over all {config.training.epochs} epochs, and the learning rate goes "
        f"on at {new:.3g} instead of {old:.3g}; the result is not that of a run that had them from the start"
    )


def _train(trainer: Trainer, store: Checkpoints, out: Path, arguments: argparse.Namespace, said: list[str]) -> int:
    say = print if trainer.main and not arguments.quiet else lambda *_, **__: None
    done = trainer.epoch * trainer.steps + trainer.step
    for line in said:
        say(line, flush=True)
    logs = trainer.main and not arguments.no_tensorboard
    progress = Progress(tensorboard_writer(out / "tensorboard", done) if logs else None, arguments.quiet)
    trainer.on_step, trainer.on_epoch, store.before_saving = progress.on_step, progress.on_epoch, progress.flush
    with progress.following(trainer), _signals(trainer) as received:
        trainer.fit()
    if received and trainer.epoch < trainer.epochs:
        say(f"stopped by {received[0].name} at epoch {trainer.epoch + 1}, step {trainer.step}; continue with --resume")
        return 128 + received[0]
    rows = [row for row in trainer.history if "test_accuracy" in row]
    if rows:
        best = max(rows, key=lambda row: row["test_accuracy"])
        say(
            f"best test accuracy {best['test_accuracy']:.2%} in epoch {best['epoch']:.0f}, last "
            f"{rows[-1]['test_accuracy']:.2%}, {sum(row['seconds'] for row in rows):.0f} s of training; wrote "
            f"{out / 'best.pt'} and {out / 'last.pt'}"
        )
    return 0


def _config(arguments: argparse.Namespace, out: Path, earlier: dict[str, Any] | None) -> Config:
    if earlier is None:
        if arguments.config is None:
            raise ValueError(f"there is no {out / 'last.pt'} to resume from; pass --config to begin")
        return load_config(arguments.config, arguments.changes)
    old = from_dict(earlier["config"], out / "last.pt")
    source = old.to_dict() if arguments.config is None else arguments.config
    config = load_config(source, arguments.changes)
    found = differences(_flat(old.to_dict()), _flat(config.to_dict()))
    if different := [text for key, text in found.items() if key not in (*MAY_CHANGE, EPOCHS)]:
        raise ValueError(
            f"the run in {out} was made with another configuration: {'; '.join(different)}. A "
            f"resumed run may change {', '.join((*MAY_CHANGE, EPOCHS))} only; use another --out for a new run"
        )
    begun = earlier["state"]["epoch"] + (earlier["state"]["step"] > 0)
    if config.training.epochs < begun:
        raise ValueError(
            f"{EPOCHS} is {config.training.epochs}, and the run in {out} is in epoch {begun}; raise it to train longer"
        )
    return config


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _show(config: Config) -> None:
    for key, value in _flat(config.to_dict()).items():
        print(f"{key} = {value!r}")


@contextlib.contextmanager
def _signals(trainer: Trainer) -> Iterator[list[signal.Signals]]:
    """Let SIGINT and SIGTERM end the training after the current step, and a second one at once."""
    received: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        print(f"\nqif train: {received[0].name}, saving after this step", file=sys.stderr, flush=True)
        trainer.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
