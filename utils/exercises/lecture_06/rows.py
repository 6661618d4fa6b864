"""Lecture 06: attention with the whole row in sight, one query after another in float64: what the lecture must not do."""

import math

import numpy as np

from utils.exercises.arrays import INF


def row(scores, values):
    """Output and log-sum-exp of one query: scores (n_keys,), values (n_keys, d_v); 0 and -inf without a key."""
    top = max(scores, default=-INF)
    if top == -INF:
        return np.zeros(values.shape[-1]), -INF
    powers = np.array([math.exp(s - top) for s in scores])
    total = math.fsum(powers)
    return powers @ values / total, top + math.log(total)


def whole(q, k, v, allowed, scale):
    """Attention of float64 arrays, row by row: (out, lse). allowed: booleans (n_queries, n_keys)."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])).astype(float) for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = np.zeros((*lead, q.shape[-2], v.shape[-1])), np.full((*lead, q.shape[-2]), -INF)
    for place in np.ndindex(*lse.shape):
        keys = np.flatnonzero(allowed[place[-1]])
        out[place], lse[place] = row(scale * (k[place[:-1]][keys] @ q[place]), v[place[:-1]][keys])
    return out, lse


def seen(n_queries, n_keys, causal, shift=None):
    """Booleans (n_queries, n_keys): who may see whom; aligned at the bottom right unless a shift is given."""
    shift = n_keys - n_queries if shift is None else shift
    i, j = np.indices((n_queries, n_keys))
    return (j <= i + shift) | (not causal)


def finite(m):
    return np.where(np.isneginf(m), 0, m)
