"""Lecture 11: one attention map minus a part of another. The oracle goes one query and one key at a time."""

import math

import numpy as np

from utils.exercises.arrays import draw, kept_dtype, or_one, weights_of
from utils.judge.function import exercise

MODULE = "differential"


@exercise("11A", MODULE, importance="essential")
def subtract_map(q1, k1, q2, k2, v, lam, causal=False):
    (n, d), m = q1.shape[-2:], v.shape[-2]
    lam = np.broadcast_to(np.asarray(lam, float), q1.shape[:-2])
    out = np.zeros((*q1.shape[:-1], v.shape[-1]))
    for at in np.ndindex(*q1.shape[:-1]):
        head, seen = at[:-1], [not causal or j <= at[-1] + m - n for j in range(m)]
        maps = []
        for q, k in ((q1, k1), (q2, k2)):
            scores = [math.fsum((q[at].astype(float) * k[head][j]).tolist()) / math.sqrt(d) for j in range(m)]
            maps.append(weights_of(scores, seen))
        for j, (first, second) in enumerate(zip(*maps)):
            out[at] += (first - lam[head] * second) * v[head][j]
    return out


def inputs(rng, heads=2, n=3, m=4, d=4, d_v=3, lead=(), size=1.0):
    """q1, k1, q2, k2, v; the scores grow with size squared."""
    shapes = [(*lead, heads, rows, columns) for rows, columns in ((n, d), (m, d), (n, d), (m, d), (m, d_v))]
    q1, k1, q2, k2, v = (draw(rng, *shape) for shape in shapes)
    return size * q1, size * k1, size * q2, size * k2, v


@subtract_map.property(
    "the second map is subtracted, lambda times",
    hint="Two maps, each a softmax over the keys: which of them is multiplied by lam, and what is done with both?",
)
def _(ask, rng):
    one = np.array([[[2.0, 0.0]]]), np.array([[[1.0, 0.0], [0.0, 1.0]]])
    two = np.array([[[0.0, 2.0]]]), np.array([[[0.0, 1.0], [0.0, 3.0]]])
    ask(*one, *two, np.array([[[4.0], [8.0]]]), 0.5)
    ask(*inputs(rng), 0.8)


@subtract_map.property(
    "lambda 0 is attention, and lambda may be above 1", hint="What does your answer do to lam itself?"
)
def _(ask, rng):
    ask(*inputs(rng), 0.0)
    ask(*inputs(rng, size=1.5), 1.4)


@subtract_map.property(
    "a lambda for each head", hint="Which axes of (heads, n_queries, n_keys) must lam of shape (heads,) get behind it?"
)
def _(ask, rng):
    ask(*inputs(rng, heads=3, n=3, m=3), np.array([0.2, 0.5, 1.1]))
    ask(*inputs(rng, heads=2, n=4, m=2), np.array([0.9, 0.1]))


@subtract_map.property("any axes in front", hint="What stands for the axes in front, and do heads of a batch mix?")
def _(ask, rng):
    ask(*inputs(rng, lead=(2,)), 0.3)
    ask(*inputs(rng, lead=(2, 3), heads=2, n=1), np.array([0.4, 0.7]))
    ask(*inputs(rng, heads=1, n=1, m=1, d=1, d_v=1), 0.6)


@subtract_map.property(
    "causal in both maps, bottom-right aligned; nothing to see gives zeros",
    hint="Which of the two maps gets causal, and what may query 0 of 2 see, with 4 keys?",
)
def _(ask, rng):
    ask(*inputs(rng, n=3, m=3), 0.5, causal=True)
    ask(*inputs(rng, n=2, m=4), 0.5, causal=True)
    ask(*inputs(rng, n=4, m=2), np.array([0.5, 0.8]), causal=True)


@subtract_map.property(
    "scores of 1e4 do not overflow, in either map",
    hint="Does each map have a softmax of its own, with its own maximum?",
)
def _(ask, rng):
    ask(*inputs(rng, size=150.0), 0.7)
    q1, k1, q2, k2, v = inputs(rng, m=40)
    ask(300 * q1, k1, q2, 300 * k2, v, 0.7)


@subtract_map.property("the float type of q1", hint="Which float type has lam, and what becomes of float32 times it?")
def _(ask, rng):
    kept_dtype(ask, np.float32, *inputs(rng, size=1.5), lam=0.3)
    *maps, v = inputs(rng)
    kept_dtype(ask, np.float32, *maps, v=v, lam=0.3)  # v stays in double
    kept_dtype(ask, np.float32, *inputs(rng, lead=(2,), n=1, m=40), lam=np.array([0.3, 0.9]), causal=True)


