"""Answers to the exercises of lecture 02 as learners write them: right ones, unlike the lecture's, and wrong ones, each
with words that the report must contain. Heads, reviews, PyTorch and kernels have files of their own."""

import numpy as np
import torch

from tests.lectures.collect import collect
from tests.lectures.lecture_02 import answers_heads, answers_kernels, answers_review, answers_torch
from utils.exercises.lecture_02.heads import parameter

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_heads, answers_review, answers_torch)


# --- 2B --------------------------------------------------------------------------------------------------------------


@right("2B")
def attention_by_einsum(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    pairs = (x_q, w_q), (x_kv, w_k), (x_kv, w_v)
    q, k, v = (np.einsum("...td,dhe->...hte", x, w.reshape(len(w), n_heads, -1)) for x, w in pairs)
    scores = np.einsum("...hie,...hje->...hij", q, k) / q.shape[-1] ** 0.5
    allowed = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
    if causal:
        allowed = allowed & np.tri(*scores.shape[-2:], scores.shape[-1] - scores.shape[-2], dtype=bool)
    top = np.where(allowed, scores, -1e300).max(-1, keepdims=True)
    powers = np.where(allowed, np.exp(np.where(allowed, scores - top, 0)), 0)
    weights = powers / np.maximum(powers.sum(-1, keepdims=True), 1e-30)
    found = np.einsum("...hij,...hje->...hie", weights, v)
    return np.einsum("...hie,hed->...id", found, w_o.reshape(n_heads, -1, w_o.shape[1])).astype(x_q.dtype)


@right("2B")
def attention_in_a_loop(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    from attention.fundamentals import attention_numpy

    out = 0
    for i, parts in enumerate(zip(*(np.split(w, n_heads, axis=1) for w in (w_q, w_k, w_v)), np.split(w_o, n_heads))):
        a, b, c, d = parts
        own = mask if mask is None or mask.ndim < 3 else mask[..., min(i, mask.shape[-3] - 1), :, :]
        out = out + attention_numpy(x_q @ a, x_kv @ b, x_kv @ c, own, causal) @ d
    return out


def attended(q, k, v, n_heads, mask, causal, scale=None):
    from attention.fundamentals import attention_numpy
    from attention.multi_head import split_heads

    return attention_numpy(*(split_heads(a, n_heads) for a in (q, k, v)), mask, causal, scale)


def merged(found):
    return np.concatenate([found[..., i, :, :] for i in range(found.shape[-3])], axis=-1)


@wrong("2B", "The last matrix is missing")
def attention_not_projected(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal))


@wrong("2B", "The scores are scaled by the width of all heads")
def attention_scaled_by_the_whole(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal, w_q.shape[1] ** -0.5)) @ w_o


@wrong("2B", "a plain reshape mixes the tokens")
def attention_merged_by_reshape(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    found = attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)
    return found.reshape(*x_q.shape[:-1], -1) @ w_o


@wrong("2B", "There is only one head")
def attention_in_one_head(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    from attention.fundamentals import attention_numpy

    return attention_numpy(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, mask, causal) @ w_o


@wrong("2B", "causal is not handed on")
def attention_without_causal(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, False)) @ w_o


