"""Check a trainer's saved state before any of it is restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...support.files import check_parts

PARTS: dict[Any, Any] = {
    "model": {str: object},
    "optimizer": {"state": dict, "param_groups": [{"params": [int], "lr": (float, Tensor)}]},
    "scheduler": (dict, type(None)),
    "scaler": (dict, type(None)),
    "random": [{"torch": [Tensor], "numpy": list, "python": list}],
    "epoch": int,
    "step": int,
    "means": {str: [float]},
    "rates": [float],
    "seconds": float,
    "history": [{"epoch": float, "loss": float, "lr": float, "seconds": float, str: float}],
}
"""The parts of :meth:`~.engine.Trainer.state`, as :func:`~qif_plugins.support.files.check_parts` takes them.

Early files have no ``"unmoved"``, the weights for which the optimizer has no state yet."""


def check_state(
    state: Mapping[str, Any], optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    scaler: torch.amp.GradScaler | None, steps: int,
) -> None:  # fmt: skip
    """Check a saved state against the run that is to resume from it; changes nothing.

    Args:
        state: Result of :meth:`~.engine.Trainer.state`.
        optimizer: The run's optimizer.
        scheduler: The run's schedule, if any.
        scaler: The run's loss scaler; ``None`` without mixed precision.
        steps: Optimizer steps in an epoch.

    Raises:
        ValueError: A part is missing, has another type, belongs to another run or contradicts the others.
    """
    check_parts(state, PARTS)
    check_progress(state)
    for name, mine in (("scheduler", scheduler), ("scaler", scaler)):
        if (state[name] is None) != (mine is None):
            has, have = ("no", "one") if state[name] is None else ("a", "none")
            raise ValueError(f"it has {has} {name}, and this run has {have}")
        if mine is not None:
            values = mine.state_dict()
            # Private entries differ between versions of PyTorch.
            check_parts(state[name], {key: object for key in values if key[0] != "_" and key != "verbose"}, name)
            _check_like(state[name], values, name)
    if state["step"] >= steps:
        raise ValueError(f"it is in step {state['step']} of an epoch, and this run has {steps}")
    _check_optimizer(state, optimizer)


def check_progress(state: Mapping[str, Any]) -> None:
    """Check that the parts of a state agree on how far the run has come.

    Raises:
        ValueError: They disagree.
    """
    epoch, step, history, means = state["epoch"], state["step"], state["history"], state["means"]
    if step < 0 or len(history) != epoch:
        raise ValueError(f"its epoch {epoch}, its step {step} and its history of {len(history)} epochs do not agree")
    if any(len(pair) != 2 or not pair[0] > 0 for pair in means.values()):
        raise ValueError("each of its means must be a count above 0 and a total")
    if step and "loss" not in means:
        raise ValueError("it lacks means.loss, of the epoch under way")
    if not all(0 <= number < 2**63 for number in state["rates"]):
        raise ValueError("each of its rates must be a count of spikes or of neuron-steps")
    if not state["random"]:
        raise ValueError("it lacks random[0], the states of the random number generators")


def _check_like(saved: Any, mine: Any, name: str) -> None:
    """Raise ``ValueError`` unless a value can replace this run's: of the same type and length, and not NaN."""
    if isinstance(mine, dict):
        check_parts(saved, dict, name)
        for key in mine.keys() & saved.keys():
            _check_like(saved[key], mine[key], f"{name}.{key}")
    elif isinstance(mine, list | tuple):
        check_parts(saved, [object], name)
        if len(saved) != len(mine):
            raise ValueError(f"{name} has {len(saved)} entries, and this run's {len(mine)}")
        for number, (value, own) in enumerate(zip(saved, mine, strict=True)):
            _check_like(value, own, f"{name}[{number}]")
    elif mine is None or isinstance(mine, bool):  # such as foreach and fused, which have three values
        check_parts(saved, (bool, type(None)), name)
    elif isinstance(mine, int | float | Tensor):
        if isinstance(saved, Tensor) and saved.numel() == 1 and not saved.is_complex():
            saved = saved.item()
        check_parts(saved, int if name.endswith(("last_epoch", "_step_count")) else float, name)
        if saved != saved:
            raise ValueError(f"{name} is NaN")
    else:
        check_parts(saved, type(mine), name)


def _check_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    saved, groups = state["optimizer"], optimizer.param_groups
    sizes = [[len(group["params"]) for group in some] for some in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"optimizer has groups of {sizes[0]} tensors, and this run's {sizes[1]}: another model's")
    for number, (group, mine) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        own, name = {key: value for key, value in mine.items() if key != "params"}, f"optimizer.param_groups[{number}]"
        # Switches differ between versions of PyTorch, which fill in the missing ones.
        check_parts(group, {key: object for key, value in own.items() if type(value) in (int, float, tuple)}, name)
        _check_like(group, own, name)
    wanted = _moments(optimizer)
    begun = state["epoch"] > 0 or state["step"] > 0
    if begun and wanted and not saved["state"]:
        raise ValueError(f"it lacks optimizer.state, with {' and '.join(wanted)} of every weight")
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, (p for group in groups for p in group["params"]), strict=True))
    for number in of_number.keys() - saved["state"].keys() - set(state.get("unmoved", of_number)):
        raise ValueError(f"it lacks optimizer.state[{number}]")
    for number, entry in saved["state"].items():
        if number not in of_number:
            raise ValueError(f"optimizer.state[{number}] belongs to no weight")
        _check_moments(entry, of_number[number], wanted, f"optimizer.state[{number}]")


def _check_moments(entry: Any, weight: Tensor, wanted: tuple[str, ...], name: str) -> None:
    """Raise ``ValueError`` unless the optimizer's state of one weight is complete and fits the weight."""
    check_parts(entry, {key: (float, Tensor) if key == "step" else Tensor for key in wanted}, name)
    for key, value in entry.items():
        if not isinstance(value, Tensor):
            check_parts(value, (float, type(None)), f"{name}.{key}")
        elif value.shape != weight.shape and (value.numel() != 1 or (key in wanted and key != "step")):
            raise ValueError(
                f"{name}.{key} is {list(value.shape)}, and the weight {list(weight.shape)}: another model's"
            )
        if value is not None and bool((value != value).any() if isinstance(value, Tensor) else value != value):
            raise ValueError(f"{name}.{key} holds NaN")
        if key == "step" and not value >= 0:
            raise ValueError(f"{name}.step must be at least 0, and is {float(value)}")


def _moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that a common optimizer keeps for every weight."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return ("step", "exp_avg", "exp_avg_sq")
    momentum = isinstance(optimizer, torch.optim.SGD) and any(group["momentum"] for group in optimizer.param_groups)
    return ("momentum_buffer",) if momentum else ()
