// Definitions with which a C++ compiler compiles a kernel of fastloss/cuda for the CPU. They include no other header, because hundreds
// of kernels are compiled.

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define memcpy __builtin_memcpy

inline float fabs(float x) { return __builtin_fabsf(x); }
inline double fabs(double x) { return __builtin_fabs(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline double copysign(double x, double y) { return __builtin_copysign(x, y); }

struct Index {
    unsigned int x;
};

// defined in block.cpp
extern "C" Index threadIdx, blockIdx, gridDim;
extern "C" void __syncthreads();

inline void __threadfence() {}
inline void __threadfence_system() {}

template <class T>
inline T exchange(T* at, const T value) {
    const T before = *at;
    *at = value;
    return before;
}

template <class T>
inline T atomicAdd(T* at, const T value) { return exchange(at, T(*at + value)); }
inline int atomicExch(int* at, const int value) { return exchange(at, value); }
