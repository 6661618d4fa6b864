"""PTX of tensor-core kernels: each instruction computes what the manual says, and is compiled by NVRTC as it stands."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda
from utils.cuda.ptx import TILES

gpu = pytest.importorskip("utils.cuda.gpu")
RNG = np.random.default_rng(0)

TOOLS = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cstdint>
#define LDMATRIX_X4(R0, R1, R2, R3, addr)                                           \
  asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];\n" \
               : "=r"(R0), "=r"(R1), "=r"(R2), "=r"(R3)                             \
               : "r"(addr))
__device__ __forceinline__ uint32_t address(const void* p) {
  uint32_t a;
  asm("{ .reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide; }" : "=r"(a) : "l"(p));
  return a;
}
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], %2;\n" ::"r"(to), "l"(from), "n"(16));
}
"""

# a (16, 16) and b (16, 8), both row-major, through shared memory; STRIDE is the width of a's rows there, in halves.
PRODUCT = (
    TOOLS
    + r"""
template <int STRIDE> __global__ void product(const half* a, const half* b, float* d) {
  __shared__ __align__(128) half sa[16 * STRIDE], sb[16 * 8];
  int lane = threadIdx.x;
  copy16(address(&sa[lane / 2 * STRIDE + lane % 2 * 8]), a + lane * 8);
  if (lane < 16) copy16((uint32_t)__cvta_generic_to_shared(&sb[lane * 8]), b + lane * 8);
  asm volatile("cp.async.commit_group;\n" ::);
  asm volatile("cp.async.wait_group %0;\n" ::"n"(0));
  __syncwarp();
  uint32_t ra[4], rb[2];
  LDMATRIX_X4(ra[0], ra[1], ra[2], ra[3], address(&sa[lane % 16 * STRIDE + lane / 16 * 8]));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(rb[0]), "=r"(rb[1]) : "r"(address(&sb[lane % 16 * 8])));
  float c[4] = {0.f, 0.f, 0.f, 0.f};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]),
                 "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  int row = lane / 4, column = lane % 4 * 2;
  d[row * 8 + column] = c[0];
  d[row * 8 + column + 1] = c[1];
  d[(row + 8) * 8 + column] = c[2];
  d[(row + 8) * 8 + column + 1] = c[3];
}"""
)
WMMA = r"""
#include <mma.h>
using namespace nvcuda;
__global__ void tile(const half* a, const half* b, float* d) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::row_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fd;
  wmma::fill_fragment(fd, 0.f);
  wmma::load_matrix_sync(fa, a, 16);
  wmma::load_matrix_sync(fb, b, 16);
  wmma::mma_sync(fd, fa, fb, fd);
  wmma::store_matrix_sync(d, fd, 16, wmma::mem_row_major);
}"""


@pytest.mark.parametrize("stride, conflicts", [(16, 4), (24, 0)])
def test_copies_ldmatrix_and_mma_make_a_product_with_its_bank_conflicts(stride, conflicts, compiler):  # noqa: F811
    a, b = RNG.standard_normal((16, 16)).astype("f2"), RNG.standard_normal((16, 8)).astype("f2")
    d, plain, wide = np.zeros((16, 8), "f4"), np.zeros((16, 8), "f4"), np.zeros((16, 16), "f4")
    kernel = cuda.compile(PRODUCT, template=stride)
    report = kernel.check[1, 32](a, b, d)
    kernel.fast[1, 32](a, b, plain)
    assert report.ok, str(report)
    assert (d == plain).all()
    np.testing.assert_allclose(d, a.astype("f4") @ b.astype("f4"), rtol=1e-5, atol=1e-6)
    cuda.compile(WMMA).fast[1, 32](a, np.concatenate([b, b], axis=1), wide)
    np.testing.assert_allclose(d, wide[:, :8], rtol=1e-6, atol=1e-6)
    # a's rows are 8 words apart, so 8 of them meet in 4 groups of banks; 12 words apart they do not meet
    assert sum(row.conflicts for row in report.rows if row.kind == "load") == conflicts
    loads = [row for row in report.rows if row.space == "shared" and row.kind == "load"]
    assert {row.array: (row.requests, row.bytes) for row in loads} == {"sa": (1, 512), "sb": (1, 256)}
    gpu.compile_for(PRODUCT, kernel.name, "sm_80")


