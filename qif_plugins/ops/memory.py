"""Large tensors in main memory: fewer page faults, and one buffer less in the backward pass.

The allocator takes a tensor of more than 32 MiB fresh from the operating system and gives it back at once when it is
freed. The first touch of each page of 4 KiB is then a fault, which costs several times what the kernels do with the
page. Two remedies: huge pages where the system leaves the choice to the program (as Linux does by default), and a
gradient that is written over h once nothing else can see h.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import _C, Tensor

__all__ = ["is_last_use", "prefer_huge_pages", "reborn"]

LARGE = 1 << 22
"""Bytes from which a tensor is worth a system call: two huge pages on most machines."""
OVERWRITTEN = 1 << 18
"""Bytes from which h is worth the question whether it can be overwritten."""
MADV_HUGEPAGE = 14
PAGE = 4096


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_madvise = _find_madvise()


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """``tensor``, not yet written, on huge pages if it is large, in main memory, and the system has them to give."""
    size = tensor.nbytes
    if size >= LARGE and _madvise is not None and tensor.device.type == "cpu":
        start = tensor.data_ptr()
        first, stop = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
        _madvise(first, stop - first, MADV_HUGEPAGE)  # advice: where it is refused, nothing is lost
    return tensor


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
    fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return fresh.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
