"""Lecture 12: a loss and a bias that make loads even. The oracles count slot by slot."""

import numpy as np
import torch

from utils.judge.function import exercise

MODULE = "mixture"


def tensor(rng, *shape):
    """Rows of different whole numbers, so that no two logits of a token are equal.

    Slots number a power of two below where they can: a count over them is exact, also as the single precision that
    torch makes of a whole number over a whole number.
    """
    return torch.from_numpy(np.argsort(rng.random(shape), axis=-1).astype(float))


def biases(rng, n):
    """n numbers, no two of which differ by a whole one."""
    return torch.from_numpy(rng.integers(-2, 3, n) + np.arange(n) / 10)


def counted(rows, k):
    """How many rows (n, n_experts) choose each expert."""
    counts = [0] * rows.shape[1]
    for row in rows.tolist():
        for e in sorted(range(len(row)), key=lambda e: -row[e])[:k]:
            counts[e] += 1
    return counts


@exercise("12D", MODULE, importance="essential")
def load_balancing_loss(router_logits, top_k):
    rows = router_logits.reshape(-1, router_logits.shape[-1])
    powers = torch.exp(rows - rows.detach().max(-1, keepdim=True).values)
    probabilities = powers / powers.sum(-1, keepdim=True)
    total = 0.0
    for e, count in enumerate(counted(rows, top_k)):
        total = total + count / (len(rows) * top_k) * probabilities[:, e].sum() / len(rows)
    return rows.shape[1] * total


@load_balancing_loss.property(
    "even: 1; everything to one expert: n_experts",
    hint="By which number is the sum over experts multiplied, and by what are the counts divided?",
)
def _(ask, rng):
    ask(50 * torch.eye(4, dtype=torch.float64), 1)
    collapsed = torch.zeros(6, 4, dtype=torch.float64)
    collapsed[:, 2] = 50.0
    ask(collapsed, 1)


@load_balancing_loss.property(
    "top 1 and more, uneven logits",
    hint="The loads are shares of all slots: how many slots have n tokens with k experts?",
)
def _(ask, rng):
    ask(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]).double(), 2)
    ask(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]]).double(), 1)
    ask(tensor(rng, 8, 5), 2)
    ask(3 * tensor(rng, 16, 4), 4)


@load_balancing_loss.property(
    "one batch, whatever axes stand in front",
    hint="Over which tokens are loads and means taken: over each text, or over all?",
)
def _(ask, rng):
    ask(3 * tensor(rng, 4, 8, 5), 2)
    ask(3 * tensor(rng, 2, 2, 4, 3), 1)
    ask(3 * tensor(rng, 6), 2)


@load_balancing_loss.property(
    "the gradient goes through the probabilities",
    hint="Which of the two factors may be differentiated, and where does it leave the graph?",
)
def _(ask, rng):
    ask.gradients(2 * tensor(rng, 8, 4), 1)
    ask.gradients(2 * tensor(rng, 8, 4, 5), 2)


@load_balancing_loss.property(
    "all at once: float32, two texts, large logits",
    hint="Does the softmax survive large logits, and which type comes back?",
)
def _(ask, rng):
    ask.gradients((200 + tensor(rng, 2, 8, 6)).float(), 3)


