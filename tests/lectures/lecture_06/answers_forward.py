"""Answers to exercises 6A, 6B and 6G: the online softmax, the loop over tiles, and merging."""

import math

import numpy as np

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 6A --------------------------------------------------------------------------------------------------------------


@right("6A")
def one_score_at_a_time(m, ell, scores):
    m, total = np.array(m, scores.dtype), np.array(ell, scores.dtype)
    for j in range(scores.shape[-1]):
        m_new = np.maximum(m, scores[..., j])
        safe = np.where(m_new == -np.inf, np.zeros_like(m_new), m_new)
        total = total * np.exp(m - safe) + np.exp(scores[..., j] - safe)
        m = m_new
    return m, total


@right("6A")
def through_torch(m, ell, scores):
    import torch

    old = torch.from_numpy(np.asarray(m, scores.dtype)) + torch.from_numpy(np.asarray(ell, scores.dtype)).log()
    everything = torch.cat([old[..., None], torch.from_numpy(scores)], dim=-1)
    m_new = np.maximum(m, scores.max(-1)).astype(scores.dtype)
    lse = everything.logsumexp(-1).numpy()
    return m_new, np.exp(lse - np.where(np.isneginf(m_new), np.zeros_like(m_new), m_new))


@wrong("6A", "multiply it by exp(m - m_new)")
def never_rescaled(m, ell, scores):
    m_new = np.maximum(m, scores.max(axis=-1))
    safe = np.where(np.isneginf(m_new), 0, m_new)
    return m_new, ell + np.exp(scores - safe[..., None]).sum(axis=-1)


@wrong("6A", "-inf minus -inf is nan")
def unguarded(m, ell, scores):
    m_new = np.maximum(m, scores.max(axis=-1))
    return m_new, ell * np.exp(m - m_new) + np.exp(scores - m_new[..., None]).sum(axis=-1)


@wrong("6A", "low scores vanish")
def from_a_small_number(m, ell, scores):
    m_new = np.maximum(np.maximum(m, 1e-30), scores.max(axis=-1))
    return m_new, ell * np.exp(m - m_new) + np.exp(scores - m_new[..., None]).sum(axis=-1)


@wrong("6A", "returned float64, expected float32")
def doubled(m, ell, scores):
    m_new, total = one_score_at_a_time(m, ell, scores)
    return m_new.astype(np.float64), total.astype(np.float64)


@wrong("6A", "returned float64, expected float32")
def in_the_type_of_m(m, ell, scores):
    m_new = np.maximum(m, scores.max(axis=-1))
    finite = np.where(np.isneginf(m_new), 0, m_new)
    return m_new, ell * np.exp(m - finite) + np.exp(scores - finite[..., None]).sum(axis=-1)


@wrong("6A", "ell: expected nan for the row with a score of nan")
def nan_turned_into_zero(m, ell, scores):
    m_new, total = one_score_at_a_time(m, ell, scores)
    return m_new, np.nan_to_num(total)


# --- 6G --------------------------------------------------------------------------------------------------------------


@right("6G")
def merged_two_by_two(outs, lses):
    out, lse = np.array(outs[0]), np.array(lses[0])
    for next_out, next_lse in zip(outs[1:], lses[1:]):
        whole = np.logaddexp(lse, next_lse)
        safe = np.where(np.isneginf(whole), np.zeros_like(whole), whole)
        out = np.exp(lse - safe)[..., None] * out + np.exp(next_lse - safe)[..., None] * next_out
        lse = whole
    return out, lse


@right("6G")
def merged_in_torch(outs, lses):
    import torch

    shares = torch.nan_to_num(torch.softmax(torch.from_numpy(np.array(lses)), dim=0)).numpy()
    return np.einsum("p...,p...d->...d", shares, np.array(outs)), np.logaddexp.reduce(np.array(lses))


@wrong("6G", "weigh it by its share of the sum")
def mean_of_the_parts(outs, lses):
    return np.mean(outs, axis=0), np.logaddexp.reduce(lses)


@wrong("6G", "is nan")
def merged_unguarded(outs, lses):
    shares = np.exp(lses - np.logaddexp.reduce(lses))
    return (shares[..., None] * outs).sum(axis=0), np.logaddexp.reduce(lses)


@wrong("6G", "exp overflows")
def merged_overflowing(outs, lses):
    weights = np.exp(lses)
    total = weights.sum(axis=0)
    out = (weights[..., None] * outs).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    return out, np.log(total)


@wrong("6G", "returned float64, expected float32")
def merged_in_double(outs, lses):
    out, lse = merged_two_by_two(outs, lses)
    return out.astype(float), lse.astype(float)


