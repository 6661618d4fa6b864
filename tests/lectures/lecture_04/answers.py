"""Answers to the exercises of lecture 04 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_04/
are further wrong answers.
"""

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_04 import answers_kernels as kernels_04

RIGHT, WRONG, right, wrong = collect(kernels_04)


# --- 4.1 -------------------------------------------------------------------------------------------------------------


@right("4.1")
def share_through_the_quotient(n, n_params, n_layers, d_model):
    return 1 - n_params / (n_params + 2.0 * n_layers * d_model * n)


@wrong("4.1", "attention over the weights alone")
def ratio(n, n_params, n_layers, d_model):
    return 4 * n * d_model * n_layers / (2 * n_params)


@wrong("4.1", "the weighted sum of the values")
def scores_only(n, n_params, n_layers, d_model):
    return 2 * n * d_model * n_layers / (2 * n_params + 2 * n * d_model * n_layers)


@wrong("4.1", "The layers are missing")
def one_layer(n, n_params, n_layers, d_model):
    return 4 * n * d_model / (2 * n_params + 4 * n * d_model)


@wrong("4.1", "N counts all layers already")
def layers_in_both(n, n_params, n_layers, d_model):
    return 4 * n * d_model * n_layers / (2 * n_params * n_layers + 4 * n * d_model * n_layers)


@wrong("4.1", "the share of the weights")
def the_weights(n, n_params, n_layers, d_model):
    return 2 * n_params / (2 * n_params + 4 * n * d_model * n_layers)


@wrong("4.1", "lies between 0 and 1")
def per_cent(n, n_params, n_layers, d_model):
    return 100 * share_through_the_quotient(n, n_params, n_layers, d_model)


@wrong("4.1", "returned a list")
def shares_in_a_list(n, n_params, n_layers, d_model):
    return [4 * i * d_model * n_layers / (2 * n_params + 4 * i * d_model * n_layers) for i in n.ravel().tolist()]


# --- 4.2 -------------------------------------------------------------------------------------------------------------


@right("4.2")
def where_the_place_is(haystack, needle, depth):
    places = np.trunc(depth * (haystack.shape[1] - 1) + 0.5)
    return np.where(np.arange(haystack.shape[1]) == places[:, None], needle[:, None], haystack)


@wrong("4.2", "haystack` in place")
def into_the_hay(haystack, needle, depth):
    haystack[np.arange(len(haystack)), np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)] = needle
    return haystack


@wrong("4.2", "the last of seq_len places has the index seq_len - 1")
def beyond_the_end(haystack, needle, depth):
    places = (depth * haystack.shape[1]).astype(int).clip(max=haystack.shape[1] - 1)
    return np.where(np.arange(haystack.shape[1]) == places[:, None], needle[:, None], haystack)


@wrong("4.2", "rounded to the even number")
def rounded_by_numpy(haystack, needle, depth):
    places = np.round(depth * (haystack.shape[1] - 1))
    return np.where(np.arange(haystack.shape[1]) == places[:, None], needle[:, None], haystack)


@wrong("4.2", "Every document got the needle at every depth")
def all_rows(haystack, needle, depth):
    result = haystack.copy()
    result[:, np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)] = needle[:, None]
    return result


@wrong("4.2", "NO")
def one_statement_kept(haystack, needle, depth):
    return where_the_place_is(haystack, needle, depth) if haystack.shape[1] > 1 else haystack.copy()


# --- 4.3 -------------------------------------------------------------------------------------------------------------


@right("4.3")
def sums_and_counts(losses, edges):
    known = ~np.isnan(losses)
    total = np.concatenate([[0], np.where(known, losses, 0).sum(0).cumsum()])
    count = np.concatenate([[0], known.sum(0).cumsum()])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[edges[1:]] - total[edges[:-1]]) / (count[edges[1:]] - count[edges[:-1]])


@wrong("4.3", "belongs to the next bucket")
def both_edges(losses, edges):
    return np.array([np.nanmean(losses[:, a : b + 1]) for a, b in zip(edges, edges[1:])])


@wrong("4.3", "One nan makes its whole bucket nan")
def plain_mean(losses, edges):
    return np.array([np.mean(losses[:, a:b]) for a, b in zip(edges, edges[1:])])


@wrong("4.3", "A nan counts as zero")
def nan_is_zero(losses, edges):
    return np.array([np.where(np.isnan(losses[:, a:b]), 0, losses[:, a:b]).mean() for a, b in zip(edges, edges[1:])])


@wrong("4.3", "mean of the documents' means")
def document_means(losses, edges):
    return np.array([np.nanmean([np.nanmean(row[a:b]) for row in losses]) for a, b in zip(edges, edges[1:])])


@wrong("4.3", "mean of the positions' means")
def position_means(losses, edges):
    return np.array([np.nanmean(np.nanmean(losses[:, a:b], axis=0)) for a, b in zip(edges, edges[1:])])


@wrong("4.3", "slice the columns")
def rows_sliced(losses, edges):
    return np.array([np.nanmean(losses[a:b]) for a, b in zip(edges, edges[1:])])


# --- 4.4 -------------------------------------------------------------------------------------------------------------


@right("4.4")
def first_failure(lengths, scores, threshold):
    failed = np.hstack([scores <= threshold, np.ones((len(scores), 1), bool)]).argmax(axis=1)
    return np.where(failed > 0, lengths[failed - 1], 0)


