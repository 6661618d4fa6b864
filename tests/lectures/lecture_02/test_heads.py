"""Lecture 02: what its experiments are made of, and the finished exercises against the triple."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attention import multi_head as m
from attention.experiments import multi_head as experiments
from utils import training


def small(seed=0, n_layers=2):
    config = m.TransformerConfig(vocab_size=32, d_model=24, n_heads=3, n_layers=n_layers, d_ff=0)
    return training.initialise(m.TransformerLM(config, positions=m.DistanceBias(3)).double(), seed)


def some_ids(seed=0, batch=2, n=12):
    return torch.from_numpy(np.random.default_rng(seed).integers(32, size=(batch, n)))


def test_the_exercise_is_the_numpy_function_without_its_checks():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 8)), rng.standard_normal((4, 8, 8))
    mask = rng.random((2, 4, 5, 5)) < 0.6
    for causal in (False, True):
        ours, theirs = (f(x, x, *w, 4, mask, causal) for f in (m.multi_head, m.multi_head_attention_numpy))
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_layer_of_minilm_can_be_rebuilt_from_its_matrices():
    layer = experiments.minilm_layer("The old man the boats.", 5)
    out = m.multi_head(layer.x, layer.x, layer.w_q, layer.w_k, layer.w_v, layer.w_o, 12) + layer.b_o
    np.testing.assert_allclose(out, layer.out, atol=1e-4)
    with pytest.raises(ValueError, match="number must be from 0 to 5"):
        experiments.minilm_layer("x", 6)


def test_losses_without_nobody_are_the_models_and_no_hook_is_left():
    model, ids = small(), some_ids()
    losses = m.losses_without(model, ids, [[], [(0, 1)], [], [(1, 0), (1, 2)]])
    torch.testing.assert_close(losses[[0, 2]], training.next_token_loss(model, ids).detach().repeat(2))
    assert losses[1] != losses[0] and losses[3] != losses[0]
    with m.without_heads(model, [(1, 0), (1, 2)]):
        torch.testing.assert_close(losses[3], training.next_token_loss(model, ids).detach())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_importance_of_a_head_is_the_slope_of_the_loss():
    model, ids = small(), some_ids(1)
    found = experiments.head_importance(model, [ids])
    assert found.shape == (2, 3)
    w_o, step = model.blocks[1].attention.w_o, 1e-4
    loss = []
    for factor in (1 + step, 1 - step):
        kept = w_o.data.clone()
        w_o.data[8:16] *= factor
        loss.append(training.next_token_loss(model, ids).item())
        w_o.data.copy_(kept)
    assert abs(abs(loss[0] - loss[1]) / (2 * step) - found[1, 1]) < 1e-4
    assert not any(module._forward_hooks for module in model.modules())


def test_ranked_heads_are_pairs_the_largest_first():
    assert experiments.ranked(np.array([[0.1, 0.5], [0.7, 0.2]])) == [(1, 0), (0, 1), (1, 1), (0, 0)]


def test_the_second_round_can_be_known_and_the_first_cannot():
    ids, period = next(experiments.repeated(seed=1))
    assert (ids[:, period:] == ids[:, :-period]).all()
    assert all(len(set(row[:period].tolist())) == period for row in ids)
    assert 1 / 20 <= experiments.guess_earlier() <= 1 / 8
    assert (experiments.two_rounds()[:, 20:] == experiments.two_rounds()[:, :20]).all()


def test_one_step_of_each_experiment_has_finite_numbers(monkeypatch):
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *args, steps, **more: fit(*args, steps=2, **more))
    run = experiments.train_repeats(2, 0)
    assert np.isfinite(run.loss).all() and run.maps[0].shape == (2, 4, 40, 40)
    assert np.isfinite(experiments.explained("difference", 2, 0))
    reader = experiments.train_sentiment(True, 0)
    assert reader(experiments.reviews(np.random.default_rng(0), 3)[0]).shape == (3, 2)


def test_the_layer_takes_the_place_of_the_language_models_own():
    from utils import language_model

    if language_model.problem():
        pytest.skip("the language model is not installed")
    smollm = language_model.load()
    ids = language_model.excerpt(smollm, 24)
    with torch.no_grad():
        ours, theirs = experiments.with_module(smollm, m.MultiHeadAttention)(ids), smollm(ids)
    assert (ours - theirs).abs().max() < 1e-2
    assert F.cross_entropy(ours[0, :-1], ids[0, 1:]) < 6
