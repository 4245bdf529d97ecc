"""Backward pass composed of PyTorch's own operators, for second and higher derivatives.

The kernels compute first derivatives. Higher ones differentiate the sums here, which are those of :mod:`.contract`. In
them the derivative of the spike s is the surrogate w(h), as in the kernels, and w has its own derivative: zero for the
window, which is flat except at its ends, and that of the formula for every other shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_backend
from .contract import LEARNABLE, Kind, Shape


def multi_step_backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h_seq: Tensor, v: Tensor | None,
    x_seq: Tensor | None, a: Tensor | None, u1: Tensor | None, u2: Tensor | None, v_threshold: Tensor | None,
    v_reset: Tensor | None, input_gain: Tensor | None, s0: Tensor | None, s1: Tensor | None, s2: Tensor | None,
    numbers: Sequence[float], x_dtype: torch.dtype, soft: bool, detach_reset: bool, strict: bool, shape: int,
    pre_reset: bool, rebound: bool, needs_v: bool, needs: Sequence[bool], backend: str,
) -> list[Tensor]:  # fmt: skip
    """Compute ``qif::multi_step_backward``, bit by bit where all is finite, and differentiable any number of times."""
    tensors = (a, u1, u2, v_threshold, v_reset, input_gain, s0, s1, s2)
    *values, s0, s1, s2 = (_number(*pair, h_seq) for pair in zip(tensors, numbers[:9], strict=True))
    kind = Kind(soft, detach_reset, strict, Shape(shape), pre_reset, rebound)
    neuron = _Neuron(_Numbers(rebound, *values), (s0, s1, s2), kind)
    needed = {name for name, need, value in zip(LEARNABLE, needs, tensors, strict=False) if need and value is not None}
    start = torch.full_like(h_seq[0], numbers[9]) if v is None else v.to(h_seq.dtype)

    zero = torch.zeros_like(h_seq[0])
    sums = dict.fromkeys(needed, zero.double())

    def add(name: str, term: Tensor) -> None:
        if name in needed:
            sums[name] = sums[name] + term.double()

    back = zero
    grads: list[Tensor] = []
    for t in reversed(range(len(h_seq))):
        gv = None
        if grad_v is not None:
            gv = grad_v[t] if grad_v.dim() == h_seq.dim() else grad_v if t == len(h_seq) - 1 else None
        gs, gv, gh = (
            zero if g is None else g.to(h_seq.dtype)
            for g in (None if grad_spike is None else grad_spike[t], gv, None if grad_h is None else grad_h[t])
        )
        back = neuron.step(h_seq[t], back, gs, gv, gh, add)
        grads.append(back * neuron.numbers.gain)
        if t > 0:
            neuron.charge(h_seq[t - 1], back, True, add)
        else:
            neuron.charge(start, back, pre_reset, add)
        if x_seq is not None:
            add("input_gain", back * x_seq[t].to(h_seq.dtype))
    results = [torch.stack(grads[::-1]).to(x_dtype)]
    to_v = neuron.step(start, back, zero, zero, zero, add) if pre_reset else back * neuron.numbers.slope(start)
    if needs_v and v is not None:
        results.append(to_v.to(v.dtype))
    for name, value in zip(LEARNABLE, tensors, strict=False):
        if name in needed and value is not None:
            results.append(_sum_to(sums[name], value, h_seq.dtype))
    return results


class _Numbers(NamedTuple):
    """The six numbers that can be learned; each broadcasts to one time step."""

    rebound: bool
    a: Any
    u1: Any
    u2: Any
    threshold: Any
    v_reset: Any
    gain: Any

    def map(self, v: Any) -> Any:
        return torch_backend.charge(self.a, self.u1, self.u2, v, self.rebound)

    def slope(self, v: Any) -> Any:
        return torch_backend.slope(self.a, self.u1, self.u2, v, self.rebound)

    def highest(self, h: Tensor) -> Tensor:
        """A membrane that without rebound is at most the threshold: where the surrogate of a hard reset sees h, and
        after a soft reset."""
        return torch_backend.highest(h, self.threshold, self.rebound)

    def bent(self, v: Any) -> Any:
        """The membrane in the map's second factor."""
        return torch_backend.bent(self.u1, v, self.rebound)


