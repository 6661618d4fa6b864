# Generated from solutions/02_multi_head_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 02 · Multi-head attention: what it trains for itself alone."""

import copy
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.experiments.fundamentals import translation, translation_batches, translation_loss
from attention.multi_head import (
    DistanceBias,
    EncoderDecoder,
    EncoderLayer,
    MultiHeadAttention,
    Positions,
    TransformerConfig,
    TransformerLM,
    record,
)
from utils import data, training
from utils.data import Vocabulary

__all__ = [
    "minilm_layer",
    "explained",
    "repeated",
    "train_repeats",
    "with_module",
    "head_importance",
    "train_translator",
    "named_shares",
    "Sentiment",
]


class Layer(NamedTuple):
    """The attention of a trained encoder layer on one sentence: float64 arrays, (d_in, d_out), used as x @ w.

    x (n, 385) has a last column of ones, so that the last rows of w_q, w_k and w_v (385, 384) are their biases;
    w_o (384, 384), b_o (384,); weights (12, n, n) and out (n, 384) are what the layer itself computed.
    """

    tokens: list[str]
    x: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray
    weights: np.ndarray
    out: np.ndarray

def minilm_layer(sentence, number):
    """The attention of layer `number` (0 to 5) of MiniLM with what goes in and comes out. ValueError for others."""
    if not 0 <= number < 6:
        raise ValueError(f"number must be from 0 to 5, got {number}")
    model, tokenizer = data.minilm()
    weights, tokens = data.minilm_attention(sentence)
    attention, kept = model.encoder.layer[number].attention, {}
    hook = attention.output.dense.register_forward_hook(lambda module, inputs, result: kept.update(out=result))
    with torch.no_grad():
        states = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
    hook.remove()

    def matrix(part):
        return np.concatenate([part.weight.detach().numpy().T, part.bias.detach().numpy()[None]])

    own, last = attention.self, attention.output.dense
    x = np.pad(states[number][0].numpy(), ((0, 0), (0, 1)), constant_values=1.0)
    arrays = (x, matrix(own.query), matrix(own.key), matrix(own.value), last.weight.detach().numpy().T,
              last.bias.detach().numpy(), weights[number], kept["out"][0].numpy())
    return Layer(tokens, *(array.astype(np.float64) for array in arrays))


class TwoLookups(nn.Module):
    """Eight keys with values, a question about two of them, a number as the answer: attention and a linear layer."""

    def __init__(self, n_heads, d_model=32, n_keys=8):
        super().__init__()
        self.key, self.first, self.second = (nn.Embedding(n_keys, d_model) for _ in range(3))
        self.value = nn.Parameter(torch.randn(1, d_model))              # the direction in which a value is written
        self.attention = MultiHeadAttention(d_model, n_heads)
        self.answer = nn.Linear(d_model, 1)

    def forward(self, keys, values, a, b):
        memory = self.key(keys) + values[..., None] @ self.value        # (batch, 8, d_model)
        question = (self.first(a) + self.second(b))[:, None]            # (batch, 1, d_model)
        return self.answer(self.attention(question, memory))[:, 0, 0]

def lookups(rng, batch=128, n_keys=8):
    """Keys in random order, their values, the two keys asked for, and the values of these two."""
    keys = rng.permuted(np.tile(np.arange(n_keys), (batch, 1)), axis=1)
    values = rng.standard_normal((batch, n_keys))
    places = rng.permuted(np.tile(np.arange(n_keys), (batch, 1)), axis=1)[:, :2]
    asked, found = (np.take_along_axis(x, places, axis=1) for x in (keys, values))
    return [torch.from_numpy(x) for x in (keys, values, asked[:, 0], asked[:, 1], found[:, 0], found[:, 1])]

def explained(task, n_heads, seed):
    """Train one model on task "sum" or "difference"; the share of the answer's variance that it explains then."""
    sign, rng = {"sum": 1, "difference": -1}[task], np.random.default_rng(seed)
    model = training.initialise(TwoLookups(n_heads).double(), seed)

    def loss(model, batch):
        return F.mse_loss(model(*batch[:4]), batch[4] + sign * batch[5])

    training.fit(model, (lookups(rng) for _ in range(300)), loss, steps=300, lr=1e-2)
    exam = lookups(np.random.default_rng(99), batch=2000)
    with torch.no_grad():
        return 1 - (loss(model, exam) / (exam[4] + sign * exam[5]).var()).item()


