"""The rows of lecture 10: linear attention, and the selective scan of Mamba."""

import numpy as np

from attention import linear
from tests.contract.triples import BAD_SHAPES, Triple, attention_inputs, changed, normal

# ---- linear attention -----------------------------------------------------------------------------------------------


def linear_inputs(rng, q=(2, 3, 5, 4), k=(2, 3, 7, 4), **more):
    """q and k are features: none is negative."""
    return changed(attention_inputs(rng, q, k, **more), q=np.abs, k=np.abs)


def plain_linear(q, k, v, causal=True, chunk=64, normalise=False):
    """One query and one key at a time."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n, m = q.shape[-2], k.shape[-2]
    q, k, v = (np.broadcast_to(np.asarray(a, float), (*lead, *a.shape[-2:])) for a in (q, k, v))
    out = np.zeros((*lead, n, v.shape[-1]))
    for at in np.ndindex(*lead, n):
        weights = [float(q[at] @ k[at[:-1]][j]) for j in range(m) if not causal or j <= at[-1] + m - n]
        total = sum(weights)
        for j, weight in enumerate(weights):
            out[at] += weight * v[at[:-1]][j] / (total if normalise and total else 1)
    return (out,)


def any_chunk(call, rng):
    arguments = linear_inputs(rng, q=(2, 37, 4), k=(2, 40, 4))
    expected = plain_linear(**arguments)[0]
    for chunk in (1, 2, 16, 37, 1000):
        np.testing.assert_allclose(call(**arguments, chunk=chunk)[0], expected, rtol=1e-4, atol=1e-5)


def later_tokens(call, rng):
    """Nan in a key or value reaches the queries behind it, and no earlier one."""
    for name in ("k", "v"):
        arguments = linear_inputs(rng, q=(2, 9, 4), k=(2, 9, 4))
        expected = plain_linear(**arguments)[0]
        arguments[name] = arguments[name].copy()
        arguments[name][:, 5] = np.nan
        got = call(**arguments)[0]
        np.testing.assert_allclose(got[:, :5], expected[:, :5], rtol=1e-4, atol=1e-5)
        assert np.isnan(got[:, 5:]).all()


def one_key(call, rng):
    arguments = linear_inputs(rng, q=(3, 4), k=(1, 4), causal=False, normalise=True)
    np.testing.assert_allclose(call(**arguments)[0], np.broadcast_to(arguments["v"], (3, 6)), rtol=1e-5)


LINEAR = Triple(
    "linear_attention",
    linear.linear_attention_numpy,
    linear.linear_attention_torch,
    linear.linear_attention_cuda,
    linear_inputs,
    plain_linear,
    {
        "values without columns, normalised": dict(q=(3, 4), k=(7, 4), v=(7, 0), normalise=True),
        "no leading axes": dict(q=(5, 4), k=(7, 4)),
        "one query, one key": dict(q=(1, 4), k=(1, 4)),
        "as many queries as keys": dict(q=(2, 7, 4), k=(2, 7, 4)),
        "more queries than keys": dict(q=(2, 9, 4), k=(2, 4, 4)),
        "ragged tails, a chunk of 16": dict(q=(2, 19, 7), k=(2, 35, 7), d_v=3, chunk=16),
        "not causal": dict(causal=False),
        "normalised": dict(normalise=True),
        "normalised, not causal, more queries than keys": dict(q=(2, 9, 4), k=(2, 4, 4), causal=False, normalise=True),
        "normalised, some queries without a key": dict(q=(2, 9, 4), k=(2, 4, 4), normalise=True),
        "more queries than keys, a chunk of 2": dict(q=(2, 9, 4), k=(2, 4, 4), chunk=2),
        "more columns than a slice": dict(q=(1, 9, 3), k=(1, 9, 3), d_v=150),
        "keys shared by the batch": dict(q=(3, 5, 4), k=(1, 7, 4), v=(7, 2)),
        "values bring the batch": dict(q=(5, 4), k=(7, 4), v=(3, 7, 2)),
        "d_head of 1": dict(q=(2, 5, 1), k=(2, 7, 1)),
    },
    {
        "no keys": dict(q=(2, 3, 4), k=(2, 0, 4)),
        "no keys, not causal": dict(q=(2, 3, 4), k=(2, 0, 4), causal=False, normalise=True),
        "no queries": dict(q=(2, 0, 4), k=(2, 7, 4)),
        "no batch": dict(q=(0, 3, 4), k=(0, 7, 4)),
        "no batch, brought by k": dict(q=(1, 3, 4), k=(0, 7, 4)),
        "values without columns": dict(q=(3, 4), k=(7, 4), v=(7, 0)),
        "nothing at all": dict(q=(0, 4), k=(0, 4)),
    },
    ("q", "k", "v"),
    ("q",),
    {sentence: change for sentence, change in BAD_SHAPES.items()}
    | {"chunk must be a positive whole number": dict(chunk=0), "chunk must be a positive": dict(chunk=2.5)},
    nothing=lambda a: changed(a, k=lambda k: k[..., :0, :], v=lambda v: v[..., :0, :]),
    gradient=("q", "k", "v"),
    limits={
        "any chunk gives the same": any_chunk,
        "what comes later may be nan": later_tokens,
        "normalised, with one key it is its value": one_key,
    },
)

# ---- the selective scan ---------------------------------------------------------------------------------------------


def scan_inputs(rng, batch=2, n=7, channels=5, d_state=3, skip=True):
    drawn = {
        "x": normal(rng, batch, n, channels),
        "delta": np.abs(normal(rng, batch, n, channels)) / 2,
        "a": -np.abs(normal(rng, channels, d_state)),
        "b": normal(rng, batch, n, d_state),
        "c": normal(rng, batch, n, d_state),
    }
    return drawn | ({"d": normal(rng, channels)} if skip else {})


def plain_scan(x, delta, a, b, c, d=None):
    """Unrolled: each output as a sum over the tokens before it."""
    x, delta, a, b, c = (np.asarray(array, float) for array in (x, delta, a, b, c))
    y = np.zeros(x.shape) if d is None else x * d
    for t in range(x.shape[1]):
        for j in range(t + 1):
            fading = np.exp(delta[:, j + 1 : t + 1].sum(1)[..., None] * a)  # (batch, channels, d_state)
            y[:, t] += np.einsum("bds,bs,bs->bd", fading, b[:, j], c[:, t]) * delta[:, j] * x[:, j]
    return (y,)


def earlier_outputs(call, rng):
    arguments = scan_inputs(rng)
    expected = call(**arguments)[0]
    arguments["x"] = arguments["x"].copy()
    arguments["x"][0, 4, 2] = np.nan
    got = call(**arguments)[0]
    reached = np.zeros(got.shape, bool)
    reached[0, 4:, 2] = True
    np.testing.assert_array_equal(np.isnan(got), reached)
    np.testing.assert_allclose(got[~reached], expected[~reached], rtol=1e-5, atol=1e-6)


def no_decay_is_linear_attention(call, rng):
    """With a = 0 and steps of 1 the state is a sum: linear attention, c asks and b is the key."""
    arguments = scan_inputs(rng, skip=False)
    arguments |= {"delta": np.ones_like(arguments["delta"]), "a": np.zeros_like(arguments["a"])}
    expected = plain_linear(arguments["c"], arguments["b"], arguments["x"])[0]
    np.testing.assert_allclose(call(**arguments)[0], expected, rtol=1e-4, atol=1e-5)


SCAN = Triple(
    "selective_scan",
    linear.selective_scan_numpy,
    linear.selective_scan_torch,
    linear.selective_scan_cuda,
    scan_inputs,
    plain_scan,
    {
        "with a skip": {},
        "without a skip": dict(skip=False),
        "one of each": dict(batch=1, n=1, channels=1, d_state=1),
        "several tiles and blocks": dict(batch=2, n=37, channels=35, d_state=17),
        "one state": dict(n=20, d_state=1),
    },
    {
        "no tokens": dict(n=0),
        "no texts": dict(batch=0),
        "no channels": dict(channels=0),
        "no states": dict(d_state=0, skip=False),
    },
    ("x", "b", "c"),
    ("x",),
    {
        "x and a must have the axes (batch, seq, channels) and (channels, state)": dict(x=lambda x: x[0]),
        "delta must have shape (2, 7, 5)": dict(delta=lambda delta: delta[:, :6]),
        "a must have shape (5, 3)": dict(a=lambda a: a[:4]),
        "b must have shape (2, 7, 3)": dict(b=lambda b: b[..., :2]),
        "c must have shape (2, 7, 3)": dict(c=lambda c: c[:1]),
        "d must have shape (5,)": dict(d=lambda d: d[:3]),
        "x must hold real numbers": dict(x=lambda x: x > 0),
        "delta must hold real numbers": dict(delta=lambda delta: delta + 1j),
    },
    gradient=("x", "delta", "a", "b", "c"),
    limits={
        "nan reaches later outputs of its own channel": earlier_outputs,
        "without decay it is linear attention": no_decay_is_linear_attention,
    },
)
