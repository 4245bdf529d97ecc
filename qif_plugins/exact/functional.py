"""One layer of continuous-time neurons as a differentiable function of spike times.

:func:`spiking_layer` runs the engine and its adjoint (:mod:`.engine`, which has the equations) under autograd.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.threads import for_each_chunk

try:
    from . import engine
except ImportError as error:
    raise ImportError("qif_plugins.exact needs Numba: pip install 'qif-plugins[cpu]'") from error

__all__ = ["MODELS", "EndState", "EventBudgetError", "LayerOutput", "check_spikes", "spiking_layer"]

MODELS = {"lif": engine.LIF, "qif": engine.QIF, "theta": engine.THETA}
"""The neurons by name."""

MAX_SPIKES = 1 << 20
"""Default budget of output spikes of one layer in one sample."""

_SEGMENT = 64
"""States are kept once in so many events and recomputed in between."""


class EventBudgetError(RuntimeError):
    """A layer emitted more spikes in one sample than ``max_spikes`` allows; nothing was truncated."""


class EndState(NamedTuple):
    """The neurons at the trial's end.

    Attributes:
        angle: [B, N] in [0, π] for QIF and theta neurons, -cot(angle) = V - ``offset``: 0 just after a spike, π just
            before one, finite and smooth where V is not. ``None`` for LIF.
        v: [B, N] membrane; huge within rounding of a spike of a QIF neuron.
        current: [B, N] synaptic current; zero for theta neurons.
    """

    angle: Tensor | None
    v: Tensor
    current: Tensor


class LayerOutput(NamedTuple):
    """Spikes in ascending order, and the state at the end.

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
    """Every spike of a layer of N neurons, exactly, and exactly differentiable.

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
            event; not with recurrence). What arrives after the trial's end has no effect. Default none.
        recurrent_weight: [N, N]: the layer's own spikes, sent from column to row. Default none.
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
        ValueError: Any of the above does not hold; the message names the value and the limit.
        EventBudgetError: The budget ran out.
    """
    _check_model(model, duration, tau, current, i0)
    dtype = weight.dtype
    _check_tensors(times, indices, weight, delay, recurrent_weight, recurrent_delay, v0, i0, model)
    check_spikes(times, indices, weight.shape[1], duration)
    if max_spikes < 1:
        raise ValueError(f"max_spikes must be at least 1, got {max_spikes}")
    if delay is not None and delay.dim() == 2:
        return _with_synaptic_delays(
            model, times, indices, weight, duration, tau, delay, recurrent_weight, v0, i0, current, max_spikes
        )
    if delay is not None:
        times, indices = _delayed(times, indices, delay, duration)
    batch, neurons = times.shape[0], weight.shape[0]
    rows = weight.double().t()
    if recurrent_weight is not None:
        rows = torch.cat([rows, recurrent_weight.double().t()])
    sent = torch.zeros(neurons, dtype=torch.float64) if recurrent_delay is None else recurrent_delay.double() / tau
    start = _start(model, v0, i0, batch, neurons)
    drive = torch.as_tensor(current, dtype=torch.float64).expand(neurons)
    out_times, out_indices, p, q, i = _Layer.apply(
        times.double() / tau, indices.long().clone(), rows, sent, start, drive, MODELS[model],
        recurrent_weight is not None, duration / tau, max_spikes,
    )  # fmt: skip
    return LayerOutput((out_times * tau).to(dtype), out_indices, _end(model, p, q, i, dtype))


