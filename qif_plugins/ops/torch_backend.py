"""Reference implementation in PyTorch, for any device and dtype; the others reproduce its bits.

It follows :mod:`.contract` operation by operation. :mod:`.compiled` traces it, with time steps of any shape, and
with lists of them in place of the tensors [T, N] that results are written to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Coefficient, Coefficients, Kind, Shape


def unavailable(device: torch.device) -> str | None:
    """Say why this machine lacks ``device``; the reference runs wherever PyTorch does."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here."
    return None


def forward(
    x: Tensor, v0: Tensor | float, c: Coefficients, kind: Kind, spike: Tensor, v_last: Tensor | None,
    v_seq: Tensor | None, h: Tensor | None,
) -> None:  # fmt: skip
    """See :mod:`.contract`."""
    dtype = compute_dtype(x)
    numbers = _spread(c, x[0].numel(), dtype, x.device)[:6]
    for t, (membrane, fired, v) in enumerate(steps(x, initial(v0, x, dtype), numbers, kind)):
        spike[t] = fired
        if h is not None:
            h[t] = membrane
        if v_seq is not None:
            v_seq[t] = v
    if v_last is not None:
        v_last.copy_(v)


def backward(
    grad_spike: Tensor | None, grad_v: Tensor | None, grad_h: Tensor | None, h: Tensor, v0: Tensor | float,
    x: Tensor | None, c: Coefficients, kind: Kind, grad_x: Tensor, grad_v0: Tensor | None, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """See :mod:`.contract`."""
    dtype, last = h.dtype, h.shape[0] - 1
    a, u1, u2, threshold, v_reset, gain, s0, s1, s2 = _spread(c, h[0].numel(), dtype, h.device)
    zero = torch.zeros_like(h[0])
    # Apple's GPUs have no float64.
    wide = torch.float32 if h.device.type == "mps" else torch.float64
    sums = [zero.new_zeros(zero.shape if needed else 0, dtype=wide) for needed in needs]
    after = charge(a, u1, u2, v_reset, kind.rebound)
    start = initial(v0, h, dtype)

    def incoming(gradient: Tensor | None, t: int) -> Tensor:
        if gradient is None or t < 0 or (gradient.dim() < h.dim() and t != last):
            return zero
        return (gradient if gradient.dim() < h.dim() else gradient[t]).to(dtype)

    back = k0 = zero
    held: Tensor | None = None
    for t in range(last, -2 if kind.pre_reset else -1, -1):
        membrane = h[t] if t >= 0 else start
        fired, v = _fire_and_reset(membrane, threshold, v_reset, kind, again=True)
        gs, gv, gh = (incoming(gradient, t) for gradient in (grad_spike, grad_v, grad_h))
        w = derivative(kind.shape, membrane, threshold, s0, s1, s2)
        if kind.soft:
            k0 = back * slope(a, u1, u2, v, kind.rebound) + gv
            kept, held = k0, None
            if not kind.rebound:
                held = fired & (membrane - threshold > threshold)
                kept = torch.where(held, zero, k0)
            through = gs if kind.detach_reset else gs - kept * threshold
            k = kept + gh
        else:
            k = torch.where(fired, zero, back * slope(a, u1, u2, membrane, kind.rebound) + gv) + gh
            through = gs
            if not kind.detach_reset:
                reach = after - charge(a, u1, u2, highest(membrane, threshold, kind.rebound), kind.rebound)
                through = (gs + back * reach) + gv * (v_reset - membrane)
        surrogate = torch.where(w == 0, zero, through * w)
        grad = surrogate + k
        if needs[3]:
            if kind.soft:
                k0 = torch.where(fired, k0 if held is None else torch.where(held, -k0, k0), zero)
            sums[3] -= surrogate + k0 if kind.soft else surrogate
        if needs[4] and not kind.soft:
            sums[4] += torch.where(fired, back * slope(a, u1, u2, v_reset, kind.rebound) + gv, zero)
        if t >= 0:
            grad_x[t] = grad * gain
            if any(needs[:3]):
                before = h[t - 1] if t else start
                if t or kind.pre_reset:
                    _, before = _fire_and_reset(before, threshold, v_reset, kind, again=True)
                _add_charge(sums, needs, grad, before, a, u1, u2, kind.rebound)
            if needs[5] and x is not None:
                sums[5] += grad * x[t].to(dtype)
        back = grad
    if grad_v0 is not None:
        grad_v0.copy_(back if kind.pre_reset else back * slope(a, u1, u2, start, kind.rebound))
    return [
        _reduce(total, entry).to(dtype) if needed else None
        for total, entry, needed in zip(sums, c[:6], needs, strict=True)
    ]


def _add_charge(
    sums: list[Tensor], needs: Sequence[bool], grad: Tensor, v: Tensor, a: Any, u1: Any, u2: Any, rebound: bool
) -> None:
    """Add the terms of a, u1 and u2 in the charge that the membrane ``v`` contributed to a step."""
    m = bent(u1, v, rebound)
    if needs[0]:
        sums[0] += grad * ((v - u1) * (m - u2))
    if needs[1]:
        sums[1] -= grad * (a * (v - u2 if rebound else (m - u2) + (m - v)))
    if needs[2]:
        sums[2] -= grad * (a * (v - u1))


def charge(a: Any, u1: Any, u2: Any, v: Any, rebound: bool) -> Any:
    """f(v), see :mod:`.contract`."""
    return (a * (v - u1)) * (bent(u1, v, rebound) - u2)


def slope(a: Any, u1: Any, u2: Any, v: Any, rebound: bool) -> Any:
    """f'(v), see :mod:`.contract`."""
    m = bent(u1, v, rebound)
    return a * ((m - u1) + (m - u2))


def bent(u1: Any, v: Any, rebound: bool) -> Any:
    """The membrane in the map's second factor; floats too, for :mod:`.unfused`."""
    if rebound:
        return v
    return torch.where(v < u1, u1, v) if isinstance(v, Tensor) or isinstance(u1, Tensor) else max(v, u1)


def highest(h: Tensor, threshold: Any, rebound: bool) -> Tensor:
    """The membrane h, without rebound at most the threshold: so the surrogate gradient of a hard reset sees it."""
    return h if rebound else torch.where(h > threshold, threshold, h)


def exp_negative(y: Tensor) -> Tensor:
    """Compute e^-y for y >= 0, to one unit in the last place of float32, with the same bits on every machine.

    It is Cephes' expf, of additions, multiplications and an exact scaling by a power of two. y above 80, and NaN, count
    as 80, which keeps the result normal. In float64 it is PyTorch's exponential.
    """
    if y.dtype == torch.float64:
        return torch.exp(-y)
    y = torch.where(y < 80.0, y, 80.0)
    n = torch.floor(y * -1.44269504088896341 + 0.5)
    r = (-y - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + factor
    p = (p * (r * r) + r) + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def steps(x_seq: Tensor, v: Tensor, numbers: Sequence[Any], kind: Kind) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the membrane before the reset, the spike and the membrane after it, step by step.

    ``numbers`` are the neuron's six numbers; each broadcasts to one step.
    """
    a, u1, u2, threshold, v_reset, gain = numbers
    if kind.pre_reset:
        _, v = _fire_and_reset(v, threshold, v_reset, kind)
    for x in x_seq.unbind(0):
        h = charge(a, u1, u2, v, kind.rebound) + gain * x.to(v.dtype)
        fired, v = _fire_and_reset(h, threshold, v_reset, kind)
        yield h, fired, v


def _fire_and_reset(h: Tensor, threshold: Any, v_reset: Any, kind: Kind, again: bool = False) -> tuple[Tensor, Tensor]:
    """Return the spike and the membrane after the reset; ``again`` in a backward pass."""
    if again:
        # Another operator with the same result: Inductor would keep the bool tensor of the forward pass for this one,
        # and takes some 30 ns to write an entry of it.
        fired = threshold < h if kind.strict else threshold <= h
    else:
        fired = h > threshold if kind.strict else h >= threshold
    return fired, torch.where(fired, subtracted(h, threshold, kind.rebound) if kind.soft else v_reset, h)


def subtracted(h: Tensor, threshold: Any, rebound: bool) -> Tensor:
    """The membrane that a soft reset leaves after a spike: h - θ, without rebound at most the threshold."""
    return highest(h - threshold, threshold, rebound)


def derivative(shape: Shape, h: Tensor, threshold: Any, s0: Any, s1: Any, s2: Any) -> Tensor:
    """Compute w(h), see :mod:`.contract`."""
    if shape == Shape.WINDOW:
        return ((h >= s0) & (h <= s1)) * s2
    z = h - threshold
    if shape == Shape.ATAN:
        y = s0 * z
        return s1 / (1 + y * y)
    if shape == Shape.SIGMOID:
        e = exp_negative(s0 * z.abs())
        return (s0 * e) / ((1 + e) * (1 + e))
    if shape == Shape.GAUSSIAN:
        y = s0 * (z - s2)
        square = y * y
        return torch.where(square < 80.0, s1 * exp_negative(square), 0.0)
    y = s0 * z.abs() + 1
    return 1 / (y * y)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the computation for an input ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def initial(v0: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the membrane before the first step as a tensor of the shape of one time step of ``x``."""
    return v0.to(dtype) if isinstance(v0, Tensor) else torch.full_like(x[0], v0, dtype=dtype)


def _spread(c: Coefficients, neurons: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Return each coefficient as a tensor [N], or 0-dimensional if it is a plain float."""
    numbers = [_spread_one(entry, neurons, dtype) for entry in c]
    for index in (1, 3, 4):
        if numbers[index].device != device:
            # torch.where copies a number from the host to a GPU at every call, and waits for it; this fills it there.
            numbers[index] = torch.full((), numbers[index].item(), dtype=dtype, device=device)
    return numbers


def _spread_one(entry: Coefficient, neurons: int, dtype: torch.dtype) -> Any:
    values = entry.values
    if not isinstance(values, Tensor):
        # Rounded as the kernels round their arguments, and kept on the host, where reading it needs no synchronisation.
        return torch.tensor(
            values if dtype == torch.float64 else struct.unpack("f", struct.pack("f", values))[0],
            dtype=dtype, device="cpu",
        )  # fmt: skip
    if values.numel() == 1:
        return values.expand(neurons)
    return values.repeat_interleave(entry.inner).repeat(neurons // (entry.inner * values.numel()))


def _reduce(total: Tensor, entry: Coefficient) -> Tensor:
    """Add up terms [N] to one value per coefficient."""
    if not isinstance(entry.values, Tensor) or entry.values.numel() == 1:
        return total.sum().reshape(1)
    return total.reshape(-1, entry.values.numel(), entry.inner).sum(dim=(0, 2))
