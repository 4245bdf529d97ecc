"""Losses over the logits of every time step, for labels that belong to the whole sequence.

Temporal efficient training (Deng et al., *Temporal Efficient Training of Spiking Neural Network via Gradient
Re-weighting*, ICLR 2022, arXiv 2202.11946) takes the cross entropy of each step and averages, instead of the cross
entropy of the average; a second term keeps the logits near a constant::

    L = (1 - λ) 1/T Σ_t CE(O[t], y) + λ MSE(O, φ)

φ is the threshold in the paper, 1 in its code's default.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("tet", "mean")


def tet(logits: Tensor, labels: Tensor, regularization: float = 0.0, target: float = 1.0) -> Tensor:
    """Compute the TET loss.

    Args:
        logits: ``[T, N, classes]``.
        labels: ``[N]``, int64.
        regularization: λ, in [0, 1]. Default 0.
        target: φ, what the second term pulls every logit to. Default 1, the threshold.

    Returns:
        A scalar.
    """
    steps = logits.shape[0]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(steps))
    if regularization == 0:
        return loss
    return (1 - regularization) * loss + regularization * (logits - target).square().mean()


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of the logits ``[T, N, classes]`` averaged over time."""
    return F.cross_entropy(logits.mean(0), labels)


class SequenceLoss:
    """A loss that the trainer calls with a model and a batch ``(x, labels)``.

    Args:
        name: One of :data:`LOSSES`.
        steps: T, over which static images are repeated; ``None`` for batches of sequences ``[N, T, C, H, W]``.
        regularization: λ of :func:`tet`. Default 0.
        target: φ of :func:`tet`. Default 1.
    """

    def __init__(self, name: str, steps: int | None, regularization: float = 0.0, target: float = 1.0) -> None:
        self.name, self.steps, self.regularization, self.target = name, steps, regularization, target

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss, and the share of samples that the mean logits classify correctly."""
        x, labels = batch
        x_seq = x.transpose(0, 1) if self.steps is None else x.expand(self.steps, *x.shape)
        logits = model(x_seq)
        if logits.dtype != torch.float64:
            logits = logits.float()  # half precision would round the loss
        if self.name == "tet":
            loss = tet(logits, labels, self.regularization, self.target)
        else:
            loss = mean_cross_entropy(logits, labels)
        return loss, {"accuracy": (logits.detach().mean(0).argmax(-1) == labels).float().mean()}
