"""Derive the window of a neuron that learns its parameters, from their current values alone.

Equal parameters have equal windows: in evaluation and in training, for one step and for all of them, in the first pass
and in the recomputation of activation checkpointing. So whenever a parameter has changed, the reset closure of
:mod:`qif_plugins.neuron.moments` is solved anew, from the input's moments and by a fixed number of steps: four
iterations, then Newton's method. Nothing is read back from a GPU, so a training step does not wait for it, and a
checkpoint needs no further state.

The result agrees with :func:`~qif_plugins.membrane_moments` to rounding if the last steps have settled, and to 1e-5 of
the deviation at worst. That function raises an error if the closure does not converge. Training cannot stop then, so
the moments are those of the input, as for a membrane that keeps nothing from step to step. Simulated membranes are
close to this: at θ = σ_I = 1, u1 = 0, u2 = 0.5 and a from 0.7 to 1.5, where the closure's deviation grows without
bound, their density at the threshold is 0.26 to 0.25, and that of the input 0.24.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .moments import closure_step, newton_step
from .parameters import Number, QIFParameters
from .surrogate import Gaussian, Window, isometric_gaussian, unbiased_window

_ITERATIONS = 4
_NEWTON_STEPS = 12
"""Enough for every leak up to 0.9999 and inputs down to a hundredth of the threshold."""
_TOLERANCE = 1e-5
"""Relative change in the last step above which the closure has not converged. Newton's error is about its square."""


@torch.no_grad()
def followed_moments(params: QIFParameters, input_std: Number, input_mean: Number = 0.0) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation of the membrane without reading anything back from a device.

    Args:
        params: The neuron; at least one of its numbers is a tensor.
        input_std: Standard deviation of g·x, a float or a tensor that broadcasts with the parameters. Its magnitude
            counts as at least 1e-6, so that a learned threshold from which it is derived may pass through 0.
        input_mean: Mean of g·x. Default 0.

    Returns:
        ``(mean, std)`` of the reset closure, of the broadcast shape, on the parameters' device; the input's own moments
        if the closure does not converge. float64 (float32 on devices that have none), without gradient.
    """
    numbers = params.numbers()
    device = next(value.device for value in numbers.values() if isinstance(value, Tensor))
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def placed(value: Number) -> Any:
        # Non-blocking, so that the copy of a measured moment to the device is not waited for.
        return value.detach().to(device, dtype, non_blocking=True) if isinstance(value, Tensor) else value

    params = params.with_numbers(**{name: placed(value) for name, value in numbers.items()})
    input_mean, input_std = placed(input_mean), placed(input_std)
    input_std = input_std.abs().clamp(min=1e-6) if isinstance(input_std, Tensor) else max(abs(input_std), 1e-6)
    shapes = [v.shape for v in (*params.numbers().values(), input_mean, input_std) if isinstance(v, Tensor)]
    zero = torch.zeros(torch.broadcast_shapes(*shapes), dtype=dtype, device=device)
    step = partial(closure_step, params, input_std=input_std, input_mean=input_mean)
    mean, std = zero + input_mean, zero + input_std
    for _ in range(_ITERATIONS):
        mean, std = step(mean, std)
    for _ in range(_NEWTON_STEPS):
        new_mean, new_std, attracts = newton_step(step, mean, std)
        moved = torch.maximum((new_mean - mean).abs(), (new_std - std).abs()) / std
        mean, std = new_mean, new_std.clamp(min=input_std)
        if _is_at_hand(moved) and bool((moved <= 1e-8).all()):  # and the step has squared that
            break
    settled = attracts & (moved <= _TOLERANCE)  # false for NaN
    return torch.where(settled, mean, input_mean), torch.where(settled, std, input_std)


def window_of_moments(
    name: str, params: QIFParameters, mean: Number, std: Number, input_std: Number | None = None
) -> Window | Gaussian:
    """Derive a surrogate from the moments of the membrane, without checks.

    Args:
        name: ``"isometric"``, ``"unbiased"`` or ``"paper"``.
        params: The neuron.
        mean: Mean of the membrane.
        std: Standard deviation of the membrane.
        input_std: Standard deviation of g·x; ``None`` (default) if only the membrane was measured.
    """
    if name == "isometric":
        return Gaussian.unchecked(*isometric_gaussian(params, mean, std, input_std))
    if name == "paper":
        return Window.unchecked(mean - std, mean + std, torch.ones_like(std) if isinstance(std, Tensor) else 1.0)
    return Window.unchecked(*unbiased_window(params.v_threshold, mean, std))


class WindowMemory:
    """Cache of the last window, valid as long as the parameters are unchanged. Copies and pickles are empty."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the window."""
        self._seen: list[tuple[Any, Any]] | None = None
        self._window: Window | Gaussian | None = None
        self._doubted = True

    def doubt(self) -> None:
        """Have the window derived anew for the next gradient, since writes through ``.data`` are not noticed."""
        self._doubted = True

    def __call__(self, parameters: Sequence[Any], derive: Callable[[], Window | Gaussian]) -> Window | Gaussian:
        """Return the window for these parameters.

        Args:
            parameters: The values on which the window depends, compared by identity and by version.
            derive: Function that derives the window.
        """
        if torch.compiler.is_compiling():
            return derive()
        seen = versions(parameters)
        # Without gradients the window is not used, so evaluation need not derive it anew.
        if self._window is None or not same_versions(seen, self._seen) or (self._doubted and torch.is_grad_enabled()):
            window = derive()
            if not all(has_storage(value) for value in window.coefficients()):
                return window
            self._window, self._seen, self._doubted = window, seen, False
        return self._window

    def __reduce__(self) -> Any:
        return WindowMemory, ()


def versions(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return the values, each with the count of its changes in place."""
    return [(value, version_of(value)) for value in values]


def same_versions(now: list[tuple[Any, Any]], before: list[tuple[Any, Any]] | None) -> bool:
    """Return whether nothing has changed.

    Values are compared by identity. The old ones are kept alive, so that a new tensor is never taken for an old one.
    """
    return (
        before is not None
        and len(now) == len(before)
        and all(value is then and version == last for (value, version), (then, last) in zip(now, before, strict=True))
    )


def version_of(value: Any) -> Any:
    """Return the count of a tensor's changes in place, ``None`` for anything else."""
    if not isinstance(value, Tensor):
        return None
    return object() if value.is_inference() else value._version  # an inference tensor does not count its changes


def has_storage(value: Any) -> bool:
    """Return whether a number may be kept; a tensor wrapped by a transform of torch.func must not outlive it."""
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
