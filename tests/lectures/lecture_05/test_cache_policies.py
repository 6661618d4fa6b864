"""Lecture 05, what a cache may forget: policies, eviction, sinks, and bits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attention.kv_cache import (
    KVCache,
    LearnedSink,
    NullKey,
    QuantizedKVCache,
    SinkKVCache,
    dequantize,
    evict,
    keep_heavy,
    keep_random,
    keep_sinks,
    keep_voted,
    keep_window,
    pack,
    quantize,
    random_with_sinks,
    unpack,
    values_from_keys,
)
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM
from attention.rotary import Rotary
from utils import training

POLICIES = [keep_window, keep_sinks, keep_random, random_with_sinks, keep_heavy, keep_voted]


def some(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def causal_weights(*shape, seed=0):
    n_queries, n_keys = shape[-2:]
    weights = np.random.default_rng(seed).random(shape) ** 3 * np.tri(n_queries, n_keys, n_keys - n_queries)
    return weights / weights.sum(-1, keepdims=True)


def small_model(n_layers=2, positions=None):
    config = TransformerConfig(vocab_size=17, d_model=16, n_heads=2, n_layers=n_layers, d_ff=32)
    model = TransformerLM(config, positions=Rotary(8) if positions is None else positions)
    return training.initialise(model.double(), 0).eval()


# --- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(9, 9), (2, 3, 9, 9), (4, 11), (1, 1)])
def test_a_policy_keeps_exactly_its_budget(policy, shape):
    weights = causal_weights(*shape)
    for budget in range(shape[-1] + 3):
        keep = policy(weights, budget)
        assert keep.dtype == bool and keep.shape == (*shape[:-2], shape[-1])
        assert (keep.sum(-1) == min(budget, shape[-1])).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_leaves_the_weights_alone_and_refuses_nonsense(policy):
    weights = causal_weights(5, 5)
    before = weights.copy()
    policy(weights, 3)
    assert (weights == before).all()
    for bad, budget in ((weights, -1), (weights[0], 2), (weights[:, :3], 2)):
        with pytest.raises(ValueError, match="budget must be|weights must be"):
            policy(bad, budget)


def test_window_and_sinks_keep_what_their_names_say():
    weights = causal_weights(12, 12)
    assert np.flatnonzero(keep_window(weights, 3)).tolist() == [9, 10, 11]
    assert np.flatnonzero(keep_sinks(weights, 6)).tolist() == [0, 1, 2, 3, 10, 11]
    assert (keep_sinks(weights, 6, n_sinks=0) == keep_window(weights, 6)).all()
    kept = [random_with_sinks(weights, 6, seed) for seed in range(5)]
    assert all(keep[:4].all() for keep in kept) and len({tuple(keep) for keep in kept}) > 1


def test_heavy_hitters_are_found_wherever_they_stand():
    for place in range(8):
        weights = causal_weights(12, 12)
        weights[place + 1 :, place] += 3
        assert keep_heavy(weights, 4)[place] and keep_heavy(weights, 4, fair=True)[place]


def test_even_attention_makes_old_keys_heavy_and_a_fair_score_does_not():
    even = np.tri(20) / np.arange(1, 21)[:, None]
    assert np.flatnonzero(keep_heavy(even, 8)).tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    nearly = even.copy()
    nearly[-3:, 9] *= 1.01
    assert keep_heavy(nearly, 2, fair=True)[9] and not keep_heavy(nearly, 2)[9]


def test_voters_decide_and_stay():
    weights = np.zeros((20, 20))
    weights[:16, 2] = 1.0  # loved by those who do not vote
    weights[16:, 9] = 1.0
    assert np.flatnonzero(keep_voted(weights, 5, n_voters=4)).tolist() == [9, 16, 17, 18, 19]
    assert np.flatnonzero(keep_voted(weights, 7, n_voters=4, width=3)).tolist() == [8, 9, 10, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="width odd, got 8 and 2"):
        keep_voted(weights, 5, width=2)


def test_random_is_the_same_for_the_same_seed_only():
    weights = causal_weights(4, 40, 40)
    assert (keep_random(weights, 20) == keep_random(weights, 20)).all()
    assert (keep_random(weights, 20) != keep_random(weights, 20, seed=1)).any()


def test_an_evicted_cache_is_attention_under_a_mask_and_smaller():
    model = small_model(1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(17, size=(3, 12)))
    cache = KVCache(3, 2, 12, 8)
    model(ids, caches=[cache])
    keep = keep_random(np.zeros((3, 2, 12, 12)), 5)
    smaller = evict(cache, keep, room=1)
    assert smaller.n_bytes == cache.n_bytes // 2 and smaller.length == 5
    after = ids[:, :1]
    got = model(after, positions=torch.tensor([12]), caches=[smaller])[:, 0]
    mask = torch.cat([torch.from_numpy(keep), torch.ones(3, 2, 1, dtype=torch.bool)], dim=-1)[:, :, None]
    assert torch.allclose(got, model(torch.cat([ids, after], 1), mask=mask)[:, -1], rtol=0, atol=1e-12)


def test_keeping_everything_changes_nothing():
    cache = KVCache(2, 3, 7, 4)
    k, v = cache.update(some(2, 3, 6, 4), some(2, 3, 6, 4, seed=1))
    same = evict(cache, np.ones((2, 3, 6), dtype=bool), room=0)
    assert torch.equal(same.k, k) and torch.equal(same.v, v)


def test_eviction_refuses_a_mask_that_does_not_fit():
    cache = KVCache(1, 2, 4, 8)
    cache.update(some(1, 2, 4, 8), some(1, 2, 4, 8))
    uneven = np.array([[[True, True, False, False], [True, False, False, False]]])
    for keep in (uneven, np.ones((1, 2, 3), dtype=bool)):
        with pytest.raises(ValueError, match="keep must be"):
            evict(cache, keep, room=1)


# --- sinks -----------------------------------------------------------------------------------------------------------


def test_a_cache_with_room_for_all_is_a_cache():
    model = small_model()
    ids = torch.from_numpy(np.random.default_rng(0).integers(17, size=(2, 20)))
    caches = [SinkKVCache(20, 4, Rotary(8).frequencies) for _ in range(2)]
    got = torch.cat([model(ids[:, t : t + 1], caches=caches) for t in range(20)], dim=1)
    assert torch.allclose(got, model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_sinks", [0, 4])
def test_positions_are_counted_inside_the_cache(n_sinks):
    """One layer: reading on with a cache of 9 is reading the kept 9 tokens as a text of their own."""
    model = small_model(1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(17, size=(2, 40)))
    cache = SinkKVCache(9, n_sinks, Rotary(8).frequencies)
    for t in range(40):
        got = model(ids[:, t : t + 1], caches=[cache])[:, 0]
        kept = ids[:, : t + 1] if t < 9 else torch.cat([ids[:, :n_sinks], ids[:, t + 1 - (9 - n_sinks) : t + 1]], dim=1)
        assert torch.allclose(got, model(kept)[:, -1], rtol=0, atol=1e-12)
    assert cache.k.shape[2] == 9


def test_without_frequencies_a_window_is_a_mask():
    model = small_model(1)
    ids = torch.from_numpy(np.random.default_rng(0).integers(17, size=(2, 30)))
    cache = SinkKVCache(7, 0)
    got = torch.cat([model(ids[:, t : t + 1], caches=[cache]) for t in range(30)], dim=1)
    places = torch.arange(30)
    assert torch.allclose(got, model(ids, mask=places[:, None] - places < 7), rtol=0, atol=1e-12)


def test_a_full_sink_cache_takes_one_token_at_a_time():
    cache = SinkKVCache(6, 2)
    cache.update(some(1, 1, 5, 4), some(1, 1, 5, 4))
    with pytest.raises(ValueError, match="takes one at a time, got 2"):
        cache.update(some(1, 1, 2, 4), some(1, 1, 2, 4))
    with pytest.raises(ValueError, match="n_sinks must lie"):
        SinkKVCache(4, 4)


def with_sink(x, block, n_heads, score):
    """Multi-head attention with e^score added to each denominator, written out."""
    d_head = x.shape[-1] // n_heads
    q, k, v = ((x @ w).unflatten(-1, (n_heads, d_head)).transpose(1, 2) for w in (block.w_q, block.w_k, block.w_v))
    e = torch.exp(q @ k.mT / d_head**0.5) * torch.ones(x.shape[1], x.shape[1]).tril()
    weights = e / (torch.exp(score)[:, None, None] + e.sum(-1, keepdim=True))
    return (weights @ v).transpose(1, 2).flatten(2) @ block.w_o


def test_a_null_key_adds_one_to_the_denominator():
    block = MultiHeadAttention(8, 2).double()
    x = some(2, 5, 8)
    assert torch.allclose(block(x, causal=True, cache=NullKey()), with_sink(x, block, 2, torch.zeros(2)), atol=1e-12)


def test_a_learned_sink_adds_its_exponential_and_is_learned():
    positions = LearnedSink(4, 2).double()
    positions.frequencies = positions.frequencies * 0  # no rotation: the formula above knows none
    positions.sink.data = torch.tensor([0.7, -1.3], dtype=torch.float64)
    block = MultiHeadAttention(8, 2, positions).double()
    x = some(2, 5, 8)
    out = block(x, causal=True, cache=NullKey())
    assert torch.allclose(out, with_sink(x, block, 2, positions.sink), atol=1e-12)
    out.square().sum().backward()
    assert (positions.sink.grad.abs() > 1e-6).all()


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_loses_nothing(bits):
    codes = torch.from_numpy(np.random.default_rng(0).integers(2**bits, size=(3, 5, 16), dtype=np.uint8))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert pack(codes, bits).nbytes == codes.nbytes * bits // 8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [-2, -1])
def test_no_number_moves_by_more_than_half_a_step(bits, axis):
    x = some(2, 3, 32, 16)
    got = dequantize(*quantize(x, bits, axis), torch.float64)
    step = (x.amax(axis, keepdim=True) - x.amin(axis, keepdim=True)) / (2**bits - 1)
    assert ((got - x).abs() <= 0.51 * step + 5e-3).all()


@pytest.mark.parametrize(("bits", "per_number"), [(8, 9), (4, 5), (2, 3)])
def test_the_bytes_of_a_quantised_cache_include_minimum_and_step(bits, per_number):
    cache = QuantizedKVCache(bits, group=32)
    cache.update(some(2, 3, 64, 32), some(2, 3, 64, 32))
    assert 8 * cache.n_bytes == per_number * 2 * (2 * 3 * 64 * 32)


def test_token_by_token_the_quantised_cache_holds_the_same():
    k, v = some(1, 2, 50, 16), some(1, 2, 50, 16, seed=1)
    once, one_by_one = QuantizedKVCache(4, group=16), QuantizedKVCache(4, group=16)
    once.update(k[:, :, :49], v[:, :, :49])
    expected = once.update(k[:, :, 49:], v[:, :, 49:])
    for t in range(50):
        got = one_by_one.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert not torch.equal(got[0][:, :, :48], k[:, :, :48]), "the others are not"
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert torch.equal(got[0][:, :, 48:], k[:, :, 48:]), "the last tokens are exact"
    assert once.n_bytes == one_by_one.n_bytes


@pytest.mark.parametrize("key_axis", ["token", "channel"])
def test_a_quantised_cache_tells_no_token_about_later_ones(key_axis):
    k, v, later = some(1, 2, 50, 16), some(1, 2, 50, 16, seed=1), some(1, 2, 50, 16, seed=2)
    found = []
    for end in (k, torch.cat([k[:, :, :20], 100 * later[:, :, 20:]], dim=2)):
        cache = QuantizedKVCache(2, group=16, key_axis=key_axis)
        parts = [cache.update(end[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 20), (20, 50))]
        found.append([parts[0][0], parts[1][0][:, :, :20]])
    for plain, with_other_end in zip(*found):
        assert torch.equal(plain, with_other_end)


def test_a_quantised_cache_refuses_sizes_it_cannot_pack():
    for bits, group in ((3, 32), (4, 0)):
        with pytest.raises(ValueError, match=f"got {bits} and {group}"):
            QuantizedKVCache(bits, group)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        QuantizedKVCache(2, group=2).update(some(1, 1, 2, 6), some(1, 1, 2, 6))


def test_of_too_many_voters_the_most_recent_are_kept():
    even = np.tri(20) / np.arange(1, 21)[:, None]
    assert np.flatnonzero(keep_voted(even, 4, n_voters=8)).tolist() == [16, 17, 18, 19]
    with pytest.raises(ValueError, match="n_voters must be at least 1"):
        keep_voted(even, 4, n_voters=0)


def test_a_large_channel_spoils_the_others_per_token_only():
    x = some(64, 32)
    x[:, 5] *= 20
    others = torch.arange(32) != 5
    per_token, per_channel = (
        (dequantize(*quantize(x, 4, axis), torch.float64) - x)[:, others].abs().mean() for axis in (-1, -2)
    )
    assert per_token > 3 * per_channel


# --- slim attention --------------------------------------------------------------------------------------------------


def test_values_are_rebuilt_from_keys():
    x, w_k, w_v = some(7, 12).numpy(), some(12, 12, seed=1).numpy(), some(12, 9, seed=2).numpy()
    assert np.allclose(values_from_keys(x @ w_k, w_k, w_v), x @ w_v, rtol=0, atol=1e-10)


def test_grouped_keys_are_refused():
    with pytest.raises(ValueError, match="w_k must be square"):
        values_from_keys(np.ones((3, 4)), np.ones((8, 4)), np.ones((8, 8)))


def test_a_slim_cache_attends_as_the_whole_one_does():
    block = MultiHeadAttention(16, 2).double()
    x = some(1, 6, 16)
    k = (x @ block.w_k).detach().numpy()
    v = values_from_keys(k, block.w_k.detach().numpy(), block.w_v.detach().numpy())
    heads = [torch.from_numpy(t).unflatten(-1, (2, 8)).transpose(1, 2) for t in (k, v)]
    q = (x @ block.w_q).unflatten(-1, (2, 8)).transpose(1, 2)
    slim = F.scaled_dot_product_attention(q, *heads).transpose(1, 2).flatten(2) @ block.w_o
    assert torch.allclose(slim, block(x), rtol=0, atol=1e-10)
