"""Every mistake is reported, as what it is and at the line that makes it, under both compilers."""
import numpy as np
import pytest
from cuda_cases import CASES, barrier_lines, without_line
from cuda_compilers import compiler  # noqa: F401

from utils import cuda


def floats(n):
    return np.arange(n, dtype=np.float32)


def zeros(n):
    return np.zeros(n, np.float32)


# name: (kind, source, launch, arguments). The line at fault is marked HERE; a report about two lines may name either.
MISTAKES = {
    "a read past the end": ("out of bounds", r"""
__global__ void k(const float* x, float* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i + 1];  // HERE
}""", (4, 32), lambda: (floats(128), zeros(128))),

    "a read before the beginning": ("out of bounds", r"""
__global__ void k(const float* x, float* y) {
  y[threadIdx.x] = x[(int)threadIdx.x - 1];  // HERE
}""", (1, 32), lambda: (floats(32), zeros(32))),

    "a read far past the end": ("out of bounds", r"""
__global__ void k(const float* x, float* y, int n) {
  y[threadIdx.x] = x[threadIdx.x + 1000 * n];  // HERE
}""", (1, 32), lambda: (floats(32), zeros(32), 32)),

    "a tail without its guard": ("out of bounds", r"""
__global__ void k(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = 2.f * x[i];  // HERE
}""", (4, 32), lambda: (floats(100), zeros(100), 100)),

    "a guard that is off by one": ("out of bounds", r"""
__global__ void k(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n)
    y[i] = 2.f * x[i];  // HERE
}""", (4, 32), lambda: (floats(100), zeros(100), 100)),

    "a write past a shared array": ("out of bounds", r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x + 1] = 1.f;  // HERE
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}""", (1, 32), lambda: (zeros(32),)),

    "a read in the next shared array": ("out of bounds", r"""
__global__ void k(float* y) {
  __shared__ float s[32], t[32];
  s[threadIdx.x] = t[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 8];  // HERE
}""", (1, 32), lambda: (zeros(32),)),

    "too little dynamic shared memory": ("out of bounds", r"""
__global__ void k(float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1.f;  // HERE
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}""", (1, 32, 124), lambda: (zeros(32),)),

    "an index of the wrong row length": ("out of bounds", r"""
__global__ void k(const float* x, float* y, int rows, int columns) {
  if (threadIdx.x < rows)
    for (int j = 0; j < columns; ++j)
      y[threadIdx.x * columns + j] = x[threadIdx.x * (columns + 1) + j];  // HERE
}""", (1, 32), lambda: (floats(30), zeros(30), 5, 6)),

    "an atomic past the end": ("out of bounds", r"""
__global__ void k(int* counts) {
  if (threadIdx.x % 2 == 0)
    atomicAdd(&counts[threadIdx.x], 1);  // HERE
}""", (1, 32), lambda: (np.zeros(16, np.int32),)),

    "a null pointer": ("null pointer", r"""
__global__ void k(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // HERE
}""", (1, 32), lambda: (None, zeros(32))),

    "a write through const": ("write to const", r"""
__global__ void k(const float* x) {
  ((float*)x)[threadIdx.x] = 1.f;  // HERE
}""", (1, 32), lambda: (zeros(32),)),

    "a misaligned float4": ("misaligned", r"""
__global__ void k(const float* x, float* y) {
  int i = threadIdx.x;
  float4 v = *reinterpret_cast<const float4*>(x + 1 + 4 * i);  // HERE
  y[i] = v.x + v.w;
}""", (1, 4), lambda: (floats(32), zeros(32))),

    "a misaligned half2": ("misaligned", r"""
__global__ void k(const half* x, float* y) {
  int i = threadIdx.x;
  half2 v = *reinterpret_cast<const half2*>(x + 2 * i + 1);  // HERE
  y[i] = __low2float(v);
}""", (1, 4), lambda: (np.zeros(32, np.float16), zeros(32))),

    "a misaligned float2": ("misaligned", r"""
