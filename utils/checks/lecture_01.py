"""The exercises of lecture 01: softmax, additive scores, masks, attention weights and their gradient, a local window.
Its kernels are in kernels_01.py.

The oracles go one row at a time in float64, with Python's own arithmetic where that is short: slow, and unlike the
lecture. Inputs are rounded to one decimal, so that what a report shows is what the function was given.
"""

import math
from functools import partial

import numpy as np

from utils.checks import Failed, exercise
from utils.checks.kernels_01 import barrier_places, load_tile, softmax_rows

__all__ = ["barrier_places", "load_tile", "softmax_rows"]  # exercises too
MODULE = "fundamentals"
INF = np.inf


def draw(rng, *shape):
    return rng.normal(size=shape).round(1)


def weights_of(scores, allowed):
    """The softmax of one row of numbers over the allowed entries; zeros where there are none."""
    top = max((s for s, a in zip(scores, allowed) if a and s > -INF), default=None)
    if top is None:
        return [0.0] * len(scores)
    powers = [math.exp(s - top) if a else 0.0 for s, a in zip(scores, allowed)]
    return [p / math.fsum(powers) for p in powers]


# --- 1.1 -------------------------------------------------------------------------------------------------------------


@exercise("1.1", MODULE)
def softmax(x, axis=-1):
    def row(scores):
        return weights_of([float(s) for s in scores], [True] * len(scores))

    return np.apply_along_axis(row, axis, x)


@softmax.property("each row becomes weights that sum to 1")
def _(ask, rng):
    ask(draw(rng, 2, 3))
    ask(draw(rng, 5, 17))


@softmax.property("axis chooses what sums to 1")
def _(ask, rng):
    ask(draw(rng, 2, 3), axis=0)
    ask(draw(rng, 2, 3, 4), axis=1)
    ask(draw(rng, 4))


@softmax.property("scores of 1e4 and -1e4 do not overflow", hint="Subtract the largest score before exp.")
def _(ask, rng):
    ask(np.array([[1e4, 1e4 - 1, 0.0], [-1e4, -1e4 + 1, -1e4]]))
    ask(1e4 * draw(rng, 3, 9))


@softmax.property("a score of -inf gets the weight 0")
def _(ask, rng):
    ask(np.array([[0.5, -INF, 1.0], [-INF, -INF, 2.0]]))


@softmax.property("a row of only -inf gives zeros, not nan")
def _(ask, rng):
    ask(np.array([[0.5, 1.0], [-INF, -INF]]))
    ask(np.array([[0.5, -INF], [1.0, -INF]]), axis=0)


@softmax.property(
    "the float type of x is kept", hint="A float64 array or NumPy scalar in the arithmetic turns all into float64."
)
def _(ask, rng):
    for dtype in (np.float32, np.float16):
        result = ask(draw(rng, 2, 3).astype(dtype))
        if result.dtype != dtype:
            raise Failed(f"returned {result.dtype}, expected {dtype.__name__} for scores of {dtype.__name__}")
    ask(np.array([[0.5, 1.0], [-INF, -INF]], dtype=np.float16))


def highest(x, axis):
    return x.max(axis=axis, keepdims=True)


def summed(powers, axis):
    return powers.sum(axis=axis, keepdims=True)


def or_one(total):
    return np.where(total == 0, 1, total)


