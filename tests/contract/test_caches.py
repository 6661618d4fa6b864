"""Caches, packs and ways to generate: sizes, types and devices."""

import re

import numpy as np
import pytest
import torch

from attention import kv_cache
from attention.kv_cache import (
    KVCache,
    PagedKVCache,
    PagePool,
    QuantizedKVCache,
    RingKVCache,
    SinkKVCache,
    beam_search,
    generate,
    generate_ragged,
    generate_speculative,
    new_caches,
)
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import Rotary, apply_rope_torch

TYPES = (torch.float64, torch.float32, torch.bfloat16)


def tokens(n, dtype=torch.float64, d_head=4, seed=0):
    """Keys and values (1, 2, n, d_head)."""
    drawn = np.random.default_rng(seed).standard_normal((2, 1, 2, n, d_head))
    return tuple(torch.from_numpy(drawn).to(dtype))


def small_model(dtype=torch.float64):
    torch.manual_seed(0)
    config = TransformerConfig(11, 8, 2, 1, 16)
    return TransformerLM(config, positions=Rotary(config.d_head)).to(dtype)


MAKERS = {
    "contiguous": lambda dtype, device: KVCache(1, 2, 9, 4, dtype, device),
    "ring": lambda dtype, device: RingKVCache(1, 2, 9, 4, dtype, device),
    "paged": lambda dtype, device: PagedKVCache(PagePool(9, 2, 2, 4, dtype, device), 1),
    "quantised": lambda dtype, device: QuantizedKVCache(8, 2),
    "sinks": lambda dtype, device: SinkKVCache(9, 2, Rotary(4).frequencies),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_cache_gives_back_what_it_was_given_in_its_type(make, dtype):
    cache, (k, v) = make(dtype, None), tokens(7, dtype)
    for t in range(7):
        found = cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
    for result, given in zip(found, (k, v), strict=True):
        assert result.dtype == dtype and result.shape == given.shape
        torch.testing.assert_close(result.double(), given.double(), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_cache_makes_its_tensors_where_its_keys_lie(make):
    with torch.device("meta"):  # what is made without a device now lies elsewhere
        cache, (k, v) = make(torch.float64, "cpu"), tokens(12, d_head=4)
        for t in range(9 if isinstance(cache, KVCache) else 12):
            found = cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert all(t.device.type == "cpu" for t in found)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_cache_works_on_another_device(make):
    cache, (k, v) = make(torch.float64, "meta"), tokens(3)
    found = [cache.update(k[:, :, t : t + 1].to("meta"), v[:, :, t : t + 1].to("meta")) for t in range(3)][-1]
    assert all(t.device.type == "meta" and t.shape == k.shape for t in found)


def test_packs_and_what_eviction_keeps_lie_where_their_tensors_lie():
    codes = torch.randint(16, (2, 4), dtype=torch.uint8)
    with torch.device("meta"):
        packed = kv_cache.pack(codes, 4)
        assert (kv_cache.unpack(packed, 4) == codes).all()
        cache, (k, v) = KVCache(1, 2, 9, 4, device="cpu"), tokens(3)
        cache.update(k, v)
        smaller = kv_cache.evict(cache, np.array([[[True, False, True]] * 2]), 1)
    torch.testing.assert_close(smaller.update(k[:, :, :1], v[:, :, :1])[0][:, :, :2], k[:, :, [0, 2]])


def test_generation_makes_its_tensors_where_the_model_lies():
    model, ids = small_model(), torch.tensor([[1, 2, 3]])
    both = torch.tensor([[1, 2, 3], [4, 5, 6]])
    plain = generate(model, ids, 4)
    with torch.device("meta"):
        caches = [KVCache(1, 2, 9, 4, device="cpu")]
        assert (generate(model, ids, 4, caches, temperature=0.5, top_k=1) == plain).all()
        assert (beam_search(model, ids, 4, 1, new_caches(model, 1, 9))[0] == plain).all()
        found = generate_speculative(model, ids, 4, lambda ids: np.array([1, 2]), new_caches(model, 1, 9))[0]
        assert (found == plain).all()
        generate_ragged(model, both, [3, 2], 4, new_caches(model, 2, 9))


@pytest.mark.parametrize("dtype", TYPES)
def test_speculation_is_greedy_in_every_type(dtype):
    model, ids = small_model(dtype), torch.tensor([[1, 2, 3]])
    for guess in ([1, 2], []):
        found, _ = generate_speculative(model, ids, 6, lambda ids, g=guess: np.array(g, int), new_caches(model, 1, 9))
        torch.testing.assert_close(found, generate(model, ids, 6, new_caches(model, 1, 9)))


@pytest.mark.parametrize("dtype", TYPES)
def test_keys_that_moved_700_times_are_as_if_turned_once(dtype):
    frequencies = Rotary(4).frequencies
    k, v = tokens(700, dtype)
    cache = SinkKVCache(64, 4, frequencies)
    for t in range(700):
        found, _ = cache.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
    moved = torch.arange(4, 64) - 63  # the last place was theirs when they came
    expected = apply_rope_torch(k[:, :, 640:].double(), moved, frequencies)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(found[:, :, 4:].double(), expected, atol=bound, rtol=bound)
    assert (found[:, :, :4] == k[:, :, :4]).all()


def test_a_quantised_cache_refuses_what_it_cannot_pack_before_anything_changes():
    cache, (k, v) = QuantizedKVCache(4, group=2), tokens(1, d_head=3)
    with pytest.raises(ValueError, match="d_head must be a multiple of 2, got 3"):
        cache.update(k, v)
    assert (cache.length, cache.n_bytes) == (0, 0)


@pytest.mark.parametrize("name", ["quantised", "sinks"])
def test_a_cache_refuses_tokens_of_another_batch_before_anything_changes(name):
    cache, (k, v) = MAKERS[name](torch.float64, None), tokens(1)
    cache.update(k, v)
    with pytest.raises(ValueError, match=re.escape("k and v must be (1, 2, n_new, 4) for this cache")):
        cache.update(k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
    assert cache.length == 1
    assert cache.update(k, v)[0].shape == (1, 2, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantising_half_precision_costs_no_more_than_half_a_step(dtype):
    x = tokens(64, dtype, d_head=8)[0] * 20
    codes, minimum, step = kv_cache.quantize(x, 8, -1)
    error = (kv_cache.dequantize(codes, minimum, step, torch.float64) - x.double()).abs()
    assert (error <= step.double() * 0.51 + minimum.double().abs() * 2**-10).all()
    exact = kv_cache.dequantize(codes, minimum, step, torch.float64)
    assert (kv_cache.dequantize(codes, minimum, step, dtype) == exact.to(dtype)).all()


SENTENCES = {
    "window must be a whole number of at least 1, got 0": lambda: RingKVCache(1, 1, 0, 4),
    "page_size must be a whole number of at least 1, got 0": lambda: PagePool(3, 0, 1, 4),
    "n_pages must be a whole number of at least 1, got 0": lambda: PagePool(0, 3, 1, 4),
    "capacity must be a whole number of at least 0, got -1": lambda: KVCache(1, 1, -1, 4),
    "capacity must be a whole number of at least 0, got 2.5": lambda: KVCache(1, 1, 2.5, 4),
    "n_sinks must lie between 0 and capacity - 1": lambda: SinkKVCache(0, 0),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sizes_that_cannot_be_get_a_sentence(sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SENTENCES[sentence]()


WAYS = {
    "generate": lambda model, ids: generate(model, ids, 2),
    "beam search": lambda model, ids: beam_search(model, ids, 2, 1, new_caches(model, 1, 9)),
    "speculative": lambda model, ids: generate_speculative(model, ids, 2, lambda _: [], new_caches(model, 1, 9)),
    "ragged": lambda model, ids: generate_ragged(model, ids, [1], 2, new_caches(model, 1, 9)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_empty_prompt_gets_a_sentence(way):
    for ids in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="ids must be"):
            way(small_model(), ids)
