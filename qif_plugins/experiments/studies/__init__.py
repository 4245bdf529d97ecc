"""Studies: experiments that are run trial by trial and written up from their records alone.

A study is a module with

    TITLE, QUESTION                     the head of its page
    plan(options, done) -> settings     every setting that the trials so far allow to name; called until none is new
    run(setting) -> result              one trial, both of plain JSON values
    report(options, trials, figure)     the page's :class:`~qif_plugins.experiments.studies.page.Body`; draws the figure

and :mod:`qif_plugins.experiments.studies.runner` does the rest.
"""

from __future__ import annotations

__all__ = ["STUDIES"]

STUDIES = {
    "windows": "which surrogate window trains best, and how far each one's gradient is from the true one",
    "closures": "moments and rate of the membrane, predicted and measured, layer by layer, over training",
    "learnable": "a, u1 and u2 learned per layer and per channel: what is learned, what it gains",
    "latency": "time of a QIF layer over a LIF layer, per backend, from the files of qif bench",
    "budget": "LIF against QIF after the same number of trials of the same search",
}
"""Studies by the name of their module, with what each asks."""