def usual_softmax(x, axis=-1, *, top=highest, total=summed, divisor=or_one, guarded=True):
    """The softmax in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    shift = top(x, axis)
    powers = np.exp(x - (np.where(np.isneginf(shift), 0, shift) if guarded else shift))
    return powers / divisor(total(powers, axis))


def keeps_no_axis(reduce):
    return lambda x, axis: reduce(x, axis).squeeze(axis)


for message, changes in {
    "exp overflows: subtract the largest score of each row first.": [{"top": lambda x, axis: np.zeros_like(x)}],
    "The sum runs over the whole array: sum along the axis, with keepdims=True.": [
        {"total": lambda powers, axis: powers.sum()}
    ],
    "The largest score of the whole array is subtracted: take the maximum along the axis, with keepdims=True.": [
        {"top": lambda x, axis: x.max()}
    ],
    "The axis is ignored: it is always the last one.": [
        {"top": lambda x, axis: highest(x, -1), "total": lambda powers, axis: summed(powers, -1)}
    ],
    "keepdims=True keeps the axis that was summed, or whose maximum was taken.": [
        {"total": keeps_no_axis(summed)},
        {"top": keeps_no_axis(highest)},
    ],
    "Nothing may be added to the denominator; replace a zero sum by 1.": [
        {"divisor": lambda total, small=small: total + small} for small in (1e-6, 1e-7, 1e-8, 1e-9)
    ],
    "In float16 so small a number is 0, and 0/0 is nan: replace a zero sum by 1.": [
        {"divisor": lambda total: np.maximum(total, 1e-30)}
    ],
}.items():
    for change in changes:
        softmax.mistake(message)(partial(usual_softmax, **change))
        if "divisor" not in change:  # the same mistake without the guard, which may be still to come
            softmax.mistake(message)(partial(usual_softmax, **change, divisor=lambda total: total, guarded=False))

for change in {"guarded": False}, {"divisor": lambda total: total}:
    softmax.mistake("-inf minus -inf is nan, and so is 0/0: guard the row that has nothing to attend to.")(
        partial(usual_softmax, **change)
    )


@softmax.mistake("A row of only -inf became a uniform average: it has nothing to attend to, so its weights are 0.")
def _(x, axis=-1):
    return usual_softmax(np.where(np.isneginf(summed(x, axis)) & np.isneginf(highest(x, axis)), 0, x), axis)


# --- 1.2 -------------------------------------------------------------------------------------------------------------


@exercise("1.2", MODULE)
def additive_scores(q, k, w_q, w_k, v):
    scores = np.empty((len(q), len(k)))
    for i, j in np.ndindex(*scores.shape):
        hidden = [math.tanh(q[i] @ w_q[:, a] + k[j] @ w_k[:, a]) for a in range(len(v))]
        scores[i, j] = math.fsum(float(v[a]) * h for a, h in enumerate(hidden))
    return scores


def additive_input(rng, n_queries, n_keys, d_q, d_k, d_a):
    return [draw(rng, *shape) for shape in ((n_queries, d_q), (n_keys, d_k), (d_q, d_a), (d_k, d_a), (d_a,))]


@additive_scores.property("v . tanh(q_i W_q + k_j W_k) for query i and key j")
def _(ask, rng):
    ask(*additive_input(rng, 2, 2, 2, 2, 2))
    ask(*additive_input(rng, 5, 7, 4, 4, 6))


@additive_scores.property("one row for each query, one column for each key")
def _(ask, rng):
    ask(*additive_input(rng, 2, 3, 2, 2, 2))
    ask(*additive_input(rng, 1, 3, 2, 2, 1))
    ask(*additive_input(rng, 3, 1, 2, 2, 4))


@additive_scores.property("queries and keys may differ in width")
def _(ask, rng):
    ask(*additive_input(rng, 2, 3, 2, 4, 3))


@additive_scores.property("large inputs saturate, without nan")
def _(ask, rng):
    q, k, w_q, w_k, v = additive_input(rng, 2, 3, 2, 2, 2)
    ask(1e4 * q, -1e4 * k, w_q, w_k, v)


@additive_scores.property("float32 in, the same scores to 1e-5")
def _(ask, rng):
    ask(*(a.astype(np.float32) for a in additive_input(rng, 3, 4, 2, 2, 5)))


@additive_scores.mistake("tanh is taken of query and key separately: add them first.")
def _(q, k, w_q, w_k, v):
    return (np.tanh(q @ w_q)[:, None] + np.tanh(k @ w_k)[None]) @ v


@additive_scores.mistake("The result is transposed: one row for each query, one column for each key.")
def _(q, k, w_q, w_k, v):
    return additive_scores.oracle(q, k, w_q, w_k, v).T


@additive_scores.mistake("tanh is missing: without it the query only adds one number to its whole row.")
def _(q, k, w_q, w_k, v):
    return ((q @ w_q)[:, None] + (k @ w_k)[None]) @ v


@additive_scores.mistake("The sum runs over the keys: it has to run over the last axis, d_a.")
def _(q, k, w_q, w_k, v):
    return (np.tanh((q @ w_q)[:, None] + (k @ w_k)[None]) * v).sum(axis=1)


@additive_scores.mistake("Every query meets every key: make a new axis for each.")
def _(q, k, w_q, w_k, v):
    return np.tanh(q @ w_q + k @ w_k) @ v


@additive_scores.mistake("This is the dot product of the projections: add them, and weigh the tanh of the sum with v.")
def _(q, k, w_q, w_k, v):
    return (q @ w_q) @ (k @ w_k).T


@additive_scores.mistake("These are weights: the softmax comes later.")
def _(q, k, w_q, w_k, v):
    return softmax.oracle(additive_scores.oracle(q, k, w_q, w_k, v))


@additive_scores.mistake("v is missing: it weighs the hidden units before they are summed.")
def _(q, k, w_q, w_k, v):
    return np.tanh((q @ w_q)[:, None] + (k @ w_k)[None]).sum(axis=-1)


# --- 1.3 -------------------------------------------------------------------------------------------------------------


@exercise("1.3", MODULE)
def causal_mask(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    mask = np.zeros((n_queries, n_keys), dtype=bool)
    for i, j in np.ndindex(*mask.shape):
        mask[i, j] = n_keys - 1 - j >= n_queries - 1 - i
    return mask


@causal_mask.property("square: each query sees itself and what came before")
def _(ask, rng):
    ask(3, 3)
    ask(6, 6)


@causal_mask.property("n_keys may be left out: as many as queries")
def _(ask, rng):
    ask(3)
    ask(1)


@causal_mask.property("fewer queries than keys: the last query sees every key")
def _(ask, rng):
    ask(2, 4)
    ask(1, 5)


@causal_mask.property("more queries than keys: the first queries see nothing")
def _(ask, rng):
    ask(4, 2)


@causal_mask.property("no keys: one empty row for each query")
def _(ask, rng):
    ask(3, 0)


def compare_positions(n_queries, n_keys, shift):
    """The boolean matrix of j <= i + shift."""
    return np.arange(n_keys) <= np.arange(n_queries)[:, None] + shift


def or_as_many(n_keys, n_queries):
    return n_queries if n_keys is None else n_keys


@causal_mask.mistake("The mask starts at the top left: align it so that the last query sees every key.")
def _(n_queries, n_keys=None):
    return compare_positions(n_queries, or_as_many(n_keys, n_queries), 0)


@causal_mask.mistake("A query does not see its own position: the diagonal belongs to it.")
def _(n_queries, n_keys=None):
    n_keys = or_as_many(n_keys, n_queries)
    return compare_positions(n_queries, n_keys, n_keys - n_queries - 1)


@causal_mask.mistake("`n_keys or n_queries` takes 0 keys for none given: ask `n_keys is None`.")
def _(n_queries, n_keys=None):
    return causal_mask.oracle(n_queries, n_keys or n_queries)


@causal_mask.mistake("The mask is the wrong way round: True means may attend.")
def _(n_queries, n_keys=None):
    return ~causal_mask.oracle(n_queries, n_keys)


@causal_mask.mistake("The mask is transposed: rows are queries, and the future is above the diagonal.")
def _(n_queries, n_keys=None):
    return causal_mask.oracle(or_as_many(n_keys, n_queries), n_queries).T


@causal_mask.mistake("These are numbers: a mask is boolean. `astype(bool)`, or compare positions.")
def _(n_queries, n_keys=None):
    return causal_mask.oracle(n_queries, n_keys).astype(float)


@causal_mask.mistake(
    "This is what is added to the scores, 0 and -inf: the mask itself is boolean, True where a query may attend."
)
def _(n_queries, n_keys=None):
    return np.where(causal_mask.oracle(n_queries, n_keys), 0.0, -INF)


# --- 1.4 -------------------------------------------------------------------------------------------------------------


@exercise("1.4", MODULE)
def padding_mask(lengths, n_keys):
    mask = np.zeros((len(lengths), 1, 1, n_keys), dtype=bool)
    for row, length in zip(mask, lengths):
        row[..., : int(length)] = True
    return mask


@padding_mask.property("True for the first lengths[b] keys of sentence b")
def _(ask, rng):
    ask(np.array([1, 3]), 4)
    ask(np.array([2, 5, 1, 4]), 6)


@padding_mask.property("a full sentence has no padding")
def _(ask, rng):
    ask(np.array([3, 3]), 3)


@padding_mask.property("an empty sentence is all padding")
def _(ask, rng):
    ask(np.array([0, 2]), 3)


@padding_mask.property("lengths of any integer type")
def _(ask, rng):
    ask(np.array([1, 2], dtype=np.uint8), 3)


def positions_before(lengths, n_keys):
    return np.arange(n_keys) < lengths[:, None, None, None]


@padding_mask.mistake("One key too many: positions count from 0, so the last one kept is length - 1. Use <, not <=.")
def _(lengths, n_keys):
    return positions_before(lengths + 1, n_keys)


@padding_mask.mistake("The mask is the wrong way round: True means may attend, padding is False.")
def _(lengths, n_keys):
    return ~positions_before(lengths, n_keys)


@padding_mask.mistake("The shape is (batch, n_keys): put two axes of length 1 between them, for heads and queries.")
def _(lengths, n_keys):
    return positions_before(lengths, n_keys)[:, 0, 0]


@padding_mask.mistake("The lengths are counted from the right: padding stands at the end of a sentence.")
def _(lengths, n_keys):
    return positions_before(lengths, n_keys)[..., ::-1]


@padding_mask.mistake("These are numbers: a mask is boolean. Keep the comparison as it is.")
def _(lengths, n_keys):
    return positions_before(lengths, n_keys).astype(float)


# --- 1.5 -------------------------------------------------------------------------------------------------------------


@exercise("1.5", MODULE)
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


@attention_weights.property("softmax of q k^T / sqrt(d_head) over the keys")
def _(ask, rng):
    ask(draw(rng, 2, 4), draw(rng, 2, 4))
    ask(draw(rng, 2, 3), draw(rng, 5, 3))


@attention_weights.property(
    "a given scale replaces 1/sqrt(d_head)", hint="A scale of 0 is a scale too: ask whether it is None."
)
def _(ask, rng):
    ask(draw(rng, 2, 3), draw(rng, 3, 3), scale=2.0)
    ask(draw(rng, 2, 3), draw(rng, 3, 3), scale=0.0)


@attention_weights.property("a key that the mask forbids gets the weight 0")
def _(ask, rng):
    ask(draw(rng, 2, 2), draw(rng, 3, 2), mask=np.array([[True, True, False], [False, True, True]]))


@attention_weights.property("causal: nothing of the future, bottom-right aligned")
def _(ask, rng):
    ask(draw(rng, 3, 2), draw(rng, 3, 2), causal=True)
    ask(draw(rng, 2, 2), draw(rng, 4, 2), causal=True)


@attention_weights.property("mask and causal together: both must allow it")
def _(ask, rng):
    mask = np.array([[True, False, True], [True, True, False], [False, True, True]])
    ask(draw(rng, 3, 2), draw(rng, 3, 2), mask=mask, causal=True)


@attention_weights.property("nothing to attend to gives zeros, not nan")
def _(ask, rng):
    ask(draw(rng, 2, 2), draw(rng, 2, 2), mask=np.array([[True, True], [False, False]]))
    ask(draw(rng, 3, 2), draw(rng, 1, 2), causal=True)


@attention_weights.property("scores of 1e4 and -1e4 do not overflow")
def _(ask, rng):
    ask(np.array([[1e4, 0.0], [-1e4, 1.0]]), np.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.2]]))
    mask = np.array([[False, True, True], [True, False, True]])
    ask(np.array([[1e4, 0.0], [-1e4, 1.0]]), np.array([[1.0, 0.5], [-1.0, -0.5], [-1.0, 0.2]]), mask=mask)


@attention_weights.property("leading axes, and masks that broadcast")
def _(ask, rng):
    q, k = draw(rng, 2, 3, 4, 5), draw(rng, 2, 3, 6, 5)
    ask(q, k)
    ask(q, k, mask=padding_mask.oracle([2, 6], 6), causal=True)


@attention_weights.property("float32 in, the same weights to 1e-5")
def _(ask, rng):
    ask(draw(rng, 3, 4).astype(np.float32), draw(rng, 5, 4).astype(np.float32), causal=True)


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


@attention_weights.mistake("-inf minus -inf is nan: guard the query that has nothing to attend to.")
def _(q, k, mask=None, causal=False, scale=None):
    return np.where(
        permitted(q, k, mask, causal).any(axis=-1, keepdims=True), usual_weights(q, k, mask, causal, scale), np.nan
    )


# --- 1.6 -------------------------------------------------------------------------------------------------------------


@exercise("1.6", MODULE, returns=("d_q", "d_k", "d_v"))
def attention_backward(q, k, v, d_out, mask=None, causal=False, scale=None):
    allowed = permitted(q, k, mask, causal)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    inputs = [np.asarray(a, dtype=complex) for a in (q, k, v)]

    def loss():
        q, k, v = inputs
        scores = scale * np.einsum("...id,...jd->...ij", q, k)
        top = np.max(np.where(allowed, scores.real, -INF), axis=-1, keepdims=True, initial=-1e300)
        powers = np.where(allowed, np.exp(np.where(allowed, scores - top, 0)), 0)
        total = powers.sum(axis=-1, keepdims=True)
        return (
            np.einsum("...ij,...jd->...id", powers / np.where(allowed.any(-1, keepdims=True), total, 1), v) * d_out
        ).sum()

    # A step of 1e-30 along the imaginary axis: the imaginary part of the loss is the slope, with nothing cancelled.
    gradients = tuple(np.empty(a.shape) for a in inputs)
    for entries, gradient in zip(inputs, gradients):
        for place in np.ndindex(*gradient.shape):
            entries[place] += 1e-30j
            gradient[place] = loss().imag / 1e-30
            entries[place] = entries[place].real
    return gradients


def backward_input(rng, n_queries, n_keys, d_head, d_v, leading=()):
    shapes = (n_queries, d_head), (n_keys, d_head), (n_keys, d_v), (n_queries, d_v)
    return [draw(rng, *leading, *shape) for shape in shapes]


@attention_backward.property("slope of sum(out * d_out) for every entry of q, k, v")
def _(ask, rng):
    ask(*backward_input(rng, 2, 2, 2, 2))
    ask(*backward_input(rng, 3, 4, 2, 5))


@attention_backward.property(
    "a given scale replaces 1/sqrt(d_head)", hint="A scale of 0 is a scale too: ask whether it is None."
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 2, 2), scale=1.5)
    ask(*backward_input(rng, 2, 3, 2, 2), scale=0.0)


@attention_backward.property("nothing flows through what mask or causal forbids")
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 2, 2), mask=np.array([[True, True, False], [False, True, True]]))
    ask(*backward_input(rng, 2, 4, 2, 2), causal=True)


@attention_backward.property("nothing to attend to: gradient 0, not nan")
def _(ask, rng):
    ask(*backward_input(rng, 2, 2, 2, 2), mask=np.array([[True, True], [False, False]]))
    ask(*backward_input(rng, 3, 2, 2, 2), causal=True)


@attention_backward.property("scores of 1e4 give no nan")
def _(ask, rng):
    _, _, v, d_out = backward_input(rng, 2, 2, 2, 2)
    ask(np.array([[1e4, 0.0], [-1e4, 0.0]]), np.array([[1.0, 0.2], [0.5, 1.0]]), v, d_out)


@attention_backward.property("leading axes")
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 2, 2, leading=(2, 2)), causal=True)


@attention_backward.property("float32 in, the same gradients to 1e-5")
def _(ask, rng):
    ask(*(a.astype(np.float32) for a in backward_input(rng, 3, 3, 2, 2)))


def softmax_backward(p, d_p):
    return p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))


def usual_gradients(
    q,
    k,
    v,
    d_out,
    mask=None,
    causal=False,
    scale=None,
    *,
    jacobian=softmax_backward,
    scaled=(True, True),
    sign=1,
    turned_v=swapped,
    turned_d_s=swapped,
    turned_p=swapped,
):
    """The gradients in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    p = usual_weights(q, k, mask, causal, scale)
    d_s = sign * jacobian(p, d_out @ turned_v(v))
    scale = root(q.shape[-1]) if scale is None else scale
    for_q, for_k = (scale if factor else 1 for factor in scaled)
    return for_q * d_s @ k, for_k * turned_d_s(d_s) @ q, turned_p(p) @ d_out


