"""Lecture 07: the lightning indexer, a module, and one step of its training."""

import math
from functools import partial

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module
from utils.judge.step import step

MODULE = "sparse"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


# --- 7D --------------------------------------------------------------------------------------------------------------


@module("7D", MODULE, make={"d_model": 4, "n_heads": 2, "d_index": 3}, returns=("scores",), importance="essential")
class LightningIndexer(nn.Module):
    """One head after the other, as the sum in the formula."""

    def __init__(self, d_model, n_heads, d_index):
        super().__init__()
        self.query = nn.Linear(d_model, n_heads * d_index, bias=False)
        self.key = nn.Linear(d_model, d_index, bias=False)
        self.norm = nn.LayerNorm(d_index, eps=1e-6)
        self.weight = nn.Linear(d_model, n_heads, bias=False)

    def forward(self, x, causal=False):
        d, heads = self.norm.normalized_shape[0], self.weight.out_features
        k, total = self.norm(self.key(x)), 0
        for j in range(heads):
            q = x @ self.query.weight[j * d : (j + 1) * d].T
            match = torch.einsum("...td,...sd->...ts", q, k) / math.sqrt(d)
            total = total + self.weight(x)[..., j, None] * match.clamp(min=0) / math.sqrt(heads)
        if causal:
            place = torch.arange(x.shape[-2])
            total = torch.where(place > place[:, None], -torch.inf, total)
        return total


