"""Our neuron and its peers in a benchmark, each as one call on a sequence ``[T, N]``.

Hosts are imported when their peer is built. As a program (``python -m qif_plugins.experiments.bench.peers``) this
module serves another process, one repetition at a time, so that two versions of one host can be interleaved in one run.

Two clocks. *Call time* is what the caller waits for: from an idle device until it is idle again, Python and launches
included. *Device time*, on a GPU only, is the GPU's own: the whole pass is queued behind a delay that is longer than
Python needs for it, and CUDA events before and after it see no gaps.
"""

from __future__ import annotations

import gc
import importlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...neuron.functional import qif_multi_step
from ...neuron.parameters import QIFParameters
from ...neuron.surrogate import Window

__all__ = [
    "FLOORS",
    "FLOOR_NEW",
    "FLOOR_THERE",
    "OURS",
    "PEERS",
    "OldHost",
    "Runner",
    "draw",
    "dtype_name",
    "moved_bytes",
    "peers_for",
]

PASSES = ("forward", "backward", "both")
Times = dict[str, dict[str, float]]
"""Seconds by clock (``"call"``, and on a GPU ``"device"``) and pass. On a GPU also ``"queued"``: 1 where the whole pass
was queued before the GPU began it, 0 where the device time holds some of Python's, as where a peer waits for the GPU or
launches more than its queue holds (about a thousand kernels)."""
Call = Callable[[Tensor], Any]


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


def _copies_there(device: torch.device) -> Call:
    """The tensor copied three times into memory that was allocated once: what moving the bytes costs."""
    there: list[Tensor] = []

    def call(x: Tensor) -> list[Tensor]:
        x = x.detach()
        if not there:
            there.extend(torch.empty_like(x) for _ in range(3))
        return [tensor.copy_(x) for tensor in there]

    return call


def _copies_new(device: torch.device) -> Call:
    """The tensor copied three times into memory that the operating system maps for it, a fault for each page.

    An allocator has that only sometimes: the C library's hands out again what was freed, if it is small enough.
    """

    def call(x: Tensor) -> list[Tensor]:
        x = x.detach()
        return [_mapped_like(x).copy_(x) for _ in range(3)]  # held until the clock has stopped: unmapped after it

    return call


def _mapped_like(x: Tensor) -> Tensor:
    block = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(block, dtype=x.dtype).view(x.shape)


