// Types and functions for the generated part of a kernel: bits of numbers, 16-bit numbers, arguments, loads and stores.
//
// NVRTC compiles this file, and a C++ compiler does for the tests. It includes no header, because NVRTC has none.

#define DEVICE static __device__ __forceinline__

// --- numbers and their bits ------------------------------------------------------------------------------------------

template <class To, class From>
DEVICE To same_bits(const From& x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}

DEVICE int as_int(const float x) { return same_bits<int>(x); }
DEVICE long long as_int(const double x) { return same_bits<long long>(x); }
DEVICE float as_float(const int x) { return same_bits<float>(x); }
DEVICE double as_float(const long long x) { return same_bits<double>(x); }
DEVICE int shift_left(const int x, const int n) { return (int)((unsigned int)x << n); }
DEVICE long long shift_left(const long long x, const long long n) { return (long long)((unsigned long long)x << n); }

// Return 1 / x for a normal number up to 2^126, to at least 14 bits. A correctly rounded division takes ten instructions more.
#if defined(__CUDA_ARCH__)
DEVICE float reciprocal_estimate(const float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float exp2_estimate(const float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
DEVICE float reciprocal_estimate(const float x) { return (1.0f / x) * 1.0000002f; }  // not better than a device's
DEVICE float exp2_estimate(const float x) { return __builtin_exp2f(x) * 1.0000002f; }
#endif

// Return x / y for 0 <= y <= 2^60 and |x| <= 2^60, and 0 if both are 0. One iteration of Newton's method corrects the estimate, which
// takes no subnormal number. The number added to the divisor is too small to change any but 0.
DEVICE float quotient(const float x, const float y) {
    const float dividend = x * 0x1p64f, divisor = fma(y, 0x1p64f, 0x1p-126f), r = reciprocal_estimate(divisor), q = dividend * r;
    return fma(fma(-divisor, q, dividend), r, q);
}
DEVICE double quotient(const double x, const double y) { return y == 0.0 ? 0.0 : x / y; }

// As in NumPy, the minimum and the maximum are NaN if x or y is NaN.
template <class T>
DEVICE T minimum(const T x, const T y) { return x != x || y != y ? x + y : x < y ? x : y; }
template <class T>
DEVICE T maximum(const T x, const T y) { return x != x || y != y ? x + y : x > y ? x : y; }
#if __CUDA_ARCH__ >= 800
DEVICE float minimum(const float x, const float y) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
    return least;
}
DEVICE float maximum(const float x, const float y) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
    return most;
}
#endif

// Convert float64 to float32; a number between two float32 numbers becomes the one whose last bit is 1. Rounding the result to 16
// bits then gives the same number as rounding the float64 number once.
DEVICE float round_to_odd(const double x) {
    const float single = (float)x;
    const double error = x - (double)single;
    const int bits = as_int(single);
    const bool grows = bits < 0 ? error < 0.0 : error > 0.0, is_inexact = error < 0.0 || error > 0.0;  // the error of inf is NaN
    return as_float(is_inexact && (bits & 1) == 0 ? bits + (grows ? 1 : -1) : bits);
}

