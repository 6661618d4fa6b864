"""The CUDA subset: each word does on the CPU what it does on a GPU, under both compilers."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

LANES = np.arange(32)


def run(source, *outputs, grid=1, block=32, shared=0, arguments=(), **how):
    """Run a kernel whose first parameters are `outputs`, checked and plain, and compare the two; return the outputs."""
    kernel = cuda.compile(source, **how)
    first = [np.zeros_like(o) for o in outputs]
    report = kernel.check[grid, block, shared](*first, *arguments)
    assert report.ok, str(report)
    second = [np.zeros_like(o) for o in outputs]
    kernel.fast[grid, block, shared](*second, *arguments)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
    return first if len(first) > 1 else first[0]


def ints(n):
    return np.zeros(n, np.int32)


def test_indices_of_a_three_dimensional_launch(compiler):  # noqa: F811
    y = run(
        """
__global__ void k(int* y) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}""",
        ints(2 * 3 * 4 * 5 * 3 * 2),
        grid=(2, 3, 4),
        block=(5, 3, 2),
    )
    np.testing.assert_array_equal(y, np.add.outer(1000 * np.arange(24), np.arange(30)).ravel())


def test_shuffles_move_values_as_on_a_gpu(compiler):  # noqa: F811
    y = run(
        """
__global__ void k(int* y) {
  int v = 10 + threadIdx.x;
  y[threadIdx.x] = __shfl_sync(0xffffffff, v, 5);
  y[32 + threadIdx.x] = __shfl_sync(0xffffffff, v, 1, 8);
  y[64 + threadIdx.x] = __shfl_up_sync(0xffffffff, v, 3);
  y[96 + threadIdx.x] = __shfl_down_sync(0xffffffff, v, 3, 16);
  y[128 + threadIdx.x] = __shfl_xor_sync(0xffffffff, v, 6);
}""",
        ints(160),
    ).reshape(5, 32)
    segment = LANES % 16
    expected = [
        np.full(32, 15),
        10 + LANES // 8 * 8 + 1,
        10 + np.where(LANES >= 3, LANES - 3, LANES),
        10 + np.where(segment + 3 < 16, LANES + 3, LANES),
        10 + (LANES ^ 6),
    ]
    np.testing.assert_array_equal(y, expected)


def test_votes_and_masks_of_part_of_a_warp(compiler):  # noqa: F811
    y = run(
        """
__global__ void k(unsigned* y) {
  int i = threadIdx.x;
  y[i] = __ballot_sync(0xffffffff, i % 3 == 0);
  y[32 + i] = __any_sync(0xffffffff, i == 7) + 2 * __all_sync(0xffffffff, i < 31);
  if (i < 8) y[64 + i] = __ballot_sync(0x000000ff, i % 2);
  if (i < 8) y[72 + i] = __shfl_xor_sync(0x000000ff, i, 1) + 100 * __popc(__activemask() & 0xff);
}""",
        np.zeros(96, np.uint32),
    )
    assert (y[:32] == sum(1 << i for i in range(0, 32, 3))).all() and (y[32:64] == 1).all()
    assert (y[64:72] == 0b10101010).all() and (y[72:80] % 100 == np.arange(8) ^ 1).all()


def test_voting_barriers(compiler):  # noqa: F811
    y = run(
        """
__global__ void k(int* y) {
  int i = threadIdx.x;
  int count = __syncthreads_count(i % 5 == 0);
  int all = __syncthreads_and(i < 64), any = __syncthreads_or(i == 63);
  y[i] = count * 100 + all * 10 + any;
}""",
        ints(64),
        block=64,
    )
    assert (y == 13 * 100 + 11).all()


@pytest.mark.parametrize(
    "type_, dtype", [("int", np.int32), ("unsigned", np.uint32), ("unsigned long long", np.uint64)]
)
def test_integer_atomics(type_, dtype, compiler):  # noqa: F811
    y = run(
        f"""
