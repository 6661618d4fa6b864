"""Lecture 02: multi-head attention as a PyTorch module, with places for hooks."""

import math

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.exercises.lecture_02.hooks import HookedExercise
from utils.exercises.positions import Turned
from utils.judge.result import Failed

MODULE = "multi_head"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


class Placed(Turned):
    """Positions that turn, and add a number for each head and distance to the scores."""

    def __init__(self, n_heads):
        self.n_heads = n_heads

    def bias(self, n_queries, n_keys):
        distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
        return torch.sin(torch.arange(1.0, self.n_heads + 1)[:, None, None] * distance)


class Cache:
    """Keys and values so far."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def update(self, k, v):
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        return self.k, self.v


class MultiHeadAttention(nn.Module):  # the oracle: one head at a time
    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        self.n_heads, self.d_head, self.positions = n_heads, d_model // n_heads, positions
        for name in "qkvo":
            setattr(self, f"w_{name}", nn.Parameter(torch.zeros(d_model, d_model)))
        self.weights, self.outputs = nn.Identity(), nn.Identity()

    def turn(self, x, positions, cross):
        return x if self.positions is None or cross else self.positions.rotate(x, positions)

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None, cache=None):
        cross, n = x_kv is not None, x.shape[1]
        other, positions = x_kv if cross else x, torch.arange(n) if positions is None else positions
        own = [slice(self.d_head * h, self.d_head * (h + 1)) for h in range(self.n_heads)]
        q = torch.stack([self.turn(x @ self.w_q[:, s], positions, cross) for s in own], 1)
        k = torch.stack([self.turn(other @ self.w_k[:, s], positions, cross) for s in own], 1)
        v = torch.stack([other @ self.w_v[:, s] for s in own], 1)
        if cache is not None:
            k, v = cache.update(k, v)
        n_keys, shares = k.shape[2], []
        allowed = torch.ones(x.shape[0], self.n_heads, n, n_keys, dtype=torch.bool)
        if causal:
            allowed = allowed & (torch.arange(n_keys) <= torch.arange(n)[:, None] + n_keys - n)
        if mask is not None:
            allowed = allowed & mask
        bias = getattr(self.positions, "bias", lambda *sizes: None)(n, n_keys) if not cross else None
        for h in range(self.n_heads):
            scores = q[:, h] @ k[:, h].mT / math.sqrt(self.d_head) + (0 if bias is None else bias[h].to(x.dtype))
            scores = scores.masked_fill(~allowed[:, h], -1e38)
            powers = torch.exp(scores - scores.amax(-1, keepdim=True)) * allowed[:, h]
            total = powers.sum(-1, keepdim=True)
            shares.append(powers / total.masked_fill(total == 0, 1))
        found = self.outputs(self.weights(torch.stack(shares, 1)) @ v)
        return sum(found[:, h] @ self.w_o[s] for h, s in enumerate(own))


layer = HookedExercise(
    "2D",
    "MultiHeadAttention",
    MODULE,
    importance="essential",
    oracle=MultiHeadAttention,
    make={"d_model": 6, "n_heads": 2},
)


class Still:
    """Positions that do nothing."""

    def rotate(self, x, positions):
        return x

    def bias(self, n_queries, n_keys):
        return None


@layer.property(
    "parameters w_q, w_k, w_v and w_o with the shapes of the contract",
    hint="Which four matrices does the contract name, and which shape have all of them?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=8, n_heads=4)


@layer.property(
    "they begin at random, with numbers of about d_model ** -0.5",
    hint="What would a layer learn whose numbers are all alike? By which factor does a sum of d_model numbers grow?",
)
def _(ask, rng):
    ask.begins(256**-0.5, d_model=256)


@layer.property("self-attention with copied weights", hint="In which order do split, softmax, merge and w_o stand?")
def _(ask, rng):
    ask(tensor(rng, 1, 3, 6))
    ask(tensor(rng, 2, 5, 12), make={"d_model": 12, "n_heads": 3})


@layer.property("cross-attention: x asks, x_kv answers", hint="From which of the two come q, k and v?")
def _(ask, rng):
    ask(tensor(rng, 2, 3, 6), x_kv=tensor(rng, 2, 5, 6))
    ask(tensor(rng, 1, 4, 6), x_kv=tensor(rng, 1, 4, 6))


@layer.property("mask and causal", hint="To which function do mask and causal go?")
def _(ask, rng):
    x, mask = tensor(rng, 2, 4, 6), torch.from_numpy(rng.random((2, 1, 1, 4)) < 0.6)
    mask[..., 0] = True
    ask(x, causal=True)
    ask(x, mask=mask)
    ask(x, mask=mask, causal=True)
    ask(x, x_kv=tensor(rng, 2, 4, 6), mask=~mask & mask)  # nothing at all


@layer.property(
    "queries and keys are rotated, values are not, and nothing is in cross-attention",
    hint="Which two go through rotate, with which positions, and when?",
)
def _(ask, rng):
    make = {"d_model": 8, "n_heads": 2, "positions": Rotating()}
    ask(tensor(rng, 2, 4, 8), make=make)
    ask(tensor(rng, 2, 3, 8), make=make, positions=torch.tensor([2, 7, 9]))
    ask(tensor(rng, 2, 3, 8), x_kv=tensor(rng, 2, 3, 8), make=make)


class Rotating(Turned, Still):
    """Positions that turn, and no more."""


@layer.property(
    "a bias is added to the scores, in self-attention only",
    hint="Which two numbers does bias want? Is it asked in cross-attention, and what if it is None?",
)
def _(ask, rng):
    make = {"d_model": 8, "n_heads": 2, "positions": Placed(2)}
    ask(tensor(rng, 2, 4, 8), make=make, causal=True)
    ask(tensor(rng, 2, 3, 8), x_kv=tensor(rng, 2, 3, 8), make=make)


@layer.property(
    "the cache gets rotated keys, and what it returns is attended to",
    hint="In which order do rotate and cache stand, and which k and v are used after it?",
)
def _(ask, rng):
    make = {"d_model": 8, "n_heads": 2, "positions": Placed(2)}
    for n_new in (1, 2):
        old = Cache(tensor(rng, 2, 2, 5, 4), tensor(rng, 2, 2, 5, 4))
        ask(tensor(rng, 2, n_new, 8), make=make, causal=True, positions=torch.arange(5, 5 + n_new), cache=old)


@layer.property(
    "a hook on self.weights replaces the weights",
    hint="Is self.weights a module, and does your code go on with what it returns?",
)
def _(ask, rng):
    ask.hooked("weights", tensor(rng, 2, 3, 6))


@layer.property(
    "a hook on self.outputs replaces what the heads found",
    hint="What goes through self.outputs: before the merge, or after it?",
)
def _(ask, rng):
    ask.hooked("outputs", tensor(rng, 2, 3, 6))


@layer.property(
    "gradients reach every parameter and the input",
    hint="Where does the computation leave torch: detach, .data, NumPy?",
)
def _(ask, rng):
    ask.gradients(tensor(rng, 2, 3, 6), causal=True)


@layer.property("float32, large scores, all at once", hint="Does anything that you make have a float type of its own?")
def _(ask, rng):
    make = {"d_model": 8, "n_heads": 2, "positions": Rotating()}
    out = ask(10 * tensor(rng, 2, 9, 8).float(), make=make, causal=True, positions=torch.arange(3, 12))
    if not torch.isfinite(torch.from_numpy(out)).all():
        raise Failed("some of the output is not finite")


class Usual(nn.Module):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        self.n_heads, self.positions = n_heads, Still() if positions is None else positions
        begin = (nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in range(4))
        self.w_q, self.w_k, self.w_v, self.w_o = begin
        self.weights, self.outputs = nn.Identity(), nn.Identity()

    def split(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def join(self, found):
        return found.transpose(1, 2).flatten(2)

    def scale(self, q):
        return q.shape[-1] ** -0.5

    def turned(self, q, k, v, positions):
        return self.positions.rotate(q, positions), self.positions.rotate(k, positions), v

    def stored(self, k, v, cache):
        return (k, v) if cache is None else cache.update(k, v)

    def biased(self, scores, cross):
        bias = None if cross else self.positions.bias(*scores.shape[-2:])
        return scores if bias is None else scores + bias

    def shares(self, scores, mask, causal):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if causal:
            allowed = allowed.tril(scores.shape[-1] - scores.shape[-2])
        if mask is not None:
            allowed = allowed & mask
        return torch.softmax(scores.masked_fill(~allowed, -math.inf), -1).nan_to_num(0.0)

    def sources(self, x, other):
        return x, other, other

    def finished(self, weights, v):
        return self.join(self.outputs(self.weights(weights) @ v)) @ self.w_o

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None, cache=None):
        positions = torch.arange(x.shape[1]) if positions is None else positions
        sources = self.sources(x, x if x_kv is None else x_kv)
        q, k, v = (self.split(s @ w) for s, w in zip(sources, (self.w_q, self.w_k, self.w_v)))
        if x_kv is None:
            q, k, v = self.turned(q, k, v, positions)
        k, v = self.stored(k, v, cache)
        scores = self.biased(q @ k.mT * self.scale(q), x_kv is not None)
        return self.finished(self.shares(scores, mask, causal), v)


@layer.mistake("A plain reshape does not split heads: use split_heads.")
class _(Usual):
    def split(self, x):
        return x.reshape(x.shape[0], self.n_heads, x.shape[1], -1)


@layer.mistake("The axes of heads and tokens were not swapped back before the heads were merged: use merge_heads.")
class _(Usual):
    def join(self, found):
        return found.reshape(found.shape[0], found.shape[2], -1)


@layer.mistake("The scores are not scaled: divide them by sqrt(d_head).")
class _(Usual):
    def scale(self, q):
        return 1.0


@layer.mistake("The scores are divided by sqrt(d_model): the dot product adds d_head numbers.")
class _(Usual):
    def scale(self, q):
        return len(self.w_q) ** -0.5


@layer.mistake("Keys and values come from x: x_kv answers.")
class _(Usual):
    def sources(self, x, other):
        return x, x, x


@layer.mistake("The values come from x: both keys and values are x_kv's.")
class _(Usual):
    def sources(self, x, other):
        return x, other, x


@layer.mistake("The keys are not rotated.")
class _(Usual):
    def turned(self, q, k, v, positions):
        return self.positions.rotate(q, positions), k, v


@layer.mistake("Nothing is rotated: q and k go through self.positions.rotate.")
class _(Usual):
    def turned(self, q, k, v, positions):
        return q, k, v


@layer.mistake("The values are rotated too: only queries and keys are.")
class _(Usual):
    def turned(self, q, k, v, positions):
        return (*super().turned(q, k, v, positions)[:2], self.positions.rotate(v, positions))


@layer.mistake("The positions that were handed over are not used.")
class _(Usual):
    def turned(self, q, k, v, positions):
        return super().turned(q, k, v, torch.arange(q.shape[2]))


@layer.mistake("The cache is filled, but what it returns is not used: the old keys are not seen.")
class _(Usual):
    def stored(self, k, v, cache):
        super().stored(k, v, cache)
        return k, v


@layer.mistake("The bias is not added to the scores.")
class _(Usual):
    def biased(self, scores, cross):
        return scores


@layer.mistake("The bias is added in cross-attention too, where distances mean nothing.")
class _(Usual):
    def biased(self, scores, cross):
        return super().biased(scores, False)


@layer.mistake("causal=True changes nothing.")
class _(Usual):
    def shares(self, scores, mask, causal):
        return super().shares(scores, mask, False)


@layer.mistake("The mask changes nothing.")
class _(Usual):
    def shares(self, scores, mask, causal):
        return super().shares(scores, None, causal)


@layer.mistake("The last matrix is missing: the merged heads are multiplied by w_o.")
class _(Usual):
    def finished(self, weights, v):
        return self.join(self.outputs(self.weights(weights) @ v))


@layer.mistake("self.weights is there, but nothing goes through it: weights = self.weights(...).")
class _(Usual):
    def finished(self, weights, v):
        return self.join(self.outputs(weights @ v)) @ self.w_o


@layer.mistake("self.outputs is there, but nothing goes through it.")
class _(Usual):
    def finished(self, weights, v):
        return self.join(self.weights(weights) @ v) @ self.w_o
