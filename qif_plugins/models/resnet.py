"""ResNet-19 and ResNet-34 with tdBN.

The blocks are those of Zheng et al., *Going Deeper With Directly-Trained Larger Spiking Neural Networks*, AAAI 2021,
arXiv 2011.05280: neurons replace ReLU, and tdBN with α = 1 replaces batch norm. Where two branches add up before a
neuron, the last norm of each has α = 1/√2, so that their sum is close to N(0, θ²) as well::

    x ─ conv ─ tdBN ─ neurons ─ conv ─ tdBN(1/√2) ─ + ─ neurons
    └───────────── [conv 1 x 1 ─ tdBN(1/√2)] ───────┘

A shortcut that changes neither width nor resolution passes the spikes on unchanged. Spikes of rate r add r to the mean
of the sum, whose standard deviation is 0.8 θ for r = 0.17 and θ = 1. The neurons after it do not fire less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .parts import Neurons, QIFNode, SpikingModel, conv, layer, norm1d, norm2d

BRANCH_ALPHA = 1 / math.sqrt(2)


class BasicBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions and a shortcut, which are added before the last neurons.

    Args:
        channels: Channels of the input.
        width: Channels of the output.
        stride: Stride of the first convolution and the shortcut.
        norm: ``"tdbn"`` or ``"batch"``.
        neurons: Factory of the neurons.
    """

    def __init__(self, channels: int, width: int, stride: int, norm: str, neurons: Neurons) -> None:
        super().__init__()
        theta = neurons.v_threshold
        self.conv1 = conv(channels, width, stride=stride)
        self.norm1 = norm2d(norm, width, theta)
        self.neurons1 = neurons(width)
        self.conv2 = conv(width, width)
        self.norm2 = norm2d(norm, width, theta, BRANCH_ALPHA)
        self.neurons2 = neurons(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                conv(channels, width, kernel=1, stride=stride), norm2d(norm, width, theta, BRANCH_ALPHA)
            )

    def forward(self, x_seq: Tensor) -> Tensor:
        """Map spikes ``[T, N, channels, H, W]`` to spikes ``[T, N, width, H / stride, W / stride]``."""
        branch = self.neurons1(self.norm1(self.conv1(x_seq)))
        return self.neurons2(self.norm2(self.conv2(branch)) + self.shortcut(x_seq))


