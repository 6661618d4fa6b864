"""Lecture 02: attention in all heads. The oracle goes head by head and row by row."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import draw, weights_of
from utils.exercises.lecture_02.heads import same, split_heads
from utils.judge.function import exercise

MODULE = "multi_head"


def attend(q, k, v, allowed, scale):
    """One head, one query at a time. q (n_queries, d_head), k, v (n_keys, ...), allowed (n_queries, n_keys)."""
    out = np.zeros((len(q), v.shape[-1]))
    for i, row in enumerate(allowed):
        weights = weights_of([scale * math.fsum(q[i] * key) for key in k], row)
        out[i] = sum((w * value for w, value in zip(weights, v)), np.zeros(v.shape[-1]))
    return out


@exercise("2B", MODULE, formerly="2.3", importance="essential")
def multi_head(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    n_queries, n_keys = x_q.shape[-2], x_kv.shape[-2]
    allowed = np.ones((*x_q.shape[:-2], n_heads, n_queries, n_keys), bool) & (True if mask is None else mask)
    if causal:
        allowed = allowed & (np.arange(n_keys) <= np.arange(n_queries)[:, None] + n_keys - n_queries)
    d_head, d_v = w_q.shape[1] // n_heads, w_v.shape[1] // n_heads
    out = np.zeros((*x_q.shape[:-1], w_o.shape[1]))
    for lead in np.ndindex(x_q.shape[:-2]):
        for h in range(n_heads):
            own, own_v = slice(h * d_head, (h + 1) * d_head), slice(h * d_v, (h + 1) * d_v)
            q, k, v = x_q[lead] @ w_q[:, own], x_kv[lead] @ w_k[:, own], x_kv[lead] @ w_v[:, own_v]
            out[lead] += attend(q, k, v, allowed[(*lead, h)], d_head**-0.5) @ w_o[own_v]
    return out


def inputs(rng, n_queries, n_keys, d_model, n_heads, d_head, d_v=None, leading=()):
    """(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads); the same x twice where n_keys is None."""
    d_v = d_head if d_v is None else d_v
    x_q = draw(rng, *leading, n_queries, d_model)
    x_kv = x_q.copy() if n_keys is None else draw(rng, *leading, n_keys, d_model)
    wide, wide_v = n_heads * d_head, n_heads * d_v
    w = [draw(rng, *shape) for shape in ((d_model, wide), (d_model, wide), (d_model, wide_v), (wide_v, d_model))]
    return (x_q, x_kv, *w, n_heads)


@multi_head.property(
    "self-attention in two heads", hint="Which four matrices come when, and what stands between split and merge?"
)
def _(ask, rng):
    ask(*inputs(rng, 2, None, 2, 2, 1))
    ask(*inputs(rng, 5, None, 6, 2, 3))


@multi_head.property("cross-attention: x_q asks, x_kv answers", hint="From which input come q, k and v?")
def _(ask, rng):
    ask(*inputs(rng, 2, 2, 2, 2, 1))
    ask(*inputs(rng, 3, 5, 6, 3, 2))


@multi_head.property(
    "one head is attention_numpy between projections", hint="What is left of your function when n_heads is 1?"
)
def _(ask, rng):
    ask(*inputs(rng, 3, 4, 2, 1, 2))


@multi_head.property(
    "d_head need not be d_model / n_heads, nor d_v be d_head", hint="Which width do you compute, and from which array?"
)
def _(ask, rng):
    ask(*inputs(rng, 3, 4, 4, 2, 3))
    ask(*inputs(rng, 3, 4, 4, 2, 3, d_v=1))


@multi_head.property(
    "mask and causal, and zeros where nothing is allowed", hint="To which function do mask and causal go?"
)
def _(ask, rng):
    ask(*inputs(rng, 3, None, 2, 2, 1), causal=True)
    ask(*inputs(rng, 2, 3, 2, 2, 1), mask=np.array([[True, False, True], [False, False, False]]))
    ask(*inputs(rng, 2, 4, 4, 2, 2), mask=np.array([[True, False, True, True]]), causal=True)


@multi_head.property("leading axes, and a mask for each head", hint="Which axes do you count from the front?")
def _(ask, rng):
    ask(*inputs(rng, 3, 4, 4, 2, 2, leading=(2,)), mask=rng.random((2, 2, 3, 4)) < 0.6)


@multi_head.property("float32 in, the same to 1e-5", hint="Which array do you make with a type of its own?")
def _(ask, rng):
    *arrays, n_heads = inputs(rng, 3, 4, 4, 2, 2)
    ask(*(a.astype(np.float32) for a in arrays), n_heads)


@multi_head.property(
    "all at once: a mask for each head, causal, leading axes, float32",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    *arrays, n_heads = inputs(rng, 3, 5, 4, 2, 2, d_v=3, leading=(2, 1))
    mask = rng.random((2, 1, 2, 3, 5)) < 0.6
    mask[0, 0, 1, 2] = False
    ask(*arrays, n_heads, mask=mask, causal=True)
    ask(*(a.astype(np.float32) for a in arrays), n_heads, mask=mask, causal=True)
    x_q, *others = arrays
    ask(np.array([[100.0], [1.0], [0.01]]) * x_q, *others, n_heads, mask=mask, causal=True)


def joined(found):
    return np.moveaxis(found, -3, -2).reshape(*found.shape[:-3], found.shape[-2], -1)


def usual_attention(
    x_q,
    x_kv,
    w_q,
    w_k,
    w_v,
    w_o,
    n_heads,
    mask=None,
    causal=False,
    *,
    sources=(0, 1, 1),
    project=np.matmul,
    split=split_heads.oracle,
    width=lambda q, w_q: q.shape[-1],
    join=joined,
    last=True,
    use_mask=True,
    use_causal=True,
    always=False,
    turned=same,
    heads=same,
):
    """Multi-head attention in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    n_heads = heads(n_heads)
    x = (x_q, x_kv)
    q, k, v = (split(project(x[s], w), n_heads) for s, w in zip(sources, (w_q, w_k, w_v)))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(width(q, w_q))
    n_queries, n_keys = scores.shape[-2:]
    allowed = np.ones((n_queries, n_keys), bool)
    if (causal or always) and use_causal:
        allowed = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
    if mask is not None and use_mask:
        allowed = allowed & turned(mask)
    scores = np.where(allowed, scores, -np.inf)
    powers = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    total = powers.sum(-1, keepdims=True)
    found = join(powers / np.where(total == 0, 1, total) @ v)
    return found @ w_o if last else found


