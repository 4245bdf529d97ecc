"""LIFNode's names for a neuron's numbers and our own, and the parameters that they make together."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from qif_plugins.neuron.arguments import MAP, DynamicsName, MapArguments, build_parameters, one_number
from qif_plugins.neuron.parameters import QIFParameters, holds_everywhere, is_finite
from qif_plugins.support.names import checked_number
from qif_plugins.support.text import number

if TYPE_CHECKING:
    from qif_plugins.neuron.surrogate import Window, WindowName

__all__ = ["Arguments", "NodeOptions", "StepMode", "checked_assignment", "learns", "show_options"]

StepMode = Literal["s", "m"]

DEFAULT_TAU = 2.0
LEARNS_A_MAP = "ParametricQIFNode learns a, u1 and u2, and keeps them where the neuron is stable"
WAYS_OUT = {
    **dict.fromkeys(MAP, f"{LEARNS_A_MAP}. An attribute of a subclass's own needs another name than a, u1 or u2"),
    "tau": f"{LEARNS_A_MAP}; a ParametricLIFNode that swap() converts goes on learning its leak",
    "input_gain": "a layer or a norm before the node can scale its input; of the node, v_threshold learns",
    "v_reset": "of the node, v_threshold learns",
}
"""What to do instead of learning a number that a node does not learn."""


class NodeOptions(TypedDict, total=False):
    """The keyword-only arguments that every QIF node takes beside LIFNode's."""

    a: float | None
    u1: float | None
    u2: float | None
    input_gain: float | None
    dynamics: DynamicsName | None
    window: WindowName | Window | None


Constructor = TypeVar("Constructor", bound=Callable[..., None])


def show_options(constructor: Constructor) -> Constructor:
    """Let ``help`` and ``inspect.signature`` list the :class:`NodeOptions` of a constructor that has ``**options``."""
    signature = inspect.signature(constructor)
    named = list(signature.parameters.values())[:-1]
    for name, kind in NodeOptions.__annotations__.items():
        named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    constructor.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return constructor


