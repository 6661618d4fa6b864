"""Lecture 02: multi-head attention against loops and PyTorch's own layer, its limits, the tools to look at heads."""

import numpy as np
import pytest
import torch

from attention import fundamentals as f
from attention import multi_head as m
from utils import training

# leading axes, queries, keys, d_model, heads, d_head, d_v
SIZES = [((), 7, 11, 10, 2, 3, 5), ((3,), 5, 5, 12, 3, 4, 4), ((2, 2), 1, 9, 7, 1, 7, 2), ((2,), 6, 4, 5, 5, 1, 1)]


def draw(lead, n_queries, n_keys, d_model, n_heads, d_head, d_v, seed=0, dtype=np.float64):
    """(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)."""
    rng = np.random.default_rng(seed)
    shapes = [
        (*lead, n_queries, d_model),
        (*lead, n_keys, d_model),
        (d_model, n_heads * d_head),
        (d_model, n_heads * d_head),
        (d_model, n_heads * d_v),
        (n_heads * d_v, d_model),
    ]
    return *(rng.standard_normal(shape).astype(dtype) for shape in shapes), n_heads


def loops(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Head by head and query by query, in float64; every query's allowed keys are gathered first."""
    n, k = x_q.shape[-2], x_kv.shape[-2]
    d_head, d_v = w_q.shape[1] // n_heads, w_v.shape[1] // n_heads
    mask = np.broadcast_to(True if mask is None else mask, (*x_q.shape[:-2], n_heads, n, k))
    out = np.zeros((*x_q.shape[:-1], w_o.shape[1]))
    for place in np.ndindex(*x_q.shape[:-2], n_heads, n):
        *lead, h, i = place
        lead = tuple(lead)
        seen = [j for j in range(k) if mask[place][j] and (not causal or j <= i + k - n)]
        if seen:
            query = x_q[lead][i] @ w_q[:, h * d_head : (h + 1) * d_head]
            scores = x_kv[lead][seen] @ w_k[:, h * d_head : (h + 1) * d_head] @ query / d_head**0.5
            weights = np.exp(scores - scores.max())
            values = x_kv[lead][seen] @ w_v[:, h * d_v : (h + 1) * d_v]
            out[(*lead, i)] += weights / weights.sum() @ values @ w_o[h * d_v : (h + 1) * d_v]
    return out


def tensors(call):
    return [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in call]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_numpy_and_torch_agree_with_loops_for_odd_shapes(sizes, masked, causal):
    call = draw(*sizes)
    mask = np.random.default_rng(1).random((sizes[4], sizes[1], sizes[2])) < 0.6 if masked else None
    expected = loops(*call, mask, causal)
    np.testing.assert_allclose(m.multi_head_attention_numpy(*call, mask, causal), expected, atol=1e-12)
    t_mask = None if mask is None else torch.from_numpy(mask)
    np.testing.assert_allclose(m.multi_head_attention_torch(*tensors(call), t_mask, causal), expected, atol=1e-12)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 6), (3, 9), (7, 2)])
