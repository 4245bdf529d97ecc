"""Training in one process or several, on Hugging Face Accelerate."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def accelerate() -> Any:
    """Import Hugging Face Accelerate.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import accelerate
    except ImportError:
        raise ImportError(
            "training needs accelerate, which is not installed; install it with: pip install 'qif-plugins[train]'"
        ) from None
    return accelerate


def prepare(model: nn.Module, cpu: bool | None) -> tuple[Any, Any]:
    """Make an accelerator, and prepare a model for training: on its device, in a copy for each of several processes.

    Accelerate keeps one state per process. It decides the device of all accelerators, and a new accelerator overwrites
    its settings. Several processes have to agree on it. In a single process, a trainer gets a state of its own, so that
    the user's accelerators and other trainers keep theirs.

    Args:
        model: The model.
        cpu: Whether to stay on the CPU. ``None``: if this is the only process and all parameters are on the CPU.

    Returns:
        The accelerator and the prepared model.

    Raises:
        ValueError: Several processes already have an accelerator with other settings.
    """
    several = _processes() > 1
    if cpu is None:
        cpu = not several and all(parameter.device.type == "cpu" for parameter in model.parameters())
    Accelerator, library = accelerate().Accelerator, accelerate().state
    if several or (dist.is_available() and dist.is_initialized()):
        try:
            accelerator = Accelerator(mixed_precision="no", cpu=cpu or _gloo())
        except ValueError as error:
            raise ValueError(
                f"these processes have an Accelerator that a trainer cannot share: {error} Make it with "
                "mixed_precision='no' and on the same device; a trainer sets its own precision"
            ) from error
        return accelerator, accelerator.prepare_model(model)
    kinds = (library.PartialState, library.AcceleratorState, library.GradientState)
    states = [(kind, vars(kind)["_shared_state"]) for kind in kinds]
    try:
        for kind, _ in states:
            kind._shared_state = {}
        accelerator = Accelerator(mixed_precision="no", cpu=cpu)
        return accelerator, accelerator.prepare_model(model)
    finally:
        for kind, state in states:
            kind._shared_state = state


def gather(value: Any, processes: int) -> list[Any]:
    """Collect a value from every process, in their order."""
    return accelerate().utils.gather_object([value]) if processes > 1 else [value]


def share(samples: int, process: int, processes: int) -> int:
    """Count the samples of a batch that :meth:`~.batches.Batches.epoch` gives to one process."""
    return samples // processes + (process < samples % processes)


def main_process_first() -> AbstractContextManager[None]:
    """Let the main process run the block before the others, for example to convert a data set once."""
    if _processes() == 1:
        return contextlib.nullcontext()
    first: AbstractContextManager[None] = accelerate().PartialState(cpu=_gloo()).main_process_first()
    return first


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _gloo() -> bool:
    """Return whether there are several processes without GPUs, which Accelerate has to be told."""
    return _processes() > 1 and not (torch.cuda.is_available() or torch.xpu.is_available())
