"""Compute a layer of continuous-time neurons as a differentiable function of spike times.

:func:`spiking_layer` runs the engine of :mod:`.engine`, where the equations are, under autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adjoint import MODELS, EventBudgetError, Problem, run_layer, states_at
from .checks import check_model, check_spikes, check_tensors

MAX_SPIKES = 1 << 20
"""Default limit of a layer's output spikes in one sample."""


@dataclass(frozen=True, eq=False)
class EndState:
    """State of the neurons at the trial's end.

    Attributes:
        p: [B, N] float64. LIF: V = p. QIF and theta neurons: V = rest + p/q; r(p, q) is the same state for every r > 0.
        q: [B, N] float64; ``None`` for LIF neurons.
        current: [B, N] synaptic current; zero for theta neurons.
        rest: 0 for QIF, 1/2 for theta neurons.
    """

    p: Tensor
    q: Tensor | None
    current: Tensor
    rest: float = 0.0

    @property
    def angle(self) -> Tensor | None:
        """Angle in [0, π] with -cot(angle) = V - ``rest``, [B, N]; ``None`` for LIF neurons.

        It is 0 just after a spike and π just before one, and finite and smooth where V is not.
        """
        return None if self.q is None else torch.atan2(self.q, -self.p).to(self.current.dtype)

    @property
    def v(self) -> Tensor:
        """Membrane, [B, N]; very large for a QIF neuron that is within rounding of a spike."""
        v = self.p if self.q is None else self.p / self.q.clamp(min=1e-300) + self.rest
        return v.to(self.current.dtype)


class LayerOutput(NamedTuple):
    """Spikes of a layer in ascending order, and its state at the trial's end.

    Attributes:
        times: [B, K], padded with infinity; K is the largest number of spikes in any sample.
        indices: [B, K] int64, the neurons, padded with -1.
        end: The state at the trial's end.
    """

    times: Tensor
    indices: Tensor
    end: EndState


def spiking_layer(
    model: str,
    times: Tensor,
    indices: Tensor,
    weight: Tensor,
    duration: float,
    *,
    tau: float = 1.0,
    delay: Tensor | None = None,
    recurrent_weight: Tensor | None = None,
    recurrent_delay: Tensor | None = None,
    v0: Tensor | None = None,
    i0: Tensor | None = None,
    phase0: Tensor | None = None,
    current: Tensor | float = 0.0,
    max_spikes: int = MAX_SPIKES,
) -> LayerOutput:
    """Compute all spikes of a layer of N neurons exactly, with exact derivatives.

    Args:
        model: ``"lif"``: τV' = -V + I + J, spike at 1, reset to 0. ``"qif"``: τV' = V(V - 1) + I, spike at +∞, reset to
            -∞. In both τI'/2 = -I and an input spike adds its weight to I. ``"theta"``: τV' = V(V - 1) + J, and an
            input spike adds its weight to V. ``"olif"``, the oscillating LIF neuron: τV' = -V + J, spike at 1, reset
            to 0, and an input spike adds its weight to V, up to the threshold.
        times: [B, K] input spike times, ascending in each row, in [0, ``duration``], padded with infinity at the end.
        indices: [B, K] integers, the input of each spike; ignored where the time is infinite.
        weight: [N, N_in].
        duration: Length T of the trial, > 0, in the unit of ``times`` and ``tau``.
        tau: Time constant τ of the membrane; the synapse's is τ/2. Default 1.
        delay: Delays >= 0 of the inputs, [N_in], or of each synapse, [N, N_in] (slower: no two neurons then share an
            event; not with recurrence). Spikes that arrive after the trial's end have no effect. Default: no delay.
        recurrent_weight: [N, N]: weights of the layer's own spikes, from column to row. Default: no recurrence.
        recurrent_delay: [N] delays >= 0 of the recurrent connections, by sender. Default 0.
        v0: Initial membrane, [N] or [B, N]; below 1 for LIF; -∞ (just spiked) is allowed for QIF and theta neurons.
            Default 0, for theta neurons 1/2 (the middle of the period).
        i0: Initial synaptic current, [N] or [B, N]. Default 0. Not for theta and oscillating LIF neurons.
        phase0: Share of its period that a theta or oscillating LIF neuron is through at the beginning, in place of
            ``v0``: [N] or [B, N] in [0, 1], 0 just after a spike and 1 just before one. Default: ``v0``.
        current: Constant current J, a float or [N]: any for LIF, above 1 for oscillating LIF, above 1/4 and a float for
            theta neurons. QIF has no closed form with one.
        max_spikes: Spikes that the layer may emit in a sample before :class:`EventBudgetError`. Default 2^20.

    Returns:
        Spikes and end state in ``weight``'s dtype; computed in float64 and rounded once if that is float32.
        Differentiable with respect to every tensor, but not where the order of spikes changes; a second derivative
        raises NotImplementedError.

    Raises:
        ValueError: An argument is not as described above, a weight, state or current exceeds 1e100 in size, or
            ``duration / tau`` is not between 1e-100 and 1e100; the message names the value and the limit.
        EventBudgetError: A sample has more than ``max_spikes`` spikes.
    """
    given: dict[str, Any] = {
        "tau": tau, "recurrent_weight": recurrent_weight, "recurrent_delay": recurrent_delay, "v0": v0, "i0": i0,
        "phase0": phase0, "current": current, "max_spikes": max_spikes,
    }  # fmt: skip
    if delay is not None and delay.dim() == 2:
        apart = _apart(model, times, indices, weight, duration, delay, given)
        return _joined([spiking_layer(model, times, indices, w, duration, **own) for w, own in apart], max_spikes)
    problem = _problem(model, times, indices, weight, duration, delay=delay, **given)
    out_times, out_indices, *end = run_layer(problem)
    dtype = weight.dtype
    return LayerOutput(out_times.to(dtype), out_indices, _end(model, end, dtype))


