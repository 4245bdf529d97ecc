"""The discrete QIF neuron written straight from its equations, for PyTorch's own autograd.

Independent of the package's kernels: it shares nothing with them but the parameters' fields.
"""

from __future__ import annotations

import torch


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, threshold, derivative):
        ctx.save_for_backward(h, threshold)
        ctx.derivative = derivative
        return (h >= threshold).to(h.dtype)

    @staticmethod
    def backward(ctx, grad):
        h, threshold = ctx.saved_tensors
        through = grad * ctx.derivative(h, threshold)
        return through, -through.sum_to_size(threshold.shape), None


def simulate(x_seq, v, params, derivative, detach_reset):
    """``(spike_seq, v_seq, h_seq)`` with ``derivative(h, threshold)`` in place of ds/dh."""
    threshold = torch.as_tensor(params.v_threshold, dtype=x_seq.dtype)
    v_reset = torch.as_tensor(params.v_reset, dtype=x_seq.dtype)

    def f(u):
        parabola = params.a * (u - params.u1) * (u - params.u2)
        if params.rebound:
            return parabola
        return torch.where(u >= params.u1, parabola, params.a * (params.u1 - params.u2) * (u - params.u1))

    charge = f(v)
    spikes, membranes, potentials = [], [], []
    for x in x_seq:
        h = charge + params.input_gain * x
        s = _Spike.apply(h, threshold, derivative)
        gate = s.detach() if detach_reset else s
        if params.reset == "hard":
            v = (1 - gate) * h + gate * v_reset
            highest = h if params.rebound else torch.where(h > threshold, threshold, h)
            charge = (1 - gate) * f(highest) + gate * f(v_reset)  # the reset folded into the charge
        else:
            v = h - threshold * gate
            if not params.rebound:
                v = torch.where(v > threshold, threshold, v)
            charge = f(v)
        spikes.append(s)
        membranes.append(v)
        potentials.append(h)
    return torch.stack(spikes), torch.stack(membranes), torch.stack(potentials)
