"""Lecture 13: an address for each text of a batch, and what a block begins with."""

import numpy as np
import torch

from attention import beyond


def test_each_text_s_address_is_blended_shifted_sharpened_and_sums_to_one():
    rng = np.random.default_rng(0)
    memory, key = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 3))
    last, shift = rng.dirichlet(np.ones(5), 2), rng.dirichlet(np.ones(3), 2)
    found = beyond.address(*map(torch.from_numpy, (memory, last, key)), 2.0, 0.3, torch.from_numpy(shift), 1.5)
    for b in range(2):
        alike = memory[b] @ key[b] / np.linalg.norm(memory[b], axis=1) / np.linalg.norm(key[b])
        w = 0.3 * np.exp(2 * alike) / np.exp(2 * alike).sum() + 0.7 * last[b]
        w = np.array([sum(shift[b, s + 1] * w[(i - s) % 5] for s in (-1, 0, 1)) for i in range(5)]) ** 1.5
        np.testing.assert_allclose(found[b], w / w.sum(), rtol=1e-9)


def test_a_block_begins_with_weights_that_keep_the_size_of_a_vector():
    torch.manual_seed(0)
    for name, weights in beyond.SetBlock(256, 4).named_parameters():
        assert abs(weights.std().item() * 256**0.5 - 1) < 0.05, name
