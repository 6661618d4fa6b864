"""Compiling: errors at the learner's line, what only a GPU can do, the cache, and the choice of a compiler."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda
from utils.cuda.cpu import toolchain
from utils.cuda.source import find_kernels, for_cpu


def error_of(source, **how):
    with pytest.raises(cuda.CompileError) as error:
        cuda.compile(source, **how)
    return str(error.value)


def test_an_unknown_name_is_shown_in_its_line_with_a_caret(compiler):  # noqa: F811
    text = error_of("""
__global__ void k(float* y) {
  y[threadIdx.x] = foo;
}""")
    assert text.startswith("line 3: ") and "'foo'" in text
    assert text.splitlines()[1:] == ["    3 |   y[threadIdx.x] = foo;", "      |                    ^"]
    assert "cuda_on_cpu" not in text and "kernel.cpp" not in text


@pytest.mark.parametrize(
    "line",
    [
        "y[0] = x;",
        "float z = 1 y[0] = z;",
        "__shared__ float s[N];",
        "y.x = 1;",
        "y[0] = __shfl_xor_sync(0xffffffff, y, 1, 2, 3, 4);",
        "threadIdx.w = 1;",
        "half h = half(y);",
        "atomicAdd(y, y);",
        'y[0] = sqrt("a");',
    ],
)
def test_an_error_is_at_the_learners_line(line, compiler):  # noqa: F811
    text = error_of(f"// a kernel\n__global__ void k(float* y) {{\n  int i = 0;\n  {line}\n}}\n")
    assert text.startswith("line 4: "), text
    assert f"    4 |   {line}" in text
    assert "/include/" not in text


def test_an_error_inside_a_template_of_ours_is_shown_where_the_learner_calls_it(compiler):  # noqa: F811
    text = error_of("""
struct Big { float x[8]; };
__global__ void k(float* y) {
  Big b;
  b = __shfl_xor_sync(0xffffffff, b, 1);
}""")
    assert text.startswith("line 5: ") and "a shuffle moves at most 16 bytes" in text


@pytest.mark.parametrize(
    "line",
    [
        'asm volatile("mov.u32 %0, %clusterid.x;" : "=r"(i));',
        'asm("wgmma.fence.sync.aligned;");',
        '__asm__ volatile("nop");',
        "cuda::atomic_ref<int> b(i);",
        "k<<<1, 1>>>(y);",
    ],
)
def test_what_only_a_gpu_can_do_says_so(line, compiler):  # noqa: F811
    text = error_of(f"__global__ void k(float* y) {{\n  int i = 0;\n  {line}\n  y[i] = 0.f;\n}}\n")
    assert text.startswith("line 3: this is not available on the CPU (")
    assert ("launch it with kernel[grid, block]" if "<<<" in line else "run it on a GPU") in text


@pytest.mark.parametrize("header", ["<iostream>", '"helpers.h"', "<torch/extension.h>", "<cuda/atomic>"])
def test_a_header_that_the_kernel_does_not_need_is_skipped_with_a_note(header, compiler):  # noqa: F811
    y = np.zeros(1, np.float32)
    with pytest.warns(UserWarning, match=f"#include {header}: not read; the kernel does without"):
        kernel = cuda.compile(f"#include {header}\n__global__ void k(float* y) {{ y[0] = 1.f; }}\n")
    kernel[1, 1](y)
    assert y[0] == 1


def test_what_a_skipped_header_declares_is_missed_with_a_note(compiler):  # noqa: F811
    text = error_of('#include "helpers.h"\n__global__ void k(float* y) { y[0] = helper(1.f); }\n')
    assert text.startswith("line 2: ") and "'helper'" in text
    assert text.splitlines()[-1].startswith('not read: #include "helpers.h" (line 1): a kernel has no C++ library and')


def test_a_function_may_have_a_version_for_the_cpu():
    kernel = cuda.compile("""
