"""Lecture 10 in CUDA: a state in shared memory and states in registers; each input is read as often as the formulas say."""

import re

import numpy as np
import pytest
import torch

from utils import cuda

g = pytest.importorskip("attention.linear")
if not hasattr(g, "linear_launch"):
    pytest.skip("lecture 10 has no CUDA part yet", allow_module_level=True)


def draw(seed, heads, n, m, d, d_v, lead=()):
    """Features (not negative) and values, in single precision."""
    rng = np.random.default_rng(seed)
    shapes = [(*lead, heads, *shape) for shape in ((n, d), (m, d), (m, d_v))]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return np.abs(q), np.abs(k), v


def summed(q, k, v, causal=True, normalise=False):
    """All pairs, in float64."""
    (n, m), (q, k, v) = (q.shape[-2], k.shape[-2]), (np.asarray(a, float) for a in (q, k, v))
    weights = np.einsum("...id,...jd->...ij", q, k) * (np.tri(n, m, m - n) if causal else 1)
    out, total = weights @ v, weights.sum(-1, keepdims=True)
    return out / np.where(total == 0, 1, total) if normalise else out


def draw_scan(seed, batch, n, channels, n_state):
    rng = np.random.default_rng(seed)
    size = (batch, n, channels), (batch, n, channels), (channels, n_state), *2 * [(batch, n, n_state)], (channels,)
    x, delta, a, b, c, d = (rng.standard_normal(shape).astype(np.float32) for shape in size)
    return x, np.exp(delta - 1), -np.exp(a), b, c, d


def scanned(x, delta, a, b, c, d=0.0):
    """Step by step, in float64."""
    x, delta, a, b, c, d = (np.asarray(array, float) for array in (x, delta, a, b, c, d))
    h, y = np.zeros((len(x), *a.shape)), np.zeros(x.shape)
    for t in range(x.shape[1]):
        h = np.exp(delta[:, t, :, None] * a) * h + delta[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y + d * x


def compare(got, wanted):
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1e-3, np.abs(wanted).max(initial=0)))


def checked(launched, output, wanted):
    kernel, launch, given = launched
    report = kernel.check[launch](*given)
    assert report.ok, report.problems[0]
    compare(given[output].reshape(wanted.shape), wanted)
    return report


# --- the kernels -----------------------------------------------------------------------------------------------------


def test_twenty_random_sizes_of_linear_attention_agree_and_read_what_the_formula_says():
    rng = np.random.default_rng(0)
    for turn in range(20):
        heads, n, m, d, d_v = (int(x) for x in rng.integers(1, (4, 70, 70, 40, 150)))
        causal = bool(rng.integers(2))
        m = max(n, m) if causal else m
        arrays = draw(turn, heads, n, m, d, d_v)
        report = checked(g.linear_launch(*arrays, causal), 3, summed(*arrays, causal))
        loaded, stored = g.linear_bytes(n, m, d, d_v)
        assert (report.global_loaded, report.global_stored) == (heads * loaded, heads * stored), (heads, n, m, d, d_v)


@pytest.mark.parametrize(("d", "d_v"), [(16, 16), (64, 64), (100, 64), (32, 48)])
def test_up_to_64_values_everything_is_read_and_written_once(d, d_v):
    arrays = draw(d, 1, 40, 40, d, d_v)
    report = checked(g.linear_launch(*arrays), 3, summed(*arrays))
    assert report.global_loaded + report.global_stored == sum(a.nbytes for a in arrays) + arrays[2].nbytes


@pytest.mark.parametrize(("d", "d_v"), [(32, 32), (64, 64), (96, 64), (128, 128), (32, 16), (64, 48)])
def test_the_state_has_no_bank_conflicts_and_rows_are_read_side_by_side(d, d_v):
    arrays = draw(d, 2, 40, 40, d, d_v)
    report = checked(g.linear_launch(*arrays), 3, summed(*arrays))
    assert report.shared_bytes <= 48 * 1024
    if d_v % 32 == 0:
        assert report.bank_conflicts == 0
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.space == "global")


def test_twenty_random_sizes_of_the_scan_agree_and_read_what_the_formula_says():
    rng = np.random.default_rng(1)
    for turn in range(20):
        batch, n, channels, n_state = (int(x) for x in rng.integers(1, (4, 70, 100, 40)))
        arrays = draw_scan(turn, batch, n, channels, n_state)
        report = checked(g.scan_launch(*arrays), 6, scanned(*arrays))
        assert report.global_loaded + report.global_stored == g.scan_bytes(batch, n, channels, n_state)


