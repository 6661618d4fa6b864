"""Functions of integers, bits and conversions, against Python's whole numbers; each is compiled by NVRTC too."""

import math

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

gpu = pytest.importorskip("utils.cuda.gpu")


def signed(x, bits=32):
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def unsigned(x, bits=32):
    return x % 2**bits


def reversed_bits(x, bits):
    return int(f"{unsigned(x, bits):0{bits}b}"[::-1], 2)


def low24(x):
    return signed(x % 2**24 << 8) >> 8


def permuted(a, b, c):
    data = (unsigned(b) << 32 | unsigned(a)).to_bytes(8, "little")
    chosen = [
        (data[n & 7] if n < 8 else 255 * (data[n & 7] >> 7)) for n in (unsigned(c) >> 4 * i & 15 for i in range(4))
    ]
    return int.from_bytes(bytes(chosen), "little")


def dot4(a, b, c):
    bytes_of = [np.frombuffer(unsigned(x).to_bytes(4, "little"), np.int8).astype(int) for x in (a, b)]
    return signed(int((bytes_of[0] * bytes_of[1]).sum()) + c)


# name: (expression of int a, b, c; what Python says)
EXPRESSIONS = {
    "mulhi": ("__mulhi(a, b)", lambda a, b, c: a * b >> 32),
    "umulhi": ("(int)__umulhi(a, b)", lambda a, b, c: signed(unsigned(a) * unsigned(b) >> 32)),
    "mul24": ("__mul24(a, b)", lambda a, b, c: signed(low24(a) * low24(b))),
    "umul24": ("(int)__umul24(a, b)", lambda a, b, c: signed((a % 2**24) * (b % 2**24))),
    "mul64hi": ("(int)__mul64hi((long long)a * b, (long long)b * c)", lambda a, b, c: signed(a * b * b * c >> 64)),
    "brev": ("(int)__brev(a)", lambda a, b, c: signed(reversed_bits(a, 32))),
    "brevll": ("(int)(__brevll((long long)a * b) >> 7)", lambda a, b, c: signed(reversed_bits(a * b, 64) >> 7)),
    "clz": ("__clz(a)", lambda a, b, c: 32 - unsigned(a).bit_length()),
    "clzll": ("__clzll((long long)a * b)", lambda a, b, c: 64 - unsigned(a * b, 64).bit_length()),
    "ffs": ("__ffs(a)", lambda a, b, c: (a & -a).bit_length()),
    "ffsll": ("__ffsll((long long)a << 9)", lambda a, b, c: (a << 9 & -(a << 9)).bit_length()),
    "popc": (
        "__popc(a) + __popcll((long long)a)",
        lambda a, b, c: unsigned(a).bit_count() + unsigned(a, 64).bit_count(),
    ),
    "sad": ("(int)__sad(a, b, c)", lambda a, b, c: signed(abs(a - b) + c)),
    "hadd": ("__hadd(a, b)", lambda a, b, c: a + b >> 1),
    "rhadd": ("__rhadd(a, b)", lambda a, b, c: a + b + 1 >> 1),
    "uhadd": ("(int)__uhadd(a, b)", lambda a, b, c: signed(unsigned(a) + unsigned(b) >> 1)),
    "byte_perm": ("(int)__byte_perm(a, b, c)", lambda a, b, c: signed(permuted(a, b, c))),
    "funnelshift_l": (
        "(int)__funnelshift_l(a, b, c)",
        lambda a, b, c: signed((unsigned(b) << 32 | unsigned(a)) << (c & 31) >> 32),
    ),
    "funnelshift_rc": (
        "(int)__funnelshift_rc(a, b, c)",
        lambda a, b, c: signed((unsigned(b) << 32 | unsigned(a)) >> min(unsigned(c), 32)),
    ),
    "dp4a": ("__dp4a(a, b, c)", dot4),
    "min of int and unsigned": ("(int)min(a, (unsigned)b)", lambda a, b, c: signed(min(unsigned(a), unsigned(b)))),
    "max of long long": (
        "(int)max((long long)a, (unsigned long long)b)",
        lambda a, b, c: signed(max(unsigned(a, 64), unsigned(b, 64))),
    ),
    "uint": ("(int)((uint)a / (ushort)7)", lambda a, b, c: signed(unsigned(a) // 7)),
}
NUMBERS = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 96)).astype(np.int32)
NUMBERS[:, :6] = [[0, -1, 1, 2**31 - 1, -(2**31), 7], [0, -1, 3, -(2**31), -(2**31), -7], [0, 33, 31, 32, -1, 5]]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_function_of_integers(name, compiler):  # noqa: F811
    expression, expected = EXPRESSIONS[name]
    source = f"""
__global__ void k(const int* x, const int* y, const int* z, int* out) {{
  int a = x[threadIdx.x], b = y[threadIdx.x], c = z[threadIdx.x];
  out[threadIdx.x] = {expression};
}}"""
    out = np.zeros(96, np.int32)
    cuda.compile(source)[1, 96](*map(np.ascontiguousarray, NUMBERS), out)
    assert out.tolist() == [expected(*map(int, abc)) for abc in NUMBERS.T]
    gpu.compile_for(source, "k", "sm_90")


