"""Answers to the exercises of lecture 03 in PyTorch, a layer and a loss, as in answers.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 3D --------------------------------------------------------------------------------------------------------------


class Base(nn.Module):
    """With torch's own attention and complex numbers, in parts that a wrong answer replaces."""

    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__()
        if n_heads < 1 or d_model % n_heads or d_model // n_heads % 2:
            raise ValueError(f"{d_model} columns do not make {n_heads} heads of even size")
        self.d_head, self.base = d_model // n_heads, base
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.randn(d_model, d_model) / math.sqrt(d_model)))

    def split(self, x):
        return x.view(*x.shape[:2], -1, self.d_head).permute(0, 2, 1, 3)

    def turn(self, x, places):
        half = x.shape[-1] // 2
        rates = self.base ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = places.double()[:, None] * rates
        z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1).to(x.dtype)

    def start(self, cache):
        return cache.length if cache is not None else 0

    def forward(self, x, positions=None, cache=None):
        n, start = x.shape[1], self.start(cache)
        if positions is None:
            positions = torch.arange(n) + start
        q, k, v = (self.split(x @ w) for w in (self.w_q, self.w_k, self.w_v))
        return self.rest(self.turn(q, positions), k, v, positions, cache)

    def rest(self, q, k, v, positions, cache):
        k = self.turn(k, positions)
        if cache is not None:
            k, v = cache.update(k, v)
        return self.attend(q, k, v)

    def attend(self, q, k, v):
        n, n_keys = q.shape[2], k.shape[2]
        allowed = torch.arange(n_keys) <= torch.arange(n)[:, None] + n_keys - n
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return out.transpose(1, 2).flatten(2) @ self.w_o


right("3D")(Base)


@right("3D")
class WithCosAndSin(Base):
    def turn(self, x, places):
        angles = torch.outer(places.double(), self.base ** (-torch.arange(0, self.d_head, 2).double() / self.d_head))
        cos, sin = (f(torch.cat([angles, angles], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        a, b = x.tensor_split(2, dim=-1)
        return x * cos + torch.cat([-b, a], -1) * sin


@wrong("3D", "they count on after what it holds")
class Restarted(Base):
    def start(self, cache):
        return 0


@wrong("3D", "The values are turned too")
class ValuesTurned(Base):
    def rest(self, q, k, v, positions, cache):
        return super().rest(q, k, self.turn(v, positions), positions, cache)


@wrong("3D", "The keys are turned after the cache")
class TurnedAfterTheCache(Base):
    def rest(self, q, k, v, positions, cache):
        if cache is not None:
            k, v = cache.update(k, v)
        return self.attend(q, self.turn(k, torch.arange(k.shape[2])), v)


@wrong("3D", "Neighbouring columns are turned")
class PairsOfNeighbours(Base):
    def turn(self, x, places):
        n = x.shape[-1] // 2
        angles = places.double()[:, None] * self.base ** (-torch.arange(n, dtype=torch.float64) / n)
        a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@wrong("3D", "base is not passed on")
class OneBase(Base):
    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__(d_model, n_heads)


@wrong("3D", "the parameter w_o")
class NoOutput(Base):
    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__(d_model, n_heads, base)
        del self.w_o


@wrong("3D", "gradients reach all parameters")
class Detached(Base):
    def turn(self, x, places):
        return super().turn(x.detach(), places)


@wrong("3D", "Later keys are seen")
class SeesAll(Base):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ self.w_o


# --- 3E --------------------------------------------------------------------------------------------------------------


def places_of(ids, n_prompt, gap):
    n = ids.shape[1]
    return torch.cat([torch.arange(n_prompt), torch.arange(n_prompt, n) + gap])


@right("3E")
def by_gather(model, ids, n_prompt, gap):
    chances = model(ids, positions=places_of(ids, n_prompt, gap)).log_softmax(-1)
    right_ones = chances[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return -right_ones[:, n_prompt:].mean()


@right("3E")
def flattened(model, ids, n_prompt, gap):
    logits = model(ids, positions=places_of(ids, n_prompt, gap))
    rows = logits[:, n_prompt:-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, ids[:, n_prompt + 1 :].reshape(-1))


@wrong("3E", "does the graph lead from it back to the model?")
def a_number(model, ids, n_prompt, gap):
    return by_gather(model, ids, n_prompt, gap).item()


@wrong("3E", "does the graph lead from it back to the model?")
def an_array(model, ids, n_prompt, gap):
    return by_gather(model, ids, n_prompt, gap).detach().numpy()


@wrong("3E", "does the graph lead from it back to the model?")
@torch.no_grad()
def without_a_graph(model, ids, n_prompt, gap):
    return by_gather(model, ids, n_prompt, gap)


@wrong("3E", "its prediction is made before the gap")
def from_the_prompt(model, ids, n_prompt, gap):
    logits = model(ids, positions=places_of(ids, n_prompt, gap))
    return F.cross_entropy(logits[:, n_prompt - 1 : -1].mT, ids[:, n_prompt:])


@wrong("3E", "No distance has changed")
def no_gap(model, ids, n_prompt, gap):
    return F.cross_entropy(model(ids)[:, n_prompt:-1].mT, ids[:, n_prompt + 1 :])


@wrong("3E", "No distance has changed")
def everything_moved(model, ids, n_prompt, gap):
    logits = model(ids, positions=torch.arange(ids.shape[1]) + gap)
    return F.cross_entropy(logits[:, n_prompt:-1].mT, ids[:, n_prompt + 1 :])


@wrong("3E", "take the mean")
def a_sum(model, ids, n_prompt, gap):
    return by_gather(model, ids, n_prompt, gap) * (ids.shape[1] - n_prompt - 1) * len(ids)


@wrong("3E", "There is a nan")
def by_exp(model, ids, n_prompt, gap):
    powers = model(ids, positions=places_of(ids, n_prompt, gap)).exp()
    chances = (powers / powers.sum(-1, keepdim=True))[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return -chances[:, n_prompt:].log().mean()


@wrong("3E", "Over which axis")
def first_text_only(model, ids, n_prompt, gap):
    return by_gather(model, ids[:1], n_prompt, gap)
