"""Hand chunks of neurons to threads, for kernels that release the interpreter lock.

A process may fork (the child then starts threads of its own), several Python threads may call at the same time, and
``torch.set_num_threads`` limits the threads of a call. Small jobs run in the calling thread alone.

Larger jobs go to PyTorch's own OpenMP team if there is one (:mod:`.shortcuts.openmp`), otherwise to a pool of this
package, where the caller works as well and does not wait for threads that have not begun. The results are the same.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .shortcuts import openmp

SMALL = 1 << 18
"""Neuron-steps below which waking a thread takes longer than it saves: some 50 microseconds."""
PARTS = 4
"""Parts of a job for each thread, so that a thread that is held up leaves its share to the others."""

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_workers = 0


def which_threads() -> str:
    """Describe the threads that jobs run on in this process."""
    return "PyTorch's own OpenMP team" if openmp.uses_openmp() else "a pool of this package's"


def for_each_chunk(
    total: int, chunk: int, work: int, run: Callable[..., None], arguments: tuple[Any, ...] = ()
) -> None:
    """Call ``run(*arguments, first, stop)`` on ranges that cover [0, total), each a whole number of chunks.

    Args:
        total: Number of neurons.
        chunk: Size of a chunk; the last one may be smaller.
        work: Total number of neuron-steps, or of anything that takes as long; below ``SMALL`` only the caller works.
        run: The function; its results must not depend on the ranges or their order.
        arguments: Its arguments before the range. Default: none.
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

    if openmp.is_ready():
        openmp.run(work_off, threads)
    else:
        _run_in_pool(work_off, threads)


def _run_in_pool(work_off: Callable[[], None], threads: int) -> None:
    """Have the caller and threads of the pool call ``work_off``; wait for those that have begun."""
    helpers = _submit(work_off, threads - 1)
    try:
        work_off()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _submit(work_off: Callable[[], None], workers: int) -> list[Future[None]]:
    """Have up to ``workers`` threads of this process call ``work_off``, in addition to the caller."""
    global _executor, _workers
    with _lock:
        if _executor is None or _workers < workers:
            if _executor is not None:
                _executor.shutdown(wait=False)  # finishes the jobs it has
            _executor, _workers = ThreadPoolExecutor(workers, thread_name_prefix="qif"), workers
        try:
            return [_executor.submit(work_off) for _ in range(workers)]
        except RuntimeError:  # the interpreter is shutting down: the caller does it alone
            return []


def _forget() -> None:
    """Drop the pool after a fork: the parent's threads do not exist here, and one of them may hold its lock."""
    global _executor, _lock
    _executor, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
