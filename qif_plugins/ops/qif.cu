// The forward and the backward kernel of qif_plugins.ops.contract in CUDA C++.
//
// A thread owns V neighbouring neurons and walks through time; consecutive threads own consecutive
// neurons, so every access of a warp is one contiguous piece of memory, 4 V bytes a thread.
// Everything that distinguishes kernels is a macro, tested with an ordinary `if`: NVRTC gets literals
// and drops the branches not taken.
//
//   QIF_X, QIF_V0, QIF_V    the type of the input, of the initial membrane, of the stored membranes:
//                           FLOAT32, FLOAT16 or BFLOAT16
//   QIF_SOFT, QIF_DETACHED, QIF_STRICT, QIF_SHAPE, QIF_PRE_RESET, QIF_REBOUND    as in contract.Kind
//   QIF_TENSORS             bit i: coefficient i is a tensor, not a plain number
//   QIF_NEEDS               bit i: the gradient of coefficient i is wanted
//   QIF_GIVEN               which pointers are not null: v_seq, h (bits 0 and 1), grad_spike, grad_v, grad_h (2 to 4)
//
// Compile with --fmad=false: a contracted multiply-add rounds once where the contract rounds twice.
//
// Every offset is a 64-bit element count, t * neurons + n: past 2^31 elements a 32-bit one would wrap.

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

#define WINDOW 0
#define ATAN 1
#define SIGMOID 2
#define FAST_SIGMOID 3

typedef long long Index;
typedef unsigned short Bits16;

// Neuron n has values[(n / inner) % count], or value where the coefficient is no tensor.
struct Number {
    const float *values;
    Index inner, count;
    float value;
};

// Where one gradient goes. A thread's first neuron is m: if `direct`, every neuron is its own
// coefficient and `out` holds float32; otherwise out holds one float64 for every `group` neurons.
struct Sum {
    void *out;
    Index group, direct;
};

struct Forward {
    Number c[9];
    const void *x, *v0;
    void *spike, *v_last, *v_seq, *h;
    Index steps, neurons;
    float start;
};

struct Backward {
    Number c[9];
    Sum sums[6];
    const void *grad_spike, *grad_v, *grad_h, *h, *v0, *x;
    void *grad_x, *grad_v0;
    Index steps, neurons, grad_v_last;
    float start;
};

