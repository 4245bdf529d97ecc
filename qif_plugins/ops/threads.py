"""Hands chunks of neurons to threads, for kernels that release the interpreter lock.

Safe whatever the caller does: a fork leaves the parent's threads behind and starts its own, several Python threads
may call at once, and ``torch.set_num_threads`` bounds a call. Small jobs run in the caller alone.

There are two sets of threads, and results do not depend on which. PyTorch's own OpenMP team comes first, where
PyTorch runs on one (:func:`_openmp`): after an operator its threads keep spinning for some milliseconds, and threads
of ours would have to share the cores with them. But a team ends only when all of its threads have come, which on a
busy machine may take a slice of the scheduler's time after the work is done. So once that has happened, and in a
forked process, where OpenMP would hang, jobs go to a pool of ours: each caller works on its own job besides, and waits
for none that has not begun.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .shortcuts import ENABLED

__all__ = ["for_each_chunk", "uses_openmp", "which_threads"]

SMALL = 1 << 18
"""Neuron-steps below which waking a thread takes longer than it saves: some 50 microseconds."""
PARTS = 4
"""Parts of a job for each thread, so that a thread that is held up leaves its share to the others."""
LATE = 1e-3
"""Seconds that the caller may wait for its team besides as long as it has worked itself."""
APART = 1.0
"""Seconds without the team after it was late."""

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_workers = 0


def _openmp() -> Callable[..., None] | None:
    """What starts a team in the OpenMP that PyTorch is linked to, if that is GNU's or speaks its language."""
    if not ENABLED:
        return None
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):  # another OpenMP, as on macOS and Windows, or none
        return None
    start.argtypes = [_TEAM_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return start


_TEAM_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_start_team = _openmp()
_team_again = 0.0
"""When the team may be asked again, by :func:`time.monotonic`."""


def uses_openmp() -> bool:
    """Whether jobs are handed to PyTorch's own OpenMP team in this process."""
    return _start_team is not None


def which_threads() -> str:
    """What jobs are handed to in this process, in words."""
    return "PyTorch's own OpenMP team" if uses_openmp() else "a pool of this package's"


def for_each_chunk(
    total: int, chunk: int, work: int, run: Callable[..., None], arguments: tuple[Any, ...] = ()
) -> None:
    """Call ``run(*arguments, first, stop)`` on ranges that cover [0, total), each a whole number of chunks.

    Args:
        total: Number of neurons.
        chunk: Size of a chunk; the last one may be smaller.
        work: Neuron-steps altogether, or what takes as long, which decide whether threads pay.
        run: Must not depend on which ranges it is called with, nor on their order.
        arguments: What it is called with besides.
    """
    chunks = -(-total // chunk)
    threads = min(torch.get_num_threads(), chunks) if work >= SMALL else 1
    if threads <= 1:
        run(*arguments, 0, total)
        return
    parts = min(chunks, threads * PARTS)
    bounds = [chunks * part // parts * chunk for part in range(parts)] + [total]
    ticket = itertools.count()

    def work_off() -> None:
        while (part := next(ticket)) < parts:
            run(*arguments, bounds[part], bounds[part + 1])

    if _start_team is not None and time.monotonic() >= _team_again:
        _work_off_in_team(_start_team, work_off, threads)
    else:
        _work_off_in_pool(work_off, threads)


def _work_off_in_team(start: Callable[..., None], work_off: Callable[[], None], threads: int) -> None:
    """Have the caller and its OpenMP team call ``work_off``; each must have come before this returns."""
    global _team_again
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

    start(_TEAM_MEMBER(member), None, threads, 0)
    now = time.monotonic()
    if now - ended > LATE + (ended - began):
        _team_again = now + APART
    for error in outcomes.values():
        if error is not None:
            raise error
    if caller not in outcomes:  # interrupted outside the try, from where ctypes lets nothing through
        raise KeyboardInterrupt


def _work_off_in_pool(work_off: Callable[[], None], threads: int) -> None:
    """Have the caller and threads of ours call ``work_off``; wait for those that have begun."""
    helpers = _submit(work_off, threads - 1)
    try:
        work_off()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _submit(work_off: Callable[[], None], workers: int) -> list[Future[None]]:
    """Have up to ``workers`` threads of this process call ``work_off``, besides the caller."""
    global _executor, _workers
    with _lock:
        if _executor is None or _workers < workers:
            if _executor is not None:
                _executor.shutdown(wait=False)  # finishes what it has
            _executor, _workers = ThreadPoolExecutor(workers, thread_name_prefix="qif"), workers
        try:
            return [_executor.submit(work_off) for _ in range(workers)]
        except RuntimeError:  # the interpreter is shutting down: the caller does it alone
            return []


def _forget() -> None:
    """After a fork: the threads of the parent do not exist here, and its lock may be held by one of them."""
    global _executor, _lock, _start_team
    _executor, _lock, _start_team = None, threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
