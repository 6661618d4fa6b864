"""Lecture 03's CUDA part: rotary embedding by a kernel, against NumPy and PyTorch, its limits and its bytes."""

import numpy as np
import pytest
import torch

from attention import rotary as r

CASES = [  # shape of x, pairs rotated, positions of a batch
    ((7, 2), 1, False), ((3, 10), 5, False), ((5, 33), 7, False), ((4, 5), 0, False), ((3, 19, 16), 8, False),
    ((2, 3, 5, 24), 8, True), ((2, 3, 1, 64), 32, True), ((3, 11, 10), 5, True), ((2, 2, 2, 6, 12), 4, True),
    ((1, 40, 9, 8), 4, False)]  # fmt: skip


def draw(shape, n_pairs, batched, seed=0):
    rng = np.random.default_rng(seed)
    positions = rng.integers(0, 100_000, (shape[0], shape[-2]) if batched else shape[-2])
    frequencies = 10_000.0 ** (-np.arange(n_pairs) / max(n_pairs, 1))
    return rng.standard_normal(shape).astype(np.float32), np.atleast_1d(positions), frequencies


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_triple_agrees_for_odd_sizes_partial_rotation_and_far_positions(case, interleaved):
    x, positions, frequencies = draw(*case)
    expected = r.apply_rope_numpy(x.astype(float), positions, frequencies, 1.3, interleaved)
    np.testing.assert_allclose(r.apply_rope_cuda(x, positions, frequencies, 1.3, interleaved), expected, atol=1e-5)
    tensors = [torch.from_numpy(a) for a in (x, positions, frequencies)]
    np.testing.assert_allclose(r.apply_rope_torch(*tensors, 1.3, interleaved).numpy(), expected, atol=1e-5)


def test_positions_of_a_billion_and_below_zero_lose_nothing():
    x, _, frequencies = draw((4, 16), 8, False)
    positions = np.array([-3, 10**9, 2**31 + 5, 100_000])
    expected = r.apply_rope_numpy(x, positions, frequencies)
    np.testing.assert_allclose(r.apply_rope_cuda(x, positions, frequencies), expected, atol=2e-6)


def test_inputs_are_not_changed_and_views_are_taken():
    x, positions, frequencies = draw((6, 40), 16, False)
    before = x.copy()
    expected = r.apply_rope_numpy(x[:, 1:34], positions, frequencies)
    np.testing.assert_allclose(r.apply_rope_cuda(x[:, 1:34], positions, frequencies), expected, atol=1e-5)
    turned = torch.from_numpy(x).T[:34].T
    np.testing.assert_allclose(r.apply_rope_cuda(turned, positions, frequencies).numpy(),
                               r.apply_rope_numpy(x[:, :34], positions, frequencies), atol=1e-5)  # fmt: skip
    # A contiguous tensor whose first number is no multiple of 16 bytes: float4 would not do.
    shifted = torch.from_numpy(x.reshape(-1)[1 : 1 + 6 * 32].copy())
    shifted = torch.cat([torch.zeros(1), shifted])[1:].view(6, 32)
    wide, *_ = r.rope_launch(shifted, torch.from_numpy(positions), torch.from_numpy(frequencies))
    assert not wide
    assert np.array_equal(x, before)


def test_limits():
    x, positions, frequencies = draw((3, 6, 16), 8, False)
    assert np.array_equal(r.apply_rope_cuda(x, 0 * positions, frequencies), x)
    assert np.array_equal(r.apply_rope_cuda(x, positions, frequencies[:0]), x)
    turned = r.apply_rope_cuda(x, positions, frequencies)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(r.apply_rope_cuda(turned, -positions, frequencies), x, atol=1e-5)
    partial = r.apply_rope_cuda(x, positions, frequencies[:4], attention_scale=2.0)
    assert np.array_equal(partial[..., 8:], x[..., 8:])


BAD = {
    "x must have at least two axes": ((8,), (8,), (4,)),
    "positions must have shape": ((5, 8), (4,), (4,)),
    "frequencies must be one for each pair": ((5, 8), (5,), (5,)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes_get_one_sentence(message):
    x, positions, frequencies = BAD[message]
    with pytest.raises(ValueError, match=message):
        r.apply_rope_cuda(np.zeros(x, np.float32), np.zeros(positions, np.int64), np.zeros(frequencies))


def test_positions_between_two_tokens_are_refused():
    with pytest.raises(ValueError, match="positions must be integers, got float64"):
        r.apply_rope_cuda(np.zeros((2, 8), np.float32), np.array([0.0, 0.5]), np.ones(4))


@pytest.mark.parametrize("interleaved", [False, True])
def test_bytes_of_the_kernel_equal_the_floor_on_twenty_random_sizes(interleaved):
    rng = np.random.default_rng(3)
    for _ in range(20):
        shape = tuple(int(n) for n in (*rng.integers(1, 4, 2), rng.integers(1, 12), rng.integers(2, 40)))
        x, positions, frequencies = draw(shape, int(rng.integers(0, shape[-1] // 2 + 1)), bool(rng.integers(2)))
        tensors = [torch.from_numpy(a) for a in (x, positions, frequencies)]
        wide, grid, block, arguments, out = r.rope_launch(*tensors, 1.0, interleaved)
        report = r.rope_kernel(wide).check[grid, block](*arguments)
        assert report.ok, report.problems
        read = sum(row.bytes for row in report.rows if row.array == "x" and row.kind == "load")
        assert read == report.global_stored == x.nbytes
        np.testing.assert_allclose(out, r.apply_rope_numpy(x, positions, frequencies, 1.0, interleaved), atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_wide_rows_are_moved_in_full_vectors(interleaved):
    x, positions, frequencies = draw((2, 4, 8, 64), 32, False)
    tensors = [torch.from_numpy(a) for a in (x, positions, frequencies)]
    wide, grid, block, arguments, _ = r.rope_launch(*tensors, 1.0, interleaved)
    report = r.rope_kernel(wide).check[grid, block](*arguments)
    rows = [row for row in report.rows if row.array in ("x", "y")]
    assert wide and sum(row.requests for row in rows) == 2 * x.nbytes // 512
    assert all(row.sectors == row.ideal_sectors for row in rows)


def test_each_angle_is_asked_for_once_for_eight_heads():
    x, positions, frequencies = draw((20, 3, 16), 8, False)
    _, grid, block, arguments, _ = r.rope_launch(*(torch.from_numpy(a) for a in (x, positions, frequencies)))
    report = r.rope_kernel(True).check[grid, block](*arguments)
    asked = sum(row.bytes for row in report.rows if row.array == "frequencies")
    assert grid[1] == 3 and asked == 3 * 3 * frequencies.nbytes
