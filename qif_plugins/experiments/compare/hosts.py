"""The network of the comparison, built from each host's own layers.

:func:`build` is the same code for every host and neuron, both of which are arguments. Hosts differ in how a layer is
applied over time, how a neuron is stepped, and how its state is cleared.

The LIF neurons have the leak β = 1/2 and do not decay their input: tdBN scales the input to the threshold, and with a
decayed input they would hardly ever fire. Their surrogate and reset are the host's defaults. The QIF neurons are those
that :func:`~qif_plugins.swap` puts in their place, but for the window, which the comparison varies.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...neuron.norm import TDBatchNorm2d
from ...support.checkpoints import load_weights
from ..bench.machine import installed
from ..data.images import Images
from ..names import HOSTS

BETA = 0.5
DYNAMICS = "monotone"
"""QIF's map: that of :func:`~qif_plugins.swap`, without rebound."""
WIDTHS = (16, 32, 32)


class SpikingJellyLayers:
    """The parts of the network in SpikingJelly, 2.x and 0.0.0.0.14, in multi-step mode.

    Layers take and return sequences ``[T, N, C, H, W]``, time first.
    """

    def __init__(self) -> None:
        from spikingjelly.activation_based import functional, layer, neuron

        self.functional, self.layer, self.neuron = functional, layer, neuron

    def conv(self, channels: int, width: int) -> nn.Module:
        """A 3 x 3 convolution over every time step."""
        return self.layer.Conv2d(channels, width, 3, padding=1, bias=False, step_mode="m")

    def norm(self, width: int) -> nn.Module:
        """tdBN for a threshold of 1."""
        own = self.layer.ThresholdDependentBatchNorm2d
        # That of 0.0.0.0.14 does not define the check of dimensions and raises NotImplementedError when called.
        if own._check_input_dim is nn.modules.batchnorm._NormBase._check_input_dim:
            return TDBatchNorm2d(width)
        return own(1.0, 1.0, width)

    def pool(self) -> nn.Module:
        """A mean over 2 x 2 at every time step."""
        return self.layer.AvgPool2d(2, step_mode="m")

    def readout(self, features: int, classes: int) -> nn.Module:
        """A linear layer of the flattened input at every time step."""
        return nn.Sequential(self.layer.Flatten(step_mode="m"), self.layer.Linear(features, classes, step_mode="m"))

    def spiking(self, neuron: Callable[[], nn.Module]) -> nn.Module:
        """A layer of neurons from sequence to sequence."""
        node = neuron()
        self.functional.set_step_mode(node, "m")
        return node

    def clear(self, network: nn.Module) -> None:
        """Forget the state that the last sequence left."""
        self.functional.reset_net(network)

    def lif(self) -> Callable[[], nn.Module]:
        """The host's LIF neuron."""
        return partial(self.neuron.LIFNode, tau=1 / (1 - BETA), decay_input=False)

    def qif(self, window: str, dynamics: str = DYNAMICS) -> Callable[[], nn.Module]:
        """The QIF neuron of this host's adapter with LIF's leak."""
        adapter: Any = importlib.import_module("qif_plugins.adapters.spikingjelly")
        return partial(adapter.QIFNode, tau=1 / (1 - BETA), decay_input=False, dynamics=dynamics, window=window)


class SnnTorchLayers:
    """The parts of the network in snnTorch, with PyTorch's layers and neurons that take one step at a time."""

    def __init__(self) -> None:
        import snntorch

        self.snntorch = snntorch

    def conv(self, channels: int, width: int) -> nn.Module:
        return _EveryStep(nn.Conv2d(channels, width, 3, padding=1, bias=False))

    def norm(self, width: int) -> nn.Module:
        return TDBatchNorm2d(width)

    def pool(self) -> nn.Module:
        return _EveryStep(nn.AvgPool2d(2))

    def readout(self, features: int, classes: int) -> nn.Module:
        return _EveryStep(nn.Sequential(nn.Flatten(), nn.Linear(features, classes)))

    def spiking(self, neuron: Callable[[], nn.Module]) -> nn.Module:
        return _Unrolled(neuron())

    def clear(self, network: nn.Module) -> None:
        """Do nothing, since a sequence starts from rest."""

    def lif(self) -> Callable[[], nn.Module]:
        return partial(self.snntorch.Leaky, beta=BETA)

    def qif(self, window: str, dynamics: str = DYNAMICS) -> Callable[[], nn.Module]:
        adapter: Any = importlib.import_module("qif_plugins.adapters.snntorch")
        # Leaky's reset subtracts the threshold; the membrane of the parabola would be unbounded.
        reset = "subtract" if dynamics == "monotone" else "zero"
        return partial(adapter.QIF, beta=BETA, dynamics=dynamics, window=window, reset_mechanism=reset)


