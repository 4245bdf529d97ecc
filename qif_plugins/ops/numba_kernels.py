"""The kernels of :mod:`.numba_backend`, in Numba. See :mod:`.contract` for the arithmetic, operation by operation.

Numba compiles without ``fastmath``, so LLVM neither reorders nor contracts. Every literal here is a float32
constant, since Numba computes a float32 with a Python number in float64.

A kernel takes the neurons from ``first`` to ``stop`` in blocks, and a block through all time steps. A block's row of
one time step goes through a few short loops, each vectorised over its neurons; what passes between them stays in the
first-level cache. Tensors arrive as addresses with a type, and all that distinguishes one call from another is
decided once a row: so each kernel is compiled once, for every type and neuron, and kept on disk. Only coefficients
that differ from neuron to neuron have a version of their own. All of it is in this one file, since Numba compares
what it kept on disk with the file of the kernel alone.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 2048
"""Neurons at a time: their rows fit into the first-level cache, and are long enough to prefetch."""
CHUNK = 16384
"""Neurons in the unit of scheduling and of summation. Fixed, so that sums do not depend on the number of threads."""
RUN = 256
"""Neurons in a row that must share every coefficient for a kernel to take them as constants."""

BURST = 64
"""Neurons that are computed, then streamed to memory: so few that the processor does both at once."""
VECTOR = 8
"""Entries that are streamed at a time, in memory aligned to as many."""

NONE, FLOAT, HALF, BFLOAT = 0, 1, 2, 3
"""Types of a tensor: absent, float32, float16, bfloat16."""
WINDOW, ATAN, SIGMOID, FAST_SIGMOID = 0, 1, 2, 3  # of contract.Shape, as integers that Numba compares
F0, F1, F05, LIMIT = np.float32(0), np.float32(1), np.float32(0.5), np.float32(80)

plain = njit(error_model="numpy")
inlined = njit(error_model="numpy", forceinline=True)


# -- rows of memory ---------------------------------------------------------------------------------


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


float_pointer, half_pointer = _pointer_to(types.float32), _pointer_to(types.uint16)


@intrinsic
def stream(typingctx, target, source):
    """Copy ``VECTOR`` float32 past the caches: a store into them would first read what it overwrites."""

    def generate(context, builder, signature, args):
        pointer = ir.VectorType(ir.FloatType(), VECTOR).as_pointer()
        vector = builder.load(builder.inttoptr(args[1], pointer), align=4)
        store = builder.store(vector, builder.inttoptr(args[0], pointer), align=4 * VECTOR)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def end_of_stream(typingctx):
    """Make what was streamed visible to other threads, as ordinary stores are."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(typingctx, address):
    """Begin to read the cache line at ``address``, which need not exist."""

    def generate(context, builder, signature, args):
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@plain
def read(address, kind, index, length, buffer):
    """``length`` entries from ``index`` on as float32: the memory itself, or converted into ``buffer``."""
    if kind == FLOAT:
        return carray(float_pointer(address + 4 * index), (length,))
    if kind != NONE:
        raw = carray(half_pointer(address + 2 * index), (length,))
        if kind == HALF:
            for j in range(length):
                buffer[j] = half_to_float(raw[j])
        else:
            for j in range(length):
                buffer[j] = np.uint32(np.uint32(raw[j]) << np.uint32(16)).view(np.float32)
    return buffer[:length]


@plain
def target(address, kind, index, length, buffer):
    """Where to write ``length`` float32 entries that belong at ``index``; :func:`write` then brings them there."""
    if kind == FLOAT:
        return carray(float_pointer(address + 4 * index), (length,))
    return buffer[:length]


@plain
def write(row, address, kind, index):
    """Round ``row`` to float16 or bfloat16 at ``index``; nothing is left to do for float32."""
    length = row.shape[0]
    raw = carray(half_pointer(address + 2 * index), (length,))
    if kind == HALF:
        for j in range(length):
            raw[j] = float_to_half(row[j])
    elif kind == BFLOAT:
        for j in range(length):
            raw[j] = float_to_bfloat(row[j])


