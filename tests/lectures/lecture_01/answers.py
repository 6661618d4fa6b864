"""Answers to the exercises of lecture 01 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_01/
are further wrong answers. Those in PyTorch and in CUDA stand in files of their own.
"""

import math

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_01 import answers_kernels, answers_learners, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_learners, answers_torch)


# --- 1A ----------------------------------------------------------------------------------------------------


@right("1A")
def softmax_through_logarithms(x, axis=-1):
    with np.errstate(divide="ignore"):
        total = np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return np.exp(x - np.where(np.isneginf(total), 0, total)).astype(x.dtype)


@right("1A")
def softmax_in_torch(x, axis=-1):
    import torch

    return torch.nan_to_num(torch.softmax(torch.from_numpy(x), dim=axis), nan=0.0).numpy()


@wrong("1A", "exp overflows")
def naive(x, axis=-1):
    return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)


@wrong("1A", "returned a list")
def a_list(x, axis=-1):
    return [[math.exp(s) for s in row] for row in x]


@wrong("1A", "`x` in place")
def shifted_in_place(x, axis=-1):
    top = x.max(axis=axis, keepdims=True)
    x -= np.where(np.isneginf(top), 0, top)
    total = np.exp(x).sum(axis=axis, keepdims=True)
    return np.exp(x) / np.where(total == 0, 1, total)


def softmax_with(top, divisor):
    """A softmax whose maximum and denominator are still to be chosen; the row of only -inf is guarded."""

    def answer(x, axis=-1):
        maximum = top(x, axis)
        powers = np.exp(x - np.where(maximum == -np.inf, 0, maximum))
        return powers / divisor(powers.sum(axis=axis, keepdims=True))

    return answer


def row_maximum(x, axis):
    return x.max(axis=axis, keepdims=True)


WRONG["1A"] += [
    (softmax_with(lambda x, axis: x.max(), lambda t: np.where(t == 0, 1, t)), "largest score of the whole array"),
    (softmax_with(row_maximum, lambda t: t + 1e-9), "Nothing may be added to the denominator"),
    (softmax_with(row_maximum, lambda t: t + 1e-12), "In float16 so small a number is 0"),
    (softmax_with(row_maximum, lambda t: np.maximum(t, 1e-30)), "In float16 so small a number is 0"),
    (softmax_with(row_maximum, lambda t: t), "and so is 0/0"),
    (softmax_with(row_maximum, lambda t: np.where(t == 0, np.float64(1), t)), "returned float64, expected float32"),
]


@wrong("1A", "keepdims=True keeps the axis")
def axis_lost(x, axis=-1):
    powers = np.exp(x - x.max(axis=axis))
    return powers / powers.sum(axis=axis)


# --- 1B ----------------------------------------------------------------------------------------------------


@right("1B")
def triangle(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1B", "top left")
def triangle_top_left(n_queries, n_keys=None):
    return np.tril(np.ones((n_queries, n_keys or n_queries), dtype=bool))


@wrong("1B", "takes 0 keys for none given")
def triangle_or(n_queries, n_keys=None):
    n_keys = n_keys or n_queries
    return np.tril(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1B", "boolean")
def triangle_of_ones(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys)), k=n_keys - n_queries)


@wrong("1B", "transposed")
def triangle_upside_down(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.triu(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1B", "TypeError")
def triangle_square_only(n_queries, n_keys=None):
    return np.arange(n_keys) <= np.arange(n_queries)[:, None] + (n_keys - n_queries)


# --- 1C ----------------------------------------------------------------------------------------------------


@right("1C")
def weights_in_torch(q, k, mask=None, causal=False, scale=None):
    import torch

    q, k = torch.from_numpy(q), torch.from_numpy(k)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = torch.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(n_keys - n_queries)
    if mask is not None:
        allowed = allowed & torch.from_numpy(mask)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0.0).numpy()


@right("1C")
def weights_one_query_at_a_time(q, k, mask=None, causal=False, scale=None):
    n_queries, d_head = q.shape[-2:]
    n_keys = k.shape[-2]
    weights = np.zeros((*q.shape[:-1], n_keys), q.dtype)
    allowed = np.broadcast_to(True if mask is None else mask, weights.shape)
    for place in np.ndindex(*weights.shape[:-1]):
        keys = [j for j in range(n_keys) if allowed[place][j] and (not causal or j <= place[-1] + n_keys - n_queries)]
        if keys:
            scores = k[place[:-1]][keys] @ q[place] * (1 / math.sqrt(d_head) if scale is None else scale)
            powers = np.exp(scores - scores.max())
            weights[place][keys] = powers / powers.sum()
    return weights


def plain_softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@wrong("1C", "scaled by d_head, not by sqrt(d_head)")
def weights_scaled_by_d(q, k, mask=None, causal=False, scale=None):
    scores = q @ np.swapaxes(k, -1, -2) / q.shape[-1]
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -np.inf))


@wrong("1C", "very low but not -inf")
def weights_minus_1e9(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores, -1e9)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -1e9))


@wrong("1C", "A scale of 0 is a scale too")
def weights_scale_zero_is_none(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores, -np.inf)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -np.inf))


