"""Lecture 06: self-attention on texts that are packed one behind the other, as a PyTorch module."""

import math

import numpy as np
import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module
from utils.judge.result import Failed

MODULE = "flash"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


def begins(*lengths):
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


@module("6E", MODULE, make={"d_model": 6, "n_heads": 2}, importance="useful")
class PackedSelfAttention(nn.Module):  # the oracle: one token at a time
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.zeros(d_model, d_model)))

    def forward(self, x, starts):
        rows, borders = [], starts.tolist()
        for begin, end in zip(borders, borders[1:]):
            for i in range(begin, end):
                found = []
                for h in range(self.n_heads):
                    own = slice(h * self.d_head, (h + 1) * self.d_head)
                    q, keys = x[i] @ self.w_q[:, own], x[begin : i + 1] @ self.w_k[:, own]
                    scores = keys @ q / math.sqrt(self.d_head)
                    powers = torch.exp(scores - scores.max())
                    found.append(powers @ (x[begin : i + 1] @ self.w_v[:, own]) / powers.sum())
                rows.append(torch.cat(found) @ self.w_o)
        return torch.stack(rows)


@PackedSelfAttention.property(
    "parameters w_q, w_k, w_v and w_o with the shapes of the contract",
    hint="How large is a matrix that makes all heads out of d_model columns?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=12, n_heads=3)


@PackedSelfAttention.property(
    "one text: causal self-attention", hint="Which axis do heads stand on, and what undoes the split?"
)
def _(ask, rng):
    ask(tensor(rng, 4, 6), begins(4))
    ask(tensor(rng, 5, 12), begins(5), make={"d_model": 12, "n_heads": 3})


@PackedSelfAttention.property(
    "two texts do not see each other", hint="Which keys does the first token of the second text see?"
)
def _(ask, rng):
    ask(tensor(rng, 5, 6), begins(2, 3))


@PackedSelfAttention.property(
    "many texts, of one token too, and empty ones", hint="How many parts are there, and what is an empty slice?"
)
def _(ask, rng):
    ask(tensor(rng, 9, 6), begins(1, 5, 0, 3))
    ask(tensor(rng, 3, 6), begins(1, 1, 1))


@PackedSelfAttention.property("one head, and as many as columns", hint="How wide is a head?")
def _(ask, rng):
    for n_heads in (1, 6):
        ask(tensor(rng, 5, 6), begins(3, 2), make={"d_model": 6, "n_heads": n_heads})


@PackedSelfAttention.property(
    "gradients reach every parameter and the input",
    hint="Where does the computation leave torch: detach, .data, NumPy?",
)
def _(ask, rng):
    ask.gradients(tensor(rng, 5, 6), begins(2, 3))


@PackedSelfAttention.property(
    "float32, large scores, texts longer than a tile", hint="Does anything that you make have a float type of its own?"
)
def _(ask, rng):
    out = ask(20 * tensor(rng, 80, 6).float(), begins(70, 10))
    if not np.isfinite(out).all():
        raise Failed("some of the output is not finite")


class Usual(nn.Module):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Parameter(torch.zeros(d_model, d_model)) for _ in range(4))

    def split(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(0, 1)

    def allowed(self, starts):
        text = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        return (text[:, None] == text).tril()

    def scale(self, q):
        return q.shape[-1] ** -0.5

    def join(self, out):
        return out.transpose(0, 1).flatten(1)

    def forward(self, x, starts):
        q, k, v = (self.split(x @ w) for w in (self.w_q, self.w_k, self.w_v))
        scores = (self.scale(q) * q @ k.mT).masked_fill(~self.allowed(starts), -math.inf)
        return self.join(torch.softmax(scores, -1) @ v) @ self.w_o


@PackedSelfAttention.mistake("The texts see each other: attend to the rows of the own text only.")
class _(Usual):
    def allowed(self, starts):
        return torch.ones(int(starts[-1]), int(starts[-1]), dtype=torch.bool).tril()


@PackedSelfAttention.mistake("A token sees later ones of its text: causal=True.")
class _(Usual):
    def allowed(self, starts):
        own = super().allowed(starts)
        return own | own.T


@PackedSelfAttention.mistake("The columns are dealt out: head h has the columns from h * d_head on.")
class _(Usual):
    def split(self, x):
        return x.unflatten(-1, (-1, self.n_heads)).movedim(-1, 0)

    def join(self, out):
        return out.movedim(0, -1).flatten(1)


@PackedSelfAttention.mistake("The axes of heads and tokens were not swapped back before the heads were merged.")
class _(Usual):
    def join(self, out):
        return out.reshape(out.shape[1], -1)


@PackedSelfAttention.mistake("All columns are one head here: split them first.")
class _(Usual):
    def split(self, x):
        return x[None]


@PackedSelfAttention.mistake("The scores are divided by sqrt(d_model): the dot product adds d_head numbers.")
class _(Usual):
    def scale(self, q):
        return len(self.w_q) ** -0.5


@PackedSelfAttention.mistake("What the heads found is not multiplied by w_o.")
class _(Usual):
    def forward(self, x, starts):
        q, k, v = (self.split(x @ w) for w in (self.w_q, self.w_k, self.w_v))
        scores = (self.scale(q) * q @ k.mT).masked_fill(~self.allowed(starts), -math.inf)
        return self.join(torch.softmax(scores, -1) @ v) + 0 * self.w_o.sum()