@plain
def copy(source, row):
    for j in range(row.shape[0]):
        row[j] = source[j]


@plain
def store(source, address, kind, index, buffer):
    """Copy ``source`` to ``index``, rounded to the type there."""
    row = target(address, kind, index, source.shape[0], buffer)
    copy(source, row)
    write(row, address, kind, index)


@plain
def fill(row, value):
    for j in range(row.shape[0]):
        row[j] = value


@inlined
def half_to_float(raw):
    bits = np.uint32(raw)
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    # The exponent is too small by 112, of normal and of subnormal numbers alike.
    scaled = np.float32(np.uint32(magnitude).view(np.float32) * np.float32(2.0**112))
    finite = np.float32(scaled).view(np.uint32)
    number = finite if magnitude < np.uint32(0x0F800000) else np.uint32(magnitude | np.uint32(0x7F800000))
    return np.uint32(number | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


@inlined
def float_to_half(value):
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    even = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + even) >> np.uint32(13))
    # Adding 1/2 leaves a subnormal half in the low bits, rounded to nearest even by the addition itself.
    shifted = np.float32(np.uint32(magnitude).view(np.float32) + F05)
    small = np.uint32(np.float32(shifted).view(np.uint32) - np.uint32(0x3F000000))
    number = small if magnitude < np.uint32(0x38800000) else normal
    number = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else number
    number = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else number
    return np.uint16(number | np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000)))


@inlined
def float_to_bfloat(value):
    bits = np.float32(value).view(np.uint32)
    even = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))
    return np.uint16(np.uint32(0x7FC0) if value != value else rounded)


# -- the coefficients: [address, count, inner] each -------------------------------------------------


