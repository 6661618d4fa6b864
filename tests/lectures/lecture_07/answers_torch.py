"""Answers to the exercises of lecture 07 in PyTorch, the indexer and its training step, as in answers.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 7D --------------------------------------------------------------------------------------------------------------


@right("7D")
class WithEinsum(nn.Module):
    def __init__(self, d_model, n_heads, d_index):
        super().__init__()
        self.n_heads, self.d_index = n_heads, d_index
        self.query = nn.Linear(d_model, n_heads * d_index, bias=False)
        self.key = nn.Linear(d_model, d_index, bias=False)
        self.norm = nn.LayerNorm(d_index, eps=1e-6)
        self.weight = nn.Linear(d_model, n_heads, bias=False)
        self.scale = d_index**-0.5

    def score(self, q, k, w):
        return torch.einsum("...th,...ths->...ts", w, torch.relu(torch.einsum("...thd,...sd->...ths", q, k)))

    def forward(self, x, causal=False):
        q = self.query(x).reshape(*x.shape[:-1], self.n_heads, self.d_index) * self.scale
        scores = self.score(q, self.norm(self.key(x)), self.weight(x) / self.n_heads**0.5)
        if causal:
            n = x.shape[-2]
            scores = scores + torch.full((n, n), -math.inf, dtype=x.dtype).triu(1)
        return scores


@right("7D")
class HeadByHead(WithEinsum):
    def score(self, q, k, w):
        parts = [w[..., j, None] * (q[..., j, :] @ k.mT).clamp_min(0) for j in range(self.n_heads)]
        return torch.stack(parts).sum(0)


@wrong("7D", "The ReLU is missing")
class NoRelu(WithEinsum):
    def score(self, q, k, w):
        return torch.einsum("...th,...thd,...sd->...ts", w, q, k)


@wrong("7D", "with copied weights, the same scores")
class ScaleFivePercentOff(WithEinsum):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale *= 1.05


@wrong("7D", "a parameter too many")
class WithBias(WithEinsum):
    def __init__(self, d_model, n_heads, d_index):
        super().__init__(d_model, n_heads, d_index)
        self.weight = nn.Linear(d_model, n_heads)


@wrong("7D", "is missing")
class OtherNames(nn.Module):
    def __init__(self, d_model, n_heads, d_index):
        super().__init__()
        self.wq, self.wk = nn.Linear(d_model, n_heads * d_index), nn.Linear(d_model, d_index)


@wrong("7D", "the contract says eps=1e-6")
class DefaultEps(WithEinsum):
    def __init__(self, d_model, n_heads, d_index):
        super().__init__(d_model, n_heads, d_index)
        self.norm = nn.LayerNorm(d_index)


@wrong("7D", "causal=True changes nothing")
class NeverCausal(WithEinsum):
    def forward(self, x, causal=False):
        return super().forward(x)


@wrong("7D", "gradients reach every parameter")
class Detached(WithEinsum):
    def score(self, q, k, w):
        return super().score(q, k.detach(), w)


@wrong("7D", "any number of axes in front")
class ThreeAxesOnly(WithEinsum):
    def score(self, q, k, w):
        return torch.einsum("bth,bths->bts", w, torch.relu(torch.einsum("bthd,bsd->bths", q, k)))


# --- 7E --------------------------------------------------------------------------------------------------------------


@right("7E")
def with_kl_div(indexer, optimiser, x, p):
    logs = F.log_softmax(indexer(x), dim=-1)
    loss = F.kl_div(logs, p, reduction="sum") / p[..., 0].numel()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


@right("7E")
def entropy_apart(indexer, optimiser, x, p):
    scores = indexer(x)
    optimiser.zero_grad(set_to_none=True)
    cross = -(p * (scores - scores.logsumexp(-1, keepdim=True))).sum(-1)
    entropy = torch.special.entr(p).sum(-1)
    loss = (cross - entropy).mean()
    loss.backward()
    optimiser.step()
    return loss.item()


def stepped(indexer, optimiser, x, p, loss_of):
    loss = loss_of(indexer(x), p)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@wrong("7E", "The mean is over single weights")
def mean_of_kl_div(indexer, optimiser, x, p):
    return stepped(indexer, optimiser, x, p, lambda s, p: F.kl_div(s.log_softmax(-1), p))


@wrong("7E", "The rows of a batch are summed")
def batchmean(indexer, optimiser, x, p):
    return stepped(indexer, optimiser, x, p, lambda s, p: F.kl_div(s.log_softmax(-1), p, reduction="batchmean"))


@wrong("7E", "The divergence is turned round")
def turned_round(indexer, optimiser, x, p):
    return stepped(
        indexer,
        optimiser,
        x,
        p,
        lambda s, p: (s.softmax(-1) * (s.log_softmax(-1) - (p + 1e-30).log())).sum(-1).mean(),
    )


@wrong("7E", "a weight of 0 adds 0")
def nan_at_zero(indexer, optimiser, x, p):
    return stepped(indexer, optimiser, x, p, lambda s, p: (p * (p.log() - s.log_softmax(-1))).sum(-1).mean())


@wrong("7E", "scores of 1e4 do not overflow")
def log_of_softmax(indexer, optimiser, x, p):
    return stepped(
        indexer, optimiser, x, p, lambda s, p: (torch.xlogy(p, p) - torch.xlogy(p, s.softmax(-1))).sum(-1).mean()
    )


@wrong("7E", "This is the cross-entropy")
def cross_entropy(indexer, optimiser, x, p):
    return stepped(indexer, optimiser, x, p, lambda s, p: F.cross_entropy(s.flatten(0, -2), p.flatten(0, -2)))


@wrong("7E", "one step: loss and weights")
def temperature_of_1_05(indexer, optimiser, x, p):
    return stepped(
        indexer, optimiser, x, p, lambda s, p: (torch.xlogy(p, p) - p * (1.05 * s).log_softmax(-1)).sum(-1).mean()
    )


@wrong("7E", "The gradients of the step before are still there")
def nothing_zeroed(indexer, optimiser, x, p):
    loss = F.kl_div(indexer(x).log_softmax(-1), p, reduction="sum") / p[..., 0].numel()
    loss.backward()
    optimiser.step()
    return loss.item()


@wrong("7E", "any shape, any optimiser")
def an_optimiser_of_its_own(indexer, optimiser, x, p):
    loss = F.kl_div(indexer(x).log_softmax(-1), p, reduction="sum") / p[..., 0].numel()
    optimiser.zero_grad()
    loss.backward()
    torch.optim.SGD(indexer.parameters(), lr=optimiser.param_groups[0]["lr"]).step()
    return loss.item()
