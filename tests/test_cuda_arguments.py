"""Wrong arguments get one clear sentence that names the argument, what was given and what is expected."""
import ctypes
import warnings

import numpy as np
import pytest

from utils import cuda

SOURCE = """
__global__ void scale(const float* x, float* y, int n, float factor) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}"""
X = np.ones(64, np.float32)


@pytest.fixture(scope="module")
def scale():
    return cuda.compile(SOURCE)


def launched(scale, *arguments, shape=(2, 32)):
    return scale[shape](*arguments)


@pytest.mark.parametrize("arguments, error, message", [
    ((X, X.copy(), 64), TypeError, r"scale takes 4 arguments \(x, y, n, factor\), got 3"),
    ((X, X.copy(), 64, 2.0, 1), TypeError, r"scale takes 4 arguments \(x, y, n, factor\), got 5"),
    ((X.astype(float), X.copy(), 64, 2.0), TypeError, "scale: x: expected an array of float32, got float64"),
    ((X, np.zeros(64, np.int32), 64, 2.0), TypeError, "scale: y: expected an array of float32, got int32"),
    ((np.ones(128, np.float32)[::2], X.copy(), 64, 2.0), ValueError, "scale: x: expected a contiguous array"),
    (([1.0] * 64, X.copy(), 64, 2.0), TypeError, "scale: x: expected an array, got list"),
    ((X, X.copy(), 64.5, 2.0), TypeError, "scale: n: expected an int value, got 64.5"),
    ((X, X.copy(), X, 2.0), TypeError, r"scale: n: expected an int value, got an array of shape \(64,\)"),
    ((X, X.copy(), 2**31, 2.0), ValueError, "scale: n: 2147483648 does not fit into an int"),
    ((X, X.copy(), 64, "two"), TypeError, "scale: factor: expected a float value, got 'two'"),
])
def test_a_wrong_argument_is_named(scale, arguments, error, message):
    with pytest.raises(error, match=message):
        launched(scale, *arguments)


@pytest.mark.parametrize("shape, error, message", [
    ((0, 32), ValueError, "scale: grid: its x size must be between 1 and 2,147,483,647, got 0"),
    (((1, 0), 32), ValueError, "scale: grid: its y size must be between 1 and 65,535, got 0"),
    (((1, 65536), 32), ValueError, "scale: grid: its y size must be between 1 and 65,535, got 65,536"),
    ((2**31, 32), ValueError, "scale: grid: its x size .* got 2,147,483,648"),
    ((2, 1025), ValueError, "scale: block: its x size must be between 1 and 1,024, got 1,025"),
    ((2, (64, 32)), ValueError, r"scale: block: 2,048 threads \(64 x 32 x 1\), but a block has at most 1,024"),
    ((2, (1, 1, 1, 1)), ValueError, "scale: block: expected one to three sizes, got 4"),
    ((2.5, 32), TypeError, "scale: grid: expected a whole number or a tuple of up to three, got 2.5"),
    (32, TypeError, r"launch with scale\[grid, block\]"),
    ((2, 32, -1), ValueError, "scale: shared_bytes: expected 0 or more, got -1"),
    ((2, 32, 1.5), TypeError, "scale: shared_bytes: expected a whole number of bytes, got 1.5"),
    ((2, 32, 227 * 1024 + 1), ValueError, "scale: shared_bytes: 232,449 bytes, but no GPU gives .* more than 232,448"),
])
def test_a_wrong_launch_shape_is_named(scale, shape, error, message):
    with pytest.raises(error, match=message):
        launched(scale, X, X.copy(), 64, 2.0, shape=shape)


def test_a_launch_without_brackets_says_how_to_launch(scale):
    for call in (scale, scale.check, scale.fast):
        with pytest.raises(TypeError, match=r"^scale: launch with scale\[grid, block\]\(\.\.\.\)$"):
            call(X, X.copy(), 64, 2.0)


def test_a_source_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="^compile: source: expected CUDA C\\+\\+ in a string, got NoneType$"):
        cuda.compile(None)


