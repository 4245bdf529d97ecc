"""Data sets of the configurations as batches for the trainer, read by torchvision and SpikingJelly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_all_start_methods
from torch.utils.data import DataLoader, Subset

from ...support.files import check_parts
from ..data.images import image_folders, load_images, torchvision_parts
from ..data.sound import Sound, divide, encode_folder, polarities
from ..data.spikingjelly import dataset_module, heidelberg_events, heidelberg_frames, prepare_nmnist
from ..names import IN_MEMORY
from .augmentation import Augmented, event_transform, image_transform
from .batches import Batches, seed_of
from .config import DataConfig

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
    "image-folder": ((3, 1, 1), 1000, 0),
    "cifar10dvs": ((2, 128, 128), 10, 9_000),
    "nmnist": ((2, 34, 34), 10, 60_000),
    "spoken-digits": ((1, 1, 40), 10, 0),
    "shd": ((1, 1, 700), 20, 8_156),
    "ssc": ((1, 1, 700), 35, 75_466),
}
"""Shape of a sample, classes and training samples of the data sets; 0 if their number depends on the folder."""
DURATIONS = {"spoken-digits": 0.6, "shd": 1.4, "ssc": 1.0}
"""Seconds of the sounds, unless ``data.duration`` says otherwise."""


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
            # Otherwise it draws from the global generator, and once more in a run that was interrupted and resumed.
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
    if data.name == "spoken-digits":
        return (polarities(data.encoder), 1, data.bands), classes
    return (channels, data.size or height, data.size or width), classes


def samples_of(data: DataConfig) -> int:
    """Number of training samples that a data set should have; 0 if it is not known before it is read."""
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
    if data.name == "spoken-digits":
        return _spoken_digits(data, batch_size, seed, advice)
    if data.name in ("shd", "ssc"):
        return _heidelberg(data, batch_size, seed)
    if data.name == "image-folder":
        return _image_folder(data, batch_size, seed, record or {}, advice)
    if data.name == "nmnist":
        return _nmnist(data, batch_size, seed)
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
        parts = image_folders("imagenet", Path(data.folder), ("train", "val"), advice[0])
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


def _image_folder(data: DataConfig, batch_size: int, seed: int, record: dict[str, Any], advice: Advice) -> Task:
    from torchvision import transforms

    folder, names = Path(data.folder), data.augment
    square = transforms.Compose([transforms.Resize(data.size), transforms.CenterCrop(data.size)])
    transform = None if "resized_crop" in names else square  # which resizes by itself
    test = next((part for part in ("test", "val") if (folder / part).is_dir()), "")
    if (folder / "train").is_dir() or test:
        parts = image_folders(data.name, folder, ("train", test or "test"), advice[0], transform)
        classes = parts[0].classes
        kept: dict[str, Any] = {}
    else:
        (whole,) = image_folders(data.name, folder, ("",), advice[0], transform)
        parts, kept = _divided(whole, folder, data.split_seed, record if "test" in record else {})
        classes = whole.classes
    if record.get("classes", classes) != classes:
        raise ValueError(
            f"{folder} has the classes {', '.join(classes)}, and the checkpoint was made with "
            f"{', '.join(record['classes'])}; pass a folder with the same ones"
        )
    shape, (mean, std) = expected_shape(data)[0], IMAGENET_STATISTICS
    chosen = [
        image_transform(names, data.size, mean, std, "imagenet", data.cutout_size, train=train)
        for train in (True, False)
    ]
    return _loaded(data, batch_size, seed, parts, chosen, shape, len(classes), {"classes": classes, **kept})


def sound_of(data: DataConfig) -> Sound:
    """Settings of the encoding of spoken digits."""
    return Sound(
        data.steps, data.duration or DURATIONS["spoken-digits"], data.bands, data.sample_rate, data.encoder, data.delta,
        data.encoder_seed,
    )  # fmt: skip


def _spoken_digits(data: DataConfig, batch_size: int, seed: int, advice: Advice) -> Task:
    sound, folder = sound_of(data), Path(data.folder)
    try:
        found, spikes = encode_folder(folder, sound)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {advice[0]}") from error
    labels = torch.tensor([recording.digit for recording in found], device="cpu")
    parts = [
        Batches.of(spikes[chosen].float(), labels[chosen], batch_size=batch_size, seed=seed, shuffle=shuffle)
        for chosen, shuffle in zip(divide(found, data.split, data.test_speakers), (True, False), strict=True)
    ]
    return Task(parts[0], parts[1], *expected_shape(data))


def _heidelberg(data: DataConfig, batch_size: int, seed: int) -> Task:
    parts = [heidelberg_events(data.name, Path(data.folder), part)[0] for part in ("train", "test")]
    frames = partial(_counted, steps=data.steps, duration=data.duration or DURATIONS[data.name])
    shape, classes = expected_shape(data)
    return _loaded(data, batch_size, seed, parts, (frames, frames), shape, classes, {})


def _counted(events: Any, steps: int, duration: float) -> Tensor:
    return torch.from_numpy(heidelberg_frames(events, steps, duration))


def _nmnist(data: DataConfig, batch_size: int, seed: int) -> Task:
    folder = Path(data.folder)
    kind = prepare_nmnist(folder)
    parts = [
        kind(str(folder), train=train, data_type="frame", frames_number=data.steps, split_by="number")
        for train in (True, False)
    ]
    shape, classes = expected_shape(data)
    transforms = [event_transform(data.augment, shape[1], train=train) for train in (True, False)]
    return _loaded(data, batch_size, seed, parts, transforms, shape, classes, {})


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
    parts, record = _divided(whole, folder, data.split_seed, record)
    shape = expected_shape(data)[0]
    transforms = [event_transform(data.augment, shape[1], train=train) for train in (True, False)]
    return _loaded(data, batch_size, seed, parts, transforms, shape, len(whole.classes), record)


def _divided(whole: Any, folder: Path, seed: int, record: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Divide a data set 9:1 in each class, or as ``record`` says; return the parts and the record of the division."""
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
        chosen = split_per_class(whole.targets, 0.9, seed)
    if not all(chosen):
        raise ValueError(f"{folder} holds {len(whole)} samples, too few to divide 9:1 in each class")
    return [Subset(whole, indices) for indices in chosen], {"samples": len(whole), "test": chosen[1]}


def _loaded(
    data: DataConfig, batch_size: int, seed: int, parts: Sequence[Any], transforms: Sequence[Any],
    shape: tuple[int, int, int], classes: int, record: dict[str, Any],
) -> Task:  # fmt: skip
    train, test = (
        LoaderBatches(Augmented(part, transform, seed), batch_size, shuffle=shuffle, seed=seed, workers=data.workers)
        for part, transform, shuffle in zip(parts, transforms, (True, False), strict=True)
    )
    return Task(train, test, shape, classes, record)
