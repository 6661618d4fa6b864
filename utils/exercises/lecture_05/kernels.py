"""The exercises of lecture 05 in CUDA: the merge of splits by their log-sum-exps, and a key's place in a paged cache."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import (
    KernelExercise,
    compiled,
    launch,
    must_be,
    must_coalesce,
    must_employ,
    must_share,
    of_global,
)
from utils.judge.result import Failed
from utils.judge.show import aligned, text

MODULE = "kv_cache"
WARP = 32
OUTS, LSES, OUT = range(3)  # which of the arrays

# --- 5H -------------------------------------------------------------------------------------------------------------

EVERY_LANE = "warp_max and warp_sum need all 32 lanes: call them after the loops, outside of every if."
merge_splits = KernelExercise(
    "5H",
    "MERGE_SPLITS",
    MODULE,
    formerly="5.7",
    importance="extra",
    fault_hints={
        "shuffle": EVERY_LANE,
        "deadlock": EVERY_LANE,
        "barrier": EVERY_LANE,
        "race": "Each number of out is written by one lane. And who reads what others put into share[] has to wait for them: "
        "__syncwarp() between the two.",
        "out of bounds": "share[] and lses have n_splits numbers for a row, outs n_splits * d, out d. The row is blockIdx.x.",
        "unwritten shared memory": "share[s] is read before a lane has written it: every s below n_splits needs a lane.",
    },
)


def merged(outs, lses):
    """The outputs over all keys, in float64, one row at a time."""
    out = np.zeros((len(outs), outs.shape[-1]))
    for row in range(len(outs)):
        full = np.isfinite(lses[row])
        if full.any():
            shares = np.exp(lses[row, full].astype(float) - lses[row, full].max())
            out[row] = shares @ outs[row, full].astype(float) / shares.sum()
    return out


def run_merge(source, outs, lses):
    """Run the kernel, compare with the oracle, return the report."""
    (rows, n_splits), d = lses.shape, outs.shape[-1]
    out = np.full((rows, d), -1, np.float32)
    kernel = compiled(source, name="merge_splits")
    report = launch(kernel, rows, WARP, 4 * n_splits, outs, lses, out, n_splits, d)
    must_be(out, merged(outs, lses), lses=lses, outs=outs)
    return report


def partials(rng, rows, n_splits, d):
    return singles(rng, rows, n_splits, d), singles(rng, rows, n_splits).astype(float)


@merge_splits.property(
    "each split counts by its share of the sum",
    hint="The share of split s is exp(lses[s]) divided by the sum over all splits: not one in n_splits, and not undivided. "
    "Its output begins at s * d. Use what warp_max and warp_sum return: a lane alone knows only its own splits.",
)
def _(source, rng):
    run_merge(source, np.float32([[[1, 2], [5, 6]]]), np.log([[1.0, 3.0]]))
    run_merge(source, *partials(rng, 1, 3, 4))


@merge_splits.property(
    "each row has its own splits",
    hint="A block is one row: the row is blockIdx.x. Its outs begin at row * n_splits * d, its lses at row * n_splits, its "
    "out at row * d.",
)
def _(source, rng):
    run_merge(source, *partials(rng, 3, 2, 3))


@merge_splits.property(
    "any number of splits, any d",
    hint="Let s go on in steps of 32 while s < n_splits, and c in steps of 32 while c < d.",
)
def _(source, rng):
    for rows, n_splits, d in ((1, 1, 1), (2, 33, 20), (3, 100, 80), (2, 32, 129)):
        run_merge(source, *partials(rng, rows, n_splits, d))


@merge_splits.property(
    "log-sum-exps of 1e4 and -1e4 do not overflow",
    hint="Subtract the largest log-sum-exp of the row, and let the search for it start at -INFINITY.",
)
def _(source, rng):
    outs, _ = partials(rng, 3, 3, 2)
    run_merge(source, outs, np.array([[1e4, 1e4 - 1, 0], [-1e4, -1e4 + 1, -1e4], [1e4, -1e4, 1e4]]))
    places = np.array([3 * WARP - 1, 2 * WARP, WARP + 1, WARP, WARP - 1])  # of the largest: in any round of the loop
    late = np.where(np.arange(3 * WARP) == places[:, None], 200.0, 0.0)
    run_merge(source, singles(rng, len(places), 3 * WARP, 3), late)


@merge_splits.property(
    "large log-sum-exps keep their small differences",
    hint="lses holds doubles: subtract before you round. A float of the size of 1e6 has steps of 1/16. So the sum of all shares "
    "may be less than 1: divide by any sum but 0.",
)
def _(source, rng):
    outs, _ = partials(rng, 2, 2, 3)
    run_merge(source, outs, np.array([[1e6], [-1e6]]) + np.log([[128.0, 16.0]]))
    alone = np.array([[1e6], [1e6]]) + [[0.04], [0.02]]  # a float would be above the first, and below the second
    run_merge(source, outs[:, :1].copy(), alone)


@merge_splits.property(
    "a split without keys does not count, whatever stands in its output",
    hint="0 times nan is nan: leave the outputs of splits with a share of 0 out of the sum.",
)
def _(source, rng):
    outs, lses = partials(rng, 2, 4, 3)
    lses[0, 1:], lses[1, 0] = -np.inf, -np.inf
    outs[0, 1:], outs[1, 0] = 99, 99
    run_merge(source, outs, lses)
    outs[0, 1:], outs[1, 0] = np.nan, np.nan
    run_merge(source, outs, lses)


@merge_splits.property(
    "a row without keys becomes zeros",
    hint="-INFINITY minus -INFINITY is nan, and so is 0 divided by 0: replace a largest of -INFINITY by 0, a sum of 0 by 1.",
)
def _(source, rng):
    outs, lses = partials(rng, 3, 2, 3)
    outs[1], lses[1] = np.nan, -np.inf
    run_merge(source, outs, lses)


@merge_splits.property(
    "neighbouring lanes read neighbouring numbers",
    hint="Lane l reads columns l, l + 32 ... of one split, and the log-sum-exps l, l + 32 ...",
)
def _(source, rng):
    must_coalesce(run_merge(source, *partials(rng, 2, 64, 64)))


@merge_splits.property("all lanes share the work", hint="One request of a warp brings 32 columns of a split.")
def _(source, rng):
    rows, n_splits, d = 2, 64, 64
    report = run_merge(source, *partials(rng, rows, n_splits, d))
    must_share(report, enough=rows * n_splits * (d // WARP + 4))
    for array, kind in ((LSES, "load"), (OUTS, "load"), (OUT, "store")):
        must_employ(report, array, kind, rows * WARP)


@merge_splits.property(
    "each output is read once, and not that of an empty split",
    hint="Ask for the share before you read outs[s * d + c], not after.",
)
def _(source, rng):
    outs, lses = partials(rng, 2, 8, 40)
    lses[:, 5:] = -np.inf
    report = run_merge(source, outs, lses)
    read = sum(row.bytes for row in of_global(report, "load", OUTS))
    enough = outs[:, :5].nbytes
    if read > enough:
        raise Failed(f"{read:,} bytes of outs were read, where {enough:,} would do")


# --- 5E -------------------------------------------------------------------------------------------------------------

key_offset = KernelExercise(
    "5E",
    "KEY_OFFSET",
    MODULE,
    formerly="5.8",
    importance="useful",
    fault_hints={
        "out of bounds": "block_table has batch * columns entries; that of token j in row b is number "
        "b * columns + j / page_size.",
    },
)

# Asks for every key of every row and head.
SHOW_OFFSETS = r"""
__global__ void show_offsets(const int* block_table, const int* lengths, long long* offsets, int columns,
                             int longest, int page_size, int heads, int d) {
  int b = blockIdx.x, h = blockIdx.y;
  for (int j = threadIdx.x; j < lengths[b]; j += blockDim.x)
    offsets[(b * heads + h) * longest + j] = (long long)key_offset(block_table, columns, b, h, j, page_size, heads, d);
}
"""


def run_offsets(source, table, lengths, page_size, heads, d):
    """Compare the place of every key with the oracle's; the table has at least the entries that lengths need."""
    table, lengths = np.array(table, np.int32), np.array(lengths, np.int32)
    offsets = np.full((len(table), heads, max(lengths)), -1, np.int64)
    kernel = compiled(source + SHOW_OFFSETS, name="show_offsets")
    sizes = (table.shape[1], offsets.shape[2], page_size, heads, d)
    launch(kernel, (len(table), heads), WARP, 0, table, lengths, offsets, *sizes)
    for b, n in enumerate(lengths):
        for j in range(n):
            page, slot = int(table[b, j // page_size]), j % page_size
            for h in range(heads):
                expected, got = ((page * page_size + slot) * heads + h) * d, int(offsets[b, h, j])
                if got != expected:
                    shown = {"block_table": text(table), "page_size": str(page_size), "heads": str(heads), "d": str(d)}
                    raise Failed(f"row {b}, head {h}, key {j}: expected {expected:,}, got {got:,}", aligned(shown))


@key_offset.property(
    "in one page, keys follow each other",
    hint="One page, one head: key j begins at j * d. The slot of a key is j % page_size.",
)
def _(source, rng):
    run_offsets(source, [[0]], [4], page_size=4, heads=1, d=3)


@key_offset.property(
    "the next page begins after page_size keys",
    hint="Key j is in the row's page j / page_size, rounded down: the last key of a full page is still in that page. "
    "A page has page_size * heads * d floats.",
)
def _(source, rng):
    run_offsets(source, [[0, 1, 2, -1]], [6], page_size=2, heads=1, d=3)
    run_offsets(source, [[0, 1, -1]], [5], page_size=3, heads=1, d=2)


@key_offset.property(
    "the page is the one that the table names",
    hint="j / page_size is a column of the table; the page is what stands there.",
)
def _(source, rng):
    run_offsets(source, [[4, 0, 7, 2]], [7], page_size=2, heads=1, d=3)


@key_offset.property(
    "each row has its own line of the table",
    hint="The line of row b begins at b * columns, however many of its entries are used.",
)
def _(source, rng):
    run_offsets(source, [[4, 0, -1], [7, -1, -1], [2, 5, 3]], [4, 1, 5], page_size=2, heads=1, d=3)


@key_offset.property(
    "heads lie inside a slot",
    hint="A page is (page_size, heads, d): a slot holds heads * d floats, and head h begins h * d floats into it.",
)
def _(source, rng):
    run_offsets(source, [[1, 0], [3, 2]], [5, 4], page_size=3, heads=2, d=4)
    run_offsets(source, [[1, 0], [3, 2]], [3, 4], page_size=2, heads=5, d=3)


@key_offset.property(
    "caches of more than 2^31 floats",
    hint="The product is computed in the type of its factors: make the first one a size_t, not the result.",
)
def _(source, rng):
    run_offsets(source, [[900_000, 5, 2_000_000]], [40], page_size=16, heads=32, d=128)
