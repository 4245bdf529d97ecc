"""Checkpoints of the commands: files that are complete or absent, and checked when they are read.

Every file has a format, the version that wrote it, its kind, and the parts of that kind, see :data:`KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .. import __version__
from ..neuron.names import WINDOWS
from ..support.checkpoints import check_content, check_tensors, load, save
from ..support.files import finite, write_json
from ..support.names import check_known
from .exact.settings import LOSSES, NEURONS, PARTS
from .names import HOSTS
from .training.state import PARTS as STATE
from .training.state import check_progress

if TYPE_CHECKING:
    from .training.engine import Trainer

FORMAT = "qif-plugins training checkpoint 1"
TRAIN, EXACT, COMPARE, EXACT_NETWORK = "qif train", "qif exact train", "qif compare --save", "qif exact train: exact.pt"
_SPIKE_TRAINS = {"name": str, "root": (str, type(None)), "limit": (int, type(None)), "split": str}
KINDS: dict[str, dict[str, Any]] = {
    TRAIN: {"config": {str: object}, "data": {str: object}, "state": STATE},
    EXACT: {
        "config": PARTS, "state": STATE,
        "data": {"source": _SPIKE_TRAINS, "before": {"epoch": float, "accuracy": float, str: float}},
    },
    COMPARE: {
        "host": str, "neuron": str, "window": str, "qif_dynamics": str, "seed": int, "epochs": int, "steps": int,
        "data": str, "shape": {"channels": int, "size": int, "classes": int},
        "last_epoch": {"loss": float, "accuracy": float, "spikes": float}, "network": {str: Tensor},
    },
    EXACT_NETWORK: {"settings": PARTS, "data": _SPIKE_TRAINS, "network": {str: Tensor}},
}  # fmt: skip
"""Kinds by the command that writes them, with their parts, see :func:`~qif_plugins.support.files.check_parts`: states
of a trainer to resume from, and trained networks."""


def save_checkpoint(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; afterwards the file is complete on the disk, or unchanged.

    Args:
        path: The file.
        kind: One of :data:`KINDS`.
        content: The parts of that kind.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    save(path, {"format": FORMAT, "kind": kind, "version": __version__, **content})


def load_checkpoint(path: Path, *kinds: str, way_out: str = "") -> dict[str, Any]:
    """Read and check a checkpoint, on the CPU.

    Args:
        path: The file.
        kinds: The kinds that it may have. Default: ``"qif train"``.
        way_out: Remedy if it is another file, for the error. Default: names the files that the command writes.

    Returns:
        The parts of its kind, with ``kind`` and ``version`` (of qif-plugins).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not such a checkpoint, is damaged or incomplete, or has weights that are not finite.
    """
    kinds = kinds or (TRAIN,)
    what = f"checkpoint of {repr(kinds[0]) if len(kinds) == 1 else 'this package'}"
    way_out = way_out or f"'{kinds[0]}' writes best.pt and last.pt into its --out folder"
    content = load(path, what, way_out)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        if isinstance(found, str) and found.startswith(FORMAT.rpartition(" ")[0]):
            raise ValueError(
                f"{path} is {found!r} of qif-plugins {content.get('version')}, and this version, {__version__}, reads "
                f"{FORMAT!r}; install the one that wrote it, or a newer one"
            )
        but = "a checkpoint of another program" if isinstance(content, dict) else f"a saved {type(content).__name__}"
        raise ValueError(f"{path} is not a {what}, but {but}; {way_out}")
    name = content.setdefault("kind", TRAIN)  # early checkpoints do not name theirs
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"{path} is no {what}: its kind is {str(name)[:80]!r}")
    own = f"checkpoint of '{name}'"
    if name not in kinds:
        resume = f"go on from it with '{name} --resume --out {path.parent}'"
        use = resume if "state" in KINDS[name] else "'qif landscape' measures it"
        raise ValueError(f"{path} is a {own}, and what is wanted is a {what}; {use}")
    check_content(path, content, {"version": str, **KINDS[name]}, own)
    try:
        _check_values(content)
    except ValueError as error:
        raise ValueError(f"{path} is no sound {own}: {error}") from None
    check_tensors(path, content["network"] if "network" in content else content["state"]["model"])
    return cast(dict[str, Any], content)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Describe by name the entries in which the options of two runs differ: ``{"lr": "lr (was 0.1, now 0.2)"}``."""
    return {
        name: f"{name} (was {was.get(name)!r}, now {now.get(name)!r})"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    }


def _check_values(content: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for parts that contradict each other, or name what this version does not have."""
    if "state" in content:
        check_progress(content["state"])
    known: dict[str, Any] = {}
    settings: Mapping[str, Any] = content
    if content["kind"] == COMPARE:
        known = {"host": HOSTS, "neuron": ("LIF", "QIF"), **({"window": WINDOWS} if content["neuron"] == "QIF" else {})}
    elif content["kind"] == EXACT_NETWORK:
        known, settings, limit = {"neuron": NEURONS, "loss": LOSSES}, content["settings"], content["data"]["limit"]
        if further := sorted(settings.keys() - PARTS.keys()):
            raise ValueError(f"this version has no setting {further[0]!r}")
        if any(size < 1 for size in settings["hidden"]) or (limit is not None and limit < 1):
            raise ValueError(f"it has the layers {settings['hidden']} and the limit {limit} of samples")
    for what, names in known.items():
        check_known(what, names, settings[what])


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
        for path in [self.last, self.best][: 1 + best]:
            save_checkpoint(path, self.kind, {"config": self.config, "data": self.data, "state": state})
        write_json(self.history, finite(trainer.history))