def numbers(type_, shape):
    """Small whole numbers as a type's bits, and as floats."""
    low = 0 if type_ == "u8" else -4
    values = RNG.integers(low, 5, shape)
    if type_ == "bf16":
        return (values.astype("f4").view("u4") >> 16).astype("u2"), values
    return values.astype({"f16": "f2", "tf32": "f4", "s8": "i1", "u8": "u1"}[type_]), values


BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8}


def one_mma(shape, type_, sum_type):
    """A kernel that fills the registers word by word as the PTX manual lays them out; a is (16, k), b is (8, k)."""
    k, per = int(shape[6:]), 32 // BITS[type_]
    n_a, n_b = TILES[shape, type_]
    n_d, letter, c_type = (
        (2, "r", "unsigned") if sum_type == "f16" else (4, "f", "float") if sum_type == "f32" else (4, "r", "int")
    )
    numbered = ["{" + ",".join(f"%{i}" for i in range(first, first + n)) + "}"
                for first, n in ((0, n_d), (n_d, n_a), (n_d + n_a, n_b), (n_d + n_a + n_b, n_d))]  # fmt: skip
    outputs = ", ".join(f'"={letter}"(d[{i}])' for i in range(n_d))
    inputs = ", ".join([*(f'"r"(a[{i}])' for i in range(n_a)), *(f'"r"(b[{i}])' for i in range(n_b)),
                        *(f'"{letter}"(d[{i}])' for i in range(n_d))])  # fmt: skip
    words, step = k // per, 4
    return f"""
#include <cuda_fp16.h>
__global__ void k(const unsigned* x, const unsigned* y, {c_type}* z) {{
  int lane = threadIdx.x, group = lane / 4, inside = lane % 4;
  unsigned a[{n_a}], b[{n_b}];
  {c_type} d[{n_d}];
  for (int i = 0; i < {n_a}; ++i) a[i] = x[(group + i % 2 * 8) * {words} + inside + i / 2 * {step}];
  for (int i = 0; i < {n_b}; ++i) b[i] = y[group * {words} + inside + i * {step}];
  for (int i = 0; i < {n_d}; ++i) d[i] = z[lane * {n_d} + i];
  asm volatile("mma.sync.aligned.{shape}.row.col.{sum_type}.{type_}.{type_}.{sum_type} {", ".join(numbered)};"
               : {outputs} : {inputs});
  for (int i = 0; i < {n_d}; ++i) z[lane * {n_d} + i] = d[i];
}}"""


ALL = [(shape, type_, "s32" if type_ in ("s8", "u8") else "f32") for shape, type_ in TILES]
ALL += [(shape, "f16", "f16") for shape, type_ in TILES if type_ == "f16"]


@pytest.mark.parametrize("shape, type_, sum_type", ALL)
def test_every_shape_of_mma_is_numpys_product(shape, type_, sum_type, compiler):  # noqa: F811
    k = int(shape[6:])
    (x, a), (y, b) = numbers(type_, (16, k)), numbers(type_, (8, k))
    dtype = {"f32": "f4", "s32": "i4", "f16": "f2"}[sum_type]
    c = RNG.integers(-3, 4, (16, 8)).astype(dtype)
    # lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next
    held = c.reshape(2, 8, 4, 2).transpose(1, 2, 0, 3)
    z = np.ascontiguousarray(held).view("u4" if sum_type == "f16" else dtype)
    source = one_mma(shape, type_, sum_type)
    cuda.compile(source)[1, 32](x.view("u4"), y.view("u4"), z)
    got = z.view(dtype).reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    assert (got == a @ b.T + c).all()
    gpu.compile_for(source, "k", "sm_80")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_gives_each_lane_its_two_neighbours(count, trans, compiler):  # noqa: F811
    registers = "{" + ", ".join(f"%{i}" for i in range(count)) + "}"
    outputs = ", ".join(f'"=r"(r[{i}])' for i in range(count))
    source = f"""
__global__ void k(const unsigned short* x, unsigned* y) {{
  __shared__ __align__(16) unsigned short s[4 * 64];
  int lane = threadIdx.x;
  for (int i = lane; i < {count * 64}; i += 32) s[i] = x[i];
  __syncwarp();
  unsigned r[{count}];
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%{count}];"
               : {outputs} : "r"((unsigned)__cvta_generic_to_shared(&s[lane % {8 * count} * 8])));
  for (int i = 0; i < {count}; ++i) y[i * 32 + lane] = r[i];
}}"""
    x, y = np.arange(64 * count, dtype=np.uint16), np.zeros(32 * count, np.uint32)
    report = cuda.compile(source).check[1, 32](x, y)
    assert report.ok and report.bank_conflicts == 0
    matrices = x.reshape(count, 8, 8)
    expected = matrices.swapaxes(1, 2) if trans else matrices
    assert (y.view("u2").reshape(count, 8, 8) == expected).all()
    gpu.compile_for(source, "k", "sm_80")


