"""Answers to the exercises of lecture 05 as learners write them: right ones, unlike the lecture's, and wrong ones."""

import itertools

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_05 import answers_kernels as kernels_05
from tests.lectures.lecture_05 import answers_memory as memory_05

RIGHT, WRONG, right, wrong = collect(kernels_05, memory_05)


# --- 5.1 -------------------------------------------------------------------------------------------------------------


def masked_attention(q, k, v, allowed):
    scores = np.where(allowed, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True) @ v


@right("5.1")
def step_by_a_mask(x, keys, values, w_q, w_k, w_v):
    all_keys, all_values = np.vstack([keys, x @ w_k]), np.vstack([values, x @ w_v])
    allowed = np.tri(len(x), len(all_keys), k=len(keys), dtype=bool)
    return masked_attention(x @ w_q, all_keys, all_values, allowed), all_keys, all_values


@right("5.1")
def step_token_by_token(x, keys, values, w_q, w_k, w_v):
    found = np.zeros((len(x), values.shape[1]))
    for i, token in enumerate(x):
        keys = np.append(keys, [token @ w_k], axis=0)
        values = np.append(values, [token @ w_v], axis=0)
        found[i] = masked_attention(token[None] @ w_q, keys, values, True)[0]
    return found, keys, values


@wrong("5.1", "starts at the top left")
def step_top_left(x, keys, values, w_q, w_k, w_v):
    k, v = np.vstack([keys, x @ w_k]), np.vstack([values, x @ w_v])
    return masked_attention(x @ w_q, k, v, np.tri(len(x), len(k), dtype=bool)), k, v


@wrong("5.1", "pass causal=True")
def step_not_causal(x, keys, values, w_q, w_k, w_v):
    k, v = np.vstack([keys, x @ w_k]), np.vstack([values, x @ w_v])
    return masked_attention(x @ w_q, k, v, True), k, v


@wrong("5.1", "The cache comes back as it was")
def step_forgets(x, keys, values, w_q, w_k, w_v):
    out, _, _ = step_by_a_mask(x, keys, values, w_q, w_k, w_v)
    return out, keys, values


@wrong("5.1", "The scale is missing")
def step_unscaled(x, keys, values, w_q, w_k, w_v):
    return step_by_a_mask(x, keys, values, w_q * np.sqrt(w_q.shape[1]), w_k, w_v)


@wrong("5.1", "the tuple (out, keys, values)")
def step_only_out(x, keys, values, w_q, w_k, w_v):
    return step_by_a_mask(x, keys, values, w_q, w_k, w_v)[0]


# --- 5.2 -------------------------------------------------------------------------------------------------------------


