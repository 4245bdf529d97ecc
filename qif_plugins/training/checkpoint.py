"""Checkpoints: files that are complete or not there, and that hold tensors and plain values only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import finite, replacing, write_json
from .engine import Trainer

__all__ = ["Checkpoints", "load_checkpoint"]

FORMAT = "qif-plugins training checkpoint 1"


class Checkpoints:
    """Saves a trainer's state into a folder: ``last.pt``, ``best.pt`` and, for people, ``history.json``.

    Args:
        folder: Where to; created at the first saving.
        config: What the run was made from, in plain values; saved along.
        data: What else is needed to make the same data, such as the division into training and test samples.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> None:
        self.folder, self.config, self.data = folder, dict(config), dict(data or {})
        self._clean = False

    @property
    def last(self) -> Path:
        """The file to go on from."""
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        """The file of the best epoch."""
        return self.folder / "best.pt"

    def save(self, trainer: Trainer, *, best: bool) -> None:
        """Replace ``last.pt``, and ``best.pt`` too if ``best``; called in every process."""
        state = trainer.state()
        if not trainer.main:
            return
        if not self._clean:
            # What an earlier run was writing when it was killed.
            for path in self.folder.glob(".*-*"):
                if path.suffix in (".pt", ".json"):
                    path.unlink()
            self._clean = True
        content = {
            "format": FORMAT,
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
        write_json(self.folder / "history.json", finite(trainer.history))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Read with ``weights_only``: a file that is not what it says cannot run code.

    Returns:
        ``config``, ``data``, ``version`` (of qif-plugins) and ``state`` (see :meth:`~.engine.Trainer.state`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint of ``qif train``.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a checkpoint in it, such as {path / 'best.pt'}")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {path}; 'qif train' writes best.pt and last.pt into its --out folder"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a file that is something else
        raise ValueError(f"{path} is no checkpoint of 'qif train': {type(error).__name__} while reading it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        kind = "a checkpoint of another program" if isinstance(content, dict) else f"a saved {type(content).__name__}"
        raise ValueError(f"{path} is no checkpoint of 'qif train', but {kind}; name its best.pt or last.pt")
    return content
