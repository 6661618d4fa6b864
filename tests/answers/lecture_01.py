"""Answers to the exercises of lecture 01 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/checks/lecture_01.py
are further wrong answers.
"""

import math

import numpy as np

RIGHT, WRONG = {}, {}


def right(number):
    def add(answer):
        RIGHT.setdefault(number, []).append(answer)
        return answer

    return add


def wrong(number, words):
    def add(answer):
        WRONG.setdefault(number, []).append((answer, words))
        return answer

    return add


# --- 1.1 -------------------------------------------------------------------------------------------------------------


@right("1.1")
def softmax_through_logarithms(x, axis=-1):
    with np.errstate(divide="ignore"):
        total = np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return np.exp(x - np.where(np.isneginf(total), 0, total)).astype(x.dtype)


@right("1.1")
def softmax_in_torch(x, axis=-1):
    import torch

    return torch.nan_to_num(torch.softmax(torch.from_numpy(x), dim=axis), nan=0.0).numpy()


@wrong("1.1", "exp overflows")
def naive(x, axis=-1):
    return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)


@wrong("1.1", "returned a list")
def a_list(x, axis=-1):
    return [[math.exp(s) for s in row] for row in x]


@wrong("1.1", "`x` in place")
def shifted_in_place(x, axis=-1):
    top = x.max(axis=axis, keepdims=True)
    x -= np.where(np.isneginf(top), 0, top)
    total = np.exp(x).sum(axis=axis, keepdims=True)
    return np.exp(x) / np.where(total == 0, 1, total)


# --- 1.2 -------------------------------------------------------------------------------------------------------------


@right("1.2")
def additive_one_product(q, k, w_q, w_k, v):
    """tanh(W [q; k]) with the two matrices stacked."""
    n_queries, n_keys = len(q), len(k)
    both = np.concatenate([np.repeat(q, n_keys, axis=0), np.tile(k, (n_queries, 1))], axis=1)
    return (np.tanh(both @ np.concatenate([w_q, w_k])) @ v).reshape(n_queries, n_keys)


@wrong("1.2", "returned the shape (2, 2, 2), expected (2, 2)")
def additive_sum_forgotten(q, k, w_q, w_k, v):
    return np.tanh((q @ w_q)[:, None] + (k @ w_k)[None]) * v


@wrong("1.2", "ValueError in line")
def additive_no_broadcasting(q, k, w_q, w_k, v):
    return np.tanh(q @ w_q + k @ w_k) @ v


@wrong("1.2", "tanh is missing")
def additive_linear(q, k, w_q, w_k, v):
    return (q @ w_q @ v)[:, None] + (k @ w_k @ v)[None, :]


# --- 1.3 -------------------------------------------------------------------------------------------------------------


@right("1.3")
def triangle(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1.3", "top left")
def triangle_top_left(n_queries, n_keys=None):
    return np.tril(np.ones((n_queries, n_keys or n_queries), dtype=bool))


@wrong("1.3", "boolean")
def triangle_of_ones(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys)), k=n_keys - n_queries)


@wrong("1.3", "transposed")
def triangle_upside_down(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.triu(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1.3", "TypeError")
def triangle_square_only(n_queries, n_keys=None):
    return np.arange(n_keys) <= np.arange(n_queries)[:, None] + (n_keys - n_queries)


# --- 1.4 -------------------------------------------------------------------------------------------------------------


@right("1.4")
def padding_by_counting(lengths, n_keys):
    ones = [[1] * int(length) + [0] * (n_keys - int(length)) for length in lengths]
    return np.array(ones, dtype=bool).reshape(-1, 1, 1, n_keys)


@wrong("1.4", "<, not <=")
def padding_inclusive(lengths, n_keys):
    return (np.arange(n_keys) <= lengths[:, None])[:, None, None]


@wrong("1.4", "two axes of length 1")
def padding_two_axes(lengths, n_keys):
    return np.arange(n_keys)[None] < lengths[:, None]


@wrong("1.4", "returned the shape (2, 4, 1, 1), expected (2, 1, 1, 4)")
def padding_axes_at_the_end(lengths, n_keys):
    return (np.arange(n_keys)[None] < lengths[:, None])[:, :, None, None]


# --- 1.5 -------------------------------------------------------------------------------------------------------------


@right("1.5")
def weights_in_torch(q, k, mask=None, causal=False, scale=None):
    import torch

    q, k = torch.from_numpy(q), torch.from_numpy(k)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = torch.einsum("...id,...jd->...ij", q, k) * (scale or q.shape[-1] ** -0.5)
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(n_keys - n_queries)
    if mask is not None:
        allowed = allowed & torch.from_numpy(mask)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0.0).numpy()


@right("1.5")
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


@wrong("1.5", "scaled by d_head, not by sqrt(d_head)")
def weights_scaled_by_d(q, k, mask=None, causal=False, scale=None):
    scores = q @ np.swapaxes(k, -1, -2) / q.shape[-1]
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -np.inf))


