"""Answers to the exercises of lecture 06 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/checks/lecture_06.py
are further wrong answers.
"""

import math

import numpy as np

from tests.answers import kernels_06
from tests.answers.collect import collect

RIGHT, WRONG, right, wrong = collect(kernels_06)


# --- 6.1 -------------------------------------------------------------------------------------------------------------


@right("6.1")
def one_score_at_a_time(m, ell, scores):
    m, total = np.array(m, scores.dtype), np.array(ell, scores.dtype)
    for j in range(scores.shape[-1]):
        m_new = np.maximum(m, scores[..., j])
        safe = np.where(m_new == -np.inf, np.zeros_like(m_new), m_new)
        total = total * np.exp(m - safe) + np.exp(scores[..., j] - safe)
        m = m_new
    return m, total


@right("6.1")
def through_torch(m, ell, scores):
    import torch

    old = torch.from_numpy(np.asarray(m, scores.dtype)) + torch.from_numpy(np.asarray(ell, scores.dtype)).log()
    everything = torch.cat([old[..., None], torch.from_numpy(scores)], dim=-1)
    m_new = np.maximum(m, scores.max(-1)).astype(scores.dtype)
    lse = everything.logsumexp(-1).numpy()
    return m_new, np.exp(lse - np.where(np.isneginf(m_new), np.zeros_like(m_new), m_new))


@wrong("6.1", "multiply it by exp(m - m_new)")
def never_rescaled(m, ell, scores):
    m_new = np.maximum(m, scores.max(axis=-1))
    safe = np.where(np.isneginf(m_new), 0, m_new)
    return m_new, ell + np.exp(scores - safe[..., None]).sum(axis=-1)


@wrong("6.1", "-inf minus -inf is nan")
def unguarded(m, ell, scores):
    m_new = np.maximum(m, scores.max(axis=-1))
    return m_new, ell * np.exp(m - m_new) + np.exp(scores - m_new[..., None]).sum(axis=-1)


@wrong("6.1", "low scores vanish")
def from_a_small_number(m, ell, scores):
    m_new = np.maximum(np.maximum(m, 1e-30), scores.max(axis=-1))
    return m_new, ell * np.exp(m - m_new) + np.exp(scores - m_new[..., None]).sum(axis=-1)


@wrong("6.1", "returned float64, expected float32")
def doubled(m, ell, scores):
    m_new, total = one_score_at_a_time(m, ell, scores)
    return m_new.astype(np.float64), total.astype(np.float64)


@wrong("6.1", "ell: expected nan for the row with a score of nan")
def nan_turned_into_zero(m, ell, scores):
    m_new, total = one_score_at_a_time(m, ell, scores)
    return m_new, np.nan_to_num(total)


# --- 6.2 -------------------------------------------------------------------------------------------------------------


@right("6.2")
def merged_two_by_two(outs, lses):
    out, lse = np.array(outs[0]), np.array(lses[0])
    for next_out, next_lse in zip(outs[1:], lses[1:]):
        whole = np.logaddexp(lse, next_lse)
        safe = np.where(np.isneginf(whole), np.zeros_like(whole), whole)
        out = np.exp(lse - safe)[..., None] * out + np.exp(next_lse - safe)[..., None] * next_out
        lse = whole
    return out, lse


@right("6.2")
def merged_in_torch(outs, lses):
    import torch

    shares = torch.nan_to_num(torch.softmax(torch.from_numpy(np.array(lses)), dim=0)).numpy()
    return np.einsum("p...,p...d->...d", shares, np.array(outs)), np.logaddexp.reduce(np.array(lses))


@wrong("6.2", "weigh it by its share of the sum")
def mean_of_the_parts(outs, lses):
    return np.mean(outs, axis=0), np.logaddexp.reduce(lses)


@wrong("6.2", "is nan")
def merged_unguarded(outs, lses):
    shares = np.exp(lses - np.logaddexp.reduce(lses))
    return (shares[..., None] * outs).sum(axis=0), np.logaddexp.reduce(lses)


