"""Rows of the table for lecture 11: differential attention, and gates behind attention, from PyTorch and transformers."""

import math

import torch
from torch.nn import functional as F
from transformers.models.diffllama import modeling_diffllama as diffllama
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from attention import differential
from attention.differential import DifferentialAttention
from attention.flash import flash_attention_cuda, flash_attention_numpy, flash_attention_torch
from attention.grouped_query import grouped_query_attention_torch
from attention.kv_cache import KVCache
from attention.multi_head import merge_heads, split_heads
from attention.rotary import Rotary
from tests.conformance.table import row
from tests.conformance.with_torch import TORCH, bottom_right, draw, three
from tests.conformance.with_transformers import D_HEAD, D_MODEL, FROM, N_HEADS, SIZES, causal, filled

TRIPLE = (
    differential.differential_attention_numpy,
    differential.differential_attention_torch,
    differential.differential_attention_cuda,
)
N = 12


@row(
    "differential attention",
    f"{TORCH}, scaled_dot_product_attention twice",
    {"lambda 0.8": dict(lam=0.8), "-0.3": dict(lam=-0.3)},
)
def two_calls(factor, lam):
    q1, k1, q2, k2, v = draw(0, (2, 3, 5, 16), (2, 3, 9, 16), (2, 3, 5, 16), (2, 3, 9, 16), (2, 3, 9, 32))
    seen = bottom_right(5, 9)
    first, second = (F.scaled_dot_product_attention(q, k, v, attn_mask=seen) for q, k in ((q1, k1), (q2, k2)))
    return three(TRIPLE, factor * q1, k1, factor * q2, k2, v, lam, causal=True), first - lam * second


def by_halves(w):
    """The columns of pairs (2i, 2i+1) as transformers has them, all first heads before all second ones."""
    return w.unflatten(1, (N_HEADS // 2, 2, D_HEAD)).transpose(1, 2).flatten(1)


@row(
    "differential layer, whole and with a cache",
    FROM + "DiffLlamaAttention",
    {f"layer {i}": dict(i=i) for i in (0, 2, 9)},
)
def layer_of_diffllama(factor, i):
    config = diffllama.DiffLlamaConfig(**SIZES, num_key_value_heads=N_HEADS)
    theirs = filled(diffllama.DiffLlamaAttention(config, layer_idx=i))
    ours = DifferentialAttention(D_MODEL, N_HEADS // 2, depth=i, positions=Rotary(D_HEAD))
    ours.norm.eps = config.rms_norm_eps  # its gain stays 1: theirs has none
    for name, own in zip("qkvo", draw(1, *[(D_MODEL, D_MODEL)] * 4), strict=True):
        own = own * 1.5 * D_MODEL**-0.5
        getattr(theirs, f"{name}_proj").weight.data = own.T if name == "o" else by_halves(own).T
        getattr(ours, f"w_{name}").data = own * (factor if name == "q" else 1.0)
    for name, vector in zip(("q1", "k1", "q2", "k2"), draw(2, *[(D_HEAD,)] * 4), strict=True):
        for layer in (theirs, ours):
            getattr(layer, f"lambda_{name}").data = 0.3 * vector
    (x,) = draw(3, (2, N, D_MODEL))
    turns = diffllama.DiffLlamaRotaryEmbedding(config)(x, torch.arange(N)[None])
    cache = KVCache(2, N_HEADS, N, D_HEAD, torch.float32)
    steps = [
        ours(x[:, a:b], causal=True, positions=torch.arange(a, b), cache=cache) for a, b in ((0, 7), (7, 8), (8, N))
    ]
    return [ours(x, causal=True), torch.cat(steps, dim=1)], theirs(x, turns, causal(N))[0]


@row("a learned sink as a gate of the LSE", FROM + "GptOssAttention", {"full attention": {}})
def sink_as_gate(factor):
    config = gpt_oss.GptOssConfig(**SIZES, num_key_value_heads=N_HEADS, head_dim=D_HEAD, layer_types=["full_attention"],
                                  num_hidden_layers=1)  # fmt: skip
    theirs = filled(gpt_oss.GptOssAttention(config, 0))
    theirs.sinks.data = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    (x,) = draw(4, (2, N, D_MODEL))
    turns = gpt_oss.GptOssRotaryEmbedding(config)(x, torch.arange(N)[None])
    q, k, v = (split_heads(getattr(theirs, f"{name}_proj")(x), N_HEADS) for name in "qkv")
    q, k = gpt_oss.apply_rotary_pos_emb(q, k, *turns)
    results = []
    for flash in (flash_attention_numpy, flash_attention_torch, flash_attention_cuda):
        given = [a.numpy() for a in (factor * q, k, v)] if flash is flash_attention_numpy else (factor * q, k, v)
        out, lse = map(torch.as_tensor, flash(*given, causal=True))
        gate = torch.sigmoid(lse.float() - theirs.sinks[:, None])
        results.append(theirs.o_proj(merge_heads(out * gate[..., None])))
    return results, theirs(x, turns, causal(N))[0]


@row(
    "a gate on the heads' outputs",
    FROM + "Qwen3NextAttention",
    {"4 heads on 2": dict(groups=2), "on 4": dict(groups=4)},
)
def gated_output(factor, groups):
    config = qwen.Qwen3NextConfig(**SIZES, num_key_value_heads=groups, head_dim=D_HEAD, partial_rotary_factor=1.0)
    theirs = filled(qwen.Qwen3NextAttention(config, 0))
    (x,) = draw(5, (2, N, D_MODEL))
    turns = qwen.Qwen3NextRotaryEmbedding(config)(x, torch.arange(N)[None])
    both = theirs.q_proj(x).unflatten(-1, (N_HEADS, 2 * D_HEAD)).transpose(1, 2)
    q, gate = both.split(D_HEAD, dim=-1)  # of each head: its query, then its gate
    k, v = (split_heads(part(x), groups) for part in (theirs.k_proj, theirs.v_proj))

    def normed(heads, norm):
        return heads / (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight)

    q, k = qwen.apply_rotary_pos_emb(normed(q, theirs.q_norm), normed(k, theirs.k_norm), *turns)
    heads = grouped_query_attention_torch(factor * q, k, v, causal=True, scale=1 / math.sqrt(D_HEAD))
    return [theirs.o_proj(merge_heads(heads * torch.sigmoid(gate)))], theirs(x, turns, causal(N))[0]
