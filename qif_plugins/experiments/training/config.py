"""Configurations of training runs: TOML files whose values are checked before anything else happens."""

from __future__ import annotations

import copy
import difflib
import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...support.names import check_known
from ...support.text import shown
from ..names import CONFIGURATIONS, DATA_SETS, ENCODERS, IN_MEMORY, SOUNDS, SPLITS, configurations
from .augmentation import EVENT_AUGMENTATIONS, IMAGE_AUGMENTATIONS
from .losses import LOSSES

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ImportError:
        raise ImportError(
            "configurations need tomli with Python 3.10; install it with: pip install 'qif-plugins[train]'"
        ) from None

COUNT, WORKERS, SEED = 2**31 - 1, 1024, 2**63 - 1
"""The largest count, number of processes or threads, and seed (PyTorch's generators take int64)."""
LARGEST = 3.4028234663852886e38
"""The largest number that float32 holds."""
_OF_NAME = {"neuron": ("dynamics", "window"), "data": ("folder", "download", "augment", "size")}
"""Keys that belong to the ``name`` of their table, and are dropped when another name is set."""
_TYPES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class DataConfig:
    """The table ``[data]``.

    Attributes:
        name: ``"digits"`` and ``"mnist5k"`` come with packages; ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"``,
            ``"cifar100"`` and ``"imagenet"`` (folders ``train`` and ``val``, in each a folder a class) are read by
            torchvision; so is ``"image-folder"``, your own images: a folder a class, in folders ``train`` and ``test``
            (or ``val``) or without them. ``"cifar10"`` may also be folders ``train`` and ``test`` of images by class.
            ``"cifar10dvs"``, ``"nmnist"``, ``"shd"`` and ``"ssc"`` (HDF5) are read by SpikingJelly. ``"spoken-digits"``
            is a folder of ``DIGIT_SPEAKER_INDEX.wav``, as in the Free Spoken Digit Dataset.
        folder: Folder of the data. Default ``"data"``.
        download: Whether to fetch one that torchvision or SpikingJelly can download, if it is not there; the files of
            ImageNet, N-MNIST, SHD and SSC, images and recordings of your own are never fetched. Default False.
        steps: T: number of times that a static image is repeated, of frames with equal event counts that CIFAR10-DVS
            and N-MNIST are cut into, or of equal steps that ``duration`` is cut into for sounds.
        size: Height and width; 0 for the data's own. ``"image-folder"`` needs it: images are resized and cropped to it.
        augment: Augmentations of training samples, see :mod:`~qif_plugins.experiments.training.augmentation`.
        cutout_size: Side of the square of ``"cutout"``. Default 16.
        workers: Processes that load data, beside each training process. Default 0.
        split_seed: Seed, below 2^63, of the division of CIFAR10-DVS, and of an image folder without ``train``, which
            have none: 9 of 10 samples a class to train. Default 0.
        duration: Seconds of a sound; later sound or events are left out. Default 0: 0.6 for ``"spoken-digits"``, 1.4
            for ``"shd"``, 1 for ``"ssc"``.
        split: Test samples of ``"spoken-digits"``: ``"speaker"``, all recordings of ``test_speakers``, or ``"index"``,
            those with the indices 0 to 4. Default ``"speaker"``.
        test_speakers: Speakers who are only tested. Default: the last two by name.
        encoder: How ``"spoken-digits"`` become spikes: ``"onset"``, ``"crossings"`` or ``"rates"``, see
            :func:`~qif_plugins.experiments.data.sound.encode`. Default ``"onset"``.
        bands: Mel bands of ``"spoken-digits"``. Default 40.
        delta: Change of a level that makes an event of ``"onset"`` and ``"crossings"``, from 0.01 to 1, as a share of
            60 dB. Default 0.1.
        sample_rate: Samples a second of the WAV files. Default 8000.
        encoder_seed: Seed, below 2^63, of the encoder ``"rates"``. Default 0.
    """

    name: str
    folder: str = "data"
    download: bool = False
    steps: int = 4
    size: int = 0
    augment: tuple[str, ...] = ()
    cutout_size: int = 16
    workers: int = 0
    split_seed: int = 0
    duration: float = 0.0
    split: str = "speaker"
    test_speakers: tuple[str, ...] = ()
    encoder: str = "onset"
    bands: int = 40
    delta: float = 0.1
    sample_rate: int = 8000
    encoder_seed: int = 0


