"""A text with coloured tokens: nothing of the text can act as markup, every number can be read, every letter is drawn."""

import io
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from utils import plotting
from utils.plotting.token_text import COLUMNS, draw_text, text_html

TOKENS = ["The", " cat", "\n", "</span><b>", " $x$", " a & b"]
VALUES = [np.nan, 2.0, 0.5, 4.0, 0.0, 1.25]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def letters_of(figure):
    return "".join(piece.get_text() for piece in figure.axes[0].texts)


def boxes_of(figure):
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def test_tokens_cannot_act_as_markup_and_keep_their_spaces_and_lines():
    html = text_html(TOKENS, VALUES, "loss, nats")
    assert "<b>" not in html and "&lt;/span&gt;&lt;b&gt;" in html and " a &amp; b" in html and "⏎\n" in html
    assert html.count("<span") == html.count("</span>") == len(TOKENS)
    assert "<script" not in html and "http" not in html


def test_every_number_can_be_read_and_the_colour_grows_with_it():
    html = text_html(TOKENS, torch.tensor(VALUES), "loss, nats")
    assert re.findall(r'title="([^"]*)"', html) == ["no number", "2.000", "0.500", "4.000", "0.000", "1.250"]
    strengths = [float(text) for text in re.findall(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", html)]
    assert strengths == pytest.approx([0.425, 0.106, 0.85, 0.0, 0.266], abs=1e-3)


def test_what_is_above_the_highest_value_has_the_strongest_colour():
    strengths = re.findall(r"0,([\d.]+)\)", text_html(["a", "b", "c"], [1, 2, 9], "loss", highest=2))
    assert strengths == ["0.425", "0.850", "0.850"]


def test_the_picture_has_every_letter_and_a_box_for_each_number():
    figure = draw_text(TOKENS, VALUES, "loss, nats", title="What was found")
    assert letters_of(figure) == "The cat⏎</span><b> $x$ a & b"
    assert len(boxes_of(figure)) == len(TOKENS) - 1
    assert figure.axes[1].get_xlabel() == "loss, nats"


def test_nothing_moves_when_the_picture_is_saved(recwarn):
    figure = draw_text(TOKENS, VALUES, "loss, nats")
    before = [ax.get_position().bounds for ax in figure.axes]
    figure.savefig(io.BytesIO(), bbox_inches="tight")
    figure.canvas.draw()
    assert [ax.get_position().bounds for ax in figure.axes] == before and not recwarn


def test_no_line_is_longer_than_the_page():
    tokens = [" word"] * 60 + ["x" * 200]
    boxes = boxes_of(draw_text(tokens, np.ones(61), "loss"))
    assert max(box.get_x() + box.get_width() for box in boxes) <= COLUMNS
    assert sum(box.get_width() for box in boxes) == sum(map(len, tokens))


def test_a_word_of_several_tokens_is_not_broken():
    figure = draw_text([*[" word"] * 16, " un", "break", "able"], np.ones(19), "loss")
    lines = {piece.get_text(): piece.get_position()[1] for piece in figure.axes[0].texts}
    assert lines[" un"] == lines["break"] == lines["able"] > lines[" word"]


def test_in_a_notebook_html_and_picture_are_shown_with_the_description(monkeypatch):
    shown = []
    monkeypatch.setattr("utils.plotting.token_text.get_ipython", lambda: object())
    monkeypatch.setattr("utils.plotting.token_text.display", shown.append)
    monkeypatch.setattr("utils.plotting.token_text.show", shown.append)
    plotting.text(TOKENS, VALUES, "loss, nats", "The loss of each token.")
    assert "<span" in shown[0].data and shown[1] == "The loss of each token."


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (([], [], "loss"), "tokens must be a list of strings with at least one"),
        ((["a", 5], [1, 2], "loss"), "tokens must be a list of strings"),
        ((["a", "b"], [1.0], "loss"), r"values must be one number for each of the 2 tokens, got shape \(1,\)"),
        ((["a"], [-1.0], "loss"), "values must be finite and not negative"),
        ((["a"], [np.inf], "loss"), "values must be finite and not negative"),
        ((["a"], [1.0], "loss", 0), "highest must be positive, got 0"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        text_html(*arguments)
