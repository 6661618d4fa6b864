"""The exercise of lecture 09 in CUDA: one pass over the latent, as keys and as values, for all heads of a block."""

import numpy as np

from utils import cuda
from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, launch, must_be, must_coalesce, must_employ, running
from utils.judge.process import TIME_LIMIT
from utils.judge.result import Failed

MODULE = "latent"
SPLIT, KEYS, WARP, MOST = 128, 16, 32, 32

BARRIERS = "Two barriers a tile: one before load_latents (a slower warp may still read the old rows), one after it."
ALL_WARPS = "Warps without a head and lanes without a key work on with the others: no return and no break in the loop."
latent_split = KernelExercise(
    "9F",
    "LATENT_SPLIT",
    MODULE,
    importance="useful",
    fault_hints={
        "race": BARRIERS,
        "deadlock": ALL_WARPS,
        "barrier": ALL_WARPS,
        "shuffle": "warp_sum, rescale and __shfl_sync need all 32 lanes: they stand outside of every if.",
        "unwritten shared memory": "Rows are read that nobody has brought: is there a barrier after load_latents, and how many "
        "rows has the last tile?",
        "out of bounds": "load_latents wants the row in the whole cache, rows + first; a tile has KEYS rows of 32 * C floats.",
    },
)


def attended(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """For each text, head and split: the blend and the log-sum-exp, in float64."""
    (batch, heads, d), splits = q_latent.shape, max(1, -(-max(lengths) // SPLIT))
    outs, lses = np.zeros((batch * heads, splits, d)), np.full((batch * heads, splits), -np.inf)
    for b, h, s in np.ndindex(batch, heads, splits):
        rows = slice(s * SPLIT, min((s + 1) * SPLIT, lengths[b]))
        if rows.start < rows.stop:
            c, k = c_kv[b, rows].astype(float), k_rope[b, rows].astype(float)
            scores = scale * (c @ q_latent[b, h].astype(float) + k @ q_rope[b, h].astype(float))
            powers = np.exp(scores - scores.max())
            outs[b * heads + h, s] = powers @ c / powers.sum()
            lses[b * heads + h, s] = scores.max() + np.log(powers.sum())
    return outs, lses


def run_split(source, q_latent, q_rope, c_kv, k_rope, lengths, scale=0.5):
    """Run the kernel on all splits, compare with the oracle, return the report."""
    (batch, heads, d_latent), d_rope = q_latent.shape, q_rope.shape[-1]
    exact, exact_lses = attended(q_latent, q_rope, c_kv, k_rope, lengths, scale)
    columns, blocks, splits = -(-(d_latent + d_rope) // WARP), -(-heads // MOST), exact.shape[1]
    with running():
        kernel = cuda.compile(source, name="latent_split", template=("float", columns), time_limit=TIME_LIMIT)
    outs, lses = np.zeros(exact.shape, np.float32), np.zeros(exact_lses.shape)
    grid, block = (batch, blocks, splits), (WARP, -(-heads // blocks))
    report = launch(
        kernel, grid, block, 4 * KEYS * WARP * columns, q_latent, q_rope, c_kv, k_rope, np.array(lengths, np.int32),
        outs, lses, c_kv.shape[1], heads, d_latent, d_rope, scale,
    )  # fmt: skip
    must_be(outs, exact, q_latent=q_latent, c_kv=c_kv)
    finite = np.isfinite(exact_lses)
    must_be(np.float32(np.where(finite, lses, 0)), np.where(finite, exact_lses, 0))
    return report


def inputs(rng, lengths=(16,), heads=2, d_latent=8, d_rope=4, capacity=None, size=1.0):
    """Queries and a cache in single precision, nan behind the lengths."""
    batch, capacity = len(lengths), capacity or max(max(lengths), 1) + 2
    c_kv, k_rope = singles(rng, batch, capacity, d_latent), singles(rng, batch, capacity, d_rope)
    for b, length in enumerate(lengths):
        c_kv[b, length:], k_rope[b, length:] = np.nan, np.nan
    queries = singles(rng, batch, heads, d_latent), singles(rng, batch, heads, d_rope)
    return *(np.float32(size) * q for q in queries), c_kv, k_rope, list(lengths)


@latent_split.property(
    "one tile: scores from the whole row, a blend of it",
    hint="The row of key t begins at tile[t * C * 32]: which lane reads column 32 * c + lane, and who needs the whole sum?",
)
def _(source, rng):
    run_split(source, *inputs(rng, (2,), heads=1, d_latent=2, d_rope=1))
    run_split(source, *inputs(rng, (16,), heads=3))


@latent_split.property(
    "more tiles: what was summed is rescaled",
    hint="rescale returns a factor: which numbers were summed with the old maximum? The weight of key t lies in lane t.",
)
def _(source, rng):
    run_split(source, *inputs(rng, (64,), heads=2))
    q_latent, q_rope, c_kv, k_rope, lengths = inputs(rng, (80, 80), heads=1)
    q_latent[:], c_kv[0, :80, 0] = np.abs(q_latent), np.linspace(-8, 8, 80)
    c_kv[1, :80, 0] = np.linspace(8, -8, 80)
    run_split(source, q_latent, q_rope, c_kv, k_rope, lengths)


@latent_split.property(
    "any length: short tiles, several splits, none",
    hint="How many rows has the last tile, and does a lane whose key does not exist keep a score of -INFINITY?",
)
def _(source, rng):
    for lengths in ((1, 15), (17, 0), (128, 129), (300, 7)):
        run_split(source, *inputs(rng, lengths))


@latent_split.property(
    "any width and any number of heads",
    hint="A lane has C columns, the last ones may be 0. Do warps without a head meet the barriers?",
)
def _(source, rng):
    run_split(source, *inputs(rng, (40,), heads=5, d_latent=33, d_rope=7))
    run_split(source, *inputs(rng, (20,), heads=1, d_latent=1, d_rope=1))
    run_split(source, *inputs(rng, (20,), heads=33, d_latent=20, d_rope=4))
    run_split(source, *inputs(rng, (18,), heads=2, d_latent=100, d_rope=20))


@latent_split.property(
    "scores of 1e4 and -1e4 do not overflow",
    hint="Is rescale called with each score, and -INFINITY where there is none?",
)
def _(source, rng):
    for size in (1e4, -1e4):
        run_split(source, *inputs(rng, (50, 3), size=size))


@latent_split.property(
    "each row is read from global memory once, for all heads",
    hint="As keys and as values the rows lie in the tile: what is read from c_kv again?",
)
def _(source, rng):
    for lengths, heads in (((70,), 6), ((40, 130), 32)):
        report = run_split(source, *inputs(rng, lengths, heads))
        read = sum(row.bytes for row in report.rows if row.kind == "load" and row.array in ("c_kv", "k_rope"))
        enough = 4 * 12 * sum(lengths)
        if read != enough:
            raise Failed(f"{read:,} bytes of the cache were read, {enough:,} are there")


@latent_split.property("neighbouring lanes read neighbouring numbers", hint="Lane l reads column 32 * c + l of a row.")
def _(source, rng):
    must_coalesce(run_split(source, *inputs(rng, (64,), heads=4, d_latent=64, d_rope=32)))


@latent_split.property(
    "all threads bring rows", hint="load_latents is called by all threads of the block, whatever their head."
)
def _(source, rng):
    report = run_split(source, *inputs(rng, (64,), heads=8, d_latent=64, d_rope=32))
    must_employ(report, 2, "load", 8 * WARP)
