# Generated from solutions/04_context_length_challenge.py by `python course.py build`. Edit that file, not this one.
"""Lecture 04 · The context-length challenge: what it trains for itself alone."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.multi_head import TransformerConfig, TransformerLM
from utils import training

__all__ = ["statement", "documents", "Statements", "statement_reader", "train_reader"]


N_NAMES, VALUES, WORDS, ASK, MOST, N_SYMBOLS, NO_ANSWER = 32, 32, 64, 96, 97, 98, -100

def statement(name, content):
    """The id of a statement: names, contents and ids are integers of one shape. Names are symbols 0 to 31, values 32 to
    63, words 64 to 95; ASK and MOST make questions."""
    return name * N_SYMBOLS + content

def documents(rng, batch, seq_len, chains=6, hops=1, share=0.3):
    """Documents of statements, followed by questions about all of them. rng: a numpy Generator.

    chains variables get a value; each is handed on `hops` times to another name, always in this order in the text. The
    other statements are hay: random words, of which one has the share `share`.
    Returns (ids, answers, order). ids and answers: (batch, seq_len + chains * (hops + 1) + 1) int64, the statements,
    then a question for each name in random order, then one for the most common word; answers holds the symbol that the
    name stands for, after a statement and after a question, and NO_ANSWER after hay. order, integers
    (batch, chains * (hops + 1)): order // (hops + 1) is the chain of a question, order % (hops + 1) how often its value
    was handed on.
    ValueError when the names or the places do not suffice.
    """
    n = chains * (hops + 1)
    if n > min(N_NAMES, seq_len):
        raise ValueError(f"chains * (hops + 1) must be at most {min(N_NAMES, seq_len)}, got {n}")
    names = rng.permuted(np.tile(np.arange(N_NAMES), (batch, 1)), axis=1)[:, :n].reshape(batch, chains, hops + 1)
    values = VALUES + rng.integers(32, size=(batch, chains, 1))
    common = WORDS + rng.integers(32, size=(batch, 1))
    text = WORDS + rng.integers(32, size=(batch, seq_len, 2))
    text = np.where(rng.random(text.shape) < share, common[:, :, None], text)
    places = np.sort(rng.random((batch, seq_len)).argsort(axis=1)[:, :n].reshape(names.shape), axis=2)
    rows = np.arange(batch)[:, None, None]
    text[rows, places] = np.stack([names, np.concatenate([values, names[:, :, :-1]], axis=2)], axis=-1)
    worth = np.broadcast_to(values, names.shape)
    said = np.full((batch, seq_len), NO_ANSWER)
    said[rows, places] = worth
    order = rng.permuted(np.tile(np.arange(n), (batch, 1)), axis=1)
    asked, replies = (np.take_along_axis(a.reshape(batch, n), order, axis=1) for a in (statement(names, ASK), worth))
    most = np.full((batch, 1), statement(MOST, MOST))
    ids = np.concatenate([statement(text[..., 0], text[..., 1]), asked, most], axis=1)
    return ids, np.concatenate([said, replies, common], axis=1), order


class Statements(nn.Module):
    """Embeds statements: ids (batch, seq) -> (batch, seq, d_model), a vector for the name plus one for the content."""

    def __init__(self, d_model):
        super().__init__()
        self.name, self.content = nn.Embedding(N_SYMBOLS, d_model), nn.Embedding(N_SYMBOLS, d_model)

    def forward(self, ids):
        return self.name(ids // N_SYMBOLS) + self.content(ids % N_SYMBOLS)

def statement_reader(positions, n_layers=2):
    """An untrained model, ids of statements -> logits over the symbols; d_model 32, two heads of 16, a Positions."""
    model = TransformerLM(TransformerConfig(N_SYMBOLS**2, 32, 2, n_layers, 64), positions=positions)
    model.embedding, model.unembedding = Statements(32), nn.Linear(32, N_SYMBOLS, bias=False)
    return model.double()

def train_reader(model, seed, steps, seq_len=32, batch=32, lr=1e-2):
    """Train on documents of seq_len statements: six variables, each handed on once. Returns the model."""
    rng = np.random.default_rng(seed)
    batches = ([torch.from_numpy(a) for a in documents(rng, batch, seq_len)[:2]] for _ in range(steps))

    def loss(model, pair):
        return F.cross_entropy(model(pair[0]).mT, pair[1], ignore_index=NO_ANSWER)

    training.fit(model, batches, loss, steps, lr=lr)
    return model
