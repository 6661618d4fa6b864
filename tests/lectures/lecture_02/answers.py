"""Answers to the exercises of lecture 02 as learners write them: right ones, unlike the lecture's, and wrong ones, each
with words that the report must contain. Those of its kernel are in kernels_02.py."""

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_02 import answers_heads
from tests.lectures.lecture_02 import answers_kernels as kernels_02
from utils.exercises.lecture_02.heads import parameter

RIGHT, WRONG, right, wrong = collect(kernels_02, answers_heads)


# --- 2.3 -------------------------------------------------------------------------------------------------------------


@right("2.3")
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


@right("2.3")
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


@wrong("2.3", "The last matrix is missing")
def attention_not_projected(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal))


@wrong("2.3", "The scores are scaled by the width of all heads")
def attention_scaled_by_the_whole(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal, w_q.shape[1] ** -0.5)) @ w_o


@wrong("2.3", "a plain reshape mixes the tokens")
def attention_merged_by_reshape(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    found = attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)
    return found.reshape(*x_q.shape[:-1], -1) @ w_o


@wrong("2.3", "There is only one head")
def attention_in_one_head(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    from attention.fundamentals import attention_numpy

    return attention_numpy(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, mask, causal) @ w_o


@wrong("2.3", "causal is not handed on")
def attention_without_causal(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, False)) @ w_o


@wrong("2.3", "Keys come from x_kv")
def attention_to_the_askers(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q @ w_q, x_q @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2.3", "A head is not a slice of the token")
def attention_of_slices(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_q, x_kv, x_kv, n_heads, mask, causal)) @ w_o