#ifdef __CUDA_ARCH__
DEVICE float from_half(const unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
DEVICE unsigned short to_half(const float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
DEVICE float from_half(const unsigned short x) { return (float)same_bits<_Float16>(x); }
DEVICE unsigned short to_half(const float x) { return same_bits<unsigned short>((_Float16)x); }
#endif
DEVICE unsigned short to_half(const double x) { return to_half(round_to_odd(x)); }

DEVICE float from_bfloat16(const unsigned short x) { return as_float((int)((unsigned int)x << 16)); }
#if __CUDA_ARCH__ >= 800
DEVICE unsigned short to_bfloat16(const float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#else
DEVICE unsigned short to_bfloat16(const float x) {
    const unsigned int bits = (unsigned int)as_int(x);
    return (unsigned short)((x != x ? bits | 1u << 22 : bits + (bits >> 16 & 1u) + 0x7FFFu) >> 16);
}
#endif
DEVICE unsigned short to_bfloat16(const double x) { return to_bfloat16(round_to_odd(x)); }

// --- arguments and sums ----------------------------------------------------------------------------------------------

#define AT_LEAST_1(n) ((n) > 0 ? (n) : 1)  // C++ has no empty arrays
#define LANES (THREADS / TEAM)  // threads of a block that compute different packs
#define LANE (threadIdx.x / TEAM)
#define MEMBER (threadIdx.x % TEAM)

typedef unsigned long long Count;  // a number of elements, and in the highest bits the number of ranges in which they have been counted
#define COUNT_BITS 52

// All counters are 0 before and after a launch. See COUNTERS in workspace.py.
struct Counters {
    Count counts[GROUPS];  // each group's elements that count
    unsigned int finished[GROUPS];  // each group's ranges that have been computed
    unsigned int taken, left;  // ranges that blocks have taken to count their elements, and blocks that have left the kernel
    int is_recorded;  // whether a bad element is recorded
};

struct Axis {
    long long length, strides[ARRAYS];
};

// Fields of 8 bytes each, written by launch.py. Sizes are in elements, strides in bytes.
struct Arguments {
    long long addresses[ARRAYS];  // of each array's first visited element
    long long upstream, upstream_stride;  // address of the upstream gradient, and its stride from one group to the next
    long long results;  // address of the reduced values: of all groups for the first sum, then of all groups for the next sum
    long long divisors;  // address of the numbers that sums and gradients are divided by, one for each group, if they are on the device
    long long partials;  // address of the partial sums of the ranges
    long long counters, record;  // addresses of the counters, and of the record of a bad element on the host
#if BY_CLASS
    long long class_results, class_partials;  // addresses of sums of each class: of the groups, for one sum after another; and of the ranges
#endif
    double numerator, divisor;  // used instead of the upstream gradient and the counts if these are numbers that the host knows
    double numbers[AT_LEAST_1(NUMBERS)];
    long long launch;  // the launch's number, for the record
    long long groups, group_packs, group_segments;  // A group is cut into segments, each of which is a row or a part of one.
    long long segment_size, segment_packs, row_segments;  // A segment is cut into packs.
    long long group_ranges, segment_ranges, range_packs;  // A range is a number of packs of one group, or of one segment.
    long long inner_size;  // length of a row's inner axis
    long long inner_strides[ARRAYS], outer_strides[ARRAYS];  // of each array along the inner and the outer axis of a row
#if CLASSES
    Axis classes;
#endif
    Axis axes[AT_LEAST_1(AXES)];  // axes outside the rows, innermost first
};

struct Sums {  // sums over a few elements, in the type of the arithmetic
    compute_t total[AT_LEAST_1(SUMS)], factor[AT_LEAST_1(FACTORS)];
};

struct Totals {  // sums over a range, or over a group, in float64
    double x[AT_LEAST_1(SUMS)];
};

#if BY_CLASS
struct ClassTerms {  // sums over a thread's entries that have a number for each class, for one class
    compute_t x[BY_CLASS];
};

struct ClassTotals {  // the same over a block
    double x[BY_CLASS];
};
#endif

// Record a bad element, by its position and operand (see Launch.bad_element) and its value, if no other is recorded.
DEVICE void record_bad(const Arguments& a, const double key, const double found) {
    Counters& counters = *(Counters*)a.counters;
    if (*(volatile int*)&counters.is_recorded || atomicExch(&counters.is_recorded, 1)) return;
    volatile double* record = (volatile double*)a.record;
    record[1] = key;
    record[2] = found;
    __threadfence_system();
    *(volatile long long*)record = a.launch;  // last, because the host reads the record when this is not 0
}

// --- packs: neighbouring elements of a row, which one thread loads together -----------------------------------------------

struct Position {
    index_t column, linear;  // index of an element in its row, and in the order of visits
    int ahead;  // elements from there to the pack; a constant, so that the packs of a turn share an address
    int count;  // number of elements: PACK, or fewer at the end of a row
    long long offsets[AXES ? ARRAYS : 1];  // bytes from each array's first visited element to the first element of the row
};

DEVICE char* row_address(const Arguments& a, const Position& pos, const int k) {
    return (char*)(a.addresses[k] + (AXES ? pos.offsets[k] : 0));
}

template <int WIDTH, class T>
struct alignas(WIDTH) Word {
    static constexpr int SIZE = WIDTH / sizeof(T);
    T x[SIZE];
};

// Load words as wide as the array's alignment allows. At the end of a row, load single elements, and set the others to 0.
template <int WIDTH, class T>
DEVICE void load_contiguous(T (&x)[PACK], const Arguments& a, const Position& pos, const int k) {
    const T* from = (const T*)(row_address(a, pos, k) + (long long)pos.column * (int)sizeof(T)) + pos.ahead;
    typedef Word<WIDTH, T> Word;
    if (!IS_RAGGED || pos.count == PACK) {
#pragma unroll
        for (int first = 0; first < PACK; first += Word::SIZE) {
            const Word word = *(const Word*)(from + first);
#pragma unroll
            for (int j = 0; j < Word::SIZE; ++j) x[first + j] = word.x[j];
        }
    } else {
#pragma unroll
        for (int j = 0; j < PACK; ++j) x[j] = j < pos.count ? from[j] : T(0);
    }
}

template <int WIDTH, class T>
DEVICE void store_contiguous(const T (&x)[PACK], const Arguments& a, const Position& pos, const int k) {
    T* to = (T*)(row_address(a, pos, k) + (long long)pos.column * (int)sizeof(T)) + pos.ahead;
    typedef Word<WIDTH, T> Word;
    if (!IS_RAGGED || pos.count == PACK) {
#pragma unroll
        for (int first = 0; first < PACK; first += Word::SIZE) {
            Word word;
#pragma unroll
            for (int j = 0; j < Word::SIZE; ++j) word.x[j] = x[first + j];
            *(Word*)(to + first) = word;
        }
    } else {
#pragma unroll
        for (int j = 0; j < PACK; ++j)
            if (j < pos.count) to[j] = x[j];
    }
}

template <class T>
DEVICE void load_constant(T& x, const Arguments& a, const Position& pos, const int k) {
    x = *(const T*)row_address(a, pos, k);
}

template <class T>
DEVICE void load_strided(T (&x)[PACK], const Arguments& a, const Position& pos, const int k) {
#pragma unroll
    for (int j = 0; j < PACK; ++j)
        x[j] = !IS_RAGGED || j < pos.count ? *(const T*)(row_address(a, pos, k) + (long long)(pos.column + pos.ahead + j) * a.inner_strides[k]) : T(0);
}

template <class T>
DEVICE void store_strided(const T (&x)[PACK], const Arguments& a, const Position& pos, const int k) {
#pragma unroll
    for (int j = 0; j < PACK; ++j)
        if (!IS_RAGGED || j < pos.count) *(T*)(row_address(a, pos, k) + (long long)(pos.column + pos.ahead + j) * a.inner_strides[k]) = x[j];
}

// Call `visit` with the address of each element of a pack, in a row with two axes. A pack takes a single division.
template <class Visit>
DEVICE void visit_nested(const Arguments& a, const Position& pos, const int k, const Visit& visit) {
    const index_t column = pos.column + pos.ahead;
    index_t outer = column / (index_t)a.inner_size, index = column - outer * (index_t)a.inner_size;
#pragma unroll
    for (int j = 0; j < PACK; ++j) {
        if (!IS_RAGGED || j < pos.count)
            visit(j, row_address(a, pos, k) + (long long)outer * a.outer_strides[k] + (long long)index * a.inner_strides[k]);
        if (++index == (index_t)a.inner_size) {
            index = 0;
            ++outer;
        }
    }
}

template <class T>
DEVICE void load_nested(T (&x)[PACK], const Arguments& a, const Position& pos, const int k) {
#pragma unroll
    for (int j = 0; j < PACK; ++j) x[j] = T(0);
    visit_nested(a, pos, k, [&](const int j, const char* from) { x[j] = *(const T*)from; });
}

template <class T>
DEVICE void store_nested(const T (&x)[PACK], const Arguments& a, const Position& pos, const int k) {
    visit_nested(a, pos, k, [&](const int j, char* to) { *(T*)to = x[j]; });
}

// Return the address of an entry's element in an array, or of the first one if the array has several for each entry.
template <bool IS_NESTED>
DEVICE char* entry_address(const Arguments& a, const Position& pos, const int k) {
    const index_t column = pos.column + pos.ahead, outer = IS_NESTED ? column / (index_t)a.inner_size : 0;
    const index_t inner = column - outer * (index_t)a.inner_size;
    return row_address(a, pos, k) + (long long)outer * a.outer_strides[k] + (long long)inner * a.inner_strides[k];
}

// --- generated by source.py for the variant ----------------------------------------------------------------------------
