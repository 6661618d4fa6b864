"""Lecture 10: what the forms have in common, memories, scans, the layer. Against other implementations: tests/conformance."""

import math

import numpy as np
import pytest
import torch

from attention.experiments.linear import (
    Imitation,
    head_inputs,
    parity_accuracy,
    recall_batches,
    references,
    train_parity,
    train_recall,
)
from attention.fundamentals import attention_numpy
from attention.linear import (
    Mamba,
    chunked_attention,
    favor_features,
    imitation_step,
    infini_attention,
    linear_attention_numpy,
    linear_attention_torch,
    long_convolution,
    memory_step,
    scan,
    selective_scan_numpy,
    selective_scan_torch,
    stream,
    wkv,
)
from utils import training


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unit(*shape, seed=0):
    drawn = normal(*shape, seed=seed)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 50])
@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_parallel_recurrent_and_chunked_form_agree(n, chunk):
    q, k, v = normal(3, 2, n, 5)
    parallel = np.tril(q @ k.swapaxes(1, 2)) @ v
    out, state = chunked_attention(q, k, v, chunk)
    np.testing.assert_allclose(out, parallel, atol=1e-10)
    for h in range(2):
        walked = np.zeros((5, 5))
        for t in range(n):
            walked = memory_step(walked, k[h, t], v[h, t], np.ones(1), np.ones(1), False)
            np.testing.assert_allclose(q[h, t] @ walked, parallel[h, t], atol=1e-10)
        np.testing.assert_allclose(state[h], walked, atol=1e-10)


def test_a_state_that_is_handed_over_continues_the_text():
    q, k, v = normal(3, 2, 23, 4)
    whole, last = chunked_attention(q, k, v, 5)
    _, state = chunked_attention(q[:, :9], k[:, :9], v[:, :9], 4)
    out, state = chunked_attention(q[:, 9:], k[:, 9:], v[:, 9:], 6, state)
    np.testing.assert_allclose(out, whole[:, 9:], atol=1e-12)
    np.testing.assert_allclose(state, last, atol=1e-12)


def test_a_chunk_must_have_a_token():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        chunked_attention(*normal(3, 4, 2), 0)


@pytest.mark.parametrize("causal", [True, False])
def test_exponential_features_make_it_softmax(causal):
    """With all monomials of exp as features it would be attention; with a table of exp(q k) as q it is, exactly."""
    q, k, v = normal(3, 6, 3)
    table = np.exp(q @ k.T)  # features of a query: its weights of all keys; of key j: the j-th unit vector
    out = linear_attention_numpy(table, np.eye(6), v, causal, normalise=True)
    allowed = np.tri(6, dtype=bool) if causal else np.ones((6, 6), bool)
    weights = np.where(allowed, table, 0)
    np.testing.assert_allclose(out, weights @ v / weights.sum(1, keepdims=True), atol=1e-12)


def test_the_delta_rule_corrects_what_is_overwritten_and_the_sum_does_not():
    k, v = unit(8), normal(2, 4)
    answers = {}
    for erase in (False, True):
        state = np.zeros((8, 4))
        for value in v:
            state = memory_step(state, k, value, np.ones(1), np.ones(1), erase)
        answers[erase] = np.abs(k @ state - v[1]).max()
    assert answers[True] < 1e-12 < 0.1 < answers[False]


def test_a_step_is_the_matrix_of_the_paper():
    """S = (I - beta k k^T) diag(alpha) S + beta k v^T."""
    state, k, v = normal(5, 3), unit(5), normal(3, seed=1)
    alpha, beta = np.random.default_rng(2).uniform(0, 1, 5), np.array([0.7])
    expected = (np.eye(5) - beta * np.outer(k, k)) @ (alpha[:, None] * state) + beta * np.outer(k, v)
    np.testing.assert_allclose(memory_step(state, k, v, alpha, beta, True), expected, atol=1e-12)


def test_a_reflection_keeps_parity_and_two_of_them_count_to_three():
    bits, sign = np.random.default_rng(0).integers(0, 2, 500), np.ones((1, 1))
    for t, bit in enumerate(bits):
        sign = memory_step(sign, np.ones(1), np.zeros(1), np.ones(1), np.array([2.0 * bit]), True)
        assert (sign[0, 0] < 0) == bits[: t + 1].sum() % 2
    place, state = 0, np.eye(2)[:, :1]
    for digit in np.random.default_rng(1).integers(0, 3, 500):  # two reflections are a rotation by a third
        for angle in (0.0, digit * math.pi / 3):
            key = np.array([math.sin(angle), -math.cos(angle)])
            state = memory_step(state, key, np.zeros(1), np.ones(1), np.array([2.0]), True)
        place = (place + digit) % 3
        wanted = 2 * math.pi * place / 3
        np.testing.assert_allclose(state[:, 0], [math.cos(wanted), math.sin(wanted)], atol=1e-9)


