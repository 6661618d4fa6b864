"""Answers to exercises 5.5 and 5.6 as learners write them; see lecture_03.py for what RIGHT, WRONG and CALLS are."""

import numpy as np

# --- 5.5 -------------------------------------------------------------------------------------------------------------


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


# --- 5.6 -------------------------------------------------------------------------------------------------------------


def levels_by_searching(x, bits, per):
    if per == "channel":
        return levels_by_searching(x.swapaxes(-1, -2), bits, "token").swapaxes(-1, -2)
    if per != "token":
        raise ValueError(per)
    low, high = x.min(-1)[..., None, None], x.max(-1)[..., None, None]
    levels = low + (high - low) * np.linspace(0, 1, 2**bits)  # (..., n_tokens, 1, levels)
    nearest = np.abs(x[..., None] - levels).argmin(-1)
    return np.take_along_axis(np.broadcast_to(levels, (*x.shape, 2**bits)), nearest[..., None], -1)[..., 0]


def levels_by_apply(x, bits, per):
    def one(group):
        span = np.ptp(group)
        return (
            group
            if span == 0
            else np.rint((group - group.min()) / span * (2**bits - 1)) / (2**bits - 1) * span + group.min()
        )

    return np.apply_along_axis(
        one, {"channel": -2, "token": -1}[per] if per in ("channel", "token") else per_error(per), x
    )


def per_error(per):
    raise ValueError(f"per is {per}")


def levels_turned_round(x, bits, per):
    return levels_by_searching(x, bits, {"channel": "token", "token": "channel"}[per])


def levels_one_too_many(x, bits, per):
    axis = -2 if per == "channel" else -1
    low = x.min(axis, keepdims=True)
    step = (x.max(axis, keepdims=True) - low) / 2**bits + 1e-300
    return np.round((x - low) / step) * step + low


def levels_with_nan(x, bits, per):
    axis = -2 if per == "channel" else -1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return np.round((x - low) / step) * step + low


def levels_without_error(x, bits, per):
    return levels_by_searching(x, bits, "channel" if per == "channel" else "token")


def levels_of_a_matrix(x, bits, per):
    if per not in ("channel", "token"):
        raise ValueError(per)
    axis = 0 if per == "channel" else 1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), 1e-300)
    return np.rint((x - low) / step) * step + low


def levels_as_codes(x, bits, per):
    axis = -2 if per == "channel" else -1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    return ((x - low) / np.maximum(high - low, 1e-300) * (2**bits - 1)).round().astype(np.uint8)


def levels_around_zero(x, bits, per):
    axis = -2 if per == "channel" else -1
    largest = np.abs(x).max(axis, keepdims=True)
    step = np.maximum(2 * largest / (2**bits - 1), 1e-300)
    return np.round((x + largest) / step) * step - largest


# --- together --------------------------------------------------------------------------------------------------------

RIGHT = {"5.5": [heavy_in_two_steps, heavy_by_a_loop], "5.6": [levels_by_searching, levels_by_apply]}
WRONG = {
    "5.5": [
        (heavy_only, "half of it is for the most recent"),
        (heavy_counted_twice, "counted twice"),
        (heavy_that_ignores_fair, "fair does not change"),
        (heavy_as_places, "expected"),
        (heavy_from_zero_recent, "NO"),
        (heavy_of_the_rows, "NO"),
    ],
    "5.6": [
        (levels_turned_round, "mixed up"),
        (levels_one_too_many, "2^b - 1 steps"),
        (levels_with_nan, "0/0 is nan"),
        (levels_without_error, "expected a ValueError"),
        (levels_of_a_matrix, "counted from the front"),
        (levels_as_codes, "expected floats"),
        (levels_around_zero, "between the smallest and the largest"),
    ],
}

some = np.random.default_rng(0)
weights = some.dirichlet(np.ones(56), size=(4, 1, 56)) * np.tri(56)
CALLS = {
    "5.5": [((np.tri(12) / np.arange(1, 13)[:, None], 4), {}), ((weights, 17), {}), ((weights, 56), {})],
    "5.6": [
        ((some.standard_normal((64, 32)), 4, "token"), {}),
        ((some.standard_normal((2, 3, 32, 32)), 4, "channel"), {}),
    ],
}