@plain
def load_constants(table, n, length, c):
    """Coefficients of neuron ``n``, and how many of the ``length`` neurons from there on share them all."""
    for k in range(9):
        count, inner = table[k, 1], table[k, 2]
        c[k, 0] = carray(float_pointer(table[k, 0]), (count,))[(n // inner) % count]
        if count > 1:
            length = min(length, inner - n % inner)
    return length


@plain
def load_rows(table, n, length, c):
    """Coefficients of the ``length`` neurons from ``n`` on."""
    for k in range(9):
        count, inner = table[k, 1], table[k, 2]
        values = carray(float_pointer(table[k, 0]), (count,))
        index = (n // inner) % count
        left = inner - n % inner
        done = 0
        while done < length:
            if inner == 1:
                run = min(count - index, length - done)
                for j in range(run):
                    c[k, done + j] = values[index + j]
                index = 0
            else:
                run = min(left, length - done)
                for j in range(run):
                    c[k, done + j] = values[index]
                index = index + 1 if index + 1 < count else 0
                left = inner
            done += run


@plain
def scatter(row, inner, n, base, sums):
    """Add ``row[j]``, of neuron ``n + j``, to the sum of its coefficient; ``sums`` begins at coefficient ``base``."""
    index = (n // inner - base) % sums.shape[0]
    left = inner - n % inner
    for j in range(row.shape[0]):
        sums[index] += row[j]
        left -= 1
        if left == 0:
            left = inner
            index = index + 1 if index + 1 < sums.shape[0] else 0


@plain
def fold(row):
    """The sum of ``row``, which is used up: in halves, so that it vectorises."""
    length = row.shape[0]
    while length > 1:
        half = length // 2
        for j in range(half):
            row[j] += row[length - half + j]
        length -= half
    return row[0]


# -- the neuron -------------------------------------------------------------------------------------


@inlined
def fires(strict, h, threshold):
    return (h > threshold) | ((h == threshold) & (not strict))


@inlined
def highest(rebound, h, threshold):
    """The membrane h, without rebound at most the threshold."""
    return threshold if (h > threshold) & (not rebound) else h


@inlined
def subtracted(rebound, h, threshold):
    """The membrane that a soft reset leaves after a spike."""
    return highest(rebound, h - threshold, threshold)


@inlined
def after_reset(soft, strict, rebound, h, threshold, v_reset):
    other = subtracted(rebound, h, threshold) if soft else v_reset
    return other if fires(strict, h, threshold) else h


@inlined
def holds(soft, strict, rebound, h, threshold):
    """Whether a soft reset leaves the membrane at the threshold."""
    return soft & (not rebound) & fires(strict, h, threshold) & (h - threshold > threshold)


@plain
def exp_negative(y):
    """See ``torch_backend.exp_negative``."""
    y = y if y < LIMIT else LIMIT
    n = np.floor(y * np.float32(-1.44269504088896341) + F05)
    r = (-y - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * (r * r) + r) + F1
    return p * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@inlined
def bent(rebound, u1, v):
    """The membrane in the map's second factor: without rebound at least u1, where the map goes on along its tangent."""
    return u1 if (v < u1) & (not rebound) else v


@inlined
def charge_of(rebound, a, u1, u2, v):
    return (a * (v - u1)) * (bent(rebound, u1, v) - u2)


@inlined
def slope(rebound, a, u1, u2, v):
    m = bent(rebound, u1, v)
    return a * ((m - u1) + (m - u2))


@inlined
def reach(rebound, a, u1, u2, threshold, v_reset, h):
    """The jump of the charge at a spike, as the surrogate of the reset sees it."""
    return charge_of(rebound, a, u1, u2, v_reset) - charge_of(rebound, a, u1, u2, highest(rebound, h, threshold))


# -- the kernels ------------------------------------------------------------------------------------


@inlined
def charge(length, x, v, h, s, c, spread, soft, strict, rebound):
    """One time step of ``length`` neurons: from the membrane ``v``, which it replaces, to ``h`` and spikes ``s``."""
    a, u1, u2, threshold, v_reset, gain = c[0, 0], c[1, 0], c[2, 0], c[3, 0], c[4, 0], c[5, 0]
    for j in range(length):
        if spread:
            a, u1, u2, threshold, v_reset, gain = c[0, j], c[1, j], c[2, j], c[3, j], c[4, j], c[5, j]
        charged = charge_of(rebound, a, u1, u2, v[j]) + gain * x[j]
        fired = fires(strict, charged, threshold)
        other = subtracted(rebound, charged, threshold) if soft else v_reset
        h[j] = charged
        s[j] = F1 if fired else F0
        v[j] = other if fired else charged


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled without the interpreter lock, from the disk where a folder for that can be written."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder
        return njit(**options)(function)


@lru_cache(maxsize=2)
def forward_kernel(spread: bool) -> Callable[..., Any]:
    """The forward kernel; ``spread``: coefficients differ from neuron to neuron."""

    def forward(
        steps, neurons, x, kind, v0, v0_kind, start, table, spike, v_last, v_seq, v_kind, h, soft, strict, pre_reset,
        rebound, streams, first, stop,
    ):  # fmt: skip
        width = min(BLOCK, stop - first)
        c = np.empty((9, width if spread else 1), np.float32)
        rows = np.empty((4, width), np.float32)
        state, buffer_x, buffer_h, buffer_s = rows[0], rows[1], rows[2], rows[3]
        n = first
        while n < stop:
            length = min(width, stop - n)
            if spread:
                load_rows(table, n, length, c)
            else:
                length = load_constants(table, n, length, c)
            threshold, v_reset = c[3, 0], c[4, 0]
            streaming = streams and not spread and n % BURST == 0 and length % BURST == 0
            v = state[:length]
            if v0_kind == NONE:
                fill(v, start)
            else:
                copy(read(v0, v0_kind, n, length, buffer_x), v)
            if pre_reset:
                for j in range(length):
                    if spread:
                        threshold, v_reset = c[3, j], c[4, j]
                    v[j] = after_reset(soft, strict, rebound, v[j], threshold, v_reset)
            for t in range(steps):
                at = t * neurons + n
                x_row = read(x, kind, at, length, buffer_x)
                if streaming:
                    ahead = x + 4 * (at + neurons if t + 1 < steps else n + length)
                    h_part, s_part = buffer_h[:BURST], buffer_s[:BURST]
                    for k in range(0, length, BURST):
                        for j in range(k, k + BURST, 16):
                            prefetch(ahead + 4 * j)
                        charge(
                            BURST,
                            x_row[k : k + BURST],
                            v[k : k + BURST],
                            h_part,
                            s_part,
                            c,
                            False,
                            soft,
                            strict,
                            rebound,
                        )
                        for j in range(0, BURST, VECTOR):
                            stream(h + 4 * (at + k + j), h_part.ctypes.data + 4 * j)
                        for j in range(0, BURST, VECTOR):
                            stream(spike + 4 * (at + k + j), s_part.ctypes.data + 4 * j)
                else:
                    h_row = target(h, FLOAT if h else NONE, at, length, buffer_h)
                    s_row = target(spike, kind, at, length, buffer_s)
                    charge(length, x_row, v, h_row, s_row, c, spread, soft, strict, rebound)
                    write(s_row, spike, kind, at)
                if v_seq:
                    store(v, v_seq, v_kind, at, buffer_s)
            if v_last:
                store(v, v_last, v_kind, n, buffer_s)
            n += length
        if streams:
            end_of_stream()

    return compiled(forward)


@lru_cache(maxsize=2)
def backward_kernel(spread: bool) -> Callable[..., Any]:
    """The backward kernel; ``sums[k][chunk]`` receives the sums of a chunk for coefficient k, if it has any."""

    def backward(
        steps, neurons, gs, gv, gh, kind, v_kind, gv_steps, h, v0, v0_kind, start, x, table, grad_x, grad_v0, sums,
        soft, detach, strict, shape, pre_reset, rebound, first, stop,
    ):  # fmt: skip
        width = min(BLOCK, stop - first)
        needs_map = sums[0].size > 0 or sums[1].size > 0 or sums[2].size > 0
        needs_any = needs_map or sums[3].size > 0 or sums[4].size > 0 or sums[5].size > 0
        c = np.empty((9, width if spread else 1), np.float32)
        rows = np.empty((9, width), np.float32)
        zeros = np.zeros(width, np.float32)
        terms = np.empty((6, width if needs_any else 0), np.float64)
        n = first
        while n < stop:
            chunk = n // CHUNK
            length = min(width, min(stop, (chunk + 1) * CHUNK) - n)
            if spread:
                load_rows(table, n, length, c)
            else:
                length = load_constants(table, n, length, c)
            a, u1, u2, threshold, v_reset, gain = c[0, 0], c[1, 0], c[2, 0], c[3, 0], c[4, 0], c[5, 0]
            s0, s1, s2 = c[6, 0], c[7, 0], c[8, 0]
            back, w, k0, v0_row, before = (
                rows[0, :length],
                rows[1, :length],
                rows[2, :length],
                rows[3],
                rows[4, :length],
            )
            fill(back, F0)
            if v0_kind == NONE:
                fill(v0_row, start)
            v0_row = read(v0, v0_kind, n, length, v0_row)
            if needs_any:
                for k in range(6):
                    for j in range(length):
                        terms[k, j] = 0.0

            for t in range(steps - 1, -2 if pre_reset else -1, -1):
                at = t * neurons + n
                if t < 0:
                    h_row = v0_row
                    gs_row = gv_row = gh_row = zeros[:length]
                else:
                    h_row = read(h, FLOAT, at, length, zeros)
                    gs_row = read(gs, kind if gs else NONE, at, length, rows[5] if gs else zeros)
                    gh_row = read(gh, FLOAT if gh else NONE, at, length, zeros)
                    if gv and (gv_steps > 1 or t == steps - 1):
                        gv_row = read(gv, v_kind, at if gv_steps > 1 else n, length, rows[6])
                    else:
                        gv_row = zeros[:length]

                # w(h)
                if shape == WINDOW:
                    for j in range(length):
                        if spread:
                            s0, s1, s2 = c[6, j], c[7, j], c[8, j]
                        w[j] = s2 if (h_row[j] >= s0) & (h_row[j] <= s1) else F0
                elif shape == ATAN:
                    for j in range(length):
                        if spread:
                            threshold, s0, s1 = c[3, j], c[6, j], c[7, j]
                        y = s0 * (h_row[j] - threshold)
                        w[j] = s1 / (F1 + y * y)
                elif shape == SIGMOID:
                    for j in range(length):
                        if spread:
                            threshold, s0 = c[3, j], c[6, j]
                        e = exp_negative(s0 * abs(h_row[j] - threshold))
                        w[j] = (s0 * e) / ((F1 + e) * (F1 + e))
                elif shape == FAST_SIGMOID:
                    for j in range(length):
                        if spread:
                            threshold, s0 = c[3, j], c[6, j]
                        y = s0 * abs(h_row[j] - threshold) + F1
                        w[j] = F1 / (y * y)
                else:
                    for j in range(length):
                        if spread:
                            threshold, s0, s1, s2 = c[3, j], c[6, j], c[7, j], c[8, j]
                        y = s0 * ((h_row[j] - threshold) - s2)
                        bell = s1 * exp_negative(y * y)
                        w[j] = bell if y * y < LIMIT else F0

                # hard resets without gradients of numbers: all the rest at once
                if not (soft or needs_any) and t >= 0:
                    for j in range(length):
                        if spread:
                            a, u1, u2, threshold, v_reset = c[0, j], c[1, j], c[2, j], c[3, j], c[4, j]
                        k = back[j] * slope(rebound, a, u1, u2, h_row[j]) + gv_row[j]
                        k = (F0 if fires(strict, h_row[j], threshold) else k) + gh_row[j]
                        jump = reach(rebound, a, u1, u2, threshold, v_reset, h_row[j])
                        reset = (gs_row[j] + back[j] * jump) + gv_row[j] * (v_reset - h_row[j])
                        weighted = (gs_row[j] if detach else reset) * w[j]
                        back[j] = (F0 if w[j] == F0 else weighted) + k
                    gx_row = target(grad_x, kind, at, length, rows[7])
                    for j in range(length):
                        if spread:
                            gain = c[5, j]
                        gx_row[j] = back[j] * gain
                    write(gx_row, grad_x, kind, at)
                    continue

                # k0 = back slope + gv, and w := what the surrogate contributes, W w
                if soft:
                    for j in range(length):
                        if spread:
                            a, u1, u2, threshold = c[0, j], c[1, j], c[2, j], c[3, j]
                        v = after_reset(True, strict, rebound, h_row[j], threshold, v_reset)
                        k0[j] = back[j] * slope(rebound, a, u1, u2, v) + gv_row[j]
                    for j in range(length):
                        if spread:
                            threshold = c[3, j]
                        kept = F0 if holds(soft, strict, rebound, h_row[j], threshold) else k0[j]
                        through = gs_row[j] if detach else gs_row[j] - kept * threshold
                        weighted = through * w[j]
                        w[j] = F0 if w[j] == F0 else weighted
                else:
                    for j in range(length):
                        if spread:
                            a, u1, u2 = c[0, j], c[1, j], c[2, j]
                        k0[j] = back[j] * slope(rebound, a, u1, u2, h_row[j]) + gv_row[j]
                    if detach:
                        for j in range(length):
                            weighted = gs_row[j] * w[j]
                            w[j] = F0 if w[j] == F0 else weighted
                    else:
                        for j in range(length):
                            if spread:
                                a, u1, u2, threshold, v_reset = c[0, j], c[1, j], c[2, j], c[3, j], c[4, j]
                            jump = reach(rebound, a, u1, u2, threshold, v_reset, h_row[j])
                            through = (gs_row[j] + back[j] * jump) + gv_row[j] * (v_reset - h_row[j])
                            weighted = through * w[j]
                            w[j] = F0 if w[j] == F0 else weighted

                # the numbers that the reset knows
                if sums[3].size > 0:
                    for j in range(length):
                        if spread:
                            threshold = c[3, j]
                        direct = -k0[j] if holds(soft, strict, rebound, h_row[j], threshold) else k0[j]
                        direct = direct if soft & fires(strict, h_row[j], threshold) else F0
                        terms[3, j] -= w[j] + direct
                if sums[4].size > 0 and not soft:
                    for j in range(length):
                        if spread:
                            a, u1, u2, threshold, v_reset = c[0, j], c[1, j], c[2, j], c[3, j], c[4, j]
                        held = back[j] * slope(rebound, a, u1, u2, v_reset) + gv_row[j]
                        terms[4, j] += held if fires(strict, h_row[j], threshold) else F0

                # the gradient of h, handed back
                for j in range(length):
                    if spread:
                        threshold = c[3, j]
                    dropped = (not soft) & fires(strict, h_row[j], threshold)
                    dropped |= holds(soft, strict, rebound, h_row[j], threshold)
                    k = (F0 if dropped else k0[j]) + gh_row[j]
                    back[j] = w[j] + k
                if t < 0:
                    continue
                gx_row = target(grad_x, kind, at, length, rows[7])
                for j in range(length):
                    if spread:
                        gain = c[5, j]
                    gx_row[j] = back[j] * gain
                write(gx_row, grad_x, kind, at)

                # the numbers of the charge, from the membrane before it
                if needs_map:
                    if t == 0 and not pre_reset:
                        copy(v0_row, before)
                    else:
                        previous = v0_row if t == 0 else read(h, FLOAT, at - neurons, length, zeros)
                        for j in range(length):
                            if spread:
                                threshold, v_reset = c[3, j], c[4, j]
                            before[j] = after_reset(soft, strict, rebound, previous[j], threshold, v_reset)
                    for j in range(length):
                        if spread:
                            u1, u2 = c[1, j], c[2, j]
                        terms[0, j] += back[j] * ((before[j] - u1) * (bent(rebound, u1, before[j]) - u2))
                    for j in range(length):
                        if spread:
                            a, u1, u2 = c[0, j], c[1, j], c[2, j]
                        m = bent(rebound, u1, before[j])
                        terms[1, j] -= back[j] * (a * (m - u2 if rebound else (m - u2) + (m - before[j])))
                    for j in range(length):
                        if spread:
                            a, u1 = c[0, j], c[1, j]
                        terms[2, j] -= back[j] * (a * (before[j] - u1))
                if sums[5].size > 0:
                    x_row = read(x, kind, at, length, rows[8])
                    for j in range(length):
                        terms[5, j] += back[j] * x_row[j]

            if grad_v0:
                if not pre_reset:
                    for j in range(length):
                        if spread:
                            a, u1, u2 = c[0, j], c[1, j], c[2, j]
                        back[j] = back[j] * slope(rebound, a, u1, u2, v0_row[j])
                store(back, grad_v0, v0_kind, n, rows[7])
            for k in range(6):
                if sums[k].size > 0:
                    inner = table[k, 2]
                    base = chunk * CHUNK // inner
                    if spread:
                        scatter(terms[k, :length], inner, n, base, sums[k][chunk])
                    else:
                        sums[k][chunk, (n // inner - base) % sums[k].shape[1]] += fold(terms[k, :length])
            n += length

    return compiled(backward)


@compiled
def total(sums, inner, count):
    """The sums of all chunks together, one for each of ``count`` values."""
    result = np.zeros(count)
    for chunk in range(sums.shape[0]):
        base = chunk * CHUNK // inner
        for i in range(sums.shape[1]):
            result[(base + i) % count] += sums[chunk, i]
    return result.astype(np.float32)
