"""Lecture 08 in CUDA: keys and values are read once for a whole group, and the factor against one read a head is exact."""

import re

import numpy as np
import pytest
import torch

from utils import cuda

g = pytest.importorskip("attention.grouped_query")
if not hasattr(g, "grouped_launch"):
    pytest.skip("lecture 08 has no CUDA part yet", allow_module_level=True)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
every_type = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(seed, heads, kv_heads, n, m, d, d_v=None, lead=(), dtype=torch.float32):
    """Queries in single precision, keys and values of this type."""
    rng = np.random.default_rng(seed)
    shapes = (*lead, heads, n, d), (*lead, kv_heads, m, d), (*lead, kv_heads, m, d_v or d)
    q, k, v = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in shapes)
    return q, k.to(dtype), v.to(dtype)


def attended(q, k, v, mask=None, causal=False, scale=None):
    """One query at a time in float64; query head h looks for its own head of keys. Forbidden values are not looked at."""
    q, k, v = (torch.as_tensor(a).double().numpy() for a in (q, k, v))
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-3:])) for a in (q, k, v))
    (heads, n, d), (kv_heads, m) = q.shape[-3:], k.shape[-3:-1]
    allowed = np.tri(n, m, m - n, dtype=bool) if causal else np.ones((n, m), bool)
    allowed = np.broadcast_to(allowed if mask is None else allowed & np.asarray(mask), (*lead, heads, n, m))
    out = np.zeros((*lead, heads, n, v.shape[-1]))
    for at in np.ndindex(*lead, heads, n):
        *row, h, i = at
        keys, theirs = allowed[at], (*row, h // (heads // kv_heads))
        if keys.any():
            scores = k[theirs][keys] @ q[at] * (d**-0.5 if scale is None else scale)
            weights = np.exp(scores - scores.max())
            out[at] = weights @ v[theirs][keys] / weights.sum()
    return out


def run(q, k, v, mask=None, causal=False, scale=None, warps=32):
    """The report of the first kernel, after the output of both has been compared."""
    kernel, launch, arguments = g.grouped_launch(q, k, v, mask, causal, scale, warps)
    report = kernel.check[launch](*arguments)
    assert report.ok, report.problems[0]
    outs, lses = arguments[4:6]
    rows, n_splits, d_v = outs.shape
    out = torch.full((rows, d_v), 9.0)
    second = g.merge_kernel().check[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d_v)
    assert second.ok, second.problems[0]
    wanted = attended(q, k, v, mask, causal, scale)
    got = out.reshape(wanted.shape).double().numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    return report


def loaded(report, *names):
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in names)


def of_cache(report):
    return [row for row in report.rows if row.array in ("k", "v")]


# --- the kernel ------------------------------------------------------------------------------------------------------


@every_type
def test_twenty_random_sizes_agree_and_read_what_the_formula_says(dtype):
    rng = np.random.default_rng(1)
    item = torch.empty(0, dtype=dtype).element_size()
    for turn in range(20):
        kv_heads, group, n, m, d, d_v = (int(x) for x in rng.integers(1, (4, 7, 9, 180, 70, 70)))
        causal, heads = bool(rng.integers(2)), kv_heads * group
        report = run(*draw(turn, heads, kv_heads, n, m, d, d_v, dtype=dtype), None, causal)
        expected = g.grouped_bytes(heads, kv_heads, n, m, d, d_v, causal, item)
        assert loaded(report, "k", "v") == expected, (heads, kv_heads, n, m, d, d_v, causal)
        n_splits = -(-m // 128) if group * n <= 64 else 1
        assert loaded(report, "q") == heads * n * n_splits * d * 4
        assert report.global_stored == heads * n * n_splits * (4 * d_v + 8)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 32])
def test_decoding_reads_keys_and_values_once_for_the_group_and_else_once_for_every_head(group):
    m, d, kv_heads = 150, 32, 2
    q, k, v = draw(group, kv_heads * group, kv_heads, 1, m, d)
    once = 2 * kv_heads * m * d * 4
    assert loaded(run(q, k, v), "k", "v") == once
    assert loaded(run(q, k, v, warps=1), "k", "v") == group * once


