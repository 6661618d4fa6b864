"""What the functions around the triples promise at the edges: weights, gradients by hand, parts, packed sequences."""

import math

import numpy as np
import pytest
import torch

from attention import (
    differential,
    flash,
    fundamentals,
    grouped_query,
    kv_cache,
    linear,
    long_context,
    mixture,
    multi_head,
    rotary,
    sparse,
)

INF = math.inf


def test_no_keys_and_a_batch_brought_by_k_give_zeros_and_zero_gradients():
    q, k, v = (torch.ones(shape, requires_grad=True) for shape in ((1, 2, 3), (5, 0, 3), (5, 0, 4)))
    out = fundamentals.attention_torch(q, k, v)
    assert out.shape == (5, 2, 4)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_gradients_of_what_the_batch_shares_are_summed():
    gradients = fundamentals.attention_backward(np.ones((2, 1, 1)), *np.ones((2, 1, 1, 1)), np.ones((2, 1, 1)))
    assert [g.shape for g in gradients] == [(2, 1, 1), (1, 1, 1), (1, 1, 1)]
    assert gradients[2].item() == 2


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4), (1, 5, 4), (5, 2)),
        ((3, 4), (2, 1, 5, 4), (3, 5, 2)),
        ((2, 6, 3, 4), (1, 5, 4), (2, 1, 1, 5, 2)),
        ((1, 1, 6, 3, 4), (1, 1, 5, 4), (5, 2)),
    ],
)
def test_shared_gradients_equal_autograd(shapes):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
    out = fundamentals.attention_torch(*tensors, causal=True)
    d_out = rng.standard_normal(out.shape)
    expected = torch.autograd.grad(out, tensors, torch.from_numpy(d_out))
    for found, exact in zip(fundamentals.attention_backward(q, k, v, d_out, causal=True), expected, strict=True):
        np.testing.assert_allclose(found, exact.numpy(), atol=1e-12)


@pytest.mark.parametrize("types", [("float16", "float32", "float64"), ("int8", "float32", "uint8")])
def test_gradients_by_hand_have_the_types_of_what_they_belong_to_and_are_not_causal_unless_asked(types):
    rng = np.random.default_rng(0)
    given = [rng.integers(-3, 4, shape).astype(float) for shape in ((2, 3, 4), (1, 5, 4), (5, 2))]
    given[2:] = [np.abs(given[2])]
    d_out = rng.standard_normal((2, 3, 2))
    expected = fundamentals.attention_backward(*given, d_out)
    assert (expected[2][-1] != 0).any() and not np.allclose(
        expected[0], fundamentals.attention_backward(*given, d_out, causal=True)[0]
    )
    with np.errstate(invalid="ignore"):
        typed = [np.abs(a).astype(t) if t.startswith("u") else a.astype(t) for a, t in zip(given, types)]
    found = fundamentals.attention_backward(*typed, d_out)
    floats = [t if t.startswith("f") else "float64" for t in types]
    assert [str(g.dtype) for g in found] == floats
    for gradient, exact in zip(found, expected):
        np.testing.assert_allclose(gradient.astype(float), exact, atol=1e-2)


def test_gradients_by_hand_do_not_see_nan_behind_a_mask():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((3, 4)) for _ in range(4))
    mask = np.array([True, True, False])
    expected = fundamentals.attention_backward(q, k, v, d_out, mask[None])
    k[2] = v[2] = np.nan
    for found, exact in zip(fundamentals.attention_backward(q, k, v, d_out, mask[None]), expected, strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-12)


def test_a_gradient_of_another_shape_gets_a_sentence():
    with pytest.raises(ValueError, match=r"d_out must have the shape \(3, 4\), got \(1, 4\)"):
        fundamentals.attention_backward(*np.ones((3, 3, 4)), np.ones((1, 4)))


@pytest.mark.parametrize("function", [fundamentals.attention_weights, fundamentals.attention_numpy])
def test_an_additive_mask_is_refused(function):
    values = () if function is fundamentals.attention_weights else (np.eye(2),)
    with pytest.raises(ValueError, match="mask must be boolean"):
        function(np.zeros((1, 2)), np.eye(2), *values, mask=np.array([[0.0, -INF]]))