@wrong("6.2", "exp overflows")
def merged_overflowing(outs, lses):
    weights = np.exp(lses)
    total = weights.sum(axis=0)
    out = (weights[..., None] * outs).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    return out, np.log(total)


@wrong("6.2", "returned float64, expected float32")
def merged_in_double(outs, lses):
    out, lse = merged_two_by_two(outs, lses)
    return out.astype(float), lse.astype(float)


@wrong("6.2", "All parts count, not only two.")
def merged_first_two(outs, lses):
    return merged_two_by_two(outs[:2], lses[:2])


@wrong("6.2", "returned the shape")
def merged_two_only(outs, lses):
    out, lse = merged_two_by_two(outs[:2], lses[:2])
    return out[..., 0], lse


# --- 6.3 -------------------------------------------------------------------------------------------------------------


def scale_of(q, scale):
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@right("6.3")
def keys_outside(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """Algorithm 1's order, with the output divided at the end."""
    work = np.result_type(q, np.float32)
    scale, n, n_keys = scale_of(q, scale), q.shape[-2], k.shape[-2]
    m = np.full((*q.shape[:-1], 1), -np.inf, work)
    total, o = np.zeros_like(m), np.zeros((*q.shape[:-1], v.shape[-1]), work)
    for j in range(0, n_keys, block_k):
        k_j, v_j = (a[..., j : j + block_k, :].astype(work) for a in (k, v))
        for i in range(0, n, block_q):
            rows = slice(i, i + block_q)
            s = q[..., rows, :].astype(work) @ k_j.swapaxes(-1, -2) * work.type(scale)
            if causal:
                r, c = np.indices(s.shape[-2:])
                s = np.where(j + c <= i + r + n_keys - n, s, work.type(-np.inf))
            m_new = np.maximum(m[..., rows, :], s.max(axis=-1, keepdims=True))
            safe = np.nan_to_num(m_new, neginf=0.0)
            p, factor = np.exp(s - safe), np.exp(m[..., rows, :] - safe)
            total[..., rows, :] = total[..., rows, :] * factor + p.sum(axis=-1, keepdims=True)
            o[..., rows, :] = o[..., rows, :] * factor + p @ v_j
            m[..., rows, :] = m_new
    with np.errstate(divide="ignore"):
        return (o / np.where(total == 0, 1, total)).astype(q.dtype), (m + np.log(total))[..., 0]


@right("6.3")
def merged_tiles(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """Each tile by itself, then merged: what a split over keys does."""
    work = np.result_type(q, np.float32)
    scale, n, n_keys = scale_of(q, scale), q.shape[-2], k.shape[-2]
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1]), work), np.full(q.shape[:-1], -np.inf, work)
    for i in range(0, n, block_q):
        rows = slice(i, i + block_q)
        for j in range(0, n_keys, block_k):
            columns = slice(j, j + block_k)
            s = work.type(scale) * q[..., rows, :].astype(work) @ np.swapaxes(k[..., columns, :].astype(work), -1, -2)
            if causal:
                r, c = np.indices(s.shape[-2:])
                s[..., j + c > i + r + n_keys - n] = -np.inf
            part_lse = np.logaddexp.reduce(s, axis=-1)
            p = np.exp(s - np.nan_to_num(part_lse, neginf=0.0)[..., None])
            whole = np.logaddexp(lse[..., rows], part_lse)
            safe = np.nan_to_num(whole, neginf=0.0)
            out[..., rows, :] = (
                np.exp(lse[..., rows] - safe)[..., None] * out[..., rows, :]
                + np.exp(part_lse - safe)[..., None] * (p @ v[..., columns, :].astype(work))
            )
            lse[..., rows] = whole
    return out.astype(q.dtype), lse


def in_one_piece(q, k, v, causal, scale, shift):
    work = np.result_type(q, np.float32)
    s = scale_of(q, scale) * q.astype(work) @ np.swapaxes(k, -1, -2).astype(work)
    if causal:
        s = np.where(np.tri(*s.shape[-2:], shift, dtype=bool), s, -np.inf)
    lse = np.logaddexp.reduce(s, axis=-1)
    p = np.exp(s - np.nan_to_num(lse, neginf=0.0)[..., None])
    return (p @ v.astype(work)).astype(q.dtype), lse