def usual_loss(
    router_logits, top_k, *, factor=lambda e, k: e, slots=True, soft=False, hard=False, split=False, over=-1, few=False
):
    """The loss in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    rows = router_logits if split else router_logits.reshape(-1, router_logits.shape[-1])
    n_experts = rows.shape[-1]
    chosen = torch.zeros_like(rows).scatter(-1, rows.topk(top_k, dim=-1).indices, 1.0)
    mean = (rows.masked_fill(chosen == 0, -torch.inf) if few else rows).softmax(over).mean(-2)
    load = chosen.mean(-2) / (top_k if slots else 1)
    load, mean = (mean if soft else load), (load if hard else mean)
    return (factor(n_experts, top_k) * (load * mean).sum(-1)).mean()


load_balancing_loss.mistakes_of(
    usual_loss,
    {
        "The factor n_experts is missing.": {"factor": lambda e, k: 1},
        "The mean over experts is taken: it is n_experts times the sum.": {"factor": lambda e, k: 1 / e},
        "The counts are divided by the tokens: with k experts a token has k slots, and loads sum to 1.": {
            "slots": False
        },
        "Both factors are mean probabilities: one of them is the load, counted.": {"soft": True},
        "Both factors are counted loads: nothing of that has a gradient.": {"hard": True},
        "Each text has a loss of its own here: loads and means are those of the whole batch.": {"split": True},
        "The softmax runs over the tokens: each token has probabilities over its experts.": {"over": 0},
        "The probabilities are a softmax over the chosen logits, as the gates are: here it runs over all.": {
            "few": True
        },
    },
)


@exercise("12E", MODULE, importance="useful")
def balancing_step(bias, router_logits, top_k, speed):
    rows = router_logits.reshape(-1, len(bias)) + bias
    counts = counted(rows, top_k)
    moves = [(sum(counts) > len(counts) * count) - (sum(counts) < len(counts) * count) for count in counts]
    return bias + speed * torch.tensor(moves, dtype=bias.dtype)


@balancing_step.property(
    "up where too few, down where too many",
    hint="Which sign has the mean count minus an expert's own, and what is it where both are equal?",
)
def _(ask, rng):
    ask(
        torch.zeros(3).double(),
        torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 1.0], [0.0, 5.0, 1.0]]).double(),
        1,
        speed=0.5,
    )
    ask(torch.zeros(4).double(), tensor(rng, 9, 4), 2, 0.25)


@balancing_step.property("exactly the mean: unchanged", hint="What does torch.sign make of 0?")
def _(ask, rng):
    ask(torch.tensor([1.0, -1.0, 0.5]).double(), 9 * torch.eye(3, dtype=torch.float64), 1, 0.5)
    rows = torch.tensor([[9.0, 0.0, 1.0], [9.0, 0.0, 1.0], [0.0, 1.0, 9.0], [0.0, 9.0, 1.0]]).double()
    ask(torch.zeros(3).double(), rows[[0, 2, 3, 0, 2, 0]], 1, 0.5)


@balancing_step.property(
    "chosen by logits plus bias", hint="Which experts would be chosen in the next step: are they counted with the bias?"
)
def _(ask, rng):
    ask(torch.tensor([2.5, 0.1, -2.2, 0.7]).double(), tensor(rng, 8, 4), 1, 0.5)
    ask(biases(rng, 5), tensor(rng, 12, 5), 2, 0.125)


@balancing_step.property(
    "one batch, whatever axes stand in front", hint="How many tokens are counted, whatever their text?"
)
def _(ask, rng):
    ask(biases(rng, 4), 2 * tensor(rng, 3, 5, 4), 2, 0.015625)


@balancing_step.property("all at once: float32, three axes, biases of any size", hint="Which float type has the bias?")
def _(ask, rng):
    ask((3 * biases(rng, 6)).float(), (3 * tensor(rng, 2, 9, 6)).float(), 3, 0.125)


def usual_step(bias, router_logits, top_k, speed, *, use=1.0, sign=1.0, move=torch.sign, mean=True):
    """The step in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    rows = router_logits.reshape(-1, len(bias)) + use * bias
    counts = torch.zeros_like(rows).scatter(-1, rows.topk(top_k, dim=-1).indices, 1.0).sum(0)
    middle = counts.mean() if mean else counts.median()
    return bias + sign * speed * move(middle - counts)


balancing_step.mistakes_of(
    usual_step,
    {
        "The bias moves the wrong way: up for an expert with too few slots.": {"sign": -1.0},
        "The experts are chosen without the bias: add it to the logits.": {"use": 0.0},
        "The bias is subtracted from the logits: add it.": {"use": -1.0},
        "An expert with exactly the mean count moves down: it stays where it is.": {
            "move": lambda gap: torch.where(gap > 0, 1.0, -1.0)
        },
        "An expert with exactly the mean count moves up: it stays where it is.": {
            "move": lambda gap: torch.where(gap < 0, -1.0, 1.0)
        },
        "The step grows with the distance from the mean: only its sign counts here.": {"move": lambda gap: gap},
        "The counts are compared with their median: the mean is asked for.": {"mean": False},
    },
)


@balancing_step.mistake("What is returned is the step alone: add it to the bias.")
def _(bias, router_logits, top_k, speed):
    return usual_step(bias, router_logits, top_k, speed) - bias
