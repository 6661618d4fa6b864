"""The row of lecture 11: one attention map minus a part of another."""

import numpy as np

from attention import differential
from tests.contract.triples import Triple, changed, normal, plain_attention


def differential_inputs(rng, q=(2, 3, 5, 4), k=(2, 3, 7, 4), d_v=6, v=None, q2=None, k2=None, lam=0.8, **more):
    shapes = {"q1": q, "k1": k, "q2": q2 or q, "k2": k2 or k, "v": v or (*k[:-1], d_v)}
    return {name: normal(rng, *shape) for name, shape in shapes.items()} | {"lam": lam} | more


def plain_differential(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """Two attentions, each as sums over single keys."""
    lead = np.broadcast_shapes(*(a.shape[:-2] for a in (q1, k1, q2, k2, v)))
    first, second = (plain_attention(q, k, v, None, causal, scale)[0] for q, k in ((q1, k1), (q2, k2)))
    return (np.broadcast_to(first - np.asarray(lam, float)[..., None, None] * second, (*lead, *first.shape[-2:])),)


def without_lambda(call, rng):
    arguments = differential_inputs(rng, lam=0.0, causal=True)
    expected = plain_attention(*(arguments[name] for name in ("q1", "k1", "v")), causal=True)[0]
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5)


def equal_maps(call, rng):
    arguments = differential_inputs(rng, lam=1.0)
    arguments |= {"q2": arguments["q1"], "k2": arguments["k1"]}
    np.testing.assert_allclose(call(**arguments)[0], np.zeros((2, 3, 5, 6)), atol=1e-6)


def sums_of_rows(call, rng):
    """With values of 1 the output is what a row of weights sums to."""
    arguments = changed(differential_inputs(rng, lam=np.array([0.2, 0.8, 1.3])), v=np.ones_like)
    sums = np.array([0.8, 0.2, -0.3])[:, None, None]
    np.testing.assert_allclose(call(**arguments)[0], np.broadcast_to(sums, (2, 3, 5, 6)), atol=1e-6)


def nan_behind_the_diagonal(call, rng):
    arguments = differential_inputs(rng, q=(2, 9, 4), k=(2, 9, 4), causal=True)
    expected = call(**arguments)[0]
    arguments["v"][..., 5, :] = np.nan
    out = call(**arguments)[0]
    np.testing.assert_allclose(out[..., :5, :], expected[..., :5, :], atol=1e-5)
    assert np.isnan(out[..., 5:, :]).all()


DIFFERENTIAL = Triple(
    "differential_attention",
    differential.differential_attention_numpy,
    differential.differential_attention_torch,
    differential.differential_attention_cuda,
    differential_inputs,
    plain_differential,
    {
        "one lambda": {},
        "a lambda for each head": dict(lam=np.array([0.2, 0.8, 1.3])),
        "a negative lambda": dict(lam=-0.5),
        "no leading axes": dict(q=(5, 4), k=(7, 4)),
        "one query, one key": dict(q=(1, 4), k=(1, 4)),
        "ragged tails": dict(q=(2, 19, 7), k=(2, 35, 7), d_v=3),
        "values wider than two tiles": dict(q=(2, 5, 20), k=(2, 40, 20), d_v=40),
        "causal, fewer queries than keys": dict(causal=True),
        "causal, more queries than keys": dict(q=(2, 9, 4), k=(2, 4, 4), causal=True),
        "keys shared by the batch": dict(k=(1, 3, 7, 4), v=(3, 7, 2), lam=np.array([0.2, 0.8, 1.3])),
        "the second queries bring the batch": dict(q=(3, 5, 4), q2=(2, 3, 5, 4), k=(3, 7, 4)),
        "the second keys bring the batch": dict(q=(5, 4), k=(7, 4), k2=(3, 7, 4), v=(7, 2)),
        "values bring the batch": dict(q=(5, 4), k=(7, 4), v=(3, 7, 2), lam=np.array([0.2, 0.8, 1.3])),
        "a scale": dict(scale=0.3),
        "a scale of 0": dict(scale=0.0),
        "d_head of 1": dict(q=(2, 5, 1), k=(2, 7, 1)),
    },
    {
        "no keys": dict(k=(2, 3, 0, 4)),
        "no keys, and k brings the batch": dict(q=(1, 2, 3), k=(5, 0, 3), d_v=4),
        "no queries": dict(q=(2, 3, 0, 4)),
        "no batch": dict(q=(0, 3, 5, 4), k=(0, 3, 7, 4)),
        "no heads": dict(q=(2, 0, 5, 4), k=(2, 0, 7, 4), lam=np.zeros(0)),
        "values without columns": dict(q=(3, 4), k=(7, 4), v=(7, 0)),
    },
    ("q1", "k1", "q2", "k2", "v"),
    ("q1",),
    {
        "q1, k1, q2 and k2 must have the same d_head of at least 1, got 4, 3, 4 and 4": dict(k1=lambda k: k[..., :3]),
        "got 4, 4, 4 and 2": dict(k2=lambda k: k[..., :2]),
        "q1 and q2 must have the same n_queries, got 5 and 4": dict(q2=lambda q: q[..., :4, :]),
        "k1, k2 and v must have the same n_keys, got 7, 6 and 7": dict(k2=lambda k: k[..., :6, :]),
        "k1, k2 and v must have the same n_keys, got 7, 7 and 6": dict(v=lambda v: v[..., :6, :]),
        "q2 must have at least two axes": dict(q2=lambda q: q[0, 0, 0]),
        "the leading axes of q1, k1, q2, k2 and v must broadcast": dict(k2=lambda k: k[:, :2]),
        "lam must be a number or one for each of the 3 heads": dict(lam=np.ones(2)),
        "q1 must hold real numbers": dict(q1=lambda q: q + 1j),
        "v must hold real numbers": dict(v=lambda v: v > 0),
    },
    None,
    lambda a: changed(a, k1=lambda k: k[..., :0, :], k2=lambda k: k[..., :0, :], v=lambda v: v[..., :0, :]),
    ("q1", "k1", "q2", "k2", "v"),
    {
        "lambda of 0 is attention": without_lambda,
        "equal maps and a lambda of 1 give nothing": equal_maps,
        "a row of weights sums to 1 minus lambda": sums_of_rows,
        "nan behind the diagonal reaches nobody before it": nan_behind_the_diagonal,
    },
)
