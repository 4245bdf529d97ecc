"""Derive a neuron's parameters and window from Leaky's arguments and ours, also where these are assigned or learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qif_plugins.neuron.arguments import MAX_BETA, MapArguments, build_parameters, warn_of_rebound
from qif_plugins.neuron.following import has_storage, same_versions, versions
from qif_plugins.neuron.module import QIFLayer, check_surrogate, checked_window, on_device, undone_on_error
from qif_plugins.neuron.names import DEFAULT_BETA, MAP, WindowName
from qif_plugins.neuron.parameters import Number, QIFParameters
from qif_plugins.neuron.surrogate import Gaussian, Surrogate, Window
from qif_plugins.support.numbers import checked_number

from .surrogate import SpikeGradient, recognised

NUMBERS = ("beta", "threshold")
ASSIGNED = frozenset({*NUMBERS, *MAP, "dynamics", "curvature"})
"""The attributes that are checked when they are assigned, apart from properties."""


class Neuron(NamedTuple):
    """The present state of a neuron, as the core takes it.

    Attributes:
        params: Its parameters.
        surrogate: Its surrogate.
        graded: Whether ``graded_spikes_factor`` scales the spikes.
        constants: beta and threshold, ``None`` for one that is learned.
        spread: The arguments that have more than one value.
    """

    params: QIFParameters
    surrogate: Any
    graded: bool
    constants: tuple[Number | None, ...]
    spread: tuple[str, ...]


class Parameters(QIFLayer):
    """The numbers and the window of a neuron with Leaky's ``beta`` and ``threshold``. Mixed in before ``Leaky``."""

    beta: Any
    threshold: Any
    graded_spikes_factor: Any
    surrogate_disable: Any
    curvature: float
    _buffers: dict[str, Any]
    _parameters: dict[str, Any]
    _reset_mechanism: str
    _input_gain: float
    _given: dict[str, Any]
    """beta and threshold as they were passed, before ``half()`` rounded them."""
    _choice: MapArguments
    """The arguments that decide the map; their numbers by name alone, as the values are the module's attributes."""
    _root_names: tuple[str, ...]
    _seen: list[tuple[Any, Any]] | None = None
    _current: Neuron
    """The neuron that was derived from the tensors in ``_seen``."""
    _varying: frozenset[str] = frozenset()
    """The names among beta and threshold that are not constant although they require no gradient: one that is
    parametrized, where no gradient is taken, and one that torch.vmap has batched, which cannot be read.
    """
    _window: WindowName | Window
    _spike_grad: Any
    _no_leak_as: float | None = None
    """The leak in place of none, where swap took over a constant beta of Leaky, which clamps it to between 0 and 1."""

    # -- assignment ------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ASSIGNED or not self._settled:
            super().__setattr__(name, value)
            return
        with undone_on_error(self):
            self._assign(name, value)

    def _assign(self, name: str, value: Any) -> None:
        """Take over a value as the constructor would; the caller undoes it if an error is raised."""
        value = value if name == "dynamics" else checked_argument(name, value)
        before, decides = self._chosen(), name == "dynamics" or name in MAP
        chosen = before
        if name != "threshold":
            chosen = chosen.assigned(name, value, self.qif_parameters if decides else None)
        if not decides:
            check_leak(chosen, name == "beta" and isinstance(value, nn.Parameter))
            if name != "curvature" and not isinstance(value, Tensor) and name not in self._buffers | vars(self):
                self.register_buffer(name, torch.tensor(value, dtype=torch.float32))  # type: ignore[attr-defined]  # after a del
            else:
                super().__setattr__(name, value)  # the host refuses a number for a buffer
        if name == "beta":
            self._no_leak_as = None
        self._choose(chosen)
        self._check(self.beta, self.threshold)
        self._window_changed()
        warn_of_rebound(before, chosen, self._reset_mechanism == "subtract", "reset_mechanism='zero'")

    def _chosen(self) -> MapArguments:
        """The arguments, passed or assigned since, that could decide the map."""
        given = {name: getattr(self, name) for name in self._choice.given}
        # None: deleted, and about to be assigned.
        leak = {name: getattr(self, name, None) for name in self._choice.leak}
        return dataclasses.replace(self._choice, given=given, leak=leak)

    def _choose(self, chosen: MapArguments) -> None:
        given, leak = dict.fromkeys(chosen.given, 0.0), dict.fromkeys(chosen.leak)
        self._choice = dataclasses.replace(chosen, given=given, leak=leak)
        self._root_names = tuple(chosen.roots)
        for name in MAP:
            self._buffers.pop(name, None)
            self.__dict__.pop(name, None)
        for name, value in chosen.roots.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)  # type: ignore[attr-defined]
            else:
                self.__dict__[name] = value

    @property
    def dynamics(self) -> str:
        """The rule that decided the map: ``"paper"``, ``"explicit"``, or one that matches beta."""
        return self._choice.decided

    @property
    def input_gain(self) -> float:
        """Factor on the input."""
        return self._input_gain

    @input_gain.setter
    def input_gain(self, value: float) -> None:
        with undone_on_error(self):
            self._input_gain = checked_argument("input_gain", value)
            self._check(self.beta, self.threshold)
            self._window_changed()

    def _gain_arguments(self) -> dict[str, Any]:
        return {"input_gain": self._input_gain}

    # -- the surrogate ---------------------------------------------------------------------------

    @property
    def surrogate(self) -> Surrogate:
        """The derivative of the spike as the kernels take it; a window's ends are in units of the membrane."""
        return self._neuron().surrogate

    @property
    def spike_grad(self) -> Any:
        """The function of mem - θ that fires: the one passed, or the current window's."""
        if callable(self._spike_grad):
            return self._spike_grad
        neuron = self._neuron()
        return SpikeGradient(neuron.surrogate.shifted(-neuron.params.v_threshold))

    @spike_grad.setter
    def spike_grad(self, value: Any) -> None:
        if value is not None:
            check_surrogate("spike_grad", value)
        self._spike_grad = recognised(value)
        self._seen = None

    @property
    def window(self) -> WindowName | Window:
        """The window's name, or the window given; set, it takes the place of a ``spike_grad`` that was passed."""
        return self._window

    @window.setter
    def window(self, value: WindowName | Window) -> None:
        value = checked_window(value)
        if self.surrogate_disable:
            raise ValueError(
                "surrogate_disable and window both decide the surrogate gradient; construct another neuron"
            )
        with undone_on_error(self):
            self._window, self._spike_grad = value, None
            self._window_changed()

    @property
    def derived_window(self) -> WindowName | None:
        return self._window if self._spike_grad is None and isinstance(self._window, str) else None

    @property
    def learns_window(self) -> bool:
        return self._learns("beta") or self._learns("threshold")

    @property
    def resets(self) -> bool:
        return self._reset_mechanism != "none"

    def _window_changed(self) -> None:
        if self.learns_window and self.derived_window not in (None, "heuristic") and not self.beta.is_meta:
            self.window_moments()  # raises where nothing converges, which training only falls back for
        self._refresh()

    # -- the parameters --------------------------------------------------------------------------

    @property
    def qif_parameters(self) -> QIFParameters:
        """The neuron's current parameters, without gradient."""
        with torch.no_grad():
            return self._neuron().params

    def _neuron(self) -> Neuron:
        """Parameters and surrogate for the current tensors, derived anew only when one of them has changed."""
        if not torch.compiler.is_compiling() or self._seen is None:
            seen = versions(self._learned())
            if not same_versions(seen, self._seen):
                self._current = self._derive()
                self._seen = seen
        current = self._current
        if not self.learns_window:
            return current
        current = current._replace(params=self._params(*self._numbers(current.constants)))
        # A window given as spike_grad moves with the threshold.
        placed = isinstance(self._spike_grad, SpikeGradient) and isinstance(self._spike_grad.surrogate, Window)
        return current._replace(surrogate=self._followed()) if placed or self.derived_window is not None else current

    def _learned(self) -> Sequence[Any]:
        names = ("beta", "threshold", "graded_spikes_factor", "_reset_mechanism", *self._root_names)
        return [getattr(self, name) for name in names]

    @torch.no_grad()
    def _follow(self) -> Window | Gaussian:
        params = self._params(*self._numbers(self._current.constants))
        if self.derived_window is None:
            return self._spike_grad.surrogate.shifted(params.v_threshold)
        return self.followed_window(self.derived_window, params)

    def _refresh(self) -> None:
        self._seen = None
        self._window_memory.clear()
        if not self.beta.is_meta:
            self._neuron()  # now rather than in the first forward, which torch.compile may be tracing

    @torch.no_grad()
    def _derive(self) -> Neuron:
        self._varying = frozenset(
            name
            for name in NUMBERS
            if is_parametrized(self, name) or not has_storage(getattr(self, name))  # type: ignore[arg-type]
        )
        beta, threshold = numbers = self._numbers()
        params = self._params(beta, threshold, checked=not self.learns_window)
        factor = self.graded_spikes_factor
        graded = isinstance(factor, nn.Parameter) or not has_storage(factor) or bool((factor != 1).any())
        surrogate = self._window if self._spike_grad is None else self._spike_grad
        if isinstance(surrogate, SpikeGradient):
            surrogate = surrogate.surrogate.shifted(params.v_threshold)
        elif self.derived_window is not None and not self.learns_window:
            near_one = beta.clamp(max=MAX_BETA) if isinstance(beta, Tensor) else min(beta, MAX_BETA)
            surrogate = self.derive_window(self.derived_window, self._params(near_one, threshold))
            surrogate = on_device(surrogate, self.beta.device)
        constants = tuple(None if self._learns(name) else now for name, now in zip(NUMBERS, numbers, strict=True))
        used = ("threshold", "beta") if self._choice.matches_leak else ("threshold", *self._root_names)
        values = {name: getattr(self, name) for name in used}
        spread = tuple(name for name, value in values.items() if isinstance(value, Tensor) and value.numel() > 1)
        return Neuron(params, surrogate, graded, constants, spread)

    def _params(self, beta: Any, threshold: Any, checked: bool = False) -> QIFParameters:
        """The parameters; unless they are checked, a learned threshold is kept where the membrane is stable."""
        return build_parameters(
            {name: getattr(self, name) for name in self._root_names}, threshold, beta=beta, curvature=self.curvature,
            reset=reset_of(self._reset_mechanism), input_gain=self._input_gain, rebound=self._choice.rebound,
            checked=checked, learned_threshold=not checked and self._learns("threshold"),
        )  # fmt: skip

    def _numbers(self, known: Sequence[Any] = (None, None)) -> tuple[Any, ...]:
        """beta and threshold as the core takes them, unless they are known already."""
        return tuple(self._number(name) if now is None else now for name, now in zip(NUMBERS, known, strict=True))

    def _number(self, name: str) -> Any:
        """A learned number as a tensor, beta kept in its range; a constant one as a float, which the kernels take.

        A constant is the number that was passed, in float32, where its buffer holds that rounded to half precision.
        """
        buffer, given = getattr(self, name), self._given[name]
        wide = self._used(name, buffer)
        if self._learns(name):
            return wide.clamp(0, MAX_BETA) if name == "beta" else wide
        if wide.numel() != 1:
            return wide
        if buffer.dtype in (torch.float16, torch.bfloat16) and isinstance(given, float):
            passed = torch.tensor(given, dtype=torch.float32, device="cpu")
            if passed.to(buffer.dtype).item() == wide.item():
                return passed.item()
        return wide.item()

    def _used(self, name: str, tensor: Tensor) -> Tensor:
        """The number that the neuron uses where ``tensor`` is its beta or threshold, in at least float32."""
        wide = _wide(tensor)
        return wide if name != "beta" or self._no_leak_as is None else matched_leak(wide, self._no_leak_as)

    def _check(self, beta: Tensor, threshold: Tensor) -> None:
        """Refuse a beta and a threshold that the constructor would refuse."""
        self._params(self._used("beta", beta).detach(), self._used("threshold", threshold).detach(), checked=True)

    def _learns(self, name: str) -> bool:
        # Among the parameters functional_call puts its tensors, too.
        return name in self._parameters or name in self._varying or bool(getattr(self, name).requires_grad)

    # -- moving and loading ----------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._refresh()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mine = [getattr(self, name) for name in NUMBERS]
        loaded = [state_dict.get(prefix + name, value) for name, value in zip(NUMBERS, mine, strict=True)]
        fits = all(new.shape == old.shape for new, old in zip(loaded, mine, strict=True))
        try:
            if fits and not self.learns_window:
                self._check(*loaded)
            # Leaky's checkpoints say "subtract", its default; the mechanism stays the one constructed.
            mechanism: Tensor = self.reset_mechanism_val.clone()  # type: ignore[has-type]
            self._settled = False
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.reset_mechanism_val = mechanism
            self._refresh()
        except ValueError as error:
            args[-1].append(f"{prefix.rstrip('.') or 'QIF'}: {error}")
        finally:
            self._settled = True


