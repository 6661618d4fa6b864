# Generated from solutions/02_multi_head_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 02 · Multi-head attention: the finished code."""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.fundamentals import attention_numpy, attention_torch, attention_weights, causal_mask
from utils.data import Vocabulary


def weights_from_torch(in_proj_weight, out_proj_weight):
    """The matrices of an nn.MultiheadAttention as this course keeps them: (d_in, d_out), used as x @ w.

    in_proj_weight (3 * d_model, d_model), out_proj_weight (d_model, d_model), arrays or tensors.
    Returns (w_q, w_k, w_v, w_o), each (d_model, d_model).
    """
    d_model = in_proj_weight.shape[1]
    w_q, w_k, w_v = (in_proj_weight[i * d_model:(i + 1) * d_model].T for i in range(3))
    return w_q, w_k, w_v, out_proj_weight.T


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


def check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads):
    """Raise ValueError, in one sentence, unless inputs, matrices and number of heads fit. For arrays and tensors."""
    for name, x in (("x_q", x_q), ("x_kv", x_kv)):
        if len(x.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_model), got shape {tuple(x.shape)}")
    if tuple(x_q.shape[:-2]) != tuple(x_kv.shape[:-2]):
        raise ValueError(f"x_q and x_kv must have the same leading axes, "
                         f"got {tuple(x_q.shape)} and {tuple(x_kv.shape)}")
    for name, w, rows, of in (("w_q", w_q, x_q.shape[-1], "x_q"), ("w_k", w_k, x_kv.shape[-1], "x_kv"),
                              ("w_v", w_v, x_kv.shape[-1], "x_kv"), ("w_o", w_o, w_v.shape[-1], "the columns of w_v")):
        if len(w.shape) != 2 or w.shape[0] != rows:
            raise ValueError(f"{name} must have {rows} rows, as {of} says, got shape {tuple(w.shape)}")
    if w_q.shape[1] != w_k.shape[1]:
        raise ValueError(f"w_q and w_k must have as many columns, got {w_q.shape[1]} and {w_k.shape[1]}")
    if n_heads < 1 or w_q.shape[1] % n_heads or w_v.shape[1] % n_heads:
        raise ValueError(f"n_heads must divide the columns of w_q and w_v, got {n_heads} heads, "
                         f"{w_q.shape[1]} and {w_v.shape[1]} columns")


