"""Lecture 07 in CUDA: the blocks that are there and no others, on any sizes; bytes, to the byte; each barrier is needed."""

import re

import numpy as np
import pytest
import torch

from utils import cuda

s = pytest.importorskip("attention.sparse")
if not hasattr(s, "block_sparse_launch"):
    pytest.skip("lecture 07 has no CUDA part yet", allow_module_level=True)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
every_type = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(seed, n, m, d, heads=2, dtype=torch.float32, d_v=None):
    rng = np.random.default_rng(seed)
    shapes = (heads, n, d), (heads, m, d), (heads, m, d_v or d)
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype) for shape in shapes]


def draw_mask(seed, n, m, size, *lead, share=0.5):
    rng = np.random.default_rng(seed)
    return rng.random((*lead, -(-n // size), -(-m // size))) < share


def expanded(block_mask, size, n, m):
    """One entry for each query and key."""
    return np.repeat(np.repeat(block_mask, size, -2), size, -1)[..., :n, :m]


def attended(q, k, v, allowed, scale=None):
    """Softmax over the allowed keys in float64, zeros where there are none; forbidden keys and values are not looked at."""
    q, k, v = (torch.as_tensor(a).double().numpy() for a in (q, k, v))
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v))
    allowed = np.broadcast_to(allowed, (*lead, q.shape[-2], k.shape[-2]))
    out = np.zeros((*lead, q.shape[-2], v.shape[-1]))
    for at in np.ndindex(*lead, q.shape[-2]):
        keys = allowed[at]
        if keys.any():
            scores = k[at[:-1]][keys] @ q[at] * (q.shape[-1] ** -0.5 if scale is None else scale)
            weights = np.exp(scores - scores.max())
            out[at] = weights @ v[at[:-1]][keys] / weights.sum()
    return out


def visible(n, m, causal=False, window=None):
    near = np.arange(m) - np.arange(n)[:, None] - (m - n)
    return ((near <= 0) | (not causal)) & ((near > -window) if window else True)


def run(q, k, v, block_mask, size, causal=False, scale=None, window=None):
    """The report of the kernel, after its output has been compared. q, k, v (heads, seq, d)."""
    kernel, launch, arguments, _ = s.block_sparse_launch(q, k, v, block_mask, size, causal, scale, window)
    report = kernel.check[launch](*arguments)
    assert report.ok, report.problems[0]
    n, m = q.shape[-2], k.shape[-2]
    allowed = expanded(block_mask, size, n, m) & visible(n, m, causal, window)
    wanted = attended(q, k, v, allowed, scale)
    got = arguments[5][..., : v.shape[-1]].double().numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[q.dtype] * max(1, np.abs(wanted).max()))
    return report, kernel


def loaded(report):
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in ("q", "k", "v"))


# --- the kernel ------------------------------------------------------------------------------------------------------


@every_type
def test_twenty_random_sizes_agree_and_read_what_the_formula_says(dtype):
    rng = np.random.default_rng(1)
    for turn in range(20):
        n, m, d, size = (int(x) for x in rng.integers(1, (140, 140, 40, 90)))
        causal = bool(rng.integers(2))
        there = draw_mask(turn, n, m, size)
        report, kernel = run(*draw(turn, n, m, d, dtype=dtype), there, size, causal)
        size, tile = min(size, max(n, m)), kernel.template[1]
        item = torch.empty(0, dtype=dtype).element_size()
        expected = s.block_sparse_bytes(there, size, n, m, d, causal, tile, item)
        assert (loaded(report), report.global_stored) == (2 * expected[0], 2 * expected[1]), (n, m, d, size, causal)


@every_type
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("size", [16, 64])
def test_heads_of_64_and_128(dtype, d, size):
    n, m = 130, 100
    report, _ = run(*draw(d, n, m, d, heads=1, dtype=dtype), draw_mask(size, n, m, size), size)
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.array in ("q", "k", "v", "out"))


@every_type
def test_every_head_has_its_own_blocks(dtype):
    n, m, size = 40, 50, 16
    q, k, v = draw(2, n, m, 8, heads=3, dtype=dtype)
    run(q, k, v, draw_mask(3, n, m, size, 3), size)


