# Generated from solutions/07_sparse_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 07 · Sliding-window and sparse attention: what it trains for itself alone."""

import math

import numpy as np
import torch
from torch import nn

from utils import training

__all__ = [
    "OffsetLayer",
    "WindowedCopy",
    "copies",
    "copy_loss",
    "train_copy",
    "copy_accuracy",
    "needle_recall",
    "minilm_chunks",
    "share_of_mass",
    "block_scores",
    "lsh_recall",
]


N_SYMBOLS, N_LAGS, LENGTH = 4, 18, 30

class OffsetLayer(nn.Module):
    """One attention layer in which token t reads tokens t - offset, with a learned bias for each head and offset."""

    def __init__(self, d_model, n_heads, offsets):
        super().__init__()
        self.n_heads = n_heads
        self.register_buffer("offsets", torch.tensor(offsets))
        self.norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.bias = nn.Parameter(torch.linspace(-1, 1, n_heads * len(offsets)).view(n_heads, 1, len(offsets)))

    def forward(self, x):
        """x (batch, n, d_model) to the same shape; only the offsets' keys are scored, n * len(offsets) of them."""
        batch, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, n, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        source = torch.arange(n)[:, None] - self.offsets
        k, v = (a[:, :, source.clamp(min=0)] for a in (k, v))                   # (batch, heads, n, offsets, d_head)
        scores = (q[..., None, :] @ k.mT)[..., 0, :] * q.shape[-1] ** -0.5 + self.bias
        p = torch.softmax(scores.masked_fill(source < 0, -math.inf), dim=-1)
        return x + self.out((p[..., None, :] @ v)[..., 0, :].transpose(1, 2).reshape(batch, n, d))

class WindowedCopy(nn.Module):
    """Symbols (batch, n) -> logits (batch, n, N_LAGS, N_SYMBOLS): which symbol was k steps back? A layer for each tuple."""

    def __init__(self, layers, d_model=72):
        super().__init__()
        self.embedding = nn.Embedding(N_SYMBOLS, d_model)
        self.layers = nn.Sequential(*(OffsetLayer(d_model, 12, tuple(offsets)) for offsets in layers))
        self.norm, self.out = nn.LayerNorm(d_model), nn.Linear(d_model, N_LAGS * N_SYMBOLS)

    def forward(self, x):
        return self.out(self.norm(self.layers(self.embedding(x)))).unflatten(-1, (N_LAGS, N_SYMBOLS))

def copies(x):
    """What is right: for symbols (batch, n) the symbol k steps before each place from N_LAGS on, (batch, n - N_LAGS, N_LAGS)."""
    return torch.stack([x[:, N_LAGS - k : x.shape[1] - k] for k in range(N_LAGS)], dim=-1)

def copy_loss(model, x):
    """Cross-entropy over all lags, for `training.fit`."""
    return nn.functional.cross_entropy(model(x)[:, N_LAGS:].flatten(0, 2), copies(x).flatten())

def train_copy(layers, seed, steps=80):
    """A WindowedCopy, trained; layers: the offsets of each layer."""
    model = training.initialise(WindowedCopy(layers).double(), seed)
    for layer in model.layers:
        drawn = np.random.default_rng(seed + 1).standard_normal(layer.bias.shape)
        layer.bias.data = torch.from_numpy(drawn)
    rng = np.random.default_rng(seed)
    streams = (torch.from_numpy(rng.integers(N_SYMBOLS, size=(24, LENGTH))) for _ in range(steps))
    training.fit(model, streams, copy_loss, steps, lr=1e-2)
    return model

@torch.no_grad()
def copy_accuracy(model):
    """Share of right answers for each lag, (N_LAGS,), on streams that were not trained on."""
    x = torch.from_numpy(np.random.default_rng(999).integers(N_SYMBOLS, size=(64, LENGTH)))
    return (model(x)[:, N_LAGS:].argmax(-1) == copies(x)).double().mean((0, 1)).numpy()


def needle_recall(block, d, together=1, n=2048, tries=400):
    """How often the block of a needle is in the best eighth by mean keys, over random keys and queries.

    The needle: `together` neighbouring keys that hold half of the query on top of their noise.
    """
    rng = np.random.default_rng(block + d + together)
    hits = 0
    for _ in range(tries):
        query = rng.standard_normal(d)
        means = rng.standard_normal((n // block, d)) / math.sqrt(block)         # of `block` keys each
        means[0] += together * 0.5 * query / block
        hits += (means[1:] @ query > means[0] @ query).sum() < n // block // 8
    return hits / tries

@torch.no_grad()
def minilm_chunks(layer, n_tokens=64, count=40):
    """What enters a layer of MiniLM on pieces of this course, x (count, n, 384), and the mean weights of its heads, p."""
    from utils import data

    model, tokenizer = data.minilm()
    ids = tokenizer.encode(data.course_prose()[:20000], add_special_tokens=False, verbose=False)
    pieces = torch.tensor(ids[: n_tokens * count]).view(count, n_tokens)
    found = model(input_ids=pieces, output_attentions=True, output_hidden_states=True)
    p = found.attentions[layer].double().mean(1)
    return found.hidden_states[layer].double(), p / p.sum(-1, keepdim=True)

@torch.no_grad()
def share_of_mass(scores, p, n_keep=8):
    """The share of the weights p (batch, n, n) on the n_keep keys of each row with the largest scores."""
    return float(p.gather(-1, scores.topk(n_keep, dim=-1).indices).sum(-1).mean())

def block_scores(rule, q, k, logits, size=32):
    """Scores of blocks (heads, blocks, blocks) by one of five rules.

    logits: q k^T / sqrt(d), with -inf for the future.
    """
    heads, n = logits.shape[1], logits.shape[-1] // size
    tiles = logits[0].view(heads, n, size, n, size).transpose(2, 3)
    if rule == "true mass":
        return torch.softmax(logits[0], -1).view(heads, n, size, n, size).sum((2, 4))
    if rule == "antidiagonals":
        row, column = torch.arange(size)[:, None], torch.arange(size)
        return tiles[..., (row + column) % 8 == 7].logsumexp(-1)
    if rule == "mean keys":
        q, k = (a[0].view(heads, n, size, -1).mean(2) for a in (q, k))
        return q @ k.mT
    if rule == "nearest":
        return torch.arange(n).expand(heads, n, n)
    return torch.from_numpy(np.random.default_rng(n).random((heads, n, n)))

def lsh_recall(n_rounds, n=512, d=32, n_buckets=16, n_best=8):
    """Share of each vector's n_best nearest that share its bucket in some round, and the share of pairs that do."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((32, d))[rng.integers(32, size=n)] + 0.7 * rng.standard_normal((n, d))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    near = points @ points.T
    np.fill_diagonal(near, -np.inf)
    best = np.argsort(-near, axis=1)[:, :n_best]
    together = np.zeros((n, n), bool)
    for _ in range(n_rounds):
        turned = points @ rng.standard_normal((d, n_buckets // 2))
        bucket = np.concatenate([turned, -turned], axis=1).argmax(1)
        together |= bucket[:, None] == bucket
    return np.take_along_axis(together, best, axis=1).mean(), together.mean()
