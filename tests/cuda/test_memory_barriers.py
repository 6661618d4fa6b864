"""Barriers that live in shared memory: cuda::barrier, cuda::pipeline, PTX's mbarrier, and the copies that they wait for."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.test_groups import compile_for_gpu
from utils import cuda

BEGIN = r"""
#include <cuda/barrier>
#include <cuda/pipeline>
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
using barrier = cuda::barrier<cuda::thread_scope_block>;
"""
MADE = "if (threadIdx.x == 0) init(&bar, blockDim.x);\n  __syncthreads();"
TURNS = (
    BEGIN
    + r"""
__global__ void k(const float* x, float* y) {
  __shared__ barrier bar;
  __shared__ float s[64];
  MADE
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = x[threadIdx.x] + i;
    bar.arrive_and_wait();
    y[threadIdx.x] += s[63 - threadIdx.x];
    bar.arrive_and_wait();
  }
}""".replace("MADE", MADE)
)


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run(source, x, size, expected, block=64, **how):
    """The kernel `k(x, y)` or `k(x, y, len(x))`, checked and plain, against what is expected; and compiled for a GPU."""
    kernel = cuda.compile(source, **how)
    more = (len(x),) if len(kernel.parameters) == 3 else ()
    y, z = np.zeros((2, size), x.dtype)
    report = kernel.check[1, block](x, y, *more)
    assert report.ok, str(report)
    kernel.fast[1, block](x, z, *more)
    np.testing.assert_allclose(y, expected.reshape(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y, z)
    if not how:
        compile_for_gpu(source)
    return report


def problems(source, x, block=64):
    kernel = cuda.compile(source)
    more = (len(x),) if len(kernel.parameters) == 3 else ()
    return kernel.check[1, block](x, np.zeros(256, x.dtype), *more).problems


def line_of(source, text):
    return source[: source.index(text)].count("\n") + 1


def test_all_threads_meet_at_a_barrier_in_memory(compiler):  # noqa: F811
    x = numbers(64)
    run(TURNS, x, 64, 3 * x[::-1] + 3)


def test_each_barrier_that_is_left_out_is_a_race(compiler):  # noqa: F811
    for part in (0, 1):
        pieces = TURNS.split("bar.arrive_and_wait();")
        source = ("bar.arrive_and_wait();" if part else ";").join(pieces[:2]) + (
            ";" if part else "bar.arrive_and_wait();"
        )
        found = problems(source + pieces[2], numbers(64))
        assert "race" in [problem.kind for problem in found], part


MISTAKES = {
    "not waited for by its maker": (TURNS.replace("  __syncthreads();", ""), "race", "bar.arrive_and_wait"),
    "never made": (TURNS.replace("init(&bar, blockDim.x)", "s[0] = 0.f"), "barrier", "bar.arrive_and_wait"),
    "waits for one too many": (TURNS.replace("blockDim.x)", "blockDim.x + 1)"), "deadlock", "bar.arrive_and_wait"),
    "waits for one too few": (TURNS.replace("blockDim.x)", "blockDim.x - 1)"), "deadlock", "bar.arrive_and_wait"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_with_a_barrier_is_named_at_its_line(name, compiler):  # noqa: F811
    source, kind, text = MISTAKES[name]
    found = problems(source, numbers(64))
    assert found and found[0].kind == kind, found
    lines = [number for number, line in enumerate(source.split("\n"), 1) if text in line or "init(" in line]
    assert found[0].line in lines, (found[0], lines)


COPIES = (
    BEGIN
    + r"""
__global__ void k(const float* x, float* y, int n) {
  __shared__ barrier bar;
  __shared__ alignas(16) float s[128];
  auto block = cg::this_thread_block();
  if (block.thread_rank() == 0) init(&bar, block.size());
  block.sync();
  for (int t = 0; t < n; ++t) {
    cuda::memcpy_async(block, s, x + 128 * t, cuda::aligned_size_t<16>(sizeof(s)), bar);
    barrier::arrival_token token = bar.arrive();
    float mine = t;
    bar.wait(cuda::std::move(token));
    y[threadIdx.x] += s[127 - threadIdx.x] + mine;
    block.sync();
  }
}"""
)


def test_a_copy_lands_when_its_barrier_opens(compiler):  # noqa: F811
    x = numbers(4, 128)
    report = run(COPIES, x, 128, x.sum(0)[::-1] + 6, block=128)
    assert report.global_loaded == x.nbytes + 4 * 128 * 4  # every tile once; y is read too


def test_a_copy_that_is_read_too_early_is_reported(compiler):  # noqa: F811
    found = problems(COPIES.replace("bar.wait(cuda::std::move(token));", ""), numbers(4, 128), 128)
    assert found[0].kind == "async copy"
    assert found[0].line == line_of(COPIES, "y[threadIdx.x] += s")


HANDED_ON = (
    BEGIN
    + r"""