@dataclass(frozen=True, eq=False)
class Arguments:
    """The numbers that a node was given, except for the threshold, which may be a parameter of the module.

    Attributes:
        map: The arguments that decide the map.
        v_reset: Membrane after a spike, and the potential that a matched leak decays to; ``None`` for the soft reset.
        input_gain: Factor on the input; ``None`` where it was left out.
        kept_gain: The gain of the leak that was matched before a, u1 or u2 was assigned.
    """

    map: MapArguments = field(default_factory=MapArguments)
    v_reset: Any = 0.0
    input_gain: Any = None
    kept_gain: Any = 1.0

    @classmethod
    def constructed(cls, decay_input: Any, dynamics: Any = None, **numbers: Any) -> Arguments:
        """The arguments of a constructor, ``None`` where one was left out.

        Raises:
            TypeError: An argument that is not a number.
            ValueError: Contradictory arguments, or a tensor that is learned or has several elements.
        """
        given = {name: constructor_number(name, value) for name, value in numbers.items() if value is not None}
        leak: dict[str, Any] = {"tau": given["tau"]} if "tau" in given else {}
        if decay_input is not None:
            leak["decay_input"] = _flag(decay_input)
        roots = {name: given[name] for name in MAP if name in given}
        return cls(MapArguments(dynamics, roots, leak), given.get("v_reset"), given.get("input_gain"))

    def assigned(self, name: str, value: Any, current: QIFParameters, open_to_leak: bool) -> Arguments:
        """The arguments after an assignment.

        Args:
            name: The attribute.
            value: Its checked value.
            current: The neuron before the assignment.
            open_to_leak: See :meth:`MapArguments.with_leak`.

        Raises:
            ValueError: An unknown ``dynamics``, or a leak that would have no effect.
        """
        if name in ("v_reset", "input_gain"):
            return dataclasses.replace(self, **{name: value})
        present = {root: getattr(current, root) for root in MAP}
        if name == "dynamics":
            changed = self.map.with_dynamics(value, present)
        elif name in MAP:
            changed = self.map.with_map(present, **{name: value})
        elif name in ("tau", "decay_input"):
            changed = self.map.with_leak(open_to_leak, **{name: value})
        else:
            return self
        matched = changed.decided == "explicit" and self.map.decided == "lif"
        return dataclasses.replace(self, map=changed, kept_gain=current.input_gain if matched else self.kept_gain)

    @property
    def tau(self) -> Any:
        """The time constant of the leak."""
        return self.map.leak.get("tau", DEFAULT_TAU)

    def numbers(self, v_threshold: Any) -> dict[str, Any]:
        """The numbers that decide, with the threshold, by the names that they were passed by."""
        leak = {"tau": self.map.leak.get("tau")} if self.map.decided == "lif" else dict(self.map.given)
        return {"v_threshold": v_threshold, "v_reset": self.v_reset, "input_gain": self.input_gain, **leak}

    def tensors(self, v_threshold: Any) -> list[Tensor]:
        """The tensors among all numbers, the threshold included."""
        values = (v_threshold, *self.map.given.values(), *self.map.leak.values(), self.v_reset, self.input_gain)
        return [value for value in values if isinstance(value, Tensor)]

    def parameters(self, v_threshold: Any, learned: bool = False) -> QIFParameters:
        """The neuron that all of them describe together.

        Args:
            v_threshold: Threshold θ.
            learned: Whether the threshold is a tensor that is learned. It is then kept where the membrane is stable
                instead of checked, and nothing is read back from its device. Default False.

        Raises:
            ValueError: A ``tau`` that is not finite and above 1, or parameters that
                :class:`~qif_plugins.QIFParameters` refuses.
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
        common |= {"checked": not learned, "learned_threshold": learned}
        if self.map.decided != "lif":
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
        if not learned and not holds_everywhere(v_threshold - rest, lambda reach: reach > 0):
            raise ValueError(
                f"v_threshold={number(v_threshold)} must lie above v_reset={number(rest)}, which a matched "
                "leak decays to"
            )
        gain = 1 / tau if self.map.leak.get("decay_input", True) else 1.0
        common["input_gain"] = gain if self.input_gain is None else one_number(self.input_gain)
        try:
            return build_parameters({}, v_threshold, beta=1 - 1 / tau, v_rest=rest, **common)
        except ValueError as error:
            numbers = f"tau={number(tau)} with v_reset={number(self.v_reset)}"
            raise ValueError(f"{numbers} cannot be matched: {error}") from None


def constructor_number(name: str, value: Any) -> float:
    """A number that a constructor was given.

    Raises:
        TypeError: Not a number.
        ValueError: A tensor that is learned or has several elements.
    """
    value = checked_number(name, value, "a number")
    if learns(value):
        way_out = WAYS_OUT.get(name, "assign it to the node, node.v_threshold = nn.Parameter(...), and it is learned")
        raise ValueError(f"{name} is a tensor with gradient, which the constructor does not take: {way_out}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, and the constructor takes one number; assign it to the node "
            f"afterwards, node.{name} = ..."
        )
    return float(value)


def checked_assignment(name: str, value: Any, owner: str) -> Any:
    """A value that is assigned to a node, as the node keeps it.

    Raises:
        TypeError: Not what ``name`` may be.
        ValueError: A tensor to learn for a number that the node, of the class called ``owner``, does not learn.
    """
    if name == "dynamics":
        return value
    if name == "decay_input":
        return _flag(value)
    if value is None and name != "v_threshold":
        return None
    value = checked_number(name, value)
    if learns(value) and name != "v_threshold":
        raise ValueError(f"{owner} does not learn {name}: {WAYS_OUT[name]}")
    return value


def learns(value: Any) -> bool:
    """Whether a number is a tensor that is learned."""
    return isinstance(value, Tensor) and (value.requires_grad or isinstance(value, nn.Parameter))


def _flag(value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool | int):
        raise TypeError(f"decay_input must be True or False, got {value!r}")
    return None if value is None else bool(value)