def test_keys_that_are_not_normalised_blow_a_delta_rule_up():
    state = np.zeros((64, 64))
    for key, value in normal(64, 2, 64):
        state = memory_step(state, key, value, np.ones(1), np.ones(1), True)
    assert np.linalg.norm(state) > 1e30


def test_every_row_of_the_table_of_models_has_another_implementation():
    n, d, rng = 40, 8, np.random.default_rng(0)
    q, k, v = unit(n, d), unit(n, d, seed=1), normal(n, d, seed=2)
    beta, number, vector = rng.uniform(0.1, 0.9, (n, 1)), -rng.uniform(0.01, 0.3, (n, 1)), -rng.uniform(0, 0.3, (n, d))
    for name, reference in references.items():
        decay = vector if name in ("GLA", "Kimi Delta Attention") else number
        writes = np.ones((n, 1)) if name in ("linear attention", "retention", "GLA") else beta
        state = np.zeros((d, d))
        other = reference(q, k, v, decay, beta)
        for t in range(n):
            erase = "Delta" in name
            state = memory_step(state, k[t], v[t], np.exp(decay[t]), writes[t], erase)
            np.testing.assert_allclose(q[t] @ state, other[t], atol=2e-6, err_msg=name)


def test_random_features_are_unbiased_and_positive():
    q, k = 0.3 * normal(2, 20, 8)
    w = normal(200_000, 8, seed=1)
    phi_q, phi_k = favor_features(q, w), favor_features(k, w)
    assert (phi_q > 0).all()
    np.testing.assert_allclose(phi_q @ phi_k.T, np.exp(q @ k.T), rtol=0.06)


def test_a_scan_with_steps_of_one_and_no_decay_is_linear_attention():
    x, b, c = normal(2, 9, 3), normal(2, 9, 4, seed=1), normal(2, 9, 4, seed=2)
    y = selective_scan_numpy(x, np.ones_like(x), np.zeros((3, 4)), b, c)
    np.testing.assert_allclose(y, linear_attention_numpy(c, b, x), atol=1e-12)


@pytest.mark.parametrize("cuts", [[0, 8], [0, 1, 8], [0, 2, 3, 4, 8], list(range(9))])
def test_pieces_of_a_stream_are_one_pass(cuts):
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((2, 8, 3)), rng.uniform(0.1, 1, (2, 8, 3))
    b, c, a, kernel = *rng.standard_normal((2, 2, 8, 4)), -rng.uniform(0.5, 2, (3, 4)), rng.standard_normal((3, 4))
    whole, _ = stream(x, delta, a, b, c, kernel)
    state = None
    for i, j in zip(cuts, cuts[1:]):
        y, state = stream(x[:, i:j], delta[:, i:j], a, b[:, i:j], c[:, i:j], kernel, state)
        np.testing.assert_allclose(y, whole[:, i:j], atol=1e-12)
    kept = x[:, -3:]
    np.testing.assert_array_equal(state[0], kept)


def test_gradients_of_the_scan_and_of_linear_attention():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    def of_scan(x, delta, a, b, c, d):
        return selective_scan_torch(x, delta.exp(), -a.exp(), b, c, d)

    shapes = (1, 4, 2), (1, 4, 2), (2, 3), (1, 4, 3), (1, 4, 3), (2,)
    assert torch.autograd.gradcheck(of_scan, [draw(*shape) for shape in shapes])
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v: linear_attention_torch(q.exp(), k.exp(), v, causal, 2, normalise=True),  # noqa: B023
            [draw(2, n, 3) for n in (4, 5, 5)],
        )


def test_the_layer_of_mamba_sees_no_later_token():
    layer = training.initialise(Mamba(8, 12, 4).double(), 0)
    x = torch.from_numpy(normal(1, 10, 8))
    changed = x.clone()
    changed[:, 6] += 1
    with torch.no_grad():
        difference = (layer(x) - layer(changed)).abs().amax(-1)[0]
    assert (difference[:6] == 0).all() and (difference[6:] > 0).all()


def test_wkv_is_a_weighted_mean_and_large_keys_do_not_overflow():
    w, u, k, v = np.abs(normal(3)) + 0.1, normal(3, seed=1), normal(7, 3, seed=2), normal(7, 3, seed=3)
    for i in range(7):
        weights = np.exp(k[:i] - (i - 1 - np.arange(i))[:, None] * w)
        total = weights.sum(0) + np.exp(u + k[i])
        expected = ((weights * v[:i]).sum(0) + np.exp(u + k[i]) * v[i]) / total
        np.testing.assert_allclose(wkv(w, u, k, v)[i], expected, atol=1e-12)
    assert np.isfinite(wkv(w, u, 1e4 * k, v)).all()