@pytest.mark.parametrize("group", [31, 33, 40, 71, 100])
def test_one_head_of_keys_for_very_many_queries_is_read_once_for_each_32(group):
    report = run(*draw(group, group, 1, 1, 20, 8))
    assert loaded(report, "k", "v") == -(-group // 32) * 2 * 20 * 8 * 4


@pytest.mark.parametrize("m", [1, 15, 16, 17, 127, 128, 129, 300])
def test_numbers_of_keys_around_a_tile_and_a_split(m):
    run(*draw(m, 6, 2, 1, m, 16))


@every_type
@pytest.mark.parametrize(("d", "d_v"), [(64, 64), (128, 128), (33, 5), (1, 40), (256, 256)])
def test_heads_of_64_and_128_and_odd_ones(dtype, d, d_v):
    report = run(*draw(d, 8, 2, 1, 37, d, d_v, dtype=dtype))
    assert report.shared_bytes <= 48 * 1024 and report.bank_conflicts == 0


@pytest.mark.parametrize(("n", "m"), [(1, 40), (5, 40), (40, 40), (40, 7), (70, 100)])
@pytest.mark.parametrize("group", [1, 3])
def test_many_queries_with_and_without_causal_masks(n, m, group):
    for causal in (False, True):
        run(*draw(n, 2 * group, 2, n, m, 8), None, causal)


def test_masks_for_all_for_each_head_and_for_each_query():
    q, k, v = draw(3, 4, 2, 5, 37, 8, lead=(3,))
    rng = np.random.default_rng(3)
    for shape in ((37,), (5, 37), (4, 1, 37), (3, 1, 1, 37), (3, 4, 5, 37)):
        for causal in (False, True):
            run(q, k, v, rng.random(shape) < 0.5, causal)


@pytest.mark.parametrize("score", [-200.0, -1e4, 1e4])
def test_scores_far_from_zero_give_no_nan(score):
    q, k, v = draw(4, 4, 2, 1, 140, 32)
    run(torch.ones_like(q), torch.ones_like(k), v, None, False, score / 32)


def test_a_maximum_that_rises_and_one_that_falls():
    q, k, v = draw(5, 4, 2, 1, 100, 8)
    slope = torch.linspace(-4, 4, 100)[:, None].expand(2, 100, 8)
    for keys in (slope, slope.flip(1)):
        run(torch.ones_like(q), keys.contiguous(), v, None, False, 1.0)


def test_neighbouring_lanes_read_neighbouring_columns_and_all_warps_load():
    report = run(*draw(6, 8, 1, 1, 64, 64))
    assert all(row.sectors == row.ideal_sectors for row in of_cache(report))
    assert sum(row.requests for row in of_cache(report)) == 2 * 64 * 64 // 32


def without(source, which):
    """The source without one of its barriers, counted from 0."""
    barrier = list(re.finditer(r"__sync(threads|warp)\(\);", source))[which]
    return source[: barrier.start()] + source[barrier.end() :]


@pytest.mark.parametrize("which", [0, 1])
def test_every_barrier_is_needed_and_its_absence_reported(which):
    kernel, launch, arguments = g.grouped_launch(*draw(7, 4, 1, 1, 50, 24))
    source = kernel.source.replace(g.GROUPED_SPLIT, without(g.GROUPED_SPLIT, which))
    assert kernel.source.count("__sync") == 2 and source.count("__sync") == 1
    report = cuda.compile(source, name="grouped_split", template=kernel.template).check[launch](*arguments)
    assert "race" in {problem.kind for problem in report.problems}


# --- the function around it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_arrays_of_any_type_come_back_in_their_own(kind):
    q, k, v = ((3 * a.numpy()).astype(kind) for a in draw(8, 4, 2, 3, 20, 6))
    out = g.grouped_query_attention_cuda(q, k, v)
    assert out.dtype == (np.float64 if kind == np.int64 else kind)
    wanted = attended(q.astype(float), k.astype(float), v.astype(float))
    np.testing.assert_allclose(out.astype(float), wanted, atol=2e-2 if kind == np.float16 else 1e-4)


@every_type
def test_keys_in_half_precision_are_read_as_they_are_stored(dtype):
    q, k, v = draw(9, 6, 2, 1, 300, 40, dtype=dtype)
    out = g.grouped_query_attention_cuda(q, k, v)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out, attended(q, k, v), atol=1e-5)
    in_type = g.grouped_query_attention_cuda(q.to(dtype), k, v)
    assert in_type.dtype == dtype
    np.testing.assert_allclose(in_type.float(), out, atol=TOLERANCE[dtype])


def test_leading_axes_broadcast_and_masks_may_bring_the_batch_of_the_keys():
    rng = np.random.default_rng(10)
    q, k, v = rng.standard_normal((4, 2, 8)), rng.standard_normal((3, 2, 5, 8)), rng.standard_normal((2, 5, 8))
    for mask in (None, rng.random((3, 1, 1, 5)) < 0.6, torch.from_numpy(rng.random((3, 4, 2, 5)) < 0.6)):
        out = g.grouped_query_attention_cuda(q, k, v, mask)
        assert out.shape == (3, 4, 2, 8)
        np.testing.assert_allclose(out, attended(q, k, v, mask), atol=1e-5)