ROUND = {"rn": np.rint, "rz": np.trunc, "rd": np.floor, "ru": np.ceil}
RANGE = {"int": (32, True), "uint": (32, False), "ll": (64, True), "ull": (64, False)}
TYPES = {"int": "int", "uint": "unsigned", "ll": "long long", "ull": "unsigned long long"}


@pytest.mark.parametrize("how", ROUND)
@pytest.mark.parametrize("to", RANGE)
@pytest.mark.parametrize("type_", ["float", "double"])
def test_a_conversion_rounds_saturates_and_takes_nan_for_zero(type_, to, how):
    source = f"__global__ void k(const {type_}* x, {TYPES[to]}* y) {{ y[threadIdx.x] = __{type_}2{to}_{how}(x[threadIdx.x]); }}"
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, 2.0**31, -(2.0**31), 1e19, 2e19, -1e30, math.inf, -math.inf, math.nan, 2.0**63],
                 "f4" if type_ == "float" else "f8")  # fmt: skip
    bits, is_signed = RANGE[to]
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    expected = [
        0
        if v != v
        else most
        if v == math.inf
        else least
        if v == -math.inf
        else min(max(int(ROUND[how](v)), least), most)
        for v in x
    ]
    y = np.zeros(len(x), f"{'i' if is_signed else 'u'}{bits // 8}")
    cuda.compile(source)[1, len(x)](x, y)
    assert y.tolist() == expected
    gpu.compile_for(source, "k", "sm_90")


def test_cache_hints_are_loads_and_stores_at_their_lines(compiler):  # noqa: F811
    source = """
__global__ void k(const float* x, const float4* v, float* y, float4* w) {
  int i = threadIdx.x;
  float a = __ldcs(&x[i]) + __ldcg(x + i) + __ldca(&x[i]) + __ldlu(&x[i]) + __ldcv(&x[i]);
  float4 b = __ldcs(v + i);
  __stcs(&y[i], a);
  __stcg(y + i, a); __stwb(y + i, a); __stwt(y + i, a);
  __stcs(w + i, b);
}"""
    x, v, y, w = np.ones(32, "f4"), np.ones((32, 4), "f4"), np.zeros(32, "f4"), np.zeros((32, 4), "f4")
    report = cuda.compile(source).check[1, 32](x, v, y, w)
    assert report.ok and (y == 5).all() and (w == 1).all()
    assert {(row.line, row.array) for row in report.rows} >= {(4, "x"), (5, "v"), (8, "w")}
    gpu.compile_for(source, "k", "sm_90")


@pytest.mark.parametrize("bounds", ["(128)", "((A * B) / (C), 1)", "(max_of(A, (B)), (1))"])
def test_launch_bounds_may_be_an_expression(bounds):
    source = f"""
#define A 64
#define B 32
#define C (8 * 2)
__device__ constexpr int max_of(int a, int b) {{ return a > b ? a : b; }}
__global__ void __launch_bounds__{bounds} k(float* y) {{ y[threadIdx.x] = 1.f; }}"""
    y = np.zeros(32, np.float32)
    kernel = cuda.compile(source)
    kernel[1, 32](y)
    assert (y == 1).all() and kernel.parameters == ("y",)
    gpu.compile_for(source, "k", "sm_90")
