"""Train exact networks: ``qif exact train``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...exact.initialisation import initialise
from ...exact.layers import LIFLayer, QIFLayer, SpikingLayer, ThetaLayer
from ...exact.losses import count_cross_entropy, first_spike_cross_entropy
from ...exact.spikes import Spikes
from ..checkpoints import Checkpoints
from ..training import Batches, Trainer
from .data import SpikeData, select
from .settings import NEURONS, Settings

LAYERS: dict[str, type[SpikingLayer]] = dict(zip(NEURONS, (LIFLayer, QIFLayer, ThetaLayer), strict=True))


def build(settings: Settings, channels: int, classes: int) -> nn.Sequential:
    """Build the network, with weights drawn from ``settings.seed``."""
    torch.manual_seed(settings.seed)
    layer = LAYERS[settings.neuron]
    sizes = [channels, *settings.hidden, classes]
    recurrent = [settings.recurrent] * len(settings.hidden) + [False]
    own: dict[str, Any] = {"pseudo_scale": settings.pseudo_scale, "max_spikes": settings.max_spikes}
    layers = [
        layer(n, m, settings.duration, settings.tau, recurrent=connected, **own)
        for (n, m), connected in zip(pairwise(sizes), recurrent, strict=True)
    ]
    return nn.Sequential(*layers)


def fit(
    network: nn.Sequential, data: SpikeData, settings: Settings, report: Callable[[dict[str, float]], None],
    active: bool = True, checkpoints: Checkpoints | None = None, resumed: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train a network in place.

    Args:
        network: From :func:`build`.
        data: The data set.
        settings: The settings of the run.
        report: Called with each epoch's measurements.
        active: Whether to scale the weights to ``settings.rate`` first (theta neurons need none). Default True.
        checkpoints: Folder to save the state to after every epoch. Default: none.
        resumed: A checkpoint of the same settings and data to continue from, as
            :func:`~qif_plugins.experiments.checkpoints.load_checkpoint` reads it. Default: from the start.

    Returns:
        One dictionary an epoch: loss, accuracy (test), gradient norm before clipping (mean and largest over batches),
        silent neurons (fraction of the hidden ones without an ordinary spike in the whole test set), unanswered
        (fraction of the test samples in which no output neuron has an ordinary spike), rate (hidden, ordinary) and
        seconds. Epoch 0, before training, has no loss, gradient norm and seconds.

    Raises:
        NonFiniteError: The loss or a gradient is not finite; names the layer, and the weights are those before that
            batch.
    """
    if resumed is None:
        if active and settings.neuron != "theta":
            initialise(
                network, select(data.train, torch.arange(min(200, len(data.train_labels)), device="cpu")), settings.rate
            )
        before = {"epoch": 0.0, **evaluate(network, data, settings)}
        report(before)
    else:
        before = resumed["data"]["before"]
    if checkpoints is not None:
        checkpoints.data["before"] = before
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr)
    batches = _Batches(
        len(data.train_labels), lambda samples, epoch: (select(data.train, samples), data.train_labels[samples]),
        settings.batch, seed=settings.seed,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.epochs * len(batches)))
    norms: list[float] = []

    def complete(trainer: Trainer, row: dict[str, float]) -> None:
        row.update(grad_norm=row.pop("gradient_norm"), grad_norm_max=max(norms), **evaluate(network, data, settings))
        norms.clear()
        report(row)

    trainer = Trainer(
        network, optimizer, lambda model, batch: classification_loss(model(batch[0]), batch[1], settings), batches,
        scheduler=schedule, epochs=settings.epochs, clip_norm=settings.clip, layers={},
        on_step=lambda trainer, measured: norms.append(measured["gradient_norm"]), on_epoch=complete, store=checkpoints,
        monitor="accuracy",
    )  # fmt: skip
    if resumed is not None:
        trainer.load_state(resumed["state"], "the saved state" if checkpoints is None else str(checkpoints.last))
    return [before, *trainer.fit()]


class _Batches(Batches):
    """Batches whose order in each epoch is the next permutation of one generator."""

    def order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epoch + 1):
            order = torch.randperm(self.count, generator=generator, device="cpu")
        return order


@torch.no_grad()
def evaluate(network: nn.Sequential, data: SpikeData, settings: Settings) -> dict[str, float]:
    """Measure accuracy, firing rate and silent neurons on the test set, see :func:`fit`."""
    correct, unanswered, spikes_sum = 0, 0, 0.0
    spiked = [torch.zeros(size, dtype=torch.bool, device="cpu") for size in settings.hidden]
    for samples in torch.arange(len(data.test_labels), device="cpu").split(200):
        out = select(data.test, samples)
        for place, layer in enumerate(network):
            out = layer(out)
            if place < len(spiked):
                counts = out.ordinary_counts()
                spiked[place] |= (counts > 0).any(0)
                spikes_sum += float(counts.sum())
        unanswered += int((out.indices < 0).all(1).sum())
        correct += int((_decide(out, settings) == data.test_labels[samples]).sum())
    total = max(1, len(data.test_labels))
    return {
        "accuracy": correct / total,
        "silent": 1 - float(torch.cat(spiked).double().mean()) if spiked else 0.0,
        "unanswered": unanswered / total,
        "rate": spikes_sum / (total * max(1, sum(settings.hidden))),
    }


def classification_loss(out: Spikes, labels: Tensor, settings: Settings) -> Tensor:
    """Compute the loss that ``settings`` names from the last layer's spikes."""
    if settings.loss == "first":
        return first_spike_cross_entropy(out, labels, settings.scale)
    return count_cross_entropy(out, labels, 1 / settings.scale)


def _decide(out: Spikes, settings: Settings) -> Tensor:
    return out.first().argmin(1) if settings.loss == "first" else out.counts().argmax(1)
