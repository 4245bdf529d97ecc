"""Our neuron and its peers in a benchmark, each as one call on a sequence ``[T, N]``.

Hosts are imported when their peer is built.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...neuron.functional import qif_multi_step
from ...neuron.parameters import QIFParameters
from ...neuron.surrogate import Window
from ...ops.backends import BackendName, available_backends

Call = Callable[[Tensor], Any]


def _ours(backend: BackendName) -> Callable[[torch.device], Call]:
    def build(device: torch.device) -> Call:
        params = QIFParameters()
        window = Window.unbiased(params)
        return lambda x: qif_multi_step(x, 0.0, params, window, backend=backend)[0]

    return build


def _spikingjelly(make: Callable[[Any], Any]) -> Callable[[torch.device], Call]:
    """Build the call of a node that ``make`` creates from SpikingJelly's module of neurons."""

    def build(device: torch.device) -> Call:
        node = make(importlib.import_module("spikingjelly.activation_based.neuron")).to(device)

        def call(x: Tensor) -> Tensor:
            node.reset()
            return node(x)

        return call

    return build


def _flex_step(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One step of our equations with SpikingJelly's ATan, for its FlexSN to fuse."""
    from spikingjelly.activation_based import surrogate

    h = 0.25 * v * (v - 0.5) + x
    s = surrogate.atan.apply(h - 1.0, 2.0)
    return s, (1.0 - s) * h


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
    """Copy the tensor three times into memory that was allocated once: the cost of moving the bytes."""
    there: list[Tensor] = []

    def call(x: Tensor) -> list[Tensor]:
        x = x.detach()
        if not there:
            there.extend(torch.empty_like(x) for _ in range(3))
        return [tensor.copy_(x) for tensor in there]

    return call


def _copies_new(device: torch.device) -> Call:
    """Copy the tensor three times into memory that the operating system maps for it, with a fault for each page.

    An allocator has this cost only in part: that of the C library reuses freed memory, if it is small enough.
    """

    def call(x: Tensor) -> list[Tensor]:
        x = x.detach()
        return [_mapped_like(x).copy_(x) for _ in range(3)]  # held until the clock has stopped: unmapped after it

    return call


def _mapped_like(x: Tensor) -> Tensor:
    block = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(block, dtype=x.dtype).view(x.shape)


FLOOR_NEW = "three copies, newly mapped memory"
FLOOR_THERE = "three copies, reused memory"
FLOORS = (FLOOR_NEW, FLOOR_THERE)
"""In float32 they move as many bytes as forward and backward do; see :func:`moved_bytes`."""
OURS = "qif"
OTHER_KERNELS = {"triton": "qif, triton", "cupy": "qif, cupy"}
"""Our kernels on a GPU by backend, measured where ``"auto"``, which :data:`OURS` takes, chooses another one."""
PEERS: dict[str, Callable[[torch.device], Call]] = {
    FLOOR_NEW: _copies_new,
    FLOOR_THERE: _copies_there,
    OURS: _ours("auto"),
    "qif, triton": _ours("triton"),
    "qif, cupy": _ours("cupy"),
    "qif, reference": _ours("torch"),
    "qif in SpikingJelly": _spikingjelly(
        lambda _: importlib.import_module("qif_plugins.adapters.spikingjelly").QIFNode(step_mode="m")
    ),
    "SpikingJelly LIFNode": _spikingjelly(lambda neuron: neuron.LIFNode(step_mode="m")),
    "SpikingJelly LIFNode, cupy": _spikingjelly(lambda neuron: neuron.LIFNode(step_mode="m", backend="cupy")),
    "SpikingJelly's own QIFNode": _spikingjelly(lambda neuron: neuron.QIFNode(step_mode="m")),
    "SpikingJelly FlexSN, our equations": _spikingjelly(
        lambda neuron: neuron.FlexSN(_flex_step, num_states=1, step_mode="m")
    ),
    "qif in snnTorch": _snntorch(ours=True),
    "snnTorch Leaky": _snntorch(ours=False),
}
"""Functions that build the call on a device, by the peer's name."""


def peers_for(device: torch.device, hosts: tuple[str, ...]) -> list[str]:
    """List the peers to measure on ``device`` with these hosts installed."""
    maps = device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE")  # a GPU's allocator keeps its memory
    others = [OTHER_KERNELS[name] for name in available_backends(device)[1:] if name in OTHER_KERNELS]
    names = [*(FLOORS if maps else [FLOOR_THERE]), OURS, *(others if device.type == "cuda" else []), "qif, reference"]
    if "spikingjelly" in hosts:
        names += ["qif in SpikingJelly", "SpikingJelly LIFNode", "SpikingJelly's own QIFNode"]
        if device.type == "cuda":
            names.append("SpikingJelly FlexSN, our equations")
    if "snntorch" in hosts:
        names += ["qif in snnTorch", "snnTorch Leaky"]
    return names


def draw(steps: int, neurons: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw input and incoming gradient of a case, ``[T, N]`` each: the same numbers in every process on a device."""
    generator = torch.Generator(device).manual_seed(0)
    x, gradient = (
        torch.randn(steps, neurons, generator=generator, dtype=torch.float32, device=device).to(dtype) for _ in range(2)
    )
    return x, gradient


def dtype_name(dtype: torch.dtype) -> str:
    """Name a type of number as files and requests do, e.g. ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def moved_bytes(peer: str, x: Tensor) -> int | None:
    """Count the bytes that forward and backward together must read and write; ``None`` where that is not known.

    Ours reads x and the incoming gradient and writes spikes and the gradient of x, all in x's dtype, writes h once and
    reads it once in float32, and writes the last membrane, one time step. Each of three copies reads and writes once.
    """
    if peer in FLOORS:
        return 6 * x.nbytes
    ours = (OURS, *OTHER_KERNELS.values())
    return 4 * x.nbytes + 2 * 4 * x.numel() + x[0].nbytes if peer in ours else None
