"""The heads and the losses of the real model in the viewers of the course."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch

from utils import language_model
from utils.plotting.token_text import text_html
from utils.plotting.views.bertviz import bertviz_html
from utils.plotting.views.heads import head_viewer_html

SENTENCE = 'The animal did not cross the "street",\nbecause it was </script> too tired.'


@pytest.fixture(scope="module")
def ids(smollm):
    return smollm.encode(SENTENCE)


@pytest.fixture(scope="module")
def weights(smollm, ids):
    return language_model.weights(smollm, ids)


def test_weights_are_rows_of_probabilities_and_see_no_future(weights, ids):
    n = ids.shape[1]
    assert weights.shape == (30, 9, n, n)
    assert np.abs(weights.sum(-1) - 1).max() < 1e-5
    assert not np.triu(weights, 1).any()


def test_weights_are_those_the_model_attends_with(smollm, weights, ids):
    """In the first layer, from queries and keys by hand."""
    block, parts = smollm.blocks[0], smollm.parts
    x = block.norm_1(smollm.embedding(ids))
    positions = torch.arange(ids.shape[1])
    q = parts.rotate(block.attention.split(x @ block.attention.w_q), positions)
    k = parts.rotate(block.attention.split(x @ block.attention.w_k), positions)
    for head in range(9):
        scores = (q[0, head] @ k[0, head // 3].T / 8).masked_fill(
            torch.ones(len(positions), len(positions)).triu(1) > 0, -1e9
        )
        assert np.abs(torch.softmax(scores, -1).numpy() - weights[0, head]).max() < 1e-5


def test_head_viewer_takes_the_heads_of_some_layers(smollm, weights, ids):
    html = head_viewer_html(weights[[0, 18]], smollm.tokens(ids))
    assert " animal" in html and html.count("</script>") == 1


def test_bertviz_takes_the_heads_of_some_layers(smollm, weights, ids):
    html = bertviz_html("head_view", weights[[0, 18]], smollm.tokens(ids))
    assert '" animal"' in html and "</script> too" not in html


def test_the_tokens_are_coloured_by_loss_and_by_weight(smollm, weights, ids):
    losses = np.concatenate([[np.nan], smollm.losses(ids).numpy()])
    for values in (losses, weights[18, 7, -1]):
        html = text_html(smollm.tokens(ids), values, "loss, nats")
        assert html.count("<span") == ids.shape[1] and "</script>" not in html


def test_the_typewriter_prints_every_letter_and_keeps_lines_short(smollm, capsys):
    text = "Ünïcode 日本語 and " + "some long words in a row, " * 12 + "\n  indented\n\nend"
    typewriter = language_model.Typewriter(smollm)
    for token in smollm.encode(text)[0]:
        typewriter(token)
    printed = capsys.readouterr().out
    assert printed.split() == text.split()
    assert max(map(len, printed.splitlines())) <= 88
    assert printed.endswith("\n  indented\n\nend")


def test_speaking_stops_at_the_end_of_an_answer_and_says_the_same_twice(smollm, capsys):
    question = smollm.tokenizer.chat("What is 2 + 2? Answer with one number.")
    language_model.speak(smollm, question, 16)
    first = capsys.readouterr().out
    language_model.speak(smollm, question, 16)
    assert capsys.readouterr().out == first
    assert first.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert len(smollm.tokenizer.encode(first)) < len(smollm.tokenizer.encode(question)) + 16
