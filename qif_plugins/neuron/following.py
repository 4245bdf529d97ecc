"""The window of a neuron that learns its parameters: a function of their current values, and of nothing else.

However often forward ran, in evaluation or in training, for one step or for all of them, in the first pass or in the
recomputation of activation checkpointing: equal parameters have equal windows. So the reset closure of
:mod:`qif_plugins.neuron.moments` is solved anew whenever a parameter has changed, from the input's moments, by a fixed
number of steps: four iterations, then Newton's method. Nothing is read back from a GPU on the way, so that a training
step does not wait for it, and nothing is kept for a checkpoint.

The result agrees with :func:`~qif_plugins.membrane_moments` to rounding where the last steps settle, and to 1e-5 of the
deviation at worst. Where that function raises, because the closure does not converge, training cannot stop to say
so: the moments are then the input's, those of a membrane that keeps nothing from step to step. Simulated membranes are
close to them there: at θ = σ_I = 1, u1 = 0, u2 = 0.5 and a from 0.7 to 1.5, where the closure's deviation grows without
bound, their density at the threshold is 0.26 to 0.25, and that of the input 0.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .parameters import Number, QIFParameters
from .surrogate import Gaussian, Window, isometric_gaussian, unbiased_window

__all__ = ["WindowMemory", "followed_moments", "has_storage", "same_versions", "versions", "window_of_moments"]

_ITERATIONS = 4
_NEWTON_STEPS = 12
"""Enough for every leak up to 0.9999 and inputs down to a hundredth of the threshold."""
_TOLERANCE = 1e-5
"""Relative change in the last step above which the closure has not converged. Newton's error is about its square."""