@LightningIndexer.property(
    "layers query, key, norm and weight, with the shapes of the contract",
    hint="Which of the four has n_heads * d_index outputs, which d_index, which n_heads, and which has a bias?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=6, n_heads=1, d_index=5)


@LightningIndexer.property(
    "with copied weights, the same scores",
    hint="What is rectified: each head's product, or their sum? Which token's weight multiplies it?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 3, 4))
    ask(tensor(rng, 2, 5, 6), make={"d_model": 6, "n_heads": 3, "d_index": 2})


@LightningIndexer.property(
    "causal: the future is -inf, and the token itself is not", hint="Which entries of row 0 may be finite?"
)
def _(ask, rng):
    ask(tensor(rng, 1, 4, 4), causal=True)


@LightningIndexer.property(
    "any number of axes in front, one token, one head", hint="Which axes does your product name?"
)
def _(ask, rng):
    ask(tensor(rng, 3, 4))
    ask(tensor(rng, 2, 1, 5, 4), causal=True)
    ask(tensor(rng, 2, 1, 4), make={"d_model": 4, "n_heads": 1, "d_index": 3})


@LightningIndexer.property(
    "gradients reach every parameter", hint="Where does the computation leave torch: detach, .data, no_grad?"
)
def _(ask, rng):
    ask.gradients(tensor(rng, 2, 5, 4))


@LightningIndexer.property(
    "all at once: causal, float32, many heads, large tokens",
    hint="Which float type does a tensor have that you make yourself?",
)
def _(ask, rng):
    x = 30 * tensor(rng, 2, 1, 6, 4).float()
    ask(x, causal=True, make={"d_model": 4, "n_heads": 8, "d_index": 5})


class Usual(nn.Module):
    """The indexer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def __init__(self, d_model, n_heads, d_index):
        super().__init__()
        self.n_heads, self.d_index = n_heads, d_index
        self.query = nn.Linear(d_model, n_heads * d_index, bias=False)
        self.key = nn.Linear(d_model, d_index, bias=False)
        self.norm = nn.LayerNorm(d_index, eps=1e-6)
        self.weight = nn.Linear(d_model, n_heads, bias=False)

    def queries(self, x):
        return self.query(x).unflatten(-1, (self.n_heads, self.d_index)).transpose(-2, -3)

    def keys(self, x):
        return self.norm(self.key(x))

    def divisor(self):
        return math.sqrt(self.d_index)

    def matches(self, x):
        return torch.relu(self.queries(x) @ self.keys(x).unsqueeze(-3).mT / self.divisor())

    def weights(self, x):
        return self.weight(x) / math.sqrt(self.n_heads)

    def summed(self, x):
        return (self.weights(x).mT[..., None] * self.matches(x)).sum(-3)

    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)

    def forward(self, x, causal=False):
        scores = self.summed(x)
        return self.hide(scores) if causal else scores


@LightningIndexer.mistake("The ReLU is missing: a head that does not match may then subtract.")
class _(Usual):
    def matches(self, x):
        return self.queries(x) @ self.keys(x).unsqueeze(-3).mT / self.divisor()


@LightningIndexer.mistake("The ReLU is taken of the sum over heads: each head is rectified before it is weighted.")
class _(Usual):
    def summed(self, x):
        match = self.queries(x) @ self.keys(x).unsqueeze(-3).mT / self.divisor()
        return torch.relu((self.weights(x).mT[..., None] * match).sum(-3))


@LightningIndexer.mistake("The products are not divided by sqrt(d_index).")
class _(Usual):
    def divisor(self):
        return 1.0


@LightningIndexer.mistake("The products are divided by d_index, not by its root.")
class _(Usual):
    def divisor(self):
        return self.d_index


@LightningIndexer.mistake("The weights are not divided by sqrt(n_heads).")
class _(Usual):
    def weights(self, x):
        return self.weight(x)


@LightningIndexer.mistake("The weights are divided by n_heads, not by its root.")
class _(Usual):
    def weights(self, x):
        return self.weight(x) / self.n_heads


@LightningIndexer.mistake("The weights belong to the token that asks, row t: here they are those of the key.")
class _(Usual):
    def summed(self, x):
        return (self.weights(x).mT[..., None, :] * self.matches(x)).sum(-3)


@LightningIndexer.mistake("The key is not normalised: norm is made and never called.")
class _(Usual):
    def keys(self, x):
        return self.key(x) + 0 * self.norm.weight + 0 * self.norm.bias


@LightningIndexer.mistake("norm has PyTorch's default eps, 1e-5: the contract says eps=1e-6.")
class _(Usual):
    def __init__(self, d_model, n_heads, d_index):
        super().__init__(d_model, n_heads, d_index)
        self.norm = nn.LayerNorm(d_index)


@LightningIndexer.mistake("The heads are cut out of the projection the wrong way: (n_heads, d_index), in this order.")
class _(Usual):
    def queries(self, x):
        return self.query(x).unflatten(-1, (self.d_index, self.n_heads)).movedim(-1, -3)


@LightningIndexer.mistake("causal=True changes nothing.")
class _(Usual):
    def hide(self, scores):
        return scores


@LightningIndexer.mistake("With causal=True the future gets 0: after a ReLU many scores are 0. It has to be -inf.")
class _(Usual):
    def hide(self, scores):
        return scores.tril()


@LightningIndexer.mistake("With causal=True a token's own score is hidden as well: only later ones are.")
class _(Usual):
    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(), -math.inf)


@LightningIndexer.mistake("Rows and columns have changed places: row t belongs to the token that asks.")
class _(Usual):
    def summed(self, x):
        return super().summed(x).mT


# --- 7E --------------------------------------------------------------------------------------------------------------

SGD = partial(torch.optim.SGD, lr=0.5)


@step("7E", MODULE, importance="useful")
def indexer_step(indexer, optimiser, x, p):
    """Row by row, over the keys that have weight."""
    scores = indexer(x)
    loss, rows = 0, 0
    for row, target in zip(scores.flatten(0, -2), p.flatten(0, -2)):
        there = target > 0
        logs = row[there] - torch.logsumexp(row, 0)
        loss = loss + (target[there] * (target[there].log() - logs)).sum()
        rows += 1
    loss = loss / rows
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


class Scorer(nn.Module):
    """x (batch, n, d_model) -> scores (batch, n, n): a bilinear form."""

    def __init__(self, size, d_model=3):
        super().__init__()
        self.w = nn.Parameter(
            size * torch.linspace(-1, 1, d_model * d_model, dtype=torch.float64).view(d_model, d_model)
        )

    def forward(self, x):
        return x @ self.w @ x.mT


def batches(rng, count, batch=2, n=4, d_model=3, zeros=False):
    made = []
    for _ in range(count):
        p = rng.integers(1, 6, size=(batch, n, n)).astype(float)
        if zeros:
            p = p * (rng.random((batch, n, n)) < 0.5) + 1.0 * (rng.permutation(n) == 0)
        made.append((tensor(rng, batch, n, d_model), torch.from_numpy(p / p.sum(-1, keepdims=True))))
    return made


@indexer_step.property(
    "one step: loss and weights",
    hint="ln(p / r) = ln p - ln r: on which axis does the softmax run, and what is averaged?",
)
def _(ask, rng):
    ask(Scorer(0.3, 2), batches(rng, 1, 2, 2, 2), optimizer=SGD)
    ask(Scorer(0.3), batches(rng, 1), optimizer=SGD)


@indexer_step.property("a weight of 0 adds 0, not nan", hint="What is 0 * log(0) in floats?")
def _(ask, rng):
    ask(Scorer(0.3), batches(rng, 1, zeros=True), optimizer=SGD)


@indexer_step.property("three steps, nothing left over", hint="What does backward do with gradients that are there?")
def _(ask, rng):
    ask(Scorer(0.3), batches(rng, 3), optimizer=SGD)


@indexer_step.property(
    "scores of 1e4 do not overflow", hint="Is there a function that gives the logarithm of a softmax?"
)
def _(ask, rng):
    ask(Scorer(2000.0), batches(rng, 1), optimizer=partial(torch.optim.SGD, lr=0.1))


@indexer_step.property("any shape, any optimiser", hint="Where does your step make something that it was given?")
def _(ask, rng):
    ask(Scorer(0.3, 5), batches(rng, 2, 3, 1, 5), optimizer=partial(torch.optim.AdamW, lr=0.1))
    ask(Scorer(0.3, 4), batches(rng, 2, 1, 7, 4, zeros=True), optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9))


def divergence(scores, p):
    return (torch.xlogy(p, p) - p * torch.log_softmax(scores, -1)).sum(-1)


def usual_step(indexer, optimiser, x, p, *, loss=lambda scores, p: divergence(scores, p).mean(), zero=True):
    """A step in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    value = loss(indexer(x), p)
    if zero:
        optimiser.zero_grad()
    value.backward()
    optimiser.step()
    return value.item()


indexer_step.mistakes_of(
    usual_step,
    {
        "The divergence is turned round: it is weighted by p, not by the softmax of the scores.": {
            "loss": lambda s, p: (s.softmax(-1) * (s.log_softmax(-1) - (p + 1e-30).log())).sum(-1).mean()
        },
        "This is the cross-entropy: the divergence subtracts the entropy of p, so that it can reach 0.": {
            "loss": lambda s, p: -(p * s.log_softmax(-1)).sum(-1).mean()
        },
        "The softmax runs over the queries: a row of scores belongs to one query.": {
            "loss": lambda s, p: (torch.xlogy(p, p) - p * s.log_softmax(-2)).sum(-1).mean()
        },
        "The mean is over single weights: sum over the keys of a row, then average the rows.": {
            "loss": lambda s, p: (divergence(s, p) / p.shape[-1]).mean()
        },
        "The loss is the sum over all rows: take the mean.": {"loss": lambda s, p: divergence(s, p).sum()},
        "The rows of a batch are summed: the mean goes over all rows (reduction='batchmean' divides by the first axis).": {
            "loss": lambda s, p: divergence(s, p).sum(-1).mean()
        },
        "0 times log 0 is nan: torch.xlogy knows it, p * p.log() does not.": {
            "loss": lambda s, p: (p * (p.log() - s.log_softmax(-1))).sum(-1).mean()
        },
        "The gradients of the step before are still there: set them to zero before backward.": {"zero": False},
    },
)


@indexer_step.mistake("What is returned is the loss after the step: the one before it is asked for.")
def _(indexer, optimiser, x, p):
    usual_step(indexer, optimiser, x, p)
    return divergence(indexer(x), p).mean().item()


@indexer_step.mistake("No weight moves: is step() called, and are the gradients still there when it is?")
def _(indexer, optimiser, x, p):
    return divergence(indexer(x), p).mean().item()
