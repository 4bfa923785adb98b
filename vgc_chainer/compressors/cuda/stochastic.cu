// QSGD and TernGrad: sums in the tree order of reduction.py, Philox numbers as in philox.py, and
// selection into the scratch of the tiles (see residual.cu), of which compress.cu makes words.

#define TILE (THREADS * ITEMS)
#define WARPS (THREADS / 32)
#define ROWS 32  // of 32 lanes: what a warp folds at once

struct Source {
    u64 gradient;
    i64 code;
    State unscale;
};

// Element i of a gradient, without loss scale, as float32.
__device__ __forceinline__ float element(const Source& from, i64 i) {
    State x = 0;
    switch (from.code) {
        case HALF:
            x = widen(((const Half*)from.gradient)[i]);
            break;
        case SINGLE:
            x = widen(((const float*)from.gradient)[i]);
            break;
#if STATE_BYTES == 8
        case DOUBLE:
            x = ((const double*)from.gradient)[i];
            break;
#endif
    }
    return (float)within(x * from.unscale, (State)LARGEST_FLOAT);
}

__device__ __forceinline__ float norm_of(double x) {
    return (float)(x > LARGEST_FLOAT ? (double)LARGEST_FLOAT : x);
}

struct Sum {
    static __device__ __forceinline__ double of(double a, double b) { return a + b; }
};
struct Largest {
    static __device__ __forceinline__ double of(double a, double b) { return a > b ? a : b; }
};

// Repeated halving of the 32 * N values of a warp, value[k] of a lane being element lane + 32 * k.
template <class Operation, int N>
__device__ __forceinline__ double fold(double (&value)[N]) {
#pragma unroll
    for (int half = N / 2; half; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k) value[k] = Operation::of(value[k], value[k + half]);
    double x = value[0];
    for (int half = 16; half; half /= 2) x = Operation::of(x, __shfl_down_sync(ALL, x, half));
    return x;
}

#if RULE == QSGD
// A warp a bucket of at most 1024 elements; writes the norms into the message.
extern "C" __global__ void __launch_bounds__(256)
    bucket_norms(const u64* __restrict__ gradients, const i64* __restrict__ codes, double unscale,
                 const i64* __restrict__ offsets, const i64* __restrict__ first_bucket, i64 groups,
                 i64 bucket_size, i64 by_maximum, float* norms) {
    const int lane = threadIdx.x & 31;
    const i64 bucket = (i64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (bucket >= first_bucket[groups]) return;
    const int group = last_not_above(first_bucket, bucket, 0, (int)groups);
    const Source from = {gradients[group], codes[group], (State)unscale};
    const i64 start = (bucket - first_bucket[group]) * bucket_size;
    const i64 left = offsets[group + 1] - offsets[group] - start;
    const int n = (int)(left < bucket_size ? left : bucket_size);
    double value[BUCKET_ROWS];
#pragma unroll
    for (int k = 0; k < BUCKET_ROWS; ++k) {
        const int i = lane + 32 * k;
        const double x = from.code && i < n ? (double)element(from, start + i) : 0.0;
        value[k] = by_maximum ? fabs(x) : x * x;
    }
    const double folded = by_maximum ? fold<Largest>(value) : fold<Sum>(value);
    if (lane == 0) norms[bucket] = norm_of(by_maximum ? folded : sqrt(folded));
}
#endif

#if RULE == TERNGRAD
// A warp a row of 1024 elements of a group: sum of x - mean, squared in the second pass.
extern "C" __global__ void __launch_bounds__(256)
    row_sums(const u64* __restrict__ gradients, const i64* __restrict__ codes, double unscale,
             const i64* __restrict__ offsets, const i64* __restrict__ first_row, i64 groups,
             const double* __restrict__ means, i64 squared, double* sums, int* largest) {
    const int lane = threadIdx.x & 31;
    const i64 row = (i64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (row >= first_row[groups]) return;
    const int group = last_not_above(first_row, row, 0, (int)groups);
    const Source from = {gradients[group], codes[group], (State)unscale};
    if (!from.code) return;
    const i64 start = (row - first_row[group]) * (32 * ROWS);
    const i64 left = offsets[group + 1] - offsets[group] - start;
    const double mean = squared ? means[group] : 0.0;
    double value[ROWS];
    float top = 0;
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
        const int i = lane + 32 * k;
        value[k] = 0;
        if (i < left) {
            const float x = element(from, start + i);
            const double away = (double)x - mean;
            value[k] = squared ? away * away : away;
            top = fmaxf(top, fabsf(x));
        }
    }
    const double sum = fold<Sum>(value);
    if (lane == 0) sums[row] = sum;
    if (squared) return;
    for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, step));
    // Floats that are not negative are ordered like their bits.
    if (lane == 0) atomicMax(largest + group, __float_as_int(top));
}

