# Generated from solutions/11_differential_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 11 · Differential attention: what it trains for itself alone."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from attention.differential import DifferentialAttention
from attention.experiments.kv_cache import N_TOKENS, copying_texts
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM, split_heads
from attention.rotary import Rotary
from utils import training

__all__ = [
    "needle_in_text",
    "pair_correlations",
    "Retriever",
    "fact_batches",
    "retrieval_loss",
    "accuracy",
    "with_attention",
    "train_retriever",
    "first_gradients",
    "GatedHead",
    "train_gated",
]


@torch.no_grad()
def needle_in_text(model, prose):
    """What the last token of a question attends to in each head, (n_layers, n_heads), by name.

    The text: 8 tokens of prose (1, 8 + n), a code of four digits, the other n, the question up to the code's first digit.
    needle: the weight of the second digit; first: that of the first token.
    """
    fact, question = model.encode("The code of the door is 7419. "), model.encode(" The code of the door is 7")
    place, rows, own = 8 + model.tokens(fact).index("4"), [], model.parts.attention

    def attention(q, k, v, causal=True):
        rows.append(torch.softmax(q[0, :, -1:] @ k[0].mT / math.sqrt(q.shape[-1]), dim=-1)[:, 0].double())
        return own(q, k, v, causal=causal)

    model.replace(attention=attention).hidden(torch.cat([prose[:, :8], fact, prose[:, 8:], question], dim=1))
    weights = torch.stack(rows).numpy()
    found = np.zeros(weights.shape[:2], [("needle", float), ("first", float)])
    found["needle"], found["first"] = weights[..., place], weights[..., 0]
    return found


