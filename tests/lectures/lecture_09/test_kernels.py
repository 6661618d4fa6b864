"""Lecture 09 in CUDA: each row of the latent cache is read once, for all heads, as key and as value; on any sizes."""

import re

import numpy as np
import pytest
import torch

from attention import latent as m
from utils import cuda

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
every_type = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(seed, lengths, heads, d_latent, d_rope, capacity=None, dtype=torch.float32):
    """Queries in single precision, a cache of this type with nan behind the lengths, and the lengths."""
    rng = np.random.default_rng(seed)
    batch, capacity = len(lengths), max(lengths, default=0) + 2 if capacity is None else capacity
    shapes = (batch, heads, d_latent), (batch, heads, d_rope), (batch, capacity, d_latent), (batch, capacity, d_rope)
    q_latent, q_rope, c_kv, k_rope = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in shapes)
    for row, length in enumerate(lengths):
        c_kv[row, length:], k_rope[row, length:] = float("nan"), float("nan")
    return q_latent, q_rope, c_kv.to(dtype), k_rope.to(dtype), np.array(lengths, np.int64)


def attended(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """One head and one sequence at a time, in float64; the key is the latent with the rotary part behind it."""
    q_latent, q_rope, c_kv, k_rope = (torch.as_tensor(a).double().numpy() for a in (q_latent, q_rope, c_kv, k_rope))
    out = np.zeros(q_latent.shape)
    for b, length in enumerate(np.asarray(lengths)):
        keys = np.concatenate([c_kv[b, :length], k_rope[b, :length]], axis=-1)
        for h in range(out.shape[1]):
            if length:
                scores = keys @ np.concatenate([q_latent[b, h], q_rope[b, h]]) * scale
                weights = np.exp(scores - scores.max())
                out[b, h] = weights @ c_kv[b, :length] / weights.sum()
    return out


def run(cache, scale=0.1, warps=32):
    """The report of the first kernel, after the output of both has been compared."""
    kernel, launch, arguments = m.latent_launch(*cache, scale, warps)
    outs, lses = arguments[5:7]
    outs.fill_(float("nan"))
    report = kernel.check[launch](*arguments)
    assert report.ok, report.problems[0]
    out = torch.full_like(arguments[0], 9.0)
    rows, n_splits, d = outs.shape
    second = m.merge_kernel().check[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d)
    assert second.ok, second.problems[0]
    wanted = attended(*cache, scale)
    tolerance = 1e-5 * max(1, np.abs(wanted).max())
    np.testing.assert_allclose(out.double().numpy(), wanted, rtol=0, atol=tolerance)
    return report


def loaded(report, *names):
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in names)


def of_cache(report):
    return [row for row in report.rows if row.array in ("c_kv", "k_rope")]


# --- the kernel ------------------------------------------------------------------------------------------------------


@every_type
def test_twenty_random_sizes_agree_and_read_what_the_formula_says(dtype):
    rng = np.random.default_rng(1)
    item = torch.empty(0, dtype=dtype).element_size()
    for turn in range(20):
        heads, d_latent, d_rope = (int(x) for x in rng.integers(1, (12, 90, 40)))
        lengths = rng.integers(0, 200, 3).tolist()
        report = run(draw(turn, lengths, heads, d_latent, d_rope, dtype=dtype))
        cache, queries = m.latent_bytes(lengths, heads, d_latent, d_rope, item)
        assert loaded(report, "c_kv", "k_rope") == cache == sum(lengths) * (d_latent + d_rope) * item
        assert loaded(report, "q_latent", "q_rope") == queries
        splits, all_splits = sum(-(-n // 128) for n in lengths), 3 * -(-max(lengths) // 128)
        assert report.global_stored == 4 * splits * heads * d_latent + 8 * all_splits * heads


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 300])
def test_lengths_around_a_tile_and_a_split(length):
    run(draw(length, [length, 0], 3, 24, 8))


