"""Lecture 08: heads that are turned onto one another before they are merged."""

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "grouped_query"


def polar(m):
    """The rotation nearest to a square matrix, without its singular vectors: m (m^T m)^(-1/2)."""
    values, vectors = np.linalg.eigh(m.T @ m)
    return m @ (vectors / np.sqrt(values)) @ vectors.T


@exercise("8C", MODULE, returns=("merged", "turned"), importance="useful")
def aligned_merge(v, w_v, w_o, n_kv_heads):
    if n_kv_heads < 1 or len(v) % n_kv_heads:
        raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {len(v)} and {n_kv_heads}")
    group = len(v) // n_kv_heads
    merged, turned = [], [None] * len(v)
    for first in range(0, len(v), group):
        turns = [polar(v[h].T @ v[first]) for h in range(first, first + group)]
        merged.append(sum(w_v[first + i] @ turn for i, turn in enumerate(turns)) / group)
        for i, turn in enumerate(turns):
            turned[first + i] = turn.T @ w_o[first + i]
    return np.array(merged), np.array(turned)


def layer(rng, heads, d_model=5, d_head=3, d_out=4, n_tokens=12):
    """Values on a text of its own, so that v is not a text times w_v, and the weights."""
    return draw(rng, heads, n_tokens, d_head), draw(rng, heads, d_model, d_head), draw(rng, heads, d_head, d_out)


def said(tokens, w_v, w_o):
    per_head = len(w_o) // len(w_v)
    return sum(tokens @ w_v[h // per_head] @ w_o[h] for h in range(len(w_o)))


@aligned_merge.property("as many heads as before: nothing changes", hint="Which rotation turns a head onto itself?")
def _(ask, rng):
    ask(*layer(rng, 2), 2)


@aligned_merge.property(
    "every group has its first head as reference",
    hint="How far does h go, and which head is the reference of the last one?",
)
def _(ask, rng):
    ask(*layer(rng, 2), 1)
    ask(*layer(rng, 4), 2)
    ask(*layer(rng, 6), 2)
    ask(*layer(rng, 6), 3)


@aligned_merge.property(
    "rotated copies of one head are merged without loss",
    hint="What undoes the rotation of v, and where does it go in w_o?",
)
def _(ask, rng):
    v, w_v, w_o = layer(rng, 3)
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(3)]
    copies = np.stack([w_v[0] @ turn for turn in turns])
    back = np.stack([turn.T @ w_o[0] for turn in turns])
    tokens = draw(rng, 20, 5)
    merged, turned = ask(tokens @ copies, copies, back, 1)
    gap = np.abs(said(tokens, merged, turned) - said(tokens, copies, back)).max()
    if gap > 1e-8:
        raise Failed(f"what the heads say has changed by {gap:.2g}")


@aligned_merge.property("the values decide, not the weights", hint="From which argument does the rotation come?")
def _(ask, rng):
    v, w_v, w_o = layer(rng, 2)
    ask(v, 0 * w_v + 1, w_o, 1)


@aligned_merge.property("any sizes", hint="Which of d_model, d_head and d_out does your code take for another one?")
def _(ask, rng):
    ask(*layer(rng, 4, d_model=9, d_head=6, d_out=2, n_tokens=40), 2)
    ask(*layer(rng, 2, d_model=2, d_head=1, d_out=7), 1)


@aligned_merge.property(
    "values of very different size", hint="Does the length of the vectors change which rotation is the best?"
)
def _(ask, rng):
    v, w_v, w_o = layer(rng, 4, n_tokens=200)
    ask(v * np.array([1e3, 1.0, 1e-2, 5.0])[:, None, None], w_v, w_o, 2)
    v, w_v, w_o = layer(rng, 4, d_model=1, d_out=1)
    ask(1e3 * v, w_v, w_o, 2)


def usual_merge(v, w_v, w_o, n_kv_heads, *, rotation=lambda a, b: _svd(a.T @ b), reference=lambda h, group: h // group * group,
                back=lambda r, o: r.T @ o, source=lambda v, w_v: v, share=lambda group: 1 / group, home=lambda h, group, n: h // group,
                forth=lambda r, w: w @ r):  # fmt: skip
    """The merge in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    group, look = len(v) // n_kv_heads, source(v, w_v)
    merged, turned = np.zeros((n_kv_heads, *w_v.shape[1:])), np.zeros(w_o.shape)
    for h in range(len(v)):
        r = rotation(look[h], look[reference(h, group)])
        merged[home(h, group, n_kv_heads)] += forth(r, w_v[h]) * share(group)
        turned[h] = back(r, w_o[h])
    return merged, turned


def _svd(m):
    u, _, vt = np.linalg.svd(m)
    return u @ vt


def _svd_not_transposed(m):
    u, _, vt = np.linalg.svd(m)
    return u @ vt.T


aligned_merge.mistakes_of(
    usual_merge,
    {
        "Nothing is turned: this is the plain mean.": {"rotation": lambda a, b: np.eye(a.shape[1])},
        "The rotation goes the wrong way: it has to bring v[h] onto the reference, svd(v[h].T @ reference).": {
            "rotation": lambda a, b: _svd(b.T @ a)
        },
        "np.linalg.svd returns V transposed already: the rotation is u @ vt.": {
            "rotation": lambda a, b: _svd_not_transposed(a.T @ b)
        },
        "The least-squares map is no rotation: w_o cannot undo it with its transpose.": {
            "rotation": lambda a, b: np.linalg.lstsq(a, b, rcond=None)[0]
        },
        "Every head is turned onto head 0: the reference is the first head of its own group.": {
            "reference": lambda h, group: 0
        },
        "w_v is averaged as it is: each head's w_v is turned first, w_v[h] @ rotation.": {"forth": lambda r, w: w},
        "w_o is not turned back: what the heads say changes.": {"back": lambda r, o: o},
        "w_o is turned by the rotation itself: it needs the inverse, the transpose, on the left.": {
            "back": lambda r, o: r @ o
        },
        "The rotation comes from the weights: it has to come from v, what the heads hand over.": {
            "source": lambda v, w_v: w_v
        },
        "The heads of a group are added: take their mean.": {"share": lambda group: 1.0},
    },
)


@aligned_merge.mistake("The groups are dealt out, as with tile: neighbours form a group.")
def _(v, w_v, w_o, n_kv_heads):
    order = np.arange(len(v)).reshape(-1, n_kv_heads).T.ravel()
    merged, turned = usual_merge(v[order], w_v[order], w_o[order], n_kv_heads)
    return merged, turned[np.argsort(order)]