def multi_head_attention_numpy(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in NumPy: project, attend in each head, concatenate, project.

    x_q (..., n_queries, d_model), x_kv (..., n_keys, d_model); w_q, w_k (d_model, n_heads * d_head),
    w_v (d_model, n_heads * d_v), w_o (n_heads * d_v, d_model); mask boolean, True = may attend, broadcastable to
    (..., n_heads, n_queries, n_keys). Returns (..., n_queries, d_model). Raises ValueError when shapes do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    q, k, v = (split_heads(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o


def multi_head_attention_torch(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in PyTorch; arguments, shapes and errors as multi_head_attention_numpy, differentiable."""
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    q, k, v = split_heads(x_q @ w_q, n_heads), split_heads(x_kv @ w_k, n_heads), split_heads(x_kv @ w_v, n_heads)
    return merge_heads(attention_torch(q, k, v, mask, causal)) @ w_o


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


def masked_softmax(scores, mask=None, causal=False):
    """Weights from scores (batch, n_heads, n_queries, n_keys); a row with nothing to attend to is zero, gradient too.

    mask boolean, True = may attend, broadcastable to the scores, on their device. ValueError for another mask.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean with True = may attend, got {mask.dtype}")
    if causal:
        allowed = torch.from_numpy(causal_mask(*scores.shape[-2:])).to(scores.device)
        mask = allowed if mask is None else allowed & mask
    if mask is None:
        return torch.softmax(scores, dim=-1)
    nothing = ~mask.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~mask & ~nothing, -math.inf), dim=-1).masked_fill(nothing, 0.0)


class MultiHeadAttention(nn.Module):
    """Multi-head attention, self or cross, with places to look at and to change what a head does.

    A hook on `weights` sees the attention weights (batch, n_heads, n_queries, n_keys); one on `outputs` sees what the
    heads found, (batch, n_heads, n_queries, d_head), before they are merged. What a hook returns takes their place.
    """

    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
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
        check_projections(x, x if x_kv is None else x_kv, self.w_q, self.w_k, self.w_v, self.w_o, self.n_heads)
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
        weights = self.weights(masked_softmax(scores, mask, causal))
        return merge_heads(self.outputs(weights @ v)) @ self.w_o


class DistanceBias(Positions):
    """A learned number for each head and distance is added to the scores; beyond `reach` all distances share one.

    The factor 4 lets the numbers grow four times as far in as many steps.
    """

    def __init__(self, n_heads, reach=7):
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(n_heads, 2 * reach + 1))

    def bias(self, n_queries, n_keys):
        queries = torch.arange(n_keys - n_queries, n_keys, device=self.table.device)
        distance = queries[:, None] - torch.arange(n_keys, device=self.table.device)
        return 4 * self.table[:, distance.clip(-self.reach, self.reach) + self.reach]


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

def feed_forward(d_model, d_ff):
    """Two linear layers without biases and a GELU between them, for each token alone: (..., d_model) to the same."""
    return nn.Sequential(nn.Linear(d_model, d_ff, bias=False), nn.GELU(), nn.Linear(d_ff, d_model, bias=False))

class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)) if there is one."""

    def __init__(self, config, attention, norm):
        super().__init__()
        self.norm_1, self.attention = norm(config.d_model), attention
        if config.d_ff:
            self.norm_2, self.feed_forward = norm(config.d_model), feed_forward(config.d_model, config.d_ff)

    def forward(self, x, **where):
        x = x + self.attention(self.norm_1(x), causal=True, **where)
        return x + self.feed_forward(self.norm_2(x)) if hasattr(self, "feed_forward") else x


def standard_attention(config, layer, positions):
    """The attention of layer number `layer` (from 0) of a TransformerLM."""
    return MultiHeadAttention(config.d_model, config.n_heads, positions)

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
        ValueError where ids are not integers (batch, seq) below vocab_size.
        """
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be integers (batch, seq), got {ids.dtype} of shape {tuple(ids.shape)}")
        if ids.numel() and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(f"ids must lie in 0 ... {self.config.vocab_size - 1}, got {ids.min()} to {ids.max()}")
        if positions is None:
            start = caches[0].length if caches else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.positions.embed(self.embedding(ids), positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=mask, positions=positions, cache=caches[layer] if caches else None)
        return self.unembedding(self.norm(x))


@contextmanager
def record(model, names=("weights", "outputs")):
    """During the block, keep what leaves the modules of these last names: {"blocks.0.attention.weights": tensor}."""
    cache, handles = {}, []
    for path, module in model.named_modules():
        if path.split(".")[-1] in names:
            def keep(_module, _inputs, output, path=path):
                cache[path] = output.detach()
            handles.append(module.register_forward_hook(keep))
    try:
        yield cache
    finally:
        for handle in handles:
            handle.remove()

