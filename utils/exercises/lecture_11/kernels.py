"""The exercise of lecture 11 in CUDA: both maps of differential attention in one pass over keys and values."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, bytes_read, compiled, launch, must_be, must_coalesce, must_employ
from utils.judge.result import Failed

MODULE = "differential"
TILE = 16

differential_flash = KernelExercise(
    "11C",
    "DIFFERENTIAL_FLASH",
    MODULE,
    importance="useful",
    fault_hints={
        "race": "Two barriers: one before the tiles are overwritten, one before they are used.",
        "barrier": "All 256 threads have to come to __syncthreads(), also those without a query.",
        "deadlock": "All 256 threads have to come to __syncthreads(), also those without a query.",
        "shuffle": "rescale and __shfl_sync need all threads of a warp: call them outside of any if.",
        "out of bounds": "Keys and values end at `visible`, and a row of v_tile has 16 * C floats.",
        "unwritten shared memory": "Something in a tile is used that no thread has put there: which barrier stands between load_rows and its use, "
        "and are all 16 * C columns of v_tile filled?",
    },
)


def one_map(q, k, v, causal, scale):
    """One row at a time, in float64."""
    (n, m), out = (q.shape[1], k.shape[1]), np.zeros((*q.shape[:2], v.shape[-1]))
    for h, i in np.ndindex(*q.shape[:2]):
        end = max(0, i + 1 + m - n) if causal else m
        if end:
            scores = scale * k[h, :end].astype(float) @ q[h, i].astype(float)
            powers = np.exp(scores - scores.max())
            out[h, i] = powers @ v[h, :end] / powers.sum()
    return out


def run(source, rng, *, heads=1, n=3, m=5, d=4, d_v=8, causal=False, scale=0.5, lam=0.5, **given):
    """Run the kernel and compare. given: some of q1, k1, q2, k2, v."""
    shapes = {"q1": (n, d), "k1": (m, d), "q2": (n, d), "k2": (m, d), "v": (m, d_v)}
    arrays = {name: given.get(name, singles(rng, heads, *shape)) for name, shape in shapes.items()}
    lam, columns = np.full(heads, lam, np.float32) * (1 + np.arange(heads, dtype=np.float32)), -(-d_v // TILE)
    kernel, out = compiled(source, "differential_flash", (columns,)), np.full((heads, n, d_v), 99, np.float32)
    shared = 4 * TILE * (4 * (d + 1) + TILE * columns)
    grid, sizes = (heads, -(-n // TILE)), (n, m, d, d_v, int(causal), scale)
    report = launch(kernel, grid, (TILE, TILE), shared, *arrays.values(), lam, out, *sizes)
    q1, k1, q2, k2, v = arrays.values()
    second = lam[:, None, None] * one_map(q2, k2, v, causal, scale)
    must_be(out, one_map(q1, k1, v, causal, scale) - second, **arrays)
    return report


@differential_flash.property(
    "one key: its value, 1 - lambda times",
    hint="What does a key score that is not there, in each map, and who multiplies by lambda, you or the last line?",
)
def _(source, rng):
    run(source, rng, n=1, m=1, d=1, d_v=1)
    run(source, rng, n=3, m=1, d=2, d_v=1)


@differential_flash.property(
    "one tile: two softmaxes over the same values",
    hint="Is each score multiplied by scale? Which lane knows the weights of key r, and who needs them?",
)
def _(source, rng):
    run(source, rng, n=1, m=2, d=2, d_v=2)
    run(source, rng, n=TILE, m=TILE)


@differential_flash.property(
    "any number of queries and keys",
    hint="How many keys has the last tile, where does the second begin, and what happens to both sums in between?",
)
def _(source, rng):
    for n, m in ((1, 17), (17, 15), (5, 33), (33, 70)):
        run(source, rng, n=n, m=m)


@differential_flash.property(
    "each map has its own maximum and its own sum",
    hint="When a larger score comes in one map alone, what shrinks, and what stays as it is?",
)
def _(source, rng):
    slope = np.linspace(-4, 4, 60, dtype=np.float32)[None, :, None].repeat(4, 2)
    ones, flat = np.ones((1, 3, 4), np.float32), np.zeros((1, 60, 4), np.float32)
    for k1, k2 in ((slope, slope[:, ::-1].copy()), (slope, flat), (flat, slope)):
        run(source, rng, m=60, q1=ones, q2=ones, k1=k1, k2=k2, scale=1.0)


@differential_flash.property("scores of 1e4 and -1e4 do not overflow", hint="Does every weight come from rescale?")
def _(source, rng):
    ones, keys = np.ones((1, 3, 4), np.float32), np.ones((1, 40, 4), np.float32)
    for size in (1e4, -1e4):
        run(source, rng, m=40, q1=ones, k1=keys, q2=-ones, k2=keys, scale=size / 4)


@differential_flash.property(
    "causal, in both maps; a query that sees nothing is zero",
    hint="What is the score of a key that may not be seen, in the first map and in the second?",
)
def _(source, rng):
    for n, m in ((20, 20), (5, 37), (37, 5), (20, 5)):
        run(source, rng, n=n, m=m, causal=True)


@differential_flash.property(
    "several heads, any widths, all at once",
    hint="Which pointers stand at this head already, and how long is a row of v_tile?",
)
def _(source, rng):
    for d, d_v in ((5, 33), (32, 64), (1, 1)):
        run(source, rng, heads=3, n=18, m=35, d=d, d_v=d_v, causal=True)


@differential_flash.property(
    "keys and values are read once a block, none behind `visible`",
    hint="Who copies a value from v, and for how many maps? Behind which key has no query of the block anything to see?",
)
def _(source, rng):
    for causal, rows in ((False, 3 * 64), (True, 32 + 48 + 64)):  # of three blocks
        report = run(source, rng, heads=2, n=48, m=64, d=16, d_v=32, causal=causal)
        for array, name, width in ((1, "k1", 16), (3, "k2", 16), (4, "v", 32)):
            if bytes_read(report, array) != (once := 2 * rows * width * 4):
                raise Failed(f"{bytes_read(report, array):,} bytes of {name} were read, where {once:,} would do")


@differential_flash.property(
    "all threads load, and neighbours read neighbouring columns", hint="How does load_rows number the elements?"
)
def _(source, rng):
    report = run(source, rng, n=16, m=64, d=32, d_v=32)
    for array in (1, 3, 4):
        must_employ(report, array, "load", TILE * TILE)
    must_coalesce(report)
