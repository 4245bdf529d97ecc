"""Stationary mean and deviation of the QIF membrane under normal input.

Under threshold-dependent batch normalization the input g·x[t] is close to N(m, σ_I²). Two closures
approximate the resulting mean μ and deviation σ of the pre-reset membrane h ~ N(μ, σ²):

* ``"free"`` leaves out the reset, as arXiv 2510.05168 does. With S = u1 + u2 and P = u1 u2::

      μ  = a (σ² + μ² - S μ + P) + m
      σ² = a² (2 σ⁴ + 4 μ² σ² + S² σ² - 4 S μ σ²) + σ_I²

* ``"reset"``, this package's, includes the reset: below the threshold the charge is f(h), above it f of
  the membrane after the reset, each weighted by its part of the normal density.

For a map without rebound, the part of the density below u1 goes with f's tangent there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..support.names import check_known
from ..support.numbers import checked_number
from .names import CLOSURES, ClosureName
from .parameters import Number, QIFParameters

_MAX_ITERATIONS = 500
_MAX_NEWTON_STEPS = 50
_MOMENTS = (1.0, 0.0, 1.0, 0.0, 3.0)
"""E[Z^k] of a standard normal Z for k = 0..4."""


class MomentClosureError(ValueError):
    """Raised if iterating a moment closure from the input's moments does not reach a fixed point."""


def membrane_moments(
    params: QIFParameters, input_std: Number, input_mean: Number = 0.0, closure: ClosureName = "reset"
) -> tuple[Number, Number]:
    """Compute the stationary mean and standard deviation of the pre-reset membrane h.

    Args:
        params: The neuron.
        input_std: Standard deviation σ_I of g·x, > 0; a float or a tensor (per channel, per neuron).
        input_mean: Mean m of g·x. Default 0.
        closure: ``"reset"`` (default) or ``"free"``, see the module's docstring.

    Returns:
        ``(mean, std)``: floats if every argument is a float, else float64 tensors of the
        broadcast shape, without gradient. They are never NaN.

    Raises:
        MomentClosureError: The closure does not converge.
        ValueError: The closure is unknown, or ``input_std`` is not positive and finite.
    """
    check_known("closure", CLOSURES, closure)
    input_std, input_mean = checked_number("input_std", input_std), checked_number("input_mean", input_mean)
    if params.is_uniform and not isinstance(input_std, Tensor) and not isinstance(input_mean, Tensor):
        return _uniform_moments(params, float(input_std), float(input_mean), closure)
    return _iterate(params, input_std, input_mean, closure)


@lru_cache(maxsize=256)
def _uniform_moments(
    params: QIFParameters, input_std: float, input_mean: float, closure: ClosureName
) -> tuple[float, float]:
    mean, std = _iterate(params, input_std, input_mean, closure)
    return mean.item(), std.item()


