"""Kernels in the manner of public ones run unchanged: right, nothing reported, under both compilers, and NVRTC takes them."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.manners import MANNERS
from utils import cuda


def copied(arguments):
    return [np.copy(a) if isinstance(a, np.ndarray) and a.ndim else a for a in arguments]


@pytest.mark.parametrize("name", MANNERS)
def test_the_kernel_runs_as_it_stands(name, compiler):  # noqa: F811
    case = MANNERS[name]
    given = case.arguments(np.random.default_rng(0))
    expected = np.asarray(case.expected(*copied(given)))
    kernel = cuda.compile(case.source, case.name, case.template)
    for constant, values in case.filled.items():
        kernel.fill(constant, values)
    for launch in (kernel.check, kernel.fast):
        arguments = copied(given)
        report = launch[case.grid, case.block, case.shared](*arguments)
        assert report is None or report.ok, str(report)
        got = arguments[case.out]
        if got.dtype == np.uint16:  # bfloat16
            got = (got.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("name", MANNERS)
def test_a_gpus_compiler_takes_it_too(name):
    gpu = pytest.importorskip("utils.cuda.gpu")
    case = MANNERS[name]
    try:
        gpu.compile_for(case.source, cuda.compile(case.source, case.name, case.template).name, "sm_90")
    except cuda.CompileError as error:
        if "nvidia-cuda-cccl" not in str(error):
            raise
