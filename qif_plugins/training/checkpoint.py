"""Checkpoints: files that are complete or not there, and that hold tensors and plain values only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import finite, remove_rests, replacing, write_json
from .engine import Trainer

__all__ = ["EXACT", "FORMAT", "TRAIN", "Checkpoints", "check_kind", "load_checkpoint"]

FORMAT = "qif-plugins training checkpoint 1"
TRAIN, EXACT = "qif train", "qif exact train"
"""Kinds: the command that writes such a checkpoint, and goes on from it."""


class Checkpoints:
    """Saves a trainer's state into a folder: ``last.pt``, ``best.pt`` and, for people, ``history.json``.

    Args:
        folder: Where to; created at the first saving.
        config: What the run was made from, in plain values; saved along.
        data: What else is needed to make the same data, such as the division into training and test samples.
        kind: Which command's they are, so that no other one takes them for its own. Default ``"qif train"``.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], data: Mapping[str, Any] | None = None, kind: str = TRAIN
    ) -> None:
        self.folder, self.config, self.data, self.kind = folder, dict(config), dict(data or {}), kind
        self._clean = False

    @property
    def last(self) -> Path:
        """The file to go on from."""
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        """The file of the best epoch."""
        return self.folder / "best.pt"

    @property
    def history(self) -> Path:
        """The file for people."""
        return self.folder / "history.json"

    def save(self, trainer: Trainer, *, best: bool) -> None:
        """Replace ``last.pt``, and ``best.pt`` too if ``best``; called in every process."""
        state = trainer.state()
        if not trainer.main:
            return
        if not self._clean:
            # What an earlier run was writing when it was killed.
            for path in (self.last, self.best, self.history):
                remove_rests(path)
            self._clean = True
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "version": __version__,
            "config": self.config,
            "data": self.data,
            "state": state,
        }
        for path in [self.last, self.best][: 1 + best]:
            with replacing(path) as beside, beside.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        write_json(self.history, finite(trainer.history))


def load_checkpoint(path: Path, kind: str = TRAIN) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Read with ``weights_only``: a file that is not what it says cannot run code.

    Args:
        path: The file.
        kind: Which command's it must be. Default ``"qif train"``.

    Returns:
        ``config``, ``data``, ``version`` (of qif-plugins) and ``state`` (see :meth:`~.engine.Trainer.state`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or another command's.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a checkpoint in it, such as {path / 'best.pt'}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; '{kind}' writes best.pt and last.pt into its --out folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a file that is something else
        raise ValueError(f"{path} is no checkpoint of '{kind}': {type(error).__name__} while reading it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        what = "a checkpoint of another program" if isinstance(content, dict) else f"a saved {type(content).__name__}"
        raise ValueError(f"{path} is no checkpoint of '{kind}', but {what}; name its best.pt or last.pt")
    check_kind(path, content, kind)
    return content


def check_kind(path: Path, content: Mapping[str, Any], kind: str = TRAIN) -> None:
    """Raises ValueError unless the content of a checkpoint at ``path`` is of ``kind``; early ones do not say theirs."""
    found = content.get("kind", kind)
    if found != kind:
        raise ValueError(
            f"{path} is a checkpoint of '{found}', and what is wanted is one of '{kind}'; go on from it with '{found} "
            f"--resume --out {path.parent}'"
        )
