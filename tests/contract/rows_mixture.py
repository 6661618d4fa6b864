"""The row of lecture 12 in the table of triples: a mixture of attention experts."""

import numpy as np

from attention import mixture
from tests.contract.triples import Triple, changed, normal, plain_attention


def mixture_inputs(rng, x=(2, 7, 6), n_experts=4, d_head=3, top_k=2, **more):
    d_model = x[-1]
    shapes = {"w_router": (d_model, n_experts), "w_q": (n_experts, d_model, d_head), "w_k": (d_model, d_head)}
    shapes |= {"w_v": (d_model, d_head), "w_o": (n_experts, d_head, d_model)}
    weights = {name: normal(rng, *shape) / 2 for name, shape in shapes.items()}
    return {"x": normal(rng, *x)} | weights | {"top_k": top_k} | more


def plain_mixture(x, w_router, w_q, w_k, w_v, w_o, top_k, causal=False):
    """All experts for all tokens, with gates that are 0 where a token did not choose."""
    x, w_router, w_q, w_k, w_v, w_o = (np.asarray(a, float) for a in (x, w_router, w_q, w_k, w_v, w_o))
    logits, gates = x @ w_router, np.zeros((*x.shape[:-1], len(w_q)))
    for at in np.ndindex(x.shape[:-1]):
        chosen = sorted(range(len(w_q)), key=lambda e: (-logits[at][e], e))[:top_k]
        powers = np.exp(logits[at][chosen] - logits[at][chosen].max())
        gates[at][chosen] = powers / powers.sum()
    out = np.zeros(x.shape)
    for expert in range(len(w_q)):
        heads = plain_attention(x @ w_q[expert], x @ w_k, x @ w_v, None, causal)[0]
        out += gates[..., expert, None] * (heads @ w_o[expert])
    return (out,)


def unseen(arguments):
    """Nobody chooses expert 1, and its weights are nan."""
    new = changed(arguments, x=np.abs, w_router=np.abs, w_q=np.copy, w_o=np.copy)
    new["w_router"][:, 1] = -1.0
    new["w_q"][1] = new["w_o"][1] = np.nan
    return new


def one_expert(call, rng):
    arguments = mixture_inputs(rng, n_experts=1, top_k=1)
    x, (w_q, w_o) = arguments["x"], (arguments[name][0] for name in ("w_q", "w_o"))
    expected = plain_attention(x @ w_q, x @ arguments["w_k"], x @ arguments["w_v"])[0] @ w_o
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5 * np.abs(expected).max())


def equal_logits(call, rng):
    arguments = mixture_inputs(rng)
    arguments["w_router"][:] = 0
    first = changed(arguments, w_router=lambda w: w[:, :2], w_q=lambda w: w[:2], w_o=lambda w: w[:2])
    np.testing.assert_allclose(call(**arguments)[0], call(**first)[0], atol=1e-6)


def nan_behind_the_diagonal(call, rng):
    arguments = mixture_inputs(rng, x=(9, 6), causal=True)
    expected = call(**arguments)[0]
    arguments["x"][5] = np.nan
    found = call(**arguments)[0]
    np.testing.assert_allclose(found[:5], expected[:5], atol=1e-5)
    assert np.isnan(found[5:]).all()


MIXTURE = Triple(
    "mixture_attention",
    mixture.mixture_attention_numpy,
    mixture.mixture_attention_torch,
    mixture.mixture_attention_cuda,
    mixture_inputs,
    plain_mixture,
    {
        "no leading axes": dict(x=(7, 6)),
        "two leading axes": dict(x=(2, 2, 5, 6), causal=True),
        "top 1": dict(top_k=1),
        "all experts": dict(top_k=4, causal=True),
        "causal, ragged": dict(x=(2, 35, 7), n_experts=5, d_head=33, top_k=3, causal=True),
        "one token": dict(x=(1, 1, 6)),
    },
    {
        "no tokens": dict(x=(2, 0, 6)),
        "no batch": dict(x=(0, 7, 6)),
        "no width": dict(x=(2, 3, 0)),
    },
    ("x", "w_router", "w_q", "w_k", "w_o", "w_v"),
    ("x",),
    {
        "w_router must have shape": dict(w_router=lambda w: w[:3]),
        "w_o must have shape": dict(w_o=lambda w: w[:3]),
        "w_k must have shape": dict(w_k=lambda w: w[:, :2]),
        "x must have at least two axes": dict(x=lambda x: x[0, 0]),
        "w_v must hold real numbers": dict(w_v=lambda w: w > 0),
        "top_k must be a whole number from 1 to 4": dict(top_k=5),
    },
    unseen,
    gradient=("x", "w_router", "w_q", "w_k", "w_v", "w_o"),
    limits={
        "one expert is attention between projections": one_expert,
        "of equal logits the first experts": equal_logits,
        "nan behind the diagonal": nan_behind_the_diagonal,
    },
)
