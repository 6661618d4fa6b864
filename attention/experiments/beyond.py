# Generated from solutions/13_beyond_text_and_memory.py by `python course.py build`. Edit that file, not this one.
"""Lecture 13 · Appendix: beyond text and memory: what it trains for itself alone."""

import functools

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from attention.beyond import address, patchify
from attention.multi_head import merge_heads, split_heads
from utils import training

__all__ = [
    "Pooled",
    "train_pooled",
    "VisionBlock",
    "VisionTransformer",
    "digits",
    "train_vision",
    "Asker",
    "colour_grids",
    "train_asker",
    "Scorer",
    "train_scorer",
    "NeuralTuringMachine",
    "copies",
    "train_copier",
]


class Pooled(nn.Module):
    """rho(pooled phi(x)), x (batch, n) to (batch,); the pooled part has `size` numbers, a sum or attention."""

    def __init__(self, kind, size, width=32):
        super().__init__()
        self.kind = kind
        self.phi = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, size + 1))
        self.rho = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, 1))

    def pooled(self, x):
        z = self.phi(x[..., None])
        score, features = z[..., :1], z[..., 1:]
        weights = torch.ones_like(score) if self.kind == "sum" else torch.softmax(score, dim=1)
        return (weights * features).sum(1)

    def forward(self, x):
        return self.rho(self.pooled(x))[:, 0]


@functools.cache
def train_pooled(kind, size, n=5, steps=400, seed=0):
    """(error, model): the maximum of n numbers in [-1, 1]; the error relative to the spread of the maximum."""
    rng, model = np.random.default_rng(seed), training.initialise(Pooled(kind, size).double(), seed)
    batches = (torch.from_numpy(rng.uniform(-1, 1, (64, n))) for _ in range(steps))
    training.fit(model, batches, lambda m, x: (m(x) - x.amax(1)).square().mean(), steps, lr=0.01)
    x = torch.from_numpy(np.random.default_rng(9).uniform(-1, 1, (1000, n)))
    with torch.no_grad():
        return float((model(x) - x.amax(1)).square().mean().sqrt() / x.amax(1).std()), model


class Scorer(nn.Module):
    """Scores (2, 2) of two queries and two keys, one-hot, by GAT or by GATv2."""

    def __init__(self, name, width=8):
        super().__init__()
        self.name, self.target, self.source = name, nn.Linear(2, width), nn.Linear(2, width)
        self.a = nn.Linear(width, 1, bias=False)

    def forward(self, x):
        both = self.target(x)[:, None] + self.source(x)
        inside = self.name == "GATv2"
        scores = self.a(nn.functional.leaky_relu(both, 0.2) if inside else both)[..., 0]
        return scores if inside else nn.functional.leaky_relu(scores, 0.2)


@functools.cache
def train_scorer(name, steps=300, seed=0):
    """(how many of two queries prefer their own key, the loss)."""
    model, x = training.initialise(Scorer(name).double(), seed), torch.eye(2).double()
    own = torch.arange(2)
    history = training.fit(
        model, (x for _ in range(steps)), lambda m, x: nn.functional.cross_entropy(m(x), own), steps, lr=0.02
    )
    with torch.no_grad():
        return int((model(x).argmax(1) == own).sum()), history.losses[-1]


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward; keeps its last weights (batch, heads, n, n)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)

    def forward(self, x):
        q, k, v = (split_heads(a, self.n_heads) for a in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        self.weights = weights.detach()
        x = x + self.out(merge_heads(weights @ v))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nn.Module):
    """Scores of 10 digits for pictures (batch, 8, 8): patches of 2 x 2, positions, a class token in front."""

    def __init__(self, d_model=32, n_layers=2, n_heads=4):
        super().__init__()
        self.embed = nn.Linear(4, d_model)
        self.class_token = nn.Parameter(0.1 * torch.randn(1, d_model))
        self.places = nn.Parameter(0.1 * torch.randn(17, d_model))
        self.blocks = nn.ModuleList(VisionBlock(d_model, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, 10)

    def forward(self, images):
        x = self.embed(patchify(images))
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


@functools.cache
def digits():
    """((images, labels), (images, labels)): 1,437 to learn and 360 to test; images (n, 8, 8) from 0 to 1."""
    found = load_digits()
    images, labels = torch.from_numpy(found.images / 16), torch.from_numpy(found.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return tuple((images[part], labels[part]) for part in (order[:1437], order[1437:]))


@functools.cache
def train_vision(steps=400, seed=0):
    """(model, share of the 360 new digits that are right)."""
    (images, labels), (new, right) = digits()
    rng, model = np.random.default_rng(seed), training.initialise(VisionTransformer().double(), seed)
    batches = (torch.from_numpy(rng.choice(len(labels), 64)) for _ in range(steps))
    training.fit(
        model, batches, lambda m, i: nn.functional.cross_entropy(m(images[i]), labels[i]), steps, lr=0.003
    )
    with torch.no_grad():
        return model, float((model(new).argmax(1) == right).double().mean())


class Asker(nn.Module):
    """Scores of 16 places for a word (batch,) and a picture (batch, 16, 3): the word asks, squares are keys."""

    def __init__(self, d_model=16):
        super().__init__()
        self.words, self.keys = nn.Embedding(6, d_model), nn.Linear(3, d_model)
        self.values, self.answer = nn.Parameter(0.1 * torch.randn(16, d_model)), nn.Linear(d_model, 16)

    def forward(self, word, grid):
        scores = (self.keys(grid) @ self.words(word)[:, :, None])[..., 0] / self.keys.out_features**0.5
        weights = torch.softmax(scores, dim=-1)
        self.weights = weights.detach()
        return self.answer(weights @ self.values)


def colour_grids(rng, batch):
    """(word (batch,), grid (batch, 16, 3), place (batch,)): 16 noisy colours, the word's one at one place alone."""
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], float)
    word, place = rng.integers(6, size=batch), rng.integers(16, size=batch)
    squares = (word[:, None] + rng.integers(1, 6, size=(batch, 16))) % 6
    squares[np.arange(batch), place] = word
    grid = colours[squares] + 0.15 * rng.standard_normal((batch, 16, 3))
    return tuple(map(torch.from_numpy, (word, grid, place)))


