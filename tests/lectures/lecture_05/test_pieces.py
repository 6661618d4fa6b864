"""Lecture 05: bytes, pages, codes and budgets at their edges."""

import numpy as np
import pytest
import torch

from attention import kv_cache as c


def test_the_bytes_of_a_cache_are_those_of_keys_and_values():
    assert c.KVCache(2, 3, 10, 4, torch.float16).n_bytes == 2 * (2 * 3 * 10 * 4) * 2


def test_of_an_odd_budget_the_larger_half_is_recent():
    weights = np.tril(np.full((8, 8), 0.1))
    weights[:, :3] += np.array([0.3, 0.2, 0.1])  # the heavy ones
    assert np.flatnonzero(c.keep_heavy(weights, 5)).tolist() == [0, 1, 5, 6, 7]


def test_half_precision_numbers_are_no_whole_numbers():
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="lengths must be integers"):
            c.whole_numbers("lengths", torch.ones(2, dtype=dtype))


def test_a_cache_in_pages_is_the_cache_again():
    cache = np.random.default_rng(0).standard_normal((3, 2, 11, 4)).astype(np.float32)
    lengths = [11, 4, 0]
    pages, table = c.cut_into_pages(cache, lengths, 4, [5, 2, 0, 3, 1, 4])
    assert table.tolist() == [[5, 2, 0], [3, -1, -1], [-1, -1, -1]]
    again = c.gather_pages(pages, table, lengths)
    for row, old, n in zip(again, cache, lengths):
        np.testing.assert_array_equal(row[:, :n], old[:, :n])
    assert np.isnan(pages[0, 3]).all() and np.isnan(pages[[1, 4]]).all()
    (one,), used = c.cut_into_pages(cache[1:], lengths[1:], 4, [0])
    np.testing.assert_array_equal(c.gather_pages(one[None], used, lengths[1:])[0, :, :4], cache[1, :, :4])


def test_equal_numbers_have_code_0_and_none_leaves_its_bits():
    codes, minimum, step = c.quantize(torch.full((1, 5), 0.1), 2, 1)  # half precision has no 0.1
    assert not codes.any() and step == 0 and abs(minimum.item() - 0.1) < 1e-4
    x = torch.linspace(1000.24, 1002.8, 9)[None]  # the minimum in half precision is 1000.0: 24 steps too low
    codes = c.quantize(x, 8, 1)[0]
    assert codes.max() == 255 and (codes.diff() >= 0).all()


def test_a_closed_cache_has_no_pages_and_no_length():
    pool = c.PagePool(4, 2, 1, 2)
    cache = c.PagedKVCache(pool, 2)
    cache.update(*torch.ones(2, 2, 1, 3, 2))
    assert cache.length == 3 and cache.block_table.shape == (2, 2)
    cache.close()
    assert cache.length == 0 and cache.tables == []
    again = c.PagedKVCache(pool, 2)
    again.update(*torch.ones(2, 2, 1, 4, 2))  # all four pages are free


def test_voters_stay_whatever_the_votes():
    weights = np.zeros((6, 6))
    weights[:, 0] = 1
    assert np.flatnonzero(c.keep_voted(weights, 5, n_voters=5)).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("key_axis", "of_keys"), [("channel", (1, 2, 1, 8)), ("token", (1, 2, 4, 1))])
def test_a_group_has_a_minimum_for_each_channel_of_keys_and_each_token_of_values(key_axis, of_keys):
    cache = c.QuantizedKVCache(4, group=4, key_axis=key_axis)
    cache.update(*torch.randn(2, 1, 2, 5, 8))
    for kind, shape in zip(cache.stored, (of_keys, (1, 2, 4, 1))):
        (_, minimum, step), *_ = kind
        assert minimum.shape == step.shape == shape
