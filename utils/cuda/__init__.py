"""CUDA C++ kernels on any machine: on a GPU where there is one, else on the CPU, checked.

    from utils import cuda

    kernel = cuda.compile(source)                  # CUDA C++ in a string
    kernel[grid, block](x, y, n)                   # runs it; raises cuda.KernelError if it does something wrong
    report = kernel.check[grid, block](x, y, n)    # runs it on the CPU and tells what it did, right or wrong
    kernel.fast[grid, block](x, y, n)              # runs it without checks: on the CPU, CUDA tensors on the GPU

How it works is told in utils/cuda/README.md.
"""

from .arrays import check_kind, check_numbers, float_type, like, on_device, skip_unseen, weighted_sum, work_type
from .errors import CompileError, KernelError
from .kernel import Kernel, compile
from .report import Report

__all__ = [
    "CompileError",
    "Kernel",
    "KernelError",
    "Report",
    "check_kind",
    "check_numbers",
    "compile",
    "float_type",
    "like",
    "on_device",
    "skip_unseen",
    "weighted_sum",
    "work_type",
]
