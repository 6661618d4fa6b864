"""Declarations as people write them: namespaces, defaults, functors, constant memory; and what is not for a kernel at all.

Everything that runs here is compiled by NVRTC too, so that it is CUDA.
"""

import ctypes

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

gpu = pytest.importorskip("utils.cuda.gpu")


def run(source, *arguments, name=None, template=(), n=32, **filled):
    """The first array of a kernel `(float* y, ...)` of 32 threads, checked and plain alike."""
    kernel = cuda.compile(source, name, template)
    for constant, values in filled.items():
        kernel.fill(constant, values)
    y, z = np.zeros((2, n), np.float32)
    kernel[1, 32](y, *arguments)
    kernel.fast[1, 32](z, *arguments)
    assert (y == z).all()
    gpu.compile_for(source, kernel.name, "sm_90")
    return y


NAMESPACES = r"""
namespace attention { namespace detail {
__device__ float two() { return 2.f; }
template <int N = 3, typename T = float> __global__ void defaults(T* y) { y[threadIdx.x] = N; }
}
namespace { __global__ void hidden(float* y) { y[threadIdx.x] = detail::two(); } }
}
namespace other::deep { static __global__ void k(float* y) { y[threadIdx.x] = 5.f; } }
extern "C" __global__ void k(float* y) { y[threadIdx.x] = 7.f; }
"""


@pytest.mark.parametrize(
    "name, template, called, value",
    [
        ("hidden", (), "attention::hidden", 2),
        ("other::deep::k", (), "other::deep::k", 5),
        ("deep::k", (), "other::deep::k", 5),
        ("k", (), "k", 7),
        ("defaults", (), "attention::detail::defaults<>", 3),
        ("detail::defaults", (4,), "attention::detail::defaults<4>", 4),
    ],
)
def test_a_kernel_in_a_namespace_by_its_name_and_with_its_defaults(name, template, called, value, compiler):  # noqa: F811
    assert (run(NAMESPACES, name=name, template=template) == value).all()
    assert cuda.compile(NAMESPACES, name, template).name == called


def test_a_name_that_two_namespaces_have_is_asked_about():
    source = "namespace a { __global__ void k(int* x) {} } namespace b { __global__ void k(int* x) {} }"
    with pytest.raises(cuda.CompileError, match=r"2 kernels called 'k' \(a::k, b::k\)"):
        cuda.compile(source, "k")


class Add(ctypes.Structure):
    _fields_ = ()


class Scale(ctypes.Structure):
    _fields_ = [("by", ctypes.c_float)]


FUNCTORS = r"""
struct Add { __device__ float operator()(float a, float b) const { return a + b; } };
struct Scale { float by; __device__ __forceinline__ float operator()(float a, float b) const { return by * a * b; } };
template <typename Op> __global__ void combine(float* y, Op op) { y[threadIdx.x] = op(threadIdx.x, 2.f); }
"""


def test_functors_with_and_without_fields(compiler):  # noqa: F811
    assert run(FUNCTORS, Add(), template="Add").tolist() == [i + 2 for i in range(32)]
    assert run(FUNCTORS, Scale(0.5), template="Scale").tolist() == list(range(32))


def test_a_forced_inline_function_as_argument_and_as_template_argument(compiler):  # noqa: F811
    source = r"""
__forceinline__ __device__ float twice(float a) { return 2.f * a; }
__device__ __forceinline__ float half_of(float a) { return a / 2.f; }
template <typename F> __device__ float apply(F f, float x) { return f(x); }
template <float (*F)(float)> __global__ void k(float* y, float by) {
  y[threadIdx.x] = F(threadIdx.x) + apply(half_of, 6.f) + apply([=](float x) { return x * by; }, 1.f);
}"""
    assert run(source, 10.0, template="twice").tolist() == [2 * i + 13 for i in range(32)]


def test_overloads_are_told_apart_by_their_arguments(compiler):  # noqa: F811
    source = r"""
__device__ float f(float) { return 1.f; }
__device__ float f(int) { return 2.f; }
__device__ float f(unsigned) { return 4.f; }
__device__ float f(double) { return 8.f; }
__device__ float f(float4 v) { return 16.f; }
__global__ void k(float* y) { y[threadIdx.x] = f(1.f) + f(1) + f(1u) + f(1.0) + f(make_float4(0.f, 0.f, 0.f, 0.f)); }"""
    assert (run(source) == 31).all()


CONSTANTS = r"""
__constant__ float weights[4], offset = 5.f;
__constant__ const float fixed[2] = {0.5f, 0.25f};
namespace table { static __constant__ __align__(16) int two[2][2] = {{1, 2}, {3, 4}}; }
__global__ void k(float* y) { y[threadIdx.x] = weights[threadIdx.x % 4] + offset + table::two[1][threadIdx.x % 2] + fixed[1]; }
"""


def test_constant_memory_has_its_values_or_those_it_is_filled_with(compiler):  # noqa: F811
    i, w = np.arange(32), np.array([10, 20, 30, 40], np.float32)
    assert run(CONSTANTS).tolist() == (5 + 3 + i % 2 + 0.25).tolist()
    assert run(CONSTANTS, weights=w, offset=7).tolist() == (w[i % 4] + 7 + 3 + i % 2 + 0.25).tolist()
    assert run(CONSTANTS).tolist() == (5 + 3 + i % 2 + 0.25).tolist()  # another kernel has its own
    two = np.array([[9, 9], [6, 8]], np.int32)
    assert run(CONSTANTS, **{"table::two": two}).tolist() == (5 + two[1][i % 2] + 0.25).tolist()


