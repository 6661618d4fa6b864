"""Lecture 01: the gradient of attention. The oracle moves one entry at a time."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import INF, draw, kept_dtype
from utils.exercises.lecture_01.weights import permitted, root, same, swapped, usual_weights
from utils.judge.function import exercise

MODULE = "fundamentals"


@exercise("1H", MODULE, returns=("d_q", "d_k", "d_v"), formerly="1.6", importance="extra")
def attention_backward(q, k, v, d_out, mask=None, causal=False, scale=None):
    allowed = permitted(q, k, mask, causal)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    v = np.where(np.isnan(v), 0, v)  # a nan is only asked where it is forbidden
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


@attention_backward.property(
    "slope of sum(out * d_out) for every entry of q, k, v",
    hint="Which of the five formulas gives the one that differs?",
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 2, 2, 2))
    ask(*backward_input(rng, 3, 4, 2, 5))


@attention_backward.property(
    "a given scale replaces 1/sqrt(d_head)", hint="When is the default used, and is a scale of 0 given?"
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 2, 2), scale=1.5)
    ask(*backward_input(rng, 2, 3, 2, 2), scale=0.0)


@attention_backward.property(
    "nothing flows through what mask or causal forbids", hint="Does your weights function get mask and causal?"
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 2, 2), mask=np.array([[True, True, False], [False, True, True]]))
    ask(*backward_input(rng, 2, 4, 2, 2), causal=True)
    q, k, v, d_out = backward_input(rng, 2, 3, 2, 2)
    v[1] = np.nan
    ask(q, k, v, d_out, mask=np.array([[True, False, True], [False, False, True]]))


@attention_backward.property("nothing to attend to: gradient 0, not nan", hint="What is P in a row that sees nothing?")
def _(ask, rng):
    ask(*backward_input(rng, 2, 2, 2, 2), mask=np.array([[True, True], [False, False]]))
    ask(*backward_input(rng, 3, 2, 2, 2), causal=True)


@attention_backward.property(
    "scores of 1e4 give no nan", hint="Which function of yours keeps large scores from overflowing?"
)
def _(ask, rng):
    _, _, v, d_out = backward_input(rng, 2, 2, 2, 2)
    ask(np.array([[1e4, 0.0], [-1e4, 0.0]]), np.array([[1.0, 0.2], [0.5, 1.0]]), v, d_out)


@attention_backward.property("leading axes", hint="Which two axes change places, when there are four?")
def _(ask, rng):
    ask(*backward_input(rng, 2, 4, 2, 2, leading=(2, 3)), causal=True)
    q, k, v, d_out = backward_input(rng, 2, 3, 2, 2, leading=(2, 3))
    ask(q[0], k[:, :1], v[1:], d_out)  # each is shared along another axis


@attention_backward.property("float32 in, the same gradients to 1e-5", hint="Where is the scale applied?")
def _(ask, rng):
    kept_dtype(ask, np.float32, *backward_input(rng, 3, 3, 2, 2))


@attention_backward.property(
    "all at once: mask, causal, a scale, leading axes, an axis of size 1",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    mask = rng.random((2, 1, 3, 4)) < 0.6
    mask[0, 0, 1] = mask[..., 2] = False
    ask(*backward_input(rng, 3, 4, 1, 5, leading=(2, 2)), mask=mask, causal=True, scale=0.6)
    q, k, v, d_out = backward_input(rng, 3, 4, 1, 5, leading=(2, 2))
    v[..., 2, :] = np.nan
    ask(*(a.astype(np.float32) for a in (q, k, v, d_out)), mask=mask, causal=True, scale=0.6)
    ask(np.array([[1e3], [1.0], [1e-3]]) * q, k, v, d_out, mask=mask, causal=True, scale=0.6)


def softmax_backward(p, d_p):
    return p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))


def summed(gradient, array):
    """The gradient of an array, added up over the axes along which it is shared."""
    ahead = gradient.ndim - array.ndim
    shared = [ahead + i for i, (n, m) in enumerate(zip(array.shape, gradient.shape[ahead:])) if n < m]
    return gradient.sum((*range(ahead), *shared)).reshape(array.shape)


def unsummed(gradient, array):
    return gradient


def without_nan(p, d_p):
    return np.where(p == 0, 0, d_p)


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
    collected=summed,
    guarded=without_nan,
):
    """The gradients in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    p = usual_weights(q, k, mask, causal, scale)
    d_s = sign * jacobian(p, guarded(p, d_out @ turned_v(v)))
    scale = root(q.shape[-1]) if scale is None else scale
    for_q, for_k = (scale if factor else 1 for factor in scaled)
    gradients = for_q * d_s @ k, for_k * turned_d_s(d_s) @ q, turned_p(p) @ d_out
    return tuple(map(collected, gradients, (q, k, v)))


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
    "An array that is shared along a leading axis collects from all that share it: call summed for each gradient.": {
        "collected": unsummed
    },
    "0 times nan is nan: d_p of a forbidden value has to be 0 before it meets p.": {"guarded": lambda p, d_p: d_p},
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
