"""Lecture 01: the triple against itself, against its limits and against PyTorch."""
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attention import fundamentals as f
from utils import cuda

SHAPES = [((7, 5), (11, 5), 5), ((3, 19, 33), (3, 45, 33), 33), ((2, 3, 17, 8), (2, 3, 17, 8), 6), ((1, 1, 40, 64), (1, 1, 9, 64), 64)]


def draw(shape_q, shape_k, d_v, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    arrays = (rng.standard_normal(s) for s in (shape_q, shape_k, (*shape_k[:-1], d_v)))
    return (*(a.astype(dtype) for a in arrays), rng.random((shape_q[-2], shape_k[-2])) < 0.7)


def reference(q, k, v, mask, causal, scale=None):
    """Attention written as loops over queries, in float64."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    n, m = q.shape[-2], k.shape[-2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for lead in np.ndindex(q.shape[:-2]):
        for i in range(n):
            seen = [j for j in range(m) if (not causal or j <= i + m - n) and (mask is None or mask[i, j])]
            if seen:
                s = np.array([q[lead][i] @ k[lead][j] * scale for j in seen])
                e = np.exp(s - s.max())
                out[lead][i] = (e / e.sum()) @ v[lead][seen]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_triple_agrees_with_loops_for_odd_shapes(shapes, masked, causal):
    q, k, v, mask = draw(*shapes)
    mask = mask if masked else None
    expected = reference(q, k, v, mask, causal)
    np.testing.assert_allclose(f.attention_numpy(q, k, v, mask, causal), expected, atol=1e-12)
    tensors = [torch.from_numpy(a) for a in (q, k, v)]
    t_mask = None if mask is None else torch.from_numpy(mask)
    np.testing.assert_allclose(f.attention_torch(*tensors, t_mask, causal).numpy(), expected, atol=1e-12)
    single = [a.astype(np.float32) for a in (q, k, v)]
    np.testing.assert_allclose(f.attention_cuda(*single, mask, causal), expected, atol=1e-5)


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


@pytest.mark.parametrize("attend", [f.attention_numpy, f.attention_cuda])
def test_limits(attend):
    q, k, v, _ = draw((4, 8), (6, 8), 5, dtype=np.float32)
    np.testing.assert_allclose(attend(q, k, v, scale=0.0), np.broadcast_to(v.mean(0), (4, 5)), atol=1e-6)
    np.testing.assert_allclose(attend(q, k[:1], v[:1]), np.broadcast_to(v[0], (4, 5)), atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, scale=1e4), v[(q @ k.T).argmax(-1)], atol=1e-6)
    order = np.random.default_rng(3).permutation(6)
    np.testing.assert_allclose(attend(q, k[order], v[order]), attend(q, k, v), atol=1e-6)


def test_rows_with_nothing_to_attend_are_zero_with_gradient_zero():
    q, k, v, mask = draw((5, 4), (3, 4), 4, dtype=np.float32)
    mask[2] = False
    for attend in (f.attention_numpy, f.attention_cuda):
        out = attend(q, k, v, mask)
        assert np.isfinite(out).all() and (out[2] == 0).all()
        assert (attend(q, k, v, causal=True)[:2] == 0).all()            # more queries than keys
        assert (attend(q, k[:0], v[:0]) == 0).all()
    tensors = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
    grads = torch.autograd.grad(f.attention_torch(*tensors, torch.from_numpy(mask)).square().sum(), tensors)
    assert all(g.isfinite().all() for g in grads) and (grads[0][2] == 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores_give_no_nan(size):
    q = np.full((3, 4), size / 4, np.float32)
    k, v = np.ones((5, 4), np.float32), np.arange(20, dtype=np.float32).reshape(5, 4)
    for attend in (f.attention_numpy, f.attention_cuda):
        np.testing.assert_allclose(attend(q, k, v, scale=1.0), np.broadcast_to(v.mean(0), (3, 4)), rtol=1e-6)
    out = f.attention_torch(*(torch.from_numpy(a) for a in (q, k, v)), scale=1.0)
    np.testing.assert_allclose(out.numpy(), np.broadcast_to(v.mean(0), (3, 4)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_type_and_is_right_to_one_percent(dtype):
    q, k, v, _ = draw((6, 16), (9, 16), 16, dtype=np.float32)
    tensors = [torch.from_numpy(a).to(dtype) for a in (q, k, v)]
    expected = f.attention_numpy(*(t.float().numpy() for t in tensors))
    for attend in (f.attention_torch, f.attention_cuda):
        out = attend(*tensors)
        assert out.dtype == dtype
        np.testing.assert_allclose(out.float().numpy(), expected, atol=1e-2)
    halves = [a.astype(np.float16) for a in (q, k, v)]
    assert f.attention_numpy(*halves).dtype == f.attention_cuda(*halves).dtype == np.float16


def test_kinds_and_types_come_back_as_they_were_given():
    q, k, v, _ = draw((6, 16), (9, 16), 16)
    assert f.attention_cuda(q, k, v).dtype == np.float64
    out = f.attention_cuda(*(torch.from_numpy(a) for a in (q, k, v)))
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float64


def test_inputs_are_not_changed():
    q, k, v, mask = draw((6, 16), (9, 16), 16, dtype=np.float32)
    copies = [a.copy() for a in (q, k, v, mask)]
    for attend in (f.attention_numpy, f.attention_cuda):
        attend(q, k, v, mask, True)
    assert all(np.array_equal(a, b) for a, b in zip((q, k, v, mask), copies))


def test_padding_mask_broadcasts_over_heads_and_queries():
    q, k, v, _ = draw((2, 3, 4, 8), (2, 3, 4, 8), 8, dtype=np.float32)
    mask = f.padding_mask(np.array([4, 2]), 4)
    assert mask.shape == (2, 1, 1, 4)
    short = f.attention_numpy(q[1], k[1, :, :2], v[1, :, :2])
    for attend in (f.attention_numpy, f.attention_cuda):
        np.testing.assert_allclose(attend(q, k, v, mask)[1], short, atol=1e-6)


BAD = {
    "q and k must have the same d_head, got 4 and 5": dict(q=(3, 4), k=(6, 5), v=(6, 4)),
    "k and v must have the same n_keys, got 6 and 7": dict(q=(3, 4), k=(6, 4), v=(7, 4)),
    "q must have at least two axes": dict(q=(4,), k=(6, 4), v=(6, 4)),
    "mask must broadcast to": dict(q=(3, 4), k=(6, 4), v=(6, 4), mask=np.ones((6, 3), bool)),
    "mask must be boolean": dict(q=(3, 4), k=(6, 4), v=(6, 4), mask=np.ones((3, 6))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_get_one_sentence(message):
    bad = dict(BAD[message])
    mask = bad.pop("mask", None)
    arrays = [np.zeros(shape, np.float32) for shape in bad.values()]
    for attend in (f.attention_numpy, f.attention_cuda):
        with pytest.raises(ValueError, match=message):
            attend(*arrays, mask)
    with pytest.raises(ValueError, match=message):
        f.attention_torch(*(torch.from_numpy(a) for a in arrays), None if mask is None else torch.from_numpy(mask))


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
    source = f.LOAD_TILE + f.ROW_OF_A_TILE + f.ATTENTION_TILED
    return [at for at in range(len(source)) if source.startswith(("__syncthreads();", "__syncwarp();"), at)]


@pytest.mark.parametrize("which", range(3))
def test_every_barrier_of_the_tiled_kernel_is_needed_and_its_absence_reported(which):
    source, places = f.LOAD_TILE + f.ROW_OF_A_TILE + f.ATTENTION_TILED, barriers()
    assert len(places) == 3
    at = places[which]
    without = source[:at] + " " * (source.index(";", at) + 1 - at) + source[source.index(";", at) + 1:]
    grid, block, shared, arguments, _ = tiled_arguments(33, 35, 8, False)
    report = cuda.compile(without, name="attention_tiled").check[grid, block, shared](*arguments)
    assert "race" in {p.kind for p in report.problems}


def test_measured_bytes_of_the_tiled_kernel_equal_the_formula_on_twenty_random_sizes():
    rng = np.random.default_rng(5)
    for _ in range(20):
        n, m, d = (int(x) for x in (rng.integers(1, 60), rng.integers(1, 60), rng.integers(1, 24)))
        q, k, v, _ = draw((n, d), (m, d), d, dtype=np.float32)
        grid, block, shared, arguments, _ = f.attention_launch(*(torch.from_numpy(a) for a in (q, k, v)), None, False, None)
        report = f.attention_kernel().check[grid, block, shared](*arguments)
        assert report.ok, report.problems
        assert report.global_loaded == 4 * (n * d + -(-n // 16) * 3 * m * d)
        assert report.global_stored == 4 * n * d