@wrong("6.3", "Cut k and v with block_k too")
def the_whole_matrix(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return in_one_piece(q, k, v, causal, scale, k.shape[-2] - q.shape[-2])


@wrong("6.3", "Cut k and v with block_k too")
def one_query_at_a_time(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return whole_rows(q, k, v, causal, scale, block_q=1)


@wrong("6.3", "Cut k and v with block_k too")
def whole_rows(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    parts = [
        in_one_piece(q[..., i : i + block_q, :], k, v, causal, scale, i + k.shape[-2] - q.shape[-2])
        for i in range(0, q.shape[-2], block_q)
    ]
    return np.concatenate([out for out, _ in parts], axis=-2), np.concatenate([lse for _, lse in parts], axis=-1)


@wrong("6.3", "The log of the sum is missing in the log-sum-exp")
def maximum_for_lse(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    out, _ = keys_outside(q, k, v, causal, scale, block_q, block_k)
    s = scale_of(q, scale) * q.astype(float) @ np.swapaxes(k, -1, -2)
    if causal:
        s = np.where(np.tri(*s.shape[-2:], k.shape[-2] - q.shape[-2], dtype=bool), s, -np.inf)
    return out, s.max(axis=-1)


@wrong("6.3", "top left")
def top_left(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return in_one_piece(q, k, v, causal, scale, 0)


@wrong("6.3", "returned float64, expected float32")
def in_double(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return keys_outside(*(a.astype(float) for a in (q, k, v)), causal, scale, block_q, block_k)


@wrong("6.3", "not rescaled when the maximum rises: o")
def output_never_rescaled(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    shift = k.shape[-2] - q.shape[-2]
    for i in range(0, q.shape[-2], block_q):
        rows = np.arange(i, min(i + block_q, q.shape[-2]))
        m, total, o = -np.inf, 0.0, 0.0
        for j in range(0, k.shape[-2], block_k):
            s = scale_of(q, scale) * q[..., rows, :].astype(float) @ np.swapaxes(k[..., j : j + block_k, :], -1, -2)
            if causal:
                s[..., j + np.arange(s.shape[-1]) > rows[:, None] + shift] = -np.inf
            m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
            safe = np.where(np.isneginf(m_new), 0, m_new)
            p = np.exp(s - safe)
            total = total * np.exp(m - safe) + p.sum(axis=-1, keepdims=True)
            o = o + p @ v[..., j : j + block_k, :]
            m = m_new
        out[..., rows, :] = o / np.where(total == 0, 1, total)
        lse[..., rows] = (m + np.log(total))[..., 0]
    return out.astype(q.dtype), lse


# --- 6.4 -------------------------------------------------------------------------------------------------------------


@right("6.4")
def counted_on_the_mask(n_queries, n_keys, block_q, block_k):
    mask = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=int)
    allowed = np.add.reduceat(np.add.reduceat(mask, np.arange(0, n_queries, block_q), 0), np.arange(0, n_keys, block_k), 1)
    sizes = np.outer(
        np.diff([*range(0, n_queries, block_q), n_queries]), np.diff([*range(0, n_keys, block_k), n_keys])
    )
    return np.array([(allowed == sizes).sum(), ((allowed > 0) & (allowed < sizes)).sum(), (allowed == 0).sum()])


@wrong("6.4", "top left")
def tiles_top_left(n_queries, n_keys, block_q, block_k):
    mask = np.tri(n_queries, n_keys, dtype=bool)
    tiles = [mask[i : i + block_q, j : j + block_k] for i in range(0, n_queries, block_q) for j in range(0, n_keys, block_k)]
    full, some = sum(t.all() for t in tiles), sum(t.any() for t in tiles)
    return np.array([full, some - full, len(tiles) - some])


@wrong("6.4", "<=, not <")
def tiles_strict(n_queries, n_keys, block_q, block_k):
    mask = np.tri(n_queries, n_keys, n_keys - n_queries - 1, dtype=bool)
    tiles = [mask[i : i + block_q, j : j + block_k] for i in range(0, n_queries, block_q) for j in range(0, n_keys, block_k)]
    full, some = sum(t.all() for t in tiles), sum(t.any() for t in tiles)
    return np.array([full, some - full, len(tiles) - some])


@wrong("6.4", "The order is full, partial, skipped")
def tiles_backwards(n_queries, n_keys, block_q, block_k):
    return counted_on_the_mask(n_queries, n_keys, block_q, block_k)[::-1]


@wrong("6.4", "= (6, 4, 6)")
def tiles_in_a_tuple(n_queries, n_keys, block_q, block_k):
    return tuple(int(n) for n in counted_on_the_mask(n_queries, n_keys, block_q, block_k))


@wrong("6.4", "returned a tuple of 3")
def tiles_as_a_tuple(n_queries, n_keys, block_q, block_k):
    return tuple(counted_on_the_mask(n_queries, n_keys, block_q, block_k))


# --- 6.5 -------------------------------------------------------------------------------------------------------------


@right("6.5")
def gradients_in_torch(q, k, v, out, lse, d_out, causal=False, scale=None):
    import torch

    tensors = [torch.from_numpy(a.astype(float)).requires_grad_() for a in (q, k, v)]
    s = scale_of(q, scale) * tensors[0] @ tensors[1].mT
    allowed = torch.from_numpy(np.tri(*s.shape[-2:], s.shape[-1] - s.shape[-2], dtype=bool) | (not causal))
    p = torch.exp(s.masked_fill(~allowed, -1e9) - torch.from_numpy(np.where(np.isneginf(lse), np.inf, lse))[..., None])
    p = p / p.detach().sum(-1, keepdim=True).clamp(min=1e-300)
    given = torch.from_numpy(d_out.astype(float))
    weighted = (p.detach() * (given @ tensors[2].mT).detach()).sum(-1, keepdim=True)
    inner = p.detach() * ((given @ tensors[2].mT).detach() - weighted)
    d_q, d_k = torch.autograd.grad(s, tensors[:2], inner)
    return tuple(a.numpy().astype(q.dtype) for a in (d_q, d_k, p.detach().mT @ given))


@right("6.5")
def queries_one_by_one(q, k, v, out, lse, d_out, causal=False, scale=None):
    scale, shift = scale_of(q, scale), k.shape[-2] - q.shape[-2]
    d_q, d_k, d_v = (np.zeros_like(a) for a in (q, k, v))
    for i in range(q.shape[-2]):
        end = max(0, i + 1 + shift) if causal else k.shape[-2]
        if not end:
            continue
        k_i, v_i = k[..., :end, :], v[..., :end, :]
        p = np.exp(scale * np.einsum("...jd,...d->...j", k_i, q[..., i, :]) - lse[..., i, None])
        d_p = np.einsum("...jd,...d->...j", v_i, d_out[..., i, :])
        d_s = scale * p * (d_p - (out[..., i, :] * d_out[..., i, :]).sum(-1)[..., None])
        d_q[..., i, :] = np.einsum("...j,...jd->...d", d_s, k_i)
        d_k[..., :end, :] += d_s[..., None] * q[..., i, None, :]
        d_v[..., :end, :] += p[..., None] * d_out[..., i, None, :]
    return d_q, d_k, d_v


def tiles(n_queries, n_keys, causal):
    """Tiles of 64 that a backward pass visits, keys outside: slices, and who may attend in them."""
    mask = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool) | (not causal)
    for j in range(0, n_keys, 64):
        for i in range(0, n_queries, 64):
            rows, columns = slice(i, i + 64), slice(j, j + 64)
            if mask[rows, columns].any():
                yield rows, columns, mask[rows, columns]


def tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit):
    """The given loop; `visit` does one tile."""
    gradients = [np.zeros_like(a) for a in (q, k, v)]
    scale = scale_of(q, scale)
    lse = np.where(np.isneginf(lse), np.inf, lse)
    big_d = (d_out * out).sum(axis=-1)
    for rows, columns, allowed in tiles(q.shape[-2], k.shape[-2], causal):
        s = q[..., rows, :] @ np.swapaxes(k[..., columns, :], -1, -2) * scale
        visit(gradients, rows, columns, allowed, s, lse[..., rows, None], big_d[..., rows, None], q, k, v, d_out, scale)
    return tuple(gradients)


def add_tile(gradients, rows, columns, p, d_s, q, k, d_out):
    d_q, d_k, d_v = gradients
    d_q[..., rows, :] += d_s @ k[..., columns, :]
    d_k[..., columns, :] += np.swapaxes(d_s, -1, -2) @ q[..., rows, :]
    d_v[..., columns, :] += np.swapaxes(p, -1, -2) @ d_out[..., rows, :]


@wrong("6.5", "The mask is missing")
def backward_unmasked(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(s - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d) * scale
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "Each tile adds to dV")
def backward_d_v_overwritten(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(np.where(allowed, s, -np.inf) - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d) * scale
        gradients[2][..., columns, :] = 0
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "D is missing")
def backward_without_d(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(np.where(allowed, s, -np.inf) - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2)) * scale
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "The scale is missing in dQ and dK")
def backward_unscaled(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(np.where(allowed, s, -np.inf) - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d)
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "d_v: ")
def backward_with_loud_outputs(q, k, v, out, lse, d_out, causal=False, scale=None):
    d_q, d_k, d_v = queries_one_by_one(q, k, v, out, lse, d_out, causal, scale)
    return d_q, d_k, d_v * (1 + 1e-3)


@wrong("6.5", "returned the shape")
def backward_without_leading_axes(q, k, v, out, lse, d_out, causal=False, scale=None):
    if q.ndim > 2:
        q, k, v, out, lse, d_out = (a[0] for a in (q, k, v, out, lse, d_out))
    return queries_one_by_one(q, k, v, out, lse, d_out, causal, scale)


# --- 6.6 -------------------------------------------------------------------------------------------------------------


@right("6.6")
def one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    owner_q = np.repeat(np.arange(len(cu_queries) - 1), np.diff(cu_queries))
    owner_k = np.repeat(np.arange(len(cu_keys) - 1), np.diff(cu_keys))
    allowed = owner_q[:, None] == owner_k
    if causal:
        from_the_end_q = np.asarray(cu_queries)[owner_q + 1] - np.arange(len(owner_q))
        from_the_end_k = np.asarray(cu_keys)[owner_k + 1] - np.arange(len(owner_k))
        allowed = allowed & (from_the_end_k >= from_the_end_q[:, None])
    s = np.where(allowed, scale_of(q, scale) * q @ np.swapaxes(k, -1, -2), -np.inf)
    lse = np.logaddexp.reduce(s, axis=-1)
    return np.exp(s - np.nan_to_num(lse, neginf=0.0)[..., None]) @ v, lse


@wrong("6.6", "The sequences see each other")
def one_long_sequence(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return one_mask_of_squares(q, k, v, [0, q.shape[-2]], [0, k.shape[-2]], causal, scale)


@wrong("6.6", "causal is forgotten")
def never_causal(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return one_mask_of_squares(q, k, v, cu_queries, cu_keys, False, scale)


@wrong("6.6", "The scale is forgotten")
def never_scaled(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal)


@wrong("6.6", "returned the shape")
def without_leading_axes(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    if q.ndim > 2:
        q, k, v = q[0], k[0], v[0]
    return one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal, scale)


@wrong("6.6", "nan")
def empty_rows_are_nan(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    out, lse = one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal, scale)
    return np.where(np.isneginf(lse)[..., None], np.nan, out), lse


# --- 6.7 -------------------------------------------------------------------------------------------------------------


@right("6.7")
def blocks_hop(q, k, v, positions, causal=False, scale=None):
    """The blocks move from hand to hand, as messages would."""
    n_ranks, scale = len(q), scale_of(q, scale)
    m, total = np.full((*q.shape[:2], 1), -np.inf), np.zeros((*q.shape[:2], 1))
    o, held = np.zeros((*q.shape[:2], v.shape[-1])), (k, v, positions)
    for _ in range(n_ranks):
        s = scale * q @ held[0].swapaxes(1, 2)
        s = np.where((held[2][:, None] <= positions[:, :, None]) | (not causal), s, -np.inf)
        m_new = np.maximum(m, s.max(-1, keepdims=True))
        safe = np.nan_to_num(m_new, neginf=0.0)
        p, factor = np.exp(s - safe), np.exp(m - safe)
        m, total, o = m_new, total * factor + p.sum(-1, keepdims=True), o * factor + p @ held[1]
        held = tuple(np.roll(a, 1, axis=0) for a in held)                        # to the next rank
    return o / total


@right("6.7")
def all_at_once(q, k, v, positions, causal=False, scale=None):
    where = positions.ravel()
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    s = scale_of(q, scale) * flat[0] @ flat[1].T
    s = np.where((where <= where[:, None]) | (not causal), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True) @ flat[2]).reshape(*q.shape[:2], -1)


@wrong("6.7", "Each rank sees its own block only")
def no_messages(q, k, v, positions, causal=False, scale=None):
    return np.stack([all_at_once(*(a[r : r + 1] for a in (q, k, v, positions)), causal, scale)[0] for r in range(len(q))])


@wrong("6.7", "causal is forgotten")
def ring_never_causal(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, positions, False, scale)


@wrong("6.7", "not the positions in the sequence")
def ring_by_places(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, np.arange(positions.size).reshape(positions.shape), causal, scale)


@wrong("6.7", "The keys' positions belong to the block's owner")
def ring_with_own_positions(q, k, v, positions, causal=False, scale=None):
    out = []
    for rank, own in enumerate(positions):
        s = scale_of(q, scale) * q[rank] @ np.concatenate(np.roll(k, -rank, axis=0)).T
        s = np.where((np.tile(own, len(q)) <= own[:, None]) | (not causal), s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        out.append(p / p.sum(axis=-1, keepdims=True) @ np.concatenate(np.roll(v, -rank, axis=0)))
    return np.array(out)


@wrong("6.7", "The scale is forgotten")
def ring_never_scaled(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, positions, causal)


@wrong("6.7", "nan")
def ring_overflows(q, k, v, positions, causal=False, scale=None):
    where = positions.ravel()
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    p = np.exp(scale_of(q, scale) * flat[0] @ flat[1].T) * ((where <= where[:, None]) | (not causal))
    return (p / p.sum(axis=-1, keepdims=True) @ flat[2]).reshape(*q.shape[:2], -1)


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
heads = [numbers((2, n, 16)) for n in (37, 53, 53)]
single = [numbers((2, 3, n, 8)).astype(np.float32) for n in (9, 7, 7)]
square = np.arange(12).reshape(3, 4)

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "6.1": [
        ((np.full(3, -np.inf), np.zeros(3), numbers((3, 4))), {}),
        ((np.array([-np.inf]), np.zeros(1), np.array([[-np.inf, -np.inf]])), {}),
        ((np.full((2, 5), -np.inf), np.zeros((2, 5)), numbers((2, 5, 3))), {}),
    ],
    "6.2": [
        (([numbers((5, 4)), numbers((5, 4))], [numbers(5), np.full(5, -np.inf)]), {}),
        (((numbers((5, 4)), numbers((5, 4))), (numbers(5), numbers(5))), {}),
    ],
    "6.3": [
        ((*heads,), {}),
        ((*heads, True, None, 16, 7), {}),
        ((*single, True), {"block_q": 2, "block_k": 2}),
        ((*heads,), {"scale": 1.0}),
        ((*(a[0] for a in heads), True), {}),
    ],
    "6.4": [((256, 256, 64, 64), {})],
    "6.5": [((*single, *keys_outside(*single, True), numbers((2, 3, 9, 8)).astype(np.float32), True), {})],
    "6.6": [((*(numbers((2, 10, 8)) for _ in range(3)), np.array([0, 3, 10]), np.array([0, 3, 10])), {"causal": True})],
    "6.7": [((*(numbers((3, 4, 8)) for _ in range(3)), square, True), {})],
}
