# mypy: disable-error-code="no-untyped-def"
"""The forward and the backward kernel of :mod:`.contract` in Triton.

A program owns BLOCK neighbouring neurons and walks through time. The number of steps is an ordinary
argument, so that another T does not compile another kernel. Numbers arrive as float32 by value, or as a
pointer with the layout that :mod:`.contract` describes.

Offsets: ``row`` = t * neurons is accumulated in 64 bits and added to the pointer as a scalar; n, the
position within a row, has 32 bits unless WIDE, which the launcher sets where N does not fit. So
neither t * neurons + n nor n alone can wrap, and the common case pays for no 64-bit vector arithmetic.

Launch with ``enable_fp_fusion=False``: a contracted multiply-add rounds once where the contract
rounds twice. ``/`` is approximate in float32, hence :func:`_divide`.
"""

import triton
import triton.language as tl

from .contract import Shape

# How a coefficient is given, two bits each in LAYOUTS: a float, a pointer to one number, to one for
# each neuron, to values[(n // inner) % count].
FLOAT, SINGLE, NEURON, PERIODIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

WINDOW = tl.constexpr(int(Shape.WINDOW))
ATAN = tl.constexpr(int(Shape.ATAN))
SIGMOID = tl.constexpr(int(Shape.SIGMOID))
FAST_SIGMOID = tl.constexpr(int(Shape.FAST_SIGMOID))

# Before 3.6, div_rn flushes subnormal operands and quotients to zero.
DIV_RN = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6))


@triton.jit
def _divide(numerator, denominator):
    """The quotient rounded once. That of two float32 in float64 rounds to the same float32, subnormal ones too."""
    if DIV_RN:
        quotient = tl.div_rn(numerator, denominator)
    else:
        wide = denominator.to(tl.float64)
        quotient = ((tl.zeros_like(wide) + numerator) / wide).to(tl.float32)
    return quotient