@pytest.mark.parametrize(
    ("types", "result"),
    [(("float16",) * 2, "float32"), (("float32",) * 2, "float32"), (("float32", "float64"), "float64"),
     (("float64", "float16"), "float64"), (("int8", "float32"), "float64")],
)  # fmt: skip
def test_weights_are_computed_in_the_wider_type_and_at_least_in_single(types, result):
    q, k = (np.array([[1, 2], [3, 1]]).astype(t) for t in types)
    weights = fundamentals.attention_weights(q, k)
    assert weights.dtype == result
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (weights > 0).all()  # not causal unless asked


def test_masks_of_no_queries_or_keys_are_empty_and_negative_sizes_are_refused():
    assert fundamentals.causal_mask(0, 3).shape == (0, 3) and fundamentals.causal_mask(3, 0).shape == (3, 0)
    assert fundamentals.causal_mask(1, 1).tolist() == [[True]]
    for sizes in ((-1, 3), (3, -1), (-1, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            fundamentals.causal_mask(*sizes)


def test_lengths_lie_between_none_and_all_keys():
    assert fundamentals.padding_mask([0, 4], 4).sum(-1).ravel().tolist() == [0, 4]
    for lengths in ([-1, 2], [2, -1], [5, 0], [0, 5]):
        with pytest.raises(ValueError, match="lengths must lie between 0 and n_keys = 4"):
            fundamentals.padding_mask(np.array(lengths), 4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_weights_of_small_integers_do_not_wrap_around(dtype):
    q, k = np.full((2, 3), 100, dtype), np.full((4, 3), 100, dtype)
    k[0] = 0
    expected = fundamentals.attention_weights(q.astype(float), k.astype(float))
    np.testing.assert_array_equal(fundamentals.attention_weights(q, k), expected)
    assert fundamentals.softmax(q).dtype == np.float64


def test_half_precision_is_summed_in_single():
    p = fundamentals.softmax(np.zeros(70_000, np.float16))
    assert p.dtype == np.float16
    np.testing.assert_allclose(p.astype(float), 1 / 70_000, rtol=1e-2)
    out = fundamentals.attention_numpy(np.zeros((1, 1), np.float16), *np.ones((2, 70_000, 1), np.float16))
    np.testing.assert_allclose(out.astype(float), 1.0, rtol=1e-2)


@pytest.mark.parametrize("block", [1, 2, 64])
def test_a_forbidden_value_of_nan_changes_nothing_whatever_the_block_size(block):
    q, k = np.zeros((2, 1)), np.zeros((2, 1))
    v = np.array([[1.0, 0.0], [np.nan, np.nan]])
    for attend, kind in (
        (flash.flash_attention_numpy, np.asarray),
        (flash.flash_attention_torch, torch.tensor),
        (flash.flash_attention_cuda, np.asarray),
    ):
        out, _ = attend(*map(kind, (q, k, v)), causal=True, block_q=block, block_k=block)
        assert out[0].tolist() == [1.0, 0.0]
        assert np.isnan(np.asarray(out[1])).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_log_sum_exp_is_double_for_double_and_single_otherwise(dtype):
    wanted = "float64" if dtype == "float64" else "float32"
    x = np.ones((2, 3), dtype)
    for attend, kind in (
        (flash.flash_attention_numpy, np.asarray),
        (flash.flash_attention_torch, torch.tensor),
        (flash.flash_attention_cuda, np.asarray),
        (flash.flash_attention_cuda, torch.tensor),
    ):
        assert str(attend(*map(kind, (x, x, x)))[1].dtype).endswith(wanted)


def test_a_mask_may_be_of_the_other_kind():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, 3)) for _ in range(3))
    mask, blocks = np.tri(4, 4, dtype=bool), np.tri(2, 2, dtype=bool)
    expected = fundamentals.attention_numpy(q, k, v, mask)
    tensors = [torch.from_numpy(a) for a in (q, k, v)]
    there = np.kron(blocks, np.ones((2, 2))) > 0
    for found, exact in (
        (grouped_query.grouped_query_attention_numpy(q, k, v, torch.from_numpy(mask)), expected),
        (grouped_query.grouped_query_attention_torch(*tensors, mask).numpy(), expected),
        (fundamentals.attention_torch(*tensors, mask).numpy(), expected),
        (sparse.block_sparse_attention_torch(*tensors, blocks, 2), fundamentals.attention_numpy(q, k, v, there)),
    ):
        np.testing.assert_allclose(found, exact, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("window", [1, np.int64(3), 70])
def test_a_window_of_the_kernel_is_its_mask(lead, window):
    rng = np.random.default_rng(0)
    for n, m in ((9, 9), (5, 150), (150, 5), (9, 0), (0, 9)):
        q, k, v = (rng.standard_normal((*lead, rows, d)) for rows, d in ((n, 4), (m, 4), (m, 2)))
        expected = fundamentals.attention_numpy(q, k, v, sparse.sliding_window_mask(n, m, window))
        np.testing.assert_allclose(sparse.sliding_window_attention_cuda(q, k, v, window), expected, atol=1e-5)


@pytest.mark.parametrize("window", [0, -1, True, 1.5])
def test_a_window_is_a_positive_whole_number(window):
    with pytest.raises(ValueError, match="window must be a positive whole number"):
        sparse.sliding_window_attention_cuda(*np.ones((3, 2, 4)), window)


def test_the_skip_of_a_scan_is_of_the_kind_of_the_rest_and_a_text_without_tokens_has_gradients():
    x, delta, a, b, c = (np.ones(shape) for shape in ((1, 3, 2), (1, 3, 2), (2, 4), (1, 3, 4), (1, 3, 4)))
    tensors = [torch.from_numpy(array) for array in (x, delta, -a, b, c)]
    for scan, given, d in (
        (linear.selective_scan_numpy, (x, delta, -a, b, c), torch.ones(2)),
        (linear.selective_scan_torch, tensors, np.ones(2)),
    ):
        with pytest.raises(TypeError, match="^d must be "):
            scan(*given, d)
    empty = [t if t is tensors[2] else t[:, :0].clone() for t in tensors]
    y = linear.selective_scan_torch(*(t.requires_grad_() for t in empty))
    gradients = torch.autograd.grad(y.sum(), empty)
    assert [g.shape for g in gradients] == [t.shape for t in empty] and not any(g.any() for g in gradients)


def test_the_difference_of_two_maps_in_half_precision_is_taken_in_single():
    rng = np.random.default_rng(0)
    q1, k1, q2, k2 = (rng.standard_normal((1, 5, 4)).astype(np.float16) for _ in range(4))
    v = (1000 + rng.standard_normal((1, 5, 3))).astype(np.float16)
    exact = differential.differential_attention_numpy(*(a.astype(float) for a in (q1, k1, q2, k2, v)), 1.0)
    found = differential.differential_attention_numpy(q1, k1, q2, k2, v, 1.0)
    np.testing.assert_allclose(found.astype(float), exact, atol=0.01)


def test_more_experts_than_columns():
    rng = np.random.default_rng(0)
    shapes = (2, 5, 3), (3, 7), (7, 3, 2), (3, 2), (3, 2), (7, 2, 3)
    given = [rng.standard_normal(shape) for shape in shapes]
    expected = mixture.mixture_attention_numpy(*given, 2)
    np.testing.assert_allclose(mixture.mixture_attention_cuda(*given, 2), expected, atol=1e-5)


def test_a_part_that_was_not_seen_may_hold_nan():
    outs, lses = np.array([[[1.0, 2.0]], [[np.nan, np.nan]]]), np.array([[0.5], [-INF]])
    out, lse = flash.merge_by_lse(outs, lses)
    assert out.tolist() == [[1.0, 2.0]] and lse.tolist() == [0.5]


def test_a_ring_does_not_see_nan_in_the_future_and_takes_integers():
    rng = np.random.default_rng(0)
    q, k, v = (rng.integers(-3, 4, (2, 3, 4)) for _ in range(3))
    positions = np.arange(6).reshape(2, 3)
    out = flash.ring_attention_numpy(q, k, v, positions, causal=True)
    whole = fundamentals.attention_numpy(*(a.reshape(6, 4) for a in (q, k, v)), causal=True)
    np.testing.assert_allclose(out.reshape(6, 4), whole, atol=1e-12)
    v = v.astype(float)
    v[1, 2] = np.nan
    hidden = flash.ring_attention_numpy(q, k, v, positions, causal=True).reshape(6, 4)
    np.testing.assert_allclose(hidden[:5], whole[:5], atol=1e-12)


def test_a_ring_looks_ahead_unless_it_is_causal_and_refuses_what_does_not_fit():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, d)) for d in (4, 4, 2))
    positions = np.arange(6).reshape(2, 3)
    for options in ({}, {"scale": 0.3}):
        out = flash.ring_attention_numpy(q, k, v, positions, **options)
        whole = fundamentals.attention_numpy(*(a.reshape(6, -1) for a in (q, k, v)), **options)
        np.testing.assert_allclose(out.reshape(6, 2), whole, atol=1e-12)
    for wrong in ((q[0], k[0], v[0], positions), (q, k[:, :2], v[:, :2], positions), (q, k, v, positions[:, :2])):
        with pytest.raises(ValueError, match="q, k and positions must be"):
            flash.ring_attention_numpy(*wrong)