for message, change in {
    "d_q and d_k miss a part of the softmax's derivative: it is p * (d_p - sum(p * d_p)), not p * d_p.": {
        "jacobian": lambda p, d_p: p * d_p
    },
    "d_q and d_k take p * (1 - p) for the softmax's derivative: a weight depends on all scores of its row.": {
        "jacobian": lambda p, d_p: d_p * p * (1 - p)
    },
    "In d_q and d_k the sum of p * d_p runs over the queries: it has to run over the keys.": {
        "jacobian": lambda p, d_p: p * (d_p - (p * d_p).sum(axis=-2, keepdims=True))
    },
    "The sum runs over p * d_p, not over d_p.": {
        "jacobian": lambda p, d_p: p * (d_p - d_p.sum(axis=-1, keepdims=True))
    },
    "keepdims=True keeps the axis of the keys, over which p * d_p was summed.": {
        "jacobian": lambda p, d_p: p * (d_p - (p * d_p).sum(axis=-1))
    },
    "The scale is missing in d_q and d_k: the scores were scaled, so their gradients are too.": {
        "scaled": (False, False)
    },
    "The scale is missing in d_k: the scores were scaled, so their gradients are too.": {"scaled": (True, False)},
    "The scale is missing in d_q: the scores were scaled, so their gradients are too.": {"scaled": (False, True)},
    "The sign of d_q and d_k is wrong.": {"sign": -1},
    "d_k needs the transpose of the scores' gradient: a key collects from all queries.": {"turned_d_s": same},
    "d_v needs the transpose of the weights: a value collects from all queries.": {"turned_p": same},
    "Swap the last two axes only: np.swapaxes(v, -1, -2).": {"turned_v": np.transpose},
}.items():
    attention_backward.mistake(message)(partial(usual_gradients, **change))

