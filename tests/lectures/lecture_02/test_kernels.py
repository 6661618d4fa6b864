"""Lecture 02 in CUDA: the result, whatever the sizes; the bytes, to the byte; and what each barrier is for."""

import numpy as np
import pytest
import torch
from torch import nn

from attention import multi_head as m
from utils import cuda


def draw(rng, lead_q=(), lead_kv=(), n=5, n_keys=5, d_model=8, heads=2, d_head=4, d_v=4):
    """x_q, x_kv, w_q, w_k, w_v, w_o, heads: the first seven arguments of the triple, in float64."""
    x_q, x_kv = rng.standard_normal((*lead_q, n, d_model)), rng.standard_normal((*lead_kv, n_keys, d_model))
    w_q, w_k = rng.standard_normal((2, d_model, heads * d_head)) / d_model**0.5
    w_v, w_o = rng.standard_normal((d_model, heads * d_v)), rng.standard_normal((heads * d_v, d_model))
    return x_q, x_kv, w_q, w_k, w_v, w_o, heads


def must_agree(arguments, mask=None, causal=False):
    got, expected = (f(*arguments, mask, causal) for f in (m.multi_head_attention_cuda, m.multi_head_attention_numpy))
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def tensors(rng, *shapes):
    return [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


# --- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_size_agrees_with_numpy(seed, causal):
    rng = np.random.default_rng(seed)
    n, n_keys = (int(x) for x in rng.integers(1, 50, 2))
    d_model, heads, d_head, d_v = (int(x) for x in rng.integers(1, (40, 6, 24, 24)))
    lead = [(), (2,), (2, 3)][seed % 3]
    arguments = draw(rng, lead, lead, n, n_keys, d_model, heads, d_head, d_v)
    mask = rng.random((heads, n, n_keys)) < 0.6 if seed % 2 else None
    must_agree(arguments, mask, causal)


@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (2, 7, 9), (3, 1, 1, 9), (3, 2, 1, 9), (3, 2, 7, 9), ()], ids=str)
def test_every_mask_that_broadcasts_is_taken(shape):
    rng = np.random.default_rng(1)
    mask = rng.random(shape) < 0.5
    for causal in (False, True):
        must_agree(draw(rng, (3,), (3,), 7, 9), np.asarray(mask), causal)


def test_more_keys_than_scores_that_can_be_kept():
    rng = np.random.default_rng(6)
    must_agree(draw(rng, n=3, n_keys=790, d_model=4, heads=1), causal=True)


def test_agrees_with_pytorchs_own_module():
    rng = np.random.default_rng(8)
    theirs = nn.MultiheadAttention(24, 3, bias=False, batch_first=True).double()
    x_q, x_kv = (torch.from_numpy(rng.standard_normal((2, n, 24))) for n in (17, 21))
    expected, _ = theirs(x_q, x_kv, x_kv, need_weights=False)
    weights = [w.mT for w in (*theirs.in_proj_weight.chunk(3), theirs.out_proj.weight)]
    got = m.multi_head_attention_cuda(x_q, x_kv, *weights, 3)
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-5)


