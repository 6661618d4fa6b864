"""Answers to the exercises of lecture 07 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_07/
are further wrong answers.
"""

import math

import numpy as np

from attention.fundamentals import attention_numpy
from tests.lectures.collect import collect
from tests.lectures.lecture_07 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 7A --------------------------------------------------------------------------------------------------------------


@right("7A")
def two_triangles(n_queries, n_keys, window):
    shift = n_keys - n_queries
    lower = np.tri(n_queries, n_keys, shift, dtype=bool)
    return lower & ~np.tri(n_queries, n_keys, shift - window, dtype=bool)


@right("7A")
def row_by_row(n_queries, n_keys, window):
    mask = np.zeros((n_queries, n_keys), dtype=bool)
    for i in range(n_queries):
        last = i + n_keys - n_queries
        mask[i, max(0, last - window + 1) : max(0, last + 1)] = True
    return mask


@wrong("7A", "one key too wide")
def lower_or_equal(n_queries, n_keys, window):
    back = np.arange(n_queries)[:, None] + n_keys - n_queries - np.arange(n_keys)
    return (back >= 0) & (back <= window)


@wrong("7A", "returned an array of int64, expected booleans")
def whole_numbers(n_queries, n_keys, window):
    return row_by_row(n_queries, n_keys, window).astype(np.int64)


@wrong("7A", "the first queries see nothing")
def negative_slices(n_queries, n_keys, window):
    mask = np.zeros((n_queries, n_keys), dtype=bool)
    for i in range(n_queries):
        last = i + n_keys - n_queries
        mask[i, max(0, last - window + 1) : last + 1] = True
    return mask


@wrong("7A", "many sizes")
def at_most_64(n_queries, n_keys, window):
    mask = row_by_row(n_queries, n_keys, window)
    mask[64:] = False
    return mask


@wrong("7A", "a window as long as the text")
def longer_windows_see_nothing(n_queries, n_keys, window):
    return row_by_row(n_queries, n_keys, window) & (window <= max(n_keys, 1))


# --- 7B --------------------------------------------------------------------------------------------------------------


