"""Checkpoints: files that are complete or not there, and that hold tensors and plain values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ... import __version__
from ...support.checkpoints import check_content, check_tensors, load, save
from ...support.files import finite, write_json
from .engine import Trainer
from .state import PARTS, check_progress

__all__ = ["EXACT", "FORMAT", "TRAIN", "Checkpoints", "check_checkpoint", "check_kind", "load_checkpoint"]

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
"""What a checkpoint of a kind holds beside its state, see :func:`~qif_plugins.support.files.check_parts`."""


class Checkpoints:
    """Saves a trainer's state into a folder: ``last.pt``, ``best.pt`` and, for people, ``history.json``.

    Args:
        folder: Where to; created at the first saving.
        config: What the run was made from, in plain values; saved along.
        data: What else is needed to make the same data, such as the division into training and test samples.
        kind: Which command's they are, so that no other one takes them for its own. Default ``"qif train"``.

    Attributes:
        before_saving: Called before each saving, such as to write logs out that go as far. Default nothing.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], data: Mapping[str, Any] | None = None, kind: str = TRAIN
    ) -> None:
        self.folder, self.config, self.data, self.kind = folder, dict(config), dict(data or {}), kind
        self.before_saving: Callable[[], Any] = lambda: None

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
        self.before_saving()
        content = {
            "format": FORMAT,
            "kind": self.kind,
            "version": __version__,
            "config": self.config,
            "data": self.data,
            "state": state,
        }
        for path in [self.last, self.best][: 1 + best]:
            save(path, content)
        write_json(self.history, finite(trainer.history))


def load_checkpoint(path: Path, kind: str = TRAIN) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Args:
        path: The file.
        kind: Which command's it must be. Default ``"qif train"``.

    Returns:
        ``config``, ``data``, ``version`` (of qif-plugins) and ``state`` (see :meth:`~.engine.Trainer.state`).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or another command's; it is damaged, lacks a part, or holds weights that
            are not finite.
    """
    hint = f"'{kind}' writes best.pt and last.pt into its --out folder"
    content = load(path, f"checkpoint of '{kind}'", hint)
    check_checkpoint(path, content, kind)
    return cast(dict[str, Any], content)


def check_checkpoint(path: Path, content: Any, kind: str = TRAIN) -> None:
    """Check what was read from the file of a checkpoint, see :func:`load_checkpoint`.

    Raises:
        ValueError: It is no checkpoint of ``kind``, lacks a part, or holds weights that are not finite.
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
    check_kind(path, content, kind)
    parts = {"version": str, "config": {str: object}, "data": _DATA[kind], "state": PARTS}
    check_content(path, content, parts, f"checkpoint of '{kind}'")
    try:
        check_progress(content["state"])
    except ValueError as error:
        raise ValueError(f"{path} is no sound checkpoint of '{kind}': {error}") from None
    check_tensors(path, content["state"]["model"])


def check_kind(path: Path, content: Mapping[str, Any], kind: str = TRAIN) -> None:
    """Raises ValueError unless the content of a checkpoint at ``path`` is of ``kind``; early ones do not say theirs."""
    found = content.get("kind", kind)
    if found not in (TRAIN, EXACT):
        raise ValueError(f"{path} is no checkpoint of '{kind}': its kind is {str(found)[:80]!r}")
    if found != kind:
        raise ValueError(
            f"{path} is a checkpoint of '{found}', and what is wanted is one of '{kind}'; go on from it with '{found} "
            f"--resume --out {path.parent}'"
        )
