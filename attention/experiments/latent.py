# Generated from solutions/09_multi_head_latent_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 09 · Multi-head latent attention: what it trains for itself alone."""

import copy
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from attention.latent import MultiHeadLatentAttention
from attention.multi_head import (
    MultiHeadAttention,
    TransformerConfig,
    TransformerLM,
    masked_softmax,
    merge_heads,
    split_heads,
)
from attention.rotary import Rotary
from utils import data, training

__all__ = [
    "EncoderLayer",
    "encoder_layer",
    "encoder_inputs",
    "layer_inputs",
    "with_weights",
    "MultiQueryAttention",
    "train_reader",
    "held_out_loss",
    "bigram_loss",
]


class EncoderLayer(NamedTuple):
    """One attention layer of MiniLM on one sentence: x (n, 384), w_k and w_v (384, 384), queries (12, n, 32)."""

    tokens: list
    x: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    queries: np.ndarray


@torch.no_grad()
def encoder_layer(sentence, layer):
    """The attention layer number `layer` of MiniLM, in float64. Keys and values without their biases."""
    model, tokenizer = data.minilm()
    inputs = tokenizer(sentence, return_tensors="pt")
    x = model(**inputs, output_hidden_states=True).hidden_states[layer][0].double()
    own = model.encoder.layer[layer].attention.self
    w_q, w_k, w_v = (part.weight.double().T for part in (own.query, own.key, own.value))
    queries = (x @ w_q + own.query.bias.double()).unflatten(1, (12, 32)).transpose(0, 1)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    return EncoderLayer(tokens, *(array.numpy() for array in (x, w_k, w_v, queries)))


@torch.no_grad()
def encoder_inputs(layer, length=128):
    """What enters a layer of MiniLM for the prose of this course: (n, 384) float64, one row a token."""
    model, tokenizer = data.minilm()
    ids = tokenizer(data.course_prose(), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    ends = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    first, last = ends
    states = model(input_ids=torch.cat([first, rows, last], dim=1), output_hidden_states=True).hidden_states
    return states[layer].flatten(0, 1).double().numpy()


def layer_inputs(model, ids):
    """What enters the attention of each layer of a LanguageModel on ids (1, n): a list of arrays (n, d_model) float64."""
    kept = []
    hooks = [block.attention.register_forward_pre_hook(lambda _, given: kept.append(given[0][0].double().numpy()))
             for block in model.blocks]
    try:
        with torch.no_grad():
            model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def with_weights(model, change):
    """A copy of a LanguageModel with change(layer, w_k, w_v) for the weights of its keys and values; all else is shared."""
    shared = {id(part): part for part in (*model.parameters(), model.tokenizer)}
    other = copy.deepcopy(model, shared)
    for layer, block in enumerate(other.blocks):
        new = change(layer, block.attention.w_k, block.attention.w_v)
        block.attention.w_k, block.attention.w_v = (nn.Parameter(w, requires_grad=False) for w in new)
    return other


class MultiQueryAttention(nn.Module):
    """All heads share one key and one value, as a layer of TransformerLM."""

    def __init__(self, d_model, n_heads, positions):
        super().__init__()
        self.n_heads, self.positions = n_heads, positions
        shapes = {"w_q": d_model, "w_k": d_model // n_heads, "w_v": d_model // n_heads, "w_o": d_model}
        for name, columns in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(d_model, columns) * d_model**-0.5))

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        q = self.positions.rotate(split_heads(x @ self.w_q, self.n_heads), positions)
        k = self.positions.rotate((x @ self.w_k)[:, None], positions)
        p = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), mask, causal)
        return merge_heads(p @ (x @ self.w_v)[:, None]) @ self.w_o


def train_reader(name, seed, steps=120):
    """A TransformerLM of two layers of 64 with four heads and "MHA", "GQA-1" or "MLA", trained on characters."""
    layers = {
        "MHA": lambda config, layer, positions: MultiHeadAttention(64, 4, positions),
        "GQA-1": lambda config, layer, positions: MultiQueryAttention(64, 4, positions),
        "MLA": lambda config, layer, positions: MultiHeadLatentAttention(64, 4, 16, 24, 8),
    }
    text = data.characters()
    model = TransformerLM(TransformerConfig(len(text.alphabet)), layers[name], Rotary(16))
    training.initialise(model.double(), seed)
    training.fit(model, training.windows(text.corpus, 32, 12, seed), training.next_token_loss, steps, lr=8e-3)
    return model


@functools.cache
def held_out():
    """128 stretches of held-out text, (128, 33)."""
    return next(training.windows(data.characters().held_out, 32, 128, seed=99))


@torch.no_grad()
def held_out_loss(model):
    """The mean loss on held-out text, in nats a character."""
    return float(training.next_token_loss(model, held_out()))


def bigram_loss():
    """The same of a table that knows how often each character follows each other one in the corpus."""
    text, ids = data.characters(), held_out()
    pairs = np.full((len(text.alphabet),) * 2, 0.1)
    np.add.at(pairs, (text.corpus[:-1].numpy(), text.corpus[1:].numpy()), 1)
    logs = np.log(pairs / pairs.sum(1, keepdims=True))
    return float(-logs[ids[:, :-1].numpy(), ids[:, 1:].numpy()].mean())