WRONG = {
    "x_q must have at least two axes": dict(x_q=(8,)),
    "x_kv must have at least two axes": dict(x_kv=(8,)),
    r"w_q must have shape \(8, columns\)": dict(w_q=(7, 8)),
    r"w_k must have shape \(8, columns\)": dict(w_k=(8, 8, 1)),
    r"w_v must have shape \(8, columns\)": dict(w_v=(9, 8)),
    r"w_o must have shape \(8, columns\)": dict(w_o=(6, 8)),
    "same d_head": dict(w_k=(8, 10)),
    "n_heads must divide": dict(w_v=(8, 9), w_o=(9, 8)),
    "leading axes of x_q and x_kv must broadcast": dict(x_q=(2, 5, 8), x_kv=(3, 5, 8)),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_shapes_get_one_sentence(words):
    names = ("x_q", "x_kv", "w_q", "w_k", "w_v", "w_o")
    shapes = {"x_q": (5, 8), "x_kv": (5, 8)} | dict.fromkeys(names[2:], (8, 8)) | WRONG[words]
    with pytest.raises(ValueError, match=words) as refused:
        m.multi_head_attention_cuda(*(np.zeros(shapes[name]) for name in names), 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("mask", [np.ones((5, 4), bool), np.ones((5, 5))], ids=["shape", "float"])
def test_a_wrong_mask_gets_one_sentence(mask):
    with pytest.raises(ValueError, match="mask must"):
        m.multi_head_attention_cuda(*draw(np.random.default_rng(12)), mask)


# --- the bytes -------------------------------------------------------------------------------------------------------


def tiles(size):
    return -(-size // 16)


@pytest.mark.parametrize("seed", range(8))
def test_a_product_reads_and_writes_the_formulas_bytes(seed):
    rng = np.random.default_rng(seed)
    n, d_in, d_out = (int(x) for x in rng.integers(1, 60, 3))
    x, w = tensors(rng, (n, d_in), (d_in, d_out))
    grid, block, arguments, out = m.project_launch(x, w)
    report = m.project_kernel().check[grid, block](*arguments)
    assert report.ok
    assert report.global_loaded == 4 * (n * d_in * tiles(d_out) + d_in * d_out * tiles(n))
    assert report.global_stored == 4 * n * d_out
    torch.testing.assert_close(out, x @ w, rtol=1e-5, atol=1e-4)


def attend(n, n_keys, heads, d_head, d_v, causal=False, kept=None, source=None, batch=1):
    rng = np.random.default_rng(n + n_keys)
    q, k, v = tensors(rng, (batch, n, heads * d_head), (batch, n_keys, heads * d_head), (batch, n_keys, heads * d_v))
    grid, block, shared, arguments, out = m.attend_launch(q, k, v, heads, None, causal, kept)
    kernel = cuda.compile(source, name="attend_heads") if source else m.attend_kernel()
    return kernel.check[grid, block, shared](*arguments), out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_attention_reads_and_writes_the_formulas_bytes(seed, causal):
    rng = np.random.default_rng(seed)
    n, n_keys, heads, d_head, d_v = (int(x) for x in rng.integers(1, (50, 50, 4, 20, 20)))
    kept = 16 * int(rng.integers(0, 4))
    report, _ = attend(n, n_keys, heads, d_head, d_v, causal, kept, batch=2)
    assert report.ok
    read = n * d_head
    for first_query in range(0, n, 16):
        end = min(n_keys, first_query + 16 + n_keys - n) if causal else n_keys
        loaded = max(0, min(n_keys, 16 * tiles(end)))  # whole tiles, as far as there are keys
        read += loaded * (d_head + d_v) + max(0, loaded - kept) * d_head
    assert report.global_loaded == 4 * 2 * heads * read
    assert report.global_stored == 4 * 2 * heads * n * d_v


@pytest.mark.parametrize("kept", [0, 16, 48])
def test_a_mask_is_read_once_where_scores_are_kept_and_twice_where_not(kept):
    n, n_keys, heads = 20, 35, 3
    rng = np.random.default_rng(15)
    q, k, v = tensors(rng, (1, n, heads * 4), (1, n_keys, heads * 4), (1, n_keys, heads * 4))
    mask = torch.from_numpy(rng.integers(0, 2, (1, heads, n, n_keys)).astype(np.uint8))
    grid, block, shared, arguments, _ = m.attend_launch(q, k, v, heads, mask, False, kept)
    report = m.attend_kernel().check[grid, block, shared](*arguments)
    read = sum(row.bytes for row in report.rows if row.array == "mask" and row.kind == "load")
    assert report.ok and read == heads * n * (n_keys + max(0, n_keys - kept))


def test_how_many_scores_are_kept_does_not_change_the_answer():
    outs = [attend(20, 70, 2, 5, 3, causal, kept)[1] for causal in (False, True) for kept in (None, 0, 16, 48, 80)]
    assert all(torch.equal(out, outs[0]) for out in outs[:5]) and all(torch.equal(out, outs[5]) for out in outs[5:])
    assert not torch.equal(outs[0], outs[5])


@pytest.mark.parametrize("d_head", [8, 16, 32, 64])
def test_heads_of_whole_sectors_are_read_in_place_without_waste(d_head):
    report, _ = attend(16, 32, 3, d_head, d_head)
    assert all(row.sectors == row.ideal_sectors for row in report.rows if row.space == "global")


def test_heads_of_four_floats_waste_half_of_each_sector():
    report, _ = attend(16, 16, 4, 4, 4)
    rows = [row for row in report.rows if row.array == "k"]
    assert rows and all(row.sectors == 2 * row.ideal_sectors for row in rows)


def test_the_least_traffic_of_a_layer_has_no_copy_in_it():
    """Distinct bytes: each tensor once, in multiples of a sector; nothing is written but q, k, v, the heads and the output."""
    n, heads, d_head = 48, 4, 16
    report, _ = attend(n, n, heads, d_head, d_head)
    assert report.distinct_loaded == 4 * 3 * n * heads * d_head
    assert report.distinct_stored == 4 * n * heads * d_head


# --- the barriers ----------------------------------------------------------------------------------------------------


def without_each_barrier(source):
    """The source without its first barrier, without its second, ..."""
    for barrier in ("__syncthreads();", "__syncwarp();"):
        parts = source.split(barrier)
        for i in range(1, len(parts)):
            yield barrier.join(parts[:i]) + " " * len(barrier) + barrier.join(parts[i:])


def test_every_barrier_is_needed_and_its_absence_reported():
    variants = list(without_each_barrier(m.LOAD_HEAD + m.ROW_TOOLS + m.ATTEND_HEADS))
    assert len(variants) == 3
    for source in variants:
        report, _ = attend(33, 35, 1, 8, 8, source=source)
        assert "race" in {problem.kind for problem in report.problems}
    x, w = tensors(np.random.default_rng(13), (17, 40), (40, 20))
    grid, block, arguments, _ = m.project_launch(x, w)
    variants = list(without_each_barrier(m.PROJECT))
    assert len(variants) == 2
    for source in variants:
        report = cuda.compile(source, name="project").check[grid, block](*arguments)
        assert "race" in {problem.kind for problem in report.problems}


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_tensors_run_on_the_gpu(causal):
    rng = np.random.default_rng(14)
    *arrays, heads = draw(rng, (2,), (2,), 45, 70, 40, 3, 9, 5)
    mask = rng.random((heads, 45, 70)) < 0.6
    out = m.multi_head_attention_cuda(*(torch.from_numpy(a).cuda() for a in arrays), heads, mask, causal)
    assert out.is_cuda and out.dtype == torch.float64
    expected = m.multi_head_attention_numpy(*arrays, heads, mask, causal)
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
