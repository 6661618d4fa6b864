"""What the exercises about a training step share: the usual step, and the mistakes that do not depend on its loss."""

from torch import nn

CHANGES = {
    "The gradients of the step before are still there: set them to zero before backward.": {"zero": False},
    "The optimiser steps with gradients that are not clipped: clip them between backward and step.": {"clip": False},
    "Each parameter is clipped for itself: the norm is that of all gradients together.": {"each": True},
}


def usual_step(model, optimiser, *batch, loss, zero=True, clip=True, each=False):
    """A step in the usual way: loss(model, *batch) -> a tensor. With `zero`, `clip` and `each` as they stand it is right."""
    value = loss(model, *batch)
    if zero:
        optimiser.zero_grad()
    value.backward()
    if clip:
        for group in [[p] for p in model.parameters()] if each else [list(model.parameters())]:
            nn.utils.clip_grad_norm_(group, 1.0)
    optimiser.step()
    return value.item()