@pytest.mark.parametrize("size", [1, 5, 16, 20, 48, 64, 80, 128, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_any_block_size_whole_tiles_or_not(size, causal):
    n, m = (150, 170) if size > 5 else (30, 40)
    run(*draw(size, n, m, 8, heads=1), draw_mask(size, n, m, size, share=0.6), size, causal)


@every_type
@pytest.mark.parametrize(("n", "m", "window"), [(70, 70, 1), (70, 70, 9), (33, 90, 40), (90, 33, 16), (130, 130, 500)])
def test_a_sliding_window_is_exact_inside_its_blocks(dtype, n, m, window):
    for size in (16, 24, 64):
        there = s.window_blocks(n, m, window, size)
        assert (expanded(there, size, n, m) >= visible(n, m, True, window)).all()
        touched = np.array([[visible(n, m, True, window)[i : i + size, j : j + size].any() for j in range(0, m, size)]
                            for i in range(0, n, size)])  # fmt: skip
        assert (there == touched).all()
        run(*draw(window, n, m, 16, heads=1, dtype=dtype), there, size, True, None, window)


def test_a_window_reads_a_band_of_the_keys():
    n, d = 512, 16
    _, k, v = draw(4, n, n, d, heads=1)
    there = s.window_blocks(n, n, 64, 64)
    report, _ = run(k, k, v, there, 64, True, None, 64)
    dense, _ = run(k, k, v, np.ones_like(there), 64, True)
    assert there.sum() == 15 and loaded(report) == 4 * d * (n + 2 * 64 * 15) < loaded(dense) / 2


@every_type
def test_absent_blocks_may_hold_nan(dtype):
    n, m, size = 60, 90, 16
    q, k, v = draw(5, n, m, 24, dtype=dtype)
    there = draw_mask(6, n, m, size)
    there[:, 2] = False
    k[:, 2 * size : 3 * size] = float("nan")
    v[:, 2 * size : 3 * size] = float("nan")
    run(q, k, v, there, size)
    out = s.block_sparse_attention_cuda(q, k, v, there, size)
    assert out.isfinite().all() and out.dtype == dtype


@pytest.mark.parametrize("score", [-200.0, -1e4, 1e4])
def test_scores_far_from_zero_give_no_nan(score):
    q, k = torch.ones(1, 20, 32), torch.ones(1, 45, 32)
    _, _, v = draw(2, 20, 45, 32, heads=1)
    run(q, k, v, draw_mask(1, 20, 45, 8), 8, False, score / 32)


def test_neighbouring_threads_read_neighbouring_addresses_and_meet_no_bank_conflict():
    report, _ = run(*draw(9, 64, 128, 64, heads=1), np.ones((1, 2), bool), 64)
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.array in ("q", "k", "v", "out"))
    assert report.bank_conflicts == 0


def test_all_eight_warps_load():
    d, size = 64, 64
    report, _ = run(*draw(9, 64, 128, d, heads=1), np.ones((1, 2), bool), size)
    requests = sum(row.requests for row in report.rows if row.kind == "load" and row.array in ("k", "v"))
    assert requests == 2 * 128 * d // 4 // 32  # each request brings 32 times 16 bytes


def without(source, which):
    """The source without one of its barriers, counted from 0."""
    barrier = list(re.finditer(r"__sync(threads|warp)\(\);", source))[which]
    return source[: barrier.start()] + source[barrier.end() :]


# In the kernel for half precision the other barriers are those of a warp, which wmma's own functions meet on the CPU.
BARRIERS = [
    (torch.float32, "BLOCK_SPARSE", 2),
    (torch.float32, "SPARSE_TILE", 1),
    (torch.float16, "BLOCK_SPARSE_HALF", 2),
]


@pytest.mark.parametrize(
    ("dtype", "name", "which"), [(t, name, i) for t, name, count in BARRIERS for i in range(count)]
)
def test_every_barrier_is_needed_and_its_absence_reported(dtype, name, which):
    q, k, v = draw(10, 33, 70, 32, heads=1, dtype=dtype)
    kernel, launch, arguments, _ = s.block_sparse_launch(q, k, v, draw_mask(2, 33, 70, 32, share=0.9), 32)
    source = kernel.source.replace(getattr(s, name), without(getattr(s, name), which))
    assert source.count("__sync") == kernel.source.count("__sync") - 1
    report = cuda.compile(source, name=kernel.name.split("<")[0], template=kernel.template).check[launch](*arguments)
    assert "race" in {problem.kind for problem in report.problems}


# --- the function around it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_arrays_of_any_type_come_back_in_their_own(kind):
    q, k, v = (a.numpy() for a in draw(11, 19, 37, 6))
    q, k, v = ((3 * a).astype(kind) for a in (q, k, v))
    there = draw_mask(1, 19, 37, 8)
    out = s.block_sparse_attention_cuda(q, k, v, there, 8)
    assert out.dtype == (np.float64 if kind == np.int64 else kind)
    wanted = attended(q.astype(float), k.astype(float), v.astype(float), expanded(there, 8, 19, 37))
    np.testing.assert_allclose(out.astype(float), wanted, atol=2e-2 if kind == np.float16 else 1e-4)


def test_masks_may_be_shared_or_bring_the_leading_axes_and_batches_may_be_shared():
    rng = np.random.default_rng(12)
    q, k = rng.standard_normal((20, 4)), rng.standard_normal((3, 2, 30, 4))
    for there in (draw_mask(1, 20, 30, 8), draw_mask(2, 20, 30, 8, 2), draw_mask(3, 20, 30, 8, 3, 1),
                  torch.from_numpy(draw_mask(4, 20, 30, 8, 3, 2))):  # fmt: skip
        out = s.block_sparse_attention_cuda(q, k, k, there, 8, causal=True)
        allowed = expanded(np.asarray(there), 8, 20, 30) & visible(20, 30, True)
        assert out.shape == (3, 2, 20, 4)
        np.testing.assert_allclose(out, attended(q, k, k, allowed), atol=1e-5)


def test_values_may_be_wider_or_narrower_than_keys():
    for d_v in (5, 40):
        q, k, v = draw(14, 9, 21, 16, d_v=d_v)
        there = draw_mask(5, 9, 21, 4)
        wanted = attended(q, k, v, expanded(there, 4, 9, 21))
        np.testing.assert_allclose(s.block_sparse_attention_cuda(q, k, v, there, 4), wanted, atol=1e-5)


@pytest.mark.parametrize(("q", "k", "v", "shape"), [
    ((2, 0, 8), (2, 5, 8), (2, 5, 8), (2, 0, 8)), ((2, 5, 8), (2, 0, 8), (2, 0, 3), (2, 5, 3)),
    ((2, 0, 8), (2, 0, 8), (2, 0, 3), (2, 0, 3)), ((0, 5, 8), (0, 6, 8), (0, 6, 8), (0, 5, 8)), ((5, 8), (6, 8), (6, 0), (5, 0)), ((1, 2, 3), (5, 0, 3), (5, 0, 4), (5, 2, 4)),
])  # fmt: skip
def test_empty_axes_give_empty_or_zero_results(q, k, v, shape):
    there = np.ones((-(-q[-2] // 4), -(-k[-2] // 4)), bool)
    out = s.block_sparse_attention_cuda(torch.ones(q), torch.ones(k), torch.ones(v), there, 4)
    assert out.shape == shape and not out.any()


def test_a_row_without_blocks_is_zero_and_a_value_behind_the_diagonal_changes_nothing():
    q, k, v = draw(15, 12, 12, 4, heads=1)
    there = np.array([[True, True, False], [False, False, False], [True, True, True]])
    v[0, 11] = float("nan")
    out = s.block_sparse_attention_cuda(q, k, v, there, 4, causal=True)
    assert not out[0, 4:8].any() and out[0, :11].isfinite().all() and out[0, 11].isnan().all()


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(block_size=0), "block_size must be a positive whole number, got 0"),
    (dict(block_size=2.5), "block_size must be a positive whole number, got 2.5"),
    (dict(block_mask=np.ones((3, 5))), "block_mask must be boolean with True = the block is there, got float64"),
    (dict(block_mask=[[True]]), "block_mask must be boolean"),
    (dict(block_mask=np.ones((3, 4), bool)), "block_mask must have the shape (3, 5)"),
    (dict(block_mask=np.ones((4, 3, 5), bool)), "leading axes that broadcast to (2,)"),
    (dict(k=np.ones((2, 37, 7))), "q and k must have the same d_head"),
    (dict(q=np.ones((2, 19, 6), bool)), "q must hold real numbers"),
])  # fmt: skip
def test_a_wrong_argument_is_one_clear_sentence(change, sentence):
    q, k, v = (a.numpy() for a in draw(11, 19, 37, 6))
    arguments = dict(q=q, k=k, v=v, block_mask=np.ones((3, 5), bool), block_size=8) | change
    with pytest.raises(ValueError) as error:
        s.block_sparse_attention_cuda(**arguments)
    assert sentence in str(error.value)


def test_a_window_that_is_no_positive_whole_number_is_refused():
    q, k, v = draw(11, 19, 37, 6)
    for window in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="window must be a positive whole number"):
            s.sliding_window_attention_cuda(q, k, v, window)
    out = s.sliding_window_attention_cuda(q, k, v, 7)
    np.testing.assert_allclose(out, attended(q, k, v, visible(19, 37, True, 7)), atol=1e-5)


def test_a_window_that_is_longer_than_a_block_meets_every_key_of_many_blocks():
    q, k, v = draw(12, 1344, 1344, 4, heads=1)
    out = s.sliding_window_attention_cuda(q, k, v, 66)
    np.testing.assert_allclose(out, attended(q, k, v, visible(1344, 1344, True, 66)), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
@every_type
def test_on_a_gpu_it_agrees_with_the_cpu(dtype):
    q, k, v = draw(25, 200, 150, 80, dtype=dtype)
    there = draw_mask(1, 200, 150, 32)
    got = s.block_sparse_attention_cuda(*(a.cuda() for a in (q, k, v)), there, 32, True)
    wanted = attended(q, k, v, expanded(there, 32, 200, 150) & visible(200, 150, True))
    np.testing.assert_allclose(got.cpu().double(), wanted, atol=TOLERANCE[dtype])
