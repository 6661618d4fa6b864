"""Lecture 12: what the layers have in common, their losses, and the verdicts of its experiments. Models of others: tests/conformance."""

import math

import numpy as np
import pytest
import torch

from attention.experiments import mixture as experiments
from attention.fundamentals import attention_numpy
from attention.kv_cache import KVCache
from attention.mixture import (
    MixtureOfHeadsAttention,
    RoutedAttention,
    balancing_step,
    experts_on_processes,
    kept_slots,
    load_balancing_loss,
    mixture_attention_torch,
    routed_attention,
    router_z_loss,
    top_k_gates,
)
from attention.multi_head import MultiHeadAttention
from attention.rotary import Rotary
from utils import training


def text(seed=1, batch=2, n=9, d_model=24):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, n, d_model)))


def routed(n_experts=5, top_k=2, positions=None):
    return training.initialise(RoutedAttention(24, n_experts, 8, top_k, positions).double(), 0)


def as_arguments(layer):
    return layer.w_router, *(w.contiguous() for w in (layer.experts()[0], layer.w_k, layer.w_v, layer.experts()[1]))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_layer_is_the_function_with_its_weights(top_k):
    layer, x = routed(top_k=top_k), text()
    with torch.no_grad():
        w_router, w_q, w_k, w_v, w_o = as_arguments(layer)
        expected = mixture_attention_torch(x, w_router, w_q, w_k, w_v, w_o, top_k, causal=True)
        assert torch.allclose(layer(x), expected, atol=1e-12)


def test_the_layer_decodes_with_a_cache_of_one_head():
    layer, x = routed(positions=Rotary(8)), text()
    cache = KVCache(2, 1, 9, 8)
    with torch.no_grad():
        steps = [layer(part, causal=True, cache=cache) for part in x.split((4, 1, 4), dim=1)]
        assert torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 9, 24), (2, 0, 24)])
def test_no_tokens_are_no_outputs(shape):
    layer, x = routed(positions=Rotary(8)), torch.zeros(shape).double().requires_grad_()
    out = layer(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape


def test_grouped_gives_what_dense_gives():
    rng = np.random.default_rng(2)
    x, w_q, w_o = rng.standard_normal((7, 6)), rng.standard_normal((4, 6, 3)), rng.standard_normal((4, 3, 6))
    w_k, w_v = rng.standard_normal((2, 6, 3))
    gates = rng.random((7, 4)) * (rng.random((7, 4)) < 0.5)
    heads = attention_numpy(np.einsum("nd,edh->enh", x, w_q), (x @ w_k)[None], (x @ w_v)[None], causal=True)
    dense = np.einsum("ne,enh,ehd->nd", gates, heads, w_o)
    assert np.abs(routed_attention(x, gates, w_q, w_k, w_v, w_o, causal=True) - dense).max() < 1e-12


def test_of_equal_logits_the_first_are_chosen_along_the_last_axis():
    logits = np.random.default_rng(0).integers(0, 2, (2, 3, 300)).astype(float)
    gates = top_k_gates(logits, 20)
    ones = np.cumsum(logits, axis=-1) * logits  # 1, 2, 3, ... at the larger of the two logits
    assert np.array_equal(gates, np.where((ones > 0) & (ones <= 20), 0.05, 0))


@pytest.mark.parametrize(("top_k", "n_shared"), [(2, 0), (2, 2), (4, 2)])
def test_gated_heads_are_all_heads_times_gates(top_k, n_shared):
    layer, x = training.initialise(MixtureOfHeadsAttention(24, 6, top_k, n_shared).double(), 0), text()
    usual, found = MultiHeadAttention(24, 6).double(), []
    usual.load_state_dict({name: layer.state_dict()[name] for name in ("w_q", "w_k", "w_v", "w_o")})
    usual.outputs.register_forward_hook(lambda _, __, heads: found.append(heads))
    with torch.no_grad():
        usual(x, causal=True)
        gates = layer.gates(x)
        assert ((gates != 0).sum(-1) == top_k + n_shared).all()
        dense = sum(gates[..., h, None] * found[0][:, h] @ layer.w_o[4 * h : 4 * h + 4] for h in range(6))
        assert torch.allclose(layer(x, causal=True), dense, atol=1e-12)


def test_gated_heads_with_routers_of_zeros_are_multi_head_attention():
    layer, x = training.initialise(MixtureOfHeadsAttention(24, 6, 4, 2, Rotary(4)).double(), 0), text()
    usual = MultiHeadAttention(24, 6, Rotary(4)).double()
    usual.load_state_dict({name: layer.state_dict()[name] for name in ("w_q", "w_k", "w_v", "w_o")})
    with torch.no_grad():
        for name in ("w_router", "w_shared", "w_balance"):
            getattr(layer, name).zero_()
        assert torch.allclose(layer(x, causal=True), usual(x, causal=True), atol=1e-12)


def test_sizes_that_cannot_be_are_refused():
    for sizes in ((24, 5, 2, 0), (24, 6, 0, 0), (24, 6, 5, 2), (24, 6, 2, -1)):
        with pytest.raises(ValueError, match="n_heads must divide d_model"):
            MixtureOfHeadsAttention(*sizes)
    with pytest.raises(ValueError, match="top_k must be from 1 to 4, got 5"):
        RoutedAttention(24, 4, 8, 5)
    with pytest.raises(ValueError, match="top_k must be from 1 to 4, got 0"):
        load_balancing_loss(torch.zeros(3, 4), 0)


def test_losses_at_their_ends():
    fair, collapsed = 50 * torch.eye(8).double(), torch.zeros(64, 8).double()
    collapsed[:, 3] = 50.0
    assert load_balancing_loss(fair, 1).item() == pytest.approx(1)
    assert load_balancing_loss(collapsed, 1).item() == pytest.approx(8)
    assert load_balancing_loss(torch.zeros(5, 8), 8).item() == pytest.approx(1)
    assert router_z_loss(torch.zeros(2, 3, 8)).item() == pytest.approx(math.log(8) ** 2)


def test_the_bias_evens_a_load_and_rests_when_it_is_even():
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.standard_normal((4000, 6)) + [1.5, 1, 0, 0, 0, -1])
    bias = torch.zeros(6).double()
    for _ in range(300):
        bias = balancing_step(bias, logits, 2, 0.02)
    counts = torch.bincount((logits + bias).topk(2).indices.flatten(), minlength=6)
    assert counts.max() < 1.05 * counts.double().mean()
    assert (balancing_step(bias, 9 * torch.eye(6).double(), 1, 0.02) == bias).all() or bias.abs().max() > 9


