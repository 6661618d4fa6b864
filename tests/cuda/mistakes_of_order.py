"""Kernels with one mistake each, part two: shuffles, races and what was never written."""

import numpy as np

from tests.cuda.mistakes import floats, zeros

MISTAKES = {
    "a mask without the calling lane": (
        "shuffle",
        r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  v += __shfl_xor_sync(0x0000ffff, v, 1);  // HERE
  y[threadIdx.x] = v;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a width that is no power of two": (
        "shuffle",
        r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  v += __shfl_down_sync(0xffffffffu, v, 1, 24);  // HERE
  y[threadIdx.x] = v;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a mask one lane short": (
        "shuffle",
        r"""
__global__ void k(float* y) {
  unsigned mask = __ballot_sync(0x7fffffff, y[threadIdx.x] > 0.f);  // HERE
  y[threadIdx.x] = mask;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a shuffle from a lane outside the mask": (
        "shuffle",
        r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16)
    v += __shfl_xor_sync(0x0000ffff, v, 16);  // HERE
  y[threadIdx.x] = v;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a shuffle from a lane that has returned": (
        "shuffle",
        r"""
__global__ void k(float* y) {
  if (threadIdx.x >= 20) return;
  float v = y[threadIdx.x];
  v += __shfl_down_sync(0xffffffff, v, 4);  // HERE
  y[threadIdx.x] = v;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a shuffle from a lane that the block does not have": (
        "shuffle",
        r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  for (int o = 16; o; o /= 2)
    v += __shfl_xor_sync(0xffffffff, v, o);  // HERE
  y[threadIdx.x] = v;
}""",
        (1, 48),
        lambda: (zeros(48),),
    ),
    "no __syncwarp between lanes of a warp": (
        "race",
        r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = y[threadIdx.x];
  y[threadIdx.x] = s[31 - threadIdx.x];  // HERE
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a shuffle taken for a memory barrier": (
        "race",
        r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = y[threadIdx.x];
  float v = __shfl_xor_sync(0xffffffff, 1.f, 1);
  y[threadIdx.x] = v + s[31 - threadIdx.x];  // HERE
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "__syncwarp where two warps meet": (
        "race",
        r"""
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = y[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64),
        lambda: (zeros(64),),
    ),
    "all threads add into one shared cell": (
        "race",
        r"""
__global__ void k(float* y) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0.f;
  __syncthreads();
  sum += y[threadIdx.x];  // HERE
  __syncthreads();
  if (threadIdx.x == 0) y[0] = sum;
}""",
        (1, 32),
        lambda: (zeros(32),),
    ),
    "a halving sum without barriers": (
        "race",
        r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (int o = 64; o; o /= 2)
    if (threadIdx.x < o) s[threadIdx.x] += s[threadIdx.x + o];  // HERE
  if (threadIdx.x == 0) y[0] = s[0];
}""",
        (1, 128),
        lambda: (floats(128), zeros(1)),
    ),
    "a race in global memory": (
        "race",
        r"""
__global__ void k(float* x) {
  float left = x[(threadIdx.x + 63) % 64];  // HERE
  x[threadIdx.x] = left;
}""",
        (1, 64),
        lambda: (floats(64),),
    ),
    "a race in a half array": (
        "race",
        r"""
__global__ void k(half* x) {
  __shared__ half s[64];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64),
        lambda: (np.zeros(64, np.float16),),
    ),
    "an atomic and a plain read of one counter": (
        "race",
        r"""
__global__ void k(int* counter, int* seen) {
  atomicAdd(counter, 1);
  seen[threadIdx.x] = *counter;  // HERE
}""",
        (1, 64),
        lambda: (np.zeros(1, np.int32), np.zeros(64, np.int32)),
    ),
    "a race in dynamic shared memory": (
        "race",
        r"""
__global__ void k(float* y) {
  extern __shared__ char bytes[];
  float* s = (float*)bytes;
  s[threadIdx.x] = y[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64, 256),
        lambda: (zeros(64),),
    ),
    "blocks that add into one cell": (
        "race between blocks",
        r"""
__global__ void k(const float* x, float* y) {
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int o = 16; o; o /= 2) v += __shfl_down_sync(0xffffffff, v, o);
  if (threadIdx.x == 0)
    y[0] += v;  // HERE
}""",
        (4, 32),
        lambda: (floats(128), zeros(1)),
    ),
    "a block that reads what another wrote": (
        "race between blocks",
        r"""
__global__ void k(float* x) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  x[i] = i ? x[i - 1] : 0.f;  // HERE
}""",
        (4, 1),
        lambda: (floats(4),),
    ),
    "blocks whose outputs overlap": (
        "race between blocks",
        r"""
__global__ void k(float* y) {
  y[blockIdx.x * 16 + threadIdx.x] = blockIdx.x;  // HERE
}""",
        (2, 32),
        lambda: (zeros(64),),
    ),
    "cp.async without a wait": (
        "async copy",
        r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64),
        lambda: (floats(64), zeros(64)),
    ),
    "cp.async without a commit": (
        "async copy",
        r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64),
        lambda: (floats(64), zeros(64)),
    ),
    "cp.async that waits for too few": (
        "async copy",
        r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(1);
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64),
        lambda: (floats(64), zeros(64)),
    ),
    "cp.async, a wait, but no barrier": (
        "race",
        r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""",
        (1, 64),
        lambda: (floats(64), zeros(64)),
    ),
    "cp.async still under way at the end": (
        "async copy",
        r"""
__global__ void k(const float* x) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);  // HERE
  __pipeline_commit();
}""",
        (1, 64),
        lambda: (floats(64),),
    ),
    "a failed assert": (
        "assert",
        r"""
__global__ void k(const float* x) {
  assert(x[threadIdx.x] < 5.f);  // HERE
}""",
        (1, 32),
        lambda: (floats(32),),
    ),
}