__device__ void produce(barrier free[], barrier full[], float* buffer, const float* in, int n) {
  for (int i = 0; i < n / 32; ++i) {
    free[i % 2].arrive_and_wait();
    buffer[i % 2 * 32 + threadIdx.x] = in[i * 32 + threadIdx.x];
    barrier::arrival_token token = full[i % 2].arrive();
  }
}
__device__ void consume(barrier free[], barrier full[], const float* buffer, float* out, int n) {
  barrier::arrival_token a = free[0].arrive(), b = free[1].arrive();
  for (int i = 0; i < n / 32; ++i) {
    full[i % 2].arrive_and_wait();
    out[i * 32 + threadIdx.x % 32] = 2 * buffer[i % 2 * 32 + 31 - threadIdx.x % 32];
    barrier::arrival_token token = free[i % 2].arrive();
  }
}
__global__ void k(const float* in, float* out, int n) {
  __shared__ float buffer[64];
  __shared__ barrier bar[4];
  if (threadIdx.x < 4) init(bar + threadIdx.x, blockDim.x);
  __syncthreads();
  if (threadIdx.x < 32) produce(bar, bar + 2, buffer, in, n);
  else consume(bar, bar + 2, buffer, out, n);
}"""
)


def test_one_warp_fills_buffers_that_another_empties(compiler):  # noqa: F811
    x = numbers(256)
    run(HANDED_ON, x, 256, 2 * x.reshape(-1, 32)[:, ::-1])
    found = problems(HANDED_ON.replace("full[i % 2].arrive_and_wait();", "full[i % 2].arrive();"), x)
    assert {"deadlock", "unwritten shared memory"} <= {problem.kind for problem in found}


STAGES = (
    BEGIN
    + r"""
template <int S> __global__ void k(const float* x, float* y, int n) {
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, S> state;
  __shared__ float buffer[S][64];
  auto block = cg::this_thread_block();
  auto pipe = cuda::make_pipeline(block, &state);
  for (int i = 0, fetched = 0; i < n; ++i) {
    for (; fetched < n && fetched < i + S; ++fetched) {
      pipe.producer_acquire();
      cuda::memcpy_async(block, buffer[fetched % S], x + 64 * fetched, cuda::aligned_size_t<4>(256), pipe);
      pipe.producer_commit();
    }
    pipe.consumer_wait();
    y[64 * i + threadIdx.x] = buffer[i % S][63 - threadIdx.x];
    pipe.consumer_release();
  }
}"""
)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_pipeline_of_a_block(stages, compiler):  # noqa: F811
    x = numbers(5, 64)
    run(STAGES, x, 320, x[:, ::-1], template=(stages,))


def test_a_pipeline_of_a_block_without_its_wait(compiler):  # noqa: F811
    kernel = cuda.compile(STAGES.replace("pipe.consumer_wait();", ""), template=(2,))
    report = kernel.check[1, 64](numbers(5, 64), np.zeros(320, np.float32), 5)
    assert "async copy" in [problem.kind for problem in report.problems]


def test_a_pipeline_of_one_thread(compiler):  # noqa: F811
    source = (
        BEGIN
        + r"""
__global__ void k(const float* x, float* y, int n) {
  __shared__ float4 buffer[2][32];
  const float4* rows = (const float4*)x;
  auto pipe = cuda::make_pipeline();
  for (int i = 0; i <= n; ++i) {
    pipe.producer_acquire();
    if (i < n) cuda::memcpy_async(&buffer[i % 2][threadIdx.x], rows + 32 * i + threadIdx.x, cuda::aligned_size_t<16>(16), pipe);
    pipe.producer_commit();
    if (i == 0) continue;
    cuda::pipeline_consumer_wait_prior<1>(pipe);
    __syncthreads();
    y[32 * (i - 1) + threadIdx.x] = buffer[(i - 1) % 2][31 - threadIdx.x].y;
    __syncthreads();
  }
}"""
    )
    x = numbers(3, 128)
    run(source, x, 96, x.reshape(3, 32, 4)[:, ::-1, 1], block=32)


# ---- the same in PTX, with bulk copies

PTX = r"""
__device__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void make(void* b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at(b)), "r"(n)); }
__device__ void expect(void* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" :: "r"(at(b)), "r"(bytes) : "memory");
}
__device__ void wait(void* b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n"
      "}\n" :: "r"(at(b)), "r"(parity) : "memory");
}
__device__ void fetch(void* to, const void* from, int bytes, void* b) {
  expect(b, bytes);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(at(to)), "l"(from), "r"(bytes), "r"(at(b)) : "memory");
}
"""
BULK = (
    PTX
    + r"""
