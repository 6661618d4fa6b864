"""CUDA's device functions: the table of what the CPU has is true, and what it has computes what a GPU computes."""

import operator
import re
from fractions import Fraction

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-core and nvidia-cuda-nvrtc are not installed")
from tests.cuda import device_functions


def evaluate(expression, types, result, *columns):
    """out[i] = expression of a[i], b[i], c[i], on the CPU."""
    names = "abc"[: len(columns)]
    parameters = ", ".join(f"const {t}* x{n}" for t, n in zip(types, names))
    loads = " ".join(f"{t} {n} = x{n}[i];" for t, n in zip(types, names))
    c_type = {"f4": "float", "f8": "double", "u4": "unsigned", "i4": "int", "f2": "half", "i8": "long long"}[result]
    source = f"__global__ void k({c_type}* out, {parameters}) {{ int i = threadIdx.x; {loads} out[i] = {expression}; }}"
    out = np.zeros(len(columns[0]), result)
    cuda.compile(source).fast[1, len(out)](out, *map(np.ascontiguousarray, columns))
    return out


@pytest.mark.skipif(device_functions.headers_of_cuda() is None, reason="nvidia-cuda-runtime is not installed")
def test_the_table_of_functions_is_what_nvrtc_and_the_cpu_say():
    assert device_functions.TABLE.read_text(encoding="utf-8") == device_functions.table()


def neighbours(exact, type_):
    """The numbers of a type around a fraction: (the largest not above it, the smallest not below it)."""
    near = type_(float(exact))
    below = near if Fraction(float(near)) <= exact else np.nextafter(near, type_(-np.inf))
    above = near if Fraction(float(near)) >= exact else np.nextafter(near, type_(np.inf))
    return below, above


def rounded(exact, how, type_):
    below, above = neighbours(exact, type_)
    return {"rd": below, "ru": above, "rz": below if exact > 0 else above}[how]


RNG = np.random.default_rng(0)
OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


@pytest.mark.parametrize("how", ["rd", "ru", "rz"])
@pytest.mark.parametrize("letter, c_type, code", [("f", "float", "f4"), ("d", "double", "f8")])
def test_directed_rounding_is_exact(letter, c_type, code, how):
    a, b = ((RNG.standard_normal(200) * 10.0 ** RNG.integers(-3, 4, 200)).astype(code) for _ in range(2))
    a[:4], b[:4] = [1, -1, 3, 0.1], [3, 3, -7, 0.1]
    for name, function in OPERATIONS.items():
        got = evaluate(f"__{letter}{name}_{how}(a, b)", (c_type, c_type), code, a, b)
        want = [rounded(function(Fraction(float(x)), Fraction(float(y))), how, a.dtype.type) for x, y in zip(a, b)]
        assert got.tolist() == [float(w) for w in want], name
    c = RNG.standard_normal(200).astype(code)
    got = evaluate(f"__fma{letter if letter == 'f' else ''}_{how}(a, b, c)", (c_type,) * 3, code, a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c)]
    assert got.tolist() == [float(rounded(e, how, a.dtype.type)) for e in exact]


@pytest.mark.parametrize("how", ["rd", "ru", "rz"])
def test_whole_numbers_and_doubles_become_floats_with_a_direction(how):
    whole = RNG.integers(-(2**31), 2**31, 200).astype("i4")
    got = evaluate(f"__int2float_{how}(a)", ("int",), "f4", whole)
    assert got.tolist() == [float(rounded(Fraction(int(x)), how, np.float32)) for x in whole]
    double = RNG.standard_normal(200)
    got = evaluate(f"__double2float_{how}(a)", ("double",), "f4", double)
    assert got.tolist() == [float(rounded(Fraction(x), how, np.float32)) for x in double]
    got = evaluate(f"__float2half_{how}(a)", ("float",), "f2", double.astype("f4"))
    exact = [Fraction(float(x)) for x in double.astype("f4")]
    assert got.tolist() == [float(rounded(e, how, np.float16)) for e in exact]


def parts(word, kind):
    """Words as (n, 2) or (n, 4) parts: kind is "i2", "u2", "i1" or "u1"."""
    return word.view(kind).reshape(len(word), -1).astype(int)


def words(values, kind):
    return np.ascontiguousarray((values % 2 ** (8 * int(kind[1]))).astype(f"u{kind[1]}")).view("u4").ravel()


