"""Lecture 03: the loss of a model behind a gap of positions."""

import torch
from torch import nn

from utils.judge.function import exercise

MODULE = "rotary"


class Model(nn.Module):
    """ids (batch, n), positions (n,) -> logits (batch, n, vocabulary): a mean of earlier tokens, weighted by distance."""

    def __init__(self, rng, vocabulary=5, size=1.0):
        super().__init__()
        self.table = nn.Parameter(size * torch.from_numpy(rng.normal(size=(vocabulary, vocabulary))))

    def forward(self, ids, positions=None):
        places = (torch.arange(ids.shape[1]) if positions is None else positions).double()
        near = torch.cos(0.3 * (places[:, None] - places)).tril()
        return near @ self.table[ids]


class Tracked(Model):
    """A model that `ask.gradients` takes for a tensor: its gradient is that of its weights."""

    requires_grad = True

    def is_floating_point(self):
        return True

    def detach(self):
        return self

    clone = detach

    @property
    def grad(self):
        return self.table.grad


@exercise("3E", MODULE, importance="useful")
def gap_loss(model, ids, n_prompt, gap):
    places = torch.tensor([i + gap if i >= n_prompt else i for i in range(ids.shape[1])])
    chances = torch.log_softmax(model(ids, positions=places), dim=-1)
    total = [-chances[row, i, ids[row, i + 1]] for row in range(len(ids)) for i in range(n_prompt, ids.shape[1] - 1)]
    return sum(total) / len(total)


def text(rng, n, batch=1, vocabulary=5):
    return torch.from_numpy(rng.integers(vocabulary, size=(batch, n)))


@gap_loss.property(
    "no prompt and no gap: the mean next-token loss", hint="The logits at place i are about which token?"
)
def _(ask, rng):
    ask(Model(rng), text(rng, 3), 0, 0)
    ask(Model(rng), text(rng, 8), 0, 0)


@gap_loss.property(
    "only predictions behind the prompt count", hint="Which is the first place whose logits count, and which the last?"
)
def _(ask, rng):
    ask(Model(rng), text(rng, 5), 2, 0)
    ask(Model(rng), text(rng, 9), 4, 0)


@gap_loss.property("the gap moves what follows the prompt", hint="Which positions do tokens 1, 2 and 3 have?")
def _(ask, rng):
    ask(Model(rng), text(rng, 5), 2, 10)
    ask(Model(rng), text(rng, 9), 4, 1000)


@gap_loss.property("several texts: one mean of all", hint="Over which axis does cross_entropy expect the classes?")
def _(ask, rng):
    ask(Model(rng), text(rng, 7, batch=3), 3, 20)
    ask(Model(rng, vocabulary=7), text(rng, 7, batch=5, vocabulary=7), 2, 3)


@gap_loss.property("ids and large logits stay as they are", hint="Which function survives logits of 1,000?")
def _(ask, rng):
    ask(Model(rng, size=1000.0), text(rng, 6, batch=2), 2, 7)
    ask(Model(rng), text(rng, 6, batch=1), 1, 1)
    ask(Model(rng), text(rng, 4, batch=2), 2, 5)


@gap_loss.property(
    "it can be trained on: the gradient of the model",
    hint="Is it a tensor, and does the graph lead from it back to the model?",
)
def _(ask, rng):
    ask.gradients(Tracked(rng), text(rng, 6), 2, 10)
    ask.gradients(Tracked(rng), text(rng, 5, batch=2), 1, 3)


def usual(model, ids, n_prompt, gap, *, moved=lambda p, n, gap: torch.where(p >= n, p + gap, p), first=0, answer=1, reduce="mean"):  # fmt: skip
    """The loss in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    positions = moved(torch.arange(ids.shape[1]), n_prompt, gap)
    logits = model(ids, positions=positions)[:, n_prompt + first : ids.shape[1] - answer]
    return nn.functional.cross_entropy(logits.mT, ids[:, n_prompt + first + answer :], reduction=reduce)


gap_loss.mistakes_of(
    usual,
    {
        "The token that the prompt predicts is counted too: its prediction is made before the gap.": {"first": -1},
        "The first prediction behind the gap is left out.": {"first": 1},
        "Each token is asked for itself: the right answer is the next token.": {"answer": 0},
        "No distance has changed: the positions from n_prompt on are moved, and the others are not.": [
            {"moved": lambda p, n, gap: p},
            {"moved": lambda p, n, gap: p + gap},
        ],
        "The prompt is moved, not what follows it.": {"moved": lambda p, n, gap: torch.where(p < n, p + gap, p)},
        "Behind the gap the positions begin at the gap itself: n_prompt is missing.": {
            "moved": lambda p, n, gap: torch.where(p >= n, p - n + gap, p)
        },
        "The gap begins one token too late.": {"moved": lambda p, n, gap: torch.where(p > n, p + gap, p)},
        "The loss is the sum of all predictions: take the mean.": {"reduce": "sum"},
    },
)


@gap_loss.mistake("All tokens are counted: only the predictions that are made behind the gap.")
def _(model, ids, n_prompt, gap):
    places = torch.arange(ids.shape[1])
    places = torch.where(places >= n_prompt, places + gap, places)
    return nn.functional.cross_entropy(model(ids, positions=places)[:, :-1].mT, ids[:, 1:])


@gap_loss.mistake("The softmax is taken twice: cross_entropy wants logits.")
def _(model, ids, n_prompt, gap):
    places = torch.arange(ids.shape[1])
    places = torch.where(places >= n_prompt, places + gap, places)
    chances = model(ids, positions=places).softmax(-1)[:, n_prompt:-1]
    return nn.functional.cross_entropy(chances.mT, ids[:, n_prompt + 1 :])
