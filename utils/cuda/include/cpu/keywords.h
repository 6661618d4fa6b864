// Qualifiers and built-in variables.
#pragma once

#define CU_INLINE static inline __attribute__((always_inline))

// A function without access callbacks.
#if defined(__clang__)
#define CU_UNCHECKED __attribute__((no_sanitize("coverage")))
#else
#define CU_UNCHECKED __attribute__((no_sanitize_thread))
#endif

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#ifndef __restrict__
#define __restrict__ __restrict
#endif

// Plain build: one block at a time on each OS thread, so a block's shared array is a thread's own variable.
// __thread and not thread_local: the latter calls an initialiser that zig's linker resolves wrongly.
// The checked build does not use this: source.py turns each shared array into a reference to guarded memory.
#define __shared__ static __thread __attribute__((aligned(128)))

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
