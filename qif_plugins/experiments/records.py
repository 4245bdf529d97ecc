"""Records of finished trials in one JSON file, which is complete at all times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..support.files import finite, read_json, replacing
from .bench.machine import installed, machine

PACKAGES = ("qif-plugins", "torch", "numba", "spikingjelly")
Setting = dict[str, Any]
Result = dict[str, Any]
_ANY = {str: object}
Key = TypeVar("Key")


@dataclass(frozen=True)
class Trial:
    """Record of one finished trial.

    Attributes:
        setting: Everything that decides its outcome, the seed included, in plain JSON values.
        result: The measurements; ``None`` in place of a number that is not finite.
        seconds: CPU time of the trial.
        environment: Index of its machine and versions in :attr:`Records.environments`.
    """

    setting: Setting
    result: Result
    seconds: float
    environment: int


def key_of(setting: Setting) -> str:
    """Identify a trial: its setting as JSON with sorted names."""
    return json.dumps(setting, sort_keys=True, allow_nan=False)


def by_seed(trials: Iterable[Trial], key: Callable[[Setting], Key]) -> dict[Key, dict[int, Result]]:
    """Group results by a key of their settings, then by seed."""
    found: dict[Key, dict[int, Result]] = {}
    for trial in trials:
        found.setdefault(key(trial.setting), {})[trial.setting["seed"]] = trial.result
    return found


class Records:
    """Finished trials by setting. Every :meth:`add` replaces the file as a whole; one process writes at a time.

    Args:
        path: The file; read if it exists.
        setting: Entries that every setting has, see :func:`~qif_plugins.support.files.check_parts`. Default: any.
        result: Entries that every result has. Default: any.
        what: Description of a wrong file, for the error. Default ``"no record of trials"``.

    Attributes:
        environments: Machines and versions of the trials.

    Raises:
        ValueError: The file is not a record of such trials.
    """

    def __init__(
        self, path: Path, setting: Mapping[Any, Any] = _ANY, result: Mapping[Any, Any] = _ANY,
        what: str = "no record of trials",
    ) -> None:  # fmt: skip
        self.path = path
        self.environments: list[dict[str, Any]] = []
        self._trials: dict[str, Trial] = {}
        if not path.exists():
            return
        parts = {
            "environments": [{"cpu": str, "system": str, "python": str, "versions": {str: str}}],
            "trials": [{"setting": dict(setting), "result": dict(result), "seconds": float, "environment": int}],
        }
        content = read_json(path, what, parts, "take another copy, or move it away to start anew")
        self.environments = list(content["environments"])
        for row in content["trials"]:
            if not 0 <= row["environment"] < len(self.environments):
                raise ValueError(f"{path} has a trial of environment {row['environment']}, which it does not describe")
            trial = Trial(row["setting"], row["result"], row["seconds"], row["environment"])
            self._trials[key_of(trial.setting)] = trial

    def __contains__(self, setting: Setting) -> bool:
        return key_of(setting) in self._trials

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._trials.values())

    def __len__(self) -> int:
        return len(self._trials)

    def get(self, setting: Setting) -> Trial | None:
        """Return the trial with this setting, or ``None`` if it is not finished."""
        return self._trials.get(key_of(setting))

    def matching(self, entries: Mapping[str, Any]) -> list[Trial]:
        """List the finished trials whose settings have these entries, in order."""
        return [trial for trial in self if entries.items() <= trial.setting.items()]

    def add(self, setting: Setting, result: Result, seconds: float) -> Trial:
        """Store a finished trial with the machine and versions of this process, in memory and in the file."""
        here = environment()
        if here not in self.environments:
            self.environments.append(here)
        trial = Trial(setting, finite(result), round(seconds, 2), self.environments.index(here))
        self._trials[key_of(setting)] = trial
        rows = ",\n".join(json.dumps(vars(row), allow_nan=False) for row in self._trials.values())
        with replacing(self.path) as beside:
            beside.write_text(
                f'{{"environments": {json.dumps(self.environments)},\n"trials": [\n{rows}\n]}}\n', encoding="utf-8"
            )
        return trial


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that results depend on."""
    seen = machine(torch.device("cpu"))
    versions = {name: seen["versions"][name] for name in seen["versions"] if name in PACKAGES}
    optuna = installed("optuna")
    return {
        "cpu": seen["cpu"],
        "system": seen["system"],
        "python": seen["python"],
        "versions": {**versions, **({"optuna": optuna} if optuna else {})},
    }