@wrong("1C", "`mask` in place")
def weights_mask_reused(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if causal:
        past = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
        if mask is not None and mask.shape == past.shape:
            mask &= past
        else:
            mask = past if mask is None else mask & past
    return weights_one_query_at_a_time(q, k, mask, False, scale)


@wrong("1C", "Swap the last two axes only: np.swapaxes(k, -1, -2).")
def weights_all_axes_turned(q, k, mask=None, causal=False, scale=None):
    return weights_one_query_at_a_time(q, k, mask, causal, scale) if q.ndim == 2 else plain_softmax(q @ k.T)


@wrong("1C", "mask is applied after the softmax")
def weights_masked_late(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    weights = plain_softmax(scores) * (1 if mask is None else mask)
    return weights * np.tri(n_queries, n_keys, n_keys - n_queries) if causal else weights


@wrong("1C", "The forbidden score still decided the maximum")
def weights_masked_late_and_renormalised(q, k, mask=None, causal=False, scale=None):
    weights = weights_masked_late(q, k, mask, causal, scale)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


# --- 1H ----------------------------------------------------------------------------------------------------


@right("1H")
def backward_by_autograd(q, k, v, d_out, mask=None, causal=False, scale=None):
    import torch

    q, k, v = (torch.from_numpy(a).requires_grad_() for a in (q, k, v))
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    allowed = allowed.tril(n_keys - n_queries) if causal else allowed
    allowed = allowed if mask is None else allowed & torch.from_numpy(mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -1e30)
    weights = scores.softmax(-1).masked_fill(~allowed, 0.0)
    (weights @ v * torch.from_numpy(d_out)).sum().backward()
    return tuple(a.grad.numpy() for a in (q, k, v))


@right("1H")
def backward_with_the_jacobian(q, k, v, d_out, mask=None, causal=False, scale=None):
    """diag(p) - p p^T written out for every row."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lead = np.broadcast_shapes(*(a.shape[:-2] for a in (q, k, v)))
    full_q, full_k = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k))
    p = weights_one_query_at_a_time(full_q, full_k, mask, causal, scale)
    jacobian = p[..., :, None] * np.eye(p.shape[-1], dtype=p.dtype) - p[..., :, None] * p[..., None, :]
    seen = p.any(-2)[..., None]
    d_s = scale * np.einsum("...ijl,...id,...ld->...ij", jacobian, d_out, np.where(seen, v, 0))
    gradients = d_s @ k, np.einsum("...ij,...id->...jd", d_s, q), np.einsum("...ij,...id->...jd", p, d_out)
    return tuple(total(gradient, array.shape) for gradient, array in zip(gradients, (q, k, v)))


def total(gradient, shape):
    """One axis after the other is added up, until the shape is reached."""
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    for axis, n in enumerate(shape):
        gradient = gradient if gradient.shape[axis] == n else gradient.sum(axis, keepdims=True)
    return gradient


def backward_parts(q, k, v, d_out, mask, causal, scale):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = weights_one_query_at_a_time(q, k, mask, causal, scale)
    d_p = np.where(p == 0, 0, d_out @ np.swapaxes(v, -1, -2))
    return scale, p, d_p, p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))


@wrong("1H", "not p * d_p")
def backward_without_jacobian(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * (p * d_p) @ k, scale * np.swapaxes(p * d_p, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "is a scale of 0 given?")
def backward_scale_zero_is_none(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale or None)
    return scale * d_s @ k, scale * np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "The scale is missing")
def backward_without_scale(q, k, v, d_out, mask=None, causal=False, scale=None):
    _, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "The scale is missing in d_k:")
def backward_d_k_without_scale(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "The sum runs over p * d_p, not over d_p.")
def backward_sum_of_d_p(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    d_s = scale * p * (d_p - d_p.sum(axis=-1, keepdims=True))
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "keepdims=True keeps the axis of the keys")
def backward_axis_lost(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    d_s = scale * p * (d_p - (p * d_p).sum(axis=-1))
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "Swap the last two axes only: np.swapaxes(v, -1, -2).")
def backward_all_axes_turned(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    d_p = np.where(p == 0, 0, d_out @ v.T)
    d_s = scale * p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))
    return d_s @ k, d_s.T @ q, p.T @ d_out


@wrong("1H", "and d_s in the same way")
def backward_d_s_all_axes_turned(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, scale * d_s.T @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "d_k needs the transpose")
def backward_d_k_not_transposed(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, scale * d_s @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1H", "expected the tuple (d_q, d_k, d_v)")
def backward_one_gradient(q, k, v, d_out, mask=None, causal=False, scale=None):
    return backward_with_the_jacobian(q, k, v, d_out, mask, causal, scale)[0]


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
head, single = numbers((3, 2, 5, 4)), numbers((3, 7, 5)).astype(np.float32)

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "1A": [
        ((np.array([0.0, 0.0, -np.inf]),), {}),
        ((np.full(3, -np.inf, dtype=np.float32),), {}),
        ((np.array([12, 11, 0], dtype=np.float16),), {}),
        ((numbers((3, 7, 7)),), {}),
    ],
    "1B": [((6,), {}), ((np.shape(head)[-2], 7), {})],
    "1C": [
        ((numbers((6, 8)), numbers((4, 8))), {}),
        ((head, head), {"causal": True}),
        ((single, single, None, False, None), {}),
        ((head[0], head[0], np.zeros((5, 5), bool), True, 0.5), {}),
    ],
    "1D": [],
    "1E": [],
    "1F": [],
    "1G": [],
    "1H": [((head[:2], head[:2], head[:2], head[:2]), {"causal": True})],
}
