"""The exercise of lecture 02 in CUDA: one head read in place, from rows that hold all heads."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.compare import close
from utils.judge.kernel import TILE, KernelExercise, compiled, launch, must_be, must_coalesce, must_employ, must_share
from utils.judge.result import Failed

load_head = KernelExercise(
    "2H",
    "LOAD_HEAD",
    "multi_head",
    formerly="2.7",
    importance="useful",
    fault_hints={
        "out of bounds": "Compare first + r with n_rows. The columns of a head are head * d_head to "
        "(head + 1) * d_head - 1.",
        "race": "Which elements does thread number `thread` take? No two threads may write the same one.",
        "barrier": "Not all threads go round the loop equally often: no barrier stands in it.",
    },
)

# Where nothing is loaded stands 99, which one warp puts there: the others are the learner's to employ.
SHOW_HEAD = r"""
__global__ void show_head(const float* rows, float* out, int stride, int row_stride, int head, int first, int n_rows,
                          int d_head) {
  extern __shared__ float tile[];
  if (threadIdx.y < 2)
    for (int e = threadIdx.y * TILE + threadIdx.x; e < TILE * stride; e += 2 * TILE) tile[e] = 99.0f;
  __syncthreads();
  load_head(tile, stride, rows, row_stride, head, first, n_rows, d_head);
  __syncthreads();
  for (int c = threadIdx.x; c < d_head; c += TILE) out[threadIdx.y * d_head + c] = tile[threadIdx.y * stride + c];
}
"""


def tile_of(rows, index):
    """The tile whose row r, column c is rows.flat[index(r, c)]; zeros where that does not exist."""
    at = np.array(index)
    return np.where(at < rows.size, rows.ravel()[np.minimum(at, rows.size - 1)], 0)


def known_mistakes(rows, head, d_head, first):
    """(tile, message) for what a mistaken index would have loaded, where all rows exist."""
    n_rows, row_stride = rows.shape
    r, c = first + np.arange(TILE)[:, None], np.arange(d_head)
    for other in range(row_stride // d_head):
        if other != head:
            yield rows[r, other * d_head + c], f"head {head} was asked for and head {other} loaded"
    yield (
        tile_of(rows, (head * n_rows + r) * d_head + c),
        ("read as if each head had an array of its own, (n_rows, d_head), one after another"),
    )
    yield tile_of(rows, r * d_head + head * d_head + c), "read as if rows were d_head apart: they are row_stride apart"
    yield (
        tile_of(rows, r * row_stride + c * (row_stride // d_head) + head),
        ("read as if the heads' columns took turns: those of one head stand side by side"),
    )


def run_head(source, rows, head, d_head, first=0, stride=None):
    """Load one tile of a head, compare, and return the report."""
    n_rows, row_stride = rows.shape
    stride = stride or d_head
    out, expected = np.full((TILE, d_head), -1, np.float32), np.zeros((TILE, d_head), np.float32)
    expected[: max(0, n_rows - first)] = rows[first : first + TILE, head * d_head : (head + 1) * d_head]
    kernel = compiled(source + SHOW_HEAD, name="show_head")
    arguments = (rows, out, stride, row_stride, head, first, n_rows, d_head)
    report = launch(kernel, 1, (TILE, TILE), 4 * TILE * stride, *arguments)
    if first + TILE <= n_rows and not close(out, expected):
        for mistaken, message in known_mistakes(rows, head, d_head, first):
            if close(out, mistaken):
                raise Failed(message)
    must_be(out, expected, head=head, d_head=d_head, row_stride=row_stride, first=first, n_rows=n_rows, stride=stride)
    return report


@load_head.property(
    "row r, column c lands at tile[r * stride + c]",
    hint="99 stood in the tile before: row r begins at r * stride.",
)
def _(source, rng):
    run_head(source, singles(rng, TILE, 2), head=0, d_head=2)
    run_head(source, singles(rng, TILE, 2), head=0, d_head=2, stride=3)


@load_head.property(
    "the head that was asked for",
    hint="Row t of head h begins at t * row_stride + h * d_head, its columns side by side.",
)
def _(source, rng):
    rows = singles(rng, TILE, 12)
    for head in (1, 0, 2):
        run_head(source, rows, head, d_head=4)


@load_head.property(
    "any first row, any d_head, any row_stride",
    hint="Where 99 is left, 256 threads have to copy more than 256 elements; where numbers are wrong, "
    "row r of the tile is row first + r of the matrix, and row_stride need not be a multiple of d_head.",
)
def _(source, rng):
    for d_head in (1, 7, 33, 40):
        run_head(source, singles(rng, 2 * TILE, 2 * d_head + 5), head=1, d_head=d_head, first=TILE, stride=d_head + 1)


@load_head.property(
    "rows from n_rows on become 0",
    hint="Compare first + r with n_rows. 99 stood in the tile before.",
)
def _(source, rng):
    run_head(source, singles(rng, 5, 12), head=2, d_head=4)
    run_head(source, singles(rng, TILE + 3, 12), head=1, d_head=4, first=TILE, stride=5)


@load_head.property(
    "neighbouring threads read neighbouring addresses", hint="Number the elements of the tile row after row."
)
def _(source, rng):
    must_coalesce(run_head(source, singles(rng, TILE, 48), head=1, d_head=24, stride=25))


@load_head.property("all 256 threads share the work", hint="Thread `thread` copies thread, thread + 256, ...")
def _(source, rng):
    report = run_head(source, singles(rng, TILE, 48), head=1, d_head=24)
    must_share(report, enough=24)
    must_employ(report, 0, "load", TILE * TILE)
    must_employ(report, "shared", "store", TILE * TILE)


@load_head.property(
    "each element of the head is read once, and no other",
    hint="TILE * d_head elements, not whole rows; and nothing in place of rows that do not exist.",
)
def _(source, rng):
    rows = singles(rng, TILE, 48)
    loaded = run_head(source, rows, head=1, d_head=24).global_loaded
    if loaded > rows.nbytes // 2:
        raise Failed(f"{loaded:,} bytes were read, for a head of {rows.nbytes // 2:,} bytes")
    loaded = run_head(source, singles(rng, 5, 12), head=2, d_head=4).global_loaded
    if loaded > 5 * 4 * 4:
        raise Failed(f"{loaded:,} bytes were read, where only 5 rows of 16 bytes exist")
