"""Lecture 07: patterns, blocks and choices against implementations by others, and against their own limits."""

import numpy as np
import pytest
import torch
from transformers import BigBirdConfig, BigBirdModel, DeepseekV4Config, DeepseekV32Config, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HCACompressor
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from attention import sparse as s
from attention.experiments import sparse as experiments
from attention.fundamentals import attention_numpy, attention_torch, causal_mask, softmax
from attention.kv_cache import RingKVCache
from utils import training


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


# --- patterns --------------------------------------------------------------------------------------------------------


def test_a_window_as_long_as_the_text_is_the_causal_mask():
    for n, m in ((5, 5), (2, 7), (7, 2)):
        np.testing.assert_array_equal(s.sliding_window_mask(n, m, m + n), causal_mask(n, m))


def test_a_ring_cache_is_the_window_mask():
    q, k, v = draw(0, (20, 4), (20, 4), (20, 4))
    ring = RingKVCache(1, 1, 6, 4)
    for t in range(20):
        kept = ring.update(*(torch.from_numpy(a[None, None, t : t + 1]) for a in (k, v)))
        got = attention_numpy(q[t : t + 1], *(a[0, 0].numpy() for a in kept))
        wanted = attention_numpy(q[t : t + 1], k[: t + 1], v[: t + 1], s.sliding_window_mask(1, t + 1, 6))
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize(("window", "layers"), [(4, 3), (1, 5), (7, 2)])
def test_layers_of_a_window_reach_as_far_as_each_adds_its_keys(window, layers):
    mask = s.sliding_window_mask(40, 40, window)
    seen = s.reachable(mask, layers)
    np.testing.assert_array_equal(seen, s.sliding_window_mask(40, 40, layers * (window - 1) + 1))


def test_reachability_is_a_boolean_matrix_power():
    mask = np.random.default_rng(1).random((12, 12)) < 0.15
    step = (mask | np.eye(12, dtype=bool)).astype(int)
    for layers in range(4):
        np.testing.assert_array_equal(s.reachable(mask, layers), np.linalg.matrix_power(step, layers) > 0)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_two_steps_of_the_strided_pattern_reach_everything_before(stride):
    mask = s.strided_mask(40, stride)
    assert mask.diagonal().all() and not mask[~causal_mask(40)].any()
    np.testing.assert_array_equal(s.reachable(mask, 2), causal_mask(40))


def test_the_fixed_pattern_has_its_block_and_all_summaries_before():
    mask = s.fixed_mask(24, 6, 2)
    assert mask[20].nonzero()[0].tolist() == [4, 5, 10, 11, 16, 17, 18, 19, 20]
    np.testing.assert_array_equal(s.fixed_mask(10, 1), causal_mask(10))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: s.sliding_window_mask(3, 3, 0), "window must be a whole number of at least 1, got 0"),
        (lambda: s.sliding_window_mask(3, 3, 2.5), "window must be a whole number of at least 1, got 2.5"),
        (lambda: s.sliding_window_mask(3.0, 3, 2), "n_queries must be a whole number of at least 0, got 3.0"),
        (lambda: s.reachable(np.ones((2, 2)), 1), "mask must be boolean (n, n)"),
        (lambda: s.longformer_mask(4, 3), "window must be even and global_tokens from 0 to below 4, got 3 and []"),
        (lambda: s.longformer_mask(4, 2, [4]), "global_tokens from 0 to below 4, got 2 and [4]"),
        (lambda: s.longformer_mask(4, -2), "window must be a whole number of at least 0, got -2"),
        (lambda: s.bigbird_mask(-1), "n_blocks must be a whole number of at least 0, got -1"),
        (lambda: s.strided_mask(4, 0), "stride must be at least 1, got 0"),
        (lambda: s.fixed_mask(4, 2, 3), "summary must be from 1 to stride = 2, got 3"),
        (lambda: s.select_blocks(np.zeros((2, 3)), 2), "scores must be (..., n_blocks, n_blocks)"),
        (lambda: s.select_blocks(np.zeros((2, 2)), 1), "n_keep at least 2"),
        (
            lambda: s.compressed_attention(np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2)), 0),
            "m must be a whole number",
        ),
    ],
)
def test_a_wrong_argument_is_one_clear_sentence(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)


# --- against others --------------------------------------------------------------------------------------------------