def scale_of(q, scale):
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@right("7B")
def online_over_blocks(q, k, v, block_mask, block_size, causal=False, scale=None):
    """A block at a time, with the running maximum of lecture 06."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v, there = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v, block_mask))
    n, m, dtype = q.shape[-2], k.shape[-2], q.dtype
    out = np.zeros((*lead, n, v.shape[-1]), dtype)
    for place in np.ndindex(lead):
        for a, row in enumerate(there[place]):
            rows = slice(a * block_size, min((a + 1) * block_size, n))
            top = np.full((rows.stop - rows.start, 1), -np.inf)
            total, o = np.zeros_like(top), np.zeros((len(top), v.shape[-1]))
            for b in np.flatnonzero(row):
                columns = slice(b * block_size, (b + 1) * block_size)
                s = q[place][rows] @ k[place][columns].T * scale_of(q, scale)
                if causal:
                    j = np.arange(m)[columns]
                    s = np.where(j <= np.arange(n)[rows, None] + m - n, s, -np.inf)
                new = np.maximum(top, s.max(-1, keepdims=True))
                safe = np.where(np.isneginf(new), 0, new)
                p, factor = np.exp(s - safe), np.exp(top - safe)
                total, o, top = total * factor + p.sum(-1, keepdims=True), o * factor + p @ v[place][columns], new
            out[place][rows] = o / np.where(total == 0, 1, total)
    return out


@right("7B")
def one_query_at_a_time(q, k, v, block_mask, block_size, causal=False, scale=None):
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v, there = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v, block_mask))
    out = np.zeros((*lead, q.shape[-2], v.shape[-1]), q.dtype)
    for place in np.ndindex(*lead, q.shape[-2]):
        *head, i = place
        head = tuple(head)
        j = np.arange(k.shape[-2])
        seen = there[head][i // block_size][j // block_size]
        if causal:
            seen = seen & (j <= i + k.shape[-2] - q.shape[-2])
        if seen.any():
            s = scale_of(q, scale) * (k[head][seen] @ q[place])
            p = np.exp(s - s.max())
            out[place] = p @ v[head][seen] / p.sum()
    return out


@wrong("7B", "Rows and columns of the block mask have changed places")
def columns_outside(q, k, v, block_mask, block_size, causal=False, scale=None):
    flipped = np.swapaxes(block_mask, -1, -2)
    return one_query_at_a_time(q, k, v, flipped, block_size, causal, scale) if flipped.shape == block_mask.shape else (
        one_query_at_a_time(q, k, v, block_mask, block_size, causal, scale)
    )  # fmt: skip


@wrong("7B", "nan")
def masked_afterwards(q, k, v, block_mask, block_size, causal=False, scale=None):
    n, m = q.shape[-2], k.shape[-2]
    mask = np.repeat(np.repeat(block_mask, block_size, -2), block_size, -1)[..., :n, :m]
    if causal:
        mask = mask & np.tri(n, m, m - n, dtype=bool)
    s = q @ np.swapaxes(k, -1, -2) * scale_of(q, scale) * mask
    p = np.exp(s - s.max(-1, keepdims=True)) * mask
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total) @ v


@wrong("7B", "the weights are those of the blocks that are there")
def scale_five_percent_off(q, k, v, block_mask, block_size, causal=False, scale=None):
    return one_query_at_a_time(q, k, v, block_mask, block_size, causal, 1.05 * scale_of(q, scale))


@wrong("7B", "Causal by blocks only")
def causal_blocks_only(q, k, v, block_mask, block_size, causal=False, scale=None):
    if causal and q.shape[-2] == k.shape[-2]:
        block_mask = block_mask & np.tri(*block_mask.shape[-2:], dtype=bool)
        causal = False
    return one_query_at_a_time(q, k, v, block_mask, block_size, causal, scale)


@wrong("7B", "a row of blocks without any is 0")
def empty_rows_are_nan(q, k, v, block_mask, block_size, causal=False, scale=None):
    out = one_query_at_a_time(q, k, v, block_mask, block_size, causal, scale)
    empty = ~np.repeat(np.asarray(block_mask).any(-1), block_size, -1)[..., : q.shape[-2]]
    return np.where(empty[..., None], np.nan, out)


@wrong("7B", "the last block")
def whole_blocks_only(q, k, v, block_mask, block_size, causal=False, scale=None):
    return attention_numpy(
        q[: len(q) // block_size * block_size],
        k,
        v,
        np.repeat(np.repeat(block_mask, block_size, 0), block_size, 1)[: len(q) // block_size * block_size, : len(k)],
        causal,
        scale,
    )


@wrong("7B", "leading axes")
def two_axes_only(q, k, v, block_mask, block_size, causal=False, scale=None):
    if q.ndim > 2:
        return attention_numpy(q, k, v, None, causal, scale)
    return one_query_at_a_time(q, k, v, block_mask, block_size, causal, scale)


@wrong("7B", "returned float64, expected float32")
def always_double(q, k, v, block_mask, block_size, causal=False, scale=None):
    return one_query_at_a_time(q, k, v, block_mask, block_size, causal, scale).astype(float)


@wrong("7B", "a scale that is given is used")
def falsy_scale(q, k, v, block_mask, block_size, causal=False, scale=None):
    return one_query_at_a_time(q, k, v, block_mask, block_size, causal, scale or None)


@wrong("7B", "causal")
def causal_forgotten(q, k, v, block_mask, block_size, causal=False, scale=None):
    return one_query_at_a_time(q, k, v, block_mask, block_size, False, scale)


# --- 7C --------------------------------------------------------------------------------------------------------------


@right("7C")
def loop_over_rows(scores, n_keep):
    chosen = np.zeros(scores.shape, dtype=bool)
    for place in np.ndindex(scores.shape[:-1]):
        i = place[-1]
        chosen[place][[0, i]] = True
        others = np.arange(1, i)
        best = others[np.argsort(-scores[place][1:i], kind="stable")]
        chosen[place][best[: n_keep - 2]] = True
    return chosen


@right("7C")
def by_counting_the_better(scores, n_keep):
    n = scores.shape[-1]
    i, j = np.indices((n, n))
    between = (j > 0) & (j < i)
    s = np.where(between, scores, -np.inf)
    better = (s[..., None, :] > s[..., :, None]) & between[..., None, :]
    tied = (s[..., None, :] == s[..., :, None]) & (np.arange(n) < np.arange(n)[:, None]) & between[..., None, :]
    return (between & ((better | tied).sum(-1) < n_keep - 2)) | (j == i) | (j == 0)


@wrong("7C", "Later blocks are chosen")
def top_k_of_everything(scores, n_keep):
    n = scores.shape[-1]
    ranked = np.where(np.eye(n, dtype=bool) | (np.arange(n) == 0), np.inf, scores)
    return np.argsort(np.argsort(-ranked, kind="stable")) < n_keep


@wrong("7C", "own block")
def scores_alone(scores, n_keep):
    n = scores.shape[-1]
    ranked = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    return (np.argsort(np.argsort(-ranked, kind="stable")) < n_keep) & np.tri(n, dtype=bool)


@wrong("7C", "One block too few")
def one_too_few(scores, n_keep):
    return loop_over_rows(scores, max(n_keep - 1, 2))


@wrong("7C", "returned an array of int64, expected booleans")
def numbers_of_blocks(scores, n_keep):
    return loop_over_rows(scores, n_keep).astype(int)


@wrong("7C", "of equal scores")
def not_stable(scores, n_keep):
    n = scores.shape[-1]
    noise = np.linspace(0, 1e-6, n)
    return loop_over_rows(scores + noise, n_keep)


@wrong("7C", "any numbers")
def a_thousand_for_infinity(scores, n_keep):
    n = scores.shape[-1]
    i, j = np.indices((n, n))
    ranked = np.where((i == j) | (j == 0), 1e3, np.where(j < i, scores, -1e3))
    return (np.argsort(np.argsort(-ranked, axis=-1, kind="stable"), axis=-1) < n_keep) & (j <= i)


@wrong("7C", "the rank of each block is the argsort of that list")
def the_order_for_the_ranks(scores, n_keep):
    i, j = np.indices(scores.shape[-2:])
    ranked = np.where((i == j) | (j == 0), np.inf, np.where(j < i, scores, -np.inf))
    return (np.argsort(-ranked, axis=-1, kind="stable") < n_keep) & (j <= i)


@wrong("7C", "leading axes")
def first_head_for_all(scores, n_keep):
    first = scores.reshape(-1, *scores.shape[-2:])[0]
    return np.broadcast_to(loop_over_rows(first, n_keep), scores.shape).copy()


@wrong("7C", "early rows have fewer blocks")
def fails_on_small_texts(scores, n_keep):
    if n_keep > scores.shape[-1]:
        raise ValueError("too few blocks")
    return loop_over_rows(scores, n_keep)


# --- 7F --------------------------------------------------------------------------------------------------------------


@right("7F")
def by_properties(compressed_attention):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((10, 4)) for _ in range(3))
    for m in (1, 2, 3):
        whole = compressed_attention(q, k, v, m)
        blocks = 10 // m
        means = [a[: blocks * m].reshape(blocks, m, 4).mean(1) for a in (k, v)]
        mask = np.arange(blocks) * m + m - 1 <= np.arange(10)[:, None]
        assert np.abs(whole - attention_numpy(q, *means, mask)).max() < 1e-9
        for t in range(10):
            later = k.copy()
            later[t + 1 :] += 5.0
            assert np.allclose(compressed_attention(q, later, v, m)[: t + 1], whole[: t + 1])


@right("7F")
def one_short_block(compressed_attention):
    """Seven tokens, blocks of three, one query at a time."""
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((3, 7, 4))
    found = compressed_attention(q, k, v, 3)
    for t in range(7):
        blocks = [range(3 * b, 3 * b + 3) for b in range((t + 1) // 3)]
        if not blocks:
            assert (found[t] == 0).all()
            continue
        scores = np.array([q[t] @ k[list(block)].mean(0) / 2 for block in blocks])
        p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        assert np.allclose(found[t], sum(w * v[list(block)].mean(0) for w, block in zip(p, blocks)))


@right("7F")
def with_pytorch(compressed_attention):
    import torch

    rng = np.random.default_rng(4)
    q, k, v = rng.normal(size=(13, 6)), rng.normal(size=(13, 6)), rng.normal(size=(13, 3))
    for m in (1, 3, 4, 5):
        n = 13 // m
        keys, values = (torch.from_numpy(a[: n * m].reshape(n, m, -1).mean(1)) for a in (k, v))
        mask = torch.arange(n) < ((torch.arange(13) + 1) // m)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            torch.from_numpy(q)[None], keys[None], values[None], attn_mask=mask[None]
        )[0].numpy()
        got = compressed_attention(q, k, v, m)
        assert np.allclose(got[m - 1 :], expected[m - 1 :])
        assert (got[: m - 1] == 0).all()


@wrong("7F", "which blocks may the last query see")
def whole_blocks_only_in_the_test(compressed_attention):
    rng = np.random.default_rng(3)
    for m in (1, 2, 4):
        q, k, v = rng.standard_normal((3, 8, 4))
        means = [a.reshape(8 // m, m, 4).mean(1) for a in (k, v)]
        mask = np.arange(8 // m) * m + m - 1 <= np.arange(8)[:, None]
        assert np.allclose(compressed_attention(q, k, v, m), attention_numpy(q, *means, mask))


@wrong("7F", "A test says no with an exception")
def returns_a_verdict(compressed_attention):
    q = np.ones((4, 2))
    return bool(np.allclose(compressed_attention(q, q, q, 1), q))


@wrong("7F", "it survived")
def only_m_of_1(compressed_attention):
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 6, 4))
    assert np.allclose(compressed_attention(q, k, v, 1), attention_numpy(q, k, v, causal=True))


@wrong("7F", "The right code is refused")
def expects_the_block_of_the_query(compressed_attention):
    q = np.random.default_rng(3).standard_normal((4, 2))
    assert compressed_attention(q, q, q, 2)[0].any()


@wrong("7F", "the scores are not scaled")
def only_the_leak(compressed_attention):
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 8, 4))
    before = compressed_attention(q, k, v, 4)
    for t in range(8):
        k2 = k.copy()
        k2[t + 1 :] = 9.0
        assert np.allclose(compressed_attention(q, k2, v, 4)[: t + 1], before[: t + 1])


@wrong("7F", "A test says no with an exception")
def does_nothing(compressed_attention):
    compressed_attention(np.ones((4, 2)), np.ones((4, 2)), np.ones((4, 2)), 2)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


EXAMPLE = numbers((32, 16)), numbers((32, 16), 1), numbers((32, 16), 2), np.tri(8, dtype=bool), 4
CALLS = {
    "7A": [((24, 24, 4), {}), ((1, 32, 6), {}), ((512, 512, 1024), {})],
    "7B": [
        (EXAMPLE, {"causal": True}),
        ((EXAMPLE[0][28:], *EXAMPLE[1:3], EXAMPLE[3][7:], 4), {"causal": True}),
        (tuple(a[None].astype(np.float32) for a in EXAMPLE[:3]) + (EXAMPLE[3], 4), {}),
    ],
    "7C": [
        ((numbers((8, 8)), 3), {}),
        ((numbers((9, 16, 16)).astype(np.float32), 4), {}),
        ((np.tile(np.arange(4), (4, 1)), 3), {}),
    ],
    "7D": [],
    "7E": [],
    "7F": [],
    "7G": [],
}
