"""What a trainer's saved state must hold before anything of it is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files import check_parts

__all__ = ["PARTS", "check_progress", "check_state"]

PARTS: dict[Any, Any] = {
    "model": {str: object},
    "optimizer": {"state": dict, "param_groups": [{"params": [int], "lr": (float, Tensor)}]},
    "scheduler": (dict, type(None)),
    "scaler": (dict, type(None)),
    "random": [
        {"torch": [Tensor], "numpy": list, "python": list},
    ],
    "epoch": int,
    "step": int,
    "means": {str: [float]},
    "rates": [float],
    "seconds": float,
    "history": [{"epoch": float, "loss": float, "lr": float, "seconds": float, str: float}],
}
"""The parts of :meth:`~.engine.Trainer.state`, as :func:`~qif_plugins.files.check_parts` takes them."""


def check_state(
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    scaler: torch.amp.GradScaler | None,
    steps: int,
) -> None:
    """Check a saved state against the run that is to go on from it; changes nothing.

    Args:
        state: Of :meth:`~.engine.Trainer.state`.
        optimizer: The run's own.
        scheduler: The run's own.
        scaler: The run's own; ``None`` without mixed precision.
        steps: Of the optimizer in an epoch.

    Raises:
        ValueError: A part is missing, of another kind, of another run or at odds with the others.
    """
    check_parts(state, PARTS)
    check_progress(state)
    for name, mine in (("scheduler", scheduler), ("scaler", scaler)):
        if (state[name] is None) != (mine is None):
            has, have = ("no", "one") if state[name] is None else ("a", "none")
            raise ValueError(f"it has {has} {name}, and this run has {have}")
        if mine is not None:
            _check_like(state[name], mine.state_dict(), name)
    if state["step"] >= steps:
        raise ValueError(f"it is in step {state['step']} of an epoch, and this run has {steps}")
    _check_optimizer(state["optimizer"], optimizer, begun=state["epoch"] > 0 or state["step"] > 0)


def check_progress(state: Mapping[str, Any]) -> None:
    """Check that the parts of a state that say how far a run is agree.

    Raises:
        ValueError: They do not.
    """
    epoch, step, history = state["epoch"], state["step"], state["history"]
    if step < 0 or len(history) != epoch:
        raise ValueError(f"its epoch {epoch}, its step {step} and its history of {len(history)} epochs do not agree")
    if any(len(pair) != 2 for pair in state["means"].values()):
        raise ValueError("each of its means must be a count and a total")


def _check_like(saved: dict[str, Any], mine: Mapping[str, Any], name: str) -> None:
    """That the public numbers and lists of one state dictionary are in the other, and are numbers and lists."""
    for key, value in mine.items():
        if key.startswith("_") or key == "verbose":  # which some versions of PyTorch have
            continue
        kind: Any = list if isinstance(value, list | tuple) else float if type(value) in (int, float) else object
        kind = bool if isinstance(value, bool) else int if key in ("last_epoch", "_step_count") else kind
        check_parts(saved, {key: kind}, name)
        if kind is list and len(saved[key]) != len(value):
            raise ValueError(f"{name}.{key} has {len(saved[key])} entries, and this run's {len(value)}")


def _check_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer, *, begun: bool) -> None:
    groups = optimizer.param_groups
    sizes = [[len(group["params"]) for group in some] for some in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"optimizer has groups of {sizes[0]} tensors, and this run's {sizes[1]}: another model's")
    for number, (group, mine) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        for key, value in mine.items():
            if key in group and type(value) in (int, float):
                check_parts(group[key], float, f"optimizer.param_groups[{number}].{key}")
    wanted = _moments(optimizer)
    if begun and wanted and not saved["state"]:
        raise ValueError(f"it lacks optimizer.state, with {' and '.join(wanted)} of every weight")
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, (p for group in groups for p in group["params"]), strict=True))
    for number, entry in saved["state"].items():
        name = f"optimizer.state[{number}]"
        if number not in of_number:
            raise ValueError(f"{name} belongs to no weight")
        check_parts(entry, dict.fromkeys(wanted, object), name)
        for key, value in entry.items():
            if not isinstance(value, Tensor):
                check_parts(value, (float, type(None)), f"{name}.{key}")
            elif value.numel() != 1 and value.shape != of_number[number].shape:
                shape = list(of_number[number].shape)
                raise ValueError(f"{name}.{key} is {list(value.shape)}, and the weight {shape}: another model's")
            elif bool(value.isnan().any()):
                raise ValueError(f"{name}.{key} holds NaN")


def _moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What the usual optimizers keep of every weight."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return ("step", "exp_avg", "exp_avg_sq")
    momentum = isinstance(optimizer, torch.optim.SGD) and any(group["momentum"] for group in optimizer.param_groups)
    return ("momentum_buffer",) if momentum else ()
