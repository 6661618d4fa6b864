"""Answers to the exercises of lecture 04 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_04/
are further wrong answers.
"""

import numpy as np
import torch

from tests.lectures.collect import collect
from tests.lectures.lecture_04 import answers_kernels, answers_torch
from utils.exercises.lecture_04.gap import Reader

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 4A -------------------------------------------------------------------------------------------------------------


@right("4A")
def share_through_the_quotient(n, n_params, n_layers, d_model):
    return 1 - n_params / (n_params + 2.0 * n_layers * d_model * n)


@wrong("4A", "attention over the weights alone")
def ratio(n, n_params, n_layers, d_model):
    return 4 * n * d_model * n_layers / (2 * n_params)


@wrong("4A", "the weighted sum of the values")
def scores_only(n, n_params, n_layers, d_model):
    return 2 * n * d_model * n_layers / (2 * n_params + 2 * n * d_model * n_layers)


@wrong("4A", "the token sees n")
def mean_of_a_prompt(n, n_params, n_layers, d_model):
    return 2 * n * d_model * n_layers / (2.0 * n_params + 2 * n * d_model * n_layers)


@wrong("4A", "The layers are missing")
def one_layer(n, n_params, n_layers, d_model):
    return 4 * n * d_model / (2 * n_params + 4 * n * d_model)


@wrong("4A", "N counts all layers already")
def layers_in_both(n, n_params, n_layers, d_model):
    return 4 * n * d_model * n_layers / (2 * n_params * n_layers + 4 * n * d_model * n_layers)


@wrong("4A", "the share of the weights")
def the_weights(n, n_params, n_layers, d_model):
    return 2 * n_params / (2 * n_params + 4 * n * d_model * n_layers)


@wrong("4A", "lies between 0 and 1")
def per_cent(n, n_params, n_layers, d_model):
    return 100 * share_through_the_quotient(n, n_params, n_layers, d_model)


@wrong("4A", "returned a list")
def shares_in_a_list(n, n_params, n_layers, d_model):
    return [4 * i * d_model * n_layers / (2 * n_params + 4 * i * d_model * n_layers) for i in n.ravel().tolist()]


# --- 4C -------------------------------------------------------------------------------------------------------------


@right("4C")
def first_failure(lengths, scores, threshold):
    failed = np.hstack([scores <= threshold, np.ones((len(scores), 1), bool)]).argmax(axis=1)
    return np.where(failed > 0, lengths[failed - 1], 0)


@wrong("4C", "all shorter ones have to pass too")
def longest_that_passes(lengths, scores, threshold):
    return np.array([max([n for n, s in zip(lengths, row) if s > threshold], default=0) for row in scores])


@wrong("4C", "A score equal to the threshold")
def at_least(lengths, scores, threshold):
    passed = np.cumprod(scores >= threshold, axis=1).sum(axis=1)
    return np.concatenate([[0], lengths])[passed]


@wrong("4C", "how many lengths pass")
def how_many(lengths, scores, threshold):
    return np.cumprod(scores > threshold, axis=1).sum(axis=1)


@wrong("4C", "count the ones instead")
def by_argmin(lengths, scores, threshold):
    first_failure_or_0 = np.argmin(scores > threshold, axis=1)
    return np.where(scores[:, 0] > threshold, lengths[first_failure_or_0 - 1], 0) * (first_failure_or_0 > 0)


@wrong("4C", "the lengths are axis=1")
def along_the_models(lengths, scores, threshold):
    return np.concatenate([[0], lengths])[np.minimum.accumulate(scores > threshold).sum(axis=1)]


# --- 4B -------------------------------------------------------------------------------------------------------------


@right("4B")
def by_hand(place):
    hay = np.array([[7, 8, 9], [7, 8, 9], [7, 8, 9], [7, 8, 9], [7, 8, 9]])
    given = hay.copy()
    got = place(hay, np.array([1, 2, 3, 4, 5]), np.array([0.0, 1.0, 0.25, 0.75, 0.4]))
    assert got.tolist() == [[1, 8, 9], [7, 8, 2], [7, 3, 9], [7, 8, 4], [7, 5, 9]]
    assert (hay == given).all()
    for depth in (1.5, -0.1):
        refused = False
        try:
            place(hay[:1], np.array([1]), np.array([depth]))
        except ValueError:
            refused = True
        assert refused, depth