@dataclass(frozen=True)
class LossConfig:
    """The table ``[loss]``.

    Attributes:
        name: ``"tet"``: cross entropy of every step; ``"mean"``: cross entropy of the mean logits.
        regularization: λ of TET, from 0 to 1. Default 0.
        target: Value to which TET's second term pulls the logits. Default 1.
    """

    name: str = "tet"
    regularization: float = 0.0
    target: float = 1.0


@dataclass(frozen=True)
class OptimizerConfig:
    """The table ``[optimizer]``.

    Attributes:
        name: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        lr: Largest learning rate.
        momentum: Momentum of SGD, below 1. Default 0.9.
        weight_decay: Default 0.
        clip_norm: Largest norm of the gradient. Default none.
        schedule: ``"cosine"`` to 0 over all steps, ``"steps"`` (times ``gamma`` at each of ``milestones``, in epochs)
            or ``"constant"``. Default cosine.
        warmup_epochs: Epochs of a linear rise before it, at most all. Default 0.
        milestones: Epochs at which ``"steps"`` lowers the learning rate. Default: none.
        gamma: Factor of ``"steps"``, above 0 and at most 1. Default 0.1.
    """

    name: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1


@dataclass(frozen=True)
class TrainingConfig:
    """The table ``[training]``.

    Attributes:
        epochs: Number of epochs. Default 10.
        batch_size: Samples a step of the optimizer, over all processes and accumulated batches.
        accumulation: Number of batches that a step is divided into, computed one after another. Default 1.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``. Default ``"no"``.
        seed: Seed of the weights, the order of the data and its augmentation; below 2^63. Default 0.
        save_every: Steps between checkpoints within an epoch; 0 for one at each epoch's end alone. Default 0.
        sync_batch_norm: Whether batch norms take their statistics over all processes. Default False.
        threads: CPU threads a process; 0 as PyTorch sets them. Default 0.
    """

    epochs: int = 10
    batch_size: int = 128
    accumulation: int = 1
    precision: str = "no"
    seed: int = 0
    save_every: int = 0
    sync_batch_norm: bool = False
    threads: int = 0


