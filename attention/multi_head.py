# Generated from solutions/02_multi_head_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 02 · Multi-head attention: the finished code."""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.fundamentals import (
    ROW_OF_A_TILE,
    attention_numpy,
    attention_torch,
    attention_weights,
    causal_mask,
    check_arguments,
)
from utils import cuda
from utils.data import Vocabulary

__all__ = [
    "multi_head_attention_numpy",
    "multi_head_attention_torch",
    "multi_head_attention_cuda",
    "split_heads",
    "merge_heads",
    "MultiHeadAttention",
    "TransformerConfig",
    "TransformerLM",
]


def split_heads(x, n_heads):
    """Cut the last axis into heads. Arrays and tensors.

    x (..., seq, n_heads * d_head). Returns (..., n_heads, seq, d_head): head i gets
    the columns i * d_head to (i + 1) * d_head. ValueError unless n_heads divides them.
    """
    if n_heads < 1 or x.shape[-1] % n_heads:
        raise ValueError("n_heads must divide the last axis of x, "
                         f"got {n_heads} heads and {x.shape[-1]} columns")
    cut = x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)
    return cut.swapaxes(-3, -2)


def merge_heads(x):
    """The inverse of split_heads, for arrays and tensors.

    x (..., n_heads, seq, d_head). Returns (..., seq, n_heads * d_head).
    """
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def multi_head(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in NumPy: project, attend in each head, merge, project.

    x_q (..., n_queries, d_model), x_kv (..., n_keys, d_model); w_q, w_k (d_model,
    n_heads * d_head), w_v (d_model, n_heads * d_v), w_o (n_heads * d_v, d_out); mask
    boolean, True = may attend. Returns (..., n_queries, d_out).
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """
    q, k, v = (split_heads(x @ w, n_heads)
               for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o


def test_layer(layer):
    """Raise AssertionError if layer(x, *four matrices, n_heads, key_mask) is wrong."""
    rng = np.random.default_rng(2)
    masks = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
    w = rng.standard_normal((4, 6, 6))
    for size in (1.0, 30.0):
        x = size * rng.standard_normal((4, 4, 6))
        out, weights = layer(x, *w, 3, masks)
        assert out.shape == (4, 4, 6) and weights.shape == (4, 3, 4, 4)
        for b in range(4):
            expected = multi_head(x[b], x[b], *w, 3, masks[b])
            assert np.allclose(out[b], expected), f"sentence {b}, size {size}"
            assert np.allclose(weights[b].sum(-1), masks[b].any())
            assert not weights[b][..., ~masks[b]].any()


class Positions(nn.Module):
    """How a model knows the order of its tokens: not at all. A scheme overrides one."""

    def embed(self, x, positions):
        """Add positions, (seq,) or (batch, seq), to x (batch, seq, d_model)."""
        return x

    def rotate(self, x, positions):
        """Turn queries or keys x (batch, n_heads, seq, d_head) by their positions."""
        return x

    def bias(self, n_queries, n_keys):
        """Numbers to add to the scores: (n_heads, n_queries, n_keys), or None.

        Aligned at the bottom right: the last query stands at the last key.
        """
        return None


class MultiHeadAttention(nn.Module):
    """Multi-head attention, self or cross, with places to look at what a head does.

    Hooks on `weights` see the attention weights (batch, n_heads, n_queries, n_keys);
    those on `outputs` what the heads found (batch, n_heads, n_queries, d_head).
    """

    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError("n_heads must divide d_model, "
                             f"got {n_heads} and {d_model}")
        self.n_heads, self.d_model = n_heads, d_model
        self.positions = Positions() if positions is None else positions
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5)
            for _ in range(4))
        self.weights, self.outputs = nn.Identity(), nn.Identity()

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None,
                cache=None):
        for name, tokens in (("x", x), ("x_kv", x if x_kv is None else x_kv)):
            if tokens.dim() != 3 or tokens.shape[-1] != self.d_model:
                wanted = f"(batch, seq, {self.d_model}), got {tuple(tokens.shape)}"
                raise ValueError(f"{name} must have shape {wanted}")
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        other = x if x_kv is None else x_kv
        q = split_heads(x @ self.w_q, self.n_heads)
        k, v = (split_heads(other @ w, self.n_heads) for w in (self.w_k, self.w_v))
        if x_kv is None:
            q, k = (self.positions.rotate(heads, positions) for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        bias = self.positions.bias(*scores.shape[-2:]) if x_kv is None else None
        if bias is not None:
            scores = scores + bias
        weights = self.weights(masked_softmax(scores, mask, causal))
        return merge_heads(self.outputs(cuda.weighted_sum(weights, v))) @ self.w_o


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) if there is one."""

    def __init__(self, config, attention, norm):
        super().__init__()
        self.norm_1, self.attention = norm(config.d_model), attention
        if config.d_ff:
            self.norm_2 = norm(config.d_model)
            self.feed_forward = feed_forward(config.d_model, config.d_ff)

    def forward(self, x, **where):
        x = x + self.attention(self.norm_1(x), causal=True, **where)
        if not hasattr(self, "feed_forward"):
            return x
        return x + self.feed_forward(self.norm_2(x))


@contextmanager
def record(model, names=("weights", "outputs")):
    """During the block, keep what leaves the modules of these names, by their path.

    Yields {"blocks.0.attention.weights": tensor, ...}. Hooks run in the order in which
    they came: enter it after without_heads to see what is left.
    """
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


def pattern_scores(weights, period):
    """How much each map looks at the previous token, and after the last occurrence.

    weights (..., n, n), rows are queries, of sequences that repeat after `period`.
    Returns (previous, induction), each (...): the mean of weights[i, i - 1] over
    i >= 1, and of weights[i, i - period + 1] over i >= period.
    ValueError unless 2 <= period < n. Source: Olsson et al. 2022 (arXiv 2209.11895).
    """
    if not 2 <= period < weights.shape[-1]:
        raise ValueError("period must be at least 2 and less than "
                         f"n = {weights.shape[-1]}, got {period}")
    previous = np.diagonal(weights, -1, axis1=-2, axis2=-1)
    induction = np.diagonal(weights, 1 - period, axis1=-2, axis2=-1)[..., 1:]
    return previous.mean(-1), induction.mean(-1)


def head_contributions(heads, w_o):
    """What each head adds to the output; the sum is merge_heads(heads) @ w_o.

    heads (..., n_heads, seq, d_v), w_o (n_heads * d_v, d_model).
    Returns (..., n_heads, seq, d_model). ValueError for other numbers of axes or rows.
    """
    if len(heads.shape) < 3 or len(w_o.shape) != 2:
        raise ValueError("heads must have at least three axes (n_heads, seq, d_v) and "
                         f"w_o two, got {tuple(heads.shape)} and {tuple(w_o.shape)}")
    n_heads, d_v = heads.shape[-3], heads.shape[-1]
    if len(w_o) != n_heads * d_v:
        raise ValueError(f"w_o must have n_heads * d_v = {n_heads * d_v} rows, "
                         f"got {len(w_o)}")
    return heads @ w_o.reshape(n_heads, d_v, w_o.shape[1])


def losses_without(model, ids, groups, start=0):
    """The loss of a language model while one group of heads after the other is silent.

    ids (batch, n) int64; groups: lists of (layer, head); only the predictions of
    positions start, ..., n - 2 count. Returns (len(groups),) in the model's float type.
    """
    def silencer(heads):
        def silence(_module, _inputs, outputs):
            outputs = outputs.clone()
            outputs[:, heads] = 0.0
            return outputs
        return silence

    losses = []
    for group in groups:
        handles = []
        for i, block in enumerate(model.blocks):
            own = [head for layer, head in group if layer == i]
            place = block.attention.outputs
            handles.append(place.register_forward_hook(silencer(own)))
        with torch.no_grad():
            logits = model(ids[:, :-1])[:, start:]
        for handle in handles:
            handle.remove()
        losses.append(F.cross_entropy(logits.mT, ids[:, start + 1:]))
    return torch.stack(losses)


LOAD_HEAD = r"""
#define TILE 16
__device__ void load_head(float* tile, int stride, const float* rows, int row_stride, int head,
                          int first, int n_rows, int d_head) {
  int thread = threadIdx.y * TILE + threadIdx.x;
  for (int e = thread; e < TILE * d_head; e += TILE * TILE) {
    int r = e / d_head;
    int c = e % d_head;
    bool exists = first + r < n_rows;
    size_t at = (size_t)(first + r) * row_stride + head * d_head + c;
    tile[r * stride + c] = exists ? rows[at] : 0.0f;
  }
}
"""


def check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads):
    """Raise ValueError, in one sentence, unless inputs, matrices and number of heads fit. For arrays and tensors."""
    cuda.check_numbers(x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    for name, x in (("x_q", x_q), ("x_kv", x_kv)):
        if len(x.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_model), got shape {tuple(x.shape)}")
    try:
        np.broadcast_shapes(tuple(x_q.shape[:-2]), tuple(x_kv.shape[:-2]))
    except ValueError:
        raise ValueError("the leading axes of x_q and x_kv must broadcast, got shapes "
                         f"{tuple(x_q.shape)} and {tuple(x_kv.shape)}") from None
    d_in = {"w_q": x_q.shape[-1], "w_k": x_kv.shape[-1], "w_v": x_kv.shape[-1], "w_o": w_v.shape[-1]}
    for name, w in (("w_q", w_q), ("w_k", w_k), ("w_v", w_v), ("w_o", w_o)):
        if len(w.shape) != 2 or w.shape[0] != d_in[name]:
            raise ValueError(f"{name} must have shape ({d_in[name]}, columns), got {tuple(w.shape)}")
    if w_q.shape[1] != w_k.shape[1]:
        raise ValueError(f"w_q and w_k must give the same d_head, got {w_q.shape[1]} and {w_k.shape[1]} columns")
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
    cuda.check_kind(np.ndarray, x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    given, work = x_q, cuda.work_type(x_q)                  # never in integers or in half
    x_q, x_kv, w_q, w_k, w_v, w_o = (a.astype(work, copy=False) for a in (x_q, x_kv, w_q, w_k, w_v, w_o))
    q, k, v = (split_heads(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return cuda.like(merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o, given)

def multi_head_attention_torch(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in PyTorch; arguments, shapes and errors as multi_head_attention_numpy, differentiable.

    Half precision is computed in single.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    cuda.check_kind(torch.Tensor, x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    given, work = x_q, cuda.work_type(x_q)
    x_q, x_kv, w_q, w_k, w_v, w_o = (t.to(work) for t in (x_q, x_kv, w_q, w_k, w_v, w_o))
    q, k, v = split_heads(x_q @ w_q, n_heads), split_heads(x_kv @ w_k, n_heads), split_heads(x_kv @ w_v, n_heads)
    return cuda.like(merge_heads(attention_torch(q, k, v, mask, causal)) @ w_o, given)


def weights_from_torch(in_proj_weight, out_proj_weight):
    """The matrices of an nn.MultiheadAttention as this course keeps them: (d_in, d_out), used as x @ w.

    in_proj_weight (3 * d_model, d_model), out_proj_weight (d_model, d_model), arrays or tensors.
    Returns (w_q, w_k, w_v, w_o), each (d_model, d_model). ValueError for other shapes.
    """
    d_model = in_proj_weight.shape[-1]
    if tuple(in_proj_weight.shape) != (3 * d_model, d_model) or tuple(out_proj_weight.shape) != (d_model, d_model):
        raise ValueError("in_proj_weight and out_proj_weight must have shapes (3 * d_model, d_model) and "
                         f"(d_model, d_model), got {tuple(in_proj_weight.shape)} and {tuple(out_proj_weight.shape)}")
    w_q, w_k, w_v = (in_proj_weight[i * d_model:(i + 1) * d_model].T for i in range(3))
    return w_q, w_k, w_v, out_proj_weight.T

def attention_with_dropout(q, k, v, key_mask, keep, rate):
    """Attention with dropout on its weights, in NumPy. Returns (out, weights), the weights as they were before dropout.

    q (batch, n_heads, n_queries, d_head), k, v (batch, n_heads, n_keys, d_head); key_mask (batch, n_keys) boolean,
    True = may attend; keep (batch, n_heads, n_queries, n_keys) boolean, False = dropped; rate: the share dropped, what
    is kept is divided by 1 - rate. A row with nothing to attend to is zero. ValueError for a rate outside [0, 1) and
    for a key_mask that is not boolean.
    """
    if key_mask.dtype != bool:
        raise ValueError(f"key_mask must be boolean with True = may attend, got {key_mask.dtype}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and less than 1, got {rate}")
    weights = attention_weights(q, k, mask=key_mask[:, None, None, :])
    return cuda.weighted_sum(weights * keep / (1 - rate), v), weights


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


def masked_softmax(scores, mask=None, causal=False):
    """Weights from scores (batch, n_heads, n_queries, n_keys); a row with nothing to attend to is zero, gradient too.

    mask boolean, True = may attend, broadcastable to the scores, on their device. ValueError for another mask.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean with True = may attend, got {mask.dtype}")
    if mask is not None:
        try:
            fits = torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {tuple(scores.shape)}, got shape {tuple(mask.shape)}")
    if causal:
        allowed = torch.from_numpy(causal_mask(*scores.shape[-2:])).to(scores.device)
        mask = allowed if mask is None else allowed & mask
    if mask is None:
        return torch.softmax(scores, dim=-1)
    nothing = ~mask.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~mask & ~nothing, -math.inf), dim=-1).masked_fill(nothing, 0.0)


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

def check_ids(name, ids, vocab_size):
    """Raise ValueError, in one sentence, unless ids are int32 or int64 (batch, seq) from 0 to vocab_size - 1."""
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be integers (batch, seq), int32 or int64, "
                         f"got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"{name} must lie in 0 ... {vocab_size - 1}, got {ids.min()} to {ids.max()}")

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
        self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)     # to one score for each word

    def forward(self, ids, mask=None, positions=None, caches=None):
        """mask boolean, True = may attend, beside the causal one, broadcastable to (batch, n_heads, seq, n_keys).

        positions: integers (seq,) or (batch, seq), by default 0, 1, ... after what the caches hold.
        caches: one for each layer, with `length`, the tokens seen so far, and update(k, v); see lecture 05.
        ValueError where ids are not integers (batch, seq) below vocab_size.
        """
        check_ids("ids", ids, self.config.vocab_size)
        if positions is None:
            start = caches[0].length if caches else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.positions.embed(self.embedding(ids), positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=mask, positions=positions, cache=caches[layer] if caches else None)
        return self.unembedding(self.norm(x))


@contextmanager
def without_heads(model, heads, means=None):
    """During the block, the heads [(layer, head), ...] of a TransformerLM hand over zeros.

    With means (n_layers, n_heads, d_head) they hand over their mean instead, the same for each token. ValueError for a
    head that the model does not have.
    """
    for layer, head in heads:
        if not (0 <= layer < len(model.blocks) and 0 <= head < model.blocks[layer].attention.n_heads):
            raise ValueError(f"heads must be (layer, head) pairs of the model, got {(layer, head)}")

    def switch_off(layer):
        def change(_module, _inputs, outputs):
            outputs = outputs.clone()
            for of_layer, head in heads:
                if of_layer == layer:
                    outputs[:, head] = 0.0 if means is None else means[layer][head]
            return outputs
        return change

    handles = [block.attention.outputs.register_forward_hook(switch_off(i)) for i, block in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

    Sentences are ids (batch, length), padded at the end, with the padding, start and end of `Vocabulary`.
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
        check_ids("source", source, self.source.num_embeddings)
        check_ids("target", target, self.target.num_embeddings)
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


PROJECT = r"""
#define TILE 16
__global__ void project(const float* x, const float* w, float* out, int n_rows, int d_in, int d_out) {
  __shared__ float x_tile[TILE][TILE], w_tile[TILE][TILE];
  int c = threadIdx.x, r = threadIdx.y, row = blockIdx.x * TILE + r, column = blockIdx.y * TILE + c;
  float sum = 0.0f;
  for (int first = 0; first < d_in; first += TILE) {
    // load
    x_tile[r][c] = row < n_rows && first + c < d_in ? x[(size_t)row * d_in + first + c] : 0.0f;
    w_tile[r][c] = first + r < d_in && column < d_out ? w[(size_t)(first + r) * d_out + column] : 0.0f;
    __syncthreads();                                    // both tiles have arrived
    // multiply
    for (int t = 0; t < TILE; ++t) sum += x_tile[r][t] * w_tile[t][c];
    __syncthreads();                                    // both have been used
  }
  // write
  if (row < n_rows && column < d_out) out[(size_t)row * d_out + column] = sum;
}
"""


@functools.cache
def project_kernel():
    """The product x w in tiles, compiled on first use."""
    return cuda.compile(PROJECT, name="project")

def project_launch(x, w):
    """Grid, block, arguments and output of the kernel `project`, for float32 tensors x (..., d_in), w (d_in, d_out)."""
    d_in, d_out = w.shape
    n_rows = math.prod(x.shape[:-1])
    out = torch.zeros(*x.shape[:-1], d_out, device=x.device)
    return (-(-n_rows // 16), -(-d_out // 16)), (16, 16), (x, w, out, n_rows, d_in, d_out), out

SPLIT_COPY = r"""
__global__ void split_copy(const float* x, float* y, int n_heads, int seq, int d_head, int n) {
  int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n) return;
  int c = e % d_head, t = e / d_head % seq, h = e / d_head / seq % n_heads, b = e / d_head / seq / n_heads;
  y[e] = x[((size_t)(b * seq + t) * n_heads + h) * d_head + c];
}
"""

@functools.cache
def split_copy_kernel():
    """The copy of (batch, seq, heads * d_head) to (batch, heads, seq, d_head), a thread an element."""
    return cuda.compile(SPLIT_COPY, name="split_copy")


ROW_TOOLS = ROW_OF_A_TILE + r"""
__device__ float dot(const float* a, const float* b, int d) {
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += a[t] * b[t];
  return sum;
}
__device__ void blend(float* o_row, const float* weights, const float* v_tile, int d_v) {
  for (int c = threadIdx.x; c < d_v; c += TILE)
    for (int r = 0; r < TILE; ++r) o_row[c] += weights[r] * v_tile[r * (d_v + PAD) + c];
}
"""


ATTEND_HEADS = r"""
__global__ void attend_heads(const float* q, const float* k, const float* v, const unsigned char* mask, float* out,
                             int n_heads, int n_queries, int n_keys, int d_head, int d_v, int q_stride, int k_stride,
                             int v_stride, int kept, int causal, float scale) {
  extern __shared__ float shared[];
  float *q_tile = shared, *k_tile = q_tile + TILE * (d_head + PAD), *v_tile = k_tile + TILE * (d_head + PAD);
  float *o_tile = v_tile + TILE * (d_v + PAD), *s_tile = o_tile + TILE * (d_v + PAD);   // output undivided, scores
  int x = threadIdx.x, y = threadIdx.y, first_query = blockIdx.y * TILE, i = first_query + y;
  int head = blockIdx.x % n_heads, end = causal ? min(n_keys, first_query + TILE + n_keys - n_queries) : n_keys;
  size_t batch = blockIdx.x / n_heads;
  q += batch * n_queries * q_stride, k += batch * n_keys * k_stride, v += batch * n_keys * v_stride;
  if (mask) mask += ((size_t)blockIdx.x * n_queries + i) * n_keys;                       // none is a null pointer
  float *q_row = q_tile + y * (d_head + PAD), *o_row = o_tile + y * (d_v + PAD);         // this thread's rows
  // load the queries
  load_head(q_tile, d_head + PAD, q, q_stride, head, first_query, n_queries, d_head);
  for (int c = x; c < d_v; c += TILE) o_row[c] = 0.0f;
  float maximum = -INFINITY, total = 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0, j = x; first < end; first += TILE, j += TILE) {       // j: this thread's key
      bool fresh = pass == 0 || first >= kept;          // else the scores of this tile are still here
      // load
      __syncthreads();                                  // the tiles of the last round have been used
      if (fresh) load_head(k_tile, d_head + PAD, k, k_stride, head, first, n_keys, d_head);
      if (pass == 1) load_head(v_tile, d_v + PAD, v, v_stride, head, first, n_keys, d_v);
      __syncthreads();                                  // the new tiles have arrived
      // score
      float* scores = s_tile + y * (kept + TILE + PAD) + min(first, kept);    // TILE places for all that is not kept
      bool allowed = fresh && i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries)
        && (!mask || mask[j]);
      if (fresh) scores[x] = allowed ? scale * dot(q_row, k_tile + x * (d_head + PAD), d_head) : -INFINITY;
      if (pass == 0) { maximum = fmaxf(maximum, scores[x]); continue; }
      // weights and blend, once the maximum is known
      scores[x] = expf(scores[x] - maximum);
      total += scores[x];
      __syncwarp();                                     // a row of the tile belongs to one warp
      blend(o_row, scores, v_tile, d_v);
    }
    maximum = fmaxf(row_max(maximum), -3e38f);          // finite: with nothing to attend to each weight is exp(-inf)
  }
  total = row_sum(total);
  // write, into the head's own columns
  out += (batch * n_queries + i) * n_heads * d_v + head * d_v;
  for (int c = x; c < d_v && i < n_queries; c += TILE) out[c] = total == 0.0f ? 0.0f : o_row[c] / total;
}
"""


@functools.cache
def attend_kernel():
    """Attention over heads in place, compiled on first use."""
    return cuda.compile(LOAD_HEAD + ROW_TOOLS + ATTEND_HEADS, name="attend_heads")

def attend_launch(q, k, v, n_heads, mask, causal, kept=None):
    """Grid, block, shared bytes, arguments and output of `attend_heads`.

    q (batch, n_queries, n_heads * d_head), k and v alike: float32 tensors, contiguous. mask None or uint8
    (batch, n_heads, n_queries, n_keys). kept: for how many keys scores are kept, a multiple of 16; as many as fit
    unless given.
    """
    batch, n_queries, n_keys = q.shape[0], q.shape[1], k.shape[1]
    d_head, d_v = q.shape[2] // n_heads, v.shape[2] // n_heads
    room = 48 * 1024 // 64 - 2 * (d_head + 1) - 2 * (d_v + 1) - 17            # in scores of each of the 16 rows
    kept = max(0, min(-(-n_keys // 16) * 16, room // 16 * 16)) if kept is None else kept
    shared = 64 * (2 * (d_head + 1) + 2 * (d_v + 1) + 17 + kept)
    out = torch.zeros(batch, n_queries, v.shape[2], device=q.device)
    arguments = (q, k, v, mask, out, n_heads, n_queries, n_keys, d_head, d_v, q.shape[2], k.shape[2], v.shape[2],
                 kept, int(causal), 1 / math.sqrt(d_head))
    return (batch * n_heads, -(-n_queries // 16)), (16, 16), shared, arguments, out


def project_in_tiles(x, w):
    """x (..., d_in) by w (d_in, d_out), arrays or tensors, through the kernel; a float32 tensor."""
    grid, block, arguments, out = project_launch(*cuda.on_device(x, w))
    if out.numel() and w.shape[0]:
        project_kernel().fast[grid, block](*arguments)
    return out

@cuda.skip_unseen
def attend(q, k, v, n_heads, mask, causal):
    """The output of `attend_heads` for the arguments of attend_launch."""
    grid, block, shared, arguments, out = attend_launch(q, k, v, n_heads, mask, causal)
    if out.numel() and k.shape[1]:
        attend_kernel().fast[grid, block, shared](*arguments)
    return out

def multi_head_attention_cuda(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention by tiled CUDA kernels that read heads in place; arguments, shapes and errors as
    multi_head_attention_numpy.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision, returned in
    the kind and type of x_q. Not differentiable.
    d_head + d_v up to 1,805 where a block may have 227 KB of shared memory, 1,293 on sm_80, 781 on sm_120.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    q, k, v = (project_in_tiles(x, w) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    check_arguments(*(split_heads(t, n_heads) for t in (q, k, v)), mask)      # a view: nothing is copied
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead), *t.shape[-2:]).contiguous() for t in (q, k, v))
    if mask is not None:
        full = (*lead, n_heads, q.shape[1], k.shape[1])
        mask = torch.as_tensor(mask, device=q.device).expand(full).to(torch.uint8).contiguous()
    out = attend(q, k, v, n_heads, mask, causal)
    out = project_in_tiles(out.reshape(*lead, *out.shape[1:]), w_o)
    return cuda.like(out, x_q)
