"""``qif data``: samples as the network gets them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..experiments.data.images import torchvision_datasets
from ..experiments.data.sound import encode_file
from ..experiments.data.spikingjelly import event_file_frames, heidelberg_events, heidelberg_frames
from ..experiments.figures import plot_sample
from ..experiments.names import SEQUENCES, SOUNDS
from ..experiments.training.augmentation import event_transform, image_transform
from ..experiments.training.config import DataConfig, load_config
from ..experiments.training.data import DURATIONS, IMAGENET_STATISTICS, expected_shape, sound_of

_NAMES = {".wav": "spoken_digits", ".bin": "nmnist", ".bs2": "nmnist", ".h5": "shd", ".hdf5": "shd"}
"""Configurations by the suffix of the file; other files are read as images."""


def run(arguments: argparse.Namespace) -> int:
    """Draw a sample, and print its shape and how much of it is spikes."""
    path = arguments.file
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    source = arguments.config or _NAMES.get(path.suffix.lower(), "image_folder")
    changes = arguments.changes or []
    if arguments.config is None and path.name.startswith("ssc_"):
        changes = ["data.name=ssc", *changes]
    data = load_config(source, changes).data
    x, what = _sample(data, path, arguments.index)
    shown = "x".join(map(str, x.shape))
    said = f"{what}: T x C x H x W = {shown}, values from {x.min():g} to {x.max():g}"
    if data.name in SEQUENCES:
        said += f"; {x.sum():,.0f} events, {(x > 0).float().mean():.2%} of all places and steps have one"
    plot_sample(arguments.out, x, f"{path.name}, {what}, {shown}", data.name in SOUNDS)
    print(f"{said}\nwrote {arguments.out}")
    return 0


def _sample(data: DataConfig, path: Path, index: int) -> tuple[Tensor, str]:
    """Read a sample ``[T, C, H, W]``, and say what was made of it."""
    if data.name == "spoken-digits":
        return encode_file(path, sound_of(data)).float(), f"encoder {data.encoder}, {data.bands} bands"
    if data.name in ("shd", "ssc"):
        root, part = path.parent, path.stem.removeprefix(f"{data.name}_")
        if part not in ("train", "test", *(["valid"] if data.name == "ssc" else [])):
            raise ValueError(f"{path.name} is not a file such as {data.name}_train.h5; rename it as it was downloaded")
        samples, _ = heidelberg_events(data.name, root, part)
        if index >= len(samples):
            raise ValueError(f"--index must be at most {len(samples) - 1} for {path}, got {index}")
        events, label = samples[index]
        frames = heidelberg_frames(events, data.steps, data.duration or DURATIONS[data.name])
        return torch.from_numpy(frames), f"sample {index}, class {label}"
    if data.name in ("nmnist", "cifar10dvs"):
        if data.name != "nmnist" or path.suffix.lower() not in (".bin", ".bs2"):
            raise ValueError(f"{path} cannot be shown as a sample of {data.name}; pass a .bin file of N-MNIST")
        size = expected_shape(data)[0][1]
        return event_transform((), size)(event_file_frames(path, data.steps)), "frames of equal event counts"
    if data.name != "image-folder":
        raise ValueError(f"single files are not shown as {data.name}; pass --config image_folder")
    torchvision_datasets(data.name)
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    try:
        image = default_loader(str(path))
    except OSError as error:
        raise ValueError(f"{path} is no image, WAV file, .bin file of N-MNIST or .h5 file of SHD or SSC") from error
    square = transforms.Compose([transforms.Resize(data.size), transforms.CenterCrop(data.size)])
    normalized = image_transform((), data.size, *IMAGENET_STATISTICS)(square(image))
    return normalized[None], f"normalized, the same in all {data.steps} steps"
