"""What a lane did first is judged first, whichever ways the lanes of a warp went; and what nobody wrote is nobody's to read."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

pytestmark = pytest.mark.usefixtures("compiler")


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def kinds(report):
    return [problem.kind for problem in report.problems]


LOOPS_OF_UNEQUAL_LENGTH = r"""
__global__ void causal(const float* x, float* out, int n) {
  __shared__ float p[32][33];
  int row = threadIdx.x;
  for (int j = 0; j <= row; ++j) p[row][j] = expf(x[row * n + j]);
  for (int j = row + 1; j < n; ++j) p[row][j] = 0.f;
  float sum = 0.f;
  for (int j = 0; j < n; ++j) sum += p[row][j];
  for (int j = 0; j < n; ++j) out[row * n + j] = p[row][j] / sum;
}"""


def test_a_lane_reads_what_it_wrote_in_loops_of_unequal_length():
    x, out = np.random.default_rng(0).standard_normal((32, 32), dtype=np.float32), zeros(32, 32)
    report = cuda.compile(LOOPS_OF_UNEQUAL_LENGTH).check[1, 32](x, out, 32)
    assert report.ok, str(report)
    e = np.tril(np.exp(x))
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=1e-5)
    assert report.global_loaded == 4 * 32 * 33 // 2 and report.global_stored == 4 * 32 * 32


IN_DIFFERENT_ORDERS = r"""
__device__ void put(float* s, int i, float v) { s[i] = v; }
__global__ void k(float* y, int n) {
  __shared__ float s[32][9];
  int lane = threadIdx.x;
  for (int i = 0; i < n; ++i) {
    if ((i + lane) % 3 == 0)
      s[lane][i] = 1.f;
    else if ((i + lane) % 3 == 1)
      put(s[lane], i, 2.f);
    else
      s[lane][i] = s[lane][i - (i > 0)] = 4.f;
    if (i % (1 + lane % 4)) continue;
    y[lane] += s[lane][i];
  }
}"""


def test_lanes_that_come_to_the_same_places_in_different_orders():
    y, expected = zeros(32), zeros(32)
    for lane in range(32):
        for i in range(9):
            if i % (1 + lane % 4) == 0:
                expected[lane] += (1, 2, 4)[(i + lane) % 3]
    report = cuda.compile(IN_DIFFERENT_ORDERS).check[1, 32](y, 9)
    assert report.ok, str(report)
    assert (y == expected).all()


LANES_THAT_LEAVE_EARLY = r"""
__global__ void k(const int* steps, float* y) {
  __shared__ volatile float s[64];
  int t = threadIdx.x, n = steps[t];
  while (true) {
    s[t] = n;
    if (n-- == 0) break;
    float v = s[t];
    s[t] = v + 1.f;
  }
  y[t] = s[t];
}"""


def test_lanes_that_leave_a_loop_early():
    steps = np.random.default_rng(0).integers(0, 40, 64).astype(np.int32)
    report = cuda.compile(LANES_THAT_LEAVE_EARLY).check[1, 64](steps, zeros(64))
    assert report.ok, str(report)
    assert report.shared_stored == 4 * (2 * steps.sum() + 64)  # a group of lanes is counted once


def test_logs_that_are_cut_in_the_middle_keep_the_order():
    source = LOOPS_OF_UNEQUAL_LENGTH.replace(
        "for (int j = 0; j <= row; ++j)", "for (int r = 0; r < 60; ++r) for (int j = 0; j <= row; ++j)"
    )
    x = zeros(32, 32)
    assert cuda.compile(source).check[1, 32](x, zeros(32, 32), 32).ok


def test_under_divergence_too_what_nobody_wrote_is_reported():
    source = LOOPS_OF_UNEQUAL_LENGTH.replace("int j = row + 1; j < n;", "int j = row + 2; j < n;")
    report = cuda.compile(source).check[1, 32](zeros(32, 32), zeros(32, 32), 32)
    assert kinds(report)[0] == "unwritten shared memory" and report.problems[0].line == 8


@pytest.mark.parametrize(
    "declaration, update",
    [
        ("int n", "atomicAdd(&n, 1)"),
        ("int n", "atomicMax(&n, 3)"),
        ("unsigned n", "atomicOr(&n, 1u << threadIdx.x)"),
        ("float n", "atomicAdd(&n, 1.f)"),
        ("unsigned long long n", "atomicCAS(&n, 0ull, 1ull)"),
    ],
)
def test_an_atomic_on_shared_memory_that_nobody_wrote_is_reported(declaration, update):
    source = f"""
