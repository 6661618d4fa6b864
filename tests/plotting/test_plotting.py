"""Properties of the pictures: what is refused, what is computed, and that the same figure gives the same bytes."""

import io

import matplotlib

matplotlib.use("Agg")


import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tests.plotting.displayed import png_of, shown
from utils import plotting
from utils.plotting import figure as figure_module

UNIFORM = np.full((3, 4), 0.25)
WORDS = ["[CLS]", "the", "unbelievably-long-token-of-a-subword-model", "$x$ $y$"]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_show_displays_one_png_with_the_description_as_alt_text_and_as_caption(notebook):
    plotting.heatmap(UNIFORM)
    plotting.curves({"a": [1, 2]})
    picture, caption = shown("What is\n  seen: 2 * 2.")
    assert picture.data["text/plain"] == "What is seen: 2 * 2."
    assert picture.metadata["image/png"]["alt"] == "What is seen: 2 * 2."
    assert caption.data["text/markdown"].split("\n\n") == [r"*What is seen: 2 \* 2.*", figure_module.CAPTION_AS_ALT]
    image = Image.open(io.BytesIO(png_of(picture)))
    assert image.mode == "P" and len(image.getcolors()) <= 64
    assert image.height > 600  # both figures, one below the other
    assert plt.get_fignums() == []


def test_the_same_figure_gives_the_same_bytes(notebook):
    pictures = []
    for _ in range(2):
        plotting.heads(np.stack([UNIFORM, UNIFORM]))
        pictures.append(png_of(shown()[0]))
    assert pictures[0] == pictures[1]


def test_few_colours_keep_the_single_brightest_cell_and_the_white_page(notebook):
    weights = np.eye(16)[np.zeros(16, dtype=int)] * 0.98 + 0.00125
    weights[3] = np.eye(16)[7]
    plotting.heatmap(weights)
    image = Image.open(io.BytesIO(png_of(shown()[0]))).convert("RGB")
    assert image.getpixel((2, image.height - 2)) == (255, 255, 255)
    brightest = np.array(plt.get_cmap("viridis")(1.0)[:3]) * 255
    assert np.abs(np.asarray(image).astype(int) - brightest).max(-1).min() < 16


@pytest.mark.parametrize("description", ["", "   ", None, 3])
def test_show_refuses_an_empty_description(description):
    plotting.heatmap(UNIFORM)
    with pytest.raises(ValueError, match="description must be a sentence"):
        plotting.show(description)


def test_show_refuses_to_end_a_cell_without_a_figure():
    with pytest.raises(RuntimeError, match="no open figure"):
        plotting.show("Nothing.")


def test_outside_a_notebook_the_figure_opens_in_a_window(monkeypatch):
    opened = []
    monkeypatch.setattr(plt, "show", lambda: opened.append(plt.get_fignums()))
    plotting.heatmap(UNIFORM)
    plotting.show("A window.")
    assert opened == [[1]] and plt.get_fignums() == []


@pytest.mark.parametrize(
    "weights",
    [
        UNIFORM,
        UNIFORM.tolist(),
        torch.tensor(UNIFORM, requires_grad=True),
        torch.tensor(UNIFORM, dtype=torch.bfloat16),
        torch.tensor(UNIFORM, dtype=torch.float16),
        np.vstack([UNIFORM[:2], np.zeros((1, 4))]),
    ],
    ids=["numpy", "list", "torch with grad", "bfloat16", "float16", "a masked row of zeros"],
)
def test_weights_are_taken_from_every_kind_of_array(weights):
    ax = plotting.heatmap(weights, keys=WORDS)
    assert np.asarray(ax.images[0].get_array()).shape == (3, 4)


@pytest.mark.parametrize(
    "weights, message",
    [
        (UNIFORM * 2, "weights must be rows of probabilities .* sum of 2 in row 0"),
        (np.array([[1.5, -0.5]]), "weights must be rows of probabilities, got -0.5 at"),
        (np.array([[np.nan, 1.0]]), "weights must be finite"),
        (np.ones(4) / 4, r"weights must be a non-empty array with 2 axes, got shape \(4,\)"),
        (np.zeros((0, 4)), "weights must be a non-empty array"),
        ([[1.0], [0.5, 0.5]], "weights must be a rectangular array of numbers"),
        ("attention", "weights must be a rectangular array of numbers"),
    ],
)
def test_what_is_not_rows_of_probabilities_is_refused_by_every_map(weights, message):
    for draw in (
        plotting.heatmap,
        lambda w: plotting.alignment(w, WORDS, WORDS[:3]),
        lambda w: plotting.bipartite(w, WORDS[:3], WORDS),
    ):
        with pytest.raises(ValueError, match=message):
            draw(weights)


