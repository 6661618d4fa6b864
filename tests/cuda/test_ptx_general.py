"""PTX that is not about tensor cores: each instruction gives what the manual says, and is compiled by NVRTC as it stands."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

gpu = pytest.importorskip("utils.cuda.gpu")
RNG = np.random.default_rng(0)
A, B, C = RNG.integers(0, 1 << 32, (3, 32), dtype="u4")
INT_A, INT_B = A.view("i4"), B.view("i4")
SHIFT = (C % 40).astype("u4")


def prmt(a, b, selector):
    bytes_ = np.concatenate([a.view("u1").reshape(-1, 4), b.view("u1").reshape(-1, 4)], 1)
    return sum(bytes_[:, selector >> 4 * i & 7].astype("u4") << 8 * i for i in range(4))


def majority(a, b, c):
    return a & b | b & c | a & c


# what %0 becomes of %1, %2, %3, all 32-bit registers
WORDS = {
    "add.u32 %0, %1, %2;": A + B,
    "sub.s32 %0, %1, %2;": A - B,
    "mul.lo.u32 %0, %1, %2;": A * B,
    "mul.hi.u32 %0, %1, %2;": (A.astype("u8") * B >> np.uint64(32)).astype("u4"),
    "mad.lo.s32 %0, %1, %2, %3;": A * B + SHIFT,
    "min.s32 %0, %1, %2;": np.minimum(INT_A, INT_B).view("u4"),
    "max.u32 %0, %1, %2;": np.maximum(A, B),
    "and.b32 %0, %1, %2;": A & B,
    "xor.b32 %0, %1, %2;": A ^ B,
    "not.b32 %0, %1;": ~A,
    "shl.b32 %0, %1, %3;": np.where(SHIFT < 32, A << SHIFT % 32, 0),
    "shr.u32 %0, %1, %3;": np.where(SHIFT < 32, A >> SHIFT % 32, 0),
    "shr.s32 %0, %1, %3;": (INT_A >> np.minimum(SHIFT, 31).astype("i4")).view("u4"),
    "lop3.b32 %0, %1, %2, %3, 0xe8;": majority(A, B, SHIFT),
    "lop3.b32 %0, %1, %2, %3, 0xea;": A & B | SHIFT,
    "prmt.b32 %0, %1, %2, 0x5140;": prmt(A, B, 0x5140),
    "bfe.u32 %0, %1, 7, 9;": A >> 7 & 511,
    "bfe.s32 %0, %1, 7, 9;": (INT_A << 16 >> 23).view("u4"),
    "bfi.b32 %0, %1, %2, 4, 8;": B & ~np.uint32(0xFF0) | A << 4 & 0xFF0,
    "{ .reg .pred p; setp.lt.u32 p, %1, %2; selp.b32 %0, %1, %2, p; }": np.minimum(A, B),
    "{ .reg .pred p;\n setp.ge.s32 p, %1, %2;\n mov.b32 %0, 0;\n @p mov.b32 %0, %1;\n @!p mov.b32 %0, %2; }": np.maximum(
        INT_A, INT_B
    ).view("u4"),
    "{ .reg .b64 w; mov.b64 w, {%1, %2}; shr.u64 w, w, 16; cvt.u32.u64 %0, w; }": A >> 16 | B << 16,
    "{ .reg .u32 low, high; .reg .b64 w; mul.wide.u32 w, %1, %2; mov.b64 {low, high}, w; xor.b32 %0, low, high; }": (
        A * B ^ (A.astype("u8") * B >> np.uint64(32)).astype("u4")
    ),
    "shfl.sync.bfly.b32 %0, %1, 5, 31, -1;": A[np.arange(32) ^ 5],
    "shfl.sync.idx.b32 %0, %1, 7, 0x1f, 0xffffffff;": np.full(32, A[7]),
    "mov.u32 %0, %%lanemask_lt;": (1 << np.arange(32, dtype="u8")) - 1,
    "mov.u32 %0, %%warpid;": np.zeros(32, "u4"),
}


@pytest.mark.parametrize("template", WORDS)
def test_words(template, compiler):  # noqa: F811
    text = template.replace("\n", "\\n")
    source = f"""__global__ void k(const unsigned* a, const unsigned* b, const unsigned* c, unsigned* d) {{
      int i = threadIdx.x; unsigned r;
      asm volatile("{text}" : "=r"(r) : "r"(a[i]), "r"(b[i]), "r"(c[i]));
      d[i] = r;
    }}"""
    d = np.zeros(32, "u4")
    cuda.compile(source)[1, 32](A, B, SHIFT, d)
    assert (d == WORDS[template].astype("u4")).all()
    gpu.compile_for(source, "k", "sm_90")


def test_a_move_keeps_bits_and_a_conversion_the_value(compiler):  # noqa: F811
    source = r"""__global__ void k(const float* x, unsigned* bits, float* back, int* whole, unsigned short* halves, float* from) {
      int i = threadIdx.x; float one, y; unsigned b; int n; unsigned short h;
      asm("mov.b32 %0, %1;" : "=r"(b) : "f"(x[i]));
      asm("mov.b32 %0, %1;" : "=f"(y) : "r"(b));
      asm("cvt.rni.s32.f32 %0, %1;" : "=r"(n) : "f"(x[i]));
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x[i]));
      asm("mov.f32 %0, 0f3F800000;" : "=f"(one));
      bits[i] = b; back[i] = y; whole[i] = n; halves[i] = h;
      asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(h));
      from[i] = y + one;
    }"""
    x = (RNG.standard_normal(32) * 9).astype("f4")
    bits, back, whole, halves, from_ = np.zeros(32, "u4"), x * 0, np.zeros(32, "i4"), np.zeros(32, "u2"), x * 0
    cuda.compile(source)[1, 32](x, bits, back, whole, halves, from_)
    assert (bits == x.view("u4")).all() and (back == x).all() and (whole == np.rint(x)).all()
    assert (halves.view("f2") == x.astype("f2")).all() and (from_ == x.astype("f2").astype("f4") + 1).all()
    gpu.compile_for(source, "k", "sm_90")


VECTORS = r"""__global__ void k(const float* x, float* y, int far) {
  __shared__ float4 s[32];
  int i = threadIdx.x; float a, b, c, d;
  unsigned to = (unsigned)__cvta_generic_to_shared(&s[i]);
  asm volatile("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "l"(x + 4 * i));
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(to), "f"(d), "f"(c), "f"(b), "f"(a) : "memory");
  asm volatile("ld.shared.f32 %0, [%1+8];" : "=f"(a) : "r"(to) : "memory");
  asm volatile("st.global.cs.f32 [%0+4], %1;" :: "l"(y + 2 * i + far), "f"(a) : "memory");
}"""


def test_loads_and_stores_are_counted_and_checked_as_others(compiler):  # noqa: F811
    x, y = RNG.standard_normal(128).astype("f4"), np.zeros(64, "f4")
    kernel = cuda.compile(VECTORS)
    report = kernel.check[1, 32](x, y, 0)
    assert report.ok, str(report)
    assert (y.reshape(32, 2)[:, 1] == x.reshape(32, 4)[:, 1]).all()
    counted = {(row.space, row.kind, row.line): row.bytes for row in report.rows}
    assert counted == {
        ("global", "load", 5): 512,
        ("shared", "store", 6): 512,
        ("shared", "load", 7): 128,
        ("global", "store", 8): 128,
    }
    gpu.compile_for(VECTORS, "k", "sm_90")
    assert "OUT OF BOUNDS" in str(kernel.check[1, 32](x, y, 1))
    unwritten = VECTORS.replace("st.shared.v4", "// st.shared.v4")
    assert "UNWRITTEN" in str(cuda.compile(unwritten).check[1, 32](x, y, 0))


def test_atomics_and_copies_with_hints_and_predicates(compiler):  # noqa: F811
    source = r"""__global__ void k(const int4* x, int4* y, int* sum, int n) {
      __shared__ int4 s[32];
      int i = threadIdx.x, old;
      s[i] = make_int4(-1, -1, -1, -1);
      __syncwarp();
      unsigned to = (unsigned)__cvta_generic_to_shared(&s[i]);
      asm volatile("{ .reg .pred p; .reg .b64 policy;\n"
                   "  setp.ne.b32 p, %2, 0;\n"
                   "  createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                   "  @p cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, policy; }" :: "r"(to), "l"(x + i), "r"((int)(i < n)) : "memory");
      asm volatile("cp.async.commit_group; cp.async.wait_all;" ::: "memory");
      y[i] = s[i];
      asm volatile("atom.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(sum), "r"(1) : "memory");
      asm volatile("red.global.max.s32 [%0], %1;" :: "l"(sum + 1), "r"(old) : "memory");
    }"""
    x, y, sum_ = RNG.integers(0, 99, (32, 4)).astype("i4"), np.zeros((32, 4), "i4"), np.zeros(2, "i4")
    report = cuda.compile(source).check[1, 32](x, y, sum_, 20)
    assert report.ok, str(report)
    assert (y[:20] == x[:20]).all() and (y[20:] == -1).all() and sum_.tolist() == [32, 31]
    gpu.compile_for(source, "k", "sm_90")


@pytest.mark.parametrize(
    "instruction", ["bar.sync 1, 64;", "shfl.sync.bfly.b32 %0, %0, 1, 0x181f, -1;", "wgmma.fence.sync.aligned;"]
)
def test_what_has_no_meaning_here_is_refused_and_not_guessed(instruction):
    source = f'__global__ void k(int* x) {{\n int r = 0;\n asm volatile("{instruction}" : "+r"(r));\n x[0] = r; }}'
    with pytest.raises(cuda.CompileError, match="line 3: this is not available on the CPU"):
        cuda.compile(source)