@torch.no_grad()
def pair_correlations(model, ids):
    """How alike the heads of a layer score on ids (1, n): (pairs of one key group, pairs of two), each (n_layers,).

    Correlation of the scores of five queries with the keys between token 1 and their own neighbourhood of 8 tokens.
    """
    found, own, n = [], model.parts.attention, ids.shape[1]
    group = np.arange(model.config.n_heads) // (model.config.n_heads // model.config.n_kv_heads)

    def attention(q, k, v, causal=True):
        scores = (q @ k.mT)[0].double().numpy()
        found.append(np.mean([np.corrcoef(scores[:, i, 1:i - 7]) for i in np.linspace(n // 2, n - 1, 5).astype(int)], 0))
        return own(q, k, v, causal=causal)

    model.replace(attention=attention).hidden(ids)
    found, alike = np.array(found), group[:, None] == group
    return found[:, alike & ~np.eye(len(group), dtype=bool)].mean(1), found[:, ~alike].mean(1)


class Retriever(nn.Module):
    """Reads facts, each a name and a value in one token, then questions, each a name; scores the values of those asked.

    names (batch, n) from 0 to 63; values (batch, n) from 0 to 15, or 16 for a question. The last 4 tokens are asked.
    """

    def __init__(self, attention, n_layers=1, d_model=32):
        super().__init__()
        self.names, self.values = nn.Embedding(64, d_model), nn.Embedding(17, d_model)
        self.layers = nn.ModuleList(attention(layer) for layer in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers + 1))
        self.answers = nn.Linear(d_model, 16, bias=False)

    def forward(self, names, values):
        x = self.names(names) + self.values(values)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), causal=True)
        return self.answers(self.norms[-1](x[:, -4:]))


def fact_batches(seed, batch=16, n_facts=32, n_asked=4):
    """Endless batches (names, values, answers): n_facts facts with different names, then n_asked of these names."""
    rng = np.random.default_rng(seed)
    while True:
        names = rng.random((batch, 64)).argsort(1)[:, :n_facts]
        values = rng.integers(16, size=(batch, n_facts))
        asked = rng.random((batch, n_facts)).argsort(1)[:, :n_asked]
        names = np.concatenate([names, np.take_along_axis(names, asked, 1)], axis=1)
        answers = np.take_along_axis(values, asked, 1)
        values = np.concatenate([values, np.full((batch, n_asked), 16)], axis=1)
        yield tuple(map(torch.from_numpy, (names, values, answers)))


def retrieval_loss(model, batch):
    """The mean cross-entropy of the answers, in nats."""
    names, values, answers = batch
    return nn.functional.cross_entropy(model(names, values).flatten(0, 1), answers.flatten())


@torch.no_grad()
def accuracy(model):
    """The share of right answers on 128 lists of facts."""
    names, values, answers = next(fact_batches(999, batch=128))
    return float((model(names, values).argmax(-1) == answers).double().mean())


def with_attention(change, n_layers, seed):
    """A Retriever in double precision with softmax (change None) or differential attention, {name: value} set in its layers."""
    if change is None:
        return training.initialise(Retriever(lambda layer: MultiHeadAttention(32, 4), n_layers).double(), seed)
    model = Retriever(lambda layer: DifferentialAttention(32, 2, depth=layer), n_layers).double()
    training.initialise(model, seed)
    rng = np.random.default_rng(seed + 77)
    for layer in model.layers:
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(layer, name).data = torch.from_numpy(0.1 * rng.standard_normal(layer.d_head))
        for name, value in change.items():
            setattr(layer, name, value)
    return model


class Run(NamedTuple):
    """What a training gave, every 25 steps from 0 on: accuracy and, of differential attention, lambda."""

    accuracy: list
    lambdas: list
    n_parameters: int


@functools.cache
def train_retriever(name, seed, lr=0.01, steps=200):
    """A Run of a Retriever of one layer with "softmax" or "differential" attention."""
    model = with_attention(None if name == "softmax" else {}, 1, seed)
    lambdas = []

    def measure(model):
        lambdas.append(float(getattr(model.layers[0], "lam", torch.zeros(()))))
        return accuracy(model)

    with torch.no_grad():
        start = measure(model)
    history = training.fit(model, fact_batches(seed), retrieval_loss, steps, lr=lr, evaluate=measure, every=25)
    return Run([start, *history.metrics], lambdas, sum(p.numel() for p in model.parameters()))


def first_gradients(change, n_layers=4, seeds=3):
    """Norms of the gradients of W_V before the first step: (seeds, n_layers). change: as in with_attention."""
    found = np.zeros((seeds, n_layers))
    for seed in range(seeds):
        model = with_attention(change, n_layers, seed)
        retrieval_loss(model, next(fact_batches(seed))).backward()
        found[seed] = [float(layer.w_v.grad.norm()) for layer in model.layers]
    return found


class GatedHead(MultiHeadAttention):
    """Multi-head attention with a gate sigmoid(x w_gate) on the heads' outputs, before W_O: one a head, or one a column."""

    def __init__(self, d_model, n_heads, positions, columns):
        super().__init__(d_model, n_heads, positions)
        self.w_gate = nn.Parameter(torch.randn(d_model, n_heads * columns))
        self.outputs.register_forward_hook(lambda module, given, heads: heads * self.gate)

    def forward(self, x, **named):
        self.gate = torch.sigmoid(split_heads(x @ self.w_gate, self.n_heads))
        return super().forward(x, **named)


def train_gated(columns, seed, steps=400):
    """A model of one layer and one head of 32, trained on the copying texts of lecture 05; columns: gates, 0, 1 or 32."""

    def attention(config, layer, positions):
        return GatedHead(32, 1, positions, columns) if columns else MultiHeadAttention(32, 1, positions)

    model = TransformerLM(TransformerConfig(N_TOKENS, 32, 1, 1, 0), attention, Rotary(32)).double()
    rng = np.random.default_rng(seed)
    texts = (torch.from_numpy(copying_texts(rng, 32, 32)) for _ in range(steps))
    training.fit(training.initialise(model, seed), texts, training.next_token_loss, steps, lr=1e-2)
    return model
