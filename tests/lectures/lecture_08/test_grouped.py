"""Lecture 08 against independent implementations with copied weights, and its merges against what they promise."""

import numpy as np
import pytest
import torch

from attention import grouped_query as g
from attention.experiments import grouped_query as experiments
from attention.kv_cache import KVCache
from attention.rotary import Rotary, apply_rope_numpy


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- the layer -------------------------------------------------------------------------------------------------------


def llama(n_heads, n_kv_heads, d_head, d_model):
    """A LlamaAttention of transformers, its rotation, and our layer with its weights, in single precision."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=d_model, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=d_head,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaAttention(config, layer_idx=0).eval()
    ours = g.GroupedQueryAttention(d_model, n_heads, n_kv_heads, Rotary(d_head))
    with torch.no_grad():
        for name in "qkvo":
            weight = getattr(theirs, f"{name}_proj").weight
            weight.normal_(std=d_model**-0.5)
            getattr(ours, f"w_{name}").copy_(weight.T)
    return theirs, LlamaRotaryEmbedding(config), ours


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(9, 3), (8, 8), (8, 1), (4, 2)])
@torch.no_grad()
def test_the_layer_is_that_of_transformers_with_copied_weights(n_heads, n_kv_heads):
    theirs, rotation, ours = llama(n_heads, n_kv_heads, 16, 16 * n_heads)
    x = torch.from_numpy(normal(2, 11, 16 * n_heads)).float()
    mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    expected = theirs(x, position_embeddings=rotation(x, torch.arange(11)[None]), attention_mask=mask)[0]
    assert (ours(x, causal=True) - expected).abs().max() < 5e-6
    assert expected.abs().max() > 0.5


@torch.no_grad()
def test_a_cache_of_key_heads_gives_what_the_whole_text_gives():
    _, _, ours = llama(9, 3, 8, 72)
    x = torch.from_numpy(normal(2, 12, 72)).float()
    whole, cache = ours(x, causal=True), KVCache(2, 3, 12, 8, torch.float32)
    parts = [
        ours(x[:, a:b], causal=True, positions=torch.arange(a, b), cache=cache) for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 5e-6
    assert cache.n_bytes == 2 * 2 * 3 * 12 * 8 * 4


@pytest.mark.parametrize("sizes", [(8, 3, 3), (8, 4, 3), (8, 0, 1), (8, 4, 0)])
def test_heads_that_do_not_divide_get_a_sentence(sizes):
    with pytest.raises(ValueError, match="n_kv_heads must divide n_heads and n_heads d_model"):
        g.GroupedQueryAttention(*sizes)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_it_agrees_with_the_groups_of_torch_and_its_gradients(n_kv_heads):
    shapes = (2, 4, 6, 8), (2, n_kv_heads, 6, 8), (2, n_kv_heads, 6, 8)
    ours, theirs = ([torch.from_numpy(normal(*s, seed=i)).requires_grad_() for i, s in enumerate(shapes)] for _ in "ab")
    first = g.grouped_query_attention_torch(*ours, causal=True)
    second = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(first, second)
    for tensors, out in ((ours, first), (theirs, second)):
        out.sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_no_key_is_copied_for_the_heads_of_its_group():
    q, k, v = (torch.from_numpy(normal(1, h, n, 64)).float() for h, n in ((32, 1), (2, 4096), (2, 4096)))
    made = g.new_bytes(lambda q, k, v: g.grouped_query_attention_torch(q, k, v), q, k, v)
    repeated = g.new_bytes(lambda q, k, v: k.repeat_interleave(16, 1), q, k, v)
    assert repeated == 16 * k.nbytes
    assert made < 8 * k.nbytes


def test_views_make_no_memory_and_products_of_them_do():
    k = torch.zeros(1, 3, 100, 8)
    assert g.new_bytes(lambda k: k[:, :, None].expand(-1, -1, 3, -1, -1), k) == 0
    assert g.new_bytes(lambda k: k + 1, k) == k.nbytes


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_mean_and_the_first_head_of_each_group(kind):
    w = kind(normal(5, 12))
    by_hand = np.asarray(w).reshape(5, 2, 3, 2)
    np.testing.assert_allclose(g.merge_kv_heads(w, 6, 2), by_hand.mean(2).reshape(5, 4))
    np.testing.assert_allclose(g.merge_kv_heads(w, 6, 2, "first"), by_hand[:, :, 0].reshape(5, 4))
    np.testing.assert_allclose(g.merge_kv_heads(w, 6, 6), w)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((4, 3), "n_kv_heads must divide n_heads, and n_heads the columns of w, got 3, 4 and 12"),
        ((5, 1), "n_kv_heads must divide n_heads, and n_heads the columns of w, got 1, 5 and 12"),
        ((4, 2, "median"), 'how must be "mean" or "first", got \'median\''),
    ],
)
def test_a_merge_that_cannot_be_gets_a_sentence(arguments, sentence):
    with pytest.raises(ValueError) as error:
        g.merge_kv_heads(normal(5, 12), *arguments)
    assert sentence in str(error.value)


def test_keys_turned_within_their_pairs_are_turned_by_rope_as_before():
    x, angles = normal(7, 16), normal(8)
    frequencies = 10.0 ** -np.arange(8)
    before = apply_rope_numpy(g.turn_pairs(x, angles), np.arange(7), frequencies)
    np.testing.assert_allclose(before, g.turn_pairs(apply_rope_numpy(x, np.arange(7), frequencies), angles), atol=1e-12)


def test_scores_stay_when_keys_and_queries_are_turned_alike_and_copies_merge_without_loss():
    w_k, w_q, x = normal(1, 9, 8), normal(1, 9, 8, seed=1), normal(20, 9, seed=2)
    angles = normal(3, 4, seed=3)
    keys = np.stack([g.turn_pairs(w_k[0], a) for a in angles])
    queries = np.stack([g.turn_pairs(w_q[0], a) for a in angles])
    merged, turned = g.align_keys(x @ keys, keys, queries, 1)
    np.testing.assert_allclose(turned[0], queries[0], atol=1e-12)  # the first head stays as it was
    for h in range(3):
        expected = (x @ queries[h]) @ (x @ keys[h]).T
        np.testing.assert_allclose((x @ turned[h]) @ (x @ merged[0]).T, expected, atol=1e-10)


@pytest.mark.parametrize("n_kv_heads", [0, 3, 8])
def test_an_aligned_merge_into_other_groups_gets_a_sentence(n_kv_heads):
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads"):
        g.aligned_merge(normal(4, 5, 2), normal(4, 3, 2), normal(4, 2, 3), n_kv_heads)


@pytest.mark.parametrize("way", ["mean", "first head", "aligned mean"])
@torch.no_grad()
def test_a_conversion_to_as_many_heads_changes_nothing(way):
    model = experiments.grouped_lm(g.GroupedQueryAttention, 8)
    ids = experiments.characters().corpus[None, :40]
    converted = experiments.convert(model, g.GroupedQueryAttention, 8, way)
    torch.testing.assert_close(converted(ids), model(ids))


@torch.no_grad()
def test_an_aligned_conversion_of_rotated_copies_loses_nothing_and_a_mean_does():
    model = experiments.grouped_lm(g.GroupedQueryAttention, 8)
    rng = np.random.default_rng(5)
    for block in model.blocks:
        layer = block.attention
        w_k, w_v = (w.view(64, 8, 8) for w in (layer.w_k, layer.w_v))
        for h in range(8):
            w_k[:, h] = torch.from_numpy(g.turn_pairs(w_k[:, h // 4 * 4].numpy(), rng.standard_normal(4)))
            w_v[:, h] = w_v[:, h // 4 * 4] @ torch.from_numpy(np.linalg.qr(rng.standard_normal((8, 8)))[0])
    ids = experiments.characters().corpus[None, 600:660]
    aligned, mean = (
        experiments.convert(model, g.GroupedQueryAttention, 2, way)(ids) for way in ("aligned mean", "mean")
    )
    assert (aligned - model(ids)).abs().max() < 1e-8
    assert (mean - model(ids)).abs().max() > 0.01


def test_all_models_of_the_comparison_have_as_many_parameters():
    counts = {
        sum(p.numel() for p in experiments.grouped_lm(g.GroupedQueryAttention, n, 256 + 8 * (8 - n)).parameters())
        for n in (8, 4, 2, 1)
    }
    assert len(counts) == 1


@pytest.mark.parametrize("sizes", [(8, 3), (3, 8), (6, 4)])
def test_devices_that_heads_cannot_be_dealt_to_get_a_sentence(sizes):
    heads, devices = sizes
    with pytest.raises(ValueError, match="one of n_kv_heads and n_devices must divide the other"):
        g.cache_per_device(2, heads, 16, devices)


@pytest.mark.parametrize("sizes", [(8, 0), (0, 8), (-2, 2)])
def test_no_heads_and_no_devices_get_a_sentence(sizes):
    heads, devices = sizes
    with pytest.raises(ValueError, match="n_kv_heads and n_devices must be at least 1"):
        g.cache_per_device(2, heads, 16, devices)
