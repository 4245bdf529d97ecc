"""Spike trains and their continuation beyond the trial's end.

At the end T of the trial, the drive of a neuron becomes a constant that makes it oscillate (given in :mod:`.layers`).
Its spikes from then on, at T + period·(k - phase) for k = 1, 2, ..., are its pseudospikes. ``phase``, from 0 just after
a spike to 1 just before one, is continuous in the parameters together with the number of ordinary spikes: a spike that
moves past T becomes the first pseudospike, at the same time and, for QIF and theta neurons, with the same derivative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .once import refuse_twice
from .padding import nth, nth_adjoint, places


class _Nth(torch.autograd.Function):
    """First spikes, [B, C, number], of times [B, K], phase and period [B, C], all float64."""

    @staticmethod
    def forward(
        ctx: Any, times: Tensor, phase: Tensor, period: Tensor, where: np.ndarray, counts: np.ndarray, duration: float
    ) -> Tensor:
        arrays = [x.contiguous().numpy() for x in (times, phase, period)]
        ctx.save_for_backward(times, phase, period)
        ctx.where, ctx.counts = where, counts
        return torch.from_numpy(nth(arrays[0], where, counts, *arrays[1:], duration))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        times, phase, period = ctx.saved_tensors
        results = [np.zeros(tuple(x.shape)) for x in ctx.saved_tensors]
        numbers = [x.detach().contiguous().numpy() for x in (phase, period)]
        nth_adjoint(grads[0].detach().contiguous().numpy(), ctx.where, ctx.counts, *numbers, *results)
        sources = (times, phase, period, *grads)
        return (*refuse_twice([torch.from_numpy(x) for x in results], sources), None, None, None)


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
        return torch.from_numpy(self._places(0)[1])

    def counts(self) -> Tensor:
        """Count the spikes within the trial and add ``phase``, [B, N]: continuous in the parameters."""
        ordinary = torch.from_numpy(self._places(0)[1]).to(self.times.dtype)
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
        duration = self.duration
        phase, period = self.phase, self.period
        if phase is None or period is None:
            phase = period = torch.zeros(ordinary.shape, dtype=torch.float64, device="cpu")
            duration = math.inf
        times = _Nth.apply(self.times.double(), phase.double(), period.double(), where, ordinary, duration)
        return times.to(self.times.dtype)

    def first(self) -> Tensor:
        """Return the time to each neuron's first spike or pseudospike, [B, N]."""
        return self.nth(1).squeeze(2)

    def _places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return places(self.indices.long().contiguous().numpy(), self.channels, number)
        except IndexError:
            raise ValueError(
                f"spike index {int(self.indices.max())} is not below the number of channels, {self.channels}; number "
                f"the channels from 0, or pass Spikes more channels"
            ) from None