def test_longformer_equals_the_class_of_transformers_with_copied_weights():
    n, d, heads, window = 64, 16, 2, 8
    config = LongformerConfig(
        hidden_size=d, num_attention_heads=heads, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, 0).double().eval()
    x = torch.from_numpy(draw(2, (1, n, d))[0])
    tokens = [0]
    flags = torch.zeros(1, n, dtype=torch.bool)
    flags[:, tokens] = True
    mask = torch.zeros(1, n, dtype=torch.float64)
    mask[flags] = 10000.0
    with torch.no_grad():
        expected = theirs(
            x,
            attention_mask=mask,
            is_index_masked=torch.zeros(1, n, dtype=torch.bool),
            is_index_global_attn=flags,
            is_global_attn=True,
        )[0]
        parts = [
            [
                getattr(theirs, name + end)(x).view(1, n, heads, -1).transpose(1, 2).numpy()
                for name in ("query", "key", "value")
            ]
            for end in ("", "_global")
        ]
    got = s.longformer_attention(*parts, window, tokens).swapaxes(1, 2).reshape(1, n, d)
    np.testing.assert_allclose(got, expected.numpy(), atol=5e-7)  # its softmax is in single precision


def of_bigbird(train, random_blocks=None, n=96, heads=2, size=8, d=4):
    """q, k, v and what transformers' block-sparse BigBird makes of them, (1, heads, n, d) arrays."""
    config = BigBirdConfig(
        hidden_size=heads * d,
        num_attention_heads=heads,
        num_random_blocks=1,
        block_size=size,
        max_position_embeddings=n,
    )
    theirs = BigBirdBlockSparseAttention(config, seed=1).double()
    q, k, v = (torch.from_numpy(a) for a in draw(3, *[(1, heads, n, d)] * 3))
    ones = torch.ones(1, n, dtype=torch.float64)
    blocks = ones.view(1, n // size, size)
    band = torch.einsum(
        "blq,blk->blqk", blocks[:, 2:-2], torch.cat([blocks[:, 1:-3], blocks[:, 2:-2], blocks[:, 3:-1]], 2)
    )
    if random_blocks is not None:
        theirs._bigbird_block_rand_mask_with_head = lambda **sizes: random_blocks
    context, _ = theirs.train(train).bigbird_block_sparse_attention(
        q, k, v, band[:, None], ones.view(1, 1, n, 1), ones.view(1, 1, 1, n), blocks, blocks, heads, 1, d, size, size, 1,
        n, n, 1, None, None,
    )  # fmt: skip
    return q.numpy(), k.numpy(), v.numpy(), context.view(1, n, heads, d).transpose(1, 2).detach().numpy()


def test_bigbird_blocks_equal_the_class_of_transformers_with_its_random_blocks():
    there = np.stack([s.bigbird_mask(12, 1, seed) for seed in range(2)])
    extra = there & ~s.bigbird_mask(12, 0)
    q, k, v, expected = of_bigbird(True, extra[:, 1:-1].argmax(-1)[..., None])
    np.testing.assert_allclose(s.block_sparse_attention_numpy(q, k, v, there, 8), expected, atol=1e-6)


def test_bigbird_of_transformers_draws_no_blocks_in_evaluation_but_counts_block_0_once_more():
    q, k, v, expected = of_bigbird(False)
    there = np.repeat(np.repeat(s.bigbird_mask(12, 0), 8, 0), 8, 1)
    scores = np.where(there, q @ k.swapaxes(-1, -2) / 2, -np.inf)
    scores[..., 8:-8, :8] += np.log(2)
    np.testing.assert_allclose(softmax(scores) @ v, expected, atol=1e-6)
    assert np.abs(s.block_sparse_attention_numpy(q, k, v, s.bigbird_mask(12, 0), 8) - expected).max() > 0.1


def test_bigbird_of_transformers_attends_to_all_of_a_short_text():
    config = BigBirdConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=20, num_random_blocks=1,
        block_size=8, max_position_embeddings=96,
    )  # fmt: skip
    model = BigBirdModel(config).eval()
    model(torch.arange(16)[None] % 20)
    assert model.attention_type == "original_full" and model.config.attention_type == "block_sparse"


