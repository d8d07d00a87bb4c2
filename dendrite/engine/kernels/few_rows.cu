// Linear layers over the few rows of a decoding step: out[row, output] = sum over k of x[row, k] * weight[output, k].
//
// Reading the weight is all the time there should be. So outputs take the tall side of Hopper's matrix unit (64) and the
// rows its short one (8 to 64), and every thread keeps copies of the next blocks of the weight on their way, from before
// the kernel in front has ended (the weight is constant) to the last block. A block is 64 inputs, 128 bytes a row, and
// LONG blocks beside each other are read at once: memory likes to be read in long pieces.
//
//     shared memory    stage 0                          stage 1     ...
//                      block 0      block 1 ...
//                      weight │ x   weight │ x          row r's piece p of 16 bytes lies at piece p ^ (r % 8):
//                      64·G     8·NT rows               the unit's 128-byte swizzle
//
// Compiled with these constants (`few_rows.py`):
//     NT        tiles of 8 rows: all rows of the step
//     G         groups of 128 threads, 64 outputs each
//     LONG      blocks of a stage
//     STAGES    stages that fit shared memory
//     GATED     the weight is a gate's above an up projection's; out = silu(gate) * up
//     PARTS     out is float32 [number of splits, rows, outputs]: a sum for each split of the inputs
//     IS_HALF   numbers are float16, else bfloat16
//     SUMS, SUMS_BOUND, WEIGHT_AT, X_AT   the operands of an instruction over 8 * NT rows, as assembly

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static constexpr int THREADS = G * 128;
static constexpr int PIECES = 8 * LONG, ROWS_AT_ONCE = THREADS / PIECES;
static constexpr int WEIGHT_BYTES = G * 64 * 128, X_BYTES = NT * 8 * 128, BLOCK_BYTES = WEIGHT_BYTES + X_BYTES;

__device__ __forceinline__ void copy_piece(u32 to, const u16* from, bool is_there) {  // zeros if it is not
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0));
}

// Where an operand lies, as the unit wants to be told: groups of 8 rows are 1,024 bytes apart, pieces swizzled.
__device__ __forceinline__ u64 operand(u32 at) {
    return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

__device__ __forceinline__ void multiply(float (&sum)[NT * 4], u64 weight, u64 x) {
#if IS_HALF
#define KIND "f16.f16"
#else
#define KIND "bf16.bf16"
#endif
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" ROWS "k16.f32." KIND " " SUMS ", " WEIGHT_AT ", " X_AT ", add, 1, 1, 0, 0;\n}"
                 : SUMS_BOUND : "l"(weight), "l"(x));
}

__device__ __forceinline__ float widened(u16 number) {
    float wide;
#if IS_HALF
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(number));
#else
    wide = __uint_as_float((u32)number << 16);
#endif
    return wide;
}

__device__ __forceinline__ u16 rounded(float wide) {
    u16 number;
#if IS_HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(number) : "f"(wide));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(number) : "f"(wide));
#endif
    return number;
}

struct Result {
    void* out;
    const u16* bias;  // or null
    int num_rows;
    int width;  // outputs; those of one of both projections where they are gated
};

__device__ __forceinline__ void keep(const Result& to, int row, int output, float value) {
    if (row >= to.num_rows || output >= to.width) return;
    size_t place = (size_t)row * to.width + output;
#if PARTS
    if (to.bias && blockIdx.y == 0) value += widened(to.bias[output]);
    ((float*)to.out)[(size_t)blockIdx.y * to.num_rows * to.width + place] = value;
#else
    if (to.bias && !GATED) value += widened(to.bias[output]);
    ((u16*)to.out)[place] = rounded(value);
#endif
}

// A thread holds the sums of outputs g and g + 8, or of a gate and its up projection, for the same rows.
__device__ __forceinline__ void finish(const Result& to, int row, int output, float low, float high) {
#if GATED
    if (to.bias && output < to.width) {
        low += widened(to.bias[output]);
        high += widened(to.bias[to.width + output]);
    }
    keep(to, row, output, low / (1.0f + __expf(-low)) * high);
#else
    keep(to, row, output, low);
    keep(to, row, output + 8, high);
#endif
}