@torch.no_grad()
def followed_moments(params: QIFParameters, input_std: Number, input_mean: Number = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the membrane, reading nothing back from a device.

    Args:
        params: The neuron; at least one of its numbers is a tensor.
        input_std: Standard deviation of g·x, a float or a tensor that broadcasts with the parameters. Taken as at least
            1e-6 in magnitude, so that a learned threshold that it is derived from may pass through 0.
        input_mean: Mean of g·x. Default 0.

    Returns:
        ``(mean, std)`` of the reset closure, of the broadcast shape, on the parameters' device; the input's own where
        the closure does not converge. float64 (float32 on devices that have none), without gradient.
    """
    numbers = params.numbers()
    device = next(value.device for value in numbers.values() if isinstance(value, Tensor))
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def placed(value: Number) -> Any:
        # Non-blocking, so that a measured moment on its way to the device is not waited for.
        return value.detach().to(device, dtype, non_blocking=True) if isinstance(value, Tensor) else value

    params = QIFParameters.unchecked(**{name: placed(value) for name, value in numbers.items()}, reset=params.reset)
    input_mean, input_var = placed(input_mean), placed(input_std) ** 2
    input_var = input_var.clamp(min=1e-12) if isinstance(input_var, Tensor) else max(input_var, 1e-12)
    shapes = [v.shape for v in (*params.numbers().values(), input_mean, input_var) if isinstance(v, Tensor)]
    zero = torch.zeros(torch.broadcast_shapes(*shapes), dtype=dtype, device=device)
    step = _closure(params, input_mean, input_var, zero)
    mean, var = zero + input_mean, zero + input_var
    settled = None
    for count in range(_ITERATIONS + _NEWTON_STEPS):
        new_mean, new_var, by_mean, by_var = step(mean, var)
        change_mean, change_var = new_mean - mean, new_var - var
        if count >= _ITERATIONS:
            (j11, j21), (j12, j22) = by_mean, by_var
            trace, determinant = j11 + j22, j11 * j22 - j12 * j21
            # Newton's step only where the iteration contracts, hence near the point that it would end at.
            attracts = (determinant < 1) & (trace.abs() < 1 + determinant)
            solvable = 1 - trace + determinant
            newton_mean = ((1 - j22) * change_mean + j12 * change_var) / solvable
            newton_var = ((1 - j11) * change_var + j21 * change_mean) / solvable
            change_mean = torch.where(attracts, newton_mean, change_mean)
            change_var = torch.where(attracts, newton_var, change_var)
            moved = torch.maximum(change_mean.square() / var, (change_var / var).square())
            settled = attracts & (moved <= _TOLERANCE**2)  # false for NaN
        mean, var = mean + change_mean, torch.clamp(var + change_var, min=input_var)
        if settled is not None and _is_at_hand(settled) and bool((moved <= 1e-24).all()):
            break
    assert settled is not None
    return torch.where(settled, mean, input_mean), torch.where(settled, var, input_var).sqrt()


def window_of_moments(
    name: str, params: QIFParameters, mean: Number, std: Number, input_std: Number | None = None
) -> Window | Gaussian:
    """The surrogate called ``name``, ``"isometric"``, ``"unbiased"`` or ``"paper"``, for a membrane, unchecked.

    Args:
        name: Which.
        params: The neuron.
        mean: Mean of the membrane.
        std: Its standard deviation.
        input_std: Standard deviation of g·x; ``None`` (default) where only the membrane was measured.
    """
    if name == "isometric":
        return Gaussian.unchecked(*isometric_gaussian(params, mean, std, input_std))
    if name == "paper":
        return Window.unchecked(mean - std, mean + std, torch.ones_like(std) if isinstance(std, Tensor) else 1.0)
    return Window.unchecked(*unbiased_window(params.v_threshold, mean, std))


class WindowMemory:
    """The last window derived, for as long as the parameters stay what they were. Copies and pickles begin empty."""

    def __init__(self) -> None:
        self.clear()

    @property
    def window(self) -> Window | Gaussian | None:
        """The window that is kept."""
        return self._window

    def clear(self) -> None:
        """Forget the window."""
        self._seen: list[tuple[Any, Any]] | None = None
        self._window: Window | Gaussian | None = None
        self._doubted = True

    def doubt(self) -> None:
        """Derive the window anew for the next gradient: a write through ``.data`` since would not show."""
        self._doubted = True

    def __call__(self, parameters: Sequence[Any], derive: Callable[[], Window | Gaussian]) -> Window | Gaussian:
        """The window for these parameters.

        Args:
            parameters: What the window depends on, seen by identity and by version.
            derive: Derives it.
        """
        if torch.compiler.is_compiling():
            return derive()
        seen = versions(parameters)
        # Without gradients a window is of no use, so that evaluation does not pay for the doubt.
        if self._window is None or not same_versions(seen, self._seen) or (self._doubted and torch.is_grad_enabled()):
            window = derive()
            if not all(has_storage(value) for value in window.coefficients()):
                return window
            self._window, self._seen, self._doubted = window, seen, False
        return self._window

    def __reduce__(self) -> Any:
        return WindowMemory, ()


def versions(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The values, each with the count of its changes in place."""
    return [(value, _version(value)) for value in values]


def same_versions(now: list[tuple[Any, Any]], before: list[tuple[Any, Any]] | None) -> bool:
    """Whether nothing has changed.

    By identity, while holding on to the objects: a new tensor never passes for an old one.
    """
    return (
        before is not None
        and len(now) == len(before)
        and all(value is then and version == last for (value, version), (then, last) in zip(now, before, strict=True))
    )


def _version(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return object() if value.is_inference() else value._version  # an inference tensor does not count its changes


def has_storage(value: Any) -> bool:
    """Whether a number may be kept: one that a transform of torch.func has wrapped must not outlive the transform."""
    if not isinstance(value, Tensor):
        return True
    try:
        value.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _is_at_hand(value: Tensor) -> bool:
    """Whether reading a value costs nothing and is allowed: an ordinary tensor on the CPU, and nobody traces."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not tracing and type(value) is Tensor and value.device.type == "cpu" and has_storage(value)


# -- the closure with its derivatives ------------------------------------------------------------

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]


def _closure(params: QIFParameters, input_mean: Any, input_var: Any, zero: Tensor) -> Step:
    """The reset closure as a function of mean and variance of the shape of ``zero``, with its derivatives by each.

    With y = h - θ, d = μ - θ and p the density at the threshold, the moments below it, I_k = E[yᵏ; y < 0], are
    I_0 = Φ(-d/σ), I_1 = d I_0 - σ² p and I_k = d I_{k-1} + (k-1) σ² I_{k-2}, since yᵏ⁻¹ is 0 at the threshold. Their
    derivatives: ∂I_k/∂μ = k I_{k-1} and ∂I_k/∂σ² = k(k-1)/2 I_{k-2}, from -p and p d/(2σ²) at k = 0, -p/2 at k = 1.
    Above the threshold the same holds with 1 - Φ and -p. So every expectation is linear in I_0 .. I_4, p and p d/σ².
    """
    a, u1, u2 = params.a, params.u1, params.u2
    threshold: Any = params.v_threshold
    slope, value = a * (2 * threshold - u1 - u2), a * (threshold - u1) * (threshold - u2)
    if params.reset == "hard":
        fired = params.map(params.v_reset)
        below, above = _expectations(zero + a, zero + slope, zero + (value - fired)), None
    else:  # y is the membrane after the reset
        fired = 0.0
        below = _expectations(zero + a, zero + slope, zero + value)
        above = _expectations(zero + a, zero - a * (u1 + u2), zero + a * u1 * u2)

    def step(mean: Tensor, var: Tensor) -> Any:
        d, std = mean - threshold, var.sqrt()
        z = d / std
        density = torch.exp(-0.5 * z * z) / (std * math.sqrt(2 * math.pi))
        found = (below * _moments(d, var, torch.special.ndtr(-z), density)).sum(1)
        if above is not None:
            found = found + (above * _moments(d, var, torch.special.ndtr(z), -density)).sum(1)
        first, first_mean, first_var, second, second_mean, second_var = found.unbind(0)
        return (
            first + fired + input_mean,
            second - first * first + input_var,
            (first_mean, second_mean - 2 * first * first_mean),
            (first_var, second_var - 2 * first * first_var),
        )

    return step


def _moments(d: Tensor, var: Tensor, share: Tensor, density: Tensor) -> Tensor:
    """I_0 .. I_4, p and p d/σ² on one side of the threshold, along dimension 0."""
    first = d * share - var * density
    second = d * first + var * share
    third = d * second + 2 * var * first
    fourth = d * third + 3 * var * second
    return torch.stack([share, first, second, third, fourth, density, density * d / var])


def _expectations(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """E[q] and E[q²] of q(y) = a y² + b y + c, each with its derivatives by μ and by σ², in terms of ``_moments``."""
    o = torch.zeros_like(a)
    c0, c1, c2, c3, c4 = c * c, 2 * b * c, b * b + 2 * a * c, 2 * a * b, a * a
    rows = (
        (c, b, a, o, o, o, o),
        (b, 2 * a, o, o, o, -c, o),
        (a, o, o, o, o, -b / 2, c / 2),
        (c0, c1, c2, c3, c4, o, o),
        (c1, 2 * c2, 3 * c3, 4 * c4, o, -c0, o),
        (c2, 3 * c3, 6 * c4, o, o, -c1 / 2, c0 / 2),
    )
    return torch.stack([torch.stack(row) for row in rows])