class _Neuron(NamedTuple):
    numbers: _Numbers
    surrogate: tuple[Any, Any, Any]
    kind: Kind

    def step(self, h: Tensor, back: Any, gs: Any, gv: Any, gh: Any, add: Any) -> Any:
        """Compute the gradient of h, from that of the next step's h and the incoming ones."""
        p, s, w = self.numbers, self.gate(h), self.derivative(h)
        if self.kind.soft:
            held = (s > 0) & (h - p.threshold > p.threshold) & (not p.rebound)
            kept = back * p.slope(p.highest(h - s * p.threshold)) + gv
            add("v_threshold", torch.where(held, kept, -s * kept))
            kept = torch.where(held, 0.0, kept)
            fired = gs if self.kind.detach_reset else gs - kept * p.threshold
        else:
            slope = p.slope(h)
            if not p.rebound:
                # f(min(h, θ)), whose derivatives are of the threshold's above it: of use to the second pass alone.
                above = h > p.threshold
                add("v_threshold", (1 - s) * torch.where(above, back * p.slope(p.threshold), 0.0))
                slope = torch.where(above, 0.0, slope)
            kept = (1 - s) * (back * slope + gv)
            fired = gs
            if not self.kind.detach_reset:
                fired = gs + back * (p.map(p.v_reset) - p.map(p.highest(h))) + gv * (p.v_reset - h)
            add("v_reset", s * (back * p.slope(p.v_reset) + gv))
        through = fired * w
        add("v_threshold", -through)
        return through + (kept + gh)

    def charge(self, h: Tensor, grad: Any, resets: bool, add: Any) -> None:
        """Add the terms of a, u1 and u2 in the charge to which the previous step's membrane h contributes."""
        p, s = self.numbers, self.gate(h) if resets else torch.zeros_like(h)
        highest = p.highest(h) if resets else h

        def after(term: Any) -> Any:
            if self.kind.soft:
                return term(p.highest(h - s * p.threshold) if resets else h)
            return (1 - s) * term(highest) + s * term(p.v_reset)

        add("a", grad * after(lambda v: (v - p.u1) * (p.bent(v) - p.u2)))
        add("u1", -grad * (p.a * after(lambda v: (p.bent(v) - p.u2) + (p.bent(v) - v))))
        add("u2", -grad * (p.a * after(lambda v: v - p.u1)))

    def gate(self, h: Tensor) -> Tensor:
        """Return the spike as it acts on the reset: 0 or 1, with the derivative w if the reset is not detached."""
        threshold = self.numbers.threshold
        fired = (h > threshold if self.kind.strict else h >= threshold).to(h.dtype)
        if self.kind.detach_reset:
            return fired
        rise = self.antiderivative(h)
        return fired + (rise - rise.detach())

    def derivative(self, h: Tensor) -> Tensor:
        """Compute w(h)."""
        s0, s1, s2 = self.surrogate
        value = torch_backend.derivative(self.kind.shape, h, self.numbers.threshold, s0, s1, s2)
        z = h - self.numbers.threshold
        if self.kind.shape == Shape.SIGMOID:
            share = torch.sigmoid(s0 * z)
            smooth = s0 * share * (1 - share)
        elif self.kind.shape == Shape.GAUSSIAN:
            smooth = s1 * torch.exp(-((s0 * (z - s2)) ** 2))
        else:
            return value
        # PyTorch knows no derivative of the kernels' exponential, which gives the bits.
        return value.detach() + (smooth - smooth.detach())

    def antiderivative(self, h: Tensor) -> Tensor:
        """Compute a function of h - θ whose derivative is w; the surrogate's own numbers count as constants."""
        s0, s1, s2 = (value.detach() if isinstance(value, Tensor) else value for value in self.surrogate)
        z = h - self.numbers.threshold
        if self.kind.shape == Shape.WINDOW:
            return torch.where((h >= s0) & (h <= s1), z * s2, 0.0)
        if self.kind.shape == Shape.ATAN:
            return torch.atan(s0 * z) * (s1 / s0)
        if self.kind.shape == Shape.SIGMOID:
            return torch.sigmoid(s0 * z)
        if self.kind.shape == Shape.FAST_SIGMOID:
            return z / (s0 * z.abs() + 1)
        return torch.erf(s0 * (z - s2)) * (s1 / s0 * (math.sqrt(math.pi) / 2))


def _number(tensor: Tensor | None, number: float, h_seq: Tensor) -> Tensor:
    """Return a number that broadcasts to a time step, rounded as the kernels round it."""
    if tensor is None:
        return h_seq.new_full((), number)
    return (tensor.reshape(()) if tensor.numel() == 1 else tensor).to(h_seq.dtype)


def _sum_to(total: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up the gradient of ``value`` from its terms, one per neuron."""
    total = total.sum().reshape(value.shape) if value.numel() == 1 else total.sum_to_size(value.shape)
    return total.to(dtype).to(value.dtype)