// Row r of a block's tile: 16 outputs after 16, of a gated weight 8 gates and their 8 up projections.
__device__ __forceinline__ int weight_row(int r, int width) {
#if GATED
    int output = min((blockIdx.x * (G * 4) + r / 16) * 8 + r % 8, width - 1);
    return r % 16 < 8 ? output : output + width;
#else
    return min((int)(blockIdx.x * (G * 64)) + r, width - 1);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) few_rows(
    const u16* x,       // [num_rows, depth]
    const u16* weight,  // [width, depth], or [2 * width, depth]
    const u16* bias,
    void* out,
    int num_rows,
    int width,
    int depth,            // a multiple of 64
    int blocks_per_split)
{
    extern __shared__ u8 memory[];
    asm volatile("griddepcontrol.launch_dependents;");
    const u32 stages = ((u32)__cvta_generic_to_shared(memory) + 1023) / 1024 * 1024;
    const int first = blockIdx.y * blocks_per_split;
    const int num_blocks = min(blocks_per_split, depth / 64 - first);
    const int num_stages = (num_blocks + LONG - 1) / LONG;
    const int r = threadIdx.x / PIECES, p = threadIdx.x % 8, side = threadIdx.x % PIECES / 8;
    const int offset = (first + side) * 64 + p * 8;
    const u16* rows[4 * LONG];
#pragma unroll
    for (int i = 0; i < 4 * LONG; ++i)
        rows[i] = weight + (size_t)weight_row(r + i * ROWS_AT_ONCE, width) * depth + offset;

    auto place = [&](int stage, int row) {
        return stages + (stage % STAGES * LONG + side) * BLOCK_BYTES + row * 128 + ((p ^ row % 8) << 4);
    };
    auto fetch_weight = [&](int stage) {
        if (stage >= num_stages) return;
        bool is_there = stage * LONG + side < num_blocks;
#pragma unroll
        for (int i = 0; i < 4 * LONG; ++i)
            copy_piece(place(stage, r + i * ROWS_AT_ONCE), is_there ? rows[i] + stage * (LONG * 64) : weight, is_there);
    };
    auto fetch_x = [&](int stage) {
        if (stage < num_stages) {
#pragma unroll
            for (int row = r; row < NT * 8; row += ROWS_AT_ONCE) {
                bool is_there = row < num_rows && stage * LONG + side < num_blocks;
                const u16* from = is_there ? x + (size_t)row * depth + stage * (LONG * 64) + offset : x;
                copy_piece(place(stage, row) + WEIGHT_BYTES, from, is_there);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch_weight(stage);
    asm volatile("griddepcontrol.wait;" ::: "memory");  // from here on x is there
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch_x(stage);

    const int group = threadIdx.x / 128;
    float sum[NT * 4] = {};
    for (int stage = 0; stage < num_stages; ++stage) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the unit reads what the copies wrote
        __syncthreads();                                              // and nobody reads the stage before any more
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int block = 0; block < LONG; ++block) {
            u32 at = stages + (stage % STAGES * LONG + block) * BLOCK_BYTES;
            u64 weight_at = operand(at + group * 8192), x_at = operand(at + WEIGHT_BYTES);
#pragma unroll
            for (int k = 0; k < 4; ++k) multiply(sum, weight_at + k * 2, x_at + k * 2);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        fetch_weight(stage + STAGES - 1);
        fetch_x(stage + STAGES - 1);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }

    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
    const int output = (blockIdx.x * (G * 4) + warp) * (GATED ? 8 : 16) + g;
    const Result to = {out, bias, num_rows, width};
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) finish(to, n * 8 + 2 * t + i, output, sum[n * 4 + i], sum[n * 4 + i + 2]);
}
