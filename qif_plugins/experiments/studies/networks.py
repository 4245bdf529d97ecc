"""Small LIF networks of both hosts, as people publish them, with data, optimizer, learning rate and loss of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models import build
from ..data.images import load_images

try:
    import snntorch as snn
    from snntorch import surrogate as snn_surrogate
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from spikingjelly.activation_based.model import (
        ms_resnet,
        parametric_lif_net,
        qkformer,
        sew_resnet,
        spike_driven_transformer,
        spikformer,
        spiking_resnet,
        spiking_vgg,
    )
except ImportError as error:
    raise ImportError(
        "these networks are SpikingJelly 2's and snnTorch's: pip install 'qif-plugins[study,snntorch]'"
    ) from error

__all__ = [
    "CLASSES", "NETWORKS", "Network", "Recurrent", "Stepped", "Unrolled", "convolutional", "data", "repeated",
    "resnet_18", "rows", "sew_resnet", "spiking_resnet", "tutorial_5", "vgg_11",
]  # fmt: skip

CLASSES = 10
Loss = Callable[[Tensor, Tensor], Tensor]


def mean_loss(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the output ``[T, N, classes]`` averaged over time."""
    return F.cross_entropy(out.mean(0), y)


def rate_loss(out: Tensor, y: Tensor) -> Tensor:
    """Squared distance of the firing rates from a one-hot target, as SpikingJelly's tutorials take it."""
    return F.mse_loss(out.mean(0), F.one_hot(y, CLASSES).to(out.dtype))


