"""Checkpoints of training runs: files of tensors and plain values that are either complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ... import __version__
from ...support.checkpoints import check_content, check_tensors, load, save
from ...support.files import finite, write_json
from .engine import Trainer
from .state import PARTS, check_progress

__all__ = ["EXACT", "Checkpoints", "check_checkpoint", "load_checkpoint"]

FORMAT = "qif-plugins training checkpoint 1"
TRAIN, EXACT = "qif train", "qif exact train"
"""Kinds: the command that writes such a checkpoint, and goes on from it."""
_DATA: dict[str, Any] = {
    TRAIN: {str: object},
    EXACT: {
        "source": {"name": str, "root": (str, type(None)), "limit": (int, type(None))},
        "before": {"epoch": float, "accuracy": float, str: float},
    },
}
"""Parts of a checkpoint of each kind beside its state, see :func:`~qif_plugins.support.files.check_parts`."""


class Checkpoints:
    """A folder to which a trainer's state is saved: ``last.pt``, ``best.pt`` and, for people to read, ``history.json``.

    Args:
        folder: The folder; created at the first saving.
        config: Configuration of the run in plain values, saved with the state.
        data: Further values that are needed to make the same data, such as the division into training and test samples.
        kind: Command that writes the checkpoints; other commands refuse them. Default ``"qif train"``.

    Attributes:
        last: Path of the file to resume from.
        best: Path of the file of the best epoch.
        history: Path of the history in JSON.
        before_saving: Called before each saving, for example to flush logs up to the same step. Default: does nothing.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], data: Mapping[str, Any] | None = None, kind: str = TRAIN
    ) -> None:
        self.folder, self.config, self.data, self.kind = folder, dict(config), dict(data or {}), kind
        self.last, self.best, self.history = folder / "last.pt", folder / "best.pt", folder / "history.json"
        self.before_saving: Callable[[], Any] = lambda: None

    def save(self, trainer: Trainer, *, best: bool) -> None:
        """Replace ``last.pt``, and ``best.pt`` too if ``best``; called in every process."""
        state = trainer.state()
        if not trainer.main:
            return
        self.before_saving()
        content: dict[str, Any] = {"format": FORMAT, "kind": self.kind, "version": __version__}
        content |= {"config": self.config, "data": self.data, "state": state}
        for path in [self.last, self.best][: 1 + best]:
            save(path, content)
        write_json(self.history, finite(trainer.history))


def load_checkpoint(path: Path, kind: str = TRAIN) -> dict[str, Any]:
    """Read and check a checkpoint, on the CPU.

    Args:
        path: The file.
        kind: The command that must have written it. Default ``"qif train"``.

    Returns:
        ``config``, ``data``, ``version`` (of qif-plugins) and ``state`` (see :meth:`~.engine.Trainer.state`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of this command, is damaged or lacks a part, or its weights are not
            finite.
    """
    hint = f"'{kind}' writes best.pt and last.pt into its --out folder"
    content = load(path, f"checkpoint of '{kind}'", hint)
    check_checkpoint(path, content, kind)
    return cast(dict[str, Any], content)


def check_checkpoint(path: Path, content: Any, kind: str = TRAIN) -> None:
    """Check the content of a checkpoint file, see :func:`load_checkpoint`.

    Raises:
        ValueError: It is not a checkpoint of ``kind``, lacks a part, or holds weights that are not finite.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        if isinstance(found, str) and found.startswith(FORMAT.rpartition(" ")[0]):
            raise ValueError(
                f"{path} is {found!r} of qif-plugins {content.get('version')}, and this version, {__version__}, reads "
                f"{FORMAT!r}; install the one that wrote it, or a newer one"
            )
        what = "a checkpoint of another program" if isinstance(content, dict) else f"a saved {type(content).__name__}"
        raise ValueError(f"{path} is no checkpoint of '{kind}', but {what}; name its best.pt or last.pt")
    found = content.get("kind", kind)  # early checkpoints do not name theirs
    if found not in (TRAIN, EXACT):
        raise ValueError(f"{path} is no checkpoint of '{kind}': its kind is {str(found)[:80]!r}")
    if found != kind:
        raise ValueError(
            f"{path} is a checkpoint of '{found}', and what is wanted is one of '{kind}'; go on from it with '{found} "
            f"--resume --out {path.parent}'"
        )
    parts = {"version": str, "config": {str: object}, "data": _DATA[kind], "state": PARTS}
    check_content(path, content, parts, f"checkpoint of '{kind}'")
    try:
        check_progress(content["state"])
    except ValueError as error:
        raise ValueError(f"{path} is no sound checkpoint of '{kind}': {error}") from None
    check_tensors(path, content["state"]["model"])