SIMD = {
    "vadd": ("u", lambda x, y, most, least: x + y),
    "vsubss": ("i", lambda x, y, most, least: np.clip(x - y, least, most)),
    "vaddus": ("u", lambda x, y, most, least: np.clip(x + y, 0, most)),
    "vabsdiffs": ("i", lambda x, y, most, least: abs(x - y)),
    "vavgu": ("u", lambda x, y, most, least: (x + y + 1) >> 1),
    "vmaxs": ("i", lambda x, y, most, least: np.maximum(x, y)),
    "vminu": ("u", lambda x, y, most, least: np.minimum(x, y)),
    "vcmpgts": ("i", lambda x, y, most, least: np.where(x > y, -1, 0)),
    "vsetleu": ("u", lambda x, y, most, least: (x <= y).astype(int)),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", SIMD)
def test_halves_and_bytes_of_a_word(name, size):
    a, b = RNG.integers(0, 2**32, (2, 100), dtype=np.uint32)
    sign, expected = SIMD[name]
    kind = f"{sign}{size}"
    got = evaluate(f"__{name}{4 // size}(a, b)", ("unsigned", "unsigned"), "u4", a, b)
    limits = np.iinfo(kind)
    want = words(expected(parts(a, kind), parts(b, kind), limits.max, limits.min), kind)
    assert (got == want).all()


def test_minima_of_three_and_with_relu():
    a, b, c = RNG.integers(-(2**30), 2**30, (3, 100)).astype("i4")
    types = ("int",) * 3
    assert (evaluate("__vimin3_s32(a, b, c)", types, "i4", a, b, c) == np.minimum(np.minimum(a, b), c)).all()
    want = np.maximum(np.maximum(a + b, c), 0)
    assert (evaluate("__viaddmax_s32_relu(a, b, c)", types, "i4", a, b, c) == want).all()


def test_functions_of_halves():
    a, b = RNG.standard_normal((2, 100)).astype("f2")
    a[:3], b[:3] = [np.nan, 1, np.inf], [1, np.nan, -np.inf]
    types = ("half", "half")
    with np.errstate(all="ignore"):
        want = {
            "__hequ(a, b) ? half(1.f) : half(0.f)": (np.isnan(a) | np.isnan(b) | (a == b)).astype("f2"),
            "__hne(a, b) ? half(1.f) : half(0.f)": (~np.isnan(a) & ~np.isnan(b) & (a != b)).astype("f2"),
            "__hmax_nan(a, b)": np.maximum(a, b),
            "__hadd_sat(a, b)": np.nan_to_num(np.clip(a + b, 0, 1), nan=0),
            "hfloor(a)": np.floor(a),
            "hrint(a)": np.rint(a),
            "hexp2(a)": np.exp2(a.astype("f4")).astype("f2"),
            "htanh(a)": np.tanh(a.astype("f4")).astype("f2"),
            "__low2half(__lowhigh2highlow(__halves2half2(a, b)))": b,
            "__low2half(__h2div(__halves2half2(a, b), __halves2half2(b, a)))": a / b,
        }
    for expression, expected in want.items():
        np.testing.assert_allclose(evaluate(expression, types, "f2", a, b), expected, rtol=2e-3, err_msg=expression)
    finite = np.nan_to_num(a, nan=0, posinf=9)
    assert (evaluate("__half2int_rd(a)", ("half",), "i4", finite) == np.floor(finite)).all()


def test_mathematics_that_c_does_not_have():
    special = pytest.importorskip("scipy.special")
    a, b = RNG.standard_normal((2, 100))
    want = {
        "normcdf(a)": special.ndtr(a),
        "sinpi(a) + cospi(b)": np.sin(np.pi * a) + np.cos(np.pi * b),
        "rhypot(a, b)": 1 / np.hypot(a, b),
        "norm3d(a, b, 2.0)": np.sqrt(a**2 + b**2 + 4),
        "rcbrt(a)": 1 / np.cbrt(a),
        "exp10(a)": 10**a,
        "fdim(a, b)": np.maximum(a - b, 0),
    }
    for expression, expected in want.items():
        got = evaluate(expression, ("double", "double"), "f8", a, b)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15, err_msg=expression)


def test_special_functions_of_mathematics():
    special = pytest.importorskip("scipy.special")
    a, p = RNG.standard_normal(100) * 3, RNG.random(100) * 0.998 + 0.001
    small = np.logspace(-100, -1, 100)
    want = {
        "j0(a) + j1(a) + jn(2, a)": special.jv(0, a) + special.jv(1, a) + special.jv(2, a),
        "cyl_bessel_i0(a)": special.i0(a),
        "cyl_bessel_i1(a)": special.i1(a),
        "erfcx(a)": special.erfcx(a),
        "erfcx(a + 40)": special.erfcx(a + 40),
        "normcdfinv(b)": special.ndtri(p),
        "erfinv(2 * b - 1)": special.erfinv(2 * p - 1),
        "erfcinv(c) / 10": special.erfcinv(small) / 10,
        "y0(b) + y1(b) + yn(2, b)": special.yv(0, p) + special.yv(1, p) + special.yv(2, p),
    }
    for expression, expected in want.items():
        got = evaluate(expression, ("double",) * 3, "f8", a, p, small)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12, err_msg=expression)
    floats = [x.astype("f4") for x in (a, p)]
    got = evaluate("erfinvf(b) + j0f(a) + normcdfinvf(b) + erfcxf(b)", ("float",) * 2, "f4", *floats)
    expected = special.erfinv(p) + special.j0(a) + special.ndtri(p) + special.erfcx(p)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    ends = evaluate("erfinv(a)", ("double",), "f8", np.array([1.0, -1.0, 2.0, 0.0]))
    assert ends[:2].tolist() == [np.inf, -np.inf] and np.isnan(ends[2]) and ends[3] == 0