def elu_1(x):
    return np.where(x > 0, x + 1, np.exp(x))


@pytest.mark.parametrize("segment", [1, 4, 7, 20, 50])
def test_infini_attention_is_softmax_in_a_segment_and_linear_attention_to_what_came_before(segment):
    q, k, v = normal(20, 4, seed=3), normal(20, 4, seed=4), normal(20, 3, seed=5)
    shut, wide, half = (infini_attention(q, k, v, segment, gate) for gate in (-60.0, 60.0, 0.0))
    for first in range(0, 20, segment):
        rows = slice(first, first + segment)
        np.testing.assert_allclose(shut[rows], attention_numpy(q[rows], k[rows], v[rows], causal=True), atol=1e-12)
        before = linear_attention_numpy(elu_1(q[rows]), elu_1(k[:first]), v[:first], causal=False, normalise=True)
        np.testing.assert_allclose(wide[rows], before, atol=1e-12)
    np.testing.assert_allclose(half, (shut + wide) / 2, atol=1e-12)
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        infini_attention(q, k, v, 0, 0.0)


def test_infini_attention_with_the_delta_rule_does_not_write_what_it_knows():
    k, v = np.tile(normal(1, 4, seed=3), (3, 1)), np.tile(normal(1, 3, seed=5), (3, 1))
    q = normal(3, 4, seed=6)
    plain, corrected = (infini_attention(q, k, v, 1, 60.0, delta) for delta in (False, True))
    np.testing.assert_allclose(plain[1:], v[1:], atol=1e-12)  # one key, one value: a mean of equal values
    np.testing.assert_allclose(corrected[2], v[2] / 2, atol=1e-12)  # the sum of keys grew, the values did not


def test_a_long_convolution_does_not_leak():
    x, kernel = normal(2, 9, 3), normal(9, 3, seed=1)
    direct = np.stack([sum(kernel[j] * x[:, t - j] for j in range(t + 1)) for t in range(9)], axis=1)
    np.testing.assert_allclose(long_convolution(x, kernel), direct, atol=1e-12)


def test_the_scan_starts_from_the_state_that_it_is_given():
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((1, 6, 2)), rng.uniform(0.1, 1, (1, 6, 2))
    a, b, c = -rng.uniform(0.5, 2, (2, 3)), *rng.standard_normal((2, 1, 6, 3))
    whole, last = scan(x, delta, a, b, c, np.zeros((1, 2, 3)))
    _, h = scan(x[:, :4], delta[:, :4], a, b[:, :4], c[:, :4], np.zeros((1, 2, 3)))
    y, h = scan(x[:, 4:], delta[:, 4:], a, b[:, 4:], c[:, 4:], h)
    np.testing.assert_allclose(y, whole[:, 4:], atol=1e-12)
    np.testing.assert_allclose(h, last, atol=1e-12)


def test_the_recall_task_asks_for_each_key_once_and_no_answer_stands_before_its_question():
    ids, answers = next(recall_batches(20, seed=3))
    assert ids.shape == (20, 24) and answers.shape == (20, 8)
    for row, right in zip(ids.tolist(), answers.tolist()):
        told = dict(zip(row[:16:2], row[1:16:2]))
        assert len(told) == 8 and sorted(told) == sorted(row[16:])
        assert [told[key] for key in row[16:]] == right


@pytest.mark.slow
def test_recall_grows_with_the_state_and_softmax_has_all():
    few, many = (train_recall(["linear"], d_k)[-1] for d_k in (4, 32))
    assert train_recall(["softmax"], 8)[-1] > 0.95
    assert few < 0.65 and many > 0.9


def test_parity_is_learned_with_negative_eigenvalues_and_not_without():
    able, unable = (train_parity(largest, 0) for largest in (2.0, 1.0))
    assert parity_accuracy(able, 16) > 0.9 and parity_accuracy(able, 128) > 0.8
    assert parity_accuracy(unable, 16) < 0.7


def test_learned_features_point_where_softmax_points():
    tokens, q, k, q_texts, k_texts = head_inputs("The animal didn't cross the street because it was too tired.")
    it, animal = tokens.index("it"), tokens.index("animal")
    imitation = training.initialise(Imitation(32, 32).double(), seed=0)
    optimiser = torch.optim.Adam(imitation.parameters(), lr=0.02)
    draw = np.random.default_rng(0)
    for _ in range(60):
        rows = torch.from_numpy(draw.integers(len(q_texts), size=16))
        imitation_step(imitation, optimiser, q_texts[rows], k_texts[rows])
    with torch.no_grad():
        weights = imitation.of_q(q) @ imitation.of_k(k).T
    assert weights[it].argmax() == animal
    assert weights[it, animal] > 0.3 * weights[it].sum()
