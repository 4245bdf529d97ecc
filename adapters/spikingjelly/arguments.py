"""Check LIFNode's arguments and our own, as passed to a constructor and as assigned later."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from qif_plugins.neuron.arguments import MapArguments, NodeArguments
from qif_plugins.neuron.following import has_storage
from qif_plugins.neuron.names import MAP, DynamicsName, WindowName
from qif_plugins.neuron.surrogate import Window
from qif_plugins.support.numbers import checked_number

StepMode = Literal["s", "m"]

LEARNS_A_MAP = "ParametricQIFNode learns a, u1 and u2, and keeps them where the neuron is stable"
WAYS_OUT = {
    **dict.fromkeys(MAP, f"{LEARNS_A_MAP}. An attribute of a subclass's own needs another name than a, u1 or u2"),
    "tau": f"{LEARNS_A_MAP}; a ParametricLIFNode that swap() converts still learns its leak",
    "input_gain": "a layer or a norm before the node can scale its input; of the node, v_threshold learns",
    "v_reset": "of the node, v_threshold learns",
}
"""Advice for each number that a node does not learn."""


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
    """Make ``help`` and ``inspect.signature`` list the :class:`NodeOptions` of a constructor with ``**options``."""
    signature = inspect.signature(constructor)
    named = list(signature.parameters.values())[:-1]
    for name, kind in NodeOptions.__annotations__.items():
        kind = getattr(kind, "__forward_arg__", kind)  # as text, as the annotations of the others
        named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    constructor.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return constructor


def node_arguments(decay_input: Any, dynamics: Any = None, **numbers: Any) -> NodeArguments:
    """Collect the arguments of a constructor; one that is ``None`` was left out.

    Raises:
        TypeError: As :func:`constructor_number`.
        ValueError: As there, or contradictory arguments.
    """
    given = {name: constructor_number(name, value) for name, value in numbers.items() if value is not None}
    leak: dict[str, Any] = {"tau": given["tau"]} if "tau" in given else {}
    if decay_input is not None:
        leak["decay_input"] = _flag(decay_input)
    roots = {name: given[name] for name in MAP if name in given}
    return NodeArguments(MapArguments(dynamics, roots, leak), given.get("v_reset"), given.get("input_gain"))


def constructor_number(name: str, value: Any) -> float:
    """Check a number that a constructor was given, and return it as a float.

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
    """Check a value that is assigned to a node, and return it as the node keeps it.

    Raises:
        TypeError: The value has a type that ``name`` does not take.
        ValueError: A tensor with gradient for a number that the node, of the class called ``owner``, does not learn.
    """
    if name == "dynamics" or (value is None and name != "v_threshold"):
        return value
    if name == "decay_input":
        return _flag(value)
    value = checked_number(name, value)
    if learns(value) and name != "v_threshold":
        raise ValueError(f"{owner} does not learn {name}: {WAYS_OUT[name]}")
    return value


def learns(value: Any) -> bool:
    """Return whether a number is a tensor that is learned, or a batch of torch.vmap, which cannot be read either."""
    if not isinstance(value, Tensor) or value.requires_grad or isinstance(value, nn.Parameter):
        return isinstance(value, Tensor)
    return not (torch.compiler.is_compiling() or has_storage(value))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | int):
        raise TypeError(f"decay_input must be True or False, got {value!r}")
    return bool(value)
