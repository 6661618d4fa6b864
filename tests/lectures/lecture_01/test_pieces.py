"""Lecture 01: the pieces beside the three implementations, each against a loop or a formula."""

import math

import numpy as np
import pytest

from attention import fundamentals as f
from utils import cuda


def test_additive_scores_equal_loops():
    rng = np.random.default_rng(0)
    q, k, w_q, w_k, v = (rng.standard_normal(shape) for shape in ((2, 3), (4, 5), (3, 6), (5, 6), (6,)))
    expected = [[sum(v[a] * math.tanh(i @ w_q[:, a] + j @ w_k[:, a]) for a in range(6)) for j in k] for i in q]
    np.testing.assert_allclose(f.additive_scores(q, k, w_q, w_k, v), expected, rtol=1e-12)


def test_local_weights_are_a_softmax_over_the_window_times_a_gaussian():
    scores = np.random.default_rng(0).standard_normal((2, 7))
    found = f.local_weights(scores, np.array([1.0, 4.5]), 2)
    for row, centre, weights in zip(scores, (1.0, 4.5), found):
        near = [j for j in range(7) if abs(j - centre) <= 2]  # the window's ends belong to it
        total = sum(math.exp(row[j]) for j in near)
        expected = [math.exp(row[j]) / total * math.exp(-((j - centre) ** 2) / 2) if j in near else 0 for j in range(7)]
        np.testing.assert_allclose(weights, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="at least 1"):
        f.local_weights(scores, np.zeros(2), 0.5)


@pytest.mark.parametrize(("n", "m", "d"), [(5, 7, 3), (16, 16, 4), (33, 18, 20)])
def test_scores_and_blends_of_any_size(n, m, d):
    rng = np.random.default_rng(0)
    q, k, p, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, d), (m, d), (n, m), (m, d)))
    block, of_scores, of_out = (16, 16), np.zeros((n, m), np.float32), np.zeros((n, d), np.float32)
    rows = -(-n // 16)
    cuda.compile(f.SCORES)[(-(-m // 16), rows), block](q, k, of_scores, n, m, d, 0.5)
    np.testing.assert_allclose(of_scores, 0.5 * q @ k.T, atol=1e-5)
    cuda.compile(f.BLEND)[(-(-d // 16), rows), block](p, v, of_out, n, m, d)
    np.testing.assert_allclose(of_out, p @ v, atol=1e-5)
