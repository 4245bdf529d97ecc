"""Convolutional networks without branches: VGGSNN, and the class behind it and the small convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .parts import Neurons, QIFNode, SpikingModel, conv, layer, norm2d

VGGSNN = (64, 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


class PlainNet(SpikingModel):
    """Network of convolutions with norm and neurons, mean pooling and a linear readout.

    Args:
        plan: Widths of the 3 x 3 convolutions, and ``"pool"`` for a mean over 2 x 2.
        in_channels: Channels C of the input.
        classes: Outputs.
        size: Height and width of the input.
        norm: A name of :data:`~qif_plugins.models.parts.NORMS`.
        neurons: Factory of the neurons.
        bias: Whether convolutions with a norm have biases; without a norm they always have. Default False.

    Raises:
        ValueError: An image too small for the pooling, or an unknown norm.
    """

    def __init__(
        self, plan: Sequence[int | str], in_channels: int, classes: int, size: int, norm: str | None, neurons: Neurons,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        pools = plan.count("pool")
        if size >> pools < 1:
            raise ValueError(f"size must be at least {1 << pools}, as {pools} means over 2 x 2 halve it, got {size}")
        self.in_channels, self.size = in_channels, size
        features: list[nn.Module] = []
        channels = in_channels
        for width in plan:
            if isinstance(width, str):
                features.append(layer.AvgPool2d(2))
                continue
            features += [
                conv(channels, width, bias=bias or norm is None),
                norm2d(norm, width, neurons.v_threshold),
                neurons(width),
            ]
            channels = width
        self.features = nn.Sequential(*features)
        self.flatten = layer.Flatten()
        self.classifier = layer.Linear(channels * (size >> pools) ** 2, classes)
        self._finish()

    def forward(self, x_seq: Tensor) -> Tensor:
        """Map ``[T, N, C, size, size]`` to ``[T, N, classes]``."""
        self._check(x_seq)
        if x_seq.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"the model was built for images of {self.size} x {self.size}, got {list(x_seq.shape[-2:])}; "
                "build it with another size or resize the images"
            )
        return self.classifier(self.flatten(self.features(x_seq)))


def vggsnn(
    in_channels: int = 2,
    classes: int = 10,
    size: int = 48,
    norm: str | None = "tdbn",
    spiking_neuron: Callable[..., nn.Module] | str = QIFNode,
    **kwargs: Any,
) -> PlainNet:
    """Build VGGSNN, for CIFAR10-DVS frames resized to 48 x 48.

    64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2-FC, as in Deng et al., *Temporal Efficient
    Training of Spiking Neural Network via Gradient Re-weighting*, ICLR 2022, arXiv 2202.11946, and its code: the
    convolutions have biases, and Kaiming's initialization by fan-out. 9,271,498 parameters with the defaults.

    Args:
        in_channels: Channels of a frame. Default 2, the polarities.
        classes: Outputs. Default 10.
        size: Height and width of a frame, at least 16. Default 48.
        norm: ``"tdbn"`` (default), ``"batch"`` (TET's; the same at a threshold of 1) or ``None``.
        spiking_neuron: The neuron's class or name, see :class:`~qif_plugins.models.parts.Neurons`. Default
            :class:`~qif_plugins.adapters.spikingjelly.QIFNode`.
        kwargs: Passed on to each neuron.

    Returns:
        A module from ``[T, N, in_channels, size, size]`` to ``[T, N, classes]``.

    Raises:
        ValueError: A size too small, an unknown norm or neuron, or arguments that the neuron refuses.
    """
    return PlainNet(VGGSNN, in_channels, classes, size, norm, Neurons(spiking_neuron, kwargs), bias=True)