def step_loss(out: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at every step, summed, as snnTorch's tutorial 5 takes it."""
    return torch.stack([F.cross_entropy(step, y) for step in out]).sum()


def curve_loss(out: Tensor, y: Tensor) -> Tensor:
    """Mean squared error at every step of a regression."""
    return F.mse_loss(out, y.transpose(0, 1))


def accuracy(out: Tensor, y: Tensor) -> float:
    """Share of samples whose class has the largest output, averaged over time."""
    return (out.mean(0).argmax(1) == y).float().mean().item()


def explained(out: Tensor, y: Tensor) -> float:
    """Share of the target's variance that the output explains, 0 at least."""
    left = F.mse_loss(out, y.transpose(0, 1)) / y.var(correction=0)
    return max(0.0, 1 - left.item()) if left.isfinite() else 0.0


def repeated(steps: int, *shape: int) -> Callable[[Tensor], Tensor]:
    """Show an image at every step."""
    return lambda x: x.reshape(len(x), *shape).expand(steps, len(x), *shape)


def rows(side: int, each: int = 1) -> Callable[[Tensor], Tensor]:
    """Show an image row by row, every row ``each`` times."""
    return lambda x: x.reshape(len(x), side, side).transpose(0, 1).repeat_interleave(each, 0).contiguous()


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Attributes:
        build: Draws the LIF network.
        sequence: Makes sequences ``[T, N, ...]`` of images ``[N, features]`` in [0, 1].
        data: Name of the images.
        epochs: Passes over the training data.
        lr: Learning rate.
        loss: Takes the output ``[T, N, ...]`` and the target.
        samples: Number of training images.
        batch: Samples in a batch.
        optimizer: Makes the optimizer.
        score: Takes the test output and the target.
        target: Makes the target of images and classes. Default: the classes.
    """

    build: Callable[[], nn.Module]
    sequence: Callable[[Tensor], Tensor]
    data: str = "digits"
    epochs: int = 8
    lr: float = 2e-3
    loss: Loss = mean_loss
    samples: int = 1000
    batch: int = 32
    optimizer: Callable[..., Any] = torch.optim.Adam
    score: Callable[[Tensor, Tensor], float] = accuracy
    target: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y


@lru_cache(maxsize=4)
def _images(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = load_images(name)
    top = images.train.max()
    return (
        images.train.float().flatten(1) / top, images.train_labels, images.test.float().flatten(1) / top,
        images.test_labels,
    )  # fmt: skip


def data(network: Network, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training data, targets, test data and targets of a network; the first ``samples`` of the training data."""
    x, y, test_x, test_y = _images(network.data)
    x, y = x[:samples], y[:samples]
    return x, network.target(x, y), test_x, network.target(test_x, test_y)


# -- SpikingJelly -----------------------------------------------------------------------------------------------------

LIF: Callable[..., nn.Module] = partial(neuron.LIFNode, surrogate_function=surrogate.ATan())
IF: Callable[..., nn.Module] = partial(neuron.IFNode, surrogate_function=surrogate.ATan())


def multi(*modules: nn.Module) -> nn.Module:
    """A network that takes all steps in a call."""
    model = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    functional.set_step_mode(model, "m")
    return model


def tdbn(layers: int, side: int, width: int) -> nn.Module:
    """A perceptron with tdBN and a linear readout."""
    return build("perceptron", (1, side, side), CLASSES, "lif", layers=layers, width=width, norm="tdbn")


def plain(layers: int, features: int, width: int, norm: bool = False, **node: Any) -> nn.Module:
    """A perceptron with batch norm or without, and a linear readout."""
    made: list[nn.Module] = []
    for _ in range(layers - 1):
        made += [layer.Linear(features, width), *([layer.BatchNorm1d(width)] if norm else []), LIF(**node)]
        features = width
    return multi(*made, layer.Linear(width, CLASSES))


def csnn(channels: int) -> nn.Module:
    """The network of SpikingJelly's convolutional tutorial."""
    made: list[nn.Module] = []
    before = 1
    for _ in range(2):
        made += [
            layer.Conv2d(before, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels), IF(),
            layer.MaxPool2d(2, 2),
        ]  # fmt: skip
        before = channels
    return multi(
        *made, layer.Flatten(), layer.Linear(channels * 4, 64, bias=False), IF(),
        layer.Linear(64, CLASSES, bias=False), IF(),
    )  # fmt: skip


def prenorm(channels: int) -> nn.Module:
    """Convolutions with their norm before them."""
    made: list[nn.Module] = []
    before = 1
    for _ in range(3):
        made += [layer.BatchNorm2d(before), layer.Conv2d(before, channels, 3, padding=1), LIF(decay_input=False)]
        before = channels
    return multi(*made, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(channels * 16, CLASSES))


def convolutions(layers: int, channels: int) -> nn.Module:
    """Convolutions with batch norm, one after the other without shortcuts."""
    made: list[nn.Module] = []
    before = 1
    for _ in range(layers):
        made += [
            layer.Conv2d(before, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels),
            LIF(decay_input=False),
        ]  # fmt: skip
        before = channels
    return multi(*made, layer.AdaptiveAvgPool2d((2, 2)), layer.Flatten(), layer.Linear(4 * channels, CLASSES))


def vgg(norm: bool, **node: Any) -> nn.Module:
    """SpikingJelly's VGG with fewer channels."""
    model: Any = spiking_vgg.SpikingVGG(
        [16, 16, "M", 32, 32, "M", 32], norm, layer.BatchNorm2d, CLASSES, spiking_neuron=neuron.LIFNode,
        surrogate_function=surrogate.ATan(), **node,
    )  # fmt: skip
    model.features[0] = layer.Conv2d(1, 16, 3, padding=1)
    model.avgpool = layer.AdaptiveAvgPool2d((2, 2))
    model.classifier = nn.Sequential(layer.Linear(128, 64), LIF(**node), layer.Linear(64, CLASSES))
    return multi(model)


def resnet(module: Any, name: str, **options: Any) -> nn.Module:
    """SpikingJelly's ResNet or SEW ResNet with its first two stages and a smaller stem."""
    model = getattr(module, name)(
        module.BasicBlock, [1, 1, 1, 1], CLASSES, spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(),
        **options,
    )  # fmt: skip
    model.conv1, model.maxpool = layer.Conv2d(1, 64, 3, stride=2, padding=1, bias=False), nn.Identity()
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = layer.Linear(128, CLASSES)
    return multi(model)


def vgg_11() -> nn.Module:
    """SpikingJelly's VGG-11 with batch norm and, as usual for images of 32 x 32, one linear layer as classifier."""
    features = spiking_vgg.SpikingVGG.make_layers(spiking_vgg.cfgs["A"], True, layer.BatchNorm2d, LIF)
    return multi(features, layer.Flatten(), layer.Linear(512, CLASSES))


def resnet_18(module: Any, name: str, **options: Any) -> nn.Module:
    """SpikingJelly's ResNet-18 or SEW-ResNet-18, whole."""
    return multi(getattr(module, name)(num_classes=CLASSES, spiking_neuron=LIF, **options))


class Stepped(nn.Module):
    """A network of SpikingJelly that takes one time step a call, called for all of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        functional.set_step_mode(model, "s")

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.model(step) for step in x])


class Averaged(nn.Module):
    """A network that averages over time itself, with a time of length 1 in its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = multi(model)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x)[None]
        return result