__device__ int lane_id() {
#if CU_ON_CPU
  return threadIdx.x % 32;
#else
  int lane;
  asm("mov.u32 %0, %no_such_register;" : "=r"(lane));
  return lane;
#endif
}
__global__ void k(int* y) { y[threadIdx.x] = lane_id(); }""")
    y = np.zeros(64, np.int32)
    kernel[1, 64](y)
    assert y.tolist() == list(range(32)) * 2


@pytest.mark.parametrize(
    "source, line",
    [
        ("__global__ void k(float* y) {\n  for (int i = 0; i < 3; ++i) {\n    y[i] = 1.f;\n}\n", 2),
        ("__global__ void k(float* y) {\n  y[0] = 1.f;\n", 1),
        ("// {\n__device__ void f() {\n  int i;\n\n__global__ void k(float* y) {\n  if (y) { y[0] = 1.f; }\n}\n", 2),
    ],
)
def test_a_brace_that_is_never_closed_is_shown_where_it_opens(source, line, compiler):  # noqa: F811
    shown = source.split("\n")[line - 1]
    assert error_of(source) == f"line {line}: this '{{' is never closed\n    {line} | {shown}"


def test_braces_in_both_branches_of_a_condition_do_not_hide_the_error(compiler):  # noqa: F811
    text = error_of(
        "#ifdef CU_ON_CPU\n__global__ void k(float* y) {\n#else\n__global__ void k(double* y) {\n#endif\n"
        "  y[0] = foo;\n}\n"
    )
    assert text.startswith("line 6: ") and "'foo'" in text


@pytest.mark.parametrize(
    "source, template",
    [
        ("__global__ int k(float* y) { y[0] = 1.f; return 0; }", ()),
        ("__global__ void k(float& y) { y = 1.f; }", ()),
        ("template <int D> __global__ void k(float* y) { y[0] = D; }", (1, 2)),
        ("template <int D> __global__ void k(float* y) { y[0] = D; }", ("float",)),
        ("__global__ void k(float* y) { y[0] = 1.f; } __global__ void k(int* y) { y[0] = 1; }", ()),
    ],
)
def test_a_kernel_that_cannot_be_launched_is_told_what_it_must_be(source, template, compiler):  # noqa: F811
    text = error_of(source, template=template)
    assert text.startswith("line 1: k") and text.endswith("\n    1 | " + source)
    assert " must be one `__global__ void` function without reference parameters, and template=... must fit it" in text


def test_a_function_without_a_body_is_named_where_it_is_declared(compiler):  # noqa: F811
    text = error_of("struct S { int a; };\n__device__ float f(float);\n__global__ void k(float* y) { y[0] = f(1.f); }")
    assert text == "line 2: f is declared but not defined\n    2 | __device__ float f(float);"


def test_the_cpp_library_is_not_there(compiler):  # noqa: F811
    text = error_of(
        "#include <math.h>\n#include <vector>\n__global__ void k(float* y) { std::vector<int> v(3); y[0] = v[1]; }"
    )
    assert text.startswith("line 3: ") and "not read: #include <vector> (line 2): a kernel has no C++ library" in text


HOST_HEADERS = (
    "<math.h>",
    "<cmath>",
    "<stdio.h>",
    "<cstdio>",
    "<stdint.h>",
    "<cstdint>",
    "<float.h>",
    "<stdlib.h>",
    "<cuda_runtime.h>",
    '"cuda_runtime.h"',
    "<limits.h>",
    "<assert.h>",
)
USES_HOST_HEADERS = (
    "\n".join(f"#include {header}  // as nvcc wants it" for header in HOST_HEADERS)
    + """
__global__ void k(float* y, int64_t n) {
  assert(n < INT_MAX);
  y[n] = fmaxf(-FLT_MAX, sqrtf(4.f)) + (float)(M_PI - M_PI) + (FLT_EPSILON < 1e-6f) + (DBL_MAX > FLT_MAX);
  if (n < 0) printf("%f", y[n]);
}"""
)


def test_headers_whose_content_is_built_in_are_accepted(compiler):  # noqa: F811
    y = np.zeros(3, np.float32)
    cuda.compile(USES_HOST_HEADERS)[1, 1](y, 2)
    assert y.tolist() == [0, 0, 4]


def test_an_error_after_such_headers_is_at_its_line():
    assert error_of("#include <math.h>\n#include <cstdio>\n__global__ void k(float* y) { y[0] = foo; }").startswith(
        "line 3: "
    )


@pytest.mark.parametrize(
    "declaration, sentence",
    [
        ("__shared__ float t = 0;", "shared memory cannot be initialised in its declaration"),
        ("__shared__ float t[2] = {1, 2};", "shared memory cannot be initialised in its declaration"),
        ("__shared__ int t{3};", "shared memory cannot be initialised in its declaration"),
        ("__shared__ float t[n];", "the size of a shared array must be a constant; else use extern __shared__"),
        ("float t[n];", "the size of an array must be a constant"),
    ],
)
def test_a_wrong_array_declaration_is_told_what_is_wrong_with_it(declaration, sentence, compiler):  # noqa: F811
    text = error_of(f"__global__ void k(float* y, int n) {{\n  {declaration}\n  y[0] = n;\n}}")
    assert text == f"line 2: {sentence}\n    2 |   {declaration}"


def test_the_size_of_a_shared_array_may_be_a_comparison():
    cuda.compile(
        "template <int N> __global__ void k(float* y) { __shared__ float t[N == 1 ? 2 : N]; t[0] = y[0]; }",
        template=(4,),
    )


def test_large_local_arrays_are_refused_where_they_are(compiler):  # noqa: F811
    text = error_of("""
