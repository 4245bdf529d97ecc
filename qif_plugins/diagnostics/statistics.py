"""Compute the moments of a stream of values chunk by chunk, and the effective input of a neuron."""

from __future__ import annotations

import torch
from torch import Tensor

from ..neuron.parameters import Number, QIFParameters


class Moments:
    """Count, mean and central moments up to the fourth of a stream of values, for each group separately.

    Merged chunk by chunk (Chan, Golub and LeVeque; Pébay, *Formulas for robust, one-pass parallel computation of
    covariances and arbitrary-order statistical moments*, SAND2008-6212), in float64.

    Attributes:
        n: Number of values so far in each group.
        sums: ``[4, groups]``: the mean, and the sums of the 2nd, 3rd and 4th powers of the deviations from it.
    """

    def __init__(self) -> None:
        self.n = 0
        self.sums: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add values ``[n, groups]``; n may be 0."""
        if not len(values):
            return
        # Apple's GPUs have no float64.
        values = values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
        mean = values.mean(0)
        deviation = values - mean
        square = deviation * deviation
        chunk = torch.stack([mean, square.sum(0), (square * deviation).sum(0), (square * square).sum(0)])
        self.merge(values.shape[0], chunk.to("cpu", torch.float64))

    def merge(self, n: int, sums: Tensor) -> None:
        """Add another stream's count, which may be 0, and its sums."""
        if not n:
            return
        if self.sums is None:
            self.n, self.sums = n, sums
            return
        a, b = self.n, n
        total = a + b
        (mean_a, m2a, m3a, m4a), (mean_b, m2b, m3b, m4b) = self.sums, sums
        d = mean_b - mean_a
        self.n = total
        self.sums = torch.stack(
            [
                # Infinite if one of them is, instead of the NaN of their difference.
                torch.where(d.isfinite(), mean_a + d * b / total, mean_a + mean_b),
                m2a + m2b + d**2 * (a * b / total),
                m3a + m3b + d**3 * (a * b * (a - b) / total**2) + 3 * d * (a * m2b - b * m2a) / total,
                m4a + m4b + d**4 * (a * b * (a * a - a * b + b * b) / total**3)
                + 6 * d**2 * (a * a * m2b + b * b * m2a) / total**2 + 4 * d * (a * m3b - b * m3a) / total,
            ]
        )  # fmt: skip

    @property
    def mean(self) -> Tensor:
        """Mean, ``[groups]``."""
        return self._sums()[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation, ``[groups]``."""
        return (self._sums()[1] / self.n).sqrt()

    @property
    def skewness(self) -> Tensor:
        """Third standardized moment, 0 for a normal distribution; ``[groups]``."""
        return self._sums()[2] / self.n / self.std**3

    @property
    def kurtosis(self) -> Tensor:
        """Fourth standardized moment less 3, 0 for a normal distribution; ``[groups]``."""
        return self._sums()[3] / self.n / self.std**4 - 3

    def _sums(self) -> Tensor:
        if self.sums is None:
            raise ValueError("no values yet")
        return self.sums


def effective_input(params: QIFParameters, x_seq: Tensor) -> Tensor:
    """Scale an input ``[T, ...]`` by the neuron's gain: g·x, which is what the closures call the input."""
    gain = params.input_gain
    x = x_seq if x_seq.dtype == torch.float64 else x_seq.float()
    return x * gain.to(x.device, x.dtype) if isinstance(gain, Tensor) else x * gain


def average(value: Number) -> float:
    """Average a number over the neurons, between which it may differ."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").mean().item()
