"""Training of exact networks: what ``qif exact train`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .data import Data, select
from .initialisation import initialise
from .layers import LIFLayer, QIFLayer, ThetaLayer
from .losses import count_cross_entropy, first_spike_cross_entropy
from .spikes import Spikes

__all__ = ["DEFAULTS", "LAYERS", "LOSSES", "Settings", "build", "classification_loss", "evaluate", "fit"]

LAYERS: dict[str, type[LIFLayer] | type[QIFLayer] | type[ThetaLayer]] = {
    "lif": LIFLayer,
    "qif": QIFLayer,
    "theta": ThetaLayer,
}
LOSSES = ("first", "count")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, besides the data.

    Attributes:
        neuron: ``"lif"``, ``"qif"`` or ``"theta"``.
        hidden: Sizes of the hidden layers.
        recurrent: Whether hidden layers are recurrent.
        duration, tau: Trial length and membrane time constant, in the unit of the data's spike times.
        latest: Time at which a black pixel would spike.
        loss: ``"first"`` (the first output neuron to spike wins) or ``"count"`` (the one that spikes most).
        scale: Of the logits: the time (``"first"``) or the number of spikes (``"count"``) that is one unit.
        rate: Spikes of a neuron in a trial at the start, on average; see :func:`~qif_plugins.exact.initialise`.
        epochs, batch, lr, seed: Adam with a cosine schedule to zero.
    """

    neuron: str = "qif"
    hidden: tuple[int, ...] = (100,)
    recurrent: bool = False
    duration: float = 4.0
    tau: float = 1.0
    latest: float = 2.0
    loss: str = "first"
    scale: float = 0.2
    rate: float = 1.0
    epochs: int = 10
    batch: int = 50
    lr: float = 1e-2
    seed: int = 0


DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist5k": {"hidden": (200,), "lr": 3e-3},
    "shd": {"hidden": (128,), "duration": 1.4, "tau": 0.1, "loss": "count", "scale": 1.0, "rate": 3.0, "lr": 1e-3},
}
"""What a data set changes in :class:`Settings`."""


def build(settings: Settings, channels: int, classes: int) -> nn.Sequential:
    """The network, its weights drawn by ``settings.seed``."""
    torch.manual_seed(settings.seed)
    layer = LAYERS[settings.neuron]
    sizes = [channels, *settings.hidden, classes]
    return nn.Sequential(
        *(
            layer(n, m, settings.duration, settings.tau, recurrent=settings.recurrent and place < len(settings.hidden))
            for place, (n, m) in enumerate(pairwise(sizes))
        )
    )


def fit(
    network: nn.Sequential,
    data: Data,
    settings: Settings,
    report: Callable[[dict[str, float]], None],
    active: bool = True,
) -> list[dict[str, float]]:
    """Train in place.

    Args:
        network: From :func:`build`.
        data: The task.
        settings: The run.
        report: Called with each epoch's measurements.
        active: Whether to scale the weights to ``settings.rate`` first (theta neurons need none). Default True.

    Returns:
        One dictionary an epoch: loss, accuracy (test), gradient norm (mean over batches), silent neurons (fraction of
        the hidden ones without an ordinary spike in the whole test set), rate (hidden, ordinary) and seconds. Epoch 0
        is before training.
    """
    if active and settings.neuron != "theta":
        initialise(network, select(data.train, torch.arange(min(200, len(data.train_labels)))), settings.rate)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
    batches = -(-len(data.train_labels) // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.epochs * batches))
    shuffle = torch.Generator().manual_seed(settings.seed)
    history = [{"epoch": 0.0, "loss": float("nan"), "grad_norm": float("nan"), **evaluate(network, data, settings)}]
    report(history[0])
    for epoch in range(1, settings.epochs + 1):
        began = time.perf_counter()
        loss_sum = norm_sum = 0.0
        for samples in torch.randperm(len(data.train_labels), generator=shuffle).split(settings.batch):
            loss = classification_loss(network(select(data.train, samples)), data.train_labels[samples], settings)
            optimizer.zero_grad()
            loss.backward()
            norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() / batches
            norm_sum += float(torch.stack(norms).norm()) / batches
        seconds = time.perf_counter() - began
        measured = {"loss": loss_sum, "grad_norm": norm_sum, "seconds": seconds}
        history.append({"epoch": float(epoch), **measured, **evaluate(network, data, settings)})
        report(history[-1])
    return history


@torch.no_grad()
def evaluate(network: nn.Sequential, data: Data, settings: Settings) -> dict[str, float]:
    """Accuracy on the test set, the hidden layers' mean rate, and the fraction of hidden neurons that never spike."""
    correct, spikes_sum = 0, 0.0
    spiked = [torch.zeros(size, dtype=torch.bool) for size in settings.hidden]
    for samples in torch.arange(len(data.test_labels)).split(200):
        out = select(data.test, samples)
        for place, layer in enumerate(network):
            out = layer(out)
            if place < len(spiked):
                counts = out.ordinary_counts()
                spiked[place] |= (counts > 0).any(0)
                spikes_sum += float(counts.sum())
        correct += int((_decide(out, settings) == data.test_labels[samples]).sum())
    total = max(1, len(data.test_labels))
    return {
        "accuracy": correct / total,
        "silent": 1 - float(torch.cat(spiked).double().mean()) if spiked else 0.0,
        "rate": spikes_sum / (total * max(1, sum(settings.hidden))),
    }


def classification_loss(out: Spikes, labels: Tensor, settings: Settings) -> Tensor:
    """The loss that ``settings`` names, of the last layer's spikes."""
    if settings.loss == "first":
        return first_spike_cross_entropy(out, labels, settings.scale)
    return count_cross_entropy(out, labels, 1 / settings.scale)


def _decide(out: Spikes, settings: Settings) -> Tensor:
    return out.first().argmin(1) if settings.loss == "first" else out.counts().argmax(1)
