"""Lecture 10: a memory of small features, and tiles that fit."""

import numpy as np
import pytest

from attention import linear


def test_a_memory_of_small_features_still_answers_with_an_average():
    q, k, v = np.full((4, 2), -5.0), np.full((4, 2), -5.0), np.arange(8.0).reshape(4, 2)
    found = linear.infini_attention(q, k, v, segment=2, gate=100.0)  # the memory alone
    np.testing.assert_allclose(found[2:], [v[:2].mean(0)] * 2, rtol=1e-9)
    assert not found[:2].any()  # nothing is in the memory yet


@pytest.mark.parametrize("d", [4, 64, 100, 120, 146, 147, 200, 250])
@pytest.mark.parametrize("d_v", [1, 16, 17, 64, 100])
def test_tiles_take_as_many_columns_as_fit(d, d_v):
    def fits(columns):
        return 4 * (32 * (d + 1) + 256 * columns + 16 * d * (columns | 1)) <= 48 * 1024

    columns, slices, shared = linear.linear_tiles(d, d_v)
    assert shared <= 48 * 1024 and 16 * columns * slices >= d_v > 16 * columns * (slices - 1)
    most = max(c for c in (1, 2, 3, 4) if c == 1 or fits(c))
    assert slices == -(-d_v // (16 * most))
