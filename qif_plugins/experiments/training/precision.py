"""Mixed precision of a model's forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .processes import accelerate

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of autocast by name."""


@contextlib.contextmanager
def autocast_forward(model: nn.Module, device: str, precision: str) -> Iterator[None]:
    """Run a model's forward in autocast inside the block; its outputs become float32 again."""
    dtype, forward, attributes = PRECISIONS[precision], model.forward, vars(model)
    if dtype is None:
        yield
        return

    @functools.wraps(forward)
    def in_half(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            output = forward(*args, **kwargs)
        return accelerate().utils.convert_to_fp32(output)

    before = attributes.get("forward")
    attributes["forward"] = in_half
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