for message, change in {
    "The last matrix is missing: what the heads found, side by side, is multiplied by w_o.": {"last": False},
    "The queries come from x_kv: x_q asks.": {"sources": (1, 1, 1)},
    "Keys and values come from x_q: x_kv answers.": {"sources": (0, 0, 0)},
    "x_q and x_kv have changed places.": {"sources": (1, 0, 0)},
    "Keys come from x_kv, as the values do.": {"sources": (0, 0, 1)},
    "The values come from x_q: both keys and values are x_kv's.": {"sources": (0, 1, 0)},
    "The scores are scaled by the width of all heads together: divide by sqrt(d_head), a head's own width.": {
        "width": lambda q, w_q: w_q.shape[1]
    },
    "A head is not a slice of the token: project first, then split.": {"project": lambda x, w: x},
    "There is only one head: split the projections before attending.": {"heads": lambda n_heads: 1},
    "merge_heads puts the heads side by side again; a plain reshape mixes the tokens.": {
        "join": lambda found: found.reshape(*found.shape[:-3], found.shape[-2], -1)
    },
    "A plain reshape does not split heads: use split_heads.": {
        "split": lambda x, n_heads: x.reshape(*x.shape[:-2], n_heads, x.shape[-2], -1)
    },
    "The mask is not handed on.": {"use_mask": False},
    "causal is not handed on.": {"use_causal": False},
    "The mask is turned round: True = may attend.": {"turned": np.logical_not},
    "The future is forbidden though nobody asked for it: causal is False by default.": {"always": True},
}.items():
    multi_head.mistake(message)(partial(usual_attention, **change))


@multi_head.mistake("causal is forgotten when there is a mask for each head: both must allow a key.")
def _(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return usual_attention(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask, causal and (mask is None or mask.ndim < 3))


@multi_head.mistake("The forbidden score still decided the maximum that was subtracted: mask before that.")
def _(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    q, k, v = (split_heads.oracle(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    s = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    allowed = np.tri(*s.shape[-2:], s.shape[-1] - s.shape[-2], dtype=bool) | (not causal)
    powers = np.exp(s - s.max(-1, keepdims=True)) * (allowed if mask is None else allowed & mask)
    total = powers.sum(-1, keepdims=True)
    return joined(powers / np.where(total == 0, 1, total) @ v) @ w_o
