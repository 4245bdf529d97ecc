"""Encode images and event lists as spike trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .spikes import Spikes


def encode_images(images: Tensor, latest: float, threshold: float = 0.1, dtype: torch.dtype = torch.float64) -> Spikes:
    """Encode intensities as spike times: a pixel of intensity x >= ``threshold`` spikes once, at latest · (1 - x).

    Args:
        images: [B, ...] in [0, 1].
        latest: Time > 0 at which intensity 0 would spike; no later than the trial's end.
        threshold: Intensity below which a pixel stays silent. Default 0.1.
        dtype: Type of the times. Default float64.

    Returns:
        Trains with one channel per pixel.

    Raises:
        ValueError: An intensity outside [0, 1], or ``latest`` not positive.
    """
    flat = images.reshape(images.shape[0], -1).to(dtype)
    if not 0 < latest < math.inf:
        raise ValueError(f"latest must be positive and finite, got {latest}")
    if flat.numel() and not bool(((flat >= 0) & (flat <= 1)).all()):
        raise ValueError(
            f"intensities must lie in [0, 1], got {float(flat.min()):g} to {float(flat.max()):g}; divide first"
        )
    times, order = torch.where(flat >= threshold, latest * (1 - flat), math.inf).sort(dim=1, stable=True)
    most = int(torch.isfinite(times).sum(1).max()) if len(times) else 0
    times, order = times[:, :most].contiguous(), order[:, :most]
    return Spikes(times, torch.where(torch.isfinite(times), order, -1), flat.shape[1])


def pad_events(
    events: Sequence[tuple[np.ndarray, np.ndarray]], channels: int, duration: float, dtype: torch.dtype = torch.float64
) -> Spikes:
    """Pad event lists of different lengths, such as those of SHD, to one batch.

    Args:
        events: Times and channels of each sample, in any order; events after ``duration`` are dropped.
        channels: Number of channels.
        duration: Trial length, in the unit of the times.
        dtype: Type of the times. Default float64.

    Returns:
        Trains in ascending order, padded.
    """
    kept = []
    for times, units in events:
        time = np.asarray(times, dtype=np.float64)
        inside = time <= duration
        order = np.argsort(time[inside], kind="stable")
        kept.append((time[inside][order], np.asarray(units).astype(np.int64)[inside][order]))
    most = max((len(time) for time, _ in kept), default=0)
    padded = torch.full((len(kept), most), math.inf, dtype=dtype, device="cpu")
    indices = torch.full((len(kept), most), -1, dtype=torch.int64, device="cpu")
    for row, (time, unit) in enumerate(kept):
        padded[row, : len(time)] = torch.from_numpy(time).to(dtype)
        indices[row, : len(time)] = torch.from_numpy(unit)
    return Spikes(padded, indices, channels)
