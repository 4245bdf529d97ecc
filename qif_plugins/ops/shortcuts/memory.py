"""Place large tensors in main memory on huge pages, which take fewer page faults.

PyTorch's allocator takes a tensor of more than 32 MiB fresh from the operating system and gives it back when it is
freed. The first touch of each page of 4 KiB is then a fault, which costs several times what the kernels do with the
page. So the system is told, as NumPy tells it of its arrays, that this memory is worth huge pages: one fault in place
of 512. That is advice, which a system without huge pages ignores; the tensor stays PyTorch's own in every respect.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from torch import Tensor

from . import ENABLED

__all__ = ["on_huge_pages", "uses_huge_pages"]

LARGE = 1 << 22
"""Bytes from which a tensor is worth the call: two huge pages on most machines, and NumPy's own limit."""


def _find_madvise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``, where there are huge pages to ask for."""
    if not (ENABLED and hasattr(mmap, "MADV_HUGEPAGE")):  # Linux
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise.restype = ctypes.c_int
    return madvise


_madvise = _find_madvise()


def uses_huge_pages() -> bool:
    """Whether the system is asked for huge pages in this process."""
    return _madvise is not None


def on_huge_pages(tensor: Tensor) -> Tensor:
    """``tensor``, which nobody has written to; if it is large and in main memory, its pages will be huge."""
    if _madvise is None or tensor.nbytes < LARGE or tensor.device.type != "cpu":
        return tensor
    page, address = mmap.PAGESIZE, tensor.data_ptr()
    first, stop = -(-address // page) * page, (address + tensor.nbytes) // page * page
    _madvise(first, stop - first, mmap.MADV_HUGEPAGE)  # whatever it answers, the memory can be used
    return tensor
