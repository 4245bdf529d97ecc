"""Losses on spike times and counts. Pseudospikes continue both, so that silent neurons learn as well."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .spikes import Spikes


def first_spike_cross_entropy(spikes: Spikes, labels: Tensor, scale: float, regularisation: float = 1e-2) -> Tensor:
    """Compute the cross-entropy with the logits -t/scale of the times t to first spike: the first to spike wins.

    Args:
        spikes: Output of the last layer, one neuron per class.
        labels: [B] int64.
        scale: Time > 0 that is worth one unit of a logit; begin with a fraction of the time constant.
        regularisation: Weight of mean(exp(t_label/T) - 1), which makes the right neuron spike within the trial.
            Default 0.01. It is huge if pseudospikes come many T late, which a small ``pseudo_scale`` allows.

    Returns:
        The mean over the batch.
    """
    first = spikes.first()
    right = first.gather(1, labels[:, None])[:, 0]
    loss = F.cross_entropy(-first / scale, labels)
    return loss + regularisation * (torch.exp(right / spikes.duration) - 1).mean()


def count_cross_entropy(spikes: Spikes, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the cross-entropy with ``scale`` times the spike counts, continued by the final phase, as logits.

    Args:
        spikes: Output of the last layer, one neuron per class.
        labels: [B] int64.
        scale: Logit of one spike. Default 1.

    Returns:
        The mean over the batch.
    """
    return F.cross_entropy(spikes.counts() * scale, labels)


def spike_count_loss(spikes: Spikes, targets: Tensor) -> Tensor:
    """Compute the mean squared distance of the continued counts from n + 1/2.

    At a count of n + 1/2 a neuron has spiked n times, and its next spike is half a period after the trial's end.

    Args:
        spikes: Spike trains with phases.
        targets: Wanted numbers n, broadcastable to [B, N].

    Returns:
        A scalar.
    """
    return (spikes.counts() - targets - 0.5).square().mean()


def spike_time_loss(spikes: Spikes, targets: Tensor) -> Tensor:
    """Compute the mean squared distance of the first spikes from target times.

    Args:
        spikes: Spike trains.
        targets: [B, N, n] or [N, n], ascending in the last dimension; spikes with an infinite target do not count.

    Returns:
        A scalar.
    """
    times = spikes.nth(targets.shape[-1])
    wanted = torch.isfinite(targets).expand(times.shape)
    distance = torch.where(wanted, times, 0.0) - torch.where(wanted, targets.expand(times.shape), 0.0)
    return distance.square().sum() / wanted.sum().clamp(min=1)
