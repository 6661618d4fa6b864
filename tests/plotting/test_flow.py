"""Data flow, memory and ladders: what is drawn is what was given, nothing covers anything else, bad input is one sentence."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch, Rectangle

from utils import plotting

ATTENTION = [
    ("x", "q", "W_Q"),
    ("x", "k", "W_K"),
    ("x", "v", "W_V"),
    (("q", "k"), "s", "q kᵀ / √d"),
    ("s", "w", "softmax"),
    (("w", "v"), "o", "w v"),
]
SHAPES = {"x": (5, 8), "q": (5, 4), "k": (5, 4), "v": (5, 4), "s": (5, 5), "w": (5, 5), "o": (5, 4)}
LATENT = [
    ("x", "c", "W_DKV"),
    ("x", "q", "W_Q"),
    ("c", "k", "W_UK"),
    ("c", "v", "W_UV"),
    ("x", "k_rope", "W_KR, rotate"),
    (("q", "k", "k_rope", "v"), "heads", "attention"),
    ("heads", "y", "merge, W_O"),
]
LATENT_SHAPES = {
    "x": (2, 10, 64),
    "c": (2, 10, 16),
    "q": (2, 4, 10, 16),
    "k": (2, 4, 10, 16),
    "v": (2, 4, 10, 16),
    "k_rope": (2, 10, 8),
    "heads": (2, 4, 10, 16),
    "y": (2, 10, 64),
}


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


def arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def places(ax):
    """{name: (x, y)} of the names, and of the operations."""
    return {text.get_text(): text.get_position() for text in ax.texts}


@pytest.mark.parametrize(
    "shapes, operations", [(SHAPES, ATTENTION), (LATENT_SHAPES, LATENT)], ids=["attention", "latent"]
)
class TestFlow:
    def test_every_array_is_there_with_its_shape_and_every_operation(self, shapes, operations):
        words = [text.get_text() for text in plotting.flow(arrays(shapes), operations, title="t").texts]
        assert set(shapes) <= set(words)
        assert {" × ".join(map(str, shape)) for shape in shapes.values()} <= set(words)
        assert {label for *_, label in operations} <= set(words)

    def test_an_operation_stands_right_of_its_sources_and_left_of_its_target(self, shapes, operations):
        at = places(plotting.flow(arrays(shapes), operations))
        for sources, target, label in operations:
            for source in (sources,) if isinstance(sources, str) else sources:
                assert at[source][0] < at[label][0] < at[target][0]

    def test_no_two_texts_overlap(self, shapes, operations):
        ax = plotting.flow(arrays(shapes), operations)
        ax.figure.canvas.draw()
        boxes = [text.get_window_extent() for text in ax.texts]
        for index, box in enumerate(boxes):
            assert not [other for other in boxes[:index] if box.overlaps(other)]
            assert 0 <= box.x0 and box.x1 <= ax.figure.bbox.width

    def test_no_operation_covers_an_array(self, shapes, operations):
        ax = plotting.flow(arrays(shapes), operations)
        ax.figure.canvas.draw()
        made = [p.get_window_extent() for p in ax.patches if isinstance(p, FancyBboxPatch)]
        drawn = [p.get_window_extent() for p in ax.patches if type(p) is Rectangle]
        assert made and drawn
        assert not [1 for operation in made for array in drawn if operation.overlaps(array)]


def test_small_arrays_show_their_numbers_and_large_ones_do_not():
    ax = plotting.flow({"a": np.arange(12.0).reshape(3, 4), "b": np.zeros((3, 400))}, [("a", "b", "f")])
    (picture,) = ax.images
    assert np.array_equal(picture.get_array(), np.arange(12.0).reshape(3, 4))


def test_a_tensor_with_gradients_and_a_number_are_drawn():
    import torch

    plotting.flow({"w": torch.ones(2, 3, requires_grad=True), "loss": torch.tensor(1.5)}, [("w", "loss", "sum")])


@pytest.mark.parametrize(
    "operations, words",
    [
        ([("x", "z", "f")], "names 'z', which is not among arrays: x, y"),
        ([("x", "y", "f"), ("x", "y", "g")], "is the second one into 'y'"),
        ([("x", "y", "f"), ("y", "x", "g")], "go in a circle through"),
        ([("x", "y")], r"operations\[0\] must be \(sources, target, label\), got \('x', 'y'\)"),
    ],
)
def test_a_flow_that_cannot_be_drawn_is_one_sentence(operations, words):
    with pytest.raises(ValueError, match=words):
        plotting.flow({"x": np.zeros((2, 2)), "y": np.zeros((2, 2))}, operations)


def test_memory_shows_what_is_taken_and_what_stands_in_it():
    ax = plotting.memory({"cache": np.arange(6) < 4, "ring": ["8", "9", "", "7"]}, title="t")
    words = [text.get_text() for text in ax.texts]
    assert words == ["cache", "ring", "8", "9", "7"]
    colours = [patch.get_facecolor() for patch in ax.patches]
    assert len(set(colours[:4])) == 1
    assert len(set(colours[4:6])) == 1
    assert colours[3] != colours[4] != colours[6]


def test_memory_draws_an_arrow_for_each_link_and_names_the_owners():
    pages = np.array([[0, 0, -1], [1, 1, 1]])
    ax = plotting.memory(
        {"table": ["0", "1"], "pages": pages},
        links=[(("table", 0), ("pages", (0, 0))), (("table", 1), ("pages", (1, 0)))],
        owners={0: "a", 1: "b"},
    )
    assert sum(type(patch).__name__ == "ConnectionPatch" for patch in ax.patches) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    "rows, links, words",
    [
        ({"a": np.zeros(3)}, (), r"rows\['a'\] must be booleans, whole numbers or strings"),
        ({"a": np.zeros((2, 2, 2), bool)}, (), "of shape \\(2, 2, 2\\)"),
        ({"a": np.zeros(65, bool)}, (), "has 65 cells in a line: at most 64"),
        ({"a": [True]}, [(("a", 0), ("b", 0))], r"links\[0\] must join two of"),
        ({"a": [True]}, [(("a", 0), ("a", 1))], "points at cell 1 of 'a', which has 1 x 1"),
        ({}, (), "rows must be a non-empty dict"),
    ],
)
def test_memory_that_cannot_be_drawn_is_one_sentence(rows, links, words):
    with pytest.raises(ValueError, match=words):
        plotting.memory(rows, links)


def test_the_longest_bar_of_a_rung_is_its_time():
    rungs = {"naive": (1e9, 0, 4e9), "tiled": (2e8, 6e7, 4e9)}
    seconds = plotting.ladder(rungs, bandwidth=1e12, turns_per_second=2e11, peak=1e13, title="t")
    assert seconds == {"naive": pytest.approx(1e-3), "tiled": pytest.approx(4e-4)}
    ends = {round(bar.get_x() + bar.get_width(), 12) for bar in plt.gca().patches}
    assert ends == {1e-3, 4e-4, 2e-4, 3e-4}


def test_a_rung_without_three_counts_is_one_sentence():
    with pytest.raises(ValueError, match=r"rungs\['a'\] must be \(bytes, turns, operations\)"):
        plotting.ladder({"a": (1, 2)}, 1, 1, 1)
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        plotting.ladder({"a": (1, 2, 3)}, 0, 1, 1)


@pytest.mark.parametrize("n_rungs", [1, 2, 5])
def test_the_legend_of_a_ladder_covers_neither_the_axis_nor_its_label(n_rungs):
    plotting.ladder({f"rung {n}": (1e9, 1e7, 1e9) for n in range(n_rungs)}, 1e12, 2e11, 1e13, title="t")
    figure, ax = plt.gcf(), plt.gca()
    figure.canvas.draw()
    [legend] = figure.legends
    for part in (ax.xaxis.label, *ax.get_xticklabels(), ax.patch):
        assert not legend.get_window_extent().overlaps(part.get_window_extent())
