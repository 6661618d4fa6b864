"""Every way to declare shared memory: what the checked build takes, the plain one takes too, with the same result."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

pytestmark = pytest.mark.usefixtures("compiler")

# Each declares a `put(i, v)` and a `get(i)`.
DECLARATIONS = {
    "an array": "__shared__ float s[32];",
    "alignas behind": "__shared__ alignas(16) float s[32];",
    "alignas before": "alignas(16) __shared__ float s[32];",
    "__align__": "__shared__ __align__(16) float s[32];",
    "an attribute": "__attribute__((aligned(32))) __shared__ float s[32];",
    "static": "static __shared__ float s[32];",
    "static behind": "__shared__ static float s[32];",
    "the type first": "float __shared__ s[32];",
    "two words first": "static volatile float __shared__ s[32];",
    "volatile": "volatile __shared__ float s[32];",
    "volatile behind": "__shared__ volatile float s[32];",
    "several": "__shared__ float r[4][4], s[32], t;",
    "over lines": "__shared__ float  // of a warp\n      s[32]\n      ;",
    "after a pragma": "\n  #pragma unroll\n  for (int i = 0; i < 2; ++i) ;\n  __shared__ float s[32];",
    "in a macro's size": "\n  #define N 32\n  __shared__ float s[N];",
    "a template's type": "__shared__ Pair<float, 2>::type s[32];",
    "dynamic": "extern __shared__ float s[];",
    "dynamic, the type first": "extern float __shared__ s[];",
    "dynamic, extern behind": "__shared__ extern float s[];",
    "dynamic, aligned": "extern __shared__ __align__(16) float s[];",
    "dynamic, aligned before": "alignas(16) extern __shared__ float s[];",
    "dynamic, volatile": "extern volatile __shared__ float s[];",
}
KERNEL = """
template <class T, int N> struct Pair { typedef T type; };
__global__ void k(const float* x, float* y) {
  DECLARATION
  int i = threadIdx.x;
  s[i] = x[i];
  __syncthreads();
  y[i] = s[31 - i];
}"""


def both_ways(source, shared=0, **how):
    kernel, x = cuda.compile(source, **how), np.arange(32, dtype=np.float32)
    checked, plain = np.zeros(32, np.float32), np.zeros(32, np.float32)
    report = kernel.check[1, 32, shared](x, checked)
    assert report.ok, str(report)
    kernel.fast[1, 32, shared](x, plain)
    assert (checked == plain).all()
    return report, checked


@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_declaration_of_shared_memory(name):
    declaration = DECLARATIONS[name]
    report, y = both_ways(KERNEL.replace("DECLARATION", declaration), 128 if "extern" in declaration else 0)
    assert (y == np.arange(32)[::-1]).all()
    assert report.shared_bytes == (196 if name == "several" else 128)
    assert next(row.line for row in report.rows if row.kind == "store") == 6 + declaration.count("\n")


def test_dynamic_memory_as_rows_and_under_two_names():
    report, y = both_ways(
        """
__global__ void k(const float* x, float* y) {
  extern __shared__ float rows[][8];
  extern __shared__ float all[];
  int i = threadIdx.x;
  rows[i / 8][i % 8] = x[i];
  __syncthreads();
  y[i] = all[31 - i];
}""",
        128,
    )
    assert (y == np.arange(32)[::-1]).all()


def test_unions_structs_and_types_with_constructors():
    _, y = both_ways("""
struct Sum { float v; __device__ Sum() : v(0.f) {} __device__ Sum(float x) : v(x) {} };
__global__ void k(const float* x, float* y) {
  __shared__ union { float f[32]; int i[32]; } u;
  __shared__ struct { float a[32]; int n; } p, q;
  __shared__ float4 v[8];
  __shared__ Sum sums[32];
  int t = threadIdx.x;
  u.f[t] = x[t]; p.a[t] = x[t]; q.a[t] = 1.f; sums[t] = Sum(x[t]);
  ((float*)v)[t] = x[t];
  __syncthreads();
  y[t] = u.f[31 - t] + p.a[31 - t] + q.a[t] + sums[31 - t].v + v[(31 - t) / 4].x;
}""")
    back = np.arange(32)[::-1]
    assert (y == 3 * back + 1 + back // 4 * 4).all()


def test_shared_memory_of_a_template_and_of_a_device_function():
    _, y = both_ways(
        """
template <class T, int N> __device__ T turned(T v, int t) {
  static __shared__ T s[N];
  s[t] = v;
  __syncthreads();
  return s[N - 1 - t];
}
template <int N> __global__ void k(const float* x, float* y) {
  int t = threadIdx.x;
  y[t] = turned<float, N>(x[t], t) + (float)turned<int, N>(t, t);
}""",
        template=(32,),
    )
    assert (y == 2 * np.arange(32)[::-1]).all()
