"""Outputs agree when they differ by another processor's rounding, and in nothing else."""

import base64
import io
import re

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils.authoring import outputs as notebook_outputs
from utils.plotting.figure import words_of


@pytest.mark.parametrize(
    ("expected", "actual", "agrees"),
    [
        ("0.123", "0.124", True),
        ("0.123", "0.125", False),
        ("0.93", "0.94", False),
        ("12.3", "12.4", True),
        ("1.5410", "1.5413", True),
        ("-0.0000", "0.0000", True),
        ("[ 0.0001 -0.2]", "[-0.0000 -0.2]", True),
        ("99.96 %", "100.01 %", True),
        ("largest difference 2e-16", "largest difference 3.1e-15", True),
        ("largest difference 2e-16", "largest difference 1e-4", False),
        ("largest difference 2e-16", "largest difference 3e-9", False),
        ("largest difference 0.0e+00", "largest difference 2.2e-16", True),
        ("largest difference 0.0", "largest difference 4e-8", False),
        ("4.1e-08", "9.7e-08", True),
        ("4.1e-08", "-9.7e-08", True),
        ("9.0e-07", "1.1e-06", True),
        ("8e-07", "9e-06", False),
        ("2.0e-05", "4.0e-05", False),
        ("1000", "1001", False),
        ("1", "1.0", False),
        ("0.5", "-0.5", False),
        ("1.0", "nan", False),
        ("shape (2, 3)", "shape (2, 4)", False),
        ("layer2", "layer3", False),
        ("a\nb", "a", False),
        ("x\0", "x1", False),
    ],
)
def test_numbers_have_a_tolerance_and_words_have_none(expected, actual, agrees):
    old, new = ([nbformat.v4.new_output("stream", name="stdout", text=text)] for text in (expected, actual))
    assert (notebook_outputs.differences(old, new) == []) is agrees


def drawn(draw):
    """Return the outputs of a cell that shows what `draw(axes)` draws."""
    figure = Figure(figsize=(8, 4), dpi=100)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return [nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(file.getvalue()).decode()})]


def curves(drift=0.0, factor=1.0, count=3):
    """Three noisy training curves: `drift` adds relative noise to each, `factor` scales the last, `count` are drawn."""

    def draw(axes):
        noise, steps = np.random.default_rng(0), np.arange(200)
        for index in range(3):
            curve = np.exp(-steps / 60) * (1 + 0.3 * index) + 0.05 * noise.normal(size=200) * np.exp(-steps / 100)
            walk = np.random.default_rng(index).normal(size=200).cumsum() / np.sqrt(200)
            if index < count:
                axes.plot(steps, curve * (1 + drift * walk) * (factor if index == 2 else 1))
        axes.set_ylim(-0.1, 1.8)

    return drawn(draw)


def heatmap(change=0.0):
    def draw(axes):
        weights = np.random.default_rng(0).dirichlet(np.ones(8), 8)
        weights[2, 3] += change
        axes.imshow(weights, cmap="viridis", vmin=0, vmax=1)

    return drawn(draw)


@pytest.mark.parametrize(
    ("expected", "actual", "agrees"),
    [
        (curves, lambda: curves(drift=0.01), True),
        (curves, lambda: curves(factor=0.95), False),
        (curves, lambda: curves(count=2), False),
        (heatmap, lambda: heatmap(0.02), True),
        (heatmap, lambda: heatmap(0.1), False),
    ],
    ids=["drift_of_1_percent", "curve_scaled_by_0.95", "curve_left_out", "weight_off_by_0.02", "weight_off_by_0.1"],
)
def test_a_picture_may_drift_and_may_not_change(expected, actual, agrees):
    assert (notebook_outputs.differences(expected(), actual()) == []) is agrees


def shown(draw):
    """Return the outputs of a cell that shows what `draw(axes)` draws, with the words in it."""
    figure = Figure(figsize=(8, 4), dpi=100)
    draw(figure.subplots())
    file = io.BytesIO()
    figure.savefig(file, format="png")
    encoded, words = base64.b64encode(file.getvalue()).decode(), words_of(figure)
    return [nbformat.v4.new_output("display_data", {"image/png": encoded}, metadata={"image/png": {"words": words}})]


def losses(names=("RoPE", "ALiBi"), title="RoPE breaks at 64", label="loss", note="0.52"):
    def draw(axes):
        for height, name in enumerate(names):
            axes.plot([0, 1, 2], [height + 1, height + 2, 4], label=name)
        axes.set(title=title, ylabel=label)
        axes.annotate(note, (1, 2))
        axes.legend()

    return shown(draw)


def bars(names=("full", "window"), heights=(1, 2)):
    return shown(lambda axes: axes.bar(names, heights))