def test_the_heavily_compressed_attention_of_deepseek_v4_sees_the_blocks_that_ours_sees():
    n, d, m = 21, 8, 4
    config = DeepseekV4Config(
        hidden_size=6, head_dim=d, compress_rates={"heavily_compressed_attention": m, "compressed_sparse_attention": 4}
    )
    theirs = DeepseekV4HCACompressor(config).double()
    for name in ("gate_proj.weight", "position_bias"):  # all weights of a block equal: its mean
        theirs.get_parameter(name).data.zero_()
    theirs.kv_norm.weight.data.fill_(1.0)
    theirs.rotary_emb.forward = lambda x, **named: [
        f(torch.zeros(*x.shape[:-1], d // 2).double()) for f in (torch.cos, torch.sin)
    ]
    x = torch.from_numpy(draw(12, (1, n, 6))[0])
    kept, bias = theirs(x, x, torch.arange(n)[None], None, 0)
    kv = theirs.kv_proj(x)[0].detach().numpy()
    means = kv[: n // m * m].reshape(-1, m, d).mean(1)
    sizes = np.sqrt((means**2).mean(-1, keepdims=True) + config.rms_norm_eps)
    np.testing.assert_allclose(kept[0, 0].detach().numpy(), means / sizes, atol=1e-6)
    values = np.eye(n // m).repeat(m, 0)  # a mean of them says which blocks are seen
    values = np.concatenate([values, np.zeros((n % m, n // m))])
    seen = s.compressed_attention(np.zeros((n, 2)), np.zeros((n, 2)), values, m) > 0
    np.testing.assert_array_equal(seen, (bias[0, 0] == 0).numpy())


def test_bigbird_has_three_kinds_of_blocks():
    mask = s.bigbird_mask(20, 3, seed=5)
    assert mask[[0, -1]].all() and mask[:, [0, -1]].all() and s.bigbird_mask(20, 100).all()
    band = abs(np.arange(20)[:, None] - np.arange(20)) <= 1
    band[[0, -1]] = band[:, [0, -1]] = True
    assert (mask >= band).all() and ((mask & ~band).sum(1)[1:-1] == 3).all()


@pytest.mark.parametrize("causal", [True, False])
def test_the_indexer_equals_the_class_of_transformers_with_copied_weights(causal):
    n, d_model, heads, d = 12, 20, 4, 8
    config = DeepseekV32Config(
        hidden_size=d_model,
        q_lora_rank=d_model,
        index_n_heads=heads,
        index_head_dim=d,
        index_topk=n,
        qk_rope_head_dim=4,
    )
    theirs = DeepseekV32Indexer(config, 0)
    ours = training.initialise(s.LightningIndexer(d_model, heads, d), 3)
    ours.norm.weight.data, ours.norm.bias.data = (torch.from_numpy(a).float() for a in draw(4, d, d))
    pairs = {"wq_b": ours.query, "wk": ours.key, "k_norm": ours.norm, "weights_proj": ours.weight}
    for name, layer in pairs.items():
        getattr(theirs, name).load_state_dict(layer.state_dict())
    x = torch.from_numpy(draw(5, (2, n, d_model))[0]).float()
    still = torch.ones(2, n, 4), torch.zeros(2, n, 4)  # cos and sin of no rotation
    seen = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
    caught = []
    original = torch.Tensor.topk
    try:
        torch.Tensor.topk = lambda self, *a, **o: caught.append(self) or original(self, *a, **o)
        order = theirs(x, x, still, seen[None].expand(2, n, n), None)
    finally:
        torch.Tensor.topk = original
    got = ours(x, causal)
    torch.testing.assert_close(got, caught[0], atol=5e-6, rtol=0)
    assert (got.topk(3, -1).indices[:, -1] == order[:, -1, :3]).all()


@pytest.mark.parametrize("window", [1, 6, 40])
def test_window_masks_equal_flex_attention(window):
    from torch.nn.attention.flex_attention import create_mask

    made = create_mask(lambda b, h, i, j: (j <= i) & (i - j < window), 1, 1, 30, 30, device="cpu")[0, 0]
    np.testing.assert_array_equal(s.sliding_window_mask(30, 30, window), made.numpy())


# --- limits ----------------------------------------------------------------------------------------------------------


def test_every_branch_of_nsa_is_attention_when_nothing_is_left_out():
    q, k, v = draw(6, (24, 4), (24, 4), (24, 3))
    wanted = attention_numpy(q, k, v, causal=True)
    for branch, m in ((0, 1), (1, 4), (2, 4)):
        gates = np.eye(3)[[branch]].repeat(24, 0)
        got = s.native_sparse_attention(q, [k] * 3, [v] * 3, gates, m, 24, 24)
        np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_the_branches_of_nsa_have_keys_and_values_of_their_own():
    q, *others = draw(7, *[(16, 4)] * 7)
    keys, values, gates = others[:3], others[3:], np.random.default_rng(8).random((16, 3))
    got = s.native_sparse_attention(q, keys, values, gates, 4, 3, 5)
    means, there = keys[1].reshape(4, 4, 4).mean(1), np.zeros((16, 4), bool)
    for t in range(16):  # own and first block, and the best of those between
        between = range(1, t // 4)
        there[t, [0, t // 4, *sorted(between, key=lambda b: -q[t] @ means[b])[:1]]] = True
    wanted = gates[:, :1] * s.compressed_attention(q, keys[0], values[0], 4)
    wanted += gates[:, 1:2] * attention_numpy(q, keys[1], values[1], np.repeat(there, 4, 1), causal=True)
    wanted += gates[:, 2:] * attention_numpy(q, keys[2], values[2], s.sliding_window_mask(16, 16, 5))
    np.testing.assert_allclose(got, wanted, atol=1e-12)


def nsa(q, k, v, m):
    """All three branches of a text whose length is cut to whole blocks, n_keep 3."""
    n = len(q) // m * m
    q, k, v = (a[:n] for a in (q, k, v))
    return s.native_sparse_attention(q, [k] * 3, [v] * 3, np.ones((n, 3)), m, 3, 2)


def test_a_text_shorter_than_a_block_has_no_compressed_keys():
    q, k, v = draw(14, (2, 3, 4), (2, 3, 4), (2, 3, 5))
    assert s.compressed_attention(q, k, v, 4).shape == (2, 3, 5) and not s.compressed_attention(q, k, v, 4).any()


def test_no_choice_of_nsa_depends_on_what_comes_later():
    q, k, v = draw(13, (24, 4), (24, 4), (24, 3))
    for m in (2, 4):
        before = nsa(q, k, v, m)
        for t in range(23):
            later = [a.copy() for a in (q, k, v)]
            for a in later:
                a[t + 1 :] = np.random.default_rng(t).standard_normal(a[t + 1 :].shape) * 5
            np.testing.assert_allclose(nsa(*later, m)[: t + 1], before[: t + 1], atol=1e-12)


@pytest.mark.parametrize("attend", [s.compressed_attention], ids=["compressed"])
def test_no_query_moves_when_something_later_changes(attend):
    q, k, v = draw(9, (13, 4), (13, 4), (13, 4))
    for m in (1, 2, 3, 5):
        before = attend(q, k, v, m)
        for t in range(13):
            later_k, later_v = k.copy(), v.copy()
            later_k[t + 1 :], later_v[t + 1 :] = 7.0, -7.0
            np.testing.assert_array_equal(attend(q, later_k, later_v, m)[: t + 1], before[: t + 1])


def test_absent_blocks_get_no_gradient_and_present_ones_that_of_the_mask():
    tensors = [torch.from_numpy(a).requires_grad_() for a in draw(10, (2, 12, 3), (2, 10, 3), (2, 10, 2))]
    there = np.random.default_rng(11).random((2, 3, 3)) < 0.5
    there[:, :, 1] = False
    mask = torch.from_numpy(np.repeat(np.repeat(there, 4, -2), 4, -1)[:, :12, :10].copy())
    got = torch.autograd.grad(s.block_sparse_attention_torch(*tensors, there, 4, True).square().sum(), tensors)
    wanted = torch.autograd.grad(attention_torch(*tensors, mask, True).square().sum(), tensors)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert not got[1][:, 4:8].any()


# --- experiments -----------------------------------------------------------------------------------------------------


def test_a_trained_window_answers_to_its_reach_and_guesses_beyond():
    accuracy = experiments.copy_accuracy(experiments.train_copy([(0, 1, 2, 3)] * 2, 0))
    assert accuracy[:7].min() > 0.95 and accuracy[7:].max() < 0.35


def test_mean_keys_lose_a_lone_needle_in_large_blocks():
    small, large, cluster = (experiments.needle_recall(*a) for a in ((8, 128), (128, 128), (16, 128, 4)))
    assert small > 0.6 and large < 0.4 and cluster > 0.8


def test_more_rounds_of_hashing_find_more():
    one, eight = experiments.lsh_recall(1), experiments.lsh_recall(8)
    assert one[0] < eight[0] and one[1] < eight[1] and one[0] > 2 * one[1]


@pytest.mark.parametrize(("mask", "layers"), [(np.eye(3, dtype=bool), -1), (np.eye(3), 1), (np.ones((2, 3), bool), 1)])
def test_what_cannot_be_reached_in_layers_gets_a_sentence(mask, layers):
    with pytest.raises(ValueError, match="mask must be boolean .n, n. and n_layers not negative, got"):
        s.reachable(mask, layers)
