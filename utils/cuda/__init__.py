"""CUDA C++ kernels on any machine: on a GPU where there is one, else on the CPU, checked.

    from utils import cuda

    kernel = cuda.compile(source)                  # CUDA C++ in a string
    kernel[grid, block](x, y, n)                   # runs it; raises cuda.KernelError if it does something wrong
    report = kernel.check[grid, block](x, y, n)    # runs it on the CPU and tells what it did, right or wrong
    kernel.fast[grid, block](x, y, n)              # runs it without checks: on the CPU, CUDA tensors on the GPU

How it works is told in utils/cuda/README.md.
"""
from .launch import Kernel, KernelError, compile
from .report import Report
from .source import CompileError

time_limit = 60.0          # seconds a kernel may run on the CPU before it is stopped

__all__ = ["CompileError", "Kernel", "KernelError", "Report", "compile", "time_limit"]
