"""Import SpikingJelly's data sets, even if its package of data sets cannot be imported.

``spikingjelly.datasets`` of 2.x imports every data set it has, and with them torchaudio, which refuses to load beside a
PyTorch built for another CUDA version, as an unpinned install of the two may bring. The data set that is wanted may not
need torchaudio at all.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["dataset_module", "event_file_frames", "heidelberg_events", "heidelberg_frames", "prepare_nmnist"]

HEIDELBERG = {"shd": ("SpikingHeidelbergDigits", 20), "ssc": ("SpikingSpeechCommands", 35)}
"""SpikingJelly's class and the number of classes of the Heidelberg data sets."""
HEIDELBERG_CHANNELS = 700

_PACKAGE = "spikingjelly.datasets"
_lock = threading.RLock()


def dataset_module(name: str) -> ModuleType:
    """Import a module of ``spikingjelly.datasets``.

    If the usual import fails, the module is imported without its package's ``__init__``: no other data set is imported,
    and ``import spikingjelly.datasets`` fails or works afterwards as it did before.

    Args:
        name: Such as ``"shd"`` (``SpikingHeidelbergDigits``) or ``"cifar10_dvs"`` (``CIFAR10DVS``).

    Returns:
        The module. Imported by itself, its objects cannot be unpickled in a process that was started afresh, so a
        ``DataLoader`` with workers needs them forked.

    Raises:
        ImportError: SpikingJelly, or a package that this module needs, is missing.
    """
    with _lock:
        try:
            return importlib.import_module(f"{_PACKAGE}.{name}")
        except Exception as error:
            # Not only ImportError: torchaudio raises RuntimeError for another CUDA, OSError for a missing symbol.
            try:
                return _by_itself(name)
            except Exception as own:
                raise ImportError(
                    f"{_PACKAGE}.{name} does not import ({own}); install SpikingJelly and the readers of its files: "
                    f"pip install 'qif-plugins[spikingjelly,run]'"
                ) from error


def _by_itself(name: str) -> ModuleType:
    host = importlib.import_module("spikingjelly")
    package = ModuleType(_PACKAGE)
    package.__path__ = [f"{folder}/datasets" for folder in host.__path__]
    imported = sys.modules.setdefault(_PACKAGE, package)
    try:
        return importlib.import_module(f"{_PACKAGE}.{name}")
    finally:
        if imported is package:
            del sys.modules[_PACKAGE]