def test_a_full_expert_drops_later_tokens():
    chosen = np.array([[0, 1], [0, 2], [1, 0], [0, 1]])
    assert kept_slots(chosen, 3, 2).tolist() == [[True, True], [True, True], [True, False], [False, False]]
    assert kept_slots(chosen, 3, 9).all()
    assert not kept_slots(chosen, 3, 0).any()


def test_a_router_with_renormalised_top_1_gets_no_gradient_and_others_do():
    for top_k, layer_class, moves in (
        (1, RoutedAttention, False),
        (1, experiments.SoftmaxOverAll, True),
        (2, RoutedAttention, True),
    ):
        layer = training.initialise(layer_class(24, 5, 8, top_k).double(), 0)
        layer(text()).square().sum().backward()
        assert (layer.w_router.grad.abs().max() > 1e-6) == moves
        assert moves or (layer.w_router.grad == 0).all()


@pytest.mark.slow
def test_a_routers_choice_lies_between_a_tokens_own_and_the_same_for_all():
    inputs, lengths, products = experiments.head_records(layer=3)
    old, new = slice(0, 224 * 16), slice(224 * 16, None)
    square = inputs[old].T @ inputs[old] + 10 * np.eye(384)
    router = np.linalg.solve(square, inputs[old].T @ np.log(lengths[old]))

    def error(values):
        kept = np.zeros(values.shape, bool)
        np.put_along_axis(kept, np.argsort(-values, axis=-1)[:, :6], True, axis=-1)
        return experiments.lost(kept, products[new])

    same = np.broadcast_to(lengths[old].mean(0), lengths[new].shape)
    own, routed_error, fixed = error(lengths[new]), error(inputs[new] @ router), error(same)
    assert own + 0.02 < routed_error < fixed - 0.03


@pytest.mark.slow
def test_a_collapsed_router_recovers_with_the_loss_and_not_without():
    loads = [
        experiments.train_routed(8, 1, weight, over="all", start=experiments.start_collapsed)[1].metrics[-1]
        for weight in (0.0, 0.01)
    ]
    assert loads[0] > 0.55 and loads[1] < 0.45


@pytest.mark.slow
def test_experts_on_processes_give_what_one_process_gives():
    rng = np.random.default_rng(4)
    slots, w = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((11, 5), (6, 5, 3)))
    expert = torch.tensor([0, 5, 5, 1, 0, 3, 5, 1, 0, 4, 5])  # nobody goes to expert 2
    expected = torch.einsum("sd,sdh->sh", slots, w[expert])
    assert torch.allclose(experts_on_processes(slots, expert, w, 3), expected, atol=1e-12)
    with pytest.raises(ValueError, match="multiple of n_processes"):
        experts_on_processes(slots, expert, w, 4)