def test_outputs_and_gradients_agree_with_nn_multihead_attention(n_queries, n_keys):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True, dtype=torch.float64)
    ours = m.MultiHeadAttention(12, 3).double()
    weights = m.weights_from_torch(theirs.in_proj_weight, theirs.out_proj.weight)
    for parameter, value in zip((ours.w_q, ours.w_k, ours.w_v, ours.w_o), weights):
        parameter.data.copy_(value.data)
    x, y = torch.randn(2, n_queries, 12, dtype=torch.float64), torch.randn(2, n_keys, 12, dtype=torch.float64)
    allowed = torch.rand(n_queries, n_keys) < 0.7
    allowed[:, 0] = True
    expected, maps = theirs(x, y, y, attn_mask=~allowed, average_attn_weights=False)  # theirs: True = forbidden
    with m.record(ours) as cache:
        out = ours(x, y, mask=allowed)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(cache["weights"], maps, atol=1e-12, rtol=0)

    d_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (ours.w_q, ours.w_k, ours.w_v, ours.w_o), d_out)
    d_theirs = torch.autograd.grad(expected, (theirs.in_proj_weight, theirs.out_proj.weight), d_out)
    for a, b in zip(grads, m.weights_from_torch(*d_theirs)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_module_is_the_function():
    module = m.MultiHeadAttention(12, 3).double()
    weights = module.w_q, module.w_k, module.w_v, module.w_o
    x, y = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 8, 12, dtype=torch.float64)
    mask = torch.rand(2, 3, 5, 8) < 0.5
    mask[0, 1, 2] = False
    for causal in (False, True):
        expected = m.multi_head_attention_torch(x, y, *weights, 3, mask, causal)
        torch.testing.assert_close(module(x, y, mask=mask, causal=causal), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(module(x, causal=True), m.multi_head_attention_torch(x, x, *weights, 3, causal=True))


def test_heads_of_one_size_in_another_order_give_the_same():
    x_q, x_kv, *w, n_heads = draw((2,), 5, 7, 8, 4, 2, 2)
    order = np.concatenate([np.arange(2 * h, 2 * h + 2) for h in (2, 0, 3, 1)])
    shuffled = [w[0][:, order], w[1][:, order], w[2][:, order], w[3][order]]
    np.testing.assert_allclose(
        m.multi_head_attention_numpy(x_q, x_kv, *shuffled, n_heads),
        m.multi_head_attention_numpy(x_q, x_kv, *w, n_heads),
        atol=1e-12,
    )


def test_bad_shapes_get_one_sentence():
    good = dict(zip(("x_q", "x_kv", "w_q", "w_k", "w_v", "w_o", "n_heads"), draw((2,), 5, 7, 8, 2, 4, 4)))
    zeros = np.zeros
    for name, bad, words in (
        ("x_q", zeros(8), "x_q must have at least"),
        ("x_kv", zeros((3, 7, 8)), "leading axes"),
        ("w_q", zeros((9, 8)), "w_q must have shape"),
        ("w_k", zeros((8, 6)), "same d_head"),
        ("w_v", zeros((8, 8, 1)), "w_v must have"),
        ("w_o", zeros((7, 8)), "w_o must have shape"),
        ("n_heads", 3, "n_heads must divide"),
        ("n_heads", 0, "n_heads must divide"),
    ):
        call = list((good | {name: bad}).values())
        for attend, arguments in ((m.multi_head_attention_numpy, call), (m.multi_head_attention_torch, tensors(call))):
            with pytest.raises(ValueError, match=words) as refused:
                attend(*arguments)
            assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="n_heads must divide"):
        m.split_heads(zeros((3, 8)), 3)
    with pytest.raises(ValueError, match="n_heads must divide"):
        m.split_heads(zeros((3, 8)), 0)
    with pytest.raises(ValueError, match="n_heads must divide d_model"):
        m.MultiHeadAttention(8, 3)
    with pytest.raises(ValueError, match="x_kv must have shape"):
        m.MultiHeadAttention(8, 2)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 9))
    for call, words in (
        (lambda: m.weights_from_torch(zeros((8, 4)), zeros((4, 4))), "in_proj_weight and out_proj_weight"),
        (lambda: m.pattern_scores(zeros((5, 5)), 5), "period must be"),
        (lambda: m.weights_from_torch(zeros(3), zeros((1, 1))), "in_proj_weight and out_proj_weight"),
        (lambda: m.head_contributions(zeros((2, 3, 4)), zeros((9, 4))), "w_o must have"),
        (lambda: m.head_contributions(zeros((2, 3)), zeros((6, 4))), "heads must have at least three"),
        (lambda: m.head_contributions(zeros((2, 3, 4)), zeros(8)), "and w_o two"),
        (lambda: m.attention_with_dropout(*zeros((3, 1, 1, 2, 2)), zeros((1, 2)), 1, 0.0), "key_mask"),
        (lambda: m.attention_with_dropout(*zeros((3, 1, 1, 2, 2)), zeros((1, 2)) == 0, 1, 1.0), "rate"),
        (lambda: translator()(torch.zeros(1, 3), torch.zeros(1, 3)), "source must be integers"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="mask must be boolean"):
        m.MultiHeadAttention(8, 2)(torch.zeros(1, 3, 8), mask=torch.ones(3, 3))
    for shape in ((2, 3), (2, 1, 3, 3), (1, 1, 1, 3, 3)):
        with pytest.raises(ValueError, match="mask must broadcast to"):
            m.MultiHeadAttention(8, 2)(torch.zeros(1, 3, 8), mask=torch.ones(shape, dtype=torch.bool))
    for ids in (torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.int8)):
        with pytest.raises(ValueError, match="ids must be integers"):
            m.check_ids("ids", ids, 5)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 12), (2, 3, 1, 4)])
