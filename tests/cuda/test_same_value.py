"""One statement that writes the same value from several threads does no harm: a warning. Any other race is a problem."""

import warnings

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.mistakes import floats, zeros
from utils import cuda

# (name, body of the kernel, grid, block): `v` is 2, x is 1, 2, 2, 3.
HARMLESS = [
    ("one float", "y[0] = v;", 1, 64),
    ("a vector", "((float4*)y)[0] = make_float4(1, 2, 3, v);", 1, 40),
    ("a byte", "((unsigned char*)y)[3] = 7;", 1, 33),
    ("by several blocks", "y[0] = v;", 3, 1),
    (
        "shared",
        "__shared__ float s[4]; s[threadIdx.x % 4] = threadIdx.x % 4; __syncthreads(); y[threadIdx.x] = s[0];",
        1,
        64,
    ),
    ("with a barrier between values", "for (int i = 0; i < 3; ++i) { y[0] = x[i]; __syncthreads(); }", 1, 64),
]
HARMFUL = [
    ("another value in another warp", "y[0] = threadIdx.x / 32;", 1, 64, "race"),
    ("another value in a lane", "y[0] = threadIdx.x == 5;", 1, 32, "race"),
    ("a part of a vector", "((float4*)y)[0] = make_float4(1, 2, 3, threadIdx.x < 20);", 1, 32, "race"),
    ("the number of the block", "y[0] = blockIdx.x;", 3, 1, "race between blocks"),
    ("several values in turn", "for (int i = 0; i < 3; ++i) { y[0] = x[i]; x[i] += 0.f * y[0]; }", 1, 1, None),
    (
        "equal values with another between",
        "for (int i = 0; i < 3; ++i) { y[0] = x[i]; if (y[1] > 0) return; }",
        1,
        64,
        "race",
    ),
    ("read without a barrier", "y[threadIdx.x % 2] = v; y[2 + threadIdx.x] = y[(threadIdx.x + 1) % 2];", 1, 32, "race"),
    ("a counter", "y[0] += 1;", 1, 32, "race"),
    (
        "copies under way",
        "__shared__ __align__(16) float s[4]; __pipeline_memcpy_async(s, x + threadIdx.x % 2 * 4, 16); __pipeline_commit();"
        " __pipeline_wait_prior(0); __syncthreads(); y[threadIdx.x] = s[0];",
        1,
        32,
        "race",
    ),
]


def check(body, grid, block):
    source = f"__global__ void k(float* y, float* x, float v) {{ {body} }}"
    kernel = cuda.compile(source)
    y, x = zeros(68), np.float32([1, 2, 2, 3, 3, 2, 2, 1])
    return kernel.check[grid, block](y, x, 2.0), y


@pytest.mark.parametrize(("body", "grid", "block"), [row[1:] for row in HARMLESS], ids=[row[0] for row in HARMLESS])
def test_the_same_value_is_a_warning(compiler, body, grid, block):  # noqa: F811
    report, _ = check(body, grid, block)
    assert report.ok and [w.kind.split()[0] for w in report.warnings] == ["race"]
    assert "SAME VALUE" in report.warnings[0].message and "SAME VALUE" in str(report)


@pytest.mark.parametrize(
    ("body", "grid", "block", "kind"), [row[1:] for row in HARMFUL], ids=[row[0] for row in HARMFUL]
)
def test_another_value_is_a_problem(compiler, body, grid, block, kind):  # noqa: F811
    report, _ = check(body, grid, block)
    assert {p.kind for p in report.problems} == ({kind} if kind else set())


def test_a_launch_warns_once_and_gives_what_one_run_gives():
    kernel = cuda.compile("__global__ void k(float* y, float v) { y[0] = v; y[1 + threadIdx.x] += v; }")
    y = floats(65)
    before = y.copy()
    with pytest.warns(UserWarning, match="(?s)k: SAME VALUE written to global y\\[0\\].*let one thread write"):
        kernel[1, 64](y, 3.0)
    assert y[0] == 3 and np.array_equal(y[1:], before[1:] + 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.fast[1, 64](y, 3.0)
