# Generated from solutions/08_grouped_query_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 08 · Grouped-query attention: what it trains for itself alone."""

import copy
import functools

import numpy as np
import torch
from torch import nn

from attention.grouped_query import align_keys, aligned_merge, merge_kv_heads
from attention.kv_cache import KVCache
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import Rotary
from utils import data, training

__all__ = [
    "characters",
    "batches",
    "grouped_lm",
    "train_grouped",
    "held_out_loss",
    "convert",
    "caches_of",
    "merged_layer",
    "with_layers",
]


@functools.cache
def characters():
    """The prose, read once."""
    return data.characters()

def batches(seed):
    """Endless batches (16, 33) of stretches of the corpus."""
    return training.windows(characters().corpus, 32, 16, seed)

def grouped_lm(layer, n_kv_heads, d_ff=256):
    """A language model of characters: two layers of width 64, 8 query heads on n_kv_heads; layer: the attention's class."""
    config = TransformerConfig(len(characters().alphabet), 64, 8, 2, d_ff)

    def attention(config, _, positions):
        return layer(config.d_model, config.n_heads, n_kv_heads, positions)

    return TransformerLM(config, attention, Rotary(config.d_head)).double()

def train_grouped(layer, n_kv_heads, seed=0, steps=300):
    """Trained; what is saved in keys and values goes into the feed-forward part, so that all have as many parameters."""
    model = grouped_lm(layer, n_kv_heads, d_ff=256 + 8 * (8 - n_kv_heads))
    training.fit(training.initialise(model, seed), batches(seed), training.next_token_loss, steps, lr=8e-3)
    return model

@torch.no_grad()
def held_out_loss(model):
    """Mean loss on 128 stretches of 32 characters that were not trained on."""
    return float(training.next_token_loss(model, characters().held_out[: 128 * 33].view(128, 33)))

def pair_loss():
    """The loss of a table of character pairs of the corpus, on the same text: the control."""
    size = len(characters().alphabet)
    corpus, text = characters().corpus, characters().held_out[: 128 * 33].view(128, 33)
    table = torch.full((size, size), 0.01, dtype=torch.float64)
    ones = torch.ones(len(corpus) - 1, dtype=torch.float64)
    table.index_put_((corpus[:-1], corpus[1:]), ones, accumulate=True)
    return float(-(table / table.sum(1, keepdim=True)).log()[text[:, :-1], text[:, 1:]].mean())


def split_weight(w, n_heads):
    """A projection (d_in, n_heads * d_head), tensor, as an array (n_heads, d_in, d_head)."""
    return w.detach().double().unflatten(-1, (n_heads, -1)).movedim(1, 0).numpy()

def join_weight(w, like):
    """The inverse: an array (n_heads, d_in, d_head) as a tensor (d_in, n_heads * d_head), in the type of `like`."""
    return torch.from_numpy(np.concatenate(list(w), axis=-1)).to(like.dtype)

def merged_weights(weights, n_heads, n_kv_heads, way, cached, seed=5):
    """The four matrices {"w_q", ...} of a layer with n_heads key heads, as those of one with n_kv_heads.

    way: "mean", "first head", "random" or "aligned mean"; cached: its keys and values on some text, (n_heads, n_tokens,
    d_head) arrays, which aligning looks at. The heads of queries may be a multiple of n_heads.
    """
    new = dict(weights)
    if way == "random":
        rng = np.random.default_rng(seed)
        for name in ("w_k", "w_v"):
            rows, columns = weights[name].shape
            drawn = rng.uniform(-(rows**-0.5), rows**-0.5, (rows, columns // n_heads * n_kv_heads))
            new[name] = torch.from_numpy(drawn).to(weights[name].dtype)
    elif way == "aligned mean":
        d_head = weights["w_k"].shape[1] // n_heads
        queries = split_weight(weights["w_q"], n_heads * (share := weights["w_q"].shape[1] // weights["w_k"].shape[1]))
        queries = queries.reshape(n_heads, -1, d_head)  # all queries of a key head, one below the other
        out = weights["w_o"].detach().double().numpy().reshape(n_heads, share, d_head, -1)
        out = np.concatenate(list(out.swapaxes(0, 1)), axis=-1)  # and all their outputs, side by side
        keys, queries = align_keys(cached[0], split_weight(weights["w_k"], n_heads), queries, n_kv_heads)
        values, out = aligned_merge(cached[1], split_weight(weights["w_v"], n_heads), out, n_kv_heads)
        out = np.stack(np.split(out, share, axis=-1), axis=1).reshape(weights["w_o"].shape)
        queries = queries.reshape(n_heads * share, -1, d_head)
        new = {"w_k": join_weight(keys, weights["w_k"]), "w_v": join_weight(values, weights["w_v"]),
               "w_q": join_weight(queries, weights["w_q"]), "w_o": torch.from_numpy(out).to(weights["w_o"].dtype)}
    else:
        how = {"mean": "mean", "first head": "first"}[way]
        new |= {name: merge_kv_heads(weights[name], n_heads, n_kv_heads, how) for name in ("w_k", "w_v")}
    return {name: w.detach().clone() for name, w in new.items()}

@torch.no_grad()
def convert(model, layer, n_kv_heads, way):
    """A model of grouped_lm with 8 key heads as one with n_kv_heads; way as in merged_weights."""
    new = grouped_lm(layer, n_kv_heads)
    caches = [KVCache(16, 8, 32, 8) for _ in model.blocks]
    model(characters().corpus[:512].view(16, 32), caches=caches)
    state = model.state_dict()
    for i, cache in enumerate(caches):
        names = {name: f"blocks.{i}.attention.{name}" for name in ("w_q", "w_k", "w_v", "w_o")}
        seen = [cached.transpose(0, 1).flatten(1, 2).numpy() for cached in (cache.k, cache.v)]
        merged = merged_weights({name: state[full] for name, full in names.items()}, 8, n_kv_heads, way, seen)
        state |= {names[name]: w for name, w in merged.items()}
    new.load_state_dict(state)
    return new


@torch.no_grad()
def caches_of(model, ids):
    """For each layer of a language model its keys and values on ids (1, n): arrays (n_kv_heads, n - 1, d_head)."""
    caches = model.new_caches()
    model.hidden(ids, caches=caches)
    return [[kept[0, :, 1:].double().numpy() for kept in (cache.k, cache.v)] for cache in caches]

def merged_layer(attention, cached, way):
    """A copy of a language model's attention with one key head; its merged w_k and w_v ask for gradients."""
    weights = {name: getattr(attention, name) for name in ("w_q", "w_k", "w_v", "w_o")}
    n_kv_heads = len(cached[0])
    new = copy.deepcopy(attention)
    for name, w in merged_weights(weights, n_kv_heads, 1, way, cached).items():
        setattr(new, name, nn.Parameter(w, requires_grad=name in ("w_k", "w_v")))
    return new

def with_layers(model, attentions):
    """A language model on the same weights, with other attentions: {layer: module}."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    blocks = []
    for i, block in enumerate(model.blocks):
        if i in attentions:
            block = copy.copy(block)
            block._modules = dict(block._modules) | {"attention": attentions[i]}
        blocks.append(block)
    other.blocks = nn.ModuleList(blocks)
    return other
