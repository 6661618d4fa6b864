"""A barrier in a function: threads that come to it through different calls do not meet. An access in one: who called it."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.mistakes import floats, zeros
from utils import cuda
from utils.cuda.calls import marked

WAIT = "__device__ void all_wait() { __syncthreads(); }\n"
TOTAL = """
namespace parts {
template <int N> __device__ float total(float v, float* s) {
  s[threadIdx.x] = v;
  __syncthreads();
  float t = 0;
  for (int i = 0; i < N; ++i) t += s[i];
  __syncthreads();
  return t;
}
}
__device__ float mean(float v, float* s) { return parts::total<64>(v, s) / 64; }
"""
GROUPS = (
    "#include <cooperative_groups.h>\n__device__ void all_wait() { cooperative_groups::this_thread_block().sync(); }\n"
)
KERNEL = "__global__ void k(float* y) {{\n  __shared__ float s[64];\n{}\n  y[threadIdx.x] = s[0] = 1;\n}}"
APART = [
    (WAIT, "  if (threadIdx.x < 32)\n    all_wait();\n  else\n    all_wait();", (1, 5, 7)),
    (WAIT, "  threadIdx.x < 32 ? all_wait() : all_wait();", (1, 4, 4)),
    (GROUPS, "  if (threadIdx.x < 32)\n    all_wait();\n  else\n    all_wait();", (2, 6, 8)),
    (TOTAL, "  float m = threadIdx.x < 32 ? mean(1, s)\n    : 2 * mean(2, s);\n  s[threadIdx.x] = m;", (5, 15, 16)),
    (
        TOTAL,
        "  float m = threadIdx.x < 32 ? mean(1, s)\n    : parts::total<64>(2, s);\n  s[threadIdx.x] = m;",
        (5, 12, 16),
    ),
    (
        '__device__ void all_wait() { asm volatile("bar.sync 0;"); }\n',
        "  if (threadIdx.x % 2) all_wait();\n  else all_wait();",
        (1, 5, 4),
    ),
]
TOGETHER = [
    (WAIT, "  all_wait(); for (int i = 0; i < 3; ++i) all_wait(); if (blockIdx.x == 0) all_wait(); else all_wait();"),
    (
        TOTAL,
        "  float a = mean(1, s), b = mean(2, s) + mean(a = 3, s) * parts::total<64>(mean(a, s), s); s[threadIdx.x] = b;",
    ),
    (TOTAL, "  auto again = [&](float v) { return mean(v, s); }; s[threadIdx.x] = again(1) + again(2);"),
    ("struct Row { __device__ void wait() { __syncthreads(); } };\n", "  Row r; r.wait(); (&r)->wait();"),
]


@pytest.mark.parametrize(("helper", "body", "lines"), APART)
def test_different_calls_are_different_barriers(compiler, helper, body, lines):  # noqa: F811
    report = cuda.compile(helper + KERNEL.format(body)).check[1, 64](zeros(64))
    (problem,) = [p for p in report.problems if p.kind == "barrier"]
    at, first, second = lines
    assert f"waits at line {at}: " in problem.message and f", called at line {first}: " in problem.message
    assert f"waits in another call of it, at line {second}: " in problem.message


@pytest.mark.parametrize(("helper", "body"), TOGETHER)
def test_the_same_call_is_the_same_barrier(compiler, helper, body):  # noqa: F811
    report = cuda.compile(helper + KERNEL.format(body + "\n  __syncthreads();")).check[1, 64](zeros(64))
    assert [p.kind for p in report.problems] == []


def test_only_what_is_called_from_several_places_is_marked():
    once = TOTAL + "__global__ void k(float* y) { y[0] = mean(1, y); }"
    assert marked(once) == once
    twice = marked(TOTAL + "__global__ void k(float* y) { y[0] = mean (1, y) + (2 * mean(mean(3, y), y)); }")
    assert twice.endswith(
        "y[0] = (CuFrom(__builtin_LINE(), 1), mean (1, y)) + (2 * (CuFrom(__builtin_LINE(), 2), "
        "mean((CuFrom(__builtin_LINE(), 3), mean(3, y)), y))); }"
    )


GET = """__device__ float get(const float* x, int i) {
  return x[i];
}
__device__ float twice(const float* x, int i) { return 2 * get(x, i); }
__global__ void k(const float* x, float* y) {
  y[threadIdx.x] = get(x, threadIdx.x);
  HERE
}"""


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("y[threadIdx.x] += get(x, threadIdx.x + 1);", 7),
        ("y[0] = threadIdx.x ? 0 : twice(x, 1 << 20);", 4),
    ],
)
def test_an_access_in_a_helper_names_its_caller(compiler, line, call):  # noqa: F811
    x, y = floats(32), zeros(32)
    report = cuda.compile(GET.replace("HERE", line)).check[1, 32](x, y)
    (problem,) = report.problems
    assert problem.line == 2 and f"\n  called at line {call}: " in problem.message
    if call == 7:  # thread 31 is the last, and what the others wrote is there once
        np.testing.assert_array_equal(y[:31], x[:31] + x[1:])


def test_an_access_in_the_kernel_itself_has_no_caller(compiler):  # noqa: F811
    report = cuda.compile(GET.replace("HERE", "y[threadIdx.x + 32] = 1;")).check[1, 32](zeros(32), zeros(32))
    assert report.problems[0].line == 7 and "called" not in report.problems[0].message
