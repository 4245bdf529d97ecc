"""Spike times of small networks by numerical integration, sharing nothing with the engine but the equations."""

import math

import numpy as np
from scipy.integrate import solve_ivp


def integrate(
    model, times, sources, weight, duration, tau=1.0, recurrent=None, delay=None, v0=None, i0=None, current=0.0,
    pieces=None,
):  # fmt: skip
    """All spikes (time, neuron) of one sample, ascending, and the membranes and currents at the end.

    ``pieces``, if given, receives (from, to, function of time) for each stretch of the solution: the membranes and then
    the currents. LIF and oscillating LIF neurons are integrated in V; QIF and theta neurons in the angle
    ψ = arccot(-(V - 1/2)), which passes π at a spike: τψ' = cos²ψ + (I - 1/4) sin²ψ.
    """
    neurons = len(weight)
    rest = 0.5 if model == "theta" else 0.0
    v = np.full(neurons, rest) if v0 is None else np.asarray(v0, dtype=float)
    i = np.zeros(neurons) if i0 is None else np.asarray(i0, dtype=float)
    constant = np.broadcast_to(np.asarray(current, dtype=float), (neurons,))
    delay = np.zeros(neurons) if delay is None else delay
    in_v = model in ("lif", "olif")
    lead = v if in_v else np.arctan2(1.0, -(v - 0.5))
    threshold = 1.0 if in_v else math.pi

    def slope(t, state):
        x, drive = state[:neurons], state[neurons:] + constant
        if in_v:
            change = -x + drive
        else:
            change = np.cos(x) ** 2 + (drive - 0.25) * np.sin(x) ** 2
        return np.concatenate([change / tau, -2 * state[neurons:] / tau])

    def crossing(n):
        def event(t, state):
            return state[n] - threshold

        event.terminal, event.direction = True, 1
        return event

    def membranes_and_currents(solution):
        def values(t):
            state = solution(t)
            return state if in_v else np.concatenate([0.5 - 1 / np.tan(state[:neurons]), state[neurons:]])

        return values

    def emit(n):
        spikes.append((t, n))
        state[n] = 0.0
        if recurrent is not None:
            pending.append((t + delay[n], recurrent[:, n], False))

    pending = [(t, row, True) for t, row in zip(times, weight[:, sources].T, strict=True)]
    spikes = []
    t = 0.0
    state = np.concatenate([lead, i])
    while True:
        pending.sort(key=lambda arrival: arrival[0])
        until = min(pending[0][0], duration) if pending else duration
        crossed = []
        if until > t:
            events = [crossing(n) for n in range(neurons)]
            solution = solve_ivp(
                slope, (t, until), state, "DOP853", events=events, rtol=1e-13, atol=1e-14, max_step=0.05 * tau,
                dense_output=pieces is not None,
            )  # fmt: skip
            if pieces is not None:
                pieces.append((t, solution.t[-1], membranes_and_currents(solution.sol)))
            t, state = solution.t[-1], solution.y[:, -1].copy()
            # Neurons that an input has pushed to the threshold together stay together, and one event is reported.
            close = state[:neurons] > threshold - 1e-11
            crossed = [n for n in range(neurons) if len(solution.t_events[n]) or (close[n] and t < until)]
        if crossed:
            for n in crossed:
                emit(n)
            continue
        if t >= duration and not (pending and pending[0][0] <= duration):
            break
        _, row, _ = pending.pop(0)
        if model == "theta":
            potential = 0.5 - 1 / np.tan(np.where(state[:neurons] == 0, 1e-300, state[:neurons])) + row
            state[:neurons] = np.arctan2(1.0, -(potential - 0.5))
        elif model == "olif":
            state[:neurons] += row
            for n in np.flatnonzero(state[:neurons] >= 1):
                emit(n)
        else:
            state[neurons:] += row
    end = state[:neurons] if in_v else 0.5 - 1 / np.tan(state[:neurons])
    return sorted(spikes), end, state[neurons:]
