"""Data sets of the configurations as batches for the trainer, read by torchvision and SpikingJelly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_all_start_methods
from torch.utils.data import DataLoader, Subset

from ...support.files import check_parts
from ..data.images import load_images, torchvision_datasets, torchvision_parts
from ..data.spikingjelly import dataset_module
from ..names import IN_MEMORY
from .augmentation import Augmented, event_transform, image_transform
from .batches import Batches, seed_of
from .config import DataConfig

__all__ = ["ADVICE", "Advice", "Task", "expected_shape", "load_task", "samples_of", "split_per_class"]

CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_STATISTICS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of the channels, as in the code of arXiv 2202.11946."""

Advice = tuple[str, str]
ADVICE: Advice = ("name the folder where they lie in data.folder", "set data.download=true")
_KNOWN = {
    "digits": ((1, 8, 8), 10, 1_197),
    "mnist5k": ((1, 28, 28), 10, 4_000),
    "mnist": ((1, 28, 28), 10, 60_000),
    "fashion-mnist": ((1, 28, 28), 10, 60_000),
    "cifar10": ((3, 32, 32), 10, 50_000),
    "cifar100": ((3, 32, 32), 100, 50_000),
    "imagenet": ((3, 224, 224), 1000, 1_281_167),
    "cifar10dvs": ((2, 128, 128), 10, 9_000),
}
"""Shape of a sample, classes and training samples of the data sets."""


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        train: Batches ``(x, labels)`` to learn from; x is ``[N, C, H, W]``, or ``[N, T, C, H, W]`` for events.
        test: Batches to test on, alike.
        shape: ``[C, H, W]`` of a sample of one step.
        classes: Number of classes.
        record: Values that a checkpoint needs to divide the samples in the same way; empty if the data set is divided.
    """

    train: Batches
    test: Batches
    shape: tuple[int, int, int]
    classes: int
    record: dict[str, Any] = field(default_factory=dict)


class LoaderBatches(Batches):
    """Batches that PyTorch's ``DataLoader`` loads, in worker processes if asked to.

    Args:
        items: Items by ``(epoch, index)``, see :class:`~.augmentation.Augmented`.
        batch_size: As in :class:`~.batches.Batches`.
        shuffle: As in :class:`~.batches.Batches`.
        seed: As in :class:`~.batches.Batches`.
        workers: Processes that load; 0 for none.
    """

    def __init__(self, items: Augmented, batch_size: int, *, shuffle: bool, seed: int, workers: int) -> None:
        super().__init__(len(items), self._collate, batch_size, shuffle=shuffle, seed=seed)
        self.items, self.workers = items, workers

    def epoch(self, epoch: int, first: int = 0, process: int = 0, processes: int = 1) -> Iterator[Any]:
        """See :meth:`~.batches.Batches.epoch`."""
        shares = [indices.tolist() for indices in self.indices(epoch, first, process, processes)]
        loader = DataLoader(
            self.items,
            batch_sampler=[[(epoch, index) for index in share] for share in shares if share],
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # Otherwise it draws from the global generator, and once more in a run that was cut and resumed.
            generator=torch.Generator(),
            # A module that is imported past its package cannot be unpickled by a process that starts afresh.
            multiprocessing_context="fork" if self.workers and "fork" in get_all_start_methods() else None,
        )
        loaded = iter(loader)
        for share in shares:
            yield next(loaded) if share else None

    def _collate(self, indices: Tensor, epoch: int) -> Any:
        return torch.utils.data.default_collate([self.items[epoch, index] for index in indices.tolist()])


def expected_shape(data: DataConfig) -> tuple[tuple[int, int, int], int]:
    """Shape of a sample and number of classes that a data set should have, known before it is read."""
    (channels, height, width), classes, _ = _KNOWN[data.name]
    return (channels, data.size or height, data.size or width), classes


def samples_of(data: DataConfig) -> int:
    """Number of training samples that a data set should have, known before it is read."""
    return _KNOWN[data.name][2]


def load_task(
    data: DataConfig, batch_size: int, seed: int, record: dict[str, Any] | None = None, advice: Advice = ADVICE
) -> Task:
    """Read a data set.

    Args:
        data: The data set and its options.
        batch_size: Samples a batch.
        seed: Seed of the order of the training samples and of their augmentation.
        record: Record of an earlier :class:`Task`, to divide the samples as it did. Default: none.
        advice: Two remedies for missing data, for the error: to name their folder, and to download them.

    Raises:
        FileNotFoundError: The data are not where they should be.
        ImportError: The package that reads them is not installed.
        ValueError: The samples are not those of ``record``.
    """
    if data.name in IN_MEMORY:
        return _in_memory(data, batch_size, seed, advice)
    if data.name == "cifar10dvs":
        return _events(data, batch_size, seed, record or {}, advice)
    return _images(data, batch_size, seed, advice)


def split_per_class(labels: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide samples at random in each class, as SpikingJelly's ``split_to_train_test_set`` does, with a seed.

    Args:
        labels: The class of every sample.
        share: Share of each class that goes to the first part, rounded up.
        seed: Seed of the random choice.

    Returns:
        The indices of either part, ascending.
    """
    parts: tuple[list[int], list[int]] = ([], [])
    for label in sorted(set(labels)):
        members = torch.tensor([index for index, other in enumerate(labels) if other == label], device="cpu")
        generator = torch.Generator().manual_seed(seed_of(seed, label))
        shuffled = members[torch.randperm(len(members), generator=generator, device="cpu")].tolist()
        cut = math.ceil(len(shuffled) * share)
        parts[0].extend(shuffled[:cut])
        parts[1].extend(shuffled[cut:])
    return sorted(parts[0]), sorted(parts[1])


