"""Lecture 03: the other schemes of positions against theirs, and all of them in a model."""

import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from attention import rotary as r
from attention.multi_head import MultiHeadAttention, Positions, TransformerConfig, TransformerLM
from utils import training

LENGTH = {"original_max_position_embeddings": 64}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- the other schemes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (16, 64), (32, 100), (64, 1000)])
def test_t5_buckets_equal_those_of_transformers(n_buckets, max_distance, bidirectional):
    relative = np.arange(-4000, 4001)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(relative), bidirectional, n_buckets, max_distance)
    np.testing.assert_array_equal(r.t5_buckets(relative, n_buckets, max_distance, bidirectional), theirs)


@pytest.mark.parametrize(("n_buckets", "max_distance", "bidirectional"), [(32, 16, False), (32, 8, True), (2, 8, True)])
def test_buckets_that_cannot_be_sorted_get_a_sentence(n_buckets, max_distance, bidirectional):
    with pytest.raises(ValueError, match="max_distance must be above"):
        r.t5_buckets(np.arange(-9, 9), n_buckets, max_distance, bidirectional)


@pytest.mark.parametrize("cast", [torch.float64, torch.float32, torch.bfloat16])
def test_alibi_is_rounded_once_whatever_the_model_is_cast_to(cast):
    exact = -r.alibi_slopes(12)[:, None, None] * np.abs(r.relative_positions(300, 300))
    bias = r.ALiBi(12).to(cast).bias(300, 300)
    assert bias.dtype == cast and torch.equal(bias, torch.from_numpy(exact).to(cast))


def test_alibi_slopes_of_powers_of_two_and_of_12_heads():
    np.testing.assert_allclose(r.alibi_slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(r.alibi_slopes(12), [*0.5 ** np.arange(1.0, 9), *0.5 ** np.array([0.5, 1.5, 2.5, 3.5])])
    for n_heads in range(1, 40):
        slopes, power = r.alibi_slopes(n_heads), 2 ** (n_heads.bit_length() - 1)
        assert slopes.shape == (n_heads,)
        np.testing.assert_allclose(slopes[power:], r.alibi_slopes(2 * power)[::2][: n_heads - power])
    with pytest.raises(ValueError, match="at least 1"):
        r.alibi_slopes(0)


def test_biases_are_aligned_at_the_bottom_right():
    for scheme in (r.ALiBi(3), training.initialise(r.T5Bias(3), 0)):
        np.testing.assert_array_equal(scheme.bias(2, 7).detach(), scheme.bias(7, 7)[:, 5:].detach())
    assert (r.ALiBi(3).bias(1, 4)[:, 0, -1] == 0).all()


def test_sinusoids_shift_by_a_rotation_and_need_an_even_width():
    table = r.sinusoidal_positions(np.arange(20), 8)
    np.testing.assert_allclose(np.linalg.norm(table.reshape(20, 4, 2), axis=-1), 1)
    products = table @ table.T
    np.testing.assert_allclose(products, products[::-1, ::-1], atol=1e-12)  # only the distance counts
    with pytest.raises(ValueError, match="even"):
        r.sinusoidal_positions(np.arange(3), 7)


def test_a_learned_table_ends():
    for outside in (-1, 8):
        with pytest.raises(ValueError, match="from 0 to max_length - 1 = 7"):
            r.Learned(8, 4).embed(torch.zeros(1, 2, 4), torch.tensor([7, outside]))


SCHEMES = {
    "none": Positions,
    "learned": lambda: r.Learned(256, 32),
    "sinusoidal": r.Sinusoidal,
    "T5": lambda: r.T5Bias(4),
    "ALiBi": lambda: r.ALiBi(4),
    "RoPE": lambda: r.Rotary(8),
    "partial": lambda: r.Rotary(8, partial=0.5),
    "YaRN": lambda: r.Rotary(8, scaling={"rope_type": "yarn", "factor": 4.0, **LENGTH}),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_only_relative_schemes_pass_the_shift_test(name):
    model = TransformerLM(TransformerConfig(20, 32, 4, 2, 64), positions=SCHEMES[name]())
    model = training.initialise(model.double(), 0)
    ids = torch.from_numpy(np.random.default_rng(6).integers(20, size=(2, 12)))
    change = (model(ids) - model(ids, positions=torch.arange(100, 112))).abs().max()
    assert (change > 0.1) if name in ("learned", "sinusoidal") else (change < 1e-12)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_runs_in_single_precision_with_positions_for_each_text(name):
    model = training.initialise(TransformerLM(TransformerConfig(20, 32, 4, 1, 64), positions=SCHEMES[name]()), 0)
    ids = torch.from_numpy(np.random.default_rng(6).integers(20, size=(2, 5)))
    out = model(ids, positions=torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], model(ids)[0], atol=1e-5, rtol=0)


class Cache:
    length, kept = 0, None

    def update(self, k, v):
        self.kept = (k, v) if self.kept is None else [torch.cat(pair, dim=-2) for pair in zip(self.kept, (k, v))]
        self.length = self.kept[0].shape[-2]
        return self.kept


@pytest.mark.parametrize("name", SCHEMES)
def test_token_by_token_with_a_cache_is_the_whole_text(name):
    model = TransformerLM(TransformerConfig(20, 32, 4, 2, 64), positions=SCHEMES[name]())
    model = training.initialise(model.double(), 0)
    ids = torch.from_numpy(np.random.default_rng(7).integers(20, size=(1, 9)))
    caches = [Cache(), Cache()]
    steps = torch.cat([model(ids[:, t : t + 1], caches=caches) for t in range(9)], dim=1)
    torch.testing.assert_close(steps, model(ids), atol=1e-10, rtol=0)


def test_positions_restarted_at_0_are_another_function():
    layer = training.initialise(MultiHeadAttention(16, 2, r.Rotary(8)).double(), 0)
    x, cache = torch.from_numpy(draw(1, 6, 16)), Cache()
    steps = [layer(x[:, t : t + 1], causal=True, cache=cache, positions=torch.tensor([0])) for t in range(6)]
    assert (torch.cat(steps, dim=1) - layer(x, causal=True)).abs().max() > 1e-3


def test_dynamic_rotary_follows_the_largest_position():
    dynamic = r.Rotary(8, scaling={"rope_type": "dynamic", "factor": 2.0, **LENGTH})
    x = torch.from_numpy(draw(1, 1, 2, 8))
    short, plain = torch.tensor([3, 63]), r.Rotary(8)
    torch.testing.assert_close(dynamic.rotate(x, short), plain.rotate(x, short))
    assert (dynamic.rotate(x, torch.tensor([3, 64])) - plain.rotate(x, torch.tensor([3, 64]))).abs().max() > 1e-4
