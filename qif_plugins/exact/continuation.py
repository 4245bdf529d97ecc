"""Phase and period of the pseudospikes with which spike trains continue beyond the trial's end.

The formulas are in :mod:`.layers`. Compiled with Numba, values and derivatives in one pass, since a network calls this
once a layer, where a dozen small tensor operations and their gradients would take longer than the simulation.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import engine
from .once import refuse_twice

_LIF, _QIF, _OLIF = engine.LIF, engine.QIF, engine.OLIF
_inline = njit(nogil=True, inline="always")


@_inline
def _sufficient(drive, scale):
    """Compute s = scale · softplus(drive / scale) and ds/d(drive).

    Under strong inhibition the softplus is 0 in float64, and the period 1/s or 1/√s would not be finite.
    """
    x = drive / scale
    e = math.exp(-abs(x))
    return max(scale * (max(x, 0.0) + math.log1p(e)), 1e-300), (1.0 if x > 0 else e) / (1 + e)


@_inline
def _angle(y, x, dy, dx):
    """Compute the derivative of atan2(y, x)/π from those of y and x."""
    return (x * dy - y * dx) / (math.pi * (x * x + y * y))


@njit(cache=True, nogil=True)
def _continue(model, p, q, drive, constant, scale, out):
    """Write phase, period and d(phase)/dp, d(phase)/dq, d(phase)/d(drive), d(period)/d(drive) to ``out`` [6, B, N].

    Args:
        model: The neuron's number in :mod:`.engine`.
        p: [B, N] of the state.
        q: [B, N]; not read for LIF neurons.
        drive: [B, N] D; for LIF neurons D + J.
        constant: J of theta and oscillating LIF neurons.
        scale: Scale of the softplus.
        out: The period is in units of the membrane time constant.
    """
    root = math.sqrt(max(constant - 0.25, 0.0))
    for b in range(p.shape[0]):
        for n in range(p.shape[1]):
            d = drive[b, n]
            if model == _LIF:
                s, ds = _sufficient(d, scale)
                period = math.log1p(1 / s)
                left = math.log1p((1 - p[b, n]) / s)
                d_period = -ds / (s * (s + 1))
                d_left = ds * (1 / (s + 1 - p[b, n]) - 1 / s)
                out[0, b, n], out[1, b, n] = 1 - left / period, period
                out[2, b, n], out[3, b, n] = 1 / ((s + 1 - p[b, n]) * period), 0.0
                out[4, b, n], out[5, b, n] = (left * d_period / period - d_left) / period, d_period
            elif model == _QIF:
                s, ds = _sufficient(d, scale)
                r = math.sqrt(s)
                dr = ds / (2 * r)
                y, x = r * q[b, n], q[b, n] / 2 - p[b, n]
                out[0, b, n], out[1, b, n] = math.atan2(y, x) / math.pi, math.pi / r
                out[2, b, n], out[3, b, n] = _angle(y, x, 0.0, -1.0), _angle(y, x, r, 0.5)
                out[4, b, n], out[5, b, n] = _angle(y, x, q[b, n] * dr, 0.0), -math.pi * dr / s
            elif model == _OLIF:
                period = -math.log1p(-1 / constant)
                v = p[b, n] + d
                slope = 1 / ((constant - v) * period) if v < 1 else 0.0
                out[0, b, n], out[1, b, n] = -math.log1p(-min(v, 1.0) / constant) / period, period
                out[2, b, n], out[3, b, n], out[4, b, n], out[5, b, n] = slope, 0.0, slope, 0.0
            else:
                y, x = root * q[b, n], -p[b, n] - d * q[b, n]
                out[0, b, n], out[1, b, n] = math.atan2(y, x) / math.pi, math.pi / root
                out[2, b, n], out[3, b, n] = _angle(y, x, 0.0, -1.0), _angle(y, x, root, -d)
                out[4, b, n], out[5, b, n] = _angle(y, x, 0.0, -q[b, n]), 0.0


def _computed(
    p: Tensor, q: Tensor, drive: Tensor, model: int, constant: float, scale: float, tau: float
) -> tuple[tuple[Tensor, Tensor], np.ndarray]:
    """Compute phase and period, and the numbers behind them as :func:`_continue` writes them."""
    out = np.empty((6, *p.shape))
    _continue(model, *(x.detach().contiguous().numpy() for x in (p, q, drive)), constant, scale, out)
    out[1::4] *= tau  # the period and its derivative
    return (torch.from_numpy(out[0]), torch.from_numpy(out[1])), out


class _Continuation(torch.autograd.Function):
    """Phase and period, [B, N], of p, q (any tensor for LIF) and D, [B, N] float64."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, drive: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
        outputs, ctx.partial = _computed(p, q, drive, *numbers)
        ctx.save_for_backward(p, q, drive)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        to_phase, to_period = (None if grad is None else grad.detach().numpy() for grad in grads)
        results: list[Tensor | None] = [None, None, None]
        if to_phase is not None:
            results = list(torch.from_numpy(ctx.partial[2:5] * to_phase))
        if to_period is not None:
            more = torch.from_numpy(ctx.partial[5] * to_period)
            results[2] = more if results[2] is None else results[2] + more
        return (*refuse_twice(results, (*ctx.saved_tensors, *grads)), None, None, None, None)


def continuation(
    model: int, p: Tensor, q: Tensor | None, drive: Tensor, constant: float, scale: float, tau: float
) -> tuple[Tensor, Tensor]:
    """Compute phase and period of the pseudospikes.

    Args:
        model: The neuron's number in :mod:`.engine`.
        p: [B, N] float64 of the :class:`~qif_plugins.exact.functional.EndState`.
        q: [B, N] likewise, ``None`` for LIF neurons.
        drive: [B, N] D; for LIF neurons D + J.
        constant: J of theta and oscillating LIF neurons; not read for others.
        scale: Scale > 0 of the softplus in s(D); not read where ``constant`` is.
        tau: Membrane time constant.

    Returns:
        Phase and period, [B, N] in ``drive``'s dtype.
    """
    arguments = p, p if q is None else q, drive.double(), model, constant, scale, tau
    differentiate = torch.is_grad_enabled() and (p.requires_grad or drive.requires_grad)
    phase, period = _Continuation.apply(*arguments) if differentiate else _computed(*arguments)[0]
    return phase.to(drive.dtype), period.to(drive.dtype)
