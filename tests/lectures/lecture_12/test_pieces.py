"""Lecture 12: sizes at their edges, the gates of heads, and the bytes of a grouped product."""

import numpy as np
import pytest
import torch

from attention import mixture
from utils import training


def test_one_expert_of_a_token_is_enough_and_none_is_refused():
    assert mixture.MixtureOfHeadsAttention(24, 6, 1)(torch.zeros(1, 3, 24)).shape == (1, 3, 24)
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"top_k must be from 1 to 5, got {top_k}"):
            mixture.RoutedWeights(24, 5, 8, top_k)


def test_gates_of_shared_and_routed_heads_are_softmaxes_times_their_balance():
    layer = training.initialise(mixture.MixtureOfHeadsAttention(12, 6, 2, 2).double(), 0)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 5, 12)))
    with torch.no_grad():
        found = layer.gates(x)
        for token, gates in zip(x.flatten(0, 1), found.flatten(0, 1)):
            shared, routed, balance = (
                np.exp((token @ w).numpy()) for w in (layer.w_shared, layer.w_router, layer.w_balance)
            )
            balance, chosen = 2 * balance / balance.sum(), np.argsort(-routed)[:2]
            expected = np.zeros(6)
            expected[:2] = balance[0] * 2 * shared / shared.sum()
            expected[2 + chosen] = balance[1] * 2 * routed[chosen] / routed[chosen].sum()
            np.testing.assert_allclose(gates, expected, rtol=1e-12)


@pytest.mark.parametrize(("columns", "reads"), [(1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_each_64_columns_read_the_rows_once(columns, reads):
    tiles = torch.tensor([[0, 0, 5], [2, 5, 9]])
    assert mixture.experts_bytes(tiles, 7, columns) == (4 * 9 * 7 * reads, 4 * 2 * 7 * columns, 4 * 9 * columns)
