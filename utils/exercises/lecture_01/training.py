"""Lecture 01: a training step. Models are an embedding and a linear layer, with gradients far above and below norm 1."""

from functools import partial

import torch
from torch import nn

from utils.exercises.steps import CHANGES, usual_step
from utils.judge.step import step

MODULE = "fundamentals"
SGD = partial(torch.optim.SGD, lr=0.5)


@step("1E", MODULE, importance="useful")
def training_step(model, optimiser, x, y):
    parameters = list(model.parameters())
    logits = model(x)
    right = torch.log_softmax(logits, -1).gather(-1, y[..., None])
    loss = -right.mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
    optimiser.step()
    return loss.item()


def model(size, n_answers=3):
    """x (batch, n) -> logits (batch, n, n_answers); the larger its weights, the larger its gradients."""
    built = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, n_answers)).double()
    for parameter in built.parameters():
        parameter.data *= size
    return built


def batches(rng, count, batch=2, n=4, n_answers=3):
    return [
        (torch.from_numpy(rng.integers(5, size=(batch, n))), torch.from_numpy(rng.integers(n_answers, size=(batch, n))))
        for _ in range(count)
    ]


@training_step.property(
    "one step: loss and weights",
    hint="In which order do backward and step stand, and over which axis of the logits does the loss run?",
)
def _(ask, rng):
    ask(model(0.3), batches(rng, 1), optimizer=SGD)


@training_step.property("three steps, nothing left over", hint="What does backward do with gradients that are there?")
def _(ask, rng):
    ask(model(0.3), batches(rng, 3), optimizer=SGD)


@training_step.property("all gradients clipped to norm 1", hint="What is clipped, and when: before or after backward?")
def _(ask, rng):
    ask(model(200.0), batches(rng, 2), optimizer=SGD)  # far above 1: what is added to the norm does not show


@training_step.property("any shape, any optimiser", hint="Where does your step make something that it was given?")
def _(ask, rng):
    ask(model(0.3, 7), batches(rng, 2, 3, 1, 7), optimizer=partial(torch.optim.AdamW, lr=0.1))
    ask(model(0.3, 4), batches(rng, 2, 1, 6, 4), optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).transpose(1, 2), y)


usual = partial(usual_step, loss=loss_of)


training_step.mistakes_of(
    usual,
    {
        **CHANGES,
        "The loss is the sum over all answers: take the mean.": {
            "loss": lambda model, x, y: nn.functional.cross_entropy(model(x).transpose(1, 2), y, reduction="sum")
        },
        "cross_entropy wants the classes on axis 1: which two axes of the logits change places?": {
            "loss": lambda model, x, y: nn.functional.cross_entropy(model(x), y)
        },
        "A reshape does not let two axes change places: it deals the logits out to other positions.": {
            "loss": lambda model, x, y: nn.functional.cross_entropy(
                (logits := model(x)).reshape(len(logits), logits.shape[2], logits.shape[1]), y
            )
        },
        "The softmax is taken twice: cross_entropy wants logits.": {
            "loss": lambda model, x, y: nn.functional.cross_entropy(model(x).softmax(-1).transpose(1, 2), y)
        },
    },
)


@training_step.mistake("What is returned is the loss after the step: the one before it is asked for.")
def _(model, optimiser, x, y):
    usual(model, optimiser, x, y)
    return loss_of(model, x, y).item()


@training_step.mistake("The gradients are clipped number by number (clip_grad_value_): scale them all together.")
def _(model, optimiser, x, y):
    value = loss_of(model, x, y)
    optimiser.zero_grad()
    value.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimiser.step()
    return value.item()


@training_step.mistake("Gradients of a norm below 1 are scaled up: only larger ones are scaled, down to 1.")
def _(model, optimiser, x, y):
    value = loss_of(model, x, y)
    optimiser.zero_grad()
    value.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    for p in model.parameters():
        p.grad /= norm
    optimiser.step()
    return value.item()


@training_step.mistake("No weight moves: is step() called, and are the gradients still there when it is?")
def _(model, optimiser, x, y):
    return loss_of(model, x, y).item()
