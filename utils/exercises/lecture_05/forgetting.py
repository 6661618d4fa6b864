"""Lecture 05: heavy hitters. The oracle goes through one row and one key at a time."""

from functools import partial

import numpy as np

from utils.judge.function import exercise

MODULE = "kv_cache"


# --- 5G --------------------------------------------------------------------------------------------------------------


@exercise("5G", MODULE, formerly="5.5", importance="extra")
def keep_heavy(weights, budget, fair=False):
    n_queries, n_keys = weights.shape[-2:]
    keep = np.zeros((*weights.shape[:-2], n_keys), dtype=bool)
    for place in np.ndindex(*weights.shape[:-2]):
        scores = []
        for key in range(n_keys):
            seen = [i for i in range(n_queries) if key <= n_keys - n_queries + i]
            if fair:
                shares = [weights[place][i, key] * (n_keys - n_queries + i + 1) for i in seen]
                scores.append(sum(shares) / len(seen))
            else:
                scores.append(sum(weights[place][i, key] for i in seen))
        recent = list(range(n_keys))[::-1][: budget - budget // 2]
        others = sorted((key for key in range(n_keys) if key not in recent), key=lambda key: -scores[key])
        keep[place][[*recent, *others[: budget // 2]]] = True
    return keep


def causal(rng, *shape, spread=2.0):
    """Causal weights (..., n_queries, n_keys) with heavy hitters in any place: each row sums to 1, no two sums are equal."""
    n_queries, n_keys = shape[-2:]
    scores = spread * rng.normal(size=(*shape[:-2], 1, n_keys)) + rng.normal(size=shape)
    weights = np.exp(scores) * np.tri(n_queries, n_keys, n_keys - n_queries)
    return weights / weights.sum(-1, keepdims=True)


# Keys 0 to 6: 1 has the largest weight, 2 the largest sum, 3 the largest weight of the last query, 4 the smallest sum.
SMALL = np.array(
    [
        [0.2, 0.7, 0.1, 0.0, 0.0, 0.0, 0.0],
        [0.2, 0.1, 0.6, 0.1, 0.0, 0.0, 0.0],
        [0.2, 0.1, 0.6, 0.1, 0.0, 0.0, 0.0],
        [0.1, 0.1, 0.5, 0.2, 0.0, 0.1, 0.0],
        [0.1, 0.05, 0.1, 0.4, 0.0, 0.15, 0.2],
    ]
)


@keep_heavy.property(
    "7 keys, a budget of 2: the last one and the one looked at most",
    hint="Which axis of the weights belongs to the keys, and what is summed along the other?",
)
def _(ask, rng):
    ask(SMALL, 2)


@keep_heavy.property(
    "half recent, half heavy hitters",
    hint="How many of the budget are recent keys, and where do these stand?",
)
def _(ask, rng):
    ask(causal(rng, 12, 12), 6)
    ask(causal(rng, 20, 20), 8)


@keep_heavy.property("a heavy hitter that is recent does not count twice", hint="`budget` keys have to be marked.")
def _(ask, rng):
    weights = causal(rng, 8, 8)
    weights[-1] = np.array([0.02, 0.01, 0.01, 0.02, 0.01, 0.01, 0.02, 0.9])
    weights[-2] = np.array([0.02, 0.01, 0.01, 0.02, 0.01, 0.03, 0.9, 0])
    ask(weights, 4)


@keep_heavy.property(
    "an odd budget: one more recent key than heavy hitters",
    hint="What is 5 // 2, and who gets the rest?",
)
def _(ask, rng):
    ask(causal(rng, 12, 12), 5)
    ask(causal(rng, 9, 9), 1)


@keep_heavy.property(
    "budgets of 0, of all keys, and of more",
    hint="What does your slice of recent keys do when the budget is 0, or larger than n_keys?",
)
def _(ask, rng):
    for budget in (0, 7, 10, 20):
        ask(causal(rng, 7, 7), budget)


@keep_heavy.property(
    "each row of the leading axes by itself",
    hint="Which axes are reduced, and which stay?",
)
def _(ask, rng):
    ask(causal(rng, 2, 3, 8, 8), 4)


@keep_heavy.property(
    "fair: relative to an even share, per query that could see the key",
    hint="By what is a weight multiplied, and by what is a column's sum divided?",
)
def _(ask, rng):
    for _ in range(4):
        ask(causal(rng, 24, 24, spread=0.5), 14, fair=True)  # nearly even: the age of a key matters


@keep_heavy.property(
    "fewer queries than keys: the last query sees all keys",
    hint="How many keys does the first query see when there are 5 queries and 14 keys?",
)
def _(ask, rng):
    for _ in range(4):
        ask(causal(rng, 5, 14), 6, fair=True)
        ask(causal(rng, 5, 14), 6)


@keep_heavy.property(
    "all at once: fair, leading axes, fewer queries than keys, an odd budget, nearly even weights",
    hint="Which keys does query i see when there are fewer queries than keys, and which queries see key j?",
)
def _(ask, rng):
    for spread in (0.1, 0.3, 1.0):
        for budget in (9, 16):
            ask(causal(rng, 2, 1, 7, 24, spread=spread), budget, fair=True)
            ask(causal(rng, 3, 1, 24, 24, spread=spread).astype(np.float32), budget, fair=True)
            ask(causal(rng, 2, 1, 7, 24, spread=spread), budget)


def usual_scores(weights, fair):
    n_queries, n_keys = weights.shape[-2:]
    if not fair:
        return weights.sum(-2)
    visible = n_keys - n_queries + 1 + np.arange(n_queries)
    return (weights * visible[:, None]).sum(-2) / np.minimum(n_queries, n_keys - np.arange(n_keys))


def usual_heavy(weights, budget, fair=False, *, scores=usual_scores, heavy=lambda n: n // 2, exclude=True, recent=None):
    """H2O in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    found, n_keys = scores(weights, fair).copy(), weights.shape[-1]
    n_recent = budget - heavy(budget) if recent is None else recent(budget)
    newest = np.arange(n_keys) >= n_keys - n_recent
    if exclude:
        found[..., newest] = -np.inf
    best = np.argsort(-found, axis=-1)[..., : heavy(budget)]
    keep = np.zeros(found.shape, dtype=bool)
    np.put_along_axis(keep, best, True, axis=-1)
    keep[..., newest] = True
    return keep


def uncorrected(weights, fair, visible=True, seen=True):
    n_queries, n_keys = weights.shape[-2:]
    if fair and visible:
        weights = weights * (n_keys - n_queries + 1 + np.arange(n_queries))[:, None]
    return weights.sum(-2) / (np.minimum(n_queries, n_keys - np.arange(n_keys)) if fair and seen else 1)


def fair_scores(weights, fair, most=None, more=0):
    n_queries, n_keys = weights.shape[-2:]
    if not fair:
        return weights.sum(-2)
    visible = n_keys - n_queries + 1 + np.arange(n_queries) + more
    return (weights * visible[:, None]).sum(-2) / np.minimum(most or n_queries, n_keys - np.arange(n_keys))


for message, change in {
    "All of the budget goes to the heavy hitters: half of it is for the most recent keys.": {
        "heavy": lambda n: n,
        "exclude": False,
    },
    "Only the most recent keys are kept: that is a window.": {"heavy": lambda n: 0},
    "Some heavy hitters are recent keys, and were counted twice: choose them among the others.": {"exclude": False},
    "With an odd budget the heavy hitters get the smaller half.": {"heavy": lambda n: n - n // 2},
    "The rows are summed, which gives 1 for each query: a key is a column.": {
        "scores": lambda weights, fair: np.broadcast_to(
            weights.sum(-1)[..., :1], weights.shape[:-2] + weights.shape[-1:]
        )
    },
    "Without fair, too, the scores are the fair ones: there a key's score is the sum of its column.": {
        "scores": lambda weights, fair: usual_scores(weights, True)
    },
    "The largest single weight decides: it is the sum over all queries.": {
        "scores": lambda weights, fair: weights.max(-2) if not fair else usual_scores(weights, fair)
    },
    "Only the last query votes: H2O sums over all queries.": {
        "scores": lambda weights, fair: weights[..., -1, :] if not fair else usual_scores(weights, fair)
    },
    "The least looked at are kept: take the largest sums.": {
        "scores": lambda weights, fair: -usual_scores(weights, fair)
    },
    "fair does not change which keys are kept: weigh by what a query sees, divide by who sees the key.": {
        "scores": lambda weights, fair: weights.sum(-2)
    },
    "fair: the sum is divided by the queries that see the key, but the weights were not multiplied by what a query sees.": {
        "scores": partial(uncorrected, visible=False)
    },
    "fair: the weights were multiplied, but the sum is not divided by the number of queries that could see the key.": {
        "scores": partial(uncorrected, seen=False)
    },
    "fair: no more than n_queries queries can have seen a key.": {"scores": partial(fair_scores, most=10**9)},
    "fair: query i sees n_keys - n_queries + i + 1 keys, not one more.": {"scores": partial(fair_scores, more=1)},
    "fair: with fewer queries than keys the first query sees n_keys - n_queries + 1 keys, not one.": {
        "scores": lambda weights, fair: usual_scores(
            weights
            / (
                (weights.shape[-1] - weights.shape[-2] + 1 + np.arange(weights.shape[-2]))
                / (1 + np.arange(weights.shape[-2]))
            )[:, None]
            if fair
            else weights,
            fair,
        )
    },
}.items():
    keep_heavy.mistake(message)(partial(usual_heavy, **change))


@keep_heavy.mistake("One choice was made for all heads: each row of the leading axes has its own.")
def _(weights, budget, fair=False):
    together = weights.mean(tuple(range(weights.ndim - 2)))
    return np.broadcast_to(usual_heavy(together, budget, fair), weights[..., 0, :].shape)
