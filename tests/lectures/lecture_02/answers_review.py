"""Answers to exercise 2C, tests of a layer: right ones, unlike the lecture's, and wrong ones, as in answers.py."""

import numpy as np

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], bool)


def by_loops(x, w_q, w_k, w_v, w_o, n_heads, mask):
    """One sentence, query by query: (out, weights)."""
    n, d = x.shape[0], x.shape[1] // n_heads
    out, weights = np.zeros((n, w_o.shape[1])), np.zeros((n_heads, n, n))
    for h in range(n_heads):
        own = slice(h * d, h * d + d)
        q, k, v = x @ w_q[:, own], x @ w_k[:, own], x @ w_v[:, own]
        for i in range(n if mask.any() else 0):
            scores = np.array([q[i] @ k[j] / np.sqrt(d) if mask[j] else -np.inf for j in range(n)])
            powers = np.exp(scores - scores.max())
            weights[h, i] = powers / powers.sum()
            out[i] += weights[h, i] @ v @ w_o[own]
    return out, weights


def case(size=1.0, seed=4):
    rng = np.random.default_rng(seed)
    return size * rng.normal(size=(4, 4, 6)), rng.normal(size=(4, 6, 6))


@right("2C")
def against_loops(layer):
    for size in (0.5, 30):
        x, w = case(size)
        out, weights = layer(x, *w, 3, MASK)
        for b in range(len(x)):
            expected = by_loops(x[b], *w, 3, MASK[b])
            np.testing.assert_allclose(out[b], expected[0], atol=1e-8)
            np.testing.assert_allclose(weights[b], expected[1], atol=1e-8)


def compare(layer, sentences, sizes=(1.0, 40.0), masks=MASK):
    for size in sizes:
        x, w = case(size)
        out, _ = layer(x[sentences], *w, 2, masks[sentences])
        for b, i in enumerate(sentences):
            assert np.allclose(out[b], by_loops(x[i], *w, 2, masks[i])[0])


@right("2C")
def with_a_raise(layer):
    for size in (1, 40):
        x, w = case(size)
        out, weights = layer(x, *w, 2, MASK)
        for b in range(4):
            for got, wanted in zip((out[b], weights[b]), by_loops(x[b], *w, 2, MASK[b])):
                if not np.abs(got - wanted).max() < 1e-6:
                    raise ValueError(b)


@wrong("2C", "With what do you compare the output?")
def shapes_and_finite_numbers_only(layer):
    x, w = case(40)
    out, weights = layer(x, *w, 2, np.ones((4, 4), bool))
    assert out.shape == x.shape and weights.shape == (4, 2, 4, 4) and np.isfinite(out).all()


@wrong("2C", "Is there a sentence without any key")
def no_empty_sentence(layer):
    compare(layer, [0, 1, 3])


@wrong("2C", "How large are the scores")
def small_scores_only(layer):
    compare(layer, [0, 1, 2, 3], sizes=(1.0,))


@wrong("2C", "are your weights more than 0 and 1")
def large_scores_only(layer):
    compare(layer, [0, 1, 2, 3], sizes=(40.0,))


@wrong("2C", "How many sentences has your test")
def one_sentence(layer):
    compare(layer, [0])


@wrong("2C", "Which weights do you look at")
def nothing_masked(layer):
    compare(layer, [0, 1, 2, 3], masks=np.ones((4, 4), bool))


@wrong("2C", "With what do you compare the output?")
def weights_that_sum_to_one(layer):
    x, w = case(1.0)
    _, weights = layer(x, *w, 2, MASK[[0, 1, 3, 3]])
    assert np.allclose(weights.sum(-1), 1)


@wrong("2C", "Do you look at the weights that come back?")
def the_output_only(layer):
    compare(layer, [0, 1, 2, 3])


@wrong("2C", "With how many heads do you call it?")
def one_head(layer):
    for size in (1.0, 40.0):
        x, w = case(size)
        out, weights = layer(x, *w, 1, MASK)
        for b in range(4):
            expected = by_loops(x[b], *w, 1, MASK[b])
            assert np.allclose(out[b], expected[0]) and np.allclose(weights[b], expected[1])


@wrong("2C", "A test says no with an exception")
def returns_a_verdict(layer):
    x, w = case()
    return np.allclose(layer(x, *w, 2, MASK)[0], 0)


@wrong("2C", "The right code is refused")
def wants_ones_everywhere(layer):
    x, w = case()
    assert np.allclose(layer(x, *w, 2, MASK)[1].sum(-1), 1)
