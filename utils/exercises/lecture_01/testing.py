"""Lecture 01: a test of attention, tried on right ones and on attentions with one bug each."""

import math

import numpy as np

from utils.judge.bug import bug

MODULE = "fundamentals"


def attend(
    q, k, v, mask=None, causal=False, scale=None, *, divisor=math.sqrt, axis=-1, shift=True, late=False, hidden=-np.inf,
    bottom=True, turned=False, given=True,
):  # fmt: skip
    """Attention with a place for each bug, in what follows the `*`; as it stands, it is right."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    allowed = np.ones((n_queries, n_keys), bool) if mask is None else mask ^ turned
    if causal:
        allowed = allowed & np.tri(n_queries, n_keys, n_keys - n_queries if bottom else 0, dtype=bool)
    scale = 1 / divisor(q.shape[-1]) if scale is None or not given else scale
    scores = q @ np.swapaxes(k, -1, -2) * scale
    scores = np.where(allowed | late, scores, hidden)
    top = np.maximum(scores.max(axis=axis, keepdims=True, initial=-np.inf), -1e300) if shift else 0
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp(scores - top)
        total = powers.sum(axis=axis, keepdims=True)
        return powers / np.where(total == 0, 1, total) * (allowed | (not late)) @ v


@bug("1F", MODULE, subject="attention", importance="useful")
def test_attention(attention):
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 6)), rng.standard_normal((5, 6)), rng.standard_normal((5, 2))
    mask = rng.random((3, 5)) < 0.6
    for options in ({}, {"mask": mask}, {"causal": True}, {"mask": mask, "causal": True}, {"scale": 0.3}):
        assert np.allclose(attention(q, k, v, **options), attend(q, k, v, **options))
    nothing = attention(q, k, v, mask=np.zeros((3, 5), bool))
    assert np.array_equal(nothing, np.zeros((3, 2)))
    assert np.allclose(attention(1e5 * q, k, v), attend(1e5 * q, k, v))


@test_attention.right
def _(q, k, v, mask=None, causal=False, scale=None):
    return attend(q, k, v, mask, causal, scale)


@test_attention.right
def _(q, k, v, mask=None, causal=False, scale=None):
    """One query at a time, and only over the keys that it may see."""
    q, k, v = (np.asarray(a, float) for a in (q, k, v))
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v))
    full = np.broadcast_to(True if mask is None else mask, (*lead, n_queries, n_keys))
    out = np.zeros((*lead, n_queries, v.shape[-1]))
    for place in np.ndindex(*lead, n_queries):
        seen = full[place] & ((np.arange(n_keys) <= place[-1] + n_keys - n_queries) | (not causal))
        if seen.any():
            scores = scale * k[place[:-1]][seen] @ q[place]
            powers = np.exp(scores - scores.max())
            out[place] = powers / powers.sum() @ v[place[:-1]][seen]
    return out


SEEN = "What should the output of one query be? Work it out for small numbers, and compare."
MUTANTS = {
    "the scores are divided by d_head, not by its root": ({"divisor": float}, SEEN),
    "the scale that is given is ignored": ({"given": False}, "Which arguments has your test never used?"),
    "the softmax runs over the queries": ({"axis": -2}, "What is the output when all values are the same?"),
    "the mask is the wrong way round": ({"turned": True}, "Which keys may a query see where the mask is True?"),
    "the mask is applied after the softmax": ({"late": True}, "Do the weights sum to 1 when something is masked?"),
    "the causal mask starts at the top left": ({"bottom": False}, "Has your test fewer queries than keys?"),
    "a row with nothing to attend to is an average": ({"hidden": -1e9}, "What if the mask forbids every key?"),
    "large scores overflow": ({"shift": False}, "Has your test scores of 1000 and more?"),
}


for name, (changes, hint) in MUTANTS.items():

    def wrong(q, k, v, mask=None, causal=False, scale=None, changes=changes):
        return attend(q, k, v, mask, causal, scale, **changes)

    test_attention.mutant(name, hint=hint)(wrong)
