"""Lecture 04: scores by distance, moved to where their keys stand."""

import numpy as np

from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "long_context"


# --- 4.5 -------------------------------------------------------------------------------------------------------------


@exercise("4.5", MODULE)
def relative_shift(by_distance):
    shifted = np.zeros_like(by_distance)
    n_queries, n_keys = by_distance.shape[-2:]
    for *lead, i, j in np.ndindex(*by_distance.shape):
        distance = (i + n_keys - n_queries) - j
        if distance >= 0:
            shifted[(*lead, i, j)] = by_distance[(*lead, i, n_keys - 1 - distance)]
    return shifted


def scores(rng, *shape):
    return rng.normal(size=shape).round(1) + 0.05  # never 0, which stands for the future


@relative_shift.property("entry (i, j) is the score at the distance of query i and key j")
def _(ask, rng):
    ask(scores(rng, 3, 3))
    ask(scores(rng, 6, 6))


@relative_shift.property("fewer queries than keys: the last query stands at the last key")
def _(ask, rng):
    ask(scores(rng, 2, 4))
    ask(scores(rng, 3, 8))


@relative_shift.property(
    "keys in the future get 0", hint="After cutting the line into rows, the future holds the next row's numbers."
)
def _(ask, rng):
    n = 4
    result = ask(scores(rng, n, n))
    if np.triu(result, 1).any():
        raise Failed("there are numbers above the diagonal")


@relative_shift.property("one query: nothing moves")
def _(ask, rng):
    ask(scores(rng, 1, 4))


@relative_shift.property("leading axes: every matrix by itself", hint="Keep the leading axes: reshape(*lead, -1).")
def _(ask, rng):
    ask(scores(rng, 2, 3, 4))
    ask(scores(rng, 2, 2, 3, 3))
    ask(1e4 * scores(rng, 2, 1, 3, 40).astype(np.float32))
    ask(scores(rng, 3, 1, 1, 4))


@relative_shift.mistake("The future is filled with numbers of the next row: set it to 0.")
def _(by_distance):
    *lead, n_queries, n_keys = by_distance.shape
    padded = np.concatenate([np.zeros_like(by_distance[..., :1]), by_distance], axis=-1)
    return padded.reshape(*lead, -1)[..., n_queries:].reshape(*lead, n_queries, n_keys)


@relative_shift.mistake("The rows were not moved: in column j of the result stands key j, not a distance.")
def _(by_distance):
    n_queries, n_keys = by_distance.shape[-2:]
    return np.tril(by_distance, n_keys - n_queries)


@relative_shift.mistake("The rows were turned round the end: what leaves on the left may not come in on the right.")
def _(by_distance):
    n_queries = by_distance.shape[-2]
    return np.stack([np.roll(by_distance[..., i, :], i + 1 - n_queries, axis=-1) for i in range(n_queries)], axis=-2)


@relative_shift.mistake("Shifted the wrong way: the last row stays, the first moves most.")
def _(by_distance):
    n_queries, n_keys = by_distance.shape[-2:]
    shifted = np.zeros_like(by_distance)
    for i in range(n_queries):
        shifted[..., i, i:] = by_distance[..., i, : n_keys - i]
    return shifted


@relative_shift.mistake("The last query stands at the last key: query i belongs to key i + n_keys - n_queries.")
def _(by_distance):
    n_queries, n_keys = by_distance.shape[-2:]
    shifted = np.zeros_like(by_distance)
    for i in range(n_queries):
        shifted[..., i, : i + 1] = by_distance[..., i, n_keys - 1 - i :]
    return shifted


@relative_shift.mistake("The triangle begins at the wrong diagonal: np.tril(x, n_keys - n_queries).")
def _(by_distance):
    return np.tril(relative_shift.oracle(by_distance))


@relative_shift.mistake("One place too far: the last row does not move.")
def _(by_distance):
    *lead, n_queries, n_keys = by_distance.shape
    shifted = np.zeros_like(by_distance)
    for i in range(n_queries):
        by = n_queries - i
        shifted[..., i, : n_keys - by] = by_distance[..., i, by:]
    return shifted
