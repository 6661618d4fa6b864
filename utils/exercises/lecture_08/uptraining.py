"""Lecture 08: a step of uptraining a language model."""

from functools import partial

import torch
from torch import nn

from utils.exercises.steps import CHANGES, usual_step
from utils.judge.step import step

MODULE = "grouped_query"
SGD = partial(torch.optim.SGD, lr=0.5)


@step("8E", MODULE, importance="useful")
def uptraining_step(model, optimiser, ids):
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(ids)[:, :-1]
    right = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])
    loss = -right.mean()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    for parameter, gradient in zip(trained, gradients):
        parameter.grad = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
    optimiser.step()
    return loss.item()


def model(size, frozen=False, vocabulary=5):
    """ids (batch, n) -> logits (batch, n, vocabulary), of each token alone; the larger its weights, the larger its gradients."""
    built = nn.Sequential(nn.Embedding(vocabulary, 3), nn.Linear(3, vocabulary)).double()
    for parameter in built.parameters():
        parameter.data *= size
    built[0].weight.requires_grad_(not frozen)
    return built


def texts(rng, count, batch=2, n=6, vocabulary=5):
    return [(torch.from_numpy(rng.integers(vocabulary, size=(batch, n))),) for _ in range(count)]


@uptraining_step.property(
    "one step: loss and weights", hint="Which token is the right answer to the logits at place 0?"
)
def _(ask, rng):
    ask(model(0.5), texts(rng, 1), optimizer=SGD)


@uptraining_step.property("three steps, nothing left over", hint="What does backward do with gradients that are there?")
def _(ask, rng):
    ask(model(0.5), texts(rng, 3), optimizer=SGD)


@uptraining_step.property(
    "all gradients clipped to norm 1", hint="What is clipped, and when: before or after backward?"
)
def _(ask, rng):
    ask(model(200.0), texts(rng, 2), optimizer=SGD)


@uptraining_step.property(
    "what is frozen stays", hint="Which parameters have no gradient, and does your code touch them?"
)
def _(ask, rng):
    ask(model(0.5, frozen=True), texts(rng, 2), optimizer=SGD)


@uptraining_step.property("any sizes, any optimiser", hint="Over which axis does cross_entropy expect the classes?")
def _(ask, rng):
    ask(model(0.5, vocabulary=9), texts(rng, 2, 3, 2, 9), optimizer=partial(torch.optim.AdamW, lr=0.1))
    ask(model(0.5), texts(rng, 2, 1, 12), optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9))


def next_loss(model, ids):
    return nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])


usual = partial(usual_step, loss=next_loss)


uptraining_step.mistakes_of(
    usual,
    {
        "Each token is asked for itself: the right answer is the next token.": {
            "loss": lambda model, ids: nn.functional.cross_entropy(model(ids).mT, ids)
        },
        "The shift goes the wrong way: the answer stands one place later, not earlier.": {
            "loss": lambda model, ids: nn.functional.cross_entropy(model(ids[:, 1:]).mT, ids[:, :-1])
        },
        "Only the last token is asked for: every token but the first is an answer.": {
            "loss": lambda model, ids: nn.functional.cross_entropy(model(ids[:, :-1])[:, -1], ids[:, -1])
        },
        **CHANGES,
        "The loss is the sum over all predictions: take the mean.": {
            "loss": lambda model, ids: next_loss(model, ids) * ids[:, 1:].numel()
        },
        "The softmax is taken twice: cross_entropy wants logits.": {
            "loss": lambda model, ids: nn.functional.cross_entropy(model(ids[:, :-1]).softmax(-1).mT, ids[:, 1:])
        },
    },
)


@uptraining_step.mistake("What is returned is the loss after the step: the one before it is asked for.")
def _(model, optimiser, ids):
    usual(model, optimiser, ids)
    return next_loss(model, ids).item()


@uptraining_step.mistake("No weight moves: is step() called, and are the gradients still there when it is?")
def _(model, optimiser, ids):
    return next_loss(model, ids).item()