#ifdef __CUDACC__
__device__ inline float from_half(Bits16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline Bits16 to_half(float value) {
    Bits16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ inline float from_bfloat16(Bits16 bits) { return __uint_as_float((unsigned)bits << 16); }

// Round to nearest, ties to even; by bit arithmetic where there is no instruction, before sm_80.
__device__ inline Bits16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    Bits16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
#else
    const unsigned bits = __float_as_uint(value);
    if (value != value) return (Bits16)0x7fff;
    return (Bits16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

template <typename T, int V> struct alignas(sizeof(T) * V) Pack {
    T at[V];
};

template <int V> __device__ inline void load(float (&out)[V], const void *from, Index i, int type) {
    if (type == FLOAT32) {
        const auto pack = *(const Pack<float, V> *)((const float *)from + i);
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = pack.at[k];
    } else {
        const auto pack = *(const Pack<Bits16, V> *)((const Bits16 *)from + i);
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = type == FLOAT16 ? from_half(pack.at[k]) : from_bfloat16(pack.at[k]);
    }
}

template <int V> __device__ inline void load_or_zero(float (&out)[V], const void *from, Index i, int type) {
    if (from) {
        load(out, from, i, type);
    } else {
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = 0.0f;
    }
}

template <int V> __device__ inline void store(void *to, Index i, const float (&values)[V], int type) {
    if (type == FLOAT32) {
        Pack<float, V> pack;
#pragma unroll
        for (int k = 0; k < V; ++k) pack.at[k] = values[k];
        *(Pack<float, V> *)((float *)to + i) = pack;
    } else {
        Pack<Bits16, V> pack;
#pragma unroll
        for (int k = 0; k < V; ++k) pack.at[k] = type == FLOAT16 ? to_half(values[k]) : to_bfloat16(values[k]);
        *(Pack<Bits16, V> *)((Bits16 *)to + i) = pack;
    }
}

template <int V> __device__ inline void copy(float (&to)[V], const float (&from)[V]) {
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] = from[k];
}

// Coefficient i of neurons n, n + 1, ... A plain number stays out of the registers.
template <int V>
__device__ inline void load_number(float (&out)[V], const Number *numbers, int i, Index n, Index neurons) {
    const Number &c = numbers[i];
    if (!(QIF_TENSORS >> i & 1)) {
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = c.value;
    } else if (c.count == neurons) {
        load(out, c.values, n, FLOAT32);
    } else {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            // A 64-bit division costs several 32-bit ones, and few tensors need it.
            const Index at = neurons >> 32 ? (n + k) / c.inner % c.count
                                           : (Index)((unsigned)(n + k) / (unsigned)c.inner % (unsigned)c.count);
            out[k] = c.values[at];
        }
    }
}

template <int V> struct Numbers {
    float a[V], u1[V], u2[V], threshold[V], v_reset[V], gain[V];

    __device__ inline void load(const Number *c, Index n, Index neurons) {
        load_number(a, c, 0, n, neurons);
        load_number(u1, c, 1, n, neurons);
        load_number(u2, c, 2, n, neurons);
        load_number(threshold, c, 3, n, neurons);
        load_number(v_reset, c, 4, n, neurons);
        load_number(gain, c, 5, n, neurons);
    }

    // The membrane in the map's second factor: without rebound at least u1, where the map goes on along its tangent.
    __device__ inline float bent(int k, float v) const { return !QIF_REBOUND && v < u1[k] ? u1[k] : v; }

    __device__ inline float map(int k, float v) const { return (a[k] * (v - u1[k])) * (bent(k, v) - u2[k]); }

    __device__ inline float slope(int k, float v) const {
        const float m = bent(k, v);
        return a[k] * ((m - u1[k]) + (m - u2[k]));
    }

    __device__ inline bool fires(int k, float h) const {
        return QIF_STRICT ? h > threshold[k] : h >= threshold[k];
    }

    // The membrane h, without rebound at most the threshold.
    __device__ inline float highest(int k, float h) const {
        return !QIF_REBOUND && h > threshold[k] ? threshold[k] : h;
    }

    // Whether a soft reset leaves the membrane at the threshold: without rebound it leaves no more.
    __device__ inline bool holds(int k, float h) const {
        return QIF_SOFT && !QIF_REBOUND && fires(k, h) && h - threshold[k] > threshold[k];
    }

    __device__ inline float reset(int k, float h) const {
        if (!fires(k, h)) return h;
        return QIF_SOFT ? highest(k, h - threshold[k]) : v_reset[k];
    }
};

// e^-y, the operations of torch_backend.exp_negative.
__device__ inline float exp_negative(float y) {
    y = y < 80.0f ? y : 80.0f;
    const float n = floorf(y * -1.44269504088896341f + 0.5f);
    const float r = (-y - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r) + 1.0f;
    return p * __uint_as_float((unsigned)((int)n + 127) << 23);
}

__device__ inline float derivative(float h, float threshold, float s0, float s1, float s2) {
    if (QIF_SHAPE == WINDOW) return s0 <= h && h <= s1 ? s2 : 0.0f;
    const float z = h - threshold;
    if (QIF_SHAPE == ATAN) {
        const float y = s0 * z;
        return s1 / (1.0f + y * y);
    }
    if (QIF_SHAPE == SIGMOID) {
        const float e = exp_negative(s0 * fabsf(z));
        return (s0 * e) / ((1.0f + e) * (1.0f + e));
    }
    if (QIF_SHAPE == FAST_SIGMOID) {
        const float y = s0 * fabsf(z) + 1.0f;
        return 1.0f / (y * y);
    }
    const float y = s0 * (z - s2);
    return y * y < 80.0f ? s1 * exp_negative(y * y) : 0.0f;
}

template <int V> __global__ void __launch_bounds__(256) forward(const Forward p) {
    const Index n = ((Index)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (n >= p.neurons) return;
    Numbers<V> c;
    c.load(p.c, n, p.neurons);
    float v[V], x[V], ahead[V];
    if (p.v0) {
        load(v, p.v0, n, QIF_V0);
    } else {
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = p.start;
    }
    if (QIF_PRE_RESET) {
#pragma unroll
        for (int k = 0; k < V; ++k) v[k] = c.reset(k, v[k]);
    }
    load(ahead, p.x, n, QIF_X);
    Index i = n;
    for (Index t = 0; t < p.steps; ++t, i += p.neurons) {
        copy(x, ahead);
        // The next step's input is under way while this step computes.
        if (t + 1 < p.steps) load(ahead, p.x, i + p.neurons, QIF_X);
        float h[V], spike[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
            h[k] = c.map(k, v[k]) + c.gain[k] * x[k];
            spike[k] = c.fires(k, h[k]) ? 1.0f : 0.0f;
            v[k] = c.reset(k, h[k]);
        }
        store(p.spike, i, spike, QIF_X);
        if (QIF_GIVEN & 2) store(p.h, i, h, FLOAT32);
        if (QIF_GIVEN & 1) store(p.v_seq, i, v, QIF_V);
    }
    if (p.v_last) store(p.v_last, n, v, QIF_V);
}

template <int V> struct Adjoint {
    Numbers<V> c;
    float s0[V], s1[V], s2[V], back[V];
    double total[6][V];  // Terms are float32, their sum is float64.

    __device__ inline Adjoint() {
#pragma unroll
        for (int j = 0; j < 6; ++j) {
#pragma unroll
            for (int k = 0; k < V; ++k) total[j][k] = 0.0;
        }
    }

    __device__ inline void load(const Number *numbers, Index n, Index neurons) {
        c.load(numbers, n, neurons);
        load_number(s0, numbers, 6, n, neurons);
        load_number(s1, numbers, 7, n, neurons);
        load_number(s2, numbers, 8, n, neurons);
#pragma unroll
        for (int k = 0; k < V; ++k) back[k] = 0.0f;
    }

    // One step back in time: `back` becomes the gradient of this step's h.
    __device__ inline void step(const float (&h)[V], const float (&gs)[V], const float (&gv)[V],
                                const float (&gh)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const bool fired = c.fires(k, h[k]);
            const float w = derivative(h[k], c.threshold[k], s0[k], s1[k], s2[k]);
            float through, keep, k0 = 0.0f;
            if (QIF_SOFT) {
                k0 = back[k] * c.slope(k, c.reset(k, h[k])) + gv[k];
                const bool held = c.holds(k, h[k]);
                const float kept = held ? 0.0f : k0;
                through = QIF_DETACHED ? gs[k] : gs[k] - kept * c.threshold[k];
                keep = kept + gh[k];
                if (held) k0 = -k0;
            } else {
                keep = (fired ? 0.0f : back[k] * c.slope(k, h[k]) + gv[k]) + gh[k];
                const float reach = c.map(k, c.v_reset[k]) - c.map(k, c.highest(k, h[k]));
                through = QIF_DETACHED ? gs[k] : (gs[k] + back[k] * reach) + gv[k] * (c.v_reset[k] - h[k]);
            }
            const float surrogate = w == 0.0f ? 0.0f : through * w;
            if (QIF_NEEDS & 8) {
                total[3][k] -= (double)(QIF_SOFT ? surrogate + (fired ? k0 : 0.0f) : surrogate);
            }
            if ((QIF_NEEDS & 16) && !QIF_SOFT) {
                total[4][k] += (double)(fired ? back[k] * c.slope(k, c.v_reset[k]) + gv[k] : 0.0f);
            }
            back[k] = surrogate + keep;
        }
    }

    // `v` is the membrane after the reset before the step just taken.
    __device__ inline void add_terms(const float (&v)[V], const float (&x)[V]) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const float m = c.bent(k, v[k]);
            if (QIF_NEEDS & 1) total[0][k] += (double)(back[k] * ((v[k] - c.u1[k]) * (m - c.u2[k])));
            if (QIF_NEEDS & 2) {
                const float reach = QIF_REBOUND ? m - c.u2[k] : (m - c.u2[k]) + (m - v[k]);
                total[1][k] -= (double)(back[k] * (c.a[k] * reach));
            }
            if (QIF_NEEDS & 4) total[2][k] -= (double)(back[k] * (c.a[k] * (v[k] - c.u1[k])));
            if (QIF_NEEDS & 32) total[5][k] += (double)(back[k] * x[k]);
        }
    }
};

