"""Make the engine differentiable: an autograd function of its forward and backward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.threads import for_each_chunk
from . import engine
from .padding import padded

MODELS = {"lif": engine.LIF, "qif": engine.QIF, "theta": engine.THETA}
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


class Layer(torch.autograd.Function):
    """Layer that returns its spikes and the engine's state at the trial's end.

    It takes float64 tensors (indices int64), and returns spike times and neurons, [B, K] in ascending order, and three
    tensors [B, N] of the state. Times are in the caller's unit; the engine's unit of time is ``tau``.
    """

    @staticmethod
    def forward(
        ctx: Any, times: Tensor, indices: Tensor, weight: Tensor, delay: Tensor | None, start: Tensor, drive: Tensor,
        model: int, recurrent: bool, duration: float, tau: float, max_spikes: int, differentiate: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch, neurons = times.shape[0], weight.shape[0]
        # Copies, since backward reads them later.
        t_in, source = times.contiguous().numpy() / tau, np.array(indices.contiguous().numpy())
        columns, constant = weight.contiguous().numpy(), drive.contiguous().numpy()
        sent = np.zeros(neurons) if delay is None else delay.contiguous().numpy() / tau
        begin = start.contiguous().numpy()
        # Without a backward pass, only the first state of each sample is kept.
        segment = _SEGMENT if differentiate else 1 << 60
        n_spikes, n_events = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
        end = np.empty((batch, 3, neurons))
        parts: dict[int, list[np.ndarray]] = {}

        def run(first: int, stop: int) -> None:
            room = 4 * (neurons + times.shape[1])
            while True:
                upto, *lists = engine.forward(
                    model, t_in, source, columns, recurrent, sent, begin, constant, duration / tau, segment, max_spikes,
                    room * (stop - first), n_spikes, n_events, end, first, stop,
                )  # fmt: skip
                if upto == first < stop:
                    room *= 4
                else:
                    parts[first] = lists
                    first = upto
                if first == stop or n_spikes[first] > max_spikes:
                    break

        for_each_chunk(batch, 1, _WORK * batch * (times.shape[1] + 1) * neurons, run)
        most = int(n_spikes.max(initial=0))
        if most > max_spikes:
            sample = int((n_spikes > max_spikes).argmax())
            raise EventBudgetError(max_spikes, sample)
        ordered = [parts[first] for first in sorted(parts)]
        lists = ordered[0] if len(ordered) == 1 else list(map(np.concatenate, zip(*ordered, strict=True)))
        out_times, out_indices, order = padded(lists[0], lists[1], n_spikes, most, tau)
        if differentiate:
            ctx.save_for_backward(weight, drive)
            ctx.lists, ctx.counts, ctx.inputs = lists, (n_spikes, n_events), (t_in, source)
            ctx.order, ctx.setting = order, (model, recurrent, duration / tau, tau)
        result = torch.from_numpy(out_times), torch.from_numpy(out_indices)
        ctx.mark_non_differentiable(result[1])
        ctx.set_materialize_grads(False)
        return *result, *torch.from_numpy(end).unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        weight, drive = ctx.saved_tensors
        model, recurrent, duration, tau = ctx.setting
        spike_t, spike_n, spike_e, *events, kept = ctx.lists
        (n_spikes, n_events), (t_in, source) = ctx.counts, ctx.inputs
        (batch, inputs), neurons = t_in.shape, weight.shape[0]
        columns, constant = weight.contiguous().numpy(), drive.contiguous().numpy()
        if recurrent:
            first_event = n_events.cumsum() - n_events
        else:
            events, first_event = [t_in.reshape(-1), source.reshape(-1), source.reshape(-1)], np.arange(batch) * inputs
        grad_spike = np.zeros(len(spike_t))
        if grads[0] is not None:
            present = np.arange(grads[0].shape[1]) < n_spikes[:, None]
            grad_spike[ctx.order] = grads[0].numpy()[present] * tau
        grad_end = np.zeros((batch, 3, neurons))
        for which, grad in enumerate(grads[2:]):
            if grad is not None:
                grad_end[:, which] = grad.numpy()
        grad_t, grad_start = np.zeros((batch, inputs)), np.empty((batch, 3, neurons))
        parts: dict[int, tuple[np.ndarray, ...]] = {}

        def run(first: int, stop: int) -> None:
            part = np.zeros(columns.shape), np.zeros(neurons), np.zeros(neurons)
            engine.backward(
                model, *events, first_event, n_events, columns, recurrent, constant, duration, _SEGMENT, kept, spike_t,
                spike_n, spike_e, n_spikes, n_spikes.cumsum() - n_spikes, grad_spike, grad_end,
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
        return (
            torch.from_numpy(grad_t / tau), None, grad_weight, grad_delay / tau if ctx.needs_input_grad[3] else None,
            torch.from_numpy(grad_start), grad_drive, None, None, None, None, None, None,
        )  # fmt: skip