@functools.cache
def train_asker(steps=100, seed=0):
    """(model, share of right places on 500 new pictures)."""
    rng, model = np.random.default_rng(seed), training.initialise(Asker().double(), seed)
    batches = (colour_grids(rng, 64) for _ in range(steps))
    training.fit(model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0], b[1]), b[2]), steps, lr=0.02)
    word, grid, place = colour_grids(np.random.default_rng(99), 500)
    with torch.no_grad():
        return model, float((model(word, grid).argmax(1) == place).double().mean())


class NeuralTuringMachine(nn.Module):
    """Scores of bits (batch, n, bits) for rows (batch, n, bits + 2); a memory of 16 rows of 8 numbers."""

    def __init__(self, bits=4, rows=16, width=8, hidden=32):
        super().__init__()
        self.rows, self.width = rows, width
        self.controller = nn.Linear(bits + 2 + width, hidden)
        self.heads = nn.Linear(hidden, 2 * (width + 6) + 2 * width)
        self.out = nn.Linear(hidden + width, bits)

    def moved(self, memory, last, said):
        """The new address of a head from what the controller said, (batch, width + 6)."""
        key, rest = said.tensor_split([self.width], dim=1)
        beta, gamma = nn.functional.softplus(rest[:, :1]), 1 + nn.functional.softplus(rest[:, 5:])
        gate, shift = torch.sigmoid(rest[:, 1:2] - 2), torch.softmax(rest[:, 2:5], dim=1)
        return address(memory, last, torch.tanh(key), beta, gate, shift, gamma)

    def forward(self, x):
        memory, read, outs = x.new_full((len(x), self.rows, self.width), 0.01), x.new_zeros(len(x), self.width), []
        reads = writes = torch.eye(self.rows, dtype=x.dtype)[:1].expand(len(x), -1)
        cuts = [self.width + 6, 2 * (self.width + 6), 3 * self.width + 12]
        for row in x.unbind(1):
            hidden = torch.tanh(self.controller(torch.cat([row, read], dim=1)))
            to_read, to_write, erase, add = self.heads(hidden).tensor_split(cuts, dim=1)
            reads, writes = self.moved(memory, reads, to_read), self.moved(memory, writes, to_write)
            memory = memory * (1 - writes[..., None] * torch.sigmoid(erase)[:, None])
            memory = memory + writes[..., None] * torch.tanh(add)[:, None]
            read = (reads[:, None] @ memory)[:, 0]
            outs.append(self.out(torch.cat([hidden, read], dim=1)))
        return torch.stack(outs, dim=1)


def copies(rng, batch, n, bits=4):
    """(x (batch, 2 n + 1, bits + 2), y (batch, n, bits)): n random rows, a mark, n times the wish to hear them."""
    y, x = rng.integers(2, size=(batch, n, bits)).astype(float), np.zeros((batch, 2 * n + 1, bits + 2))
    x[:, :n, :bits], x[:, n, bits], x[:, n + 1 :, bits + 1] = y, 1, 1
    return torch.from_numpy(x), torch.from_numpy(y)


@functools.cache
def train_copier(steps=250, seed=0):
    """Trained at lengths 1 to 5: {length: share of right bits} at 5 and at 10."""
    rng, model = np.random.default_rng(seed), training.initialise(NeuralTuringMachine().double(), seed)
    batches = (copies(rng, 16, int(rng.integers(1, 6))) for _ in range(steps))

    def answers(model, x, y):
        return model(x)[:, -y.shape[1] :]

    training.fit(
        model,
        batches,
        lambda m, b: nn.functional.binary_cross_entropy_with_logits(answers(m, *b), b[1]),
        steps,
        lr=0.01,
    )
    found = {}
    for n in (5, 10):
        x, y = copies(np.random.default_rng(9), 100, n)
        with torch.no_grad():
            found[n] = float(((answers(model, x, y) > 0) == y.bool()).double().mean())
    return found
