"""Lecture 02: a test of a layer of self-attention for a batch of padded sentences."""

from functools import partial

import numpy as np

from utils.exercises.lecture_02.heads import same
from utils.exercises.lecture_02.multi_head import joined, split_heads
from utils.exercises.lecture_02.multi_head import multi_head as layer_of_one
from utils.judge.bug import bug

MODULE = "multi_head"


def layer(
    x,
    w_q,
    w_k,
    w_v,
    w_o,
    n_heads,
    key_mask,
    *,
    split=split_heads.oracle,
    join=joined,
    width=lambda q, x: q.shape[-1],
    turned=same,
    placed=lambda mask: mask[:, None, None, :],
    shifted=True,
    guarded=True,
    late=False,
    last=True,
    scores_back=False,
):
    """A layer for padded sentences. The bugs are in what follows the `*`; as it stands, it is right."""
    q, k, v = (split(x @ w, n_heads) for w in (w_q, w_k, w_v))
    with np.errstate(all="ignore"):
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(width(q, x))
        allowed = np.broadcast_to(placed(turned(key_mask)), scores.shape)
        scores = np.where(allowed | late, scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        powers = np.exp(scores - np.where(np.isneginf(top), 0, top) if shifted else scores)
        total = powers.sum(-1, keepdims=True)
        weights = powers / (np.where(total == 0, 1, total) if guarded else total) * (allowed | (not late))
        out = join(weights @ v)
        return out @ w_o if last else out, scores if scores_back else weights


@bug("2C", MODULE, subject="layer", formerly="2.6", importance="useful")
def test_layer(layer):
    rng = np.random.default_rng(7)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], bool)
    w = rng.normal(size=(4, 6, 6))
    for size in (1.0, 40.0):
        x = size * rng.normal(size=(4, 4, 6))
        out, weights = layer(x, *w, 2, mask)
        assert weights.shape == (4, 2, 4, 4)
        for b in range(4):
            assert np.allclose(out[b], layer_of_one.oracle(x[b], x[b], *w, 2, mask[b]))
            assert np.allclose(weights[b].sum(-1), float(mask[b].any()))
            assert np.all(weights[b][..., ~mask[b]] == 0)


@test_layer.right
def _(x, w_q, w_k, w_v, w_o, n_heads, key_mask):
    return layer(x, w_q, w_k, w_v, w_o, n_heads, key_mask)


@test_layer.right
def _(x, w_q, w_k, w_v, w_o, n_heads, key_mask):
    """Head by head, and each sentence without its padding."""
    batch, n, d_model = x.shape
    d = d_model // n_heads
    out, weights = np.zeros((batch, n, w_o.shape[1])), np.zeros((batch, n_heads, n, n))
    for b in range(batch):
        there = np.flatnonzero(key_mask[b])
        for h in range(n_heads if len(there) else 0):
            own = slice(h * d, (h + 1) * d)
            scores = x[b] @ w_q[:, own] @ (x[b, there] @ w_k[:, own]).T / d**0.5
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            weights[b, h][:, there] = powers / powers.sum(-1, keepdims=True)
            out[b] += weights[b, h] @ x[b] @ w_v[:, own] @ w_o[own]
    return out, weights


def reshaped(x, n_heads):
    return x.reshape(*x.shape[:-2], n_heads, x.shape[-2], -1)


for name, changes, hint in (
    (
        "heads cut by a plain reshape",
        {"split": reshaped},
        "With how many heads do you call it? With what do you compare the output?",
    ),
    (
        "merged by a plain reshape",
        {"join": lambda found: found.reshape(found.shape[0], found.shape[2], -1)},
        "With what do you compare the output?",
    ),
    (
        "scaled by the width of all heads",
        {"width": lambda q, x: x.shape[-1]},
        "With how many heads do you call it, and are your weights more than 0 and 1?",
    ),
    ("the mask turned round", {"turned": np.logical_not}, "Is a key masked in your test, and another one not?"),
    (
        "the mask laid over the queries",
        {"placed": lambda mask: mask[:, None, :, None]},
        "Is any key masked in your test? Which weights do you look at: a column of a masked key, or a row?",
    ),
    (
        "every sentence gets the first one's mask",
        {"placed": lambda mask: mask[:1, None, None, :]},
        "How many sentences has your test, and are their masks different?",
    ),
    ("the mask comes after the softmax", {"late": True}, "What do the rows of the weights sum to?"),
    ("nan for a sentence without keys", {"guarded": False}, "Is there a sentence without any key in your test?"),
    ("a softmax that overflows", {"shifted": False}, "How large are the scores in your test?"),
    ("the last matrix is missing", {"last": False}, "With what do you compare the output?"),
    ("scores come back, not weights", {"scores_back": True}, "Do you look at the weights that come back?"),
):
    test_layer.mutant(name, hint)(partial(layer, **changes))
