"""Lecture 05: the cache as a module of PyTorch, and the decoder that a learner's test is tried on."""

import pytest
import torch

from attention import kv_cache as c


def test_a_cache_is_a_module_whose_memory_moves_and_is_not_saved():
    cache = c.KVCache(1, 2, 3, 4)
    assert not list(cache.parameters()) and not cache.state_dict()
    assert cache.float().k.dtype == cache.v.dtype == torch.float32
    k, v = cache(torch.ones(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))
    assert k.data_ptr() == cache.k.data_ptr() and v.shape == (1, 2, 2, 4) and cache.length == 2


def test_the_decoder_of_the_exercise_gives_what_reading_alone_gives():
    c.test_decoder(c.Decoder)

    class Late(c.Decoder):
        def reorder(self, rows):
            self.k = self.k[rows]

    with pytest.raises(AssertionError):
        c.test_decoder(Late)