class Recurrent(nn.Module):
    """A layer of LIF neurons that feed one another, over rows, and a linear readout."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.fc = layer.Linear(features, width)
        self.cell = layer.LinearRecurrentContainer(LIF(tau=5.0, decay_input=False), width, width)
        self.out = layer.Linear(width, CLASSES)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.cell(self.fc(x)))
        return result


# -- snnTorch ---------------------------------------------------------------------------------------------------------


class Unrolled(nn.Module):
    """Modules run step by step, neurons with hidden state; the output is the last neuron's membrane or its spikes."""

    def __init__(self, *modules: nn.Module, membrane: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)
        self.membrane = membrane

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for step in x:
            spikes, membrane = self.layers(step)
            out.append(membrane if self.membrane else spikes)
        return torch.stack(out)


def leaky(beta: float, **options: Any) -> nn.Module:
    """snnTorch's neuron that keeps its state."""
    return snn.Leaky(beta=beta, init_hidden=True, **options)


def tutorial_5(width: int = 256) -> nn.Module:
    """The network of snnTorch's tutorial 5, which has a width of 1000."""
    readout = leaky(0.95, output=True)
    return Unrolled(nn.Linear(784, width), leaky(0.95), nn.Linear(width, CLASSES), readout, membrane=True)


def convolutional(
    threshold: float, slope: float, channels: tuple[int, int] = (8, 16), kernel: int = 3, padding: int = 1,
    features: int = 64,
) -> nn.Module:  # fmt: skip
    """The network of snnTorch's tutorials 6 and 7, smaller, with so many features before its last layer."""
    first, second = channels
    options: Any = {"spike_grad": snn_surrogate.fast_sigmoid(slope=slope), "threshold": threshold}
    return Unrolled(
        nn.Conv2d(1, first, kernel, padding=padding), nn.MaxPool2d(2), leaky(0.5, **options),
        nn.Conv2d(first, second, kernel, padding=padding), nn.MaxPool2d(2), leaky(0.5, **options), nn.Flatten(),
        nn.Linear(features, CLASSES), leaky(0.5, output=True, **options),
    )  # fmt: skip


def regression() -> nn.Module:
    return Unrolled(
        nn.Linear(8, 64), leaky(0.9), nn.Linear(64, 64), leaky(0.9), nn.Linear(64, 1),
        leaky(0.9, output=True, threshold=1e9), membrane=True,
    )  # fmt: skip


def recurrent() -> nn.Module:
    return Unrolled(
        nn.Linear(8, 64), snn.RLeaky(beta=0.8, linear_features=64, init_hidden=True), nn.Linear(64, CLASSES),
        leaky(0.8, output=True), membrane=True,
    )  # fmt: skip


def lapicque() -> nn.Module:
    return Unrolled(
        nn.Linear(64, 100), snn.Lapicque(beta=0.9, init_hidden=True), nn.Linear(100, CLASSES),
        leaky(0.9, output=True), membrane=True,
    )  # fmt: skip


def ink(x: Tensor, y: Tensor) -> Tensor:
    """The mean of an image's rows so far, ``[N, T, 1]``."""
    return x.reshape(-1, 8, 8).mean(2).cumsum(1)[..., None]


IMAGE, WIDE = repeated(4, 1, 8, 8), repeated(4, 784)
_MNIST: dict[str, Any] = {"data": "mnist5k", "samples": 4000, "epochs": 4, "lr": 1e-3, "batch": 64}