@subtract_map.property(
    "all at once: causal, axes in front, one query or one head, large scores",
    hint="Which two of these have you never tried together?",
)
def _(ask, rng):
    ask(*inputs(rng, lead=(2,), n=1, m=5, size=150.0), np.array([0.3, 0.9]), causal=True)
    ask(*inputs(rng, lead=(1, 2), heads=1, n=3, m=5, size=150.0), 0.4, causal=True)


def usual(
    q1, k1, q2, k2, v, lam, causal=False, *, divisor=math.sqrt, shown=(True, True), shift=0, top=False, axis=-1, sign=-1,
    factor=None, values=lambda first, second, v: (first + second) @ v, own=lambda lam: lam,
):  # fmt: skip
    """Differential attention in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    lam, maps = own(np.asarray(lam, q1.dtype)), []
    lam = (lam[..., None, None] if factor is None else factor(lam, q1)).astype(q1.dtype)
    for q, k, hidden in ((q1, k1, shown[0]), (q2, k2, shown[1])):
        scores = q @ k.swapaxes(-1, -2) / divisor(q.shape[-1])
        n, m = scores.shape[-2:]
        if causal and hidden:
            scores = np.where(np.tri(n, m, (0 if top else m - n) + shift, dtype=bool), scores, -np.inf)
        with np.errstate(all="ignore"):
            powers = np.exp(scores - np.maximum(scores.max(axis=axis, keepdims=True, initial=-1e300), -1e300))
            maps.append(powers / or_one(powers.sum(axis=axis, keepdims=True)))
    return values(maps[0], sign * lam * maps[1], v).astype(q1.dtype)


def normalised(first, second, v):
    difference = first + second
    return difference / or_one(difference.sum(-1, keepdims=True)) @ v


subtract_map.mistakes_of(
    usual,
    {
        "The second map is added: it has to be subtracted.": {"sign": 1},
        "lam is not used: the whole second map is subtracted.": {"own": lambda lam: np.ones_like(lam)},
        "The rows are divided by their sum: they sum to 1 - lam, and stay so.": {"values": normalised},
        "Negative weights became 0: they stay negative.": {
            "values": lambda first, second, v: np.maximum(first + second, 0) @ v
        },
        "lam of shape (heads,) multiplies the keys: it needs two axes behind the heads.": {
            "factor": lambda lam, q: lam if lam.ndim == 0 or lam.size == 1 else np.resize(lam, q.shape[-2])[:, None]
        },
        "The scores are not scaled: divide them by sqrt(d_head).": {"divisor": lambda d: 1.0},
        "The scores are divided by d_head, not by sqrt(d_head).": {"divisor": lambda d: d},
        "causal=True reaches the first map only: both maps are causal.": {"shown": (True, False)},
        "causal=True reaches the second map only: both maps are causal.": {"shown": (False, True)},
        "causal=True changes nothing.": {"shown": (False, False)},
        "The causal mask begins at the top left: the last query has to see all keys.": {"top": True},
        "With causal=True a query sees one key too many.": {"shift": 1},
        "The softmax runs over the queries: each row of a map sums to 1, over the keys.": {"axis": -2},
    },
)


@subtract_map.mistake("There is one softmax, of the difference of the scores: each map has a softmax of its own.")
def _(q1, k1, q2, k2, v, lam, causal=False):
    lam, d = np.asarray(lam, q1.dtype)[..., None, None], math.sqrt(q1.shape[-1])
    scores = q1 @ k1.swapaxes(-1, -2) / d - lam * (q2 @ k2.swapaxes(-1, -2) / d)
    n, m = scores.shape[-2:]
    if causal:
        scores = np.where(np.tri(n, m, m - n, dtype=bool), scores, -np.inf)
    powers = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    return (powers / or_one(powers.sum(-1, keepdims=True)) @ v).astype(q1.dtype)


@subtract_map.mistake("The first map is multiplied by 1 - lam: it stays as it is.")
def _(q1, k1, q2, k2, v, lam, causal=False):
    whole = usual(q1, k1, q2, k2, v, lam, causal)
    first = usual(q1, k1, q2, k2, v, 0 * np.asarray(lam), causal)
    return (whole - np.asarray(lam, q1.dtype)[..., None, None] * first).astype(q1.dtype)


@subtract_map.mistake("The difference is multiplied by 1 - lam: nothing is multiplied here but the second map, by lam.")
def _(q1, k1, q2, k2, v, lam, causal=False):
    whole = usual(q1, k1, q2, k2, v, lam, causal)
    return (whole - np.asarray(lam, q1.dtype)[..., None, None] * whole).astype(q1.dtype)
