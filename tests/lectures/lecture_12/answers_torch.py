"""Answers to the exercises of lecture 12 in PyTorch, a layer, two ways to balance it and a test, as in answers.py."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from attention.mixture import RoutedWeights
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 12C -------------------------------------------------------------------------------------------------------------


@wrong("12C", "times as much")
class DenseWithAMask(RoutedWeights):
    """All experts for all tokens; gates with zeros take them out."""

    def weigh(self, logits):
        top, chosen = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen, F.softmax(top, dim=-1))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=self.causal)

    def turn(self, q, k):
        places = torch.arange(q.shape[2])
        return self.positions.rotate(q, places), self.positions.rotate(k, places)

    def forward(self, x, causal=True):
        self.causal = causal
        w_q, w_o = self.experts()
        q = torch.einsum("bnd,edh->benh", x, w_q)
        q, k = self.turn(q, (x @ self.w_k).unsqueeze(1))
        heads = self.attend(q, k, (x @ self.w_v).unsqueeze(1))
        return torch.einsum("bne,benh,ehd->bnd", self.weigh(x @ self.w_router), heads, w_o)


@right("12C")
class TokensByExpert(DenseWithAMask):
    """Each expert gets a matrix of its own tokens, and gives back a matrix."""

    def forward(self, x, causal=True):
        self.causal = causal
        b, n, _ = x.shape
        top, chosen = (x @ self.w_router).topk(self.top_k)
        gates, (w_q, w_o) = top.softmax(-1), self.experts()
        q = x.new_zeros(b, n, self.top_k, w_q.shape[-1])
        for e in range(self.n_experts):
            text, token, slot = torch.nonzero(chosen == e, as_tuple=True)
            q[text, token, slot] = x[text, token] @ w_q[e]
        q, k = self.turn(q.transpose(1, 2), (x @ self.w_k)[:, None])
        heads, out = self.attend(q, k, (x @ self.w_v)[:, None]), torch.zeros_like(x)
        for e in range(self.n_experts):
            text, token, slot = torch.nonzero(chosen == e, as_tuple=True)
            out[text, token] += gates[text, token, slot][:, None] * (heads[text, slot, token] @ w_o[e])
        return out


@wrong("12C", "times as much")
class AllHeadsAttend(DenseWithAMask):
    """Queries and outputs are made for the chosen only; between them every expert attends, with queries of zeros."""

    def forward(self, x, causal=True):
        self.causal = causal
        gates, (w_q, w_o) = self.weigh(x @ self.w_router), self.experts()
        q = x.new_zeros(*x.shape[:2], self.n_experts, w_q.shape[-1])
        for e, own in enumerate((gates != 0).unbind(-1)):
            q[:, :, e][own] = x[own] @ w_q[e]
        q, k = self.turn(q.transpose(1, 2), (x @ self.w_k)[:, None])
        heads, out = self.attend(q, k, (x @ self.w_v)[:, None]), torch.zeros_like(x)
        for e, own in enumerate((gates != 0).unbind(-1)):
            out[own] += gates[..., e][own][:, None] * (heads[:, e][own] @ w_o[e])
        return out


@wrong("12C", "times as much")
class DenseBySums(DenseWithAMask):
    """All experts for all tokens, without a matrix product: numbers are multiplied and summed."""

    def forward(self, x, causal=True):
        w_q, w_o = self.experts()
        q = (x[:, None, :, :, None] * w_q[:, None]).sum(-2)
        q, k = self.turn(q, (x @ self.w_k)[:, None])
        s = (q[..., :, None, :] * k[..., None, :, :]).sum(-1) / math.sqrt(q.shape[-1])
        if causal:
            s = s.masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -math.inf)
        p = s.softmax(-1)
        heads = (p[..., None] * (x @ self.w_v)[:, None, None]).sum(-2)
        out = (heads[..., None] * w_o[:, None]).sum(-2)
        return (self.weigh(x @ self.w_router).mT[..., None] * out).sum(1)


@right("12C")
class GatheredMatrices(RoutedWeights):
    """The matrices of each slot's expert are gathered: no loop, much memory."""

    def forward(self, x, causal=True):
        b, n, _ = x.shape
        top, chosen = (x @ self.w_router).topk(self.top_k)
        w_q, w_o = self.experts()
        q = torch.einsum("bnd,bnsdh->bsnh", x, w_q[chosen])
        places = torch.arange(n)
        q, k = self.positions.rotate(q, places), self.positions.rotate((x @ self.w_k)[:, None], places)
        s = q @ k.mT / math.sqrt(q.shape[-1])
        if causal:
            s = s.masked_fill(~torch.ones(n, n).tril().bool(), -math.inf)
        heads = s.softmax(-1) @ (x @ self.w_v)[:, None]
        return torch.einsum("bns,bsnh,bnshd->bnd", top.softmax(-1), heads, w_o[chosen])