def test_values_that_do_not_fit_a_constant_are_refused():
    kernel, y = cuda.compile(CONSTANTS), np.zeros(32, np.float32)
    for name in ("fixed", "nothing", "y"):
        with pytest.raises(ValueError, match=f"no `__constant__` variable '{name}'"):
            kernel.fill(name, 1.0)
    for values, error, sentence in (
        (np.zeros(3, np.float32), ValueError, "weights: the constant has 16 bytes, the values given 12"),
        (np.zeros(4), TypeError, "weights: expected values of float32, got float64"),
    ):
        kernel.fill("weights", values)
        with pytest.raises(error, match=sentence):
            kernel[1, 32](y)
    with pytest.raises(TypeError, match="weights: expected an array or a number, got str"):
        kernel.fill("weights", "ones")


REFUSED = r"""
__global__ void uses_ptx(float* y) { asm("nonsense;" : "=f"(y[0])); unknown(); }
template <class T> __device__ T load(const T* p) { T v; asm("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
__device__ float helper(float x) { return unknown(x); }
__global__ void fine(float* y) { y[threadIdx.x] = 1.f; }
__global__ void needs_helper(float* y) { y[0] = helper(1.f); }
"""


def test_a_function_that_does_not_compile_does_not_stop_the_other_kernels(compiler):  # noqa: F811
    assert (run(REFUSED, name="fine") == 1).all()
    for name, line in (("uses_ptx", 2), ("needs_helper", 4)):
        with pytest.raises(cuda.CompileError, match=rf"(^|\n)line {line}: "):
            cuda.compile(REFUSED, name)


HOST = {
    "int main() {\n  float* d;\n  cudaMalloc(&d, 4);\n  k<<<1, 32>>>(d);\n}": 5,
    "void launch(float* y, int n) {\n  k<<<n / 32, 32>>>(y);\n}": 4,
    "torch::Tensor forward(torch::Tensor x) { k<<<1, 1>>>(x.data_ptr<float>()); return x; }": 3,
    "std::mt19937 engine;": 3,
}


@pytest.mark.parametrize("host", HOST)
def test_host_code_in_a_pasted_file_is_told_what_to_paste(host, compiler):  # noqa: F811
    source = f"// a file\n__global__ void k(float* y) {{ y[0] = 1.f; }}\n{host}\n"
    sentence = (
        "this is host code: paste only the kernel and its device functions, and launch with kernel[grid, block](...)"
    )
    with pytest.raises(cuda.CompileError) as error:
        cuda.compile(source)
    assert str(error.value).startswith(f"line {HOST[host]}: {sentence}\n")
    with pytest.raises(cuda.CompileError) as error:
        gpu.compile_for(source, "k")
    assert sentence in str(error.value)


def test_a_library_that_a_device_function_asks_for_is_not_called_host_code(compiler):  # noqa: F811
    source = """template <typename T> struct Sum {
  static __device__ T of(T a, T b) {
    if constexpr (std::is_same_v<T, float>) return a + b;
    return a;
  }
};
__global__ void k(float* y) { y[0] = Sum<float>::of(y[0], 1.f); }"""
    with pytest.raises(cuda.CompileError, match=r"^line 3: .*std|^line 3: .*is_same_v") as error:
        cuda.compile(source)
    assert "host code" not in str(error.value)


@pytest.mark.parametrize(
    "expression, value",
    [
        ("M_SQRT2 * M_SQRT1_2", 1), ("M_2_SQRTPI * M_2_SQRTPI * M_PI", 4), ("M_LN2 * M_LOG2E + M_PI_2 / M_PI_4 + M_1_PI * M_PI", 4),
        ("UINT32_MAX / 65537.0", 65535), ("INT8_MAX + CHAR_BIT + SHRT_MAX % 2", 136), ("LLONG_MAX % 1000", 807),
        ("1.f / HUGE_VALF", 0),
    ],
)  # fmt: skip
def test_constants_of_the_hosts_headers(expression, value, compiler):  # noqa: F811
    source = f"#include <cmath>\n#include <climits>\n__global__ void k(float* y) {{ y[threadIdx.x] = {expression}; }}"
    np.testing.assert_allclose(run(source), value, rtol=1e-6)


VERSIONS = r"""
#include <cuda.h>
#include "cuda_compat.h"
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 600
static __device__ double atomicAdd(double* p, double value) { return *p += value; }
#endif
#if __CUDA_ARCH__ < 530
#error "halves have no arithmetic"
#endif
#if CUDA_VERSION < 11000 || CUDART_VERSION < 11000 || __CUDACC_VER_MAJOR__ < 11 || !defined(__CUDACC__)
#error "an old compiler"
#endif
__global__ void k(float* y) { y[threadIdx.x] = 1.f; }
"""


def test_what_sources_ask_about_the_compiler(compiler):  # noqa: F811
    with pytest.warns(UserWarning, match="cuda_compat.h.*not read"):
        assert (run(VERSIONS) == 1).all()
