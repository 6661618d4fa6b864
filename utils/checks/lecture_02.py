"""The exercises of lecture 02: weights taken from torch, heads split, all heads at once, patterns in maps, what each
head writes, a listing mended. Its kernel is in kernels_02.py.

The oracles go head by head and row by row, unlike the lecture. Inputs are rounded to one decimal, so that what a report
shows is what the function was given.
"""

import math
from functools import partial

import numpy as np

from utils.checks import Failed, exercise
from utils.checks.kernels_02 import load_head
from utils.checks.lecture_01 import draw, weights_of

__all__ = ["load_head"]  # an exercise too
MODULE = "multi_head"


def attend(q, k, v, allowed, scale):
    """One head, one query at a time. q (n_queries, d_head), k, v (n_keys, ...), allowed (n_queries, n_keys)."""
    out = np.zeros((len(q), v.shape[-1]))
    for i, row in enumerate(allowed):
        weights = weights_of([scale * math.fsum(q[i] * key) for key in k], row)
        out[i] = sum((w * value for w, value in zip(weights, v)), np.zeros(v.shape[-1]))
    return out


def parameter(array):
    """An array as a trainable tensor, which NumPy's functions refuse."""
    import torch  # here, because the process that tries answers imports this file too

    return torch.nn.Parameter(torch.from_numpy(array))


def numbers_of(x):
    return x.detach().numpy() if hasattr(x, "detach") else x


# --- 2.1 -------------------------------------------------------------------------------------------------------------


@exercise("2.1", MODULE, returns=("w_q", "w_k", "w_v", "w_o"))
def weights_from_torch(in_proj_weight, out_proj_weight):
    in_proj_weight, out_proj_weight = numbers_of(in_proj_weight), numbers_of(out_proj_weight)
    d = len(out_proj_weight)
    parts = [in_proj_weight[part * d : (part + 1) * d] for part in range(3)] + [out_proj_weight]
    return tuple(np.array([[w[j, i] for j in range(d)] for i in range(d)]) for w in parts)


@weights_from_torch.property("queries' matrix on top, then keys', then values'")
def _(ask, rng):
    ask(np.concatenate([np.eye(2), 2 * np.eye(2), 3 * np.eye(2)]), np.eye(2))


@weights_from_torch.property("w_q, w_k, w_v are transposed, to be used as x @ w")
def _(ask, rng):
    ask(draw(rng, 6, 2), draw(rng, 2, 2))


@weights_from_torch.property("w_o is transposed too")
def _(ask, rng):
    ask(np.concatenate([np.eye(2)] * 3), draw(rng, 2, 2))


@weights_from_torch.property("any d_model")
def _(ask, rng):
    ask(draw(rng, 3, 1), draw(rng, 1, 1))
    ask(draw(rng, 15, 5), draw(rng, 5, 5))


@weights_from_torch.property("tensors in, tensors out", hint="Use slices and .T: arrays and tensors have both.")
def _(ask, rng):
    ask(parameter(draw(rng, 21, 7)), parameter(draw(rng, 7, 7)))


def in_thirds(w):
    return [w[i * w.shape[1] : (i + 1) * w.shape[1]] for i in range(3)]


def transposed(w):
    return w.T


