"""Lecture 01: attention weights with masks. The oracle goes one row at a time."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import INF, draw, or_one, weights_of
from utils.exercises.lecture_01.masks import causal_mask, compare_positions
from utils.judge.function import exercise

MODULE = "fundamentals"


@exercise("1C", MODULE, formerly="1.5", importance="essential")
def attention_weights(q, k, mask=None, causal=False, scale=None):
    allowed = permitted(q, k, mask, causal)
    q, k = (
        np.broadcast_to(q, (*allowed.shape[:-2], *q.shape[-2:])),
        np.broadcast_to(k, (*allowed.shape[:-2], *k.shape[-2:])),
    )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weights = np.empty(allowed.shape)
    for place in np.ndindex(*allowed.shape[:-1]):
        scores = [scale * math.fsum(map(float, q[place] * key)) for key in k[place[:-1]]]
        weights[place] = weights_of(scores, allowed[place])
    return weights


def permitted(q, k, mask, causal):
    """Which query may attend to which key, in the full shape of the weights."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    leading = np.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    allowed = np.full((*leading, n_queries, n_keys), True) if mask is None else mask
    allowed = allowed & causal_mask.oracle(n_queries, n_keys) if causal else allowed
    return np.broadcast_to(allowed, (*leading, n_queries, n_keys))


@attention_weights.property(
    "softmax of q k^T / sqrt(d_head) over the keys",
    hint="Which axis is d_head, and over which axis does the softmax run?",
)
def _(ask, rng):
    ask(draw(rng, 2, 4), draw(rng, 2, 4))
    ask(draw(rng, 2, 3), draw(rng, 5, 3))


@attention_weights.property(
    "a given scale replaces 1/sqrt(d_head)", hint="When is the default used, and is a scale of 0 given?"
)
def _(ask, rng):
    ask(draw(rng, 2, 3), draw(rng, 3, 3), scale=2.0)
    ask(draw(rng, 2, 3), draw(rng, 3, 3), scale=0.0)
    ask(draw(rng, 2, 3), draw(rng, 3, 3), scale=-1.0)


@attention_weights.property(
    "a key that the mask forbids gets the weight 0", hint="What does the mask do to a score, and when?"
)
def _(ask, rng):
    ask(draw(rng, 2, 2), draw(rng, 3, 2), mask=np.array([[True, True, False], [False, True, True]]))


@attention_weights.property(
    "causal: nothing of the future, bottom-right aligned",
    hint="What does your causal_mask return for 2 queries and 4 keys?",
)
def _(ask, rng):
    ask(draw(rng, 3, 2), draw(rng, 3, 2), causal=True)
    ask(draw(rng, 2, 2), draw(rng, 4, 2), causal=True)


@attention_weights.property(
    "mask and causal together: both must allow it", hint="What happens to the one when the other is given?"
)
def _(ask, rng):
    mask = np.array([[True, False, True], [True, True, False], [False, True, True]])
    ask(draw(rng, 3, 2), draw(rng, 3, 2), mask=mask, causal=True)


@attention_weights.property(
    "nothing to attend to gives zeros, not nan", hint="What does your softmax make of a row of -inf?"
)
def _(ask, rng):
    ask(draw(rng, 2, 2), draw(rng, 2, 2), mask=np.array([[True, True], [False, False]]))
    ask(draw(rng, 3, 2), draw(rng, 1, 2), causal=True)


@attention_weights.property(
    "scores of 1e4 and -1e4 do not overflow", hint="Which function of yours keeps large scores from overflowing?"
)
def _(ask, rng):
    ask(np.array([[1e4, 0.0], [-1e4, 1.0]]), np.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.2]]))
    mask = np.array([[False, True, True], [True, False, True]])
    ask(np.array([[1e4, 0.0], [-1e4, 1.0]]), np.array([[1.0, 0.5], [-1.0, -0.5], [-1.0, 0.2]]), mask=mask)


@attention_weights.property(
    "leading axes, and masks that broadcast",
    hint="With four axes: which of them is d_head, which two of k change places, and does the mask broadcast?",
)
def _(ask, rng):
    q, k = draw(rng, 2, 3, 4, 5), draw(rng, 2, 3, 6, 5)
    ask(q, k)
    ask(q, k, mask=(np.arange(6) < np.array([2, 6])[:, None])[:, None, None], causal=True)


@attention_weights.property("float32 in, the same weights to 1e-5", hint="Where is the scale applied?")
def _(ask, rng):
    ask(draw(rng, 3, 4).astype(np.float32), draw(rng, 5, 4).astype(np.float32), causal=True)