class _EveryStep(nn.Module):
    """A stateless layer applied to every time step at once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


class _Unrolled(nn.Module):
    """A snnTorch neuron applied to a sequence from rest, in one call if the neuron can, else step by step."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x_seq: Tensor) -> Tensor:
        neuron: Any = self.neuron
        mem = neuron.reset_mem()
        if hasattr(neuron, "forward_sequence"):
            return neuron.forward_sequence(x_seq)[0]
        spikes = []
        for x in x_seq:
            spike, mem = neuron(x, mem)
            spikes.append(spike)
        # snnTorch's own surrogates always return float32 spikes.
        return torch.stack(spikes).to(x_seq.dtype)


HostLayers = SpikingJellyLayers | SnnTorchLayers


def build(
    host: HostLayers, neuron: Callable[[], nn.Module], channels: int, size: int, classes: int
) -> tuple[nn.Module, list[nn.Module]]:
    """Build three blocks of convolution, tdBN, neurons and, in the first two, pooling, and a linear readout.

    Args:
        host: Layers of the host.
        neuron: Makes one layer of neurons; LIF and QIF networks differ in this argument alone.
        channels: Channels of the image.
        size: Height and width of the image, a multiple of 4.
        classes: Outputs.

    Returns:
        The network, ``[T, N, C, H, W]`` to ``[T, N, classes]``, and its spiking layers.
    """
    layers: list[nn.Module] = []
    spiking: list[nn.Module] = []
    for index, width in enumerate(WIDTHS):
        spiking.append(host.spiking(neuron))
        layers += [host.conv(channels, width), host.norm(width), spiking[-1]]
        if index < 2:
            layers.append(host.pool())
        channels = width
    layers.append(host.readout(channels * (size // 4) ** 2, classes))
    return nn.Sequential(*layers), spiking


LAYERS: dict[str, type[HostLayers]] = dict(zip(HOSTS, (SpikingJellyLayers, SnnTorchLayers), strict=True))
"""The layers of each host."""


def rebuild(path: Path, content: Mapping[str, Any], images: Images) -> tuple[HostLayers, nn.Module]:
    """Rebuild the network of a checkpoint of ``qif compare --save``, on the CPU and in evaluation mode.

    Args:
        path: The file, for the error.
        content: Its content, see :func:`~qif_plugins.experiments.checkpoints.load_checkpoint`.
        images: The data set that the network was trained on.

    Returns:
        The layers of its host, and the network.

    Raises:
        ImportError: The host is not installed.
        ValueError: The weights are another network's, or the network is one for other images.
    """
    name, shape = content["host"], images.shape
    if host_version(name) is None:
        raise ImportError(f"the network is one of {name}'s, which is not installed: pip install 'qif-plugins[{name}]'")
    if {key: content["shape"][key] for key in shape} != shape:
        raise ValueError(f"{path} is for images of {content['shape']}, and those of {images.name} are {shape}")
    host = LAYERS[name]()
    neuron = host.lif() if content["neuron"] == "LIF" else host.qif(content["window"], content["qif_dynamics"])
    network, _ = build(host, neuron, **shape)
    load_weights(network, content["network"], str(path))
    return host, network.eval()


def host_version(name: str) -> str | None:
    """Return the installed version of a host, or ``None`` if it is not installed."""
    return None if importlib.util.find_spec(name) is None else installed(name) or "unknown version"


def installed_hosts() -> tuple[str, ...]:
    """List the hosts that are installed."""
    return tuple(name for name in HOSTS if host_version(name) is not None)
