"""Lecture 01: which query may attend to which key."""

import numpy as np

from utils.exercises.arrays import INF
from utils.judge.function import exercise

MODULE = "fundamentals"


@exercise("1B", MODULE, formerly="1.3", importance="useful")
def causal_mask(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    mask = np.zeros((n_queries, n_keys), dtype=bool)
    for i, j in np.ndindex(*mask.shape):
        mask[i, j] = n_keys - 1 - j >= n_queries - 1 - i
    return mask


@causal_mask.property(
    "square: each query sees itself and what came before", hint="Is its own position in a query's past?"
)
def _(ask, rng):
    ask(3, 3)
    ask(6, 6)


@causal_mask.property("n_keys may be left out: as many as queries", hint="What does n_keys=None mean?")
def _(ask, rng):
    ask(3)
    ask(1)


@causal_mask.property(
    "fewer queries than keys: the last query sees every key", hint="At which position does the first query stand?"
)
def _(ask, rng):
    ask(2, 4)
    ask(1, 5)


@causal_mask.property(
    "more queries than keys: the first queries see nothing", hint="At which position does the first query stand?"
)
def _(ask, rng):
    ask(4, 2)


@causal_mask.property("no keys: one empty row for each query", hint="Is 0 keys the same as no number given?")
def _(ask, rng):
    ask(3, 0)


def compare_positions(n_queries, n_keys, shift):
    """The boolean matrix of j <= i + shift."""
    return np.arange(n_keys) <= np.arange(n_queries)[:, None] + shift


def or_as_many(n_keys, n_queries):
    return n_queries if n_keys is None else n_keys


@causal_mask.mistake("The mask starts at the top left: align it so that the last query sees every key.")
def _(n_queries, n_keys=None):
    return compare_positions(n_queries, or_as_many(n_keys, n_queries), 0)


@causal_mask.mistake("A query does not see its own position: the diagonal belongs to it.")
def _(n_queries, n_keys=None):
    n_keys = or_as_many(n_keys, n_queries)
    return compare_positions(n_queries, n_keys, n_keys - n_queries - 1)


@causal_mask.mistake("Each query also sees the next position, which is its future: the diagonal is the last.")
def _(n_queries, n_keys=None):
    n_keys = or_as_many(n_keys, n_queries)
    return compare_positions(n_queries, n_keys, n_keys - n_queries + 1)


@causal_mask.mistake("The mask has n_queries columns: it needs one for each of the n_keys keys.")
def _(n_queries, n_keys=None):
    return causal_mask.oracle(n_queries)


@causal_mask.mistake("`n_keys or n_queries` takes 0 keys for none given: ask `n_keys is None`.")
def _(n_queries, n_keys=None):
    return causal_mask.oracle(n_queries, n_keys or n_queries)


@causal_mask.mistake("The mask is the wrong way round: True means may attend.")
def _(n_queries, n_keys=None):
    return ~causal_mask.oracle(n_queries, n_keys)


@causal_mask.mistake("The mask is transposed: rows are queries, and the future is above the diagonal.")
def _(n_queries, n_keys=None):
    return causal_mask.oracle(or_as_many(n_keys, n_queries), n_queries).T


for kind in float, int:

    @causal_mask.mistake("These are numbers: a mask is boolean. `astype(bool)`, or compare positions.")
    def _(n_queries, n_keys=None, kind=kind):
        return causal_mask.oracle(n_queries, n_keys).astype(kind)


@causal_mask.mistake(
    "This is what is added to the scores, 0 and -inf: the mask itself is boolean, True where a query may attend."
)
def _(n_queries, n_keys=None):
    return np.where(causal_mask.oracle(n_queries, n_keys), 0.0, -INF)
