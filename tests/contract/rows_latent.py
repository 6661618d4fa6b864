"""The row of lecture 09: one query a head and a cache of latents."""

import numpy as np

from attention import latent
from tests.contract.triples import Triple, changed, normal, plain_attention


def latent_inputs(rng, batch=3, heads=2, capacity=9, d_latent=4, d_rope=3, lengths=(9, 4, 0), scale=0.4):
    queries = {"q_latent": normal(rng, batch, heads, d_latent), "q_rope": normal(rng, batch, heads, d_rope)}
    caches = {"c_kv": normal(rng, batch, capacity, d_latent), "k_rope": normal(rng, batch, capacity, d_rope)}
    return queries | caches | {"lengths": np.array(lengths, np.int64), "scale": scale}


def plain_latent(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """Attention to the latent with the rotated key behind it; the value is the latent."""
    out, q = np.zeros(q_latent.shape), np.concatenate([q_latent, q_rope], axis=-1)
    for row, length in enumerate(lengths):
        keys = np.concatenate([c_kv[row, :length], k_rope[row, :length]], axis=-1)
        out[row] = plain_attention(q[row], keys, c_kv[row, :length], scale=scale)[0]
    return (out,)


def behind_the_lengths(arguments):
    new = changed(arguments, c_kv=np.copy, k_rope=np.copy)
    for row, length in enumerate(arguments["lengths"]):
        new["c_kv"][row, length:] = new["k_rope"][row, length:] = np.nan
    return new


def expanded(call, rng):
    """Keys and values of each head, made from the latent, give the same: absorbed MLA is expanded MLA."""
    arguments = latent_inputs(rng, heads=3, lengths=(9, 9, 9))
    w_uk, w_uv, q = normal(rng, 3, 4, 5), normal(rng, 3, 4, 6), normal(rng, 3, 3, 5)
    arguments["q_latent"] = np.einsum("bhd,hrd->bhr", q, w_uk)
    keys, values = (np.einsum("bnr,hrd->bhnd", arguments["c_kv"], w) for w in (w_uk, w_uv))
    turned = np.broadcast_to(arguments["k_rope"][:, None], (3, 3, 9, 3))
    q, keys = (np.concatenate(pair, axis=-1) for pair in ((q, arguments["q_rope"]), (keys, turned)))
    wanted = plain_attention(q[:, :, None], keys, values, scale=0.4)[0][:, :, 0]
    got = np.einsum("bhr,hrd->bhd", call(**arguments)[0], w_uv)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


LATENT = Triple(
    "latent_decode_attention",
    latent.latent_decode_attention_numpy,
    latent.latent_decode_attention_torch,
    latent.latent_decode_attention_cuda,
    latent_inputs,
    plain_latent,
    {
        "lengths of 9, 4 and 0": {},
        "one head, one row": dict(batch=1, heads=1, capacity=1, lengths=(1,)),
        "more than one split": dict(batch=2, capacity=300, d_latent=5, lengths=(300, 129)),
        "more splits than rows or columns": dict(batch=1, heads=1, capacity=600, d_latent=2, lengths=(600,)),
        "more columns than a warp": dict(batch=1, d_latent=37, d_rope=9, lengths=(8,)),
        "no rotated columns": dict(d_rope=0),
        "a scale of 0": dict(scale=0.0),
    },
    {
        "no room": dict(capacity=0, lengths=(0, 0, 0)),
        "no rows": dict(batch=0, lengths=()),
        "no heads": dict(heads=0),
    },
    ("q_latent", "q_rope", "c_kv", "k_rope"),
    ("q_latent",),
    {
        "q_latent must be (batch, heads, d_latent)": dict(q_latent=lambda q: q[0]),
        "q_rope must be (batch, heads, d_rope)": dict(q_rope=lambda q: q[:, :1]),
        "c_kv must be (3, capacity, 4)": dict(c_kv=lambda c: c[..., :3]),
        "k_rope must be (3, capacity, 3)": dict(k_rope=lambda k: k[:2]),
        "c_kv and k_rope must have the same capacity": dict(k_rope=lambda k: k[:, :5]),
        "lengths must be integers, got float64": dict(lengths=lambda x: x + 0.5),
        "lengths must be (3,), one for each row of q_latent": dict(lengths=lambda x: x[:2]),
        "lengths must lie between 0 and": dict(lengths=lambda x: x - 1),
        "q_latent must hold real numbers": dict(q_latent=lambda q: q > 0),
        "c_kv must hold real numbers": dict(c_kv=lambda c: c + 1j),
    },
    behind_the_lengths,
    lambda a: changed(a, lengths=np.zeros(3, np.int64)),
    ("q_latent", "q_rope", "c_kv", "k_rope"),
    {"absorbed is expanded": expanded},
)
