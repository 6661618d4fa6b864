"""In which order threads run, and where a kernel stands that does not go on."""

import sys

import numpy as np
import pytest

from tests.cuda.cases import CASES
from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

SCHEDULES = ("forward", "reverse", "random")
LATE = """
__global__ void late(int* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[n - 1 - i] = i;
  y[0] = i;
}"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_a_right_kernel_is_right_in_any_order(name, schedule):
    case = CASES[name]
    kernel = cuda.compile(case.source, case.name, case.template, schedule=schedule)
    report, result, expected = case.launch(kernel.check)
    assert report.ok, str(report)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)
    _, result, _ = case.launch(kernel.fast)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)


def test_a_race_shows_in_the_numbers(compiler):  # noqa: F811
    last = {}
    for schedule in SCHEDULES:
        kernel, seen = cuda.compile(LATE, schedule=schedule), []
        for launch in (kernel.check, kernel.check, kernel.fast):
            y = np.zeros(96, np.int32)
            launch[3, 32](y, 96)
            seen.append(int(y[0]))
            assert (y[1:] == np.arange(95)[::-1]).all()
        assert seen[0] == seen[1]  # the same every time
        last[schedule] = seen[0]
        assert "race" in {p.kind for p in kernel.check[3, 32](np.zeros(96, np.int32), 96).problems}
    assert last["forward"] == 95 and last["reverse"] == 0 and last["random"] not in (0, 95)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="schedule: expected one of 'forward', 'reverse', 'random', got 'backward'"):
        cuda.compile(LATE, schedule="backward")


@pytest.mark.skipif(sys.platform != "linux", reason="caught on Linux")
def test_a_division_by_zero_has_its_line_block_and_thread(compiler):  # noqa: F811
    source = """
__global__ void k(int* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = 5;
  if (i >= 70)
    y[i] = i / (n - i + 70);
}"""
    y = np.zeros(128, np.int32)
    report = cuda.compile(source).check[2, 64](y, 3)
    (problem,) = report.problems
    assert problem.kind == "division by zero" and problem.line == 6
    assert str(problem).startswith("INTEGER DIVISION BY ZERO by thread (9,0,0) of block (1,0,0), at line 6: ")
    assert report.global_stored >= 64 * 4  # what it did until then is told
    assert not cuda.compile(source).check[2, 64](y, 1000).problems  # and the next launch begins anew


def test_a_kernel_that_hangs_has_its_line_block_and_thread(compiler):  # noqa: F811
    source = """
__global__ void k(int* y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 70)
    while (atomicAdd(&y[i], 0) != 1) { }
}"""
    (problem,) = cuda.compile(source, time_limit=1).check[2, 64](np.zeros(128, np.int32)).problems
    assert problem.kind == "time limit" and problem.line == 5
    assert "stopped, in thread (6,0,0) of block (1,0,0), whose last access to memory was at line 5: `while" in str(
        problem
    )