for change in {"turned_p": np.transpose}, {"turned_d_s": np.transpose}:
    attention_backward.mistake("Swap the last two axes only: np.swapaxes(p, -1, -2), and d_s in the same way.")(
        partial(usual_gradients, **change)
    )


@attention_backward.mistake("d_q and d_k have changed places.")
def _(*args, **kwargs):
    d_q, d_k, d_v = usual_gradients(*args, **kwargs)
    return d_k, d_q, d_v


@attention_backward.mistake("0/0 or -inf minus -inf: guard the query that has nothing to attend to.")
def _(q, k, v, d_out, mask=None, causal=False, scale=None):
    some = permitted(q, k, mask, causal).any(axis=-1, keepdims=True)
    return usual_gradients(q, k, v, np.where(some, d_out, np.nan), mask, causal, scale)


# --- 1.10 ------------------------------------------------------------------------------------------------------------


@exercise("1.10", MODULE)
def local_weights(scores, centre, window):
    weights = np.empty(scores.shape)
    for row, s, p in zip(weights, scores, centre):
        inside = [abs(j - p) <= window for j in range(len(s))]
        gauss = [math.exp(-2 * ((j - p) / window) ** 2) for j in range(len(s))]
        row[:] = [w * g for w, g in zip(weights_of(list(map(float, s)), inside), gauss)]
    return weights


