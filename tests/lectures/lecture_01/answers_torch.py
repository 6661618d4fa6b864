"""Answers to the exercises of lecture 01 in PyTorch, a layer, a training step and a test, as in answers.py."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 1D --------------------------------------------------------------------------------------------------------------


@right("1D")
class WithPytorchsFunction(nn.Module):
    def __init__(self, d_model, d_head):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_head) for _ in range(3))

    def forward(self, x, causal=False):
        q, k = self.query(x), self.key(x)
        everybody = torch.eye(x.shape[-2], dtype=x.dtype)  # as values, the output is the weights
        weights = F.scaled_dot_product_attention(
            q, k, everybody.expand(*x.shape[:-2], *everybody.shape), is_causal=causal
        )
        return weights @ self.value(x), weights


@right("1D")
class WithEinsum(nn.Module):
    def __init__(self, d_model, d_head):
        super().__init__()
        self.scale = d_head**-0.5
        self.query, self.key, self.value = (nn.Linear(d_model, d_head, bias=True) for _ in "qkv")

    def forward(self, x, causal=False):
        scores = torch.einsum("...id,...jd->...ij", self.query(x) * self.scale, self.key(x))
        if causal:
            place = torch.arange(x.shape[-2])
            scores = torch.where(place[None, :] > place[:, None], float("-inf"), scores)
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
        return torch.einsum("...ij,...jd->...id", weights, self.value(x)), weights


class Base(WithEinsum):
    def attend(self, scores, causal):
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        return scores.softmax(-1)

    def forward(self, x, causal=False):
        weights = self.attend(self.query(x) @ self.key(x).mT * self.scale, causal)
        return weights @ self.value(x), weights


@wrong("1D", "returned a Tensor, expected the tuple (out, weights)")
class OutputOnly(Base):
    def forward(self, x, causal=False):
        return super().forward(x, causal)[0]


@wrong("1D", "is missing")
class OtherNames(nn.Module):
    def __init__(self, d_model, d_head):
        super().__init__()
        self.w_q, self.w_k, self.w_v = (nn.Linear(d_model, d_head) for _ in range(3))


@wrong("1D", "is missing")
class WithoutBias(Base):
    def __init__(self, d_model, d_head):
        super().__init__(d_model, d_head)
        self.query, self.key, self.value = (nn.Linear(d_model, d_head, bias=False) for _ in range(3))


@wrong("1D", "a parameter too many")
class OneLayerMore(Base):
    def __init__(self, d_model, d_head):
        super().__init__(d_model, d_head)
        self.out = nn.Linear(d_head, d_head)


@wrong("1D", "divided by d_head, not by sqrt(d_head)")
class ByTheSize(Base):
    def __init__(self, d_model, d_head):
        super().__init__(d_model, d_head)
        self.scale = 1 / d_head


@wrong("1D", "the same outputs and weights")
class ScaleFivePercentOff(Base):
    def __init__(self, d_model, d_head):
        super().__init__(d_model, d_head)
        self.scale *= 1.05


@wrong("1D", "The softmax runs over the queries")
class OverTheQueries(Base):
    def attend(self, scores, causal):
        return super().attend(scores.mT, causal).mT if not causal else super().attend(scores, causal)


@wrong("1D", "very low but not -inf")
class VeryLow(Base):
    def attend(self, scores, causal):
        return (scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9) if causal else scores).softmax(-1)


@wrong("1D", "Output and weights have changed places")
class WeightsFirst(Base):
    def forward(self, x, causal=False):
        out, weights = super().forward(x, causal)
        return weights, out


@wrong("1D", "The output mixes the keys")
class BlendsTheKeys(Base):
    def forward(self, x, causal=False):
        _, weights = super().forward(x, causal)
        return weights @ self.key(x), weights


@wrong("1D", "hidden without causal=True, too")
class AlwaysCausal(Base):
    def attend(self, scores, causal):
        return super().attend(scores, True)


@wrong("1D", "any number of axes in front")
class AllAxesTurned(Base):
    def forward(self, x, causal=False):
        k = self.key(x)
        weights = self.attend(self.query(x) @ k.permute(*range(k.ndim - 1, -1, -1)) * self.scale, causal)
        return weights @ self.value(x), weights


@wrong("1D", "gradients reach every parameter")
class Detached(Base):
    def attend(self, scores, causal):
        return super().attend(scores, causal).detach()


@wrong("1D", "all at once")
class NotShifted(Base):
    def attend(self, scores, causal):
        powers = scores.exp()
        powers = powers.tril() if causal else powers
        return powers / powers.sum(-1, keepdim=True)


# --- 1E --------------------------------------------------------------------------------------------------------------


@right("1E")
def flattened(model, optimiser, x, y):
    model.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimiser.step()
    return float(loss)


@right("1E")
def by_hand(model, optimiser, x, y):
    loss = -torch.log_softmax(model(x), -1).gather(2, y.unsqueeze(2)).mean()
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    with torch.no_grad():
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad /= max(norm, 1.0)
    optimiser.step()
    return loss.detach().item()


@wrong("1E", "The gradients of the step before are still there")
def nothing_set_to_zero(model, optimiser, x, y):
    loss = F.cross_entropy(model(x).mT, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


@wrong("1E", "No weight moves")
def zeroed_after_backward(model, optimiser, x, y):
    loss = F.cross_entropy(model(x).mT, y)
    loss.backward()
    optimiser.zero_grad()
    optimiser.step()
    return loss.item()


@wrong("1E", "not clipped")
def not_clipped(model, optimiser, x, y):
    loss = F.cross_entropy(model(x).mT, y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@wrong("1E", "all gradients clipped to norm 1")
def clipped_five_percent_off(model, optimiser, x, y):
    loss = F.cross_entropy(model(x).mT, y)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.05)
    optimiser.step()
    return loss.item()


@wrong("1E", "cross_entropy wants the classes on axis 1")
def classes_on_the_last_axis(model, optimiser, x, y):
    loss = F.cross_entropy(model(x), y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


@wrong("1E", "A reshape does not let two axes change places")
def reshaped(model, optimiser, x, y):
    batch, n, n_answers = (logits := model(x)).shape
    loss = F.cross_entropy(logits.view(batch, n_answers, n), y)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


@wrong("1E", "are scaled up")
def always_of_norm_1(model, optimiser, x, y):
    loss = F.cross_entropy(model(x).mT, y)
    optimiser.zero_grad()
    loss.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for p in model.parameters():
        p.grad /= norm
    optimiser.step()
    return loss.item()


@wrong("1E", "any shape, any optimiser")
def an_optimiser_of_its_own(model, optimiser, x, y):
    loss = F.cross_entropy(model(x).mT, y)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return loss.item()


# --- 1F --------------------------------------------------------------------------------------------------------------


def loops(q, k, v, allowed, scale):
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if allowed[i, j]]
        s = np.array([scale * q[i] @ k[j] for j in seen])
        if seen:
            p = np.exp(s - s.max())
            out[i] = p / p.sum() @ v[seen]
    return out


@right("1F")
def compares_with_loops(attention):
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(4, 8)), rng.normal(size=(7, 8)), rng.normal(size=(7, 2))
    mask = rng.random((4, 7)) < 0.5
    mask[1] = False
    future = np.arange(7) > np.arange(4)[:, None] + 3
    for m, causal, scale, size in ((None, False, None, 1), (mask, True, 0.9, 1), (mask, False, None, 1e4)):
        allowed = (np.ones((4, 7), bool) if m is None else m) & ~(future & causal)
        expected = loops(size * q, k, v, allowed, 8**-0.5 if scale is None else scale)
        got = attention(size * q, k, v, mask=m, causal=causal, scale=scale)
        assert np.isfinite(got).all() and np.abs(got - expected).max() < 1e-8


@right("1F")
def compares_with_pytorch(attention):
    rng = np.random.default_rng(6)
    q, k, v = (rng.normal(size=(2, n, 4)) for n in (3, 5, 5))
    tensors = [torch.from_numpy(a) for a in (q, k, v)]
    mask = np.array([[True, False, True, False, True]] * 3)
    triangle = np.tri(3, 5, 2, dtype=bool)
    for options, allowed in (({"mask": mask}, mask), ({"causal": True}, triangle), ({"scale": 2.0}, None)):
        attn = None if allowed is None else torch.from_numpy(allowed)
        expected = F.scaled_dot_product_attention(*tensors, attn_mask=attn, scale=options.get("scale"))
        assert np.allclose(attention(q, k, v, **options), expected.numpy())
    assert (attention(q, k, v, mask=np.zeros((3, 5), bool)) == 0).all()
    assert np.isfinite(attention(1e6 * q, k, v)).all()


@wrong("1F", "Which arguments has your test never used?")
def only_the_plain_call(attention):
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(4, 8)) for _ in range(3))
    assert np.allclose(attention(q, k, v), loops(q, k, v, np.ones((4, 4), bool), 8**-0.5))


@wrong("1F", "Does your test compare numbers?")
def looks_at_the_shape(attention):
    q = np.ones((2, 4))
    assert attention(q, q, q).shape == (2, 4)


@wrong("1F", "A test says no with an exception")
def returns_the_verdict(attention):
    q = np.ones((2, 4))
    return np.allclose(attention(q, q, q), q)


@wrong("1F", "Has your test fewer queries than keys?")
def square_only(attention):
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(4, 8)) for _ in range(3))
    mask = rng.random((4, 4)) < 0.7
    for options, allowed in (({}, np.ones((4, 4), bool)), ({"mask": mask}, mask), ({"causal": True}, np.tri(4))):
        assert np.allclose(attention(q, k, v, **options), loops(q, k, v, allowed, 8**-0.5))
    assert np.allclose(attention(q, k, v, scale=2.0), loops(q, k, v, np.ones((4, 4), bool), 2.0))
    assert not attention(q, k, v, mask=np.zeros((4, 4), bool)).any()
    assert np.isfinite(attention(1e5 * q, k, v)).all()


@wrong("1F", "The right code is refused")
def expects_too_much(attention):
    q = np.random.default_rng(5).normal(size=(4, 8))
    assert (attention(q, q, q) == q).all()


@wrong("1F", "What if the mask forbids every key?")
def never_an_empty_row(attention):
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(2, 8)), rng.normal(size=(5, 8)), rng.normal(size=(5, 8))
    triangle, mask = np.tri(2, 5, 3, dtype=bool), np.array([[True, False, True, True, False]] * 2)
    for options, allowed in (({"scale": 0.5}, np.ones((2, 5))), ({"causal": True}, triangle), ({"mask": mask}, mask)):
        expected = loops(q, k, v, allowed, options.get("scale", 8**-0.5))
        assert np.allclose(attention(q, k, v, **options), expected)
    assert np.isfinite(attention(1e5 * q, k, v)).all()
