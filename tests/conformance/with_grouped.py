"""Rows of the table for lecture 08: PyTorch's grouped heads, and the attention of Llama with fewer heads of keys."""

import torch
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from attention import grouped_query
from attention.grouped_query import GroupedQueryAttention
from attention.kv_cache import KVCache
from attention.rotary import Rotary
from tests.conformance.table import row
from tests.conformance.with_torch import TORCH, bottom_right, draw, three
from tests.conformance.with_transformers import FROM, causal, filled

TRIPLE = (
    grouped_query.grouped_query_attention_numpy,
    grouped_query.grouped_query_attention_torch,
    grouped_query.grouped_query_attention_cuda,
)
HEADS = {f"{n} heads on {m}": dict(n_heads=n, n_kv_heads=m) for n, m in ((9, 3), (8, 8), (8, 1))}


@row("grouped-query attention", f"{TORCH}, scaled_dot_product_attention with enable_gqa", HEADS)
def groups_of_torch(factor, n_heads, n_kv_heads):
    q, k, v = draw(0, (2, n_heads, 5, 16), (2, n_kv_heads, 9, 16), (2, n_kv_heads, 9, 16))
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bottom_right(5, 9), enable_gqa=True)
    return three(TRIPLE, factor * q, k, v, causal=True), theirs


@row("grouped-query layer, whole and with a cache", FROM + "LlamaAttention", HEADS)
def layer_of_llama(factor, n_heads, n_kv_heads):
    config = llama.LlamaConfig(
        hidden_size=16 * n_heads, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads, head_dim=16,
        attn_implementation="eager",
    )  # fmt: skip
    theirs, ours = (
        filled(llama.LlamaAttention(config, 0)),
        GroupedQueryAttention(16 * n_heads, n_heads, n_kv_heads, Rotary(16)),
    )
    for name in "qkvo":
        matrix = getattr(theirs, f"{name}_proj").weight.detach().T
        getattr(ours, f"w_{name}").data = matrix * (factor if name == "q" else 1.0)
    (x,) = draw(1, (2, 12, 16 * n_heads))
    turns = llama.LlamaRotaryEmbedding(config)(x, torch.arange(12)[None])
    expected = theirs(x, position_embeddings=turns, attention_mask=causal(12))[0]
    cache = KVCache(2, n_kv_heads, 12, 16, torch.float32)
    steps = [
        ours(x[:, a:b], causal=True, positions=torch.arange(a, b), cache=cache) for a, b in ((0, 7), (7, 8), (8, 12))
    ]
    return [ours(x, causal=True), torch.cat(steps, dim=1)], expected
