"""Learned a, u1 and u2, parametrized so that no optimizer step leaves the region where the neuron works.

The region, for a threshold θ > 0: the threshold lies below the unstable fixed point, f(θ) < θ; the resting point is
stable, D = (a(u1+u2) + 1)² - 4a²u1u2 < 4; and, under a hard reset, a reset membrane stays below the
threshold without input, f(v_reset) < θ, which keeps v_reset in the basin of the resting point. Each bounds a
from above; with S = u1 + u2 and δ = u1 - u2::

    1/a > (θ - u1)(θ - u2) / θ
    1/a > (v_reset - u1)(v_reset - u2) / θ
    1/a > (S + √(S² + 3δ²)) / 3

So, with unconstrained parameters w1, w2, r::

    u = θ sinh(M tanh(w/M));    a = (ε + (1 - 2ε) sigmoid(r)) / max(the three right sides)

which is finite in float32 for every w and r. Near 0, u is θ w: a step of the optimizer moves u in units of θ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qif_plugins.neuron.following import WindowMemory, has_storage
from qif_plugins.neuron.moments import membrane_moments
from qif_plugins.neuron.parameters import Number, QIFParameters
from qif_plugins.neuron.surrogate import Gaussian, Surrogate, Window
from qif_plugins.support.text import number

from ._common import RESOLVED, QIFNeuron

__all__ = ["ParametricQIFNeuron"]

REACH = 14.0
"""M: |u| stays below θ sinh(14), about 6·10⁵ θ, far from float32's limits."""
MARGIN = 1e-5
"""ε: the relative distance from the region's border, above the rounding of float32; matches leaks up to tau = 5·10⁴."""
LEARNED = ("a", "u1", "u2")
FIXED = ("v_threshold", "v_reset", "input_gain")
ELSEWHERE = ("w", "init_tau")
"""What ParametricLIFNode's users may look for."""


