"""Study 10: LIF and QIF with surrogate gradients on natural images, in a convolutional network of eight layers."""

from __future__ import annotations

from ..records import Records, Setting
from .runner import Options
from .sequences import available, report, run, settings_of

__all__ = ["FOLDERS", "QUESTION", "TITLE", "plan", "report", "run"]

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
        settings_of(data, steps=steps, arm=arm, seed=seed)
        for data, steps in sizes
        for seed in options.seeds_of(3)
        for arm in ARMS
    ]
    return available(settings, options, done)