def _way_out(advice: Advice) -> str:
    return ", or ".join(filter(None, advice))


def _in_memory(data: DataConfig, batch_size: int, seed: int, advice: Advice) -> Task:
    images = load_images(data.name, data.folder, data.download, _way_out(advice))
    train, test = images.normalized()
    return Task(
        Batches.of(train, images.train_labels, batch_size=batch_size, seed=seed),
        Batches.of(test, images.test_labels, batch_size=batch_size, shuffle=False), expected_shape(data)[0],
        images.classes,
    )  # fmt: skip


def _images(data: DataConfig, batch_size: int, seed: int, advice: Advice) -> Task:
    if data.name == "imagenet":
        mean, std = IMAGENET_STATISTICS
        parts = _image_folders(Path(data.folder), advice)
        classes = len(parts[0].classes)
    else:
        mean, std = CIFAR10_STATISTICS if data.name == "cifar10" else CIFAR100_STATISTICS
        parts = torchvision_parts(data.name, Path(data.folder), data.download, _way_out(advice))
        classes = expected_shape(data)[1]
    shape = expected_shape(data)[0]
    policy = "imagenet" if data.name == "imagenet" else "cifar10"
    transforms = [
        image_transform(data.augment, shape[1], mean, std, policy, data.cutout_size, train=train)
        for train in (True, False)
    ]
    return _loaded(data, batch_size, seed, parts, transforms, shape, classes, {})


def _image_folders(folder: Path, advice: Advice) -> list[Any]:
    datasets = torchvision_datasets("imagenet")
    try:
        parts = [datasets.ImageFolder(folder / part) for part in ("train", "val")]
    except (FileNotFoundError, RuntimeError) as error:
        raise FileNotFoundError(
            f"cannot read ImageNet from {folder}: {error}. It takes folders 'train' and 'val' with a folder of "
            f"JPEG files for each class; {advice[0]}"
        ) from error
    if parts[0].classes != parts[1].classes:
        raise ValueError(f"the folders of {folder / 'train'} and {folder / 'val'} do not name the same classes")
    return parts


def _events(data: DataConfig, batch_size: int, seed: int, record: dict[str, Any], advice: Advice) -> Task:
    folder = Path(data.folder)
    # SpikingJelly would begin to download without being asked.
    if not ((folder / "events_np").exists() or (folder / "download").exists() or data.download):
        raise FileNotFoundError(
            f"there is no CIFAR10-DVS in {folder}: neither 'events_np' nor 'download' with its ten zip files; "
            f"{_way_out(advice)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    kind = dataset_module("cifar10_dvs").CIFAR10DVS
    try:
        whole = kind(str(folder), data_type="frame", frames_number=data.steps, split_by="number")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"SpikingJelly finds no samples of CIFAR10-DVS in {folder}: {error}. An earlier conversion may have "
            "failed; remove 'events_np' and the 'frames_number_...' folders in it, and run again"
        ) from error
    if record:
        check_parts(record, {"samples": int, "test": [int]}, "the checkpoint's data")
        if record["samples"] != len(whole) or not all(0 <= index < len(whole) for index in record["test"]):
            raise ValueError(
                f"{folder} holds {len(whole)} samples, and the checkpoint was made with {record['samples']}: its "
                "division into training and test samples does not fit"
            )
        testing = set(record["test"])
        chosen = [i for i in range(len(whole)) if i not in testing], sorted(testing)
    else:
        chosen = split_per_class(whole.targets, 0.9, data.split_seed)
    if not all(chosen):
        raise ValueError(f"{folder} holds {len(whole)} samples, too few to divide 9:1 in each class")
    shape = expected_shape(data)[0]
    transforms = [event_transform(data.augment, shape[1], train=train) for train in (True, False)]
    parts = [Subset(whole, indices) for indices in chosen]
    record = {"samples": len(whole), "test": chosen[1]}
    return _loaded(data, batch_size, seed, parts, transforms, shape, len(whole.classes), record)


def _loaded(
    data: DataConfig, batch_size: int, seed: int, parts: Sequence[Any], transforms: Sequence[Any],
    shape: tuple[int, int, int], classes: int, record: dict[str, Any],
) -> Task:  # fmt: skip
    train, test = (
        LoaderBatches(Augmented(part, transform, seed), batch_size, shuffle=shuffle, seed=seed, workers=data.workers)
        for part, transform, shuffle in zip(parts, transforms, (True, False), strict=True)
    )
    return Task(train, test, shape, classes, record)
