"""Lecture 02: weights taken from torch, and heads split."""

from functools import partial

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "multi_head"


def parameter(array):
    """An array as a trainable tensor, which NumPy's functions refuse."""
    import torch  # here, because the process that tries answers imports this file too

    return torch.nn.Parameter(torch.from_numpy(array))


def numbers_of(x):
    return x.detach().numpy() if hasattr(x, "detach") else x


# --- 2.1 -------------------------------------------------------------------------------------------------------------


@exercise("2.1", MODULE, returns=("w_q", "w_k", "w_v", "w_o"))
def weights_from_torch(in_proj_weight, out_proj_weight):
    in_proj_weight, out_proj_weight = numbers_of(in_proj_weight), numbers_of(out_proj_weight)
    d = len(out_proj_weight)
    parts = [in_proj_weight[part * d : (part + 1) * d] for part in range(3)] + [out_proj_weight]
    return tuple(np.array([[w[j, i] for j in range(d)] for i in range(d)]) for w in parts)


@weights_from_torch.property("queries' matrix on top, then keys', then values'")
def _(ask, rng):
    ask(np.concatenate([np.eye(2), 2 * np.eye(2), 3 * np.eye(2)]), np.eye(2))


@weights_from_torch.property("w_q, w_k, w_v are transposed, to be used as x @ w")
def _(ask, rng):
    ask(draw(rng, 6, 2), draw(rng, 2, 2))


@weights_from_torch.property("w_o is transposed too")
def _(ask, rng):
    ask(np.concatenate([np.eye(2)] * 3), draw(rng, 2, 2))


@weights_from_torch.property("any d_model")
def _(ask, rng):
    ask(draw(rng, 3, 1), draw(rng, 1, 1))
    ask(draw(rng, 15, 5), draw(rng, 5, 5))


@weights_from_torch.property("tensors in, tensors out", hint="Use slices and .T: arrays and tensors have both.")
def _(ask, rng):
    ask(parameter(draw(rng, 21, 7)), parameter(draw(rng, 7, 7)))


def in_thirds(w):
    return [w[i * w.shape[1] : (i + 1) * w.shape[1]] for i in range(3)]


def transposed(w):
    return w.T


def usual_weights(
    in_proj_weight, out_proj_weight, *, cut=in_thirds, turned=transposed, last=transposed, order=(0, 1, 2)
):
    """The weights in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    parts = cut(in_proj_weight)
    return (*(turned(parts[i]) for i in order), last(out_proj_weight))


def same(w):
    return w


for message, change in {
    "None of them is transposed: torch computes x @ w.T, this course x @ w.": {"turned": same, "last": same},
    "w_q, w_k and w_v are not transposed: torch computes x @ w.T, this course x @ w.": {"turned": same},
    "w_o is not transposed: torch computes x @ w.T, this course x @ w.": {"last": same},
    "Cut along the first axis: the three matrices lie on top of each other.": {"cut": lambda w: np.split(w, 3, axis=1)},
    "Cut first, then transpose each part: the transpose of the whole has the parts side by side.": {
        "cut": lambda w: in_thirds(w.T)
    },
    "The rows are dealt out in turn: rows 0 to d_model - 1 are all w_q's.": {
        "cut": lambda w: [w[i::3] for i in range(3)]
    },
    "Keys and queries have changed places.": {"order": (1, 0, 2)},
    "Keys and values have changed places.": {"order": (0, 2, 1)},
    "Use slices and .T: arrays and tensors have both.": {"turned": np.transpose, "last": np.transpose},
}.items():
    weights_from_torch.mistake(message)(partial(usual_weights, **change))


# --- 2.2 -------------------------------------------------------------------------------------------------------------


@exercise("2.2", MODULE)
def split_heads(x, n_heads):
    x = numbers_of(x)
    d_head = x.shape[-1] // n_heads
    return np.stack([x[..., i * d_head : (i + 1) * d_head] for i in range(n_heads)], axis=-3)


def numbered(seq, width):
    """Token t, column c is 10 t + c, so that a report shows where each number came from."""
    return 10.0 * np.arange(seq)[:, None] + np.arange(width)


@split_heads.property("head i has the columns i * d_head to (i + 1) * d_head")
def _(ask, rng):
    ask(numbered(3, 4), 2)


@split_heads.property("heads in front of the sequence, also for odd sizes")
def _(ask, rng):
    ask(numbered(2, 6), 3)
    ask(draw(rng, 7, 15), 5)


@split_heads.property("as many heads as tokens, or as columns, or one")
def _(ask, rng):
    ask(numbered(2, 4), 2)
    ask(numbered(2, 3), 3)
    ask(numbered(3, 3), 1)


@split_heads.property("leading axes stay in front")
def _(ask, rng):
    ask(draw(rng, 2, 3, 4), 2)
    ask(draw(rng, 2, 1, 3, 6), 3)


@split_heads.property(
    "a tensor in, a tensor out", hint="Use the methods x.reshape and x.swapaxes: arrays and tensors have both."
)
def _(ask, rng):
    ask(parameter(draw(rng, 7, 6)), 3)


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
