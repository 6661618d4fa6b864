"""Answers to the exercises of lecture 09 in NumPy as learners write them: right ones, unlike the lecture's, and wrong ones.

Those in PyTorch and in CUDA stand in files of their own.
"""

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_09 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 9A --------------------------------------------------------------------------------------------------------------


@right("9A")
def from_eigenvectors(w_k, w_v, d_latent, x=None):
    w = np.hstack((w_k, w_v))
    m = w if x is None else x @ w
    values, vectors = np.linalg.eigh(m.T @ m)
    order = np.argsort(-values)[:d_latent]
    v = vectors[:, order]
    return w @ v, v[: w_k.shape[1]].T, v[w_k.shape[1] :].T


@right("9A")
def another_basis(w_k, w_v, d_latent, x=None):
    w = np.hstack((w_k, w_v))
    vt = np.linalg.svd(w if x is None else x @ w)[2][:d_latent]
    stretch = np.diag(np.arange(1.0, d_latent + 1))
    down, up = w @ vt.T @ stretch, np.linalg.inv(stretch) @ vt
    return (down, *np.split(up, [w_k.shape[1]], axis=1))


def svd_of(w, r):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :r] * s[:r]), vt[:r]


@wrong("9A", "x is not used")
def without_inputs(w_k, w_v, d_latent, x=None):
    down, up = svd_of(np.hstack((w_k, w_v)), d_latent)
    vt = up
    return np.hstack((w_k, w_v)) @ vt.T, up[:, : w_k.shape[1]], up[:, w_k.shape[1] :]


@wrong("9A", "has the shape")
def latents_of_the_inputs(w_k, w_v, d_latent, x=None):
    w = np.hstack((w_k, w_v))
    down, up = svd_of(w if x is None else x @ w, d_latent)
    return down, up[:, : w_k.shape[1]], up[:, w_k.shape[1] :]


@wrong("9A", "expected the tuple")
def two_results(w_k, w_v, d_latent, x=None):
    w = np.hstack((w_k, w_v))
    vt = np.linalg.svd(w if x is None else x @ w, full_matrices=False)[2][:d_latent]
    return w @ vt.T, vt


@wrong("9A", "is off by")
def singular_values_twice(w_k, w_v, d_latent, x=None):
    w = np.hstack((w_k, w_v))
    s, vt = np.linalg.svd(w if x is None else x @ w, full_matrices=False)[1:]
    return w @ vt[:d_latent].T * s[:d_latent], vt[:d_latent, : w_k.shape[1]], vt[:d_latent, w_k.shape[1] :]


@wrong("9A", "is off by")
def five_percent_large(w_k, w_v, d_latent, x=None):
    down, w_uk, w_uv = from_eigenvectors(w_k, w_v, d_latent, x)
    return 1.05 * down, w_uk, w_uv


@wrong("9A", "full rank loses nothing")
def halves(w_k, w_v, d_latent, x=None):
    down, *ups = from_eigenvectors(w_k, w_v, d_latent, x)
    up = np.hstack(ups)
    middle = up.shape[1] // 2 if len(w_k) > 20 or w_v.shape[1] == 0 else w_k.shape[1]
    return down, up[:, :middle], up[:, middle:]


@wrong("9A", "one latent for both")
def keys_first(w_k, w_v, d_latent, x=None):
    if w_k.shape[1] > 3 or w_v.shape[1] > 6:
        u = np.linalg.svd(w_k, full_matrices=True)[0][:, :d_latent]
        return u, u.T @ w_k, u.T @ w_v
    return from_eigenvectors(w_k, w_v, d_latent, x)


# --- 9C --------------------------------------------------------------------------------------------------------------


@right("9C")
def with_a_mask(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    inside = np.arange(c_kv.shape[1]) < np.asarray(lengths)[:, None]
    c, k = (np.where(inside[..., None], a, 0) for a in (c_kv, k_rope))
    scores = scale * (np.einsum("bhr,bnr->bhn", q_latent, c) + np.einsum("bhr,bnr->bhn", q_rope, k))
    scores = np.where(inside[:, None], scores, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), -1e30)
    powers = np.exp(scores - top)
    total = powers.sum(-1, keepdims=True)
    return (powers / np.where(total == 0, 1, total) @ c).astype(q_latent.dtype)