@triton.jit
def _number(value, inner, count, n, mask, LAYOUT: tl.constexpr):
    if LAYOUT == SINGLE:
        value = tl.load(value)
    elif LAYOUT == NEURON:
        value = tl.load(value + n, mask=mask, other=0.0)
    elif LAYOUT == PERIODIC:
        value = tl.load(value + (n // inner) % count, mask=mask, other=0.0)
    return value


@triton.jit
def _initial(v0, n, mask, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    if LAYOUT == FLOAT:
        start = tl.zeros([BLOCK], tl.float32) + v0
    else:
        start = tl.load(v0 + n, mask=mask, other=0.0).to(tl.float32)
    return start


# Compiled, one instruction rounds two numbers to bfloat16; Triton's interpreter truncates.
ROUND_BY_HAND = tl.constexpr(not isinstance(_initial, triton.JITFunction))


@triton.jit
def _store(to, at, value, mask):
    """Store with round to nearest, ties to even."""
    if ROUND_BY_HAND and to.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = bits + (0x7FFF + ((bits >> 16) & 1))
        bits = tl.where(value == value, bits, 0x7FC00000) >> 16
        tl.store(to + at, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(to + at, value, mask=mask)


@triton.jit
def _bent(u1, v, REBOUND: tl.constexpr):
    """The membrane in the map's second factor: without rebound at least u1, where the map goes on along its tangent."""
    if REBOUND:
        bent = v
    else:
        bent = tl.where(v < u1, u1, v)
    return bent


@triton.jit
def _map(a, u1, u2, v, REBOUND: tl.constexpr):
    return (a * (v - u1)) * (_bent(u1, v, REBOUND) - u2)


@triton.jit
def _slope(a, u1, u2, v, REBOUND: tl.constexpr):
    m = _bent(u1, v, REBOUND)
    return a * ((m - u1) + (m - u2))


@triton.jit
def _fires(h, threshold, STRICT: tl.constexpr):
    if STRICT:
        fired = h > threshold
    else:
        fired = h >= threshold
    return fired


@triton.jit
def _highest(h, threshold, REBOUND: tl.constexpr):
    """The membrane h, without rebound at most the threshold."""
    if REBOUND:
        highest = h
    else:
        highest = tl.where(h > threshold, threshold, h)
    return highest


@triton.jit
def _reset(h, fired, threshold, v_reset, SOFT: tl.constexpr, REBOUND: tl.constexpr):
    if SOFT:
        after = _highest(h - threshold, threshold, REBOUND)
    else:
        after = v_reset
    return tl.where(fired, after, h)


@triton.jit
def _exp_negative(y):
    """e^-y, the operations of torch_backend.exp_negative."""
    y = tl.where(y < 80.0, y, 80.0)
    # Triton's floor flushes subnormal numbers; a difference from 0.5 is never one.
    n = tl.floor(y * -1.44269504088896341 + 0.5)
    r = (-y - n * 0.693359375) - n * -2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _derivative(h, threshold, s0, s1, s2, SHAPE: tl.constexpr):
    if SHAPE == WINDOW:
        w = tl.where((s0 <= h) & (h <= s1), s2, 0.0)
    elif SHAPE == ATAN:
        y = s0 * (h - threshold)
        w = _divide(s1, 1.0 + y * y)
    elif SHAPE == SIGMOID:
        e = _exp_negative(s0 * tl.abs(h - threshold))
        w = _divide(s0 * e, (1.0 + e) * (1.0 + e))
    elif SHAPE == FAST_SIGMOID:
        y = s0 * tl.abs(h - threshold) + 1.0
        w = _divide(1.0, y * y)
    else:
        y = s0 * ((h - threshold) - s2)
        w = tl.where(y * y < 80.0, s1 * _exp_negative(y * y), 0.0)
    return w


@triton.jit(
    do_not_specialize=[
        "steps", "a_inner", "a_count", "u1_inner", "u1_count", "u2_inner", "u2_count", "threshold_inner",
        "threshold_count", "v_reset_inner", "v_reset_count", "gain_inner", "gain_count",
    ]
)  # fmt: skip
def forward(
    x, v0, spike, v_last, v_seq, h_seq,
    a, a_inner, a_count, u1, u1_inner, u1_count, u2, u2_inner, u2_count,
    threshold, threshold_inner, threshold_count, v_reset, v_reset_inner, v_reset_count, gain, gain_inner, gain_count,
    steps, neurons,
    LAYOUTS: tl.constexpr, START: tl.constexpr, SOFT: tl.constexpr, STRICT: tl.constexpr, PRE_RESET: tl.constexpr,
    REBOUND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    n = program * BLOCK + tl.arange(0, BLOCK)
    mask = n < neurons
    a = _number(a, a_inner, a_count, n, mask, LAYOUTS & 3)
    u1 = _number(u1, u1_inner, u1_count, n, mask, (LAYOUTS >> 2) & 3)
    u2 = _number(u2, u2_inner, u2_count, n, mask, (LAYOUTS >> 4) & 3)
    threshold = _number(threshold, threshold_inner, threshold_count, n, mask, (LAYOUTS >> 6) & 3)
    v_reset = _number(v_reset, v_reset_inner, v_reset_count, n, mask, (LAYOUTS >> 8) & 3)
    gain = _number(gain, gain_inner, gain_count, n, mask, (LAYOUTS >> 10) & 3)
    v = _initial(v0, n, mask, START, BLOCK)
    if PRE_RESET:
        v = _reset(v, _fires(v, threshold, STRICT), threshold, v_reset, SOFT, REBOUND)
    row = tl.full([], 0, tl.int64)
    ahead = tl.load(x + n, mask=mask, other=0.0)
    for t in range(steps):
        current = ahead.to(tl.float32)
        # The next step's input is under way while this step computes.
        limit = tl.where(t + 1 < steps, neurons, 0)
        ahead = tl.load(x + (row + neurons) + n, mask=n < limit, other=0.0)
        h = _map(a, u1, u2, v, REBOUND) + gain * current
        fired = _fires(h, threshold, STRICT)
        v = _reset(h, fired, threshold, v_reset, SOFT, REBOUND)
        tl.store(spike + row + n, fired.to(tl.float32), mask=mask)
        if h_seq is not None:
            tl.store(h_seq + row + n, h, mask=mask)
        if v_seq is not None:
            _store(v_seq, row + n, v, mask)
        row += neurons
    if v_last is not None:
        _store(v_last, n, v, mask)


@triton.jit
def _gradient(gradient, at, mask, BLOCK: tl.constexpr):
    """An incoming gradient, zero where there is none."""
    if gradient is None:
        value = tl.zeros([BLOCK], tl.float32)
    else:
        value = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _adjoint(
    back, h, gs, gv, gh, a, u1, u2, threshold, v_reset, s0, s1, s2,
    SHAPE: tl.constexpr, SOFT: tl.constexpr, DETACHED: tl.constexpr, STRICT: tl.constexpr, REBOUND: tl.constexpr,
):  # fmt: skip
    """One step back in time: the gradient of h, and the terms of the threshold's and of v_reset's."""
    fired = _fires(h, threshold, STRICT)
    w = _derivative(h, threshold, s0, s1, s2, SHAPE)
    if SOFT:
        v = _reset(h, fired, threshold, v_reset, SOFT, REBOUND)
        k0 = back * _slope(a, u1, u2, v, REBOUND) + gv
        kept = k0
        if not REBOUND:
            held = fired & (h - threshold > threshold)
            kept = tl.where(held, 0.0, k0)
            k0 = tl.where(held, -k0, k0)
        if DETACHED:
            through = gs
        else:
            through = gs - kept * threshold
        keep = kept + gh
    else:
        keep = tl.where(fired, 0.0, back * _slope(a, u1, u2, h, REBOUND) + gv) + gh
        if DETACHED:
            through = gs
        else:
            highest = _highest(h, threshold, REBOUND)
            reach = _map(a, u1, u2, v_reset, REBOUND) - _map(a, u1, u2, highest, REBOUND)
            through = (gs + back * reach) + gv * (v_reset - h)
    surrogate = tl.where(w == 0.0, 0.0, through * w)
    if SOFT:
        to_threshold = surrogate + tl.where(fired, k0, 0.0)
        to_reset = tl.zeros_like(h)
    else:
        to_threshold = surrogate
        to_reset = tl.where(fired, back * _slope(a, u1, u2, v_reset, REBOUND) + gv, 0.0)
    return surrogate + keep, to_threshold, to_reset


@triton.jit
def _write_sum(out, total, program, neurons, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Add neighbouring lanes in groups and write them in the order of their neurons."""
    if GROUP == BLOCK:
        tl.store(out + program, tl.sum(total, axis=0))
    else:
        if GROUP > 1:
            total = tl.sum(tl.reshape(total, [BLOCK // GROUP, GROUP]), axis=1)
        m = program * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        tl.store(out + m, total, mask=m * GROUP < neurons)


@triton.jit(
    do_not_specialize=[
        "steps", "visits", "a_inner", "a_count", "u1_inner", "u1_count", "u2_inner", "u2_count", "threshold_inner",
        "threshold_count", "v_reset_inner", "v_reset_count", "gain_inner", "gain_count", "s0_inner", "s0_count",
        "s1_inner", "s1_count", "s2_inner", "s2_count",
    ]
)  # fmt: skip
def backward(
    grad_spike, grad_v, grad_h, h_seq, v0, x, grad_x, grad_v0,
    sum_a, sum_u1, sum_u2, sum_threshold, sum_reset, sum_gain,
    a, a_inner, a_count, u1, u1_inner, u1_count, u2, u2_inner, u2_count,
    threshold, threshold_inner, threshold_count, v_reset, v_reset_inner, v_reset_count, gain, gain_inner, gain_count,
    s0, s0_inner, s0_count, s1, s1_inner, s1_count, s2, s2_inner, s2_count,
    steps, neurons, visits,
    LAYOUTS: tl.constexpr, START: tl.constexpr, SHAPE: tl.constexpr, SOFT: tl.constexpr, DETACHED: tl.constexpr,
    STRICT: tl.constexpr, PRE_RESET: tl.constexpr, REBOUND: tl.constexpr, GRAD_V_LAST: tl.constexpr,
    GROUPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    # Float64 sums over time and over every block that this program visits. The launcher makes the stride
    # a multiple of the coefficients' period, so that a lane meets the same coefficients every time.
    total_a = tl.zeros([BLOCK], tl.float64)
    total_u1 = tl.zeros([BLOCK], tl.float64)
    total_u2 = tl.zeros([BLOCK], tl.float64)
    total_threshold = tl.zeros([BLOCK], tl.float64)
    total_reset = tl.zeros([BLOCK], tl.float64)
    total_gain = tl.zeros([BLOCK], tl.float64)
    program = first
    for _ in range(visits):
        n = program * BLOCK + tl.arange(0, BLOCK)
        mask = n < neurons
        a_n = _number(a, a_inner, a_count, n, mask, LAYOUTS & 3)
        u1_n = _number(u1, u1_inner, u1_count, n, mask, (LAYOUTS >> 2) & 3)
        u2_n = _number(u2, u2_inner, u2_count, n, mask, (LAYOUTS >> 4) & 3)
        threshold_n = _number(threshold, threshold_inner, threshold_count, n, mask, (LAYOUTS >> 6) & 3)
        v_reset_n = _number(v_reset, v_reset_inner, v_reset_count, n, mask, (LAYOUTS >> 8) & 3)
        gain_n = _number(gain, gain_inner, gain_count, n, mask, (LAYOUTS >> 10) & 3)
        s0_n = _number(s0, s0_inner, s0_count, n, mask, (LAYOUTS >> 12) & 3)
        s1_n = _number(s1, s1_inner, s1_count, n, mask, (LAYOUTS >> 14) & 3)
        s2_n = _number(s2, s2_inner, s2_count, n, mask, (LAYOUTS >> 16) & 3)
        start = _initial(v0, n, mask, START, BLOCK)
        zero = tl.zeros([BLOCK], tl.float32)
        row = tl.full([], 0, tl.int64) + neurons
        row = row * (steps - 1)
        below = tl.load(h_seq + row + n, mask=mask, other=0.0)
        gs_below = _gradient(grad_spike, row + n, mask, BLOCK)
        if GRAD_V_LAST:
            gv = _gradient(grad_v, n, mask, BLOCK)
        else:
            gv = _gradient(grad_v, row + n, mask, BLOCK)
        back = zero
        for i in range(steps):
            earlier = i + 1 < steps
            h = below
            gs = gs_below
            gh = _gradient(grad_h, row + n, mask, BLOCK)
            # What the step before needs is under way while this step computes.
            ahead = n < tl.where(earlier, neurons, 0)
            below = tl.load(h_seq + (row - neurons) + n, mask=ahead, other=0.0)
            gs_below = _gradient(grad_spike, (row - neurons) + n, ahead, BLOCK)
            back, to_threshold, to_reset = _adjoint(
                back, h, gs, gv, gh, a_n, u1_n, u2_n, threshold_n, v_reset_n, s0_n, s1_n, s2_n,
                SHAPE, SOFT, DETACHED, STRICT, REBOUND,
            )  # fmt: skip
            if sum_threshold is not None:
                total_threshold -= tl.where(mask, to_threshold, 0.0).to(tl.float64)
            if sum_reset is not None:
                total_reset += tl.where(mask, to_reset, 0.0).to(tl.float64)
            if ((sum_a is not None) or (sum_u1 is not None)) or (sum_u2 is not None):
                v = _reset(below, _fires(below, threshold_n, STRICT), threshold_n, v_reset_n, SOFT, REBOUND)
                if PRE_RESET:
                    v_first = _reset(start, _fires(start, threshold_n, STRICT), threshold_n, v_reset_n, SOFT, REBOUND)
                else:
                    v_first = start
                v = tl.where(earlier, v, v_first)
                m = _bent(u1_n, v, REBOUND)
                if sum_a is not None:
                    total_a += tl.where(mask, back * ((v - u1_n) * (m - u2_n)), 0.0).to(tl.float64)
                if sum_u1 is not None:
                    reach_u1 = m - u2_n
                    if not REBOUND:
                        reach_u1 = reach_u1 + (m - v)
                    total_u1 -= tl.where(mask, back * (a_n * reach_u1), 0.0).to(tl.float64)
                if sum_u2 is not None:
                    total_u2 -= tl.where(mask, back * (a_n * (v - u1_n)), 0.0).to(tl.float64)
            if sum_gain is not None:
                current = tl.load(x + row + n, mask=mask, other=0.0).to(tl.float32)
                total_gain += tl.where(mask, back * current, 0.0).to(tl.float64)
            _store(grad_x, row + n, back * gain_n, mask)
            row -= neurons
            if GRAD_V_LAST:
                gv = zero
            else:
                gv = _gradient(grad_v, row + n, ahead, BLOCK)
        if PRE_RESET:
            back, to_threshold, to_reset = _adjoint(
                back, start, zero, zero, zero, a_n, u1_n, u2_n, threshold_n, v_reset_n, s0_n, s1_n, s2_n,
                SHAPE, SOFT, DETACHED, STRICT, REBOUND,
            )  # fmt: skip
            if sum_threshold is not None:
                total_threshold -= tl.where(mask, to_threshold, 0.0).to(tl.float64)
            if sum_reset is not None:
                total_reset += tl.where(mask, to_reset, 0.0).to(tl.float64)
        if grad_v0 is not None:
            if PRE_RESET:
                to_start = back
            else:
                to_start = back * _slope(a_n, u1_n, u2_n, start, REBOUND)
            _store(grad_v0, n, to_start, mask)
        program += tl.num_programs(0)
    if sum_a is not None:
        _write_sum(sum_a, total_a, first, neurons, 1 << (GROUPS & 15), BLOCK)
    if sum_u1 is not None:
        _write_sum(sum_u1, total_u1, first, neurons, 1 << ((GROUPS >> 4) & 15), BLOCK)
    if sum_u2 is not None:
        _write_sum(sum_u2, total_u2, first, neurons, 1 << ((GROUPS >> 8) & 15), BLOCK)
    if sum_threshold is not None:
        _write_sum(sum_threshold, total_threshold, first, neurons, 1 << ((GROUPS >> 12) & 15), BLOCK)
    if sum_reset is not None:
        _write_sum(sum_reset, total_reset, first, neurons, 1 << ((GROUPS >> 16) & 15), BLOCK)
    if sum_gain is not None:
        _write_sum(sum_gain, total_gain, first, neurons, 1 << ((GROUPS >> 20) & 15), BLOCK)
