"""Lecture 08: what a launch chooses, which bytes it reads, and what a device holds, against loops."""

import numpy as np
import pytest
import torch

from attention import grouped_query as g


def test_one_head_is_a_layer_too():
    assert g.GroupedQueryAttention(8, 1, 1)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match="n_kv_heads must divide n_heads"):
        g.GroupedQueryAttention(8, 0, 1)


@pytest.mark.parametrize(("heads", "kv_heads", "n"), [(8, 2, 16), (8, 2, 17), (3, 1, 1), (4, 4, 100)])
def test_keys_are_split_where_few_rows_share_them(heads, kv_heads, n):
    q, k, v = (torch.zeros(1, h, m, 4) for h, m in ((heads, n), (kv_heads, 1000), (kv_heads, 1000)))
    _, (grid, block, _), arguments = g.grouped_launch(q, k, v)
    splits = -(-1000 // g.GROUP_SPLIT) if heads // kv_heads * n <= 64 else 1
    assert grid[0] == kv_heads and grid[2] == splits and arguments[4].shape[1] == splits
    assert block[1] <= g.GROUP_WARPS and grid[1] * block[1] >= heads // kv_heads * n


@pytest.mark.parametrize("warps", [1, 3, 8, 32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "m"), [(4, 2, 5, 9), (6, 1, 4, 4), (2, 2, 40, 33), (8, 4, 1, 7), (3, 3, 7, 3)]
)
def test_the_bytes_of_a_causal_group_are_the_keys_that_some_row_of_a_block_sees(heads, kv_heads, n, m, warps):
    rows = [r % n for r in range(heads // kv_heads * n)]
    size = -(-len(rows) // -(-len(rows) // warps))
    blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
    keys = sum(max(max(0, i + 1 + m - n) for i in block) for block in blocks)
    assert g.grouped_bytes(heads, kv_heads, n, m, 3, 5, causal=True, itemsize=2, warps=warps) == kv_heads * keys * 8 * 2


def test_a_device_holds_the_bytes_of_its_heads():
    for heads, devices, own in ((8, 1, 8), (8, 2, 4), (8, 8, 1), (8, 16, 1), (6, 3, 2)):
        assert g.cache_per_device(5, heads, 16, devices, 2, 3) == 2 * 3 * own * 16 * 3
    assert isinstance(g.cache_per_device(5, 8, 16), (int, np.integer))


def test_a_turn_by_a_right_angle_takes_the_first_half_to_the_second():
    turned = g.turn_pairs(np.array([1.0, 2.0, 0.0, 3.0]), np.array([np.pi / 2, -np.pi / 2]))
    np.testing.assert_allclose(turned, [0, 3, 1, -2], atol=1e-12)


def test_axes_that_do_not_broadcast_are_told_in_their_order():
    q, k, v = (np.ones((lead, 2, 3, 4)) for lead in (2, 3, 5))
    with pytest.raises(ValueError, match=r"q, k and v must broadcast, got \(2,\), \(3,\) and \(5,\)"):
        g.check_grouped_arguments(q, k, v)