@local_weights.property("softmax in the window, times a Gaussian around p")
def _(ask, rng):
    ask(draw(rng, 2, 7), np.array([2.0, 4.0]), 2)
    ask(draw(rng, 3, 12), np.array([3.0, 6.0, 8.0]), 3)


@local_weights.property("the centre may lie between two keys")
def _(ask, rng):
    ask(draw(rng, 2, 7), np.array([2.3, 3.5]), 2)


@local_weights.property("both ends of the window belong to it")
def _(ask, rng):
    ask(np.zeros((1, 5)), np.array([2.0]), 1)


@local_weights.property("at the ends of the sentence the window is cut off")
def _(ask, rng):
    ask(draw(rng, 2, 5), np.array([0.0, 4.0]), 2)


@local_weights.property("a window without a key gives zeros, not nan")
def _(ask, rng):
    ask(draw(rng, 2, 4), np.array([1.0, 9.0]), 2)


@local_weights.property("scores of 1e4 in the window or outside do no harm")
def _(ask, rng):
    ask(np.array([[1e4, 0.5, 1.0, -1e4, 1e4], [-1e4, -1e4, -1e4, 0.0, 1e4]]), np.array([2.0, 1.0]), 1)


@local_weights.property("float32 in, the same weights to 1e-5")
def _(ask, rng):
    ask(draw(rng, 2, 6).astype(np.float32), np.array([2.0, 3.5], dtype=np.float32), 2)


