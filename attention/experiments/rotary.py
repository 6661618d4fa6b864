# Generated from solutions/03_rotary_positional_embeddings.py by `python course.py build`. Edit that file, not this one.
"""Lecture 03 · Rotary positional embeddings: what it trains for itself alone."""

import numpy as np
import torch
from torch import nn

from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import Rotary
from utils import training

__all__ = [
    "LETTERS",
    "BACK",
    "READ_AT",
    "streams",
    "read_back_loss",
    "reader",
    "train_reader",
    "read_accuracy",
    "with_rotary",
]


LETTERS, BACK = 16, 3
BINS = (3, 16, 32, 64, 128, 256)                              # accuracy is counted between these places
READ_AT = np.sqrt(np.multiply(BINS[:-1], BINS[1:]))           # and drawn in their middle, on a logarithmic axis

def streams(batch, n, seed):
    """Endless streams of random letters, int64 (batch, n)."""
    rng = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(rng.integers(LETTERS, size=(batch, n)))

def read_back_loss(model, ids):
    """Each token but the first BACK says which letter stood BACK places before it."""
    return nn.functional.cross_entropy(model(ids)[:, BACK:].mT, ids[:, :-BACK])

def reader(positions):
    """An untrained reader: one layer of width 32, two heads of 16, double precision."""
    return TransformerLM(TransformerConfig(LETTERS, 32, 2, 1, 64), positions=positions).double()

def train_reader(positions, seed, steps=120):
    """A reader trained on streams of 32."""
    model = training.initialise(reader(positions), seed)
    training.fit(model, streams(16, 32, seed), read_back_loss, steps, lr=1e-2)
    return model

@torch.no_grad()
def read_accuracy(model, mask=None, back=BACK):
    """How often the letter `back` places before is named, between the places of BINS: (5,)."""
    ids = next(streams(40, BINS[-1], 99))
    right = (model(ids, mask=mask)[:, back:].argmax(-1) == ids[:, :-back]).double().mean(0)
    return np.array([float(right[max(low - back, 0): high - back].mean()) for low, high in zip(BINS[:-1], BINS[1:])])

def with_rotary(model, **rotary):
    """A reader with RoPE, and the same weights with another Rotary."""
    other = reader(Rotary(16, **rotary))
    other.load_state_dict(model.state_dict())
    return other
