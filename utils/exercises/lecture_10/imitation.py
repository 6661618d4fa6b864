"""Lecture 10: a step of features that imitate the softmax weights of a head."""

from functools import partial

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.step import step

MODULE = "linear"
SGD = partial(torch.optim.SGD, lr=0.5)


@step("10B", MODULE, importance="useful")
def imitation_step(features, optimiser, q, k):
    trained, losses = list(features.parameters()), []
    phi_q, phi_k = features.of_q(q), features.of_k(k)
    for text in range(len(q)):
        for i in range(q.shape[1]):
            with torch.no_grad():
                p = torch.softmax((k[text] * q[text, i]).sum(-1) / q.shape[-1] ** 0.5, dim=0)
            w = (phi_k[text] * phi_q[text, i]).sum(-1)
            losses.append(-(p * (w.log() - w.sum().log())).sum())
    loss = sum(losses) / len(losses)
    for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained)):
        parameter.grad = gradient
    optimiser.step()
    return loss.item()


class Features(nn.Module):
    """Positive features of queries and of keys."""

    def __init__(self, d, m):
        super().__init__()
        self.q, self.k = (nn.Sequential(nn.Linear(d, m), nn.Softmax(-1)) for _ in range(2))

    def of_q(self, q):
        return self.q(q)

    def of_k(self, k):
        return self.k(k)


def made(rng, d=3, m=4):
    built = Features(d, m).double()
    for parameter in built.parameters():
        parameter.data = torch.from_numpy(draw(rng, *parameter.shape))
    return built


def heads(rng, count, batch=1, n=3, d=3, size=1.0):
    return [tuple(torch.from_numpy(size * draw(rng, batch, n, d)) for _ in range(2)) for _ in range(count)]


@imitation_step.property(
    "one step: loss and weights", hint="Which row of w is compared with which row of p, and what divides w?"
)
def _(ask, rng):
    ask(made(rng, d=1, m=2), heads(rng, 1, d=1, n=2), optimizer=SGD)
    ask(made(rng), heads(rng, 1), optimizer=SGD)


@imitation_step.property("three steps, nothing left over", hint="What does backward do with gradients that are there?")
def _(ask, rng):
    ask(made(rng), heads(rng, 3), optimizer=SGD)


@imitation_step.property(
    "the mean over all rows of a batch", hint="How many rows has a batch of two texts of five tokens?"
)
def _(ask, rng):
    ask(made(rng), heads(rng, 2, batch=2, n=5), optimizer=SGD)


@imitation_step.property(
    "all at once: wide heads, large scores, another optimiser",
    hint="By the root of which number are the scores divided, and does your softmax survive large scores?",
)
def _(ask, rng):
    ask(made(rng, d=16, m=5), heads(rng, 2, d=16, n=6), optimizer=partial(torch.optim.AdamW, lr=0.1))
    ask(made(rng), heads(rng, 2, batch=3, size=30.0), optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9))
    ask(made(rng), heads(rng, 1, batch=1, n=1), optimizer=SGD)


def usual(
    features, optimiser, q, k, *, scale=lambda d: d**-0.5, normal=True, mean=True, zero=True, turned=False, one=False, square=False,
    late=False, axis=-1, entries=False, information=False, sign=1, moved=True,
):  # fmt: skip
    """A step in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""

    def loss_of():
        p = torch.softmax(q @ k.mT * scale(q.shape[-1]), dim=-1)
        w = features.of_q(q) @ (features.of_q if one else features.of_k)(k).mT
        w = w / w.sum(axis, keepdim=True) if normal else w
        rows = (p - w).square().sum(-1) if square else -((w * p.log()) if turned else (p * w.log())).sum(-1)
        rows = rows + (p * p.log()).sum(-1) if information else rows
        return sign * (rows.mean() / (q.shape[1] if entries else 1) if mean else rows.sum())

    loss = loss_of()
    if zero:
        optimiser.zero_grad()
    loss.backward()
    if moved:
        optimiser.step()
    return (loss_of() if late else loss).item()


for message, change in {
    "The scores of the head are not scaled: divide by the root of d.": {"scale": lambda d: 1.0},
    "The scores of the head are multiplied by the root of d: divide by it.": {"scale": lambda d: d**0.5},
    "The scores of the head are divided by d: divide by its root.": {"scale": lambda d: 1 / d},
    "w is not divided by the sum of its row.": {"normal": False},
    "The rows are added up: their mean is wanted.": {"mean": False},
    "Gradients of earlier steps are still there: zero_grad before backward.": {"zero": False},
    "p and w are exchanged: the softmax weights stand before the logarithm of w.": {"turned": True},
    "The keys go through the features of the queries: features.of_k is theirs.": {"one": True},
    "That is the squared distance: cross-entropy is asked for.": {"square": True},
    "The loss is that after the step.": {"late": True},
    "w is divided by the sums of its columns: each row has to add up to 1.": {"axis": -2},
    "The mean is over all entries: it is over the rows, and each row is a sum.": {"entries": True},
    "That is the divergence of w from p: cross-entropy has no logarithm of p.": {"information": True},
    "The sign of the loss is turned: logarithms of weights are negative.": {"sign": -1},
    "The weights have not moved: the optimiser's step comes after backward.": {"moved": False},
}.items():
    imitation_step.mistake(message)(partial(usual, **change))