__global__ void k(float* out) {{
  __shared__ {declaration};
  {update};
  __syncthreads();
  out[threadIdx.x] = n;
}}"""
    (problem,) = cuda.compile(source).check[1, 32](zeros(32)).problems
    assert problem.kind == "unwritten shared memory" and problem.line == 4
    assert "updates atomically shared n[0], which no thread of the block has written" in problem.message
    assert (
        cuda.compile(
            source.replace(update, f"n = 0; __syncthreads(); {update}").replace("n = 0", "if (!threadIdx.x) n = 0")
        )
        .check[1, 32](zeros(32))
        .ok
    )


def test_an_exchange_may_be_the_first_to_write():
    source = (
        "__global__ void k(int* out) { __shared__ int n; atomicExch(&n, 5); __syncthreads(); out[threadIdx.x] = n; }"
    )
    out = zeros(32, dtype=np.int32)
    assert cuda.compile(source).check[1, 32](out).ok and (out == 5).all()


@pytest.mark.parametrize(
    "access",
    [
        "float4 v = *(float4*)&s[4 * t]; y[t] = v.w;",
        "y[t] = ((float2*)s)[t + 32].y;",
        "P p = ((P*)s)[t]; y[t] = p.b;",
        "float v[2]; memcpy(v, s + 2 * t, 8); y[t] = v[1];",
        "wmma::fragment<wmma::accumulator, 16, 16, 16, float> f; wmma::load_matrix_sync(f, s, 16, wmma::mem_row_major); y[t] = f.x[7];",
    ],
    ids=["float4", "float2", "struct", "memcpy", "wmma"],
)
def test_every_way_to_read_is_checked(access):
    source = f"""
#include <mma.h>
using namespace nvcuda;
struct P {{ float a, b, c; }};
__global__ void k(float* y) {{
  __shared__ __align__(16) float s[256];
  int t = threadIdx.x;
  s[t] = 1.f;
  __syncthreads();
  {access}
}}"""
    report = cuda.compile(source).check[1, 32](zeros(32))
    assert kinds(report) == ["unwritten shared memory"] and report.problems[0].line == 10


STRUCTS = r"""
struct P { float a, b, c, d, e; short f; };
__global__ void k(const P* x, P* y) {
  __shared__ P s[32];
  int t = threadIdx.x;
  s[t] = x[t];
  __syncthreads();
  y[t] = s[31 - t];
}"""


def test_a_copied_struct_is_seen_in_pieces():
    fields = [(name, "f4") for name in "abcde"] + [("f", "i2"), ("", "i2")]
    x = np.zeros(32, np.dtype(fields))
    x["e"] = np.arange(32)
    y = np.zeros_like(x)
    report = cuda.compile(STRUCTS).check[1, 32](x, y)
    assert report.ok, str(report)
    assert (y["e"] == x["e"][::-1]).all()
    assert report.global_loaded == report.global_stored == report.shared_stored == 24 * 32


def test_memset_and_memcpy_count_as_what_they_touch():
    report = cuda.compile("""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  if (threadIdx.x == 0) memset(s, 0, sizeof s);
  __syncthreads();
  memcpy(&s[threadIdx.x], &x[threadIdx.x], 4);
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x] + s[threadIdx.x + 32];
}""").check[1, 32](zeros(32), zeros(32))
    assert report.ok, str(report)
    assert (report.global_loaded, report.shared_stored) == (128, 256 + 128)


IN_AND_OUT = r"""
struct Three { float x, y, z; __device__ Three() {} __device__ Three(float a, float b, float c) : x(a), y(b), z(c) {} };
struct Many { float v[8]; };
__device__ __noinline__ Three minus(Three a, Three b) { return Three(a.x - b.x, a.y - b.y, a.z - b.z); }
__device__ float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ Many twice(Many a) { for (int i = 0; i < 8; ++i) a.v[i] *= 2.f; return a; }
__global__ void k(const float4* x, float4* y, Many* z) {
  __shared__ Three f, s;
  __shared__ float4 t[32];
  __shared__ Many m;
  int i = threadIdx.x;
  if (i == 0) {
    Three one(1.f, 2.f, 3.f), two(3.f, 2.f, 1.f);
    f = minus(two, one);
    s = minus(f, one);
    m = twice(*z);
    *z = twice(m);
  }
  t[i] = plus(x[i], x[i]);
  y[i] = plus(t[i], x[i]);
  __syncthreads();
  y[i].x = f.x + s.z;
}"""


def test_structs_that_go_in_and_out_of_functions_are_seen(compiler):  # noqa: F811
    x, y, z = np.ones((32, 4), "f4"), np.zeros((32, 4), "f4"), np.ones(1, [("v", "f4", 8)])
    report = cuda.compile(IN_AND_OUT).check[1, 32](x, y, z)
    assert report.ok, str(report)
    assert (y == [2 - 5, 3, 3, 3]).all() and (z["v"] == 4).all()
    assert report.global_loaded == 2 * 512 + 32 and report.global_stored == 512 + 128 + 32
    short = cuda.compile(IN_AND_OUT).check[1, 32](x, y[:31].copy(), z)
    assert "OUT OF BOUNDS" in str(short)
