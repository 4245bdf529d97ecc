"""Spike trains and their continuation beyond the trial's end.

At the end T of the trial, the drive of a neuron becomes a constant that makes it oscillate (given in :mod:`.layers`).
Its spikes from then on, at T + period·(k - phase) for k = 1, 2, ..., are its pseudospikes. ``phase``, from 0 just after
a spike to 1 just before one, is continuous in the parameters together with the number of ordinary spikes: a spike that
moves past T becomes the first pseudospike, at the same time and, for QIF and theta neurons, with the same derivative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .padding import places


@dataclass(frozen=True, eq=False)
class Spikes:
    """A batch of spike trains.

    Args:
        times: [B, K], ascending, in [0, T], padded with infinity.
        indices: [B, K] int64, padded with -1.
        channels: Number N of inputs or neurons.
        phase: [B, N] at the trial's end; ``None`` (default) for trains that do not continue, such as inputs.
        period: [B, N] of the pseudospikes; ``None`` with ``phase``.
        duration: Trial length T; needed with ``phase``.
    """

    times: Tensor
    indices: Tensor
    channels: int
    phase: Tensor | None = None
    period: Tensor | None = None
    duration: float = math.inf

    def ordinary_counts(self) -> Tensor:
        """Count the spikes within the trial, [B, N] int64."""
        return self._places(0)[1]

    def counts(self) -> Tensor:
        """Count the spikes within the trial and add ``phase``, [B, N]: continuous in the parameters."""
        ordinary = self.ordinary_counts().to(self.times.dtype)
        return ordinary if self.phase is None else ordinary + self.phase

    def nth(self, number: int) -> Tensor:
        """Return the first spike times of each neuron.

        Args:
            number: Number of spikes, >= 1.

        Returns:
            [B, N, number]: ordinary spikes, then pseudospikes (infinity without ``phase``).

        Raises:
            ValueError: ``number`` is below 1.
        """
        if number < 1:
            raise ValueError(f"the number of spikes must be at least 1, got {number}")
        where, ordinary = self._places(number)
        k = torch.arange(1, number + 1, device=ordinary.device) - ordinary[..., None]
        if self.phase is None or self.period is None:
            later = torch.full(k.shape, math.inf, dtype=self.times.dtype, device=self.times.device)
        else:
            later = self.duration + self.period[..., None] * (k - self.phase[..., None])
        if self.times.shape[1] == 0:
            return later
        ordinary_times = self.times.gather(1, where.clamp(min=0).flatten(1)).reshape(where.shape)
        return torch.where(where >= 0, ordinary_times, later)

    def first(self) -> Tensor:
        """Return the time to each neuron's first spike or pseudospike, [B, N]."""
        return self.nth(1)[..., 0]

    def _places(self, number: int) -> tuple[Tensor, Tensor]:
        try:
            where, counts = places(self.indices.long().contiguous().numpy(), self.channels, number)
        except IndexError:
            raise ValueError(
                f"spike index {int(self.indices.max())} is not below the number of channels, {self.channels}; number "
                f"the channels from 0, or pass Spikes more channels"
            ) from None
        return torch.from_numpy(where), torch.from_numpy(counts)
