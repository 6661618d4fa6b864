"""How fast kernels compile and run on this machine's CPU: `python -m tests.benchmarks.cuda_runner`."""

import os
import tempfile
import time
import warnings
from functools import partial

import numpy as np

from utils import cuda
from utils.cuda.binary import build
from utils.cuda.samples import FLASH, MATMUL, NAIVE, flash_shared_bytes

D = 64


def best(run, repeats=5):
    """The shortest of several times, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def show(what, milliseconds):
    print(f"{what:<58}{milliseconds:>9.1f} ms")


def compile_times():
    show("first ever compile: runtime and one kernel, checked", best(lambda: cuda.compile(MATMUL), 1))
    show("next kernel, checked", best(lambda: cuda.compile(FLASH, template=(D,)), 1))
    build.cache_clear()
    show("compiled before, in another process", best(lambda: cuda.compile(MATMUL), 1))
    show("compiled before, in this process", best(lambda: cuda.compile(MATMUL)))


def launch_times():
    kernel = cuda.compile("__global__ void nothing(float* x) { x[threadIdx.x] = 0.f; }")
    x = np.zeros(32, np.float32)
    show("a launch that does nothing, checked", best(lambda: kernel[1, 32](x), 20))
    show("a launch that does nothing, plain", best(lambda: kernel.fast[1, 32](x), 20))


def flash_times():
    rng = np.random.default_rng(0)
    kernel = cuda.compile(FLASH, template=(D,))
    for n, heads in ((128, 1), (256, 1), (512, 2), (1024, 2)):
        q, k, v = rng.standard_normal((3, heads, n, D), dtype=np.float32)
        out = np.zeros_like(q)
        shape = (n // 64, heads), 128, flash_shared_bytes(D)
        arguments = q, k, v, out, n, D**-0.5
        what = f"flash attention, N={n}, d={D}, {heads} head{'s' * (heads > 1)}"
        if n <= 256:
            show(f"{what}, checked", best(partial(kernel.check[shape], *arguments), 3))
        show(f"{what}, plain", best(partial(kernel.fast[shape], *arguments)))


def matmul_times():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 256, 256), dtype=np.float32)
    c, kernel = np.zeros_like(a), cuda.compile(MATMUL)
    show("matmul 256 x 256 x 256, checked", best(lambda: kernel.check[(16, 16), (16, 16)](a, b, c, 256, 256, 256), 2))
    show("matmul 256 x 256 x 256, plain", best(lambda: kernel.fast[(16, 16), (16, 16)](a, b, c, 256, 256, 256)))


def naive_times(n=512, heads=2):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, heads, n, D), dtype=np.float32)
    out, s = np.zeros_like(q), np.zeros((heads, n, n), np.float32)
    p, kernels = np.zeros_like(s), {name: cuda.compile(NAIVE, name) for name in ("scores", "softmax", "weighted_sum")}

    def run():
        kernels["scores"].fast[(n // 32, n // 4, heads), (32, 4)](q, k, s, n, D, D**-0.5)
        kernels["softmax"].fast[n * heads, 128](s, p, n)
        kernels["weighted_sum"].fast[(D // 32, n // 4, heads), (32, 4)](p, v, out, n, D)

    show(f"naive attention in three kernels, N={n}, {heads} heads, plain", best(run, 3))


def main():
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUDA_COURSE_CACHE"] = folder
        for part in (compile_times, launch_times, flash_times, matmul_times, naive_times):
            part()


if __name__ == "__main__":
    main()
