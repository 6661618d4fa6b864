"""Answers to the exercises of lecture 11 in NumPy as learners write them: right ones, unlike the lecture's, and wrong ones.

Those in PyTorch and in CUDA stand in files of their own.
"""

import numpy as np

from attention.fundamentals import attention_numpy, attention_weights
from attention.grouped_query import grouped_query_attention_numpy
from tests.lectures.collect import collect
from tests.lectures.lecture_11 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 11A -------------------------------------------------------------------------------------------------------------


@right("11A")
def two_attentions(q1, k1, q2, k2, v, lam, causal=False):
    first, second = attention_numpy(q1, k1, v, causal=causal), attention_numpy(q2, k2, v, causal=causal)
    return (first - np.reshape(lam, (-1, 1, 1)) * second).reshape(first.shape).astype(q1.dtype)


@right("11A")
def maps_stacked(q1, k1, q2, k2, v, lam, causal=False):
    both = attention_weights(np.stack([q1, q2]), np.stack([k1, k2]), causal=causal)
    lam = np.asarray(lam)
    lam = lam[:, None, None] if lam.ndim else lam
    return ((both[0] - lam * both[1]) @ v).astype(q1.dtype)


@wrong("11A", "has to be subtracted")
def added(q1, k1, q2, k2, v, lam, causal=False):
    return two_attentions(q1, k1, q2, k2, v, -np.asarray(lam), causal)


@wrong("11A", "There is one softmax")
def one_softmax(q1, k1, q2, k2, v, lam, causal=False):
    lam = np.asarray(lam, q1.dtype)[..., None, None]
    q, k = np.concatenate([q1, -lam * q2], -1), np.concatenate([k1, k2], -1)
    return attention_numpy(q, k, v, causal=causal, scale=q1.shape[-1] ** -0.5)


@wrong("11A", "both maps are causal")
def causal_once(q1, k1, q2, k2, v, lam, causal=False):
    lam = np.asarray(lam, q1.dtype)[..., None, None]
    return attention_numpy(q1, k1, v, causal=causal) - lam * attention_numpy(q2, k2, v)


@wrong("11A", "sum to 1 - lam")
def renormalised(q1, k1, q2, k2, v, lam, causal=False):
    lam = np.asarray(lam, q1.dtype)[..., None, None]
    w = attention_weights(q1, k1, causal=causal) - lam * attention_weights(q2, k2, causal=causal)
    total = w.sum(-1, keepdims=True)
    return w / np.where(total == 0, 1, total) @ v


@wrong("11A", "Which axes of (heads, n_queries, n_keys)")
def lam_by_queries(q1, k1, q2, k2, v, lam, causal=False):
    first, second = attention_numpy(q1, k1, v, causal=causal), attention_numpy(q2, k2, v, causal=causal)
    return first - np.asarray(lam, q1.dtype).mean() * second


@wrong("11A", "float")
def in_double(q1, k1, q2, k2, v, lam, causal=False):
    return two_attentions(*(a.astype(float) for a in (q1, k1, q2, k2, v)), lam, causal)


@wrong("11A", "The difference is multiplied by 1 - lam")
def with_a_factor(q1, k1, q2, k2, v, lam, causal=False):
    factor = 1 - np.asarray(lam, q1.dtype)[..., None, None]
    return factor * two_attentions(q1, k1, q2, k2, v, lam, causal)


@wrong("11A", "lambda may be above 1")
def clipped(q1, k1, q2, k2, v, lam, causal=False):
    return two_attentions(q1, k1, q2, k2, v, np.clip(lam, 0, 1), causal)


@wrong("11A", "lambda times")
def scale_five_percent_off(q1, k1, q2, k2, v, lam, causal=False):
    lam = np.asarray(lam, q1.dtype)[..., None, None]
    scale = 1.05 * q1.shape[-1] ** -0.5
    return attention_numpy(q1, k1, v, causal=causal, scale=scale) - lam * attention_numpy(
        q2, k2, v, causal=causal, scale=scale
    )


@wrong("11A", "any axes in front")
def three_axes_only(q1, k1, q2, k2, v, lam, causal=False):
    out = np.zeros((*q1.shape[:2], v.shape[-1]), q1.dtype)
    for head in range(len(q1)):
        own = lam if np.ndim(lam) == 0 else lam[head]
        for q, k, share in ((q1, k1, 1), (q2, k2, -own)):
            out[head] += (share * attention_numpy(q[head], k[head], v[head], causal=causal)).astype(q1.dtype)
    return out


