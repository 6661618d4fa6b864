"""Lecture 12: attention of the chosen experts alone. The oracle goes one token and one expert at a time."""

import math

import numpy as np

from utils.exercises.arrays import draw, kept_dtype
from utils.judge.function import exercise

MODULE = "mixture"


@exercise("12B", MODULE, importance="essential")
def routed_attention(x, gates, w_q, w_k, w_v, w_o, causal=False):
    out = np.zeros(x.shape)
    for i, token in enumerate(x):
        seen = x[: i + 1] if causal else x
        for e in np.flatnonzero(gates[i]):
            q = token.astype(float) @ w_q[e]
            scores = np.array([q @ (other.astype(float) @ w_k) for other in seen]) / math.sqrt(len(q))
            powers = np.exp(scores - scores.max())
            value = sum(p * (other.astype(float) @ w_v) for p, other in zip(powers / powers.sum(), seen))
            out[i] += gates[i, e] * (value @ w_o[e])
    return out


def inputs(rng, n=3, d_model=4, n_experts=3, d_head=2, top_k=2, size=1.0):
    """x, gates and weights of a small layer; each token has top_k gates that sum to 1."""
    gates = np.zeros((n, n_experts))
    for i in range(n):
        chosen = rng.permutation(n_experts)[:top_k]
        gates[i, chosen] = rng.dirichlet(np.ones(top_k)) if top_k else 0.0
    shapes = (n_experts, d_model, d_head), (d_model, d_head), (d_model, d_head), (n_experts, d_head, d_model)
    w_q, *others = (draw(rng, *shape) for shape in shapes)
    return draw(rng, n, d_model), gates, size * w_q, *others


@routed_attention.property(
    "one token, one expert: its value and its output",
    hint="A single token attends to itself: what is left of W_Q, and which two matrices follow?",
)
def _(ask, rng):
    one = np.array([[1.0, 2.0]]), np.array([[1.0]])
    ask(*one, np.ones((1, 2, 1)), np.ones((2, 1)), np.array([[1.0], [2.0]]), np.array([[[3.0, 1.0]]]))


@routed_attention.property(
    "one expert for all tokens: attention as it was",
    hint="Which scale has a query of d_head numbers, do all tokens stand among the keys, and has each token its own row?",
)
def _(ask, rng):
    ask(*inputs(rng, n_experts=1, top_k=1))
    ask(*inputs(rng, n=6, n_experts=1, top_k=1, d_head=3, size=3.0))


@routed_attention.property(
    "several experts: each with its own matrices and gates",
    hint="Which expert's W_Q, W_O and gate belong together, and are the results of a token added?",
)
def _(ask, rng):
    ask(*inputs(rng, top_k=1))
    ask(*inputs(rng, n=6, n_experts=5, top_k=3))


@routed_attention.property(
    "keys and values are those of all tokens",
    hint="Which tokens may a query see: those of its expert, or all?",
)
def _(ask, rng):
    ask(*inputs(rng, n=7, n_experts=4, top_k=1, size=3.0))


@routed_attention.property("causal", hint="Which rows of the causal mask belong to the queries of one expert?")
def _(ask, rng):
    ask(*inputs(rng, n=4, n_experts=2, top_k=1), causal=True)
    ask(*inputs(rng, n=9, n_experts=4, top_k=2, size=2.0), causal=True)


@routed_attention.property(
    "an expert that nobody chose is not read; a token without experts gets zeros",
    hint="Which experts does the loop go through when a whole column of the gates is 0? 0 times nan is nan.",
)
def _(ask, rng):
    x, gates, w_q, w_k, w_v, w_o = inputs(rng, n_experts=3, top_k=1)
    gates[:] = np.array([1.0, 0.0, 0.0])
    gates[1] = 0.0
    w_q[1:], w_o[2] = np.nan, np.nan
    ask(x, gates, w_q, w_k, w_v, w_o)


@routed_attention.property(
    "all at once: float32, causal, large scores, an unused expert",
    hint="Which float type comes back, and does the softmax survive large scores?",
)
def _(ask, rng):
    x, gates, *weights = inputs(rng, n=20, d_model=6, n_experts=4, d_head=3, top_k=2, size=300.0)
    gates[:, 3], weights[0][3] = 0.0, np.nan
    kept_dtype(ask, np.float32, x, gates, *weights, causal=True)
    x, gates, *weights = inputs(rng, n=9, n_experts=3, d_head=1, top_k=1, size=300.0)
    gates[:, 2], weights[0][2] = 0.0, np.nan
    kept_dtype(ask, np.float32, x, gates, *weights, causal=True)


def usual_routed(
    x, gates, w_q, w_k, w_v, w_o, causal=False, *, scale=lambda d: d**-0.5, among="all", weigh=True, top=False,
    write="add", swap=False, values="v", before=False,
):  # fmt: skip
    """Routed attention in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    out = np.zeros_like(x)
    for e in range(len(w_q)):
        rows = np.flatnonzero(gates[:, e])
        if not len(rows):
            continue
        keys = rows if among == "group" else np.arange(len(x))
        scores = (
            ((gates[rows, e, None] * x[rows] if before else x[rows]) @ w_q[e]) @ (x[keys] @ w_k).T * scale(w_k.shape[1])
        )
        if causal:
            place = np.arange(len(rows)) if top else rows
            allowed = keys <= place[:, None]
            scores = np.where(allowed, scores, -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        found = powers / powers.sum(-1, keepdims=True) @ (x[keys] @ (w_v if values == "v" else w_k))
        found = found @ (w_o[e - 1] if swap else w_o[e])
        result = (gates[rows, e, None] * found if weigh and not before else found).astype(x.dtype)
        result = result.sum(0) if write == "sum" else result
        out[rows] = result if write == "set" else out[rows] + result
    return out


routed_attention.mistakes_of(
    usual_routed,
    {
        "The scale 1/sqrt(d_head) is missing.": {"scale": lambda d: 1.0},
        "Scaled by d_head, not by its root.": {"scale": lambda d: 1 / d},
        "An expert's tokens see only one another: keys and values are those of all tokens.": {"among": "group"},
        "The gates are missing: each result is multiplied by the gate of its token and expert.": {"weigh": False},
        "The causal mask begins at the first query of the group: take the rows of the mask that belong to its tokens.": {
            "top": True
        },
        "The last expert of a token overwrites the others: add.": {"write": "set"},
        "W_O is that of another expert.": {"swap": True},
        "The values are made with W_K: they have a matrix of their own, W_V.": {"values": "k"},
        "The gates multiply the queries, before the softmax: they weigh what an expert found.": {"before": True},
        "An expert's results are summed over its tokens: each goes to the row of its own token.": {"write": "sum"},
    },
)


@routed_attention.mistake("The causal mask is missing: a token sees later ones.")
def _(x, gates, w_q, w_k, w_v, w_o, causal=False):
    return usual_routed(x, gates, w_q, w_k, w_v, w_o)


@routed_attention.mistake(
    "All experts are computed for all tokens: 0 times nan is nan. Take the tokens of each expert."
)
def _(x, gates, w_q, w_k, w_v, w_o, causal=False):
    scores = np.einsum("nd,edh,mh->enm", x, w_q, x @ w_k, optimize=True) * w_k.shape[1] ** -0.5
    if causal:
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    heads = powers / powers.sum(-1, keepdims=True) @ (x @ w_v)
    return np.einsum("ne,enh,ehd->nd", gates, heads, w_o)
