"""Common part of the QIF neurons of all hosts: the window, and the moments from which it is derived.

By default a window assumes the input that tdBN gives, mean 0 and deviation θ. :func:`~qif_plugins.calibrate`
replaces the assumption by measurements. A calibrated module has two more entries in its state_dict,
``input_mean`` and ``input_std`` or ``membrane_mean`` and ``membrane_std``. A checkpoint without them loads under
``strict=True`` and does not change the window; a checkpoint with them sets its window. The metadata of the
state_dict, which ``torch.save`` keeps, hold the input gain; a neuron that :func:`~qif_plugins.swap` made takes it over,
unless an input gain was passed to swap.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.backends import BACKENDS, BackendName
from ..support.names import check_known
from ..support.numbers import positive_number
from .arguments import one_number
from .following import WindowMemory, followed_moments, window_of_moments
from .moments import MomentClosureError, membrane_moments
from .names import DEFAULT_WINDOW, WINDOWS, WindowName
from .observe import watchable
from .parameters import Number, QIFParameters
from .surrogate import FusedSurrogate, Gaussian, Window

KINDS = ("input", "membrane")
GAIN = "input_gain"
"""Key of the arguments that decide the input gain in a module's metadata in a state_dict."""
_REGISTERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

NO_NIR = (
    "NIR has no quadratic integrate-and-fire neuron: its neurons (LIF, IF, LI, CubaLIF) are linear below the "
    "threshold. qif_plugins.swap(model, to='lif') turns QIF neurons into LIF neurons if they were swapped, or built "
    "with a leak (tau, beta, dynamics='lif'): fine-tune the result and export it. Neurons with the paper's parameters, "
    "or with an a, u1, u2 of your own, match no leak and stay QIF: train the network with dynamics='lif' if you want "
    "to export it, or export only the layers between the neurons."
)
"""The message of an attempt to export a QIF network to NIR: the reason, and the ways out."""


