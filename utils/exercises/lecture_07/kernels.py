"""The exercise of lecture 07 in CUDA: a block of threads walks over the blocks that its list names."""

import importlib
import math
from functools import partial

import numpy as np

from utils import cuda
from utils.exercises.arrays import singles
from utils.judge.kernel import TIME_LIMIT, KernelExercise, launch, must_be, must_coalesce, running
from utils.judge.result import Failed

MODULE = "sparse"

BARRIERS = "A tile is written by all threads and read by all: what has to happen before it is overwritten, and before it is read?"
block_sparse = KernelExercise(
    "7G",
    "BLOCK_SPARSE",
    MODULE,
    importance="useful",
    fault_hints={
        "race": BARRIERS,
        "barrier": "Every thread of the block has to reach each __syncthreads(): do all of them run the loops equally often?",
        "out of bounds": "Where does this row's list end, and where the last block of keys?",
    },
)


def lists(there):
    """starts and blocks of a mask (heads, rows, columns)."""
    rows = there.reshape(-1, there.shape[-1])
    starts = np.zeros(len(rows) + 1, np.int32)
    starts[1:] = rows.sum(-1).cumsum()
    blocks = np.nonzero(rows)[1].astype(np.int32)
    return starts, blocks if len(blocks) else starts[:1]


def attended(q, k, v, there, size, causal, window):
    """In double, over the keys that are seen only."""
    heads, n, m = len(q), q.shape[1], k.shape[1]
    out = np.zeros(q.shape)
    back = np.arange(n)[:, None] + m - n - np.arange(m)
    near = (back < window) & ((back >= 0) | (not causal))
    for h in range(heads):
        seen = near & np.repeat(np.repeat(there[h], size, 0), size, 1)[:n, :m]
        for i in range(n):
            keys = seen[i]
            if keys.any():
                scores = k[h, keys].astype(float) @ q[h, i] / math.sqrt(q.shape[-1])
                powers = np.exp(scores - scores.max())
                out[h, i] = powers @ v[h, keys] / powers.sum()
    return out


def run(source, rng, n, m, size, there, d=8, heads=1, causal=False, window=10**6, poison=False):
    """Compare with the loop, and return the report and the bytes of q, k and v that may be read."""
    q, k, v = (singles(rng, heads, rows, d) for rows in (n, m, m))
    there = np.broadcast_to(there, (heads, -(-n // size), -(-m // size)))
    if poison:  # what no row of any head reads
        absent = np.repeat(~there.any((0, 1)), size)[:m]
        k[:, absent], v[:, absent] = np.nan, np.nan
    flash, sparse = (importlib.import_module(f"attention.{name}") for name in ("flash", MODULE))
    helpers = flash.FLASH_HEAD + flash.SWIZZLE + flash.CHUNKS + flash.REGISTER_STEPS + sparse.SPARSE_TILE
    width = 32 * -(-d // 32)
    rows, keys = flash.tile_sizes(min(size, 64), min(size, 64), partial(flash.registers_bytes, width))
    with running():
        kernel = cuda.compile(
            helpers + source,
            name="block_sparse",
            template=(width, rows, keys),
            time_limit=TIME_LIMIT,
        )
    out = np.full_like(q, -1)
    starts, blocks = lists(there)
    grid = heads, -(-n // size) * -(-size // rows)
    report = launch(
        kernel, grid, (16, 16), flash.registers_bytes(width, rows, keys), q, k, v, starts, blocks, out, n, m, d, size,
        int(causal), window, 1 / math.sqrt(d),
    )  # fmt: skip
    must_be(out, attended(q, k, v, there, size, causal, window), blocks=there[0].astype(int))
    allowed = sum(sparse.block_sparse_bytes(head, size, n, m, d, causal, rows)[0] for head in there)
    return report, allowed


def read(report):
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in ("q", "k", "v"))


@block_sparse.property(
    "one block that is there", hint="Where does block blocks[starts[list]] begin, and which rows are loaded?"
)
def _(source, rng):
    run(source, rng, 4, 4, 4, np.ones((1, 1), bool))
    run(source, rng, 16, 16, 16, np.ones((1, 1), bool), d=32)


@block_sparse.property(
    "the blocks of the list, and no others", hint="From which place in blocks to which does the list of this row go?"
)
def _(source, rng):
    there = np.array([[True, False, True, False], [False, False, True, True]])
    run(source, rng, 32, 64, 16, there, poison=True)
    run(source, rng, 6, 8, 2, np.array([[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 1]], bool), poison=True)


@block_sparse.property("a row without blocks is 0", hint="How often does the loop run for an empty list?")
def _(source, rng):
    run(source, rng, 9, 9, 3, np.array([[0, 0, 0], [1, 0, 1], [0, 0, 0]], bool))


@block_sparse.property(
    "blocks of any size, longer than a tile too", hint="How many tiles of BK keys has a block of 80?"
)
def _(source, rng):
    for size in (5, 20, 80, 150):
        run(source, rng, 90, 170, size, rng.random((-(-90 // size), -(-170 // size))) < 0.7)


@block_sparse.property("short last blocks", hint="Where does a block end that is the last one?")
def _(source, rng):
    run(source, rng, 37, 45, 16, np.ones((3, 3), bool))
    run(source, rng, 1, 70, 32, np.array([[True, False, True]]))


@block_sparse.property("causal, and a window", hint="Which keys of a tile can no query of yours see?")
def _(source, rng):
    run(source, rng, 40, 50, 16, np.ones((3, 4), bool), causal=True)
    run(source, rng, 70, 70, 16, np.ones((5, 5), bool), causal=True, window=9)
    run(source, rng, 50, 30, 16, np.ones((4, 2), bool), causal=True)


@block_sparse.property("several heads, each with blocks of its own", hint="What does `list` count?")
def _(source, rng):
    run(source, rng, 40, 50, 16, rng.random((3, 3, 4)) < 0.5, heads=3, d=20)


@block_sparse.property(
    "no byte more than the blocks that are there",
    hint="What is loaded of a block that ends behind `visible`, or is absent?",
)
def _(source, rng):
    for causal in (False, True):
        report, allowed = run(source, rng, 100, 110, 20, rng.random((5, 6)) < 0.5, d=32, causal=causal)
        if read(report) > allowed:
            raise Failed(f"{read(report):,} bytes of q, k and v were read, where {allowed:,} would do")


@block_sparse.property("all threads load, side by side", hint="Is every call of load_chunks made by all 256 threads?")
def _(source, rng):
    report, _ = run(source, rng, 64, 128, 64, np.ones((1, 2), bool), d=64)
    must_coalesce(report)
    requests = sum(row.requests for row in report.rows if row.kind == "load" and row.array in ("k", "v"))
    if requests > 2 * 128 * 64 // 4 // 32:
        raise Failed(f"{requests} requests for keys and values, where {2 * 128 * 64 // 4 // 32} would do")
