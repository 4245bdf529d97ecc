// Lets a C++ compiler of the host run the kernels of qif.cu: the words of CUDA, and a loop over the grid.
#include <cmath>
#include <cstring>

#define __device__
#define __global__ static
#define __launch_bounds__(threads)

struct Position {
    unsigned x;
};
static thread_local Position blockIdx, threadIdx, blockDim, gridDim;

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The instructions cvt.f32.f16 and cvt.rn.f16.f32.
static inline float from_half(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    return (float)half;
}

static inline unsigned short to_half(float value) {
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

// What NVRTC gets as literals the host gets as variables: one library serves every case.
static int flags[12];
#define QIF_X flags[0]
#define QIF_V0 flags[1]
#define QIF_V flags[2]
#define QIF_SOFT flags[3]
#define QIF_DETACHED flags[4]
#define QIF_STRICT flags[5]
#define QIF_SHAPE flags[6]
#define QIF_PRE_RESET flags[7]
#define QIF_REBOUND flags[8]
#define QIF_TENSORS flags[9]
#define QIF_NEEDS flags[10]
#define QIF_GIVEN flags[11]

#include QIF_SOURCE

template <typename Arguments>
static void launch(void (*kernel)(Arguments), const void *arguments, unsigned blocks, unsigned threads) {
    Arguments p;
    std::memcpy(&p, arguments, sizeof p);
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(p);
}

extern "C" unsigned long size_of_forward() { return sizeof(Forward); }
extern "C" unsigned long size_of_backward() { return sizeof(Backward); }

extern "C" void run(int is_forward, int vector, const int *with, const void *arguments, unsigned blocks,
                    unsigned threads) {
    std::memcpy(flags, with, sizeof flags);
    if (is_forward)
        launch(vector == 4 ? (void (*)(Forward))forward<4> : forward<1>, arguments, blocks, threads);
    else
        launch(vector == 4 ? (void (*)(Backward))backward<4> : backward<1>, arguments, blocks, threads);
}
