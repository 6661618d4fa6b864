"""Lecture 13: graphs, sets, pictures and memories, and what the lecture says of them. Against others: tests/conformance."""

import importlib

import numpy as np
import pytest
import torch

from attention.beyond import (
    InducedSetAttention,
    SetBlock,
    address,
    graph_attention,
    memory_by_gradient,
    patchify,
    segment_softmax,
)
from attention.experiments.beyond import (
    VisionTransformer,
    copies,
    digits,
    train_asker,
    train_copier,
    train_pooled,
    train_scorer,
    train_vision,
)
from attention.linear import memory_step
from utils import training


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(*shape, seed=0):
    return torch.from_numpy(numbers(*shape, seed=seed))


# ---- Graphs ---------------------------------------------------------------------------------------------------------


def test_on_the_complete_graph_the_edges_are_a_matrix():
    n = 5
    target, source = np.divmod(np.arange(n * n), n)
    scores = numbers(n * n, 2)
    weights = segment_softmax(scores, target, n).reshape(n, n, 2)
    powers = np.exp(scores.reshape(n, n, 2))
    np.testing.assert_allclose(weights, powers / powers.sum(1, keepdims=True), atol=1e-12)


def test_the_order_of_the_edges_does_not_count():
    h, (target, source) = numbers(6, 4), np.random.default_rng(1).integers(0, 6, (2, 20))
    weights = numbers(4, 3), numbers(3, seed=1), numbers(3, seed=2)
    order = np.random.default_rng(2).permutation(20)
    out, alpha = graph_attention(h, source, target, *weights)
    moved, moved_alpha = graph_attention(h, source[order], target[order], *weights)
    np.testing.assert_allclose(moved, out, atol=1e-12)
    np.testing.assert_allclose(moved_alpha, alpha[order], atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gat_has_one_favourite_and_gatv2_two(seed):
    assert train_scorer("GAT", seed=seed)[0] <= 1
    assert train_scorer("GATv2", seed=seed)[0] == 2


# ---- Sets -----------------------------------------------------------------------------------------------------------


def test_isab_is_equivariant_and_a_block_asked_by_seeds_invariant():
    layer, x = training.initialise(InducedSetAttention(16, 2, 4).double(), 0), tensor(2, 10, 16)
    order = torch.from_numpy(np.random.default_rng(1).permutation(10))
    with torch.no_grad():
        assert torch.allclose(layer(x)[:, order], layer(x[:, order]), atol=1e-12)
        seeds = layer.points.expand(2, -1, -1)
        assert torch.allclose(layer.gather(seeds, x), layer.gather(seeds, x[:, order]), atol=1e-12)


def test_padding_changes_nothing():
    layer, x = training.initialise(InducedSetAttention(16, 2, 4).double(), 0), tensor(2, 6, 16)
    padded = torch.cat([x, 100 * torch.ones(2, 3, 16).double()], dim=1)
    mask = (torch.arange(9) < 6).expand(2, -1)
    with torch.no_grad():
        out = layer(padded, mask)
        assert torch.allclose(out[:, :6], layer(x), atol=1e-12) and not out[:, 6:].any()


def test_a_block_gives_gradients():
    block = training.initialise(SetBlock(4, 2).double(), 3)
    x, y = tensor(1, 2, 4).requires_grad_(), tensor(1, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: block(a, b).sum(), (x, y))


def test_attention_finds_the_maximum_and_cannot_count_a_sum_counts():
    errors = {size: train_pooled("sum", size)[0] for size in (1, 8)}
    error, attention = train_pooled("attention", 1)
    assert error < 0.15 < min(errors.values()) and errors[1] < 0.7
    once = tensor(3, 5)
    with torch.no_grad():
        for model, times in ((attention, 1), (train_pooled("sum", 8)[1], 2)):
            twice = model.pooled(torch.cat([once, once], dim=1))
            assert torch.allclose(twice, times * model.pooled(once), atol=1e-12)


# ---- Pictures -------------------------------------------------------------------------------------------------------


def test_patches_are_squares_row_by_row_and_a_convolution_sees_the_same():
    picture = np.arange(16.0).reshape(1, 4, 4)
    assert patchify(picture).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    images, weight = tensor(3, 8, 8), tensor(5, 4, seed=1)
    by_convolution = torch.nn.functional.conv2d(images[:, None], weight.view(5, 1, 2, 2), stride=2)
    assert torch.allclose(patchify(images) @ weight.T, by_convolution.flatten(2).mT, atol=1e-12)


def test_without_places_a_picture_is_a_set_of_patches():
    model, images = training.initialise(VisionTransformer().double(), 0), tensor(2, 8, 8)
    turned = torch.cat([images[:, 4:], images[:, :4]], dim=1)  # rows of patches change places
    with torch.no_grad():
        assert (model(images) - model(turned)).abs().max() > 1e-3
        model.places.zero_()
        assert torch.allclose(model(images), model(turned), atol=1e-12)


def test_the_digits_are_apart_and_the_transformer_reads_new_ones():
    (images, labels), (new, right) = digits()
    assert images.shape == (1437, 8, 8) and new.shape == (360, 8, 8) and 0 <= images.min() < images.max() == 1
    assert labels.bincount().min() > 100 and len(right) == 360
    assert train_vision()[1] > 0.92


def test_the_word_finds_its_square():
    model, right = train_asker()
    assert right > 0.95 and model.weights.shape == (500, 16)


# ---- Memories -------------------------------------------------------------------------------------------------------


def test_at_rate_one_with_keys_of_length_one_it_is_the_delta_rule():
    k, v, q = numbers(2, 9, 4), numbers(2, 9, 3, seed=1), numbers(2, 9, 4, seed=2)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    out, memory = memory_by_gradient(*map(torch.from_numpy, (q, k, v)), 1.0)
    state = np.zeros((2, 4, 3))
    for i in range(9):
        state = memory_step(state, k[:, i], v[:, i], np.ones(1), np.ones(1), True)
        np.testing.assert_allclose(out[:, i], (q[:, i, None] @ state)[:, 0], atol=1e-12)
    np.testing.assert_allclose(memory, state, atol=1e-12)


def test_forgetting_everything_leaves_the_last_step():
    k, v = tensor(5, 4), tensor(5, 3, seed=1)
    out, memory = memory_by_gradient(k, k, v, 0.5, forget=1.0)
    _, before = memory_by_gradient(k[:4], k[:4], v[:4], 0.5, forget=1.0)
    assert torch.allclose(memory, -0.5 * k[4:].mT @ (k[4:] @ before - v[4:]), atol=1e-12) and out.shape == (5, 3)


def test_an_address_is_a_distribution_that_a_shift_moves():
    memory, last = tensor(1, 6, 3), torch.eye(6).double()[2:3]
    for step, row in ((0, 1), (1, 2), (2, 3)):
        shift = torch.eye(3).double()[step : step + 1]
        w = address(memory, last, torch.ones(1, 3).double(), 1.0, 0.0, shift, 2.0)
        assert w[0, row] > 0.999 and w.sum().item() == pytest.approx(1)
    w = address(memory, last, 2 * memory[:, 4], 50.0, 1.0, torch.eye(3).double()[1:2], 1.0)
    assert w.argmax() == 4


def test_a_copy_is_asked_for_and_learned_past_the_training_lengths():
    x, y = copies(np.random.default_rng(0), 2, 3)
    assert x.shape == (2, 7, 6) and y.shape == (2, 3, 4)
    assert torch.equal(x[:, :3, :4], y) and x[:, 3, 4].all() and x[:, 4:, 5].all() and not x[:, 4:, :5].any()
    found = train_copier()
    assert found[5] > 0.95 and found[10] > 0.75


# ---- What to read next ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("deepseek_v32", "DeepseekV32Indexer"),
        ("deepseek_v4", "DeepseekV4Indexer"),
        ("minimax_m3_vl", "MiniMaxM3VLIndexer"),
        ("mistral_large4", "MistralLarge4TextIndexer"),
        ("qwen3_next", "Qwen3NextAttention"),
        ("inkling2", "Inkling2BlockAttentionResidual"),
    ],
)
def test_the_classes_of_the_table_exist(folder, name):
    assert hasattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def test_sinks_and_ratios_are_as_the_table_says():
    for folder, name in (("gpt_oss", "GptOss"), ("mimo_v2_flash", "MiMoV2Flash"), ("granite_swa", "GraniteSWA")):
        source = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        assert "sink" in open(source.__file__, encoding="utf-8").read() and hasattr(source, f"{name}Attention")