@contextmanager
def without_heads(model, heads, means=None):
    """During the block, the heads [(layer, head), ...] of a TransformerLM hand over zeros.

    With means (n_layers, n_heads, d_head) they hand over their mean instead, the same for each token.
    """
    def switch_off(layer):
        def change(_module, _inputs, outputs):
            outputs = outputs.clone()
            for head in [h for l, h in heads if l == layer]:
                outputs[:, head] = 0.0 if means is None else means[layer][head]
            return outputs
        return change

    handles = [block.attention.outputs.register_forward_hook(switch_off(i)) for i, block in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pattern_scores(weights, period):
    """How much each map of weights looks at the previous token, and at the token after the last occurrence.

    weights (..., n, n), rows are queries, of sequences that repeat after `period` tokens.
    Returns (previous, induction), each (...): the mean of weights[i, i - 1] over i >= 1, and the mean of
    weights[i, i - period + 1] over i >= period. Source: Olsson et al. 2022 (arXiv 2209.11895).
    """
    previous = np.diagonal(weights, -1, axis1=-2, axis2=-1)
    induction = np.diagonal(weights, 1 - period, axis1=-2, axis2=-1)[..., 1:]      # its first entry is query period - 1
    return previous.mean(-1), induction.mean(-1)


def head_contributions(heads, w_o):
    """What each head adds to the output of multi-head attention; the sum over the heads is merge_heads(heads) @ w_o.

    heads (..., n_heads, seq, d_v), w_o (n_heads * d_v, d_model). Returns (..., n_heads, seq, d_model).
    """
    n_heads, d_v = heads.shape[-3], heads.shape[-1]
    return heads @ w_o.reshape(n_heads, d_v, w_o.shape[-1])


class EncoderLayer(nn.Module):
    """x + self-attention in both directions, then x + feed-forward. x (batch, seq, d_model)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, n_heads, DistanceBias(n_heads))
        self.feed_forward = feed_forward(d_model, 2 * d_model)

    def forward(self, x, mask=None):
        x = x + self.self_attention(self.norm_1(x), mask=mask)
        return x + self.feed_forward(self.norm_2(x))

class DecoderLayer(nn.Module):
    """y + causal self-attention, then y + cross-attention into the encoder's output, then y + feed-forward."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.self_attention = MultiHeadAttention(d_model, n_heads, DistanceBias(n_heads))
        self.cross_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = feed_forward(d_model, 2 * d_model)

    def forward(self, y, encoded, mask):
        y = y + self.self_attention(self.norm_1(y), causal=True)
        y = y + self.cross_attention(self.norm_2(y), encoded, mask=mask)
        return y + self.feed_forward(self.norm_3(y))


class EncoderDecoder(nn.Module):
    """A Transformer that translates word ids, with encoder and decoder of n_layers each.

    Sentences are ids (batch, length), padded behind, with the padding, start and end of `Vocabulary`.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.1, with the norms in front of each part.
    """

    def __init__(self, n_source, n_target, d_model=48, n_heads=4, n_layers=1):
        super().__init__()
        self.source, self.target = nn.Embedding(n_source, d_model), nn.Embedding(n_target, d_model)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, n_heads) for _ in range(n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, n_heads) for _ in range(n_layers))
        self.norm_source, self.norm_target = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, n_target)

    def forward(self, source, target):
        """Logits (batch, length, n_target) of every target word, given the words before it, all at once."""
        mask = (source != Vocabulary.PAD)[:, None, None, :]
        x = self.source(source)
        for layer in self.encoder:
            x = layer(x, mask)
        encoded = self.norm_source(x)
        y = self.target(F.pad(target[:, :-1], (1, 0), value=Vocabulary.START))
        for layer in self.decoder:
            y = layer(y, encoded, mask)
        return self.out(self.norm_target(y))

    @torch.no_grad()
    def translate(self, source, n_steps):
        """Greedy translation: ids (batch, n_steps), to be read up to the first END."""
        target = source.new_full((len(source), n_steps), Vocabulary.PAD)
        for t in range(n_steps):
            target[:, t] = self(source, target[:, :t + 1])[:, t].argmax(-1)
        return target


def attention_with_dropout(q, k, v, key_mask, keep, rate):
    """Attention with dropout on its weights, in NumPy. Returns (out, weights), the weights as they were before dropout.

    q (batch, n_heads, n_queries, d_head), k, v (batch, n_heads, n_keys, d_head); key_mask (batch, n_keys) boolean,
    True = may attend; keep (batch, n_heads, n_queries, n_keys) boolean, False = dropped; rate: the share dropped, what
    is kept is divided by 1 - rate. A row with nothing to attend to is zero.
    """
    weights = attention_weights(q, k, mask=key_mask[:, None, None, :])
    return (weights * keep / (1 - rate)) @ v, weights