@pytest.mark.parametrize(
    "draw, name",
    [
        (lambda: plotting.heatmap(UNIFORM, queries=WORDS), "queries"),
        (lambda: plotting.heatmap(UNIFORM, keys=WORDS[:3]), "keys"),
        (lambda: plotting.alignment(UNIFORM, source=WORDS[:3], target=WORDS[:3]), "source"),
        (lambda: plotting.bipartite(UNIFORM, WORDS, WORDS), "queries"),
        (lambda: plotting.heads(UNIFORM[None], keys=WORDS[:1]), "keys"),
        (lambda: plotting.heads(UNIFORM[None], names=["a", "b"]), "names"),
        (lambda: plotting.matrix(UNIFORM, rows=WORDS), "rows"),
    ],
)
def test_a_wrong_number_of_labels_names_the_argument(draw, name):
    with pytest.raises(ValueError, match=f"^{name} must have one label for each of the"):
        draw()


def test_long_labels_are_shortened_and_white_space_is_visible():
    ax = plotting.heatmap(np.full((4, 4), 0.25), queries=[" ", "\n", "", "a" * 40], keys=WORDS)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:3] == ["␣", "⏎", "∅"] and labels[3] == "a" * 17 + "…"


def test_numbers_are_written_into_small_maps_only():
    assert texts(plotting.heatmap(UNIFORM)) == ["0.25"] * 12
    assert texts(plotting.heatmap(np.full((20, 20), 0.05))) == []
    assert texts(plotting.heatmap(UNIFORM, annotate=False)) == []


def test_heads_share_one_colour_scale_and_show_every_head():
    sharp, flat = np.eye(4), np.full((4, 4), 0.25)
    figure = plotting.heads(np.stack([sharp, flat, flat]))
    images = [ax.images[0] for ax in figure.axes if ax.images and ax.get_visible()]
    assert len(images) == 3 and {image.get_clim() for image in images} == {(0.0, 1.0)}
    grid = plotting.heads(np.stack([[sharp, flat]] * 3))
    assert sum(bool(ax.images) for ax in grid.axes) == 6
    single = plotting.heads(np.stack([[flat] * 6]))  # one layer: rows of four, as without a layer axis
    assert [ax.get_title(loc="center") for ax in single.axes if ax.images] == [f"head {h}" for h in range(6)]


def test_a_list_of_layers_as_transformers_returns_it_is_a_grid():
    layers = [torch.full((1, 2, 4, 4), 0.25)] * 3
    assert sum(bool(ax.images) for ax in plotting.heads(layers).axes) == 6
    with pytest.raises(ValueError, match="equal shapes"):
        plotting.heads([torch.full((2, 2, 4, 4), 0.25)])


def test_alignment_boxes_the_strongest_source_of_each_target_and_none_of_a_masked_row():
    weights = np.array([[0.1, 0.9], [0.0, 0.0], [0.8, 0.2]])
    ax = plotting.alignment(weights, ["a", "b"], ["x", "y", "z"])
    assert [(round(box.get_x() + 0.46), round(box.get_y() + 0.46)) for box in ax.patches] == [(1, 0), (0, 2)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["the strongest of its row"]


@pytest.mark.parametrize(("low", "shown"), [(0.0, (0, 3)), (-1.0, (-3, 3))])
def test_a_matrix_without_negative_numbers_has_no_scale_for_them(low, shown):
    ax = plotting.matrix([[low, 3.0]])
    assert ax.figure.axes[-1].get_ylim() == shown


def test_matrix_crosses_out_minus_infinity_and_refuses_nan():
    ax = plotting.matrix([[1.0, -np.inf], [-2.0, 0.5]])
    assert len(ax.lines[0].get_xdata()) == 1 and texts(ax) == ["1.00", "-2.00", "0.50"]
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="values must be finite or -inf"):
            plotting.matrix([[bad, 1.0]])


def test_masks_draw_a_dot_where_a_query_may_attend():
    figure = plotting.masks({"causal": np.tri(4, dtype=bool), "torch": torch.ones(2, 3, dtype=torch.bool)})
    assert [len(ax.lines[0].get_xdata()) for ax in figure.axes] == [10, 6]
    assert {(ax.get_ylabel(), ax.get_xlabel()) for ax in figure.axes} == {("queries", "keys")}
    figure = plotting.masks({"a": np.tri(2, dtype=bool)}, rows="query heads", columns="key heads")
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("query heads", "key heads")
    with pytest.raises(ValueError, match="mask 'weights' must be boolean"):
        plotting.masks({"weights": UNIFORM})
    with pytest.raises(ValueError, match="masks must be a non-empty dict"):
        plotting.masks({})


def test_curves_draw_the_mean_and_the_range_of_the_seeds():
    ax = plotting.curves({"a": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]], "b": [1.0, 1.0, 1.0]}, x=[0, 10, 20], threshold=2)
    assert ax.lines[0].get_ydata().tolist() == [2, 3, 4]
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 5)
    styles = [(line.get_color(), line.get_linestyle()) for line in ax.lines[:2]]
    assert styles[0][0] != styles[1][0] and styles[0][1] != styles[1][1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"series": {}}, "series must be a non-empty dict"),
        ({"series": {"a": [1, 2]}, "x": [1, 2, 3]}, "series 'a' must have 3 values, one for each x, got 2"),
        ({"series": {"a": [0.0, 1.0]}, "log_y": True}, "series 'a' must be positive"),
        ({"series": {"a": [np.nan]}}, "series 'a' must be finite"),
    ],
)
def test_curves_refuse_what_they_cannot_draw(arguments, message):
    with pytest.raises(ValueError, match=message):
        plotting.curves(**arguments)