def test_predicates_are_bools(compiler):  # noqa: F811
    source = """__global__ void k(int* y, float x) {
  y[0] = isinf(-1 / x) + 2 * isnan(x / x) + 4 * isfinite(x) + 8 * signbit(-x);
  bool same = isinf(-1 / x) == true;
  y[1] = same;
}"""
    y = np.zeros(2, np.int32)
    cuda.compile(source)[1, 1](y, 0.0)
    assert y.tolist() == [15, 1]


def test_the_nth_bit_and_the_parts_of_a_float():
    mask = np.full(6, 0xF0F0, "u4")
    n = np.array([1, 2, 5, -1, -2, 9], "i4")
    base = np.array([0, 5, 0, 9, 31, 0], "i4")
    got = evaluate("(int)__fns(a, b, c)", ("unsigned", "int", "int"), "i4", mask, base, n)
    assert got.tolist() == [4, 6, 12, 7, 14, -1]
    x = np.array([3.25, -8.5], "f4")
    parts = "float w; int e; float f = modf(a, &w); float g = frexp(a, &e);"
    source = f"__global__ void k(const float* x, float* y) {{ float a = x[threadIdx.x]; {parts} y[threadIdx.x] = f + 10 * w + 100 * g + 1000 * e; }}"
    y = np.zeros(2, np.float32)
    cuda.compile(source)[1, 2](x, y)
    mantissa, exponent = np.frexp(x)
    assert np.allclose(y, np.modf(x)[0] + 10 * np.trunc(x) + 100 * mantissa + 1000 * exponent)


def test_clocks_go_on():
    source = """__global__ void k(int* y) {
  long long begin = clock64();
  unsigned now;
  while (clock64() - begin < 100) {}
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  y[0] = clock() > 100 && now > 100;
}"""
    y = np.zeros(1, np.int32)
    cuda.compile(source)[1, 1](y)
    assert y[0] == 1


HALVES = [
    "H h = a; h++; --h; r = +h - -h;", "H h(3u), g(3ll); r = h + g;", "unsigned n = a; r = H(n);", "P p(a, b); p += p; p /= p; r = p.y;",
    "P p(a, b); r = -(-p / p).x;", "P p(a, b), q(a, a); r = H(p == q) + H(p <= p) + H(p != q);", "P p(a, b); p++; --p; r = p.x;",
    "H_raw bits = a; bits.x ^= 0x8000; H h(bits); r = h;", "P_raw bits = P(a, b); unsigned short x = bits.x; bits.x = bits.y; bits.y = x; P p(bits); r = p.x;",
]  # fmt: skip


@pytest.mark.parametrize(
    "h, p, header", [("__half", "__half2", "cuda_fp16.h"), ("__nv_bfloat16", "__nv_bfloat162", "cuda_bf16.h")]
)
def test_operators_of_halves_as_cuda_has_them(h, p, header, compiler):  # noqa: F811
    lines = "\n".join(f"{{ {text} y[{i}] = (float)r; }}" for i, text in enumerate(HALVES))
    source = f"#include <{header}>\n__global__ void k(float* y, float x, float z) {{ H a = x, b = z, r;\n{lines}\n}}"
    for name, type_ in (("P_raw", p + "_raw"), ("H_raw", h + "_raw"), ("P", p), ("H", h)):
        source = re.sub(rf"\b{name}\b", type_, source)
    y = np.zeros(len(HALVES), np.float32)
    cuda.compile(source)[1, 1](y, 2.5, 4.0)
    assert y.tolist() == [5, 6, 2, 1, 1, 1, 2.5, -2.5, 4]
    device_functions.Program(source, "c++", device_functions.ProgramOptions(
        arch="sm_90", std="c++17", include_path=[str(device_functions.headers_of_cuda())])).compile("cubin")  # fmt: skip


def test_a_float_stays_a_float_in_overloaded_functions(compiler):  # noqa: F811
    source = """__global__ void k(int* y, float x) {
  y[0] = sizeof(tan(x)) + sizeof(fmod(x, x)) + sizeof(abs(x)) + sizeof(log10(x)) + sizeof(atan2(x, x)) + sizeof(fmax(x, x));
}"""
    y = np.zeros(1, np.int32)
    cuda.compile(source)[1, 1](y, 1.0)
    assert y[0] == 24
    device_functions.Program(source, "c++", device_functions.ProgramOptions(arch="sm_90")).compile("cubin")
