"""Check, count and pad spike trains, compiled with Numba."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np
from numba import njit

_jit = njit(cache=True, nogil=True)


@_jit
def first_fault(times, indices, n_inputs, end):
    """Find the first invalid spike of a batch of trains.

    Args:
        times: [B, K] float64.
        indices: [B, K] int64.
        n_inputs: Indices lie in [0, n_inputs) where the time is finite.
        end: Latest time.

    Returns:
        The fault, its sample and its position: 0 for none, 1 for NaN, 2 for a negative time, 3 for a time that is
        below the one before, 4 for a time after ``end``, 5 for an index out of range.
    """
    for b in range(times.shape[0]):
        before = 0.0
        for k in range(times.shape[1]):
            t = times[b, k]
            if not t >= before:
                return (1 if t != t else 2 if t < 0 else 3), b, k
            if t != math.inf and (t > end or indices[b, k] < 0 or indices[b, k] >= n_inputs):
                return (4 if t > end else 5), b, k
            before = t
    return 0, 0, 0


@_jit
def first_outside(values, low, high, also):
    """Find the first of ``values``, [n] float64, that is NaN or outside [low, high] and not ``also``; -1 for none."""
    faults = 0
    for n in range(values.shape[0]):
        # A loop without an exit is several times faster.
        faults += not (low <= values[n] <= high)
    if faults > 0:
        for n in range(values.shape[0]):
            if not (low <= values[n] <= high or values[n] == also):
                return n
    return -1


@_jit
def places(indices, channels, number):
    """Find the positions of each channel's first spikes.

    Args:
        indices: [B, K] int64, below ``channels``; negative where there is no spike.
        channels: Number C.
        number: Number of spikes to find, at least 0.

    Returns:
        [B, C, number] positions in [0, K), -1 where the channel spikes less often; [B, C] numbers of spikes.

    Raises:
        IndexError: An index is not below ``channels``.
    """
    where = np.full((indices.shape[0], channels, number), -1, np.int64)
    counts = np.zeros((indices.shape[0], channels), np.int64)
    for b in range(indices.shape[0]):
        for k in range(indices.shape[1]):
            c = indices[b, k]
            if c >= channels:
                raise IndexError("a spike's index is not below the number of channels")
            if c >= 0:
                if counts[b, c] < number:
                    where[b, c, counts[b, c]] = k
                counts[b, c] += 1
    return where, counts


@_jit
def nth(times, where, counts, phase, period, duration):
    """Read the first spikes of each channel, continued by pseudospikes.

    Args:
        times: [B, K] float64.
        where: [B, C, number] positions from :func:`places`.
        counts: [B, C] from there.
        phase: [B, C].
        period: [B, C].
        duration: Trial length; infinite without pseudospikes.

    Returns:
        [B, C, number] times.
    """
    out = np.empty(where.shape)
    for b in range(where.shape[0]):
        for c in range(where.shape[1]):
            for k in range(where.shape[2]):
                if where[b, c, k] >= 0:
                    out[b, c, k] = times[b, where[b, c, k]]
                else:
                    out[b, c, k] = duration + period[b, c] * (k + 1 - counts[b, c] - phase[b, c])
    return out


@_jit
def nth_adjoint(grad, where, counts, phase, period, grad_times, grad_phase, grad_period):
    """Add the gradients of :func:`nth`'s arguments to the last three, given that of its result."""
    for b in range(where.shape[0]):
        for c in range(where.shape[1]):
            for k in range(where.shape[2]):
                if where[b, c, k] >= 0:
                    grad_times[b, where[b, c, k]] += grad[b, c, k]
                else:
                    grad_phase[b, c] -= period[b, c] * grad[b, c, k]
                    grad_period[b, c] += (k + 1 - counts[b, c] - phase[b, c]) * grad[b, c, k]


@_jit
def padded(times, neurons, counts, unit):
    """Sort and pad the spikes of each sample.

    Args:
        times: Spike times of all samples, one after the other.
        neurons: Neuron of each spike.
        counts: [B] numbers of spikes.
        unit: Factor of the times.

    Returns:
        [B, K] times, padded with infinity, K the largest of ``counts``; [B, K] neurons, padded with -1; for each spike,
        sample by sample and in ascending order, its place in ``times``.
    """
    most = 0
    for b in range(counts.shape[0]):
        most = max(most, counts[b])
    out_times = np.full((counts.shape[0], most), math.inf)
    out_neurons = np.full((counts.shape[0], most), -1, np.int64)
    order = np.empty(times.shape[0], np.int64)
    first = 0
    for b in range(counts.shape[0]):
        last = first + counts[b]
        order[first:last] = first + np.argsort(times[first:last], kind="mergesort")
        for k in range(counts[b]):
            out_times[b, k] = times[order[first + k]] * unit
            out_neurons[b, k] = neurons[order[first + k]]
        first = last
    return out_times, out_neurons, order


@_jit
def padded_adjoint(grad, counts, unit, order, out):
    """Write the gradient of :func:`padded`'s ``times`` to ``out``, given that of its first result, [B, K]."""
    s = 0
    for b in range(counts.shape[0]):
        for k in range(counts[b]):
            out[order[s]] = grad[b, k] * unit
            s += 1
