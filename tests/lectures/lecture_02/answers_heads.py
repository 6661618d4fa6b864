"""Answers to exercise 2A: heads taken apart."""

import numpy as np

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


@right("2A")
def heads_by_transposes(x, n_heads):
    if n_heads == 0 or x.shape[-1] % n_heads:
        raise ValueError
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], n_heads, x.shape[-1] // n_heads, x.shape[-2]).swapaxes(-1, -2)


@right("2A")
def heads_one_by_one(x, n_heads):
    if n_heads not in range(1, 10**6) or x.shape[-1] % n_heads > 0:
        raise ValueError(f"{n_heads} heads")
    d_head = x.shape[-1] // n_heads
    parts = [x[..., i * d_head : (i + 1) * d_head] for i in range(n_heads)]
    if isinstance(x, np.ndarray):
        return np.stack(parts, axis=-3)
    import torch

    return torch.stack(parts, dim=-3)


@wrong("2A", "Use the methods x.reshape and x.swapaxes")
def heads_by_split(x, n_heads):
    return np.stack(np.split(x, n_heads, axis=-1), axis=-3)


@wrong("2A", "Which methods have arrays and tensors both?")
def heads_as_an_array(x, n_heads):
    x = x if isinstance(x, np.ndarray) else x.detach().numpy()
    return x.reshape(*x.shape[:-1], n_heads, -1).swapaxes(-3, -2)


@wrong("2A", "Use the methods x.reshape and x.swapaxes")
def heads_by_moveaxis(x, n_heads):
    *lead, seq, width = x.shape
    return np.moveaxis(np.reshape(x, (*lead, seq, n_heads, width // n_heads)), -2, -3)


@wrong("2A", "4 columns in 3 heads: the docstring promises a ValueError")
def heads_that_lose_a_column(x, n_heads):
    d_head = x.shape[-1] // n_heads
    return x[..., : n_heads * d_head].reshape(*x.shape[:-1], n_heads, d_head).swapaxes(-3, -2)


@wrong("2A", "4 columns in 3 heads: the docstring promises a ValueError")
def heads_without_a_sentence_for_tensors(x, n_heads):
    """The check at the top is lost: NumPy still raises a ValueError, torch a RuntimeError."""
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads).swapaxes(-3, -2)


@wrong("2A", "A reshape never moves a number")
def heads_reshaped(x, n_heads):
    return x.reshape(*x.shape[:-2], n_heads, x.shape[-2], -1)


@wrong("2A", "behind the sequence")
def heads_not_swapped(x, n_heads):
    return x.reshape(*x.shape[:-1], n_heads, -1)


@wrong("2A", "Count the axes from the end")
def heads_swapped_in_front(x, n_heads):
    return np.swapaxes(x.reshape(*x.shape[:-1], n_heads, -1), 0, 1)


@wrong("2A", "dealt out in turn")
def heads_every_other_column(x, n_heads):
    return np.stack([x[..., i::n_heads] for i in range(n_heads)], axis=-3)


@wrong("2A", "returned a list")
def heads_in_a_list(x, n_heads):
    return np.split(x, n_heads, axis=-1)