def test_split_and_merge_are_inverse_and_take_arrays_and_tensors(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    for n_heads in (1, 2, 4):
        heads = m.split_heads(x, n_heads)
        assert heads.shape == (*shape[:-2], n_heads, shape[-2], shape[-1] // n_heads)
        np.testing.assert_array_equal(m.merge_heads(heads), x)
        np.testing.assert_array_equal(m.split_heads(torch.from_numpy(x), n_heads).numpy(), heads)
        np.testing.assert_array_equal(m.merge_heads(torch.from_numpy(heads.copy())).numpy(), x)


def test_pattern_scores_are_one_for_the_two_perfect_heads():
    n, period = 12, 5
    previous, induction = np.eye(n, k=-1), np.zeros((n, n))
    for i in range(period, n):
        induction[i, i - period + 1] = 1.0
    found = np.array(m.pattern_scores(np.stack([previous, induction]), period))
    np.testing.assert_array_equal(found, np.eye(2))


def test_contributions_sum_to_the_output():
    rng = np.random.default_rng(0)
    heads, w_o = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((15, 7))
    np.testing.assert_allclose(m.head_contributions(heads, w_o).sum(-3), m.merge_heads(heads) @ w_o, atol=1e-12)


def test_dropout_leaves_the_returned_weights_alone_and_the_output_right_on_average():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 2, 3, 4))
    lengths = np.array([[True, True, False], [False, False, False]])
    exact = f.attention_numpy(q, k, v, lengths[:, None, None])
    draws = []
    for _ in range(2000):
        out, weights = m.attention_with_dropout(q, k, v, lengths, rng.random((2, 2, 3, 3)) >= 0.3, 0.3)
        draws.append(out)
        np.testing.assert_array_equal(weights, f.attention_weights(q, k, lengths[:, None, None]))
    assert np.abs(np.mean(draws, 0) - exact).max() < 5 * np.std(draws, 0).max() / 2000**0.5
    assert (np.array(draws)[:, 1] == 0).all()


def test_distance_bias_depends_on_the_distance_only_and_is_aligned_at_the_bottom_right():
    bias = m.DistanceBias(2, reach=3).double()
    bias.table.data.normal_()
    table = bias.bias(9, 9)
    for i, j in np.ndindex(9, 9):
        torch.testing.assert_close(table[:, i, j], 4 * bias.table[:, max(-3, min(3, i - j)) + 3])
    torch.testing.assert_close(bias.bias(2, 9), table[:, -2:])


def translator(seed=0):
    return training.initialise(m.EncoderDecoder(12, 15, d_model=16, n_heads=2, n_layers=2).double(), seed)


def test_the_decoder_sees_the_whole_source_and_no_later_target_word():
    model, rng = translator(), np.random.default_rng(0)
    source, target = torch.from_numpy(rng.integers(3, 12, (1, 6))), torch.from_numpy(rng.integers(3, 15, (1, 8)))
    changed = target.clone()
    changed[0, 4] = 3 + (changed[0, 4] - 2) % 12
    with torch.no_grad():
        moved = (model(source, target) != model(source, changed)).any(-1)[0]
        assert moved.tolist() == [False] * 5 + [True] * 3  # word 4 is first read when word 5 is predicted
        for j in range(6):
            other = source.clone()
            other[0, j] = 3 + (other[0, j] - 2) % 9
            assert (model(source, target) != model(other, target)).any(-1).all()


def test_padding_of_the_source_changes_nothing():
    model, rng = translator(), np.random.default_rng(1)
    source, target = torch.from_numpy(rng.integers(3, 12, (2, 5))), torch.from_numpy(rng.integers(3, 15, (2, 4)))
    padded = torch.nn.functional.pad(source, (0, 3), value=0)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, target), model(source, target), atol=1e-12, rtol=0)


def test_greedy_translation_says_each_word_that_the_model_finds_best():
    model = translator()
    source = torch.from_numpy(np.random.default_rng(2).integers(3, 12, (3, 5)))
    found = model.translate(source, 7)
    with torch.no_grad():
        assert torch.equal(model(source, found).argmax(-1), found)


def test_cross_attention_has_projections_of_its_own():
    keys = [p for name, p in translator().named_parameters() if name.endswith("w_k")]
    assert len(keys) == 6 and len({id(p) for p in keys}) == 6