__global__ void k({type_}* y) {{
  {type_} i = threadIdx.x;
  atomicAdd(&y[0], i); atomicMax(&y[1], i); atomicExch(&y[2], ({type_})9);
  atomicOr(&y[3], i); atomicXor(&y[4], i); atomicCAS(&y[5], ({type_})0, ({type_})(i + 1));
  atomicMin(&y[6], i); atomicAnd(&y[7], i);
}}""",
        np.zeros(8, dtype),
    )
    assert y.tolist() == [496, 31, 9, 31, 0, 1, 0, 0]


def test_floating_point_atomics(compiler):  # noqa: F811
    single, double = run(
        """
__global__ void k(float* s, double* d) {
  atomicAdd(s, 0.5f); atomicAdd(d, 0.25); atomicExch(&s[1], 3.f);
}""",
        np.zeros(2, np.float32),
        np.zeros(1),
    )
    assert single.tolist() == [16, 3] and double.tolist() == [8]


def test_half_arithmetic_rounds_as_numpy_does(compiler):  # noqa: F811
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(256).astype(np.float16) for _ in range(2))
    y = run(
        """
__global__ void k(half* y, const half* a, const half* b) {
  int i = threadIdx.x;
  y[i] = __hadd(a[i], b[i]);
  y[256 + i] = a[i] * b[i];
  y[512 + i] = __float2half(__half2float(a[i]) * 3.f);
  y[768 + i] = __hmax(a[i], -b[i]);
}""",
        np.zeros(1024, np.float16),
        block=256,
        arguments=(a, b),
    ).reshape(4, 256)
    np.testing.assert_array_equal(y, [a + b, a * b, (a.astype(np.float32) * 3).astype(np.float16), np.maximum(a, -b)])


def test_every_half_converts_there_and_back(compiler):  # noqa: F811
    bits = np.arange(65536, dtype=np.uint16)
    back, wide = run(
        """
__global__ void k(half* back, float* wide, const half* x) {
  int i = blockIdx.x * 1024 + threadIdx.x;
  wide[i] = __half2float(x[i]);
  back[i] = __float2half(wide[i]);
}""",
        np.zeros(65536, np.float16),
        np.zeros(65536, np.float32),
        grid=64,
        block=1024,
        arguments=(bits.view(np.float16),),
    )
    np.testing.assert_array_equal(wide, bits.view(np.float16).astype(np.float32))
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(back.view(np.uint16)[number], bits[number])


def test_floats_round_to_the_nearest_half_and_bfloat16(compiler):  # noqa: F811
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    x = np.where(np.isnan(x), np.float32(0), x)
    h, b = run(
        """
__global__ void k(half* h, nv_bfloat16* b, const float* x) {
  int i = blockIdx.x * 1024 + threadIdx.x;
  h[i] = __float2half(x[i]);
  b[i] = __float2bfloat16(x[i]);
}""",
        np.zeros(4096, np.float16),
        np.zeros(4096, np.uint16),
        grid=4,
        block=1024,
        arguments=(x,),
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(h, x.astype(np.float16))
    np.testing.assert_array_equal(b.view(np.int16), torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy())


def test_pairs_of_halves(compiler):  # noqa: F811
    x = np.random.default_rng(0).standard_normal(64).astype(np.float16)
    y = run(
        """
__global__ void k(float* y, const half2* x) {
  half2 v = x[threadIdx.x];
  half2 w = __hfma2(v, __float2half2_rn(2.f), __half2half2(__low2half(v)));
  float2 f = __half22float2(w);
  half2 back = __float22half2_rn(f);
  y[2 * threadIdx.x] = __low2float(back);
  y[2 * threadIdx.x + 1] = __high2float(back);
}""",
        np.zeros(64, np.float32),
        arguments=(x,),
    ).reshape(32, 2)
    pairs = x.astype(np.float32).reshape(32, 2)
    np.testing.assert_allclose(y, pairs * 2 + pairs[:, :1], rtol=2e-3)


def test_vector_types_and_constants_and_device_functions(compiler):  # noqa: F811
    y = run(
        """
__constant__ float weights[4] = {1.f, 10.f, 100.f, 1000.f};
__device__ __forceinline__ float dot(float4 a) {
  return a.x * weights[0] + a.y * weights[1] + a.z * weights[2] + a.w * weights[3];
}
__global__ void k(float* y) {
  int i = threadIdx.x;
  float4 v = make_float4(i, i + 1, i + 2, i + 3);
  int2 p = make_int2(i, 2);
  double2 d = make_double2(0.5, p.y);
  uint4 u = make_uint4(1, 2, 3, 4);
  y[i] = dot(v) + (float)d.x + u.w;
}""",
        np.zeros(32, np.float32),
    )
    np.testing.assert_array_equal(y, LANES + 10 * (LANES + 1) + 100 * (LANES + 2) + 1000 * (LANES + 3) + 4.5)


def test_static_and_dynamic_shared_memory_together(compiler):  # noqa: F811
    y = run(
        """
