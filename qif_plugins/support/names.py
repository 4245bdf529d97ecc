"""What is said where a name or a number is none: the argument, what was passed, and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["checked_number", "unknown"]


def unknown(kind: str, value: Any, known: Iterable[str], otherwise: str = "") -> str:
    """The message for a name that does not exist.

    Args:
        kind: What it should name, such as ``"window"``.
        value: What was passed.
        known: The names that exist.
        otherwise: What else may be passed, such as ``"pass a Window(lo, hi)"``. Default: nothing else.
    """
    known = tuple(known)
    near = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    guess = f"did you mean {near[0]!r}? There" if near else "there"
    rest = f", or {otherwise}" if otherwise else ""
    return f"unknown {kind} {value!r}; {guess} are {', '.join(known)}{rest}"


def checked_number(name: str, value: Any, allowed: str = "a number or a tensor") -> Any:
    """``value``, where it is a tensor or can stand for a number.

    Args:
        name: The argument.
        value: What was passed for it.
        allowed: What may be passed, for the message.

    Returns:
        A tensor as it is, anything else as a float.

    Raises:
        TypeError: A string, or what has no ``float()``.
    """
    if isinstance(value, (Tensor, float)):  # older TorchDynamo traces no union
        return value
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {allowed}, got {value!r}") from None