@attention_weights.property(
    "all at once: mask, causal, a scale, leading axes, float32",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    q, k = draw(rng, 2, 3, 4, 5).astype(np.float32), draw(rng, 2, 3, 6, 5).astype(np.float32)
    mask = rng.random((2, 1, 4, 6)) < 0.6
    mask[1, 0, 2] = False
    ask(q, k, mask=mask, causal=True, scale=0.7)
    ask(q, k, mask=mask, causal=True, scale=0.0)  # 0 times -inf is nan: the scale comes before the mask
    ask(q, k, mask=mask, causal=True, scale=-0.5)
    ask(np.array([[[1e3, 1.0]], [[1e-3, 2.0]]]), draw(rng, 2, 3, 2), mask=mask[:, 0, :1, :3], causal=True, scale=0.9)


def root(d_head):
    return 1 / np.sqrt(d_head)


def same(thing):
    return thing


def swapped(array):
    return np.swapaxes(array, -1, -2)


def usual_weights(
    q,
    k,
    mask=None,
    causal=False,
    scale=None,
    *,
    default=root,
    given=same,
    axis=-1,
    forbidden=-INF,
    late=False,
    again=False,
    keep=same,
    turned=swapped,
):
    """Attention weights in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    scale = default(q.shape[-1]) if given(scale) is None else scale
    allowed = permitted(q, k, keep(mask), causal)
    scores = np.where(allowed | late, scale * (q @ turned(k)), forbidden)
    powers = np.exp(scores - np.maximum(scores.max(axis=axis, keepdims=True), -1e300))
    total = powers.sum(axis=axis, keepdims=True)
    weights = powers / or_one(total) * (allowed | (not late))
    return weights / or_one(weights.sum(axis=axis, keepdims=True)) if again else weights


for message, change in {
    "The scores are scaled by d_head, not by sqrt(d_head).": {"default": lambda d_head: 1 / d_head},
    "The scores are not scaled: divide them by sqrt(d_head).": {"default": lambda d_head: 1.0},
    "The scores are multiplied by sqrt(d_head): divide instead.": {"default": np.sqrt},
    "The scale that was given is ignored.": {"given": lambda scale: None},
    "A scale of 0 is a scale too: ask whether it is None.": {"given": lambda scale: scale or None},
    "The softmax runs over the queries: the row of one query has to sum to 1, over the keys.": {"axis": -2},
    "The mask is applied after the softmax: what is left no longer sums to 1. Mask the scores.": {"late": True},
    "The forbidden score still decided the maximum that was subtracted: mask before the softmax.": {
        "late": True,
        "again": True,
    },
    "Swap the last two axes only: np.swapaxes(k, -1, -2).": {"turned": np.transpose},
    "A forbidden score becomes 0, and exp(0) is 1: it has to become -inf.": {"forbidden": 0.0},
    "A forbidden score is very low but not -inf: with nothing to attend to, the query averages everything.": {
        "forbidden": -1e9
    },
    "The mask is the wrong way round: True means may attend.": {"keep": lambda mask: None if mask is None else ~mask},
}.items():
    attention_weights.mistake(message)(partial(usual_weights, **change))


@attention_weights.mistake("The causal mask starts at the top left: align it so that the last query sees every key.")
def _(q, k, mask=None, causal=False, scale=None):
    top_left = compare_positions(q.shape[-2], k.shape[-2], 0)
    return usual_weights(q, k, permitted(q, k, mask, False) & (top_left | (not causal)), False, scale)


@attention_weights.mistake("causal is forgotten when a mask is given: both must allow a key.")
def _(q, k, mask=None, causal=False, scale=None):
    return usual_weights(q, k, mask, causal and mask is None, scale)


@attention_weights.mistake("The mask is forgotten when causal is set: both must allow a key.")
def _(q, k, mask=None, causal=False, scale=None):
    return usual_weights(q, k, None if causal else mask, causal, scale)


@attention_weights.mistake(
    "The mask comes after the softmax, and the rest is divided by its sum: 0/0 for a query with nothing. Mask the scores."
)
def _(q, k, mask=None, causal=False, scale=None):
    weights = usual_weights(q, k, None, causal, scale) * permitted(q, k, mask, False)
    with np.errstate(invalid="ignore"):
        return weights if mask is None else weights / weights.sum(axis=-1, keepdims=True)


@attention_weights.mistake("The mask writes -inf before the scale comes: 0 times -inf is nan. Scale first, then mask.")
def _(q, k, mask=None, causal=False, scale=None):
    factor = root(q.shape[-1]) if scale is None else scale
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.where(permitted(q, k, mask, causal), q @ swapped(k), -INF) * factor
        powers = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e300))
        return powers / or_one(powers.sum(axis=-1, keepdims=True))


@attention_weights.mistake("-inf minus -inf is nan: guard the query that has nothing to attend to.")
def _(q, k, mask=None, causal=False, scale=None):
    return np.where(
        permitted(q, k, mask, causal).any(axis=-1, keepdims=True), usual_weights(q, k, mask, causal, scale), np.nan
    )
