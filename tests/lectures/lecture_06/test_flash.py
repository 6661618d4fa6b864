"""Lecture 06: flash attention against loops, torch and its own limits; its memory, its tiles, its gradient."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attention import flash as f
from attention.fundamentals import attention_backward, attention_torch
from tests.benchmarks import flash_numpy as benchmark

SHAPES = [
    ((7, 5), (11, 5), 5),
    ((3, 19, 33), (3, 45, 33), 33),
    ((2, 3, 70, 8), (2, 3, 90, 8), 6),
    ((1, 1, 40, 64), (1, 1, 9, 64), 64),
]
BLOCKS = [(64, 64), (1, 1), (16, 7), (5, 32), (128, 3)]
FORWARD = [f.flash_attention_numpy, lambda q, k, v, *a, **o: through_torch(f.flash_attention_torch, q, k, v, *a, **o)]
both = pytest.mark.parametrize("forward", FORWARD, ids=["numpy", "torch"])


def through_torch(function, *arguments, **options):
    """Call a function of tensors with arrays and get arrays."""
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    return tuple(t.numpy() for t in function(*tensors, **options))


def draw(shape_q, shape_k, d_v, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in (shape_q, shape_k, (*shape_k[:-1], d_v))]


def reference(q, k, v, causal=False, scale=None):
    """Output and log-sum-exp as loops over queries, in float64."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    n, m = q.shape[-2], k.shape[-2]
    out, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.full(q.shape[:-1], -np.inf)
    for place in np.ndindex(*q.shape[:-1]):
        end = max(0, place[-1] + 1 + m - n) if causal else m
        if end:
            s = scale * k[place[:-1]][:end].astype(float) @ q[place].astype(float)
            weights = np.exp(s - s.max())
            out[place] = weights @ v[place[:-1]][:end] / weights.sum()
            lse[place] = s.max() + np.log(weights.sum())
    return out, lse


def must_agree(got, expected, atol):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# --- forward ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_block_size_gives_plain_attention(shapes, blocks, causal, forward):
    q, k, v = draw(*shapes)
    must_agree(forward(q, k, v, causal, None, *blocks), reference(q, k, v, causal), 1e-12)


@both
@pytest.mark.parametrize("score", [-200.0, 1e4, -1e4])
def test_extreme_scores_give_the_mean_of_the_values(score, forward):
    q, k = np.full((5, 4), score / 4), np.ones((7, 4))
    v = np.arange(28.0).reshape(7, 4)
    out, lse = forward(q, k, v, False, 1.0, 2, 3)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(0), (5, 4)), rtol=1e-12)
    np.testing.assert_allclose(lse, score + np.log(7), rtol=1e-12)


@both
def test_rows_with_nothing_to_attend_to_are_zero_and_minus_infinity(forward):
    q, k, v = draw((9, 4), (3, 4), 4)
    for blocks in BLOCKS:
        out, lse = forward(q, k, v, True, None, *blocks)
        assert (out[:6] == 0).all() and np.isneginf(lse[:6]).all()
        assert np.isfinite(out).all() and np.isfinite(lse[6:]).all()
    out, lse = forward(q, k[:0], v[:0])
    assert (out == 0).all() and np.isneginf(lse).all()
    assert forward(q[:0], k, v)[0].shape == (0, 4)