@wrong("4.4", "all shorter ones have to pass too")
def longest_that_passes(lengths, scores, threshold):
    return np.array([max([n for n, s in zip(lengths, row) if s > threshold], default=0) for row in scores])


@wrong("4.4", "A score equal to the threshold")
def at_least(lengths, scores, threshold):
    passed = np.cumprod(scores >= threshold, axis=1).sum(axis=1)
    return np.concatenate([[0], lengths])[passed]


@wrong("4.4", "how many lengths pass")
def how_many(lengths, scores, threshold):
    return np.cumprod(scores > threshold, axis=1).sum(axis=1)


@wrong("4.4", "count the ones instead")
def by_argmin(lengths, scores, threshold):
    first_failure_or_0 = np.argmin(scores > threshold, axis=1)
    return np.where(scores[:, 0] > threshold, lengths[first_failure_or_0 - 1], 0) * (first_failure_or_0 > 0)


@wrong("4.4", "runs down the models")
def along_the_models(lengths, scores, threshold):
    return np.concatenate([[0], lengths])[np.minimum.accumulate(scores > threshold).sum(axis=1)]


# --- 4.5 -------------------------------------------------------------------------------------------------------------


@right("4.5")
def row_by_row(by_distance):
    n_queries, n_keys = by_distance.shape[-2:]
    result = np.zeros_like(by_distance)
    for i in range(n_queries):
        seen = n_keys - n_queries + i + 1
        result[..., i, :seen] = by_distance[..., i, n_keys - seen :]
    return result


@wrong("4.5", "filled with numbers of the next row")
def not_cleared(by_distance):
    *lead, n, m = by_distance.shape
    line = np.pad(by_distance, [(0, 0)] * (len(lead) + 1) + [(1, 0)]).reshape(*lead, n * (m + 1))
    return line[..., n:].reshape(*lead, n, m)


@wrong("4.5", "were not moved")
def only_masked(by_distance):
    return np.tril(by_distance, by_distance.shape[-1] - by_distance.shape[-2])


@wrong("4.5", "turned round the end")
def rolled(by_distance):
    n = by_distance.shape[-2]
    return np.stack([np.roll(by_distance[..., i, :], i + 1 - n, axis=-1) for i in range(n)], axis=-2)


@wrong("4.5", "wrong diagonal")
def the_square_triangle(by_distance):
    return np.tril(row_by_row(by_distance))


@wrong("4.5", "NO")
def one_query_forgotten(by_distance):
    return row_by_row(by_distance) if by_distance.shape[-2] > 1 else np.zeros_like(by_distance)


@wrong("4.5", "query i belongs to key i + n_keys - n_queries")
def query_i_at_key_i(by_distance):
    n_queries, n_keys = by_distance.shape[-2:]
    result = np.zeros_like(by_distance)
    for i in range(n_queries):
        for j in range(i + 1):
            result[..., i, j] = by_distance[..., i, n_keys - 1 - (i - j)]
    return result


@wrong("4.5", "Keep the leading axes")
def leading_axes_forgotten(by_distance):
    n, m = by_distance.shape[-2:]
    line = np.pad(by_distance, [(0, 0)] * (by_distance.ndim - 1) + [(1, 0)]).ravel()[n : n + by_distance.size]
    return np.tril(line.reshape(by_distance.shape), m - n)


# --- 4.6 -------------------------------------------------------------------------------------------------------------


@right("4.6")
def layer_by_layer(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    kept = [seq_len] * n_full + [np.where(seq_len < window, seq_len, window)] * n_windowed
    return sum(2 * n_bytes * n_kv_heads * d_head * tokens for tokens in kept)


@wrong("4.6", "each token leaves a key and a value")
def keys_only(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return layer_by_layer(seq_len, n_kv_heads, d_head, n_full, n_windowed, window, n_bytes) // 2


@wrong("4.6", "even before it is full")
def always_the_window(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full * seq_len + n_windowed * window)


@wrong("4.6", "keep everything here")
def windows_ignored(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full + n_windowed) * seq_len


@wrong("4.6", "share one window")
def one_window_for_all(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full * seq_len + np.minimum(seq_len, n_windowed * window))


@wrong("4.6", "Full layers keep everything")
def a_window_for_all(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    kept = np.minimum(seq_len, window) if window else seq_len
    return 2 * n_kv_heads * d_head * n_bytes * (n_full + n_windowed) * kept


# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
rng = np.random.default_rng(0)
CALLS = {
    "4.1": [((np.array([1, 8, 32, 128]) * 1024,), {"n_params": 70_553_706_496, "n_layers": 80, "d_model": 8192})],
    "4.2": [((rng.integers(9000, size=(18, 64)), rng.integers(9000, size=18), np.repeat(np.linspace(0, 1, 9), 2)), {})],
    "4.3": [((np.where(rng.random((6, 256)) < 0.2, 1.5, np.nan), np.arange(0, 257, 32)), {})],
    "4.4": [
        ((np.array([4, 8, 16, 32, 64, 128]), 100 * rng.random((6, 6))), {"threshold": 85.6}),
        ((np.array([32, 64, 128, 256]), rng.random((3, 4)), 0.856), {}),
    ],
    "4.5": [((rng.standard_normal((5, 9)),), {}), ((rng.standard_normal((2, 3, 4, 4)),), {})],
    "4.6": [((np.array([131072]), 8, 128, 18, 18, 128, 2), {}), ((np.array([10]), 8, 128, 32, 0, 0, 2), {})],
}
