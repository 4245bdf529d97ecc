"""Event-based engine: the forward pass of one layer and its adjoint, compiled with Numba.

Times are in units of the membrane time constant τ. Per neuron the state is three numbers,

    LIF     (V, I, -)       V' = -V + I + J,        I' = -2I,   an input spike adds w to I;  spike at V = 1, V -> 0
    QIF     (p, q, I)       V = p/q, V' = V(V - 1) + I, I' = -2I, an input spike adds w to I;  spike at q = 0
    THETA   (p, q, -)       V - 1/2 = p/q, V' = V(V - 1) + J,     an input spike adds w to V;  spike at q = 0
    OLIF    (V, 0, -)       V' = -V + J, J > 1,   an input spike adds w to V, V <= 1;  spike at V = 1, V -> 0

J is constant in time. (p, q) and r(p, q) are the same state, so both are scaled by 1/(|p| + |q|) after each event, and
q >= 0 is kept by changing both signs at a spike: V = +∞ and V = -∞ are one point and the reset needs no work.
With σ = 1 - exp(-Δ) and x = I σ², C(x) = cos √x, S(x) = sin(√x)/√x (entire: cosh and sinh for x < 0),

    QIF     p <- (C p + I σS q)(1 - σ),  q <- C q - σS p,  I <- I (1 - σ)²
    THETA   the same with σ = Δ, I = J - 1/4 and without the factors (1 - σ)

An interval runs from one event to the next; interval e ends with event e, and the last interval ends with the trial.
All neurons of a layer share the events, so an interval is one pass over the neurons, after which those that spike in it
are treated one by one. Backward walks the intervals in reverse. States are kept at every ``seg``-th interval and
recomputed in between, so that the memory does not hold every neuron's state at every event.

At event e the adjoint a gives dL/dt_e = a·(Df⁻ - f⁺), f the right-hand side before and after, D the jump's derivative;
a spike at t_s adds to a the gradient of t_s, where dt_s = dq/p (projective) or -dV/V' (LIF).

Everything compiled is in this file, because Numba's cache notices changes to a function's own file alone.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np
from numba import njit

LIF, QIF, THETA, OLIF = 0, 1, 2, 3

_LIMIT = 0.5
"""|x| up to which the polynomials below are exact to rounding (the first omitted term is 3e-19)."""

_jit = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
_inline = njit(nogil=True, error_model="numpy", fastmath={"contract"}, inline="always")
"""Compiler of parts of a loop, which are inlined: a call with many arrays would cost as much as the work itself."""


_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8 = [(-1.0) ** n / math.factorial(2 * n) for n in range(9)]
_S0, _S1, _S2, _S3, _S4, _S5, _S6, _S7, _S8 = [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(9)]
_D0, _D1, _D2, _D3, _D4, _D5, _D6, _D7 = [(-1.0) ** n * n / math.factorial(2 * n + 1) for n in range(1, 9)]


@_inline
def _is_lif(model):
    return (model == LIF) | (model == OLIF)


@_inline
def _c_series(x):
    return _C0 + x * (_C1 + x * (_C2 + x * (_C3 + x * (_C4 + x * (_C5 + x * (_C6 + x * (_C7 + x * _C8)))))))


@_inline
def _s_series(x):
    return _S0 + x * (_S1 + x * (_S2 + x * (_S3 + x * (_S4 + x * (_S5 + x * (_S6 + x * (_S7 + x * _S8)))))))


@_inline
def _slope_series(x):
    return _D0 + x * (_D1 + x * (_D2 + x * (_D3 + x * (_D4 + x * (_D5 + x * (_D6 + x * _D7))))))


@_jit
def _entire(x):
    """Compute C(x), S(x), S'(x), for x < -limit scaled by exp(-√-x) against overflow: the scale of (p, q) is free."""
    if abs(x) <= _LIMIT:
        return _c_series(x), _s_series(x), _slope_series(x)
    if x > 0:
        z = math.sqrt(x)
        c, s = math.cos(z), math.sin(z) / z
    else:
        z = math.sqrt(-x)
        m = math.exp(-2 * z)
        c, s = (1 + m) / 2, (1 - m) / (2 * z)
    return c, s, (c - s) / (2 * x)


