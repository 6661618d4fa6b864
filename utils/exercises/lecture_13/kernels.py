"""The exercise of lecture 13 in CUDA: a softmax for each ragged row, a warp for each."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce, must_employ, of_global
from utils.judge.result import Failed

MODULE = "beyond"

segment_softmax_kernel = KernelExercise(
    "13B",
    "SEGMENT_SOFTMAX",
    MODULE,
    importance="useful",
    fault_hints={
        "shuffle": "All 32 lanes have to come to warp_max and warp_sum: do they stand inside of a loop over edges?",
        "out of bounds": "The last edge of a node is end - 1: which lanes have one in the last round?",
        "race": "Which lane writes which edge? Does each loop begin among the edges of its own node? No edge has two writers.",
    },
)


def run(source, rng, counts, *, scores=None):
    """Run the kernel on nodes with so many edges, and compare."""
    starts = np.append(0, np.cumsum(counts)).astype(np.int32)
    scores = singles(rng, starts[-1]) if scores is None else scores
    expected = np.zeros(len(scores))
    for first, end in zip(starts, starts[1:]):
        if end > first:
            row = scores[first:end].astype(float)
            powers = np.exp(row - row.max())
            expected[first:end] = powers / powers.sum()
    weights, kernel = np.full(len(scores), 99, np.float32), compiled(source, "segment_softmax")
    report = launch(kernel, max(1, -(-len(counts) // 4)), (32, 4), 0, scores, starts, weights, len(counts))
    must_be(weights, expected, scores=scores, starts=starts)
    return report


@segment_softmax_kernel.property(
    "one node of a few edges", hint="What do the lanes without an edge bring to the maximum, and what to the sum?"
)
def _(source, rng):
    run(source, rng, [2], scores=np.zeros(2, np.float32))
    run(source, rng, [5])


@segment_softmax_kernel.property(
    "several nodes, each from first to end", hint="Where do the edges of the second node begin, and where do they end?"
)
def _(source, rng):
    run(source, rng, [2, 3])
    run(source, rng, [3, 1, 7, 2, 9])


@segment_softmax_kernel.property(
    "more edges than lanes", hint="With 70 edges: which ones are lane 0's, and by how much does it go on?"
)
def _(source, rng):
    for counts in ([33], [70, 32], [31, 64, 65]):
        run(source, rng, counts)


@segment_softmax_kernel.property(
    "nodes without edges", hint="What does your code do when first is end, and which edges does it write then?"
)
def _(source, rng):
    run(source, rng, [0, 3, 0, 0, 5, 0])


@segment_softmax_kernel.property(
    "scores of 1e4 and -1e4 do not overflow", hint="What is subtracted before expf, and where does the maximum begin?"
)
def _(source, rng):
    for size in (1e4, -1e4):
        run(source, rng, [4, 40], scores=(size + singles(rng, 44)).astype(np.float32))
    # The largest score in every place of three rounds, where a maximum that missed it would overflow.
    run(source, rng, [70] * 70, scores=200 * np.eye(70, dtype=np.float32).ravel())


@segment_softmax_kernel.property(
    "all at once: long, short and empty rows, large scores", hint="Which two of these have you never tried together?"
)
def _(source, rng):
    counts = [0, 100, 1, 33, 0, 7, 64, 0, 2]
    run(source, rng, counts, scores=(500 * singles(rng, sum(counts))).astype(np.float32))


@segment_softmax_kernel.property(
    "all lanes work, side by side, and each edge is read three times at most",
    hint="Which edges has lane 1 when lane 0 has edge `first`? How many loops over the scores are needed?",
)
def _(source, rng):
    counts = [96, 64, 128, 32]
    report, once = run(source, rng, counts), 4 * sum(counts)
    must_employ(report, 0, "load", 128)
    must_employ(report, 2, "store", 128)
    must_coalesce(report)
    if (read := sum(row.bytes for row in of_global(report, "load", 0))) > 3 * once:
        raise Failed(f"{read:,} bytes of scores were read, where {3 * once:,} would do")
