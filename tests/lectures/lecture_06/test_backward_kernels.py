"""Lecture 06 in CUDA: the backward pass against autograd, on easy and on hard input."""

import numpy as np
import pytest
import torch

from attention import flash as f
from tests.lectures.lecture_06.test_kernels import draw

# --- backward --------------------------------------------------------------------------------------------------------


def gradients(q, k, v, d_out, causal, scale=None):
    """Of the formula, by torch, in float64; and output and log-sum-exp."""
    inputs = [a.detach().double().requires_grad_() for a in (q, k, v)]
    n, m, d = q.shape[-2], k.shape[-2], q.shape[-1]
    s = inputs[0] @ inputs[1].mT * (d**-0.5 if scale is None else scale)
    allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.ones(n, m, dtype=torch.bool)
    p = torch.softmax(s.masked_fill(~allowed, -1e300), -1) * allowed
    return torch.autograd.grad(p @ inputs[2], inputs, d_out.double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (16, 16, 32), (37, 50, 64), (50, 37, 80), (20, 33, 128), (7, 90, 7)]
)
def test_gradients_agree_with_autograd(n, m, d, causal):
    q, k, v = draw(n, n, m, d, dtype=torch.float64)
    d_out = torch.from_numpy(np.random.default_rng(n + 1).standard_normal((2, n, d)))
    got = f.flash_attention_backward_cuda(q, k, v, *f.flash_attention_cuda(q, k, v, causal), d_out, causal)
    for ours, theirs in zip(got, gradients(q, k, v, d_out, causal), strict=True):
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, theirs.abs().max()))


def test_gradients_of_queries_with_nothing_to_attend_to_are_zero():
    q, k, v = draw(17, 60, 21, 8)
    out, lse = f.flash_attention_cuda(q, k, v, True)
    d_q, d_k, d_v = f.flash_attention_backward_cuda(q, k, v, out, lse, torch.ones_like(out), True)
    assert (d_q[:, :39] == 0).all()
    assert all(torch.isfinite(g).all() for g in (d_q, d_k, d_v))


@pytest.mark.parametrize("score", [-200.0, 1e4])
def test_gradients_with_scores_far_from_zero(score):
    q, k, (_, _, v) = torch.ones(1, 20, 16), torch.ones(1, 45, 16), draw(18, 20, 45, 16, heads=1)
    out, lse = f.flash_attention_cuda(q, k, v, scale=score / 16)
    got = f.flash_attention_backward_cuda(q, k, v, out, lse, torch.ones_like(out), scale=score / 16)
    np.testing.assert_allclose(got[2], torch.full_like(v, 20 / 45), rtol=2e-3)  # lse itself is only good to 1e-3
    assert all(torch.isfinite(g).all() for g in got)


def test_gradients_take_any_leading_axes_other_widths_and_half_precision():
    q, k, v = draw(19, 9, 21, 16, heads=6)
    q, k, v = q.reshape(2, 3, 9, 16), k.reshape(2, 3, 21, 16), v.reshape(2, 3, 21, 16)[..., :5]
    d_out = torch.from_numpy(np.random.default_rng(20).standard_normal((2, 3, 9, 5))).float()
    expected = gradients(q, k, v, d_out, True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)):
        inputs = [a.to(dtype) for a in (q, k, v)]
        out, lse = f.flash_attention_cuda(*inputs, True)
        got = f.flash_attention_backward_cuda(*inputs, out, lse, d_out.to(dtype), True)
        for ours, theirs, given in zip(got, expected, inputs, strict=True):
            assert ours.shape == given.shape and ours.dtype == dtype
            np.testing.assert_allclose(ours.double(), theirs, rtol=0, atol=tolerance * theirs.abs().max())


def test_gradients_of_arrays_are_arrays():
    q, k, v = (a.numpy() for a in draw(21, 9, 9, 8))
    out, lse = f.flash_attention_cuda(q, k, v)
    got = f.flash_attention_backward_cuda(q, k, v, out, lse, out)
    expected = gradients(*(torch.from_numpy(a) for a in (q, k, v, out)), False)
    assert all(
        isinstance(g, np.ndarray) and np.abs(g - e.numpy()).max() < 1e-5 for g, e in zip(got, expected, strict=True)
    )


def test_gradients_of_a_wrong_shape_get_a_sentence():
    q, k, v = draw(22, 9, 9, 8)
    out, lse = f.flash_attention_cuda(q, k, v)
    with pytest.raises(ValueError, match=r"d_out must have the shape \(2, 9, 8\), got \(9, 8\)"):
        f.flash_attention_backward_cuda(q, k, v, out, lse, out[0])
    with pytest.raises(ValueError, match=r"lse must have the shape \(2, 9\), got \(2, 9, 8\)"):
        f.flash_attention_backward_cuda(q, k, v, out, out, out)


@pytest.mark.parametrize("causal", [False, True])
def test_the_backward_kernels_report_no_problem_and_load_what_they_must(causal):
    n, m, d = 37, 50, 24
    q, k, v = draw(23, n, m, d, heads=1)
    out, lse = f.flash_attention_cuda(q, k, v, causal)
    launches, _ = f.backward_launches(q, k, v, out, lse, out.clone(), causal, 0.2)
    reports = [kernel.check[launch](*arguments) for kernel, launch, arguments in launches]
    assert all(report.ok for report in reports), [report.problems for report in reports]
    keys = sum(min(first + 16, n) + m - n if causal else m for first in range(0, n, 16))
    assert reports[0].global_loaded == 4 * (3 * n * d + 16 * n + 2 * d * keys)  # each thread reads its lse
    queries = sum(n - max(0, first + n - m) if causal else n for first in range(0, m, 16))
    pairs = n * m if not causal else sum(i + 1 + m - n for i in range(n))
    assert reports[1].global_loaded == 4 * (2 * m * d + 2 * d * queries + 2 * pairs)  # lse and delta of each pair


def test_two_backward_runs_are_equal_to_the_bit():
    q, k, v = draw(24, 70, 70, 32)
    out, lse = f.flash_attention_cuda(q, k, v)
    first, second = (f.flash_attention_backward_cuda(q, k, v, out, lse, out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
