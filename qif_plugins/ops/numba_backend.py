"""Implementation in Numba, for CPUs; float16, bfloat16 and float32; parallel over neurons.

The kernels are in :mod:`.numba_kernels`; each call runs on one thread, without the interpreter lock, and
:mod:`.threads` hands ranges of neurons to threads. Numba's own threading layers are not used: the one that is
always there aborts the process when two Python threads enter it, the others do not survive a fork or are not always
there, and all would share the cores with PyTorch's threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .contract import Coefficients, Kind
from .threads import for_each_chunk

SHARE = 1 << 16
"""Smallest number of neuron-steps that a thread takes at a time."""
STREAMED = 1 << 20
"""Neuron-steps from which the outputs of the forward pass are too large for a core's caches."""


def unavailable(device: torch.device) -> str | None:
    """See :mod:`.contract`."""
    if device.type != "cpu":
        return f"it runs on CPUs and the device is {device.type}; use 'auto' or a backend for that device."
    try:
        from . import numba_kernels  # noqa: F401
    except ImportError as error:
        return f"Numba cannot be imported ({error}); pip install 'qif-plugins[cpu]'."
    return None


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """Import Numba and the kernels, at the first call: an import statement costs a microsecond at every other one."""
    from . import numba_kernels

    return numba_kernels


class Table(NamedTuple):
    """Coefficients in the form that the kernels take.

    Attributes:
        rows: Address, count and inner of each coefficient.
        spread: Whether coefficients differ within a run of neurons.
        kept: Owner of the memory at the addresses.
    """

    rows: Any
    spread: bool
    kept: Any


def forward(
    x: Tensor, v0: Tensor | float, c: Coefficients | Table, kind: Kind, spike: Tensor, v_last: Tensor | None,
    v_seq: Tensor | None, h: Tensor | None, steps: int | None = None,
) -> None:  # fmt: skip
    """See :mod:`.contract`; given ``steps``, the contiguous tensors may have any shape."""
    kernels = _kernels()
    steps, neurons = _sizes(x, steps)
    table = c if isinstance(c, Table) else tabulate(c, neurons)
    v_out = v_seq if v_last is None else v_last
    arguments = (
        steps, neurons, x.data_ptr(), _TYPES[x.dtype], *_start(v0), table.rows, spike.data_ptr(), _address(v_last),
        _address(v_seq), 0 if v_out is None else _TYPES[v_out.dtype], _address(h), kind.soft, kind.strict,
        kind.pre_reset, kind.rebound, _streams(spike, h, steps, neurons),
    )  # fmt: skip
    kernel = kernels.forward_kernel(table.spread)
    for_each_chunk(neurons, _share(steps), steps * neurons, kernel, arguments)


def backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h: Tensor, v0: Tensor | float,
    x: Tensor | None, c: Coefficients | Table, kind: Kind, grad_x: Tensor, grad_v0: Tensor | None,
    needs: tuple[bool, ...], steps: int | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """See :mod:`.contract`; given ``steps``, the contiguous tensors may have any shape."""
    kernels = _kernels()
    steps, neurons = _sizes(h, steps)
    table = c if isinstance(c, Table) else tabulate(c, neurons)
    sums = _sums(table.rows, needs, neurons, kernels.CHUNK) if any(needs) else _NO_SUMS
    arguments = (
        steps, neurons, _address(grad_spike), _address(grad_v), _address(grad_h), _TYPES[grad_x.dtype],
        0 if grad_v is None else _TYPES[grad_v.dtype], 1 if grad_v is None else grad_v.numel() // neurons,
        h.data_ptr(), *_start(v0), _address(x), table.rows, grad_x.data_ptr(), _address(grad_v0), sums, kind.soft,
        kind.detach_reset, kind.strict, int(kind.shape), kind.pre_reset, kind.rebound,
    )  # fmt: skip
    kernel = kernels.backward_kernel(table.spread)
    chunk = _share(steps) if sums is _NO_SUMS else kernels.CHUNK
    for_each_chunk(neurons, chunk, steps * neurons, kernel, arguments)
    if sums is _NO_SUMS:
        return [None] * 6
    return [
        torch.from_numpy(kernels.total(parts, inner, count)) if needed else None
        for parts, (_, count, inner), needed in zip(sums, table.rows[:6].tolist(), needs, strict=True)
    ]


def tabulate(c: Coefficients, neurons: int) -> Table:
    """Make the table of the coefficients of ``neurons`` neurons; it is valid as long as they are."""
    if c.is_uniform:
        return _uniform(c)
    kept = [entry.values if isinstance(entry.values, Tensor) else _one(entry.values) for entry in c]
    rows = [
        (values.data_ptr(), values.numel(), neurons if values.numel() == 1 else entry.inner)
        for values, entry in zip(kept, c, strict=True)
    ]
    spread = any(inner < min(_kernels().RUN, neurons) for _, _, inner in rows)
    return Table(np.array(rows, np.int64), spread, kept)


@lru_cache(maxsize=256)
def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float32, device="cpu")


@lru_cache(maxsize=256)
def _uniform(c: Coefficients) -> Table:
    kept = np.array([entry.values for entry in c], np.float32)
    return Table(np.array([(kept[k:].ctypes.data, 1, 1 << 62) for k in range(9)], np.int64), False, kept)


_NO_SUMS = (np.zeros((0, 0)),) * 6


def _sums(rows: Any, needs: tuple[bool, ...], neurons: int, chunk: int) -> tuple[Any, ...]:
    """Allocate the sums of the numbers' gradients, one per chunk of neurons."""
    chunks = -(-neurons // chunk)
    # A chunk of neurons meets only so many of a coefficient's values.
    return tuple(
        np.zeros((chunks, min(count, chunk // inner + 2)) if needed else (0, 0))
        for (_, count, inner), needed in zip(rows[:6].tolist(), needs, strict=True)
    )


_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
"""``numba_kernels.FLOAT, HALF, BFLOAT``; 0 is ``NONE``."""


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _start(v0: Tensor | float) -> tuple[int, int, Any]:
    """Return address and type of the initial membrane, or zeros and its value if it is a float."""
    if isinstance(v0, Tensor):
        return v0.data_ptr(), _TYPES[v0.dtype], np.float32(0)
    return 0, 0, np.float32(v0)


def _streams(spike: Tensor, h: Tensor | None, steps: int, neurons: int) -> bool:
    """Whether to write spikes and h past the caches, because they are too large for them."""
    if h is None or spike.dtype != torch.float32 or steps * neurons < STREAMED or neurons % _kernels().BURST:
        return False
    return (spike.data_ptr() | h.data_ptr()) % (4 * _kernels().VECTOR) == 0


def _share(steps: int) -> int:
    """Return the smallest number of neurons for a thread, in whole blocks; for passes without sums over neurons."""
    block = _kernels().BLOCK
    return -(-SHARE // (steps * block)) * block


def _sizes(x: Tensor, steps: int | None) -> tuple[int, int]:
    steps = x.shape[0] if steps is None else steps
    return steps, x.numel() // steps