def repeated(seed, batch=32, vocab=32, seq_len=40):
    """Sequences (batch, seq_len) that repeat their first `period` tokens, and the period; endless."""
    rng = np.random.default_rng(seed)
    while True:
        period = rng.integers(8, 21)
        segment = rng.permuted(np.tile(np.arange(vocab), (batch, 1)), axis=1)[:, :period]
        yield torch.from_numpy(np.tile(segment, (1, seq_len // period + 1))[:, :seq_len]), period

@functools.cache
def exams():
    """Three batches (32, 40) with their periods, and one with two whole rounds of 20."""
    stream = repeated(seed=99, batch=32)
    first = [next(stream) for _ in range(3)]
    return first, next(ids for ids, period in stream if period == 20)

def two_rounds():
    """32 sequences (32, 40) of two rounds of 20."""
    return exams()[1]

def guess_earlier():
    """The accuracy in the second round of a guess among the tokens of the first."""
    return float(np.mean([1 / period for _, period in exams()[0]]))

@torch.no_grad()
def second_round(model):
    """Accuracy and loss (nats) where the next token can be known: from the end of the first round on."""
    logits, targets = zip(*((model(ids[:, :-1])[:, period:], ids[:, period + 1:]) for ids, period in exams()[0]))
    right = [(row.argmax(-1) == t).double().mean().item() for row, t in zip(logits, targets)]
    return np.mean(right), np.mean([F.cross_entropy(row.mT, t).item() for row, t in zip(logits, targets)])

@torch.no_grad()
def attention_maps(model, ids=None):
    """Weights of all heads, averaged over sequences, by default those of two_rounds(): (n_layers, n_heads, n, n)."""
    with record(model, ("weights",)) as cache:
        model(two_rounds() if ids is None else ids)
    return torch.stack(list(cache.values())).mean(1).numpy()

class Run(NamedTuple):
    """A trained model, and what was measured every ten steps."""

    model: nn.Module
    steps: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    maps: list[np.ndarray]

def train_repeats(n_layers, seed):
    """Train a model of n_layers layers of four heads without feed-forward layers for 200 steps: a Run."""
    config = TransformerConfig(vocab_size=32, d_model=48, n_heads=4, n_layers=n_layers, d_ff=0)
    model = training.initialise(TransformerLM(config, positions=DistanceBias(4)).double(), seed)
    seen = []

    def loss(model, batch):
        return training.next_token_loss(model, batch[0])

    def evaluate(model):
        seen.append((*second_round(model), attention_maps(model)))
        return seen[-1][0]

    history = training.fit(model, repeated(seed), loss, steps=200, lr=6e-3, evaluate=evaluate, every=10)
    accuracy, losses, maps = zip(*seen)
    return Run(model, np.array(history.steps), np.array(accuracy), np.array(losses), list(maps))


class Rotation(Positions):
    """Positions that rotate as a language model does."""

    def __init__(self, rotate):
        super().__init__()
        self.turn = rotate

    def rotate(self, x, positions):
        return self.turn(x, positions)

class InPlace(nn.Module):
    """A layer of this lecture, called as a LanguageModel calls its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, parts, attention, positions, cache, options):
        return self.layer(x, causal=True, positions=positions, cache=cache, **options)

@torch.no_grad()
def with_module(model, layer_class):
    """A language model on the same weights, with layer_class(d_model, n_heads, positions) for the attention of each layer."""
    config, other = model.config, copy.copy(model)
    other._modules, blocks = dict(model._modules), []
    for block in model.blocks:
        new = layer_class(config.d_model, config.n_heads, Rotation(model.parts.rotate))
        for name in ("w_q", "w_k", "w_v", "w_o"):
            w = getattr(block.attention, name)
            if w.shape[1] < config.d_model:                             # each key head for all the queries that ask it
                heads = w.unflatten(1, (config.n_kv_heads, -1))
                w = heads.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1).flatten(1)
            getattr(new, name).data = w                                 # not a copy, where it is the model's own
        block = copy.copy(block)
        block._modules = dict(block._modules) | {"attention": InPlace(new)}
        blocks.append(block)
    other.blocks = nn.ModuleList(blocks)
    return other

def twice(model, seed, n=50):
    """A start token, then n random tokens of a language model, twice: ids (1, 2 n + 1)."""
    segment = np.random.default_rng(seed).integers(1000, 49000, n)
    return torch.from_numpy(np.concatenate([[0], segment, segment])[None])

def ranked(scores):
    """The heads (layer, head) of an array of scores (n_layers, n_heads), the largest first."""
    return [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]

def head_importance(model, texts):
    """How fast the loss changes with a factor behind each head: |d loss / d factor|, its mean over texts (1, n).

    model: with blocks[i].attention.outputs, the place of a hook. Returns an array (n_layers, n_heads).
    Source: Michel et al. 2019 (arXiv 1905.10650), equation 2, with one factor a text.
    """
    total = 0.0
    for ids in texts:
        factors, handles = [], []
        for block in model.blocks:
            factor = torch.ones(block.attention.n_heads, requires_grad=True)

            def multiply(_module, _inputs, outputs, factor=factor):
                return outputs * factor[:, None, None].to(outputs.dtype)

            handles.append(block.attention.outputs.register_forward_hook(multiply))
            factors.append(factor)
        loss = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        for handle in handles:
            handle.remove()
        total = total + torch.stack(torch.autograd.grad(loss, factors)).abs().numpy()
    return total / len(texts)


def train_translator(seed):
    """Train an EncoderDecoder with one layer each for 240 steps."""
    words = translation()
    model = training.initialise(EncoderDecoder(len(words.english), len(words.german)).double(), seed)
    batches = translation_batches(words.source, words.target, seed)
    training.fit(model, batches, translation_loss, steps=240, lr=5e-3)
    return model

@functools.cache
def exactly_right(model):
    """The share of the 1,000 test numbers that are translated without a mistake."""
    target = translation().test_target
    found = model.translate(translation().test_source, target.shape[1])
    return ((found == target) | (target == Vocabulary.PAD)).all(1).double().mean().item()


def named_shares():
    """Mean weight of MiniLM's heads (6, 12) on five places, over four sentences: {name: array}."""
    texts = ["The animal didn't cross the street because it was too tired.",
             "The old man the boats while the young wait at home.",
             "She gave the book to her brother because he had asked for it.",
             "Numbers are translated word by word, except that the units come first."]
    found = []
    for text in texts:
        w = data.minilm_attention(text)[0]
        inner = w[:, :, 1:-1]                                           # queries without [CLS] and [SEP]
        here = np.arange(inner.shape[2])
        found.append({"itself": inner[:, :, here, here + 1].mean(-1), "previous": inner[:, :, here, here].mean(-1),
                      "next": inner[:, :, here, here + 2].mean(-1), "[CLS]": inner[..., 0].mean(-1),
                      "[SEP]": inner[..., -1].mean(-1)})
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}

class Sentiment(nn.Module):
    """The mean of the word vectors, with or without an encoder layer before it, and a linear classifier."""

    def __init__(self, attend, d_model=16):
        super().__init__()
        self.embedding, self.out = nn.Embedding(16, d_model), nn.Linear(d_model, 2)
        self.layer = EncoderLayer(d_model, 2) if attend else nn.Identity()

    def forward(self, x):
        return self.out(self.layer(self.embedding(x))).mean(1)

def reviews(rng, batch=64, length=12):
    """Words (batch, 12), positive (batch,), place of the opinion, and whether it is negated.

    Words 0 to 2 are good, 3 to 5 bad, 6 is "not", 7 to 15 say nothing.
    """
    x = rng.integers(7, 16, size=(batch, length))
    positive, negated = rng.integers(2, size=(2, batch))
    rows, place = np.arange(batch), rng.integers(4, length, size=batch)
    x[rows, place] = np.where(positive ^ negated, 0, 3) + rng.integers(3, size=batch)
    x[rows, np.where(negated, place - 1, rng.integers(0, 3, size=batch))] = 6
    return torch.from_numpy(x), torch.from_numpy(positive), place, negated

def train_sentiment(attend, seed):
    """Train a Sentiment model for 300 steps."""
    rng = np.random.default_rng(seed)
    model = training.initialise(Sentiment(attend).double(), seed)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    training.fit(model, (reviews(rng) for _ in range(300)), loss, steps=300, lr=1e-2)
    return model