@wrong("12C", "probabilities among all experts")
class SoftmaxBefore(DenseWithAMask):
    def weigh(self, logits):
        p, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen, p)


@wrong("12C", "The gates are missing")
class Unweighed(DenseWithAMask):
    def weigh(self, logits):
        return torch.zeros_like(logits).scatter(-1, logits.topk(self.top_k, dim=-1).indices, 1.0)


@wrong("12C", "The mask is missing")
class SeesTheFuture(DenseWithAMask):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))


@wrong("12C", "`causal` is not asked")
class AlwaysCausal(DenseWithAMask):
    def forward(self, x, causal=True):
        return super().forward(x)


@wrong("12C", "The shared key is not rotated")
class QueriesAlone(DenseWithAMask):
    def turn(self, q, k):
        return self.positions.rotate(q, torch.arange(q.shape[2])), k


@wrong("12C", "several tokens")
class ScaleFivePercentOff(DenseWithAMask):
    def attend(self, q, k, v):
        scale = 1.05 * q.shape[-1] ** -0.5
        return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True, scale=scale)


@wrong("12C", "gradients reach every weight")
class DetachedGates(DenseWithAMask):
    def weigh(self, logits):
        return super().weigh(logits).detach()


@wrong("12C", "a parameter too many")
class WithABias(DenseWithAMask):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.bias = torch.nn.Parameter(torch.zeros(self.n_experts))


@wrong("12C", "several texts")
class AllTextsAsOne(DenseWithAMask):
    def forward(self, x, causal=True):
        if len(x) == 1 or x.shape[1] == 1:
            return super().forward(x, causal)
        return super().forward(x.flatten(0, 1)[None], causal).view_as(x)


@wrong("12C", "all at once")
class NotShifted(DenseWithAMask):
    def attend(self, q, k, v):
        powers = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])).tril()
        return powers / powers.sum(-1, keepdim=True) @ v


# --- 12D -------------------------------------------------------------------------------------------------------------


@right("12D")
def with_one_hot(router_logits, top_k):
    n_experts = router_logits.shape[-1]
    p = F.softmax(router_logits, dim=-1).flatten(0, -2) if router_logits.dim() > 1 else router_logits.softmax(-1)[None]
    hits = F.one_hot(p.topk(top_k).indices, n_experts).sum(-2).to(p.dtype)
    return n_experts * torch.dot(hits.mean(0) / top_k, p.mean(0))


@right("12D")
def per_token_sums(router_logits, top_k):
    rows = router_logits.reshape(-1, router_logits.shape[-1])
    share = torch.zeros(rows.shape[1], dtype=rows.dtype)
    share.index_add_(0, rows.topk(top_k, 1)[1].flatten(), torch.ones(len(rows) * top_k, dtype=rows.dtype))
    return (rows.softmax(1) * share).sum() * rows.shape[1] / (len(rows) ** 2 * top_k)


@right("12D")
def counts_over_a_number(router_logits, top_k):
    """A whole number over a whole number is single precision in torch."""
    rows = router_logits.reshape(-1, router_logits.shape[-1])
    chosen = rows.topk(top_k, dim=-1).indices.flatten()
    load = torch.bincount(chosen, minlength=rows.shape[-1]) / len(chosen)
    return rows.shape[-1] * (load * rows.softmax(-1).mean(0)).sum()


@wrong("12D", "a softmax over the chosen logits, as the gates are")
def mean_gates(router_logits, top_k):
    rows = router_logits.reshape(-1, router_logits.shape[-1])
    top, chosen = rows.topk(top_k, dim=-1)
    gates = torch.zeros_like(rows).scatter(-1, chosen, top.softmax(-1))
    return rows.shape[-1] * ((gates > 0).to(rows.dtype).mean(0) / top_k * gates.mean(0)).sum()


@wrong("12D", "The factor n_experts is missing")
def without_the_factor(router_logits, top_k):
    return with_one_hot(router_logits, top_k) / router_logits.shape[-1]


@wrong("12D", "The counts are divided by the tokens")
def per_token(router_logits, top_k):
    return with_one_hot(router_logits, top_k) * top_k


@wrong("12D", "nothing of that has a gradient")
def hard_twice(router_logits, top_k):
    rows = router_logits.reshape(-1, router_logits.shape[-1])
    hits = F.one_hot(rows.topk(top_k).indices, rows.shape[1]).sum(1).to(rows.dtype).mean(0) / top_k
    return rows.shape[1] * (hits * hits).sum()


@wrong("12D", "Both factors are mean probabilities")
def soft_twice(router_logits, top_k):
    p = router_logits.reshape(-1, router_logits.shape[-1]).softmax(-1).mean(0)
    return len(p) * (p * p).sum()


@wrong("12D", "Each text has a loss of its own")
def text_by_text(router_logits, top_k):
    if router_logits.dim() < 3:
        return with_one_hot(router_logits, top_k)
    return torch.stack([text_by_text(text, top_k) for text in router_logits]).mean()


