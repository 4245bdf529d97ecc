"""The area under a surrogate, a measure of how much of the gradient it passes on.

If the membrane's density changes little over the width of a surrogate, the mean surrogate is its area times the density
at the threshold. The true sensitivity of the firing probability is that density alone, so an area of 1 has no bias.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron.surrogate import FastSigmoid, FusedSurrogate, Gaussian, Window

REACH = 20.0
"""Distance from the threshold, in thresholds, up to which a surrogate without a formula is integrated."""
_CLOSEST = 1e-6
_NEAR, _FAR = 2500, 4000
"""Numbers of grid points: on each side with logarithmic spacing from ``_CLOSEST`` on, and evenly spaced everywhere."""


def area(surrogate: Any, v_threshold: Any = 1.0) -> float:
    """Return the integral of a surrogate over the membrane.

    Args:
        surrogate: A fused surrogate, or a callable. The gradient of a callable is integrated over ``REACH`` thresholds
            on each side.
        v_threshold: Threshold θ of the neuron. Default 1.

    Returns:
        The area. If a callable draws random numbers, does not run on the CPU, or has a gradient that is negative
        somewhere or 0 everywhere, the result is 1, the area of the spike's true derivative.
    """
    if isinstance(surrogate, FastSigmoid):
        return 2 / surrogate.slope
    if isinstance(surrogate, Gaussian):
        return math.sqrt(2 * math.pi) * _mean(surrogate.height * surrogate.width)
    if isinstance(surrogate, Window):
        return _mean(surrogate.height * (surrogate.hi - surrogate.lo))
    if isinstance(surrogate, FusedSurrogate):  # ATan and Sigmoid
        return 1.0
    try:
        found = _integral(surrogate, abs(_mean(v_threshold)))
    except Exception:  # whatever a user's function raises
        return 1.0
    return found if math.isfinite(found) and found > 0 else 1.0


def _integral(surrogate: Callable[[Tensor], Tensor], v_threshold: float) -> float:
    """Integrate the gradient of a function of h - θ; NaN for one that draws random numbers or has negative values."""
    alone = copy.deepcopy(surrogate).cpu() if isinstance(surrogate, nn.Module) else surrogate
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        kind: Any = {"dtype": torch.float32, "device": "cpu"}
        near = torch.logspace(math.log10(_CLOSEST), math.log10(REACH), _NEAR, **kind)
        x = torch.cat([-near, near, torch.linspace(-REACH, REACH, _FAR, **kind)]).sort().values * v_threshold
        state = torch.random.get_rng_state()
        x.requires_grad_()
        (slope,) = torch.autograd.grad(alone(x).sum(), x)
        if not torch.equal(state, torch.random.get_rng_state()) or bool((slope < 0).any()):
            return math.nan
        return torch.trapezoid(slope.double(), x.detach().double()).item()


def _mean(value: Any) -> float:
    return torch.as_tensor(value).detach().double().mean().item()
