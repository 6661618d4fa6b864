"""What orders blocks: an atomic behind a __threadfence(). Right kernels are not reported, and each of their mistakes is."""

import numpy as np
import pytest

from tests.cuda.compilers import compiler  # noqa: F401
from utils import cuda

gpu = pytest.importorskip("utils.cuda.gpu")

# The last block to draw a ticket adds up what all have stored.
TICKET = r"""
__global__ void total(const float* x, float* parts, unsigned* tickets, float* sum) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    float mine = 0.f;
    for (int i = 0; i < 32; ++i) mine += x[blockIdx.x * 32 + i];
    parts[blockIdx.x] = mine;
    __threadfence();
    last = atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float all = 0.f;
    for (int b = 0; b < gridDim.x; ++b) all += parts[b];
    *sum = all;
    *tickets = 0;
  }
}"""
# One block after another, in the order in which they take the lock, changes what it holds.
LOCK = r"""
__global__ void total(const float* x, float* parts, unsigned* lock, float* sum) {
  if (threadIdx.x == 0) {
    while (atomicCAS(lock, 0u, 1u) != 0u) {}
    for (int i = 0; i < 32; ++i) *sum += x[blockIdx.x * 32 + i];
    __threadfence();
    atomicExch(lock, 0u);
  }
}"""
# Each block waits for the one before it, and hands on.
CHAIN = r"""
__global__ void total(const float* x, float* parts, unsigned* ready, float* sum) {
  if (threadIdx.x == 0) {
    while (atomicAdd(ready, 0u) != blockIdx.x) {}
    float before = blockIdx.x ? parts[blockIdx.x - 1] : 0.f;
    for (int i = 0; i < 32; ++i) before += x[blockIdx.x * 32 + i];
    parts[blockIdx.x] = before;
    if (blockIdx.x == gridDim.x - 1) *sum = before;
    __threadfence();
    atomicAdd(ready, 1u);
  }
}"""
# The same in PTX: a load that acquires, a reduction that releases.
PTX = CHAIN.replace(
    "while (atomicAdd(ready, 0u) != blockIdx.x) {}",
    'unsigned seen; do { asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(seen) : "l"(ready)); } while (seen != blockIdx.x);',
).replace(
    "__threadfence();\n    atomicAdd(ready, 1u);",
    'asm volatile("fence.acq_rel.gpu;"); asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" :: "l"(ready), "r"(1u));',
)
RIGHT = {"ticket": TICKET, "lock": LOCK, "chain": CHAIN, "in PTX": PTX}


def check(source, blocks=5):
    x = np.random.default_rng(0).integers(-9, 9, 32 * blocks).astype("f4")
    sum_, word = np.zeros(1, "f4"), np.zeros(1, "u4")
    report = cuda.compile(source).check[blocks, 32](x, np.zeros(blocks, "f4"), word, sum_)
    return report, sum_[0] == x.sum()


@pytest.mark.parametrize("how", RIGHT)
def test_blocks_that_hand_over_in_order_are_right(how, compiler):  # noqa: F811
    report, right = check(RIGHT[how])
    assert report.ok, str(report)
    assert right
    gpu.compile_for(RIGHT[how], "total", "sm_90")


WRONG = {
    "no fence before the ticket": TICKET.replace("__threadfence();", ""),
    "no fence before the lock is given back": LOCK.replace("__threadfence();", ""),
    "no fence in the chain": CHAIN.replace("__threadfence();", ""),
    "a fence of the block only": CHAIN.replace("__threadfence()", "__threadfence_block()"),
    "no lock is taken": LOCK.replace("while (atomicCAS(lock, 0u, 1u) != 0u) {}", ""),
    "stored behind the ticket": TICKET.replace("__syncthreads();", "__syncthreads(); parts[blockIdx.x] = 0.f;"),
    "read without a ticket": TICKET.replace("float mine = 0.f;", "float mine = parts[0] * 0.f;"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_order_is_a_race_between_blocks(mistake):
    assert WRONG[mistake] not in RIGHT.values()
    report, _ = check(WRONG[mistake])
    assert "RACE BETWEEN BLOCKS" in str(report)


def test_the_order_of_one_launch_is_not_that_of_the_next():
    x, parts, word, sum_ = np.ones(160, "f4"), np.zeros(5, "f4"), np.zeros(1, "u4"), np.zeros(1, "f4")
    kernel = cuda.compile(TICKET)
    for _ in range(2):
        assert kernel.check[5, 32](x, parts, word, sum_).ok
        assert "RACE BETWEEN BLOCKS" in str(
            cuda.compile(LOCK.replace("__threadfence();", "")).check[5, 32](x, parts, word, sum_)
        )