def within(distance, window):
    return np.abs(distance) <= window


def everywhere(distance, window):
    return np.full(distance.shape, True)


def usual_local(
    scores, centre, window, *, inside=within, kept=everywhere, sigma=lambda window: window / 2, again=False
):
    """Local weights in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    distance = np.arange(scores.shape[-1]) - centre[:, None]
    masked = np.where(inside(distance, window), scores, -INF)
    powers = np.exp(masked - np.maximum(masked.max(axis=-1, keepdims=True), -1e300))
    total = powers.sum(axis=-1, keepdims=True)
    weights = powers / np.where(total == 0, 1, total) * np.exp(-(distance**2) / (2 * sigma(window) ** 2))
    total = weights.sum(axis=-1, keepdims=True) if again else 1
    return np.where(kept(distance, window), weights / np.where(total == 0, 1, total), 0)


for message, change in {
    "The weights are made to sum to 1 again after the Gaussian: leave them smaller.": {"again": True},
    "The Gaussian is too wide: its sigma is half the window, D/2.": {"sigma": lambda window: window},
    "The 2 in the Gaussian is missing: the exponent is -(s - p)^2 / (2 sigma^2).": {
        "sigma": lambda window: window / 2 / np.sqrt(2)
    },
    "The Gaussian is missing: keys far from the centre count less.": {"sigma": lambda window: INF},
    "The softmax runs over all keys, also those outside: mask the scores to the window first.": {
        "inside": everywhere,
        "kept": within,
    },
    "The window is missing: keys further than D from the centre get the weight 0.": {"inside": everywhere},
    "The window is one key too narrow: p - D and p + D both belong to it. Use <=, not <.": {
        "inside": lambda distance, window: np.abs(distance) < window
    },
}.items():
    local_weights.mistake(message)(partial(usual_local, **change))


@local_weights.mistake("The centre is rounded to a whole position: compare |s - p| with D as it is.")
def _(scores, centre, window):
    return usual_local(scores, np.round(centre), window)