def test_the_scan_has_no_bank_conflicts_and_reads_side_by_side():
    arrays = draw_scan(2, 2, 40, 64, 16)
    report = checked(g.scan_launch(*arrays), 6, scanned(*arrays))
    assert report.bank_conflicts == 0 and report.shared_bytes == 8192
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.space == "global")


def test_long_sequences_stay_in_single_precision():
    arrays = draw_scan(3, 1, 1000, 8, 16)
    compare(g.selective_scan_cuda(*arrays), scanned(*arrays))
    arrays = draw(3, 1, 2000, 2000, 32, 32)
    compare(g.linear_attention_cuda(*arrays), summed(*arrays))


KERNELS = {
    "linear_chunked": (5, lambda: g.linear_launch(*draw(7, 1, 40, 60, 24, 24))),
    "selective_scan": (2, lambda: g.scan_launch(*draw_scan(7, 1, 40, 40, 16))),
}


@pytest.mark.parametrize(("name", "which"), [(name, i) for name, (n, _) in KERNELS.items() for i in range(n)])
def test_every_barrier_is_needed_and_its_absence_reported(name, which):
    kernel, launch, given = KERNELS[name][1]()
    barriers = list(re.finditer(r"__syncthreads\(\);", kernel.source))
    assert len(barriers) == KERNELS[name][0]
    source = kernel.source[: barriers[which].start()] + kernel.source[barriers[which].end() :]
    report = cuda.compile(source, name=name, template=kernel.template).check[launch](*given)
    assert "race" in {problem.kind for problem in report.problems}


# --- the functions around them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("shape", "lead"), [
    ((2, 5, 7, 4, 6), (3,)), ((2, 9, 4, 4, 6), ()), ((2, 5, 0, 4, 6), ()), ((2, 0, 5, 4, 6), ()), ((2, 5, 7, 4, 0), ()),
    ((0, 5, 7, 4, 3), ()), ((1, 1, 1, 1, 1), (2, 2)), ((2, 35, 35, 8, 70), ()), ((1, 20, 20, 5, 64), ()),
])  # fmt: skip
def test_linear_attention_of_any_size_comes_back_in_its_kind(shape, lead, causal, normalise):
    arrays = draw(10, *shape, lead=lead)
    wanted = summed(*arrays, causal, normalise)
    out = g.linear_attention_cuda(*arrays, causal=causal, normalise=normalise)
    assert out.dtype == np.float32
    compare(out, wanted)
    out = g.linear_attention_cuda(*(torch.from_numpy(a) for a in arrays), causal=causal, normalise=normalise)
    assert isinstance(out, torch.Tensor)
    compare(out.numpy(), wanted)


@pytest.mark.parametrize(
    "shape", [(2, 0, 4, 3), (0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0), (1, 1, 1, 1), (2, 17, 33, 17)]
)
def test_a_scan_of_any_size_comes_back_in_its_kind(shape):
    arrays = draw_scan(11, *shape)
    compare(g.selective_scan_cuda(*arrays), scanned(*arrays))
    compare(g.selective_scan_cuda(*arrays[:5]), scanned(*arrays[:5]))
    out = g.selective_scan_cuda(*(torch.from_numpy(a) for a in arrays))
    assert isinstance(out, torch.Tensor)
    compare(out.numpy(), scanned(*arrays))


def test_what_comes_later_changes_nothing_be_it_nan():
    q, k, v = draw(12, 2, 40, 40, 8, 6)
    clean = g.linear_attention_cuda(q, k, v)
    v[:, 19], k[:, 21] = np.nan, np.inf
    out = g.linear_attention_cuda(q, k, v)
    np.testing.assert_allclose(out[:, :19], clean[:, :19], rtol=1e-6)
    assert np.isnan(out[:, 19:]).all()
    x, *rest = draw_scan(12, 2, 30, 40, 16)
    x[0, 20, 7] = np.nan
    bad = np.isnan(g.selective_scan_cuda(x, *rest))
    assert bad[0, 20:, 7].all() and bad.sum() == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
def test_on_a_gpu_they_agree_with_the_cpu():
    arrays = draw(13, 4, 300, 300, 64, 128)
    compare(g.linear_attention_cuda(*(torch.from_numpy(a).cuda() for a in arrays)).cpu().numpy(), summed(*arrays))
    arrays = draw_scan(13, 2, 300, 100, 16)
    compare(g.selective_scan_cuda(*(torch.from_numpy(a).cuda() for a in arrays)).cpu().numpy(), scanned(*arrays))
