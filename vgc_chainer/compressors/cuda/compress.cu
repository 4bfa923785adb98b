// From the scratch of the tiles to the packed message
//
//     [table | shard counts | absent groups | dense groups | words]
//
// in three small launches: how many elements of each tile fit their group's exponent; prefix sum
// over the tiles and everything that goes before the words; the words, in index order.

#define COUNT_WARPS 8
#define SCAN_THREADS 1024
#define SCAN_ITEMS 8

__device__ __forceinline__ int code_of(u32 entry, int top) {
    const int rounded = (int)(entry >> 16 & 0xFFF) - 2048;
    return top - min(rounded, top);
}

extern "C" __global__ void count_fitting(const int* __restrict__ tops,
                                         const i64* __restrict__ offsets,
                                         const int* __restrict__ tile_group,
                                         const int* __restrict__ first_tile,
                                         const u32* __restrict__ scratch,
                                         const u32* __restrict__ counts, u32* fitting, i64 tiles,
                                         i64 tile_size) {
    const int tile = blockIdx.x * COUNT_WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (tile >= tiles) return;
    const int n = counts[tile];
    int fits = 0;
    if (n) {
        const int group = tile_group[tile], top = tops[group];
        const u32* mine = scratch + offsets[group] + (tile - first_tile[group]) * tile_size;
        for (int i = lane; i < n; i += 32) fits += code_of(mine[i], top) <= MAX_CODE;
    }
    for (int step = 16; step; step >>= 1) fits += __shfl_xor_sync(ALL, fits, step);
    if (lane == 0) fitting[tile] = fits;
}

// One block. Exclusive prefix sum of `fitting` into `starts`; head of the message.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    scan_tiles(const u32* __restrict__ fitting, u32* starts, i64 tiles,
               const int* __restrict__ tops, i64 groups, i64 exponents, u32* packed, i64 table,
               i64 shards, const u32* __restrict__ lists, i64 listed) {
    __shared__ u32 warp_sums[SCAN_THREADS / 32];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    u32 carried = 0;
    for (i64 base = 0; base < tiles; base += SCAN_THREADS * SCAN_ITEMS) {
        const i64 mine = base + (i64)thread * SCAN_ITEMS;
        u32 value[SCAN_ITEMS], sum = 0;
#pragma unroll
        for (int k = 0; k < SCAN_ITEMS; ++k) {
            value[k] = mine + k < tiles ? fitting[mine + k] : 0;
            sum += value[k];
        }
        u32 through = sum;
        for (int step = 1; step < 32; step <<= 1) {
            const u32 below = __shfl_up_sync(ALL, through, step);
            if (lane >= step) through += below;
        }
        if (lane == 31) warp_sums[warp] = through;
        __syncthreads();
        u32 at = carried + through - sum;
        for (int w = 0; w < SCAN_THREADS / 32; ++w) {
            at += w < warp ? warp_sums[w] : 0;
            carried += warp_sums[w];
        }
#pragma unroll
        for (int k = 0; k < SCAN_ITEMS; ++k) {
            if (mine + k < tiles) starts[mine + k] = at;
            at += value[k];
        }
        __syncthreads();
    }
    if (exponents) {
        for (i64 k = thread; k < table; k += SCAN_THREADS) {
            const int low = tops[2 * k];
            const int high = 2 * k + 1 < groups ? tops[2 * k + 1] : NO_EXPONENT;
            packed[k] = (u32)(low & 0xFFFF) | (u32)high << 16;
        }
    }
    u32* shard_counts = packed + table;
    for (i64 k = thread; k < shards; k += SCAN_THREADS) shard_counts[k] = shards > 1 ? 0 : carried;
    for (i64 k = thread; k < listed; k += SCAN_THREADS) shard_counts[shards + k] = lists[k];
}

// One warp a tile. Where a selected element does not fit, or keeps its quantisation error, r and
// v still hold what `accumulate` saw.
extern "C" __global__ void emit_words(const int* __restrict__ tops,
                                      const i64* __restrict__ offsets,
                                      const int* __restrict__ tile_group,
                                      const int* __restrict__ first_tile,
                                      const u32* __restrict__ scratch,
                                      const u32* __restrict__ counts,
                                      const u32* __restrict__ starts, i64 tiles, i64 tile_size,
                                      State* r, State* v, u32* shard_counts, i64 shards,
                                      i64 index_bits, u32* words, i64 exponents, i64 coded,
                                      i64 error_feedback, i64 hold) {
    const int tile = blockIdx.x * COUNT_WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (tile >= tiles) return;
    const int n = counts[tile];
    if (n == 0) return;
    const int group = tile_group[tile], top = exponents ? tops[group] : 0;
    const i64 start = offsets[group] + (tile - first_tile[group]) * tile_size;
    const u32 mask = (u32)((1ull << index_bits) - 1);
    // Words of a tile that lies in one shard are counted together.
    const bool whole = (start >> index_bits) == ((start + tile_size - 1) >> index_bits);
    u32 at = starts[tile];
    const u32 first = at;
    for (int base = 0; base < n; base += 32) {
        const bool there = base + lane < n;
        const u32 entry = there ? scratch[start + base + lane] : 0;
        const int code = exponents ? code_of(entry, top) : coded ? (int)(entry >> 16 & 0xFFF) : 0;
        const bool fits = there && (!exponents || code <= MAX_CODE);
        const u32 sent = __ballot_sync(ALL, fits);
        if (fits) {
            const i64 index = start + (entry & 0xFFFF);
            words[at + __popc(sent & ((1u << lane) - 1))] =
                (entry & 0x80000000u) | (u32)code << index_bits | ((u32)index & mask);
            if (error_feedback) {
                const State power = power_of_two(top - code);
                r[index] -= entry >> 31 ? -power : power;
            } else if (hold) {
                r[index] = 0;
            }
            if (hold) v[index] = 0;
            if (shards > 1 && !whole) atomicAdd(shard_counts + (index >> index_bits), 1u);
        }
        at += __popc(sent);
    }
    if (shards > 1 && whole && lane == 0)
        atomicAdd(shard_counts + (start >> index_bits), at - first);
}
