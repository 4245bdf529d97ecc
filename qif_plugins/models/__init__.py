"""Spiking networks on SpikingJelly's layers, with the neuron as one argument.

Every model takes sequences ``[T, N, C, H, W]``, time first and any T, and returns ``[T, N, classes]``. A readout is a
linear layer without neurons. Between two sequences, SpikingJelly's ``functional.reset_net`` clears the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..support.names import check_known
from .parts import NEURONS, NORMS, SpikingModel
from .plain import PlainNet, vggsnn
from .resnet import ResNet, resnet19, resnet34
from .small import Perceptron, convnet, perceptron

__all__ = [
    "MODELS", "NEURONS", "NORMS", "Perceptron", "PlainNet", "ResNet", "SpikingModel", "build", "convnet", "perceptron",
    "resnet19", "resnet34", "vggsnn",
]  # fmt: skip

MODELS: dict[str, Callable[..., SpikingModel]] = {
    "perceptron": perceptron,
    "convnet": convnet,
    "resnet19": resnet19,
    "resnet34": resnet34,
    "vggsnn": vggsnn,
}
"""Constructors by name."""


def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    spiking_neuron: Callable[..., nn.Module] | str = "qif",
    **kwargs: Any,
) -> SpikingModel:
    """Build the model ``name`` for data of a given shape.

    Args:
        name: One of :data:`MODELS`.
        shape: Shape ``[C, H, W]`` of one sample of one step.
        classes: Outputs.
        spiking_neuron: The neuron's name in :data:`NEURONS`, or its class. Default ``"qif"``.
        kwargs: The model's own arguments, such as ``norm`` or a perceptron's ``layers``; the rest goes to each neuron,
            and ``per_channel=True`` gives each neuron the width of its layer, see
            :class:`~qif_plugins.models.parts.Neurons`.

    Returns:
        A module from ``[T, N, C, H, W]`` to ``[T, N, classes]``.

    Raises:
        ValueError: Unknown model or neuron, a shape that the model does not take, or arguments that neither the
            model nor the neuron has.
    """
    check_known("model", MODELS, name)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be [C, H, W] of one sample of one step, all positive, got {list(shape)}")
    channels, height, width = shape
    if name == "perceptron":
        sizes = {"in_features": channels * height * width}
    elif name in ("resnet19", "resnet34"):
        sizes = {"in_channels": channels}
    elif height != width:
        raise ValueError(f"{name} takes square images, got {height} x {width}; crop or resize them")
    else:
        sizes = {"in_channels": channels, "size": height}
    return MODELS[name](**sizes, classes=classes, spiking_neuron=spiking_neuron, **kwargs)