__global__ void k(const float* x, float* y) {
  float2 v = reinterpret_cast<const float2*>(x + 1)[threadIdx.x];  // HERE
  y[threadIdx.x] = v.x + v.y;
}""", (1, 4), lambda: (floats(32), zeros(32))),

    "shared memory that nobody wrote": ("unwritten shared memory", r"""
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + 32];  // HERE
}""", (1, 32), lambda: (zeros(32),)),

    "shared memory of the block before": ("unwritten shared memory", r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  if (blockIdx.x == 0) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = s[threadIdx.x];  // HERE
}""", (2, 32), lambda: (zeros(64),)),

    "a barrier in both branches": ("barrier", r"""
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = y[threadIdx.x];
  if (threadIdx.x < 40) {
    __syncthreads();  // HERE
    y[threadIdx.x] = s[63 - threadIdx.x];
  } else {
    __syncthreads();
  }
}""", (1, 64), lambda: (zeros(64),)),

    "a return before the barrier": ("barrier", r"""
__global__ void k(float* y, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();  // HERE
  y[threadIdx.x] = 1.f;
}""", (1, 64), lambda: (zeros(64), 50)),

    "a barrier in a loop of unequal length": ("barrier", r"""
__global__ void k(float* y) {
  for (int i = 0; i < 1 + threadIdx.x / 32; ++i)
    __syncthreads();  // HERE
  y[threadIdx.x] = 1.f;
}""", (1, 64), lambda: (zeros(64),)),

    "a shuffle that half the warp never reaches": ("deadlock", r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16)
    v += __shfl_xor_sync(0xffffffff, v, 1);  // HERE
  __syncthreads();
  y[threadIdx.x] = v;
}""", (1, 32), lambda: (zeros(32),)),

    "two halves in different shuffles": ("deadlock", r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffff, v, 1);  // HERE
  else
    v = __shfl_down_sync(0xffffffff, v, 1);
  y[threadIdx.x] = v;
}""", (1, 32), lambda: (zeros(32),)),

    "a __syncwarp that not all reach": ("deadlock", r"""
__global__ void k(float* y) {
  if (threadIdx.x % 2) {
    __syncwarp();  // HERE
  }
  __syncthreads();
  y[threadIdx.x] = 1.f;
}""", (1, 32), lambda: (zeros(32),)),

    "a mask without the calling lane": ("shuffle", r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  v += __shfl_xor_sync(0x0000ffff, v, 1);  // HERE
  y[threadIdx.x] = v;
}""", (1, 32), lambda: (zeros(32),)),

    "a mask one lane short": ("shuffle", r"""
__global__ void k(float* y) {
  unsigned mask = __ballot_sync(0x7fffffff, y[threadIdx.x] > 0.f);  // HERE
  y[threadIdx.x] = mask;
}""", (1, 32), lambda: (zeros(32),)),

    "a shuffle from a lane outside the mask": ("shuffle", r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  if (threadIdx.x < 16)
    v += __shfl_xor_sync(0x0000ffff, v, 16);  // HERE
  y[threadIdx.x] = v;
}""", (1, 32), lambda: (zeros(32),)),

    "a shuffle from a lane that has returned": ("shuffle", r"""
__global__ void k(float* y) {
  if (threadIdx.x >= 20) return;
  float v = y[threadIdx.x];
  v += __shfl_down_sync(0xffffffff, v, 4);  // HERE
  y[threadIdx.x] = v;
}""", (1, 32), lambda: (zeros(32),)),

    "a shuffle from a lane that the block does not have": ("shuffle", r"""
__global__ void k(float* y) {
  float v = y[threadIdx.x];
  for (int o = 16; o; o /= 2)
    v += __shfl_xor_sync(0xffffffff, v, o);  // HERE
  y[threadIdx.x] = v;
}""", (1, 48), lambda: (zeros(48),)),

    "no __syncwarp between lanes of a warp": ("race", r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = y[threadIdx.x];
  y[threadIdx.x] = s[31 - threadIdx.x];  // HERE
}""", (1, 32), lambda: (zeros(32),)),

    "a shuffle taken for a memory barrier": ("race", r"""
