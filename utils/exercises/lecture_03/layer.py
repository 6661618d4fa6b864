"""Lecture 03: self-attention whose queries and keys are turned, with a cache, as a PyTorch module."""

import math

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module

MODULE = "rotary"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


class Cache:
    """Keys and values, (batch, n_heads, length, d_head) each; it stays as it is, so that answers can be compared on it."""

    def __init__(self, k, v):
        self.k, self.v, self.length = k, v, k.shape[2]

    def update(self, k, v):
        return torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)

    def __repr__(self):
        return f"a cache that holds {self.length} tokens"


@module("3D", MODULE, make={"d_model": 8, "n_heads": 2}, importance="essential")
class RotaryAttention(nn.Module):  # the oracle: one head at a time, its pairs as complex numbers
    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"d_model must make n_heads heads of even size, got {d_model} and {n_heads}")
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        self.rates = base ** (-torch.arange(0, self.d_head, 2, dtype=torch.float64) / self.d_head)
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.zeros(d_model, d_model)))

    def turn(self, x, positions):
        half = x.shape[-1] // 2
        z = torch.complex(x[..., :half].double(), x[..., half:].double())
        z = z * torch.polar(torch.ones(1, dtype=torch.float64), positions.double()[:, None] * self.rates)
        return torch.cat([z.real, z.imag], dim=-1).to(x.dtype)

    def forward(self, x, positions=None, cache=None):
        n, d = x.shape[1], self.d_head
        stored = 0 if cache is None else cache.length
        places = torch.arange(n) + stored if positions is None else positions
        own = [slice(d * h, d * (h + 1)) for h in range(self.n_heads)]
        k = torch.stack([self.turn(x @ self.w_k[:, part], places) for part in own], 1)
        v = torch.stack([x @ self.w_v[:, part] for part in own], 1)
        if cache is not None:
            k, v = cache.update(k, v)
        allowed, out = torch.ones(n, k.shape[2], dtype=torch.bool).tril(k.shape[2] - n), 0
        for h, part in enumerate(own):
            scores = self.turn(x @ self.w_q[:, part], places) @ k[:, h].mT / math.sqrt(d)
            weights = torch.softmax(scores.masked_fill(~allowed, -math.inf), dim=-1)
            out = out + weights @ v[:, h] @ self.w_o[part]
        return out


@RotaryAttention.property(
    "parameters w_q, w_k, w_v and w_o with the shapes of the contract",
    hint="Which shape has each of the four?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=12, n_heads=3)


@RotaryAttention.property(
    "one token: no rotation shows, no mask", hint="What do the scores divide by, and what follows the merge of heads?"
)
def _(ask, rng):
    ask(tensor(rng, 1, 1, 8))
    ask(tensor(rng, 2, 1, 12), make={"d_model": 12, "n_heads": 3})


@RotaryAttention.property(
    "several tokens: queries and keys are turned, values are not",
    hint="Which two of the three are turned, before or after they are split into heads?",
)
def _(ask, rng):
    ask(3 * tensor(rng, 1, 3, 8))
    ask(3 * tensor(rng, 2, 5, 12), make={"d_model": 12, "n_heads": 3})


@RotaryAttention.property("nothing of the future", hint="Which option of attention_torch hides later keys?")
def _(ask, rng):
    ask(3 * tensor(rng, 2, 6, 8))


@RotaryAttention.property(
    "positions that are handed over, and another base", hint="Who turns by which positions, and where does base go?"
)
def _(ask, rng):
    ask(3 * tensor(rng, 2, 3, 8), positions=torch.tensor([2, 7, 9]))
    ask(3 * tensor(rng, 1, 4, 12), make={"d_model": 12, "n_heads": 2, "base": 100.0})


@RotaryAttention.property(
    "a cache: positions count on, and stored keys are not turned again",
    hint="What is the position of the first new token, with `cache.length` stored? What goes into `update`?",
)
def _(ask, rng):
    for n_new in (1, 2):
        k, v = tensor(rng, 1, 2, 3, 4), tensor(rng, 1, 2, 3, 4)
        ask(3 * tensor(rng, 1, n_new, 8), cache=Cache(2 * k, v))
        ask(3 * tensor(rng, 1, n_new, 8), positions=torch.arange(n_new) + 50, cache=Cache(2 * k, v))
    ask(3 * tensor(rng, 1, 3, 8), cache=Cache(torch.zeros(1, 2, 0, 4).double(), torch.zeros(1, 2, 0, 4).double()))


@RotaryAttention.property("gradients reach all parameters", hint="Which step leaves PyTorch's graph?")
def _(ask, rng):
    ask.gradients(tensor(rng, 2, 4, 8))


class Usual(nn.Module):
    """The layer in the usual way; a mistake replaces one method."""

    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError("heads of even size")
        self.n_heads, self.base = n_heads, base
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Parameter(torch.zeros(d_model, d_model)) for _ in range(4))

    def split(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def turn(self, x, places):
        d = x.shape[-1]
        angles = places[:, None].double() * self.base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        a, b, cos, sin = *x.chunk(2, dim=-1), angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def places(self, n, positions, cache):
        start = 0 if cache is None else cache.length
        return torch.arange(start, start + n) if positions is None else positions

    def turned(self, q, k, v, places):
        return self.turn(q, places), self.turn(k, places), v

    def stored(self, k, v, cache):
        return (k, v) if cache is None else cache.update(k, v)

    def heads(self, x, places):
        return self.turned(*(self.split(x @ w) for w in (self.w_q, self.w_k, self.w_v)), places)

    def scale(self, q):
        return q.shape[-1] ** -0.5

    def hidden(self, n, n_keys):
        return ~torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n)

    def join(self, out):
        return out.transpose(1, 2).flatten(2)

    def forward(self, x, positions=None, cache=None):
        q, k, v = self.heads(x, self.places(x.shape[1], positions, cache))
        k, v = self.stored(k, v, cache)
        scores = q @ k.mT * self.scale(q)
        scores = scores.masked_fill(self.hidden(*scores.shape[-2:]), -math.inf)
        return self.join(torch.softmax(scores, -1) @ v) @ self.w_o


