"""Kernels that must give the same everywhere, for parts of CUDA that the samples (utils/cuda/samples.py) leave out.

CASES: name -> Case. `arrays(rng)` makes the arguments, arrays and numbers in the kernel's order; `expected(*arguments)`
computes with NumPy what the last array must hold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FLASH = r"""
// one warp for each query row; keys and values pass through dynamic shared memory in tiles of BK rows
template <int D, int BK>
__global__ void flash(const float* q, const float* k, const float* v, int n, float scale, float* o) {
  extern __shared__ float tiles[];
  float* k_tile = tiles;                       // [BK][D + 1]
  float* v_tile = tiles + BK * (D + 1);        // [BK][D]
  int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
  int thread = threadIdx.y * 32 + lane, threads = 32 * blockDim.y;
  float m = -INFINITY, l = 0.f, acc[D / 32];
  for (int j = 0; j < D / 32; ++j) acc[j] = 0.f;
  for (int first = 0; first < n; first += BK) {
    for (int i = thread; i < BK * D; i += threads) {
      bool inside = first + i / D < n;
      k_tile[i / D * (D + 1) + i % D] = inside ? k[(size_t)first * D + i] : 0.f;
      v_tile[i] = inside ? v[(size_t)first * D + i] : 0.f;
    }
    __syncthreads();
    for (int c = 0; c < BK && first + c < n; ++c) {
      float s = 0.f;
      if (row < n) for (int d = lane; d < D; d += 32) s += q[(size_t)row * D + d] * k_tile[c * (D + 1) + d];
      for (int offset = 16; offset; offset >>= 1) s += __shfl_xor_sync(0xffffffffu, s, offset);
      s *= scale;
      float larger = fmaxf(m, s), shrink = expf(m - larger), p = expf(s - larger);
      l = l * shrink + p;
      m = larger;
      for (int j = 0; j < D / 32; ++j) acc[j] = acc[j] * shrink + p * v_tile[c * D + 32 * j + lane];
    }
    __syncthreads();
  }
  if (row < n) for (int j = 0; j < D / 32; ++j) o[(size_t)row * D + 32 * j + lane] = acc[j] / l;
}
"""

COPY_ASYNC = r"""
#include <cuda_pipeline_primitives.h>
__global__ void running_sums(const float4* x, int tiles, float* y) {      // two buffers: one fills while one is used
  __shared__ float4 buffer[2][64];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&buffer[0][t], &x[t], 16);
  __pipeline_commit();
  float sum = 0.f;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) __pipeline_memcpy_async(&buffer[(tile + 1) % 2][t], &x[(tile + 1) * 64 + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float4 other = buffer[tile % 2][63 - t];
    sum += other.x + other.y + other.z + other.w;
    y[tile * 64 + t] = sum;
    __syncthreads();
  }
}
"""

HALF = r"""
#include <cuda_fp16.h>
__global__ void axpy(const __half2* x, float a, int n, __half2* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n / 2) y[i] = __hfma2(__float2half2_rn(a), x[i], y[i]);
}
"""

VOTES = r"""
__global__ void compact(const float* x, int n, int* out) {        // where the positive values of each warp go
  int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  unsigned positive = __ballot_sync(0xffffffffu, i < n && x[i] > 0.f);
  int before = __popc(positive & ((1u << lane) - 1));
  int any = __syncthreads_or(positive == 0xffffffffu);
  if (i < n) out[i] = any ? -1 : before;
}
"""

STRUCT = r"""
struct Line { float slope, offset; int every; };
__constant__ float weights[3] = {0.5f, 0.25f, 0.125f};
__global__ void evaluate(Line line, int n, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = i % line.every ? line.slope * i + line.offset : weights[i % 3];
}
"""


@dataclass(frozen=True)
class Case:
    """A kernel, how it is launched, with what, and what comes out."""

    source: str
    arguments: Callable
    expected: Callable
    grid: object
    block: object
    template: tuple = ()
    shared: int = 0
    tolerance: float = 1e-5


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def attention(q, k, v, _n, scale, _o):
    s = q.astype(np.float64) @ k.T * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def running_sums(x, tiles, _y):
    return np.cumsum(x.reshape(tiles, 64, 4).sum(-1)[:, ::-1], axis=0)


def positions(x, _n, out):
    positive = np.zeros(256, bool)
    positive[: len(x)] = x > 0
    warps = positive.reshape(8, 32)
    return (np.cumsum(warps, 1) - warps).reshape(-1)[: len(out)]


LINE = np.array((0.5, 2.0, 4), dtype=[("slope", "f4"), ("offset", "f4"), ("every", "i4")])[()]

CASES = {
    "flash attention, 66 KB of shared memory": Case(
        FLASH,
        lambda r: (normal(r, 100, 64), normal(r, 100, 64), normal(r, 100, 64), 100, 0.125, np.zeros((100, 64), np.float32)),
        attention, 13, (32, 8), template=(64, 128), shared=4 * 128 * (65 + 64)),
    "cp.async, two buffers": Case(
        COPY_ASYNC, lambda r: (normal(r, 5 * 256), 5, np.zeros((5, 64), np.float32)), running_sums, 1, 64),
    "half2 arithmetic": Case(
        HALF, lambda r: (normal(r, 256).astype(np.float16), 0.5, 256, normal(r, 256).astype(np.float16)),
        lambda x, a, _, y: a * x.astype(np.float32) + y, 1, 128, tolerance=1e-2),
    "votes": Case(
        VOTES, lambda r: (normal(r, 200), 200, np.zeros(200, np.int32)), positions, 2, 128, tolerance=0),
    "a struct by value, constant memory": Case(
        STRUCT, lambda r: (LINE, 100, np.zeros(100, np.float32)),
        lambda line, n, _: np.where(np.arange(n) % 4, 0.5 * np.arange(n) + 2, 0.5 ** (1 + np.arange(n) % 3)), 1, 128),
}  # fmt: skip

# Wrong kernels, each with the tool of compute-sanitizer that sees it: ours must see the same.
MISTAKES = {
    "a missing barrier": ("racecheck", r"""
__global__ void reverse(float* x) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[127 - threadIdx.x];
}"""),
    "one element too far": ("memcheck", r"""
__global__ void shift(float* x) {
  x[threadIdx.x] = x[threadIdx.x + 4096];
}"""),
    "a misaligned float4": ("memcheck", r"""
__global__ void vectors(float* x) {
  float4 v = *(float4*)(x + 1);
  x[threadIdx.x] = v.x;
}"""),
    "a barrier that half of the block skips": ("synccheck", r"""
__global__ void half_way(float* x) {
  if (threadIdx.x < 48) { __syncthreads(); x[threadIdx.x] = 1.f; }
}"""),
}  # fmt: skip
