"""The switch for every shortcut: a way that is faster than PyTorch's public one, and gives the same results.

There are three, and the environment variable ``QIF_PLUGINS_SHORTCUTS=0`` turns all of them off, for a process that
must not depend on them and to find out whether a fault lies in one:

- small calls on a CPU go past PyTorch's dispatcher (:mod:`.eager`),
- large jobs run on PyTorch's own OpenMP team (:mod:`.threads`),
- large tensors in main memory lie on huge pages (:mod:`.memory`).

Each looks for what it needs that is not public, and a version or a system without it has the public way. So does
:mod:`.autograd`, which is none of them: what it registers is there for ``torch.func``, whatever the switch says.
"""

from __future__ import annotations

import os

__all__ = ["ENABLED", "VARIABLE"]

VARIABLE = "QIF_PLUGINS_SHORTCUTS"


def _is_on(value: str | None) -> bool:
    """What the variable says; read once, when the package is imported.

    Raises:
        ValueError: It is neither 0 nor 1.
    """
    if value not in (None, "", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (no shortcuts) or 1 (the default), got {value!r}")
    return value != "0"


ENABLED = _is_on(os.environ.get(VARIABLE))
