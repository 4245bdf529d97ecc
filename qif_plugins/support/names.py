"""Messages for an unknown name, and the check that an argument is a number."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .text import shown

__all__ = ["checked_number", "unknown"]


def unknown(kind: str, value: Any, known: Iterable[Any], otherwise: str = "") -> str:
    """Write the message for a name that does not exist: the nearest one that does, and all of them.

    Args:
        kind: The thing it should name, such as ``"window"``.
        value: The name that was passed.
        known: The names that exist.
        otherwise: Another way out, such as ``"pass a Window(lo, hi)"``. Default: there is no other.
    """
    known = tuple(known)
    near = difflib.get_close_matches(value, [name for name in known if name], 1) if isinstance(value, str) else []
    choose = f"did you mean {near[0]!r}? Choose" if near else "choose"
    rest = f", or {otherwise}" if otherwise else ""
    return f"unknown {kind} {shown(value)}; {choose} from {', '.join(map(repr, known))}{rest}"


def checked_number(name: str, value: Any, allowed: str = "a number or a tensor") -> Any:
    """Return ``value`` as a float, or as it is if it is a tensor.

    Args:
        name: The argument, for the message.
        value: The value that was passed for it.
        allowed: The kinds of value that may be passed, for the message.

    Raises:
        TypeError: A string, or another value that ``float()`` does not take.
    """
    if isinstance(value, (Tensor, float)):  # older TorchDynamo traces no union
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {allowed}, got {value!r}") from None
