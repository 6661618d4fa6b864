"""Wrong arguments get one clear sentence that names the argument, what was given and what is expected."""

import ctypes
import warnings

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(
    "arguments, error, message",
    [
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
    ],
)
def test_a_wrong_argument_is_named(scale, arguments, error, message):
    with pytest.raises(error, match=message):
        launched(scale, *arguments)


@pytest.mark.parametrize(
    "shape, error, message",
    [
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
        (
            (2, 32, 227 * 1024 + 1),
            ValueError,
            "scale: shared_bytes: 232,449 bytes, but no GPU gives .* more than 232,448",
        ),
    ],
)
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

    with pytest.raises(ValueError, match=r"\.check and \.steps run on the CPU"):
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


def refused_tensors():
    leaf = torch.ones(64, requires_grad=True)
    return {
        "meta": (torch.ones(64, device="meta"), "on the CPU or on a CUDA device, got one on the device 'meta'"),
        "negative": (torch.imag(torch.ones(64, dtype=torch.complex64).conj()), "marked as negative.* x.resolve_neg"),
        "sparse": (torch.eye(8).to_sparse(), "expected a dense tensor, got a sparse_coo one"),
        "csr": (torch.eye(8).to_sparse_csr(), "expected a dense tensor, got a sparse_csr one"),
        "nested": (torch.nested.nested_tensor([torch.ones(3)]), "expected a dense tensor, got a nested one"),
        "quantised": (
            torch.quantize_per_tensor(torch.ones(64), 1.0, 0, torch.qint8),
            "dense tensor, got a quantised one",
        ),
        "expanded": (torch.ones(1).expand(64), r"contiguous array; pass a contiguous copy \(x.contiguous\(\)\)"),
        "strided": (torch.ones(128)[::2], "expected a contiguous array"),
        "without memory": (emptied(), "with memory of its own, got a Tensor that has none"),
        "a leaf": (leaf, r"requires gradients, and the kernel may write to it .*; pass x.detach\(\)"),
        "of a graph": (leaf * 2, "requires gradients"),
        "a parameter": (torch.nn.Parameter(torch.ones(64)), "requires gradients"),
        "double": (torch.ones(64, dtype=torch.float64), "expected an array of float32, got float64"),
    }


def emptied():
    x = torch.ones(64)
    x.untyped_storage().resize_(0)
    return x


REFUSED_ARRAYS = {
    "big-endian": (np.ones(64, ">f4"), "bytes are in the order of another machine .>f4."),
    "masked": (np.ma.masked_array(np.ones(64, np.float32), mask=True), "expected a plain array, got a masked one"),
    "objects": (np.array([1.0] * 64, object), "expected an array of numbers, got one of Python objects"),
    "reversed": (np.ones(64, np.float32)[::-1], "expected a contiguous array"),
    "Fortran's order": (np.asfortranarray(np.ones((8, 8), np.float32)), "expected a contiguous array"),
    "broadcast": (np.broadcast_to(np.float32(1), 64), "expected a contiguous array"),
    "texts": (np.array(["a"] * 64), "expected an array of float32, got str"),
    "complex": (np.ones(64, np.complex64), "expected an array of float32, got complex64"),
    "dates": (np.ones(64, "datetime64[s]"), "expected an array of float32, got datetime64"),
}


@pytest.mark.parametrize("how", ["check", "fast"])
@pytest.mark.parametrize("name", refused_tensors())
def test_a_tensor_whose_memory_is_not_its_values_is_refused(scale, name, how):
    tensor, message = refused_tensors()[name]
    with pytest.raises((TypeError, ValueError), match="scale: y: .*" + message):
        getattr(scale, how)[2, 32](X, tensor, 64, 2.0)


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_an_array_whose_memory_is_not_its_values_is_refused(scale, name):
    array, message = REFUSED_ARRAYS[name]
    with pytest.raises((TypeError, ValueError), match="scale: x: .*" + message):
        scale[2, 32](array, X.copy(), 64, 2.0)


def test_big_endian_is_refused_in_every_place():
    kernel = cuda.compile("struct S { int a; };\n__global__ void k(void* x, S s) { ((float*)x)[0] = s.a; }")
    x, s = np.zeros(4, ">f4"), np.array((1,), [("a", ">i4")])
    with pytest.raises(ValueError, match="k: x: the array's bytes are in the order of another machine"):
        kernel[1, 1](x, np.array((1,), "i4,")[()])
    with pytest.raises(TypeError, match="k: s: expected a struct of 4 bytes"):
        kernel[1, 1](x.astype("f4"), s[()])

    class Swapped(ctypes.BigEndianStructure):
        _fields_ = [("a", ctypes.c_int)]

    with pytest.raises(TypeError, match="k: s: expected a struct of 4 bytes"):
        kernel[1, 1](x.astype("f4"), Swapped(1))


