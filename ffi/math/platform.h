// What lets one source serve a CPU and a CUDA compiler.
#ifndef FEDFUSE_MATH_PLATFORM_H_
#define FEDFUSE_MATH_PLATFORM_H_

#if defined(__CUDACC__)
#define FEDFUSE_HOST_DEVICE __host__ __device__
#define FEDFUSE_INLINE __forceinline__
#else
#define FEDFUSE_HOST_DEVICE
// Always, not just preferably: a copy left out of line in a file compiled for AVX-512 could be the one the linker keeps
// for everybody.
#define FEDFUSE_INLINE inline __attribute__((always_inline))
#endif

#endif  // FEDFUSE_MATH_PLATFORM_H_
