# ---
# jupyter:
#   course:
#     module: multi_head
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lecture 02 · Multi-head attention

# %%
import sys; sys.path.insert(0, "..")              # the course's own modules live one folder up

import matplotlib.pyplot as plt
import numpy as np
import torch

from utils import data, plotting, training
from utils.check import check

torch.set_num_threads(1)                          # tiny models: one thread is fastest, and the same everywhere

# %% tags=["export"]
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.fundamentals import attention_numpy, attention_torch, causal_mask

# %% [markdown]
# ## Part 1 · The mechanism

# %% tags=["export"]
def split_heads(x, n_heads):
    """Cut the last axis into heads: (..., seq, n_heads * d_head) -> (..., n_heads, seq, d_head). Arrays and tensors.

    Head i gets the columns i * d_head to (i + 1) * d_head. ValueError when n_heads does not divide the last axis.
    """
    if n_heads < 1 or x.shape[-1] % n_heads:
        raise ValueError(f"n_heads must divide the last axis of x, got {n_heads} heads and {x.shape[-1]} columns")
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads).swapaxes(-3, -2)

def merge_heads(x):
    """The inverse of split_heads: (..., n_heads, seq, d_head) -> (..., seq, n_heads * d_head). Arrays and tensors."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

# %% tags=["export"]
def multi_head_attention_numpy(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in NumPy: project, attend in each head, concatenate, project.

    x_q (..., n_queries, d_model), x_kv (..., n_keys, d_model); w_q, w_k (d_model, n_heads * d_head),
    w_v (d_model, n_heads * d_v), w_o (n_heads * d_v, d_model); mask boolean, True = may attend, broadcastable to
    (..., n_heads, n_queries, n_keys). Returns (..., n_queries, d_model). Raises ValueError when shapes do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """
    q, k, v = (split_heads(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o

def multi_head_attention_torch(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in PyTorch; arguments, shapes and errors as multi_head_attention_numpy, differentiable."""
    q, k, v = (split_heads(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return merge_heads(attention_torch(q, k, v, mask, causal)) @ w_o

# %% [markdown]
# ## Part 2 · A small language model
#
# Positions can enter a model in three places: added to the embeddings, as a rotation of queries and keys, or added to
# the scores. One interface with three hooks holds them all; lecture 03 fills them in.

# %% tags=["export"]
class Positions(nn.Module):
    """How a model knows the order of its tokens. This one knows nothing; a scheme overrides one of the three hooks."""

    def embed(self, x, positions):
        """Add positions to embeddings. x (batch, seq, d_model), positions integers (seq,) or (batch, seq)."""
        return x

    def rotate(self, x, positions):
        """Turn queries or keys by their positions. x (batch, n_heads, seq, d_head), positions as in embed."""
        return x

    def bias(self, n_queries, n_keys):
        """Numbers to add to the scores: (n_heads, n_queries, n_keys), aligned at the bottom right, or None."""
        return None

# %% tags=["export"]
class MultiHeadAttention(nn.Module):
    """Multi-head attention, self or cross, with places to look at and to change what a head does.

    A hook on `weights` sees the attention weights (batch, n_heads, n_queries, n_keys); one on `outputs` sees what the
    heads found, (batch, n_heads, n_queries, d_head), before they are merged. What a hook returns takes their place.
    """

    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model, got {n_heads} and {d_model}")
        self.n_heads = n_heads
        self.positions = Positions() if positions is None else positions
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5)
                                                  for _ in range(4))
        self.weights, self.outputs = nn.Identity(), nn.Identity()

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None, cache=None):
        """x (batch, n_queries, d_model) asks; x_kv (batch, n_keys, d_model) answers, by default x itself.

        mask boolean, broadcastable to (batch, n_heads, n_queries, n_keys). positions: integers (n_queries,) or
        (batch, n_queries), by default 0, 1, ...; they rotate queries and keys in self-attention only.
        cache: update(k, v) stores keys and values and returns all that may be attended to. Returns the shape of x.
        """
        q = split_heads(x @ self.w_q, self.n_heads)
        k, v = (split_heads((x if x_kv is None else x_kv) @ w, self.n_heads) for w in (self.w_k, self.w_v))
        if x_kv is None:
            positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            q, k = self.positions.rotate(q, positions), self.positions.rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        bias = self.positions.bias(*scores.shape[-2:]) if x_kv is None else None
        if bias is not None:
            scores = scores + bias
        if causal:
            allowed = torch.from_numpy(causal_mask(*scores.shape[-2:])).to(x.device)
            mask = allowed if mask is None else allowed & mask
        if mask is None:
            weights = torch.softmax(scores, dim=-1)
        else:
            nothing = ~mask.any(-1, keepdim=True)             # rows with nothing to attend to: zeros, and no gradient
            weights = torch.softmax(scores.masked_fill(~mask & ~nothing, -math.inf), dim=-1).masked_fill(nothing, 0.0)
        return merge_heads(self.outputs(self.weights(weights) @ v)) @ self.w_o

# %% tags=["export"]
@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a TransformerLM. d_ff = 0 leaves the feed-forward layers out (an attention-only model)."""

    vocab_size: int
    d_model: int = 64
    n_heads: int = 4
    n_layers: int = 2
    d_ff: int = 256

    @property
    def d_head(self):
        return self.d_model // self.n_heads

def standard_attention(config, layer, positions):
    """The attention of layer number `layer` (from 0) of a TransformerLM."""
    return MultiHeadAttention(config.d_model, config.n_heads, positions)

class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)) if there is one."""

    def __init__(self, config, attention, norm):
        super().__init__()
        self.norm_1, self.attention = norm(config.d_model), attention
        if config.d_ff:
            self.norm_2 = norm(config.d_model)
            self.feed_forward = nn.Sequential(nn.Linear(config.d_model, config.d_ff, bias=False), nn.GELU(),
                                              nn.Linear(config.d_ff, config.d_model, bias=False))

    def forward(self, x, **where):
        x = x + self.attention(self.norm_1(x), causal=True, **where)
        return x + self.feed_forward(self.norm_2(x)) if hasattr(self, "feed_forward") else x

class TransformerLM(nn.Module):
    """A small decoder-only language model. ids (batch, seq) -> logits (batch, seq, vocab_size).

    config: a TransformerConfig. Three parts can be exchanged:
    attention(config, layer, positions): a module called as MultiHeadAttention is, one for each layer;
    positions: a Positions, shared by all layers; norm(d_model): a module, such as nn.LayerNorm or nn.RMSNorm.
    """

    def __init__(self, config, attention=standard_attention, positions=None, norm=nn.LayerNorm):
        super().__init__()
        self.config = config
        self.positions = Positions() if positions is None else positions
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, attention(config, layer, self.positions), norm)
                                    for layer in range(config.n_layers))
        self.norm = norm(config.d_model)
        self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, ids, mask=None, positions=None, caches=None):
        """mask boolean, True = may attend, beside the causal one, broadcastable to (batch, n_heads, seq, n_keys).

        positions: integers (seq,) or (batch, seq), by default 0, 1, ... behind what the caches hold.
        caches: one for each layer, with `length`, the tokens seen so far, and update(k, v); see lecture 05.
        """
        if positions is None:
            start = caches[0].length if caches else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.positions.embed(self.embedding(ids), positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=mask, positions=positions, cache=caches[layer] if caches else None)
        return self.unembedding(self.norm(x))
