"""Time one peer on one input, by two clocks, and measure its memory.

*Call time* is what the caller waits for: from an idle device until it is idle again, Python and launches included.
*Device time*, on a GPU only, is the GPU's own: the whole pass is queued behind a delay that is longer than Python needs
for it, and CUDA events before and after it see no gaps.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .peers import FLOORS, PEERS

PASSES = ("forward", "backward", "both")
Times = dict[str, dict[str, float]]
"""Seconds by clock (``"call"``, and on a GPU ``"device"``) and pass. On a GPU also ``"queued"``: 1 where the whole pass
was queued before the GPU began it, 0 where the device time holds some of Python's, as where a peer waits for the GPU or
launches more than its queue holds (about a thousand kernels)."""


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
        """Measure the seconds of the forward pass, of the backward pass, and of both.

        On a CPU, both is their sum. On a GPU the call time of both is measured on its own, since nothing waits between
        the passes in use; its device time is the sum.
        """
        with self._current():
            return self._repeat_on_gpu() if self.on_gpu else {"call": self._forward_and_backward()}

    def _current(self) -> AbstractContextManager[Any]:
        """Make the GPU current, for peers, events and delays that take no tensor."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    def _forward_and_backward(self) -> dict[str, float]:
        """Run the two passes and return their call times, where the device does not run on while Python does."""
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
        """Measure the largest memory that one repetition holds, without input and incoming gradient."""
        self.x.grad = None
        if self.is_floor:  # which PyTorch does not see, or only once
            return sum(tensor.nbytes for tensor in self.call(self.x))
        with self._current():
            return peak_bytes(self.device, self._forward_and_backward)


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Measure the largest memory that PyTorch holds during ``call`` beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # Our neurons call the kernels another way under a profiler, unless it hides; its part in C++ records all the same.
    hidden = mock.patch.object(torch.autograd.profiler, "_is_profiler_enabled", False, create=True)
    with _quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile, hidden:
        call()
    held = peak = 0
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the profiler's C++ code writes to standard error."""
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
    """Delay what is queued next on the current GPU by about ``seconds``."""
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


def release() -> None:
    """Free memory that is no longer in use, and the GPU memory that PyTorch keeps for later."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