class ResNet(SpikingModel):
    """Network of a stem, stages of :class:`BasicBlock`, mean pooling and a head; :func:`resnet19` and :func:`resnet34`.

    Args:
        in_channels: Channels C of the input.
        stem_width: Channels of the first convolution.
        stem_kernel: Height and width of its kernel.
        stem_stride: Its stride.
        pool: Pooling layer after the stem's neurons.
        stages: Blocks of each stage.
        widths: Channels of each stage; every stage but the first halves the resolution.
        head: Layers from the last width to the classes.
        norm: ``"tdbn"`` or ``"batch"``.
        neurons: Factory of the neurons.

    Raises:
        ValueError: No norm: without one a block's sum grows from block to block.
    """

    def __init__(
        self, in_channels: int, stem_width: int, stem_kernel: int, stem_stride: int, pool: nn.Module,
        stages: Sequence[int], widths: Sequence[int], head: nn.Module, norm: str, neurons: Neurons,
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in ("tdbn", "batch"):
            raise ValueError(f"norm must be 'tdbn' or 'batch' in a ResNet, got {norm!r}")
        self.in_channels = in_channels
        self.conv1 = conv(in_channels, stem_width, stem_kernel, stem_stride)
        self.norm1 = norm2d(norm, stem_width, neurons.v_threshold)
        self.neurons1 = neurons(stem_width)
        self.pool = pool
        blocks: list[nn.Module] = []
        channels = stem_width
        for stage, (count, width) in enumerate(zip(stages, widths, strict=True)):
            for index in range(count):
                blocks.append(BasicBlock(channels, width, 2 if stage and not index else 1, norm, neurons))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.mean = layer.AdaptiveAvgPool2d((1, 1))
        self.flatten = layer.Flatten()
        self.head = head
        self._finish()

    def forward(self, x_seq: Tensor) -> Tensor:
        """Map ``[T, N, C, H, W]`` to ``[T, N, classes]``."""
        self._check(x_seq)
        spikes = self.pool(self.neurons1(self.norm1(self.conv1(x_seq))))
        return self.head(self.flatten(self.mean(self.blocks(spikes))))


def resnet19(
    in_channels: int = 3,
    classes: int = 10,
    norm: str = "tdbn",
    head_norm: bool = True,
    spiking_neuron: Callable[..., nn.Module] | str = QIFNode,
    **kwargs: Any,
) -> ResNet:
    """Build ResNet-19 of arXiv 2011.05280 and 2202.11946: stages of 3, 3, 2 blocks of 128, 256, 512 channels.

    As in the code of Deng et al., *Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting*,
    ICLR 2022: a 3 x 3 stem of 64 channels, and a head of two linear layers with 256 neurons between them. For CIFAR,
    and for DVS frames with two channels. 12,631,370 parameters with the defaults.

    That code has no norm in the head and 12,630,858 parameters. Its 256 neurons are silent at first, since mean rates
    and PyTorch's initial weights make an input with a standard deviation of 0.1, far below the threshold.

    Args:
        in_channels: Channels of the input. Default 3.
        classes: Outputs. Default 10.
        norm: ``"tdbn"`` (default) or ``"batch"``, the code's own.
        head_norm: Whether the head's neurons have a norm as well. Default True.
        spiking_neuron: The neuron's class or name, see :class:`~qif_plugins.models.parts.Neurons`. Default
            :class:`~qif_plugins.adapters.spikingjelly.QIFNode`.
        kwargs: Passed on to each neuron.

    Returns:
        A module from ``[T, N, in_channels, H, W]``, any H and W, to ``[T, N, classes]``.

    Raises:
        ValueError: An unknown norm or neuron, or arguments that the neuron refuses.
    """
    neurons = Neurons(spiking_neuron, kwargs)
    middle = [norm1d(norm, 256, neurons.v_threshold)] if head_norm else []
    head = nn.Sequential(layer.Linear(512, 256), *middle, neurons(256), layer.Linear(256, classes))
    return ResNet(in_channels, 64, 3, 1, nn.Identity(), (3, 3, 2), (128, 256, 512), head, norm, neurons)


def resnet34(
    in_channels: int = 3,
    classes: int = 1000,
    norm: str = "tdbn",
    spiking_neuron: Callable[..., nn.Module] | str = QIFNode,
    **kwargs: Any,
) -> ResNet:
    """Build ResNet-34 with tdBN for ImageNet: stages of 3, 4, 6, 3 blocks of 64, 128, 256, 512 channels.

    The stem is that of He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, arXiv 1512.03385: a 7 x 7
    convolution of stride 2 and a 3 x 3 maximum of stride 2. 21,797,672 parameters with the defaults.

    Args:
        in_channels: Channels of the input. Default 3.
        classes: Outputs. Default 1000.
        norm: ``"tdbn"`` (default) or ``"batch"``.
        spiking_neuron: The neuron's class or name, see :class:`~qif_plugins.models.parts.Neurons`. Default
            :class:`~qif_plugins.adapters.spikingjelly.QIFNode`.
        kwargs: Passed on to each neuron.

    Returns:
        A module from ``[T, N, in_channels, H, W]``, any H and W, to ``[T, N, classes]``.

    Raises:
        ValueError: An unknown norm or neuron, or arguments that the neuron refuses.
    """
    neurons = Neurons(spiking_neuron, kwargs)
    pool = layer.MaxPool2d(3, 2, 1)
    head = layer.Linear(512, classes)
    return ResNet(in_channels, 64, 7, 2, pool, (3, 4, 6, 3), (64, 128, 256, 512), head, norm, neurons)
