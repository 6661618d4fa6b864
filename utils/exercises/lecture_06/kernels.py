"""The exercise of lecture 06 in CUDA: the loop over the tiles of a flash kernel."""

import importlib

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce
from utils.judge.result import Failed

MODULE = "flash"
TILE = 16

# --- 6F --------------------------------------------------------------------------------------------------------------

flash_shared = KernelExercise(
    "6F",
    "FLASH_SHARED",
    MODULE,
    formerly="6.8",
    importance="useful",
    fault_hints={
        "race": "Wait where numbers change hands: before the tiles are overwritten (__syncthreads), before they are used "
        "(__syncthreads), before the other weights of the row are read (__syncwarp).",
        "unwritten shared memory": "A tile has 16 rows of d floats, `stride` apart, and nothing between them is written. A "
        "barrier has to stand between load_rows and its first use.",
        "shuffle": "row_max and row_sum need all sixteen threads of a row: call them outside of any if.",
        "deadlock": "Barriers and shuffles need all threads: put them outside of any if.",
        "barrier": "A barrier has to be reached by all 256 threads: put it outside of any if.",
    },
)


def attended(q, k, v, causal, scale):
    """Output and log-sum-exp in float64, one query at a time."""
    (n, d), m = q.shape, len(k)
    out, lse = np.zeros((n, d)), np.full(n, -np.inf)
    for i in range(n):
        end = max(0, i + 1 + m - n) if causal else m
        if end:
            s = scale * (k[:end].astype(float) @ q[i].astype(float))
            weights = np.exp(s - s.max())
            out[i], lse[i] = weights @ v[:end] / weights.sum(), s.max() + np.log(weights.sum())
    return out, lse


def run_flash(source, q, k, v, causal=False, scale=0.3):
    """Run the kernel on one head, compare with the oracle, return the report."""
    source = source.replace("float maximum, total;", "float maximum = NAN, total = NAN;")  # declared, not set: anything
    (n, d), m = q.shape, len(k)
    out, lse = np.full((n, d), 99, np.float32), np.full(n, 99, np.float32)
    kernel = compiled(importlib.import_module(f"attention.{MODULE}").FLASH_HEAD + source, name="flash_shared")
    shared = 4 * TILE * (4 * (d + 1) + TILE + 1)
    report = launch(kernel, (1, -(-n // TILE)), (TILE, TILE), shared, q, k, v, out, lse, n, m, d, int(causal), scale)
    expected, expected_lse = attended(q, k, v, causal, scale)
    must_be(out, expected, n_queries=n, n_keys=m, d=d, causal=causal)
    must_be(lse, expected_lse, n_queries=n, n_keys=m, d=d, causal=causal)
    return report


def head(rng, n, m, d):
    return singles(rng, n, d), singles(rng, m, d), singles(rng, m, d)


def loaded(n, m, d, causal):
    """Bytes that blocks of TILE queries have to load."""
    ends = [min(first + TILE, n) for first in range(0, n, TILE)]
    return 4 * (n * d + 2 * d * sum(max(0, end + m - n) if causal else m for end in ends))


@flash_shared.property(
    "one full tile: softmax, then the average of the values",
    hint="`maximum` and `total` come without a value. Weights are exp(scale * product - maximum of the row); total is their "
    "sum over the row, o_row the sum of weight times value.",
)
def _(source, rng):
    run_flash(source, *head(rng, TILE, TILE, 4))


@flash_shared.property(
    "more tiles: what came before is rescaled",
    hint="When the maximum grows from old to new, total and every o_row[c] were measured against the old one: multiply both "
    "by exp(old - new). When it does not grow, that factor is 1.",
)
def _(source, rng):
    q, k, v = head(rng, TILE, 3 * TILE, 4)
    run_flash(source, np.abs(q), np.linspace(-1, 2, len(k), dtype=np.float32)[:, None] + 0 * k, v)
    run_flash(source, np.abs(q), np.linspace(2, -1, len(k), dtype=np.float32)[:, None] + 0 * k, v)
    run_flash(source, np.abs(q), np.linspace(200, -200, len(k), dtype=np.float32)[:, None] + 0 * k, v)
    run_flash(source, q, k, v)


@flash_shared.property(
    "sizes that fill no tile",
    hint="Rows that do not exist were loaded as zeros, and the score of a zero is 0: use may_attend. Columns: c goes on in "
    "steps of TILE while c < d.",
)
def _(source, rng):
    for n, m, d in ((1, 1, 1), (5, 21, 33), (TILE + 3, 2 * TILE + 1, 17)):
        run_flash(source, *head(rng, n, m, d))


@flash_shared.property(
    "scores of -200, 1e4 and -1e30",
    hint="The maximum starts at -INFINITY, below every score, and is subtracted before exp.",
)
def _(source, rng):
    v = singles(rng, TILE + 4, 3)
    for score in (-200, -1e30, 1e4):
        run_flash(source, np.full((2, 3), score / 3, np.float32), np.ones_like(v), v, scale=1.0)


@flash_shared.property(
    "causal masks, and queries with nothing to attend to",
    hint="may_attend knows the causal mask. Where a row has seen no key, maximum is -INFINITY, and -INFINITY minus -INFINITY "
    "is nan: shift by 0 there.",
)
def _(source, rng):
    for n, m in ((TILE + 5, TILE + 5), (7, TILE + 7), (2 * TILE + 1, 9), (TILE, TILE + 8)):
        run_flash(source, *head(rng, n, m, 5), causal=True)


@flash_shared.property(
    "no number is loaded twice, and no tile that nobody sees",
    hint="Each block loads K and V once, up to `visible`, keeps nothing in global memory, and takes no tile behind `visible`.",
)
def _(source, rng):
    n, d, shared = 3 * TILE, 8, {}
    for causal in (False, True):
        report = run_flash(source, *head(rng, n, n, d), causal=causal)
        if report.global_loaded > loaded(n, n, d, causal):
            raise Failed(f"{report.global_loaded:,} bytes are loaded, where {loaded(n, n, d, causal):,} would do")
        shared[causal] = sum(row.requests for row in report.rows if row.space == "shared")
    if shared[True] > 0.72 * shared[False]:  # 6 of 9 tiles, and what each block does once
        raise Failed(
            f"a causal mask leaves {shared[True] / shared[False]:.0%} of the requests to shared memory, and 6 of 9 tiles"
        )


@flash_shared.property(
    "neighbouring threads read neighbouring addresses", hint="Let load_rows read global memory; score from the tiles."
)
def _(source, rng):
    must_coalesce(run_flash(source, *head(rng, TILE, 2 * TILE, 24)))


@flash_shared.property(
    "the sixteen threads of a row share the work",
    hint="Thread x has key first + x, and columns x, x + 16, ... of o_row.",
)
def _(source, rng):
    d, n_tiles = 2 * TILE, 2
    report = run_flash(source, *head(rng, TILE, n_tiles * TILE, d))
    requests = sum(row.requests for row in report.rows if row.space == "shared" and row.kind == "load")
    enough = 8 * n_tiles * (2 * d + d // TILE * (2 * TILE + 1))  # 8 warps: two numbers a product, and the old o_row
    if requests > 2 * enough:
        raise Failed(f"{requests:,} requests to shared memory, where {enough:,} would do")
