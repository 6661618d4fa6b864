"""Lecture 11: pairs in groups, the first token as a gate, and bytes, against loops and sums."""

import numpy as np
import pytest
import torch

from attention import differential as m
from attention.fundamentals import attention_numpy


def test_the_lambdas_begin_small():
    torch.manual_seed(0)
    layer = m.DifferentialWeights(512, 2)
    drawn = torch.cat([p.detach() for name, p in layer.named_parameters() if name.startswith("lambda_")])
    assert len(drawn) == 4 * 128 and abs(drawn.std() - 0.1) < 0.02


def test_pairs_of_maps_share_the_keys_of_their_group():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((8, 5, 3), (2, 7, 3), (2, 7, 4)))
    logits = rng.standard_normal((4, 5))
    found = m.differential_pairs(q, k, v, logits)
    for pair in range(4):
        first, second = (attention_numpy(q[h], k[h // 4], v[h // 4], causal=True) for h in (2 * pair, 2 * pair + 1))
        np.testing.assert_allclose(found[pair], first - second / (1 + np.exp(-logits[pair]))[:, None], atol=1e-12)
    for wrong in (k[:0], np.concatenate([k, k[:1]])):
        with pytest.raises(ValueError, match="each group must hold whole pairs"):
            m.differential_pairs(q, wrong, wrong, logits)


@pytest.mark.parametrize(("n", "keys"), [(5, 5), (3, 7), (1, 1)])
def test_with_the_first_token_as_a_gate_it_is_the_same_attention(n, keys):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, length, 4)) for length in (n, keys, keys))
    out, gate = m.first_as_gate(*map(torch.from_numpy, (q, k, v)))
    np.testing.assert_allclose(out, attention_numpy(q, k, v, causal=True), atol=1e-12)
    scores = np.einsum("...id,...jd->...ij", q, k) / 2
    later = np.where(np.arange(1, keys) <= np.arange(n)[:, None] + keys - n, np.exp(scores[..., 1:]), 0).sum(-1)
    np.testing.assert_allclose(gate, later / (later + np.exp(scores[..., 0])), atol=1e-12)


@pytest.mark.parametrize(("maps", "outputs"), [(1, 1), (2, 5)])
def test_two_calls_read_the_values_twice(maps, outputs):
    keys, queries, output = m.differential_bytes(20, 30, 4, 6, maps=maps)
    assert keys == 4 * 2 * 30 * (4 + 4 + maps * 6)  # two tiles of queries
    assert queries == 4 * 20 * (4 + 4) and output == 4 * 20 * 6 * outputs


def test_one_column_is_enough_and_none_is_refused():
    q, k, v = np.ones((3, 1)), np.ones((4, 1)), np.ones((4, 2))
    assert m.check_differential(q, k, q, k, v, 0.5) == ()
    with pytest.raises(ValueError, match="the same d_head of at least 1"):
        m.check_differential(q[:, :0], k[:, :0], q[:, :0], k[:, :0], v, 0.5)
