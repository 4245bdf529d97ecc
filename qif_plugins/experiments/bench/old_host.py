"""Measure peers in a process with another version of SpikingJelly, so that two versions are interleaved in one run."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .machine import installed
from .peers import draw
from .runner import Runner, Times, release

SETTLE = 0.02
"""Seconds after which OpenMP threads without work no longer take a core from the next peer."""


class OldHost:
    """A process with another version of SpikingJelly.

    Args:
        folder: Where that version was installed (``pip install --target FOLDER --no-deps spikingjelly==0.0.0.0.14``).

    Raises:
        ValueError: There is no SpikingJelly in the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "spikingjelly").is_dir():
            raise ValueError(
                f"{folder} has no folder 'spikingjelly'; install it with "
                f"pip install --target {folder} --no-deps spikingjelly==0.0.0.0.14"
            )
        begin = str(folder.resolve()), torch.get_num_threads()
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, begin)
        self.version = self.ask(installed, "spikingjelly")

    def ask(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of a module in the other process, and wait for its result.

        Raises:
            RuntimeError: The call failed; the message is that of its error.
            ConnectionError: The process has ended.
        """
        try:
            return self._pool.submit(_answer, work, *arguments).result()
        except BrokenProcessPool:
            raise ConnectionError(
                "the process with the other SpikingJelly ended; leave out --old-spikingjelly"
            ) from None

    def forget(self) -> None:
        """Free the memory of the last case."""
        self.ask(_forget)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


class OldRunner:
    """A :class:`~.runner.Runner` in the process of an :class:`OldHost`."""

    def __init__(
        self, host: OldHost, peer: str, steps: int, neurons: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.host, self.peer = host, peer
        host.ask(_build, peer, steps, neurons, dtype, device)

    def repeat(self) -> Times:
        """Measure a repetition, then wait until the other process sleeps: its threads spin after their work."""
        times: Times = self.host.ask(_call, self.peer, "repeat")
        time.sleep(SETTLE)
        return times

    def peak_bytes(self) -> int:
        """Measure the largest memory that one repetition holds."""
        return int(self.host.ask(_call, self.peer, "peak_bytes"))


# -- in the other process ----------------------------------------------------------------------------------------------

_runners: dict[str, Runner] = {}
"""The peers of the case, by name."""
_drawn = lru_cache(maxsize=1)(draw)


def _begin(folder: str, threads: int) -> None:
    sys.path.insert(0, folder)
    torch.set_num_threads(threads)


def _answer(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return work(*arguments)
    except Exception as error:  # any error of a host is this peer's result; not every error can be pickled
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _forget() -> None:
    _runners.clear()
    _drawn.cache_clear()
    release()


def _build(peer: str, steps: int, neurons: int, dtype: torch.dtype, device: torch.device) -> None:
    _runners[peer] = Runner(peer, *_drawn(steps, neurons, dtype, device))


def _call(peer: str, method: str) -> Any:
    return getattr(_runners[peer], method)()