def test_one_head_for_each_is_multi_head_and_one_for_all_is_multi_query():
    q, k, v = draw(11, 6, 6, 4, 30, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    np.testing.assert_allclose(g.grouped_query_attention_cuda(q, k, v), want, atol=1e-5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k[:1].expand(6, -1, -1), v[:1].expand(6, -1, -1))
    np.testing.assert_allclose(g.grouped_query_attention_cuda(q, k[:1], v[:1]), want, atol=1e-5)


def test_it_agrees_with_the_groups_of_torch():
    q, k, v = draw(12, 6, 2, 4, 30, 8, lead=(2,))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    np.testing.assert_allclose(g.grouped_query_attention_cuda(q, k, v), want, atol=1e-5)


def test_what_a_mask_forbids_changes_nothing_be_it_nan():
    q, k, v = draw(13, 4, 2, 3, 20, 8)
    mask = np.random.default_rng(13).random(20) < 0.5
    clean = g.grouped_query_attention_cuda(q, k, v, mask)
    k[:, ~mask], v[:, ~mask] = float("nan"), float("nan")
    np.testing.assert_array_equal(g.grouped_query_attention_cuda(q, k, v, mask), clean)


@pytest.mark.parametrize(("q", "k", "v", "shape"), [
    ((2, 4, 0, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 4, 0, 8)), ((4, 3, 8), (2, 0, 8), (2, 0, 3), (4, 3, 3)),
    ((0, 4, 3, 8), (0, 2, 5, 8), (0, 2, 5, 8), (0, 4, 3, 8)), ((0, 3, 8), (0, 5, 8), (0, 5, 8), (0, 3, 8)),
    ((0, 3, 8), (2, 5, 8), (2, 5, 8), (0, 3, 8)), ((4, 3, 8), (2, 5, 8), (2, 5, 0), (4, 3, 0)),
    ((1, 2, 1, 3), (5, 1, 0, 3), (5, 1, 0, 4), (5, 2, 1, 4)),
])  # fmt: skip
def test_empty_axes_give_empty_or_zero_results(q, k, v, shape):
    for dtype in (torch.float32, torch.float64):
        out = g.grouped_query_attention_cuda(*(torch.ones(size, dtype=dtype) for size in (q, k, v)))
        assert out.shape == shape and out.dtype == dtype and not out.any()


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(q=np.ones((5, 3, 8))), "the heads of q must be a multiple of those of k and v, got 5 and 2"),
    (dict(q=np.ones((3, 8))), "q must have at least three axes (heads, seq, d_head), got shape (3, 8)"),
    (dict(q=np.ones((4, 3, 7))), "q and k must have the same d_head of at least 1, got 7 and 8"),
    (dict(v=np.ones((4, 6, 8))), "k and v must have the same heads and n_keys, got (2, 6) and (4, 6)"),
    (dict(k=np.ones((0, 6, 8)), v=np.ones((0, 6, 8))), "the heads of q must be a multiple of those of k and v, got 4 and 0"),
    (dict(q=np.ones((2, 4, 3, 8)), k=np.ones((3, 2, 6, 8))), "the leading axes of q, k and v must broadcast"),
    (dict(mask=np.zeros((3, 6))), "mask must be boolean with True = may attend, got float64"),
    (dict(mask=np.ones((3, 5), bool)), "mask must broadcast to (4, 3, 6), got shape (3, 5)"),
    (dict(mask=np.ones((2, 4, 3, 6), bool)), "mask must broadcast to (4, 3, 6), got shape (2, 4, 3, 6)"),
    (dict(q=np.ones((4, 3, 8), bool)), "q must hold real numbers, got bool"),
])  # fmt: skip
def test_a_wrong_argument_is_one_clear_sentence(change, sentence):
    right = dict(q=np.ones((4, 3, 8)), k=np.ones((2, 6, 8)), v=np.ones((2, 6, 8)))
    g.grouped_query_attention_cuda(**right)
    with pytest.raises(ValueError) as error:
        g.grouped_query_attention_cuda(**right | change)
    assert sentence in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
@every_type
def test_on_a_gpu_it_agrees_with_the_cpu(dtype):
    q, k, v = draw(14, 32, 8, 1, 700, 128, dtype=dtype)
    got = g.grouped_query_attention_cuda(q.cuda(), k.cuda(), v.cuda())
    np.testing.assert_allclose(got.cpu(), attended(q, k, v), atol=1e-5)
