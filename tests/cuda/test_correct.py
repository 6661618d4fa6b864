"""Correct kernels: right results, no false report, exact byte counts, checked and plain, under both compilers."""

import numpy as np
import pytest

from tests.cuda.cases import CASES, attention, flash, matmul, up
from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda
from utils.cuda import samples
from utils.cuda.cpu.toolchain import zig_command


@pytest.mark.parametrize("name", CASES)
def test_correct_kernels_give_numpys_result_and_no_report(name, compiler):  # noqa: F811
    case = CASES[name]
    kernel = cuda.compile(case.source, case.name, case.template)
    report, result, expected = case.launch(kernel.check)
    assert report.problems == []
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert report.global_loaded > 0 and report.global_stored > 0


@pytest.mark.parametrize("name", CASES)
def test_the_plain_build_gives_the_same_result(name):
    case = CASES[name]
    kernel = cuda.compile(case.source, case.name, case.template)
    _, plain, expected = case.launch(kernel.fast)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
    _, again, _ = case.launch(kernel.fast)
    np.testing.assert_array_equal(plain, again)


def counts(report):
    return (
        report.global_loaded,
        report.global_stored,
        report.sectors_loaded,
        report.sectors_stored,
        report.distinct_loaded,
        report.distinct_stored,
    )


@pytest.mark.parametrize("name", CASES)
def test_both_compilers_count_the_same_bytes_and_sectors(name, monkeypatch):
    case, seen = CASES[name], {}
    if zig_command() is None:
        pytest.skip("zig is not installed")
    for chosen in ("g++", "zig"):
        monkeypatch.setenv("CUDA_COURSE_CXX", chosen)
        report, _, _ = case.launch(cuda.compile(case.source, case.name, case.template).check)
        seen[chosen] = counts(report)
    assert seen["g++"] == seen["zig"]


def test_matmul_moves_its_formulas_bytes_at_twenty_sizes(compiler):  # noqa: F811
    kernel, rng = cuda.compile(samples.MATMUL), np.random.default_rng(1)
    for seed in range(20):
        rows, inner, columns = map(int, rng.integers(1, 60, 3))
        report, result, expected = matmul(kernel.check, rows, inner, columns, seed)
        assert report.ok
        assert report.global_loaded == 4 * (up(columns, 16) * rows * inner + up(rows, 16) * inner * columns)
        assert report.global_stored == 4 * rows * columns
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_flash_moves_its_formulas_bytes_at_twenty_sizes(compiler):  # noqa: F811
    d, rng = 32, np.random.default_rng(2)
    kernel = cuda.compile(samples.FLASH, template=(d,))
    for seed in range(20):
        n, heads = int(rng.integers(1, 140)), int(rng.integers(1, 3))
        report, result, expected = flash(kernel.check, n, heads, d, seed)
        assert report.ok
        assert report.global_loaded == 4 * heads * n * d * (1 + 2 * up(n, 64))
        assert report.global_stored == 4 * heads * n * d
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


COPY = r"""
__global__ void copy(const float* x, float* y, int stride, int offset) {
  int i = threadIdx.x * stride + offset;
  y[threadIdx.x] = x[i];
}
"""


@pytest.mark.parametrize("stride, offset, sectors", [(1, 0, 4), (1, 1, 5), (2, 0, 8), (8, 0, 32), (0, 3, 1)])
def test_a_warps_sectors_follow_its_stride(stride, offset, sectors):
    report = cuda.compile(COPY).check[1, 32](np.zeros(512, np.float32), np.zeros(32, np.float32), stride, offset)
    assert report.sectors_loaded == sectors and report.sectors_stored == 4
    assert report.sectors_per_request == {4: max(sectors, 4)}


BANKS = r"""
__global__ void banks(float* y, int stride) {
  __shared__ float s[1024];
  for (int i = threadIdx.x; i < 1024; i += 32) s[i] = i;
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x * stride % 1024];
}
"""


@pytest.mark.parametrize("stride, extra", [(0, 0), (1, 0), (2, 1), (3, 0), (4, 3), (16, 15), (32, 31), (33, 0)])
def test_bank_conflicts_follow_the_stride(stride, extra):
    report = cuda.compile(BANKS).check[1, 32](np.zeros(32, np.float32), stride)
    assert report.ok and report.bank_conflicts == extra


def test_a_column_read_of_a_square_tile_conflicts_and_padding_cures_it():
    x, y = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.float32)
    square, padded = (
        cuda.compile(samples.TRANSPOSE, template=(pad,)).check[1, (32, 32)](x, y, 32, 32) for pad in (0, 1)
    )
    assert square.bank_conflicts == 32 * 31 and padded.bank_conflicts == 0


WIDE = r"""
template <class V, class T>
__global__ void wide(const T* x, float* y) {
  V v = reinterpret_cast<const V*>(x)[threadIdx.x];
  y[threadIdx.x] = (float)v.x;
}
"""


@pytest.mark.parametrize(
    "vector, number, dtype, size",
    [
        ("half2", "half", np.float16, 4),
        ("nv_bfloat162", "nv_bfloat16", np.uint16, 4),
        ("float2", "float", np.float32, 8),
        ("int4", "int", np.int32, 16),
        ("float4", "float", np.float32, 16),
        ("double2", "double", np.float64, 16),
    ],
)
def test_a_vector_is_read_whole(vector, number, dtype, size, compiler):  # noqa: F811
    x, y = np.arange(128, dtype=dtype), np.zeros(32, np.float32)
    load, store = cuda.compile(WIDE, template=(vector, number)).check[1, 32](x, y).rows
    assert (load.requests, load.bytes, load.sectors) == (1, 32 * size, size)
    assert (store.requests, store.bytes, store.sectors) == (1, 128, 4)


def test_distinct_bytes_count_a_sector_once_however_often_it_is_read():
    x, y = np.zeros(32, np.float32), np.zeros(32, np.float32)
    report = cuda.compile(COPY).check[1, 32](x, y, 0, 5)
    assert report.global_loaded == 128 and report.distinct_loaded == 32 and report.distinct_stored == 128


def test_torch_tensors_on_the_cpu_are_read_and_written_in_place():
    torch = pytest.importorskip("torch")
    x, y = torch.arange(32, dtype=torch.float32), torch.zeros(32)
    assert cuda.compile(COPY)[1, 32](x, y, 1, 0) is None
    assert torch.equal(x, y)


def test_flash_agrees_with_numpy_at_the_lectures_size():
    q, k, v = np.random.default_rng(3).standard_normal((3, 1, 128, 64), dtype=np.float32)
    out = np.zeros_like(q)
    cuda.compile(samples.FLASH, template=(64,)).fast[2, 128, samples.flash_shared_bytes(64)](q, k, v, out, 128, 0.125)
    np.testing.assert_allclose(out, attention(q, k, v), atol=1e-5)
