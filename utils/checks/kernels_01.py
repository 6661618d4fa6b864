"""The exercises of lecture 01 in CUDA: a softmax with one warp for each row, a tile, and its barriers."""

import contextlib
import importlib
import re

import numpy as np

from utils import cuda
from utils.checks import Exercise, Failed, exercise
from utils.checks.compare import close
from utils.checks.faults import in_full
from utils.checks.process import TIME_LIMIT, Stopped
from utils.checks.show import LARGEST_SHOWN, aligned, argument, returned, text, where

MODULE = "fundamentals"
TILE = 16


@contextlib.contextmanager
def limited():
    """Kernels inside have no more time than a whole check."""
    before, cuda.time_limit = cuda.time_limit, min(cuda.time_limit, TIME_LIMIT)
    try:
        yield
    finally:
        cuda.time_limit = before


def launch(kernel, grid, block, shared, *arguments):
    """Run a kernel and return its report; raises KernelError if it does something wrong, Stopped if it does not end."""
    with limited():
        report = kernel.check[grid, block, shared](*arguments)
    if report.problems and report.problems[0].kind == "time limit":
        raise Stopped(report.complaint())
    if not report.ok:
        raise cuda.KernelError(report.complaint(), report)
    return report


def must_be(got, expected, **inputs):
    """Raise Failed, with the inputs where they are small, unless a kernel's result is the expected one."""
    if not close(got, expected):
        shown = {name: argument(value) for name, value in inputs.items()}
        if len(got) < TILE and got.size <= LARGEST_SHOWN:
            shown |= {"expected": text(expected), "got": text(got)}
        raise Failed(where(got, expected), aligned(shown))


def loads(report):
    return [row for row in report.rows if row.space == "global" and row.kind == "load"]


def must_coalesce(report):
    """Raise Failed where lanes of a request read far apart. A few sectors too many come from the end of a row."""
    for row in loads(report):
        if row.sectors >= 2 * row.ideal_sectors:
            raise Failed(f"line {row.line} fetches {row.sectors} sectors where {row.ideal_sectors} would do")


def must_share(report, enough):
    """Raise Failed where so many requests were made that most lanes must have stood idle."""
    requests = sum(row.requests for row in loads(report))
    if requests > enough:
        raise Failed(f"{requests} requests, where {enough} would do")


def draw(rng, *shape):
    return rng.normal(size=shape).round(1).astype(np.float32)


# --- 1.7 -------------------------------------------------------------------------------------------------------------

ALL_LANES = "Call warp_max and warp_sum after the loop: lanes without a column have to take part."
softmax_rows = Exercise(
    "1.7",
    "SOFTMAX_ROWS",
    MODULE,
    fault_hints={
        "shuffle": ALL_LANES,
        "deadlock": ALL_LANES,
        "out of bounds": "A block is one row here: the row is blockIdx.x. Its columns are 0 to n_keys - 1.",
    },
)


def run_softmax(source, scores):
    weights = np.full_like(scores, -1)
    report = launch(cuda.compile(source, name="softmax_rows"), len(scores), 32, 0, scores, weights, scores.shape[1])
    shifted = np.exp(scores.astype(float) - scores.max(axis=1, keepdims=True))
    must_be(weights, shifted / shifted.sum(axis=1, keepdims=True), s=scores)
    return report


@softmax_rows.property(
    "each row becomes weights that sum to 1",
    hint="Use what warp_max and warp_sum return: a lane alone knows only its own columns. Every lane has to call them.",
)
def _(source, rng):
    run_softmax(source, draw(rng, 2, 3))
    run_softmax(source, draw(rng, 5, 32))


@softmax_rows.property("any number of keys", hint="Let j go on in steps of 32 while j < n_keys.")
def _(source, rng):
    for n_keys in (1, 33, 64, 100, 1000):
        run_softmax(source, draw(rng, 2, n_keys))


@softmax_rows.property(
    "scores of 1e4 and -1e4 do not overflow", hint="Subtract the row's maximum, and let the search for it start at -INFINITY."
)
def _(source, rng):
    run_softmax(source, np.float32([[1e4, 1e4 - 1, 0], [-1e4, -1e4 + 1, -1e4], [-1e30, -1e30, -1e30]]))


@softmax_rows.property("neighbouring lanes read neighbouring scores", hint="Lane l reads columns l, l + 32, l + 64 ...")
def _(source, rng):
    must_coalesce(run_softmax(source, draw(rng, 4, 64)))


