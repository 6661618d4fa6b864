"""Rows of the table for lecture 12: JetMoE's attention experts, and the routers and losses of three families of models."""

import numpy as np
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.jetmoe import modeling_jetmoe as jetmoe
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from attention import mixture
from attention.rotary import Rotary
from tests.conformance.table import row
from tests.conformance.with_torch import draw, three
from tests.conformance.with_transformers import FROM, causal

D_MODEL, D_HEAD, N = 24, 16, 12
TRIPLE = mixture.mixture_attention_numpy, mixture.mixture_attention_torch, mixture.mixture_attention_cuda
EXPERTS = {f"{k} of {n} experts": dict(n_experts=n, top_k=k) for n, k in ((8, 2), (5, 1), (4, 4))}


def attention_experts(n_experts, top_k):
    """JetMoE's layer with drawn weights, and the same as arguments of ours: (theirs, w_router, w_q, w_k, w_v, w_o)."""
    config = jetmoe.JetMoeConfig(
        hidden_size=D_MODEL, num_local_experts=n_experts, num_experts_per_tok=top_k, num_key_value_heads=1,
        kv_channels=D_HEAD, attn_implementation="eager",
    )  # fmt: skip
    shapes = (D_MODEL, n_experts), (n_experts, D_MODEL, D_HEAD), (D_MODEL, D_HEAD), (D_MODEL, D_HEAD)
    weights = [w * w.shape[-2] ** -0.5 for w in draw(12, *shapes, (n_experts, D_HEAD, D_MODEL))]
    w_router, w_q, w_k, w_v, w_o = weights
    theirs = jetmoe.JetMoeAttention(config, 0).eval()
    theirs.experts.router.layer.weight.data = w_router.T
    theirs.experts.input_linear.weight.data, theirs.experts.output_linear.weight.data = w_q.mT, w_o.mT
    theirs.kv_proj.weight.data, theirs.experts.bias.data = torch.cat([w_k, w_v], 1).T, torch.zeros(D_MODEL)
    return config, theirs, weights


@row("mixture of attention heads", FROM + "JetMoeAttention, positions not turned", EXPERTS)
def experts_of_jetmoe(factor, n_experts, top_k):
    _, theirs, (w_router, w_q, *others) = attention_experts(n_experts, top_k)
    (x,) = draw(13, (2, N, D_MODEL))
    still = torch.ones(2, N, D_HEAD), torch.zeros(2, N, D_HEAD)
    expected = theirs(x, causal(N), still)[0]
    return three(TRIPLE, x, w_router, factor * w_q, *others, top_k, causal=True), expected


@row("routed layer with RoPE", FROM + "JetMoeAttention", EXPERTS)
def layer_of_jetmoe(factor, n_experts, top_k):
    config, theirs, (w_router, w_q, w_k, w_v, w_o) = attention_experts(n_experts, top_k)
    ours = mixture.RoutedAttention(D_MODEL, n_experts, D_HEAD, top_k, Rotary(D_HEAD))
    ours.w_router.data, ours.w_k.data, ours.w_v.data = w_router, w_k, w_v
    ours.w_q.data, ours.w_o.data = factor * w_q.transpose(0, 1).flatten(1), w_o.flatten(0, 1)
    (x,) = draw(14, (2, N, D_MODEL))
    turns = jetmoe.JetMoeRotaryEmbedding(config)(x, torch.arange(N)[None])
    return [ours(x)], theirs(x, causal(N), turns)[0]


def logits_of(factor, n_experts=8):
    """Tokens and a router's matrix, and their logits times factor: x (2, N, d_model), w (n_experts, d_model), logits."""
    x, w = draw(15, (2, N, D_MODEL), (n_experts, D_MODEL))
    w = w * D_MODEL**-0.5
    return x, w, factor * (x @ w.T)


def scattered(gates, chosen, n_experts=8):
    return torch.zeros(len(gates), n_experts).scatter(1, chosen, gates)