NETWORKS = {
    "perceptron 2, tdBN": Network(partial(tdbn, 2, 8, 64), IMAGE),
    "perceptron 5, tdBN, T = 1": Network(partial(tdbn, 5, 8, 64), repeated(1, 1, 8, 8)),
    "perceptron 5, batch norm, decayed input": Network(partial(plain, 5, 64, 64, True), repeated(4, 64)),
    "perceptron 9, tdBN": Network(partial(tdbn, 9, 28, 128), repeated(4, 1, 28, 28), **_MNIST),
    "perceptron 17, tdBN": Network(partial(tdbn, 17, 28, 128), repeated(4, 1, 28, 28), **_MNIST),
    "perceptron 33, tdBN": Network(partial(tdbn, 33, 28, 64), repeated(4, 1, 28, 28), **_MNIST),
    "perceptron 3, no norm, decayed input": Network(partial(plain, 3, 784, 128), WIDE, **_MNIST),
    "perceptron 5, no norm": Network(partial(plain, 5, 784, 128, decay_input=False), WIDE, **_MNIST),
    "perceptron 3, no norm, θ = 0.5, τ = 1.1": Network(
        partial(plain, 3, 64, 128, tau=1.1, v_threshold=0.5), repeated(8, 64)
    ),
    "perceptron 3, batch norm, θ = 0.5": Network(
        partial(plain, 3, 64, 128, True, v_threshold=0.5, decay_input=False), repeated(4, 64)
    ),
    "SpikingJelly tutorial, two layers": Network(
        lambda: multi(layer.Linear(784, 128), LIF(tau=2.0), layer.Linear(128, CLASSES), LIF(tau=2.0)),
        repeated(10, 784), "mnist5k", 3, loss=rate_loss, samples=2000,
    ),
    "SpikingJelly tutorial, convolution": Network(partial(csnn, 16), IMAGE, epochs=12, loss=rate_loss),
    "norm before the convolution": Network(partial(prenorm, 16), IMAGE),
    "20 convolutions, batch norm": Network(partial(convolutions, 20, 16), IMAGE, epochs=6),
    "VGG, batch norm, decayed input": Network(partial(vgg, True), IMAGE),
    "VGG, batch norm": Network(partial(vgg, True, decay_input=False), IMAGE),
    "VGG, no norm": Network(partial(vgg, False, decay_input=False), IMAGE),
    "spiking ResNet": Network(partial(resnet, spiking_resnet, "SpikingResNet"), IMAGE, epochs=3),
    "SEW ResNet": Network(partial(resnet, sew_resnet, "SEWResNet", cnf="ADD"), IMAGE, epochs=3),
    "parametric LIF net": Network(
        lambda: multi(
            parametric_lif_net.MNISTNet(
                8, neuron.ParametricLIFNode, init_tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True
            )
        ),
        repeated(4, 1, 28, 28), "mnist5k", 3, loss=rate_loss,
    ),
    "Spikformer": Network(
        lambda: multi(
            spikformer.Spikformer(4, 1, 16, 16, 4, CLASSES, 32, 4, 2.0, 2, spiking_neuron=neuron.LIFNode)
        ),
        lambda x: F.interpolate(x.reshape(-1, 1, 8, 8), (16, 16)).expand(4, -1, -1, -1, -1), epochs=8,
    ),
    "spike-driven transformer": Network(
        lambda: Averaged(
            spike_driven_transformer.SpikeDrivenTransformer(4, 1, CLASSES, 32, 4, 1, 2.0, spiking_neuron=neuron.LIFNode)
        ),
        lambda x: F.interpolate(x.reshape(-1, 1, 8, 8), (32, 32)).expand(4, -1, -1, -1, -1), epochs=4,
    ),
    "QKFormer": Network(
        lambda: Averaged(
            qkformer.QKFormer(4, 1, CLASSES, 32, (1, 2, 4), (1, 1, 1), 2.0, spiking_neuron=neuron.LIFNode)
        ),
        lambda x: F.interpolate(x.reshape(-1, 1, 8, 8), (16, 16)).expand(4, -1, -1, -1, -1), epochs=8,
    ),
    "MS-ResNet": Network(
        lambda: Averaged(
            ms_resnet.MSResNet(4, 1, CLASSES, (1, 1, 1, 1), 8, 3, 1, spiking_neuron=neuron.LIFNode)
        ),
        IMAGE,
    ),
    "rows, batch norm, T = 56, τ = 20": Network(
        partial(plain, 3, 8, 64, True, tau=20.0, decay_input=False), rows(8, 7), epochs=8
    ),
    "rows, recurrent": Network(partial(Recurrent, 8, 64), rows(8), epochs=10, lr=2e-3),
    "snnTorch tutorial 5": Network(
        tutorial_5, repeated(25, 784), "mnist5k", 2, 5e-4, step_loss, 2000, 128,
    ),
    "snnTorch tutorial 6": Network(partial(convolutional, 1.0, 25), repeated(10, 1, 8, 8), "digits", 8, 1e-2),
    "snnTorch tutorial 7": Network(
        partial(convolutional, 0.5, 75), repeated(10, 1, 8, 8), "digits", 8, 2e-3, rate_loss
    ),
    "snnTorch regression": Network(
        regression, rows(8), "digits", 15, 2e-3, curve_loss, score=explained, target=ink
    ),
    "snnTorch recurrent": Network(recurrent, rows(8), "digits", 10, 2e-3, step_loss),
    "snnTorch Lapicque": Network(lapicque, repeated(25, 64), "digits", 8, 2e-3, step_loss),
}  # fmt: skip
"""Networks by name."""
