"""Lecture 01: one head of self-attention as a PyTorch module."""

import math

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module

MODULE = "fundamentals"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


@module(
    "1D", MODULE, make={"d_model": 4, "d_head": 3}, returns=("out", "weights"), importance="essential"
)  # the oracle goes one query at a time
class SelfAttention(nn.Module):
    def __init__(self, d_model, d_head):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_head) for _ in range(3))

    def forward(self, x, causal=False):
        n, rows = x.shape[-2], []
        for i in range(n):
            seen = i + 1 if causal else n
            q = self.query(x[..., i, :]) / math.sqrt(self.query.out_features)
            scores = (self.key(x[..., :seen, :]) * q[..., None, :]).sum(-1)
            powers = torch.exp(scores - scores.amax(-1, keepdim=True))
            shares = powers / powers.sum(-1, keepdim=True)
            rows.append(torch.cat([shares, shares.new_zeros(*shares.shape[:-1], n - seen)], dim=-1))
        weights = torch.stack(rows, dim=-2)
        return weights @ self.value(x), weights


@SelfAttention.property(
    "layers query, key and value, of the right shapes",
    hint="Which three layers does the contract name, and from which width to which do they go?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=6, d_head=2)


@SelfAttention.property(
    "with copied weights, the same outputs and weights",
    hint="Which two of q, k and v make the scores, and by what are they divided?",
)
def _(ask, rng):
    ask(tensor(rng, 2, 4))
    ask(tensor(rng, 5, 4))


@SelfAttention.property("any number of axes in front", hint="Which two axes of k change places, when there are four?")
def _(ask, rng):
    ask(tensor(rng, 2, 3, 4))
    ask(tensor(rng, 2, 2, 3, 4))
    ask(tensor(rng, 1, 1, 4))


@SelfAttention.property(
    "causal: no token looks at a later one",
    hint="Which scores become -inf, and before which step? Does a token see itself?",
)
def _(ask, rng):
    ask(tensor(rng, 3, 4), causal=True)
    ask(tensor(rng, 2, 5, 4), causal=True)
    ask(1e6 * tensor(rng, 3, 4), causal=True)  # scores below any number that stands for -inf


@SelfAttention.property(
    "gradients reach every parameter and the input",
    hint="Where does the computation leave torch: detach, .data, .item(), NumPy?",
)
def _(ask, rng):
    ask.gradients(tensor(rng, 3, 4))
    ask.gradients(tensor(rng, 2, 3, 4), causal=True)


@SelfAttention.property(
    "all at once: causal, float32, large scores",
    hint="Which float type does a tensor have that you make yourself, and does the softmax survive large scores?",
)
def _(ask, rng):
    x = 30 * tensor(rng, 2, 1, 4, 6).float()
    ask(x, causal=True, make={"d_model": 6, "d_head": 5})


class Usual(nn.Module):
    """The head in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def __init__(self, d_model, d_head):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_head) for _ in range(3))

    def divisor(self, q):
        return math.sqrt(q.shape[-1])

    def shares(self, scores):
        return torch.softmax(scores, dim=-1)

    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)

    def weights(self, q, k, causal):
        scores = q @ k.transpose(-1, -2) / self.divisor(q)
        return self.shares(self.hide(scores) if causal else scores)

    def forward(self, x, causal=False):
        weights = self.weights(self.query(x), self.key(x), causal)
        return weights @ self.value(x), weights


@SelfAttention.mistake("The scores are not scaled: divide them by sqrt(d_head).")
class _(Usual):
    def divisor(self, q):
        return 1.0


@SelfAttention.mistake("The scores are divided by d_head, not by sqrt(d_head).")
class _(Usual):
    def divisor(self, q):
        return q.shape[-1]


@SelfAttention.mistake("The scores are divided by sqrt(d_model): the dot product adds d_head numbers.")
class _(Usual):
    def divisor(self, q):
        return math.sqrt(self.query.in_features)


@SelfAttention.mistake("The softmax runs over the queries: the row of one query has to sum to 1, over the keys.")
class _(Usual):
    def shares(self, scores):
        return torch.softmax(scores, dim=-2)


@SelfAttention.mistake("Queries and keys have changed places: row i belongs to the query of token i.")
class _(Usual):
    def weights(self, q, k, causal):
        return super().weights(k, q, causal)


@SelfAttention.mistake("The output mixes x itself: it has to mix the values.")
class _(Usual):
    def forward(self, x, causal=False):
        weights = self.weights(self.query(x), self.key(x), causal)
        return weights @ x, weights


@SelfAttention.mistake("The output mixes the keys: it has to mix the values.")
class _(Usual):
    def forward(self, x, causal=False):
        weights = self.weights(self.query(x), self.key(x), causal)
        return weights @ self.key(x), weights


@SelfAttention.mistake("Output and weights have changed places: (out, weights) is asked for.")
class _(Usual):
    def forward(self, x, causal=False):
        return super().forward(x, causal)[::-1]


@SelfAttention.mistake("The second result holds the scores: the weights are what the softmax makes of them.")
class _(Usual):
    def forward(self, x, causal=False):
        q, k = self.query(x), self.key(x)
        scores = q @ k.transpose(-1, -2) / self.divisor(q)
        return super().forward(x, causal)[0], self.hide(scores) if causal else scores


@SelfAttention.mistake("The mask comes after the softmax: what is left no longer sums to 1. Mask the scores.")
class _(Usual):
    def weights(self, q, k, causal):
        shares = super().weights(q, k, False)
        return shares.tril() if causal else shares


@SelfAttention.mistake("causal=True changes nothing.")
class _(Usual):
    def hide(self, scores):
        return scores


@SelfAttention.mistake("The later tokens are hidden without causal=True, too.")
class _(Usual):
    def weights(self, q, k, causal):
        return super().weights(q, k, True)


@SelfAttention.mistake("A forbidden score becomes 0, and exp(0) is 1: it has to become -inf.")
class _(Usual):
    def hide(self, scores):
        return scores.tril()


for low in (-1e4, -1e6, -1e9, -1e10):

    @SelfAttention.mistake("A forbidden score is very low but not -inf: an allowed one can lie below it.")
    class _(Usual):
        low = low

        def hide(self, scores):
            return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), self.low)


@SelfAttention.mistake("With causal=True a token does not see itself: only later ones are hidden.")
class _(Usual):
    def hide(self, scores):
        hidden = torch.ones_like(scores, dtype=torch.bool).triu()
        return scores.masked_fill(hidden, -math.inf)


@SelfAttention.mistake("With causal=True the earlier tokens are hidden: it is the later ones.")
class _(Usual):
    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril(-1), -math.inf)


@SelfAttention.mistake("With causal=True the allowed tokens are hidden: True in masked_fill means hide.")
class _(Usual):
    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