@dataclass(frozen=True)
class Config:
    """The configuration of a training run.

    Attributes:
        data: The data set, see :class:`DataConfig`.
        model: ``name``, one of ``qif_plugins.models.MODELS``, and the model's own arguments.
        neuron: ``name``, one of ``qif_plugins.models.NEURONS``, and the neuron's arguments; ``surrogate_function`` by
            the name of a surrogate of SpikingJelly. TOML has no null: in both, ``"none"`` stands for ``None``.
        loss: See :class:`LossConfig`.
        optimizer: See :class:`OptimizerConfig`.
        training: See :class:`TrainingConfig`.
    """

    data: DataConfig
    model: dict[str, Any]
    neuron: dict[str, Any] = field(default_factory=lambda: {"name": "qif"})
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values: tuples become lists, and options that are off are left out."""
        return _plain(asdict(self))


def load_config(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Config:
    """Read a configuration and change values in it.

    Args:
        source: A name among :func:`~qif_plugins.experiments.names.configurations`, the path of a TOML file, or nested
            dictionaries such as :meth:`Config.to_dict` returns.
        changes: Each ``table.key=value``; the value as in TOML, quotes around a word optional, ``none`` for an option
            that is off. Another ``neuron.name`` drops ``dynamics`` and ``window`` of the source, which describe its own
            QIF neuron; another ``data.name`` its ``folder``, ``download``, ``augment`` and ``size``.

    Raises:
        ValueError: Anything unknown or out of range; the message says what there is.
        FileNotFoundError: No such name and no such file.
    """
    tables = copy.deepcopy(dict(source)) if isinstance(source, Mapping) else _read(source)
    before = {table: dict(tables[table]) for table in _OF_NAME if isinstance(tables.get(table), dict)}
    for change in changes:
        _change(tables, change)
    changed = {change.partition("=")[0].strip() for change in changes}
    for table, own in before.items():
        if tables[table].get("name") != own.get("name"):
            for key in _OF_NAME[table]:
                if f"{table}.{key}" not in changed:
                    tables[table].pop(key, None)
    return from_dict(tables)


def _read(source: str | Path) -> dict[str, Any]:
    path = CONFIGURATIONS / f"{source}.toml"
    if str(source) not in configurations():
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no configuration {str(source)!r}: neither a file nor one of {', '.join(configurations())}"
            )
    try:
        return tomllib.loads(path.read_bytes().decode())  # always UTF-8, regardless of the locale
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def from_dict(tables: Mapping[str, Any], source: str | Path = "") -> Config:
    """Make a configuration from nested dictionaries.

    Args:
        tables: Such as :meth:`Config.to_dict` returns.
        source: The checkpoint that they were read from, where no table may be missing. Default none.

    Raises:
        ValueError: Anything unknown, missing, of a wrong type or out of range.
    """
    try:
        config: Config = _build(Config, tables, "")
        for table in get_type_hints(Config):
            if str(source) and table not in tables:
                raise ValueError(f"{table} is missing from the configuration")
    except ValueError as error:
        if not str(source):
            raise
        raise ValueError(f"the configuration in {source} is not valid: {error}") from error
    return config


# -- reading -----------------------------------------------------------------------------------------------------------


def _build(kind: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} must be a table, got {shown(values)}")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise _unknown(prefix + key)
    for entry in fields(kind):
        if entry.name not in values and entry.default is entry.default_factory is MISSING:
            raise ValueError(f"{prefix + entry.name} is missing from the configuration")
    return kind(**{key: _value(hints[key], value, prefix + key) for key, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    if get_origin(hint) in (Union, types.UnionType):
        return None if value is None else _value(next(h for h in get_args(hint) if h is not type(None)), value, name)
    if get_origin(hint) is dict:
        if not isinstance(value, Mapping) or not isinstance(value.get("name", ""), str):
            raise ValueError(f"{name} must be a table with a name, got {shown(value)}")
        return dict(value)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {shown(value)}")
        return tuple(_value(get_args(hint)[0], part, name) for part in value)
    value = of_type(hint, value, name)
    if hint is float and LARGEST < abs(value) < math.inf:
        raise ValueError(f"{name} must be at most {LARGEST:.3g} in magnitude, got {shown(value)}")
    return value


def of_type(kind: type, value: Any, name: str) -> Any:
    """Return a value of type ``kind``, or a float for a whole number where a float is wanted.

    Raises:
        ValueError: The value has another type.
    """
    if kind is float and type(value) is int:
        return float(value) if abs(value) <= LARGEST else value
    if type(value) is not kind:
        raise ValueError(f"{name} must be {_TYPES[kind]}, got {shown(value)}")
    return value


def _change(tables: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ValueError(f"--set {change!r} is not of the form table.key=value, such as training.epochs=5")
    table, dot, key = name.partition(".")
    if table not in get_type_hints(Config) or not dot or not key:
        raise _unknown(name)
    hint = get_type_hints(Config)[table]
    if is_dataclass(hint) and key not in get_type_hints(hint):
        raise _unknown(name)
    place = tables.setdefault(table, {})
    *path, last = key.split(".")
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ValueError(f"--set {change!r}: {part} is a value, not a table")
    if text.strip().lower() == "none" and is_dataclass(hint):
        place.pop(last, None)
    else:
        place[last] = _parse(text.strip())


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # not TOML, or a number of thousands of digits
        return text


def _unknown(name: str) -> ValueError:
    tables = get_type_hints(Config)
    keys = {table: get_type_hints(hint) if is_dataclass(hint) else ("name",) for table, hint in tables.items()}
    known = [f"{table}.{key}" for table, some in keys.items() for key in some]
    return unknown_key(name, known, f"the tables {', '.join(tables)}")


def unknown_key(name: str, known: Sequence[str], otherwise: str) -> ValueError:
    """Make the error for a key that does not exist: with the keys that are like it, or else with ``otherwise``."""
    near = difflib.get_close_matches(name.rpartition(".")[2], {key.rpartition(".")[2] for key in known}, 3, 0.6)
    close = [key for part in near for key in known if key.endswith(f".{part}")]
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {otherwise}"
    return ValueError(f"unknown configuration key {name!r}; {hint}")


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    data, loss, optimizer, training = config.data, config.loss, config.optimizer, config.training
    _one_of("data.name", data.name, DATA_SETS)
    _one_of("data.split", data.split, SPLITS)
    _one_of("data.encoder", data.encoder, ENCODERS)
    _one_of("loss.name", loss.name, LOSSES)
    _one_of("optimizer.name", optimizer.name, ("sgd", "adam", "adamw"))
    _one_of("optimizer.schedule", optimizer.schedule, ("cosine", "steps", "constant"))
    _one_of("training.precision", training.precision, ("no", "bf16", "fp16"))
    fixed = data.name in (*IN_MEMORY, *SOUNDS)
    events = data.name in ("cifar10dvs", "nmnist")
    allowed = () if fixed else EVENT_AUGMENTATIONS if events else IMAGE_AUGMENTATIONS
    for name in data.augment:
        _one_of(f"data.augment of {data.name}", name, allowed)
    _check_numbers(config)
    if training.batch_size % training.accumulation:
        raise ValueError(
            f"training.batch_size {training.batch_size} must be a multiple of training.accumulation "
            f"{training.accumulation}"
        )
    if fixed and data.size:
        raise ValueError(f"data.size must be 0 for {data.name}, whose samples keep their size, got {data.size}")
    if data.name == "image-folder" and not data.size:
        raise ValueError(
            "data.size must be at least 1 for image-folder, whose images may have any size, got 0; data.size=64, for "
            "example, resizes and crops them to 64 x 64"
        )
    if "name" not in config.model:
        raise ValueError("model.name is missing from the configuration")


def _check_numbers(config: Config) -> None:
    data, loss, optimizer, training = config.data, config.loss, config.optimizer, config.training
    for key, value, least, most in (
        ("data.steps", data.steps, 1, COUNT), ("data.size", data.size, 0, COUNT),
        ("data.cutout_size", data.cutout_size, 1, COUNT), ("data.workers", data.workers, 0, WORKERS),
        ("data.split_seed", data.split_seed, 0, SEED), ("data.encoder_seed", data.encoder_seed, 0, SEED),
        ("data.duration", data.duration, 0, 3600), ("data.bands", data.bands, 1, COUNT),
        ("data.delta", data.delta, 0.01, 1), ("data.sample_rate", data.sample_rate, 1, COUNT),
        ("training.epochs", training.epochs, 1, COUNT),
        ("training.batch_size", training.batch_size, 1, COUNT),
        ("training.accumulation", training.accumulation, 1, COUNT), ("training.seed", training.seed, 0, SEED),
        ("training.save_every", training.save_every, 0, COUNT), ("training.threads", training.threads, 0, WORKERS),
        ("loss.regularization", loss.regularization, 0, 1),
    ):  # fmt: skip
        if not value >= least:
            raise ValueError(f"{key} must be at least {least}, got {shown(value)}")
        if value > most:
            raise ValueError(f"{key} must be at most {most}, got {shown(value)}")
    if not math.isfinite(loss.target):
        raise ValueError(f"loss.target must be finite, got {loss.target}")
    for key, number, positive in (
        ("optimizer.weight_decay", optimizer.weight_decay, False), ("optimizer.momentum", optimizer.momentum, False),
        ("optimizer.warmup_epochs", optimizer.warmup_epochs, False),
        *(("each of optimizer.milestones", milestone, False) for milestone in optimizer.milestones),
        ("optimizer.lr", optimizer.lr, True), ("optimizer.clip_norm", optimizer.clip_norm, True),
        ("optimizer.gamma", optimizer.gamma, True),
    ):  # fmt: skip
        if number is not None and not (0 <= number < math.inf and (number or not positive)):
            off = "; 'none' clips nothing" if key == "optimizer.clip_norm" else ""
            raise ValueError(f"{key} must be {'positive' if positive else 'at least 0'} and finite, got {number}{off}")
    if optimizer.momentum >= 1:
        raise ValueError(f"optimizer.momentum must be below 1, got {optimizer.momentum}; 0.9 is usual")
    if optimizer.gamma > 1:
        raise ValueError(f"optimizer.gamma must be at most 1, got {optimizer.gamma}: it lowers the learning rate")
    if optimizer.warmup_epochs > training.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs must be at most training.epochs, {training.epochs}, got "
            f"{optimizer.warmup_epochs}; lower it, or train longer"
        )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if not known:
        raise ValueError(f"unknown {name} {shown(value)}; there are none, leave it empty")
    check_known(name, known, value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
