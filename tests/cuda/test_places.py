"""A place in a kernel is finer than its line, and is the kernel's own line whatever was inlined into it."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

pytestmark = pytest.mark.usefixtures("compiler")


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def global_accesses(report):
    return [(row.line, row.kind, row.array) for row in report.rows if row.space == "global"]


ROWS = r"""
template <int D> __global__ void rows(const float4* a, float4* b, int n) {
  for (int i = 0; i < n; ++i) {
    float4 v = a[i * D];
    float4 w = b[i * D + 1];
    v.x += w.y;
    b[i * D] = v;
  } }"""


@pytest.mark.parametrize(
    "type_, width, dtype", [("float4", 4, "f4"), ("float2", 2, "f4"), ("half2", 2, "f2"), ("int4", 4, "i4")]
)
def test_a_vector_in_a_template_is_at_its_line(type_, width, dtype):
    source = ROWS.replace("float4", type_)
    if type_ == "half2":
        source = source.replace("v.x += w.y", "v = __hadd2(v, w)")
    a = zeros(8, width, dtype=dtype)
    report = cuda.compile(source, template=(2,)).check[1, 1](a, a.copy(), 4)
    assert global_accesses(report) == [(4, "load", "a"), (5, "load", "b"), (7, "store", "b")]


IN_HELPERS = r"""
template <class T, int N> struct Tile {
  T data[N];
  __device__ void load(const T* from, int stride) {
    for (int i = 0; i < N; ++i)
      data[i] = from[i * stride];
  }
};
template <class T> __device__ __forceinline__ T twice(const T* p) {
  T v = *p;
  v.x += v.x;
  return v; }
__global__ void k(const float2* x, const float4* y, float4* z) {
  int t = threadIdx.x;
  Tile<float2, 3> tile;
  tile.load(x + t, 32);
  float4 v = twice(y + t);
  v.y = tile.data[0].x + tile.data[1].y + tile.data[2].x;
  z[t] = v;
}"""


def test_an_access_in_a_helper_is_at_the_helpers_line():
    report = cuda.compile(IN_HELPERS).check[1, 32](zeros(96, 2), zeros(32, 4), zeros(32, 4))
    assert global_accesses(report) == [(6, "load", "x"), (10, "load", "y"), (19, "store", "z")]


def test_a_mistake_with_a_vector_is_at_its_line():
    source = ROWS.replace("b[i * D] = v", "b[i * D + 8] = v")
    (problem,) = cuda.compile(source, template=(2,)).check[1, 1](zeros(8, 4), zeros(8, 4), 4).problems
    assert (problem.kind, problem.line) == ("out of bounds", 7)


BARRIER = """
#define WAIT __syncthreads()
#define BOTH(c) if (c) {{ __syncthreads(); }} else {{ __syncthreads(); }}
__global__ void k(float* y) {{
  {}
  y[threadIdx.x] = 1.f;
}}"""


@pytest.mark.parametrize(
    "line",
    [
        "if (threadIdx.x % 2) { __syncthreads(); } else { __syncthreads(); }",
        "if (threadIdx.x % 2) WAIT; else WAIT;",
        "BOTH(threadIdx.x < 40)",
        "int n = threadIdx.x % 2 ? __syncthreads_count(1) : __syncthreads_count(0); y[0] = n;",
        "if (threadIdx.x < 32) { __syncthreads(); } else { __syncthreads_or(1); }",
    ],
)
def test_two_barriers_on_one_line_are_two(line):
    report = cuda.compile(BARRIER.format(line)).check[1, 64](zeros(64))
    assert (report.problems[0].kind, report.problems[0].line) == ("barrier", 5)
    assert "waits at another barrier of that line" in report.problems[0].message


def test_one_barrier_stays_one_in_templates_helpers_and_unrolled_loops():
    report = cuda.compile("""
template <int N> __device__ __forceinline__ void turn(float* s, int t) {
  #pragma unroll
  for (int i = 0; i < N; ++i) { float v = s[(t + 1) % 64]; __syncthreads(); s[t] = v; __syncthreads(); }
}
__global__ void k(float* y) {
  __shared__ float s[64];
  int t = threadIdx.x;
  s[t] = y[t];
  __syncthreads();
  if (y[0] > -1.f) turn<3>(s, t); else turn<4>(s, t);
  bool odd = t % 2;
  if (odd) s[t] += 1.f;
  __syncthreads();
  if (odd) s[t] += 1.f;
  y[t] = s[t];
}""").check[1, 64](zeros(64))
    assert report.ok, str(report)


def test_two_shuffles_on_one_line_are_two():
    report = cuda.compile("""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  v = threadIdx.x % 2 ? __shfl_xor_sync(0xffffffff, v, 1) : __shfl_down_sync(0xffffffff, v, 1);
  y[threadIdx.x] = v;
}""").check[1, 32](zeros(32))
    assert [(p.kind, p.line) for p in report.problems] == [("deadlock", 4)]


def test_two_accesses_on_one_line_are_counted_apart_where_they_cost_different():
    report = cuda.compile("""
__global__ void k(const float* x, float* y) {
  int t = threadIdx.x;
  y[t] = x[t] + x[32 * t];
  y[t] += x[t] + x[t + 32];
}""").check[1, 32](zeros(1024), zeros(64))
    loads = {
        line: [r.sectors / r.requests for r in report.rows if (r.line, r.array, r.kind) == (line, "x", "load")]
        for line in (4, 5)
    }
    assert sorted(loads[4]) == [4, 32] and loads[5] == [4]
    assert report.sectors_per_request[4] == 32


RACE_BY_BARRIER = """
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = y[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];
  if (threadIdx.x < 40)
    CALL;
}"""


@pytest.mark.parametrize(
    "call, kind",
    [
        ("__syncthreads()", "barrier"),
        ("y[0] = __syncthreads_or(y[1] > 0)", "barrier"),
        ("__syncwarp()", "deadlock"),
        ("y[1] = __shfl_xor_sync(0xffffffff, y[1], 1)", "deadlock"),
    ],
)
def test_the_barrier_stands_before_the_race_that_it_caused(call, kind):
    source = RACE_BY_BARRIER.replace("CALL", call)
    if kind == "deadlock":
        source = source.replace("\n}", "\n  __syncthreads();\n}")
    report = cuda.compile(source).check[1, 64](zeros(64))
    found = [problem.kind for problem in report.problems]
    assert found[0] == kind and "race" in found
    with pytest.raises(cuda.KernelError, match="^(BARRIER|DEADLOCK)"):
        cuda.compile(source)[1, 64](zeros(64))