@right("5.2")
def flops_by_weights(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    weights = n_layers * (4 * d_model**2 + 2 * d_model * d_ff) + d_model * vocab_size
    return 2 * n_new * weights + 4 * n_layers * d_model * n_new * n_keys


@wrong("5.2", "the factor 2 is missing")
def multiplications_only(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return flops_by_weights(n_new, n_keys, d_model, d_ff, n_layers, vocab_size) // 2


@wrong("5.2", "not n_new squared")
def square_attention(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return flops_by_weights(n_new, n_new, d_model, d_ff, n_layers, vocab_size)


@wrong("5.2", "Old tokens are not projected again")
def no_cache_at_all(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return flops_by_weights(n_keys, n_keys, d_model, d_ff, n_layers, vocab_size)


@wrong("5.2", "only those of the n_new tokens are computed")
def keys_of_old_tokens_again(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    total = 2 * n_new * d_model * vocab_size
    for _ in range(n_layers):
        total = total + 4 * n_new * d_model**2 + 4 * n_keys * d_model**2  # queries, output; keys, values
        total = total + 4 * n_new * d_model * d_ff + 4 * n_new * n_keys * d_model
    return total


@wrong("5.2", "The output layer is missing")
def layers_only(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return flops_by_weights(n_new, n_keys, d_model, d_ff, n_layers, 0)


@wrong("5.2", "returned the shape")
def all_together(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return np.array(flops_by_weights(n_new, n_keys, d_model, d_ff, n_layers, vocab_size).sum())


# --- 5.3 -------------------------------------------------------------------------------------------------------------


@right("5.3")
def by_cumsum(lengths, n_keys):
    inside = np.arange(n_keys)[::-1] < lengths[:, None]
    return inside.reshape(len(lengths), 1, 1, n_keys), np.maximum(np.cumsum(inside, axis=1) - 1, 0)


@right("5.3")
def row_by_row(lengths, n_keys):
    rows = [[0] * (n_keys - n) + list(range(n)) for n in lengths]
    mask = [[[[False] * (n_keys - n) + [True] * n]] for n in lengths]
    return np.array(mask, dtype=bool), np.array(rows, dtype=np.int64)


@wrong("5.3", "Positions count the padding")
def positions_of_columns(lengths, n_keys):
    mask, _ = by_cumsum(lengths, n_keys)
    return mask, np.tile(np.arange(n_keys), (len(lengths), 1))


@wrong("5.3", "padding is on the right")
def padded_right(lengths, n_keys):
    inside = np.arange(n_keys) < lengths[:, None]
    return inside[:, None, None], np.where(inside, np.arange(n_keys), 0)


@wrong("5.3", "negative positions")
def negative_positions(lengths, n_keys):
    positions = np.arange(n_keys) - (n_keys - lengths[:, None])
    return (positions >= 0)[:, None, None], positions


@wrong("5.3", "Positions count from 1")
def from_one(lengths, n_keys):
    mask, _ = by_cumsum(lengths, n_keys)
    return mask, np.cumsum(mask[:, 0, 0], axis=1)


@wrong("5.3", "wrong way round")
def mask_of_padding(lengths, n_keys):
    mask, positions = by_cumsum(lengths, n_keys)
    return ~mask, positions


# --- 5.4 -------------------------------------------------------------------------------------------------------------


@right("5.4")
def verify_by_takewhile(draft, logits):
    own = np.argmax(logits, axis=1)
    kept = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, own)))
    return own[: len(kept) + 1]


@right("5.4")
def verify_by_cumprod(draft, logits):
    own = logits.argmax(1)
    n = int(np.cumprod(own[: len(draft)] == draft).sum())
    return np.concatenate([draft[:n], own[n : n + 1]]).astype(int)


@wrong("5.4", "All matches are counted")
def verify_count(draft, logits):
    own = logits.argmax(-1)
    return own[: np.count_nonzero(own[:-1] == draft) + 1]


@wrong("5.4", "All matches are counted")
def verify_later_matches(draft, logits):
    own = logits.argmax(-1)
    m = own[:-1] == draft
    return np.concatenate([draft[m], [own[m.sum()]]]).astype(int)


@wrong("5.4", "ask first whether there is a mismatch")
def verify_by_argmax(draft, logits):
    own = logits.argmax(-1)
    n = (own[:-1] != draft).argmax() if len(draft) else 0
    return own[: n + 1]


@wrong("5.4", "ask first whether there is a mismatch")
def verify_by_argmax_that_needs_a_draft(draft, logits):
    own = logits.argmax(-1)
    return own[: (own[:-1] != draft).argmax() + 1]


@wrong("5.4", "not from the last row of logits")
def verify_with_the_last_row(draft, logits):
    n = int(np.cumprod(logits[:-1].argmax(-1) == draft).sum())
    return np.append(draft[:n], logits[-1].argmax())


@wrong("5.4", "Everything the model says is taken")
def verify_nothing(draft, logits):
    return logits.argmax(-1)


@wrong("5.4", "one token more")
def verify_without_bonus(draft, logits):
    own = logits.argmax(-1)
    wrong_places = np.flatnonzero(own[:-1] != draft)
    return own[: wrong_places[0] + 1] if len(wrong_places) else draft


@wrong("5.4", "The model's own token is missing")
def verify_only_accepted(draft, logits):
    n = int(np.cumprod(logits[:-1].argmax(-1) == draft).sum())
    return draft[:n]


# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
some = np.random.default_rng(0)
matrices = [some.standard_normal((16, 8)) / 4 for _ in range(3)]
CALLS = memory_05.CALLS | {
    "5.1": [
        ((some.standard_normal((12, 16)), np.empty((0, 8)), np.empty((0, 8)), *matrices), {}),
        ((some.standard_normal((4, 16)), some.standard_normal((5, 8)), some.standard_normal((5, 8)), *matrices), {}),
    ],
    "5.2": [((np.arange(1, 33), np.arange(1, 33), 64, 128, 2, 103), {})],
    "5.3": [((np.array([20, 7, 13]), 20), {}), ((np.array([21, 8, 14]), 21), {})],
    "5.4": [((np.array([1, 2, 0]), some.standard_normal((4, 5))), {}), ((np.array([], int), np.ones((1, 5))), {})],
}
