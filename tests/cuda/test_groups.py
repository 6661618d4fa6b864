"""Cooperative groups of blocks and of parts of a warp, and what lanes find out about one another."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from tests.cuda.test_subset import LANES, ints, run
from utils import cuda

BEGIN = "#include <cooperative_groups.h>\n#include <cooperative_groups/reduce.h>\nnamespace cg = cooperative_groups;\n"


def compile_for_gpu(source):
    """Where CUDA's C++ headers are installed, the same text is compiled for a GPU."""
    gpu = pytest.importorskip("utils.cuda.gpu")
    try:
        gpu.compile_for(source, "k", "sm_90")
    except cuda.CompileError as error:
        if "nvidia-cuda-cccl" not in str(error):
            raise


def test_ranks_and_sizes(compiler):  # noqa: F811
    source = (
        BEGIN
        + r"""
__global__ void k(int* y) {
  cg::thread_block block = cg::this_thread_block();
  cg::thread_block_tile<32> warp = cg::tiled_partition<32>(block);
  auto four = cg::tiled_partition<4>(warp);
  cg::thread_group eight = cg::tiled_partition(block, 8);
  int i = block.thread_rank(), n = block.size();
  y[i] = i + 1000 * block.group_index().y;
  y[n + i] = warp.meta_group_rank() + 10 * warp.thread_rank() + 1000 * warp.meta_group_size();
  y[2 * n + i] = four.thread_rank() + 10 * four.meta_group_rank() + 1000 * four.size();
  y[3 * n + i] = eight.thread_rank() + 10 * eight.size() + 1000 * cg::this_grid().thread_rank();
}"""
    )
    y = run(source, ints(4 * 96), grid=1, block=(8, 4, 3)).reshape(4, 96)
    i = np.arange(96)
    assert y[0].tolist() == i.tolist()
    assert y[1].tolist() == (i // 32 + 10 * (i % 32) + 3000).tolist()
    assert y[2].tolist() == (i % 4 + 10 * (i % 32 // 4) + 4000).tolist()
    assert y[3].tolist() == (i % 8 + 80 + 1000 * i).tolist()
    compile_for_gpu(source)


def test_shuffles_votes_and_reductions_of_tiles(compiler):  # noqa: F811
    source = (
        BEGIN
        + r"""
#include <cooperative_groups/scan.h>
__global__ void k(int* y) {
  auto block = cg::this_thread_block();
  auto tile = cg::tiled_partition<8>(block);
  int i = threadIdx.x;
  y[i] = tile.shfl(i, 3);
  y[32 + i] = tile.shfl_down(i, 2);
  y[64 + i] = tile.shfl_up(i, 2);
  y[96 + i] = tile.shfl_xor(i, 5);
  y[128 + i] = tile.ballot(i % 3 == 0) + 1000 * tile.any(i == 9) + 10000 * tile.all(i < 16);
  y[160 + i] = cg::reduce(tile, i, cg::plus<int>()) + 1000 * cg::reduce(tile, i, cg::greater<int>());
  y[192 + i] = cg::inclusive_scan(tile, i) + 1000 * cg::exclusive_scan(tile, i, cg::plus<int>());
  y[224 + i] = tile.match_any(i / 3);
}"""
    )
    y = run(source, ints(256)).reshape(8, 32)
    i, of_tiles = LANES, LANES.reshape(4, 8)
    first = i // 8 * 8
    assert y[0].tolist() == (first + 3).tolist()
    assert y[1].tolist() == np.where(i % 8 + 2 < 8, i + 2, i).tolist()
    assert y[2].tolist() == np.where(i % 8 >= 2, i - 2, i).tolist()
    assert y[3].tolist() == (i ^ 5).tolist()
    ballot = [sum(1 << k for k in range(8) if (f + k) % 3 == 0) for f in first]
    assert y[4].tolist() == (ballot + 1000 * (first == 8) + 10000 * (first < 16)).tolist()
    assert y[5].tolist() == np.repeat(of_tiles.sum(1) + 1000 * of_tiles.max(1), 8).tolist()
    total = np.cumsum(of_tiles, 1)
    assert y[6].tolist() == (total + 1000 * (total - of_tiles)).ravel().tolist()
    assert y[7].tolist() == [sum(1 << k for k in range(8) if (f + k) // 3 == a // 3) for f, a in zip(first, i)]
    compile_for_gpu(source)


def test_lanes_that_are_active_together(compiler):  # noqa: F811
    source = (
        BEGIN
        + r"""
__global__ void k(int* y) {
  int i = threadIdx.x;
  if (i % 3 == 1) {
    auto active = cg::coalesced_threads();
    y[i] = active.size() + 100 * active.thread_rank() + 10000 * active.shfl(i, 2);
  } else {
    unsigned mask = __activemask();
    y[i] = __popc(mask) + 100 * __reduce_add_sync(mask, 1u);
  }
  auto odd = cg::binary_partition(cg::tiled_partition<32>(cg::this_thread_block()), i % 2);
  y[32 + i] = odd.size() + 100 * odd.thread_rank();
}"""
    )
    y = run(source, ints(64))
    inside = LANES % 3 == 1
    assert y[:32].tolist() == np.where(inside, 11 + 100 * (LANES // 3) + 10000 * 7, 21 + 2100).tolist()
    assert y[32:].tolist() == (16 + 100 * (LANES // 2)).tolist()
    compile_for_gpu(source)


def test_a_group_copies_and_waits(compiler):  # noqa: F811
    source = (
        BEGIN
        + r"""
#include <cooperative_groups/memcpy_async.h>
__global__ void k(float* y, const float* x) {
  __shared__ float s[128];
  auto block = cg::this_thread_block();
  cg::memcpy_async(block, s, x, sizeof s);
  cg::wait(block);
  for (int i = threadIdx.x; i < 128; i += blockDim.x) y[i] = s[127 - i];
}"""
    )
    x = np.arange(128, dtype=np.float32)
    assert run(source, np.zeros(128, np.float32), block=64, arguments=(x,)).tolist() == x[::-1].tolist()
    compile_for_gpu(source)


@pytest.mark.parametrize("wrong", ["block.sync()", "cg::sync(block)", "cg::wait(block)"])
def test_a_missing_sync_of_a_group_is_a_race(wrong, compiler):  # noqa: F811
    source = (
        BEGIN.replace("reduce", "memcpy_async")
        + f"""
__global__ void k(float* y) {{
  __shared__ float s[64];
  auto block = cg::this_thread_block();
  s[threadIdx.x] = threadIdx.x;
  {wrong};
  y[threadIdx.x] = s[63 - threadIdx.x];
}}"""
    )
    y = np.zeros(64, np.float32)
    assert cuda.compile(source).check[1, 64](y).ok and y[0] == 63
    report = cuda.compile(source.replace(wrong, "")).check[1, 64](y)
    assert [p.line for p in report.problems if p.kind == "race"][0] in (8, 10)


def test_a_tile_orders_its_lanes_and_no_others(compiler):  # noqa: F811
    source = (
        BEGIN
        + r"""
template <int N> __global__ void k(float* y) {
  __shared__ float s[64];
  auto tile = cg::tiled_partition<N>(cg::this_thread_block());
  s[threadIdx.x] = threadIdx.x;
  tile.sync();
  y[threadIdx.x] = s[threadIdx.x ^ 31];
}"""
    )
    y = np.zeros(64, np.float32)
    assert cuda.compile(source, template=32).check[1, 64](y).ok
    assert y.tolist() == [i ^ 31 for i in range(64)]


def test_what_a_grid_cannot_do_here_is_said_at_its_line(compiler):  # noqa: F811
    with pytest.raises(cuda.CompileError) as error:
        cuda.compile(BEGIN + "__global__ void k(int* y) {\n  cg::this_grid().sync();\n}")
    assert str(error.value).startswith("line 5: ") and "a grid cannot meet on the CPU" in str(error.value)


def test_matches_and_reductions_of_a_warp(compiler):  # noqa: F811
    source = r"""
__global__ void k(int* y) {
  int i = threadIdx.x, equal;
  y[i] = (int)__match_any_sync(0xffffffffu, i % 5);
  y[32 + i] = (int)__match_all_sync(0xffffffffu, 7.5f, &equal) + equal;
  y[64 + i] = (int)__match_all_sync(0xffffffffu, (long long)(i / 31), &equal) + equal;
  y[96 + i] = __reduce_add_sync(0xffffffffu, -i) + __reduce_max_sync(0xffffffffu, i - 40);
  y[128 + i] = (int)(__reduce_min_sync(0xffffffffu, (unsigned)i + 3u) + __reduce_or_sync(0xffffffffu, 1u << i % 7));
  y[160 + i] = (int)(__reduce_and_sync(0xffffffffu, i | 12u) + __reduce_xor_sync(0xffffffffu, (unsigned)i * 3u));
}"""
    y = run(source, ints(192)).reshape(6, 32)
    same = [np.int32(np.uint32(sum(1 << k for k in range(32) if k % 5 == i % 5))) for i in LANES]
    assert y[0].tolist() == [int(s) for s in same]
    assert (y[1] == 0).all() and (y[2] == 0).all()  # all 32 bits, and 1; none, and 0
    assert (y[3] == -496 - 9).all() and (y[4] == 3 + 127).all()
    assert (y[5] == 12 + np.bitwise_xor.reduce(LANES * 3)).all()
    compile_for_gpu(source)


def test_more_atomics(compiler):  # noqa: F811
    source = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
__global__ void k(unsigned* u, long long* l, half* h, __nv_bfloat16* b, float2* f, unsigned short* s) {
  unsigned i = threadIdx.x;
  atomicInc(&u[0], 9u);
  atomicDec(&u[1], 9u);
  atomicAdd_block(&u[2], i);
  atomicMax(&l[0], (long long)i << 40);
  atomicMin(&l[1], -((long long)i << 40));
  atomicAdd(&h[0], __float2half(0.5f));
  atomicAdd((half2*)&h[2], __floats2half2_rn(1.f, 2.f));
  atomicAdd(&b[0], __float2bfloat16(0.25f));
  atomicAdd((__nv_bfloat162*)&b[2], __floats2bfloat162_rn(1.f, -1.f));
  atomicAdd(&f[0], make_float2(1.f, 0.5f));
  atomicCAS(&s[0], (unsigned short)0, (unsigned short)(i + 1));
}"""
    u, wide, h, b, f, s = run(
        source,
        *(np.zeros(4, t) for t in (np.uint32, np.int64, np.float16, np.uint16)),
        np.zeros((1, 2), np.float32),
        np.zeros(2, np.uint16),
    )
    assert u.tolist() == [32 % 10, 8, 496, 0] and wide.tolist() == [31 << 40, -(31 << 40), 0, 0]
    assert h.tolist() == [16, 0, 32, 64] and f.tolist() == [[32, 16]] and s[0] == 1
    assert (b.astype(np.uint32) << 16).view(np.float32).tolist() == [8, 0, 32, -32]
    compile_for_gpu(source)
