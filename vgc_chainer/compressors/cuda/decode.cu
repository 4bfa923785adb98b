// Decode of all ranks' messages straight into the gradients, in two launches.
//
// The flat index space is cut into tiles of TILE elements, one a warp. `find_tiles` reads every
// word once, checks it and notes where each tile begins in each message. `write_mean` adds up a
// tile in shared memory, message by message, so in rank order and without atomics, and writes the
// mean into whatever gradients the tile covers. If a check failed it writes nothing.

#define FINDS 4  // words a thread looks at
#define AHEAD 8  // messages whose words are loaded before the first is added

struct Words {
    const i64* shard_first;  // of this message: number of words before each shard; null if one
    i64 shards, index_bits, mask;
};

__device__ __forceinline__ i64 index_of(const Words& format, u32 word, i64 at) {
    i64 index = (i64)word & format.mask;
    if (format.shards > 1) {
        const int shard = last_not_above(format.shard_first, at, 0, (int)format.shards - 1);
        index += (i64)shard << format.index_bits;
    }
    return index;
}

// Whether entry k of a table is one that a sender may have written.
__device__ __forceinline__ bool possible(const u32* table, i64 k) {
#if RULE == VARIANCE
    const int exponent = ((const short*)table)[k];
#if STATE_BYTES == 8
    const int least = -1074, most = 1023;
#else
    const int least = -149, most = 127;
#endif
    return exponent == NO_EXPONENT || (exponent >= least && exponent <= most);
#else
    const float norm = __int_as_float((int)table[k]);
    return norm >= 0 && norm <= LARGEST_FLOAT;
#endif
}

// starts[tile * messages + m]: first word of message m at or behind the start of the tile.
extern "C" __global__ void __launch_bounds__(256)
    find_tiles(const u64* __restrict__ words, const u64* __restrict__ tables,
               const i64* __restrict__ counts, const i64* __restrict__ shard_first, i64 messages,
               i64 shards, i64 index_bits, i64 total, i64 tiles,
               const i64* __restrict__ offsets, const int* __restrict__ tile_first_group,
               i64 groups, i64 entries, const u64* __restrict__ closed, u32* starts,
               i64* refused) {
    const int m = blockIdx.y, lane = threadIdx.x & 31;
    const i64 n = counts[m], first_word = (i64)blockIdx.x * 256 * FINDS + threadIdx.x;
    const u32* mine = (const u32*)words[m];
    const Words format = {shard_first + m * (shards + 1), shards, index_bits,
                          (1ll << index_bits) - 1};
    u32 word[FINDS], previous[FINDS];
#pragma unroll
    for (int k = 0; k < FINDS; ++k) {
        const i64 i = first_word + 256 * k;
        word[k] = i < n ? mine[i] : 0;
        previous[k] = i > 0 && i <= n ? mine[i - 1] : 0;
    }
    i64 from[FINDS], to[FINDS];  // tiles that begin with word i
#pragma unroll
    for (int k = 0; k < FINDS; ++k) {
        const i64 i = first_word + 256 * k;
        from[k] = 0;
        to[k] = -1;
        if (i > n) continue;
        const i64 before = i ? index_of(format, previous[k], i - 1) : -1;
        const i64 here = i < n ? index_of(format, word[k], i) : total;
        if (here <= before || (i < n && here >= total)) {
            *refused = 1;
            continue;
        }
        from[k] = i ? before / TILE + 1 : 0;
        to[k] = i < n ? here / TILE : tiles;
        if (i < n && (closed || RULE == VARIANCE)) {
            const int tile = (int)to[k];
            const int group = last_not_above(offsets, here, tile_first_group[tile],
                                             tile_first_group[tile + 1]);
            if (closed && closed[m * groups + group]) *refused = 1;
#if RULE == VARIANCE
            if (((const short*)tables[m])[group] == NO_EXPONENT) *refused = 1;
#endif
        }
    }
    for (i64 k = (i64)blockIdx.x * 256 + threadIdx.x; k < entries; k += (i64)gridDim.x * 256)
        if (!possible((const u32*)tables[m], k)) *refused = 1;
#pragma unroll
    for (int k = 0; k < FINDS; ++k) {
        for (u32 waiting = __ballot_sync(ALL, from[k] <= to[k]); waiting; waiting &= waiting - 1) {
            const int source = __ffs(waiting) - 1;
            const i64 first = __shfl_sync(ALL, from[k], source);
            const i64 last = __shfl_sync(ALL, to[k], source);
            const u32 begins = (u32)(first_word - lane + source + 256 * k);
            for (i64 tile = first + lane; tile <= last; tile += 32)
                starts[tile * messages + m] = begins;
        }
    }
}

struct Values {
    i64 index_bits, code_mask, bucket_size;
    State tau;
    const i64* first_bucket;
};

