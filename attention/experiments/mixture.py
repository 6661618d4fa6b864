# Generated from solutions/12_mixture_of_experts_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 12 · Mixture-of-experts attention: what it trains for itself alone."""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from attention.fundamentals import softmax
from attention.mixture import RoutedAttention, load_balancing_loss
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import Rotary
from utils import data, training

__all__ = [
    "EncoderHeads",
    "encoder_heads",
    "head_records",
    "lost",
    "head_sizes",
    "loss_with_heads",
    "routed_lm",
    "train_routed",
    "held_out_loss",
    "fullest",
    "start_collapsed",
    "pair_loss",
]


class EncoderHeads(NamedTuple):
    """One attention layer of MiniLM on one text: x (n, 384), q, k, v (12, n, 32), w_q (12, 384, 32), w_k and w_v
    (384, 384), w_o (12, 32, 384), as float64 arrays. q, k and v contain the biases, the output's bias is left out."""

    tokens: list
    x: np.ndarray
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray


@torch.no_grad()
def heads_of(x, own):
    """The arrays of EncoderHeads but the tokens, for inputs x (n, 384) of one attention of MiniLM."""
    parts = own.self.query, own.self.key, own.self.value
    w_q, w_k, w_v = (part.weight.double().T for part in parts)
    split = [(x @ w + part.bias.double()).unflatten(1, (12, 32)).transpose(0, 1)
             for w, part in zip((w_q, w_k, w_v), parts)]
    w_o = own.output.dense.weight.double().T.unflatten(0, (12, 32))
    arrays = (x, *split, w_q.unflatten(1, (12, 32)).transpose(0, 1), w_k, w_v, w_o)
    return [array.contiguous().numpy() for array in arrays]


@torch.no_grad()
def encoder_heads(sentence, layer):
    """EncoderHeads of layer number `layer` of MiniLM on a sentence."""
    model, tokenizer = data.minilm()
    given = tokenizer(sentence, return_tensors="pt")
    x = model(**given, output_hidden_states=True).hidden_states[layer][0].double()
    tokens = tokenizer.convert_ids_to_tokens(given["input_ids"][0].tolist())
    return EncoderHeads(tokens, *heads_of(x, model.encoder.layer[layer].attention))


