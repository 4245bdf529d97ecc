"""Run jobs on the OpenMP team that PyTorch's own operators run on.

After an operator the threads of that team keep spinning for some milliseconds, and other threads would have to share
the cores with them. However, a job on the team ends only when all of its threads have arrived, which on a busy machine
may take a time slice of the scheduler longer than the work. After such a delay the team is not used for a second. In a
forked process, where OpenMP would hang, it is never used.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from . import ENABLED

LATE = 1e-3
"""Seconds that the caller may wait for its team, beyond the time that it worked itself, before the team is late."""
PAUSE = 1.0
"""Seconds without the team after it was late."""


def _find_team() -> Callable[..., None] | None:
    """Find the function that starts a team in the OpenMP that PyTorch is linked to, if that has GNU's interface."""
    if not ENABLED:
        return None
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):  # another OpenMP, as on macOS and Windows, or no OpenMP at all
        return None
    start.argtypes = [_TEAM_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


_TEAM_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_start_team = _find_team()
_team_again = 0.0
"""Time from which on the team may be used again, by :func:`time.monotonic`."""


def uses_openmp() -> bool:
    """Whether jobs are handed to PyTorch's own OpenMP team in this process."""
    return _start_team is not None


def is_ready() -> bool:
    """Whether the team exists and was not late a moment ago."""
    return _start_team is not None and time.monotonic() >= _team_again


def run(work_off: Callable[[], None], threads: int) -> None:
    """Have the caller and its team, ``threads`` altogether, call ``work_off``; returns when each has done so."""
    global _team_again
    assert _start_team is not None
    caller = threading.get_ident()
    outcomes: dict[int, BaseException | None] = {}
    ended = began = time.monotonic()

    def member(_: Any) -> None:
        nonlocal ended
        outcome: BaseException | None = None
        try:
            work_off()
        except BaseException as error:  # OpenMP knows no exceptions; an interrupt comes here too
            outcome = error
        outcomes[threading.get_ident()] = outcome
        if threading.get_ident() == caller:
            ended = time.monotonic()

    _start_team(_TEAM_MEMBER(member), None, threads, 0)
    now = time.monotonic()
    if now - ended > LATE + (ended - began):
        _team_again = now + PAUSE
    for error in outcomes.values():
        if error is not None:
            raise error
    if caller not in outcomes:  # interrupted outside the try, from where ctypes lets nothing through
        raise KeyboardInterrupt


def _forget() -> None:
    """Give the team up after a fork, which leaves its threads behind."""
    global _start_team
    _start_team = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
