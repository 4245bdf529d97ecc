"""The arguments that decide the map of a neuron, by one rule for both hosts and for ``qif window``.

The first of these that was passed decides:

1. ``dynamics``: ``"paper"`` takes the a, u1 and u2 of arXiv 2510.05168, ``"lif"`` matches the leak by the parabola, and
   ``"monotone"`` matches it by a map that is LIF's below rest, so that strong inhibition causes no spike.
2. ``a``, ``u1``, ``u2``, any of them; those left out are the paper's. Together with ``dynamics`` they are refused.
3. A leak: ``tau`` and ``decay_input`` in SpikingJelly, ``beta`` in snnTorch. It is matched by the parabola.
4. Nothing: the leak of :data:`DEFAULT_BETA` is matched, with an input gain of 1.

A leak that was passed but does not decide is set aside, and ``repr`` shows it. A model that passes its own leak can
therefore be given another neuron. After construction the last assignment decides. Only a leak that is assigned to a
neuron with ``dynamics="paper"`` or a given map is refused.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..support.names import check_known
from ..support.numbers import number
from .names import DYNAMICS, MAP, MATCHED, PAPER, DynamicsName
from .parameters import Number, QIFParameters, all_positive, holds_everywhere, is_finite

MIN_DISTANCE = 1e-6
"""Least distance of a matched neuron's learned threshold above the resting point."""
MAX_REACH = 0.99
"""Largest learned threshold of a given map, as a share of the way from the resting to the unstable point."""
DEFAULT_TAU = 2.0
"""Time constant of a SpikingJelly node that matches a leak if none was passed."""
MAX_BETA = 0.9999
"""Upper limit of a learned leak β, and of the β for which a window is derived. The matched map needs β < 1, and its
float32 gradient and its moments need some distance from 1.
"""


@dataclass(frozen=True, eq=False)
class MapArguments:
    """The arguments, passed or assigned since, that could decide the map.

    Attributes:
        dynamics: ``"paper"``, ``"lif"``, ``"monotone"``, or ``None`` if it was left out.
        given: Those of a, u1 and u2 that were passed.
        leak: The arguments of the leak that were passed, by the host's names.
        monotone: Whether a given map is the one that ``dynamics="monotone"`` had before.

    Raises:
        ValueError: An unknown ``dynamics``, or one together with a, u1 or u2.
    """

    dynamics: str | None = None
    given: Mapping[str, Number] = field(default_factory=dict)
    leak: Mapping[str, Any] = field(default_factory=dict)
    monotone: bool = False

    def __post_init__(self) -> None:
        if self.dynamics is None:
            return
        check_known("dynamics", DYNAMICS, self.dynamics, otherwise="pass a, u1, u2")
        if self.given:
            raise ValueError(
                f"dynamics={self.dynamics!r} contradicts {', '.join(self.given)}: both decide the map; pass one of them"
            )

    @property
    def decided(self) -> str:
        """Kind of the map: ``"paper"``, ``"explicit"``, ``"lif"`` or ``"monotone"``."""
        if self.dynamics is not None:
            return self.dynamics
        return "explicit" if self.given else "lif"

    @property
    def matches_leak(self) -> bool:
        """True if the map is matched to a leak."""
        return self.decided in MATCHED

    @property
    def left_open(self) -> bool:
        """True if no argument was passed that decides the map."""
        return self.dynamics is None and not self.given and not self.leak

    @property
    def rebound(self) -> bool:
        """True if the map rebounds, see :class:`QIFParameters`."""
        return not (self.monotone or self.decided == "monotone")

    @property
    def roots(self) -> dict[str, Number]:
        """Values of a, u1 and u2; empty if a leak is matched."""
        return {} if self.matches_leak else {**PAPER, **self.given}

    def check_beta(self, way_out: str) -> None:
        """Refuse to match a leak if ``beta`` is needed but was not passed.

        Args:
            way_out: The advice in the message.

        Raises:
            ValueError: ``beta`` is missing.
        """
        if self.matches_leak and "beta" not in self.leak and not self.left_open:
            matches, shapes = f"dynamics={self.dynamics!r} matches a leak", "curvature shapes the map that beta matches"
            raise ValueError(f"{matches if self.dynamics else shapes}: {way_out}")

    def describe_set_aside(self) -> str:
        """Describe the leak that was passed but does not decide, if any, for ``repr``."""
        shown = ", ".join(f"{name}={number(value)}" for name, value in self.leak.items())
        return f", {shown} set aside" if shown and not self.matches_leak else ""

    def assigned(self, name: str, value: Any, current: QIFParameters | None) -> MapArguments:
        """Return the arguments after an assignment, which decides from now on.

        Args:
            name: The argument that is assigned. After a, u1 or u2 the map is given, and the other two keep their
                current values. ``"dynamics"`` replaces a given map (``"explicit"`` keeps the current map, ``None``
                leaves the map to the other arguments). After an argument of the leak, the leak is matched.
            value: Its value. ``None`` removes an argument of the leak.
            current: The neuron before the assignment; ``None`` suffices for an argument of the leak.

        Raises:
            ValueError: ``dynamics`` is unknown, or a leak would have no effect, since ``dynamics="paper"`` or a, u1, u2
                were given.
        """
        if name == "dynamics" and value != "explicit":
            return MapArguments(value, self.given if value is None else {}, self.leak, value is None and self.monotone)
        if name == "dynamics" and self.decided == "explicit":
            return self
        if name == "dynamics" or name in MAP:
            changed = {} if name == "dynamics" else {name: value}
            present = {root: one_number(getattr(current, root)) for root in MAP}
            return MapArguments(None, present | changed, self.leak, name == "dynamics" and not self.rebound)
        if self.dynamics == "paper" or self.given:
            what = "dynamics='paper'" if self.dynamics else ", ".join(self.given)
            raise ValueError(
                f"{name}={number(value)} would have no effect: the neuron was given {what}, which decides the map. "
                "Assign dynamics='lif' first, and it matches the leak"
            )
        leak = {key: now for key, now in {**self.leak, name: value}.items() if now is not None}
        return MapArguments(self.dynamics, self.given, leak, self.monotone)