# Forward, one interval: every neuron's state at its end as if it did not spike, and which neurons do (``flag``).


@_inline
def _crossed(p, q):
    return (q < 0) | ((q == 0) & (p > 0))


@_inline
def _qif_step(p0, q0, i, c, k, e):
    p, q = (c * p0 + i * k * q0) * e, c * q0 - k * p0
    return p, q, 1 / (abs(p) + abs(q))


@_jit
def _qif_advance(x, y, flag, dt):
    p0, q0, i0, p1, q1, i1 = x[0], x[1], x[2], y[0], y[1], y[2]
    e, sigma = math.exp(-dt), -math.expm1(-dt)
    far = 0
    for n in range(p0.shape[0]):
        i = i0[n]
        z = i * sigma * sigma
        p, q, r = _qif_step(p0[n], q0[n], i, _c_series(z), sigma * _s_series(z), e)
        p1[n] = p * r
        q1[n] = q * r
        i1[n] = i * e * e
        flag[n] = _crossed(p, q)
        far += abs(z) > _LIMIT
    if far > 0:
        for n in range(p0.shape[0]):
            z = i0[n] * sigma * sigma
            if abs(z) > _LIMIT:
                c, s, _ = _entire(z)
                p, q, r = _qif_step(p0[n], q0[n], i0[n], c, sigma * s, e)
                p1[n] = p * r
                q1[n] = q * r
                flag[n] = _crossed(p, q) or z > math.pi**2


@_jit
def _theta_advance(x, y, flag, dt, drive):
    p0, q0, p1, q1 = x[0], x[1], y[0], y[1]
    root = math.sqrt(drive - 0.25)
    c, k = math.cos(root * dt), math.sin(root * dt) / root
    rik = (drive - 0.25) * k
    turned = root * dt > math.pi
    for n in range(p0.shape[0]):
        p, q = c * p0[n] + rik * q0[n], c * q0[n] - k * p0[n]
        r = 1 / (abs(p) + abs(q))
        p1[n] = p * r
        q1[n] = q * r
        flag[n] = _crossed(p, q) | turned


@_jit
def _lif_advance(x, y, flag, dt, drive):
    v0, i0, v1, i1 = x[0], x[1], y[0], y[1]
    e = math.exp(-dt)
    rise = -math.expm1(-dt)
    for n in range(v0.shape[0]):
        i, j = i0[n], drive[n]
        b = v0[n] - j + i
        v = j * rise + e * (v0[n] + i * rise)
        peak = (i > 0) & (b * b >= 4 * i * (1 - j)) & (b > 2 * i * e) & (b < 2 * i)
        v1[n] = v
        i1[n] = i * e * e
        flag[n] = (v >= 1) | (v0[n] >= 1) | peak


@_jit
def _advance(model, x, y, flag, dt, drive):
    """Advance all neurons over an interval; returns how many are flagged."""
    if model == QIF:
        _qif_advance(x, y, flag, dt)
    elif model == THETA:
        _theta_advance(x, y, flag, dt, drive[0])
    else:
        _lif_advance(x, y, flag, dt, drive)
    some = 0
    for n in range(flag.shape[0]):
        some += flag[n]
    return some


@_jit
def _projective_zero(p, q, i):
    """Find the smallest σ > 0 with q(σ) = 0, infinite if there is none; q >= 0, and q = 0 only with p < 0."""
    if i > 0:
        r = math.sqrt(i)
        return math.atan2(r * q, p) / r
    if p <= 0:
        return math.inf
    if i == 0:
        return q / p
    r = math.sqrt(-i)
    z = r * q / p
    return math.atanh(z) / r if z < 1 else math.inf


