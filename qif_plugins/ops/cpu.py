"""The Numba implementation: CPU; float16, bfloat16 and float32; parallel over neurons.

The kernels are in :mod:`.cpu_kernels`; each call runs on one thread, without the interpreter lock, and
:mod:`.threads` hands ranges of neurons to threads. Numba's own threading layers are not used: the one that is
always there aborts the process when two Python threads enter it, and the others do not survive a fork or are not
always there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contract import Coefficients, Kind
from .threads import for_each_chunk

__all__ = ["backward", "forward", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    """See :mod:`.contract`."""
    if device.type != "cpu":
        return f"it runs on CPUs and the device is {device.type}; use 'auto' or a backend for that device."
    try:
        from . import cpu_kernels  # noqa: F401
    except ImportError as error:
        return f"Numba cannot be imported ({error}); pip install 'qif-plugins[cpu]'."
    return None


def forward(
    x: Tensor,
    v0: Tensor | float,
    c: Coefficients,
    kind: Kind,
    spike: Tensor,
    v_last: Tensor | None,
    v_seq: Tensor | None,
    h: Tensor | None,
) -> None:
    """See :mod:`.contract`."""
    from . import cpu_kernels as kernels

    steps, neurons = x.shape
    table, spread, _kept = _coefficients(c, neurons, kernels.RUN)
    v_out = v_seq if v_last is None else v_last
    arguments = (
        steps, neurons, x.data_ptr(), _TYPES[x.dtype], *_start(v0), table, spike.data_ptr(), _address(v_last),
        _address(v_seq), 0 if v_out is None else _TYPES[v_out.dtype], _address(h), kind.soft, kind.strict,
        kind.pre_reset,
    )  # fmt: skip
    kernel = kernels.forward_kernel(spread)
    for_each_chunk(neurons, kernels.CHUNK, x.numel(), lambda first, stop: kernel(*arguments, first, stop))


def backward(
    grad_spike: Tensor | None,
    grad_v: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    v0: Tensor | float,
    x: Tensor | None,
    c: Coefficients,
    kind: Kind,
    grad_x: Tensor,
    grad_v0: Tensor | None,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """See :mod:`.contract`."""
    from . import cpu_kernels as kernels

    steps, neurons = h.shape
    table, spread, _kept = _coefficients(c, neurons, kernels.RUN)
    chunks = -(-neurons // kernels.CHUNK)
    # A chunk of neurons meets only so many of a coefficient's values.
    sums = tuple(
        np.zeros((chunks, min(count, kernels.CHUNK // inner + 2)) if needed else (0, 0))
        for (_, count, inner), needed in zip(table[:6].tolist(), needs, strict=True)
    )
    arguments = (
        steps, neurons, _address(grad_spike), _address(grad_v), _address(grad_h), _TYPES[grad_x.dtype],
        0 if grad_v is None else _TYPES[grad_v.dtype], steps if grad_v is not None and grad_v.dim() == 2 else 1,
        h.data_ptr(), *_start(v0), _address(x), table, grad_x.data_ptr(), _address(grad_v0), sums, kind.soft,
        kind.detach_reset, kind.strict, int(kind.shape), kind.pre_reset,
    )  # fmt: skip
    kernel = kernels.backward_kernel(spread)
    for_each_chunk(neurons, kernels.CHUNK, h.numel(), lambda first, stop: kernel(*arguments, first, stop))
    return [
        torch.from_numpy(kernels.total(parts, inner, count)) if needed else None
        for parts, (_, count, inner), needed in zip(sums, table[:6].tolist(), needs, strict=True)
    ]


_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
"""``cpu_kernels.FLOAT, HALF, BFLOAT``; 0 is ``NONE``."""


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _start(v0: Tensor | float) -> tuple[int, int, Any]:
    """Address and type of the initial membrane, and its value where it has none."""
    if isinstance(v0, Tensor):
        return v0.data_ptr(), _TYPES[v0.dtype], np.float32(0)
    return 0, 0, np.float32(v0)


def _coefficients(c: Coefficients, neurons: int, run: int) -> tuple[Any, bool, Any]:
    """A table of address, count and inner; whether coefficients differ within a run; what the addresses belong to."""
    if c.is_uniform:
        return _uniform(c)
    kept = [entry.values if isinstance(entry.values, Tensor) else torch.tensor([entry.values]) for entry in c]
    rows = [
        (values.data_ptr(), values.numel(), neurons if values.numel() == 1 else entry.inner)
        for values, entry in zip(kept, c, strict=True)
    ]
    spread = any(inner < min(run, neurons) for _, _, inner in rows)
    return np.array(rows, np.int64), spread, kept


@lru_cache(maxsize=256)
def _uniform(c: Coefficients) -> tuple[Any, bool, Any]:
    kept = np.array([entry.values for entry in c], np.float32)
    return np.array([(kept[k:].ctypes.data, 1, 1 << 62) for k in range(9)], np.int64), False, kept