@pytest.mark.parametrize("heads", [1, 2, 16, 31, 32, 33, 40, 70])
def test_any_number_of_heads_and_up_to_32_of_them_share_one_pass(heads):
    report = run(draw(heads, [50, 20], heads, 20, 4))
    passes = -(-heads // 32)
    assert loaded(report, "c_kv", "k_rope") == passes * 70 * 24 * 4 == m.latent_bytes([50, 20], heads, 20, 4)[0]


def test_the_bytes_of_the_cache_do_not_grow_with_the_heads_unless_each_has_a_block_of_its_own():
    one, many = (loaded(run(draw(2, [70], heads, 32, 8)), "c_kv", "k_rope") for heads in (1, 16))
    apart = loaded(run(draw(2, [70], 16, 32, 8), warps=1), "c_kv", "k_rope")
    assert one == many and apart == 16 * one


@every_type
@pytest.mark.parametrize(("d_latent", "d_rope"), [(64, 16), (128, 64), (512, 64), (33, 7), (1, 1), (32, 0)])
def test_widths_of_real_models_and_odd_ones(dtype, d_latent, d_rope):
    report = run(draw(d_latent, [37], 4, d_latent, d_rope, dtype=dtype), (d_latent + d_rope) ** -0.5)
    assert report.shared_bytes <= 48 * 1024 and report.bank_conflicts == 0


@pytest.mark.parametrize("score", [-200.0, -1e4, 1e4])
def test_scores_far_from_zero_give_no_nan(score):
    q_latent, q_rope, c_kv, k_rope, lengths = draw(4, [140, 3], 2, 32, 0)
    c_kv[0, :140, 0], q_latent[:, :, 0] = 1.0, 1.0
    q_latent[:, :, 1:] = 0.0
    run((q_latent, q_rope, c_kv, k_rope, lengths), score)


def test_a_maximum_that_rises_and_one_that_falls():
    q_latent, q_rope, c_kv, k_rope, lengths = draw(5, [100], 2, 8, 4)
    q_latent[:], q_rope[:] = 0.0, 1.0
    for slope in (torch.linspace(-8, 8, 102), torch.linspace(8, -8, 102)):
        k_rope[0] = slope[:, None]
        run((q_latent, q_rope, c_kv, k_rope, lengths), 1.0)


def test_neighbouring_lanes_read_neighbouring_columns_and_all_warps_load():
    report = run(draw(6, [128], 8, 64, 32))
    assert all(row.sectors == row.ideal_sectors for row in of_cache(report))
    assert sum(row.requests for row in of_cache(report)) == 128 * (64 + 32) // 32


def without(source, which):
    """The source without one of its barriers, counted from 0."""
    barrier = list(re.finditer(r"__sync(threads|warp)\(\);", source))[which]
    return source[: barrier.start()] + source[barrier.end() :]


@pytest.mark.parametrize("which", [0, 1])
def test_every_barrier_is_needed_and_its_absence_reported(which):
    kernel, launch, arguments = m.latent_launch(*draw(7, [50], 4, 24, 8), 0.1)
    source = kernel.source.replace(m.LATENT_SPLIT, without(m.LATENT_SPLIT, which))
    assert kernel.source.count("__sync") == 2 and source.count("__sync") == 1
    report = cuda.compile(source, name="latent_split", template=kernel.template).check[launch](*arguments)
    assert "race" in {problem.kind for problem in report.problems}


# --- the function around it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64])
def test_arrays_of_any_type_come_back_in_their_own(kind):
    *arrays, lengths = draw(8, [20, 31], 3, 6, 2, capacity=31)
    arrays = [(3 * torch.nan_to_num(a)).numpy().astype(kind) for a in arrays]
    out = m.latent_decode_attention_cuda(*arrays, lengths, 0.1)
    assert out.dtype == (np.float64 if kind == np.int64 else kind)
    wanted = attended(*(a.astype(float) for a in arrays), lengths, 0.1)
    np.testing.assert_allclose(out.astype(float), wanted, atol=1e-2 if kind == np.float16 else 1e-4)


@every_type
def test_a_cache_in_half_precision_is_read_as_it_is_stored(dtype):
    cache = draw(9, [150, 0, 9], 4, 40, 8, dtype=dtype)
    out = m.latent_decode_attention_cuda(*cache, 0.2)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out, attended(*cache, 0.2), atol=1e-5)
    in_type = m.latent_decode_attention_cuda(cache[0].to(dtype), *cache[1:], 0.2)
    assert in_type.dtype == dtype
    np.testing.assert_allclose(in_type.float(), out, atol=20 * TOLERANCE[dtype])