@functools.cache
@torch.no_grad()
def head_records(layer, length=14):
    """What each head of a layer adds, on this course's prose in texts of 16 tokens: (inputs, lengths, products).

    inputs (n, 384) enter the layer; lengths (n, 12) are those of what the heads add, products (n, 12, 12) the inner
    products of these vectors with one another.
    """
    model, tokenizer = data.minilm()
    ids = tokenizer(data.course_prose(), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    first, last = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    inputs, products = [], []
    for ids in torch.cat([first, rows, last], dim=1).split(16):        # a few texts at a time, for their memory
        for x in model(input_ids=ids, output_hidden_states=True).hidden_states[layer].double():
            _, q, k, v, *_, w_o = heads_of(x, model.encoder.layer[layer].attention)
            parts = softmax(q @ k.swapaxes(1, 2) / math.sqrt(32)) @ v @ w_o
            products.append(np.einsum("hnd,gnd->nhg", parts, parts, optimize=True))
            inputs.append(x.numpy())
    products = np.concatenate(products)
    return np.concatenate(inputs), np.sqrt(np.einsum("nhh->nh", products)), products


def lost(kept, products):
    """The relative error of a layer's output when only the heads kept, boolean (n, 12), are added up."""
    gone = 1.0 - kept
    wrong = np.einsum("nh,nhg,ng->", gone, products, gone, optimize=True)
    return float(np.sqrt(wrong / products.sum()))


def parts_of_heads(attention, heads):
    """The lengths (n, n_heads) of what heads (1, n_heads, n, d_head) add to each token."""
    return (heads[0] @ attention.w_o.unflatten(0, (attention.n_heads, -1))).norm(dim=-1).T.double().numpy()


def with_hooks(model, see, ids, function):
    """function(ids) while see(layer, attention, x, heads) is called in each attention; what it returns replaces the heads."""
    last, hooks = {}, []
    for i, block in enumerate(model.blocks):
        def keep(_, given):
            last["x"] = given[0][0].double().numpy()

        def replace(_, __, heads, i=i, own=block.attention):
            return see(i, own, last["x"], heads)

        hooks.append(block.attention.register_forward_pre_hook(keep))
        hooks.append(block.attention.outputs.register_forward_hook(replace))
    try:
        with torch.no_grad():
            return function(ids)
    finally:
        for hook in hooks:
            hook.remove()


def head_sizes(model, ids):
    """What enters each attention of a LanguageModel on ids (1, n), and the lengths of what its heads add.

    Two lists with an item for each layer, (n - 1, d_model) and (n - 1, n_heads): without token 0, which is unlike all others.
    """
    inputs, lengths = [], []

    def see(_, attention, x, heads):
        inputs.append(x[1:])
        lengths.append(parts_of_heads(attention, heads)[1:])

    with_hooks(model, see, ids, model.hidden)
    return inputs, lengths


def loss_with_heads(model, ids, choose):
    """The mean loss on ids (1, n) when choose(layer, x, lengths), boolean (n, n_heads), says which heads a token keeps."""

    def see(i, attention, x, heads):
        kept = torch.from_numpy(np.ascontiguousarray(choose(i, x, parts_of_heads(attention, heads))))
        return heads * kept.T[None, :, :, None]

    return with_hooks(model, see, ids, model.losses).mean().item()


@functools.cache
def characters():
    """The prose, read once."""
    return data.characters()


class SoftmaxOverAll(RoutedAttention):
    """Gates are the probabilities of the chosen among all experts, as in Switch: with top-1 they stay below 1."""

    def route(self, x):
        _, chosen = super().route(x)
        return self.logits.softmax(-1).gather(-1, chosen), chosen


def routed_lm(n_experts, top_k, over="chosen"):
    """A language model of one layer of 48 whose heads are experts of 16; over: what the softmax of its gates runs over."""
    layer = {"chosen": RoutedAttention, "all": SoftmaxOverAll}[over]
    config = TransformerConfig(len(characters().alphabet), 48, 3, 1, 96)
    return TransformerLM(config, lambda _, __, positions: layer(48, n_experts, 16, top_k, positions), Rotary(16)).double()


def start_collapsed(model, size=8.0):
    """Let expert 0 of each layer have nearly all tokens: a constant part of what enters raises its logit by `size`."""
    with torch.no_grad():
        for block in model.blocks:
            way = torch.from_numpy(np.random.default_rng(5).standard_normal(48))
            block.norm_1.bias += way / way.norm()
            block.attention.w_router[:, 0] += size * way / way.norm()


def train_routed(n_experts, top_k, weight, over="chosen", seed=0, steps=200, start=None):
    """(model, history): a routed_lm trained with `weight` times the auxiliary loss; metrics are its largest load.

    start(model): changes the first weights. The load is measured every 20 steps.
    """
    model = training.initialise(routed_lm(n_experts, top_k, over), seed)
    if start:
        start(model)

    def loss(model, ids):
        value = training.next_token_loss(model, ids)
        for block in model.blocks if weight else ():
            value = value + weight * load_balancing_loss(block.attention.logits, top_k)
        return value

    batches = training.windows(characters().corpus, 48, 12, seed)
    history = training.fit(model, batches, loss, steps, lr=6e-3, evaluate=fullest, every=20)
    return model, history


@functools.cache
def held_out(count):
    """Stretches of held-out text, (count, 65)."""
    return next(training.windows(characters().held_out, 64, count, seed=99))


@torch.no_grad()
def fullest(model):
    """The largest load of an expert in any layer, on held-out text."""
    model(held_out(8)[:, :-1])
    found = []
    for block in model.blocks:
        logits = block.attention.logits
        chosen = logits.topk(block.attention.top_k, dim=-1).indices.flatten()
        found.append(torch.bincount(chosen).max().item() / len(chosen))
    return max(found)


@torch.no_grad()
def held_out_loss(model):
    """The mean loss on held-out text, in nats a character."""
    return float(training.next_token_loss(model, held_out(32)))


@functools.cache
def pair_loss():
    """The same of a table that knows how often each character follows each other one in the corpus."""
    corpus, text, size = characters().corpus, held_out(32), len(characters().alphabet)
    table = torch.full((size, size), 0.1, dtype=torch.float64)
    table.index_put_((corpus[:-1], corpus[1:]), torch.ones(len(corpus) - 1, dtype=torch.float64), accumulate=True)
    return float(-(table / table.sum(1, keepdim=True)).log()[text[:, :-1], text[:, 1:]].mean())