__global__ void k(const float* x, float* y, int n) {
  __shared__ alignas(128) float tile[2][64];
  __shared__ alignas(8) unsigned long long full[2];
  bool first = threadIdx.x == 0;
  if (first) {
    make(&full[0], 1);
    make(&full[1], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (first) fetch(tile[0], x, 256, &full[0]);
  for (int i = 0; i < n; ++i) {
    if (first && i + 1 < n) fetch(tile[(i + 1) % 2], x + 64 * (i + 1), 256, &full[(i + 1) % 2]);
    wait(&full[i % 2], i / 2 % 2);
    y[threadIdx.x] += tile[i % 2][63 - threadIdx.x];
    __syncthreads();
  }
}"""
)


def test_bulk_copies_of_tiles(compiler):  # noqa: F811
    x = numbers(5, 64)
    report = run(BULK, x, 64, x.sum(0)[::-1])
    assert report.global_loaded == x.nbytes + 5 * 64 * 4
    assert report.sector_bytes_loaded == x.nbytes + 5 * 64 * 4  # every sector of a tile once


def test_bulk_copies_that_are_not_waited_for_or_bring_too_little(compiler):  # noqa: F811
    found = problems(BULK.replace("    wait(&full[i % 2], i / 2 % 2);\n", ""), numbers(5, 64))
    assert (found[0].kind, found[0].line) == ("async copy", line_of(BULK, "y[threadIdx.x] +=") - 1), found
    found = problems(BULK.replace("expect(b, bytes)", "expect(b, bytes + 16)"), numbers(5, 64))
    assert found[-1].kind == "deadlock" and "bytes that never come" in found[-1].message
    found = problems(BULK.replace("    __syncthreads();\n  }\n", "  }\n"), numbers(5, 64))
    assert "race" in [problem.kind for problem in found]


def test_a_bulk_store_and_cp_async_that_a_barrier_follows(compiler):  # noqa: F811
    source = (
        PTX
        + r"""
__global__ void k(const float* x, float* y) {
  __shared__ alignas(128) float tile[64];
  __shared__ alignas(8) unsigned long long full;
  if (threadIdx.x == 0) make(&full, 64);
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(at(&tile[threadIdx.x])), "l"(x + threadIdx.x));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(at(&full)));
  wait(&full, 0);
  float v = 2 * tile[63 - threadIdx.x];
  __syncthreads();
  tile[threadIdx.x] = v;
  unsigned long long state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(at(&full)));
  asm volatile("{ .reg .pred over; W: mbarrier.test_wait.shared.b64 over, [%0], %1; @!over bra W; }" :: "r"(at(&full)), "l"(state));
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(y), "r"(at(tile)), "r"(256) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}"""
    )
    x = numbers(64)
    run(source, x, 64, 2 * x[::-1])


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_in_other_orders_and_step_by_step(schedule):
    x, y = numbers(5, 64), np.zeros(64, np.float32)
    kernel = cuda.compile(BULK, schedule=schedule)
    assert kernel.check[1, 64](x, y, 5).ok
    np.testing.assert_allclose(y, x.sum(0)[::-1], atol=1e-5)
    page = kernel.steps[1, 64](x, np.zeros(64, np.float32), 5)._repr_html_()
    assert len(page) < 200 * 1024


def test_what_is_not_there_is_said():
    source = "#include <cuda/barrier>\n__global__ void k(int* x) {\n  cuda::atomic_ref<int> a(*x);\n}"
    with pytest.raises(cuda.CompileError, match=r"^line 3: this is not available on the CPU \(of cuda:: only barriers"):
        cuda.compile(source)
    source = '__global__ void k(int* x) {\n  asm volatile("wgmma.fence.sync.aligned;");\n}'
    with pytest.raises(cuda.CompileError, match=r"^line 2: this is not available on the CPU \(wgmma: use mma.sync"):
        cuda.compile(source)
