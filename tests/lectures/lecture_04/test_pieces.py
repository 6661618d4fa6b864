"""Lecture 04: where a needle lies, what a bucket without losses says, and what a prompt costs, against loops and sums."""

import warnings

import numpy as np
import pytest

from attention import long_context as lc


def test_a_needle_lies_at_the_place_that_is_nearest_to_its_depth():
    haystack = np.arange(30).reshape(6, 5)
    depth = np.array([0.0, 1.0, 0.5, 0.125, 0.12, 0.3])  # 0.125 is as near to the first place as to the second
    found = lc.place_needle(haystack, np.arange(100, 106), depth)
    for row, old, needle, place in zip(found, haystack, range(100, 106), (0, 4, 2, 1, 0, 1)):
        assert row[place] == needle and np.array_equal(np.delete(row, place), np.delete(old, place))
    assert np.array_equal(haystack, np.arange(30).reshape(6, 5))
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="depth must lie between 0 and 1"):
            lc.place_needle(haystack[:1], np.array([7]), np.array([wrong]))


def test_a_bucket_without_losses_is_nan_without_a_warning():
    losses = np.array([[np.nan, 1.0, 3.0, np.nan], [np.nan, 2.0, np.nan, np.nan]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lc.loss_by_position(losses, np.array([0, 1, 3, 4, 4]))
    np.testing.assert_array_equal(found, [np.nan, 2.0, np.nan, np.nan])


@pytest.mark.parametrize("window", [3, None])
def test_the_next_token_reads_the_weights_and_the_cache(window):
    model = {"active": 1000, "full": 2, "windowed": 3, "window": window, "d_attention": 8, "n_kv_heads": 2, "d_head": 4}
    prefill, cache, read = lc.prompt_cost(model, 10, n_bytes=1)
    pairs = 2 * 55 + 3 * (sum(min(t, 3) for t in range(1, 11)) if window else 0)
    assert prefill == 2 * 1000 * 10 + 4 * 8 * pairs
    assert cache == 2 * 2 * 4 * (2 * 10 + 3 * (3 if window else 0)) and read == 1000 + cache