def usual_weights(
    in_proj_weight, out_proj_weight, *, cut=in_thirds, turned=transposed, last=transposed, order=(0, 1, 2)
):
    """The weights in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    parts = cut(in_proj_weight)
    return (*(turned(parts[i]) for i in order), last(out_proj_weight))


def same(w):
    return w


for message, change in {
    "None of them is transposed: torch computes x @ w.T, this course x @ w.": {"turned": same, "last": same},
    "w_q, w_k and w_v are not transposed: torch computes x @ w.T, this course x @ w.": {"turned": same},
    "w_o is not transposed: torch computes x @ w.T, this course x @ w.": {"last": same},
    "Cut along the first axis: the three matrices lie on top of each other.": {
        "cut": lambda w: np.split(w, 3, axis=1)
    },
    "Cut first, then transpose each part: the transpose of the whole has the parts side by side.": {
        "cut": lambda w: in_thirds(w.T)
    },
    "The rows are dealt out in turn: rows 0 to d_model - 1 are all w_q's.": {
        "cut": lambda w: [w[i::3] for i in range(3)]
    },
    "Keys and queries have changed places.": {"order": (1, 0, 2)},
    "Keys and values have changed places.": {"order": (0, 2, 1)},
    "Use slices and .T: arrays and tensors have both.": {"turned": np.transpose, "last": np.transpose},
}.items():
    weights_from_torch.mistake(message)(partial(usual_weights, **change))


# --- 2.2 -------------------------------------------------------------------------------------------------------------


@exercise("2.2", MODULE)
def split_heads(x, n_heads):
    x = numbers_of(x)
    d_head = x.shape[-1] // n_heads
    return np.stack([x[..., i * d_head : (i + 1) * d_head] for i in range(n_heads)], axis=-3)


def numbered(seq, width):
    """Token t, column c is 10 t + c, so that a report shows where each number came from."""
    return 10.0 * np.arange(seq)[:, None] + np.arange(width)


@split_heads.property("head i has the columns i * d_head to (i + 1) * d_head")
def _(ask, rng):
    ask(numbered(3, 4), 2)


@split_heads.property("heads in front of the sequence, also for odd sizes")
def _(ask, rng):
    ask(numbered(2, 6), 3)
    ask(draw(rng, 7, 15), 5)


@split_heads.property("as many heads as tokens, or as columns, or one")
def _(ask, rng):
    ask(numbered(2, 4), 2)
    ask(numbered(2, 3), 3)
    ask(numbered(3, 3), 1)


@split_heads.property("leading axes stay in front")
def _(ask, rng):
    ask(draw(rng, 2, 3, 4), 2)
    ask(draw(rng, 2, 1, 3, 6), 3)


@split_heads.property(
    "a tensor in, a tensor out", hint="Use the methods x.reshape and x.swapaxes: arrays and tensors have both."
)
def _(ask, rng):
    ask(parameter(draw(rng, 7, 6)), 3)


def cut_last(x, n_heads):
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)


for message, answer in {
    "A reshape never moves a number: cut the last axis in two first, then swap the axes.": lambda x, n_heads: x.reshape(
        *x.shape[:-2], n_heads, x.shape[-2], x.shape[-1] // n_heads
    ),
    "The heads are there, but behind the sequence: swap the two axes.": cut_last,
    "The columns are dealt out in turn: head 0 has the first d_head of them.": lambda x, n_heads: np.moveaxis(
        x.reshape(*x.shape[:-1], x.shape[-1] // n_heads, n_heads), -1, -3
    ),
    "Count the axes from the end (-3 and -2): in front there may be a batch.": lambda x, n_heads: cut_last(
        x, n_heads
    ).swapaxes(0, 1),
    "The last two axes are swapped: it is heads and sequence that change places.": lambda x, n_heads: np.moveaxis(
        cut_last(x, n_heads), -3, -1
    ),
}.items():
    split_heads.mistake(message)(answer)

for answer in (
    lambda x, n_heads: np.moveaxis(cut_last(x, n_heads), -2, -3),
    lambda x, n_heads: np.stack(np.split(x, n_heads, axis=-1), axis=-3),
):
    split_heads.mistake("Use the methods x.reshape and x.swapaxes: arrays and tensors have both.")(answer)


# --- 2.3 -------------------------------------------------------------------------------------------------------------


@exercise("2.3", MODULE)
def multi_head_attention_numpy(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
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


@multi_head_attention_numpy.property("self-attention in two heads")
def _(ask, rng):
    ask(*inputs(rng, 2, None, 2, 2, 1))
    ask(*inputs(rng, 5, None, 6, 2, 3))


@multi_head_attention_numpy.property("cross-attention: x_q asks, x_kv answers")
def _(ask, rng):
    ask(*inputs(rng, 2, 2, 2, 2, 1))
    ask(*inputs(rng, 3, 5, 6, 3, 2))


@multi_head_attention_numpy.property("one head is attention_numpy between projections")
def _(ask, rng):
    ask(*inputs(rng, 3, 4, 2, 1, 2))


@multi_head_attention_numpy.property("d_head need not be d_model / n_heads, nor d_v be d_head")
def _(ask, rng):
    ask(*inputs(rng, 3, 4, 4, 2, 3))
    ask(*inputs(rng, 3, 4, 4, 2, 3, d_v=1))


@multi_head_attention_numpy.property("mask and causal, and zeros where nothing is allowed")
def _(ask, rng):
    ask(*inputs(rng, 3, None, 2, 2, 1), causal=True)
    ask(*inputs(rng, 2, 3, 2, 2, 1), mask=np.array([[True, False, True], [False, False, False]]))
    ask(*inputs(rng, 2, 4, 4, 2, 2), mask=np.array([[True, False, True, True]]), causal=True)


@multi_head_attention_numpy.property("leading axes, and a mask for each head")
def _(ask, rng):
    ask(*inputs(rng, 3, 4, 4, 2, 2, leading=(2,)), mask=rng.random((2, 2, 3, 4)) < 0.6)


@multi_head_attention_numpy.property("float32 in, the same to 1e-5")
def _(ask, rng):
    *arrays, n_heads = inputs(rng, 3, 4, 4, 2, 2)
    ask(*(a.astype(np.float32) for a in arrays), n_heads)


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
    heads=same,
):
    """Multi-head attention in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    n_heads = heads(n_heads)
    x = (x_q, x_kv)
    q, k, v = (split(project(x[s], w), n_heads) for s, w in zip(sources, (w_q, w_k, w_v)))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(width(q, w_q))
    n_queries, n_keys = scores.shape[-2:]
    allowed = np.ones((n_queries, n_keys), bool)
    if causal and use_causal:
        allowed = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
    if mask is not None and use_mask:
        allowed = allowed & mask
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
}.items():
    multi_head_attention_numpy.mistake(message)(partial(usual_attention, **change))