class QIFLayer:
    """Mixin for a spiking QIF module of any host; adapters place it before the host's base class."""

    _measured: Mapping[str, Tensor] = {}
    _window_scale: float = 1.0
    _x_std: float | None = None
    """Deviation of the input x if a norm gives it, see :meth:`assume_input`."""
    _open_to_leak: bool = False
    """Whether swap chose the map and the user has not changed it, so that an assigned reset may change it, and a loaded
    checkpoint the input gain.
    """
    _gain_passed: bool = False
    """Whether the user passed the input gain to swap, so that a loaded checkpoint leaves it alone."""
    _window_memory: WindowMemory
    """Cache of the window that follows learned numbers."""
    _settled = False
    """Whether the constructor has finished, so that assignments are the user's. False while a state is loaded."""
    _backend: BackendName

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward_sequence" in vars(cls):
            # It is called by its name, without the module's hooks.
            cls.forward_sequence = watchable(vars(cls)["forward_sequence"])  # type: ignore[attr-defined]

    @property
    def qif_parameters(self) -> QIFParameters:
        """The neuron's current parameters."""
        raise NotImplementedError

    @property
    def backend(self) -> BackendName:
        """The implementation that runs; ``"auto"`` takes the best one for the input's device."""
        return self._backend

    @backend.setter
    def backend(self, name: BackendName) -> None:
        check_known("backend", ("auto", *BACKENDS), name)
        self._backend = name

    @property
    def derived_window(self) -> WindowName | None:
        """Name of the window that the module derives for itself; ``None`` if its surrogate was given."""
        raise NotImplementedError

    @property
    def learns_window(self) -> bool:
        """True if the window follows learned parameters, which needs the moments of the input."""
        return False

    @property
    def resets(self) -> bool:
        """True if the membrane is reset after a spike. Without a reset there is no stationary membrane to measure."""
        return True

    @property
    def fires_in_operator(self) -> bool:
        """True if the operator itself makes the spikes, so that their gradient passes through it."""
        return True

    def _window_changed(self) -> None:
        """Derive the window anew.

        Raises:
            MomentClosureError: The closure does not converge. With learned numbers there is no error.
        """
        raise NotImplementedError

    def _learned(self) -> Sequence[Any]:
        """Return the numbers that the window follows if they are learned."""
        raise NotImplementedError

    def _follow(self) -> Window | Gaussian:
        """Return the window of the current values of the learned numbers."""
        assert self.derived_window is not None
        return self.followed_window(self.derived_window, self.qif_parameters)

    def _followed(self) -> Window | Gaussian:
        """Return the window of the learned numbers, from the cache if none of them has changed."""
        return self._window_memory(self._learned(), self._follow)

    @property
    def measured_moments(self) -> Mapping[str, Tensor]:
        """Moments to which the window was calibrated, by name; empty if it was not calibrated.

        float64 on the CPU, one value or of a shape that broadcasts to one time step.
        """
        return self._measured

    @measured_moments.setter
    def measured_moments(self, moments: Mapping[str, Tensor]) -> None:
        with undone_on_error(self):
            self._measured = _checked_moments(moments)
            self._window_changed()

    def _measured_of(self, kind: str) -> tuple[Number, Number] | None:
        """Return the measured mean and deviation of the ``"input"`` or the ``"membrane"``, if there are any."""
        if f"{kind}_mean" not in self._measured:
            return None
        return one_number(self._measured[f"{kind}_mean"]), one_number(self._measured[f"{kind}_std"])

    @property
    def window_scale(self) -> float:
        """Deviation of g·x, in thresholds, for which the window is derived if nothing was measured.

        Default 1, as under tdBN with an input gain of 1. Under a norm, :func:`~qif_plugins.swap` makes it follow the
        neuron's input gain and threshold until a number is assigned. It is not part of the ``state_dict``. If the
        neuron's numbers are tensors of several values, it is computed from their means.

        Raises:
            ValueError: The assigned number is not positive and finite.
        """
        if self._x_std is None:
            return self._window_scale
        params = self.qif_parameters
        std, threshold = (
            torch.as_tensor(value, dtype=torch.float64, device="cpu").mean()
            for value in (self._assumed_std(params), params.v_threshold)
        )
        return (std / threshold).item()

    @window_scale.setter
    def window_scale(self, scale: float) -> None:
        self._assume(float(positive_number("window_scale", scale, 1)), None)

    def assume_input(self, std: float) -> None:
        """Derive the window for an input x of deviation ``std`` times the input gain, also if the gain changes later.

        For a deviation below the threshold the window is the one for a deviation equal to the threshold. It is wider,
        and less sharp, which trains better if neurons seldom spike.

        Args:
            std: Deviation of x, such as a norm's weight, > 0.

        Raises:
            ValueError: ``std`` is not positive and finite.
            MomentClosureError: The closure does not converge. The module is then unchanged.
        """
        self._assume(1.0, float(positive_number("std", std)))

    def _assume(self, scale: float, x_std: float | None) -> None:
        with undone_on_error(self):
            self._window_scale, self._x_std = scale, x_std
            self._window_changed()

    def input_moments(self, params: QIFParameters | None = None) -> tuple[Number, Number]:
        """Return mean and deviation of g·x for the window: those measured, or else 0 and θ times :attr:`window_scale`.

        Args:
            params: The neuron. Default: the module's own parameters.
        """
        measured = self._measured_of("input")
        if measured is not None:
            return measured
        return 0.0, self._assumed_std(self.qif_parameters if params is None else params)

    def _assumed_std(self, params: QIFParameters) -> Number:
        threshold = params.v_threshold
        if self._x_std is None:
            return threshold if self._window_scale == 1 else self._window_scale * threshold
        gain: Any = params.input_gain
        std: Any = self._x_std * abs(gain)
        if isinstance(std, Tensor) or isinstance(threshold, Tensor):
            place: Any = std if isinstance(std, Tensor) else threshold
            return torch.maximum(torch.as_tensor(std).to(place), torch.as_tensor(threshold).to(place))
        return max(std, threshold)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Add to the error of a closure where the input deviation comes from, if it was not measured."""
        try:
            yield
        except MomentClosureError as error:
            if self._measured or (self._x_std is None and self._window_scale == 1):
                raise
            raise MomentClosureError(
                f"{error} The input deviation is that of the module's window_scale, which swap or initialise chose for "
                "its input: assign a smaller input_gain first, such as 1, or window_scale = 1 to derive the window "
                "for an input as large as the threshold."
            ) from None

    def derive_window(self, name: WindowName, params: QIFParameters) -> Window | Gaussian:
        """Derive the window called ``name`` for the measured moments, or else for the assumed ones.

        Raises:
            ValueError: Unknown name.
            MomentClosureError: The closure does not converge, and the window follows no learned parameters.
        """
        return self.followed_window(name, params) if self.learns_window else self.settled_window(name, params)

    def settled_window(self, name: WindowName, params: QIFParameters) -> Window | Gaussian:
        """Derive the window of :meth:`derive_window` for parameters that are not learned.

        Raises:
            ValueError: Unknown name.
            MomentClosureError: The closure does not converge.
        """
        if name == "heuristic" or (not self._measured and self._x_std is None and self._window_scale == 1):
            return Window.named(name, params)
        membrane = self._measured_of("membrane")
        if membrane is not None:
            return dataclasses.replace(window_of_moments(name, params, *membrane))  # which checks its numbers
        mean, std = self.input_moments(params)
        with self._explaining():
            return Window.named(name, params, std, input_mean=mean)

    def followed_moments(self, params: QIFParameters) -> tuple[Tensor, Tensor]:
        """Compute mean and deviation of the membrane for the window of learned ``params``, see :mod:`.following`."""
        if "membrane_mean" in self._measured:
            device = next(v.device for v in params.numbers().values() if isinstance(v, Tensor))
            measured = (self._measured[f"membrane_{name}"] for name in ("mean", "std"))
            mean, std = (value.to(device, torch.float32, non_blocking=True) for value in measured)
            return mean, std
        input_mean, input_std = self.input_moments(params)
        return followed_moments(params, input_std, input_mean)

    @torch.no_grad()
    def followed_window(self, name: str, params: QIFParameters) -> Window | Gaussian:
        """Derive the window called ``name`` from the values of learned ``params`` alone, see :mod:`.following`.

        Nothing is read back from a device. The result is in float32, or in float64 for parameters in float64.
        """
        threshold: Any = params.v_threshold
        if name == "heuristic":
            return Window.unchecked(threshold - 0.5, threshold + 0.5)
        mean, std = self.followed_moments(params)
        input_std: Any = None if "membrane_mean" in self._measured else self.input_moments(params)[1]
        if isinstance(input_std, Tensor):
            input_std = input_std.to(std.device, non_blocking=True)
        window = window_of_moments(name, params, mean, std, input_std)
        dtypes = [value.dtype for value in params.numbers().values() if isinstance(value, Tensor)]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        return window.mapped(lambda value: value.to(dtype))

    def window_moments(self, params: QIFParameters | None = None) -> tuple[Number, Number]:
        """Return the mean and deviation of the membrane that the window assumes.

        Args:
            params: The neuron. Default: the module's own parameters.

        Raises:
            MomentClosureError: The closure does not converge.
        """
        params = self.qif_parameters if params is None else params
        mean, std = self.input_moments(params)
        with self._explaining():
            return self._measured_of("membrane") or membrane_moments(params, std, mean)

    def _gain_arguments(self) -> dict[str, Any]:
        """The arguments that decide the input gain, as they may be assigned."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, value in self._measured.items():
            destination[prefix + name] = value
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[GAIN] = self._gain_arguments()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [f"{kind}_{moment}" for kind in KINDS for moment in ("mean", "std")]
        # Removed, so that the host's loading does not find them unexpected; load_state_dict works on a copy.
        moments = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        gain = args[0].get(GAIN, {}) if self._open_to_leak and not self._gain_passed else {}
        if moments or gain:
            try:
                for name in filter(gain.__contains__, self._gain_arguments()):
                    value = gain[name]
                    setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
                if moments and self.learns_window:  # a training that had left the region of convergence goes on there
                    self._measured = _checked_moments(moments)
                    self._window_memory.clear()
                elif moments:
                    self.measured_moments = moments
            except (ValueError, TypeError) as error:
                args[-1].append(f"{prefix}: {error}")