def build_parameters(
    roots: Mapping[str, Any],
    v_threshold: Any,
    *,
    beta: Any = None,
    v_rest: Number = 0.0,
    checked: bool = True,
    learned_threshold: bool = False,
    **others: Any,
) -> QIFParameters:
    """Build the neuron that the arguments describe together.

    A learned threshold is clamped to the region in which the membrane is stable. If a leak is matched, the unstable
    point moves with the threshold, which must be at least 1e-6 above the resting point. Otherwise it must be at most
    99 % of the way from the resting to the unstable point. Beyond these limits it gets no gradient.

    Args:
        roots: a, u1 and u2; empty if a leak is matched.
        v_threshold: Threshold θ.
        beta: The leak to match if ``roots`` is empty.
        v_rest: The potential that a matched leak decays to. Default 0.
        checked: Whether to check the numbers. ``False`` reads no tensor back from its device. Default True.
        learned_threshold: Whether the threshold is a tensor that is learned. Default False.
        **others: ``v_reset``, ``reset``, ``input_gain``, ``rebound`` and, if a leak is matched, ``curvature``, see
            :meth:`QIFParameters.matching_lif`.

    Raises:
        ValueError: :class:`QIFParameters` refuses the parameters.
    """
    if not roots:
        if learned_threshold:
            v_threshold = v_threshold.clamp(min=v_rest + MIN_DISTANCE)
        return QIFParameters.matching_lif(beta, v_threshold, v_rest=v_rest, checked=checked, **others)
    others.pop("curvature", None)
    if learned_threshold:
        resting, unstable = QIFParameters.unchecked(**roots).fixed_points()
        v_threshold = v_threshold.clamp(max=resting + MAX_REACH * (unstable - resting))
    make = QIFParameters if checked else QIFParameters.unchecked
    return make(**roots, v_threshold=v_threshold, **others)


def map_resting_at(v_rest: Any) -> DynamicsName:
    """Choose the map with which :func:`~qif_plugins.swap` matches a leak; towards a rest below 0 only the parabola can.

    Args:
        v_rest: The potential that the neuron leaks to; ``None`` for 0.
    """
    if v_rest is None:
        return "monotone"
    known = isinstance(v_rest, int | float | Tensor) and not (isinstance(v_rest, Tensor) and v_rest.is_meta)
    return "monotone" if known and holds_everywhere(v_rest, lambda rest: rest >= 0) else "lif"


def warn_of_rebound(before: MapArguments, after: MapArguments, subtracts: bool, way_out: str) -> None:
    """Warn where an assignment takes away the bound that a map without rebound gives the subtracting reset.

    Args:
        before: The arguments before it.
        after: Those after it.
        subtracts: Whether the reset subtracts the threshold.
        way_out: The assignment that resets to rest instead.
    """
    if subtracts and after.rebound and not before.rebound:
        warnings.warn(
            "the map is the parabola now, under which a reset that subtracts the threshold no longer bounds the "
            f"membrane: it may run away. Assign {way_out} to reset to rest, or dynamics='monotone' for the bound.",
            stacklevel=4,
        )


