"""Lecture 13: induced attention, and a test of poolings. The oracle goes one set and one head at a time."""

import numpy as np
import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.bug import bug
from utils.judge.module import module

MODULE = "beyond"
SIZES = {"d_model": 4, "n_heads": 2, "m": 3}


class Block(nn.Module):
    """The block of the contract, one set and one head at a time."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        for name in ("w_q", "w_k", "w_v", "w_o", "w_f"):
            setattr(self, name, nn.Parameter(torch.zeros(d_model, d_model)))

    def forward(self, x, y, mask=None):
        return torch.stack([self.one(x[b], y[b] if mask is None else y[b][mask[b]]) for b in range(len(x))])

    def one(self, x, y):
        heads, width = [], x.shape[1] // self.n_heads
        for h in range(self.n_heads):
            part = slice(h * width, (h + 1) * width)
            scores = (x @ self.w_q[:, part]) @ (y @ self.w_k[:, part]).T / width**0.5
            heads.append(torch.softmax(scores, -1) @ (y @ self.w_v[:, part]))
        h = x + torch.cat(heads, -1) @ self.w_o
        return h + (h @ self.w_f).clamp(min=0)


class Weights(nn.Module):
    """The parameters of the contract, and what the mistakes share. They override one of its methods."""

    def __init__(self, d_model, n_heads, m):
        super().__init__()
        self.points = nn.Parameter(torch.zeros(m, d_model))
        self.gather, self.spread = Block(d_model, n_heads), Block(d_model, n_heads)

    def gathered(self, x, mask):
        return self.gather(self.points.expand(len(x), -1, -1), x, mask)

    def after(self, out, mask):
        return out if mask is None else out * mask[..., None]

    def forward(self, x, mask=None):
        return self.after(self.spread(x, self.gathered(x, mask)), mask)


@module("13C", MODULE, make=SIZES, importance="essential")
class InducedSetAttention(Weights):
    def forward(self, x, mask=None):
        rows = []
        for b in range(len(x)):
            there = slice(None) if mask is None else mask[b]
            points = self.gather.one(self.points, x[b][there])
            out = torch.zeros_like(x[b])
            out[there] = self.spread.one(x[b][there], points)
            rows.append(out)
        return torch.stack(rows)


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


def mask_of(*rows):
    return torch.tensor([[bool(int(c)) for c in row] for row in rows])


@InducedSetAttention.property(
    "the parameters of the contract", hint="Is the class made from InducedWeights, and does it leave __init__ as it is?"
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=6, n_heads=3, m=1)


@InducedSetAttention.property(
    "one set: the points ask the set, then the set asks",
    hint="Who is the first argument of each block, and how many rows has the result?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 1, 4))
    ask(2 * tensor(rng, 1, 5, 4))


@InducedSetAttention.property("a batch of sets", hint="How does (m, d_model) get an axis for the batch?")
def _(ask, rng):
    ask(2 * tensor(rng, 3, 5, 4))
    ask(tensor(rng, 2, 3, 4))


@InducedSetAttention.property(
    "padding is not seen, and comes out as zeros",
    hint="Which block has padding among its keys, and which rows of the result belong to padding?",
)
def _(ask, rng):
    ask(2 * tensor(rng, 1, 4, 4), mask=mask_of("1100"))
    ask(2 * tensor(rng, 2, 4, 4), mask=mask_of("1011", "0100"))


@InducedSetAttention.property("other sizes", hint="Which sizes stand in your code as numbers?")
def _(ask, rng):
    ask(2 * tensor(rng, 2, 5, 6), make={"d_model": 6, "n_heads": 3, "m": 1})
    ask(2 * tensor(rng, 2, 2, 4), make={"d_model": 4, "n_heads": 1, "m": 5})


@InducedSetAttention.property(
    "gradients reach the points, every weight and the input",
    hint="Where does the computation leave torch: detach, .data, torch.tensor(...)?",
)
def _(ask, rng):
    ask.gradients(2 * tensor(rng, 2, 4, 4))


@InducedSetAttention.property(
    "all at once: float32, large numbers, a mask, a long set", hint="Which of these have you never tried together?"
)
def _(ask, rng):
    mask = torch.arange(60) < torch.tensor([[60], [1], [37]])
    ask(tensor(rng, 3, 60, 6).float(), make={"d_model": 6, "n_heads": 2, "m": 4}, mask=mask)
    ask(20 * tensor(rng, 3, 60, 4), mask=mask)


@InducedSetAttention.mistake("The mask is not handed to self.gather: the points ask padding, too.")
class _(Weights):
    def gathered(self, x, mask):
        return super().gathered(x, None)


@InducedSetAttention.mistake("Rows of padding are not zero: multiply the result by the mask.")
class _(Weights):
    def after(self, out, mask):
        return out


@InducedSetAttention.mistake("The gathered points are returned: the elements have to ask them.")
class _(Weights):
    def forward(self, x, mask=None):
        return self.gathered(x, mask)


@InducedSetAttention.mistake("The elements ask the points themselves: they ask what the points gathered.")
class _(Weights):
    def gathered(self, x, mask):
        return self.points.expand(len(x), -1, -1) + 0 * super().gathered(x, mask)


@InducedSetAttention.mistake("The same block is used twice: self.gather first, then self.spread.")
class _(Weights):
    def forward(self, x, mask=None):
        return self.after(self.gather(x, self.gathered(x, mask)), mask)


@InducedSetAttention.mistake("The two blocks have changed places: the points ask by self.gather.")
class _(Weights):
    def forward(self, x, mask=None):
        points = self.spread(self.points.expand(len(x), -1, -1), x, mask)
        return self.after(self.gather(x, points), mask)


@InducedSetAttention.mistake("The elements ask each other: there are no inducing points in between.")
class _(Weights):
    def forward(self, x, mask=None):
        return self.after(self.spread(x, self.gather(x, x, mask)), mask)


# --- 13D -------------------------------------------------------------------------------------------------------------


@bug("13D", MODULE, subject="pool", importance="useful")
def test_pooling(pool):
    rng = np.random.default_rng(3)
    x, mask = rng.standard_normal((2, 6, 8)), np.ones((2, 6), bool)
    mask[0, [1, 4, 5]] = False
    right = pool(x, mask)
    assert np.allclose(pool(x[:, ::-1], mask[:, ::-1]), right, atol=1e-4)
    assert np.allclose(pool(x + 30 * ~mask[..., None], mask), right, atol=1e-4)
    for b in range(2):
        assert np.allclose(pool(x[b : b + 1, mask[b]], mask[b : b + 1, mask[b]]), right[b], atol=1e-4)
    for b, j in zip(*np.nonzero(mask)):
        other = x.copy()
        other[b, j] -= 2.0
        assert np.abs(pool(other, mask) - right)[b].max() > 1e-3


def features(x):
    """Eight numbers to five, none of which forgets an element."""
    return np.tanh(x @ np.random.default_rng(1).standard_normal((8, 5)) / 2) + x[..., :5] / 5


def kept(mask):
    return mask[..., None].astype(float)


def attention(x, mask, axis=1, blocked=-np.inf):
    """Attention pooling with a learned query, here a fixed one."""
    scores = np.where(mask, x @ np.random.default_rng(2).standard_normal(8) / 4, blocked)
    powers = np.exp(scores - scores.max(axis, keepdims=True))
    return ((powers / powers.sum(axis, keepdims=True))[..., None] * features(x)).sum(1)


@test_pooling.right
def _(x, mask):
    return (features(x) * kept(mask)).sum(1)


@test_pooling.right
def _(x, mask):
    """A mean, in single precision."""
    total = (features(x) * kept(mask)).sum(1)
    return np.exp((total / kept(mask).sum(1)).astype(np.float32))


@test_pooling.right
def _(x, mask):
    return attention(x, mask)


CONTENT = "Is what stands in the padding changed in your test, and is it ever large?"
MORE = "Does your test compare a padded set with the same set without padding, or with more of it?"
ORDER = "Is every element moved in your test, and its mask with it?"
for name, hint, code in (
    ("positions are added", ORDER, lambda x, m: attention(x + np.arange(x.shape[1])[:, None] / 4, m)),
    ("the mask is ignored", CONTENT, lambda x, m: features(x).sum(1)),
    ("the mask blocks with -3 in place of minus infinity", CONTENT, lambda x, m: attention(x, m, blocked=-3.0)),
    (
        "a mean over the padded length",
        MORE,
        lambda x, m: (features(x) * kept(m)).sum(1) / x.shape[1],
    ),
    (
        "padding is taken as zeros, and counted",
        MORE,
        lambda x, m: attention(x * kept(m), np.ones_like(m)),
    ),
    (
        "the mean of the batch is subtracted",
        "Is each set also given alone?",
        lambda x, m: attention(x, m) - attention(x, m).mean(0),
    ),
    (
        "only the first four elements count",
        "How many of the elements does your test change, one at a time?",
        lambda x, m: attention(x, m & (np.cumsum(m, 1) <= 4)),
    ),
    (
        "a constant",
        "Does anything in your test have to change the result?",
        lambda x, m: np.ones((len(x), 5)),
    ),
    (
        "the first element counts twice",
        ORDER,
        lambda x, m: (features(x) * kept(m)).sum(1) + (features(x) * kept(m))[:, 0],
    ),
):
    test_pooling.mutant(name, hint)(code)
