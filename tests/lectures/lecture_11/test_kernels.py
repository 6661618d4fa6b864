"""Lecture 11 in CUDA: both maps in one pass, on any sizes; what it reads is what the formula says."""

import re

import numpy as np
import pytest
import torch

from attention import differential as m
from attention.flash import flash_attention_cuda
from utils import cuda


def draw(seed, heads, n, n_keys, d, d_v, lead=()):
    rng = np.random.default_rng(seed)
    shapes = (n, d), (n_keys, d), (n, d), (n_keys, d), (n_keys, d_v)
    arrays = [rng.standard_normal((*lead, heads, *shape)).astype(np.float32) for shape in shapes]
    return *arrays, (1.5 * rng.random(heads)).astype(np.float32)


def attended(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """One query at a time, in float64."""
    q1, k1, q2, k2, v = (np.asarray(a, float) for a in (q1, k1, q2, k2, v))
    out, n, n_keys = np.zeros((*q1.shape[:-1], v.shape[-1])), q1.shape[-2], k1.shape[-2]
    lam, scale = np.broadcast_to(np.asarray(lam, float), q1.shape[:-2]), scale or q1.shape[-1] ** -0.5
    for at in np.ndindex(*q1.shape[:-1]):
        head, end = at[:-1], max(0, at[-1] + 1 + n_keys - n) if causal else n_keys
        for q, k, share in ((q1, k1, 1.0), (q2, k2, -lam[head])) if end else ():
            scores = k[head][:end] @ q[at] * scale
            powers = np.exp(scores - scores.max())
            out[at] += share * powers @ v[head][:end] / powers.sum()
    return out


def run(arguments, **options):
    """The report of the kernel, after its output has been compared."""
    kernel, launch, given = m.differential_launch(*arguments, **options)
    given[6].fill_(float("nan"))
    report = kernel.check[launch](*given)
    assert report.ok, report.problems[0]
    wanted = attended(*arguments, **options)
    got = given[6].double().numpy().reshape(wanted.shape)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    return report


def loaded(report, *names):
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in names)


def test_twenty_random_sizes_agree_and_read_what_the_formula_says():
    rng = np.random.default_rng(0)
    for turn in range(20):
        heads, n, n_keys, d, d_v = (int(x) for x in rng.integers(1, (4, 70, 70, 40, 70)))
        causal = bool(rng.integers(2))
        report = run(draw(turn, heads, n, n_keys, d, d_v), causal=causal)
        keys, queries, output = m.differential_bytes(n, n_keys, d, d_v, causal)
        assert loaded(report, "k1", "k2", "v") == heads * keys
        assert loaded(report, "q1", "q2") == heads * queries and report.global_stored == heads * output


def test_values_are_read_once_for_both_maps():
    report = run(draw(1, 2, 48, 64, 32, 64))
    assert (
        loaded(report, "v") == 2 * 3 * 64 * 64 * 4
        and loaded(report, "k1") == loaded(report, "k2") == 2 * 3 * 64 * 32 * 4
    )


@pytest.mark.parametrize(("d", "d_v"), [(32, 64), (64, 128), (128, 256), (1, 1), (33, 7)])
def test_widths_of_real_models_and_odd_ones(d, d_v):
    report = run(draw(d, 1, 20, 37, d, d_v), causal=True)
    assert (report.shared_bytes <= 48 * 1024) == (4 * (d + 1) + 16 * -(-d_v // 16) <= 768)
    if d % 32 == 0:
        assert all(row.sectors == row.ideal_sectors for row in report.rows if row.array in ("k1", "k2", "v"))


@pytest.mark.parametrize("score", [-200.0, -1e4, 1e4])
def test_scores_far_from_zero_give_no_nan(score):
    q1, k1, q2, k2, v, lam = draw(2, 2, 5, 40, 8, 6)
    run((np.ones_like(q1), np.ones_like(k1), q2, k2, v, lam), scale=score / 8)
    run((q1, k1, np.ones_like(q2), np.ones_like(k2), v, lam), scale=score / 8)


def test_a_maximum_that_rises_in_one_map_and_falls_in_the_other():
    q1, k1, q2, k2, v, lam = draw(3, 1, 3, 60, 4, 6)
    slope = np.linspace(-4, 4, 60, dtype=np.float32)[None, :, None].repeat(4, 2)
    for first, second in ((slope, -slope), (slope, 0 * slope), (0 * slope, slope)):
        run((np.ones_like(q1), first, np.ones_like(q2), second, v, lam), scale=1.0)


def without(source, which):
    """The source without one of its barriers, counted from 0."""
    barrier = list(re.finditer(r"__syncthreads\(\);", source))[which]
    return source[: barrier.start()] + source[barrier.end() :]


@pytest.mark.parametrize("which", [0, 1])
def test_every_barrier_is_needed_and_its_absence_reported(which):
    kernel, launch, arguments = m.differential_launch(*draw(7, 1, 20, 50, 24, 24))
    assert kernel.source.count("__syncthreads") == 2
    source = without(kernel.source, which)
    report = cuda.compile(source, name="differential_flash", template=kernel.template).check[launch](*arguments)
    assert "race" in {problem.kind for problem in report.problems}


def test_lambda_of_zero_is_flash_attention_and_two_calls_are_one_pass():
    q1, k1, q2, k2, v, lam = draw(4, 2, 19, 35, 8, 8)
    first, second = (flash_attention_cuda(q, k, v)[0] for q, k in ((q1, k1), (q2, k2)))
    np.testing.assert_allclose(m.differential_attention_cuda(q1, k1, q2, k2, v, 0.0), first, atol=1e-6)
    both = m.differential_attention_cuda(q1, k1, q2, k2, v, lam)
    np.testing.assert_allclose(both, first - lam[:, None, None] * second, atol=1e-6)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_arrays_of_any_type_come_back_in_their_own(kind):
    *arrays, lam = draw(5, 2, 5, 7, 4, 6)
    arrays = [(3 * a).astype(kind) for a in arrays]
    out = m.differential_attention_cuda(*arrays, lam)
    assert out.dtype == (np.float64 if kind == np.int64 else kind)
    np.testing.assert_allclose(out.astype(float), attended(*arrays, lam), atol=2e-2 if kind == np.float16 else 1e-3)


def test_lambda_may_be_a_tensor_a_list_or_a_number_and_values_may_be_infinite_behind_the_diagonal():
    *arrays, lam = draw(6, 2, 20, 20, 8, 6)
    wanted = attended(*arrays, lam, causal=True)
    for given in (lam, torch.from_numpy(lam), lam.tolist()):
        np.testing.assert_allclose(m.differential_attention_cuda(*arrays, given, causal=True), wanted, atol=1e-5)
    arrays[4] = arrays[4].copy()
    arrays[4][:, 12] = np.inf
    out = m.differential_attention_cuda(*arrays, lam, causal=True)
    np.testing.assert_allclose(out[:, :12], wanted[:, :12], atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
def test_on_a_gpu_it_agrees_with_the_cpu():
    *arrays, lam = draw(8, 3, 70, 90, 64, 128)
    got = m.differential_attention_cuda(*(torch.from_numpy(a).cuda() for a in arrays), lam, causal=True)
    np.testing.assert_allclose(got.cpu(), attended(*arrays, lam, causal=True), atol=1e-5)
