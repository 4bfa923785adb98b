// Number of the first of many arrays that holds NaN or Inf: one launch, whatever their number.

#define CHUNK 8192

__device__ __forceinline__ bool bad(const u16* a, i64 i) { return (a[i] & 0x7C00u) == 0x7C00u; }
__device__ __forceinline__ bool bad(const u32* a, i64 i) {
    return (a[i] & 0x7F800000u) == 0x7F800000u;
}
__device__ __forceinline__ bool bad(const u64* a, i64 i) {
    return (a[i] >> 52 & 0x7FF) == 0x7FF;
}

template <class A>
__device__ __forceinline__ bool any_bad(const A* array, int n) {
    bool found = false;
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += 256) found |= bad(array, i);
    return found;
}

// first_chunk[k]: number of chunks of all arrays before array k; `first` starts as their number.
extern "C" __global__ void __launch_bounds__(256)
    first_nonfinite(const u64* __restrict__ arrays, const i64* __restrict__ sizes,
                    const i64* __restrict__ codes, const i64* __restrict__ first_chunk, i64 number,
                    i64* first) {
    const int array = last_not_above(first_chunk, blockIdx.x, 0, (int)number - 1);
    const i64 start = (blockIdx.x - first_chunk[array]) * CHUNK, left = sizes[array] - start;
    const int n = left < CHUNK ? (int)left : CHUNK;
    bool found = false;
    switch (codes[array]) {
        case HALF:
            found = any_bad((const u16*)arrays[array] + start, n);
            break;
        case SINGLE:
            found = any_bad((const u32*)arrays[array] + start, n);
            break;
        case DOUBLE:
            found = any_bad((const u64*)arrays[array] + start, n);
            break;
    }
    if (__syncthreads_or(found) && threadIdx.x == 0) atomicMin(first, (i64)array);
}
