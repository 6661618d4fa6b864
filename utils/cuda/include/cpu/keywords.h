// Qualifiers and built-in variables.
#pragma once

#define CU_INLINE static inline __attribute__((always_inline))

// A function without access callbacks.
#if defined(__clang__)
#define CU_UNCHECKED __attribute__((no_sanitize("coverage")))
#else
#define CU_UNCHECKED __attribute__((no_sanitize_thread))
#endif

// gcc gives no callback where a struct is passed to a function, or returned from it, straight from or into memory. So in its
// checked build a kernel has all its functions inlined.
#if defined(CU_CHECKED) && !defined(__clang__)
#define __global__ __attribute__((noinline, flatten))
#define __noinline__
#else
#define __global__ __attribute__((noinline))
#define __noinline__ __attribute__((noinline))
#endif
#define __device__
#define __host__
#define __constant__             // not const: a host may fill it, so its values may not be taken for granted
// gcc refuses to inline a call through a pointer that it has not followed yet; binary.py then asks for less.
#ifdef CU_INLINE_IS_A_HINT
#define __forceinline__ inline
#else
#define __forceinline__ inline __attribute__((always_inline))
#endif
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

// Shared memory of the plain build: one block at a time runs on each OS thread, so it is a thread's own. What a declaration
// becomes is said in source.py.
// __thread and not thread_local: the latter calls an initialiser that zig's linker resolves wrongly.
#define CU_BLOCK_MEMORY __thread __attribute__((aligned(128)))

typedef unsigned int uint;          // as nvcc has them, from the host's headers
typedef unsigned short ushort;
typedef unsigned long ulong;

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

#define warpSize 32
#define threadIdx (cu_thread_idx())
#define blockIdx (cu_block_idx())
#define blockDim (cu_block_dim())
#define gridDim (cu_grid_dim())