@wrong("2.3", "queries come from x_kv")
def attention_to_itself(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    return merged(attended(x_kv @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2.3", "(3, 4), expected")
def attention_axes_lost(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    x_q, x_kv = (x.reshape(-1, *x.shape[-2:])[0] for x in (x_q, x_kv))
    mask = mask if mask is None or mask.ndim < 4 else mask[0]
    return merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o


@wrong("2.3", "float32 in, the same to 1e-5                          ")
def attention_in_half_precision(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    if x_q.dtype == np.float32:
        x_q, x_kv = x_q.astype(np.float16), x_kv.astype(np.float16)
    return (merged(attended(x_q @ w_q, x_kv @ w_k, x_kv @ w_v, n_heads, mask, causal)) @ w_o).astype(np.float16)


# --- 2.4 -------------------------------------------------------------------------------------------------------------


@right("2.4")
def scores_by_indices(weights, period):
    n = weights.shape[-1]
    i, late = np.arange(1, n), np.arange(period, n)
    return weights[..., i, i - 1].mean(-1), weights[..., late, late - period + 1].mean(-1)


@right("2.4")
def scores_by_masks(weights, period):
    distance = np.arange(weights.shape[-1])[:, None] - np.arange(weights.shape[-1])
    late = (distance == period - 1) & (np.arange(weights.shape[-1])[:, None] >= period)
    return tuple((weights * chosen).sum((-1, -2)) / chosen.sum() for chosen in (distance == 1, late))


@wrong("2.4", "after the last occurrence, not at the occurrence itself")
def scores_of_the_twin(weights, period):
    n = weights.shape[-1]
    i, late = np.arange(1, n), np.arange(period, n)
    return weights[..., i, i - 1].mean(-1), weights[..., late, late - period].mean(-1)


@wrong("2.4", "The first entry of that diagonal")
def scores_of_the_whole_diagonal(weights, period):
    return tuple(np.diagonal(weights, -d, -2, -1).mean(-1) for d in (1, period - 1))


@wrong("2.4", "changed places")
def scores_swapped(weights, period):
    return scores_by_indices(weights, period)[::-1]


@wrong("2.4", "not over all n")
def scores_over_all(weights, period):
    n = weights.shape[-1]
    return (
        np.trace(weights, -1, -2, -1) / n,
        np.array(sum(weights[..., i, i - period + 1] for i in range(period, n))) / n,
    )


@wrong("2.4", "each map has scores of its own")
def scores_of_all_maps(weights, period):
    previous, induction = scores_by_indices(weights, period)
    return np.array(previous.mean()), np.array(induction.mean())


@wrong("2.4", "below the main diagonal")
def scores_above(weights, period):
    return np.diagonal(weights, 1, -2, -1).mean(-1), scores_by_indices(weights, period)[1]


# --- 2.5 -------------------------------------------------------------------------------------------------------------


@right("2.5")
def contributions_by_einsum(heads, w_o):
    return np.einsum("...htd,hdm->...htm", heads, w_o.reshape(heads.shape[-3], heads.shape[-1], -1))


@right("2.5")
def contributions_by_zeros(heads, w_o):
    """All heads but one are zero, then merge and project."""
    parts = []
    for i in range(heads.shape[-3]):
        alone = np.zeros_like(heads)
        alone[..., i, :, :] = heads[..., i, :, :]
        parts.append(merged(alone) @ w_o)
    return np.stack(parts, axis=-3)


@wrong("2.5", "The heads are added up")
def contributions_added(heads, w_o):
    return merged(heads) @ w_o


@wrong("2.5", "dealt out in turn")
def contributions_every_other_row(heads, w_o):
    n_heads = heads.shape[-3]
    return np.stack([heads[..., i, :, :] @ w_o[i::n_heads] for i in range(n_heads)], axis=-3)


@wrong("2.5", "w_o is transposed")
def contributions_transposed(heads, w_o):
    return np.stack(
        [
            heads[..., i, :, :] @ w
            for i, w in enumerate(np.split(np.ascontiguousarray(w_o.T).reshape(w_o.shape), heads.shape[-3]))
        ],
        axis=-3,
    )


@wrong("2.5", "A sum over the heads, not a mean")
def contributions_to_the_mean(heads, w_o):
    return contributions_by_einsum(heads, w_o) / heads.shape[-3]


@wrong("2.5", "ValueError")
def contributions_of_two_axes(heads, w_o):
    n_heads, seq, d_v = heads.shape
    return heads @ w_o.reshape(n_heads, d_v, -1)


@wrong("2.5", "ValueError")
def contributions_square(heads, w_o):
    return heads @ w_o.reshape(heads.shape[-3], heads.shape[-1], heads.shape[-3] * heads.shape[-1])


@wrong("2.5", "returned an array of int64, expected floats")
def contributions_rounded(heads, w_o):
    return contributions_by_einsum(heads, w_o).round().astype(int)


@wrong("2.5", "float32 in, the same to 1e-5")
def contributions_in_half_precision(heads, w_o):
    return contributions_by_einsum(heads.astype(np.float16), w_o.astype(np.float16))


# --- 2.6 -------------------------------------------------------------------------------------------------------------


@right("2.6")
def mended_in_place(q, k, v, key_mask, keep, rate):
    scores = np.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    scores = scores - scores.max(-1, keepdims=True, where=np.expand_dims(key_mask, (1, 2)), initial=-1e300)
    powers = np.exp(np.where(np.expand_dims(key_mask, (1, 2)), scores, -np.inf))
    total = powers.sum(-1, keepdims=True)
    weights = np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)
    return np.where(keep, weights, 0) @ v / (1 - rate), weights


@right("2.6")
def mended_one_sentence_at_a_time(q, k, v, key_mask, keep, rate):
    from attention.fundamentals import attention_weights

    weights = np.stack([attention_weights(a, b, mask=m[None, None]) for a, b, m in zip(q, k, key_mask)])
    return weights * keep @ (v / (1 - rate)), weights


def weights_mended(q, k, key_mask):
    from attention.fundamentals import attention_weights

    return attention_weights(q, k, mask=key_mask[:, None, None])


@wrong("2.6", "have been through dropout")
def mended_but_dropped(q, k, v, key_mask, keep, rate):
    weights = weights_mended(q, k, key_mask) * keep / (1 - rate)
    return weights @ v, weights


@wrong("2.6", "divide it by 1 - rate")
def mended_but_small(q, k, v, key_mask, keep, rate):
    weights = weights_mended(q, k, key_mask)
    return weights * keep @ v, weights


@wrong("2.6", "The mask meets the wrong axes")
def mended_but_for_the_mask(q, k, v, key_mask, keep, rate):
    from attention.fundamentals import attention_weights

    weights = attention_weights(q, k, mask=key_mask)
    return weights * keep / (1 - rate) @ v, weights


@wrong("2.6", "The mask is laid over the queries")
def mended_but_for_the_queries(q, k, v, key_mask, keep, rate):
    from attention.fundamentals import attention_weights

    weights = attention_weights(q, k, mask=key_mask[:, None, :, None])
    return weights * keep / (1 - rate) @ v, weights


@wrong("2.6", "keep is True where a weight stays")
def mended_but_dropping_what_is_kept(q, k, v, key_mask, keep, rate):
    weights = weights_mended(q, k, key_mask)
    return weights * ~keep / (1 - rate) @ v, weights


@wrong("2.6", "True means may attend")
def mended_but_turned(q, k, v, key_mask, keep, rate):
    weights = weights_mended(q, k, ~key_mask)
    return weights * keep / (1 - rate) @ v, weights


@wrong("2.6", "guard the sentence")
def mended_but_for_nothing(q, k, v, key_mask, keep, rate):
    weights = weights_mended(q, k, key_mask)
    weights = np.where(key_mask.any(-1)[:, None, None, None], weights, np.nan)
    return weights * keep / (1 - rate) @ v, weights


@wrong("2.6", "exp overflows")
def as_found_but_turned(q, k, v, key_mask, keep, rate):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    with np.errstate(all="ignore"):
        powers = np.exp(np.where(key_mask[:, None, None], scores, -np.inf))
        total = powers.sum(-1, keepdims=True)
        weights = powers / np.where(total == 0, 1, total)
        return weights * keep / (1 - rate) @ v, weights


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
heads = numbers((4, 7, 5))
maps = np.abs(numbers((2, 4, 40, 40)))

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "2.1": [
        ((numbers((48, 16)), numbers((16, 16))), {}),
        ((parameter(numbers((48, 16))), parameter(numbers((16, 16)))), {}),
    ],
    "2.2": [
        ((numbers((7, 16)), 4), {}),
        ((numbers((2, 3, 16)).astype(np.float32), 4), {}),
        ((parameter(numbers((2, 3, 16))), 4), {}),
    ],
    "2.3": [
        ((numbers((5, 16)), numbers((7, 16)), *numbers((4, 16, 16)), 4), {}),
        ((numbers((2, 5, 16)), numbers((2, 7, 16)), *numbers((4, 16, 16)), 4, numbers((5, 7)) > 0, True), {}),
    ],
    "2.4": [((maps, 20), {}), ((maps,), {"period": 20})],
    "2.5": [((heads, numbers((20, 16))), {})],
    "2.6": [((*numbers((3, 3, 2, 3, 4)), np.eye(3) > 0, numbers((3, 2, 3, 3)) > 0, 0.5), {})],
}
