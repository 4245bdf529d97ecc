"""Networks small enough for a laptop: perceptrons and a convolutional network of five layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .parts import Neurons, QIFNode, SpikingModel, layer, norm1d
from .plain import PlainNet


class Perceptron(SpikingModel):
    """Network of linear layers with neurons between them; see :func:`perceptron`."""

    def __init__(
        self, in_features: int, classes: int, layers: int, width: int, norm: str | None, neurons: Neurons
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("classes", classes), ("layers", layers), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_features = in_features
        hidden: list[nn.Module] = []
        for features in [in_features, *[width] * (layers - 2)][: layers - 1]:
            hidden += [
                layer.Linear(features, width, bias=norm is None),
                norm1d(norm, width, neurons.v_threshold),
                neurons(width),
            ]
        self.hidden = nn.Sequential(*hidden)
        self.classifier = layer.Linear(width if hidden else in_features, classes)
        self._finish()

    def forward(self, x_seq: Tensor) -> Tensor:
        """Map ``[T, N, *]`` to ``[T, N, classes]``."""
        lead = 2 if self.step_mode == "m" else 1
        if x_seq.dim() <= lead or x_seq.shape[lead:].numel() != self.in_features:
            raise ValueError(
                f"Perceptron in step mode {self.step_mode!r} takes {'[T, N, *]' if lead == 2 else '[N, *]'} with "
                f"{self.in_features} features a step, got {list(x_seq.shape)}"
            )
        return self.classifier(self.hidden(x_seq.flatten(lead)))


def perceptron(
    in_features: int,
    classes: int,
    layers: int = 2,
    width: int = 256,
    norm: str | None = "tdbn",
    spiking_neuron: Callable[..., nn.Module] | str = QIFNode,
    **kwargs: Any,
) -> Perceptron:
    """Build a multi-layer perceptron: linear, norm and neurons ``layers - 1`` times, then a linear readout.

    Args:
        in_features: Number of values of a sample in one step; C·H·W for an image.
        classes: Outputs.
        layers: Number of linear layers, the readout included. Default 2.
        width: Neurons of a hidden layer. Default 256.
        norm: ``"tdbn"`` (default), ``"batch"`` or ``None``, see :data:`~qif_plugins.models.parts.NORMS`.
        spiking_neuron: The neuron's class or name, see :class:`~qif_plugins.models.parts.Neurons`. Default
            :class:`~qif_plugins.adapters.spikingjelly.QIFNode`.
        kwargs: Passed on to each neuron.

    Returns:
        A module from ``[T, N, *]`` to ``[T, N, classes]``; every layer starts as PyTorch's does.

    Raises:
        ValueError: A size below 1, an unknown norm or neuron, or arguments that the neuron refuses.
    """
    return Perceptron(in_features, classes, layers, width, norm, Neurons(spiking_neuron, kwargs))


def convnet(
    in_channels: int,
    classes: int,
    size: int = 28,
    widths: Sequence[int] = (16, 32, 32, 32),
    norm: str | None = "tdbn",
    spiking_neuron: Callable[..., nn.Module] | str = QIFNode,
    **kwargs: Any,
) -> PlainNet:
    """Build a convolutional network of ``len(widths) + 1`` layers for images of 8 x 8 to 32 x 32.

    3 x 3 convolutions with norm and neurons, a 2 x 2 mean after each of the first two, and a linear readout.

    Args:
        in_channels: Channels of the image.
        classes: Outputs.
        size: Height and width of the image, at least 4. Default 28.
        widths: Channels of the convolutions, two or more. Default (16, 32, 32, 32).
        norm: ``"tdbn"`` (default), ``"batch"`` or ``None``, see :data:`~qif_plugins.models.parts.NORMS`.
        spiking_neuron: The neuron's class or name, see :class:`~qif_plugins.models.parts.Neurons`. Default
            :class:`~qif_plugins.adapters.spikingjelly.QIFNode`.
        kwargs: Passed on to each neuron.

    Returns:
        A module from ``[T, N, in_channels, size, size]`` to ``[T, N, classes]``.

    Raises:
        ValueError: Sizes that do not fit, an unknown norm or neuron, or arguments that the neuron refuses.
    """
    if len(widths) < 2:
        raise ValueError(f"widths must name two convolutions or more, got {tuple(widths)}")
    plan: list[int | str] = [widths[0], "pool", widths[1], "pool", *widths[2:]]
    return PlainNet(plan, in_channels, classes, size, norm, Neurons(spiking_neuron, kwargs))
