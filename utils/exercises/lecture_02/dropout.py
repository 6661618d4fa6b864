"""Lecture 02: a listing with dropout and padding, mended."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import draw, weights_of
from utils.exercises.lecture_02.heads import same
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "multi_head"


# --- 2.6 -------------------------------------------------------------------------------------------------------------


@exercise("2.6", MODULE, returns=("out", "weights"))
def attention_with_dropout(q, k, v, key_mask, keep, rate):
    weights = np.zeros(keep.shape)
    for b, h, i in np.ndindex(keep.shape[:-1]):
        scores = [math.fsum(q[b, h, i] * key) / math.sqrt(q.shape[-1]) for key in k[b, h]]
        weights[b, h, i] = weights_of(scores, key_mask[b])
    return np.einsum("bhij,bhjd->bhid", np.where(keep, weights / (1 - rate), 0), v), weights


def sentences(rng, batch, n_heads, n_queries, n_keys, d_head, dropped=0.5):
    """(q, k, v, key_mask, keep): nothing is masked, a share of the weights is dropped."""
    q, k, v = (draw(rng, batch, n_heads, n, d_head) for n in (n_queries, n_keys, n_keys))
    return q, k, v, np.ones((batch, n_keys), bool), rng.random((batch, n_heads, n_queries, n_keys)) >= dropped


@attention_with_dropout.property("without dropout and padding it is attention")
def _(ask, rng):
    ask(*sentences(rng, 1, 1, 2, 2, 2, dropped=0), 0.0)
    ask(*sentences(rng, 2, 2, 3, 4, 2, dropped=0), 0.0)


@attention_with_dropout.property("the returned weights are those before dropout")
def _(ask, rng):
    got = ask(*sentences(rng, 1, 1, 2, 3, 2), 0.5)[1]
    if abs(got.sum(-1) - 1).max() > 1e-8:
        raise Failed("the rows of the weights do not sum to 1")


@attention_with_dropout.property("the output uses what is kept, divided by 1 - rate")
def _(ask, rng):
    ask(*sentences(rng, 1, 2, 2, 3, 2, dropped=0.25), 0.25)


@attention_with_dropout.property("key_mask is True where a key may be attended to")
def _(ask, rng):
    q, k, v, _, keep = sentences(rng, 1, 1, 2, 3, 2, dropped=0)
    ask(q, k, v, np.array([[True, True, False]]), keep, 0.0)


@attention_with_dropout.property("each sentence has its own mask, whatever the numbers of queries and heads")
def _(ask, rng):
    q, k, v, _, keep = sentences(rng, 2, 1, 2, 2, 2, dropped=0)
    ask(q, k, v, np.array([[True, False], [True, True]]), keep, 0.0)
    q, k, v, _, keep = sentences(rng, 2, 2, 3, 3, 2, dropped=0)
    ask(q, k, v, np.array([[True, False, True], [True, True, False]]), keep, 0.0)


@attention_with_dropout.property("a sentence with nothing to attend to gives zeros, not nan")
def _(ask, rng):
    q, k, v, _, keep = sentences(rng, 2, 1, 2, 2, 2, dropped=0)
    ask(q, k, v, np.array([[True, True], [False, False]]), keep, 0.0)


@attention_with_dropout.property("scores of 1e4 do not overflow")
def _(ask, rng):
    q, k, v, mask, keep = sentences(rng, 1, 1, 2, 3, 2, dropped=0)
    ask(1e4 * q, k, v, mask, keep, 0.0)


@attention_with_dropout.property(
    "all at once: padding, dropout, rows of very different size, one query",
    hint="Which two of them do not work together?",
)
def _(ask, rng):
    mask = np.array([[True, False, True, True], [False, False, False, False], [False, True, True, False]])
    for n_queries, dtype in ((3, np.float64), (1, np.float64), (3, np.float32), (1, np.float32)):
        q, k, v, _, keep = sentences(rng, 3, 2, n_queries, 4, 2, dropped=0.3)
        size = np.array([300.0, 1.0, 0.01])[:n_queries, None] if dtype == np.float64 else 1.0
        ask(*((size * q).astype(dtype), k.astype(dtype), v.astype(dtype)), mask, keep, 0.3)


def for_each_sentence(key_mask):
    return key_mask[:, None, None, :]


def usual_dropout(
    q,
    k,
    v,
    key_mask,
    keep,
    rate,
    *,
    placed=for_each_sentence,
    turned=same,
    kept=same,
    forbidden=-np.inf,
    late=False,
    shifted=True,
    guarded=True,
    enlarged=True,
    back="before",
    again=False,
):
    """The mended listing in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    allowed = placed(turned(key_mask))
    scores = np.where(allowed | late, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), forbidden)
    top = np.maximum(scores.max(-1, keepdims=True), -1e300 if guarded else -np.inf)
    powers = np.exp(scores - top if shifted else scores)
    total = powers.sum(-1, keepdims=True)
    weights = powers / (np.where(total == 0, 1, total) if guarded else total) * (allowed | (not late))
    dropped = weights * kept(keep) / (1 - rate if enlarged else 1)
    if again:
        dropped = dropped / np.where(dropped.sum(-1, keepdims=True) == 0, 1, dropped.sum(-1, keepdims=True))
    return dropped @ v, (weights if back == "before" else dropped)


for message, change in {
    "The returned weights have been through dropout: return them as they were before.": {"back": "after"},
    "What is kept is not enlarged: divide it by 1 - rate, so that the mean stays.": {"enlarged": False},
    "What is kept is made to sum to 1 again; dropout only divides it by 1 - rate.": {"again": True},
    "The mask is the wrong way round: True means may attend.": {"turned": np.logical_not},
    "The mask meets the wrong axes: (batch, n_keys) has to become (batch, 1, 1, n_keys).": {"placed": same},
    "The mask is laid over the queries: (batch, n_keys) has to become (batch, 1, 1, n_keys).": {
        "placed": lambda key_mask: key_mask[:, None, :, None]
    },
    "keep is True where a weight stays.": {"kept": np.logical_not},
    "The mask is applied after the softmax: what is left no longer sums to 1. Mask the scores.": {"late": True},
    "A forbidden score is very low but not -inf: an empty sentence gets the mean of its padding.": {"forbidden": -1e9},
    "exp overflows: subtract the largest score first.": {"shifted": False},
    "0/0 or -inf minus -inf is nan: guard the sentence that has nothing to attend to.": {"guarded": False},
}.items():
    attention_with_dropout.mistake(message)(partial(usual_dropout, **change))
