"""Check the tables ``[model]`` and ``[neuron]`` of a configuration against the signatures of models and neurons."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ...support.text import shown
from .config import COUNT, LARGEST, of_type, unknown_key

LAYERS = 1000
FROM_DATA = ("in_features", "in_channels", "classes", "size", "spiking_neuron")
"""Arguments of the models that come from the data instead."""
_KINDS = {frozenset({kind.__name__}): kind for kind in (bool, int, float, str)} | {frozenset({"Sequence", "int"}): list}


def arguments_of(constructor: Callable[..., Any]) -> dict[str, type | None]:
    """List the arguments that a configuration may set, each with its type; ``None`` stands for any type.

    The type comes from the annotation, or from the default where a host has not annotated the argument.
    """
    kinds: dict[str, type | None] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in FROM_DATA:
            continue
        hint = parameter.annotation
        text = hint if isinstance(hint, str) else hint.__name__ if isinstance(hint, type) else str(hint)
        words = frozenset(re.findall(r"\w+", text)) - {"None", "NoneType", "Optional", "typing"}
        if hint is parameter.empty:
            default = type(parameter.default)
            kinds[name] = default if default in (bool, float, str) else None
        else:
            kinds[name] = _KINDS.get(
                words, str if isinstance(parameter.default, str) else None
            )  # str: one of some names
    return kinds


def checked(table: str, given: Mapping[str, Any], known: Mapping[str, type | None]) -> dict[str, Any]:
    """Check the arguments of a table, and convert whole numbers to floats where floats are wanted.

    Args:
        table: Its name, for the error.
        given: Values by name; ``None`` is allowed except for whole numbers and lists.
        known: From :func:`arguments_of`.

    Raises:
        ValueError: A name is unknown, or a value has another type or is out of range.
    """
    result = {}
    for key, value in given.items():
        name = f"{table}.{key}"
        if key not in known:
            raise unknown_key(name, [f"{table}.{other}" for other in known], ", ".join(known))
        optional = known[key] not in (int, list)
        result[key] = value if value is None and optional else _value(name, value, known[key])
    return result


def _value(name: str, value: Any, kind: type | None) -> Any:
    if kind is None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        return value
    if kind is list:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list of whole numbers, got {shown(value)}")
        return [_value(f"each of {name}", part, int) for part in value]
    value = of_type(kind, value, name)
    if kind is int:
        most = LAYERS if name.endswith(".layers") else COUNT
        if not 1 <= value <= most:
            limit = f"at least 1, got {shown(value)}" if value < 1 else f"at most {most}, got {shown(value)}"
            raise ValueError(f"{name} must be {limit}")
    if kind is float and not abs(value) <= LARGEST:
        raise ValueError(f"{name} must be finite and at most {LARGEST:.3g} in magnitude, got {shown(value)}")
    return value