def check_spikes(times: Tensor, indices: Tensor, n_inputs: int, duration: float) -> None:
    """Check spike trains.

    Args:
        times: [B, K], ascending, in [0, duration], padded with infinity.
        indices: [B, K] integers in [0, n_inputs) wherever the time is finite.
        n_inputs: Number of inputs.
        duration: Length of the trial.

    Raises:
        ValueError: They are not; the message names the first offender.
    """
    if times.dim() != 2 or times.shape != indices.shape:
        raise ValueError(
            f"spike times and indices must both be [batch, spikes], got {list(times.shape)} and {list(indices.shape)}"
        )
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"spike indices must be integers, got {indices.dtype}")
    if not times.is_floating_point():
        raise ValueError(f"spike times must be floating point, got {times.dtype}")
    with torch.no_grad():
        present = times != math.inf
        if bool(times.isnan().any()):
            raise ValueError(f"spike time {_at(times.isnan())} is NaN; pad with infinity")
        if bool((times < 0).any()):
            where = _at(times < 0)
            raise ValueError(f"spike time {where} is {float(times[where]):g}, before the trial; times start at 0")
        # The trial's end as the times' dtype has it, so that a time rounded up to it passes.
        late = present & (times > torch.tensor(duration, dtype=times.dtype))
        if bool(late.any()):
            where = _at(late)
            raise ValueError(
                f"spike time {where} is {float(times[where]):g}, after the trial's end at {duration:g}; drop it (time "
                f"infinity, index -1) or lengthen the trial"
            )
        if times.shape[1] > 1 and bool((times[:, 1:] < times[:, :-1]).any()):
            where = _at(times[:, 1:] < times[:, :-1])
            raise ValueError(
                f"spike times must ascend in each sample, with the padding last; sample {where[0]} falls after spike "
                f"{where[1]}: sort times and indices together"
            )
        outside = present & ((indices < 0) | (indices >= n_inputs))
        if bool(outside.any()):
            where = _at(outside)
            raise ValueError(f"spike index {where} is {int(indices[where])}; the layer has inputs 0 to {n_inputs - 1}")


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, times: Tensor, indices: Tensor, rows: Tensor, delay: Tensor, start: Tensor, drive: Tensor, model: int,
        recurrent: bool, duration: float, max_spikes: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        t_in, source = times.contiguous().numpy(), indices.contiguous().numpy()
        weight, sent = rows.contiguous().numpy(), delay.contiguous().numpy()
        begin, constant = start.contiguous().numpy(), drive.contiguous().numpy()
        batch, neurons = times.shape[0], rows.shape[1]
        capacity = min(max_spikes, max(64, 4 * neurons))
        # Without a backward pass to come, one state is kept.
        segment = _SEGMENT if any(ctx.needs_input_grad) else 1 << 60
        while True:
            events = times.shape[1] + (capacity if recurrent else 0)
            kept = torch.empty(batch, events // segment + 1, 3, neurons, dtype=torch.float64).numpy()
            spike_t = torch.full((batch, capacity), math.inf, dtype=torch.float64)
            spike_n, spike_e = (torch.full((batch, capacity), -1, dtype=torch.int64) for _ in range(2))
            event_t = torch.empty(batch, events if recurrent else 0, dtype=torch.float64).numpy()
            event_source, event_ref = (
                torch.empty(batch, events if recurrent else 0, dtype=torch.int64).numpy() for _ in range(2)
            )
            n_spikes, n_events = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
            end = torch.empty(batch, 3, neurons, dtype=torch.float64)
            lists = spike_t.numpy(), spike_n.numpy(), spike_e.numpy(), n_spikes.numpy()
            buffers = kept, *lists, event_t, event_source, event_ref, n_events.numpy(), end.numpy()

            def run(first: int, stop: int, buffers: tuple[Any, ...] = buffers) -> None:
                engine.forward(
                    model, t_in, source, weight, recurrent, sent, begin, constant, duration, segment, *buffers, first,
                    stop,
                )  # fmt: skip

            for_each_chunk(batch, 1, batch * (events + 1) * neurons, run)
            most = int(n_spikes.max()) if batch else 0
            if most <= capacity:
                break
            if capacity == max_spikes:
                sample = int((n_spikes > capacity).nonzero()[0])
                raise EventBudgetError(
                    f"the layer emits more than max_spikes={max_spikes} spikes in sample {sample}; raise max_spikes, "
                    f"shorten the trial or scale the weights down"
                )
            capacity = min(max_spikes, 4 * capacity)
        if not recurrent:
            event_t, event_source = t_in, source
        order = spike_t[:, :most].argsort(dim=1, stable=True)
        out_times = spike_t[:, :most].gather(1, order)
        out_indices = spike_n[:, :most].gather(1, order)
        ctx.save_for_backward(rows, drive)
        ctx.events = event_t, event_source, event_ref, n_events.numpy()
        ctx.spikes = kept, *lists
        ctx.order, ctx.k, ctx.setting = order, times.shape[1], (model, recurrent, duration)
        ctx.mark_non_differentiable(out_indices)
        ctx.set_materialize_grads(False)
        return out_times, out_indices, end[:, 0], end[:, 1], end[:, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        rows, drive = ctx.saved_tensors
        model, recurrent, duration = ctx.setting
        event_t, event_source, event_ref, n_events = ctx.events
        kept, spike_t, spike_n, spike_e, n_spikes = ctx.spikes
        weight, constant = rows.contiguous().numpy(), drive.contiguous().numpy()
        batch, neurons = spike_t.shape[0], rows.shape[1]
        grad_spike = torch.zeros(spike_t.shape, dtype=torch.float64)
        if grads[0] is not None:
            grad_spike.scatter_(1, ctx.order, grads[0])
            grad_spike.masked_fill_(torch.from_numpy(spike_t) == math.inf, 0.0)
        zero = torch.zeros(batch, neurons, dtype=torch.float64)
        grad_end = torch.stack([zero if grad is None else grad for grad in grads[2:]], 1).contiguous()
        grad_t = torch.zeros(batch, ctx.k, dtype=torch.float64)
        grad_start = torch.empty(batch, 3, neurons, dtype=torch.float64)
        parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def run(first: int, stop: int) -> None:
            part = (
                torch.zeros_like(rows, memory_format=torch.contiguous_format),
                zero.new_zeros(neurons),
                zero.new_zeros(neurons),
            )
            engine.backward(
                model, event_t, event_source, event_ref, n_events, weight, recurrent, constant, duration, _SEGMENT,
                kept, spike_t, spike_n, spike_e, n_spikes, grad_spike.numpy(), grad_end.numpy(),
                ctx.needs_input_grad[0], grad_t.numpy(), part[0].numpy(), part[1].numpy(), grad_start.numpy(),
                part[2].numpy(), first, stop,
            )  # fmt: skip
            parts[first] = part

        # As few parts as threads: each has its own sum of the weights' gradients.
        chunk = max(1, -(-batch // torch.get_num_threads()))
        for_each_chunk(batch, chunk, batch * (event_t.shape[1] + 1) * neurons, run)
        sums = [sum((parts[first][which] for first in sorted(parts)), torch.zeros(())) for which in range(3)]
        return grad_t, None, sums[0], sums[1], grad_start, sums[2], None, None, None, None


def _start(model: str, v0: Tensor | None, i0: Tensor | None, batch: int, neurons: int) -> Tensor:
    """The engine's initial state [B, 3, N]."""
    rest = 0.5 if model == "theta" else 0.0
    v = torch.full((neurons,), rest, dtype=torch.float64) if v0 is None else v0.double()
    i = torch.zeros(neurons, dtype=torch.float64) if i0 is None else i0.double()
    v, i = v.expand(batch, neurons), i.expand(batch, neurons)
    if model == "lif":
        return torch.stack([v, i, torch.zeros_like(v)], 1)
    spiked = v == -math.inf
    p = torch.where(spiked, -1.0, torch.where(spiked, 0.0, v) - (0.5 if model == "theta" else 0.0))
    return torch.stack([p, torch.where(spiked, 0.0, 1.0).expand(batch, neurons), i], 1)


def _end(model: str, p: Tensor, q: Tensor, i: Tensor, dtype: torch.dtype) -> EndState:
    if model == "lif":
        return EndState(None, p.to(dtype), q.to(dtype))
    v = p / q.clamp(min=1e-300) + (0.5 if model == "theta" else 0.0)
    return EndState(torch.atan2(q, -p).to(dtype), v.to(dtype), i.to(dtype))


def _delayed(times: Tensor, indices: Tensor, delay: Tensor, duration: float) -> tuple[Tensor, Tensor]:
    """The spikes as they arrive, in order; those after the trial's end dropped."""
    arrival = times + delay.to(times.dtype)[indices.clamp(min=0)]
    late = ~(arrival <= duration)
    arrival, order = torch.where(late, math.inf, arrival).sort(dim=1, stable=True)
    return arrival, torch.where(late, -1, indices).gather(1, order)


def _with_synaptic_delays(
    model: str, times: Tensor, indices: Tensor, weight: Tensor, duration: float, tau: float, delay: Tensor,
    recurrent_weight: Tensor | None, v0: Tensor | None, i0: Tensor | None, current: Tensor | float, max_spikes: int,
) -> LayerOutput:  # fmt: skip
    """Each neuron as a layer of its own, since each has its own order of events."""
    if recurrent_weight is not None:
        raise ValueError("delays of single synapses, [N, N_in], do not go with recurrence; pass one delay per input")
    batch = times.shape[0]
    outputs = []
    for n in range(len(weight)):
        pick = [None if x is None else x[..., n : n + 1] for x in (v0, i0)]
        own = current[n : n + 1] if isinstance(current, Tensor) and current.dim() else current
        outputs.append(
            spiking_layer(
                model,
                times,
                indices,
                weight[n : n + 1],
                duration,
                tau=tau,
                delay=delay[n],
                v0=pick[0],
                i0=pick[1],
                current=own,
                max_spikes=max_spikes,
            )
        )
    all_times, order = torch.cat([out.times for out in outputs], 1).sort(dim=1, stable=True)
    all_indices = torch.cat([torch.where(out.indices < 0, -1, n) for n, out in enumerate(outputs)], 1).gather(1, order)
    counts = (all_indices >= 0).sum(1)
    most = int(counts.max()) if batch else 0
    if most > max_spikes:
        raise EventBudgetError(
            f"the layer emits {most} spikes in sample {int(counts.argmax())}, more than max_spikes={max_spikes}"
        )
    angles = [out.end.angle for out in outputs if out.end.angle is not None]
    v, i = (torch.cat([out.end[field] for out in outputs], 1) for field in (1, 2))  # type: ignore[misc]
    angle = torch.cat(angles, 1) if angles else None
    return LayerOutput(all_times[:, :most], all_indices[:, :most], EndState(angle, v, i))


def _check_model(model: str, duration: float, tau: float, current: Tensor | float, i0: Tensor | None) -> None:
    if model not in MODELS:
        raise ValueError(f"unknown neuron {model!r}; the neurons are {', '.join(map(repr, MODELS))}")
    if not (0 < duration < math.inf):
        raise ValueError(f"a trial needs a positive, finite duration, got {duration}")
    if not (0 < tau < math.inf):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if model == "theta":
        if isinstance(current, Tensor) or not 0.25 < current < math.inf:
            raise ValueError(f"a theta neuron needs one constant current above 1/4 (it oscillates), got {current}")
        if i0 is not None:
            raise ValueError("a theta neuron has no synaptic current; i0 must be None")
    elif model == "qif" and (isinstance(current, Tensor) or current != 0):
        raise ValueError("QIF has no closed form with a constant current; use i0, an input spike, or a theta neuron")
    elif not bool(torch.isfinite(torch.as_tensor(current)).all()):
        raise ValueError(f"the constant current must be finite, got {current}")


def _check_tensors(
    times: Tensor, indices: Tensor, weight: Tensor, delay: Tensor | None, recurrent_weight: Tensor | None,
    recurrent_delay: Tensor | None, v0: Tensor | None, i0: Tensor | None, model: str,
) -> None:  # fmt: skip
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
            bad = ~torch.isfinite(value)
            if name == "v0" and model != "lif":
                bad &= value != -math.inf
            if name.endswith("delay"):
                bad |= value < 0
            if name == "v0" and model == "lif":
                bad |= value >= 1
            if bool(bad.any()):
                where = _at(bad)
                limit = "a finite delay >= 0" if name.endswith("delay") else "finite"
                limit = "finite and below the threshold 1" if name == "v0" and model == "lif" else limit
                raise ValueError(f"{name}{list(where)} is {float(value[where])}; it must be {limit}")


def _at(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
