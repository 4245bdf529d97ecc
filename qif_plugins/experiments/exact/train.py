"""Train exact networks: ``qif exact train``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...exact.functional import MAX_SPIKES
from ...exact.initialisation import initialise
from ...exact.layers import LIFLayer, QIFLayer, SpikingLayer, ThetaLayer
from ...exact.losses import count_cross_entropy, first_spike_cross_entropy
from ...exact.spikes import Spikes
from ...support.checkpoints import check_content, check_tensors
from ..training import Batches, Trainer
from ..training.checkpoint import Checkpoints
from .data import SpikeData, select

__all__ = [
    "DEFAULTS",
    "LAYERS",
    "LIF_IMAGES",
    "LOSSES",
    "Settings",
    "build",
    "check_saved",
    "classification_loss",
    "fit",
]

LAYERS: dict[str, type[SpikingLayer]] = {"lif": LIFLayer, "qif": QIFLayer, "theta": ThetaLayer}
LOSSES = ("first", "count")


@dataclass(frozen=True)
class Settings:
    """Settings that decide a run, apart from the data.

    Attributes:
        neuron: ``"lif"``, ``"qif"`` or ``"theta"``.
        hidden: Sizes of the hidden layers.
        recurrent: Whether hidden layers are recurrent.
        duration: Trial length, in the unit of the data's spike times.
        tau: Membrane time constant, in the same unit.
        latest: Time at which a black pixel would spike.
        loss: ``"first"`` (the first output neuron to spike wins) or ``"count"`` (the one that spikes most).
        scale: Unit of the logits: a time (loss ``"first"``) or a number of spikes (``"count"``).
        rate: Spikes of a neuron in a trial at the start, on average; see :func:`~qif_plugins.exact.initialise`.
        epochs: Passes over the training data.
        batch: Samples in a batch.
        lr: Adam's learning rate at the start; a cosine takes it to 0.
        seed: Seed of the initial weights and of the order of the samples.
        clip: Largest norm of a batch's gradient, beyond which it is scaled down; ``None``: no limit.
        pseudo_scale: Scale of the pseudospikes, see :class:`~qif_plugins.exact.QIFLayer`; ``None``: its default.
        max_spikes: Spikes of a layer in one sample before
            :class:`~qif_plugins.exact.functional.EventBudgetError`.
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
    clip: float | None = None
    pseudo_scale: float | None = None
    max_spikes: int = MAX_SPIKES


PARTS: dict[str, Any] = {
    "neuron": str, "hidden": [int], "recurrent": bool, "duration": float, "tau": float, "latest": float,
    "loss": str, "scale": float, "rate": float, "epochs": int, "batch": int, "lr": float, "seed": int,
    "clip": (float, type(None)), "pseudo_scale": (float, type(None)), "max_spikes": int,
}  # fmt: skip
"""Parts of saved settings, see :func:`~qif_plugins.support.files.check_parts`."""
_PARTS: dict[str, Any] = {
    "settings": PARTS,
    "data": {"name": str, "root": (str, type(None)), "limit": (int, type(None))},
    "network": {str: Tensor},
}  # fmt: skip


def check_saved(path: Path, content: Any) -> Settings:
    """Check the content of an ``exact.pt``, and return its settings.

    Raises:
        ValueError: The file is another one, lacks a part, or holds weights that are not finite.
    """
    kind = "file exact.pt of 'qif exact train'"
    check_content(path, content, _PARTS, kind)
    saved = content["settings"]
    known = {one.name for one in fields(Settings)}
    if not saved.keys() <= known or saved["neuron"] not in LAYERS or saved["loss"] not in LOSSES:
        raise ValueError(f"{path} is no {kind}, or one of another version")
    limit = content["data"]["limit"]
    if any(size < 1 for size in saved["hidden"]) or (limit is not None and limit < 1):
        raise ValueError(f"{path} is no {kind}: it has the layers {saved['hidden']} and the limit {limit} of samples")
    check_tensors(path, content["network"])
    return Settings(**{**saved, "hidden": tuple(saved["hidden"])})


DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist5k": {"hidden": (200,), "lr": 3e-3},
    "shd": {"hidden": (128,), "duration": 1.4, "tau": 0.1, "loss": "count", "scale": 1.0, "rate": 3.0, "lr": 1e-3},
}
"""Changes to :class:`Settings` by data set."""

LIF_IMAGES: dict[str, Any] = {"duration": 1.0, "latest": 1.0}
"""Changes for LIF neurons on images, since long after the input a silent neuron has no membrane left to learn from."""


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
        resumed: A checkpoint of the same settings and data to go on from, as
            :func:`~qif_plugins.experiments.training.checkpoint.load_checkpoint` reads it. Default: from the start.

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

    def indices(self, epoch: int, first: int = 0, process: int = 0, processes: int = 1) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(epoch + 1):
            order = torch.randperm(self.count, generator=generator, device="cpu")
        for batch in order.split(self.batch_size)[first:]:
            yield batch if processes == 1 else batch.tensor_split(processes)[process]


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
