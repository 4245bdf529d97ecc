"""Train and evaluate one network of the comparison, reproducibly from its seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..checkpoints import COMPARE, save_checkpoint
from ..data.images import Images
from ..training.firing import FiringRates
from .hosts import DYNAMICS, LAYERS, build


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters that all trainings of one comparison share.

    Attributes:
        epochs: Passes over the training images.
        steps: Time steps T; the image is the input current of every one.
        batch_size: Images in one step of the optimizer, Adam.
        learning_rate: Initial learning rate; a cosine schedule takes it to 0.
        device: Device to train on.
    """

    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    device: torch.device


@dataclass(frozen=True)
class Epoch:
    """Measurements after one epoch.

    Attributes:
        loss: Mean cross entropy over the epoch's training batches.
        accuracy: Share of test images classified correctly.
        spikes: Spikes per neuron-step on the test images.
    """

    loss: float
    accuracy: float
    spikes: float


@dataclass
class Training:
    """Record of one network's training.

    Attributes:
        host: Name of the host.
        neuron: ``"LIF"`` or ``"QIF"``.
        window: The QIF neuron's window; for LIF the host's own surrogate.
        seed: Seed of the weights and of the order of the images.
        epochs: One entry an epoch.
        step_ms: Median wall time of a training step in milliseconds.
    """

    host: str
    neuron: str
    window: str
    seed: int
    epochs: list[Epoch] = field(default_factory=list)
    step_ms: float = float("nan")

    @property
    def name(self) -> str:
        """File name of its network, without the suffix."""
        neuron = "lif" if self.neuron == "LIF" else f"qif-{self.window}"
        return f"{self.host}-{neuron}-{self.seed}"


def train(
    images: Images, host_name: str, window: str | None, seed: int, settings: Hyperparameters,
    progress: Callable[[Training], None] = lambda training: None,
) -> tuple[Training, nn.Module]:  # fmt: skip
    """Train one network.

    Args:
        images: The data, on ``settings.device``.
        host_name: One of :data:`~qif_plugins.experiments.names.HOSTS`.
        window: The window of a QIF neuron by name; ``None`` trains the host's LIF neuron.
        seed: Decides the initial weights and the order of the images; the same for every host and neuron.
        settings: Hyperparameters.
        progress: Called after every epoch.

    Returns:
        The record of the training, and the trained network.
    """
    host = LAYERS[host_name]()
    neuron = host.lif() if window is None else host.qif(window)
    torch.manual_seed(seed)
    network, spiking = build(host, neuron, **images.shape)
    network.to(settings.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    order = torch.Generator().manual_seed(seed)
    batches = -(-len(images.train) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    encode = encoder(images, settings.steps)
    result = Training(host_name, "LIF" if window is None else "QIF", window or _surrogate_name(spiking[0]), seed)
    times: list[float] = []
    for _ in range(settings.epochs):
        network.train()
        losses: list[float] = []
        for batch in torch.randperm(len(images.train), generator=order, device="cpu").split(settings.batch_size):
            batch = batch.to(settings.device)
            x_seq, labels = encode(images.train[batch]), images.train_labels[batch]
            began = time.perf_counter()
            host.clear(network)
            loss = nn.functional.cross_entropy(network(x_seq).mean(0), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())  # waits for the device, so that the clock sees the whole step
            times.append(time.perf_counter() - began)
        accuracy, spikes = _evaluate(host.clear, network, spiking, images, encode, settings)
        result.epochs.append(Epoch(sum(losses) / len(losses), accuracy, spikes))
        progress(result)
    result.step_ms = 1000 * median(times)
    return result, network


def save(path: Path, network: nn.Module, training: Training, images: Images, settings: Hyperparameters) -> None:
    """Write a trained network with its settings, its data set's name and its accuracy."""
    content = {
        "host": training.host,
        "neuron": training.neuron,
        "window": training.window,
        "qif_dynamics": DYNAMICS,
        "seed": training.seed,
        "epochs": settings.epochs,
        "steps": settings.steps,
        "data": images.name,
        "shape": images.shape,
        "last_epoch": asdict(training.epochs[-1]),
        "network": {name: tensor.cpu() for name, tensor in network.state_dict().items()},
    }
    save_checkpoint(path, COMPARE, content)


def encoder(images: Images, steps: int) -> Callable[[Tensor], Tensor]:
    """Make a function that normalizes images and repeats them over ``steps`` time steps."""
    mean, std = images.normalization()

    def encode(batch: Tensor) -> Tensor:
        x = (batch.float() - mean) / std
        return x.expand(steps, *x.shape)

    return encode


@torch.no_grad()
def _evaluate(
    clear: Callable[[nn.Module], None], network: nn.Module, spiking: list[nn.Module], images: Images,
    encode: Callable[[Tensor], Tensor], settings: Hyperparameters,
) -> tuple[float, float]:  # fmt: skip
    """Measure the accuracy and the spikes per neuron-step on the test images."""
    rates = FiringRates({str(index): layer for index, layer in enumerate(spiking)})
    network.eval()
    correct = 0
    with rates.measuring():
        for x, labels in zip(images.test.split(256), images.test_labels.split(256), strict=True):
            clear(network)
            correct += int((network(encode(x)).mean(0).argmax(1) == labels).sum())
        clear(network)
    return correct / len(images.test), rates.mean() or 0.0


def _surrogate_name(layer: nn.Module) -> str:
    """Return the host's name for the surrogate of its LIF neuron."""
    neuron = getattr(layer, "neuron", layer)
    surrogate = getattr(neuron, "surrogate_function", None) or neuron.spike_grad
    name = getattr(surrogate, "__name__", None) or type(surrogate).__name__
    owner = getattr(surrogate, "__qualname__", name).split(".")[0]
    return owner.lower()
