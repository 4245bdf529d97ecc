"""What a benchmark compares: our neuron and its peers, each as one call on a sequence ``[T, N]``.

Hosts are imported when their peer is built. As a program (``python -m qif_plugins.bench_peers``) this module serves
another process, one repetition at a time, so that two versions of one host can be interleaved in one run.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .functional import qif_multi_step
from .parameters import QIFParameters
from .surrogate import Window

__all__ = ["PEERS", "OldHost", "Runner", "peers_for"]

Times = dict[str, float]
Call = Callable[[Tensor], Tensor]


def _ours(backend: str) -> Callable[[torch.device], Call]:
    def build(device: torch.device) -> Call:
        params = QIFParameters()
        window = Window.unbiased(params)
        return lambda x: qif_multi_step(x, 0.0, params, window, backend=backend)[0]

    return build


def _spikingjelly(name: str, backend: str | None = None) -> Callable[[torch.device], Call]:
    def build(device: torch.device) -> Call:
        from spikingjelly.activation_based import neuron

        node = getattr(neuron, name)(step_mode="m").to(device)
        if backend is not None:
            node.backend = backend

        def call(x: Tensor) -> Tensor:
            node.reset()
            return node(x)

        return call

    return build


def _qif_in_spikingjelly(device: torch.device) -> Call:
    node = importlib.import_module("qif_plugins.adapters.spikingjelly").QIFNode(step_mode="m").to(device)

    def call(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return call


def _flex_step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One step of our equations with SpikingJelly's ATan, for its FlexSN to fuse."""
    from spikingjelly.activation_based import surrogate

    h = 0.25 * v * (v - 0.5) + x
    s = surrogate.atan.apply(h - 1.0, 2.0)
    return s, (1.0 - s) * h


def _flex(device: torch.device) -> Call:
    from spikingjelly.activation_based import neuron

    node = neuron.FlexSN(_flex_step, num_states=1, step_mode="m").to(device)

    def call(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return call


def _snntorch(ours: bool) -> Callable[[torch.device], Call]:
    def build(device: torch.device) -> Call:
        import snntorch

        if ours:
            layer = importlib.import_module("qif_plugins.adapters.snntorch").QIF(beta=0.9).to(device)
        else:
            layer = snntorch.Leaky(beta=0.9).to(device)

        def call(x: Tensor) -> Tensor:
            if layer.beta.dtype != x.dtype:
                layer.to(x.dtype)
            mem = torch.zeros_like(x[0])
            spikes = []
            for current in x:
                spike, mem = layer(current, mem)
                spikes.append(spike)
            return torch.stack(spikes)

        return call

    return build


def _three_copies(device: torch.device) -> Call:
    """The floor: as many bytes as forward and backward move, by copying the tensor into new memory three times."""

    def call(x: Tensor) -> Tensor:
        first, *_ = [x.detach().clone() for _ in range(3)]
        return first

    return call


FLOOR = "three copies"
OURS = "qif"
PEERS: dict[str, Callable[[torch.device], Call]] = {
    FLOOR: _three_copies,
    OURS: _ours("auto"),
    "qif, reference": _ours("torch"),
    "qif in SpikingJelly": _qif_in_spikingjelly,
    "SpikingJelly LIFNode": _spikingjelly("LIFNode"),
    "SpikingJelly LIFNode, cupy": _spikingjelly("LIFNode", "cupy"),
    "SpikingJelly's own QIFNode": _spikingjelly("QIFNode"),
    "SpikingJelly FlexSN, our equations": _flex,
    "qif in snnTorch": _snntorch(ours=True),
    "snnTorch Leaky": _snntorch(ours=False),
}
"""By name, how to build the call."""


def peers_for(device: torch.device, hosts: tuple[str, ...]) -> list[str]:
    """The peers that mean something on ``device`` with these hosts installed."""
    names = [FLOOR, OURS, "qif, reference"]
    if "spikingjelly" in hosts:
        names += ["qif in SpikingJelly", "SpikingJelly LIFNode", "SpikingJelly's own QIFNode"]
        if device.type == "cuda":
            names.append("SpikingJelly FlexSN, our equations")
    if "snntorch" in hosts:
        names += ["qif in snnTorch", "snnTorch Leaky"]
    return names


class Runner:
    """One peer on one input; each call is one repetition."""

    def __init__(self, peer: str, steps: int, neurons: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        make = lambda: torch.randn(steps, neurons, generator=generator).to(device, dtype)  # noqa: E731
        self.device = device
        self.x, self.gradient = make().requires_grad_(), make()
        self.is_floor = peer == FLOOR
        self.call = PEERS[peer](device)

    def repeat(self) -> Times:
        """Seconds of the forward pass, of the backward pass, and of both."""
        self.x.grad = None
        mark = _events if self.device.type == "cuda" else _clock
        marks = [mark()]
        spikes = self.call(self.x)
        marks.append(mark())
        if not self.is_floor:
            spikes.backward(self.gradient)
        marks.append(mark())
        forward, backward = itertools.starmap(_between, itertools.pairwise(marks))
        if self.is_floor:  # of its three copies, forward and backward have half each
            forward = backward = forward / 2
        return {"forward": forward, "backward": backward, "both": forward + backward}

    def peak_bytes(self) -> int:
        """Memory that one repetition holds at most, besides input and incoming gradient."""
        self.x.grad = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.repeat()
            return torch.cuda.max_memory_allocated(self.device) - before
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            self.repeat()
        held = peak = 0
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Standard error closed to what the profiler's C++ code says there."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _clock() -> float:
    return time.perf_counter()


def _events() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    if isinstance(first, float):
        return float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second)) / 1e3


class OldHost:
    """A process with another version of SpikingJelly, which repeats a peer when asked.

    Args:
        folder: Where that version was installed (``pip install --target FOLDER spikingjelly==0.0.0.0.14``).
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "spikingjelly").is_dir():
            raise ValueError(f"{folder} has no folder 'spikingjelly'; install it with pip install --target {folder}")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qif_plugins.bench_peers"],
            env={**os.environ, "PYTHONPATH": str(folder)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.version = self.ask(threads=torch.get_num_threads())["version"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            RuntimeError: What went wrong there.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process with the other SpikingJelly ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class OldRunner:
    """As :class:`Runner`, in the process of an :class:`OldHost`."""

    def __init__(
        self, host: OldHost, peer: str, steps: int, neurons: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.host = host
        host.ask(peer=peer, T=steps, N=neurons, dtype=str(dtype).removeprefix("torch."), device=str(device))

    def repeat(self) -> Times:
        """As of :class:`Runner`."""
        return self.host.ask(do="repeat")

    def peak_bytes(self) -> int:
        """As of :class:`Runner`."""
        return int(self.host.ask(do="peak_bytes")["bytes"])


def installed(package: str) -> str | None:
    """Its version, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _serve() -> None:
    runner: Runner | None = None
    answers, sys.stdout = sys.stdout, sys.stderr  # what a host prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if "threads" in request:
                torch.set_num_threads(request["threads"])
                answer["version"] = installed("spikingjelly")
            elif "peer" in request:
                runner = None  # frees the last one's memory first
                runner = Runner(
                    request["peer"], request["T"], request["N"], getattr(torch, request["dtype"]),
                    torch.device(request["device"]),
                )  # fmt: skip
            elif request["do"] == "repeat" and runner is not None:
                answer = dict(runner.repeat())
            elif runner is not None:
                answer["bytes"] = runner.peak_bytes()
        except Exception as error:  # whatever a host raises is this peer's result
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
