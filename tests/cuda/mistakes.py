"""Kernels with one mistake each, part one: accesses that leave their arrays, and barriers that not all reach."""

import numpy as np


def floats(n):
    return np.arange(n, dtype=np.float32)


def zeros(n):
    return np.zeros(n, np.float32)


# name: (kind, source, launch, arguments). The line at fault is marked HERE; a report about two lines may name either.
MISTAKES = {
    "a read past the end": (
        "out of bounds",
        r"""
__global__ void k(const float* x, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i + 1];  // HERE
}""",
        (4, 32),
        lambda: (floats(128), zeros(128)),
    ),
    "a read before the beginning": (
        "out of bounds",
        r"""
__global__ void k(const float* x, float* y) {
  y[threadIdx.x] = x[(int)threadIdx.x - 1];  // HERE
}""",
        (1, 32),
        lambda: (floats(32), zeros(32)),
    ),
    "a read far past the end": (
        "out of bounds",
        r"""
__global__ void k(const float* x, float* y, int n) {
  y[threadIdx.x] = x[threadIdx.x + 1000 * n];  // HERE
}""",
        (1, 32),
        lambda: (floats(32), zeros(32), 32),
    ),
    "a tail without its guard": (
        "out of bounds",
        r"""
__global__ void k(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = 2.f * x[i];  // HERE
}""",
        (4, 32),
        lambda: (floats(100), zeros(100), 100),
    ),
    "a guard that is off by one": (
        "out of bounds",
        r"""
__global__ void k(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n)
    y[i] = 2.f * x[i];  // HERE
}""",
        (4, 32),
        lambda: (floats(100), zeros(100), 100),
    ),
    "a write past a shared array": (
        "out of bounds",
        r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x + 1] = 1.f;  // HERE
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a read in the next shared array": (
        "out of bounds",
        r"""
__global__ void k(float* y) {
  __shared__ float s[32], t[32];
  s[threadIdx.x] = t[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 8];  // HERE
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "too little dynamic shared memory": (
        "out of bounds",
        r"""
__global__ void k(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1.f;  // HERE
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}""",
        (1, 32, 124),
        lambda: (zeros(32),),
    ),
    "an index of the wrong row length": (
        "out of bounds",
        r"""
__global__ void k(const float* x, float* y, int rows, int columns) {
  if (threadIdx.x < rows)
    for (int j = 0; j < columns; ++j)
      y[threadIdx.x * columns + j] = x[threadIdx.x * (columns + 1) + j];  // HERE
}""",
        (1, 32),
        lambda: (floats(30), zeros(30), 5, 6),
    ),
    "an atomic past the end": (
        "out of bounds",
        r"""
__global__ void k(int* counts) {
  if (threadIdx.x % 2 == 0)
    atomicAdd(&counts[threadIdx.x], 1);  // HERE
}""",
        (1, 32),
        lambda: (np.zeros(16, np.int32),),
    ),
    "a null pointer": (
        "null pointer",
        r"""
__global__ void k(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // HERE
}""",
        (1, 32),
        lambda: (None, zeros(32)),
    ),
    "a write through const": (
        "write to const",
        r"""
__global__ void k(const float* x) {
  ((float*)x)[threadIdx.x] = 1.f;  // HERE
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a misaligned float4": (
        "misaligned",
        r"""
__global__ void k(const float* x, float* y) {
  int i = threadIdx.x;
  float4 v = *reinterpret_cast<const float4*>(x + 1 + 4 * i);  // HERE
  y[i] = v.x + v.w;
}""",
        (1, 4),
        lambda: (floats(32), zeros(32)),
    ),
    "a misaligned half2": (
        "misaligned",
        r"""
__global__ void k(const half* x, float* y) {
  int i = threadIdx.x;
  half2 v = *reinterpret_cast<const half2*>(x + 2 * i + 1);  // HERE
  y[i] = __low2float(v);
}""",
        (1, 4),
        lambda: (np.zeros(32, np.float16), zeros(32)),
    ),
    "a misaligned float2": (
        "misaligned",
        r"""
__global__ void k(const float* x, float* y) {
  float2 v = reinterpret_cast<const float2*>(x + 1)[threadIdx.x];  // HERE
  y[threadIdx.x] = v.x + v.y;
}""",
        (1, 4),
        lambda: (floats(32), zeros(32)),
    ),
    "shared memory that nobody wrote": (
        "unwritten shared memory",
        r"""
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 32];  // HERE
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "shared memory of the block before": (
        "unwritten shared memory",
        r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  if (blockIdx.x == 0) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x];  // HERE
}""",
        (2, 32),
        lambda: (zeros(64),),
    ),
    "a barrier in both branches": (
        "barrier",
        r"""
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = y[threadIdx.x];
  if (threadIdx.x < 40) {
    __syncthreads();  // HERE
    y[threadIdx.x] = s[63 - threadIdx.x];
  } else {
    __syncthreads();
  }
}""",
        (1, 64),
        lambda: (zeros(64),),
    ),
    "a return before the barrier": (
        "barrier",
        r"""
__global__ void k(float* y, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();  // HERE
  y[threadIdx.x] = 1.f;
}""",
        (1, 64),
        lambda: (zeros(64), 50),
    ),
    "a barrier in a loop of unequal length": (
        "barrier",
        r"""
__global__ void k(float* y) {
  for (int i = 0; i < 1 + threadIdx.x / 32; ++i)
    __syncthreads();  // HERE
  y[threadIdx.x] = 1.f;
}""",
        (1, 64),
        lambda: (zeros(64),),
    ),
    "a shuffle that half the warp never reaches": (
        "deadlock",
        r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16)
    v += __shfl_xor_sync(0xffffffff, v, 1);  // HERE
  __syncthreads();
  y[threadIdx.x] = v;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "two halves in different shuffles": (
        "deadlock",
        r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffff, v, 1);  // HERE
  else
    v = __shfl_down_sync(0xffffffff, v, 1);
  y[threadIdx.x] = v;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a __syncwarp that not all reach": (
        "deadlock",
        r"""
__global__ void k(float* y) {
  if (threadIdx.x % 2) {
    __syncwarp();  // HERE
  }
  __syncthreads();
  y[threadIdx.x] = 1.f;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
}
