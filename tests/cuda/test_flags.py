"""Flags and counters: what a lock, a ticket or a volatile flag orders is no race, and what only looks like it is one.

The flag or the counter may be a `__device__` variable of the source or stand in an array.
"""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

# Each block waits for the flag of the one before it, and hands on a running total.
CHAIN = r"""
__global__ void k(const int* x, volatile int* flag, int* total, int* y) {
  __shared__ int before;
  int b = blockIdx.x;
  if (threadIdx.x == 0) {
    int sum = 0;
    if (b > 0) {
      while (flag[b - 1] == 0) {}
      __threadfence();
      sum = total[b - 1];
    }
    before = sum;
    for (int i = 0; i < 32; ++i) sum += x[32 * b + i];
    total[b] = sum;
    __threadfence();
    flag[b] = 1;
  }
  __syncthreads();
  y[32 * b + threadIdx.x] = before + x[32 * b + threadIdx.x];
}"""


def ints(n):
    return np.zeros(n, np.int32)


def test_a_volatile_flag_behind_a_fence_orders_blocks(compiler):  # noqa: F811
    x, y = np.arange(128, dtype=np.int32), ints(128)
    report = cuda.compile(CHAIN).check[4, 32](x, ints(4), ints(4), y)
    assert report.ok, str(report)
    before = np.cumsum(x.reshape(4, 32).sum(1)) - x.reshape(4, 32).sum(1)
    assert y.tolist() == (x + np.repeat(before, 32)).tolist()


@pytest.mark.parametrize("gone", ["    __threadfence();\n    flag", "volatile int* flag"])
def test_without_the_fence_or_the_volatile_it_is_a_race(gone, compiler):  # noqa: F811
    source = CHAIN.replace(gone, gone.replace("__threadfence();", "").replace("volatile ", ""))
    source = source.replace("while (flag[b - 1] == 0) {}", "if (flag[b - 1] == 0) sum = 1;")  # or it may wait for ever
    report = cuda.compile(source).check[4, 32](np.arange(128, dtype=np.int32), ints(4), ints(4), ints(128))
    assert "race between blocks" in [problem.kind for problem in report.problems]


def test_volatile_shared_memory_is_no_order(compiler):  # noqa: F811
    source = r"""
__global__ void k(const float* x, float* y) {
  __shared__ volatile float s[64];
  int t = threadIdx.x;
  s[t] = x[t];
  __syncthreads();
  if (t < 32) {
    s[t] += s[t + 32];
    s[t] += s[t + 16];
  }
  if (t == 0) y[0] = s[0];
}"""
    report = cuda.compile(source).check[1, 64](np.ones(64, np.float32), np.zeros(1, np.float32))
    assert [problem.kind for problem in report.problems][:1] == ["race"]


OF_THE_SOURCE = {
    "a lock": r"""
__device__ int lock = 0;
__global__ void k(int* y) {
  if (threadIdx.x == 0) {
    while (atomicCAS(&lock, 0, 1) != 0) {}
    __threadfence();
    y[0] += 1;
    __threadfence();
    atomicExch(&lock, 0);
  }
}""",
    "a ticket": r"""
__device__ unsigned tickets = 0;
__device__ int parts[8];
__global__ void k(int* y) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    y[1 + blockIdx.x] = 1;
    __threadfence();
    last = atomicInc(&tickets, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0)
    for (int b = 0; b < gridDim.x; ++b) y[0] += y[1 + b];
}""",
    "a volatile flag": r"""
__device__ volatile int turn;
__global__ void k(int* y) {
  if (threadIdx.x == 0) {
    while (turn != blockIdx.x) {}
    __threadfence();
    y[0] += 1;
    __threadfence();
    turn = blockIdx.x + 1 == gridDim.x ? 0 : blockIdx.x + 1;
  }
}""",
}


@pytest.mark.parametrize("name", OF_THE_SOURCE)
def test_a_variable_of_the_source_orders_blocks(name, compiler):  # noqa: F811
    source = OF_THE_SOURCE[name]
    y = ints(6)
    report = cuda.compile(source).check[5, 32](y)
    assert report.ok, str(report)
    assert y[0] == 5
    report = cuda.compile(source.replace("__threadfence();", "")).check[5, 32](ints(6))
    assert [problem.kind for problem in report.problems] == ["race between blocks"]


LOOPS = {
    "the largest float": (
        r"""
__global__ void k(const float* x, float* y) {
  int *bits = (int*)y, old = *bits, seen;
  float mine = x[threadIdx.x + blockIdx.x * blockDim.x];
  do {
    seen = old;
    old = atomicCAS(bits, seen, __float_as_int(fmaxf(mine, __int_as_float(seen))));
  } while (seen != old);
}""",
        lambda x: x.max(),
    ),
    "and most threads have nothing to do": (
        r"""
__global__ void k(const float* x, float* y) {
  int *bits = (int*)y, old = *bits, seen;
  float mine = x[threadIdx.x + blockIdx.x * blockDim.x];
  while (mine > __int_as_float(old)) {
    seen = old;
    old = atomicCAS(bits, seen, __float_as_int(mine));
    if (old == seen) break;
  }
}""",
        lambda x: max(x.max(), 0),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_first_read_of_a_loop_around_atomic_cas_is_no_race(name, compiler):  # noqa: F811
    source, expected = LOOPS[name]
    x, y = np.random.default_rng(0).standard_normal(128).astype(np.float32), np.zeros(1, np.float32)
    report = cuda.compile(source).check[2, 64](x, y)
    assert report.ok, str(report)
    assert y[0] == expected(x)


def test_a_plain_read_without_such_a_loop_is(compiler):  # noqa: F811
    source = "__global__ void k(const float* x, float* y) { if (y[0] < 3.f) atomicAdd(y, x[threadIdx.x]); }"
    report = cuda.compile(source).check[1, 32](np.ones(32, np.float32), np.zeros(1, np.float32))
    assert [problem.kind for problem in report.problems] == ["race"]


def test_a_counter_that_one_thread_sets_and_all_use_needs_a_barrier(compiler):  # noqa: F811
    source = r"""
__global__ void k(int* y) {
  __shared__ int n;
  if (threadIdx.x == 0) n = 0;
  atomicAdd(&n, 1);
  __syncthreads();
  y[threadIdx.x] = n;
}"""
    report = cuda.compile(source).check[1, 64](ints(64))
    assert [problem.kind for problem in report.problems] == ["race"]
    right = source.replace("  atomicAdd", "  __syncthreads();\n  atomicAdd")
    assert cuda.compile(right).check[1, 64](ints(64)).ok
