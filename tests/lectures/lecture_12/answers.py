"""Answers to the exercises of lecture 12 in NumPy as learners write them: right ones, unlike the lecture's, and wrong ones.

Those in PyTorch and in CUDA stand in files of their own.
"""

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_12 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 12A -------------------------------------------------------------------------------------------------------------


@right("12A")
def by_rank(logits, k):
    rank = np.argsort(np.argsort(-logits, axis=-1, kind="stable"), axis=-1, kind="stable")
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True)) * (rank < k)
    return powers / powers.sum(axis=-1, keepdims=True)


@right("12A")
def row_by_row(logits, k):
    out = np.zeros_like(logits)
    for at in np.ndindex(logits.shape[:-1]):
        left = list(range(logits.shape[-1]))
        for _ in range(k):
            best = max(left, key=lambda e: (logits[at][e], -e))
            left.remove(best)
            out[at][best] = np.exp(logits[at][best] - logits[at].max())
        out[at] /= out[at].sum()
    return out


@wrong("12A", "The softmax runs over all logits")
def switch_gates(logits, k):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    out = np.zeros_like(p)
    np.put_along_axis(out, chosen, np.take_along_axis(p, chosen, -1), -1)
    return out


@wrong("12A", "Of equal logits the higher number")
def reversed_sort(logits, k):
    chosen = np.argsort(logits, axis=-1, kind="stable")[..., ::-1][..., :k]
    out = np.zeros_like(logits)
    values = np.take_along_axis(logits, chosen, -1)
    p = np.exp(values - values.max(-1, keepdims=True))
    np.put_along_axis(out, chosen, p / p.sum(-1, keepdims=True), -1)
    return out


@wrong("12A", "of equal logits the lower number")
def by_threshold(logits, k):
    least = np.sort(logits, axis=-1)[..., -k][..., None]
    p = np.exp(logits - logits.max(-1, keepdims=True)) * (logits >= least)
    return p / p.sum(-1, keepdims=True)


