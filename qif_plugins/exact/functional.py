"""Compute a layer of continuous-time neurons as a differentiable function of spike times.

:func:`spiking_layer` runs the engine of :mod:`.engine`, where the equations are, under autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adjoint import MODELS, EventBudgetError, Layer
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
    current: Tensor | float = 0.0,
    max_spikes: int = MAX_SPIKES,
) -> LayerOutput:
    """Compute all spikes of a layer of N neurons exactly, with exact derivatives.

    Args:
        model: ``"lif"``: τV' = -V + I + J, spike at 1, reset to 0. ``"qif"``: τV' = V(V - 1) + I, spike at +∞, reset to
            -∞. In both τI'/2 = -I and an input spike adds its weight to I. ``"theta"``: τV' = V(V - 1) + J, and an
            input spike adds its weight to V.
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
        i0: Initial synaptic current, [N] or [B, N]. Default 0. Not for theta neurons.
        current: Constant current J, a float or [N]: any for LIF, above 1/4 and a float for theta neurons. QIF has no
            closed form with one.
        max_spikes: Spikes that the layer may emit in a sample before :class:`EventBudgetError`. Default 2^20.

    Returns:
        Spikes and end state in ``weight``'s dtype; computed in float64 and rounded once if that is float32.
        Differentiable with respect to every tensor, but neither twice nor where the order of spikes changes.

    Raises:
        ValueError: An argument is not as described above, a weight, state or current exceeds 1e100 in size, or
            ``duration / tau`` is not between 1e-100 and 1e100; the message names the value and the limit.
        EventBudgetError: A sample has more than ``max_spikes`` spikes.
    """
    check_model(model, duration, tau, current, i0)
    check_tensors(times, indices, weight, delay, recurrent_weight, recurrent_delay, v0, i0, model)
    check_spikes(times, indices, weight.shape[1], duration)
    if max_spikes < 1:
        raise ValueError(f"max_spikes must be at least 1, got {max_spikes}")
    if delay is not None and delay.dim() == 2:
        return _with_synaptic_delays(
            model, times, indices, weight, duration, delay, recurrent_weight, max_spikes,
            tau=tau, v0=v0, i0=i0, current=current,
        )  # fmt: skip
    if delay is not None:
        times, indices = _delayed(times, indices, delay, duration)
    batch, neurons = times.shape[0], weight.shape[0]
    columns = weight.double()
    if recurrent_weight is not None:
        columns = torch.cat([columns, recurrent_weight.double()], 1)
    tensors = (
        times.double(), indices.long(), columns, None if recurrent_delay is None else recurrent_delay.double(),
        _start(model, v0, i0, batch, neurons),
        torch.as_tensor(current, dtype=torch.float64, device="cpu").expand(neurons),
    )  # fmt: skip
    differentiate = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out_times, out_indices, p, q, i = Layer.apply(
        *tensors, MODELS[model], recurrent_weight is not None, duration, tau, max_spikes, differentiate
    )
    dtype = weight.dtype
    if model == "lif":
        return LayerOutput(out_times.to(dtype), out_indices, EndState(p, None, q.to(dtype)))
    end = EndState(p, q, i.to(dtype), 0.5 if model == "theta" else 0.0)
    return LayerOutput(out_times.to(dtype), out_indices, end)


def _start(model: str, v0: Tensor | None, i0: Tensor | None, batch: int, neurons: int) -> Tensor:
    """Make the engine's initial state [B, 3, N]."""
    rest = 0.5 if model == "theta" else 0.0
    if v0 is None and i0 is None:
        start = torch.zeros(batch, 3, neurons, dtype=torch.float64, device="cpu")
        start[:, 1] = 0.0 if model == "lif" else 1.0
        return start
    v = torch.full((neurons,), rest, dtype=torch.float64, device="cpu") if v0 is None else v0.double()
    i = torch.zeros(neurons, dtype=torch.float64, device="cpu") if i0 is None else i0.double()
    v, i = v.expand(batch, neurons), i.expand(batch, neurons)
    if model == "lif":
        return torch.stack([v, i, torch.zeros_like(v)], 1)
    spiked = v == -math.inf
    p = torch.where(spiked, -1.0, torch.where(spiked, 0.0, v) - rest)
    return torch.stack([p, torch.where(spiked, 0.0, 1.0).expand(batch, neurons), i], 1)


def _delayed(times: Tensor, indices: Tensor, delay: Tensor, duration: float) -> tuple[Tensor, Tensor]:
    """Delay input spikes and sort them by arrival; spikes after the trial's end are dropped."""
    arrival = times + delay.to(times.dtype)[indices.clamp(min=0)]
    late = ~(arrival <= duration)
    arrival, order = torch.where(late, math.inf, arrival).sort(dim=1, stable=True)
    return arrival, torch.where(late, -1, indices).gather(1, order)


def _with_synaptic_delays(
    model: str, times: Tensor, indices: Tensor, weight: Tensor, duration: float, delay: Tensor,
    recurrent_weight: Tensor | None, max_spikes: int, **options: Any,
) -> LayerOutput:  # fmt: skip
    """Compute each neuron as a layer of its own, since its events arrive in an order of their own."""
    if recurrent_weight is not None:
        raise ValueError("delays of single synapses, [N, N_in], do not go with recurrence; pass one delay per input")
    outputs = []
    for n in range(len(weight)):
        of_neuron, own = slice(n, n + 1), dict(options)
        own |= {k: x[..., of_neuron] for k, x in options.items() if isinstance(x, Tensor) and x.dim()}
        outputs.append(
            spiking_layer(
                model, times, indices, weight[of_neuron], duration, delay=delay[n], max_spikes=max_spikes, **own
            )
        )
    all_times, order = torch.cat([out.times for out in outputs], 1).sort(dim=1, stable=True)
    all_indices = torch.cat([torch.where(out.indices < 0, -1, n) for n, out in enumerate(outputs)], 1).gather(1, order)
    counts = (all_indices >= 0).sum(1)
    most = int(counts.max()) if len(times) else 0
    if most > max_spikes:
        raise EventBudgetError(max_spikes, int((counts > max_spikes).int().argmax()))
    ends = [out.end for out in outputs]
    q = [end.q for end in ends if end.q is not None]
    p, current = torch.cat([end.p for end in ends], 1), torch.cat([end.current for end in ends], 1)
    end = EndState(p, torch.cat(q, 1) if q else None, current, ends[0].rest)
    return LayerOutput(all_times[:, :most], all_indices[:, :most], end)