@softmax_rows.property(
    "all 32 lanes share the work", hint="Every lane reads its own columns, in one request of the warp."
)
def _(source, rng):
    must_share(run_softmax(source, draw(rng, 4, 64)), enough=3 * 4 * 64 // 32)


@softmax_rows.property("each score is read three times at most")
def _(source, rng):
    scores = draw(rng, 3, 64)
    loaded = run_softmax(source, scores).global_loaded
    if loaded > 3 * scores.nbytes:
        raise Failed(f"{loaded:,} bytes were read, for {scores.nbytes:,} bytes of scores")


# --- 1.8 -------------------------------------------------------------------------------------------------------------

load_tile = Exercise("1.8", "LOAD_TILE", MODULE)

# Where nothing is loaded stands 99.
SHOW_TILE = r"""
__global__ void show_tile(const float* rows, float* out, int stride, int first, int n_rows, int d) {
  extern __shared__ float tile[];
  for (int e = threadIdx.y * TILE + threadIdx.x; e < TILE * stride; e += TILE * TILE) tile[e] = 99.0f;
  __syncthreads();
  load_tile(tile, stride, rows, first, n_rows, d);
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += TILE) out[threadIdx.y * d + c] = tile[threadIdx.y * stride + c];
}
"""


def run_tile(source, rows, first, stride):
    n_rows, d = rows.shape
    out, expected = np.full((TILE, d), -1, np.float32), np.zeros((TILE, d), np.float32)
    expected[: max(0, n_rows - first)] = rows[first : first + TILE]
    kernel = cuda.compile(source + SHOW_TILE, name="show_tile")
    report = launch(kernel, 1, (TILE, TILE), 4 * TILE * stride, rows, out, stride, first, n_rows, d)
    must_be(out, expected, first=first, n_rows=n_rows, d=d, stride=stride)
    return report


@load_tile.property(
    "row r, column c lands at tile[r * stride + c]",
    hint="99 stood in the tile before: row r begins at r * stride.",
)
def _(source, rng):
    run_tile(source, draw(rng, TILE, 2), first=0, stride=2)
    run_tile(source, draw(rng, TILE, 2), first=0, stride=3)


@load_tile.property(
    "any first row, any number of columns",
    hint="Where 99 is left, 256 threads have to copy more than 256 elements; where numbers are wrong, "
    "row r of the tile is row first + r of the matrix.",
)
def _(source, rng):
    for d in (1, 7, 33, 40):
        run_tile(source, draw(rng, 2 * TILE, d), first=TILE, stride=d + 1)


@load_tile.property(
    "rows from n_rows on become 0 and are not read",
    hint="Compare first + r with n_rows. 99 stood in the tile before.",
)
def _(source, rng):
    run_tile(source, draw(rng, 5, 4), first=0, stride=4)
    run_tile(source, draw(rng, TILE + 3, 4), first=TILE, stride=5)


@load_tile.property("neighbouring threads read neighbouring addresses", hint="Number the elements row after row.")
def _(source, rng):
    must_coalesce(run_tile(source, draw(rng, TILE, 24), first=0, stride=25))


@load_tile.property("all 256 threads share the work", hint="Thread `thread` copies thread, thread + 256, ...")
def _(source, rng):
    must_share(run_tile(source, draw(rng, TILE, 24), first=0, stride=24), enough=24)


@load_tile.property("each element is read once")
def _(source, rng):
    rows = draw(rng, TILE, 24)
    loaded = run_tile(source, rows, first=0, stride=24).global_loaded
    if loaded > rows.nbytes:
        raise Failed(f"{loaded:,} bytes were read, for a tile of {rows.nbytes:,} bytes")


# --- 1.9 -------------------------------------------------------------------------------------------------------------


@exercise("1.9", MODULE)
def barrier_places():
    return {1, 3}  # {0, 1} is right too: the properties judge what the kernel does


def run_barriers(ask, rng, n_queries, n_keys):
    """The places, after the kernel with barriers there has computed the right scores."""
    reply = ask.run()
    value = reply.values[0]
    if reply.is_tuple or value.type_name != "set" or value.array is None or value.array.ndim != 1:
        raise Failed(f"returned {returned(reply)}, expected a set, such as {{0, 4}}")
    places = set(value.array.tolist())
    if not places <= set(range(5)):
        raise Failed("the places are 0 to 4")
    lecture = importlib.import_module(f"attention.{MODULE}")
    source = lecture.LOAD_TILE + lecture.SCORES_TILED
    for place in range(5):
        source = source.replace(f"/* place {place} */", "__syncthreads();" if place in places else "")
    q, k = draw(rng, n_queries, 2), draw(rng, n_keys, 2)
    scores = np.zeros((n_queries, n_keys), np.float32)
    kernel = cuda.compile(source, name="scores_tiled")
    try:
        with limited():
            kernel[-(-n_queries // TILE), (TILE, TILE), 4 * TILE * 2](q, k, scores, n_queries, n_keys, 2, 1.0)
    except cuda.KernelError as problem:
        kind = problem.report.problems[0].kind if problem.report and problem.report.problems else "endless wait"
        told = without_source(str(problem), lecture.LOAD_TILE.count("\n"))
        raise Failed(f"{n_queries} queries, {n_keys} keys: {kind}", in_full(told)) from None
    must_be(scores, q @ k.T)
    return places


def without_source(message, n_lines):
    """A message of the CUDA runner that quotes none of the first lines: they are load_tile, the answer to 1.8."""
    return re.sub(
        r"line (\d+): `[^`]*`",
        lambda found: f"line {found[1]} (in load_tile)" if int(found[1]) <= n_lines else found[0],
        message,
    )


@barrier_places.property("nobody uses a tile before it is loaded", hint="Who has to wait for load_tile, and where?")
def _(ask, rng):
    run_barriers(ask, rng, TILE, TILE)


@barrier_places.property(
    "nobody loads the next tile while one is in use", hint="The loop comes round: what happens first?"
)
def _(ask, rng):
    run_barriers(ask, rng, TILE, 3 * TILE)


@barrier_places.property(
    "sizes that fill no tile",
    hint="A barrier must be reached by all threads of the block or by none: else it hangs, or pairs with another one.",
)
def _(ask, rng):
    run_barriers(ask, rng, TILE + 4, TILE + 5)


@barrier_places.property("no barrier more than needed", hint="Each round of the loop has two things to wait for.")
def _(ask, rng):
    if len(run_barriers(ask, rng, TILE, TILE)) > 2:
        raise Failed("fewer barriers would do")
