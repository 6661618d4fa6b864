"""Answers to the exercises of lecture 11 in PyTorch, a layer and a real model's attention, as in answers.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from attention.differential import DifferentialWeights
from attention.multi_head import masked_softmax, merge_heads
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 11B -------------------------------------------------------------------------------------------------------------


class TwoCalls(DifferentialWeights):
    """Two attentions over the same values, then the subtraction. The wrong ones override one method."""

    @property
    def lam(self):
        products = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        return products[0].exp() - products[1].exp() + self.lambda_init

    def maps(self, q, k, mask, causal):
        return masked_softmax(q @ k.mT * q.shape[-1] ** -0.5, mask, causal)

    def split(self, heads):
        return heads.unflatten(1, (-1, 2)).unbind(2)

    def after(self, heads):
        return self.norm(heads) * self.factor

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        q, k, v = self.project(x, positions, cache)
        first, second = (self.maps(a, b, mask, causal) @ v for a, b in zip(self.split(q), self.split(k)))
        return merge_heads(self.after(first - self.lam * second)) @ self.w_o


RIGHT.setdefault("11B", []).append(TwoCalls)


@right("11B")
class OwnNorm(TwoCalls):
    """The norm and the subtraction written out."""

    def after(self, heads):
        size = torch.sqrt((heads * heads).mean(dim=-1, keepdim=True) + 1e-5)
        return heads * self.norm.weight / size * (1 - self.lambda_init)


@wrong("11B", "a parameter too many")
class OneMore(TwoCalls):
    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.other_norm = nn.RMSNorm(4)


@wrong("11B", "in this contract 2i and 2i + 1 are")
class ByHalves(TwoCalls):
    def split(self, heads):
        return heads.chunk(2, dim=1)


@wrong("11B", "The norm is missing")
class NoNorm(TwoCalls):
    def after(self, heads):
        return heads * self.factor


@wrong("11B", "The factor is missing")
class NoFactor(TwoCalls):
    def after(self, heads):
        return self.norm(heads)


@wrong("11B", "it is 1 - lambda_init, a constant")
class TheOtherFactor(TwoCalls):
    def after(self, heads):
        return self.norm(heads) * (1 - self.lam)


@wrong("11B", "lambda_init is not added")
class NoInit(TwoCalls):
    @property
    def lam(self):
        return (self.lambda_q1 @ self.lambda_k1).exp() - (self.lambda_q2 @ self.lambda_k2).exp()


@wrong("11B", "first the sum over d_head, then exp")
class ExponentialsOfProducts(TwoCalls):
    @property
    def lam(self):
        products = (self.lambda_q1 * self.lambda_k1).exp(), (self.lambda_q2 * self.lambda_k2).exp()
        return products[0].sum() - products[1].sum() + self.lambda_init


@wrong("11B", "gradients reach every weight")
class FixedLambda(TwoCalls):
    @property
    def lam(self):
        return super().lam.item()


@wrong("11B", "sqrt(2 d_head)")
class WidthOfTheValues(TwoCalls):
    def maps(self, q, k, mask, causal):
        return masked_softmax(q @ k.mT * (2 * q.shape[-1]) ** -0.5, mask, causal)


@wrong("11B", "several tokens")
class ScaleFivePercentOff(TwoCalls):
    def maps(self, q, k, mask, causal):
        return masked_softmax(1.05 * q @ k.mT * q.shape[-1] ** -0.5, mask, causal)


@wrong("11B", "The mask is not used")
class NoMask(TwoCalls):
    def maps(self, q, k, mask, causal):
        return super().maps(q, k, None, causal)


@wrong("11B", "positions are not handed on")
class NoPositions(TwoCalls):
    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        return super().forward(x, mask, causal)


@wrong("11B", "all at once")
class NotShifted(TwoCalls):
    def maps(self, q, k, mask, causal):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
        seen = seen.tril() if causal else seen
        p = scores.exp() * (seen if mask is None else seen & mask)
        return p / p.sum(-1, keepdim=True).clamp_min(1e-300 if p.dtype == torch.float64 else 1e-30)


# --- 11F -------------------------------------------------------------------------------------------------------------


def seen_of(q, k):
    n, m = q.shape[-2], k.shape[-2]
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


@right("11F")
def from_the_whole_softmax(q, k, v):
    p = F.softmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen_of(q, k), -math.inf), -1)
    return p @ v, p[..., 1:].sum(-1)


@right("11F")
def with_logaddexp(q, k, v):
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen_of(q, k), -math.inf)
    lse = torch.logsumexp(scores[..., 1:], -1)
    total = torch.logaddexp(lse, scores[..., 0])
    out = (scores[..., 1:] - total[..., None]).exp() @ v[..., 1:, :]
    return out + (scores[..., :1] - total[..., None]).exp() * v[..., :1, :], (lse - total).exp()


def changed(q, k, v, scale=1.0, sign=1, seen=None, back=1.0):
    seen = seen_of(q, k) if seen is None else seen
    scores = scale * q @ k.mT / math.sqrt(q.shape[-1])
    others = scores[..., 1:].masked_fill(~seen[:, 1:], -math.inf)
    gate = torch.sigmoid(sign * (torch.logsumexp(others, -1) - scores[..., 0]))
    out = masked_softmax(scores[..., 1:], seen[:, 1:]) @ v[..., 1:, :]
    return gate[..., None] * out + back * (1 - gate)[..., None] * v[..., :1, :], gate


@wrong("11F", "The first token's value does not come back")
def pure_gate(q, k, v):
    return changed(q, k, v, back=0.0)


@wrong("11F", "The sigmoid's sign is wrong")
def other_sign(q, k, v):
    return changed(q, k, v, sign=-1)


@wrong("11F", "The mask is missing")
def everything_seen(q, k, v):
    return changed(q, k, v, seen=torch.ones_like(seen_of(q, k)))


@wrong("11F", "top left")
def from_the_top(q, k, v):
    return changed(q, k, v, seen=seen_of(q, k).new_ones(q.shape[-2], k.shape[-2]).tril())


@wrong("11F", "The LSE has the first token's score in it")
def lse_of_all(q, k, v):
    scores, seen = q @ k.mT / math.sqrt(q.shape[-1]), seen_of(q, k)
    gate = torch.sigmoid(torch.logsumexp(scores.masked_fill(~seen, -math.inf), -1) - scores[..., 0])
    out = masked_softmax(scores[..., 1:], seen[:, 1:]) @ v[..., 1:, :]
    return gate[..., None] * out + (1 - gate)[..., None] * v[..., :1, :], gate


@wrong("11F", "The LSE has later keys in it")
def lse_of_later_keys(q, k, v):
    scores, seen = q @ k.mT / math.sqrt(q.shape[-1]), seen_of(q, k)
    gate = torch.sigmoid(torch.logsumexp(scores[..., 1:], -1) - scores[..., 0])
    out = masked_softmax(scores[..., 1:], seen[:, 1:]) @ v[..., 1:, :]
    return gate[..., None] * out + (1 - gate)[..., None] * v[..., :1, :], gate


@wrong("11F", "the scale is in every score")
def five_percent_off(q, k, v):
    return changed(q, k, v, scale=1.05 if q.shape[-1] == 9 else 1.0)


@wrong("11F", "gate 0")
def nan_in_the_first_row(q, k, v):
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen_of(q, k), -math.inf)
    out = torch.softmax(scores[..., 1:], -1) @ v[..., 1:, :]
    gate = torch.sigmoid(torch.logsumexp(scores[..., 1:], -1) - scores[..., 0])
    return gate[..., None] * out + (1 - gate)[..., None] * v[..., :1, :], gate


@wrong("11F", "all at once")
def logs_of_sums(q, k, v):
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen_of(q, k), -math.inf)
    total = scores.exp().sum(-1, keepdim=True)
    p = scores.exp() / total
    return p @ v, p[..., 1:].sum(-1)