def test_bars_are_the_means_over_seeds():
    ax = plotting.bars({"one": 2.0, "three seeds": [1.0, 2.0, 6.0]})
    assert [bar.get_height() for bar in ax.patches] == [2, 3]


def test_scaling_finds_the_exponent():
    x = np.array([64, 128, 256, 512])
    slopes = plotting.scaling({"square": (x, 3.0 * x**2), "root": (torch.tensor(x), x**0.5)})
    assert slopes == pytest.approx({"square": 2.0, "root": 0.5})
    with pytest.raises(ValueError, match="must be positive for logarithmic axes"):
        plotting.scaling({"bad": (x, x * 0.0)})
    with pytest.raises(ValueError, match="as many x as y"):
        plotting.scaling({"bad": (x, x[:2])})


def test_roofline_compares_with_the_lower_of_the_two_roofs():
    ax = plotting.roofline({"memory": (1.0, 50.0), "compute": (100.0, 250.0)}, bandwidth=100.0, peak=1000.0)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["memory: 50% of its roof", "compute: 25% of its roof"]
    with pytest.raises(ValueError, match="peak must be positive"):
        plotting.roofline({"a": (1.0, 1.0)}, bandwidth=1.0, peak=0)


def test_memory_layout_counts_the_sectors_that_a_row_and_a_column_touch():
    array = np.arange(32, dtype=np.float32).reshape(4, 8)  # a row is one sector of 32 bytes
    first_row = np.zeros((4, 8), dtype=bool)
    first_row[0] = True
    assert plotting.memory_layout(array, touched=first_row) == 1
    assert plotting.memory_layout(array.T, touched=first_row.T) == 1
    first_column = np.zeros((4, 8), dtype=bool)
    first_column[:, 0] = True
    assert plotting.memory_layout(array, touched=first_column) == 4
    assert plotting.memory_layout(torch.from_numpy(array).t(), touched=first_column.T) == 4


def test_memory_layout_writes_the_byte_offsets_of_views():
    array = np.arange(12, dtype=np.float64).reshape(3, 4)
    for view, offsets in (
        (array.T, [0, 32, 64]),
        (array[:, ::2], [0, 16]),
        (np.broadcast_to(array[0], (2, 4)), [0, 8]),
        (array[::-1], [64, 72]),
    ):
        plotting.memory_layout(view)
        assert texts(plt.gcf().axes[0])[: len(offsets)] == [str(offset) for offset in offsets]


@pytest.mark.parametrize(
    "array, touched, message",
    [
        (np.zeros((2, 2, 2)), None, "array must have 1 or 2 axes"),
        (np.zeros((20, 20)), None, "array must have 1 or 2 axes and 1 to 128 elements"),
        (np.zeros((2, 4)), np.ones((3, 4), dtype=bool), "touched must have the shape"),
        (np.zeros((5000, 4))[::2500], None, "span at most 64 sectors"),
    ],
)
def test_memory_layout_refuses_what_does_not_fit(array, touched, message):
    with pytest.raises(ValueError, match=message):
        plotting.memory_layout(array, touched=touched)


def test_tiles_state_what_is_on_chip_also_at_a_ragged_edge():
    figure = plotting.tiles(100, 70, 16, 64, 32, steps=[(0, 0), (1, 2)])
    full, ragged = (texts(ax)[-1] for ax in figure.axes[:2])
    assert "Q, O 64×16, K, V 32×16" in full and "scores 64×32: 20 KiB" in full
    assert "Q, O 36×16, K, V 6×16" in ragged and "scores 36×6: 6.09 KiB" in ragged


def test_tiles_refuse_a_step_that_causality_skips():
    with pytest.raises(ValueError, match="steps must lie in the grid of 2 by 2 tiles and not be skipped"):
        plotting.tiles(64, 64, 16, 32, 32, steps=[(0, 1)], causal=True)
    plotting.tiles(32, 64, 16, 32, 32, steps=[(0, 1)], causal=True)  # the last queries see all keys
    with pytest.raises(ValueError, match="block_q must be a positive whole number, got 0"):
        plotting.tiles(64, 64, 16, 0, 32, steps=[(0, 0)])


def test_timeline_orders_by_year_and_refuses_other_shapes():
    ax = plotting.timeline([(2017, "second", "note"), (2014, "first", "note " * 40)])
    assert [text for text in texts(ax) if text.isdigit()] == ["2014", "2017"]
    for bad in ([], [("year", "label", "note")], [(2014, "no note")]):
        with pytest.raises(ValueError, match="events must"):
            plotting.timeline(bad)
