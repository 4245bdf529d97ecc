"""Study 10: LIF and QIF with surrogate gradients on natural images, in a convolutional network of eight layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..data.images import is_by_class
from ..records import Records, Result, Setting, Trial
from . import sequences
from .page import Body
from .runner import Options

TITLE = "CIFAR-10"
QUESTION = (
    "Is QIF more accurate than LIF on natural images? A convolutional network of eight layers, narrow enough for one "
    "CPU core, is trained with each neuron for equally many epochs, at T = 2 and T = 4."
)
FOLDERS = ("cifar10",)
"""Data sets that the study reads from the user's folders."""
ARMS = ("LIF", "QIF, paper's parameters", "QIF, swap")
"""Arms of the study of sequences."""
STEPS = (2, 4)


def plan(options: Options, done: Records) -> list[Setting]:
    """Name a training for every number of steps, seed and arm; all seeds of fewer steps come first.

    Raises:
        ValueError: There is neither a folder of data nor a finished trial.
    """
    sizes = [("digits", 8)] if options.quick else [(FOLDERS[0], steps) for steps in STEPS]
    settings = [
        sequences.settings_of(data, steps=steps, arm=arm, seed=seed)
        for data, steps in sizes
        for seed in options.seeds_of(3)
        for arm in ARMS
    ]
    return sequences.available(settings, options, done)


def run(setting: Setting, folders: Mapping[str, Path]) -> Result:
    """Train and test one network, as in the study of sequences; ``by_class`` says whether images lie in folders."""
    folder = folders.get(setting["data"])
    return {**sequences.run(setting, folders), "by_class": folder is not None and is_by_class(folder)}


def report(options: Options, trials: Sequence[Trial], picture: Path) -> Body:
    """Write up the differences from LIF as the study of sequences does; say where the pixels may be others."""
    body = sequences.report(options, trials, picture)
    if not any(trial.result["by_class"] for trial in trials):
        return body
    caution = "The images were files in a folder a class, such as JPEG: not the very pixels of CIFAR-10's own files."
    return replace(body, method=f"{caution} {body.method}")
