"""Make the engine differentiable: an autograd function of its forward and backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..ops.threads import for_each_chunk
from . import engine
from .once import refuse_twice
from .padding import padded, padded_adjoint

MODELS = {"lif": engine.LIF, "qif": engine.QIF, "theta": engine.THETA, "olif": engine.OLIF}
"""The engine's number for each neuron, by name."""

_SEGMENT = 64
"""Number of events from one stored state to the next; the states in between are recomputed."""
_WORK = 4
"""Cost of one event in one neuron, in steps of a discrete neuron; the number of threads depends on it."""


class EventBudgetError(RuntimeError):
    """Error of a layer that emits more spikes in one sample than ``max_spikes`` allows; there is no result.

    Args:
        max_spikes: The limit.
        sample: The first sample that exceeds it.
    """

    def __init__(self, max_spikes: int, sample: int) -> None:
        super().__init__(
            f"the layer emits more than max_spikes={max_spikes} spikes in sample {sample}; raise max_spikes, shorten "
            f"the trial or scale the weights down"
        )
        self.max_spikes, self.sample = max_spikes, sample

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_spikes, self.sample)


class Problem(NamedTuple):
    """Tensors and numbers of a layer's simulation, checked.

    Attributes:
        times: [B, K] float64.
        indices: [B, K] int64.
        weight: [N, N_in] float64; if ``recurrent``, [N, N_in + N].
        delay: [N] float64 of the recurrent connections; ``None`` for 0.
        start: [B, 3, N] float64, the engine's state at the beginning; ``None`` for its default.
        drive: [N] float64, J; ``None`` for ``constant``.
        constant: J of every neuron, if ``drive`` is ``None``.
        model: The engine's number for the neuron.
        recurrent: Whether the layer receives its own spikes.
        duration: Trial length, in the unit of ``times``, as is ``tau``.
        tau: Membrane time constant.
        max_spikes: Largest number of spikes in a sample.
    """

    times: Tensor
    indices: Tensor
    weight: Tensor
    delay: Tensor | None
    start: Tensor | None
    drive: Tensor | None
    constant: float
    model: int
    recurrent: bool
    duration: float
    tau: float
    max_spikes: int


class _Simulation(NamedTuple):
    """What :func:`engine.forward` returned, and the arrays that it was given."""

    lists: list[np.ndarray]
    n_spikes: np.ndarray
    n_events: np.ndarray
    end: np.ndarray
    t_in: np.ndarray
    source: np.ndarray
    driven: np.ndarray


def _simulate(problem: Problem, segment: int) -> _Simulation:
    """Run the engine, which keeps the state at every ``segment``-th event.

    Raises:
        EventBudgetError: A sample has more than ``max_spikes`` spikes.
    """
    (times, indices, weight, delay, start, drive, constant, model, recurrent, duration, tau, max_spikes) = problem
    batch, neurons = times.shape[0], weight.shape[0]
    # Copies, since backward reads them later.
    t_in, source = times.detach().contiguous().numpy() / tau, np.array(indices.contiguous().numpy())
    columns = weight.detach().contiguous().numpy()
    driven = np.full(neurons, constant) if drive is None else drive.detach().contiguous().numpy()
    sent = np.zeros(neurons) if delay is None else delay.detach().contiguous().numpy() / tau
    if start is None:
        begin = np.zeros((batch, 3, neurons))
        if model in (engine.QIF, engine.THETA):
            begin[:, 1] = 1.0
    else:
        begin = start.detach().contiguous().numpy()
    n_spikes, n_events = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    end = np.empty((batch, 3, neurons))
    parts: dict[int, list[np.ndarray]] = {}
    exceeding: list[int] = []

    def run(first: int, stop: int) -> None:
        room = 4 * (neurons + times.shape[1])
        while True:
            upto, *lists = engine.forward(
                model, t_in, source, columns, recurrent, sent, begin, driven, duration / tau, segment, max_spikes,
                room * (stop - first), n_spikes, n_events, end, first, stop,
            )  # fmt: skip
            if upto == first < stop:
                room *= 4
            else:
                parts[first] = lists
                first = upto
            if first == stop:
                break
            if n_spikes[first] > max_spikes:
                exceeding.append(first)
                break

    for_each_chunk(batch, 1, _WORK * batch * (times.shape[1] + 1) * neurons, run)
    if exceeding:
        raise EventBudgetError(max_spikes, min(exceeding))
    ordered = [parts[first] for first in sorted(parts)]
    lists = ordered[0] if len(ordered) == 1 else list(map(np.concatenate, zip(*ordered, strict=True)))
    return _Simulation(lists, n_spikes, n_events, end, t_in, source, driven)