def test_a_result_does_not_depend_on_the_rest_of_the_batch():
    cache = draw(10, [300, 5, 129], 2, 16, 4)
    together = m.latent_decode_attention_cuda(*cache, 0.3)
    for b in range(3):
        assert torch.equal(m.latent_decode_attention_cuda(*(a[b : b + 1] for a in cache), 0.3)[0], together[b])


@pytest.mark.parametrize(("lengths", "heads", "capacity"), [([], 2, 3), ([3, 0], 0, 3), ([0, 0], 2, 0), ([0], 2, 5)])
def test_empty_axes_give_empty_or_zero_results(lengths, heads, capacity):
    out = m.latent_decode_attention_cuda(*draw(11, lengths, heads, 4, 2, capacity=capacity), 0.5)
    assert out.shape == (len(lengths), heads, 4) and not out.any()


def test_lengths_may_be_a_tensor_of_any_integer_type():
    *arrays, lengths = draw(12, [20, 31], 3, 6, 2)
    wanted = m.latent_decode_attention_cuda(*arrays, lengths, 0.1)
    for given in (torch.from_numpy(lengths), torch.from_numpy(lengths).to(torch.int16), lengths.astype(np.uint8)):
        assert torch.equal(m.latent_decode_attention_cuda(*arrays, given, 0.1), wanted)


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(q_latent=np.ones((2, 6))), "q_latent must be (batch, heads, d_latent)"),
    (dict(q_rope=np.ones((2, 4, 2))), "q_rope must be (batch, heads, d_rope) with the (2, 3) of q_latent"),
    (dict(c_kv=np.ones((2, 9, 5))), "c_kv must be (2, capacity, 6), got shape (2, 9, 5)"),
    (dict(k_rope=np.ones((1, 9, 2))), "k_rope must be (2, capacity, 2), got shape (1, 9, 2)"),
    (dict(k_rope=np.ones((2, 8, 2))), "c_kv and k_rope must have the same capacity, got 9 and 8"),
    (dict(lengths=np.array([1, 2, 3])), "lengths must be (2,), one for each row of q_latent"),
    (dict(lengths=np.array([1, 10])), "lengths must lie between 0 and 9, got [1, 10]"),
    (dict(lengths=np.array([1.5, 2.0])), "lengths must be integers, got float64"),
    (dict(c_kv=np.ones((2, 9, 6), bool)), "c_kv must hold real numbers, got bool"),
])  # fmt: skip
def test_a_wrong_argument_is_one_clear_sentence(change, sentence):
    right = dict(q_latent=np.ones((2, 3, 6)), q_rope=np.ones((2, 3, 2)), c_kv=np.ones((2, 9, 6)),
                 k_rope=np.ones((2, 9, 2)), lengths=np.array([9, 4]), scale=1.0)  # fmt: skip
    m.latent_decode_attention_cuda(**right)
    with pytest.raises(ValueError) as error:
        m.latent_decode_attention_cuda(**right | change)
    assert sentence in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")
@every_type
def test_on_a_gpu_it_agrees_with_the_cpu(dtype):
    *arrays, lengths = draw(13, [500, 37], 16, 512, 64, dtype=dtype)
    got = m.latent_decode_attention_cuda(*(a.cuda() for a in arrays), lengths, 0.05)
    np.testing.assert_allclose(got.cpu(), attended(*arrays, lengths, 0.05), atol=1e-5)
