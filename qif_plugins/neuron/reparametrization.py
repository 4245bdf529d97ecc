"""A bijection from unconstrained parameters onto the a, u1 and u2 of working neurons, for learning them.

For a threshold θ > 0 a neuron works in the region given by three conditions:

* The threshold is below the unstable fixed point, f(θ) < θ.
* The resting point is stable, D = (a(u1+u2) + 1)² - 4a²u1u2 < 4.
* Under a hard reset, a reset membrane stays below the threshold without input, f(v_reset) < θ, which keeps v_reset in
  the basin of the resting point.

Each bounds a from above. With S = u1 + u2 and δ = u1 - u2::

    1/a > (θ - u1)(θ - u2) / θ
    1/a > (v_reset - u1)(v_reset - u2) / θ
    1/a > (S + √(S² + 3δ²)) / 3

So, with unconstrained parameters w1, w2, r::

    u = θ sinh(M tanh(w/M));    a = (ε + (1 - 2ε) sigmoid(r)) / max(the three right sides)

These are finite in float32 for every w and r. Near 0, u is θ w, so a step of the optimizer moves u in units of θ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..support.numbers import number
from .parameters import QIFParameters

REACH = 14.0
"""M: |u| stays below θ sinh(14), about 6·10⁵ θ, far from float32's limits."""
MARGIN = 1e-5
"""ε: the relative distance from the region's border, above the rounding of float32; matches leaks up to tau = 5·10⁴."""


def constrained(r: Tensor, w1: Tensor, w2: Tensor, fixed: QIFParameters) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a, u1 and u2 from the unconstrained parameters, see the module's docstring."""
    theta: Any = fixed.v_threshold
    u1, u2 = (theta * torch.sinh(REACH * torch.tanh(w / REACH)) for w in (w1, w2))
    a = (MARGIN + (1 - 2 * MARGIN) * torch.sigmoid(r)) / _bound(u1, u2, fixed)
    return a, u1, u2


def unconstrained(params: QIFParameters) -> dict[str, Tensor]:
    """Compute the unconstrained parameters that give ``params``, in float64.

    Raises:
        ValueError: ``params`` are outside the region of the module's docstring.
    """
    theta: Any = params.v_threshold
    v_reset: Any = params.v_reset
    if not theta > 0:
        raise ValueError(f"ParametricQIFNode needs a positive v_threshold, got {theta:g}: shift the potentials")
    if params.reset == "hard" and not v_reset < theta:
        raise ValueError(f"ParametricQIFNode needs v_reset below v_threshold={theta:g}, got v_reset={v_reset:g}")
    a, u1, u2 = (
        torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (params.a, params.u1, params.u2)
    )
    raw = {}
    for name, u in (("u1", u1), ("u2", u2)):
        w = torch.asinh(u / theta) / REACH
        if not bool((w.abs() < 1).all()):
            raise ValueError(
                f"{name}={number(u)} is out of reach for ParametricQIFNode, which learns up to "
                f"{theta * math.sinh(REACH):g} for v_threshold={theta:g}; use QIFNode, or a smaller tau"
            )
        raw[f"raw_{name}"] = REACH * torch.atanh(w)
    bound = _bound(u1, u2, params)
    share = (a * bound - MARGIN) / (1 - 2 * MARGIN)
    if not bool(((share > 0) & (share < 1)).all()):
        raise ValueError(
            f"a={number(a)} is outside the region that ParametricQIFNode learns in, {number(MARGIN / bound)} < a < "
            f"{number((1 - MARGIN) / bound)} for u1={number(u1)}, u2={number(u2)}, v_threshold={theta:g}, "
            f"v_reset={v_reset:g}: above it the resting point is unstable, or the threshold or the reset is not "
            "safely below the unstable fixed point. Decrease a or v_threshold, or use QIFNode."
        )
    return {"raw_a": torch.logit(share), **raw}


def _bound(u1: Tensor, u2: Tensor, fixed: QIFParameters) -> Tensor:
    """Compute the lower bound of 1/a."""
    theta: Any = fixed.v_threshold
    total, difference = u1 + u2, u1 - u2
    # The constant keeps the root's derivative finite at u1 = u2 = 0, where another bound is the larger one.
    square = 3 * difference * difference + 1e-6 * theta * theta
    root = torch.sqrt(total * total + square)
    # For S < 0 without the cancellation in S + root; |S| so that the branch not taken stays finite, too.
    stability = torch.where(total > 0, total + root, square / (root + total.abs()))
    bound = torch.maximum((theta - u1) * (theta - u2) / theta, stability / 3)
    if fixed.reset == "hard":
        v_reset: Any = fixed.v_reset
        bound = torch.maximum(bound, (v_reset - u1) * (v_reset - u2) / theta)
    return bound