@wrong("1.5", "very low but not -inf")
def weights_minus_1e9(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores, -1e9)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -1e9))


@wrong("1.5", "`mask` in place")
def weights_mask_reused(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if causal:
        past = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
        if mask is not None and mask.shape == past.shape:
            mask &= past
        else:
            mask = past if mask is None else mask & past
    return weights_one_query_at_a_time(q, k, mask, False, scale)


@wrong("1.5", "ValueError in line")
def weights_all_axes_turned(q, k, mask=None, causal=False, scale=None):
    return weights_one_query_at_a_time(q, k, mask, causal, scale) if q.ndim == 2 else plain_softmax(q @ k.T)


@wrong("1.5", "mask is applied after the softmax")
def weights_masked_late(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    weights = plain_softmax(scores) * (1 if mask is None else mask)
    return weights * np.tri(n_queries, n_keys, n_keys - n_queries) if causal else weights


# --- 1.6 -------------------------------------------------------------------------------------------------------------


@right("1.6")
def backward_by_autograd(q, k, v, d_out, mask=None, causal=False, scale=None):
    import torch

    q, k, v = (torch.from_numpy(a).requires_grad_() for a in (q, k, v))
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    allowed = allowed.tril(n_keys - n_queries) if causal else allowed
    allowed = allowed if mask is None else allowed & torch.from_numpy(mask)
    scores = (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~allowed, -1e30)
    weights = scores.softmax(-1).masked_fill(~allowed, 0.0)
    (weights @ v * torch.from_numpy(d_out)).sum().backward()
    return tuple(a.grad.numpy() for a in (q, k, v))


@right("1.6")
def backward_with_the_jacobian(q, k, v, d_out, mask=None, causal=False, scale=None):
    """diag(p) - p p^T written out for every row."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = weights_one_query_at_a_time(q, k, mask, causal, scale)
    jacobian = p[..., :, None] * np.eye(p.shape[-1], dtype=p.dtype) - p[..., :, None] * p[..., None, :]
    d_s = scale * np.einsum("...ijl,...id,...ld->...ij", jacobian, d_out, v)
    return d_s @ k, np.einsum("...ij,...id->...jd", d_s, q), np.einsum("...ij,...id->...jd", p, d_out)


def backward_parts(q, k, v, d_out, mask, causal, scale):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = weights_one_query_at_a_time(q, k, mask, causal, scale)
    d_p = d_out @ np.swapaxes(v, -1, -2)
    return scale, p, d_p, p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))


@wrong("1.6", "not p * d_p")
def backward_without_jacobian(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * (p * d_p) @ k, scale * np.swapaxes(p * d_p, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "The scale is missing")
def backward_without_scale(q, k, v, d_out, mask=None, causal=False, scale=None):
    _, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "d_k needs the transpose")
def backward_d_k_not_transposed(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, scale * d_s @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "expected the tuple (d_q, d_k, d_v)")
def backward_one_gradient(q, k, v, d_out, mask=None, causal=False, scale=None):
    return backward_with_the_jacobian(q, k, v, d_out, mask, causal, scale)[0]


# --- 1.7 -------------------------------------------------------------------------------------------------------------


@right("1.7")
def local_by_loops(scores, centre, window):
    weights = np.zeros_like(scores)
    for i, p in enumerate(centre):
        first, last = max(0, math.ceil(p - window)), min(scores.shape[1] - 1, math.floor(p + window))
        if first <= last:
            s = np.arange(first, last + 1)
            powers = np.exp(scores[i, s] - scores[i, s].max())
            weights[i, s] = powers / powers.sum() * np.exp(-((s - p) ** 2) / (window**2 / 2))
    return weights


@wrong("1.7", "sum to 1 again")
def local_renormalised(scores, centre, window):
    weights = local_by_loops(scores, centre, window)
    return weights / weights.sum(axis=-1, keepdims=True)


@wrong("1.7", "sigma is half the window")
def local_wide(scores, centre, window):
    distance = np.arange(scores.shape[1]) - centre[:, None]
    inside = np.where(np.abs(distance) <= window, scores, -np.inf)
    return plain_softmax(inside) * np.exp(-(distance**2) / (2 * window**2))


@wrong("1.7", "mask the scores to the window first")
def local_softmax_over_everything(scores, centre, window):
    distance = np.arange(scores.shape[1]) - centre[:, None]
    return plain_softmax(scores) * np.exp(-2 * (distance / window) ** 2) * (np.abs(distance) <= window)


@wrong("1.7", "TypeError in line")
def local_whole_centres_only(scores, centre, window):
    weights = np.zeros_like(scores)
    for i, p in enumerate(centre):
        weights[i, p - window : p + window + 1] = 1
    return weights
