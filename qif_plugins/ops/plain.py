"""Whether a call is plain: nothing but autograd would notice if it went past PyTorch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import _C, Tensor, nn
from torch.autograd import forward_ad

__all__ = ["is_plain"]

_TYPES = (Tensor, nn.Parameter)


def _bits(*names: str) -> int:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return int(keys.raw_repr())


# None of this is public. In a version that lacks a name no call counts as plain, and the operator serves them all.
try:
    _AUTOGRAD = _bits("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    _KEYS = frozenset((_AUTOGRAD, _bits("CPU", "AutocastCPU")))
    """Of an ordinary tensor on the CPU, and of one that was made in inference mode. Any other kind has more."""
    _STATES = frozenset((_bits("BackendSelect", "ADInplaceOrView"), _bits("BackendSelect")))
    """Of a thread without modes, transforms, tracers and compilers."""
    _state: Any = _C._dispatch_tls_local_include_set
    _keys: Any = _C._dispatch_keys
    _function_modes: Any = _C._len_torch_function_stack
    _known = isinstance(forward_ad._current_level, int)
except AttributeError:
    _known = False


def is_plain(*tensors: Any) -> bool:
    """Whether all ``tensors`` (what is none is skipped) are ordinary CPU tensors and nothing watches operators."""
    if not _known or torch.compiler.is_compiling():
        return False
    if _state().raw_repr() not in _STATES or _function_modes() or forward_ad._current_level >= 0:
        return False
    return all(
        type(tensor) in _TYPES and _keys(tensor).raw_repr() in _KEYS for tensor in tensors if isinstance(tensor, Tensor)
    )