@wrong("6G", "TypeError in line")
def merged_arrays_only(outs, lses):
    if not isinstance(lses, np.ndarray):
        raise TypeError("arrays only")
    return merged_two_by_two(outs, lses)


@wrong("6G", "All parts count, not only two.")
def merged_first_two(outs, lses):
    return merged_two_by_two(outs[:2], lses[:2])


@wrong("6G", "returned the shape")
def merged_two_only(outs, lses):
    out, lse = merged_two_by_two(outs[:2], lses[:2])
    return out[..., 0], lse


# --- 6B --------------------------------------------------------------------------------------------------------------


def scale_of(q, scale):
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@right("6B")
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


@right("6B")
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
            out[..., rows, :] = np.exp(lse[..., rows] - safe)[..., None] * out[..., rows, :] + np.exp(part_lse - safe)[
                ..., None
            ] * (p @ v[..., columns, :].astype(work))
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


@wrong("6B", "Are k and v cut too")
def the_whole_matrix(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return in_one_piece(q, k, v, causal, scale, k.shape[-2] - q.shape[-2])


@wrong("6B", "Are k and v cut too")
def one_query_at_a_time(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return whole_rows(q, k, v, causal, scale, block_q=1)


@wrong("6B", "Are k and v cut too")
def whole_rows(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    parts = [
        in_one_piece(q[..., i : i + block_q, :], k, v, causal, scale, i + k.shape[-2] - q.shape[-2])
        for i in range(0, q.shape[-2], block_q)
    ]
    return np.concatenate([out for out, _ in parts], axis=-2), np.concatenate([lse for _, lse in parts], axis=-1)


@right("6B")
def always_finished(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """As in the first paper: the output is divided after every tile."""
    return one_tile_after_another(q, k, v, causal, scale, block_q, block_k)


@wrong("6B", "The running maximum starts too high")
def from_ten_thousand_below(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return one_tile_after_another(q, k, v, causal, scale, block_q, block_k, start=-1e4)


@wrong("6B", "scores go through exp at once, and a tile of 4 x 3")
def tiles_are_squares(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return one_tile_after_another(q, k, v, causal, scale, block_q, block_q)


@wrong("6B", "float16 in: right to their precision")
def scaled_in_half(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = q * q.dtype.type(scale_of(q, scale))
    return one_tile_after_another(scaled, k, v, causal, 1.0, block_q, block_k)


def one_tile_after_another(q, k, v, causal, scale, block_q, block_k, start=-np.inf):
    kind, work, n, n_keys = q.dtype, np.result_type(q, np.float32), q.shape[-2], k.shape[-2]
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1]), work), np.zeros(q.shape[:-1], work)
    q, k, v = (a.astype(work) for a in (q, k, v))
    scale = work.type(scale_of(q, scale))
    for i in range(0, n, block_q):
        q_i = q[..., i : i + block_q, :]
        m, total, o = np.full((*q_i.shape[:-1], 1), start, work), np.zeros((), work), np.zeros((), work)
        for j in range(0, n_keys, block_k):
            s = q_i @ k[..., j : j + block_k, :].swapaxes(-1, -2) * scale
            r, c = np.indices(s.shape[-2:])
            s = np.where((j + c <= i + r + n_keys - n) | (not causal), s, work.type(-np.inf))
            m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
            safe = np.nan_to_num(m_new, neginf=0.0)
            p, old = np.exp(s - safe), total * np.exp(m - safe)
            m, total = m_new, old + p.sum(axis=-1, keepdims=True)
            o = (old * o + p @ v[..., j : j + block_k, :]) / np.where(total == 0, 1, total)
        out[..., i : i + block_q, :] = o
        with np.errstate(divide="ignore"):
            lse[..., i : i + block_q] = (m + np.log(total))[..., 0]
    return out.astype(kind), lse


@wrong("6B", "The log of the sum is missing in the log-sum-exp")
def maximum_for_lse(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    out, _ = keys_outside(q, k, v, causal, scale, block_q, block_k)
    s = scale_of(q, scale) * q.astype(float) @ np.swapaxes(k, -1, -2)
    if causal:
        s = np.where(np.tri(*s.shape[-2:], k.shape[-2] - q.shape[-2], dtype=bool), s, -np.inf)
    return out, s.max(axis=-1)


@wrong("6B", "top left")
def top_left(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return in_one_piece(q, k, v, causal, scale, 0)


@wrong("6B", "returned float64, expected float32")
def in_double(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return keys_outside(*(a.astype(float) for a in (q, k, v)), causal, scale, block_q, block_k)


@wrong("6B", "not rescaled when the maximum rises: o")
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