@row("top-k gates", FROM + "MixtralTopKRouter", {f"top {k}": dict(top_k=k) for k in (2, 5, 8)})
def router_of_mixtral(factor, top_k):
    x, w, logits = logits_of(factor)
    theirs = mixtral.MixtralTopKRouter(
        mixtral.MixtralConfig(hidden_size=D_MODEL, num_local_experts=8, num_experts_per_tok=top_k)
    )
    theirs.weight.data = w
    _, gates, chosen = theirs(x)
    return [mixture.top_k_gates(logits.numpy(), top_k).reshape(-1, 8)], scattered(gates, chosen)


@row("top-1, softmax over all, capacity", FROM + "SwitchTransformersTop1Router", {"room for 3": dict(room=3)})
def router_of_switch(factor, room):
    x, w, logits = logits_of(factor)
    config = switch.SwitchTransformersConfig(hidden_size=D_MODEL, num_experts=8, expert_capacity=room)
    theirs = switch.SwitchTransformersTop1Router(config).eval()
    theirs.classifier.weight.data = w
    chosen, gate, _ = theirs(x)
    ours = []
    for text in logits:  # its capacity is that of a text
        best = text.argmax(-1, keepdim=True)
        kept = torch.from_numpy(mixture.kept_slots(best.numpy(), 8, room))
        ours.append(torch.zeros(N, 8).scatter(1, best, text.softmax(-1).gather(1, best) * kept))
    return [torch.stack(ours)], chosen * gate


LOSSES = {f"top {k}": dict(top_k=k) for k in (1, 2)}
SCALES = (0.3, 1.0, 3.0, 10.0)


def batches(factor):
    """Logits (2, N, 8) of several sizes, uneven more and more: for losses, which are one number each."""
    _, _, logits = logits_of(factor)
    return [scale * (logits + torch.linspace(0, 1, 8) * factor) for scale in SCALES]


@row("auxiliary loss, times top_k", FROM + "Mixtral's load_balancing_loss_func", LOSSES)
def loss_of_mixtral(factor, top_k):
    theirs = [mixtral.load_balancing_loss_func((one.flatten(0, 1),), 8, top_k) for one in batches(1.0)]
    ours = [top_k * mixture.load_balancing_loss(one, top_k) for one in batches(factor)]
    return [torch.stack(ours)], torch.stack(theirs)


@row("auxiliary loss of each text", FROM + "Switch's load_balancing_loss_func", {"top 1": {}})
def loss_of_switch(factor):
    theirs = [switch.load_balancing_loss_func(one.softmax(-1), one.argmax(-1)) for one in batches(1.0)]
    ours = [torch.stack([mixture.load_balancing_loss(text, 1) for text in one]).mean() for one in batches(factor)]
    return [torch.stack(ours)], torch.stack(theirs)


@row("z-loss", FROM + "router_z_loss_func", {"8 experts": {}})
def z_loss_of_switch(factor):
    theirs = [switch.router_z_loss_func(one) / 10 for one in batches(1.0)[:3]]
    return [torch.stack([mixture.router_z_loss(one) / 10 for one in batches(factor)[:3]])], torch.stack(theirs)


@row(
    "choice by score plus bias, gates by score",
    FROM + "DeepseekV3TopkRouter",
    {f"top {k}": dict(top_k=k) for k in (1, 3)},
)
def router_of_deepseek(factor, top_k):
    x, w, logits = logits_of(factor)
    config = deepseek.DeepseekV3Config(
        hidden_size=D_MODEL, num_local_experts=8, num_experts_per_tok=top_k, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, norm_topk_prob=False,
    )  # fmt: skip
    theirs = deepseek.DeepseekV3TopkRouter(config)
    bias = torch.from_numpy(np.linspace(-0.3, 0.3, 8)).float()
    theirs.weight.data, theirs.e_score_correction_bias.data = w, bias
    _, gates, chosen = theirs(x.flatten(0, 1))
    scores = logits.flatten(0, 1).sigmoid()
    ours = (scores + bias).topk(top_k, dim=-1).indices
    return [scattered(scores.gather(1, ours), ours)], scattered(gates, chosen)
