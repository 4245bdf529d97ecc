"""Data augmentation with random numbers that depend on seed, epoch and sample alone, in any worker and resumed run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batches import seed_of

IMAGE_AUGMENTATIONS = ("crop", "resized_crop", "flip", "autoaugment", "cutout")
EVENT_AUGMENTATIONS = ("flip", "roll")


class Augmented(Dataset[Any]):
    """A data set indexed by ``(epoch, index)``, whose transform draws random numbers that depend on that pair.

    Args:
        items: A data set of ``(value, label)``.
        transform: Maps a value to a tensor; draws from PyTorch's global generator, as torchvision's transforms do.
        seed: Seed of the random numbers.
    """

    def __init__(self, items: Any, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.items, self.transform, self.seed = items, transform, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone: torch.manual_seed would reset those of GPUs too.
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            value, label = self.items[index]
            return self.transform(value), int(label)


def image_transform(
    names: Sequence[str], size: int, mean: Sequence[float], std: Sequence[float], policy: str = "cifar10",
    cutout_size: int = 16, train: bool = True,
) -> Callable[[Any], Tensor]:  # fmt: skip
    """Make a torchvision transform from a PIL image to a normalized tensor ``[C, size, size]``.

    Args:
        names: Names from :data:`IMAGE_AUGMENTATIONS`, applied only in training, in this order: ``"crop"`` (pad by
            4 pixels and cut out ``size``), ``"resized_crop"`` (a random part, resized), ``"flip"`` (left to right,
            every second image), ``"autoaugment"`` (its ``policy``), ``"cutout"`` (see :func:`cutout`).
        size: Height and width of the result.
        mean: Mean of each channel, to normalize by.
        std: Standard deviation of each channel, to normalize by.
        policy: Policy of AutoAugment: ``"cifar10"`` or ``"imagenet"``.
        cutout_size: Side of the square that is cut out. Default 16.
        train: Whether to augment. Otherwise images larger than ``size`` are resized to 8/7 of it and cropped to their
            centre if ``"resized_crop"`` is among the names, as is usual for ImageNet. Default True.
    """
    from torchvision import transforms

    parts: list[Any] = []
    if train:
        makers: dict[str, Callable[[], Any]] = {
            "crop": lambda: transforms.RandomCrop(size, 4),
            "resized_crop": lambda: transforms.RandomResizedCrop(size),
            "flip": transforms.RandomHorizontalFlip,
            "autoaugment": lambda: transforms.AutoAugment(transforms.AutoAugmentPolicy[policy.upper()]),
        }
        parts += [make() for name, make in makers.items() if name in names]
    elif "resized_crop" in names:
        parts += [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size)]
    parts += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if train and "cutout" in names:
        parts.append(partial(cutout, size=cutout_size))
    composed: Callable[[Any], Tensor] = transforms.Compose(parts)
    return composed


def cutout(image: Tensor, size: int) -> Tensor:
    """Set one square of ``size`` pixels to 0, its centre anywhere in the image ``[C, H, W]`` (DeVries and Taylor,
    arXiv 1708.04552); on a normalized image 0 is the mean colour."""
    height, width = image.shape[-2:]
    y, x = int(torch.randint(height, (), device="cpu")), int(torch.randint(width, (), device="cpu"))
    top, left = max(0, y - size // 2), max(0, x - size // 2)
    image = image.clone()
    image[..., top : y - size // 2 + size, left : x - size // 2 + size] = 0
    return image


def event_transform(names: Sequence[str], size: int, train: bool = True) -> Callable[[Any], Tensor]:
    """Make a transform from event frames ``[T, 2, H, W]`` to a float tensor ``[T, 2, size, size]``.

    Args:
        names: Names from :data:`EVENT_AUGMENTATIONS`, applied only in training, and equally to all frames of a sample:
            ``"flip"`` (left to right, every second sample) and ``"roll"`` (up to five pixels along either axis, around
            the border).
        size: Height and width of the result; frames are resized bilinearly, with antialiasing.
        train: Whether to augment. Default True.
    """
    # No closure: worker processes that are spawned, as on Windows, receive the transform pickled.
    return partial(_frames, names=tuple(names) if train else (), size=size)


def _frames(frames: Any, names: tuple[str, ...], size: int) -> Tensor:
    x = torch.as_tensor(frames, dtype=torch.float32, device="cpu")
    if x.shape[-2:] != (size, size):
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    if "flip" in names and torch.rand((), device="cpu") < 0.5:
        x = x.flip(-1)
    if "roll" in names:
        dy, dx = torch.randint(-5, 6, (2,), device="cpu").tolist()
        x = x.roll((dy, dx), (-2, -1))
    return x
