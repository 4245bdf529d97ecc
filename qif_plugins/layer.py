"""What a host's QIF module has in common with every other: the moments that its window is derived from.

By default a window assumes the input that tdBN makes, mean 0 and deviation θ. :func:`~qif_plugins.calibrate`
replaces the assumption by what it measured. A module that was calibrated has two more entries in its state_dict,
``input_mean`` and ``input_std`` or ``membrane_mean`` and ``membrane_std``. A checkpoint without them loads under
``strict=True`` and leaves the window as it is; a checkpoint with them brings its window along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .moments import membrane_moments
from .parameters import Number, QIFParameters
from .surrogate import Window, unbiased_window

__all__ = ["NO_NIR", "QIFLayer", "on_device"]

KINDS = ("input", "membrane")

NO_NIR = (
    "NIR has no quadratic integrate-and-fire neuron: its neurons (LIF, IF, LI, CubaLIF) are linear below the "
    "threshold, and none of them is this one. Convert the network back with qif_plugins.swap(model, to='lif'), "
    "fine-tune and export that, or export the layers between the neurons by themselves."
)
"""Why a QIF network is not exported to NIR, and what to do."""


class QIFLayer:
    """Mixed in by the adapters before the host's base class."""

    _measured: Mapping[str, Tensor] = {}

    @property
    def qif_parameters(self) -> QIFParameters:
        """The neuron's current parameters."""
        raise NotImplementedError

    @property
    def derived_window(self) -> str | None:
        """Name of the window that the module derives for itself; ``None`` where its surrogate was given."""
        raise NotImplementedError

    @property
    def learns_window(self) -> bool:
        """Whether the window follows learned parameters, which needs the moments of the input."""
        return False

    @property
    def resets(self) -> bool:
        """Whether the membrane is reset after a spike; without, there is no stationary membrane to measure."""
        return True

    @property
    def fires_in_operator(self) -> bool:
        """Whether the spikes are the operator's own, so that their gradient passes through it."""
        return True

    def _window_changed(self) -> None:
        """Derive the window anew."""
        raise NotImplementedError

    @property
    def measured_moments(self) -> Mapping[str, Tensor]:
        """The moments that the window was calibrated to, by name; empty where it was not.

        float64 on the CPU, one value or of a shape that broadcasts to one time step.
        """
        return self._measured

    @measured_moments.setter
    def measured_moments(self, moments: Mapping[str, Tensor]) -> None:
        # Copies: safetensors refuses tensors that share their storage.
        found = {
            name: torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
            for name, value in moments.items()
        }
        if found and not any(set(found) == {f"{kind}_mean", f"{kind}_std"} for kind in KINDS):
            raise ValueError(
                "a window is calibrated to input_mean and input_std, or to membrane_mean and membrane_std; got "
                f"{', '.join(sorted(found))}"
            )
        before = self._measured
        self._measured = found
        try:
            self._window_changed()
        except ValueError:
            self._measured = before
            raise

    def input_moments(self) -> tuple[Number, Number]:
        """Mean and deviation of g·x that the window assumes: measured, or those of tdBN, 0 and θ."""
        if "input_mean" not in self._measured:
            return 0.0, self.qif_parameters.v_threshold
        return _number(self._measured["input_mean"]), _number(self._measured["input_std"])

    def derive_window(self, name: str, params: QIFParameters) -> Window:
        """The window called ``name`` for the moments that were measured, or else assumed.

        Raises:
            ValueError: Unknown name.
            MomentClosureError: The closure does not converge.
        """
        if name == "heuristic" or not self._measured:
            return Window.named(name, params)
        if "input_mean" in self._measured:
            mean, std = (_number(self._measured[key]) for key in ("input_mean", "input_std"))
            return Window.named(name, params, std, input_mean=mean)
        return window_from_membrane(
            name, params, *(_number(self._measured[k]) for k in ("membrane_mean", "membrane_std"))
        )

    def window_moments(self) -> tuple[Number, Number]:
        """Mean and deviation of the membrane that the window assumes.

        Raises:
            MomentClosureError: The closure does not converge.
        """
        if "membrane_mean" in self._measured:
            return _number(self._measured["membrane_mean"]), _number(self._measured["membrane_std"])
        mean, std = self.input_moments()
        return membrane_moments(self.qif_parameters, std, mean)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, value in self._measured.items():
            destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [f"{kind}_{moment}" for kind in KINDS for moment in ("mean", "std")]
        # Taken out, so that the host's loading does not call them unexpected; load_state_dict works on a copy.
        moments = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if moments:
            try:
                self.measured_moments = moments
            except ValueError as error:
                args[-1].append(f"{prefix}: {error}")


def window_from_membrane(name: str, params: QIFParameters, mean: Number, std: Number) -> Window:
    """The window called ``name``, ``"unbiased"`` or ``"paper"``, for a membrane of these moments."""
    if name == "paper":
        return Window(mean - std, mean + std)
    return Window(*unbiased_window(params.v_threshold, mean, std))


def on_device(window: Window, device: torch.device) -> Window:
    """``window`` with its tensors, if any, in float32 on ``device``; itself where nothing has to move."""
    values = window.coefficients()
    if not any(isinstance(value, Tensor) and value.device != device for value in values):
        return window
    return Window.unchecked(*(v.to(device, torch.float32) if isinstance(v, Tensor) else v for v in values))


def _number(value: Tensor) -> Number:
    return value.item() if value.numel() == 1 else value