__global__ void k(float* y) {
  float big[40000];
  for (int i = 0; i < 40000; ++i) big[i] = y[i];
  for (int i = 0; i < 40000; ++i) y[i] = big[(i * 7) % 40000];
}""")
    assert "the local variables of one thread take more than 88 KB" in text


WARNED = {
    "float total;\n  for (int i = 0; i < 3; ++i) total += y[i];\n  y[0] = total;": (3, "uninitialized"),
    'printf("%d", y[0]);': (2, "format"),
    "float w[4];\n  for (int i = 0; i < 4; ++i) w[i] = y[i];\n  y[1] = w[7];": (4, "array"),
}


@pytest.mark.parametrize("lines", WARNED)
def test_what_a_compiler_warns_of_is_passed_on_at_its_line(lines, compiler):  # noqa: F811
    line, word = WARNED[lines]
    source = f"__global__ void k(float* y) {{\n  {lines}\n}}"
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning) as told:
            cuda.compile(source)
        assert any(str(w.message).startswith(f"line {line}: ") and word in str(w.message) for w in told)
        assert not any("[-W" in str(w.message) for w in told)


TWO = "__global__ void a(float* x) { x[0] = 1; }\n__global__ void b(float* x) { x[0] = 2; }\n"


def test_which_kernel_and_which_template():
    assert "2 kernels (a, b): say which one with name=" in error_of(TWO)
    assert "no kernel called 'c'; it has a, b" in error_of(TWO, name="c")
    assert "no kernel" in error_of("int x;")
    assert "a is not a template" in error_of(TWO, name="a", template=(1,))
    assert "k is a template: give its arguments" in error_of("template <int D> __global__ void k(float* x) {}")
    assert cuda.compile(TWO, name="b").name == "b"


def test_kernels_and_their_parameters_are_found_whatever_the_spelling():
    kernels = find_kernels("""
// __global__ void no(int x)
/* __global__ void neither(int x); */
const char* text = "__global__ void nor(int)";
extern "C" __global__ __launch_bounds__(128, 2) void one(const float *__restrict__ x, float* y, const int n = 3) {}
template <class T, int N>
__global__ void __launch_bounds__(64)
two(T* const x, unsigned long long n, float w[]) {}
static __global__ void three() {}
""")
    assert [(k.name, k.is_template, k.parameters) for k in kernels] == [
        ("one", False, ("x", "y", "n")),
        ("two", True, ("x", "n", "w")),
        ("three", False, ()),
    ]


def test_rewriting_shared_memory_keeps_every_line_where_it_is():
    source = """
template <int N> __global__ void k(float* x) {
  __shared__ float a[N][N + 1],
                   b[N];   // __shared__ int c[2];
  __shared__ __align__(16) half c[8];
  __shared__ float total;
  extern __shared__ __align__(16) unsigned char bytes[];
  x[0] = a[0][0];
}"""
    for checked in (False, True):
        text = for_cpu(source, checked)
        assert text.count("\n") == source.count("\n") and "extern __shared__" not in text
        assert text.split("\n")[7].strip() == "x[0] = a[0][0];"


@pytest.mark.parametrize(
    "source", ["extern __shared__ float s[];\n__global__ void k() {}", "__shared__ float s[4];\n__global__ void k() {}"]
)
def test_shared_memory_outside_a_kernel_is_refused(source):
    assert error_of(source).startswith("line 1: declare shared memory inside the kernel that uses it")


def test_a_kernel_shows_its_name_and_parameters():
    kernel = cuda.compile("template <int D> __global__ void k(const float* q, int n) {}", template=(64,))
    assert (kernel.name, kernel.parameters, kernel.template) == ("k<64>", ("q", "n"), (64,))
    assert kernel.declarations == ("const float* q", "int n")
    assert repr(kernel) == "<kernel k<64>(const float* q, int n)>"


def test_no_compiler_says_how_to_get_one(monkeypatch):
    monkeypatch.delenv("CUDA_COURSE_CXX", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain, "zig_command", lambda: None)
    toolchain._find_compiler.cache_clear()
    assert "pip install ziglang" in error_of(TWO, name="a")
    toolchain._find_compiler.cache_clear()


def test_an_unknown_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CUDA_COURSE_CXX", "no-such-compiler")
    assert "'no-such-compiler', which is not on this machine" in error_of(TWO, name="a")


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_COURSE_CACHE", str(tmp_path))
    script = f"from utils import cuda; cuda.compile({TWO!r}, 'a')"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True)
    libraries = list(tmp_path.glob("*" + toolchain.LIBRARY_SUFFIX))
    assert len(libraries) == 1 and not list(tmp_path.glob("build-*"))
    written = libraries[0].stat().st_mtime_ns
    start = sum(os.times()[:4])  # processor time, the compiler's included
    cuda.compile(TWO, "a")
    assert sum(os.times()[:4]) - start < 0.2 and libraries[0].stat().st_mtime_ns == written


@pytest.mark.slow
def test_processes_that_compile_the_same_at_once_do_not_disturb_one_another(tmp_path):
    script = f"""
import os; os.environ["CUDA_COURSE_CACHE"] = {str(tmp_path)!r}
import numpy as np
from utils import cuda
x = np.zeros(1, np.float32); cuda.compile({TWO!r}, 'b')[1, 1](x); assert x[0] == 2"""
    with ThreadPoolExecutor(3) as pool:
        command = [sys.executable, "-c", script]
        done = list(pool.map(lambda _: subprocess.run(command, capture_output=True, check=False), range(3)))
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr
    assert not list(tmp_path.glob("build-*"))
