"""Place large tensors in main memory on huge pages, which take fewer page faults.

PyTorch's allocator takes a tensor of more than 32 MiB fresh from the operating system and gives it back when it is
freed. The first touch of each page of 4 KiB is then a fault, which costs several times what the kernels do with the
page. So this module advises the system to use huge pages for it, as NumPy does for its arrays: one fault in place of
512. A system without huge pages ignores the advice. The tensor remains PyTorch's own in every respect.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from torch import Tensor

from . import ENABLED

LARGE = 1 << 22
"""Bytes from which a tensor is worth the call: two huge pages on most machines, and NumPy's own limit."""


def _find_madvise() -> Callable[[int, int, int], int] | None:
    """Find the C library's ``madvise``; ``None`` on systems without huge pages."""
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
    """Ask for huge pages for ``tensor``, to which nothing has been written yet, if it is large and in main memory."""
    if _madvise is None or tensor.nbytes < LARGE or tensor.device.type != "cpu":
        return tensor
    page, address = mmap.PAGESIZE, tensor.data_ptr()
    first, stop = -(-address // page) * page, (address + tensor.nbytes) // page * page
    _madvise(first, stop - first, mmap.MADV_HUGEPAGE)  # if it fails, the memory can be used as it is
    return tensor
