"""Pictures of measured numbers can be read: one look for each name, no two alike, labels that do not overlap."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from utils import plotting
from utils.plotting.series import looks, registered


def test_one_name_has_one_look_in_every_figure():
    first = plotting.curves({"ALiBi": [1, 2], "RoPE": [2, 1]}).get_lines()
    second = plotting.curves({"RoPE": [1, 2], "something else": [3, 3], "ALiBi (as trained)": [2, 1]}).get_lines()
    assert first[0].get_color() == second[2].get_color() == plotting.SERIES["ALiBi"][0]
    assert first[1].get_color() == second[0].get_color()
    assert second[1].get_color() not in (second[0].get_color(), second[2].get_color())


def test_series_without_a_name_of_the_course_differ_from_one_another():
    given = looks([f"number {i}" for i in range(7)])
    assert len(set(given)) == 7
    assert len(looks([f"number {i}" for i in range(12)])) == 12


@pytest.mark.parametrize(
    "labels",
    [
        ["RoPE", "PI", "RoPE, 40 steps", "PI, 40 steps"],
        ["softmax", "sigmoid, b = -log n", "sigmoid, b = 0"],
        ["attention", "RoPE", "softmax", "with a cache"],  # one look, four names
        ["4 sinks + 60, positions in the cache", "4 sinks + 60, positions in the text", "all keys", "last 64"],
        ["RoPE", *(f"number {i}" for i in range(20))],
    ],
)
def test_no_two_series_of_a_figure_look_alike(labels):
    given = looks(labels)
    assert len(set(given)) == len(labels)
    assert given[0] == plotting.SERIES[registered(labels[0])]


def test_a_variant_keeps_the_colour_of_its_name_and_takes_another_line():
    first, other, variant = looks(["RoPE", "no positions", "RoPE, 40 steps"])
    assert variant[0] == first[0] != other[0]
    assert variant[1] != first[1]


@pytest.mark.parametrize(
    "label, name",
    [
        ("dynamic NTK (13)", "dynamic NTK"),
        ("NTK", "NTK"),
        ("RoPE as it is", "RoPE"),
        ("interpolation + 40 steps", "interpolation"),
        ("window with sinks", "window with sinks"),
        ("PIcture", None),
        ("a RoPE", None),
    ],
)
def test_a_label_has_the_longest_name_that_it_begins_with(label, name):
    assert registered(label) == name


def test_every_line_style_of_the_registry_fits_into_a_legend():
    ax = plotting.curves({name: [1, 2] for name in ("no positions", "facts first", "SnapKV")})
    ax.figure.canvas.draw()
    for handle in ax.get_legend().get_lines():
        _, dashes = handle._unscaled_dash_pattern
        assert np.ptp(handle.get_xdata()) > sum(dashes) * handle.get_linewidth()  # both in points


@pytest.mark.parametrize(
    "labels",
    [
        ["none", "worst others", "previous-token heads"],
        ["a label of twenty-four a", "b label of twenty-four b", "c label of twenty-four c"],
        [
            f"{bits} bits, {kind} outliers, per {of}"
            for bits in (4, 2)
            for kind in ("no", "with")
            for of in ("token", "row")
        ],
    ],
)
def test_no_two_labels_of_bars_overlap(labels):
    ax = plotting.bars(dict.fromkeys(labels, 1.0))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= ax.figure.bbox.width


def test_a_label_of_bars_that_is_too_long_breaks_after_its_commas():
    labels = [f"{i} bits, no outliers, per token" for i in range(8)]
    ax = plotting.bars(dict.fromkeys(labels, 1.0))
    assert ax.get_xticklabels()[3].get_text() == "3 bits,\nno outliers,\nper token"


@pytest.mark.parametrize(
    "x, expected",
    [([32, 64, 128, 256], [32, 64, 128, 256]), ([1, 2, 4], [1, 2, 4]), ([1, 2, 4, 1024], None), ([10, 20, 40], None)],
)
def test_lengths_that_are_powers_of_two_are_written_below_the_axis(x, expected):
    ax = plotting.curves({"a": np.arange(len(x))}, x=x)
    if expected:
        assert ax.get_xticks().tolist() == expected
    else:
        assert len(ax.get_xticks()) != len(x)


def test_the_peak_of_a_roofline_stands_above_the_points_on_it():
    ax = plotting.roofline(
        {"decode": (1, 3e12), "matmul": (2000, 989e12), "fused": (4000, 989e12)}, bandwidth=3.35e12, peak=989e12
    )
    ax.figure.canvas.draw()
    peak = next(text for text in ax.texts if "peak" in text.get_text()).get_window_extent()
    for line in ax.get_lines()[2:]:
        assert peak.y0 > line.get_window_extent().y1


def test_a_power_law_has_marks_between_the_powers_of_ten():
    x = np.array([512, 1024, 2048])
    plotting.scaling({"a": (x, 1e9 / x)})
    assert len(plt.gca().yaxis.get_minorticklocs()) > 5
    assert len(plt.gca().xaxis.get_minorticklocs()) == 0


@pytest.mark.parametrize("intensities", [[1, 1.3, 62, 2700, 4096], [0.375], [5000]])
def test_the_words_of_a_roofline_cover_neither_each_other_nor_the_legend(intensities):
    ax = plotting.roofline({f"kernel {i}": (i, min(989e12, i * 3.35e12)) for i in intensities}, 3.35e12, 989e12)
    ax.figure.canvas.draw()
    boxes = [word.get_window_extent() for word in (*ax.texts, ax.get_legend())]
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