@_jit
def _lif_crossing(v, i, j, v_end, e):
    """Find exp(-Δ) at the first upward crossing of V = 1 before exp(-Δ) = e, or -1 if there is none.

    The crossing is the root of i u² - b u + d = 0, b = v - j + i, d = 1 - j, at which the left side grows with u.
    """
    if v >= 1:
        return 1.0
    b, d = v - j + i, 1 - j
    square = b * b - 4 * i * d
    if square >= 0:
        root = math.sqrt(square)
        if b >= 0:
            u = (b + root) / (2 * i) if i != 0 else math.inf
        else:
            u = 2 * d / (b - root)
        if e <= u <= 1:
            return u
    return e if v_end >= 1 else -1.0


@_jit
def _first(model, x, y, n, dt, drive):
    """Find the time from the interval's start to a flagged neuron's first spike, infinite if rounding set the flag."""
    if _is_lif(model):
        u = _lif_crossing(x[0, n], x[1, n], drive[n], y[0, n], math.exp(-dt))
        return min(-math.log(u), dt) if u > 0 else math.inf
    i = x[2, n] if model == QIF else drive[0] - 0.25
    zero = _projective_zero(x[0, n], x[1, n], i)
    if model == THETA:
        return min(zero, dt)
    return min(-math.log1p(-zero), dt) if zero < 1 else dt


@_jit
def _settle(model, x, y, n, count, last, dt, drive):
    """Correct ``y[:, n]``, the state at the interval's end, for ``count`` spikes of neuron n, the last at ``last``."""
    if _is_lif(model):
        u, e = math.exp(-last), math.exp(-(dt - last))
        rise = -math.expm1(-(dt - last))
        i = x[1, n] * u * u
        y[0, n] = drive[n] * rise + i * e * rise
        return
    if count % 2 == 1:
        y[0, n] = -y[0, n]
        y[1, n] = -y[1, n]
    if y[1, n] <= 0:
        y[0, n], y[1, n] = -1.0, 0.0


@_inline
def _record(spikes, found, time, neuron, interval):
    """Write a spike down if there is room; returns the number found so far, the new one included."""
    if found < spikes[0].shape[0]:
        spikes[0][found], spikes[1][found], spikes[2][found] = time, neuron, interval
    return found + 1


@_jit
def _resolve_lif(x, n, dt, drive, forced, t, interval, found, spikes):
    """Record a LIF neuron's spikes in an interval; returns the number found so far and the time of the last."""
    capacity, before = spikes[0].shape[0], found
    last, v, i, e = 0.0, x[0, n], x[1, n], math.exp(-dt)
    while found <= capacity:
        rest = dt - last
        rise = -math.expm1(-rest)
        end = drive[n] * rise + math.exp(-rest) * (v + i * rise)
        if forced and found == before:
            end = max(end, 1.0)
        u = _lif_crossing(v, i, drive[n], end, e)
        if u < 0:
            break
        last = min(last - math.log(u), dt)
        found = _record(spikes, found, t + last, n, interval)
        i *= u * u
        e = math.exp(-(dt - last))
        v = 0.0
    return found, last


@_jit
def _number_of_zeros(zero, period, end, odd):
    """Count the zeros of q up to ``end``, the first at ``zero``; ``odd`` as the sign of q at the end says."""
    total = 0
    if zero <= end:
        total = 1 + int(min((end - zero) / period, 1e9)) if period < math.inf else 1
    if (total % 2 == 1) != odd:
        # A zero within rounding of the end: the sign of q decides whether it belongs to this interval.
        after = zero + total * period if period < math.inf else zero
        if total > 0 and (period == math.inf or end - (after - period) < after - end):
            total -= 1
        else:
            total += 1
    return total