def grid(numbers):
    def draw(axes):
        axes.imshow(np.zeros((2, 4)), vmin=0, vmax=1)
        for place, number in enumerate(numbers):
            axes.text(place % 4, place // 4, f"{number:.2f}", ha="center")

    return shown(draw)


def coloured(label):
    def draw(axes):
        axes.figure.colorbar(axes.imshow(np.eye(3)), label=label)

    return shown(draw)


EIGHT = [0.11, 0.22, 0.33, 0.44, 0.55, 0.66, 0.77, 0.88]
CHANGED_WORDS = {
    "legend names swapped": (losses(), losses(names=("ALiBi", "RoPE"))),
    "the title names the other model": (losses(), losses(title="ALiBi breaks at 64")),
    "a number in the title": (losses(), losses(title="RoPE breaks at 68")),
    "another y label": (losses(), losses(label="gain")),
    "another number in a note": (losses(), losses(note="0.82")),
    "labels of two bars swapped": (bars(), bars(names=("window", "full"))),
    "eight numbers in a grid": (grid(EIGHT), grid(EIGHT[::-1])),
    "one number in a grid": (grid(EIGHT), grid([0.19, *EIGHT[1:]])),
    "label of a colour bar": (coloured("weight"), coloured("score")),
}


@pytest.mark.parametrize("name", CHANGED_WORDS)
def test_a_figure_that_says_something_else_is_another_one(name):
    expected, actual = CHANGED_WORDS[name]
    [found] = notebook_outputs.differences(expected, actual)
    assert "its words differ" in found
    assert notebook_outputs.differences(actual, actual) == []


def test_a_number_in_a_figure_may_drift():
    assert notebook_outputs.differences(losses(note="0.521"), losses(note="0.522")) == []


def test_words_that_come_or_go_are_a_difference():
    with_words, without = losses(), losses()
    without[0].metadata.clear()
    assert "its words are missing" in notebook_outputs.differences(with_words, without)[0]
    assert "its words are new" in notebook_outputs.differences(without, with_words)[0]


def test_what_a_cell_tolerates_is_its_own_and_words_are_never_tolerated():
    old, new = (
        [nbformat.v4.new_output("stream", name="stdout", text=text)]
        for text in ("loss 1.71 at 340", "loss 1.75 at 343")
    )
    assert notebook_outputs.differences(old, new)
    assert notebook_outputs.differences(old, new, {"numbers": 0.01})
    assert notebook_outputs.differences(old, new, {"numbers": 0.05}) == []
    assert notebook_outputs.differences(old, new, {"picture": 0.5})
    assert notebook_outputs.differences(curves(), curves(factor=0.95), {"picture": 0.1}) == []
    assert notebook_outputs.differences(curves(), curves(factor=0.95), {"numbers": 0.1})
    assert notebook_outputs.differences(losses(), losses(label="gain"), {"numbers": 0.5, "picture": 0.5})


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        (curves, "the picture"),
        (
            lambda: [nbformat.v4.new_output("display_data", {"text/html": "<img src='data:image/png;base64,AAAA'>"})],
            "HTML",
        ),
        (lambda: [nbformat.v4.new_output("stream", name="stdout", text="loss 3\n" * 3)], "the printed text"),
    ],
    ids=["picture", "html", "text"],
)
def test_a_missing_output_is_named_in_words_and_prints_no_base64(outputs, name):
    for found in (notebook_outputs.differences(outputs(), []), notebook_outputs.differences([], outputs())):
        assert "1 outputs expected, 0 came" in found[0] or "0 outputs expected, 1 came" in found[0]
        assert name in found[1] and not re.search(r"[A-Za-z0-9+/=]{100}|base64", " ".join(found))


def test_a_report_has_no_colours_and_no_line_without_end():
    long = "<img src='data:image/png;base64," + "A" * 5000 + "'>"
    old, new = ([nbformat.v4.new_output("stream", name="stdout", text=f"\x1b[31m{x}\x1b[0m{long}")] for x in "ab")
    [found] = notebook_outputs.differences(old, new)
    assert "\x1b" not in found and len(found) < 400


def test_pictures_that_differ_are_kept_with_their_difference(tmp_path):
    [found] = notebook_outputs.differences(curves(), curves(count=2), keep=tmp_path / "new" / "In_3")
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == [f"In_3_output_1_{kind}.png" for kind in ("difference", "kept", "new")]
    assert all(name in found for name in files)
    changed = np.asarray(Image.open(tmp_path / "new" / "In_3_output_1_difference.png").convert("RGB"), int)
    assert ((changed == (200, 0, 0)).all(-1)).sum() > 50
    assert notebook_outputs.differences(curves(), curves(), keep=tmp_path / "same") == []
    assert not list(tmp_path.glob("same*"))


def test_cleaning_twice_changes_nothing():
    picture = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(picture, "PNG")
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="a\n"),
        nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture.getvalue()).decode()}),
        nbformat.v4.new_output("stream", name="stdout", text="b\n"),
    ]
    once = notebook_outputs.clean(outputs)
    assert [output.get("text") for output in once] == ["a\nb\n", None]
    assert len(Image.open(io.BytesIO(base64.b64decode(once[1].data["image/png"]))).getcolors()) <= 64
    assert notebook_outputs.clean(once) == once
