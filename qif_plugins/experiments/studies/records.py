"""The finished trials of a study, in one JSON file that is always complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...support.files import finite, read_json, replacing
from ..bench.harness import machine
from ..bench.peers import installed

__all__ = ["Records", "Result", "Setting", "Trial", "environment", "key_of"]

PACKAGES = ("qif-plugins", "torch", "numba", "spikingjelly")
_FILE = {
    "environments": [{"cpu": str, "system": str, "python": str, "versions": {str: str}}],
    "trials": [{"setting": {str: object}, "result": {str: object}, "seconds": float, "environment": int}],
}
Setting = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One finished trial.

    Attributes:
        setting: Everything that decides its outcome, the seed included.
        result: What was measured; ``None`` in place of what is not finite.
        seconds: CPU time that it took.
        environment: Index of the machine and versions it ran with.
    """

    setting: Setting
    result: Result
    seconds: float
    environment: int


def key_of(setting: Setting) -> str:
    """What identifies a trial: its setting as JSON with sorted names."""
    return json.dumps(setting, sort_keys=True, allow_nan=False)


class Records:
    """Trials by setting. Every :meth:`add` replaces the file by a complete one; one process writes at a time.

    Args:
        path: The file; read if it exists.

    Attributes:
        environments: Machines and versions, those of the trials.

    Raises:
        ValueError: The file is no record of trials.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environments: list[dict[str, Any]] = []
        self._trials: dict[str, Trial] = {}
        if not path.exists():
            return
        content = read_json(path, "no record of trials", _FILE, "take another copy, or move it away to start anew")
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
        """The trial with this setting, if it is finished."""
        return self._trials.get(key_of(setting))

    def add(self, setting: Setting, result: Result, seconds: float) -> Trial:
        """Store a finished trial, in memory and in the file, with the machine and versions of this process."""
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
    """Machine and versions, as far as results depend on them."""
    seen = machine(torch.device("cpu"))
    versions = {name: seen["versions"][name] for name in seen["versions"] if name in PACKAGES}
    optuna = installed("optuna")
    return {
        "cpu": seen["cpu"],
        "system": seen["system"],
        "python": seen["python"],
        "versions": {**versions, **({"optuna": optuna} if optuna else {})},
    }
