"""The exercise of lecture 01 in CUDA: a softmax with one warp for each row."""

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce, must_employ, must_share
from utils.judge.result import Failed

MODULE = "fundamentals"

ALL_LANES = "Call warp_max and warp_sum after the loop: lanes without a column have to take part."
softmax_rows = KernelExercise(
    "1G",
    "SOFTMAX_ROWS",
    MODULE,
    formerly="1.7",
    importance="useful",
    fault_hints={
        "shuffle": ALL_LANES,
        "deadlock": ALL_LANES,
        "out of bounds": "A block is one row here: the row is blockIdx.x. Its columns are 0 to n_keys - 1.",
    },
)


def run_softmax(source, scores):
    weights = np.full_like(scores, -1)
    report = launch(compiled(source, name="softmax_rows"), len(scores), 32, 0, scores, weights, scores.shape[1])
    shifted = np.exp(scores.astype(float) - scores.max(axis=1, keepdims=True))
    must_be(weights, shifted / shifted.sum(axis=1, keepdims=True), s=scores)
    return report


@softmax_rows.property(
    "each row becomes weights that sum to 1",
    hint="Where does row blockIdx.x begin, and where do the results of warp_max and warp_sum go?",
)
def _(source, rng):
    run_softmax(source, singles(rng, 2, 3))
    run_softmax(source, singles(rng, 5, 32))


@softmax_rows.property("any number of keys", hint="Let j go on in steps of 32 while j < n_keys.")
def _(source, rng):
    for n_keys in (1, 33, 64, 100, 1000):
        run_softmax(source, singles(rng, 2, n_keys))


@softmax_rows.property(
    "scores of 1e4 and -1e4 do not overflow",
    hint="Subtract the row's maximum, and let the search for it start at -INFINITY.",
)
def _(source, rng):
    run_softmax(source, np.float32([[1e4, 1e4 - 1, 0], [-1e4, -1e4 + 1, -1e4], [-1e30, -1e30, -1e30]]))
    run_softmax(source, 200 * np.eye(70, dtype=np.float32))  # the largest score in every column of three rounds


@softmax_rows.property("neighbouring lanes read neighbouring scores", hint="Lane l reads columns l, l + 32, l + 64 ...")
def _(source, rng):
    must_coalesce(run_softmax(source, singles(rng, 4, 64)))


@softmax_rows.property(
    "all 32 lanes share the work", hint="Every lane reads and writes its own columns, in one request of the warp."
)
def _(source, rng):
    report = run_softmax(source, singles(rng, 4, 64))
    must_share(report, enough=3 * 4 * 64 // 32)
    must_employ(report, 0, "load", 4 * 32)
    must_employ(report, 1, "store", 4 * 32)


@softmax_rows.property("each score is read three times at most", hint="How many loops run over all the scores?")
def _(source, rng):
    scores = singles(rng, 3, 64)
    loaded = run_softmax(source, scores).global_loaded
    if loaded > 3 * scores.nbytes:
        raise Failed(f"{loaded:,} bytes were read, for {scores.nbytes:,} bytes of scores")
