"""Shortcuts past PyTorch on a CPU, which give the same results faster, and the switch for all of them.

- :mod:`.eager` calls the kernels without PyTorch's dispatcher,
- :mod:`.openmp` runs large jobs on PyTorch's own OpenMP team,
- :mod:`.memory` places large tensors on huge pages.

The environment variable ``QIF_PLUGINS_SHORTCUTS=0`` turns them off, for a process that must not depend on them, or to
find out whether a fault is in one of them. Each checks that the private names that it needs exist; if they do not,
PyTorch's public interface is used. ``docs/compatibility.md`` says what each buys. (:mod:`..autograd` uses a private
name of PyTorch as well, but for ``torch.func``, not for speed, and regardless of this switch.)
"""

from __future__ import annotations

import os

__all__ = ["ENABLED", "VARIABLE"]

VARIABLE = "QIF_PLUGINS_SHORTCUTS"


def _is_on(value: str | None) -> bool:
    """Read the variable's value, once, when the package is imported.

    Raises:
        ValueError: It is neither 0 nor 1.
    """
    if value not in (None, "", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (no shortcuts) or 1 (the default), got {value!r}")
    return value != "0"


ENABLED = _is_on(os.environ.get(VARIABLE))
