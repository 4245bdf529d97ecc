"""Hyperparameter search by Optuna's TPE sampler, the same for every neuron that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .records import Records, Setting

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def search(
    distributions: Mapping[str, BaseDistribution], common: Setting, entries: Callable[[dict[str, Any]], Setting],
    records: Records, trials: int, startup: int = 10,
) -> list[Setting]:  # fmt: skip
    """List the settings of a search: those of its finished trials in order, then that of the next one.

    The finished trials alone decide the next, so that a search that was stopped continues as if it had not been.

    Args:
        distributions: The search space, as Optuna's distributions.
        common: Entries of every setting of this search, in plain JSON values.
        entries: Turns the sampled values into further entries.
        records: The finished trials; their results have an ``"accuracy"`` to maximise.
        trials: Length of the search.
        startup: Trials that are drawn at random before the sampler models their results. Default 10.

    Returns:
        Settings with ``common``, ``"number"`` (from 0), ``entries`` and the values themselves as ``"sampled"``. All
        ``trials`` of them once the search is over; only the last one may be missing in ``records``.
    """
    settings: list[Setting] = []
    finished: list[tuple[dict[str, Any], float]] = []
    for number in range(trials):
        known = {**common, "number": number}
        trial = next(iter(records.matching(known)), None)
        if trial is None:
            values = _propose(distributions, finished, number, startup)
            return [*settings, {**known, **entries(values), "sampled": values}]
        settings.append(trial.setting)
        finished.append((trial.setting["sampled"], trial.result["accuracy"]))
    return settings


def _propose(
    distributions: Mapping[str, BaseDistribution], finished: Iterable[tuple[Mapping[str, Any], float]], seed: int,
    startup: int,
) -> dict[str, Any]:  # fmt: skip
    """Sample the values of one trial, as a function of the arguments alone."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    # Optuna reports every study that it creates, and here each trial creates one.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        space = dict(distributions)
        for params, value in finished:
            study.add_trial(optuna.trial.create_trial(params=dict(params), distributions=space, value=value))
        return dict(study.ask(space).params)
    finally:
        optuna.logging.set_verbosity(verbosity)