@RotaryAttention.mistake("The values are turned too: only queries and keys are.")
class _(Usual):
    def turned(self, q, k, v, places):
        return self.turn(q, places), self.turn(k, places), self.turn(v, places)


@RotaryAttention.mistake("The keys are not turned.")
class _(Usual):
    def turned(self, q, k, v, places):
        return self.turn(q, places), k, v


@RotaryAttention.mistake("Nothing is turned.")
class _(Usual):
    def turned(self, q, k, v, places):
        return q, k, v


@RotaryAttention.mistake("Neighbouring columns are turned: the pairs are columns i and i + d_head / 2.")
class _(Usual):
    def turn(self, x, places):
        by_pairs = super().turn(x.unflatten(-1, (-1, 2)).mT.flatten(-2), places)
        return by_pairs.unflatten(-1, (2, -1)).mT.flatten(-2)


@RotaryAttention.mistake("The keys are turned after the cache: turn each by its own position, before it is stored.")
class _(Usual):
    def turned(self, q, k, v, places):
        return self.turn(q, places), k, v

    def stored(self, k, v, cache):
        k, v = super().stored(k, v, cache)
        return self.turn(k, torch.arange(k.shape[2])), v


@RotaryAttention.mistake("The rotation stands before the split: its pairs then reach over all heads.")
class _(Usual):
    def heads(self, x, places):
        q, k, v = (x @ w for w in (self.w_q, self.w_k, self.w_v))
        return [self.split(a) for a in (self.turn(q, places), self.turn(k, places), v)]


@RotaryAttention.mistake("With a cache the positions restart at 0: they count on after what it holds.")
class _(Usual):
    def places(self, n, positions, cache):
        return torch.arange(n) if positions is None else positions


@RotaryAttention.mistake("The positions that are handed over are not used.")
class _(Usual):
    def places(self, n, positions, cache):
        return super().places(n, None, cache)


@RotaryAttention.mistake("The cache is filled, but what it returns is not used: the old keys are not seen.")
class _(Usual):
    def stored(self, k, v, cache):
        super().stored(k, v, cache)
        return k, v


@RotaryAttention.mistake("base is not passed on: it is 10,000 always.")
class _(Usual):
    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__(d_model, n_heads)


@RotaryAttention.mistake("Later keys are seen: attention is causal here.")
class _(Usual):
    def hidden(self, n, n_keys):
        return torch.zeros(n, n_keys, dtype=torch.bool)


@RotaryAttention.mistake("The causal mask begins at the top left: the last query has to see all keys.")
class _(Usual):
    def hidden(self, n, n_keys):
        return ~torch.ones(n, n_keys, dtype=torch.bool).tril()


@RotaryAttention.mistake("The scores are not scaled: divide them by sqrt(d_head).")
class _(Usual):
    def scale(self, q):
        return 1.0


@RotaryAttention.mistake("The axes of heads and tokens were not swapped back before the heads were merged.")
class _(Usual):
    def join(self, out):
        return out.reshape(out.shape[0], out.shape[2], -1)
