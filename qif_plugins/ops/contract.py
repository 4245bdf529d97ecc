"""Definition of the two kernels, which every implementation follows.

An implementation is a module with three functions::

    unavailable(device) -> str | None
        Why it cannot run on tensors of that device, and what to install; None if it can.
    forward(x, v0, c, kind, spike, v_last, v_seq, h)
    backward(grad_spike, grad_v, grad_h, h, v0, x, c, kind, grad_x, grad_v0, needs) -> list

Both work on two-dimensional views [T, N], contiguous, time first, the neurons in memory order
(:mod:`.layout`), and write their results into tensors that the caller allocated.

forward:
    x       [T, N]  float16, bfloat16 or float32 (the reference: float64 too)
    v0      [N] tensor, or a float: the membrane before the first step, after its reset; with kind.pre_reset
            the membrane before its reset, which the kernel then applies first, v = reset(v0)
    c       Coefficients
    spike   [T, N]  out, x's dtype
    v_last  [N] out or None, the membrane after the last reset;  v_seq  [T, N] out or None, after each
    h       [T, N]  out or None, float32 (float64 with float64 x): the membrane before each reset

backward:
    grad_spike  [T, N] or None;  grad_v  [T, N] (of v_seq), [N] (of v_last) or None;  grad_h [T, N] or None
    h, v0, c, kind  as in forward;  x is given where the gradient of the input gain is needed
    grad_x  [T, N]  out, x's dtype;  grad_v0  [N] out or None, v0's dtype
    needs   six booleans: which of a, u1, u2, v_threshold, v_reset, input_gain need a gradient
    returns six entries, each None or a [count] tensor in the computation's dtype

The arithmetic, operation by operation, in float32 and never contracted to a fused multiply-add. It is
the definition that makes all implementations bit-identical; `?:` selects, it does not multiply::

    map         f(v) = (a (v - u1)) (m - u2);   slope(v) = a ((m - u1) + (m - u2))
                m = v with kind.rebound;   without m = v < u1 ? u1 : v, f's tangent at u1 below u1

    forward     h = f(v) + g x;   s = h >= θ  (strict: h > θ; NaN: false)
                hard: v = s ? v_reset : h
                soft: v = s ? (held ? θ : h - θ) : h
                held = s and (h - θ > θ) without kind.rebound, else false: so much is left that it would fire again

    backward    from the last step to the first, with back = 0 at the last:
                w = w(h);   gs, gv, gh = the incoming gradients of this step, 0 where there is none
        hard    reach = f(v_reset) - f(h);   without kind.rebound f(v_reset) - f(h > θ ? θ : h)
                W = (gs + back reach) + gv (v_reset - h)         detached: W = gs
                k = (s ? 0 : back slope(h) + gv) + gh
        soft    k0 = back slope(v) + gv,  v = s ? (held ? θ : h - θ) : h;   k1 = held ? 0 : k0
                W = gs - k1 θ                                    detached: W = gs
                k = k1 + gh
                grad = (w == 0 ? 0 : W w) + k;   grad_x = grad g;   back = grad
        end     grad_v0 = grad slope(v0); with kind.pre_reset instead the `grad` of one more step whose h is v0
                and whose gs, gv, gh are 0

    w(h)        z = h - θ
        window        lo <= h and h <= hi ? height : 0
        atan          y = s0 z;   s1 / (1 + y y)                       s0 = π α / 2, s1 = α / 2
        sigmoid       e = exp_(s0 |z|);   (s0 e) / ((1 + e) (1 + e))   s0 = α
        fast sigmoid  y = s0 |z| + 1;   1 / (y y)                      s0 = slope
        gaussian      y = s0 (z - s2);   y y < 80 ? s1 exp_(y y) : 0   s0 = 1 / (√2 width), s1 = height, s2 = offset
        exp_(y) = e^-y from additions and multiplications alone, see ``torch_backend.exp_negative``; the gaussian is 0
        from e^-80 on, for infinite h and for NaN

    gradients of the numbers, v the membrane after the reset before this step; each term in float32, the sum
    over steps and neurons in float64, in any order:
        a: grad ((v - u1)(m - u2))    u2: -grad (a (v - u1))    g: grad x
        u1: -grad (a (v - u2));   without kind.rebound -grad (a ((m - u2) + (m - v)))
        θ (hard): -(w == 0 ? 0 : W w)    θ (soft): -((w == 0 ? 0 : W w) + (s ? (held ? -k0 : k0) : 0))
        v_reset (hard): s ? back slope(v_reset) + gv : 0
        with kind.pre_reset the additional step contributes to θ and v_reset alone
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Coefficient(NamedTuple):
    """One number of the kernel: neuron n has ``values[(n // inner) % len(values)]``.

    ``values`` is a float, the same for every neuron, or a one-dimensional contiguous tensor in the
    computation's dtype on the input's device.
    """

    values: float | Tensor
    inner: int = 1


class Coefficients(NamedTuple):
    """Every number of the kernel; ``s0, s1, s2`` belong to the surrogate."""

    a: Coefficient
    u1: Coefficient
    u2: Coefficient
    v_threshold: Coefficient
    v_reset: Coefficient
    input_gain: Coefficient
    s0: Coefficient
    s1: Coefficient
    s2: Coefficient

    @property
    def is_uniform(self) -> bool:
        """Whether every number is a plain float."""
        return not any(isinstance(c.values, Tensor) for c in self)


COEFFICIENT_NAMES = Coefficients._fields
LEARNABLE = COEFFICIENT_NAMES[:6]


class Shape(IntEnum):
    """The surrogates that every kernel implements."""

    WINDOW = 0
    ATAN = 1
    SIGMOID = 2
    FAST_SIGMOID = 3
    GAUSSIAN = 4


class Kind(NamedTuple):
    """Variant of the neuron that a kernel computes: everything that is not a number."""

    soft: bool
    detach_reset: bool
    strict: bool
    shape: Shape
    pre_reset: bool
    rebound: bool = True
