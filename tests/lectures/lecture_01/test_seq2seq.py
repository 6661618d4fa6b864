"""The encoder-decoder of lecture 01 is the one of the paper, and padding is invisible to it."""

import numpy as np
import pytest
import torch

from attention.fundamentals import AdditiveAttention, Seq2Seq
from utils.data import Vocabulary
from utils.training import initialise

SOURCE = torch.tensor([[5, 3, 7, 4, Vocabulary.END], [6, 8, Vocabulary.END, 0, 0]])
TARGET = torch.tensor([[4, 3, 6, Vocabulary.END], [5, Vocabulary.END, 0, 0]])


def model(attention="additive", seed=0):
    return initialise(Seq2Seq(9, 8, d_hidden=6, attention=attention).double(), seed).eval()


def additive(seed=0):
    rng = np.random.default_rng(seed)
    query, keys = (torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in ((3, 4), (3, 5, 7)))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    return initialise(AdditiveAttention(4, 7, 6).double(), seed), query, keys, mask


def test_additive_attention_is_the_formula_of_the_paper_one_key_at_a_time():
    layer, query, keys, mask = additive()
    context, weights = layer(query, keys, mask)
    for b in range(2):
        e = [layer.v @ torch.tanh(query[b] @ layer.w_q + keys[b, j] @ layer.w_k) for j in range(5) if mask[b, j]]
        alpha = torch.softmax(torch.stack(e), 0)
        assert torch.allclose(weights[b, : len(e)], alpha, atol=1e-12) and (weights[b, len(e) :] == 0).all()
        assert torch.allclose(context[b], alpha @ keys[b, : len(e)], atol=1e-12)


def test_a_row_with_nothing_to_attend_is_zero_and_so_is_its_gradient():
    layer, query, keys, mask = additive()
    context, weights = layer(query, keys, mask)
    context.sum().backward()
    assert (context[2] == 0).all() and (weights[2] == 0).all()
    assert (query.grad[2] == 0).all() and (keys.grad[2] == 0).all() and query.grad[:2].abs().sum() > 0


def test_scores_of_any_size_give_no_nan():
    layer, query, keys, mask = additive()
    layer.v.data *= 1e4
    _, weights = layer(query * 1e4, keys * 1e4, mask)
    assert torch.isfinite(weights).all() and torch.allclose(weights[:2].sum(-1), torch.ones(2).double())


@pytest.mark.parametrize("mask", [torch.ones(3, 5), torch.ones(3, 4, dtype=torch.bool)])
def test_a_mask_of_the_wrong_kind_is_named(mask):
    layer, query, keys, _ = additive()
    with pytest.raises(ValueError, match=r"mask must be boolean of shape \(3, 5\), not torch"):
        layer(query, keys, mask)


@pytest.mark.parametrize("attention", ["additive", None])
def test_padding_changes_nothing(attention):
    alone = model(attention)(SOURCE[1:, :3], TARGET[1:, :2])
    padded = model(attention)(SOURCE, TARGET)[1:, :2]
    assert torch.allclose(alone, padded, atol=1e-12)


@pytest.mark.parametrize("attention", ["additive", None])
def test_a_word_is_predicted_without_seeing_it_or_its_successors(attention):
    other = TARGET.clone()
    other[:, 2:] = 7
    before, after = (model(attention)(SOURCE, target) for target in (TARGET, other))
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3], after[:, 3])


@pytest.mark.parametrize("attention", ["additive", None])
def test_greedy_translation_is_what_teacher_forcing_with_it_predicts(attention):
    net = model(attention)
    ids, _ = net.translate(SOURCE, 6)
    assert torch.equal(net(SOURCE, ids).argmax(-1), ids)


def test_alignments_are_distributions_over_the_words_that_are_there():
    _, alignments = model().translate(SOURCE, 6)
    assert alignments.shape == (2, 6, 5) and torch.allclose(alignments.sum(-1), torch.ones(2, 6).double())
    assert (alignments[1, :, 3:] == 0).all() and (alignments[1, :, :3] > 0).all()
    assert model(None).translate(SOURCE, 6)[1] is None


def test_an_annotation_joins_the_forward_and_the_backward_state_of_the_same_word():
    net = model()
    h, _, _ = net.encoder(SOURCE[:1])
    changed = SOURCE[:1].clone()
    changed[0, 2] = 3
    other, _, _ = net.encoder(changed)
    moved = (h != other)[0]
    assert moved[:, :6].any(-1).tolist() == [False, False, True, True, True]  # forward: from the changed word on
    assert moved[:, 6:].any(-1).tolist() == [True, True, True, False, False]  # backward: up to the changed word


def test_the_two_last_states_are_the_ends_of_the_two_readings():
    h, h_n, h_1 = model().encoder(SOURCE)
    assert torch.allclose(h_n, torch.stack([h[0, 4, :6], h[1, 2, :6]]))  # the last word that is there
    assert torch.allclose(h_1, h[:, 0, 6:])


def test_an_unknown_attention_is_named():
    with pytest.raises(ValueError, match="attention must be \"additive\" or None, not 'dot'"):
        Seq2Seq(5, 5, attention="dot")


@pytest.mark.parametrize("attention", ["additive", None])
def test_the_decoder_begins_with_what_w_s_makes_of_the_backward_state(attention):
    layer, states = model(attention), []
    layer.f.register_forward_pre_hook(lambda _, inputs: states.append(inputs[1]))
    layer(SOURCE, TARGET)
    _, _, h_1 = layer.encoder(SOURCE)
    assert torch.equal(states[0], torch.tanh(h_1 @ layer.w_s))