@torch.no_grad()
def _iterate(
    params: QIFParameters, input_std: Number, input_mean: Number, closure: ClosureName
) -> tuple[Tensor, Tensor]:
    values = (*params.numbers().values(), input_std, input_mean)
    device = next((v.device for v in values if isinstance(v, Tensor) and v.dim() > 0), torch.device("cpu"))
    # On the CPU, where checking for convergence after every iteration costs nothing.
    params = params.with_numbers(**{name: _float64(value) for name, value in params.numbers().items()})
    input_std, input_mean = _float64(input_std), _float64(input_mean)
    if not bool(torch.all(torch.isfinite(input_std) & (input_std > 0) & torch.isfinite(input_mean))):
        raise ValueError(
            f"the input's moments must be finite and its deviation positive, got input_mean={input_mean.tolist()}, "
            f"input_std={input_std.tolist()}"
        )
    tensors = [*params.numbers().values(), input_std, input_mean]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors if isinstance(t, Tensor)))
    mean, std = input_mean.expand(shape).clone(), input_std.expand(shape).clone()

    def step(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        return closure_step(params, mean, std, input_std, input_mean, closure)

    for count in range(_MAX_ITERATIONS + _MAX_NEWTON_STEPS):
        if count < _MAX_ITERATIONS:
            new_mean, new_std = step(mean, std)
            settles, tolerance = True, 1e-13
        else:
            # With a long memory the iteration settles as slowly as the membrane; Newton's method does not.
            new_mean, new_std, attracts = newton_step(step, mean, std)
            settles, tolerance = bool(attracts.all()), 1e-12
        change = torch.maximum((new_mean - mean).abs(), (new_std - std).abs())
        mean, std = new_mean, new_std
        if not bool((torch.isfinite(change) & (std > 0)).all()):
            break
        if settles and bool((change <= tolerance * (1 + std)).all()):
            return _to(mean, device), _to(std, device)
    raise MomentClosureError(
        f"the {closure!r} closure does not converge for a threshold of {_range(params.v_threshold)}, input mean "
        f"{_range(input_mean)} and input deviation {_range(input_std)} (a={_range(params.a)}, u1={_range(params.u1)}, "
        f"u2={_range(params.u2)}): the membrane's deviation grows without bound. Use a smaller input deviation or a"
        + (", or closure='reset'" if closure == "free" else "")
        + ", match a leak, or take a surrogate that needs no moments: the window 'heuristic' or a given Window(lo, hi)."
    )


def newton_step(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of Newton's method towards a fixed point of ``step``, or ``step`` itself if it leads away from any.

    The derivatives are finite differences. No value is read back from the device.

    Args:
        step: Function of mean and deviation, both with an additional first dimension of size 3, that returns them after
            a time step.
        mean: Mean of h.
        std: Standard deviation of h.

    Returns:
        ``(mean, std, attracts)``; ``attracts`` is, elementwise, whether iterating ``step`` leads to a fixed point
        nearby.
    """
    by = std * torch.finfo(std.dtype).eps ** 0.5
    next_mean, next_std = step(torch.stack([mean, mean + by, mean]), torch.stack([std, std, std + by]))
    (j11, j12), (j21, j22) = ((new[1:] - new[0]) / by for new in (next_mean, next_std))
    next_mean, next_std = next_mean[0], next_std[0]
    trace, determinant = j11 + j22, j11 * j22 - j12 * j21
    attracts = (determinant < 1) & (trace.abs() < 1 + determinant)
    solvable = 1 - trace + determinant
    change_mean, change_std = next_mean - mean, next_std - std
    newton_mean = mean + ((1 - j22) * change_mean + j12 * change_std) / solvable
    newton_std = std + ((1 - j11) * change_std + j21 * change_mean) / solvable
    return torch.where(attracts, newton_mean, next_mean), torch.where(attracts, newton_std, next_std), attracts


def closure_step(
    params: QIFParameters,
    mean: Tensor,
    std: Tensor,
    input_std: Number,
    input_mean: Number = 0.0,
    closure: ClosureName = "reset",
) -> tuple[Tensor, Tensor]:
    """Run one iteration of a closure: compute the moments one time step after ``(mean, std)``.

    No value is read back from the device, so a neuron whose parameters are learned can follow its
    moments inside a training step.

    Args:
        params: The neuron.
        mean: Mean of h before the step.
        std: Standard deviation of h before the step.
        input_std: Standard deviation of g·x.
        input_mean: Mean of g·x.
        closure: ``"reset"`` or ``"free"``.

    Returns:
        ``(mean, std)`` after the step, of the broadcast shape.
    """
    a, s, p = params.a, params.u1 + params.u2, params.u1 * params.u2
    var = std * std
    if closure == "free" and params.rebound:
        new_mean = a * (var + mean * mean - s * mean + p) + input_mean
        new_var = a * a * var * (2 * var + 4 * mean * mean + s * s - 4 * s * mean)
        return new_mean, torch.sqrt(new_var + input_std * input_std)

    below = _MOMENTS if closure == "free" else _lower_moments((params.v_threshold - mean) / std)
    first, second = _below_moments(params, _charge_polynomial, mean, std, below)
    if closure == "reset" and params.reset == "hard":
        fired = params.map(params.v_reset)
        above = 1 - below[0]
        first = first + fired * above
        second = second + fired * fired * above
    elif closure == "reset":
        subtracted = _subtracted_below(params, mean, std, below)
        shifted = _charge_polynomial(params, mean - params.v_threshold, std)
        first_above, second_above = _polynomial_moments(shifted, _difference(subtracted, below))
        first, second = first + first_above, second + second_above
        if not params.rebound:
            held, share = params.map(params.v_threshold), 1 - subtracted[0]
            first, second = first + held * share, second + held * held * share
    return first + input_mean, torch.sqrt(second - first * first + input_std * input_std)


def membrane_memory(params: QIFParameters, mean: Tensor, std: Tensor) -> Tensor:
    """Compute the mean square of ∂h[t+1]/∂h[t] for h ~ N(mean, std²), without the surrogate in the reset.

    Below the threshold that derivative is f'(h). Above it, it is 0 under a hard reset and f'(h - θ) under a soft one;
    without rebound it is also 0 above 2θ.

    Args:
        params: The neuron.
        mean: Mean of h.
        std: Standard deviation of h.

    Returns:
        E[(∂h[t+1]/∂h[t])²], of the broadcast shape; 0 if nothing is kept from step to step.
    """
    below = _lower_moments((params.v_threshold - mean) / std)
    memory = _below_moments(params, _slope_polynomial, mean, std, below)[1]
    if params.reset == "soft":
        shifted = _slope_polynomial(params, mean - params.v_threshold, std)
        subtracted = _subtracted_below(params, mean, std, below)
        memory = memory + _polynomial_moments(shifted, _difference(subtracted, below))[1]
    return memory


def firing_rate(params: QIFParameters, mean: Number, std: Number) -> Number:
    """Compute the probability of a spike per step, P(h >= θ) = 1 - Φ((θ - μ)/σ), for h ~ N(mean, std²).

    Args:
        params: The neuron.
        mean: Mean of h.
        std: Standard deviation of h.

    Returns:
        Spikes per neuron-step, a float if every argument is a float.
    """
    z = (params.v_threshold - mean) / std
    if isinstance(z, Tensor):
        return 0.5 * torch.erfc(z / math.sqrt(2))
    return 0.5 * math.erfc(z / math.sqrt(2))


def _below_moments(
    params: QIFParameters, polynomial: Any, mean: Tensor, std: Tensor, below: tuple[Any, ...]
) -> tuple[Any, Any]:
    """First and second moment of a polynomial of the membrane under the partial moments ``below`` an upper limit."""
    if params.rebound:
        return _polynomial_moments(polynomial(params, mean, std), below)
    lowest = _lower_moments((params.u1 - mean) / std)
    # A threshold below u1 leaves the tangent alone.
    lowest = tuple(torch.where(below[0] < lowest[0], part, low) for part, low in zip(below, lowest, strict=True))
    first, second = _polynomial_moments(polynomial(params, mean, std), _difference(below, lowest))
    first_of_tangent, second_of_tangent = _polynomial_moments(polynomial(params, mean, std, True), lowest)
    return first + first_of_tangent, second + second_of_tangent


def _subtracted_below(params: QIFParameters, mean: Tensor, std: Tensor, below: tuple[Any, ...]) -> tuple[Any, ...]:
    """Partial moments up to where a soft reset leaves h - θ: all, without rebound up to 2θ, and at least ``below``."""
    if params.rebound:
        return _MOMENTS
    doubled = _lower_moments((2 * params.v_threshold - mean) / std)
    return tuple(torch.where(doubled[0] < below[0], low, part) for part, low in zip(doubled, below, strict=True))


def _difference(whole: tuple[Any, ...], part: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a - b for a, b in zip(whole, part, strict=True))


def _slope_polynomial(params: QIFParameters, mean: Any, std: Tensor, tangent: bool = False) -> tuple[Any, Any, Any]:
    """f'(mean + std z) as a polynomial in z, or the slope of f's tangent at u1."""
    if tangent:
        return 0.0, 0.0, params.a * (params.u1 - params.u2)
    return 0.0, 2 * params.a * std, params.a * ((mean - params.u1) + (mean - params.u2))


def _charge_polynomial(params: QIFParameters, mean: Any, std: Tensor, tangent: bool = False) -> tuple[Any, Any, Any]:
    """f(mean + std z), or f's tangent at u1, as a polynomial in z: its coefficients of z², z and 1."""
    if tangent:
        slope = params.a * (params.u1 - params.u2)
        return 0.0, slope * std, slope * (mean - params.u1)
    s, p = params.u1 + params.u2, params.u1 * params.u2
    return (
        params.a * std * std,
        params.a * (2 * mean - s) * std,
        params.a * (mean * mean - s * mean + p),
    )


def _lower_moments(z: Tensor) -> tuple[Tensor, ...]:
    """E[Z^k; Z < z] of a standard normal Z for k = 0..4."""
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    cumulative = 0.5 * torch.erfc(-z / math.sqrt(2))
    return (
        cumulative,
        -density,
        cumulative - z * density,
        -(z * z + 2) * density,
        3 * cumulative - (z**3 + 3 * z) * density,
    )


def _polynomial_moments(coefficients: tuple[Any, Any, Any], m: tuple[Any, ...]) -> tuple[Any, Any]:
    """First and second moment of a z² + b z + c under the partial moments m of z."""
    a, b, c = coefficients
    first = a * m[2] + b * m[1] + c * m[0]
    second = a * a * m[4] + 2 * a * b * m[3] + (b * b + 2 * a * c) * m[2] + 2 * b * c * m[1] + c * c * m[0]
    return first, second


def _float64(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _to(value: Tensor, device: torch.device) -> Tensor:
    # Apple's GPUs have no float64.
    return value.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _range(value: Any) -> str:
    low, high = value.min().item(), value.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
