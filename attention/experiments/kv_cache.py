# Generated from solutions/05_kv_cache.py by `python course.py build`. Edit that file, not this one.
"""Lecture 05 · KV cache: what it trains for itself alone."""

import copy

import numpy as np
import torch
from torch.nn import functional as F

from attention.multi_head import TransformerConfig, TransformerLM, record
from attention.rotary import Rotary
from utils import training

__all__ = [
    "copying_texts",
    "is_trigger",
    "train_copier",
    "look_at_sink",
    "Facts",
    "facts_and_questions",
    "train_clerk",
    "plant_outliers",
]


N_TOKENS, N_TRIGGERS = 33, 4                       # token 0 begins a text, tokens 1 to 4 are triggers

def copying_texts(rng, batch, seq_len):
    """Texts of the task of Guo et al. 2024 (arXiv 2410.13835), int64 (batch, seq_len); rng a numpy Generator.

    Behind a trigger comes the token before it, behind another token one drawn from a fixed table.
    """
    table = np.random.default_rng(0).dirichlet(np.full(N_TOKENS - 1, 0.05), size=N_TOKENS).cumsum(1)
    ids = np.zeros((batch, seq_len), dtype=np.int64)
    ids[:, 1] = rng.integers(N_TRIGGERS + 1, N_TOKENS, size=batch)
    for t in range(2, seq_len):
        last = ids[:, t - 1]
        drawn = 1 + (table[last] < rng.random((batch, 1))).sum(1).clip(0, N_TOKENS - 2)
        ids[:, t] = np.where(is_trigger(last), ids[:, t - 2], drawn)
    return ids

def is_trigger(ids):
    return (ids >= 1) & (ids <= N_TRIGGERS)


def train_copier(seed, positions=None, make_cache=None, steps=400):
    """A model of one layer and one head, trained on copying_texts. Returns it.

    make_cache(): what stands in front of the keys, made anew for each batch; see NullKey.
    """
    positions = Rotary(32) if positions is None else positions
    model = TransformerLM(TransformerConfig(N_TOKENS, 32, 1, 1, 0), positions=positions).double()
    rng = np.random.default_rng(seed)

    def loss(model, ids):
        caches = [make_cache()] if make_cache else None
        return F.cross_entropy(model(ids[:, :-1], caches=caches).mT, ids[:, 1:])

    texts = (torch.from_numpy(copying_texts(rng, 32, 32)) for _ in range(steps))
    training.fit(training.initialise(model, seed), texts, loss, steps, lr=1e-2)
    return model


@torch.no_grad()
def look_at_sink(model, make_cache=None):
    """What a copier does with token 0, on 64 new texts. Returns a dictionary of numbers.

    mass: weight on token 0 from tokens that are no triggers, mass_trigger: from triggers, null: on the null key;
    value_ratio: length of token 0's value over the others'; loss, and evicted: the loss without token 0.
    """
    ids = torch.from_numpy(copying_texts(np.random.default_rng(9), 64, 32))
    with record(model, ("weights",)) as seen:
        logits = model(ids[:, :-1], caches=[make_cache()] if make_cache else None)
    weights, extra = seen["blocks.0.attention.weights"][:, 0], int(make_cache is not None)
    may_attend = torch.arange(31 + extra) != extra                     # all but token 0
    without = model(ids[:, :-1], mask=may_attend, caches=[make_cache()] if make_cache else None)
    trigger, late = is_trigger(ids[:, :-1]), torch.arange(31) >= 4
    values = (model.blocks[0].norm_1(model.embedding(ids[:, :-1])) @ model.blocks[0].attention.w_v).norm(dim=-1)
    return {
        "mass": weights[..., extra][~trigger & late].mean().item(),
        "mass_trigger": weights[..., extra][trigger & late].mean().item(),
        "null": weights[..., 0][~trigger & late].mean().item() if extra else 0.0,
        "value_ratio": (values[:, 0].mean() / values[:, 1:].mean()).item(),
        "loss": F.cross_entropy(logits.mT[..., 1:], ids[:, 2:]).item(),
        "evicted": F.cross_entropy(without.mT[..., 1:], ids[:, 2:]).item(),
    }


N_NAMES, N_NUMBERS = 32, 16

class Facts(torch.nn.Module):
    """Embeds tokens (N_NUMBERS + 1) * name + number, with number 0 for a question, as name plus number."""

    def __init__(self, d_model):
        super().__init__()
        self.names, self.numbers = torch.nn.Embedding(N_NAMES, d_model), torch.nn.Embedding(N_NUMBERS + 1, d_model)

    def forward(self, ids):
        return self.names(ids // (N_NUMBERS + 1)) + self.numbers(ids % (N_NUMBERS + 1))

def facts_and_questions(rng, asked):
    """All names in any order with a number each, then the names asked (batch, n). Returns ids and answers, tensors."""
    names = rng.permuted(np.tile(np.arange(N_NAMES), (len(asked), 1)), axis=1)
    numbers = rng.integers(N_NUMBERS, size=(len(asked), N_NAMES))                  # by name
    facts = names * (N_NUMBERS + 1) + 1 + np.take_along_axis(numbers, names, axis=1)
    ids = np.concatenate([facts, asked * (N_NUMBERS + 1)], axis=1)
    return torch.from_numpy(ids), torch.from_numpy(np.take_along_axis(numbers, asked, axis=1))

def train_clerk(seed, steps=120):
    """A model that answers facts_and_questions: one layer, one head, no positions."""
    model = TransformerLM(TransformerConfig(N_NAMES * (N_NUMBERS + 1), 32, 1, 1, 0))
    model.embedding = Facts(32)
    rng = np.random.default_rng(seed)
    batches = (facts_and_questions(rng, rng.integers(N_NAMES, size=(32, 16))) for _ in range(steps))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0])[:, N_NAMES:, :N_NUMBERS].mT, batch[1])

    training.fit(training.initialise(model.double(), seed), batches, loss, steps, lr=1e-2)
    return model


def plant_outliers(model, factor=20.0):
    """A copy of a TransformerLM with Rotary that computes the same, with keys of a few large channels.

    In each head the last pair of channels is `factor` times as large in the keys, and as much smaller in the queries.
    """
    other, half = copy.deepcopy(model), model.config.d_head // 2
    columns = [head * 2 * half + i for head in range(model.config.n_heads) for i in (half - 1, 2 * half - 1)]
    with torch.no_grad():
        for block in other.blocks:
            block.attention.w_k[:, columns] *= factor
            block.attention.w_q[:, columns] /= factor
    return other
