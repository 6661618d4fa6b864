"""Lecture 05's kernels: decoding in splits and through a block table, against NumPy and PyTorch, and their bytes."""

import re

import numpy as np
import pytest
import torch

from utils import cuda

kv = pytest.importorskip("attention.kv_cache")
if not hasattr(kv, "paged_decode_attention_cuda"):
    pytest.skip("lecture 05 has no CUDA part yet", allow_module_level=True)

SHAPES = [
    ([1], 1, 1),
    ([0, 3], 2, 7),
    ([127, 128, 129, 0], 1, 33),
    ([300, 5], 3, 80),
    ([257], 2, 128),
    ([40, 40], 1, 300),
]


def draw(lengths, heads, d, spare=5, seed=0, dtype=np.float32):
    """q, k_cache, v_cache with room for `spare` tokens more, nan behind the end of each row; lengths."""
    rng = np.random.default_rng(seed)
    shape = len(lengths), heads, max(lengths, default=0) + spare, d
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((len(lengths), heads, d), shape, shape))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = np.nan, np.nan
    return q, k, v, np.array(lengths, np.int64)


def paged(k, v, lengths, page_size, seed=0, spare=2):
    """Pages in random order, nan where no token is, and a block table with -1 behind each row's last page."""
    counts = -(-np.array(lengths) // page_size)
    order = np.random.default_rng(seed).permutation(counts.sum() + spare)
    table = np.full((len(lengths), counts.max(initial=0) + 1), -1)
    pages = [np.full((len(order), page_size, k.shape[1], k.shape[3]), np.nan, k.dtype) for _ in (k, v)]
    for b, n in enumerate(lengths):
        table[b, : counts[b]], order = order[: counts[b]], order[counts[b] :]
        for j in range(n):
            for to, cache in zip(pages, (k, v), strict=True):
                to[table[b, j // page_size], j % page_size] = cache[b, :, j]
    return *pages, table


def both(q, k, v, lengths, page_size=16, scale=None):
    """The results of the contiguous and of the paged kernel."""
    return (
        kv.decode_attention_cuda(q, k, v, lengths, scale),
        kv.paged_decode_attention_cuda(q, *paged(k, v, lengths, page_size), lengths, scale),
    )


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_kernels_agree_with_pytorch_on_each_row(shape, scale):
    q, k, v, lengths = draw(*shape)
    expected = np.zeros_like(q)
    for b, n in enumerate(lengths):
        if n:
            row = (torch.from_numpy(a)[None].double() for a in (q[b][:, None], k[b, :, :n], v[b, :, :n]))
            attended = torch.nn.functional.scaled_dot_product_attention(*row, scale=scale)
            expected[b] = attended[0, :, 0].numpy()
    for out in both(q, k, v, lengths, scale=scale):
        assert out.shape == q.shape and out.dtype == np.float32
        np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("page_size", [1, 3, 16, 128, 400])
def test_paged_is_contiguous_to_the_last_bit(page_size):
    contiguous, through_pages = both(*draw([300, 0, 129, 16], 2, 33), page_size=page_size)
    assert np.array_equal(contiguous, through_pages)


def test_rows_may_share_pages():
    q, k, v, _ = draw([40, 40], 2, 8)
    k[1, :, :16], v[1, :, :16] = k[0, :, :16], v[0, :, :16]
    k_pages, v_pages, table = paged(k, v, [40, 40], 16)
    table[1, 0] = table[0, 0]
    out = kv.paged_decode_attention_cuda(q, k_pages, v_pages, table, [40, 40])
    assert np.array_equal(out, kv.decode_attention_cuda(q, k, v, [40, 40]))


def test_a_row_gets_the_same_result_in_every_batch():
    q, k, v, lengths = draw([700, 30, 129, 0], 2, 64)
    together = both(q, k, v, lengths)
    for b in range(len(lengths)):
        for out, whole in zip(
            both(q[b : b + 1], k[b : b + 1], v[b : b + 1], lengths[b : b + 1]), together, strict=True
        ):
            assert np.array_equal(out[0], whole[b])


def test_a_row_without_keys_is_zero_also_when_all_are():
    for lengths in ([0, 200, 0], [0, 0, 0]):
        for out in both(*draw(lengths, 2, 20)):
            assert np.isfinite(out).all() and (out[np.array(lengths) == 0] == 0).all()


@pytest.mark.parametrize("level", [-1e6, -1e4, -200.0, 1e4, 1e6])
def test_extreme_scores_cost_no_accuracy(level):
    """Every score is the level or one above, over three splits and a part of a fourth."""
    q, k, v, lengths = draw([400, 70], 1, 2)
    q[:], k[..., 0] = [level, 1], 1
    k[..., 1] = np.arange(k.shape[2]) % 2
    expected = kv.decode_attention_numpy(*(a.astype(np.float64) for a in (q, k, v)), lengths, scale=1.0)
    for out in both(q, k, v, lengths, scale=1.0):
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_scores_near_the_end_of_the_range_give_no_nan():
    for level in (1e38, -1e38):
        q, k, v, lengths = draw([400, 70], 1, 1)
        q[:], k[:] = level, 1
        for out in both(q, k, v, lengths, scale=1.0):
            assert np.isfinite(out).all()


def test_one_split_may_outweigh_the_others_completely():
    q, k, v, lengths = draw([400], 1, 1)
    q[:], k[:] = 1, 0
    k[0, 0, 300] = 1e4
    for out in both(q, k, v, lengths):
        assert out[0, 0] == v[0, 0, 300]


def test_a_nan_that_is_attended_to_is_not_hidden():
    for array, j in ((1, 299), (2, 0), (2, 130)):
        arguments = draw([300, 300], 2, 8)
        arguments[array][1, 0, j] = np.nan
        for out in both(*arguments):
            assert np.isnan(out).any(-1).tolist() == [[False, False], [True, False]]


# --- bad input -------------------------------------------------------------------------------------------------------


def contiguous_arguments(**changed):
    given = {"q": np.ones((2, 3, 8)), "k": np.ones((2, 3, 10, 8)), "v": np.ones((2, 3, 10, 8)), "lengths": [4, 10]}
    return (given | changed).values()


@pytest.mark.parametrize("shape", [(2, 4, 10, 8), (2, 3, 10, 7), (1, 3, 10, 8)], ids=str)
def test_a_cache_of_other_sizes_than_the_query_is_refused_before_anything_is_read(shape):
    cache = np.ones(shape)
    with pytest.raises(ValueError, match="^keys (and values must be|must have four axes)"):
        kv.decode_attention_cuda(*contiguous_arguments(k=cache, v=cache))


@pytest.mark.parametrize(
    ("table", "lengths", "message"),
    [
        ([[0, 5], [1, 2]], [4, 4], "block_table must name pages 0 to 4"),
        ([[0, -1], [1, 2]], [3, 4], "block_table must name pages 0 to 4"),
        ([[0, 1], [1, 2]], [4, 5], "lengths must lie between 0 and 4"),
        ([[0, 1]], [4, 4], r"block_table must be \(2, columns\)"),
        ([0, 1], [2, 2], r"block_table must be \(2, columns\)"),
    ],
)
def test_a_bad_block_table_gets_one_sentence(table, lengths, message):
    q, pages = np.ones((2, 3, 8)), np.ones((5, 2, 3, 8))
    with pytest.raises(ValueError, match=message):
        kv.paged_decode_attention_cuda(q, pages, pages, table, lengths)
    with pytest.raises(ValueError, match="pages must be"):
        kv.paged_decode_attention_cuda(q, pages[:, :, :2], pages[:, :, :2], [[0, 1], [1, 2]], [4, 4])


# --- bytes and faults ------------------------------------------------------------------------------------------------


def random_sizes(count):
    rng = np.random.default_rng(3)
    return [
        (rng.integers(0, 400, rng.integers(1, 4)).tolist(), *map(int, rng.integers(1, [4, 100, 20])))
        for _ in range(count)
    ]


def launched(lengths, heads, d, page_size=None):
    """Reports of the two kernels, run with every check; the output is compared."""
    q, k, v, lengths = draw(lengths, heads, d)
    rows, n_splits = len(lengths) * heads, -(-int(lengths.max()) // kv.SPLIT)
    outs, lses, out = np.full((rows, n_splits, d), np.nan, np.float32), np.zeros((rows, n_splits)), 0 * q - 1
    where, caches, kernel = (k.shape[2],), (k, v), cuda.compile(kv.DECODE_SPLIT)
    if page_size:
        *caches, table = paged(k, v, lengths, page_size)
        where, kernel = (table.astype(np.int32), table.shape[1], page_size), cuda.compile(kv.PAGED_SPLIT)
    lengths = lengths.astype(np.int32)
    reports = (
        kernel.check[(rows, n_splits), 32, 8 * d](q, *caches, lengths, outs, lses, *where, heads, d, d**-0.5),
        cuda.compile(kv.MERGE_SPLITS).check[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d),
    )
    np.testing.assert_allclose(out, kv.decode_attention_numpy(q, k, v, lengths), atol=1e-5)
    return reports


def read(report, *arrays):
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in arrays)


@pytest.mark.parametrize("lengths, heads, d, page_size", random_sizes(10), ids=str)
def test_bytes_are_the_floor_and_the_partials_and_the_table_exactly(lengths, heads, d, page_size):
    keys, full = heads * sum(lengths), heads * sum(-(-n // kv.SPLIT) for n in lengths)
    rows, partials = heads * len(lengths), heads * len(lengths) * -(-max(lengths) // kv.SPLIT)
    for size in (None, page_size):
        split, merge = launched(lengths, heads, d, size)
        assert split.ok and merge.ok, (split.problems, merge.problems)
        assert read(split, "k", "v") == 4 * 2 * keys * d
        assert read(split, "q") == 4 * full * d
        assert read(split, "block_table") == (4 * keys if size else 0)
        assert split.global_stored == 4 * full * d + 8 * partials
        assert merge.global_loaded == 4 * full * d + 2 * 8 * partials
        assert merge.global_stored == 4 * rows * d


@pytest.mark.parametrize("d", [32, 64, 80, 128])
@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
def test_no_sector_is_fetched_in_vain(page_size, d):
    for report in launched([130, 20], 2, d, page_size):
        for row in report.rows:
            if row.space == "global":
                assert row.sectors == row.ideal_sectors, row


def test_the_size_of_a_split_is_the_same_in_python_and_in_cuda():
    assert re.findall(r"#define SPLIT (\d+)", kv.ATTEND_SPLIT) == [str(kv.SPLIT)]


def test_the_merge_without_its_barrier_is_reported():
    assert kv.MERGE_SPLITS.count("__syncwarp();") == 1
    outs, lses, out = np.ones((1, 40, 8), np.float32), np.zeros((1, 40)), np.zeros((1, 8), np.float32)
    report = cuda.compile(kv.MERGE_SPLITS.replace("__syncwarp();", "")).check[1, 32, 160](outs, lses, out, 40, 8)
    assert "race" in {problem.kind for problem in report.problems}
