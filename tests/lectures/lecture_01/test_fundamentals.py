"""Lecture 01: the triple against itself, against its limits and against PyTorch."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attention import fundamentals as f
from utils import cuda


def draw(shape_q, shape_k, d_v, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    arrays = (rng.standard_normal(s) for s in (shape_q, shape_k, (*shape_k[:-1], d_v)))
    return (*(a.astype(dtype) for a in arrays), rng.random((shape_q[-2], shape_k[-2])) < 0.7)


@pytest.mark.parametrize("masked", [False, True])
def test_torch_agrees_with_sdpa_forward_and_backward(masked):
    q, k, v, mask = draw((2, 3, 9, 8), (2, 3, 9, 8), 8)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
    attend = torch.from_numpy(mask | np.eye(9, dtype=bool)) if masked else None
    ours, theirs = f.attention_torch(*tensors, attend), scaled_dot_product_attention(*tensors, attn_mask=attend)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    d_out = torch.from_numpy(np.random.default_rng(1).standard_normal(ours.shape))
    for a, b in zip(torch.autograd.grad(ours, tensors, d_out), torch.autograd.grad(theirs, tensors, d_out)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_backward_pass_by_hand_equals_autograd_with_masks_and_empty_rows():
    q, k, v, mask = draw((2, 7, 5), (2, 11, 5), 4)
    mask[3] = False
    tensors = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
    out = f.attention_torch(*tensors, torch.from_numpy(mask), True, 0.3)
    d_out = np.random.default_rng(1).standard_normal(out.shape)
    expected = torch.autograd.grad(out, tensors, torch.from_numpy(d_out))
    for a, b in zip(f.attention_backward(q, k, v, d_out, mask, True, 0.3), expected):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-12)


def test_padding_mask_broadcasts_over_heads_and_queries():
    q, k, v, _ = draw((2, 3, 4, 8), (2, 3, 4, 8), 8, dtype=np.float32)
    mask = f.padding_mask(np.array([4, 2]), 4)
    assert mask.shape == (2, 1, 1, 4)
    short = f.attention_numpy(q[1], k[1, :, :2], v[1, :, :2])
    for attend in (f.attention_numpy, f.attention_cuda):
        np.testing.assert_allclose(attend(q, k, v, mask)[1], short, atol=1e-6)


def test_causal_mask_is_aligned_at_the_bottom_right():
    assert f.causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert f.causal_mask(3, 1).tolist() == [[False], [False], [True]]
    assert np.array_equal(f.causal_mask(5), np.tril(np.ones((5, 5), bool)))
    with pytest.raises(ValueError, match="must not be negative"):
        f.causal_mask(-1)


def tiled_arguments(n, m, d, causal):
    q, k, v, mask = draw((n, d), (m, d), d, dtype=np.float32)
    return f.attention_launch(*(torch.from_numpy(a) for a in (q, k, v)), torch.from_numpy(mask), causal, None)


def barriers():
    source = f.LOAD_TILE + f.ROW_OF_A_TILE + f.ADD_TILE + f.ATTENTION_TILED
    return [at for at in range(len(source)) if source.startswith(("__syncthreads();", "__syncwarp();"), at)]


@pytest.mark.parametrize("which", range(3))
def test_every_barrier_of_the_tiled_kernel_is_needed_and_its_absence_reported(which):
    source, places = f.LOAD_TILE + f.ROW_OF_A_TILE + f.ADD_TILE + f.ATTENTION_TILED, barriers()
    assert len(places) == 3
    at = places[which]
    without = source[:at] + " " * (source.index(";", at) + 1 - at) + source[source.index(";", at) + 1 :]
    grid, block, shared, arguments, _ = tiled_arguments(33, 35, 8, False)
    report = cuda.compile(without, name="attention_tiled").check[grid, block, shared](*arguments)
    assert "race" in {p.kind for p in report.problems}


def test_measured_bytes_of_the_tiled_kernel_equal_the_formula_on_twenty_random_sizes():
    rng = np.random.default_rng(5)
    for _ in range(20):
        n, m, d = (int(x) for x in (rng.integers(1, 60), rng.integers(1, 60), rng.integers(1, 24)))
        q, k, v, _ = draw((n, d), (m, d), d, dtype=np.float32)
        grid, block, shared, arguments, _ = f.attention_launch(
            *(torch.from_numpy(a) for a in (q, k, v)), None, False, None
        )
        report = f.attention_kernel().check[grid, block, shared](*arguments)
        assert report.ok, report.problems
        assert report.global_loaded == 4 * (n * d + -(-n // 16) * 3 * m * d)
        assert report.global_stored == 4 * n * d
