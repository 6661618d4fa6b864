"""Lecture 08: grouped-query attention as a PyTorch module."""

import math

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.exercises.positions import Turned
from utils.judge.module import module
from utils.judge.result import Failed

MODULE = "grouped_query"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


class Cache:
    """Keys and values so far; what it is given has to have as many heads as it was made for, if any."""

    def __init__(self, k=None, v=None):
        self.k, self.v = k, v

    def update(self, k, v):
        for name, old, new in (("keys", self.k, k), ("values", self.v, v)):
            if old.shape[1] != new.shape[1]:
                raise ValueError(f"this cache has {old.shape[1]} heads, and got {name} of {new.shape[1]}")
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        return self.k, self.v


@module("8D", MODULE, make={"d_model": 8, "n_heads": 4, "n_kv_heads": 2}, importance="essential")
class GroupedQueryAttention(nn.Module):  # the oracle: one head at a time
    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_model // n_heads
        self.positions = positions
        for name, columns in (("q", d_model), ("k", self.d_head * n_kv_heads), ("v", self.d_head * n_kv_heads), ("o", d_model)):  # fmt: skip
            setattr(self, f"w_{name}", nn.Parameter(torch.zeros(d_model, columns)))

    def turn(self, x, positions):
        return x if self.positions is None else self.positions.rotate(x, positions)

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        n, d = x.shape[1], self.d_head
        positions = torch.arange(n) if positions is None else positions
        k = torch.stack([self.turn(x @ self.w_k[:, d * h : d * (h + 1)], positions) for h in range(self.n_kv_heads)], 1)
        v = torch.stack([x @ self.w_v[:, d * h : d * (h + 1)] for h in range(self.n_kv_heads)], 1)
        if cache is not None:
            k, v = cache.update(k, v)
        n_keys, out = k.shape[2], 0
        allowed = torch.ones(x.shape[0], self.n_heads, n, n_keys, dtype=torch.bool)
        if causal:
            allowed = allowed & (torch.arange(n_keys) <= torch.arange(n)[:, None] + n_keys - n)
        if mask is not None:
            allowed = allowed & mask
        for h in range(self.n_heads):
            own = slice(d * h, d * (h + 1))
            kv = h // (self.n_heads // self.n_kv_heads)
            scores = self.turn(x @ self.w_q[:, own], positions) @ k[:, kv].mT / math.sqrt(d)
            scores = scores.masked_fill(~allowed[:, h], -1e300 if scores.dtype == torch.float64 else -1e38)
            powers = torch.exp(scores - scores.amax(-1, keepdim=True)) * allowed[:, h]
            total = powers.sum(-1, keepdim=True)
            out = out + powers / total.masked_fill(total == 0, 1) @ v[:, kv] @ self.w_o[own]
        return out


@GroupedQueryAttention.property(
    "parameters w_q, w_k, w_v and w_o with the shapes of the contract",
    hint="How many columns has a matrix that makes n_kv_heads heads of d_head?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=18, n_heads=9, n_kv_heads=3)
    ask.parameters(d_model=6, n_heads=3, n_kv_heads=1)
    ask.begins(256**-0.5, d_model=256)


@GroupedQueryAttention.property(
    "with copied weights, the same output", hint="Which heads share, and what undoes the split?"
)
def _(ask, rng):
    ask(tensor(rng, 1, 3, 8))
    ask(tensor(rng, 2, 5, 18), make={"d_model": 18, "n_heads": 9, "n_kv_heads": 3})


@GroupedQueryAttention.property(
    "one head of keys, and as many as queries", hint="What is the size of a group at both ends?"
)
def _(ask, rng):
    ask(tensor(rng, 2, 4, 6), make={"d_model": 6, "n_heads": 3, "n_kv_heads": 1})
    ask(tensor(rng, 2, 4, 6), make={"d_model": 6, "n_heads": 3, "n_kv_heads": 3})


@GroupedQueryAttention.property("causal and a mask, together too", hint="To which function do mask and causal go?")
def _(ask, rng):
    x, mask = tensor(rng, 2, 4, 8), torch.from_numpy(rng.random((2, 1, 1, 4)) < 0.7)
    mask[..., 0] = True
    ask(x, causal=True)
    ask(x, mask=mask)
    ask(x, mask=mask, causal=True)


@GroupedQueryAttention.property(
    "queries and keys are rotated, values are not", hint="Which two go through rotate, and with which places?"
)
def _(ask, rng):
    make = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "positions": Turned()}
    ask(tensor(rng, 2, 5, 16), make=make)
    ask(tensor(rng, 2, 3, 16), make=make, causal=True, positions=torch.tensor([2, 7, 9]))