template <int N>
__global__ void k(float* y) {
  __shared__ float fixed[N], one;
  extern __shared__ float4 dynamic[];
  int i = threadIdx.x;
  if (i == 0) one = 1.f;
  fixed[i] = i;
  dynamic[i] = make_float4(i, 0.f, 0.f, 2.f);
  __syncthreads();
  y[i] = fixed[N - 1 - i] + dynamic[(i + 1) % N].w + one;
}""",
        np.zeros(64, np.float32),
        block=64,
        shared=64 * 16,
        template=(64,),
    )
    np.testing.assert_array_equal(y, 63 - np.arange(64) + 3)


def test_a_shared_array_in_a_device_function(compiler):  # noqa: F811
    y = run(
        """
__device__ float block_sum(float x) {
  __shared__ float partial[64];
  partial[threadIdx.x] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < 64; ++i) sum += partial[i];
  __syncthreads();
  return sum;
}
__global__ void k(float* y) { y[threadIdx.x] = block_sum(1.f) + block_sum(threadIdx.x); }""",
        np.zeros(64, np.float32),
        block=64,
    )
    assert (y == 64 + 2016).all()


def test_an_optional_array_may_be_none(compiler):  # noqa: F811
    y = run(
        "__global__ void k(int* y, const int* mask) { y[threadIdx.x] = mask ? mask[threadIdx.x] : 5; }",
        ints(32),
        arguments=(None,),
    )
    assert (y == 5).all()


def test_cp_async_fills_with_zeros(compiler):  # noqa: F811
    y = run(
        """
__global__ void k(float* y, const float* x) {
  __shared__ float4 s[32];
  int i = threadIdx.x;
  __pipeline_memcpy_async(&s[i], &reinterpret_cast<const float4*>(x)[i], 16, i % 2 ? 8 : 0);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[4 * i] = s[i].x; y[4 * i + 1] = s[i].y; y[4 * i + 2] = s[i].z; y[4 * i + 3] = s[i].w;
}""",
        np.zeros(128, np.float32),
        arguments=(np.ones(128, np.float32),),
    ).reshape(32, 4)
    np.testing.assert_array_equal(y[0::2], 1)
    np.testing.assert_array_equal(y[1::2], np.tile([1, 1, 0, 0], (16, 1)))


def test_printf_and_its_order(capsys):
    kernel = cuda.compile(r"""
__global__ void k(int* x) {
  if (threadIdx.x < 2) printf("%d of %d: %.1f\n", threadIdx.x, 2, 0.5);
}""")
    kernel[2, 32](ints(1))
    assert capsys.readouterr().out == "0 of 2: 0.5\n1 of 2: 0.5\n" * 2
    kernel.fast[1, 32](ints(1))
    assert capsys.readouterr().out == "0 of 2: 0.5\n1 of 2: 0.5\n"
    assert kernel.check[1, 32](ints(1)).output == "0 of 2: 0.5\n1 of 2: 0.5\n" and capsys.readouterr().out == ""


def test_infinities_and_fast_mathematics(compiler):  # noqa: F811
    y = run(
        """
__global__ void k(float* y) {
  float m = -INFINITY;
  y[0] = fmaxf(m, 1.f); y[1] = __expf(m - 1.f); y[2] = rsqrtf(4.f); y[3] = __fdividef(1.f, 4.f); y[4] = max(2, 3);
  y[5] = exp2f(3.f); y[6] = isinf(m) ? 1.f : 0.f; y[7] = __saturatef(2.f);
  y[8] = __int_as_float(0x40000000); y[9] = min(1.f, 2.f);
}""",
        np.zeros(10, np.float32),
        block=1,
    )
    np.testing.assert_allclose(y, [1, 0, 0.5, 0.25, 3, 8, 1, 1, 2, 1])