__global__ void k(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = y[threadIdx.x];
  float v = __shfl_xor_sync(0xffffffff, 1.f, 1);
  y[threadIdx.x] = v + s[31 - threadIdx.x];  // HERE
}""", (1, 32), lambda: (zeros(32),)),

    "__syncwarp where two warps meet": ("race", r"""
__global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = y[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64), lambda: (zeros(64),)),

    "all threads add into one shared cell": ("race", r"""
__global__ void k(float* y) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0.f;
  __syncthreads();
  sum += y[threadIdx.x];  // HERE
  __syncthreads();
  if (threadIdx.x == 0) y[0] = sum;
}""", (1, 32), lambda: (zeros(32),)),

    "a halving sum without barriers": ("race", r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  for (int o = 64; o; o /= 2)
    if (threadIdx.x < o) s[threadIdx.x] += s[threadIdx.x + o];  // HERE
  if (threadIdx.x == 0) y[0] = s[0];
}""", (1, 128), lambda: (floats(128), zeros(1))),

    "a race in global memory": ("race", r"""
__global__ void k(float* x) {
  float left = x[(threadIdx.x + 63) % 64];  // HERE
  x[threadIdx.x] = left;
}""", (1, 64), lambda: (floats(64),)),

    "a race in a half array": ("race", r"""
__global__ void k(half* x) {
  __shared__ half s[64];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64), lambda: (np.zeros(64, np.float16),)),

    "an atomic and a plain read of one counter": ("race", r"""
__global__ void k(int* counter, int* seen) {
  atomicAdd(counter, 1);
  seen[threadIdx.x] = *counter;  // HERE
}""", (1, 64), lambda: (np.zeros(1, np.int32), np.zeros(64, np.int32))),

    "a race in dynamic shared memory": ("race", r"""
__global__ void k(float* y) {
  extern __shared__ char bytes[];
  float* s = (float*)bytes;
  s[threadIdx.x] = y[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64, 256), lambda: (zeros(64),)),

    "blocks that add into one cell": ("race between blocks", r"""
__global__ void k(const float* x, float* y) {
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int o = 16; o; o /= 2) v += __shfl_down_sync(0xffffffff, v, o);
  if (threadIdx.x == 0)
    y[0] += v;  // HERE
}""", (4, 32), lambda: (floats(128), zeros(1))),

    "a block that reads what another wrote": ("race between blocks", r"""
__global__ void k(float* x) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  x[i] = i ? x[i - 1] : 0.f;  // HERE
}""", (4, 1), lambda: (floats(4),)),

    "blocks whose outputs overlap": ("race between blocks", r"""
__global__ void k(float* y) {
  y[blockIdx.x * 16 + threadIdx.x] = blockIdx.x;  // HERE
}""", (2, 32), lambda: (zeros(64),)),

    "cp.async without a wait": ("async copy", r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64), lambda: (floats(64), zeros(64))),

    "cp.async without a commit": ("async copy", r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64), lambda: (floats(64), zeros(64))),

    "cp.async that waits for too few": ("async copy", r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(1);
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64), lambda: (floats(64), zeros(64))),

    "cp.async, a wait, but no barrier": ("race", r"""
__global__ void k(const float* x, float* y) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[63 - threadIdx.x];  // HERE
}""", (1, 64), lambda: (floats(64), zeros(64))),

    "cp.async still under way at the end": ("async copy", r"""
__global__ void k(const float* x) {
  __shared__ float s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 4);  // HERE
  __pipeline_commit();
}""", (1, 64), lambda: (floats(64),)),

    "a failed assert": ("assert", r"""
