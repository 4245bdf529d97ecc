"""The width of a surrogate that keeps the gradient's size from layer to layer.

A norm before each neuron (tdBN of scale σ_I) divides by the deviation of the weighted spikes. Their variance is
r(1 - r) for each unit of squared weight, with the firing rate r = P(h >= θ). So one layer multiplies the mean square of
the gradient by

    G = σ_I² E[w(h)²] / (r (1 - r) (1 - j)),     j = E[(∂h[t+1]/∂h[t])²]

The factor 1/(1 - j) adds the gradient that the membrane passes between time steps, in the stationary state. A surrogate
A g((h - θ)/s) without bias has A E[g] = p(θ), so G = 1 fixes its relative mean square:

    ρ = E[w²]/E[w]² = r (1 - r) (1 - j) / (σ_I p(θ))²

The ρ of a surrogate decreases from infinity to 1 as its width s grows. With z = (θ - μ)/σ and the density φ of the
standard normal distribution the required ρ is r(1 - r)/φ(z)² times σ²(1 - j)/σ_I². The first factor is at least π/2,
its value at z = 0. If the second makes ρ smaller than π/2, the width is the one for π/2, because a wider surrogate
would hardly distinguish one membrane from another.

All computations are elementwise, in float64 and in logarithms, and read nothing back from a device. Thresholds far in
the tail of the membrane's distribution, or far below its mean, therefore give finite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .moments import membrane_memory
from .parameters import Number, QIFParameters

LEAST = math.log(math.pi / 2)
_STEPS = 10
"""Number of Newton's steps. The last changes the width by less than 1e-10 of it, for thresholds up to 1,000 deviations
from the mean."""


@torch.no_grad()
def relative_mean_square(
    params: QIFParameters, mean: Number, std: Number, input_std: Number | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the relative mean square of an isometric surrogate.

    Args:
        params: The neuron.
        mean: Mean μ of the membrane.
        std: Standard deviation σ of the membrane.
        input_std: Standard deviation σ_I of g·x. ``None`` (default) if only the membrane was measured; it is then taken
            as σ √(1 - j), its value for a linear membrane.

    Returns:
        ``(z, log ρ)`` with z = (θ - μ)/σ, float64.
    """
    mean, std = _float64(mean), _float64(std)
    z = (params.v_threshold - mean) / std
    log_rho = torch.special.log_ndtr(z) + torch.special.log_ndtr(-z) + z * z + math.log(2 * math.pi)
    if input_std is not None:
        kept = (1 - membrane_memory(params, mean, std)).clamp(min=1e-12)
        # A learned threshold, from which the deviation is derived, may pass through 0.
        log_rho = log_rho + torch.log(kept) + 2 * torch.log((std / _float64(input_std)).abs().clamp(max=1e6))
    return z, log_rho.clamp(min=LEAST)


@torch.no_grad()
def gaussian_width(z: Tensor, log_rho: Tensor) -> Tensor:
    """Compute the width of a Gaussian surrogate centred on the threshold, in deviations of the membrane.

    For w = A exp(-(h - θ)²/(2 s²)) and u = (s/σ)²::

        ρ = (1 + u)/√(u (2 + u)) · exp(z²/((1 + u)(2 + u)))

    Args:
        z: (θ - μ)/σ.
        log_rho: Logarithm of the relative mean square ρ > 1.

    Returns:
        s/σ, of the broadcast shape.
    """

    def excess(x: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.exp(x)
        product = (1 + u) * (2 + u)
        value = torch.log1p(u) - 0.5 * (x + torch.log(2 + u)) + z * z / product - log_rho
        return value, -1 / product - z * z * u * (3 + 2 * u) / product**2

    return torch.exp(0.5 * _root(excess, -torch.log(2 + z * z / 3) + 0 * log_rho))


@torch.no_grad()
def rectangle_width(z: Tensor, log_rho: Tensor) -> Tensor:
    """Compute half the width of a rectangular surrogate centred on the threshold, in deviations of the membrane.

    A rectangle without bias has ρ = 1/P(lo <= h <= hi), so it covers the share 1/ρ of the membranes.

    Args:
        z: (θ - μ)/σ.
        log_rho: Logarithm of the relative mean square ρ > 1.

    Returns:
        κ, of the broadcast shape.
    """
    z = z.abs()

    def excess(x: Tensor) -> tuple[Tensor, Tensor]:
        kappa = torch.exp(x)
        upper, lower = torch.special.log_ndtr(kappa - z), torch.special.log_ndtr(-kappa - z)
        log_share = upper + torch.log(-torch.expm1(lower - upper))
        ends = torch.exp(-0.5 * (kappa - z) ** 2 - log_share) + torch.exp(-0.5 * (kappa + z) ** 2 - log_share)
        return -log_share - log_rho, -kappa * ends / math.sqrt(2 * math.pi)

    return torch.exp(_root(excess, -torch.log(1 + z / 3) + 0 * log_rho))


def _root(excess: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Find the zero of a decreasing function by Newton's steps; a step that leaves the bracket halves it instead."""
    x, low, high = start, start - 100, start + 10
    for _ in range(_STEPS):
        value, slope = excess(x)
        low, high = torch.where(value > 0, x, low), torch.where(value > 0, high, x)
        new = x - value / slope
        x = torch.where((new >= low) & (new <= high), new, 0.5 * (low + high))
    return x


def _float64(value: Number) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)  # which has no float64