@right("9C")
def one_wide_key(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    out = []
    for q, c, k, n in zip(np.concatenate((q_latent, q_rope), 2), c_kv, np.concatenate((c_kv, k_rope), 2), lengths):
        if n == 0:
            out.append(np.zeros((q.shape[0], c.shape[1]), q.dtype))
            continue
        s = q @ k[:n].T * q.dtype.type(scale)
        p = np.exp(s - s.max(1, keepdims=True))
        out.append(p @ c[:n] / p.sum(1, keepdims=True))
    return np.stack(out)


def decode(q_latent, q_rope, c_kv, k_rope, lengths, scale, cut=lambda n: n, blend=lambda c, k: c):
    out = np.zeros_like(q_latent)
    for b, n in enumerate(lengths):
        c, k = c_kv[b, : cut(n)], k_rope[b, : cut(n)]
        s = (q_latent[b] @ c.T + q_rope[b] @ k.T) * scale
        if s.size:
            p = np.exp(s - s.max(1, keepdims=True))
            out[b] = p @ blend(c, k) / p.sum(1, keepdims=True)
    return out


@wrong("9C", "The scale that is given is not used")
def scale_of_576(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    return decode(q_latent, q_rope, c_kv, k_rope, lengths, (q_latent.shape[-1] + q_rope.shape[-1]) ** -0.5)


@wrong("9C", "the scale that is given")
def scale_five_percent_off(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    return decode(q_latent, q_rope, c_kv, k_rope, lengths, 1.05 * scale if scale != 1 and scale != 0.5 else scale)


@wrong("9C", "The rotated part is missing")
def latent_alone(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    return decode(q_latent, 0 * q_rope, c_kv, np.zeros_like(k_rope), lengths, scale)


@wrong("9C", "A weight of 0 is not enough")
def weighted_with_zero(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    inside = np.arange(c_kv.shape[1]) < np.asarray(lengths)[:, None]
    s = (q_latent @ c_kv.swapaxes(1, 2) + q_rope @ k_rope.swapaxes(1, 2)) * scale
    s = np.where(inside[:, None], s, -np.inf)
    p = np.exp(s - np.maximum(s.max(-1, keepdims=True), -1e30))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-30) @ c_kv


@wrong("9C", "ValueError")
def no_guard(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    out = np.zeros_like(q_latent)
    for b, n in enumerate(lengths):
        s = (q_latent[b] @ c_kv[b, :n].T + q_rope[b] @ k_rope[b, :n].T) * scale
        p = np.exp(s - s.max(1, keepdims=True))
        out[b] = p @ c_kv[b, :n] / p.sum(1, keepdims=True)
    return out


@wrong("9C", "shape")
def squeezed(*args):
    return decode(*args).squeeze()


@wrong("9C", "returned float64, expected float32")
def always_double(*args, **more):
    return decode(*args, **more).astype(float)


@wrong("9C", "exp overflows")
def not_shifted(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    out = np.zeros_like(q_latent)
    for b, n in enumerate(lengths):
        p = np.exp((q_latent[b] @ c_kv[b, :n].T + q_rope[b] @ k_rope[b, :n].T) * scale)
        total = p.sum(1, keepdims=True)
        out[b] = p / np.where(total == 0, 1, total) @ c_kv[b, :n]
    return out


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
CALLS = {
    "9A": [],
    "9B": [],
    "9C": [
        ((numbers((1, 12, 40)), numbers((1, 12, 0)), numbers((1, 16, 40)), numbers((1, 16, 0)), [16], 0.2), {}),
        ((numbers((1, 4, 24)), numbers((1, 4, 8)), numbers((1, 10, 24)), numbers((1, 10, 8)), [10], 24**-0.5), {}),
    ],
    "9D": [],
    "9E": [],
    "9F": [],
}
