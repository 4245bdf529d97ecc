"""Estimate the memory that a training run needs, before it begins."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...diagnostics.spiking import spiking_layers

_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_here() -> float:
    """Return the bytes of memory that a run may fill: of the first GPU, or else of the container or machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    sizes = [math.inf]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for path in map(Path, _CONTAINER):
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(float(path.read_text()))
    return min(sizes)


def weights(model: nn.Module) -> int:
    """Count the bytes of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def activations(model: nn.Module, shape: tuple[int, int, int], reset: Callable[[nn.Module], Any]) -> int:
    """Count the numbers that one time step of one sample keeps for the backward pass.

    Those are the outputs of the layers with weights, of norms and of neurons.

    Args:
        model: Model of sequences ``[T, N, C, H, W]``; a copy of it is run.
        shape: ``[C, H, W]``.
        reset: Clears the state of its neurons.
    """
    copy, counts = deepcopy(model).eval(), []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            counts.append(output.numel())

    layers = {id(layer): layer for layer in spiking_layers(copy).values()}
    layers |= {id(module): module for module in copy.modules() if list(module.parameters(recurse=False))}
    for layer in layers.values():
        layer.register_forward_hook(count)
    like = next(copy.parameters())
    with torch.no_grad():
        reset(copy)
        copy(torch.zeros(1, 1, *shape, dtype=like.dtype, device=like.device))
    return sum(counts)


def check_memory(needed: float, what: str, way_out: str) -> None:
    """Raise ``ValueError`` if more memory is needed than there is.

    Args:
        needed: Number of bytes.
        what: Subject and verb of the error, such as ``"8 samples take"``.
        way_out: Remedy, for the error.
    """
    here = memory_here()
    if needed > here:
        size = f"about {needed / 1e9:,.0f} GB" if needed < math.inf else "more than can be counted"
        raise ValueError(f"{what} {size}, and the memory here is {here / 1e9:,.0f} GB; {way_out}")
