"""Check and format numbers that may be tensors."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


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


def positive_number(name: str, value: Any, default: float | None = None) -> Any:
    """Return ``value`` as :func:`checked_number` does, if it is positive and finite.

    Args:
        name: The argument, for the message.
        value: The value that was passed for it, one number.
        default: The argument's default, for the message. Default: none is named.

    Raises:
        TypeError: As in :func:`checked_number`.
        ValueError: The value is not positive and finite.
    """
    checked = checked_number(name, value, "a positive number")
    if not (checked > 0 and math.isfinite(checked)):
        way_out = "" if default is None else f"; the default is {default}"
        raise ValueError(f"{name} must be positive and finite, got {value}{way_out}")
    return checked


def number(value: Any, form: str = "g") -> str:
    """Format a float, or a tensor of them: ``0.5``, or ``[0 .. 0.5]`` from the least to the greatest.

    Args:
        value: The number; anything else but floats, integers and tensors is shown as ``repr`` shows it.
        form: Format specification of each number. Default ``"g"``.
    """
    if isinstance(value, Tensor):
        if value.is_meta or not value.numel():
            return f"tensor of shape {list(value.shape)}"
        if value.numel() > 1:
            return f"[{value.min().item():{form}} .. {value.max().item():{form}}]"
        value = value.item()
    return f"{value:{form}}" if isinstance(value, float | int) and not isinstance(value, bool) else repr(value)