class ParametricQIFNeuron(QIFNeuron):
    """Mixed in before a version's QIFNode.

    Attributes:
        raw_a: The unconstrained parameter behind a, one value or ``[channels]``.
        raw_u1: The same behind u1.
        raw_u2: The same behind u2.
    """

    raw_a: nn.Parameter
    raw_u1: nn.Parameter
    raw_u2: nn.Parameter
    raw_names: ClassVar[tuple[str, ...]] = ("raw_a", "raw_u1", "raw_u2")
    channels: int | None
    _placed: Window | Gaussian | None = None

    def _configure(self, params: QIFParameters, *args: Any) -> dict[str, Any]:
        unconstrained(params)  # says what is wrong before the window's derivation trips over it
        return super()._configure(params, *args)

    def _learn(self, channels: int | None) -> None:
        """Create the parameters at the numbers given to the constructor."""
        if channels is not None and not (isinstance(channels, int) and channels > 0):
            raise ValueError(f"channels must be a positive whole number or None, got {channels!r}")
        self.channels = channels
        for name, value in unconstrained(self._params).items():
            raw = torch.full(() if channels is None else (channels,), value.item())  # in the default dtype
            self.register_parameter(name, nn.Parameter(raw))
        self._window_memory = WindowMemory()
        if self._follows:
            self._place_window()

    # -- the parameters --------------------------------------------------------------------------

    def _has_raw(self) -> bool:
        # As attributes: a parametrization, or a tensor in its place, takes one out of _parameters.
        return all(hasattr(self, name) for name in self.raw_names)

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, u1, u2 in float32 (float64 in a float64 module), with gradient."""
        if not self._has_raw():
            # The host's constructor runs before there are parameters.
            return self._params.a, self._params.u1, self._params.u2  # type: ignore[return-value]
        dtype = torch.promote_types(self.raw_a.dtype, torch.float32)
        r, w1, w2 = (raw.to(dtype) for raw in (self.raw_a, self.raw_u1, self.raw_u2))
        return constrained(r, w1, w2, self._params)

    @property
    def a(self) -> Tensor:
        """Curvature of the map, as learned so far; one value or ``[channels]``."""
        return self._numbers()[0]

    @property
    def u1(self) -> Tensor:
        """First root of the map, as learned so far."""
        return self._numbers()[1]

    @property
    def u2(self) -> Tensor:
        """Second root of the map, as learned so far."""
        return self._numbers()[2]

    @property
    def dynamics(self) -> str:
        """``"learned"``."""
        return "learned"

    @property
    def params(self) -> QIFParameters:
        """The neuron as the core describes it; tensors with gradient, one value or ``[channels]``."""
        a, u1, u2 = self._numbers()
        return self._with(a, u1, u2)

    def _with(self, a: Tensor, u1: Tensor, u2: Tensor) -> QIFParameters:
        fixed = {name: getattr(self._params, name) for name in ("v_threshold", "v_reset", "reset", "input_gain")}
        return QIFParameters.unchecked(a=a, u1=u1, u2=u2, **fixed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ELSEWHERE and name not in self.__dict__.get("_parameters", ()):
            raise ValueError(
                f"{type(self).__name__} has no {name}: it learns {', '.join(LEARNED)}, in raw_a, raw_u1 and raw_u2. "
                "Construct one with another init_tau, or let swap() convert a ParametricLIFNode, which keeps its w"
            )
        super().__setattr__(name, value)

    def _assign(self, name: str, value: Any, store: Callable[[], None]) -> None:
        """Take over the threshold, the reset or the gain; what is learned is not assigned."""
        self._refuse(name, value, f"it learns a, u1 and u2, which {name} does not decide any more")
        if name == "v_reset":
            self._replace(**({"reset": "soft"} if value is None else {"v_reset": float(value), "reset": "hard"}))
        else:
            self._replace(**{name: float(value)})
        store()

    def _refuse(self, name: str, value: Any, reason: str, fixed: tuple[str, ...] = FIXED) -> None:
        if name not in fixed:
            error = AttributeError if name in RESOLVED else ValueError  # the first for what is a read-only property
            raise error(
                f"{name} of a {type(self).__name__} cannot be assigned: {reason}. Construct another, or take QIFNode"
            )
        if isinstance(value, Tensor) and (value.requires_grad or value.numel() > 1 or isinstance(value, nn.Parameter)):
            raise ValueError(
                f"{type(self).__name__} learns beside one fixed {name}, a number; QIFNode learns its threshold and "
                "takes one a neuron"
            )

    def _replace(self, **changes: Any) -> None:
        """Assign numbers that are not learned; a, u1 and u2 keep their values."""
        if all(getattr(self._params, name) == value for name, value in changes.items()):
            return
        learned = {name: value.detach().double() for name, value in zip(LEARNED, self._numbers(), strict=True)}
        kept = {field.name: getattr(self._params, field.name) for field in dataclasses.fields(self._params)}
        params = QIFParameters(**{**kept, **learned, **changes})
        raw = unconstrained(params)
        if self._follows:
            self._check_closure(params)
        with torch.no_grad():
            for name, value in raw.items():
                getattr(self, name).copy_(value)
        self._params = dataclasses.replace(self._params, **changes)
        self._link = None
        if self._follows:
            self._window_memory.clear()
            self._place_window()

    # -- the window ------------------------------------------------------------------------------

    @property
    def _follows(self) -> bool:
        return self.derived_window not in (None, "heuristic")

    @property
    def learns_window(self) -> bool:
        """Whether the window follows learned parameters, which needs the moments of the input."""
        return self._follows

    @property
    def moments(self) -> Tensor:
        """Mean and deviation of the membrane behind the window, ``[2]`` or ``[2, channels]``, for the parameters as
        they are now.
        """
        return torch.stack(torch.broadcast_tensors(*self.followed_moments(self.params))).float()

    def _window_changed(self) -> None:
        if self._follows:
            self._check_closure(self._with(*(value.detach().double() for value in self._numbers())))
            self._window_memory.clear()
            self._place_window()
        else:
            super()._window_changed()

    def _check_closure(self, params: QIFParameters) -> None:
        """Refuse what training only falls back for.

        Raises:
            MomentClosureError: The closure does not converge for ``params``.
        """
        if "membrane_mean" not in self.measured_moments:
            input_mean, input_std = self.input_moments() if self.measured_moments else (0.0, params.v_threshold)
            membrane_moments(params, input_std, input_mean)

    def input_moments(self) -> tuple[Number, Number]:
        mean, std = super().input_moments()
        return (mean, std) if self.channels is None else (_one_dimension(mean), _one_dimension(std))

    def _followed(self) -> Window | Gaussian:
        """The window of the current parameters, kept until one changes."""
        parameters = [getattr(self, name) for name in self.raw_names]
        return self._window_memory(parameters, lambda: self.followed_window(self.window, self.params))  # type: ignore[arg-type]

    def _place_window(self) -> None:
        """Show the window in ``surrogate_function``, where a host's own time step and the user find it."""
        window = self._followed()
        if window is not self._placed and all(has_storage(value) for value in window.coefficients()):
            self._show_window(window, self._params.v_threshold)
            self._placed = window

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        if self._follows:  # the window's numbers move to the module's device with it
            self._window_memory.clear()
            self._place_window()
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "moments", None)  # of versions whose window depended on how often forward had run
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._link = None
        if self._follows:
            self._window_memory.clear()
            self._place_window()

    def reset(self) -> None:
        super().reset()
        self._window_memory.doubt()

    def detach(self) -> None:
        super().detach()
        self._window_memory.doubt()

    # -- running ---------------------------------------------------------------------------------

    def _before_forward(self) -> None:
        if self._follows and not torch.compiler.is_compiling():  # which has no use for what is shown
            self._place_window()

    def _neuron(self, x_seq: Tensor, single: bool = False) -> tuple[QIFParameters, Surrogate]:
        params = self.params
        surrogate = self._followed() if self._follows else self._surrogate(params.v_threshold)
        if self.channels is None:
            return params, surrogate
        step = x_seq.shape if single else x_seq.shape[1:]
        if self.channels not in step[:2][-1:]:
            raise ValueError(
                f"channels={self.channels}, and one time step of the input, [N, channels, *], has shape {list(step)}"
            )
        # [C] against one step [N, C, *]: one dimension of size 1 for each after the channels.
        shape = (self.channels, *[1] * max(x_seq.dim() + single - 3, 0))
        params = self._with(*(value.view(shape) for value in (params.a, params.u1, params.u2)))  # type: ignore[union-attr]
        if isinstance(surrogate, Window | Gaussian):
            surrogate = surrogate.mapped(lambda value: _shaped(value, shape))
        return params, surrogate


def constrained(r: Tensor, w1: Tensor, w2: Tensor, fixed: QIFParameters) -> tuple[Tensor, Tensor, Tensor]:
    """a, u1, u2 for the unconstrained parameters; see the module's docstring."""
    theta: Any = fixed.v_threshold
    u1, u2 = (theta * torch.sinh(REACH * torch.tanh(w / REACH)) for w in (w1, w2))
    a = (MARGIN + (1 - 2 * MARGIN) * torch.sigmoid(r)) / _bound(u1, u2, fixed)
    return a, u1, u2


def unconstrained(params: QIFParameters) -> dict[str, Tensor]:
    """The unconstrained parameters that give ``params``, in float64.

    Raises:
        ValueError: ``params`` lie outside the region of the module's docstring.
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
    """What 1/a must exceed."""
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


def _one_dimension(value: Number) -> Number:
    return value.flatten() if isinstance(value, Tensor) else value


def _shaped(value: Number, shape: tuple[int, ...]) -> Number:
    return value.view(shape) if isinstance(value, Tensor) and value.dim() else value
