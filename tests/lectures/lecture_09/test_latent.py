"""Lecture 09: what the layer's forms have in common, factors and conversions. Against DeepSeek's layers: tests/conformance."""

import math

import numpy as np
import pytest
import torch

from attention.experiments.latent import layer_inputs, with_weights
from attention.latent import (
    LatentAttention,
    LatentCache,
    MultiHeadLatentAttention,
    best_of_past,
    grouped_as_latent,
    joint_latent,
    latent_decode_attention_torch,
)
from attention.multi_head import Positions
from attention.rotary import Rotary
from utils import language_model, training

D, HEADS, NOPE, ROPE, LATENT, V, N = 64, 4, 16, 8, 24, 12, 12


def layer(query=None, seed=0):
    ours = MultiHeadLatentAttention(D, HEADS, NOPE, LATENT, ROPE, query, V, Rotary(ROPE, interleaved=True))
    return training.initialise(ours, seed)


def text(seed=1, batch=2, n=N):
    return torch.from_numpy(2 * np.random.default_rng(seed).standard_normal((batch, n, D))).float()


def test_a_scale_wrong_by_five_percent_is_seen():
    ours, x = layer(), text()
    right = ours(x, causal=True)
    ours.scale *= 1.05
    assert (ours(x, causal=True) - right).abs().max() > 1e-3 * right.abs().max()


def test_the_layer_of_the_exercise_is_the_expanded_form():
    ours, x = layer(20), text()
    plain = LatentAttention(D, HEADS, NOPE, LATENT, ROPE, 20, V, ours.positions)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.allclose(plain(x), ours(x, causal=True), atol=1e-6)


def test_without_a_rotation_the_rotated_part_is_a_part_of_the_latent():
    """As in Kimi Linear: positions that do nothing leave two products with one shared key."""
    ours = MultiHeadLatentAttention(D, HEADS, NOPE, LATENT, ROPE, positions=Positions())
    training.initialise(ours.double(), 3)
    x = text(n=5).double()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        assert torch.allclose(ours(x)[:, order], ours(x[:, order]), atol=1e-12)


def test_masked_tokens_are_not_read():
    ours, x = layer().double(), text().double()
    mask = torch.ones(N, dtype=torch.bool)
    mask[3] = False
    other = x.clone()
    other[:, 3] = 1e3
    seen = torch.arange(N) != 3
    for absorbed in (False, True):
        first, second = (ours(a, mask=mask, absorbed=absorbed)[:, seen] for a in (x, other))
        assert torch.allclose(first, second, atol=1e-9)


def test_the_cache_says_what_does_not_fit():
    cache = LatentCache(2, 3, 4, 1)
    for rows, sentence in (
        ((torch.zeros(2, 1, 5), torch.zeros(2, 1, 1)), "c_kv must be (2, n_new, 4), got (2, 1, 5)"),
        ((torch.zeros(2, 2, 4), torch.zeros(2, 1, 1)), "k_rope must be (2, n_new, 1), got (2, 1, 1)"),
        ((torch.zeros(2, 4, 4), torch.zeros(2, 4, 1)), "the cache holds 3 tokens, got 4"),
    ):
        with pytest.raises(ValueError) as error:
            cache.update(*rows)
        assert sentence in str(error.value) and cache.length == 0
    with pytest.raises(ValueError, match="d_latent must be a whole number of at least 1"):
        LatentCache(2, 3, 0, 1)


def test_gradients_of_a_decode_step():
    rng = np.random.default_rng(5)
    shapes = (2, 3, 4), (2, 3, 2), (2, 5, 4), (2, 5, 2)
    arrays = [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: latent_decode_attention_torch(*a, np.array([5, 2]), 0.4), arrays)


# ---- Factors and conversions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [False, True])
def test_the_error_of_a_joint_latent_is_that_of_eckart_and_young(inputs):
    rng = np.random.default_rng(6)
    w_k, w_v, x = rng.standard_normal((9, 5)), rng.standard_normal((9, 6)), rng.standard_normal((40, 9))
    seen = x if inputs else np.eye(9)
    sigma = np.linalg.svd(seen @ np.concatenate([w_k, w_v], 1), compute_uv=False)
    for rank in range(1, 10):
        down, up_k, up_v = joint_latent(w_k, w_v, rank, x if inputs else None)
        missed = seen @ (down @ np.concatenate([up_k, up_v], 1) - np.concatenate([w_k, w_v], 1))
        assert np.linalg.norm(missed) == pytest.approx(math.sqrt((sigma[rank:] ** 2).sum()), abs=1e-9)


def test_a_joint_latent_says_what_does_not_fit():
    for arguments in ((np.ones((3, 2)), np.ones((4, 2)), 1), (np.ones((3, 2)), np.ones((3, 2)), 0)):
        with pytest.raises(ValueError, match="w_k and w_v must be"):
            joint_latent(*arguments)


def test_the_best_of_the_past_are_never_later_and_equal_ones_the_earlier():
    chosen = best_of_past(torch.tensor([[0.0, 9, 9, 9], [0, 0, 9, 9], [1, 0, 1, 9], [0, 0, 0, 1]]), 2)
    assert chosen.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert best_of_past(torch.zeros(3, 3), 100).tolist() == np.tri(3, dtype=bool).tolist()


def test_groups_that_do_not_divide_the_heads():
    q, k = torch.zeros(1, 4, 2, 3), torch.zeros(1, 3, 2, 3)
    with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
        grouped_as_latent(q, k, k)


@pytest.fixture(scope="module")
def smollm():
    if language_model.problem():
        pytest.skip("the language model is not installed")
    return language_model.load()


def test_a_model_with_its_own_weights_put_in_again_is_the_same_and_the_first_stays(smollm):
    ids = language_model.excerpt(smollm, 12)
    before = [block.attention.w_k.clone() for block in smollm.blocks[:2]]
    with torch.no_grad():
        right = smollm(ids)
        same = with_weights(smollm, lambda layer, w_k, w_v: (w_k.clone(), w_v.clone()))
        assert torch.equal(same(ids), right)
        zero = with_weights(smollm, lambda layer, w_k, w_v: (0 * w_k, w_v))
        assert not torch.allclose(zero(ids), right, atol=1)
        assert torch.equal(smollm(ids), right)
    assert all(torch.equal(b.attention.w_k, w) for b, w in zip(smollm.blocks, before, strict=False))


def test_the_inputs_of_a_layer_are_what_its_keys_are_made_from(smollm):
    ids, seen = language_model.excerpt(smollm, 8), []
    hook = smollm.blocks[3].attention.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    inputs = layer_inputs(smollm, ids)
    hook.remove()
    assert len(inputs) == 30 and torch.equal(torch.from_numpy(inputs[3]).float(), seen[0])
    assert not any(block.attention._forward_pre_hooks for block in smollm.blocks)
