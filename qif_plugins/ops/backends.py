"""List the implementations, find those that run on a device, and choose one for ``"auto"``."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch

logger = logging.getLogger("qif_plugins")

BackendName = Literal["auto", "numba", "triton", "cupy", "torch"]
"""The values of an argument ``backend``."""
BACKENDS: tuple[BackendName, ...] = ("numba", "triton", "cupy", "torch")
"""Implementations by public name, best first on any device; each is the module ``NAME_backend`` of this package."""


@lru_cache(maxsize=16)
def implementation(backend: str) -> ModuleType:
    """Import the module that implements ``backend``, at its first use.

    Raises:
        ValueError: Unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from 'auto', {', '.join(map(repr, BACKENDS))}")
    return importlib.import_module(f".{backend}_backend", __package__)


@lru_cache(maxsize=64)
def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """Say why ``backend`` cannot run on ``device`` and what to install or change; ``None`` if it can run.

    Args:
        backend: One of the names in :data:`BACKENDS`.
        device: The device of the input.

    Raises:
        ValueError: Unknown backend.
    """
    reason: str | None = implementation(backend).unavailable(device)
    return reason


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """List the implementations that run on ``device``, best first.

    Args:
        device: A torch device. Default ``"cpu"``.

    Returns:
        Names to pass as ``backend``; ``"torch"``, the reference, is always among them.
    """
    device = torch.device(device)
    return tuple(name for name in BACKENDS if unavailable_reason(name, device) is None)


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve ``"auto"`` and check an explicit choice.

    Raises:
        ValueError: Unknown backend, or float64 asked of one that computes in float32.
        RuntimeError: The backend does not run on ``device``; the message says what to install.
    """
    if backend == "auto":
        return _best(device) if dtype != torch.float64 else "torch"
    reason = unavailable_reason(backend, device)
    if reason is not None:
        raise RuntimeError(
            f"backend {backend!r} cannot run on {device}: {reason} "
            f"Available there: {', '.join(map(repr, available_backends(device)))}."
        )
    if dtype == torch.float64 and backend != "torch":
        raise ValueError(
            f"backend {backend!r} computes in float32 and the input is float64; use backend='torch' or 'auto', "
            "or convert the input."
        )
    return backend


@lru_cache(maxsize=64)
def _best(device: torch.device) -> str:
    # On a CPU Triton runs in its interpreter, which is meant for tests, so it has to be asked for by name.
    best = next(
        name
        for name in BACKENDS
        if unavailable_reason(name, device) is None and not (name == "triton" and device.type == "cpu")
    )
    logger.info("qif_plugins: backend 'auto' takes %r on %s", best, device)
    return best
