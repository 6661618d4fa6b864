"""The exercises of lecture 04 in CUDA: a softmax that reads each number once, and a matrix product of tiles."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce, must_employ, must_share
from utils.judge.result import Failed

MODULE = "long_context"
THREADS, TILE, WARP = 256, 16, 32


def must_move(report, loaded, stored):
    """Raise Failed where more bytes are read or written than said."""
    for verb, moved, enough in (("read", report.global_loaded, loaded), ("written", report.global_stored, stored)):
        if moved > enough:
            raise Failed(f"{moved:,} bytes were {verb}, where {enough:,} would do")


# --- 4G -------------------------------------------------------------------------------------------------------------

EVERY_THREAD = "block_max and block_sum wait for the whole block: call them after the loops, outside of every if."
softmax_read_once = KernelExercise(
    "4G",
    "SOFTMAX_READ_ONCE",
    MODULE,
    formerly="4.7",
    importance="useful",
    fault_hints={
        "barrier": EVERY_THREAD,
        "deadlock": EVERY_THREAD,
        "shuffle": EVERY_THREAD,
        "race": "A thread that reads what another one put into row[] has to wait for it: read your own columns, or "
        "__syncthreads().",
        "race between blocks": "A block is one row of x and of y: add blockIdx.x * n_columns to both.",
        "out of bounds": "A block is one row of x and of y: the row is blockIdx.x. Its columns, in row[] too, are 0 to "
        "n_columns - 1.",
        "unwritten shared memory": "row[j] is read before x[j] was copied into it.",
    },
)


def run_softmax(source, x):
    rows, n_columns = x.shape
    y = np.full_like(x, -1)
    kernel = compiled(source, name="softmax_read_once")
    report = launch(kernel, rows, THREADS, 4 * n_columns, x, y, n_columns)
    maximum = x.max(axis=1, keepdims=True).astype(float)
    powers = np.exp(x - np.where(np.isneginf(maximum), 0, maximum))
    total = powers.sum(axis=1, keepdims=True)
    must_be(y, powers / np.where(total == 0, 1, total), x=x)
    return report


@softmax_read_once.property(
    "each row becomes weights that sum to 1",
    hint="Use what block_max and block_sum return: a thread alone knows only its own columns.",
)
def _(source, rng):
    run_softmax(source, singles(rng, 2, 3))
    run_softmax(source, singles(rng, 3, THREADS))


@softmax_read_once.property(
    "any number of columns up to 12,000", hint=f"Let j go on in steps of {THREADS} while j < n_columns."
)
def _(source, rng):
    for n_columns in (1, 255, 257, 1000, 12_000):
        run_softmax(source, singles(rng, 2, n_columns))


@softmax_read_once.property(
    "scores of 1e4 and -1e4 do not overflow",
    hint="Subtract the row's maximum, and let the search for it start at -INFINITY.",
)
def _(source, rng):
    run_softmax(source, np.float32([[1e4, 1e4 - 1, 0], [-1e4, -1e4 + 1, -1e4], [-3e38, -3e38, -3e38]]))
    late = np.zeros((2, 3 * THREADS), np.float32)  # the largest score in the third round of the loop
    late[0, -1], late[1, THREADS + 1] = 200, 200
    run_softmax(source, late)


@softmax_read_once.property(
    "-inf gets the weight 0, and a row of only -inf becomes zeros",
    hint="-INFINITY minus -INFINITY is nan, and so is 0 divided by 0: replace a maximum of -INFINITY by 0, a sum of 0 by 1.",
)
def _(source, rng):
    run_softmax(source, np.float32([[0.5, -np.inf, 1], [-np.inf, -np.inf, -np.inf], [-np.inf, -np.inf, 2]]))


@softmax_read_once.property(
    "neighbouring threads read neighbouring numbers",
    hint=f"Thread t reads columns t, t + {THREADS}, t + {2 * THREADS} ...",
)
def _(source, rng):
    must_coalesce(run_softmax(source, singles(rng, 2, 4 * THREADS)))


@softmax_read_once.property(
    "all 256 threads share the work",
    hint="Every thread reads its own columns, and writes them: one request of a warp brings 32 numbers.",
)
def _(source, rng):
    report = run_softmax(source, singles(rng, 2, 4 * THREADS))
    must_share(report, enough=3 * 2 * 4 * THREADS // WARP)
    must_employ(report, 0, "load", 2 * THREADS)
    must_employ(report, 1, "store", 2 * THREADS)


@softmax_read_once.property(
    "each number is read once and written once",
    hint="row[] holds the copy: read x[j] in the first loop only, and write y[j] in the last.",
)
def _(source, rng):
    x = singles(rng, 3, 1001)
    must_move(run_softmax(source, x), x.nbytes, x.nbytes)


# --- 4H -------------------------------------------------------------------------------------------------------------

ALL_WAIT = (
    "All 256 threads of a block have to come to each barrier, also those outside C: no return, no barrier in an if."
)
matmul_tiled = KernelExercise(
    "4H",
    "MATMUL_TILED",
    MODULE,
    formerly="4.8",
    importance="extra",
    fault_hints={
        "race": "Two barriers in each round: one after the loads, so that both tiles have arrived, and one after the "
        "sums, so that nobody overwrites a tile in use.",
        "barrier": ALL_WAIT,
        "deadlock": ALL_WAIT,
        "out of bounds": "Compare with m, n and k before each load and before the write. What lies outside counts as 0. A row "
        "of A is k numbers long, a row of B n.",
        "unwritten shared memory": "Every number of both tiles has to be loaded in each round: 0 where A or B ends, and "
        "a barrier before they are used.",
    },
)


def run_matmul(source, rng, m, n, k):
    a, b = singles(rng, m, k), singles(rng, k, n)
    c = np.full((m, n), -1, np.float32)
    kernel = compiled(source, name="matmul_tiled")
    report = launch(kernel, (-(-n // TILE), -(-m // TILE)), (TILE, TILE), 0, a, b, c, m, n, k)
    must_be(c, a.astype(float) @ b, m=m, n=n, k=k, a=a, b=b)
    return report


def must_move_tiles(source, rng, m, n, k):
    """Raise Failed where more is read than each number of A once for each tile of columns, of B for each tile of rows."""
    reads = m * k * -(-n // TILE) + k * n * -(-m // TILE)
    must_move(run_matmul(source, rng, m, n, k), 4 * reads, 4 * m * n)


@matmul_tiled.property(
    "one tile times one tile",
    hint="Thread (x, y) adds up a_tile[y][t] * b_tile[t][x] and writes row y, column x of its tile of C.",
)
def _(source, rng):
    run_matmul(source, rng, TILE, TILE, TILE)


@matmul_tiled.property(
    "several tiles in every direction",
    hint="The tile of C begins at row blockIdx.y * TILE, column blockIdx.x * TILE. first goes on in steps of TILE while "
    "first < k, and the sum is not started again.",
)
def _(source, rng):
    run_matmul(source, rng, 2 * TILE, 3 * TILE, 4 * TILE)


@matmul_tiled.property(
    "sizes that fill no tile",
    hint="Load 0 where A or B ends: row against m, first + ... against k, column against n. The last round may be a part "
    "of a tile: first < k.",
)
def _(source, rng):
    for m, n, k in ((2, 3, 1), (17, 15, 33), (5, 40, 20), (33, 1, 7)):
        run_matmul(source, rng, m, n, k)


@matmul_tiled.property(
    "the bytes of the formula",
    hint="In the sums read a_tile and b_tile, not a and b; add up in a variable, and write c once, after the loop.",
)
def _(source, rng):
    must_move_tiles(source, rng, 2 * TILE, 3 * TILE, TILE)


@matmul_tiled.property(
    "what lies outside is not read",
    hint="What lies outside A or B must not be read: compare first + x with k, first + y with k.",
)
def _(source, rng):
    must_move_tiles(source, rng, 20, 35, 18)


@matmul_tiled.property(
    "neighbouring threads read neighbouring addresses",
    hint="In a row of A the column is first + threadIdx.x; in a row of B it is the column of C, which goes with threadIdx.x.",
)
def _(source, rng):
    must_coalesce(run_matmul(source, rng, 2 * TILE, 2 * TILE, 2 * TILE))


@matmul_tiled.property(
    "all 256 threads share the work", hint="Each thread loads one number of each tile in each round."
)
def _(source, rng):
    m, n, k = 2 * TILE, 2 * TILE, 2 * TILE
    report, blocks = run_matmul(source, rng, m, n, k), (m // TILE) * (n // TILE)
    must_share(report, enough=(m * k * (n // TILE) + k * n * (m // TILE)) // WARP)
    for memory, kind in (("global", "load"), ("shared", "store"), (2, "store")):
        must_employ(report, memory, kind, blocks * THREADS)