def test_a_read_only_array_is_refused_only_where_the_kernel_may_write(scale):
    frozen = X.copy()
    frozen.flags.writeable = False
    launched(scale, frozen, X.copy(), 64, 2.0)
    with pytest.raises(ValueError, match="scale: y: the array is read-only, but the kernel's parameter is not const"):
        launched(scale, X, frozen, 64, 2.0)


def test_arrays_that_share_part_of_their_memory_are_refused(scale):
    both = np.ones(96, np.float32)
    with pytest.raises(ValueError, match="scale: x and y share part of their memory"):
        launched(scale, both[:64], both[32:], 64, 2.0)


def test_one_array_under_two_names_is_one_array(scale):
    x = np.ones(64, np.float32)
    launched(scale, x, x, 64, 2.0)
    assert (x == 2).all()


def test_more_than_48_kb_of_shared_memory_warns_once(scale):
    kernel = cuda.compile(SOURCE.replace("scale", "wide_scale"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            kernel[2, 32, 50_000](X, X.copy(), 64, 2.0)
    assert [str(w.message).split(";")[0] for w in caught] == ["wide_scale: 50,000 bytes of shared memory"]


def test_too_much_static_shared_memory_is_reported():
    source = "__global__ void k(float* x) { __shared__ float a[60000]; a[0] = x[0]; x[1] = a[0]; }"
    report = cuda.compile(source).check[1, 1](np.zeros(2, np.float32))
    assert [p.kind for p in report.problems] == ["shared memory"]


def test_host_and_device_may_not_mix(scale):
    class Fake:
        is_cuda, dtype, shape = True, "torch.float32", (64,)

        def data_ptr(self):
            return 0

    with pytest.raises(ValueError, match="scale: all arrays must be on one device, but .*x is in the CPU's memory"):
        launched(scale, X, Fake(), 64, 2.0)


def test_check_refuses_cuda_tensors(scale):
    class Fake:
        is_cuda, dtype, shape = True, "torch.float32", (64,)

        def data_ptr(self):
            return 0

    with pytest.raises(ValueError, match=r"\.check runs on the CPU"):
        scale.check[2, 32](Fake(), Fake(), 64, 2.0)


STRUCT = """
struct Shape { int rows; float factor; double bias; };
__global__ void k(float* y, Shape s) { y[threadIdx.x] = s.rows * s.factor + (float)s.bias; }
"""


class Shape(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int), ("factor", ctypes.c_float), ("bias", ctypes.c_double)]


def test_a_struct_goes_by_value_from_ctypes_and_from_numpy():
    dtype = np.dtype([("rows", np.int32), ("factor", np.float32), ("bias", np.float64)], align=True)
    for shape in (Shape(3, 0.5, 1.0), np.array((3, 0.5, 1.0), dtype)[()]):
        y = np.zeros(32, np.float32)
        cuda.compile(STRUCT)[1, 32](y, shape)
        assert (y == 2.5).all()


def test_a_struct_of_the_wrong_size_is_named():
    with pytest.raises(TypeError, match="k: s: the kernel's struct has 16 bytes, the one given 8"):
        cuda.compile(STRUCT)[1, 32](np.zeros(32, np.float32), np.array((1, 2), "i4,i4")[()])
    with pytest.raises(TypeError, match="k: s: expected a struct of 16 bytes .* got int"):
        cuda.compile(STRUCT)[1, 32](np.zeros(32, np.float32), 3)


def test_scalars_of_every_type_arrive():
    kernel = cuda.compile("""
__global__ void k(double* y, double d, half h, nv_bfloat16 b, bool t, unsigned u, long long q, size_t z,
                  signed char c) {
  y[0] = d; y[1] = (float)h; y[2] = (float)b; y[3] = t; y[4] = u; y[5] = q; y[6] = z; y[7] = c;
}""")
    y = np.zeros(8)
    kernel[1, 1](y, 0.1, 0.5, 0.25, True, 2**32 - 1, -(2**40), 2**50, np.int8(-3))
    assert y.tolist() == [0.1, 0.5, 0.25, 1, 2**32 - 1, -(2**40), 2**50, -3]