@_jit
def _resolve_projective(model, x, y, n, dt, drive, forced, t, interval, found, spikes):
    """Record the spikes of a QIF or theta neuron as :func:`_resolve_lif` does."""
    i, end = (x[2, n], -math.expm1(-dt)) if model == QIF else (drive[0] - 0.25, dt)
    zero = _projective_zero(x[0, n], x[1, n], i)
    period = math.pi / math.sqrt(i) if i > 0 else math.inf
    total = _number_of_zeros(zero, period, end, _crossed(y[0, n], y[1, n]))
    if forced and total == 0:
        total = 1
    last = 0.0
    for m in range(min(total, spikes[0].shape[0] + 1 - found)):
        at = min(zero + m * period if m > 0 else zero, end)
        last = at if model == THETA else dt if at >= 1 else min(-math.log1p(-at), dt)
        found = _record(spikes, found, t + last, n, interval)
    return found, last


@_inline
def _resolve(model, x, y, flag, dt, drive, cause, t, interval, found, most, spikes):
    """Record the spikes of all flagged neurons in an interval and settle their states.

    Returns the number found so far, more than ``most`` where it stopped early.
    """
    for n in range(flag.shape[0]):
        if flag[n]:
            before = found
            if _is_lif(model):
                found, last = _resolve_lif(x, n, dt, drive, n == cause, t, interval, found, spikes)
            else:
                found, last = _resolve_projective(model, x, y, n, dt, drive, n == cause, t, interval, found, spikes)
            if found > most:
                break
            if found > before:
                _settle(model, x, y, n, found - before, last, dt, drive)
    return found


@_inline
def _first_arrival(model, x, y, flag, t, until, drive, delay):
    """Find the recurrent spike of the interval that arrives first: when, and its neuron; ``until`` and -1 if none."""
    dt, end, cause = until - t, until, -1
    for n in range(flag.shape[0]):
        if flag[n]:
            at = t + _first(model, x, y, n, dt, drive) + delay[n]
            if at < end or (at == end and delay[n] == 0 and cause < 0):
                end, cause = at, n
    return end, cause


@_inline
def _enqueue(queue_t, queue_ref, head, tail, spike_t, spike_n, first, before, found, delay, duration):
    """Insert the arrivals of the spikes before..found into the queue head..tail by time; returns its new tail."""
    for s in range(before, found):
        at = spike_t[s] + delay[spike_n[s]]
        if at > duration:
            continue
        place = tail
        while place > head and queue_t[place - 1] > at:
            queue_t[place], queue_ref[place] = queue_t[place - 1], queue_ref[place - 1]
            place -= 1
        queue_t[place], queue_ref[place] = at, s - first
        tail += 1
    return tail


@_jit
def _receive(model, x, row):
    """Let an input spike with the weights ``row`` arrive."""
    if model == THETA:
        p, q = x[0], x[1]
        for n in range(row.shape[0]):
            p[n] += row[n] * q[n]
    elif model == OLIF:
        v = x[0]
        for n in range(row.shape[0]):
            v[n] = min(v[n] + row[n], 1.0)
    else:
        current = x[2] if model == QIF else x[1]
        for n in range(row.shape[0]):
            current[n] += row[n]


@_jit
def _row(weight, rows, have, source):
    """Return ``rows[source]``, the weights from ``source``, copied from the column of ``weight`` at the first use."""
    if not have[source]:
        have[source] = True
        for n in range(weight.shape[0]):
            rows[source, n] = weight[n, source]
    return rows[source]