def test_bfloat16_is_computed_in_single_precision():
    q, k, v = (torch.from_numpy(a).bfloat16() for a in draw((2, 70, 16), (2, 90, 16), 16))
    out, lse = f.flash_attention_torch(q, k, v, True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected, _ = reference(*(t.double().numpy() for t in (q, k, v)), True)
    np.testing.assert_allclose(out.double().numpy(), expected, atol=1e-2)


# --- memory and time -------------------------------------------------------------------------------------------------


def test_peak_memory_grows_linearly_with_the_length():
    lengths = np.array([512, 1024, 2048, 4096])
    peaks = []
    for n in lengths:
        arrays = draw((n, 32), (n, 32), 32, dtype=np.float32)
        peaks.append(benchmark.peak_bytes(lambda: f.flash_attention_numpy(*arrays)))
    slope = np.polyfit(np.log(lengths), np.log(peaks), 1)[0]
    assert slope < 1.1
    assert peaks[-1] < 4096 * 4096  # bytes: a quarter of one matrix


@pytest.mark.parametrize(("lead", "n"), [((4,), 2048), ((3, 40), 512), ((5000, 1), 16), ((), 1500)])
def test_chosen_tiles_take_no_more_than_12_megabytes_beyond_inputs_and_output(lead, n):
    q, k, v = draw((*lead, n, 32), (*lead, n, 32), 32, dtype=np.float32)
    peak = benchmark.peak_bytes(lambda: f.flash_attention_numpy(q, k, v, True))
    assert peak - q.nbytes - q[..., 0].nbytes < 12e6


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (5, 1, 2), (0,), (2, 0)])
def test_heads_taken_in_parts_are_all_heads_once(lead):
    for size in (1, 2, 4, 100):
        count = np.zeros(lead, int)
        for part in f.parts_of(lead, size):
            count[part] += 1
            assert count[part].size <= max(size, 1)
        assert (count == 1).all()


def test_tiles_that_are_given_are_taken_and_others_chosen():
    q, k, v = draw((2, 700, 8), (1, 900, 8), 5)
    expected = reference(q, np.broadcast_to(k, (2, 900, 8)), np.broadcast_to(v, (2, 900, 5)), True)
    for blocks in ({}, {"block_q": 100}, {"block_k": 33}, {"block_q": 7, "block_k": 800}):
        must_agree(f.flash_attention_numpy(q, k, v, True, **blocks), expected, 1e-12)


def test_no_gradient_needs_the_matrix():
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tensors = [torch.zeros(512, 16, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = f.flash_attention_torch(*tensors)
    assert out.requires_grad and sum(kept.values()) == 4 * (4 * 512 * 16 + 512)


# --- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["numpy", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients_equal_the_backward_pass_with_the_matrix(shapes, causal, backward):
    q, k, v = draw(*shapes)
    out, lse = f.flash_attention_numpy(q, k, v, causal, 0.4)
    d_out = np.random.default_rng(1).standard_normal(out.shape)
    arguments = q, k, v, out, lse, d_out, causal, 0.4
    got = (
        f.flash_attention_backward_numpy(*arguments)
        if backward == "numpy"
        else through_torch(f.flash_attention_backward_torch, *arguments)
    )
    must_agree(got, attention_backward(q, k, v, d_out, causal=causal, scale=0.4), 1e-11)


def test_autograd_through_flash_attention_equals_autograd_through_the_matrix_and_torch():
    tensors = [torch.from_numpy(a).requires_grad_() for a in draw((2, 70, 8), (2, 70, 8), 8)]
    d_out = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 70, 8)))
    outs = [
        f.flash_attention_torch(*tensors, causal=True)[0],
        attention_torch(*tensors, causal=True),
        scaled_dot_product_attention(*tensors, is_causal=True),
    ]
    ours, *others = [torch.autograd.grad(out, tensors, d_out) for out in outs]
    for theirs in others:
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_finite_differences_agree():
    tensors = [torch.from_numpy(a).requires_grad_() for a in draw((5, 3), (7, 3), 2)]
    assert torch.autograd.gradcheck(
        lambda *t: f.flash_attention_torch(*t, causal=True, block_q=2, block_k=3)[0], tensors
    )


