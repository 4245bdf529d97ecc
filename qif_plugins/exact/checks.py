"""Check the spike trains, parameters and states that a layer receives."""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from torch import Tensor

from ..support.names import check_known
from .adjoint import MODELS
from .padding import first_fault, first_outside

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
    end = duration if times.dtype == torch.float64 else float(torch.tensor(duration, dtype=times.dtype, device="cpu"))
    arrays = times.detach().double().contiguous().numpy(), indices.long().contiguous().numpy()
    fault, sample, place = first_fault(*arrays, n_inputs, end)
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


def check_model(
    model: str, duration: float, tau: float, current: Tensor | float, v0: Tensor | None, i0: Tensor | None,
    phase0: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for a neuron, a trial, a start or a current that :func:`spiking_layer` does not take."""
    check_known("neuron", MODELS, model)
    if not (0 < duration < math.inf):
        raise ValueError(f"a trial needs a positive, finite duration, got {duration}")
    if not (0 < tau < math.inf):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if not 1 / LARGEST <= duration / tau <= LARGEST:
        raise ValueError(
            f"duration / tau must lie between {1 / LARGEST:g} and {LARGEST:g}, got {duration:g} / {tau:g}; give both "
            "in the same unit of time"
        )
    if model in ("theta", "olif") and i0 is not None:
        kind = "a theta" if model == "theta" else "an oscillating LIF"
        raise ValueError(f"{kind} neuron has no synaptic current; i0 must be None")
    if phase0 is not None and model not in ("theta", "olif"):
        raise ValueError(f"phase0 is for 'theta' and 'olif', which oscillate without input; use v0 for {model!r}")
    if phase0 is not None and v0 is not None:
        raise ValueError("v0 and phase0 say the same; pass one of them")
    if model == "theta":
        if isinstance(current, Tensor) or not 0.25 < current < math.inf:
            raise ValueError(f"a theta neuron needs one constant current above 1/4 (it oscillates), got {current}")
        if current > LARGEST:
            raise ValueError(f"the constant current must be at most {LARGEST:g}, got {current}")
    elif model == "qif" and (isinstance(current, Tensor) or current != 0):
        raise ValueError("QIF has no closed form with a constant current; use i0, an input spike, or a theta neuron")
    elif not (bool((current.abs() <= LARGEST).all()) if isinstance(current, Tensor) else abs(current) <= LARGEST):
        raise ValueError(f"the constant current must be finite and within ±{LARGEST:g}, got {current}")
    elif model == "olif" and not (bool((current > 1).all()) if isinstance(current, Tensor) else current > 1):
        raise ValueError(f"an oscillating LIF neuron needs a constant current above the threshold 1, got {current}")


def check_tensors(model: str, times: Tensor, indices: Tensor, weight: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raise ValueError for tensors of wrong shape, dtype, device or range.

    Args:
        model: The neuron.
        times: [B, K].
        indices: [B, K].
        weight: [N, N_in].
        others: The other tensors that :func:`spiking_layer` takes, by name.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"weight must be [neurons, inputs] in float32 or float64, got {list(weight.shape)} in {weight.dtype}"
        )
    neurons, inputs = weight.shape
    of_state = (neurons,), (times.shape[0], neurons)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "weight": ((neurons, inputs),), "delay": ((inputs,), (neurons, inputs)),
        "recurrent_weight": ((neurons, neurons),), "recurrent_delay": ((neurons,),),
        "v0": of_state, "i0": of_state, "phase0": of_state,
    }  # fmt: skip
    given = {"weight": weight, **{name: value for name, value in others.items() if value is not None}}
    for name, value in given.items():
        if value.shape not in shapes[name]:
            allowed = " or ".join(str(list(shape)) for shape in shapes[name])
            raise ValueError(f"{name} must be {allowed}, got {list(value.shape)}")
    for name, value in {"times": times, "indices": indices, **given}.items():
        if value.device.type != "cpu":
            raise ValueError(f"exact layers run on the CPU; {name} is on {value.device}")
    for name, value in given.items():
        low, high, says = -LARGEST, LARGEST, f"finite and within ±{LARGEST:g}"
        if name.endswith("delay"):
            low, high, says = 0.0, sys.float_info.max, "a finite delay >= 0"
        elif name == "phase0":
            low, high, says = 0.0, 1.0, "a share of the period, from 0 to 1"
        elif name == "v0" and model in ("lif", "olif"):
            high, says = math.nextafter(1.0, 0.0), f"finite and below the threshold 1, and not below {-LARGEST:g}"
        spiked = -math.inf if name == "v0" and model in ("qif", "theta") else low
        place = first_outside(value.detach().double().contiguous().numpy().reshape(-1), low, high, spiked)
        if place >= 0:
            where = [int(i) for i in np.unravel_index(place, value.shape)]
            raise ValueError(f"{name}{where} is {float(value[tuple(where)])}; it must be {says}")
