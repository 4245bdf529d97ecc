"""Experiments that run trial by trial, and pages that are written from their records alone.

A study is a module of this package, listed in :data:`STUDIES`, with

    TITLE, QUESTION                         the head of its page
    plan(options, done) -> settings         the trials to run, as far as the finished ones determine them
    run(setting) -> result                  runs one trial
    report(options, trials, picture) -> Body    writes the page and draws its figure

- A *setting* is a dictionary of plain JSON values with everything that decides the outcome, the seed included: it
  identifies the trial. A *result* is such a dictionary, too. ``run`` is called in another process where trials run in
  parallel, so it takes nothing but the setting.
  A study of data that users bring along lists their names in ``FOLDERS``; its ``run(setting, folders)`` gets the
  folders by name, which are not part of the setting.
- ``plan`` gets the command's :class:`~.runner.Options` and the finished trials, as
  :class:`~qif_plugins.experiments.records.Records`. It is called again after its settings have run, until it names no
  new one; a search can thus name its next trial from the results of those before. Settings that come first run first:
  begin with a whole grid of the first seed.
- ``report`` gets the finished trials among those that ``plan`` names, in that order; it must cope with missing ones. It
  draws to ``picture`` with :func:`~qif_plugins.experiments.figures.figure`, and returns a :class:`~.page.Body`: at most
  two sentences, then tables.

:func:`~.runner.run_study` does the rest. Every finished trial is stored at once, so that a study that was stopped
continues from there.
"""

from __future__ import annotations

__all__ = ["OF_FOLDERS", "STUDIES"]

STUDIES = {
    "windows": "which surrogate window trains best, and how far its gradient is from the true one",
    "closures": "moments and rate of the membrane, predicted and measured, layer by layer, over training",
    "learnable": "a, u1 and u2 learned per layer and per channel: what is learned, what it gains",
    "latency": "time of a QIF layer over a LIF layer, per backend, from the files of qif bench",
    "budget": "LIF against QIF after the same number of trials of the same search",
    "swap": "small published LIF networks of both hosts, each against the same network after swap",
    "sequences": "LIF, parametric LIF and QIF on spoken digits and N-MNIST, from your own folders",
    "images": "LIF and QIF in eight convolutional layers on CIFAR-10 at T = 2 and 4, from your own folder",
    "spikes": "accuracy against synaptic operations and energy, firing penalized or thresholds raised",
    "depth": "norm of the gradient by layer in deep perceptrons, and accuracy against depth and number of steps",
}
"""Studies by the name of their module, with the question of each."""
OF_FOLDERS = ("sequences", "images", "spikes")
"""Studies of data that the package neither ships nor downloads."""