def heidelberg_events(name: str, root: Path, part: str) -> tuple[Any, Path]:
    """Open the events of the Heidelberg Digits or Speech Commands (HDF5) with SpikingJelly's class.

    Args:
        name: ``"shd"`` or ``"ssc"``.
        root: Folder with files such as ``shd_train.h5``, or with a folder ``events_h5`` or ``extract`` that holds them,
            which is where SpikingJelly 2.x and 0.0.0.0.14 put them. Nothing is written there or downloaded. The
            format: ``spikes/times`` (seconds) and ``spikes/units`` (0 to 699), an array a sample, and ``labels``.
        part: ``"train"``, ``"test"``, or ``"valid"`` for SSC.

    Returns:
        The data set of ``({"t": times, "x": units}, label)``, and the file.

    Raises:
        FileNotFoundError: The file is not in any of these places.
        ImportError: SpikingJelly or h5py is missing, or this SpikingJelly has no such data set.
        ValueError: A label is outside the data set's.
    """
    file = f"{name}_{part}.h5"
    path = next((p for p in (root / file, root / "events_h5" / file, root / "extract" / file) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{file} is neither in {root} nor in its folders events_h5 and extract; download and unpack it from "
            f"https://zenkelab.org/resources/spiking-heidelberg-datasets-shd/"
        )
    kind, classes = HEIDELBERG[name]
    dataset_type = getattr(dataset_module("shd"), kind, None)
    if dataset_type is None:
        raise ImportError(f"this SpikingJelly has no {kind}; 2.0 has: pip install 'spikingjelly>=2'")
    # The places that either version looks in, so that neither starts a download.
    with tempfile.TemporaryDirectory() as folder:
        for place in ("events_h5", "extract"):
            _provide(path.resolve(), Path(folder) / place)
        which = {"train": part == "train"} if name == "shd" else {"split": part}
        dataset = dataset_type(folder, **which, data_type="event")
        dataset.h5_file_path = path.resolve()  # SpikingJelly 2.x opens it when the first sample is read
    import h5py

    with h5py.File(path) as opened:
        labels = np.asarray(opened["labels"], dtype=np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"{path} has labels {labels.min()} to {labels.max()}; {name.upper()}'s are 0 to {classes - 1}")
    return dataset, path


def heidelberg_frames(events: Any, steps: int, duration: float) -> np.ndarray:
    """Count the events of a sample in each time step and channel; later events are left out.

    Args:
        events: Times ``t`` in seconds and units ``x``.
        steps: T.
        duration: Seconds that the T steps span.

    Returns:
        Counts ``[T, 1, 1, 700]``, float32.
    """
    unit, step = np.asarray(events["x"], np.int64), np.asarray(events["t"], np.float64) * (steps / duration)
    if len(unit) and unit.max() >= HEIDELBERG_CHANNELS:
        raise ValueError(f"a sample has unit {unit.max()}; the units are 0 to {HEIDELBERG_CHANNELS - 1}")
    kept = step < steps
    place = step[kept].astype(np.int64) * HEIDELBERG_CHANNELS + unit[kept]
    counts = np.bincount(place, minlength=steps * HEIDELBERG_CHANNELS).astype(np.float32)
    return counts.reshape(steps, 1, 1, HEIDELBERG_CHANNELS)


def prepare_nmnist(root: Path) -> Any:
    """Return SpikingJelly's class ``NMNIST``, with the events of ``root`` in the form that it reads.

    Args:
        root: SpikingJelly's folder of the data set (``events_np``, or ``download`` with ``Train.zip`` and
            ``Test.zip``), or one with the unpacked ``Train`` and ``Test``, a folder of ``.bin`` files for each digit.
            SpikingJelly converts these into ``events_np`` beside them, under another name first.

    Raises:
        FileNotFoundError: None of these is in ``root``.
    """
    kind = dataset_module("n_mnist").NMNIST
    if (root / "events_np").exists() or (root / "download").exists():
        return kind
    source = next((place for place in (root, root / "extract") if (place / "Train").is_dir()), None)
    if source is None or not (source / "Test").is_dir():
        raise FileNotFoundError(
            f"there is no N-MNIST in {root}: neither folders 'Train' and 'Test' with a folder of .bin files for each "
            "digit, nor 'events_np' or 'download' as SpikingJelly has them"
        )
    convert = getattr(kind, "create_raw_from_extracted", None) or kind.create_events_np_files
    beside = Path(tempfile.mkdtemp(prefix=".events_np.qif-", dir=root))
    try:
        convert(source, beside)
        beside.chmod(0o755)  # mkdtemp's are private
        beside.rename(root / "events_np")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return kind


def event_file_frames(path: Path, steps: int) -> np.ndarray:
    """Read a file of N-MNIST and cut it into frames of equal event counts, as SpikingJelly does.

    Returns:
        Counts ``[T, 2, 34, 34]``.
    """
    module = dataset_module("n_mnist")
    tools = getattr(module, "utils", None) or module.sjds
    events = tools.load_ATIS_bin(str(path))
    height, width = module.NMNIST.get_H_W()
    outside = max(int(events["x"].max(initial=0)), int(events["y"].max(initial=0)))
    if path.stat().st_size % 5 or outside >= height or len(events["t"]) < steps:
        raise ValueError(
            f"{path} is not an N-MNIST sample that {steps} frames can be made of: {path.stat().st_size} bytes of 5 an "
            f"event, pixels up to {outside} of at most {height - 1}"
        )
    return np.asarray(tools.integrate_events_by_fixed_frames_number(events, "number", steps, height, width))


def _provide(file: Path, folder: Path) -> None:
    """Create ``folder`` with ``file`` in it, by a link if possible."""
    try:
        folder.symlink_to(file.parent, target_is_directory=True)
    except OSError:  # Windows, without the privilege to make links
        folder.mkdir()
        shutil.copyfile(file, folder / file.name)
