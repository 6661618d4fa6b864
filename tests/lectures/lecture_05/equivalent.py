"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

ALL_KEPT = "with so many recent keys the budget is n_keys or more, and all are kept"
EQUIVALENT = {
    "5F": {
        "line 8.24: -1 becomes 1": "of two axes number 1 is the last",
    },
    "5G": {
        "line 11.13: weights.sum(-2, dtype=float) without dtype": "sums of float32 differ where two keys are equally good",
        "line 17.37: 0 becomes -1": ALL_KEPT,
        "line 17.37: 0 becomes 1": ALL_KEPT,
    },
    "5H": {
        "line 14.40: for (int s = lane; s < n_splits; s += 32) top = fmaxf(top, l: 32 becomes 31": "some are looked at "
        "twice: the largest is the same",
        "line 18.13: share[s] = expf(lses[s] - top);: expf(lses[s] - top) times 1.05": "every share is divided by the sum",
    },
}