// A block a group: folds up to 2^20 rows. First pass: means. Second: bounds and tops.
extern "C" __global__ void __launch_bounds__(256)
    fold_rows(const i64* __restrict__ codes, const i64* __restrict__ offsets,
              const i64* __restrict__ first_row, const double* __restrict__ sums, i64 squared,
              double clip, double* means, const int* __restrict__ largest, float* bounds,
              float* tops) {
    __shared__ double partial[1024];
    const int group = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const i64 size = offsets[group + 1] - offsets[group];
    if (size == 0 || codes[group] == 0) {
        if (threadIdx.x == 0 && squared) bounds[group] = tops[group] = 0;
        return;
    }
    const double* rows = sums + first_row[group];
    i64 n = first_row[group + 1] - first_row[group];
    double value[ROWS];
    double sum = rows[0];
    if (n > 1) {
        const int blocks = (int)((n + 1023) / 1024);
        for (int b = warp; b < blocks; b += 8) {
#pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                const i64 i = (i64)b * 1024 + lane + 32 * k;
                value[k] = i < n ? rows[i] : 0.0;
            }
            sum = fold<Sum>(value);
            if (lane == 0) partial[b] = sum;
        }
        __syncthreads();
        if (warp) return;
        sum = partial[0];
        if (blocks > 1) {
#pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                const int i = lane + 32 * k;
                value[k] = i < blocks ? partial[i] : 0.0;
            }
            sum = fold<Sum>(value);
        }
    }
    if (threadIdx.x) return;
    if (!squared) {
        means[group] = sum / (double)size;
        return;
    }
    const float bound = norm_of(sqrt(sum / (double)size) * clip);
    const float top = __int_as_float(largest[group]);
    bounds[group] = bound;
    tops[group] = top < bound ? top : bound;
}
#endif

// Lane index % 4 of Philox4x32-10, as a float32 in [0, 1).
__device__ __forceinline__ float uniform(i64 index, u64 step, u32 seed, u32 rank) {
    u32 c0 = (u32)(index >> 2), c1 = (u32)(index >> 34), c2 = (u32)step, c3 = (u32)(step >> 32);
    u32 k0 = seed, k1 = rank;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = (u64)c0 * 0xD2511F53u, p1 = (u64)c2 * 0xCD9E8D57u;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
        c1 = (u32)p1;
        c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c3 = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const int which = (int)(index & 3);
    const u32 bits = which < 2 ? (which ? c1 : c0) : (which == 2 ? c2 : c3);
    return (float)(bits >> 8) * 5.9604644775390625e-8f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    draw(const u64* __restrict__ gradients, const i64* __restrict__ codes, double unscale,
         const i64* __restrict__ offsets, const int* __restrict__ tile_group,
         const int* __restrict__ first_tile, const float* __restrict__ table,
         const float* __restrict__ bounds, const i64* __restrict__ first_bucket, i64 bucket_size,
         i64 levels, u64 step, i64 seed, i64 rank, u32* scratch, u32* counts) {
    __shared__ int warp_counts[WARPS];
    const int tile = blockIdx.x, group = tile_group[tile];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Source from = {gradients[group], codes[group], (State)unscale};
    if (!from.code) {
        if (threadIdx.x == 0) counts[tile] = 0;
        return;
    }
    const i64 inside = (i64)(tile - first_tile[group]) * TILE;
    const i64 start = offsets[group] + inside, left = offsets[group + 1] - start;
    const int n = left < TILE ? (int)left : TILE;
    const int first = warp * 32 * ITEMS + lane;
#if RULE == QSGD
    const float* norms = table + first_bucket[group] + inside / bucket_size;
    const u32 into_bucket = (u32)(inside % bucket_size), bucket = (u32)bucket_size;
#else
    const float top = table[group], bound = bounds[group];
#endif
    u32 entries[ITEMS], due[ITEMS];
    int selected = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = first + 32 * k;
        bool chosen = false;
        if (i < n) {
            const float x = element(from, inside + i), magnitude = fabsf(x);
            const float number = uniform(start + i, step, (u32)seed, (u32)rank);
            entries[k] = (u32)i | (x < 0 ? 0x80000000u : 0u);
#if RULE == QSGD
            float norm = norms[(into_bucket + (u32)i) / bucket];
            if (norm == 0) norm = 1;
            const float level = floorf(magnitude / norm * (float)levels + number);
            const int code = level > (float)levels ? (int)levels : (int)level;
            entries[k] |= (u32)code << 16;
            chosen = code != 0;
#else
            chosen = number * top < (magnitude < bound ? magnitude : bound);
#endif
        }
        due[k] = __ballot_sync(ALL, chosen);
        selected += __popc(due[k]);
    }
    if (lane == 0) warp_counts[warp] = selected;
    __syncthreads();
    int at = 0, total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        at += w < warp ? warp_counts[w] : 0;
        total += warp_counts[w];
    }
    if (threadIdx.x == 0) counts[tile] = total;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        if (due[k] >> lane & 1)
            scratch[start + at + __popc(due[k] & ((1u << lane) - 1))] = entries[k];
        at += __popc(due[k]);
    }
}