@wrong("2B", "The mask is turned round")
def attention_forbidden(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return attention_in_a_loop(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, None if mask is None else ~mask, causal)


@wrong("2B", "causal is False by default")
def attention_causal_by_default(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=True):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2B", "Keys come from x_kv")
def attention_to_the_askers(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_q @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2B", "A head is not a slice of the token")
def attention_of_slices(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q, x_kv, x_kv, n_heads, mask, causal)) @ w_o


@wrong("2B", "queries come from x_kv")
def attention_to_itself(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_kv @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2B", "(3, 4), expected")
def attention_axes_lost(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    x_q, x_kv = (x.reshape(-1, *x.shape[-2:])[0] for x in (x_q, x_kv))
    mask = mask if mask is None or mask.ndim < 4 else mask[0]
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2B", "float32 in, the same to 1e-5                          ")
def attention_in_half_precision(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    if x_q.dtype == np.float32:
        x_q, x_kv = x_q.astype(np.float16), x_kv.astype(np.float16)
    return (merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o).astype(np.float16)


# --- 2E --------------------------------------------------------------------------------------------------------------


@right("2E")
def scores_by_indices(weights, period):
    n = weights.shape[-1]
    i, late = np.arange(1, n), np.arange(period, n)
    return weights[..., i, i - 1].mean(-1), weights[..., late, late - period + 1].mean(-1)


@right("2E")
def scores_by_masks(weights, period):
    distance = np.arange(weights.shape[-1])[:, None] - np.arange(weights.shape[-1])
    late = (distance == period - 1) & (np.arange(weights.shape[-1])[:, None] >= period)
    return tuple((weights * chosen).sum((-1, -2)) / chosen.sum() for chosen in (distance == 1, late))


@wrong("2E", "after the last occurrence, not at the occurrence itself")
def scores_of_the_twin(weights, period):
    n = weights.shape[-1]
    i, late = np.arange(1, n), np.arange(period, n)
    return weights[..., i, i - 1].mean(-1), weights[..., late, late - period].mean(-1)


@wrong("2E", "The first entry of that diagonal")
def scores_of_the_whole_diagonal(weights, period):
    return tuple(np.diagonal(weights, -d, -2, -1).mean(-1) for d in (1, period - 1))


@wrong("2E", "Which query has the first entry of your diagonal, and which the last?")
def scores_without_the_last_query(weights, period):
    previous, _ = scores_by_indices(weights, period)
    return previous, np.diagonal(weights, 1 - period, -2, -1)[..., :-1].mean(-1)


@wrong("2E", "Which query has the first entry of your diagonal, and which the last?")
def scores_begun_too_late(weights, period):
    late = np.arange(period + 1, weights.shape[-1])
    total = weights[..., late, late - period + 1].sum(-1)
    return scores_by_indices(weights, period)[0], total / max(len(late), 1)


@wrong("2E", "changed places")
def scores_swapped(weights, period):
    return scores_by_indices(weights, period)[::-1]


@wrong("2E", "not over all n")
def scores_over_all(weights, period):
    n = weights.shape[-1]
    return (
        np.trace(weights, -1, -2, -1) / n,
        np.array(sum(weights[..., i, i - period + 1] for i in range(period, n))) / n,
    )


@wrong("2E", "each map has scores of its own")
def scores_of_all_maps(weights, period):
    previous, induction = scores_by_indices(weights, period)
    return np.array(previous.mean()), np.array(induction.mean())


@wrong("2E", "below the main diagonal")
def scores_above(weights, period):
    return np.diagonal(weights, 1, -2, -1).mean(-1), scores_by_indices(weights, period)[1]


# --- 2F --------------------------------------------------------------------------------------------------------------


@right("2F")
def contributions_by_einsum(heads, w_o):
    return np.einsum("...htd,hdm->...htm", heads, w_o.reshape(heads.shape[-3], heads.shape[-1], -1))


@right("2F")
def contributions_by_zeros(heads, w_o):
    """All heads but one are zero, then merge and project."""
    parts = []
    for i in range(heads.shape[-3]):
        alone = np.zeros_like(heads)
        alone[..., i, :, :] = heads[..., i, :, :]
        parts.append(merged(alone) @ w_o)
    return np.stack(parts, axis=-3)


@wrong("2F", "The heads are added up")
def contributions_added(heads, w_o):
    return merged(heads) @ w_o


@wrong("2F", "dealt out in turn")
def contributions_every_other_row(heads, w_o):
    n_heads = heads.shape[-3]
    return np.stack([heads[..., i, :, :] @ w_o[i::n_heads] for i in range(n_heads)], axis=-3)


@wrong("2F", "w_o is transposed")
def contributions_transposed(heads, w_o):
    return np.stack(
        [
            heads[..., i, :, :] @ w
            for i, w in enumerate(np.split(np.ascontiguousarray(w_o.T).reshape(w_o.shape), heads.shape[-3]))
        ],
        axis=-3,
    )


@wrong("2F", "A sum over the heads, not a mean")
def contributions_to_the_mean(heads, w_o):
    return contributions_by_einsum(heads, w_o) / heads.shape[-3]


@wrong("2F", "ValueError")
def contributions_of_two_axes(heads, w_o):
    n_heads, seq, d_v = heads.shape
    return heads @ w_o.reshape(n_heads, d_v, -1)


@wrong("2F", "ValueError")
def contributions_square(heads, w_o):
    return heads @ w_o.reshape(heads.shape[-3], heads.shape[-1], heads.shape[-3] * heads.shape[-1])


@wrong("2F", "returned an array of int64, expected floats")
def contributions_rounded(heads, w_o):
    return contributions_by_einsum(heads, w_o).round().astype(int)


@wrong("2F", "float32 in, the same to 1e-5")
def contributions_in_half_precision(heads, w_o):
    return contributions_by_einsum(heads.astype(np.float16), w_o.astype(np.float16))


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
heads = numbers((4, 7, 5))
maps = np.abs(numbers((2, 4, 40, 40)))

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "2A": [
        ((numbers((7, 16)), 4), {}),
        ((numbers((2, 3, 16)).astype(np.float32), 4), {}),
        ((parameter(numbers((2, 3, 16))), 4), {}),
    ],
    "2B": [
        ((numbers((5, 16)), numbers((7, 16)), *numbers((4, 16, 16)), 4), {}),
        ((numbers((2, 5, 16)), numbers((2, 7, 16)), *numbers((4, 16, 16)), 4, numbers((5, 7)) > 0, True), {}),
    ],
    "2C": [],
    "2D": [],
    "2E": [((maps, 20), {}), ((maps,), {"period": 20})],
    "2F": [((heads, numbers((20, 16))), {})],
    "2G": [
        ((answers_torch.small_lm(), torch.arange(12)[None] % 7, [[], [(1, 0)]]), {"start": 3}),
        ((answers_torch.small_lm(), torch.arange(12)[None] % 7, [[(0, 1), (1, 0)]], 0), {}),
    ],
    "2H": [],
}
