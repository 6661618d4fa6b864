"""Answers to the exercises of lecture 05 as learners write them: right ones, unlike the lecture's, and wrong ones."""

import itertools

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_05 import answers_kernels as kernels_05
from tests.lectures.lecture_05 import answers_memory as memory_05
from tests.lectures.lecture_05 import answers_testing as testing_05
from tests.lectures.lecture_05 import answers_torch as torch_05

RIGHT, WRONG, right, wrong = collect(kernels_05, memory_05, torch_05, testing_05)


# --- 5A --------------------------------------------------------------------------------------------------------------


def masked_attention(q, k, v, allowed):
    scores = np.where(allowed, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True) @ v


@right("5A")
def step_by_a_mask(x, keys, values, w_q, w_k, w_v):
    all_keys, all_values = np.vstack([keys, x @ w_k]), np.vstack([values, x @ w_v])
    allowed = np.tri(len(x), len(all_keys), k=len(keys), dtype=bool)
    return masked_attention(x @ w_q, all_keys, all_values, allowed), all_keys, all_values


@right("5A")
def step_token_by_token(x, keys, values, w_q, w_k, w_v):
    found = np.zeros((len(x), values.shape[1]))
    for i, token in enumerate(x):
        keys = np.append(keys, [token @ w_k], axis=0)
        values = np.append(values, [token @ w_v], axis=0)
        found[i] = masked_attention(token[None] @ w_q, keys, values, True)[0]
    return found, keys, values


@wrong("5A", "starts at the top left")
def step_top_left(x, keys, values, w_q, w_k, w_v):
    k, v = np.vstack([keys, x @ w_k]), np.vstack([values, x @ w_v])
    return masked_attention(x @ w_q, k, v, np.tri(len(x), len(k), dtype=bool)), k, v


@wrong("5A", "pass causal=True")
def step_not_causal(x, keys, values, w_q, w_k, w_v):
    k, v = np.vstack([keys, x @ w_k]), np.vstack([values, x @ w_v])
    return masked_attention(x @ w_q, k, v, True), k, v


@wrong("5A", "The cache comes back as it was")
def step_forgets(x, keys, values, w_q, w_k, w_v):
    out, _, _ = step_by_a_mask(x, keys, values, w_q, w_k, w_v)
    return out, keys, values


@wrong("5A", "The scale is missing")
def step_unscaled(x, keys, values, w_q, w_k, w_v):
    return step_by_a_mask(x, keys, values, w_q * np.sqrt(w_q.shape[1]), w_k, w_v)


@wrong("5A", "the tuple (out, keys, values)")
def step_only_out(x, keys, values, w_q, w_k, w_v):
    return step_by_a_mask(x, keys, values, w_q, w_k, w_v)[0]


@wrong("5A", "in another order: return (out, keys, values)")
def step_cache_first(x, keys, values, w_q, w_k, w_v):
    out, keys, values = step_by_a_mask(x, keys, values, w_q, w_k, w_v)
    return keys, values, out


@wrong("5A", "Only the last new token looks")
def step_of_the_last_token(x, keys, values, w_q, w_k, w_v):
    out, keys, values = step_by_a_mask(x, keys, values, w_q, w_k, w_v)
    return out[-1:], keys, values


@wrong("5A", "by the width of a key, not of x")
def step_scaled_by_the_model(x, keys, values, w_q, w_k, w_v):
    return step_by_a_mask(x, keys, values, w_q * np.sqrt(w_q.shape[1] / w_q.shape[0]), w_k, w_v)


@wrong("5A", "by the width of a key, not of a value")
def step_scaled_by_the_value(x, keys, values, w_q, w_k, w_v):
    return step_by_a_mask(x, keys, values, w_q * np.sqrt(w_q.shape[1] / w_v.shape[1]), w_k, w_v)


# --- 5F --------------------------------------------------------------------------------------------------------------


@right("5F")
def verify_by_takewhile(draft, logits):
    own = np.argmax(logits, axis=1)
    kept = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, own)))
    return own[: len(kept) + 1]


@right("5F")
def verify_by_cumprod(draft, logits):
    own = logits.argmax(1)
    n = int(np.cumprod(own[: len(draft)] == draft).sum())
    return np.concatenate([draft[:n], own[n : n + 1]]).astype(int)


@wrong("5F", "All matches are counted")
def verify_count(draft, logits):
    own = logits.argmax(-1)
    return own[: np.count_nonzero(own[:-1] == draft) + 1]


@wrong("5F", "All matches are counted")
def verify_later_matches(draft, logits):
    own = logits.argmax(-1)
    m = own[:-1] == draft
    return np.concatenate([draft[m], [own[m.sum()]]]).astype(int)


@wrong("5F", "ask first whether there is a mismatch")
def verify_by_argmax(draft, logits):
    own = logits.argmax(-1)
    n = (own[:-1] != draft).argmax() if len(draft) else 0
    return own[: n + 1]


@wrong("5F", "ask first whether there is a mismatch")
def verify_by_argmax_that_needs_a_draft(draft, logits):
    own = logits.argmax(-1)
    return own[: (own[:-1] != draft).argmax() + 1]


@wrong("5F", "not from the last row of logits")
def verify_with_the_last_row(draft, logits):
    n = int(np.cumprod(logits[:-1].argmax(-1) == draft).sum())
    return np.append(draft[:n], logits[-1].argmax())


@wrong("5F", "Everything the model says is taken")
def verify_nothing(draft, logits):
    return logits.argmax(-1)


@wrong("5F", "one token more")
def verify_without_bonus(draft, logits):
    own = logits.argmax(-1)
    wrong_places = np.flatnonzero(own[:-1] != draft)
    return own[: wrong_places[0] + 1] if len(wrong_places) else draft


@wrong("5F", "The model's own token is missing")
def verify_only_accepted(draft, logits):
    n = int(np.cumprod(logits[:-1].argmax(-1) == draft).sum())
    return draft[:n]


# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
some = np.random.default_rng(0)
matrices = [some.standard_normal((16, 8)) / 4 for _ in range(3)]
CALLS = (
    memory_05.CALLS
    | torch_05.CALLS
    | {
        "5A": [
            ((some.standard_normal((12, 16)), np.empty((0, 8)), np.empty((0, 8)), *matrices), {}),
            (
                (some.standard_normal((4, 16)), some.standard_normal((5, 8)), some.standard_normal((5, 8)), *matrices),
                {},
            ),
        ],
        "5F": [((np.array([1, 2, 0]), some.standard_normal((4, 5))), {}), ((np.array([], int), np.ones((1, 5))), {})],
    }
)
