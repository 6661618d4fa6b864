"""Lecture 02: heads split."""

import numpy as np

from utils.exercises.arrays import draw, refuses
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "multi_head"


def parameter(array):
    """An array as a trainable tensor, which NumPy's functions refuse."""
    import torch  # here, because the process that tries answers imports this file too

    return torch.nn.Parameter(torch.from_numpy(array))


def numbers_of(x):
    return x.detach().numpy() if hasattr(x, "detach") else x


@exercise("2A", MODULE, formerly="2.2", importance="essential")
def split_heads(x, n_heads):
    x = numbers_of(x)
    d_head = x.shape[-1] // n_heads
    return np.stack([x[..., i * d_head : (i + 1) * d_head] for i in range(n_heads)], axis=-3)


def same(x):
    return x


def numbered(seq, width):
    """Token t, column c is 10 t + c, so that a report shows where each number came from."""
    return 10.0 * np.arange(seq)[:, None] + np.arange(width)


@split_heads.property(
    "head i has the columns i * d_head to (i + 1) * d_head",
    hint="Which columns of a row should head 0 have, and which has yours?",
)
def _(ask, rng):
    ask(numbered(3, 4), 2)


@split_heads.property(
    "heads in front of the sequence, also for odd sizes", hint="Which two axes change places, counted from the end?"
)
def _(ask, rng):
    ask(numbered(2, 6), 3)
    ask(draw(rng, 7, 15), 5)


@split_heads.property(
    "as many heads as tokens, or as columns, or one",
    hint="Which size does your code take for another one, where the two are equal?",
)
def _(ask, rng):
    ask(numbered(2, 4), 2)
    ask(numbered(2, 3), 3)
    ask(numbered(3, 3), 1)


@split_heads.property("leading axes stay in front", hint="Which axes do you count from the front?")
def _(ask, rng):
    ask(draw(rng, 2, 3, 4), 2)
    ask(draw(rng, 2, 1, 3, 6), 3)


@split_heads.property(
    "a tensor in, a tensor out",
    hint="Which methods have arrays and tensors both? And which numbers of heads does the docstring refuse?",
)
def _(ask, rng):
    ask(parameter(draw(rng, 7, 6)), 3)
    for width, n_heads in ((4, 3), (2, 4), (4, 0)):
        if not (refuses(ask, numbered(2, width), n_heads) and refuses(ask, parameter(numbered(2, width)), n_heads)):
            raise Failed(f"{width} columns in {n_heads} heads: the docstring promises a ValueError")


def cut_last(x, n_heads):
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)


for message, answer in {
    "A reshape never moves a number: cut the last axis in two first, then swap the axes.": lambda x, n_heads: x.reshape(
        *x.shape[:-2], n_heads, x.shape[-2], x.shape[-1] // n_heads
    ),
    "The heads are there, but behind the sequence: swap the two axes.": cut_last,
    "The columns are dealt out in turn: head 0 has the first d_head of them.": lambda x, n_heads: np.moveaxis(
        x.reshape(*x.shape[:-1], x.shape[-1] // n_heads, n_heads), -1, -3
    ),
    "Count the axes from the end (-3 and -2): in front there may be a batch.": lambda x, n_heads: cut_last(
        x, n_heads
    ).swapaxes(0, 1),
    "The last two axes are swapped: it is heads and sequence that change places.": lambda x, n_heads: np.moveaxis(
        cut_last(x, n_heads), -3, -1
    ),
}.items():
    split_heads.mistake(message)(answer)

for answer in (
    lambda x, n_heads: np.moveaxis(cut_last(x, n_heads), -2, -3),
    lambda x, n_heads: np.stack(np.split(x, n_heads, axis=-1), axis=-3),
):
    split_heads.mistake("Use the methods x.reshape and x.swapaxes: arrays and tensors have both.")(answer)