@wrong("12D", "the gradient goes through the probabilities")
def detached(router_logits, top_k):
    return with_one_hot(router_logits.detach(), top_k) + 0 * router_logits.sum()


# --- 12E -------------------------------------------------------------------------------------------------------------


@right("12E")
def with_comparisons(bias, router_logits, top_k, speed):
    rows = (router_logits + bias).flatten(0, -2)
    counts = F.one_hot(rows.topk(top_k, dim=-1).indices, len(bias)).sum((0, 1))
    share = len(rows) * top_k / len(bias)
    return bias + speed * ((counts < share).to(bias.dtype) - (counts > share).to(bias.dtype))


@right("12E")
def expert_by_expert(bias, router_logits, top_k, speed):
    new, rows = bias.clone(), (router_logits + bias).reshape(-1, len(bias))
    chosen = rows.topk(top_k, dim=-1).indices
    for e in range(len(bias)):
        count = int((chosen == e).sum())
        if count * len(bias) != chosen.numel():
            new[e] += speed if count * len(bias) < chosen.numel() else -speed
    return new


@right("12E")
def single_counts(bias, router_logits, top_k, speed):
    counts = torch.bincount((router_logits + bias).topk(top_k, dim=-1).indices.flatten(), minlength=len(bias)).float()
    return bias + speed * torch.sign(counts.mean() - counts)


@wrong("12E", "The bias is subtracted")
def minus_the_bias(bias, router_logits, top_k, speed):
    return bias + with_comparisons(-bias, router_logits, top_k, speed) + bias


@wrong("12E", "moves the wrong way")
def towards_the_full(bias, router_logits, top_k, speed):
    return 2 * bias - with_comparisons(bias, router_logits, top_k, speed)


@wrong("12E", "chosen without the bias")
def raw_logits(bias, router_logits, top_k, speed):
    return with_comparisons(0 * bias, router_logits, top_k, speed) + bias


@wrong("12E", "only its sign counts")
def by_the_distance(bias, router_logits, top_k, speed):
    counts = torch.bincount((router_logits + bias).topk(top_k, dim=-1).indices.flatten(), minlength=len(bias))
    return bias + speed * (counts.to(bias.dtype).mean() - counts)


@wrong("12E", "exactly the mean")
def never_still(bias, router_logits, top_k, speed):
    counts = torch.bincount((router_logits + bias).topk(top_k, dim=-1).indices.flatten(), minlength=len(bias))
    return torch.where(counts < counts.double().mean(), bias + speed, bias - speed)


@wrong("12E", "the step alone")
def without_the_old(bias, router_logits, top_k, speed):
    return with_comparisons(bias, router_logits, top_k, speed) - bias


@wrong("12E", "leaves its arguments as they were")
def in_place(bias, router_logits, top_k, speed):
    bias += with_comparisons(bias, router_logits, top_k, speed) - bias
    return bias


# --- 12F -------------------------------------------------------------------------------------------------------------


@right("12F")
def with_prefixes(layer):
    for seed, size in ((0, 1.0), (1, 50.0)):
        x = np.random.default_rng(seed).standard_normal((13, 8))
        x[6:] *= size
        out = layer(x)
        for cut in range(1, 13):
            assert np.allclose(layer(x[:cut]), out[:cut], rtol=1e-3, atol=1e-4)


@wrong("12F", "how many tokens follow")
def change_a_later_token(layer):
    x = np.random.default_rng(0).standard_normal((12, 8))
    for at in range(1, 12):
        for size in (1.0, 100.0):
            other = x.copy()
            other[at] = size * np.random.default_rng(at).standard_normal(8)
            assert np.allclose(layer(x)[:at], layer(other)[:at], rtol=1e-3, atol=1e-4)


@wrong("12F", "each token sees the next one")
def one_cut_in_the_middle(layer):
    x = np.random.default_rng(0).standard_normal((12, 8))
    assert np.allclose(layer(x)[:5], layer(x[:6])[:5], rtol=1e-3, atol=1e-4)


@wrong("12F", "divided by the largest")
def small_numbers_only(layer):
    x = np.random.default_rng(0).standard_normal((12, 8))
    for cut in range(1, 12):
        assert np.allclose(layer(x[:cut]), layer(x)[:cut], rtol=1e-3, atol=1e-4)


@wrong("12F", "refused")
def to_the_last_bit(layer):
    x = np.random.default_rng(0).standard_normal((40, 8))
    for cut in range(1, 40):
        assert (layer(x[:cut]) == layer(x)[:cut]).all()
        assert layer(x).dtype == np.float64


@wrong("12F", "it survived")
def says_it_with_a_value(layer):
    x = np.random.default_rng(0).standard_normal((6, 8))
    return np.allclose(layer(x)[:3], layer(x[:3]))