def states_at(problem: Problem, at: Tensor) -> np.ndarray:
    """Compute the engine's states at given times.

    Args:
        problem: The layer and its inputs.
        at: [P] float64 times in [0, duration].

    Returns:
        [B, P, 3, N], just after the events at the same time.

    Raises:
        EventBudgetError: A sample has more than ``max_spikes`` spikes.
    """
    batch, neurons = problem.times.shape[0], problem.weight.shape[0]
    # Each of these times is an event from one more input, whose weights are 0, and the engine keeps all its states.
    weight = problem.weight.detach()
    inputs = weight.shape[1] - (neurons if problem.recurrent else 0)
    weight = torch.cat([weight[:, :inputs], weight.new_zeros(neurons, 1), weight[:, inputs:]], 1)
    times = torch.cat([problem.times.detach(), at.expand(batch, -1)], 1)
    indices = torch.cat([problem.indices, problem.indices.new_full((batch, len(at)), inputs)], 1)
    times, order = times.sort(dim=1, stable=True)
    indices = indices.gather(1, order)
    place = torch.argsort(at, stable=True).numpy()
    out = np.empty((batch, len(at), 3, neurons))
    for b in range(batch):  # one sample's states at a time
        one = slice(b, b + 1)
        start = None if problem.start is None else problem.start[one]
        alone = problem._replace(times=times[one], indices=indices[one], weight=weight, start=start)
        done = _simulate(alone, 1)
        sources, kept = done.lists[4] if problem.recurrent else done.source[0, : done.n_events[0]], done.lists[6]
        out[b, place] = kept[1:][sources == inputs]
    return out


def _outputs(done: _Simulation, tau: float) -> tuple[tuple[Tensor, ...], np.ndarray]:
    """Make the tensors that :func:`run_layer` returns; also the order of the spikes in time."""
    times, neurons, order = padded(done.lists[0], done.lists[1], done.n_spikes, tau)
    return (torch.from_numpy(times), torch.from_numpy(neurons), *torch.from_numpy(done.end).unbind(1)), order


def run_layer(problem: Problem) -> tuple[Tensor, ...]:
    """Compute a layer: its spike times and neurons, [B, K] in ascending order, and the engine's state at the end.

    Returns:
        Times in the caller's unit, neurons, and three tensors [B, N].

    Raises:
        EventBudgetError: A sample has more than ``max_spikes`` spikes.
    """
    tensors = (problem.times, problem.weight, problem.delay, problem.start, problem.drive)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return cast("tuple[Tensor, ...]", _Layer.apply(*problem))
    # No backward pass: only the first state of each sample is kept, and autograd's share of the time is saved.
    return _outputs(_simulate(problem, 1 << 60), problem.tau)[0]


class _Layer(torch.autograd.Function):
    """Differentiable :func:`run_layer`, of the fields of a :class:`Problem`."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, ...]:
        problem = Problem(*fields)
        done = _simulate(problem, _SEGMENT)
        outputs, ctx.order = _outputs(done, problem.tau)
        given = (problem.times, problem.delay, problem.start, problem.drive)
        ctx.save_for_backward(problem.weight, *(x if x is not None and x.requires_grad else None for x in given))
        ctx.done = done
        ctx.setting = problem.model, problem.recurrent, problem.duration / problem.tau, problem.tau
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        weight = ctx.saved_tensors[0]
        model, recurrent, duration, tau = ctx.setting
        lists, n_spikes, n_events, _, t_in, source, driven = ctx.done
        spike_t, spike_n, spike_e, *events, kept = lists
        (batch, inputs), neurons = t_in.shape, weight.shape[0]
        columns = weight.detach().contiguous().numpy()
        if recurrent:
            first_event = n_events.cumsum() - n_events
        else:
            events, first_event = [t_in.reshape(-1), source.reshape(-1), source.reshape(-1)], np.arange(batch) * inputs
        grad_spike = np.zeros(len(spike_t))
        if grads[0] is not None:
            padded_adjoint(grads[0].detach().contiguous().numpy(), n_spikes, tau, ctx.order, grad_spike)
        grad_end = np.zeros((batch, 3, neurons))
        for which, grad in enumerate(grads[2:]):
            if grad is not None:
                grad_end[:, which] = grad.detach().numpy()
        grad_t, grad_start = np.zeros((batch, inputs)), np.empty((batch, 3, neurons))
        parts: dict[int, tuple[np.ndarray, ...]] = {}

        def run(first: int, stop: int) -> None:
            part = np.zeros(columns.shape), np.zeros(neurons), np.zeros(neurons)
            engine.backward(
                model, *events, first_event, n_events, columns, recurrent, driven, duration, _SEGMENT, kept,
                spike_t, spike_n, spike_e, n_spikes, n_spikes.cumsum() - n_spikes, grad_spike, grad_end,
                ctx.needs_input_grad[0], grad_t, part[0], part[1], grad_start, part[2], first, stop,
            )  # fmt: skip
            parts[first] = part

        # As few parts as threads: each has its own sum of the weights' gradients.
        chunk = max(1, -(-batch // torch.get_num_threads()))
        for_each_chunk(batch, chunk, _WORK * batch * (inputs + 1) * neurons, run)
        first, *others = (parts[part] for part in sorted(parts))
        for other in others:
            for total, more in zip(first, other, strict=True):
                total += more
        grad_weight, grad_delay, grad_drive = map(torch.from_numpy, first)
        results = (
            torch.from_numpy(grad_t / tau), grad_weight, grad_delay / tau, torch.from_numpy(grad_start), grad_drive
        )  # fmt: skip
        wanted = ctx.needs_input_grad[:1] + ctx.needs_input_grad[2:6]
        chosen = [result if needed else None for result, needed in zip(results, wanted, strict=True)]
        first_grad, *other_grads = refuse_twice(chosen, (*ctx.saved_tensors, *grads))
        return first_grad, None, *other_grads, *[None] * 6