def test_what_only_reads_may_require_gradients_and_nothing_is_refused_without_a_graph(scale):
    leaf, y = torch.ones(64, requires_grad=True), torch.zeros(64)
    scale[2, 32](leaf, y, 64, 2.0)
    assert (y == 2).all()
    with torch.no_grad():
        scale[2, 32](X, leaf, 64, 3.0)
    assert (leaf == 3).all()
    scale[2, 32](X, leaf.detach(), 64, 4.0)
    assert (leaf == 4).all()


def test_inside_a_transform_of_torch_a_sentence_says_so(scale):
    def launch(x):
        scale[2, 32](x, torch.zeros(64), 64, 2.0)
        return x.sum()

    with pytest.raises(ValueError, match="scale: x: "):
        torch.func.grad(launch)(torch.ones(64))


def test_read_only_arrays_are_read_and_not_written(scale):
    x, y = X.copy(), X.copy()
    x.flags.writeable = y.flags.writeable = False
    scale[2, 32](x, out := X.copy(), 64, 2.0)
    assert (out == 2).all()
    with pytest.raises(ValueError, match="scale: y: the array is read-only, but the kernel's parameter is not const"):
        scale[2, 32](x, y, 64, 2.0)


@pytest.mark.parametrize("empty", [lambda: np.zeros(0, np.float32), lambda: torch.zeros(0)], ids=["NumPy", "torch"])
def test_arrays_without_elements_are_arrays(scale, empty):
    assert scale.check[2, 32](empty(), empty(), 0, 2.0).ok
    (problem,) = scale.check[2, 32](X, empty(), 64, 2.0).problems
    assert "at y[0], but y has 0 elements" in problem.message
    source = "__global__ void k(const float* a, const float* b, float* y) { y[0] = b[0]; }"
    (problem,) = cuda.compile(source).check[1, 1](empty(), empty(), X.copy()).problems
    assert "but b has 0 elements" in problem.message or "but a has 0 elements" in problem.message


def test_one_memory_under_two_types_has_no_false_race():
    x = np.zeros(64, np.int32)
    source = "__global__ void k(int* x, unsigned char* bytes) { bytes[threadIdx.x] = threadIdx.x; }"
    assert cuda.compile(source).check[1, 256](x, x.view(np.uint8)).ok
    assert x[1] == 0x07060504


@pytest.mark.parametrize(
    "type_, value",
    [
        ("float", "2.5"),
        ("float", b"2"),
        ("float", np.complex64(1 + 2j)),
        ("float", 1j),
        ("int", "3"),
        ("half", "1"),
        ("bool", 0.5),
    ],
)
def test_a_value_is_not_guessed(type_, value):
    with pytest.raises(TypeError, match="k: v: expected a"):
        cuda.compile(f"__global__ void k(float* y, {type_} v) {{ y[0] = float(v); }}")[1, 1](X.copy(), value)


@pytest.mark.parametrize(
    "type_, value",
    [
        ("float", 1e39),
        ("half", 7e4),
        ("nv_bfloat16", 3.4e38),
        ("unsigned", -1),
        ("signed char", 128),
        ("long long", 2**63),
    ],
)
def test_a_value_that_does_not_fit_is_refused(type_, value):
    with pytest.raises(ValueError, match="k: v: .* does not fit into an? "):
        cuda.compile(f"__global__ void k(float* y, {type_} v) {{ y[0] = float(v); }}")[1, 1](X.copy(), value)


def test_a_long_list_is_not_printed_in_full(scale):
    with pytest.raises(TypeError, match="scale: x: expected an array, got list") as error:
        scale[2, 32]([1.0] * 10**6, X.copy(), 64, 2.0)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("limit", [0, -1, "5", None, float("nan")])
def test_a_time_limit_is_a_number_of_seconds(limit):
    with pytest.raises(ValueError, match="compile: time_limit: expected a number of seconds above 0"):
        cuda.compile(SOURCE, time_limit=limit)


@pytest.mark.parametrize(
    "vector, dtype, n",
    [("char4", "i1", 4), ("uchar3", "u1", 3), ("short2", "i2", 2), ("ushort4", "u2", 4), ("double4", "f8", 4),
     ("longlong2", "i8", 2), ("ulonglong4", "u8", 4), ("uint3", "u4", 3), ("double3", "f8", 3)],
)  # fmt: skip
def test_an_array_of_vectors_is_an_array_of_numbers(vector, dtype, n):
    kernel = cuda.compile(
        f"__global__ void k(const {vector}* x, {vector}* y) {{ y[threadIdx.x] = x[31 - threadIdx.x]; }}"
    )
    x = np.arange(32 * n).reshape(32, n).astype(dtype)
    y = np.zeros_like(x)
    kernel[1, 32](x, y)
    assert (y == x[::-1]).all()
    with pytest.raises(TypeError, match=r"k: x: expected an array of "):
        kernel[1, 32](x.astype("f4"), y)
