"""Lecture 03: rotary embedding against its properties and against transformers; the other schemes against theirs."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved_of_gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_split_of_llama

from attention import rotary as r

LENGTH = {"original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.5, **LENGTH},
    "yarn": {"factor": 4.0, **LENGTH},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTH},
}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "n_pairs", "batched"),
    [
        ((5, 6), 3, False),
        ((3, 7, 10), 5, True),
        ((3, 7, 10), 2, False),
        ((2, 3, 5, 9), 4, True),
        ((2, 1, 3, 1, 4), 1, True),
    ],
)
def test_numpy_and_torch_agree_and_rotate_by_complex_numbers(shape, n_pairs, batched, interleaved):
    x, frequencies = draw(*shape), np.random.default_rng(1).uniform(0, 1, n_pairs)
    positions = np.random.default_rng(2).integers(0, 1000, (shape[0], shape[-2]) if batched else shape[-2])
    ours = r.apply_rope_numpy(x, positions, frequencies, 1.3, interleaved)
    tensors = torch.from_numpy(x), torch.from_numpy(positions), torch.from_numpy(frequencies)
    np.testing.assert_allclose(r.apply_rope_torch(*tensors, 1.3, interleaved), ours, atol=1e-12)
    columns = np.arange(2 * n_pairs)
    columns = columns.reshape(n_pairs, 2) if interleaved else columns.reshape(2, n_pairs).T
    where = positions.reshape(shape[0], *[1] * (len(shape) - 3), shape[-2]) if batched else positions
    turned = (x[..., columns[:, 0]] + 1j * x[..., columns[:, 1]]) * 1.3 * np.exp(1j * where[..., None] * frequencies)
    np.testing.assert_allclose(ours[..., columns[:, 0]], turned.real, atol=1e-12)
    np.testing.assert_allclose(ours[..., columns[:, 1]], turned.imag, atol=1e-12)
    np.testing.assert_array_equal(ours[..., 2 * n_pairs :], x[..., 2 * n_pairs :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_are_kept_and_scores_depend_on_the_distance_only_up_to_position_100000(interleaved):
    q, k, frequencies = draw(50, 32), draw(50, 32, seed=1), r.rope_frequencies(32)[0]
    distance = np.random.default_rng(3).integers(-200, 200, 50)
    near = None
    for start in (200, 12_345, 99_800):
        turned_q = r.apply_rope_numpy(q, start + distance, frequencies, interleaved=interleaved)
        turned_k = r.apply_rope_numpy(k, np.full(50, start), frequencies, interleaved=interleaved)
        np.testing.assert_allclose(np.linalg.norm(turned_q, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-12)
        scores = (turned_q * turned_k).sum(-1)
        near = scores if near is None else near
        np.testing.assert_allclose(scores, near, atol=1e-9)
    assert np.abs(near - (q * k).sum(-1)).max() > 1


def test_position_0_changes_nothing_and_negative_positions_turn_back():
    x, frequencies = draw(4, 8), r.rope_frequencies(8)[0]
    np.testing.assert_array_equal(r.apply_rope_numpy(x, np.zeros(4, int), frequencies), x)
    there = r.apply_rope_numpy(x, np.arange(4) + 9, frequencies)
    np.testing.assert_allclose(r.apply_rope_numpy(there, -np.arange(4) - 9, frequencies), x, atol=1e-12)


def test_rotation_equals_that_of_llama_and_of_gptj():
    x, positions, frequencies = draw(2, 3, 7, 12), np.arange(7) + 40, r.rope_frequencies(12)[0]
    angles, tensor = torch.from_numpy(positions[:, None] * frequencies), torch.from_numpy(x)
    wide = torch.cat([angles, angles], -1)[None]
    theirs, _ = half_split_of_llama(tensor, tensor, wide.cos(), wide.sin())
    np.testing.assert_allclose(r.apply_rope_numpy(x, positions, frequencies), theirs, atol=1e-12)
    theirs = interleaved_of_gptj(tensor.swapaxes(1, 2), angles.sin()[None], angles.cos()[None]).swapaxes(1, 2)
    np.testing.assert_allclose(r.apply_rope_numpy(x, positions, frequencies, interleaved=True), theirs, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_float_type_is_kept_and_half_precision_keeps_its_digits_far_out(dtype):
    x, positions, frequencies = draw(3, 8).astype(dtype), np.array([0, 1000, 100_000]), r.rope_frequencies(8)[0]
    ours = r.apply_rope_numpy(x, positions, frequencies)
    theirs = r.apply_rope_torch(torch.from_numpy(x), positions, frequencies)
    exact = r.apply_rope_numpy(x.astype(np.float64), positions, frequencies)
    assert ours.dtype == dtype and theirs.numpy().dtype == dtype
    tolerance = {np.float16: 2e-3, np.float32: 1e-6, np.float64: 1e-12}[dtype]
    np.testing.assert_allclose(ours, exact, atol=tolerance)
    np.testing.assert_allclose(theirs, exact, atol=tolerance)


def test_the_gradient_is_the_rotation_back():
    x = torch.from_numpy(draw(2, 3, 5, 8)).requires_grad_()
    positions, frequencies = torch.arange(10).reshape(2, 5), r.rope_frequencies(8)[0][:3]
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda x: r.apply_rope_torch(x, positions, frequencies, 1.1, interleaved), x)
        out = r.apply_rope_torch(x, positions, frequencies, interleaved=interleaved)
        d_out = torch.from_numpy(draw(2, 3, 5, 8, seed=1))
        back = r.apply_rope_torch(d_out, -positions, frequencies, interleaved=interleaved)
        torch.testing.assert_close(torch.autograd.grad(out, x, d_out)[0], back)


@pytest.mark.parametrize(
    ("x", "positions", "frequencies", "words"),
    [
        (np.ones(4), np.arange(4), np.ones(2), "x must have at least two axes"),
        (np.ones((3, 4)), np.arange(4), np.ones(2), "positions must have shape"),
        (np.ones((2, 3, 4)), np.ones((3, 3), int), np.ones(2), "positions must have shape"),
        (np.ones((3, 4)), np.ones((3, 3), int), np.ones(2), "positions must have shape"),
        (np.ones((3, 4)), np.arange(3), np.ones(3), "frequencies must be one for each pair"),
        (np.ones((3, 4)), np.arange(3), np.ones((3, 2)), "frequencies must be one for each pair"),
    ],
)
def test_shapes_that_do_not_fit_get_a_sentence(x, positions, frequencies, words):
    with pytest.raises(ValueError, match=words):
        r.apply_rope_numpy(x, positions, frequencies)
    with pytest.raises(ValueError, match=words):
        r.apply_rope_torch(torch.from_numpy(x), positions, frequencies)


def test_the_two_pairings_give_the_same_scores_after_the_permutation_and_not_before():
    x, frequencies, positions = draw(9, 20), r.rope_frequencies(10)[0], np.arange(9)
    weights = draw(2, 20, 30, seed=1)

    def scores(weights, interleaved):
        q, k = ((x @ w).reshape(9, 3, 10).swapaxes(0, 1) for w in weights)
        q, k = (r.apply_rope_numpy(a, positions, frequencies, interleaved=interleaved) for a in (q, k))
        return q @ k.swapaxes(-1, -2)

    converted = [r.interleaved_to_half_split(w, 3) for w in weights]
    np.testing.assert_allclose(scores(converted, False), scores(weights, True), atol=1e-10)
    assert np.abs(scores(weights, False) - scores(weights, True)).max() > 1
    with pytest.raises(ValueError, match="even number of columns"):
        r.interleaved_to_half_split(np.ones((4, 9)), 3)


def test_keys_in_a_cache_move_as_if_they_had_been_turned_elsewhere():
    k, frequencies = draw(2, 5, 12), r.rope_frequencies(12)[0][:4]
    for shift in (-30, 0, 70):
        moved = r.shift_keys(r.apply_rope_numpy(k, np.arange(40, 45), frequencies), shift, frequencies)
        np.testing.assert_allclose(moved, r.apply_rope_numpy(k, np.arange(40, 45) + shift, frequencies), atol=1e-12)


# --- frequencies -----------------------------------------------------------------------------------------------------


def transformers_frequencies(d_head, parameters, seq_len=None):
    length = parameters.get("original_max_position_embeddings", 64)
    config = LlamaConfig(
        head_dim=d_head,
        hidden_size=d_head,
        num_attention_heads=1,
        max_position_embeddings=2 * length,
        rope_parameters=parameters,
    )
    if parameters["rope_type"] == "dynamic":  # its trained length is the configured one
        config.max_position_embeddings = length
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=seq_len)
    return frequencies.numpy(), scale


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_equal_those_of_transformers_for_random_parameters(kind):
    rng = np.random.default_rng(5)
    for trial in range(40):
        d_head, length = 2 * int(rng.integers(4, 65)), int(rng.integers(32, 8192))
        more = {
            "yarn": {"beta_slow": rng.uniform(0.5, 2), "beta_fast": rng.uniform(4, 40)},
            "llama3": {"low_freq_factor": rng.uniform(0.5, 2), "high_freq_factor": rng.uniform(3, 8)},
        }.get(kind, {})
        if kind == "yarn" and trial % 3:
            more |= [{"attention_factor": 1.2, "truncate": False}, {"mscale": 0.7, "mscale_all_dim": 1.1}][
                trial % 3 - 1
            ]
        parameters = {
            "rope_type": kind,
            "rope_theta": 10 ** rng.uniform(3, 6),
            "factor": rng.uniform(1, 32),
            "original_max_position_embeddings": length,
            **more,
            "partial_rotary_factor": [1.0, 0.5][trial % 2],
        }
        d_head += d_head % 4  # half of it is even too
        seq_len = int(rng.integers(1, 4 * length)) if kind == "dynamic" else None
        expected, scale = transformers_frequencies(d_head, parameters, seq_len)
        ours, our_scale = r.rope_frequencies(d_head, scaling=parameters | ({"seq_len": seq_len} if seq_len else {}))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=0)  # slow pairs are far below 1e-6
        assert math.isclose(our_scale, scale, rel_tol=1e-9)


def test_default_frequencies_are_a_geometric_sequence_from_1_down():
    frequencies, scale = r.rope_frequencies(8, base=16.0)
    np.testing.assert_allclose(frequencies, [1, 0.5, 0.25, 0.125])
    assert scale == 1.0 and frequencies.dtype == np.float64


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_factor_of_1_changes_nothing(kind):
    scaling = {"rope_type": kind, **SCALINGS[kind], "factor": 1.0}
    ours, scale = r.rope_frequencies(32, scaling=scaling)
    np.testing.assert_allclose(ours, r.rope_frequencies(32)[0], rtol=1e-12)
    assert scale == 1.0


def test_dynamic_scaling_begins_behind_the_trained_length():
    dynamic = {"rope_type": "dynamic", "factor": 4.0, **LENGTH}
    plain = r.rope_frequencies(16)[0]
    for seq_len in (1, 64):
        np.testing.assert_allclose(r.rope_frequencies(16, scaling=dynamic | {"seq_len": seq_len})[0], plain)
    assert r.rope_frequencies(16, scaling=dynamic | {"seq_len": 65})[0][-1] < plain[-1]


def test_the_older_key_type_is_read():
    older, newer = ({key: "linear", "factor": 4.0} for key in ("type", "rope_type"))
    np.testing.assert_array_equal(r.rope_frequencies(16, scaling=older)[0], r.rope_frequencies(16, scaling=newer)[0])
    with pytest.raises(ValueError, match="rope_type must be one of"):
        r.rope_frequencies(16, scaling={"type": "su", "factor": 4.0})


def test_interpolation_is_dividing_the_positions():
    x, linear = draw(6, 16), r.rope_frequencies(16, scaling={"rope_type": "linear", "factor": 4.0})[0]
    slowed = r.apply_rope_numpy(x, np.arange(6), linear)
    np.testing.assert_allclose(slowed, r.apply_rope_numpy(x, np.arange(6) / 4, r.rope_frequencies(16)[0]), atol=1e-12)


def test_ntk_scaling_is_another_base():
    for d, factor in ((4, 2.0), (16, 4.0), (128, 8.0)):
        base = 10000.0 * factor ** (d / (d - 2))
        np.testing.assert_allclose(r.ntk_frequencies(r.rope_frequencies(d)[0], factor), r.rope_frequencies(d, base)[0])


@pytest.mark.parametrize(
    ("d_head", "scaling", "words"),
    [
        (7, None, "even"),
        (8, {"partial_rotary_factor": 0.1}, "even"),
        (8, {"rope_type": "longrope"}, "rope_type must be one of"),
        (8, {"rope_type": "yarn", "factor": 2.0}, "must have original_max_position_embeddings"),
        (8, {"rope_type": "linear"}, "must have factor"),
        (8, {"rope_type": "linear", "factor": 0.0}, "factor must be positive"),
        (8, {"rope_type": "linear", "factor": math.nan}, "factor must be positive"),
        (8, {"rope_theta": 0.0}, "base must be positive"),
        (8, {"partial_rotary_factor": 1.5}, "from 2 to d_head"),
        (8, {"rope_type": "yarn", "factor": 2.0, "beta_slow": 32, "beta_fast": 1, **LENGTH}, "beta_slow must be less"),
        (
            8,
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0, **LENGTH},
            "slow must be",
        ),
        (2, {"rope_type": "dynamic", "factor": 2.0, **LENGTH}, "two pairs"),
    ],
)
def test_bad_scalings_get_a_sentence(d_head, scaling, words):
    with pytest.raises(ValueError, match=words):
        r.rope_frequencies(d_head, scaling=scaling)


@pytest.mark.parametrize(
    ("nulls", "plain"),
    [
        ({"rope_type": "default", "factor": None}, None),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": None}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope_type": "dynamic", **SCALINGS["dynamic"], "seq_len": None},
            {"rope_type": "dynamic", **SCALINGS["dynamic"]},
        ),
    ],
)
def test_a_key_that_is_none_counts_as_missing(nulls, plain):
    np.testing.assert_array_equal(r.rope_frequencies(8, scaling=nulls)[0], r.rope_frequencies(8, scaling=plain)[0])
    rotary = r.Rotary(8, scaling=nulls | {"partial_rotary_factor": None}, partial=0.5)
    assert rotary.scaling["partial_rotary_factor"] == 0.5


def test_stretching_takes_lists_and_only_positive_factors():
    np.testing.assert_allclose(r.ntk_frequencies([1.0, 0.1, 0.01], 4), [1, 0.05, 0.0025])
    np.testing.assert_allclose(r.keep_by_turns([1.0, 0.001], 64, 1, 4), [1, 0])
    for factor in (0, -4, math.nan):
        with pytest.raises(ValueError, match="factor must be positive"):
            r.ntk_frequencies([1.0, 0.1], factor)
