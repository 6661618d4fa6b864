"""Lecture 02: what layers begin with, and what the launch of the kernel chooses."""

import numpy as np
import pytest
import torch

from attention import multi_head as m


def test_a_layer_begins_with_weights_that_keep_the_size_of_a_vector():
    torch.manual_seed(0)
    layer = m.MultiHeadAttention(256, 4)
    for name, weights in layer.named_parameters():
        assert weights.shape == (256, 256), name
        assert abs(weights.std().item() * 256**0.5 - 1) < 0.05, name


def test_one_layer_of_encoder_and_decoder_unless_more_are_asked_for():
    assert len(m.EncoderDecoder(5, 6).encoder) == len(m.EncoderDecoder(5, 6).decoder) == 1
    assert len(m.EncoderDecoder(5, 6, n_layers=3).encoder) == 3


@pytest.mark.parametrize("name", ["w_q", "w_k", "w_v", "w_o"])
def test_a_matrix_without_a_second_axis_is_named(name):
    arguments = {n: np.zeros((8, 8)) for n in ("x_q", "x_kv", "w_q", "w_k", "w_v", "w_o")} | {name: np.zeros(8)}
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        m.check_projections(*arguments.values(), 2)


@pytest.mark.parametrize("d_head", [4, 31, 64, 150])
@pytest.mark.parametrize("n_keys", [1, 16, 17, 100, 5000])
def test_as_many_scores_are_kept_as_48_kilobytes_hold(n_keys, d_head):
    q, k = torch.zeros(1, 3, 2 * d_head), torch.zeros(1, n_keys, 2 * d_head)
    _, _, shared, arguments, _ = m.attend_launch(q, k, k, 2, None, False)
    kept, most = arguments[13], 48 * 1024
    assert kept % 16 == 0 and 0 <= kept < n_keys + 16
    assert shared <= most and (kept >= n_keys or shared + 64 * 16 > most)


def test_split_copy_is_split_heads():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 20)).astype(np.float32))
    y = torch.zeros(2, 4, 3, 5)
    m.split_copy_kernel()[1, 128](x, y, 4, 3, 5, x.numel())
    assert torch.equal(y, m.split_heads(x, 4))
