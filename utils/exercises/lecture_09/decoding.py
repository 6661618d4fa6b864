"""Lecture 09: one decode step on latents. The oracle goes one head and one key at a time."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import draw, kept_dtype, or_one, weights_of
from utils.judge.function import exercise

MODULE = "latent"


@exercise("9C", MODULE, importance="essential")
def absorbed_decode(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    out = np.zeros(q_latent.shape, float)
    for b, h in np.ndindex(*q_latent.shape[:2]):
        n = int(lengths[b])
        scores = [
            scale * math.fsum([*(q_latent[b, h] * c_kv[b, j]).tolist(), *(q_rope[b, h] * k_rope[b, j]).tolist()])
            for j in range(n)
        ]
        for weight, row in zip(weights_of(scores, [True] * n), c_kv[b, :n]):
            out[b, h] += weight * row
    return out


def inputs(rng, batch=2, heads=3, capacity=5, d_latent=4, d_rope=2, lengths=(5, 3), size=1.0):
    """Queries, a cache and lengths; behind the lengths stands nan."""
    c_kv, k_rope = draw(rng, batch, capacity, d_latent), draw(rng, batch, capacity, d_rope)
    for b, length in enumerate(lengths):
        c_kv[b, length:], k_rope[b, length:] = np.nan, np.nan
    queries = size * draw(rng, batch, heads, d_latent), size * draw(rng, batch, heads, d_rope)
    return *queries, c_kv, k_rope, np.array(lengths)


def full(rng, **sizes):
    """The same with every row in use."""
    q_latent, q_rope, c_kv, k_rope, _ = inputs(rng, lengths=(0, 0), **sizes)
    c_kv, k_rope = draw(rng, *c_kv.shape), draw(rng, *k_rope.shape)
    return q_latent, q_rope, c_kv, k_rope, np.full(len(c_kv), c_kv.shape[1])


@absorbed_decode.property(
    "the blend of latents, by scores of two parts",
    hint="Which two products make a score, and which of the two caches is blended?",
)
def _(ask, rng):
    one = (
        np.array([[[1.0, 0.0]]]),
        np.array([[[2.0]]]),
        np.array([[[1.0, 3.0], [2.0, 0.0]]]),
        np.array([[[1.0], [0.0]]]),
    )
    ask(*one, np.array([2]), 1.0)
    ask(*full(rng, batch=2, heads=3), 0.5)


@absorbed_decode.property("the scale that is given", hint="To which scores does the scale belong, and is it 0.5 here?")
def _(ask, rng):
    ask(*full(rng), 0.3)
    ask(*full(rng, size=3.0), 0.9)
    ask(*full(rng), 0.0)


@absorbed_decode.property(
    "behind a length anything may stand, even nan",
    hint="Are the rows behind the length cut off, or only weighted with 0? 0 times nan is nan.",
)
def _(ask, rng):
    ask(*inputs(rng, lengths=(5, 3)), 0.5)
    ask(*inputs(rng, batch=3, lengths=(1, 4, 2)), 0.5)


@absorbed_decode.property("a length of 0 gives zeros", hint="What does your softmax do with a row without scores?")
def _(ask, rng):
    ask(*inputs(rng, lengths=(0, 4)), 0.5)


@absorbed_decode.property(
    "any sizes: one head, no rotated columns, 300 rows",
    hint="Which axis is squeezed away when it is 1, and what if k_rope has no columns?",
)
def _(ask, rng):
    ask(*inputs(rng, batch=1, heads=1, capacity=300, lengths=(290,)), 0.4)
    ask(*inputs(rng, d_rope=0, heads=1, d_latent=1), 0.7)


@absorbed_decode.property(
    "large scores do not overflow",
    hint="What is subtracted before exp, and is it the largest score of each head?",
)
def _(ask, rng):
    ask(*inputs(rng, size=2000.0), 0.5)
    q_latent, *others = full(rng, capacity=40)
    q_latent[0, 0] *= 1e4
    ask(q_latent, *others, 1.0)
    ask(*inputs(rng, heads=1, lengths=(2, 4), size=2000.0), 0.5)


@absorbed_decode.property("the float type of q_latent", hint="Which float type has the array that you fill?")
def _(ask, rng):
    *arrays, lengths = inputs(rng, lengths=(4, 0))
    kept_dtype(ask, np.float32, *arrays, lengths=lengths, scale=0.6)
    *arrays, lengths = inputs(rng, heads=1, d_rope=1, lengths=(3, 5))
    kept_dtype(ask, np.float32, *arrays, lengths=lengths, scale=0.6)


def usual_decode(
    q_latent, q_rope, c_kv, k_rope, lengths, scale, *, rope=1.0, both=True, read=slice, axis=-1, shift=True, turn=False,
    own_scale=None,
):  # fmt: skip
    """The step in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    out = np.zeros_like(q_latent)
    scale = own_scale(q_latent, q_rope) if own_scale else scale
    for b, length in enumerate(lengths):
        c, k = c_kv[b, read(length)], k_rope[b, read(length)]
        latent, turned = q_latent[b] @ c.T, q_rope[b] @ k.T
        scores = (latent + rope * turned) * scale if both else latent * scale + turned
        with np.errstate(all="ignore"):
            powers = np.exp(scores - (scores.max(axis=axis, keepdims=True, initial=-1e300) if shift else 0))
            weights = powers / or_one(powers.sum(axis=axis, keepdims=True))
        out[b] = weights @ c
    return out


for message, change in {
    "The rotated part is missing: its product is added to the score.": {"rope": 0.0},
    "The scale reaches the latent's product only: both are scaled together.": {"both": False},
    "Rows behind a length are read: cut them off. A weight of 0 is not enough, 0 times nan is nan.": {
        "read": lambda length: slice(None)
    },
    "The softmax runs over the heads: the weights of one head have to sum to 1, over the rows.": {"axis": 0},
    "exp overflows: subtract the largest score of each head.": {"shift": False},
    "The scale that is given is not used: it cannot be read off the widths, 1/sqrt(d_latent + d_rope) is another one.": {
        "own_scale": lambda q_latent, q_rope: (q_latent.shape[-1] + q_rope.shape[-1]) ** -0.5
    },
    "The last row of each text is left out: the first lengths[b] rows count.": {
        "read": lambda length: slice(max(length - 1, 0))
    },
}.items():
    absorbed_decode.mistake(message)(partial(usual_decode, **change))


@absorbed_decode.mistake("A length of 0 gives nan: 0 divided by 0.")
def _(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    out = usual_decode(q_latent, q_rope, c_kv, k_rope, lengths, scale)
    out[np.asarray(lengths) == 0] = np.nan
    return out


@absorbed_decode.mistake("The rotated keys are blended too: the value is the latent alone.")
def _(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    wide = [np.concatenate(pair, axis=-1) for pair in ((q_latent, q_rope), (c_kv, k_rope))]
    nothing = wide[0][..., :0], wide[1][..., :0]
    return usual_decode(wide[0], nothing[0], wide[1], nothing[1], lengths, scale)
