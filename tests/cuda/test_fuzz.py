"""Random kernels: both compilers and both builds agree with NumPy, nothing is reported, and no barrier can be left out."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.fuzz import REGISTERS, THREADS, Program
from utils import cuda

SEEDS = range(12)


def numbers(seed):
    return np.random.default_rng(seed).integers(0, 2**32, (THREADS, REGISTERS), dtype=np.uint32)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_kernel_computes_what_numpy_says(seed, compiler):  # noqa: F811
    program, x = Program(seed), numbers(seed)
    expected = program.expected(x)
    kernel, y = cuda.compile(program.source), np.zeros(THREADS, np.uint32)
    report = kernel.check[1, THREADS](x, y)
    assert report.ok, f"{report}\n{program.source}"
    assert (y == expected).all(), program.source
    assert report.global_loaded == x.nbytes and report.global_stored == y.nbytes
    y[:] = 0
    kernel.fast[1, THREADS](x, y)
    assert (y == expected).all(), program.source


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_random_kernels_do_not_depend_on_the_order(schedule):
    for seed in SEEDS[:4]:
        program, x, y = Program(seed), numbers(seed), np.zeros(THREADS, np.uint32)
        assert cuda.compile(program.source, schedule=schedule).check[1, THREADS](x, y).ok
        assert (y == program.expected(x)).all(), program.source


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_every_barrier_of_a_random_kernel_is_missed(seed):
    program, x = Program(seed), numbers(seed)
    lines = program.source.split("\n")
    assert len(program.barriers) >= 5 and all("__syncthreads" in lines[n - 1] for n in program.barriers)
    for n in program.barriers:
        text = "\n".join(lines[: n - 1] + [""] + lines[n:])
        report = cuda.compile(text).check[1, THREADS](x, np.zeros(THREADS, np.uint32))
        needed = "race" in {p.kind for p in report.problems}
        assert needed or is_followed_by_one(program, n), f"line {n} of\n{program.source}"


def is_followed_by_one(program, line):
    """The last barrier of an exchange orders nothing where the next array used is another one, or none."""
    lines = program.source.split("\n")
    used = [name for name in ("s[", "t[") if name in lines[line - 2]]
    for text in lines[line:]:
        if "__syncthreads" in text:
            return True
        if any(name in text for name in used):
            return False
    return True
