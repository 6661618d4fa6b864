"""Lecture 09: a test of a decode step, tried on right ones and on steps with one bug each."""

import math

import numpy as np

from utils.judge.bug import bug

MODULE = "latent"


def step(
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *, columns=lambda q, r, c: q + r, rope=1.0, turned=False, axis=-1,
    shift=True, up=None, past=0, mixed=False,
):  # fmt: skip
    """A decode step with a place for each bug, in what follows the `*`; as it stands, it is right."""
    c_kv, k_rope = c_kv[past:], k_rope[past:]
    keys = np.einsum("nr,hrd->hnd", c_kv, w_uk[::-1] if turned else w_uk)
    scores = np.einsum("hd,hnd->hn", q_nope, keys) + rope * (q_rope[::-1] if mixed else q_rope) @ k_rope.T
    scores = scores / math.sqrt(columns(q_nope.shape[-1], q_rope.shape[-1], c_kv.shape[-1]))
    with np.errstate(all="ignore"):
        powers = np.exp(scores - (scores.max(axis=axis, keepdims=True) if shift else 0))
        weights = powers / powers.sum(axis=axis, keepdims=True)
    return np.einsum("hn,nr,hrd->hd", weights, c_kv, w_uv[::-1] if up else w_uv)


@bug("9D", MODULE, subject="decode", importance="useful")
def test_latent_decode(decode):
    rng = np.random.default_rng(1)
    for size in (1.0, 1e3):
        arrays = [rng.standard_normal(s) for s in ((4, 5), (4, 2), (6, 9), (6, 2), (4, 9, 5), (4, 9, 3))]
        arrays[0], arrays[1] = size * arrays[0], size * arrays[1]
        assert np.allclose(decode(*arrays), step(*arrays), rtol=1e-7, atol=1e-7)


@test_latent_decode.right
def _(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
    return step(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv)


@test_latent_decode.right
def _(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
    """Absorbed, one head at a time."""
    out = []
    for h in range(len(q_nope)):
        scores = (c_kv @ (w_uk[h] @ q_nope[h]) + k_rope @ q_rope[h]) * (len(q_nope[h]) + len(q_rope[h])) ** -0.5
        powers = np.exp(scores - scores.max())
        out.append((powers / powers.sum()) @ c_kv @ w_uv[h])
    return np.stack(out)


SCALES = "How much do the weights of your inputs differ? With even weights no scale shows."
MUTANTS = {
    "the scale is 1/sqrt(d_latent + d_rope)": ({"columns": lambda q, r, c: c + r}, SCALES),
    "the scale is 1/sqrt(d_head)": ({"columns": lambda q, r, c: q}, SCALES),
    "the scale is 5 percent too small": ({"columns": lambda q, r, c: 1.1025 * (q + r)}, SCALES),
    "the rotated part is missing": ({"rope": 0.0}, "Are q_rope and k_rope of your inputs large enough to matter?"),
    "the heads of W_UK are in the wrong order": ({"turned": True}, "Is each head compared, with weights of its own?"),
    "the heads of W_UV are in the wrong order": ({"up": True}, "Is each head compared, with weights of its own?"),
    "the rotated queries are those of other heads": ({"mixed": True}, "Has each head a q_rope of its own?"),
    "the softmax runs over the heads": ({"axis": 0}, "What is the output when all latents are the same?"),
    "the first token is never seen": ({"past": 1}, "Does every token of your cache change the output?"),
    "large scores overflow": ({"shift": False}, "Has your test scores of 1000 and more?"),
}


for name, (changes, hint) in MUTANTS.items():

    def wrong(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, changes=changes):
        return step(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, **changes)

    test_latent_decode.mutant(name, hint=hint)(wrong)
