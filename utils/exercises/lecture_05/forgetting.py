"""The exercises of lecture 05 about what a cache may forget: heavy hitters, and quantisation by channel or by token.

The oracles go through one row, one key, one number at a time.
"""

from functools import partial

import numpy as np

from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "kv_cache"


# --- 5.5 -------------------------------------------------------------------------------------------------------------


@exercise("5.5", MODULE)
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


@keep_heavy.property("7 keys, a budget of 2: the last one and the one looked at most")
def _(ask, rng):
    ask(SMALL, 2)


@keep_heavy.property("half recent, half heavy hitters")
def _(ask, rng):
    ask(causal(rng, 12, 12), 6)
    ask(causal(rng, 20, 20), 8)


@keep_heavy.property("a heavy hitter that is recent does not count twice", hint="`budget` keys have to be marked.")
def _(ask, rng):
    weights = causal(rng, 8, 8)
    weights[-1] = np.array([0.02, 0.01, 0.01, 0.02, 0.01, 0.01, 0.02, 0.9])
    weights[-2] = np.array([0.02, 0.01, 0.01, 0.02, 0.01, 0.03, 0.9, 0])
    ask(weights, 4)


@keep_heavy.property("an odd budget: one more recent key than heavy hitters")
def _(ask, rng):
    ask(causal(rng, 12, 12), 5)
    ask(causal(rng, 9, 9), 1)


@keep_heavy.property("budgets of 0, of all keys, and of more")
def _(ask, rng):
    for budget in (0, 7, 10, 20):
        ask(causal(rng, 7, 7), budget)


@keep_heavy.property("each row of the leading axes by itself")
def _(ask, rng):
    ask(causal(rng, 2, 3, 8, 8), 4)


@keep_heavy.property("fair: relative to an even share, per query that could see the key")
def _(ask, rng):
    for _ in range(4):
        ask(causal(rng, 24, 24, spread=0.5), 14, fair=True)  # nearly even: the age of a key matters


@keep_heavy.property("fewer queries than keys: the last query sees all keys")
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


# --- 5.6 -------------------------------------------------------------------------------------------------------------


@exercise("5.6", MODULE)
def round_to_levels(x, bits, per):
    groups = np.moveaxis(x, -2, -1) if per == "channel" else x
    out = np.empty(groups.shape)
    for place in np.ndindex(*groups.shape[:-1]):
        group = groups[place].astype(np.float64)
        levels = np.linspace(group.min(), group.max(), 2**bits)
        for i, number in enumerate(group):
            out[place][i] = levels[np.abs(levels - number).argmin()]
    return np.moveaxis(out, -1, -2) if per == "channel" else out


@round_to_levels.property("3 tokens, 1 bit: the smallest and the largest of each")
def _(ask, rng):
    ask(np.array([[1.0, 2.0, 4.0, 5.0], [0.0, 1.0, 5.0, 7.0], [2.0, 3.0, 3.0, 8.0]]), 1, "token")


@round_to_levels.property("per token, 2 and 4 bits")
def _(ask, rng):
    ask(rng.normal(size=(3, 8)), 2, "token")
    ask(rng.normal(size=(5, 16)), 4, "token")


@round_to_levels.property("per channel")
def _(ask, rng):
    ask(rng.normal(size=(8, 3)), 2, "channel")
    ask(rng.normal(size=(16, 5)), 4, "channel")


@round_to_levels.property("8 bits: 256 levels")
def _(ask, rng):
    ask(rng.normal(size=(4, 6)), 8, "token")


@round_to_levels.property("groups that lie far from 0, and all below 0")
def _(ask, rng):
    ask(100 + rng.normal(size=(6, 4)), 2, "channel")
    ask(-5 - rng.random(size=(4, 6)), 3, "token")


@round_to_levels.property("a group of equal numbers stays as it is")
def _(ask, rng):
    x = rng.normal(size=(4, 5))
    x[:, 2] = 0.7
    ask(x, 2, "channel")
    ask(np.zeros((2, 3)), 4, "token")


@round_to_levels.property("leading axes: each channel or token of each head by itself")
def _(ask, rng):
    for per in ("channel", "token"):
        ask(rng.normal(size=(2, 3, 6, 4)) * np.arange(1, 4)[:, None, None], 2, per)


@round_to_levels.property(
    "all at once: leading axes, one of them 1, groups of very different size, far from 0, an equal one",
    hint="Do the groups of one head disturb those of another?",
)
def _(ask, rng):
    for per in ("channel", "token"):
        x = rng.normal(size=(2, 1, 7, 4)) * np.array([1e-3, 1.0, 1e3, 1.0]) + np.array([0.0, 1e4, -5.0, 0.1])
        x[1, :, :, 3] = 0.7
        ask(x, 3, per)
        ask(np.swapaxes(x, -1, -2), 3, per)
        ask(x[:, :, :1], 2, per)


@round_to_levels.property('another `per` is a ValueError: "channel" or "token"')
def _(ask, rng):
    try:
        ask.run(np.ones((2, 2)), 2, "head")
    except Failed as failed:
        if "ValueError" in f"{failed} {failed.details}":
            return
        raise
    raise Failed('returned a result for per="head", expected a ValueError')


def both(bits):
    return 2**bits - 1


def usual_levels(
    x,
    bits,
    per,
    *,
    axes={"channel": -2, "token": -1},
    steps=both,
    symmetric=False,
    whole=False,
    guard=True,
    rounding=np.round,
    lift=True,
):
    """Rounding to levels in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    if per not in axes:
        raise ValueError(f"per must be one of {', '.join(axes)}, got {per}")
    axis = None if whole else axes[per]
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    if symmetric:
        low, high = -np.abs(x).max(axis, keepdims=True), np.abs(x).max(axis, keepdims=True)
    step = (high - low) / steps(bits)
    codes = rounding((x - low) / (np.where(step == 0, 1, step) if guard else step))
    return codes * step + low if lift else codes * step


for message, change in {
    "Channels and tokens are mixed up: a channel is a column, its numbers run along the axis -2.": {
        "axes": {"channel": -1, "token": -2}
    },
    "Between 2^b levels there are 2^b - 1 steps, not 2^b.": {"steps": lambda bits: 2**bits},
    "The levels lie between -m and m, with m the largest size: here they lie between the smallest and the largest.": {
        "symmetric": True
    },
    "One minimum and one step for the whole array: each channel or token has its own.": {"whole": True},
    "All numbers of a group are equal: the step is 0, and 0/0 is nan.": {"guard": False},
    "This rounds down to the next level: take the nearest.": {"rounding": np.floor},
    "The minimum is missing: add it again after the steps were counted.": {"lift": False},
    "Nothing was rounded: round (x - minimum) / step.": {"rounding": lambda x: x},
}.items():
    round_to_levels.mistake(message)(partial(usual_levels, **change))


@round_to_levels.mistake("These are the codes, 0 to 2^b - 1: turn them back into numbers.")
def _(x, bits, per):
    axis = -2 if per == "channel" else -1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return np.round((x - low) / np.where(step == 0, 1, step))


@round_to_levels.mistake(
    "The axes are counted from the front: with leading axes channels run along -2, tokens along -1."
)
def _(x, bits, per):
    return usual_levels(x, bits, per, axes={"channel": 0, "token": 1})


@round_to_levels.mistake("The heads of a batch share a group: only one axis is grouped.")
def _(x, bits, per):
    axis = tuple(i for i in range(x.ndim) if i != (x.ndim - 1 if per == "channel" else x.ndim - 2))
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return np.round((x - low) / np.where(step == 0, 1, step)) * step + low
