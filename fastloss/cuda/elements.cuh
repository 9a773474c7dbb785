// What a kernel's own lines are written with: bits, 16-bit numbers, arguments, packs.
//
// NVRTC, nvcc, hipcc and, for the tests, a C++ compiler read it. No header is included: NVRTC has none.

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

// 1 / x for 1 <= x <= 2, right to 14 bits at least: a division that is rounded takes ten instructions more.
#if defined(__CUDA_ARCH__)
DEVICE float reciprocal_estimate(const float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#elif defined(__HIP_DEVICE_COMPILE__)
DEVICE float reciprocal_estimate(const float x) { return __builtin_amdgcn_rcpf(x); }
#else
DEVICE float reciprocal_estimate(const float x) { return 1.0f / x; }
#endif

// NumPy's: NaN if either is
template <class T>
DEVICE T minimum(const T x, const T y) { return x != x || y != y ? x + y : x < y ? x : y; }
template <class T>
DEVICE T maximum(const T x, const T y) { return x != x || y != y ? x + y : x > y ? x : y; }

// float64 as float32, and what lies between two float32 as the odd one of them: rounded once more, to 16 bits, that is what
// rounding once would have given.
DEVICE float to_odd(const double x) {
    const float single = (float)x;
    const double error = x - (double)single;
    const int bits = as_int(single);
    const bool grows = bits < 0 ? error < 0.0 : error > 0.0, is_inexact = error < 0.0 || error > 0.0;  // not NaN: inf is exact
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
DEVICE unsigned short to_half(const double x) { return to_half(to_odd(x)); }

DEVICE float from_bfloat16(const unsigned short x) { return as_float((int)((unsigned int)x << 16)); }
DEVICE unsigned short to_bfloat16(const float x) {
    const unsigned int bits = (unsigned int)as_int(x);
    return (unsigned short)((x != x ? bits | 1u << 22 : bits + (bits >> 16 & 1u) + 0x7FFFu) >> 16);
}
DEVICE unsigned short to_bfloat16(const double x) { return to_bfloat16(to_odd(x)); }

// --- what a kernel is given ------------------------------------------------------------------------------------------

#define AT_LEAST_1(n) ((n) > 0 ? (n) : 1)  // C++ has no empty arrays
#define TOTALS (SUMS + 2 * IS_CHECKED)  // a range leaves so many: its sums, and of the first bad element where it is and what

struct Axis {
    long long length, strides[ARRAYS];
};

// Fields of 8 bytes each, written by launch.py: addresses, strides and lengths. Sizes are in elements, strides in bytes.
struct Arguments {
    long long addresses[ARRAYS];  // of each array's first element visited
    long long upstream, upstream_step;  // numbers that gradients are multiplied by, from one group to the next
    long long counts;  // numbers that sums and gradients are divided by, float64, one a group
    long long results;  // where the reduced values go, group by group, and those of the next sum behind
    long long partials;  // what ranges leave
    long long finished;  // for each group how many ranges are, 0 before a launch and after it
    long long is_recorded, record;  // whether a bad element was, and where on the host
    double numerator, divisor;  // in place of `upstream` and `counts`
    double numbers[AT_LEAST_1(NUMBERS)];
    long long launch;  // what the record names the launch by
    long long groups, group_packs, group_segments;  // a group is cut into segments, a part of a row each,
    long long segment_size, segment_packs, row_segments;  // and these into packs
    long long group_ranges, range_packs;
    long long inner_size;  // of a row's inner axis
    long long inner_strides[ARRAYS], outer_strides[ARRAYS];  // along the two axes of a row
    Axis axes[AT_LEAST_1(AXES)];  // outside the rows, innermost first
};

struct Sums {  // of some elements, in the type of the arithmetic
    compute_t total[AT_LEAST_1(SUMS)], factor[AT_LEAST_1(FACTORS)];
    double key, found;  // the first bad element: where it is, and what
};

struct Totals {
    double x[AT_LEAST_1(TOTALS)];
};

#define NONE 1e300  // the key of no element

DEVICE void note(Sums& sums, const double key, const double found) {
    if (key < sums.key) {
        sums.key = key;
        sums.found = found;
    }
}

// --- packs: neighbours in a row ----------------------------------------------------------------------------------------

struct Place {
    index_t column, linear;  // of the pack's first element, in its row and in the walk
    int count;  // of elements; PACK but at the end of a row
    long long offsets[AXES ? ARRAYS : 1];  // from each array's first element to that of the row
};

DEVICE char* at(const Arguments& a, const Place& place, const int k) {
    return (char*)(a.addresses[k] + (AXES ? place.offsets[k] : 0));
}

template <int WIDTH, class T>
struct alignas(WIDTH) Word {
    static constexpr int SIZE = WIDTH / sizeof(T);
    T x[SIZE];
};

// Each word as wide as the array's alignment allows; the end of a row one by one. Lanes past it are 0.
template <int WIDTH, class T>
DEVICE void load_contiguous(T (&x)[PACK], const Arguments& a, const Place& place, const int k) {
    const T* from = (const T*)(at(a, place, k) + (long long)place.column * (int)sizeof(T));
    typedef Word<WIDTH, T> Word;
    if (!IS_RAGGED || place.count == PACK) {
#pragma unroll
        for (int first = 0; first < PACK; first += Word::SIZE) {
            const Word word = *(const Word*)(from + first);
#pragma unroll
            for (int j = 0; j < Word::SIZE; ++j) x[first + j] = word.x[j];
        }
    } else {
#pragma unroll
        for (int j = 0; j < PACK; ++j) x[j] = j < place.count ? from[j] : T(0);
    }
}

template <int WIDTH, class T>
DEVICE void store_contiguous(const T (&x)[PACK], const Arguments& a, const Place& place, const int k) {
    T* to = (T*)(at(a, place, k) + (long long)place.column * (int)sizeof(T));
    typedef Word<WIDTH, T> Word;
    if (!IS_RAGGED || place.count == PACK) {
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
            if (j < place.count) to[j] = x[j];
    }
}

template <class T>
DEVICE void load_constant(T (&x)[1], const Arguments& a, const Place& place, const int k) {
    x[0] = *(const T*)at(a, place, k);
}

template <class T>
DEVICE void load_strided(T (&x)[PACK], const Arguments& a, const Place& place, const int k) {
#pragma unroll
    for (int j = 0; j < PACK; ++j)
        x[j] = !IS_RAGGED || j < place.count ? *(const T*)(at(a, place, k) + (long long)(place.column + j) * a.inner_strides[k]) : T(0);
}

template <class T>
DEVICE void store_strided(const T (&x)[PACK], const Arguments& a, const Place& place, const int k) {
#pragma unroll
    for (int j = 0; j < PACK; ++j)
        if (!IS_RAGGED || j < place.count) *(T*)(at(a, place, k) + (long long)(place.column + j) * a.inner_strides[k]) = x[j];
}

// Rows with two axes: visit each element of a pack with its address, at the cost of one division for the pack.
template <class Visit>
DEVICE void visit_nested(const Arguments& a, const Place& place, const int k, const Visit& visit) {
    index_t outer = place.column / (index_t)a.inner_size, index = place.column - outer * (index_t)a.inner_size;
#pragma unroll
    for (int j = 0; j < PACK; ++j) {
        if (!IS_RAGGED || j < place.count) visit(j, at(a, place, k) + (long long)outer * a.outer_strides[k] + (long long)index * a.inner_strides[k]);
        if (++index == (index_t)a.inner_size) {
            index = 0;
            ++outer;
        }
    }
}

template <class T>
DEVICE void load_nested(T (&x)[PACK], const Arguments& a, const Place& place, const int k) {
#pragma unroll
    for (int j = 0; j < PACK; ++j) x[j] = T(0);
    visit_nested(a, place, k, [&](const int j, const char* from) { x[j] = *(const T*)from; });
}

template <class T>
DEVICE void store_nested(const T (&x)[PACK], const Arguments& a, const Place& place, const int k) {
    visit_nested(a, place, k, [&](const int j, char* to) { *(T*)to = x[j]; });
}

// --- what the variant decides ------------------------------------------------------------------------------------------