class Traces(NamedTuple):
    """Membranes and synaptic currents at chosen times.

    Attributes:
        times: [P].
        v: [B, P, N] membranes; a QIF or theta neuron's is very large just before a spike, and very low just after.
        current: [B, P, N] synaptic currents; zero for neurons that have none.
    """

    times: Tensor
    v: Tensor
    current: Tensor


@torch.no_grad()
def spiking_traces(
    model: str, times: Tensor, indices: Tensor, weight: Tensor, duration: float, at: Tensor, **options: Any
) -> Traces:
    """Compute the membranes and currents of a layer at given times, exactly.

    Args:
        model: As for :func:`spiking_layer`, as are the arguments that follow and the ``options``.
        times: [B, K].
        indices: [B, K].
        weight: [N, N_in].
        duration: Length T of the trial.
        at: [P] times in [0, T], in any order. At the time of an event the state is that just after it.

    Returns:
        The traces in ``weight``'s dtype, without a gradient. (That of the state at T is in ``LayerOutput.end``.)

    Raises:
        ValueError: ``at`` or another argument is not as described.
        EventBudgetError: A sample has more than ``max_spikes`` spikes.
    """
    if at.dim() != 1 or not at.is_floating_point() or not bool(((at >= 0) & (at <= duration)).all()):
        shown = f"{list(at.shape)} in {at.dtype}" + (f", {at.min():g} to {at.max():g}" if at.numel() else "")
        raise ValueError(f"the times of traces must be [P] floats in [0, {duration:g}], the trial; got {shown}")
    delay = options.pop("delay", None)
    if delay is not None and delay.dim() == 2:
        apart = _apart(model, times, indices, weight, duration, delay, options)
        parts = [spiking_traces(model, times, indices, w, duration, at, **own) for w, own in apart]
        return Traces(at, torch.cat([part.v for part in parts], 2), torch.cat([part.current for part in parts], 2))
    states = torch.from_numpy(
        states_at(_problem(model, times, indices, weight, duration, delay=delay, **options), at.double())
    )
    end = _end(model, states.unbind(2), weight.dtype)
    return Traces(at, end.v, end.current)


def _problem(
    model: str, times: Tensor, indices: Tensor, weight: Tensor, duration: float, *, tau: float = 1.0,
    delay: Tensor | None = None, recurrent_weight: Tensor | None = None, recurrent_delay: Tensor | None = None,
    v0: Tensor | None = None, i0: Tensor | None = None, phase0: Tensor | None = None, current: Tensor | float = 0.0,
    max_spikes: int = MAX_SPIKES,
) -> Problem:  # fmt: skip
    """Check the arguments of :func:`spiking_layer` and bring them to the engine's form."""
    check_model(model, duration, tau, current, v0, i0, phase0)
    check_tensors(
        model, times, indices, weight,
        {
            "delay": delay, "recurrent_weight": recurrent_weight, "recurrent_delay": recurrent_delay, "v0": v0,
            "i0": i0, "phase0": phase0,
        },
    )  # fmt: skip
    check_spikes(times, indices, weight.shape[1], duration)
    if max_spikes < 1:
        raise ValueError(f"max_spikes must be at least 1, got {max_spikes}")
    if delay is not None:
        times, indices = _delayed(times, indices, delay, duration)
    columns = weight.double()
    if recurrent_weight is not None:
        columns = torch.cat([columns, recurrent_weight.double()], 1)
    batch, neurons = times.shape[0], weight.shape[0]
    varied = isinstance(current, Tensor)
    return Problem(
        times.double(), indices.long(), columns, None if recurrent_delay is None else recurrent_delay.double(),
        _start(model, v0, i0, phase0, current, batch, neurons),
        current.double().expand(neurons) if isinstance(current, Tensor) else None,
        0.0 if varied else float(current), MODELS[model], recurrent_weight is not None, duration, tau, max_spikes,
    )  # fmt: skip