@wrong("4B", "Which place do you expect for a depth between two places")
def ends_only(place):
    hay = np.arange(10).reshape(2, 5)
    got = place(hay, np.array([77, 88]), np.array([0.0, 1.0]))
    assert got.tolist() == [[77, 1, 2, 3, 4], [5, 6, 7, 8, 88]]


@wrong("4B", "What do you expect for a depth of 0?")
def one_document_in_the_middle(place):
    """It lets every bug pass, and still it compares."""
    assert place(np.zeros((1, 5), int), np.array([7]), np.array([0.5]))[0, 2] == 7


@wrong("4B", "What should the haystack look like after the call")
def haystack_not_looked_at(place):
    hay = np.tile(np.arange(3), (5, 1))
    got = place(hay, np.array([11, 12, 13, 14, 15]), np.array([0.0, 1.0, 0.25, 0.75, 0.4]))
    assert got.tolist() == [[11, 1, 2], [0, 1, 12], [0, 13, 2], [0, 1, 14], [0, 15, 2]]


@wrong("4B", "What does the docstring promise for a depth of 1.5")
def no_bad_depths(place):
    hay = np.tile(np.arange(3), (5, 1))
    got = place(hay, np.array([11, 12, 13, 14, 15]), np.array([0.0, 1.0, 0.25, 0.75, 0.4]))
    assert got.tolist() == [[11, 1, 2], [0, 1, 12], [0, 13, 2], [0, 1, 14], [0, 15, 2]]
    assert hay.tolist() == 5 * [[0, 1, 2]]


@wrong("4B", "Have your documents needles of their own")
def one_needle_for_all(place):
    hay = np.tile(np.arange(3), (5, 1))
    got = place(hay, np.full(5, 11), np.array([0.0, 1.0, 0.25, 0.75, 0.4]))
    assert got.tolist() == [[11, 1, 2], [0, 1, 11], [0, 11, 2], [0, 1, 11], [0, 11, 2]]
    assert hay.tolist() == 5 * [[0, 1, 2]]


@wrong("4B", "The right code is refused")
def half_to_even(place):
    got = place(np.zeros((1, 4), int), np.ones(1, int), np.array([0.5]))
    assert got.tolist() == [[0, 1, 0, 0]]


@wrong("4B", "A test says no with an exception")
def says_it_with_a_value(place):
    return place(np.zeros((1, 4), int), np.ones(1, int), np.array([0.5])).sum() == 1


# --- 4F -------------------------------------------------------------------------------------------------------------


@right("4F")
def layer_by_layer(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    kept = [seq_len] * n_full + [np.where(seq_len < window, seq_len, window)] * n_windowed
    return sum(2 * n_bytes * n_kv_heads * d_head * tokens for tokens in kept)


@wrong("4F", "each token leaves a key and a value")
def keys_only(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return layer_by_layer(seq_len, n_kv_heads, d_head, n_full, n_windowed, window, n_bytes) // 2


@wrong("4F", "even before it is full")
def always_the_window(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full * seq_len + n_windowed * window)


@wrong("4F", "keep everything here")
def windows_ignored(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full + n_windowed) * seq_len


@wrong("4F", "share one window")
def one_window_for_all(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full * seq_len + np.minimum(seq_len, n_windowed * window))


@wrong("4F", "Full layers keep everything")
def a_window_for_all(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    kept = np.minimum(seq_len, window) if window else seq_len
    return 2 * n_kv_heads * d_head * n_bytes * (n_full + n_windowed) * kept


# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
rng = np.random.default_rng(0)
CALLS = {
    "4A": [
        ((np.array([1, 8, 32, 128]) * 1024,), {"n_params": 70_553_706_496, "n_layers": 80, "d_model": 8192}),
        ((np.array([2048]), 8_030_261_248, 32, 4096), {}),
    ],
    "4B": [],
    "4C": [
        ((np.array([4, 8, 16, 32, 64, 128]), 100 * rng.random((6, 6)), 85.6), {}),
        ((215 + np.array([0, 1000, 4000]), -rng.random((3, 3)), -0.14), {}),
    ],
    "4D": [((Reader(), torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[3, 1, 0, 2]]), [0, 1000, 16000], 3), {})],
    "4E": [],
    "4F": [((np.array([131072]), 8, 128, 18, 18, 128, 2), {}), ((np.array([10]), 8, 128, 32, 0, 0, 2), {})],
}