def _checked_moments(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    return found


OTHERS = "pass any other surrogate, also a Gaussian, as surrogate_function (SpikingJelly) or spike_grad (snnTorch)"
"""Advice for a surrogate that ``window`` does not take."""


def checked_window(window: Any) -> Any:
    """Check and return ``window``, a name or a window.

    Raises:
        TypeError: It is neither.
        ValueError: The name is unknown.
    """
    if not isinstance(window, str | Window):
        raise TypeError(f"window must be one of {', '.join(map(repr, WINDOWS))} or a Window, got {window!r}; {OTHERS}")
    if isinstance(window, str):
        check_known("window", WINDOWS, window, otherwise=f"pass a Window(lo, hi); {OTHERS}")
    return window


@contextlib.contextmanager
def undone_on_error(module: Any) -> Iterator[None]:
    """Restore the attributes, parameters and buffers of ``module`` if the block raises a TypeError or ValueError."""
    before = {name: copy.copy(value) if name in _REGISTERS else value for name, value in vars(module).items()}
    try:
        yield
    except (TypeError, ValueError):
        vars(module).clear()
        vars(module).update(before)
        raise


EXAMPLES = {"surrogate_function": "surrogate.ATan()", "spike_grad": "snntorch.surrogate.atan()"}
"""Argument for a surrogate -> an example of the host's surrogates."""


def check_surrogate(argument: str, surrogate: Any) -> None:
    """Refuse a value of ``argument`` that is no surrogate.

    Raises:
        TypeError: It is a class, or cannot be called.
    """
    if isinstance(surrogate, type) or not (callable(surrogate) or isinstance(surrogate, FusedSurrogate)):
        raise TypeError(
            f"{argument} must be a function of membrane - θ, as {EXAMPLES[argument]} returns, got {surrogate!r}; "
            f"a class has to be called, {EXAMPLES[argument]}, and a window by name is window="
        )


def chosen_window(window: Any, surrogate: Any, argument: str) -> Any:
    """Choose the window of a neuron from the arguments of its constructor.

    Returns:
        The name or the window that was passed; ``None`` if a surrogate was passed (as ``argument``); the default if
        neither was.

    Raises:
        TypeError: As in :func:`checked_window` and :func:`check_surrogate`.
        ValueError: As in :func:`checked_window`, or both were passed.
    """
    if surrogate is None:
        return checked_window(DEFAULT_WINDOW if window is None else window)
    if window is not None:
        raise ValueError(f"{argument} and window both decide the surrogate gradient; pass one of them")
    check_surrogate(argument, surrogate)
    return None


def on_device(window: Window | Gaussian, device: torch.device) -> Window | Gaussian:
    """Return ``window`` with its tensors, if any, in float32 on ``device``; the same object if nothing has to move."""
    if not any(isinstance(value, Tensor) and value.device != device for value in window.coefficients()):
        return window
    return window.mapped(lambda value: value.to(device, torch.float32))
