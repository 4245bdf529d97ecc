"""Large tensors in main memory: fewer page faults, and one buffer less in the backward pass.

The allocator takes a tensor of more than 32 MiB fresh from the operating system and gives it back at once when it is
freed. The first touch of each page of 4 KiB is then a fault, which costs several times what the kernels do with the
page. Two remedies: memory on huge pages that serves one tensor after another, and a gradient that is written over h
once nothing else can see h.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import weakref
from typing import Any, ClassVar

import torch
from torch import _C, Tensor
from torch.autograd import profiler

__all__ = ["is_last_use", "reborn", "recycled"]

LARGE = 1 << 22
"""Bytes from which a tensor is worth memory of its own: two huge pages on most machines."""
OVERWRITTEN = 1 << 18
"""Bytes from which h is worth the question whether it can be overwritten."""
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
    return _with_storage(flat.untyped_storage(), 0, tensor)


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


# Not public, and not in every version of PyTorch; without them nothing is overwritten.
_keeps_graph = getattr(_C._autograd, "_get_current_graph_task_keep_graph", None)
_storage_references = getattr(_C, "_storage_Use_Count", None)
_shows_hooks = hasattr(getattr(_C._autograd, "SavedTensor", None), "unpack_hook")


def is_last_use(ctx: Any, saved: Tensor, is_output: bool) -> bool:
    """Whether ``saved`` may be overwritten: nothing but the backward pass that is running can see it.

    The pass frees the graph (no ``retain_graph``), no hook packed the tensor, and nobody else holds its storage.

    Args:
        ctx: Context of the ``torch.autograd.Function`` whose backward asks.
        saved: What it saved first.
        is_output: Whether that is one of its outputs.
    """
    if saved.nbytes < OVERWRITTEN or _keeps_graph is None or _storage_references is None or not _shows_hooks:
        return False
    if _keeps_graph() or ctx._raw_saved_tensors[0].unpack_hook is not None:
        return False
    return _references(saved) == _own_references(is_output)


def _references(tensor: Tensor) -> tuple[int, int]:
    """How many tensors share the storage, and how many Python references it has."""
    storage = tensor.untyped_storage()
    assert _storage_references is not None
    return _storage_references(storage._cdata), sys.getrefcount(storage)


class _Probe(torch.autograd.Function):
    """Saves what it makes, returns it or not, drops it, and counts in its backward pass what is left."""

    seen: ClassVar[dict[bool, tuple[int, int]]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_output: bool) -> tuple[Tensor, Tensor | None]:
        kept = x.clone()
        ctx.save_for_backward(kept)
        ctx.is_output = is_output
        return x.clone(), kept if is_output else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx._raw_saved_tensors[0].unpack_hook is None:
            (kept,) = ctx.saved_tensors
            _Probe.seen[ctx.is_output] = _references(kept)
        return gradients[0], None


def _own_references(is_output: bool) -> tuple[int, int] | None:
    """What :func:`_references` finds where nobody but PyTorch holds the tensor; asked of it, as versions may differ."""
    if is_output not in _Probe.seen:
        with torch.enable_grad():
            out = _Probe.apply(torch.zeros(1, requires_grad=True), is_output)[0]
            out.backward()
    return _Probe.seen.get(is_output)


def reborn(tensor: Tensor) -> Tensor:
    """A new tensor in the memory of ``tensor``, which has no history and is no view."""
    return _with_storage(tensor.untyped_storage(), int(tensor.storage_offset()), tensor)


def _with_storage(storage: torch.UntypedStorage, offset: int, like: Tensor) -> Tensor:
    fresh = torch.empty(0, dtype=like.dtype, device=like.device)
    return fresh.set_(storage, offset, like.shape, like.stride())
