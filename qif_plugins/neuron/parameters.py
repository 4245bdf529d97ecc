"""Parameters of the discretized quadratic integrate-and-fire neuron.

The map of one time step, from the membrane after the reset, v[t-1], and the input x[t]::

    f(v) = a (v - u1)(v - u2)          without rebound: below u1 its tangent there, a (u1 - u2)(v - u1)
    h[t] = f(v[t-1]) + g x[t]          charge, g the input gain
    s[t] = 1 if h[t] >= theta else 0   fire
    v[t] = v_reset if s[t] else h[t]   hard reset
    v[t] = h[t] - theta s[t]           soft reset; without rebound min(h[t] - theta s[t], theta)

Source: Jahns et al., *Discretized Quadratic Integrate-and-Fire Neuron Model for Deep Spiking Neural
Networks*, arXiv 2510.05168; the input gain, the map without rebound and :meth:`QIFParameters.matching_lif` are this
package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.torch_backend import charge, slope, subtracted
from ..support.names import check_known
from ..support.numbers import checked_number, number

Number = float | Tensor
"""A float, or a tensor that broadcasts to one time step of the input (per channel, per neuron)."""

RESETS = ("hard", "soft")


@dataclass(frozen=True, eq=False)
class QIFParameters:
    """The numbers that define a discrete QIF neuron, validated on construction.

    Every number may be a float or a tensor that broadcasts to one time step of the input, such as
    ``[C, 1, 1]`` for one value a channel of ``[N, C, H, W]``; tensors are checked elementwise.

    Args:
        a: Curvature of the map, > 0. Default 0.25.
        u1: First root of the map. Default 0.
        u2: Second root of the map. Default 0.5.
        v_threshold: Firing threshold θ. It must lie below the unstable fixed point of the map, or the
            membrane runs away before it can spike. Default 1.
        v_reset: Membrane after a spike under ``reset="hard"``. ``None`` (default) means ``u1``, so
            that f(v_reset) = 0. It must lie in the basin of the resting point.
        reset: ``"hard"`` sets the membrane to ``v_reset``; ``"soft"`` subtracts the threshold. With rebound a soft
            reset leaves the membrane unbounded: a large h stays large after the subtraction, and f squares it.
            Without rebound it leaves at most the threshold, which bounds the membrane.
        input_gain: Factor g on the input. Default 1.
        rebound: Whether the map is the parabola everywhere. Default True: a strongly inhibited membrane, far below the
            vertex (u1 + u2)/2, then rises and may cause a spike. ``False`` continues the map below u1 along its
            tangent, so that it never decreases, and the neuron is a leaky integrator there. The surrogate gradient
            through a hard reset then treats a membrane above the threshold as one at the threshold. ``False`` needs
            u2 <= u1 <= 0.

    Raises:
        ValueError: A number is not finite, ``a <= 0``, the map has no fixed point, the threshold is
            not below the unstable fixed point (the message names both), ``v_reset`` is outside the
            basin of the resting point, ``reset`` is unknown, or ``rebound=False`` does not allow the roots.
        TypeError: A number is neither real nor a floating-point tensor.
    """

    a: Number = 0.25
    u1: Number = 0.0
    u2: Number = 0.5
    v_threshold: Number = 1.0
    v_reset: Number | None = None
    reset: Literal["hard", "soft"] = "hard"
    input_gain: Number = 1.0
    rebound: bool = True

    def __post_init__(self) -> None:
        self._normalise()
        self._check()

    @classmethod
    def unchecked(cls, **numbers: Any) -> QIFParameters:
        """Construct without the checks, and so without reading any tensor back from its device.

        Use this for parameters that are valid by construction, such as those of
        ``ParametricQIFNode`` inside a training step.

        Args:
            **numbers: The constructor's arguments.

        Returns:
            The parameters.

        Raises:
            TypeError: The constructor does not have this argument.
        """
        self = object.__new__(cls)
        for name, default in _DEFAULTS.items():
            object.__setattr__(self, name, numbers.pop(name, default))
        if numbers:
            raise TypeError(f"QIFParameters has no field named {', '.join(sorted(numbers))}")
        self._normalise()
        return self

    @classmethod
    def matching_lif(
        cls,
        beta: Number,
        v_threshold: Number = 1.0,
        curvature: float = 0.5,
        input_gain: Number = 1.0,
        v_rest: Number = 0.0,
        v_reset: Number | None = None,
        reset: Literal["hard", "soft"] = "hard",
        *,
        rebound: bool = True,
        checked: bool = True,
    ) -> QIFParameters:
        """Compute the parameters that match a leaky integrate-and-fire neuron near rest.

        With y = v - v_rest the map is f(v) = v_rest + β y + a y²: LIF with leak β near rest, plus the
        quadratic spike initiation. a = c (1 - β) / (θ - v_rest) puts the unstable fixed point at
        v_rest + (θ - v_rest) / c. Without rebound the map below u1 is LIF's, β y; u1 is 0 if ``v_rest`` is 0.

        Args:
            beta: Share β of its membrane that the LIF neuron keeps in a step, 0 <= β < 1; 1 - 1/tau for SpikingJelly's
                LIFNode.
            v_threshold: Firing threshold θ, above ``v_rest``. Default 1.
            curvature: Place c of the threshold between the resting point (0) and the unstable fixed point (1),
                0 < c < 1. Default 0.5.
            input_gain: Factor on the input; 1/tau for LIFNode with ``decay_input``. Default 1.
            v_rest: Potential that the LIF neuron leaks to. Default 0.
            v_reset: As in the constructor, but ``None`` means ``v_rest``.
            reset: As in the constructor.
            rebound: As in the constructor; ``False`` needs a ``v_rest`` of at least 0.
            checked: Whether to check the numbers. ``False`` reads no tensor back from its device (with a
                float ``v_rest``), for a β and θ that are kept in range while they are learned. Default True.

        Returns:
            The matched parameters.

        Raises:
            ValueError: β or c is outside its range, θ or ``v_rest`` is not finite, θ is not above ``v_rest``,
                ``v_rest`` is below 0 without rebound, or the matched map has no real roots u1, u2.
            TypeError: A number is neither real nor a tensor.
        """
        beta, v_threshold, v_rest = (
            checked_number(name, value)
            for name, value in (("beta", beta), ("v_threshold", v_threshold), ("v_rest", v_rest))
        )
        curvature = checked_number("curvature", curvature, "a number between 0 and 1")
        for name, value in (("v_threshold", v_threshold), ("v_rest", v_rest)):
            if checked and not holds_everywhere(value, is_finite):
                raise ValueError(f"{name} must be finite, got {number(value)}")
        if checked and not holds_everywhere(beta, lambda b: (b >= 0) & (b < 1)):
            raise ValueError(
                f"matching a LIF neuron needs 0 <= beta < 1, got beta={number(beta)}. A neuron without leak "
                "(beta = 1) has no resting point for a QIF map to match; pass a beta just below 1, or a, u1, u2."
            )
        if not 0 < curvature < 1:
            raise ValueError(
                f"curvature must lie between 0 and 1, got {curvature}: at 1 or above the threshold would "
                "not be below the unstable fixed point. The default is 0.5."
            )
        reach = v_threshold - v_rest
        if checked and not all_positive(reach):
            raise ValueError(
                f"v_threshold={number(v_threshold)} must lie above the resting potential v_rest={number(v_rest)}."
            )
        if checked and not rebound and not holds_everywhere(v_rest, lambda rest: rest >= 0):
            raise ValueError(
                f"a map without rebound needs u2 <= u1 <= 0, and so a leak to 0 or above, got v_rest={number(v_rest)}: "
                "match it by the parabola (rebound=True, dynamics='lif')."
            )
        a = curvature * (1 - beta) / reach
        # Roots u1 >= u2 of v_rest + β y + a y².
        if holds_everywhere(v_rest, lambda r: r == 0):
            # By division alone, as this is done at every step while β is learned; finite in its derivative at β = 0.
            upper, lower = v_rest, v_rest - beta / a
        else:
            discriminant = beta * beta - 4 * a * v_rest
            if checked and not holds_everywhere(discriminant, lambda d: d >= 0):
                raise ValueError(
                    f"no real roots u1, u2 match beta={number(beta)} with v_rest={number(v_rest)} and "
                    f"v_threshold={number(v_threshold)}. Shift the potentials so that the neuron rests at 0, or pass a "
                    "larger beta."
                )
            root = _sqrt(discriminant)
            # Not u1 from the product of the roots: it divides by beta + root, which may be 0 where an entry rests at 0.
            upper, lower = v_rest - (beta - root) / (2 * a), v_rest - (beta + root) / (2 * a)
        matched = cls.unchecked(
            a=a, u1=upper, u2=lower, v_threshold=v_threshold, v_reset=v_rest, reset=reset, input_gain=input_gain,
            rebound=rebound,
        )  # fmt: skip
        if checked:
            matched._check_match(beta)
        if v_reset is not None:
            object.__setattr__(matched, "v_reset", v_reset)
            matched._normalise()
        if checked:
            matched._check()
        return matched

    # -- the map ---------------------------------------------------------------------------------

    def map(self, v: Any) -> Any:
        """Compute f(v), in the kernels' order of operations.

        Args:
            v: Membrane after the reset, a float or a tensor.

        Returns:
            The charge that it contributes to the next step, of the broadcast shape.
        """
        return charge(self.a, self.u1, self.u2, v, self.rebound)

    def map_derivative(self, v: Any) -> Any:
        """Compute f'(v) = a (2v - u1 - u2), without rebound at least a (u1 - u2).

        Args:
            v: Membrane after the reset, a float or a tensor.

        Returns:
            The slope of the map there, of the broadcast shape.
        """
        return slope(self.a, self.u1, self.u2, v, self.rebound)

    def after_soft_reset(self, h: Any) -> Any:
        """Compute the membrane that a soft reset leaves after a spike: h - θ, without rebound at most θ.

        Args:
            h: Membrane before the reset, a tensor.

        Returns:
            The membrane after it, of the broadcast shape.
        """
        return subtracted(h, self.v_threshold, self.rebound)

    def fixed_points(self) -> tuple[Number, Number]:
        """Compute the fixed points of the map without input.

        They are the roots of a u² - (a (u1 + u2) + 1) u + a u1 u2. At the lower one f' = 1 - √D, at the upper
        one f' = 1 + √D > 1, where D is the discriminant.

        Returns:
            ``(resting, unstable)``: floats, or tensors if one of the numbers is a tensor.
        """
        half = self._linear_term() / 2
        root = _sqrt(half * half - self.a * self.u1 * self.a * self.u2)
        unstable = (half + root) / self.a
        # The lower root through the product of the roots, u1 u2, where half - root would cancel.
        if isinstance(half, Tensor):
            resting: Number = torch.where(half > 0, self.u1 * self.u2 / unstable, (half - root) / self.a)
        else:
            resting = self.u1 * self.u2 / unstable if half > 0 else (half - root) / self.a
        return resting, unstable

    @property
    def is_stable(self) -> bool:
        """Return whether the resting point is stable, |f'| < 1, in every element."""
        return holds_everywhere(self.map_derivative(self.fixed_points()[0]), lambda slope: abs(slope) < 1)

    # -- plumbing --------------------------------------------------------------------------------

    def numbers(self) -> dict[str, Number]:
        """Return the numeric fields by name, with ``v_reset`` resolved."""
        return {name: getattr(self, name) for name in _DEFAULTS if name not in ("reset", "rebound")}

    def with_numbers(self, **numbers: Number) -> QIFParameters:
        """Return the same kind of neuron with other numbers, unchecked as by :meth:`unchecked`."""
        return QIFParameters.unchecked(**(self.numbers() | numbers), reset=self.reset, rebound=self.rebound)

    @property
    def is_uniform(self) -> bool:
        """Whether every number is a plain float."""
        return not any(isinstance(value, Tensor) for value in self.numbers().values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QIFParameters):
            return NotImplemented
        return (self.reset, self.rebound) == (other.reset, other.rebound) and all(
            same_number(mine, theirs)
            for mine, theirs in zip(self.numbers().values(), other.numbers().values(), strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.reset, self.rebound, *(v for v in self.numbers().values() if not isinstance(v, Tensor))))

    def _linear_term(self) -> Number:
        return self.a * (self.u1 + self.u2) + 1

    def _normalise(self) -> None:
        if self.v_reset is None:
            object.__setattr__(self, "v_reset", self.u1)
        for name, value in self.numbers().items():
            if isinstance(value, Tensor):
                if not value.is_floating_point():
                    raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):  # older TorchDynamo traces no union
                object.__setattr__(self, name, checked_number(name, value))
            else:
                object.__setattr__(self, name, float(value))

    @torch.no_grad()
    def _check_match(self, beta: Number) -> None:
        """Refuse a leak whose map cannot be represented in floating point, with a message about the leak."""
        numbers = (self.a, self.u1, self.u2)
        if any(isinstance(value, Tensor) and value.is_meta for value in numbers):
            return
        representable = all(holds_everywhere(value, is_finite) for value in numbers) and all_positive(self.a)
        if not (representable and all_positive(self.fixed_points()[1] - self.v_threshold)):
            raise ValueError(
                f"no map in floating point matches beta={number(beta)} with v_threshold={number(self.v_threshold)}: "
                "the leak is too near 1, or the threshold out of scale. Pass a smaller beta, or scale the potentials."
            )

    @torch.no_grad()
    def _check(self) -> None:
        check_known("reset", RESETS, self.reset)
        numbers = self.numbers()
        if any(isinstance(value, Tensor) and value.is_meta for value in numbers.values()):
            return  # no values to check
        for name, value in numbers.items():
            if not holds_everywhere(value, is_finite):
                raise ValueError(f"{name} must be finite, got {number(value)}")
        if not all_positive(self.a):
            raise ValueError(
                f"a must be positive, got a={number(self.a)}: the map must open upwards to initiate spikes"
            )
        half = self._linear_term() / 2
        if not all_positive(half * half - self.a * self.u1 * self.a * self.u2):
            raise ValueError(
                f"the map with a={number(self.a)}, u1={number(self.u1)}, u2={number(self.u2)} has no resting point: "
                "every membrane runs away without input. Decrease a, or move u1 or u2 towards 0."
            )
        _, unstable = self.fixed_points()
        if not all_positive(unstable - self.v_threshold):
            raise ValueError(
                f"v_threshold={number(self.v_threshold)} is not below the unstable fixed point {number(unstable)} of "
                f"the map (a={number(self.a)}, u1={number(self.u1)}, u2={number(self.u2)}): the membrane would run "
                "away before it spikes. Lower v_threshold, or decrease a."
            )
        assert self.v_reset is not None
        # f(u1) = 0 >= u1, so that u1 lies at or below the resting point, or beyond the unstable one.
        if not self.rebound and not (
            holds_everywhere(self.u1 - self.u2, lambda d: d >= 0)
            and holds_everywhere(self.u1, lambda u: u <= 0)
            and all_positive(unstable - self.u1)
        ):
            raise ValueError(
                f"a map without rebound needs u2 <= u1 <= 0, got u1={number(self.u1)}, u2={number(self.u2)}: it bends "
                "at u1, which must lie on its rising branch and not above the resting point. Keep the parabola "
                "(rebound=True; dynamics='lif' of a node), or match a leak to a resting potential of 0 or above."
            )
        if self.reset == "hard":
            # f(mirror) = f(unstable)
            mirror = self.u1 + self.u2 - unstable if self.rebound else -math.inf
            if not (all_positive(unstable - self.v_reset) and all_positive(self.v_reset - mirror)):
                raise ValueError(
                    f"v_reset={number(self.v_reset)} lies outside the basin of the resting point, "
                    f"({number(mirror)}, {number(unstable)}): the membrane would run away after every spike."
                )


# As plain values: TorchDynamo does not trace dataclasses.fields.
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(QIFParameters)}


def holds_everywhere(value: Any, condition: Callable[[Any], Any]) -> bool:
    """Return whether ``condition`` holds for a number, or for every element of a tensor."""
    return bool(torch.all(condition(value.detach()))) if isinstance(value, Tensor) else bool(condition(value))


def all_positive(value: Any) -> bool:
    """Return whether a number, or every element of a tensor, is above 0."""
    return holds_everywhere(value, lambda number: number > 0)


def is_finite(value: Any) -> Any:
    """Return whether a number is neither infinite nor NaN; for a tensor elementwise."""
    return torch.isfinite(value) if isinstance(value, Tensor) else math.isfinite(value)


def _sqrt(value: Any) -> Any:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def same_number(mine: Number, theirs: Number) -> bool:
    """Return whether two numbers are equal; tensors must be equal in every element and on the same device."""
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return (
            isinstance(mine, Tensor)
            and isinstance(theirs, Tensor)
            and mine.device == theirs.device
            and torch.equal(mine, theirs)
        )
    return mine == theirs