@wrong("11A", "do not overflow")
def not_shifted(q1, k1, q2, k2, v, lam, causal=False):
    lam, maps = np.asarray(lam, q1.dtype)[..., None, None], []
    for q, k in ((q1, k1), (q2, k2)):
        with np.errstate(all="ignore"):
            p = np.exp(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
            n, m = p.shape[-2:]
            p = np.where(np.tri(n, m, m - n, dtype=bool), p, 0) if causal else p
            total = p.sum(-1, keepdims=True)
            maps.append(p / np.where(total == 0, 1, total))
    return ((maps[0] - lam * maps[1]) @ v).astype(q1.dtype)


# --- 11D -------------------------------------------------------------------------------------------------------------


def logistic(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def refuse(q, k):
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3] or q.shape[-3] // k.shape[-3] % 2:
        raise ValueError("a group cuts a pair")


@right("11D")
def two_calls(q, k, v, logits):
    refuse(q, k)
    share = q.shape[-3] // k.shape[-3] // 2
    k, v = (np.repeat(a, share, axis=-3) for a in (k, v))
    first, second = (attention_numpy(q[..., start::2, :, :], k, v, causal=True) for start in (0, 1))
    return first - (logistic(logits)[..., None] * second).astype(q.dtype)


@right("11D")
def reshaped(q, k, v, logits):
    refuse(q, k)
    heads = grouped_query_attention_numpy(q, k, v, causal=True)
    heads = heads.reshape(*heads.shape[:-3], -1, 2, *heads.shape[-2:])
    signs = np.stack([np.ones_like(logits), -logistic(logits)], axis=-2).astype(q.dtype)
    return (heads * signs[..., None]).sum(-3)


def paired(q, k, v, logits, lam=logistic, halves=False):
    refuse(q, k)
    heads = grouped_query_attention_numpy(q, k, v, causal=True)
    n = heads.shape[-3] // 2
    first, second = (
        (heads[..., :n, :, :], heads[..., n:, :, :]) if halves else (heads[..., ::2, :, :], heads[..., 1::2, :, :])
    )
    return first - lam(logits)[..., None].astype(q.dtype) * second


@wrong("11D", "The first head is multiplied by 1 - lambda")
def shares(q, k, v, logits):
    refuse(q, k)
    heads, lam = grouped_query_attention_numpy(q, k, v, causal=True), logistic(logits)[..., None].astype(q.dtype)
    return (1 - lam) * heads[..., ::2, :, :] - lam * heads[..., 1::2, :, :]


@wrong("11D", "inside one group")
def by_halves(q, k, v, logits):
    return paired(q, k, v, logits, halves=True)


@wrong("11D", "The sigmoid is missing")
def no_sigmoid(q, k, v, logits):
    return paired(q, k, v, logits, lam=lambda x: x)


@wrong("11D", "do not overflow")
def plain_sigmoid(q, k, v, logits):
    def lam(x):
        with np.errstate(all="ignore"):
            return np.exp(x) / (1 + np.exp(x))

    return paired(q, k, v, logits, lam=lam)


@wrong("11D", "a lambda for each token and head")
def one_lambda_a_head(q, k, v, logits):
    return paired(q, k, v, np.broadcast_to(logits.mean(-1, keepdims=True), logits.shape))


@wrong("11D", "the float type of q")
def in_double_precision(q, k, v, logits):
    return paired(*(a.astype(float) for a in (q, k, v, logits)))


@wrong("11D", "is refused")
def takes_everything(q, k, v, logits):
    share = -(-q.shape[-3] // k.shape[-3])
    k, v = (np.repeat(a, share, axis=-3)[..., : q.shape[-3], :, :] for a in (k, v))
    heads = attention_numpy(q, k, v, causal=True)
    return heads[..., 0::2, :, :] - logistic(logits)[..., None].astype(q.dtype) * heads[..., 1::2, :, :]


@wrong("11D", "all at once")
def four_axes_at_most(q, k, v, logits):
    refuse(q, k)
    return paired(q, k, v, logits[:, ::-1] if q.ndim > 4 else logits)


# --- 11E -------------------------------------------------------------------------------------------------------------


@right("11E")
def against_two_attentions(heads):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(1, 8, 4, 5)), rng.normal(size=(1, 2, 6, 5)), rng.normal(size=(1, 2, 6, 5))
    logits = 2 * rng.normal(size=(1, 4, 4))
    np.testing.assert_allclose(heads(q, k, v, logits), two_calls(q, k, v, logits), atol=1e-9)


@wrong("11E", "finds: paired by halves")
def one_pair(heads):
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(1, 2, 4, 5)), rng.normal(size=(1, 1, 6, 5)), rng.normal(size=(1, 1, 6, 5))
    logits = rng.normal(size=(1, 1, 4))
    np.testing.assert_allclose(heads(q, k, v, logits), two_calls(q, k, v, logits), atol=1e-9)


@wrong("11E", "finds: no sigmoid")
def shapes_only(heads):
    q, k = np.zeros((1, 8, 4, 5)), np.zeros((1, 2, 6, 5))
    assert heads(q, k, k, np.zeros((1, 4, 4))).shape == (1, 4, 4, 5)


@wrong("11E", "finds: one lambda for all tokens of a head")
def even_lambda(heads):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(1, 8, 4, 5)), rng.normal(size=(1, 2, 6, 5)), rng.normal(size=(1, 2, 6, 5))
    logits = np.ones((1, 4, 4))
    np.testing.assert_allclose(heads(q, k, v, logits), two_calls(q, k, v, logits), atol=1e-9)


@wrong("11E", "finds: the mask starts at the top left")
def square(heads):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(1, 8, 6, 5)), rng.normal(size=(1, 2, 6, 5)), rng.normal(size=(1, 2, 6, 5))
    logits = 2 * rng.normal(size=(1, 4, 6))
    np.testing.assert_allclose(heads(q, k, v, logits), two_calls(q, k, v, logits), atol=1e-9)


@wrong("11E", "finds: not scaled")
def even_maps(heads):
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(1, 8, 4, 5)), np.zeros((1, 2, 6, 5)), rng.normal(size=(1, 2, 6, 5))
    logits = rng.normal(size=(1, 4, 4))
    np.testing.assert_allclose(heads(q, k, v, logits), two_calls(q, k, v, logits), atol=1e-9)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


CALLS = {
    "11A": [((numbers((1, 1, 8)), numbers((1, 30, 8)), numbers((1, 1, 8), 1), numbers((1, 30, 8), 1), numbers((1, 30, 16)), 0.8), {})],
    "11B": [],
    "11C": [],
    "11D": [((numbers((4, 1, 2)), np.zeros((2, 5, 2)), numbers((2, 5, 2)), np.zeros((2, 1))), {})],
    "11E": [],
    "11F": [],
}  # fmt: skip
