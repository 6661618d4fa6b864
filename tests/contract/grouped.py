"""The row of lecture 08: heads that share keys and values."""

import numpy as np

from attention import grouped_query
from tests.contract.triples import Triple, changed, normal, plain_attention, unseen_keys


def grouped_inputs(rng, q=(2, 6, 5, 4), k=(2, 3, 7, 4), d_v=6, v=None, mask=None, **more):
    drawn = {"q": normal(rng, *q), "k": normal(rng, *k), "v": normal(rng, *(v or (*k[:-1], d_v)))}
    return drawn | ({} if mask is None else {"mask": rng.random(mask) < 0.6}) | more


def plain_grouped(q, k, v, mask=None, causal=False, scale=None):
    """With repeated heads, the head of keys written out for each head of queries."""
    group = q.shape[-3] // max(k.shape[-3], 1)
    theirs = [head // max(group, 1) for head in range(q.shape[-3])]
    return plain_attention(q, k[..., theirs, :, :], v[..., theirs, :, :], mask, causal, scale)[:1]


def as_many_heads(call, rng):
    arguments = grouped_inputs(rng, q=(2, 3, 5, 4))
    np.testing.assert_allclose(call(**arguments)[0], plain_attention(**arguments)[0], atol=1e-5)


def one_head_for_all(call, rng):
    arguments = grouped_inputs(rng, k=(2, 1, 7, 4))
    np.testing.assert_allclose(call(**arguments)[0], plain_attention(**arguments)[0], atol=1e-5)


GROUPED = Triple(
    "grouped_query_attention",
    grouped_query.grouped_query_attention_numpy,
    grouped_query.grouped_query_attention_torch,
    grouped_query.grouped_query_attention_cuda,
    grouped_inputs,
    plain_grouped,
    {
        "six heads on three": {},
        "no leading axes, nine on three": dict(q=(9, 1, 4), k=(3, 40, 4)),
        "more rows than a block": dict(q=(12, 9, 4), k=(2, 19, 4)),
        "two splits": dict(q=(4, 1, 5), k=(2, 200, 5)),
        "three splits": dict(q=(4, 1, 5), k=(2, 300, 5)),
        "causal": dict(causal=True),
        "no leading axes, causal": dict(q=(6, 5, 4), k=(3, 7, 4), causal=True),
        "causal, more queries than keys": dict(q=(2, 6, 9, 4), k=(2, 3, 4, 4), causal=True),
        "a mask for each head, and causal": dict(mask=(2, 6, 5, 7), causal=True),
        "a mask for keys": dict(mask=(7,)),
        "a mask for each text, a scale": dict(mask=(2, 1, 1, 7), scale=0.3),
        "a scale of 0": dict(scale=0.0),
        "keys shared by the batch": dict(k=(1, 3, 7, 4)),
        "queries shared by the batch": dict(q=(6, 5, 4)),
    },
    {
        "no keys": dict(k=(2, 3, 0, 4)),
        "no queries": dict(q=(2, 6, 0, 4)),
        "no batch": dict(q=(0, 6, 5, 4), k=(0, 3, 7, 4)),
        "no heads": dict(q=(2, 0, 5, 4)),
        "no heads at all": dict(q=(2, 0, 5, 4), k=(2, 0, 7, 4)),
        "no keys, and k brings the batch": dict(q=(6, 5, 4), k=(3, 3, 0, 4)),
    },
    ("q", "k", "v"),
    ("q",),
    {
        "the heads of q must be a multiple of those of k and v, got 5 and 3": dict(q=lambda q: q[:, :5]),
        "q must have at least three axes": dict(q=lambda q: q[0, 0]),
        "q and k must have the same d_head of at least 1, got 3 and 4": dict(q=lambda q: q[..., :3]),
        "k and v must have the same heads and n_keys": dict(v=lambda v: v[:, :, :6]),
        "the leading axes of q, k and v must broadcast": dict(q=lambda q: np.concatenate([q, q[:1]])),
        "mask must be boolean with True = may attend": dict(mask=np.zeros((5, 7))),
        "mask must broadcast to (2, 6, 5, 7)": dict(mask=np.ones((7, 5), bool)),
        "v must hold real numbers": dict(v=lambda v: v > 0),
    },
    unseen_keys,
    lambda a: changed(a, mask=np.zeros((5, 7), bool)),
    ("q", "k", "v"),
    {"as many heads of keys: multi-head": as_many_heads, "one head of keys: multi-query": one_head_for_all},
)