def test_matrices_of_another_layer_have_its_shapes():
    w, w_o = np.arange(12.0).reshape(6, 2), np.array([[1.0, 2.0], [3.0, 4.0]])
    assert [m.tolist() for m in multi_head.weights_from_torch(w, w_o)][::3] == [[[0, 2], [1, 3]], [[1, 3], [2, 4]]]
    for wrong in ((w[:4], w_o), (w, w_o[:1])):
        with pytest.raises(ValueError, match="in_proj_weight and out_proj_weight must have shapes"):
            multi_head.weights_from_torch(*wrong)


def test_the_kernel_of_rope_takes_whole_positions():
    with pytest.raises(ValueError, match="positions must be integers, got float64"):
        rotary.apply_rope_cuda(np.ones((2, 4)), np.array([0.0, 0.5]), np.ones(2))


def test_the_kernel_of_rope_takes_more_pairs_than_a_block_has_threads_times_a_thousand():
    x, positions, frequencies = np.ones((3000, 260), np.float32), np.arange(3000), np.linspace(1, 0, 130)
    expected = rotary.apply_rope_numpy(x, positions, frequencies)
    np.testing.assert_allclose(rotary.apply_rope_cuda(x, positions, frequencies), expected, atol=1e-4)


def test_parts_of_very_different_size_merge_and_what_is_no_list_of_parts_is_refused():
    outs, lses = np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[1e4, -1e4], [1e4, -1e4]])
    out, lse = flash.merge_by_lse(outs, lses)
    np.testing.assert_allclose(out, [[2.0], [3.0]])
    np.testing.assert_allclose(lse, [1e4 + math.log(2), -1e4 + math.log(2)])
    out, lse = flash.merge_by_lse(outs, np.full((2, 2), -INF))
    assert out.tolist() == [[0.0], [0.0]] and np.isneginf(lse).all()
    for wrong in ((outs[:0], lses[:0]), (outs, lses[:1]), (outs[0, 0], lses[0, 0])):
        with pytest.raises(ValueError):
            flash.merge_by_lse(*wrong)