// The gradients of coefficients are summed in float64 over time and over every neuron that this thread
// visits: m, m + stride, ... The caller makes the stride a multiple of the coefficients' period, so that
// all of them share their coefficients, and sums the [stride / group] results. No atomics, hence the same
// sum every time.
template <int V> __global__ void __launch_bounds__(256) backward(const Backward p) {
    const Index m = ((Index)blockIdx.x * blockDim.x + threadIdx.x) * V;
    const Index stride = (Index)gridDim.x * blockDim.x * V;
    if (m >= p.neurons) return;
    Adjoint<V> adjoint;
    for (Index n = m; n < p.neurons; n += stride) {
        adjoint.load(p.c, n, p.neurons);
        float start[V], h[V], below[V], gs[V], gs_below[V], gv[V], gh[V], x[V], out[V];
        if (p.v0) {
            load(start, p.v0, n, QIF_V0);
        } else {
#pragma unroll
            for (int k = 0; k < V; ++k) start[k] = p.start;
        }
        Index i = n + (p.steps - 1) * p.neurons;
        load(below, p.h, i, FLOAT32);
        const void *grad_spike = QIF_GIVEN & 4 ? p.grad_spike : nullptr;
        const void *grad_v = QIF_GIVEN & 8 ? p.grad_v : nullptr;
        const void *grad_h = QIF_GIVEN & 16 ? p.grad_h : nullptr;
        load_or_zero(gs_below, grad_spike, i, QIF_X);
        load_or_zero(gv, grad_v, p.grad_v_last ? n : i, QIF_V);
        for (Index t = p.steps - 1; t >= 0; --t, i -= p.neurons) {
            copy(h, below);
            copy(gs, gs_below);
            if (t > 0) {
                load(below, p.h, i - p.neurons, FLOAT32);
                load_or_zero(gs_below, grad_spike, i - p.neurons, QIF_X);
            } else {
                copy(below, start);
            }
            load_or_zero(gh, grad_h, i, FLOAT32);
            adjoint.step(h, gs, gv, gh);
            if (QIF_NEEDS & 39) {
                float v[V];
                load_or_zero(x, QIF_NEEDS & 32 ? p.x : nullptr, i, QIF_X);
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    v[k] = t > 0 || QIF_PRE_RESET ? adjoint.c.reset(k, below[k]) : below[k];
                }
                adjoint.add_terms(v, x);
            }
#pragma unroll
            for (int k = 0; k < V; ++k) out[k] = adjoint.back[k] * adjoint.c.gain[k];
            store(p.grad_x, i, out, QIF_X);
            // The gradient of v_last enters at the last step only.
            load_or_zero(gv, t > 0 && !p.grad_v_last ? grad_v : nullptr, i - p.neurons, QIF_V);
        }
        if (QIF_PRE_RESET) {
            load_or_zero(gs, nullptr, 0, FLOAT32);
            load_or_zero(gh, nullptr, 0, FLOAT32);
            adjoint.step(start, gs, gv, gh);
        }
        if (p.grad_v0) {
#pragma unroll
            for (int k = 0; k < V; ++k) {
                out[k] = QIF_PRE_RESET ? adjoint.back[k] : adjoint.back[k] * adjoint.c.slope(k, start[k]);
            }
            store(p.grad_v0, n, out, QIF_V0);
        }
    }
#pragma unroll
    for (int j = 0; j < 6; ++j) {
        if (!(QIF_NEEDS >> j & 1)) continue;
        const Sum &sum = p.sums[j];
        double group = 0.0;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            group += adjoint.total[j][k];
            if (sum.direct) {
                ((float *)sum.out)[m + k] = (float)adjoint.total[j][k];
            } else if ((m + k + 1) % sum.group == 0) {
                ((double *)sum.out)[(m + k) / sum.group] = group;
                group = 0.0;
            }
        }
    }
}
