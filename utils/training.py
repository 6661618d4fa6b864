"""Training for the small models of the course: the same first weights on every system, one loop for all."""

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm


class History(NamedTuple):
    """What `fit` records: losses[i] is the training loss of step i + 1, metrics[i] was measured after steps[i] steps."""

    losses: list[float]
    steps: list[int]
    metrics: list[float]


def initialise(module, seed):
    """Draw the parameters of a module again, from numpy's default_rng(seed), in their usual scale. Returns the module.

    torch's own generator gives other numbers on other systems. Linear, convolution and recurrent layers get
    U(-b, b) with b = 1/sqrt(fan in), or 1/sqrt(hidden size), as in torch; embeddings N(0, 1). A module's own parameters are taken
    as weights (d_in, d_out) and get U(-b, b) with b = 1/sqrt(d_in), unless all their elements are equal:
    zero biases, gains of one and single numbers stay as they were set.
    """
    rng = np.random.default_rng(seed)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(part, nn.Embedding):
                drawn = rng.standard_normal(parameter.shape)
                if part.padding_idx is not None:
                    drawn[part.padding_idx] = 0.0
            else:
                bound = _bound(part, parameter)
                if bound is None:
                    continue
                drawn = rng.uniform(-bound, bound, parameter.shape)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.asarray(drawn)))
    return module


def _bound(part, parameter):
    """Half the width of the uniform distribution of a parameter; None where it keeps the value it has."""
    if isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
        return part.hidden_size**-0.5
    if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return part.weight[0].numel() ** -0.5
    if (parameter == parameter.flatten()[0]).all():
        return None
    return parameter.shape[0] ** -0.5


def windows(ids, length, batch, seed):
    """Endless batches (batch, length + 1) int64, each row a random stretch of `ids` (n,): `length` tokens and the next."""
    if length < 1 or len(ids) < length + 2:
        raise ValueError(f"length must be from 1 to {len(ids) - 2} for {len(ids)} ids, not {length}")
    rng = np.random.default_rng(seed)
    while True:
        starts = torch.from_numpy(rng.integers(len(ids) - length - 1, size=batch))
        yield ids[starts[:, None] + torch.arange(length + 1)]


def next_token_loss(model, ids):
    """The mean cross-entropy (nats) of a model's logits for ids[:, :-1] against ids[:, 1:]; ids (batch, n) int64."""
    return nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])


def fit(model, batches, loss, steps, lr=3e-3, evaluate=None, every=50, stop_at=None):
    """Train a model with AdamW, its gradient clipped to norm 1. Returns a `History`.

    batches: an iterable of batches, at least `steps` long (a generator may be endless).
    loss(model, batch): the scalar tensor to make small.
    evaluate(model): a number, measured every `every` steps and after the last, without gradients, in evaluation mode.
    stop_at: training ends as soon as `evaluate` reaches it.
    RuntimeError where the loss is not finite.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"steps and every must be at least 1, not {steps} and {every}")
    if stop_at is not None and evaluate is None:
        raise ValueError("stop_at needs evaluate, the metric that is to reach it")
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    history = History([], [], [])
    batches = iter(batches)
    model.train()
    for step in tqdm(range(1, steps + 1), leave=False, file=sys.stdout):  # on stderr JupyterLab leaves a red strip
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(f"batches ended after {step - 1} of {steps} steps") from None
        value = loss(model, batch)
        if not torch.isfinite(value):
            raise RuntimeError(f"the loss is {value.item()} at step {step}: a smaller lr than {lr} may help")
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        history.losses.append(value.item())
        if evaluate is not None and (step % every == 0 or step == steps):
            model.eval()
            with torch.no_grad():
                metric = float(evaluate(model))
            model.train()
            history.steps.append(step)
            history.metrics.append(metric)
            if stop_at is not None and metric >= stop_at:
                break
    model.eval()
    return history
