// Variance, hybrid and Strom: one pass over gradient, second moment, residual and v.
//
// A block owns one tile of up to TILE elements of one group. A warp owns 32 * ITEMS consecutive
// ones of them, lane by lane, so that ballots yield the order of the indices. Selected elements go
// to the tile's own place in the scratch, in order, as
//
//     sign << 31 | (rounded exponent + 2048) << 16 | position in the tile
//
// (compress.cu makes words of them once the exponent of the group is known), 4 bytes a parameter.

#define TILE (THREADS * ITEMS)
#define WARPS (THREADS / 32)

struct Rule {
    State unscale, unscale_square, zeta, tau;
    double alpha;
    bool keep_r, keep_v;  // of a selected element, until compress.cu knows whether it fits
};

__device__ __forceinline__ bool unambiguous(State r, State v, double alpha) {
    const double wide = (double)r;
    return wide * wide > (double)v * alpha;
}

// Applies the rule to one element; r becomes the saturated value to be sent where it is due.
__device__ __forceinline__ bool apply(const Rule& rule, State& r, State& v, State& new_r) {
#if RULE == STROM
    bool due = (r < 0 ? -r : r) > rule.tau;
#elif RULE == HYBRID
    bool due = (r < 0 ? -r : r) > rule.tau && unambiguous(r, v, rule.alpha);
#else
    bool due = unambiguous(r, v, rule.alpha);
#endif
    if (!due) {
        new_r = r;
        v *= rule.zeta;
        return false;
    }
    r = within(r, (State)LARGEST);
#if RULE == VARIANCE
    new_r = rule.keep_r ? r : (State)0;
    if (!rule.keep_v) v = 0;
#else
    const State quantum = r < 0 ? -rule.tau : rule.tau;
    new_r = r - quantum;
#if RULE == HYBRID
    const double wide = (double)quantum;
    const double corrected = (double)v - wide * (double)r * 2 + wide * wide;
    v = (State)(corrected > 0 ? corrected : 0);
#endif
#endif
    return true;
}

// The scratch entry of a selected element.
__device__ __forceinline__ u32 entry_of(State value, int position, int& exponent) {
    u32 entry = (u32)position | (value < 0 ? 0x80000000u : 0u);
#if RULE == VARIANCE
    int e;
#if STATE_BYTES == 8
    const double mantissa = fabs(frexp(value, &e));
#else
    const float mantissa = fabsf(frexpf(value, &e));
#endif
    exponent = e - 1;
    entry |= (u32)(e - 1 + (mantissa >= (State)0.75) + 2048) << 16;
#endif
    return entry;
}

template <class G>
__device__ __forceinline__ void tile_pass(const Rule& rule, const G* __restrict__ g,
                                          const State* __restrict__ s, State* __restrict__ r,
                                          State* __restrict__ v, int n, u32* __restrict__ scratch,
                                          u32* count, int* top) {
    __shared__ int warp_counts[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int first = warp * 32 * ITEMS + lane;
    G gradient[ITEMS];
    State moment[ITEMS], residual[ITEMS], variance[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = first + 32 * k;
        if (i < n) {
            gradient[k] = g[i];
            residual[k] = r[i];
#if RULE != STROM
            moment[k] = s[i];
            variance[k] = v[i];
#endif
        }
    }
    u32 due[ITEMS];
    int selected = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int i = first + 32 * k;
        bool chosen = false;
        if (i < n) {
            residual[k] += widen(gradient[k]) * rule.unscale;
            State variance_k = 0, new_r;
#if RULE != STROM
            variance_k = variance[k] + moment[k] * rule.unscale_square;
            if (variance_k > (State)LARGEST) variance_k = (State)LARGEST;
#endif
            chosen = apply(rule, residual[k], variance_k, new_r);
            r[i] = new_r;
#if RULE != STROM
            v[i] = variance_k;
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
    if (threadIdx.x == 0) *count = total;
    if (selected == 0) return;
    int largest = NO_EXPONENT;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        if (due[k] >> lane & 1) {
            int exponent = NO_EXPONENT;
            scratch[at + __popc(due[k] & ((1u << lane) - 1))] =
                entry_of(residual[k], first + 32 * k, exponent);
            largest = max(largest, exponent);
        }
        at += __popc(due[k]);
    }
#if RULE == VARIANCE
    for (int step = 16; step; step >>= 1)
        largest = max(largest, __shfl_xor_sync(ALL, largest, step));
    if (lane == 0) atomicMax(top, largest);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) accumulate(
    const u64* __restrict__ gradients, const u64* __restrict__ moments,
    const i64* __restrict__ codes, int* tops, const i64* __restrict__ offsets,
    const int* __restrict__ tile_group, const int* __restrict__ first_tile, State* r, State* v,
    u32* scratch, u32* counts, double unscale, double unscale_square, double alpha, double zeta,
    double tau, i64 keep_r, i64 keep_v) {
    const int tile = blockIdx.x, group = tile_group[tile];
    const i64 inside = (i64)(tile - first_tile[group]) * TILE;
    const i64 start = offsets[group] + inside;
    const i64 left = offsets[group + 1] - start;
    const int n = left < TILE ? (int)left : TILE;
    const u64 g = gradients[group];
    const State* s = (const State*)moments[group] + inside;
    const Rule rule = {(State)unscale, (State)unscale_square, (State)zeta, (State)tau,
                       alpha,          keep_r != 0,           keep_v != 0};
#define PASS(G) \
    tile_pass(rule, (const G*)g + inside, s, r + start, v + start, n, scratch + start, \
              counts + tile, tops + group)
    switch (codes[group]) {
        case HALF:
            PASS(Half);
            break;
        case SINGLE:
            PASS(float);
            break;
#if STATE_BYTES == 8
        case DOUBLE:
            PASS(double);
            break;
#endif
        default:  // a group that takes no part
            if (threadIdx.x == 0) counts[tile] = 0;
    }
}
