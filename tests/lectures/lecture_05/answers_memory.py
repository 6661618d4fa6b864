"""Answers to exercise 5G as learners write them."""

import numpy as np

# --- 5G --------------------------------------------------------------------------------------------------------------


def scores_of(weights, fair):
    n_queries, n_keys = weights.shape[-2:]
    allowed = np.tri(n_queries, n_keys, n_keys - n_queries)
    if not fair:
        return weights.sum(axis=-2)
    return np.einsum("...qk,q->...k", weights, allowed.sum(1)) / allowed.sum(0)


def heavy_in_two_steps(weights, budget, fair=False):
    n_keys = weights.shape[-1]
    budget = min(budget, n_keys)
    n_old = n_keys - (budget - budget // 2)
    rank = (-scores_of(weights, fair)[..., :n_old]).argsort(-1).argsort(-1)
    keep = np.ones((*weights.shape[:-2], n_keys), dtype=bool)
    keep[..., :n_old] = rank < budget // 2
    return keep


def heavy_by_a_loop(weights, budget, fair=False):
    rows, n_keys = scores_of(weights, fair).reshape(-1, weights.shape[-1]), weights.shape[-1]
    kept = np.zeros(rows.shape, dtype=bool)
    for row, scores in zip(kept, rows):
        row[max(0, n_keys - (budget - budget // 2)) :] = True
        while row.sum() < min(budget, n_keys):
            row[np.where(row, -np.inf, scores).argmax()] = True
    return kept.reshape(*weights.shape[:-2], n_keys)


def heavy_only(weights, budget, fair=False):
    scores = scores_of(weights, fair)
    return (-scores).argsort(-1).argsort(-1) < budget


def heavy_counted_twice(weights, budget, fair=False):
    keep = heavy_only(weights, budget // 2, fair)
    keep[..., max(weights.shape[-1] - (budget - budget // 2), 0) :] = True
    return keep


def heavy_that_ignores_fair(weights, budget, fair=False):
    return heavy_in_two_steps(weights, budget)


def heavy_as_places(weights, budget, fair=False):
    return np.flatnonzero(heavy_in_two_steps(weights, budget, fair))


def heavy_from_zero_recent(weights, budget, fair=False):
    keep = heavy_only(weights, budget // 2, fair)
    keep[..., -(budget - budget // 2) :] = True  # -0: all of them
    return keep


def heavy_of_the_rows(weights, budget, fair=False):
    return heavy_in_two_steps(weights.swapaxes(-1, -2), budget, fair)


def heavy_always_fair(weights, budget, fair=False):
    return heavy_in_two_steps(weights, budget, fair=True)


# --- together --------------------------------------------------------------------------------------------------------

RIGHT = {"5G": [heavy_in_two_steps, heavy_by_a_loop]}
WRONG = {
    "5G": [
        (heavy_only, "half of it is for the most recent"),
        (heavy_counted_twice, "counted twice"),
        (heavy_that_ignores_fair, "fair does not change"),
        (heavy_as_places, "expected"),
        (heavy_always_fair, "Without fair, too"),
        (heavy_from_zero_recent, "NO"),
        (heavy_of_the_rows, "NO"),
    ]
}

some = np.random.default_rng(0)
weights = some.dirichlet(np.ones(56), size=(4, 1, 56)) * np.tri(56)
CALLS = {"5G": [((np.tri(12) / np.arange(1, 13)[:, None], 4), {}), ((weights, 17), {}), ((weights, 56), {})]}
