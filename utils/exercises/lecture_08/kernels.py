"""The exercise of lecture 08 in CUDA: a block of warps reads keys and values once for a group of query heads."""

import math

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce, of_global
from utils.judge.result import Failed

MODULE = "grouped_query"

grouped_split = KernelExercise(
    "8F",
    "GROUPED_SPLIT",
    MODULE,
    importance="useful",
    fault_hints={
        "race": "Two barriers: one before a tile is overwritten, one before it is used.",
        "barrier": "All warps of a block have to come to __syncthreads(), also one without a row.",
        "deadlock": "All warps of a block have to come to __syncthreads(), also one without a row.",
        "out of bounds": "The rows of a head of keys begin at head * n_keys, and end is the end of this block's keys.",
        "unwritten shared memory": "A row of a tile is used before it is there: which barrier stands between load_tile and its use?",
    },
)


def attended(q, k, v, mask, causal, scale, n_queries):
    """One row at a time, in float64. q (groups, rows, d); row r is query r % n_queries of its head."""
    groups, rows, _ = q.shape
    out, n_keys = np.zeros((groups, rows, v.shape[-1])), k.shape[1]
    for g, r in np.ndindex(groups, rows):
        seen = np.arange(n_keys) <= r % n_queries + n_keys - n_queries if causal else np.ones(n_keys, bool)
        seen = seen if mask is None else seen & mask[g, r].astype(bool)
        if seen.any():
            scores = scale * k[g, seen].astype(float) @ q[g, r].astype(float)
            powers = np.exp(scores - scores.max())
            out[g, r] = powers @ v[g, seen] / powers.sum()
    return out


def run(source, rng, *, groups=1, rows=3, n_keys=5, d=4, d_v=None, warps=32, q=None, k=None, **seen):
    """Run the kernel on one split of one or more groups, and compare. seen: mask, causal, scale, n_queries."""
    d_v = d_v or d
    seen = {"mask": None, "causal": False, "scale": 1 / math.sqrt(d), "n_queries": 1} | seen
    q = singles(rng, groups, rows, d) if q is None else q
    k, v = singles(rng, groups, n_keys, d) if k is None else k, singles(rng, groups, n_keys, d_v)
    columns, blocks = -(-max(d, d_v) // 32), -(-rows // warps)
    kernel = compiled(source, "grouped_split", ("float", columns))
    outs, lses = np.full((groups, rows, d_v), -1, np.float32), np.zeros((groups, rows))
    allowed = np.zeros(1, np.uint8) if seen["mask"] is None else seen["mask"]
    sizes = (rows, seen["n_queries"], n_keys, d, d_v, n_keys, int(seen["mask"] is not None), int(seen["causal"]))
    grid, block, shared = (groups, blocks, 1), (32, -(-rows // blocks)), 2 * 4 * 16 * 32 * columns
    report = launch(kernel, grid, block, shared, q, k, v, allowed, outs, lses, *sizes, seen["scale"])
    must_be(outs, attended(q, k, v, **seen), q=q, k=k, v=v)
    return report


def read(report, *names):
    return sum(row.bytes for row in of_global(report, "load") if row.array in names)


@grouped_split.property("one row, one tile", hint="Which lane knows the score of key t, and which knows its weight?")
def _(source, rng):
    run(source, rng, rows=1, n_keys=2, d=2)
    run(source, rng, rows=1, n_keys=16)


@grouped_split.property(
    "every head of keys has its own rows",
    hint="Where in k and in v does the head blockIdx.x begin, and with which width?",
)
def _(source, rng):
    run(source, rng, groups=3, rows=4, n_keys=7, d=5, d_v=6)


@grouped_split.property(
    "any number of keys",
    hint="How many rows has the last tile, where does the second begin, and what happens to the sum so far?",
)
def _(source, rng):
    for n_keys in (1, 15, 17, 33, 130):
        run(source, rng, groups=2, n_keys=n_keys)


@grouped_split.property(
    "the sum so far shrinks when a larger score comes",
    hint="By which factor does the sum so far shrink, and when is it multiplied: before or after the new values are added?",
)
def _(source, rng):
    slope = np.linspace(-4, 4, 60, dtype=np.float32)[None, :, None].repeat(4, 2)
    for keys in (slope, slope[:, ::-1].copy()):
        run(source, rng, n_keys=60, q=np.ones((1, 3, 4), np.float32), k=keys)


@grouped_split.property("scores of 1e4 and -1e4 do not overflow", hint="Does every weight come from rescale?")
def _(source, rng):
    for size in (1e4, -1e4):
        ones = np.ones((1, 3, 4), np.float32), np.ones((1, 40, 4), np.float32)
        run(source, rng, n_keys=40, q=ones[0], k=ones[1], scale=size / 4)


@grouped_split.property(
    "masks and causal, together too; a row that sees nothing is zero",
    hint="What is the score of a key that this row may not see, and when does it get it: before or after rescale?",
)
def _(source, rng):
    mask = (rng.random((2, 6, 37)) < 0.5).astype(np.uint8)
    mask[1, 2] = 0
    run(source, rng, groups=2, rows=6, n_keys=37, mask=mask)
    run(source, rng, groups=2, rows=6, n_keys=37, n_queries=3, causal=True)
    run(source, rng, groups=2, rows=6, n_keys=37, n_queries=3, causal=True, mask=mask)


@grouped_split.property(
    "more rows than a block has warps", hint="Does a warp without a row of its own come to every barrier?"
)
def _(source, rng):
    run(source, rng, rows=33, n_keys=20)


@grouped_split.property(
    "any width", hint="Which rows of a tile are 32 * C floats long, and where is column 32 * c + lane?"
)
def _(source, rng):
    for d, d_v in ((33, 5), (64, 64), (1, 40)):
        run(source, rng, rows=2, n_keys=20, d=d, d_v=d_v)


@grouped_split.property(
    "keys and values are read once for the whole group", hint="Who copies rows from k and v, and how often for a tile?"
)
def _(source, rng):
    for rows in (1, 4, 8):
        report, once = run(source, rng, groups=2, rows=rows, n_keys=50, d=32), 2 * 50 * 2 * 32 * 4
        if read(report, "k", "v") != once:
            raise Failed(
                f"{read(report, 'k', 'v'):,} bytes of k and v were read for {rows} rows, where {once:,} would do"
            )


@grouped_split.property("neighbouring lanes read neighbouring columns", hint="How does load_tile number the elements?")
def _(source, rng):
    must_coalesce(run(source, rng, rows=4, n_keys=64, d=64))
