"""Save and load the trained networks of a comparison."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...neuron.surrogate import WINDOWS
from ...support import checkpoints
from ...support.names import unknown
from ..data.images import Images
from ..names import HOSTS
from .hosts import LAYERS, HostLayers, build, host_version
from .training import Hyperparameters, Training

__all__ = ["KIND", "check_content", "checkpoint_name", "rebuild", "save"]

KIND = "qif compare"
"""Value of the entry ``"kind"`` in such a file."""


def checkpoint_name(training: Training) -> str:
    """Return the file name of one training, without the suffix."""
    neuron = "lif" if training.neuron == "LIF" else f"qif-{training.window}"
    return f"{training.host}-{neuron}-{training.seed}"


def save(path: Path, network: nn.Module, training: Training, images: Images, settings: Hyperparameters) -> None:
    """Write a trained network with its settings, its data set's name and its accuracy."""
    content = {
        "kind": KIND,
        "host": training.host,
        "neuron": training.neuron,
        "window": training.window,
        "seed": training.seed,
        "epochs": settings.epochs,
        "steps": settings.steps,
        "data": images.name,
        "shape": _shape(images),
        "last_epoch": asdict(training.epochs[-1]),
        "network": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
    }
    checkpoints.save(path, content)


def check_content(path: Path, content: Any) -> None:
    """Check the content of a file that :func:`save` wrote.

    Raises:
        ValueError: The file is another one, lacks a part, or holds weights that are not finite.
    """
    kind = "file of 'qif compare --save'"
    checkpoints.check_content(path, content, _PARTS, kind)
    if content["kind"] != KIND or content["host"] not in HOSTS or content["neuron"] not in ("LIF", "QIF"):
        raise ValueError(f"{path} is no {kind}, or one of another version")
    if content["neuron"] == "QIF" and content["window"] not in WINDOWS:
        raise ValueError(f"{path}: {unknown('window', content['window'], WINDOWS)}")
    checkpoints.check_tensors(path, content["network"])


_PARTS: dict[str, Any] = {
    "kind": str, "host": str, "neuron": str, "window": str, "seed": int, "epochs": int, "steps": int, "data": str,
    "shape": {"channels": int, "size": int, "classes": int},
    "last_epoch": {"loss": float, "accuracy": float, "spikes": float},
    "network": {str: Tensor},
}  # fmt: skip


def rebuild(path: Path, content: dict[str, Any], images: Images) -> tuple[HostLayers, nn.Module]:
    """Rebuild the network that :func:`save` wrote, on the CPU and in evaluation mode.

    Args:
        path: The file, for the error.
        content: Content of the file, see :func:`check_content`.
        images: The data set that the network was trained on.

    Returns:
        The layers of its host, and the network.

    Raises:
        ImportError: The host is not installed.
        ValueError: The weights are another network's, or the network is one for other images.
    """
    name = content["host"]
    if host_version(name) is None:
        raise ImportError(f"the network is one of {name}'s, which is not installed: pip install 'qif-plugins[{name}]'")
    shape = _shape(images)
    if {key: content["shape"][key] for key in shape} != shape:
        raise ValueError(f"{path} is for images of {content['shape']}, and those of {images.name} are {shape}")
    host = LAYERS[name]()
    neuron = host.lif() if content["neuron"] == "LIF" else host.qif(content["window"])
    network, _ = build(host, neuron, **shape)
    checkpoints.load_weights(network, content["network"], str(path))
    return host, network.eval()


def _shape(images: Images) -> dict[str, int]:
    return {"channels": images.train.shape[1], "size": images.train.shape[2], "classes": images.classes}
