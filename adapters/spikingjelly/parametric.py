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

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from qif_plugins.moments import MomentClosureError, closure_step, membrane_moments
from qif_plugins.parameters import Number, QIFParameters
from qif_plugins.surrogate import Surrogate, Window, unbiased_window

from ._common import QIFNeuron, show

__all__ = ["ParametricQIFNeuron"]

REACH = 14.0
"""M: |u| stays below θ sinh(14), about 6·10⁵ θ, far from float32's limits."""
MARGIN = 1e-5
"""ε: the relative distance from the region's border, above the rounding of float32; matches leaks up to tau = 5·10⁴."""
CLOSURE_STEPS = 2
"""Iterations of the closure a training step. The closure contracts faster than an optimizer moves the parameters."""
MOMENT_LIMIT = 8.0
"""Moments beyond this many θ come from a closure that diverges; the last good ones are kept."""
LEARNED = ("a", "u1", "u2")


class ParametricQIFNeuron(QIFNeuron):
    """Mixed in before a version's QIFNode.

    Attributes:
        raw_a, raw_u1, raw_u2: The unconstrained parameters, one value or ``[channels]``.
        moments: Mean and deviation of the membrane, ``[2]`` or ``[2, channels]``, behind the window.
    """

    raw_a: nn.Parameter
    raw_u1: nn.Parameter
    raw_u2: nn.Parameter
    moments: Tensor
    training: bool
    channels: int | None

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
            self.register_parameter(name, nn.Parameter(raw))  # type: ignore[attr-defined]
        self.register_buffer("moments", torch.zeros(2, *self.raw_a.shape, dtype=torch.float32))  # type: ignore[attr-defined]
        if self._follows:
            moments = self._fixed_point(self._params)
            self._set_moments(moments if channels is None else moments.unsqueeze(1).expand(2, channels))

    # -- the parameters --------------------------------------------------------------------------

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, u1, u2 in float32 (float64 in a float64 module), with gradient."""
        if "raw_a" not in self._parameters:  # type: ignore[attr-defined]
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
    def params(self) -> QIFParameters:
        """The neuron as the core describes it; tensors with gradient, one value or ``[channels]``."""
        a, u1, u2 = self._numbers()
        return self._with(a, u1, u2)

    def _with(self, a: Tensor, u1: Tensor, u2: Tensor) -> QIFParameters:
        fixed = {name: getattr(self._params, name) for name in ("v_threshold", "v_reset", "reset", "input_gain")}
        return QIFParameters.unchecked(a=a, u1=u1, u2=u2, **fixed)

    def _replace(self, **changes: Any) -> None:
        """Assign numbers that are not learned; a, u1 and u2 keep their values."""
        if all(getattr(self._params, name) == value for name, value in changes.items()):
            return
        learned = {name: value.detach().double() for name, value in zip(LEARNED, self._numbers(), strict=True)}
        kept = {field.name: getattr(self._params, field.name) for field in dataclasses.fields(self._params)}
        params = QIFParameters(**{**kept, **learned, **changes})
        raw = unconstrained(params)
        moments = self._fixed_point(params) if self._follows else None
        with torch.no_grad():
            for name, value in raw.items():
                getattr(self, name).copy_(value)
        self._params = dataclasses.replace(self._params, **changes)
        self._link = None
        if moments is not None:
            self._set_moments(moments)

    # -- the window ------------------------------------------------------------------------------

    @property
    def _follows(self) -> bool:
        return self.window in ("unbiased", "paper") and type(self.surrogate_function) is self.analytic_window

    @property
    def learns_window(self) -> bool:
        """Whether the window follows learned parameters, which needs the moments of the input."""
        return self._follows

    def _window_changed(self) -> None:
        if self._follows:
            self._set_moments(self._fixed_point(self._with(*(value.detach().double() for value in self._numbers()))))

    def _fixed_point(self, params: QIFParameters) -> Tensor:
        """Where the closure converges for parameters in float64, ``[2]`` or ``[2, channels]``.

        Raises:
            MomentClosureError: Nowhere.
        """
        input_mean, input_std = self._input(params)
        moments = membrane_moments(params, input_std, input_mean)
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in moments])

    def _input(self, params: QIFParameters) -> tuple[Number, Number]:
        """Mean and deviation of the input: measured, or those of tdBN for the threshold of ``params``."""
        return self.input_moments() if self.measured_moments else (0.0, params.v_threshold)

    def _set_moments(self, moments: Tensor) -> None:
        with torch.no_grad():
            self.moments.copy_(moments)
        self._update_window(moments.to(self.moments.device, torch.float32))

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        if self._follows:  # the window's numbers move to the module's device with it
            self._update_window(self.moments.float())
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "moments")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._link = None
        if not self._follows:
            return
        if saved is not None and saved.shape == self.moments.shape:
            self._set_moments(saved)  # after the measured moments, which derive the window anew when they are loaded
            return
        moments = self.moments.float()
        with contextlib.suppress(MomentClosureError):  # then the last good ones stay
            moments = self._fixed_point(self._with(*(value.detach().double() for value in self._numbers())))
        self._set_moments(moments)

    @torch.no_grad()
    def _advance(self, params: QIFParameters) -> None:
        """Let the moments follow the parameters by a few iterations, without reading anything from the device."""
        theta: Any = self._params.v_threshold
        input_mean, input_std = self._input(params)
        before = self.moments.float()
        mean, std = before[0], before[1]
        for _ in range(CLOSURE_STEPS):
            mean, std = closure_step(params, mean, std, input_std, input_mean)
        good = (mean.abs() < MOMENT_LIMIT * theta) & (std < MOMENT_LIMIT * theta)  # false for NaN
        after = torch.where(good, torch.stack([mean, std]), before)
        self.moments.copy_(after)
        self._update_window(after)

    def _update_window(self, moments: Tensor) -> None:
        theta: Any = self._params.v_threshold
        mean, std = moments[0], moments[1]
        if self.window == "paper":
            ends: tuple[Number, Number, Number] = mean - std, mean + std, torch.ones_like(std)
        else:
            ends = unbiased_window(theta, mean, std)
        self.surrogate_function.follow(Window.unchecked(*ends), theta)

    # -- running ---------------------------------------------------------------------------------

    def _neuron(self, x_seq: Tensor, single: bool = False) -> tuple[QIFParameters, Surrogate]:
        params = self.params
        if self.training and self._follows:
            detached = (value.detach() for value in (params.a, params.u1, params.u2) if isinstance(value, Tensor))
            self._advance(self._with(*detached))
        surrogate = self._surrogate(params.v_threshold)
        if self.channels is None:
            return params, surrogate
        # [C] against one step [N, C, *]: one dimension of size 1 for each after the channels.
        shape = (self.channels, *[1] * max(x_seq.dim() + single - 3, 0))
        params = self._with(*(value.view(shape) for value in (params.a, params.u1, params.u2)))  # type: ignore[union-attr]
        if isinstance(surrogate, Window):
            surrogate = Window.unchecked(*(_shaped(value, shape) for value in surrogate.coefficients()))
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
                f"{name}={show(u)} is out of reach for ParametricQIFNode, which learns up to "
                f"{theta * math.sinh(REACH):g} for v_threshold={theta:g}; use QIFNode, or a smaller tau"
            )
        raw[f"raw_{name}"] = REACH * torch.atanh(w)
    bound = _bound(u1, u2, params)
    share = (a * bound - MARGIN) / (1 - 2 * MARGIN)
    if not bool(((share > 0) & (share < 1)).all()):
        raise ValueError(
            f"a={show(a)} is outside the region that ParametricQIFNode learns in, {show(MARGIN / bound)} < a < "
            f"{show((1 - MARGIN) / bound)} for u1={show(u1)}, u2={show(u2)}, v_threshold={theta:g}, "
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


def _shaped(value: Number, shape: tuple[int, ...]) -> Number:
    return value.view(shape) if isinstance(value, Tensor) and value.dim() else value