def reset_of(mechanism: str) -> str:
    """The core's name for a reset mechanism; under ``"none"`` the threshold is out of reach."""
    return "soft" if mechanism == "subtract" else "hard"


def check_leak(chosen: MapArguments, learn_beta: bool) -> None:
    """Refuse to match or learn a leak where there is none.

    Raises:
        ValueError: A leak is needed and ``beta`` was not passed, or it is to be learned and the map is given.
    """
    chosen.check_beta(f"pass beta (QIF() alone matches {DEFAULT_BETA:g})")
    if learn_beta and not chosen.matches_leak:
        raise ValueError(
            "learn_beta learns the leak that the neuron matches, and this neuron has "
            f"{'the paper' if chosen.decided == 'paper' else 'given'} parameters instead: pass beta and neither "
            "dynamics='paper' nor a, u1, u2, or leave learn_beta False"
        )


def checked_argument(name: str, value: Any) -> Any:
    """Check a number or a tensor, and convert an array or a list to a tensor, as the host does.

    Raises:
        TypeError: It is none of these.
        ValueError: A tensor with gradient for a number that is not learned, or a curvature that is not one number.
    """
    if not isinstance(value, Tensor | str | bytes) and (isinstance(value, Sequence) or np.ndim(value)):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name} must be a number, a tensor, or an array or list of numbers, got {value!r}"
            ) from None
    value = value if type(value) is int else checked_number(name, value)  # the host keeps an integer as one
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"{name} must be real, got {value!r}")
    if name in ("curvature", "input_gain"):
        if isinstance(value, Tensor) and (value.numel() != 1 or value.requires_grad):
            raise ValueError(f"{name} must be one number that is not learned, got {value!r}")
        return float(value)
    if name in MAP and isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(
                f"QIF does not learn {name}: learn_beta and learn_threshold, or a parameter assigned to beta or "
                "threshold, learn what shapes its map. (In SpikingJelly, ParametricQIFNode learns a, u1 and u2.)"
            )
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())
    return value


def _wide(tensor: Tensor) -> Tensor:
    """In at least float32: the host keeps an integer threshold as an integer, and half() rounds beta."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def matched_leak(beta: Tensor, no_leak_as: float) -> Tensor:
    """The leak that a map matches, elementwise, for a beta that Leaky clamps to between 0 and 1.

    Args:
        beta: Any beta.
        no_leak_as: The leak in place of a beta of 1 or more, which is none.
    """
    return torch.where(beta >= 1, torch.full_like(beta, no_leak_as), beta).clamp(min=0)


def detached(value: Any) -> Any:
    """A number as it is, a tensor without gradient, in at least float32."""
    return _wide(value.detach()) if isinstance(value, Tensor) else value