# --- 2.4 -------------------------------------------------------------------------------------------------------------


@exercise("2.4", MODULE, returns=("previous", "induction"))
def pattern_scores(weights, period):
    n = weights.shape[-1]
    previous = sum(weights[..., i, i - 1] for i in range(1, n)) / (n - 1)
    induction = sum(weights[..., i, i - period + 1] for i in range(period, n)) / (n - period)
    return previous, induction


def rows_of_weights(rng, *shape):
    drawn = rng.random(shape)
    return (drawn / drawn.sum(-1, keepdims=True)).round(2)


@pattern_scores.property("previous: the mean weight on the key before the query")
def _(ask, rng):
    ask(rows_of_weights(rng, 5, 5), 3)


@pattern_scores.property("induction: the mean weight on the key period - 1 before the query")
def _(ask, rng):
    ask(rows_of_weights(rng, 6, 6), 3)


@pattern_scores.property("induction begins with query number period")
def _(ask, rng):
    weights = np.zeros((5, 5))
    weights[2, 0] = 1.0
    ask(weights, 3)


@pattern_scores.property("any period, also one with a last round that is cut off")
def _(ask, rng):
    ask(rows_of_weights(rng, 7, 7), 2)
    ask(rows_of_weights(rng, 7, 7), 5)


@pattern_scores.property("leading axes: one score for each map")
def _(ask, rng):
    ask(rows_of_weights(rng, 4, 5, 5), 3)
    ask(rows_of_weights(rng, 5, 2, 6, 6), 3)


def below(weights, distance, first):
    """The weights [i, i - distance] of the queries from `first` on."""
    return np.diagonal(weights, -distance, -2, -1)[..., max(first - distance, 0) :]


def means(previous, induction):
    return lambda weights, period: (previous(weights).mean(-1), induction(weights, period).mean(-1))


def one_before(weights):
    return below(weights, 1, 1)


def behind_the_last(weights, period):
    return below(weights, period - 1, period)