FLOOR_NEW = "three copies, newly mapped memory"
FLOOR_THERE = "three copies, memory that is there"
FLOORS = (FLOOR_NEW, FLOOR_THERE)
"""In float32 they move as many bytes as forward and backward do; see :func:`moved_bytes`."""
OURS = "qif"
PEERS: dict[str, Callable[[torch.device], Call]] = {
    FLOOR_NEW: _copies_new,
    FLOOR_THERE: _copies_there,
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
    maps = device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE")  # a GPU's allocator keeps what it has
    names = [*(FLOORS if maps else [FLOOR_THERE]), OURS, "qif, reference"]
    if "spikingjelly" in hosts:
        names += ["qif in SpikingJelly", "SpikingJelly LIFNode", "SpikingJelly's own QIFNode"]
        if device.type == "cuda":
            names.append("SpikingJelly FlexSN, our equations")
    if "snntorch" in hosts:
        names += ["qif in snnTorch", "snnTorch Leaky"]
    return names


def draw(steps: int, neurons: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and incoming gradient of a case, ``[T, N]`` each: the same numbers in every process on one device."""
    generator = torch.Generator(device).manual_seed(0)
    x, gradient = (
        torch.randn(steps, neurons, generator=generator, dtype=torch.float32, device=device).to(dtype) for _ in range(2)
    )
    return x, gradient


def dtype_name(dtype: torch.dtype) -> str:
    """As files and requests have it, e.g. ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def moved_bytes(peer: str, x: Tensor) -> int | None:
    """Bytes that forward and backward together must read and write; ``None`` for peers of which that is not known.

    Ours reads x and the incoming gradient and writes spikes and the gradient of x, all in x's dtype, writes h once and
    reads it once in float32, and writes the last membrane, one time step. Each of three copies reads and writes once.
    """
    if peer in FLOORS:
        return 6 * x.nbytes
    return 4 * x.nbytes + 2 * 4 * x.numel() + x[0].nbytes if peer == OURS else None


class Runner:
    """One peer on one input, compiled and loaded; each call is one repetition.

    Args:
        peer: One of :data:`PEERS`.
        x: Input [T, N]. On a CPU each runner has a copy of its own; on a GPU, whose memory is scarcer, all share one.
        gradient: Incoming gradient, as x.
    """

    def __init__(self, peer: str, x: Tensor, gradient: Tensor) -> None:
        self.device = x.device
        self.on_gpu = x.device.type == "cuda"
        self.x = (x.detach() if self.on_gpu else x.detach().clone()).requires_grad_()
        self.gradient = gradient if self.on_gpu else gradient.clone()
        self.is_floor = peer in FLOORS
        self.call = PEERS[peer](x.device)
        with self._current():
            self._forward_and_backward()

    def repeat(self) -> Times:
        """Seconds of the forward pass, of the backward pass, and of both.

        On a CPU, both is their sum. On a GPU the call time of both is measured on its own, since nothing waits between
        the passes in use; its device time is the sum.
        """
        with self._current():
            return self._repeat_on_gpu() if self.on_gpu else {"call": self._forward_and_backward()}

    def _current(self) -> AbstractContextManager[Any]:
        """The GPU current, for peers, events and delays that look to no tensor."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    def _forward_and_backward(self) -> dict[str, float]:
        """The two passes and their call times, where the device does not run on behind Python's back."""
        self.x.grad = None
        began = time.perf_counter()
        spikes = self.call(self.x)
        between = time.perf_counter()
        if not self.is_floor:
            spikes.backward(self.gradient)
        return self._passes(between - began, time.perf_counter() - between)

    def _passes(self, forward: float, backward: float) -> dict[str, float]:
        if self.is_floor:  # of its three copies, forward and backward have half each
            forward = backward = forward / 2
        return dict(zip(PASSES, (forward, backward, forward + backward), strict=True))

    def _repeat_on_gpu(self) -> Times:
        call: dict[str, float] = {}
        device: dict[str, float] = {}
        queued: dict[str, float] = {}
        host: dict[str, float] = {}

        def call_time(which: str, work: Callable[[], Any]) -> Any:
            torch.cuda.synchronize()
            began = time.perf_counter()
            result = work()
            host[which] = time.perf_counter() - began
            torch.cuda.synchronize()
            call[which] = time.perf_counter() - began
            return result

        def device_time(which: str, work: Callable[[], Any]) -> Any:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            _delay(2 * host[which] + 1e-4)
            first.record()
            result = work()
            last.record()
            queued[which] = float(not first.query())  # still behind the delay
            last.synchronize()
            device[which] = first.elapsed_time(last) / 1e3
            return result

        for measure in (call_time, device_time):
            self.x.grad = None
            spikes = measure("forward", partial(self.call, self.x))
            if not self.is_floor:
                measure("backward", partial(spikes.backward, self.gradient))
            del spikes
        self.x.grad = None
        if self.is_floor:
            call, device = (self._passes(taken["forward"], 0.0) for taken in (call, device))
            return {"call": call, "device": device, "queued": dict.fromkeys(PASSES, queued["forward"])}
        call_time("both", lambda: self.call(self.x).backward(self.gradient))
        self.x.grad = None
        device, queued = self._passes(**device), queued | {"both": min(queued.values())}
        return {"call": call, "device": device, "queued": queued}

    def peak_bytes(self) -> int:
        """Memory that one repetition holds at most, besides input and incoming gradient."""
        self.x.grad = None
        if self.is_floor:  # which PyTorch does not see, or only once
            return sum(tensor.nbytes for tensor in self.call(self.x))
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            with self._current():
                self._forward_and_backward()
            return torch.cuda.max_memory_allocated(self.device) - before
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            self._forward_and_backward()
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


def _delay(seconds: float) -> None:
    """Keep the current GPU from what is queued next, for about ``seconds``."""
    if hasattr(torch.cuda, "_sleep"):  # not public; without it, the results say that nothing was queued in time
        torch.cuda._sleep(int(seconds * _cycles_a_second(torch.cuda.current_device())))


@cache
def _cycles_a_second(device: int) -> float:
    cycles = 10_000_000
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # loads the kernel, and wakes the clocks
    first.record()
    torch.cuda._sleep(cycles)
    last.record()
    last.synchronize()
    return cycles / (first.elapsed_time(last) / 1e3)


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
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qif_plugins.experiments.bench.peers"],
            env={**os.environ, "PYTHONPATH": str(folder)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.version = self.ask(do="start", threads=torch.get_num_threads())["version"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            RuntimeError: What went wrong there.
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
    """As :class:`Runner`, in the process of an :class:`OldHost`."""

    def __init__(
        self, host: OldHost, peer: str, steps: int, neurons: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.host, self.peer = host, peer
        host.ask(do="build", peer=peer, T=steps, N=neurons, dtype=dtype_name(dtype), device=str(device))

    def repeat(self) -> Times:
        """As of :class:`Runner`; then the other process has gone to sleep, whose threads spin after their work."""
        times = self.host.ask(do="repeat", peer=self.peer)
        time.sleep(SETTLE)
        return times

    def peak_bytes(self) -> int:
        """As of :class:`Runner`."""
        return int(self.host.ask(do="peak_bytes", peer=self.peer)["bytes"])


def installed(package: str) -> str | None:
    """Its version, or ``None``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    """What :class:`OldHost` asks for: the peers of one case, by name."""

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


def release() -> None:
    """Give back what nobody holds, also what PyTorch keeps of a GPU's memory for itself."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    _serve()
