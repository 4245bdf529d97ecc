"""Check the spike trains, parameters and states that a layer receives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.names import unknown
from .adjoint import MODELS
from .padding import first_fault

LARGEST = 1e100
"""Largest size of weights, states, currents and duration / tau. The engine squares them; larger numbers could overflow
float64 in the sum over all events, and spikes would then be missing without an error."""


def check_spikes(times: Tensor, indices: Tensor, n_inputs: int, duration: float) -> None:
    """Check spike trains.

    Args:
        times: [B, K] on the CPU, ascending, in [0, duration], padded with infinity.
        indices: [B, K] integers in [0, n_inputs) wherever the time is finite.
        n_inputs: Number of inputs.
        duration: Length of the trial.

    Raises:
        ValueError: A train breaks one of these rules; the message names the first invalid value.
    """
    if times.dim() != 2 or times.shape != indices.shape:
        raise ValueError(
            f"spike times and indices must both be [batch, spikes], got {list(times.shape)} and {list(indices.shape)}"
        )
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"spike indices must be integers, got {indices.dtype}")
    if not times.is_floating_point():
        raise ValueError(f"spike times must be floating point, got {times.dtype}")
    # The trial's end as the times' dtype has it, so that a time rounded up to it passes.
    end = torch.tensor(duration, dtype=times.dtype, device=times.device)
    arrays = times.detach().double().contiguous().numpy(), indices.long().contiguous().numpy()
    fault, sample, place = first_fault(*arrays, n_inputs, float(end))
    if fault:
        where, time = f"spike time {sample, place}", f"{arrays[0][sample, place]:g}"
        faults = (
            f"{where} is NaN; pad with infinity",
            f"{where} is {time}, before the trial; times start at 0",
            f"spike times must ascend in each sample, with the padding last; sample {sample} falls after spike "
            f"{place - 1}: sort times and indices together",
            f"{where} is {time}, after the trial's end at {duration:g}; drop it (time infinity, index -1) or lengthen "
            "the trial",
            f"spike index {sample, place} is {arrays[1][sample, place]}; the layer has inputs 0 to {n_inputs - 1}",
        )
        raise ValueError(faults[fault - 1])


def check_model(model: str, duration: float, tau: float, current: Tensor | float, i0: Tensor | None) -> None:
    """Raise ValueError for a neuron, a trial or a current that :func:`spiking_layer` does not take."""
    if model not in MODELS:
        raise ValueError(unknown("neuron", model, MODELS))
    if not (0 < duration < math.inf):
        raise ValueError(f"a trial needs a positive, finite duration, got {duration}")
    if not (0 < tau < math.inf):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if not 1 / LARGEST <= duration / tau <= LARGEST:
        raise ValueError(
            f"duration / tau must lie between {1 / LARGEST:g} and {LARGEST:g}, got {duration:g} / {tau:g}; give both "
            "in the same unit of time"
        )
    if model == "theta":
        if isinstance(current, Tensor) or not 0.25 < current < math.inf:
            raise ValueError(f"a theta neuron needs one constant current above 1/4 (it oscillates), got {current}")
        if current > LARGEST:
            raise ValueError(f"the constant current must be at most {LARGEST:g}, got {current}")
        if i0 is not None:
            raise ValueError("a theta neuron has no synaptic current; i0 must be None")
    elif model == "qif" and (isinstance(current, Tensor) or current != 0):
        raise ValueError("QIF has no closed form with a constant current; use i0, an input spike, or a theta neuron")
    elif not bool((torch.as_tensor(current, dtype=torch.float64, device="cpu").abs() <= LARGEST).all()):
        raise ValueError(f"the constant current must be finite and within ±{LARGEST:g}, got {current}")


def check_tensors(
    times: Tensor, indices: Tensor, weight: Tensor, delay: Tensor | None, recurrent_weight: Tensor | None,
    recurrent_delay: Tensor | None, v0: Tensor | None, i0: Tensor | None, model: str,
) -> None:  # fmt: skip
    """Raise ValueError for tensors of wrong shape, dtype, device or range."""
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"weight must be [neurons, inputs] in float32 or float64, got {list(weight.shape)} in {weight.dtype}"
        )
    neurons, inputs = weight.shape
    batch = times.shape[0]
    shapes: dict[str, tuple[Tensor | None, tuple[tuple[int, ...], ...]]] = {
        "delay": (delay, ((inputs,), (neurons, inputs))),
        "recurrent_weight": (recurrent_weight, ((neurons, neurons),)),
        "recurrent_delay": (recurrent_delay, ((neurons,),)),
        "v0": (v0, ((neurons,), (batch, neurons))),
        "i0": (i0, ((neurons,), (batch, neurons))),
    }
    for name, (value, allowed) in shapes.items():
        if value is not None and tuple(value.shape) not in allowed:
            raise ValueError(f"{name} must be {' or '.join(str(list(a)) for a in allowed)}, got {list(value.shape)}")
    named = {"weight": weight, **{name: value for name, (value, _) in shapes.items() if value is not None}}
    for name, value in {"times": times, "indices": indices, **named}.items():
        if value.device.type != "cpu":
            raise ValueError(f"exact layers run on the CPU; {name} is on {value.device}")
    with torch.no_grad():
        for name, value in named.items():
            if value.numel() == 0:
                continue
            if name.endswith("delay"):
                bad, limit = ~(torch.isfinite(value) & (value >= 0)), "a finite delay >= 0"
            else:
                # The extremes take a fraction of the time of a mask, and NaN passes through to them.
                low, high = value.aminmax()
                if low >= -LARGEST and high <= LARGEST and not (name == "v0" and model == "lif"):
                    continue
                bad, limit = ~(value.abs() <= LARGEST), f"finite and within ±{LARGEST:g}"
            if name == "v0" and model != "lif":
                bad &= value != -math.inf
            elif name == "v0":
                bad, limit = bad | (value >= 1), f"finite and below the threshold 1, and not below {-LARGEST:g}"
            if bool(bad.any()):
                where = _at(bad)
                raise ValueError(f"{name}{list(where)} is {float(value[where])}; it must be {limit}")


def _at(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
