# Generated from solutions/01_attention_fundamentals.py by `python course.py build`. Edit that file, not this one.
"""Lecture 01 · Attention fundamentals: what it trains for itself alone."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.fundamentals import Seq2Seq
from utils import data, training
from utils.data import Vocabulary

__all__ = [
    "HISTORY",
    "minilm_head",
    "Recall",
    "recall_streams",
    "recall_loss",
    "train_recall",
    "recall_accuracy",
    "influence",
    "translation",
    "translation_batches",
    "translation_loss",
    "train_translator",
    "exactly_right",
    "source_lengths",
    "align",
    "agreement",
]


HISTORY = [
    (1990, "Elman network", "a recurrent net: memory is its own last state"),  # Cognitive Science 14, 179-211
    (1991, "fast weights", "outer products of two learned patterns as a memory"),  # Schmidhuber; see 2102.11174
    (1997, "LSTM", "gates that keep a state over long times"),  # Hochreiter, Schmidhuber, Neural Computation 9(8)
    (2013, "soft window", "handwriting that moves along its text"),  # Graves, 1308.0850
    (2014, "seq2seq", "a sentence squeezed into one vector"),  # Sutskever et al., 1409.3215
    (2014, "additive attention", "the decoder searches the source at each word"),  # Bahdanau et al., 1409.0473
    (2015, "Luong attention", "dot, general and concat; global and local"),  # 1508.04025
    (2016, "key-value memory", "address by one vector, read another"),  # Miller et al., 1606.03126
    (2017, "Transformer", "attention without recurrence, in many heads"),  # Vaswani et al., 1706.03762
    (2019, "multi-query", "heads share keys and values"),  # Shazeer, 1911.02150
    (2020, "linear attention", "no softmax, a state of fixed size"),  # Katharopoulos et al., 2006.16236
    (2021, "RoPE", "positions as rotations"),  # Su et al., 2104.09864
    (2022, "FlashAttention", "exact attention, tile by tile"),  # Dao et al., 2205.14135
    (2022, "mixture of heads", "each token is routed to a few heads"),  # Zhang et al., 2210.05144
    (2023, "grouped-query", "groups of heads share keys and values"),  # Ainslie et al., 2305.13245
    (2024, "latent attention", "a compressed cache of keys and values"),  # DeepSeek-V2, 2405.04434
    (2024, "differential attention", "the difference of two softmax maps"),  # Ye et al., 2410.05258
    (2025, "native sparse attention", "sparsity that is trained, not cut in later"),  # 2502.11089
]


class Head(NamedTuple):
    """One head of a trained encoder on one sentence: float64 arrays; projections (d_in, d_out), used as x @ w + b."""

    tokens: list[str]
    x: np.ndarray
    w_q: np.ndarray
    b_q: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    weights: np.ndarray


def minilm_head(sentence, layer, head):
    """The head of MiniLM with its input: x (n, 384), w_q, w_k, w_v (384, 32), b_q, b_k, b_v (32,), weights (n, n).

    layer from 0 to 5, head from 0 to 11; ValueError for others.
    """
    model, tokenizer = data.minilm()
    if not (0 <= layer < 6 and 0 <= head < 12):
        raise ValueError(f"layer must be from 0 to 5 and head from 0 to 11, got {layer} and {head}")
    weights, tokens = data.minilm_attention(sentence)
    with torch.no_grad():
        states = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
    own, rows = model.encoder.layer[layer].attention.self, slice(32 * head, 32 * head + 32)
    parts = []
    for part in (own.query, own.key, own.value):
        parts += [part.weight.detach().numpy()[rows].T, part.bias.detach().numpy()[rows]]
    arrays = (states[layer][0].numpy(), *parts, weights[layer, head])
    return Head(tokens, *(array.astype(np.float64) for array in arrays))


class Recall(nn.Module):
    """Reads streams (batch, 16) and answers for every lag k at once: logits (batch, 16, 8).

    memory: "window" (the last four symbols), "RNN", "LSTM" or "attention". All share embeddings and the last two layers.
    """

    def __init__(self, memory, seq_len=16, n_symbols=8, d=32, window=4):
        super().__init__()
        if memory not in ("window", "RNN", "LSTM", "attention"):
            raise ValueError(f'memory must be "window", "RNN", "LSTM" or "attention", not {memory!r}')
        self.memory, self.window = memory, window
        self.symbol = nn.Embedding(n_symbols, d)
        self.question = nn.Embedding(seq_len, d)  # one vector for each lag k
        self.answer = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, n_symbols))
        match memory:
            case "window":
                self.mix = nn.Linear(window * d, d)
            case "RNN":
                self.mix = nn.RNN(d, d, batch_first=True)
            case "LSTM":
                self.mix = nn.LSTM(d, d, batch_first=True)
            case "attention":
                self.place = nn.Embedding(seq_len, d)

    def attend(self, x):
        """Weights (batch, 16 questions, 16 places) for symbols x (batch, 16, d)."""
        keys = x + self.place.weight  # a symbol with its place
        scores = self.question.weight @ keys.mT / math.sqrt(x.shape[-1])
        return torch.softmax(scores, dim=-1)

    def values(self, x):
        """What a symbol hands over: itself, without its place."""
        return x

    def forward(self, stream):
        x = self.symbol(stream)  # (batch, 16, d)
        match self.memory:
            case "window":
                found = self.mix(x[:, -self.window :].flatten(1))[:, None]
            case "attention":
                found = self.attend(x) @ self.values(x)
            case _:
                found = self.mix(x)[0][:, -1:]  # the last state answers every question
        question = self.question.weight.expand_as(x)
        return self.answer(torch.cat([found.expand_as(x), question], dim=-1))


def recall_streams(seed, batch=64):
    """Endless batches of (streams, answers), both (batch, 16) int64."""
    rng = np.random.default_rng(seed)
    while True:
        yield [torch.from_numpy(ids) for ids in data.recall_stream(rng, batch, seq_len=16, n_symbols=8)]


def recall_loss(model, batch):
    """Mean cross-entropy of a batch of (streams, answers)."""
    stream, answers = batch
    return F.cross_entropy(model(stream).mT, answers)


def train_recall(model, seed, steps=500):
    """`steps` steps from the first weights of `seed`, in double precision. Returns the model."""
    training.initialise(model.double(), seed)
    training.fit(model, recall_streams(seed), recall_loss, steps, lr=1e-2)
    return model


@torch.no_grad()
def recall_accuracy(model):
    """Share of right answers for each of the 16 lags, over 1,000 streams of their own."""
    stream, answers = next(recall_streams(seed=99, batch=1000))
    return (model(stream).argmax(-1) == answers).double().mean(0).numpy()


def influence(network, seed, forget_bias=0.0, n=50, d=32):
    """Norm of d out_T / d x_t for the distances T - t = 1 ... n - 1 in an untrained network, in float64: (n - 1,)."""
    training.initialise(network.double(), seed)
    if forget_bias:
        network.bias_ih_l0.data[d : 2 * d] += forget_bias  # torch's order: input, forget, cell, output
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x)[0][-1], x)  # (d, n, d)
    return jacobian.norm(dim=(0, 2)).flip(0)[1:].numpy()


class Translation(NamedTuple):
    """The number words: vocabularies, pairs to test with, and ids (n, length) of both languages."""

    english: Vocabulary
    german: Vocabulary
    test: list
    source: torch.Tensor
    target: torch.Tensor
    test_source: torch.Tensor
    test_target: torch.Tensor


@functools.cache
def translation():
    """The translation data, read once."""
    train, test = data.number_words()
    english, german = Vocabulary([p.source for p in train]), Vocabulary([p.target for p in train])
    ids = [
        torch.from_numpy(vocabulary.encode([getattr(p, side) for p in pairs]))
        for pairs in (train, test)
        for vocabulary, side in ((english, "source"), (german, "target"))
    ]
    return Translation(english, german, test, *ids)


def translation_batches(source, target, seed):
    """Endless batches of 64 pairs of ids, without the columns that are padding only."""
    rng = np.random.default_rng(seed)
    while True:
        rows = torch.from_numpy(rng.integers(len(source), size=64))
        yield [ids[rows][:, : (ids[rows] != Vocabulary.PAD).sum(1).max()] for ids in (source, target)]


def translation_loss(model, batch):
    """Mean cross-entropy of the German words, padding left out."""
    source, target = batch
    return F.cross_entropy(model(source, target).mT, target, ignore_index=Vocabulary.PAD)


def train_translator(attention, seed, steps=150):
    """A Seq2Seq of number words after `steps` steps; attention "additive" or None."""
    words = translation()
    model = training.initialise(Seq2Seq(len(words.english), len(words.german), attention=attention).double(), seed)
    training.fit(model, translation_batches(words.source, words.target, seed), translation_loss, steps, lr=6e-3)
    return model


def exactly_right(model):
    """For each test sentence: is the greedy translation right from the first word to the last? Booleans (1000,)."""
    words = translation()
    ids, _ = model.translate(words.test_source, words.test_target.shape[1])
    return ((ids == words.test_target) | (words.test_target == Vocabulary.PAD)).all(1).numpy()


def source_lengths():
    """English words of each test sentence, (1000,)."""
    return np.array([len(p.source) for p in translation().test])


def align(model, source):
    """Translate a list of English words. Returns (weights (n_german, n_source + 1), German words)."""
    words = translation()
    ids, alignments = model.translate(torch.from_numpy(words.english.encode([source])), words.test_target.shape[1])
    german = words.german.decode(ids[0])
    return alignments[0, : len(german), : len(source) + 1].numpy(), german


def kind_of(german, t):
    """What German word number t is: the unit before an "und", the ten after it, a scale, or None of these."""
    if "und" in german[t + 1 : t + 2]:
        return "unit"
    if t and german[t - 1] == "und":
        return "ten"
    return "scale" if german[t] in ("hundert", "tausend", "Million", "Millionen") else None


def agreement(model):
    """{kind: share of the words whose largest weight is on the English word that they translate}, over the test set."""
    words = translation()
    found = model.translate(words.test_source, words.test_target.shape[1])[1].argmax(-1).numpy()
    hits = {"unit": [], "ten": [], "scale": [], None: []}
    for i, p in enumerate(words.test):
        for t, j in enumerate(p.alignment):
            if j >= 0:  # "und" translates no English word
                hits[kind_of(p.target, t)].append(found[i, t] == j)
    return {name: np.mean(values) for name, values in hits.items() if name}