@dataclass(frozen=True, eq=False)
class NodeArguments:
    """The numbers that SpikingJelly's nodes are given, except for the threshold, which may be a module's parameter.

    Attributes:
        map: The arguments that decide the map.
        v_reset: Membrane after a spike, and the potential that a matched leak decays to; ``None`` for the soft reset.
        input_gain: Factor on the input; ``None`` if it was left out.
        kept_gain: The gain of the leak that was matched before a, u1 or u2 was assigned.
    """

    map: MapArguments = field(default_factory=MapArguments)
    v_reset: Any = 0.0
    input_gain: Any = None
    kept_gain: Any = 1.0

    def assigned(self, name: str, value: Any, current: QIFParameters, open_to_leak: bool) -> NodeArguments:
        """Return the arguments after an assignment, see :meth:`MapArguments.assigned` and :meth:`resting_at`.

        Raises:
            ValueError: As in :meth:`MapArguments.assigned`.
        """
        if name in ("v_reset", "input_gain"):
            changed = dataclasses.replace(self, **{name: value})
            return changed.resting_at(value, open_to_leak) if name == "v_reset" else changed
        if name == "v_threshold":
            return self
        decides = self.map.assigned(name, value, current)
        matched = decides.decided == "explicit" and self.map.matches_leak
        return dataclasses.replace(self, map=decides, kept_gain=current.input_gain if matched else self.kept_gain)

    def resting_at(self, v_rest: Any, open_to_leak: bool) -> NodeArguments:
        """Return the arguments for another potential to leak to, see :func:`map_resting_at`.

        Args:
            v_rest: The potential; ``None`` for 0.
            open_to_leak: Whether :func:`~qif_plugins.swap` chose the map, and may choose another.
        """
        if not (open_to_leak and self.map.matches_leak):
            return self
        return dataclasses.replace(self, map=dataclasses.replace(self.map, dynamics=map_resting_at(v_rest)))

    @property
    def decays_input(self) -> bool:
        """True if the matched LIF neuron scales its input by 1/tau."""
        return bool(self.map.leak.get("decay_input", not self.map.left_open))

    @property
    def tau(self) -> Any:
        """Time constant of the leak."""
        return self.map.leak.get("tau", DEFAULT_TAU)

    def numbers(self, v_threshold: Any) -> dict[str, Any]:
        """Return the numbers that decide, including the threshold, under the names of the arguments."""
        leak = {"tau": self.map.leak.get("tau")} if self.map.matches_leak else dict(self.map.given)
        return {"v_threshold": v_threshold, "v_reset": self.v_reset, "input_gain": self.input_gain, **leak}

    def tensors(self, v_threshold: Any) -> list[Tensor]:
        """Return the tensors among all numbers, including the threshold."""
        values = (v_threshold, *self.map.given.values(), *self.map.leak.values(), self.v_reset, self.input_gain)
        return [value for value in values if isinstance(value, Tensor)]

    def parameters(self, v_threshold: Any, learned: bool = False) -> QIFParameters:
        """Build the neuron that all arguments describe together.

        Args:
            v_threshold: Threshold θ.
            learned: Whether the threshold is a tensor that is learned. It is then clamped to the stable region instead
                of checked, and nothing is read back from its device. Default False.

        Raises:
            ValueError: ``tau`` is not finite or not above 1, or :class:`~qif_plugins.QIFParameters` refuses the
                parameters.
        """
        rest: Any = 0.0 if self.v_reset is None else one_number(self.v_reset)
        if learned:  # a half module's threshold, too
            v_threshold = v_threshold.to(torch.promote_types(v_threshold.dtype, torch.float32))
        else:
            v_threshold = one_number(v_threshold)
            for name, value in (("v_threshold", v_threshold), ("v_reset", rest)):
                if not (isinstance(value, Tensor) and value.is_meta) and not holds_everywhere(value, is_finite):
                    raise ValueError(f"{name} must be finite, got {number(value)}")
        common: dict[str, Any] = {"v_reset": rest, "reset": "soft" if self.v_reset is None else "hard"}
        common |= {"checked": not learned, "learned_threshold": learned, "rebound": self.map.rebound}
        if not self.map.matches_leak:
            gain = self.kept_gain if self.map.decided == "explicit" else 1.0
            common["input_gain"] = gain if self.input_gain is None else one_number(self.input_gain)
            return build_parameters(
                {name: one_number(value) for name, value in self.map.roots.items()}, v_threshold, **common
            )
        tau = one_number(self.tau)
        if not (holds_everywhere(tau, lambda t: t > 1) and holds_everywhere(tau, lambda t: 1 - 1 / t < 1)):
            raise ValueError(
                f"tau must be above 1 and finite, got {number(tau)}: SpikingJelly's LIF leaks with 1 - 1/tau a step"
            )
        if not learned and not all_positive(v_threshold - rest):
            raise ValueError(
                f"v_threshold={number(v_threshold)} must lie above v_reset={number(rest)}, which a matched "
                "leak decays to"
            )
        gain = 1 / tau if self.decays_input else 1.0
        common["input_gain"] = gain if self.input_gain is None else one_number(self.input_gain)
        try:
            return build_parameters({}, v_threshold, beta=1 - 1 / tau, v_rest=rest, **common)
        except ValueError as error:
            numbers = f"tau={number(tau)} with v_reset={number(self.v_reset)}"
            raise ValueError(
                f"{numbers} cannot be matched: {error} Here beta is 1 - 1/tau; dynamics='paper' matches no leak."
            ) from None


def one_number(value: Any) -> Any:
    """Turn a tensor of one number into a float, and one of integers into floats; return anything else unchanged."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    if value.numel() == 1:
        return float(value)
    return value if value.is_floating_point() else value.float()