def _end(model: str, state: Sequence[Tensor], dtype: torch.dtype) -> EndState:
    """Name the three numbers of the engine's state."""
    first, second, third = state
    if model in ("lif", "olif"):
        return EndState(first, None, second.to(dtype))
    return EndState(first, second, third.to(dtype), _REST[model])


_REST = {"lif": 0.0, "qif": 0.0, "theta": 0.5, "olif": 0.0}


def _start(
    model: str, v0: Tensor | None, i0: Tensor | None, phase0: Tensor | None, current: Tensor | float, batch: int,
    neurons: int,
) -> Tensor | None:  # fmt: skip
    """Make the engine's initial state [B, 3, N]; ``None`` for its default."""
    if v0 is None and i0 is None and phase0 is None:
        return None
    zero = torch.zeros(batch, neurons, dtype=torch.float64, device="cpu")
    i = zero if i0 is None else i0.double().expand(batch, neurons)
    if phase0 is not None and model == "theta":
        angle = math.pi * phase0.double().expand(batch, neurons)
        return torch.stack([-math.sqrt(float(current) - 0.25) * angle.cos(), angle.sin(), zero], 1)
    if phase0 is not None:
        level = torch.as_tensor(current, dtype=torch.float64, device="cpu")
        v0 = -level * torch.expm1(phase0.double() * torch.log1p(-1 / level))
    v = zero + _REST[model] if v0 is None else v0.double().expand(batch, neurons)
    if model in ("lif", "olif"):
        return torch.stack([v, i, zero], 1)
    spiked = v == -math.inf
    p = torch.where(spiked, -1.0, torch.where(spiked, 0.0, v) - _REST[model])
    return torch.stack([p, torch.where(spiked, 0.0, 1.0).expand(batch, neurons), i], 1)


def _delayed(times: Tensor, indices: Tensor, delay: Tensor, duration: float) -> tuple[Tensor, Tensor]:
    """Delay input spikes and sort them by arrival; spikes after the trial's end are dropped."""
    arrival = times + delay.to(times.dtype)[indices.clamp(min=0)]
    late = ~(arrival <= duration)
    arrival, order = torch.where(late, math.inf, arrival).sort(dim=1, stable=True)
    return arrival, torch.where(late, -1, indices).gather(1, order)


def _apart(
    model: str, times: Tensor, indices: Tensor, weight: Tensor, duration: float, delay: Tensor, given: dict[str, Any]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Make of each neuron a layer of its own, since its events arrive in an order of their own.

    Returns:
        Weights and options of each.
    """
    if given.get("recurrent_weight") is not None:
        raise ValueError("delays of single synapses, [N, N_in], do not go with recurrence; pass one delay per input")
    names = ("v0", "i0", "phase0")
    check_tensors(model, times, indices, weight, {"delay": delay, **{name: given.get(name) for name in names}})
    layers = []
    for n in range(len(weight)):
        of = slice(n, n + 1)
        own = {name: x[..., of] if isinstance(x, Tensor) and x.dim() else x for name, x in given.items()}
        layers.append((weight[of], own | {"delay": delay[n]}))
    return layers


def _joined(outputs: list[LayerOutput], max_spikes: int) -> LayerOutput:
    """Make one layer's output of its neurons'."""
    all_times, order = torch.cat([out.times for out in outputs], 1).sort(dim=1, stable=True)
    all_indices = torch.cat([torch.where(out.indices < 0, -1, n) for n, out in enumerate(outputs)], 1).gather(1, order)
    counts = (all_indices >= 0).sum(1)
    most = int(counts.max()) if len(counts) else 0
    if most > max_spikes:
        raise EventBudgetError(max_spikes, int((counts > max_spikes).int().argmax()))
    ends = [out.end for out in outputs]
    q = [end.q for end in ends if end.q is not None]
    p, current = torch.cat([end.p for end in ends], 1), torch.cat([end.current for end in ends], 1)
    end = EndState(p, torch.cat(q, 1) if q else None, current, ends[0].rest)
    return LayerOutput(all_times[:, :most], all_indices[:, :most], end)
