"""Lecture 11: the layer, V2's heads and gates, and what the lecture says about them. Against transformers: tests/conformance."""

import math

import numpy as np
import pytest
import torch

from attention.differential import (
    DifferentialAttention,
    differential_attention_torch,
    differential_pairs,
    first_as_gate,
    lambda_init,
    sigmoid,
    subtract_map,
)
from attention.experiments.differential import (
    GatedHead,
    first_gradients,
    needle_in_text,
    pair_correlations,
    train_gated,
    train_retriever,
)
from attention.experiments.kv_cache import look_at_sink
from attention.fundamentals import attention_numpy
from attention.grouped_query import grouped_query_attention_numpy
from attention.kv_cache import KVCache
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM
from attention.rotary import Rotary
from utils import language_model, training


def layer(depth=1, seed=0, **more):
    return training.initialise(DifferentialAttention(16, 2, depth, **more).double(), seed)


def text(seed=1, n=9, batch=2):
    return torch.from_numpy(2 * np.random.default_rng(seed).standard_normal((batch, n, 16)))


# ---- The layer ------------------------------------------------------------------------------------------------------


def test_lambda_init_counts_layers_from_zero():
    assert [round(lambda_init(depth), 3) for depth in range(4)] == [0.2, 0.356, 0.471, 0.556]
    assert 0.799 < lambda_init(29) < 0.8
    with pytest.raises(ValueError, match="depth must be at least 0, got -1"):
        lambda_init(-1)


def test_the_layer_says_which_widths_do_not_fit():
    for sizes in ((16, 3), (16, 0), (10, 2)):
        with pytest.raises(ValueError, match="2 n_heads must divide d_model"):
            DifferentialAttention(*sizes)


def test_the_layer_is_the_triple_between_projections():
    ours, x = layer(), text()
    with torch.no_grad():
        q, k, v = ours.project(x)
        found = differential_attention_torch(q[:, ::2], k[:, ::2], q[:, 1::2], k[:, 1::2], v, ours.lam, causal=True)
        heads = ours.norm(found) * (1 - lambda_init(1))
        assert torch.allclose(heads.transpose(1, 2).flatten(2) @ ours.w_o, ours(x, causal=True), atol=1e-12)


def test_with_lambda_zero_and_no_norm_the_layer_is_multi_head_attention_of_the_first_heads():
    ours, x = layer(depth=0), text()
    ours.norm, ours.factor, ours.lambda_init = torch.nn.Identity(), 1.0, 0.0
    with torch.no_grad():
        for name in ("lambda_q2", "lambda_k2"):
            getattr(ours, name).copy_(getattr(ours, name.replace("2", "1")))
        assert abs(ours.lam.item()) < 1e-12
        q, k, v = ours.project(x)
        first = attention_numpy(q[:, ::2].numpy(), k[:, ::2].numpy(), v.numpy(), causal=True)
        expected = torch.from_numpy(first).transpose(1, 2).flatten(2) @ ours.w_o
        assert torch.allclose(ours(x, causal=True), expected, atol=1e-12)


def test_a_scale_wrong_by_five_percent_is_seen():
    ours, x = layer(), text()
    right = ours(x, causal=True)
    with torch.no_grad():
        ours.w_q *= 1.05
    assert (ours(x, causal=True) - right).abs().max() > 1e-3 * right.abs().max()


def test_step_by_step_with_a_cache_is_all_at_once():
    ours, x = layer(positions=Rotary(4)), text()
    with torch.no_grad():
        cache = KVCache(2, 4, 9, 4, torch.float64)
        steps = [ours(x[:, a:b], causal=True, positions=torch.arange(a, b), cache=cache) for a, b in ((0, 4), (4, 9))]
        assert torch.allclose(torch.cat(steps, 1), ours(x, causal=True), atol=1e-12)