@wrong("12A", "Which kind of sort keeps equal numbers")
def any_sort(logits, k):
    chosen = np.argsort(-logits, axis=-1)[..., :k]
    kept = np.full_like(logits, -np.inf)
    np.put_along_axis(kept, chosen, np.take_along_axis(logits, chosen, -1), -1)
    p = np.exp(kept - kept.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@wrong("12A", "exp overflows")
def not_shifted(logits, k):
    rank = np.argsort(np.argsort(-logits, axis=-1, kind="stable"), axis=-1)
    p = np.where(rank < k, np.exp(logits), 0)
    return p / p.sum(-1, keepdims=True)


@wrong("12A", "shape")
def only_the_chosen(logits, k):
    values = -np.sort(-logits, axis=-1)[..., :k]
    p = np.exp(values - values.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@wrong("12A", "returned float64, expected float32")
def always_double(logits, k):
    return by_rank(logits.astype(float), k)


@wrong("12A", "not minus infinity")
def zeros_for_the_rest(logits, k):
    rank = np.argsort(np.argsort(-logits, axis=-1, kind="stable"), axis=-1)
    kept = np.where(rank < k, logits, 0)
    p = np.exp(kept - kept.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# --- 12B -------------------------------------------------------------------------------------------------------------


def attend(q, k, v, allowed):
    s = np.where(allowed, q @ k.T / np.sqrt(k.shape[1]).astype(q.dtype), -np.inf)
    p = np.exp(s - s.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) @ v


@right("12B")
def token_by_token(x, gates, w_q, w_k, w_v, w_o, causal=False):
    k, v, rows = x @ w_k, x @ w_v, []
    for i, gate in enumerate(gates):
        seen, row = slice(0, i + 1 if causal else len(x)), np.zeros(x.shape[1], x.dtype)
        for e in range(len(gate)):
            if gate[e] > 0:
                row = row + gate[e] * (attend((x[i] @ w_q[e])[None], k[seen], v[seen], True)[0] @ w_o[e])
        rows.append(row)
    return np.stack(rows)


@right("12B")
def sorted_slots(x, gates, w_q, w_k, w_v, w_o, causal=False):
    k, v, allowed = x @ w_k, x @ w_v, np.tri(len(x), dtype=bool) | (not causal)
    experts, tokens = np.nonzero(gates.T)
    out = np.zeros_like(x)
    for e in np.unique(experts):
        own = tokens[experts == e]
        np.add.at(out, own, gates[own, e][:, None] * (attend(x[own] @ w_q[e], k, v, allowed[own]) @ w_o[e]))
    return out


def routed(x, gates, w_q, w_k, w_v, w_o, causal=False, scale=1.0, keys=None, mask=None, gate=None):
    out = np.zeros_like(x)
    for e in range(len(w_q)):
        own = np.flatnonzero(gates[:, e])
        if len(own) == 0:
            continue
        others = own if keys else np.arange(len(x))
        allowed = (others <= own[:, None]) if causal else np.ones((len(own), len(others)), bool)
        allowed = allowed if mask is None else mask(allowed)
        found = attend(scale * (x[own] @ w_q[e]), x[others] @ w_k, x[others] @ w_v, allowed)
        out[own] += (1 if gate else gates[own, e][:, None]) * (found @ w_o[e])
    return out


@wrong("12B", "The gates are missing")
def without_gates(*args, **more):
    return routed(*args, **more, gate=True)


@wrong("12B", "An expert's tokens see only one another")
def keys_of_the_group(*args, **more):
    return routed(*args, **more, keys=True)


@wrong("12B", "The causal mask is missing")
def sees_the_future(x, gates, w_q, w_k, w_v, w_o, causal=False):
    return routed(x, gates, w_q, w_k, w_v, w_o)


@wrong("12B", "The scale 1/sqrt(d_head) is missing")
def no_scale(x, gates, w_q, w_k, *others, **more):
    return routed(x, gates, w_q, w_k, *others, **more, scale=np.sqrt(w_k.shape[1]).astype(x.dtype))


@wrong("12B", "one expert for all tokens")
def scale_five_percent_off(*args, **more):
    return routed(*args, **more, scale=args[0].dtype.type(1.05))


@wrong("12B", "All experts are computed for all tokens")
def dense(x, gates, w_q, w_k, w_v, w_o, causal=False):
    k, v, allowed, out = x @ w_k, x @ w_v, np.tri(len(x), dtype=bool) | (not causal), np.zeros_like(x)
    for e in range(len(w_q)):
        out = out + gates[:, e, None] * (attend(x @ w_q[e], k, v, allowed) @ w_o[e])
    return out


@wrong("12B", "The last expert of a token overwrites")
def overwritten(x, gates, w_q, w_k, w_v, w_o, causal=False):
    k, v, allowed, out = x @ w_k, x @ w_v, np.tri(len(x), dtype=bool) | (not causal), np.zeros_like(x)
    for e in range(len(w_q)):
        own = np.flatnonzero(gates[:, e])
        if len(own):
            out[own] = gates[own, e, None] * (attend(x[own] @ w_q[e], k, v, allowed[own]) @ w_o[e])
    return out


@wrong("12B", "returned float64, expected float32")
def in_double(x, *args, **more):
    return routed(x.astype(float), *args, **more)


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
layer = (numbers((12, 24, 4)), numbers((24, 4)), numbers((24, 4)), numbers((12, 4, 24)))
some = np.where(numbers((16, 12)) > 0.5, 0.25, 0.0)
CALLS = {
    "12A": [((numbers((16, 12)), 4), {}), ((numbers((50, 12)), 4), {})],
    "12B": [((numbers((16, 24)), some, *layer), {}), ((numbers((16, 24)), some, *layer), {"causal": True})],
    "12C": [],
    "12D": [],
    "12E": [],
    "12F": [],
    "12G": [],
}
