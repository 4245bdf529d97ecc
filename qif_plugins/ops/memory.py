"""Large tensors in main memory: fewer page faults.

The allocator takes a tensor of more than 32 MiB fresh from the operating system and gives it back at once when it is
freed. The first touch of each page of 4 KiB is then a fault, which costs several times what the kernels do with the
page. The remedy: memory on huge pages that serves one tensor after another.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref

import torch
from torch import Tensor
from torch.autograd import profiler

__all__ = ["recycled"]

LARGE = 1 << 22
"""Bytes from which a tensor is worth memory of its own: two huge pages on most machines."""
HUGE_PAGE = 1 << 21
CAN_KEEP = all(hasattr(mmap, name) for name in ("MADV_HUGEPAGE", "MADV_FREE"))  # Linux
CAN_KEEP = CAN_KEEP and os.environ.get("QIF_PLUGINS_KEEP_MEMORY") != "0"
KEPT = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 if CAN_KEEP else 0
"""Bytes kept for later tensors at most. The system may take them all the same when it runs short of memory."""

_kept: dict[int, mmap.mmap] = {}
"""By id, oldest first. A tensor may be freed at any moment, also while this is read: so each access is one operation
that no other thread can interrupt, and there is no lock."""


def recycled(tensor: Tensor) -> Tensor:
    """``tensor``, not yet written; if it is large, in main memory, and nobody counts bytes, one like it in kept memory.

    That memory comes on huge pages, if the system has them to give, and waits for the next tensor of its size when the
    last reference to this one is gone.
    """
    if tensor.nbytes < LARGE or tensor.device.type != "cpu" or not CAN_KEEP:
        return tensor
    if getattr(profiler, "_is_profiler_enabled", True):  # which records what PyTorch's allocator gives and takes
        return tensor
    size = -(-tensor.nbytes // HUGE_PAGE) * HUGE_PAGE
    try:
        block = _take(size)
    except OSError:  # no more address space
        _kept.clear()
        return tensor
    lent = memoryview(block)
    weakref.finalize(lent, _keep, block).atexit = False
    flat = torch.frombuffer(lent, dtype=tensor.dtype, count=tensor.numel())
    fresh = torch.empty(0, dtype=tensor.dtype)
    return fresh.set_(flat.untyped_storage(), 0, tensor.shape, tensor.stride())


def _take(size: int) -> mmap.mmap:
    for key, block in reversed(list(_kept.items())):
        if len(block) == size and _kept.pop(key, None) is not None:
            return block
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _keep(block: mmap.mmap) -> None:
    try:
        block.madvise(mmap.MADV_FREE)  # the system takes it when it runs short, and not before
    except OSError:  # a system that cannot do that gets it back at once
        return
    _kept[id(block)] = block
    while sum(map(len, list(_kept.values()))) > KEPT:
        _kept.pop(next(iter(list(_kept)), 0), None)
