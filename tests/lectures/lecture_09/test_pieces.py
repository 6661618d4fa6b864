"""Lecture 09: groups as a latent, and an empty batch."""

import numpy as np
import torch

from attention import latent
from attention.fundamentals import attention_numpy


def test_groups_are_a_latent_whatever_the_sizes():
    rng = np.random.default_rng(0)
    for heads, groups, n, m, d in ((4, 2, 3, 5, 3), (6, 3, 4, 4, 2), (3, 1, 1, 6, 5), (2, 2, 2, 2, 7)):
        q, k, v = (rng.standard_normal((2, h, length, d)) for h, length in ((heads, n), (groups, m), (groups, m)))
        expected = [
            attention_numpy(q[:, h], k[:, h * groups // heads], v[:, h * groups // heads], causal=True)
            for h in range(heads)
        ]
        found = latent.grouped_as_latent(*map(torch.from_numpy, (q, k, v)))
        np.testing.assert_allclose(found, np.stack(expected, 1), atol=1e-12)


def test_no_sequences_have_no_splits():
    q, c = torch.zeros(0, 4, 8), torch.zeros(0, 5, 8)
    _, (grid, _, _), arguments = latent.latent_launch(q, q[..., :0], c, c[..., :0], [], 1.0)
    assert grid[0] == grid[2] == 0 and arguments[5].shape == (0, 0, 8)
