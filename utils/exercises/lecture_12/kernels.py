"""The exercise of lecture 12 in CUDA: a product of gathered rows with the weights of their experts."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, bytes_read, compiled, launch, must_be, must_coalesce, must_employ
from utils.judge.result import Failed

MODULE = "mixture"
ROWS = 32

grouped_matmul = KernelExercise(
    "12G",
    "GROUPED_MATMUL",
    MODULE,
    importance="useful",
    fault_hints={
        "race": "Two barriers a round: one before the tiles are overwritten, one before they are used. "
        "The first also stands between those who write source, target and gate and those who read them.",
        "barrier": "All 256 threads have to come to __syncthreads(), also those without a slot.",
        "deadlock": "All 256 threads have to come to __syncthreads(), also those without a slot.",
        "out of bounds": "Which row of x is slot begin + r, and for which r is there one? source has `rows` entries, "
        "written by other threads: which barrier stands between? And w has `inner` rows of `columns` floats, of which "
        "`left` are to the left of this block.",
        "unwritten shared memory": "A row of a tile, or of source, is used before it is there: which barrier stands between?",
    },
)


def run(source, rng, counts, *, inner=3, columns=4, n_rows=None, order=True, gates=True):
    """Run the kernel with so many slots for each expert, and compare. order: rows are gathered and scattered."""
    slots = sum(counts)
    n_rows = n_rows or max(1, slots // 2)
    x, w = singles(rng, n_rows, inner), singles(rng, len(counts), inner, columns)
    comes = rng.integers(0, n_rows, slots).astype(np.int32) if order else np.arange(slots, dtype=np.int32)
    goes = rng.permutation(slots).astype(np.int32) if order else np.arange(slots, dtype=np.int32)
    gate = rng.integers(1, 9, slots).astype(np.float32) / 4 if gates else np.ones(slots, np.float32)
    expected, tiles, begin = np.zeros((slots, columns)), [], 0
    for expert, count in enumerate(counts):
        for s in range(begin, begin + count):
            expected[goes[s]] = gate[s] * (x[comes[s]].astype(float) @ w[expert])
        tiles += [(expert, first, min(first + ROWS, begin + count)) for first in range(begin, begin + count, ROWS)]
        begin += count
    y, kernel = np.full((slots, columns), 99, np.float32), compiled(source, "grouped_matmul")
    grid, tiles = (len(tiles), -(-columns // 64)), np.array(tiles, np.int32)
    report = launch(kernel, grid, (16, 16), 0, x, w, comes, goes, gate, tiles, y, inner, columns)
    must_be(y, expected, x=x, w=w, source=comes, target=goes, gates=gate, tiles=tiles)
    return report


@grouped_matmul.property(
    "one expert: rows times its weights",
    hint="Which row of x_tile and which column of w_tile does sum[i][c] need? Is what stood in y replaced?",
)
def _(source, rng):
    run(source, rng, [3], inner=2, columns=2, n_rows=3, order=False, gates=False)
    run(source, rng, [32], n_rows=32, order=False, gates=False)


@grouped_matmul.property(
    "each expert has its own weights and its own slots", hint="How many rows of the tile belong to this expert?"
)
def _(source, rng):
    run(source, rng, [2, 0, 5, 1], n_rows=8, order=False, gates=False)


@grouped_matmul.property(
    "rows are gathered and scattered",
    hint="Which row of x is that of slot begin + r, and which row of y: source[r] or target[r]?",
)
def _(source, rng):
    run(source, rng, [2, 3], gates=False)
    run(source, rng, [7, 20], gates=False)


@grouped_matmul.property("each slot has its gate", hint="With what is a sum multiplied when it is written?")
def _(source, rng):
    run(source, rng, [2, 3])


@grouped_matmul.property(
    "any widths", hint="How many columns of x has the last round, and which columns of y exist in the last block?"
)
def _(source, rng):
    for inner, columns in ((33, 5), (1, 70), (64, 64), (70, 130)):
        run(source, rng, [4, 9], inner=inner, columns=columns)


@grouped_matmul.property(
    "full tiles, half-empty tiles, all at once",
    hint="What do the rows of a tile hold from `rows` on, and who writes them?",
)
def _(source, rng):
    run(source, rng, [33, 0, 64, 17, 1], inner=40, columns=70)


@grouped_matmul.property(
    "rows are read once, weights once a tile", hint="Who copies a row of x, and how often for 64 columns?"
)
def _(source, rng):
    report = run(source, rng, [40, 24, 10], inner=64, columns=64)
    for array, name, once in ((0, "x", 4 * 74 * 64), (1, "w", 4 * 4 * 64 * 64)):
        if bytes_read(report, array) != once:
            raise Failed(f"{bytes_read(report, array):,} bytes of {name} were read, where {once:,} would do")


@grouped_matmul.property(
    "all threads load and write, and neighbours have neighbouring columns",
    hint="How are the elements of a tile numbered, and which columns are a thread's own?",
)
def _(source, rng):
    report = run(source, rng, [64, 32], inner=64, columns=64)
    for array in (0, 1):
        must_employ(report, array, "load", 3 * 256)
    must_employ(report, 6, "store", 3 * 256)
    must_coalesce(report)
