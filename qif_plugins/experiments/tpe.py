"""Hyperparameter search by Optuna's TPE sampler, trial by trial, each decided by the trials before it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["propose"]


def propose(
    distributions: Mapping[str, BaseDistribution],
    finished: Iterable[tuple[Mapping[str, Any], float]],
    seed: int,
    startup: int = 10,
) -> dict[str, Any]:
    """The next trial's parameters: a function of the arguments, so that a search goes on after a stop as without one.

    Args:
        distributions: The search space, of Optuna's distributions.
        finished: Parameters and value of every trial so far, in order; more is better.
        seed: Of the sampler for this trial.
        startup: Trials that are drawn at random before the sampler models what they found. Default 10.

    Returns:
        A value for each of ``distributions``.
    """
    import optuna

    verbosity = optuna.logging.get_verbosity()
    # Optuna reports each study that it creates, and here that is one a trial.
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
