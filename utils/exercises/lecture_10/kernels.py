"""The exercise of lecture 10 in CUDA: the loop over chunks of linear attention, with its state in shared memory."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, bytes_read, compiled, launch, must_be, must_coalesce, must_employ
from utils.judge.result import Failed

MODULE = "linear"
TILE = 16

linear_chunked = KernelExercise(
    "10G",
    "LINEAR_CHUNKED",
    MODULE,
    importance="useful",
    fault_hints={
        "race": "Three barriers a chunk: before the tiles are overwritten, before they are used, before the state changes.",
        "barrier": "All 256 threads have to come to __syncthreads(), also those without a query.",
        "deadlock": "All 256 threads have to come to __syncthreads(), all of a warp to __shfl_sync: does an if keep some away?",
        "shuffle": "__shfl_sync needs all threads of a warp: call it outside of any if.",
        "out of bounds": "Which rows and columns does the last chunk have, and which row of v belongs to query first + y?",
        "unwritten shared memory": "A row of a tile is used before it is there: which barrier stands between load_tile and its use?",
    },
)


def summed(q, k, v, causal):
    """One query at a time, in float64."""
    (n, m), out = (q.shape[1], k.shape[1]), np.zeros((*q.shape[:2], v.shape[-1]))
    for h, i in np.ndindex(*q.shape[:2]):
        end = i + 1 + m - n if causal else m
        out[h, i] = (k[h, :end].astype(float) @ q[h, i].astype(float)) @ v[h, :end]
    return out


def run(source, rng, *, heads=1, n=3, m=None, d=4, d_v=8, causal=True, columns=None, **given):
    """Run the kernel and compare. given: some of q, k, v; columns: of v a thread."""
    m = n if m is None else m
    shapes = {"q": (n, d), "k": (m, d), "v": (m, d_v)}
    arrays = {name: given.get(name, singles(rng, heads, *shape)) for name, shape in shapes.items()}
    columns = columns or -(-d_v // TILE)
    kernel, out = compiled(source, "linear_chunked", (columns,)), np.full((heads, n, d_v), 99, np.float32)
    shared = 4 * (2 * TILE * (d + 1) + TILE * TILE * columns + TILE * d * (columns | 1))
    grid, sizes = (heads, -(-d_v // (TILE * columns))), (n, m, d, d_v, int(causal))
    report = launch(kernel, grid, (TILE, TILE), shared, *arrays.values(), out, *sizes)
    must_be(out, summed(**arrays, causal=causal), **arrays)
    return report


@linear_chunked.property(
    "one chunk: a query takes its own key and those before",
    hint="Which scores of a chunk may query y use, and may the chunk be in the state when the state is read?",
)
def _(source, rng):
    run(source, rng, n=1, d=2, d_v=2)
    run(source, rng, n=3, d=2, d_v=2)
    run(source, rng, n=TILE)


@linear_chunked.property(
    "any length: a chunk sees the state of before",
    hint="What is in the state when a chunk reads it, and when does the chunk come into it?",
)
def _(source, rng):
    for n in (15, 17, 32, 33, 70):
        run(source, rng, n=n)


@linear_chunked.property("more keys than queries", hint="In which row of k and v is the key of query first + y?")
def _(source, rng):
    for n, m in ((1, 17), (5, 37), (33, 40)):
        run(source, rng, n=n, m=m)


@linear_chunked.property("not causal: queries read the whole state", hint="What does a chunk add where causal is 0?")
def _(source, rng):
    for n, m in ((20, 20), (5, 37), (37, 5)):
        run(source, rng, n=n, m=m, causal=False)


@linear_chunked.property(
    "several heads, any widths, slices of V, all at once",
    hint="Which pointers stand at this head and slice already, and where do the columns of this slice end?",
)
def _(source, rng):
    for causal in (True, False):
        for d, d_v, columns in ((5, 33, 1), (32, 70, 2), (1, 1, 1)):
            run(source, rng, heads=3, n=18, m=35, d=d, d_v=d_v, columns=columns, causal=causal)


@linear_chunked.property(
    "what comes later may be nan", hint="0 times nan is nan: what is multiplied with the keys behind a query?"
)
def _(source, rng):
    q, k, v = (singles(rng, 1, 20, width) for width in (4, 4, 8))
    v[0, 10:] = np.nan
    kernel, out = compiled(source, "linear_chunked", (1,)), np.full((1, 20, 8), 99, np.float32)
    launch(kernel, (1, 1), (TILE, TILE), 4 * (2 * TILE * 5 + TILE * TILE + TILE * 4), q, k, v, out, 20, 20, 4, 8, 1)
    must_be(out[:, :10], summed(q[:, :10], k[:, :10], v[:, :10], True))


@linear_chunked.property("everything is read once", hint="Who copies rows of q, k and v, and how often for a chunk?")
def _(source, rng):
    report = run(source, rng, heads=2, n=50, d=16, d_v=32)
    for array, name, width in ((0, "q", 16), (1, "k", 16), (2, "v", 32)):
        if bytes_read(report, array) != (once := 2 * 50 * width * 4):
            raise Failed(f"{bytes_read(report, array):,} bytes of {name} were read, where {once:,} would do")


@linear_chunked.property(
    "all threads load and write, and neighbours have neighbouring columns",
    hint="How does load_tile number the elements, and which columns are a thread's own?",
)
def _(source, rng):
    report = run(source, rng, n=64, d=32, d_v=32)
    for array in (0, 1, 2):
        must_employ(report, array, "load", TILE * TILE)
    must_employ(report, 3, "store", TILE * TILE)
    must_coalesce(report)