def test_gates_are_at_least_one_and_at_most_all():
    logits = np.array([[[0.0, 1.0, 2.0], [2.0, 2.0, 0.0]]])
    assert mixture.top_k_gates(logits, 3).shape == (1, 2, 3) and mixture.top_k_gates(logits, 1).sum() == 2
    for k in (0, 4):
        with pytest.raises(ValueError):
            mixture.top_k_gates(logits, k)


def test_slopes_of_one_head_and_of_none():
    assert rotary.alibi_slopes(1).tolist() == [2.0**-8]
    with pytest.raises(ValueError):
        rotary.alibi_slopes(0)


def test_running_maxima_of_integers_are_floats():
    m, total = flash.online_softmax(np.full(2, -INF), np.zeros(2), np.array([[1, 2], [3, 3]]))
    np.testing.assert_allclose(m + np.log(total), np.log(np.exp([[1, 2], [3, 3]]).sum(-1)))


UNSIGNED = ("uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("dtype", UNSIGNED)
def test_lengths_and_tables_may_be_unsigned(dtype):
    lengths = np.array([3, 1], dtype)
    mask, positions = kv_cache.left_padding(lengths, 4)
    assert positions.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    assert mask.sum() == fundamentals.padding_mask(lengths, 4).sum() == 4
    rng = np.random.default_rng(0)
    q, (k, v) = rng.standard_normal((2, 1, 2)), rng.standard_normal((2, 4, 2, 1, 2))
    table = np.array([[0, 1], [2, 3]])
    expected = kv_cache.paged_decode_attention_numpy(q, k, v, table, lengths.astype(int))
    found = kv_cache.paged_decode_attention_numpy(q, k, v, table.astype(dtype), lengths)
    np.testing.assert_array_equal(found, expected)
    tensors = [torch.from_numpy(a) for a in (q, k, v, table.astype(dtype), lengths)]
    np.testing.assert_allclose(kv_cache.paged_decode_attention_torch(*tensors).numpy(), expected)
    np.testing.assert_allclose(kv_cache.paged_decode_attention_cuda(*tensors).numpy(), expected, atol=1e-6)


def test_numbers_of_operations_do_not_wrap_around():
    small = kv_cache.forward_flops(*np.array([[4096], [4096]], np.int32), 4096, 16384, 32, 50_000)
    assert small.tolist() == kv_cache.forward_flops(*np.array([[4096], [4096]]), 4096, 16384, 32, 50_000).tolist()
    assert small[0] > 2**31


def test_distances_of_small_integers_are_sorted_like_large_ones():
    distances = np.array([-128, -127, 0, 127])
    assert rotary.t5_buckets(distances.astype(np.int8)).tolist() == rotary.t5_buckets(distances).tolist()


def test_lengths_that_are_no_list_of_integers_get_a_sentence():
    for lengths in (np.array([1.5]), np.array([[1]])):
        with pytest.raises(ValueError, match="lengths must be integers"):
            fundamentals.padding_mask(lengths, 4)


def on_meta(*tensors):
    return [t.to("meta") for t in tensors]


def test_functions_make_their_tensors_where_their_arguments_lie():
    x = torch.randn(2, 3, 4)
    for function in (fundamentals.attention_torch, lambda *a, **b: flash.flash_attention_torch(*a, **b)[0]):
        assert function(*on_meta(x, x, x), causal=True).device.type == "meta"
        with torch.device("meta"):  # what is made without a device now lies elsewhere
            function(x, x, x, causal=True)
    angles = torch.randn(2)
    assert rotary.apply_rope_torch(*on_meta(x), np.arange(3), angles.numpy()).device.type == "meta"
    with torch.device("meta"):
        multi_head.masked_softmax(torch.randn(1, 1, 3, 3, device="cpu"), causal=True)
        flash.flash_attention_backward_torch(x, x, x, x, x[..., 0], x, causal=True)
        kv_cache.decode_attention_torch(x, x[:, :, None], x[:, :, None], torch.ones(2, dtype=int, device="cpu"))


def test_pages_that_do_not_hold_the_tokens_get_a_sentence():
    for table, words in (([[0, 1]], "room for 4 tokens a row, got"), ([[0, 9, 1]], "must name pages 0 to 2")):
        with pytest.raises(ValueError, match=words):
            kv_cache.gather_pages(np.ones((3, 2, 1, 4)), np.array(table), np.array([5]))


def test_a_layer_does_not_see_nan_behind_a_mask():
    torch.manual_seed(0)
    layer, x = multi_head.MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    mask = torch.tensor([True, True, True, True, False])
    expected = layer(x, mask=mask)
    x[:, 4] = math.nan
    torch.testing.assert_close(layer(x, mask=mask)[:, :4], expected[:, :4])


def test_attention_with_dropout_and_with_relative_positions_do_not_see_nan_behind_a_mask():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 1, 4, 2))
    mask, keep = np.array([[True, True, True, False]]), np.ones((1, 1, 4, 4), bool)
    expected, _ = multi_head.attention_with_dropout(q, k, v, mask, keep, 0.5)
    r, u, w = rng.standard_normal((4, 2)), *rng.standard_normal((2, 2))
    relative = long_context.relative_attention_numpy(q, k, v, r, u, w)
    v[..., 3, :] = np.nan
    np.testing.assert_allclose(multi_head.attention_with_dropout(q, k, v, mask, keep, 0.5)[0], expected)
    found = long_context.relative_attention_numpy(q, k, v, r, u, w)
    np.testing.assert_allclose(found[..., :3, :], relative[..., :3, :])
