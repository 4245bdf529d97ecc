"""Settings of exact networks and their defaults, which ``qif exact --help`` shows without importing PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..names import BUNDLED

NEURONS = ("lif", "qif", "theta")
LOSSES = ("first", "count")
TIMED = ("shd", "spoken-digits")
"""Data sets whose spikes have times, in seconds; those of images come from intensities."""
DATA_SETS = (*BUNDLED, *TIMED)
DEMONSTRATIONS = ("move", "count", "silence")
"""The demonstrations of ``qif exact demo``."""


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
    max_spikes: int = 1 << 20


PARTS: dict[str, Any] = {
    "neuron": str, "hidden": [int], "recurrent": bool, "duration": float, "tau": float, "latest": float,
    "loss": str, "scale": float, "rate": float, "epochs": int, "batch": int, "lr": float, "seed": int,
    "clip": (float, type(None)), "pseudo_scale": (float, type(None)), "max_spikes": int,
}  # fmt: skip
"""Parts of saved settings, see :func:`~qif_plugins.support.files.check_parts`."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "mnist5k": {"hidden": (200,), "lr": 3e-3},
    "shd": {"hidden": (128,), "duration": 1.4, "tau": 0.1, "loss": "count", "scale": 1.0, "rate": 3.0, "lr": 1e-3},
    "spoken-digits": {"hidden": (64,), "duration": 0.7, "tau": 0.2, "scale": 0.03},
}
"""Changes to :class:`Settings` by data set."""

LIF_IMAGES: dict[str, Any] = {"duration": 1.0, "latest": 1.0}
"""Changes for LIF neurons on images, since long after the input a silent neuron has no membrane left to learn from."""
