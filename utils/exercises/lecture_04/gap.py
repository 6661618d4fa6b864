"""Lecture 04: the loss of a model across a gap of positions."""

import copy

import numpy as np
import torch
from torch import nn

from utils.judge.function import exercise

MODULE = "long_context"


class Cache:
    """Keys and values of one layer, and how many they are; what joins a copy does not join the other."""

    def __init__(self):
        self.k = self.v = torch.zeros(1, 0, 4)

    @property
    def length(self):
        return self.k.shape[1]

    def update(self, k, v):
        self.k, self.v = torch.cat([self.k, k], dim=1), torch.cat([self.v, v], dim=1)
        return self.k, self.v


class Reader(nn.Module):
    """Two layers of causal attention with rotated queries and keys, called as a LanguageModel is."""

    dtype = torch.float32  # the precision of its losses

    def __init__(self, vocabulary=7, seed=0):
        super().__init__()
        rng = np.random.default_rng(seed)
        drawn = [rng.normal(size=size) for size in ((vocabulary, 4), *[(4, 4)] * 6, (4, vocabulary))]
        self.embedding, *self.matrices, self.out = (torch.from_numpy(a).float() for a in drawn)

    def new_caches(self):
        return [Cache(), Cache()]

    @staticmethod
    def rotate(x, positions):
        angles = positions.to(x.dtype)[:, None] * torch.tensor([1.0, 0.01], dtype=x.dtype)
        a, b, cos, sin = x[..., :2], x[..., 2:], angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def hidden(self, ids, mask=None, positions=None, caches=None):
        n, x = ids.shape[1], self.embedding[ids]
        if positions is None:
            positions = torch.arange(n) + (caches[0].length if caches else 0)
        for layer in range(2):
            q, k, v = (x @ w for w in self.matrices[3 * layer : 3 * layer + 3])
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if caches:
                k, v = caches[layer].update(k, v)
            seen = torch.ones(n, k.shape[1], dtype=torch.bool).tril(k.shape[1] - n)
            x = x + (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return x

    def logits(self, x):
        return x @ self.out

    def forward(self, ids, mask=None, positions=None, caches=None):
        return self.logits(self.hidden(ids, mask, positions, caches))

    def losses(self, ids, mask=None, positions=None, caches=None):
        logits = self(ids, mask, positions, caches)[0, :-1]
        return -logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


@exercise("4D", MODULE, importance="essential")
def loss_across_gap(model, prompt, rest, gaps, n_last):  # the oracle: everything again for each gap, without a cache
    n_prompt, n_rest = prompt.shape[1], rest.shape[1]
    ids = torch.cat([prompt, rest], dim=1)
    found = []
    for gap in gaps:
        positions = torch.tensor([i + (gap if i >= n_prompt else 0) for i in range(n_prompt + n_rest)])
        losses = model.losses(ids, positions=positions)
        found.append(sum(losses[len(losses) - n_last :].tolist()) / n_last)
    return torch.tensor(found)


def texts(rng, n_prompt, n_rest, vocabulary=7):
    return [torch.from_numpy(rng.integers(vocabulary, size=(1, n))) for n in (n_prompt, n_rest)]


@loss_across_gap.property(
    "no gap: the loss of the text in one piece", hint="At which position does the first token of rest stand?"
)
def _(ask, rng):
    ask(Reader(), *texts(rng, 6, 5), [0], 4)


@loss_across_gap.property("one gap", hint="Which positions grow by the gap, and which stay?")
def _(ask, rng):
    ask(Reader(), *texts(rng, 6, 5), [40], 4)


@loss_across_gap.property(
    "only the last n_last tokens count", hint="Which entries of the losses belong to the last n_last tokens?"
)
def _(ask, rng):
    ask(Reader(), *texts(rng, 6, 8), [3], 2)
    ask(Reader(), *texts(rng, 5, 8), [3], 1)


@loss_across_gap.property(
    "several gaps, each on the same prompt", hint="What has your cache seen when the second gap comes?"
)
def _(ask, rng):
    ask(Reader(), *texts(rng, 6, 5), [0, 10, 300, 0], 3)


@loss_across_gap.property(
    "any model, any lengths", hint="Does your code know the length of one of the texts, or a number of the lecture?"
)
def _(ask, rng):
    ask(Reader(11, seed=3), *texts(rng, 1, 9, 11), [2, 5000], 8)
    ask(Reader(5, seed=4), *texts(rng, 12, 3, 5), [1, 0], 2)


def usual(
    model, prompt, rest, gaps, n_last, *, own=copy.copy, start=lambda n, gap: n + gap,
    pick=lambda losses, n: losses[-n:], mean=lambda losses: losses.mean(), read=True,
):  # fmt: skip
    """The usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    n, found = prompt.shape[1], []
    caches = model.new_caches()
    if read:
        model.hidden(prompt, positions=torch.arange(n), caches=caches)
    for gap in gaps:
        positions = torch.arange(rest.shape[1]) + start(n, gap)
        losses = model.losses(rest, positions=positions, caches=[own(cache) for cache in caches])
        found.append(mean(pick(losses, n_last)))
    return torch.stack(found)


loss_across_gap.mistakes_of(
    usual,
    {
        "The second gap finds the question of the first in its caches: read each on copies.": {"own": lambda c: c},
        "The prompt is forgotten in the positions: rest begins at n_prompt + gap.": {"start": lambda n, gap: gap},
        "One position too early: rest begins at n_prompt + gap.": {"start": lambda n, gap: n + gap - 1},
        "One position too late: rest begins at n_prompt + gap.": {"start": lambda n, gap: n + gap + 1},
        "No gap is seen: the positions of rest have to grow by it, and those of the prompt must not.": {
            "start": lambda n, gap: n
        },
        "The gap has the wrong sign: rest stands farther back, not before the prompt.": {
            "start": lambda n, gap: n - gap
        },
        "This is the mean over all of rest: only the last n_last tokens count.": {"pick": lambda losses, n: losses},
        "These are the first n_last losses, not the last.": {"pick": lambda losses, n: losses[:n]},
        "The last token is left out: losses holds one for each token but the first, so its last belongs to the last.": {
            "pick": lambda losses, n: losses[-n - 1 : -1]
        },
        "This is the sum of the losses: take the mean.": {"mean": lambda losses: losses.sum()},
        "This is the loss of the last token alone: take the mean of the last n_last.": {
            "pick": lambda losses, n: losses[-1:]
        },
        "The prompt was never read: model.hidden(prompt, caches=...) fills the caches.": {"read": False},
    },
)


@loss_across_gap.mistake("Each gap is added to those before it: every one is counted from the prompt.")
def _(model, prompt, rest, gaps, n_last):
    return usual(model, prompt, rest, np.cumsum(gaps).tolist(), n_last)
