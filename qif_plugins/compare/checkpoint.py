"""Trained networks of the comparison as files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Images
from ..files import replacing
from .hosts import HOSTS, Host, build, host_version
from .training import Settings, Training

__all__ = ["KIND", "checkpoint_name", "rebuild", "save"]

KIND = "qif compare"
"""What the entry ``"kind"`` of such a file says."""


def checkpoint_name(training: Training) -> str:
    """A file name for one training, without the suffix."""
    neuron = "lif" if training.neuron == "LIF" else f"qif-{training.window}"
    return f"{training.host}-{neuron}-{training.seed}"


def save(path: Path, network: nn.Module, training: Training, images: Images, settings: Settings) -> None:
    """Write a trained network, what it was trained on, and how well it does."""
    shape = {"channels": images.train.shape[1], "size": images.train.shape[2], "classes": images.classes}
    content = {
        "kind": KIND,
        "host": training.host,
        "neuron": training.neuron,
        "window": training.window,
        "seed": training.seed,
        "epochs": settings.epochs,
        "steps": settings.steps,
        "data": images.name,
        "shape": shape,
        "last_epoch": asdict(training.epochs[-1]),
        "network": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
    }
    with replacing(path) as beside:
        torch.save(content, beside)


def rebuild(content: dict[str, Any]) -> tuple[Host, nn.Module]:
    """The network that :func:`save` wrote, from what ``torch.load`` read, on the CPU and in evaluation mode.

    Returns:
        Its host and the network.

    Raises:
        ImportError: The host is not installed.
    """
    name = content["host"]
    if host_version(name) is None:
        raise ImportError(f"the network is one of {name}'s, which is not installed: pip install 'qif-plugins[{name}]'")
    host = HOSTS[name]()
    neuron = host.lif() if content["neuron"] == "LIF" else host.qif(content["window"])
    network, _ = build(host, neuron, **content["shape"])
    network.load_state_dict(content["network"])
    return host, network.eval()
