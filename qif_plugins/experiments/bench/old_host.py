"""Measure peers in a process with another version of SpikingJelly, so that two versions are interleaved in one run.

As a program (``python -m qif_plugins.experiments.bench.old_host``) this module is that process; it serves one
repetition at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import installed
from .peers import draw, dtype_name
from .runner import Runner, Times, release

__all__ = ["OldHost", "OldRunner"]

SETTLE = 0.02
"""Seconds after which OpenMP threads without work no longer take a core from the next peer."""


class OldHost:
    """A process with another version of SpikingJelly, which repeats a peer when asked.

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
        paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qif_plugins.experiments.bench.old_host"],
            env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.version = self.ask(do="start", threads=torch.get_num_threads())["version"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: The other process failed; the message is its own.
            ConnectionError: The process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ConnectionError("the process with the other SpikingJelly ended; leave out --old-spikingjelly")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


class OldRunner:
    """A :class:`~.runner.Runner` in the process of an :class:`OldHost`."""

    def __init__(
        self, host: OldHost, peer: str, steps: int, neurons: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.host, self.peer = host, peer
        host.ask(do="build", peer=peer, T=steps, N=neurons, dtype=dtype_name(dtype), device=str(device))

    def repeat(self) -> Times:
        """Measure a repetition, then wait until the other process sleeps: its threads spin after their work."""
        times = self.host.ask(do="repeat", peer=self.peer)
        time.sleep(SETTLE)
        return times

    def peak_bytes(self) -> int:
        """Measure the largest memory that one repetition holds."""
        return int(self.host.ask(do="peak_bytes", peer=self.peer)["bytes"])


def _serve() -> None:
    served = _Served()
    answers, sys.stdout = sys.stdout, sys.stderr  # what a host prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(served, request.pop("do"))(**request)
        except Exception as error:  # whatever a host raises is this peer's result
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class _Served:
    """Answers to :class:`OldHost`: the peers of one case, by name."""

    def __init__(self) -> None:
        self.runners: dict[str, Runner] = {}
        self.case: tuple[Tensor, Tensor] | None = None

    def start(self, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        return {"version": installed("spikingjelly")}

    def forget(self) -> dict[str, Any]:
        """Free the last case."""
        self.runners, self.case = {}, None
        release()
        return {}

    def build(self, peer: str, T: int, N: int, dtype: str, device: str) -> dict[str, Any]:
        if self.case is None:
            self.case = draw(T, N, getattr(torch, dtype), torch.device(device))
        self.runners[peer] = Runner(peer, *self.case)
        return {}

    def repeat(self, peer: str) -> Times:
        return self.runners[peer].repeat()

    def peak_bytes(self, peer: str) -> dict[str, Any]:
        return {"bytes": self.runners[peer].peak_bytes()}


if __name__ == "__main__":
    _serve()
