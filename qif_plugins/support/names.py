"""Check names, and write the message for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from .text import shown


def check_known(kind: str, known: Collection[Any], *names: Any, otherwise: str = "") -> None:
    """Check that names exist.

    Args:
        kind: The thing that they should name, such as ``"window"``.
        known: The names that exist.
        names: The names to check.
        otherwise: As in :func:`unknown`.

    Raises:
        ValueError: One does not exist; the message is that of :func:`unknown`.
    """
    for name in names:
        if name not in known:
            raise ValueError(unknown(kind, name, known, otherwise))


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