__global__ void k(const float* x) {
  assert(x[threadIdx.x] < 5.f);  // HERE
}""", (1, 32), lambda: (floats(32),)),
}


def line_of(source):
    lines = source.split("\n")
    return 1 + next(i for i, line in enumerate(lines) if "HERE" in line)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_is_named_at_its_line(name, compiler):  # noqa: F811
    kind, source, shape, arguments = MISTAKES[name]
    report = cuda.compile(source).check[shape](*arguments())
    found = [p for p in report.problems if p.kind == kind]
    assert found, f"reported instead: {[str(p) for p in report.problems]}"
    assert any(f"line {line_of(source)}:" in str(p) for p in found), str(found[0])
    assert {p.line for p in found} - {0}


DELETED = [(name, line) for name, case in CASES.items() for line in barrier_lines(case)]


def test_the_samples_have_barriers_to_delete():
    assert len(DELETED) >= 14


@pytest.mark.parametrize("name, line", DELETED, ids=[f"{name}-{line}" for name, line in DELETED])
def test_every_deleted_barrier_is_reported(name, line, compiler):  # noqa: F811
    case = CASES[name]
    kernel = cuda.compile(without_line(case.source, line), case.name, case.template)
    report, _, _ = case.launch(kernel.check)
    assert {p.kind for p in report.problems} & {"race", "async copy"}, f"line {line} of {name} can go unnoticed"


STACK = r"""
__device__ float deep(float x, int n) {
  volatile float here[64];
  here[n % 64] = x;
  return n ? deep(x + here[n % 64], n - 1) + here[0] : x;
}
__global__ void k(float* y, int n) { y[threadIdx.x] = deep(1.f, n); }
"""


def test_a_stack_overflow_is_reported(compiler):  # noqa: F811
    report = cuda.compile(STACK).check[1, 1](zeros(1), 500)
    assert [p.kind for p in report.problems] == ["stack overflow"]


def test_dynamic_shared_memory_that_the_launch_forgot_is_named(compiler):  # noqa: F811
    kernel = cuda.compile("""
__global__ void k(const float* x, float* y) {
  extern __shared__ float s[];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}""")
    (problem,) = kernel.check[1, 32](floats(32), zeros(32)).problems
    assert problem.kind == "null pointer" and problem.line == 4
    assert problem.message.endswith("; this launch gives the block no dynamic shared memory: k[grid, block, shared_bytes]")
    (problem,) = kernel.check[1, 32, 128](None, zeros(32)).problems
    assert problem.kind == "null pointer" and "dynamic shared memory" not in problem.message


def test_threads_that_write_one_cell_are_told_to_let_one_write(compiler):  # noqa: F811
    kernel = cuda.compile("__global__ void k(float* y) { y[0] = threadIdx.x; }")
    (problem,) = kernel.check[1, 32](zeros(1)).problems
    assert problem.kind == "race" and "both in the same statement: let one thread write, in block" in problem.message
    assert "between them" not in problem.message


def test_one_wrong_kernel_gives_one_error_with_the_rest_folded():
    source = without_line(CASES["matmul"].source, barrier_lines(CASES["matmul"])[0])
    with pytest.raises(cuda.KernelError) as error:
        CASES["matmul"].launch(cuda.compile(source))
    assert str(error.value).startswith("RACE on shared tile_")
    assert "more problem" in str(error.value)
    assert len(error.value.report.problems) > 1


def test_a_stopped_launch_leaves_nothing_behind_for_the_next():
    _, source, shape, arguments = MISTAKES["a race in dynamic shared memory"]
    wrong, right = cuda.compile(source), CASES["matmul"]
    kernel = cuda.compile(right.source)
    for _ in range(2):
        assert not wrong.check[shape](*arguments()).ok
        assert right.launch(kernel.check)[0].ok


def test_the_same_run_gives_the_same_report():
    source = without_line(CASES["softmax"].source, barrier_lines(CASES["softmax"])[0])
    kernel = cuda.compile(source, "softmax")
    first, second = (CASES["softmax"].launch(kernel.check)[0] for _ in range(2))
    assert str(first) == str(second) and first.table() == second.table() and first._repr_html_() == second._repr_html_()
