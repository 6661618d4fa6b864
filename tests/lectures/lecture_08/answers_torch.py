"""Answers to the exercises of lecture 08 in PyTorch, a layer and a step of uptraining, as in answers.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 8D --------------------------------------------------------------------------------------------------------------


def matrices(module, d_model, n_heads, n_kv_heads):
    d_kv = d_model // n_heads * n_kv_heads
    for name, columns in (("w_q", d_model), ("w_k", d_kv), ("w_v", d_kv), ("w_o", d_model)):
        setattr(module, name, nn.Parameter(torch.randn(d_model, columns) / math.sqrt(d_model)))


@right("8D")
class WithPytorchsGroups(nn.Module):
    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        self.n_heads, self.d_head, self.positions = n_heads, d_model // n_heads, positions
        matrices(self, d_model, n_heads, n_kv_heads)

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        batch, n, _ = x.shape
        q, k, v = (
            x.matmul(w).view(batch, n, -1, self.d_head).permute(0, 2, 1, 3) for w in (self.w_q, self.w_k, self.w_v)
        )
        if self.positions is not None:
            places = torch.arange(n) if positions is None else positions
            q, k = self.positions.rotate(q, places), self.positions.rotate(k, places)
        if cache is not None:
            k, v = cache.update(k, v)
        allowed = mask
        if causal:
            triangle = torch.ones(n, k.shape[2], dtype=torch.bool).tril(k.shape[2] - n)
            allowed = triangle if mask is None else mask & triangle
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return out.permute(0, 2, 1, 3).reshape(batch, n, -1) @ self.w_o


class Base(nn.Module):
    """With einsum, in parts that a wrong answer replaces."""

    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_model // n_heads
        self.positions = positions
        matrices(self, d_model, n_heads, n_kv_heads)

    def turn(self, x, places):
        return self.positions.rotate(x, places) if self.positions is not None else x

    def heads(self, x, w):
        return (x @ w).unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def scores(self, q, k):
        return torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (self.n_kv_heads, -1)), k) * self.d_head**-0.5

    def blend(self, weights, v):
        return torch.einsum("bhgij,bhjd->bhgid", weights, v).flatten(1, 2)

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        places = torch.arange(x.shape[1]) if positions is None else positions
        q, k, v = (self.heads(x, w) for w in (self.w_q, self.w_k, self.w_v))
        q, k = self.turn(q, places), self.turn(k, places)
        if cache is not None:
            k, v = cache.update(k, v)
        scores = self.scores(q, k)
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if causal:
            allowed = allowed.tril(scores.shape[-1] - scores.shape[-2])
        if mask is not None:
            allowed = allowed & mask
        if allowed.dim() == 4:
            allowed = allowed.expand(-1, self.n_heads, -1, -1).unflatten(1, (self.n_kv_heads, -1))
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return self.blend(weights, v).transpose(1, 2).flatten(2) @ self.w_o


right("8D")(Base)


@wrong("8D", "w_k has the shape")
class AsManyKeysAsQueries(Base):
    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__(d_model, n_heads, n_heads, positions)


@wrong("8D", "is missing")
class WithLinearLayers(nn.Module):
    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        self.query, self.key = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)


@wrong("8D", "w_q begins with numbers of size 2e+01, expected about 0.06")
class BeginsTooLarge(Base):
    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__(d_model, n_heads, n_kv_heads, positions)
        for matrix in self.parameters():
            matrix.data *= d_model


@wrong("8D", "the same output")
class ScaleFivePercentOff(Base):
    def scores(self, q, k):
        return 1.05 * super().scores(q, k)


@wrong("8D", "neighbours share a key head")
class DealtOut(Base):
    def scores(self, q, k):
        n_q = q.shape[1] // k.shape[1]
        return torch.einsum("bhid,bhjd->bhij", q, k.repeat(1, n_q, 1, 1)).unflatten(
            1, (self.n_kv_heads, -1)
        ) / math.sqrt(self.d_head)

    def blend(self, weights, v):
        return weights.flatten(1, 2) @ v.repeat(1, self.n_heads // self.n_kv_heads, 1, 1)


@wrong("8D", "divided by sqrt(d_model)")
class DividedByTheModel(Base):
    def scores(self, q, k):
        return super().scores(q, k) * math.sqrt(self.d_head / (self.d_head * self.n_heads))


@wrong("8D", "with which places?")
class PlacesIgnored(Base):
    def turn(self, x, places):
        return super().turn(x, torch.arange(x.shape[2]))


@wrong("8D", "In which order do rotate, cache and sharing stand?")
class CachedBeforeTheRotation(Base):
    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        if cache is None:
            return super().forward(x, mask, causal, positions)
        plain, self.positions = self.positions, None
        out = super().forward(x, mask, causal, positions, cache)
        self.positions = plain
        return out


@wrong("8D", "gradients reach every parameter")
class Detached(Base):
    def blend(self, weights, v):
        return super().blend(weights, v.detach())


# --- 8E --------------------------------------------------------------------------------------------------------------


@right("8E")
def flattened(model, optimiser, ids):
    optimiser.zero_grad(set_to_none=True)
    logits = model(ids)[:, :-1]
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm=1.0)
    optimiser.step()
    return float(loss)


@right("8E")
def by_hand(model, optimiser, ids):
    predicted = torch.log_softmax(model(ids[:, :-1]), dim=-1)
    loss = -predicted.gather(2, ids[:, 1:].unsqueeze(2)).mean()
    for p in model.parameters():
        p.grad = None
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads))
    for g in grads:
        g /= max(norm, 1.0)
    optimiser.step()
    return loss.detach().item()


def step_with(loss, zero=True, norm=1.0, returned=float):
    """A step that is right but for what is given."""

    def answer(model, optimiser, ids):
        value = loss(model, ids)
        if zero:
            optimiser.zero_grad()
        value.backward()
        if norm:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimiser.step()
        return returned(value)

    return answer


def next_token(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])


WRONG["8E"] = [
    (step_with(lambda model, ids: F.cross_entropy(model(ids).mT, ids)), "the right answer is the next token"),
    (step_with(lambda model, ids: F.cross_entropy(model(ids[:, :-1]), ids[:, 1:])), "Error"),
    (step_with(next_token, zero=False), "The gradients of the step before are still there"),
    (step_with(next_token, norm=None), "not clipped"),
    (step_with(next_token, norm=1.05), "all gradients clipped to norm 1"),
    (step_with(lambda model, ids: F.cross_entropy(model(ids[:, 1:]).mT, ids[:, :-1])), "the wrong way"),
    (step_with(lambda model, ids: 1.05 * next_token(model, ids)), "one step: loss and weights"),
]


@wrong("8E", "what is frozen stays")
def frozen_moves_too(model, optimiser, ids):
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
    loss = next_token(model, ids)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    for p in frozen:
        p.requires_grad_(False)
    return loss.item()


@wrong("8E", "any sizes, any optimiser")
def an_optimiser_of_its_own(model, optimiser, ids):
    loss = next_token(model, ids)
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return loss.item()