@_jit
def forward(
    model, t_in, source_in, weight, recurrent, delay, start, drive, duration, seg, max_spikes, capacity, n_spikes,
    n_events, end, lo, hi,
):  # fmt: skip
    """Simulate the samples ``lo`` to ``hi``.

    Args:
        t_in: [B, K] times of the input spikes, ascending, infinite behind the last.
        source_in: [B, K] their sources.
        weight: [N, S], column ``source``; with ``recurrent`` the last N columns are from the layer's own neurons.
        delay: [N], of the recurrent connections, by source.
        start: [B, 3, N] states at t = 0.
        drive: [N] J.
        capacity: Number of spikes of all these samples that there is room for.
        n_spikes: [B], out; above ``max_spikes`` for a sample with more spikes, at which the simulation stops.
        n_events: [B], out.
        end: [B, 3, N], out.

    Returns:
        The first sample that did not fit, where the simulation stopped, or ``hi``. Then the results of the samples
        before it, joined without padding. The spikes: time, neuron and interval, ordered by interval, and within an
        interval by neuron. If ``recurrent``, the events that the layer received:
        time, source and ref, the input's position or the spike's number in the sample. The states at the start of
        intervals 0, seg, 2 seg, ... [segments, 3, N].
    """
    n_neurons = weight.shape[0]
    n_input = weight.shape[1] - (n_neurons if recurrent else 0)
    rows = np.empty((weight.shape[1], n_neurons))
    have = np.zeros(weight.shape[1], np.bool_)
    x = np.empty((3, n_neurons))
    y = np.empty((3, n_neurons))
    flag = np.empty(n_neurons, np.uint8)
    spike_t = np.empty(capacity)
    spike_n = np.empty(capacity, np.int64)
    spike_e = np.empty(capacity, np.int64)
    spikes = spike_t, spike_n, spike_e
    queue_t = np.empty(capacity if recurrent else 0)
    queue_ref = np.empty(capacity if recurrent else 0, np.int64)
    most_events = (hi - lo) * t_in.shape[1] + (capacity if recurrent else 0)
    event_t = np.empty(most_events if recurrent else 0)
    event_source = np.empty(most_events if recurrent else 0, np.int64)
    event_ref = np.empty(most_events if recurrent else 0, np.int64)
    kept = np.empty((most_events // seg + hi - lo, 3, n_neurons))
    n_kept, found, n_received, upto = 0, 0, 0, hi
    for b in range(lo, hi):
        x[:] = start[b]
        y[:] = 0.0
        t, i, head, tail, e, first, first_kept = 0.0, 0, 0, 0, 0, found, n_kept
        most = min(capacity, first + max_spikes)
        while True:
            if e % seg == 0:
                kept[n_kept] = x
                n_kept += 1
            until = duration
            if i < t_in.shape[1] and t_in[b, i] < until:
                until = t_in[b, i]
            if head < tail and queue_t[head] < until:
                until = queue_t[head]
            some = _advance(model, x, y, flag, until - t, drive)
            cause = -1
            if recurrent and some > 0:
                until, cause = _first_arrival(model, x, y, flag, t, until, drive, delay)
                if cause >= 0:
                    _advance(model, x, y, flag, until - t, drive)
                    flag[cause] = 1
            before = found
            if some > 0:
                found = _resolve(model, x, y, flag, until - t, drive, cause, t, e, found, most, spikes)
                if found > most:
                    break
            if recurrent:
                tail = _enqueue(queue_t, queue_ref, head, tail, spike_t, spike_n, first, before, found, delay, duration)
            x, y = y, x
            t = until
            if head < tail and queue_t[head] <= until:
                ref = queue_ref[head]
                source = n_input + spike_n[first + ref]
                head += 1
            elif i < t_in.shape[1] and t_in[b, i] <= until:
                ref, source = i, source_in[b, i]
                i += 1
            else:
                break
            _receive(model, x, _row(weight, rows, have, source))
            if recurrent:
                event_t[n_received], event_source[n_received], event_ref[n_received] = until, source, ref
                n_received += 1
            e += 1
        if found > most:
            n_spikes[b] = found - first if found - first > max_spikes else 0
            found, n_received, n_kept, upto = first, n_received - (e if recurrent else 0), first_kept, b
            break
        n_spikes[b] = found - first
        n_events[b] = e
        end[b] = x
    return (
        upto, spike_t[:found], spike_n[:found], spike_e[:found], event_t[:n_received], event_source[:n_received],
        event_ref[:n_received], kept[:n_kept],
    )  # fmt: skip


# Backward: adjoint of the state at an interval's end -> at its start.


@_inline
def _qif_adjoint(p0, q0, i, ap, aq, ai, c, k, slope, sigma, e):
    r = _qif_step(p0, q0, i, c, k, e)[2]
    gp, gq, c_slope = ap * e * r, aq * r, -0.5 * sigma * k
    to_i = ai * e * e + gp * (c_slope * p0 + (k + i * slope) * q0) + gq * (c_slope * q0 - slope * p0)
    return gp * c - gq * k, gp * i * k + gq * c, to_i


@_jit
def _qif_retreat(x, a, b, dt):
    p0, q0, i0, ap, aq, ai, bp, bq, bi = x[0], x[1], x[2], a[0], a[1], a[2], b[0], b[1], b[2]
    e, sigma = math.exp(-dt), -math.expm1(-dt)
    cube = sigma * sigma * sigma
    far = 0
    for n in range(p0.shape[0]):
        i = i0[n]
        z = i * sigma * sigma
        c, k, slope = _c_series(z), sigma * _s_series(z), cube * _slope_series(z)
        to_p, to_q, to_i = _qif_adjoint(p0[n], q0[n], i, ap[n], aq[n], ai[n], c, k, slope, sigma, e)
        bp[n] = to_p
        bq[n] = to_q
        bi[n] = to_i
        far += abs(z) > _LIMIT
    if far > 0:
        for n in range(p0.shape[0]):
            z = i0[n] * sigma * sigma
            if abs(z) > _LIMIT:
                c, s, slope = _entire(z)
                bp[n], bq[n], bi[n] = _qif_adjoint(
                    p0[n], q0[n], i0[n], ap[n], aq[n], ai[n], c, sigma * s, cube * slope, sigma, e
                )


@_jit
def _theta_retreat(x, a, b, dt, drive):
    root = math.sqrt(drive - 0.25)
    c, k = math.cos(root * dt), math.sin(root * dt) / root
    rik = (drive - 0.25) * k
    p0, q0, ap, aq, bp, bq = x[0], x[1], a[0], a[1], b[0], b[1]
    for n in range(p0.shape[0]):
        p, q = c * p0[n] + rik * q0[n], c * q0[n] - k * p0[n]
        r = 1 / (abs(p) + abs(q))
        bp[n] = (ap[n] * c - aq[n] * k) * r
        bq[n] = (ap[n] * rik + aq[n] * c) * r


@_jit
def _lif_retreat(a, b, dt, grad_drive):
    e, rise = math.exp(-dt), -math.expm1(-dt)
    av, ai, bv, bi = a[0], a[1], b[0], b[1]
    for n in range(av.shape[0]):
        bv[n] = av[n] * e
        bi[n] = ai[n] * e * e + av[n] * e * rise
        grad_drive[n] += av[n] * rise


@_jit
def _lif_spikes(x, a, b, n, t, dt, drive, first, last, spike_t, grad_spike, grad_drive):
    """Take neuron n's adjoint over an interval with the spikes first..last, in place of _lif_retreat's result."""
    grad_drive[n] += a[0, n] * math.expm1(-dt)
    av, ai = a[0, n], a[1, n]
    later = dt
    for s in range(last, first - 1, -1):
        at = min(spike_t[s] - t, dt)
        rest = later - at
        e, rise = math.exp(-rest), -math.expm1(-rest)
        grad_drive[n] += av * rise
        ai = ai * e * e + av * e * rise
        av = av * e
        current = x[1, n] * math.exp(-2 * at) + drive[n]
        av = -(grad_spike[s] - av * current) / (current - 1)
        later = at
    e, rise = math.exp(-later), -math.expm1(-later)
    grad_drive[n] += av * rise
    b[0, n], b[1, n] = av * e, ai * e * e + av * e * rise


@_jit
def _projective_spikes(model, x, b, n, t, dt, drive, first, last, spike_t, grad_spike):
    """Add to the adjoint at the interval's start the gradients of the spikes first..last of neuron n."""
    p0, q0, i = x[0, n], x[1, n], x[2, n] if model == QIF else drive[0] - 0.25
    for s in range(first, last + 1):
        at = min(spike_t[s] - t, dt)
        sigma = -math.expm1(-at) if model == QIF else at
        c, k, slope = _entire(i * sigma * sigma)
        k *= sigma
        h = grad_spike[s] / (c * p0 + i * k * q0)
        if model == QIF:
            h /= math.exp(-at)
            c_slope = -0.5 * sigma * k
            b[2, n] += h * (c_slope * q0 - slope * sigma * sigma * sigma * p0)
        b[0, n] -= h * k
        b[1, n] += h * c


@_jit
def _to_time(model, x, a, row, drive):
    """Compute dL/dt of an event from the states ``x`` and adjoints ``a`` just after it."""
    total = 0.0
    if model == QIF:
        for n in range(row.shape[0]):
            total += row[n] * (2 * a[2, n] - a[0, n] * x[1, n])
    elif model == OLIF:
        for n in range(row.shape[0]):
            # A neuron that is pushed to the threshold spikes at the time of the event, whatever the weight.
            total += a[0, n] * (row[n] if x[0, n] < 1 else 1 - drive[n])
    elif model == LIF:
        for n in range(row.shape[0]):
            total += row[n] * (2 * a[1, n] - a[0, n])
    else:
        for n in range(row.shape[0]):
            total += row[n] * (a[1, n] * x[1, n] - a[0, n] * (x[0, n] - row[n] * x[1, n]))
    return total


@_jit
def _to_weight(model, x, a, row, grad):
    """Add dL/dw of an event, and take the adjoint to just before it."""
    if model == THETA:
        q, ap, aq = x[1], a[0], a[1]
        for n in range(row.shape[0]):
            grad[n] += ap[n] * q[n]
            aq[n] += row[n] * ap[n]
    elif model == OLIF:
        v, av = x[0], a[0]
        for n in range(row.shape[0]):
            if v[n] >= 1:
                av[n] = 0.0
            grad[n] += av[n]
    else:
        current = a[2] if model == QIF else a[1]
        for n in range(row.shape[0]):
            grad[n] += current[n]


@_inline
def _replay(
    model, states, low, high, intervals, duration, times, sources, weight, rows, grad_rows, have, drive, spike_t,
    spike_n, spike_e, s, left, flag,
):  # fmt: skip
    """Recompute the states at the start of the intervals low..high from that of the first, ``states[0]``.

    The spikes from ``s``, the first of interval ``low``, to ``left`` are those of forward.
    """
    t = times[low - 1] if low > 0 else 0.0
    for e in range(low, high):
        x, y = states[e - low], states[e - low + 1]
        until = times[e] if e < intervals - 1 else duration
        _advance(model, x, y, flag, until - t, drive)
        while s < left and spike_e[s] == e:
            n, first = spike_n[s], s
            while s < left and spike_e[s] == e and spike_n[s] == n:
                s += 1
            _settle(model, x, y, n, s - first, spike_t[s - 1] - t, until - t, drive)
        if e < intervals - 1:
            if not have[sources[e]]:
                grad_rows[sources[e]] = 0.0
            _receive(model, y, _row(weight, rows, have, sources[e]))
        t = until


@_jit
def _retreat(model, x, a, b, t, dt, drive, begin, left, e, spike_t, spike_n, spike_e, grad_spike, grad_drive):
    """Take the adjoint over interval ``e``, whose spikes are the last before ``left``; returns the first of them."""
    if _is_lif(model):
        _lif_retreat(a, b, dt, grad_drive)
    else:
        # A spike changed the signs of p and q.
        s = left - 1
        while s >= begin and spike_e[s] == e:
            a[0, spike_n[s]] *= -1
            a[1, spike_n[s]] *= -1
            s -= 1
        if model == QIF:
            _qif_retreat(x, a, b, dt)
        else:
            _theta_retreat(x, a, b, dt, drive[0])
    while left > begin and spike_e[left - 1] == e:
        n, last = spike_n[left - 1], left - 1
        while left > begin and spike_e[left - 1] == e and spike_n[left - 1] == n:
            left -= 1
        if _is_lif(model):
            _lif_spikes(x, a, b, n, t, dt, drive, left, last, spike_t, grad_spike, grad_drive)
        else:
            _projective_spikes(model, x, b, n, t, dt, drive, left, last, spike_t, grad_spike)
    return left


@_jit
def backward(
    model, event_t, event_source, event_ref, first_event, n_events, weight, recurrent, drive, duration, seg, kept,
    spike_t, spike_n, spike_e, n_spikes, first_spike, grad_spike, grad_end, needs_time, grad_t, grad_weight, grad_delay,
    grad_start, grad_drive, lo, hi,
):  # fmt: skip
    """Take the adjoint of the samples ``lo`` to ``hi`` back to their start.

    Names are those of :func:`forward`; the lists of all samples are joined one after the other.

    Args:
        event_t: Times of sample b's events from ``first_event[b]`` on; without ``recurrent``, of its input spikes.
        event_source: Source of each event.
        event_ref: Number of the spike or input spike of each event; not read without ``recurrent``.
        first_spike: [B], position of sample b's first spike.
        grad_spike: Like ``spike_t``, in and overwritten: its gradients.
        grad_end: [B, 3, N] of ``end``; homogeneous, p·grad_p + q·grad_q = 0.
        grad_t: [B, K], out: of ``t_in``.
        grad_weight: [N, S], added to, as ``grad_delay`` and ``grad_drive``, [N]; one array for each caller at a time.
        grad_start: [B, 3, N], out.
    """
    n_neurons = weight.shape[0]
    n_input = weight.shape[1] - (n_neurons if recurrent else 0)
    rows = np.empty((weight.shape[1], n_neurons))
    grad_rows = np.empty((weight.shape[1], n_neurons))
    have = np.zeros(weight.shape[1], np.bool_)
    states = np.zeros((seg + 1, 3, n_neurons))
    a = np.zeros((3, n_neurons))
    b = np.zeros((3, n_neurons))
    flag = np.empty(n_neurons, np.uint8)
    after = 0
    for sample in range(lo):
        after += n_events[sample] // seg + 1
    for sample in range(lo, hi):
        a[:] = grad_end[sample]
        intervals = n_events[sample] + 1
        after += n_events[sample] // seg + 1
        n_parts = n_events[sample] // seg + 1
        begin, left = first_spike[sample], first_spike[sample] + n_spikes[sample]
        times = event_t[first_event[sample] : first_event[sample] + n_events[sample]]
        sources = event_source[first_event[sample] : first_event[sample] + n_events[sample]]
        for part in range(n_parts - 1, -1, -1):
            low, high = part * seg, min(part * seg + seg, intervals)
            states[0] = kept[after - n_parts + part]
            s = left
            while s > begin and spike_e[s - 1] >= low:
                s -= 1
            _replay(
                model, states, low, high, intervals, duration, times, sources, weight, rows, grad_rows, have, drive,
                spike_t, spike_n, spike_e, s, left, flag,
            )  # fmt: skip
            for e in range(high - 1, low - 1, -1):
                x, y = states[e - low], states[e - low + 1]
                until = duration
                if e < intervals - 1:
                    until, source = times[e], sources[e]
                    if needs_time or recurrent:
                        to_time = _to_time(model, y, a, rows[source], drive)
                        ref = event_ref[first_event[sample] + e] if recurrent else e
                        if source >= n_input:
                            grad_spike[begin + ref] += to_time
                            grad_delay[source - n_input] += to_time
                        else:
                            grad_t[sample, ref] = to_time
                    _to_weight(model, y, a, rows[source], grad_rows[source])
                t = times[e - 1] if e > 0 else 0.0
                left = _retreat(
                    model, x, a, b, t, until - t, drive, begin, left, e, spike_t, spike_n, spike_e, grad_spike,
                    grad_drive,
                )  # fmt: skip
                a, b = b, a
        grad_start[sample] = a
    for source in range(weight.shape[1]):
        if have[source]:
            for n in range(n_neurons):
                grad_weight[n, source] += grad_rows[source, n]