def test_a_language_model_takes_the_layer_and_the_parameters_are_those_of_four_heads():
    def attention(config, depth, positions):
        return DifferentialAttention(config.d_model, config.n_heads // 2, depth, positions)

    model = training.initialise(TransformerLM(TransformerConfig(30, 32, 4), attention, Rotary(8)).double(), 0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(30, size=(2, 7)))
    with torch.no_grad():
        assert model(ids).shape == (2, 7, 30)
    ours = sum(p.numel() for p in DifferentialAttention(32, 2).parameters())
    assert ours - sum(p.numel() for p in MultiHeadAttention(32, 4).parameters()) == 4 * 8 + 16


def test_gradients_of_the_triple_and_of_lambda():
    rng = np.random.default_rng(5)
    shapes = (2, 3, 4), (2, 5, 4), (2, 3, 4), (2, 5, 4), (2, 5, 6), (2,)
    arrays = [torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: differential_attention_torch(*a, causal=True), arrays)


# ---- What the lecture says ------------------------------------------------------------------------------------------


def test_rows_sum_to_one_minus_lambda_and_some_weights_are_negative():
    rng = np.random.default_rng(0)
    q1, k1, q2, k2 = rng.standard_normal((4, 1, 6, 4))
    weights = subtract_map(q1, k1, q2, k2, np.eye(6)[None], 0.7)
    np.testing.assert_allclose(weights.sum(-1), 0.3, atol=1e-12)
    assert weights.min() < 0


def test_the_norm_raises_gradients_by_about_the_root_of_the_length():
    softmax = first_gradients(None).mean(0)
    alone, both, neither = (
        first_gradients(change).mean(0) / softmax
        for change in ({"factor": 1.0}, {}, {"factor": 1.0, "norm": torch.nn.Identity()})
    )
    assert (alone > 3).all() and (alone < 12).all() and (neither < 1).all()
    assert both[0] > 3 and 1.5 < both[3] < 4


def test_a_gated_head_is_the_head_times_its_gate():
    x, plain = text(), MultiHeadAttention(16, 2).double()
    for columns in (1, 8):
        gated = training.initialise(GatedHead(16, 2, None, columns).double(), 0)
        plain.load_state_dict({name: w for name, w in gated.state_dict().items() if name != "w_gate"})
        gated.w_gate.data.zero_()
        torch.testing.assert_close(gated(x, causal=True), plain(x, causal=True) / 2)
        gated.w_gate.data[:, :columns] = -1000 * x[0, 0, :, None]  # shuts the first head for the first token
        heads = []
        plain.outputs.register_forward_hook(lambda *given: heads.append(given[2]))
        plain(x, causal=True)
        expected = torch.cat([torch.zeros(8), heads[0][0, 1, 0] / 2]).double() @ gated.w_o
        torch.testing.assert_close(gated(x, causal=True)[0, 0], expected)


@pytest.mark.slow
def test_a_gate_leaves_a_fraction_of_the_sink():
    alone, gated = (look_at_sink(train_gated(columns, 0)) for columns in (0, 32))
    assert alone["mass"] > 0.5 and gated["mass"] < 0.35
    assert alone["value_ratio"] < 0.4 < gated["value_ratio"]


@pytest.mark.parametrize("name", ["softmax", "differential"])
def test_a_retriever_learns_far_above_chance(name):
    run = train_retriever(name, 0)
    assert run.accuracy[0] < 0.15 and run.accuracy[-1] > 0.9 and len(run.accuracy) == len(run.lambdas) == 9


def test_v2_inside_a_group_is_a_difference_of_maps_and_by_halves_is_not():
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((8, 4, 3)), rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 3))
    heads = grouped_query_attention_numpy(q, k, v, causal=True)
    out = differential_pairs(q, k, v, np.zeros((4, 4)))
    for pair, group in enumerate((0, 0, 1, 1)):
        one = subtract_map(
            q[None, 2 * pair], k[None, group], q[None, 2 * pair + 1], k[None, group], v[None, group], 0.5, True
        )
        np.testing.assert_allclose(out[pair], one[0], atol=1e-12)
    assert np.abs(heads[:4] - 0.5 * heads[4:] - out).max() > 0.1
    with pytest.raises(ValueError, match="whole pairs of query heads, got 6 query heads on 2 key heads"):
        differential_pairs(q[:6], k, v, np.zeros((3, 4)))


def test_a_sink_is_a_gate_in_both_directions():
    rng = np.random.default_rng(2)
    scores = 3 * rng.standard_normal(20)
    lse = math.log(np.exp(scores).sum())
    weights = np.exp(scores - lse)
    for s in (-1e3, -2.0, lse, 5.0, 1e3):
        top = max(s, scores.max())
        powers = np.exp(np.append(scores, s) - top)
        np.testing.assert_allclose(powers[:-1] / powers.sum(), weights * sigmoid(lse - s), atol=1e-15)
    for gate in (1e-6, 0.25, 0.999):
        s = lse - math.log(gate / (1 - gate))
        assert sigmoid(lse - s) == pytest.approx(gate, rel=1e-9)


def test_the_first_token_as_a_gate_gives_gradients():
    q, k, v = (
        torch.randn(1, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    given = [a.requires_grad_() for a in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *a: first_as_gate(*a)[0], given)


# ---- The language model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    if language_model.problem():
        pytest.skip("the language model is not installed")
    return language_model.load()


def test_the_needle_is_found_and_what_it_loses_goes_to_the_first_token(smollm):
    for n in (16, 256):
        row = needle_in_text(smollm, language_model.excerpt(smollm, 8 + n))[17, 4]
        assert row["needle"] > 0.4 and 1 - row["needle"] - row["first"] < 0.06


def test_heads_of_one_key_group_score_more_alike(smollm):
    same, across = pair_correlations(smollm, language_model.excerpt(smollm, 256))
    assert same.shape == across.shape == (30,)
    assert same.mean() > 0.6 and same.mean() > across.mean() + 0.08 and across.mean() > 0.3