for message, answer in {
    "Induction looks at the key after the last occurrence, not at the occurrence itself: i - period + 1.": means(
        one_before, lambda w, period: below(w, period, period)
    ),
    "Induction looks one too far back: the key after the last occurrence is i - period + 1.": means(
        one_before, lambda w, period: below(w, period + 1, period + 1)
    ),
    "The first entry of that diagonal is query period - 1, whose token stands there for the first time.": means(
        one_before, lambda w, period: below(w, period - 1, period - 1)
    ),
    "Rows are queries: the key before query i is weights[i, i - 1], below the main diagonal.": means(
        lambda w: np.diagonal(w, 1, -2, -1), behind_the_last
    ),
    "Rows are queries: both diagonals lie below the main one, where offsets are negative.": means(
        lambda w: np.diagonal(w, 1, -2, -1), lambda w, period: np.diagonal(w, period - 1, -2, -1)[..., 1:]
    ),
    "Take the mean over the queries, not the sum.": lambda w, period: (
        one_before(w).sum(-1),
        behind_the_last(w, period).sum(-1),
    ),
    "The mean runs over all axes: each map has scores of its own.": lambda w, period: (
        np.asarray(one_before(w).mean()),
        np.asarray(behind_the_last(w, period).mean()),
    ),
    "The mean is over the queries that have such a key, not over all n.": lambda w, period: (
        one_before(w).sum(-1) / w.shape[-1],
        behind_the_last(w, period).sum(-1) / w.shape[-1],
    ),
    "The two have changed places: (previous, induction).": lambda w, period: pattern_scores.oracle(w, period)[::-1],
    "np.diagonal takes the first two axes unless told: axis1=-2, axis2=-1.": lambda w, period: (
        np.diagonal(w, -1).mean(-1),
        np.diagonal(w, 1 - period)[..., 1:].mean(-1),
    ),
}.items():
    pattern_scores.mistake(message)(answer)


# --- 2.5 -------------------------------------------------------------------------------------------------------------


@exercise("2.5", MODULE)
def head_contributions(heads, w_o):
    n_heads, d_v = heads.shape[-3], heads.shape[-1]
    parts = [np.einsum("...td,dm->...tm", heads[..., i, :, :], w_o[i * d_v : (i + 1) * d_v]) for i in range(n_heads)]
    return np.stack(parts, axis=-3)


@head_contributions.property("each head by its own block of rows")
def _(ask, rng):
    ask(np.ones((2, 1, 1)), np.array([[1.0, 2.0], [3.0, 4.0]]))
    ask(draw(rng, 2, 3, 2), draw(rng, 4, 2))


@head_contributions.property("the heads are not added up yet")
def _(ask, rng):
    ask(draw(rng, 3, 2, 2), draw(rng, 6, 4))


@head_contributions.property("d_model need not be n_heads * d_v")
def _(ask, rng):
    ask(draw(rng, 2, 3, 2), draw(rng, 4, 5))
    ask(draw(rng, 3, 4, 1), draw(rng, 3, 2))


@head_contributions.property("leading axes")
def _(ask, rng):
    ask(draw(rng, 2, 2, 3, 2), draw(rng, 4, 3))


@head_contributions.property("float32 in, the same to 1e-5")
def _(ask, rng):
    ask(draw(rng, 2, 3, 2).astype(np.float32), draw(rng, 4, 3).astype(np.float32))


def sizes(heads):
    return heads.shape[-3], heads.shape[-1]


for message, answer in {
    "The heads are added up: keep what each one adds.": lambda heads, w_o: joined(heads) @ w_o,
    "The rows are dealt out in turn: head 0 owns the first d_v rows of w_o.": lambda heads, w_o: (
        heads @ w_o.reshape(*sizes(heads)[::-1], -1).swapaxes(0, 1)
    ),
    "w_o is transposed: its rows belong to the heads, its columns to the output.": lambda heads, w_o: (
        heads @ w_o.T.reshape(*sizes(heads), -1)
    ),
    "The blocks are in the wrong order: head 0 owns the first d_v rows.": lambda heads, w_o: (
        heads @ w_o.reshape(*sizes(heads), -1)[::-1]
    ),
    "A sum over the heads, not a mean: nothing is divided by n_heads.": lambda heads, w_o: (
        heads @ w_o.reshape(*sizes(heads), -1) / heads.shape[-3]
    ),
    "Every head uses the first block: each has rows of its own.": lambda heads, w_o: heads @ w_o[: heads.shape[-1]],
}.items():
    head_contributions.mistake(message)(answer)


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
