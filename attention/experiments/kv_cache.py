# Generated from solutions/05_kv_cache.py by `python course.py build`. Edit that file, not this one.
"""Lecture 05 · KV cache: what it trains for itself alone."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from attention.kv_cache import evict, new_caches
from attention.multi_head import TransformerConfig, TransformerLM, masked_softmax, record
from attention.rotary import Rotary
from utils import training

__all__ = [
    "copying_texts",
    "is_trigger",
    "train_copier",
    "look_at_sink",
    "sink_and_stream",
    "loss_with_entry",
    "passkey",
    "read_and_choose",
    "loss_after",
    "look_up",
    "schedule",
]


def schedule(prompt, chunk, n_weights=8.03e9):
    """(start, end) in milliseconds of Ben's pieces of a prompt and of Anna's tokens, on an H100; two bytes a weight."""
    a_step = 2e3 * n_weights / 3.35e12  # all weights are read
    clock, anna, ben = 0.0, [], []
    for piece in [0] * 4 + [chunk] * (prompt // chunk) + [0] * 4:
        end = clock + max(a_step, 2e3 * n_weights * piece / 989e12)  # or multiplied with each token
        if piece:
            ben.append((clock, end))
        if piece < prompt:
            anna.append((clock, end))
        clock = end
    return {"Ben's prompt": ben, "Anna's tokens": anna}


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


@torch.no_grad()
def sink_and_stream(model, ids, layer=11, first=64):
    """What a language model does with token 0 of ids (1, n). Returns three tensors.

    Its weight in each head, mean over the queries from `first` on (layers, heads); the length of its value over the mean of the
    others' (layers, key heads); and the sizes of the numbers after a layer (n, d_model).
    """
    on_first, streams, caches = [], [], model.new_caches()

    def watch(q, k, v, causal):
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True)
        on_first.append(weights[0, :, first:, 0].mean(-1))
        return weights @ v

    hook = model.blocks[layer].register_forward_hook(lambda block, given, stream: streams.append(stream[0].abs()))
    try:
        model.replace(attention=watch).hidden(ids, caches=caches)
    finally:
        hook.remove()
    norms = torch.stack([cache.v[0].norm(dim=-1) for cache in caches])
    return torch.stack(on_first), norms[..., 0] / norms[..., 1:].mean(-1), streams[0]

def loss_with_entry(model, ids, entry, value, layer=11):
    """The loss of a language model on ids (1, n) where after a layer one number of token 0 is set to a value."""
    def change(block, given, stream):
        stream = stream.clone()
        stream[0, 0, entry] = value
        return stream

    hook = model.blocks[layer].register_forward_hook(change)
    try:
        return float(model.losses(ids).mean())
    finally:
        hook.remove()


def passkey(model, prose, key, depth):
    """A pass key (a string of digits with a space in front) in prose, ids (1, n), and the question for it at the end.

    depth: where, as a share. Returns ids (1, n) without the last token, and that token with the key's, (1, n_key + 1).
    """
    ids = prose[0].tolist()
    at = int(depth * len(ids))
    ids[at:at] = model.encode(f" The pass key is{key}. Remember it:{key} is the pass key.")[0].tolist()
    ids += model.encode(" What is the pass key? The pass key is")[0].tolist()
    return torch.tensor([ids[:-1]]), torch.tensor([ids[-1:] + model.encode(key)[0].tolist()])

@torch.no_grad()
def read_and_choose(model, ids, choices):
    """Read ids (1, n) and let policies choose. choices: {name: (policy, budget)}, asked for each layer and key head.

    Returns full KVCaches, and {name: [boolean (1, n_kv_heads, n) of each layer]}. The weights of a key head are the mean over
    its query heads.
    """
    caches, kept = new_caches(model, 1, ids.shape[1]), {name: [] for name in choices}
    n_kv_heads = model.config.n_kv_heads

    def watch(q, k, v, causal):
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True)
        of_group = weights.unflatten(1, (n_kv_heads, -1)).mean(2).numpy()
        for name, (policy, budget) in choices.items():
            kept[name].append(policy(of_group, budget))
        return weights @ v

    model.replace(attention=watch).hidden(ids, caches=caches)
    return caches, kept

def loss_after(model, caches, kept, ids, gap=0):
    """The loss of all tokens of ids (1, n) but the first, after full KVCaches of which each keeps what `kept` says.

    kept: as read_and_choose gives it; None keeps all. Positions go on where the text ended, and `gap` further.
    """
    end, n_new = caches[0].length, ids.shape[1]
    everything = np.ones((1, caches[0].k.shape[1], end), dtype=bool)
    smaller = [evict(cache, everything if kept is None else kept[i], n_new) for i, cache in enumerate(caches)]
    return float(model.losses(ids, caches=smaller, positions=end + gap + torch.arange(n_new)).mean())


def look_up(ids, n_draft=8, longest=3):
    """Guess what follows ids (1, n): what followed its last tokens where they last stood before. Returns a list."""
    tokens = ids[0].tolist()
    for n in range(longest, 0, -1):
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at:at + n] == tokens[-n:]:
                return tokens[at + n:at + n + n_draft]
    return []