def test_broadcast_keys_get_the_sum_of_their_gradients():
    q, k, v = (torch.from_numpy(a).requires_grad_() for a in draw((3, 5, 4), (1, 6, 4), 4))
    ours = torch.autograd.grad(f.flash_attention_torch(q, k, v)[0].square().sum(), (q, k, v))
    theirs = torch.autograd.grad(attention_torch(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_rows_with_nothing_to_attend_to_have_gradient_zero():
    q, k, v = (torch.from_numpy(a).requires_grad_() for a in draw((5, 4), (2, 4), 4))
    gradients = torch.autograd.grad(f.flash_attention_torch(q, k, v, causal=True)[0].square().sum(), (q, k, v))
    assert (
        all(g.isfinite().all() for g in gradients) and (gradients[0][:3] == 0).all() and (gradients[0][3:] != 0).any()
    )


# --- the pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 10])
def test_online_softmax_equals_three_passes_for_every_width(width):
    scores = np.random.default_rng(0).standard_normal((4, 5, 10)) * 50
    scores[0, 0, :6] = -np.inf
    m, ell = np.full((4, 5), -np.inf), np.zeros((4, 5))
    for j in range(0, 10, width):
        m, ell = f.online_softmax(m, ell, scores[..., j : j + width])
    np.testing.assert_array_equal(m, scores.max(-1))
    np.testing.assert_allclose(ell, np.exp(scores - m[..., None]).sum(-1), rtol=1e-12)


def test_online_softmax_gives_the_type_of_the_scores():
    m, ell = f.online_softmax(np.full(3, -np.inf), np.zeros(3), np.ones((3, 2), np.float32))
    assert m.dtype == ell.dtype == np.float32


def test_parts_merge_in_any_order_and_grouping():
    q, k, v = draw((3, 9, 8), (3, 30, 8), 5)
    parts = [
        f.flash_attention_numpy(q, k[:, j], v[:, j]) for j in (slice(0, 4), slice(4, 4), slice(4, 21), slice(21, 30))
    ]
    outs, lses = zip(*parts)
    whole = f.flash_attention_numpy(q, k, v)
    must_agree(f.merge_by_lse(outs, lses), whole, 1e-12)
    must_agree(f.merge_by_lse(outs[::-1], lses[::-1]), whole, 1e-12)
    left, right = f.merge_by_lse(outs[:2], lses[:2]), f.merge_by_lse(outs[2:], lses[2:])
    must_agree(f.merge_by_lse([left[0], right[0]], [left[1], right[1]]), whole, 1e-12)


def test_one_part_is_itself_a_query_needs_no_axis_and_no_part_is_refused():
    out, lse = draw((3, 1, 2), (3, 1), 1)[:2]
    must_agree(f.merge_by_lse(out[:1], lse[:1]), (out[0], lse[0]), 1e-12)
    whole = f.merge_by_lse(out, lse)
    must_agree(f.merge_by_lse(out[:, 0], lse[:, 0]), (whole[0][0], whole[1][0]), 1e-12)
    with pytest.raises(ValueError, match="of at least one part, got shapes"):
        f.merge_by_lse(out[:0], lse[:0])


def test_outputs_of_whole_numbers_are_merged_in_floats():
    out, _ = f.merge_by_lse(np.array([[[1]], [[2]]]), np.zeros((2, 1)))
    assert out == 1.5


def test_causal_tiles_counts_every_tile_once_and_agrees_with_what_the_backward_pass_visits():
    rng = np.random.default_rng(0)
    for n, m, block in rng.integers(1, 40, (50, 3)).tolist():
        full, partial, skipped = f.causal_tiles(n, m, block, block)
        assert full + partial + skipped == -(-n // block) * -(-m // block)
        masks = [mask for *_, mask in f.backward_tiles(n, m, True, block)]
        assert sum(mask is None for mask in masks) == full and sum(mask is not None for mask in masks) == partial


def test_few_heads_are_taken_at_a_time_where_a_tile_is_chosen_and_all_where_both_are_given(monkeypatch):
    taken, plain = [], f.tiled_attention

    def noted(q, *rest):
        taken.append(len(q))
        return plain(q, *rest)

    monkeypatch.setattr(f, "tiled_attention", noted)

    def heads(n_heads, n_queries, n_keys, d, d_v, **blocks):
        taken.clear()
        q, k, v = (np.ones((n_heads, *sizes)) for sizes in ((n_queries, d), (n_keys, d), (n_keys, d_v)))
        f.flash_attention_numpy(q, k, v, **blocks)
        return list(taken)

    assert f.TILE_SCORES == 4 * 256 * 512
    assert heads(8, 256, 512, 8, 4) == [3, 3, 2]  # 3 x 256 x (512 + 8 + 4) numbers are fewer than TILE_SCORES
    assert heads(2, 256, 512, 8, 2000) == [1, 1]
    assert heads(8, 256, 512, 200, 4) == [2, 2, 2, 2]
    assert heads(120, 64, 64, 8, 4, block_q=64, block_k=64) == [120]
    for blocks in ({"block_q": 64}, {"block_k": 64}):
        assert heads(120, 64, 64, 8, 4, **blocks) == [107, 13]