__device__ __forceinline__ State value_of(const Values& values, u32 word, const u32* table,
                                          int group, i64 inside) {
    const u32 code = word >> values.index_bits & (u32)values.code_mask;
#if RULE == VARIANCE
    const State size = power_of_two((int)((const short*)table)[group] - (int)code);
#elif RULE == QSGD
    const float norm =
        __int_as_float((int)table[values.first_bucket[group] + inside / values.bucket_size]);
    const State size = (State)(norm * (float)code / (float)values.code_mask);
#elif RULE == TERNGRAD
    const State size = (State)__int_as_float((int)table[group]);
#else
    const State size = values.tau;
#endif
    return word >> 31 ? -size : size;
}

// A state value behind a pointer that is only sure to be a multiple of four.
__device__ __forceinline__ State load(const u32* from, i64 at) {
#if STATE_BYTES == 8
    return __hiloint2double((int)from[2 * at + 1], (int)from[2 * at]);
#else
    return __int_as_float((int)from[at]);
#endif
}

template <class G>
__device__ __forceinline__ void write(G* to, const State* sum, int n, State ranks, State scale) {
    const int lane = threadIdx.x & 31;
    const i64 number = (i64)ranks;
    if ((number & (number - 1)) == 0) {  // a power of two: the product is exact as well
        const State part = 1 / ranks;
        for (int j = lane; j < n; j += 32) narrow(to + j, sum[j] * part * scale);
    } else {
        for (int j = lane; j < n; j += 32) narrow(to + j, sum[j] / ranks * scale);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    write_mean(const u64* __restrict__ words, const u64* __restrict__ tables,
               const u64* __restrict__ dense, const u64* __restrict__ gradients,
               const i64* __restrict__ codes, i64 messages, i64 groups, i64 index_bits,
               i64 code_mask, i64 bucket_size, double tau, const i64* __restrict__ first_bucket,
               i64 total, i64 tiles, const i64* __restrict__ offsets,
               const int* __restrict__ tile_first_group, const u32* __restrict__ starts,
               const i64* refused, double scale) {
    __shared__ State sums[WARPS][TILE];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const i64 tile = (i64)blockIdx.x * WARPS + warp;
    if (tile >= tiles || *refused) return;
    const i64 base = tile * TILE, end = base + TILE < total ? base + TILE : total;
    const int first_group = tile_first_group[tile], last_group = tile_first_group[tile + 1];
    const Values values = {index_bits, code_mask, bucket_size, (State)tau, first_bucket};
    State* sum = sums[warp];
    for (int j = lane; j < TILE; j += 32) sum[j] = 0;
    __syncwarp();
    // Indices of one message ascend inside the tile: the low bits tell which element it is, also
    // where the tile spans shards, as long as a shard is no smaller than a tile.
    const u32 mask = (u32)((1ll << index_bits) - 1), low = (u32)base & mask;
    for (i64 m0 = 0; m0 < messages; m0 += AHEAD) {
        u32 word[AHEAD], begin[AHEAD];
        int n[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            n[k] = 0;
            if (m0 + k < messages) {
                begin[k] = starts[tile * messages + m0 + k];
                n[k] = (int)(starts[(tile + 1) * messages + m0 + k] - begin[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (lane < n[k]) word[k] = ((const u32*)words[m0 + k])[begin[k] + lane];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const i64 m = m0 + k;
            if (m >= messages) break;
            for (int i = lane; i < n[k]; i += 32) {
                const u32 w = i == lane ? word[k] : ((const u32*)words[m])[begin[k] + i];
                const int j = (int)(((w & mask) - low) & mask);
                const int group = last_not_above(offsets, base + j, first_group, last_group);
                sum[j] += value_of(values, w, (const u32*)tables[m], group,
                                   base + j - offsets[group]);
            }
            __syncwarp();
            if (dense) {
                for (int group = first_group; group <= last_group && group < groups; ++group) {
                    const u32* from = (const u32*)dense[m * groups + group];
                    if (!from) continue;
                    const i64 start = offsets[group] > base ? offsets[group] : base;
                    const i64 stop = offsets[group + 1] < end ? offsets[group + 1] : end;
                    for (i64 at = start + lane; at < stop; at += 32)
                        sum[at - base] += load(from, at - offsets[group]);
                }
                __syncwarp();
            }
        }
    }
    for (int group = first_group; group <= last_group && group < groups; ++group) {
        const i64 start = offsets[group] > base ? offsets[group] : base;
        const i64 stop = offsets[group + 1] < end ? offsets[group + 1] : end;
        const int n = (int)(stop - start);
        const i64 inside = start - offsets[group];
        const State ranks = (State)messages;
        const State* from = sum + (start - base);
        switch (n > 0 ? codes[group] : 0) {
            case HALF:
                write((Half*)gradients[group] + inside, from, n, ranks, (State)scale);
                break;
            case SINGLE:
                write((float*)gradients[group] + inside, from, n, ranks, (State)scale);
                break;
            case DOUBLE:
                write((double*)gradients[group] + inside, from, n, ranks, (State)scale);
                break;
        }
    }
}