INSTRUCTIONS = {
    'float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); y[i] = r;': np.exp2,
    'asm volatile("{\\n\\t.reg .f32 t;\\n\\tlg2.approx.f32 t, %1;\\n\\tadd.f32 %0, t, %2;\\n}" : "=f"(y[i]) : "f"(x), "f"(1.f));':
        lambda x: np.log2(x) + 1,
    'float r; asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x)); y[i] = r;': lambda x: 1 / x,
    'unsigned lane; asm("mov.u32 %0, %%laneid;" : "=r"(lane)); y[i] = lane;': lambda x: np.arange(32),
    'unsigned t; asm("mov.u32 %0, %tid.x;" : "=r"(t)); y[i] = t;': lambda x: np.arange(32),
    'float r; asm("fma.rn.f32 %0, %1, %1, %2;" : "=f"(r) : "f"(x), "f"(2.f)); y[i] = r;': lambda x: x * x + 2,
    'unsigned p; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(p) : "f"(x), "f"(1.f)); y[i] = p >> 16 == __half_as_ushort(__float2half(x));':
        np.ones_like,
}  # fmt: skip


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_single_instructions(text, compiler):  # noqa: F811
    source = f"#include <cuda_fp16.h>\n__global__ void k(const float* in, float* y) {{\n  int i = threadIdx.x; float x = in[i];\n  {text}\n}}"
    x, y = RNG.random(32).astype("f4") + 0.5, np.zeros(32, "f4")
    cuda.compile(source)[1, 32](x, y)
    np.testing.assert_allclose(y, INSTRUCTIONS[text](x), rtol=1e-6)
    gpu.compile_for(source, "k", "sm_80")


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.fence.sync.aligned;",
        "mbarrier.init.shared.b64 [%0];",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%0}, {%0}, {%0}, {%0};",
        "nonsense %0;",
        "ex2.approx.f32 %0;",
    ],
)
def test_other_ptx_is_refused_in_one_sentence_at_its_line(text, compiler):  # noqa: F811
    source = f'__global__ void k(float* y) {{\n  unsigned a = 0;\n  asm volatile("{text}" :: "r"(a));\n  y[0] = a;\n}}'
    with pytest.raises(cuda.CompileError) as error:
        cuda.compile(source)
    assert str(error.value).startswith(
        f"line 3: this is not available on the CPU ({'wgmma' if 'wgmma' in text else 'this PTX'}: "
    )


def test_lines_after_an_instruction_over_several_lines_are_where_they_were(compiler):  # noqa: F811
    lines = ["__global__ void k(float* y) {", "float r;", 'asm("ex2.approx.f32 %0, %1;"', ': "=f"(r)', ': "f"(1.f));']
    source = TOOLS + "\n".join([*lines, "y[0] = r + foo;", "}"])
    with pytest.raises(cuda.CompileError, match=f"^line {source.count(chr(10))}: "):  # one line follows it
        cuda.compile(source)


def test_a_copy_that_is_not_waited_for_is_reported_through_ptx_too(compiler):  # noqa: F811
    source = PRODUCT.replace('asm volatile("cp.async.wait_group %0;\\n" ::"n"(0));', "")
    a, b, d = np.zeros((16, 16), "f2"), np.zeros((16, 8), "f2"), np.zeros((16, 8), "f4")
    report = cuda.compile(source, template=16).check[1, 32](a, b, d)
    assert "async copy" in {p.kind for p in report.problems}
