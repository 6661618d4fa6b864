"""The words of figures, and what the user's machine may not change in them."""

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from tests.plotting.displayed import shown
from utils import plotting
from utils.paths import ROOT


def test_the_words_of_a_figure_are_kept_beside_it(notebook):
    plotting.curves({"RoPE": [1, 2, 3], "ALiBi": [3, 2, 1]}, xlabel="tokens", ylabel="loss (nats)", title="They cross")
    picture, _ = shown("Two lines.")
    words = picture.metadata["image/png"]["words"]
    assert words[:2] == ["They cross", "tokens"]
    assert words[-2:] == ["RoPE", "ALiBi"]
    assert {"loss (nats)", "0", "1", "2"} <= set(words)


def draw_a_grid(numbers):
    figure, ax = plt.subplots()
    for (row, column), number in np.ndenumerate(numbers):
        ax.text(column, row, f"{number:.2f}")
    ax.set(xlim=(-1, 4), ylim=(-1, 2), title="grid")


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda: plotting.curves({"a": [1, 2], "b": [2, 3]}), lambda: plotting.curves({"b": [1, 2], "a": [2, 3]})),
        (lambda: plotting.bars({"MHA": 1, "GQA": 2}), lambda: plotting.bars({"GQA": 1, "MHA": 2})),
        (lambda: plotting.bars({"a": 1}, title="RoPE fails"), lambda: plotting.bars({"a": 1}, title="ALiBi fails")),
        (lambda: plotting.bars({"a": 1}, ylabel="gain"), lambda: plotting.bars({"a": 1}, ylabel="loss")),
        (lambda: draw_a_grid(np.arange(8.0).reshape(2, 4)), lambda: draw_a_grid(np.arange(8.0).reshape(2, 4) + 0.5)),
        (lambda: plotting.heatmap([[1.0]], ["a"], ["b"]), lambda: plotting.heatmap([[1.0]], ["b"], ["a"])),
        (lambda: plotting.curves({"a": [1, 2]}, threshold=1.5, threshold_name="chance"),
         lambda: plotting.curves({"a": [1, 2]}, threshold=1.5, threshold_name="the goal")),
    ],
    ids=["legend names", "labels of bars", "title", "y label", "numbers in a grid", "labels of an axis", "threshold"],
)  # fmt: skip
def test_what_is_swapped_in_a_figure_is_seen_in_its_words(notebook, one, other):
    seen = []
    for draw in (one, one, other):
        draw()
        seen.append(shown("A figure.")[0].metadata["image/png"]["words"])
    assert seen[0] == seen[1] != seen[2]


USUAL = "font.size: 20\naxes.grid: False\nfont.family: serif\nfigure.figsize: 3, 3\nlines.linewidth: 5\n"
DRAW = "from utils import plotting; plotting.curves({'a': [1, 2]}, title='T'); import matplotlib.pyplot as plt; plt.savefig({!r})"


@pytest.mark.parametrize(
    "rc",
    [USUAL, "text.usetex: True\n", "savefig.dpi: 30\nsavefig.transparent: True\naxes.prop_cycle: cycler(color='r')\n"],
)
def test_the_users_matplotlibrc_changes_no_picture(tmp_path, rc):
    (tmp_path / "matplotlibrc").write_text(rc)
    pictures = []
    for name, environment in (("plain", {}), ("theirs", {"MATPLOTLIBRC": str(tmp_path)})):
        file = tmp_path / f"{name}.png"
        command = [sys.executable, "-c", DRAW.replace("{!r}", repr(str(file)))]
        given = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), **environment}
        subprocess.run(command, env=given, cwd=ROOT, check=True, timeout=300)
        pictures.append(np.asarray(Image.open(file)))
    assert np.array_equal(*pictures)


def test_a_roofline_prints_the_numbers_it_was_given():
    plotting.roofline({"matmul": (100, 1e14)}, bandwidth=3.35e12, peak=989e12, title="t")
    words = " ".join(text.get_text() for text in plt.gca().texts)
    assert "bandwidth 3.35 TB/s" in words
    assert "peak 989 TFLOP/s" in words
    plt.close("all")


def test_a_line_break_in_a_label_of_bars_stays():
    plotting.bars({"one\ntwo": 1, "a rather long label that has to be broken": 2})
    first, second = (label.get_text() for label in plt.gca().get_xticklabels())
    assert first == "one\ntwo"
    assert "\n" in second
    plt.close("all")


@pytest.mark.parametrize("x", [None, [1, 2, 3], [0, 1]])
def test_an_axis_of_whole_numbers_shows_no_fractions(x):
    ax = plotting.curves({"a": [1.0, 2.0, 3.0][: len(x or "abc")]}, x=x)
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    shown = [
        float(label.get_text().replace("−", "-"))
        for label in ax.get_xticklabels()
        if low <= label.get_position()[0] <= high
    ]
    assert shown and all(value.is_integer() for value in shown)
    plt.close("all")


def test_japanese_words_are_drawn_and_what_no_font_has_is_named(recwarn, caplog):
    plotting.heatmap([[0.5, 0.5]], queries=["土曜日"], keys=["年", "\U0001f9e0"], title="A title")
    ax = plt.gcf().axes[0]
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["土曜日"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["年", "U+1F9E0"]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert "findfont" not in caplog.text  # it would stand under the figure, in red
    plt.close("all")