@GroupedQueryAttention.property(
    "the cache gets rotated keys, n_kv_heads of them, and what it returns is attended to",
    hint="In which order do rotate, cache and sharing stand?",
)
def _(ask, rng):
    make = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "positions": Turned()}
    for n_new in (1, 2):
        old = Cache(tensor(rng, 2, 2, 6, 4), tensor(rng, 2, 2, 6, 4))
        ask(tensor(rng, 2, n_new, 16), make=make, causal=True, positions=torch.arange(6, 6 + n_new), cache=old)


@GroupedQueryAttention.property(
    "gradients reach every parameter and the input",
    hint="Where does the computation leave torch: detach, .data, NumPy?",
)
def _(ask, rng):
    ask.gradients(tensor(rng, 2, 3, 8), causal=True)


@GroupedQueryAttention.property(
    "float32, large scores, all at once", hint="Does anything that you make have a float type of its own?"
)
def _(ask, rng):
    make = {"d_model": 24, "n_heads": 6, "n_kv_heads": 2, "positions": Turned()}
    out = ask(20 * tensor(rng, 2, 40, 24).float(), make=make, causal=True, positions=torch.arange(3, 43))
    if not torch.isfinite(torch.from_numpy(out)).all():
        raise Failed("some of the output is not finite")


class Usual(nn.Module):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.positions = n_heads, n_kv_heads, positions
        d_kv = d_model // n_heads * n_kv_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, columns) * d_model**-0.5) for columns in (d_model, d_kv, d_kv, d_model)
        )

    def split(self, x, heads):
        return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)

    def turn(self, x, positions):
        return x if self.positions is None else self.positions.rotate(x, positions)

    def stored(self, k, v, positions, cache):
        k = self.turn(k, positions)
        return (k, v) if cache is None else cache.update(k, v)

    def share(self, x):
        return x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)

    def scale(self, q):
        return q.shape[-1] ** -0.5

    def weights(self, scores, mask, causal):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if causal:
            allowed = allowed.tril(scores.shape[-1] - scores.shape[-2])
        if mask is not None:
            allowed = allowed & mask
        return torch.softmax(scores.masked_fill(~allowed, -math.inf), -1)

    def join(self, out):
        return out.transpose(1, 2).flatten(2)

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        positions = torch.arange(x.shape[1]) if positions is None else positions
        q = self.turn(self.split(x @ self.w_q, self.n_heads), positions)
        k, v = (self.split(x @ w, self.n_kv_heads) for w in (self.w_k, self.w_v))
        k, v = self.stored(k, v, positions, cache)
        scores = q @ self.share(k).mT * self.scale(q)
        return self.join(self.weights(scores, mask, causal) @ self.share(v)) @ self.w_o


@GroupedQueryAttention.mistake("Heads are dealt out, as by repeat: neighbours share a key head (repeat_interleave).")
class _(Usual):
    def share(self, x):
        return x.repeat(1, self.n_heads // self.n_kv_heads, 1, 1)


@GroupedQueryAttention.mistake("The scores are not scaled: divide them by sqrt(d_head).")
class _(Usual):
    def scale(self, q):
        return 1.0


@GroupedQueryAttention.mistake("The scores are divided by d_head, not by sqrt(d_head).")
class _(Usual):
    def scale(self, q):
        return 1 / q.shape[-1]


@GroupedQueryAttention.mistake("The scores are divided by sqrt(d_model): the dot product adds d_head numbers.")
class _(Usual):
    def scale(self, q):
        return len(self.w_q) ** -0.5


@GroupedQueryAttention.mistake("The keys are not rotated.")
class _(Usual):
    def stored(self, k, v, positions, cache):
        return (k, v) if cache is None else cache.update(k, v)


@GroupedQueryAttention.mistake("The values are rotated too: only queries and keys are.")
class _(Usual):
    def stored(self, k, v, positions, cache):
        return super().stored(k, self.turn(v, positions), positions, cache)


@GroupedQueryAttention.mistake("The cache gets repeated keys: share the heads after the cache, not before it.")
class _(Usual):
    def stored(self, k, v, positions, cache):
        return super().stored(*(self.share(a) if cache else a for a in (k, v)), positions, cache)


@GroupedQueryAttention.mistake("The cache is filled, but what it returns is not used: the old keys are not seen.")
class _(Usual):
    def stored(self, k, v, positions, cache):
        super().stored(k, v, positions, cache)
        return self.turn(k, positions), v


@GroupedQueryAttention.mistake("causal=True changes nothing.")
class _(Usual):
    def weights(self, scores, mask, causal):
        return super().weights(scores, mask, False)


@GroupedQueryAttention.mistake("The mask changes nothing.")
class _(Usual):
    def weights(self, scores, mask, causal):
        return super().weights(scores, None, causal)


@GroupedQueryAttention.mistake("The axes of heads and tokens were not swapped back before the heads were merged.")
class _(Usual):
    def join(self, out):
        return out.reshape(out.shape[0], out.shape[2], -1)
