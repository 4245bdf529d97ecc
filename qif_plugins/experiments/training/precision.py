"""Mixed precision of a model's forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .processes import accelerate

__all__ = ["PRECISIONS", "autocast_forward", "forward_replaced"]

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of autocast by name."""


def autocast_forward(model: nn.Module, device: str, precision: str) -> Callable[..., Any] | None:
    """Wrap a model's forward in autocast; its outputs become float32 again. ``None`` for the precision ``"no"``."""
    dtype, forward = PRECISIONS[precision], model.forward
    if dtype is None:
        return None
    to_float32 = accelerate().utils.convert_to_fp32

    @functools.wraps(forward)
    def in_half(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            output = forward(*args, **kwargs)
        return to_float32(output)

    return in_half


@contextlib.contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Let a model run ``forward`` inside the block, and its own forward again afterwards."""
    if forward is None:
        yield
        return
    attributes = vars(model)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
