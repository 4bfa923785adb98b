// Shared by all kernels. Defined by the host: STATE_BYTES (4 or 8), RULE and the launch shape.
//
// No kernel may be compiled with contraction of a * b + c or with fast division: the results are
// those of the NumPy code, bit for bit.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if STATE_BYTES == 8
typedef double State;
#define LARGEST 1.7976931348623157e308
#else
typedef float State;
#define LARGEST 3.402823466e38f
#endif

#define VARIANCE 0
#define HYBRID 1
#define STROM 2
#define QSGD 3
#define TERNGRAD 4
#define NONE 5

#define ALL 0xFFFFFFFFu
#define NO_EXPONENT (-32768)
#define MAX_CODE 7

#define LARGEST_FLOAT 3.402823466e38f
#define LARGEST_HALF 65504.0f

// Codes of dtypes in the tables; 0 stands for an array that is not there.
#define HALF 1
#define SINGLE 2
#define DOUBLE 3

struct Half {
    u16 bits;
};

__device__ __forceinline__ State widen(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
__device__ __forceinline__ State widen(float x) { return x; }
#if STATE_BYTES == 8
__device__ __forceinline__ State widen(double x) { return x; }
#endif

// What is too large for a dtype becomes its largest number.
__device__ __forceinline__ State within(State x, State largest) {
    return x > largest ? largest : x < -largest ? -largest : x;
}

__device__ __forceinline__ void narrow(Half* to, State x) {
    x = within(x, (State)LARGEST_HALF);
#if STATE_BYTES == 8
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(to->bits) : "d"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#endif
}
__device__ __forceinline__ void narrow(float* to, State x) {
    *to = (float)within(x, (State)LARGEST_FLOAT);
}
__device__ __forceinline__ void narrow(double* to, State x) {
    *to = within(x, (State)LARGEST);
}

// 2^e in the state dtype: exact, denormals too, 0 below and infinity above its range.
__device__ __forceinline__ State power_of_two(int e) {
#if STATE_BYTES == 8
    const int bias = 1023, fraction = 52;
#else
    const int bias = 127, fraction = 23;
#endif
    i64 bits = 0;
    if (e > bias)
        bits = (i64)(2 * bias + 1) << fraction;
    else if (e > -bias)
        bits = (i64)(e + bias) << fraction;
    else if (e > -bias - fraction)
        bits = 1ll << (e + bias + fraction - 1);
#if STATE_BYTES == 8
    return __longlong_as_double(bits);
#else
    return __int_as_float((int)bits);
#endif
}

// Last k in [low, high] with starts[k] <= at; starts ascend and starts[low] <= at.
__device__ __forceinline__ int last_not_above(const i64* starts, i64 at, int low, int high) {
    while (low < high) {
        const int middle = (low + high + 1) >> 1;
        if (starts[middle] <= at)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}
