"""Pictures of attention weights and masks. Rows are queries, columns are keys."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from utils.plotting.figure import COLOURS, INK, set_title
from utils.plotting.inputs import as_array, as_labels, as_mask, as_named, as_weights

MASK_COLOURS = ListedColormap(["#f2f2f2", COLOURS[0]])


def heatmap(weights, queries=None, keys=None, title="", ax=None, annotate=None, xlabel="keys", ylabel="queries"):
    """One attention map. weights (n_queries, n_keys): rows of probabilities, or of zeros. Returns the axes.

    queries, keys: one label each. annotate: write the numbers into the cells; by default in maps of at most 100 cells.
    Raises ValueError for other weights or another number of labels.
    """
    weights = as_weights(weights, "weights", dims=(2,))
    image = _draw(
        weights,
        queries,
        keys,
        title,
        ax,
        annotate,
        xlabel,
        ylabel,
        names=("queries", "keys"),
        cmap="viridis",
        limits=(0, _top(weights)),
    )
    image.axes.figure.colorbar(image, ax=image.axes, label="attention weight", shrink=0.8)
    return image.axes


def matrix(values, rows=None, columns=None, title="", ax=None, annotate=None, xlabel="", ylabel="", label="value"):
    """Any real matrix, such as scores before the softmax: blue below zero, red above; -inf is drawn as a cross.

    values (n_rows, n_columns), finite or -inf; rows, columns: one label each; label: what the colour bar measures.
    Returns the axes. Raises ValueError for nan or +inf, another number of axes or of labels.
    """
    values = as_array(values, "values")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values must have shape (n_rows, n_columns), got {values.shape}")
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError("values must be finite or -inf, got nan or +inf")
    blocked = np.isneginf(values)
    reach = np.abs(values[~blocked]).max(initial=0) or 1.0
    image = _draw(
        np.ma.masked_where(blocked, values),
        rows,
        columns,
        title,
        ax,
        annotate,
        xlabel,
        ylabel,
        names=("rows", "columns"),
        cmap="RdBu_r",
        limits=(-reach, reach),
    )
    i, j = np.nonzero(blocked)
    image.axes.plot(j, i, "x", color="#888888", markersize=5, linestyle="none")
    bar = image.axes.figure.colorbar(image, ax=image.axes, label=label, shrink=0.8)
    if not (values[~blocked] < 0).any():
        bar.ax.set_ylim(0, reach)  # the same colours, without those that cannot be there
    return image.axes


def heads(weights, queries=None, keys=None, title="", names=None):
    """Small multiples on one colour scale: (heads, n_queries, n_keys), or (layers, heads, ...) as a grid.

    names: one title for each head. Heads and layers are counted from 0, as in the array. Returns the figure.
    """
    weights = as_weights(weights, "weights", dims=(3, 4))
    if len(weights) == 1 and weights.ndim == 4:
        weights = weights[0]  # one layer needs no grid of layers
    layered = weights.ndim == 4
    n_heads, n_queries, n_keys = weights.shape[-3:]
    queries, keys = as_labels(queries, n_queries, "queries"), as_labels(keys, n_keys, "keys")
    names = as_labels(names, n_heads, "names") or [f"head {h}" for h in range(n_heads)]
    if layered:
        maps, n_columns = weights.reshape(-1, n_queries, n_keys), n_heads
    else:
        maps, n_columns = weights, min(n_heads, 4)
    n_rows = -(-len(maps) // n_columns)
    labelled = n_columns <= 4 and max(n_queries, n_keys) <= 16  # smaller maps have no room for words
    side = 8.5 / n_columns
    figure, grid = plt.subplots(
        n_rows,
        n_columns,
        figsize=(9, max(2.2, n_rows * side * min(n_queries / n_keys, 2) + 0.8)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="compressed",
    )
    for index, ax in enumerate(grid.flat):
        row, column = divmod(index, n_columns)
        if index >= len(maps):
            ax.set_visible(False)
            continue
        image = ax.imshow(maps[index], vmin=0, vmax=_top(weights), aspect="auto" if n_queries != n_keys else "equal")
        _label_axes(ax, queries if labelled else None, keys if labelled else None, size=8)
        if not labelled:
            ax.set(xticks=[], yticks=[])
        if not layered or row == 0:
            ax.set_title(names[index if not layered else column], fontsize=10, fontweight="normal", loc="center")
        if column == 0:
            ax.set_ylabel(f"layer {row}" if layered else "queries", fontsize=10)
        if index + n_columns >= len(maps):
            ax.set_xlabel("keys", fontsize=10)
            ax.tick_params(labelbottom=True)
    figure.colorbar(image, ax=grid, label="attention weight", shrink=min(1, 2 / n_rows), aspect=15, pad=0.01)
    set_title(figure, title)
    return figure


def alignment(weights, source, target, title=""):
    """Which source words each target word was made from. weights (n_target, n_source); strongest link of a row boxed.

    source, target: the words. Returns the axes.
    """
    weights = as_weights(weights, "weights", dims=(2,))
    image = _draw(
        weights,
        target,
        source,
        title,
        None,
        None,
        "source",
        "target",
        names=("target", "source"),
        cmap="cividis",
        limits=(0, 1),
    )
    ax = image.axes
    for i, j in enumerate(weights.argmax(-1)):
        if weights[i].any():
            ax.add_patch(plt.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor=COLOURS[1], linewidth=2))
    ax.xaxis.set_label_position("top")
    ax.tick_params(axis="x", bottom=False, labelbottom=False, labeltop=True)
    frame = Patch(fill=False, edgecolor=COLOURS[1], linewidth=2, label="the strongest of its row")
    ax.legend(handles=[frame], loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.4)
    ax.figure.colorbar(image, ax=ax, label="attention weight", shrink=0.8)
    return ax


def bipartite(weights, queries, keys, title=""):
    """Queries left, keys right, a line for each weight above 3 %: the wider, the more attention. Returns the axes."""
    weights = as_weights(weights, "weights", dims=(2,))
    n_queries, n_keys = weights.shape
    queries, keys = as_labels(queries, n_queries, "queries"), as_labels(keys, n_keys, "keys")
    if queries is None or keys is None:
        raise ValueError("queries and keys must be lists of labels, got None")
    tallest = max(n_queries, n_keys)
    figure, ax = plt.subplots(figsize=(6.5, 0.9 + 0.34 * tallest))
    left = np.arange(n_queries) + (tallest - n_queries) / 2
    right = np.arange(n_keys) + (tallest - n_keys) / 2
    for i in range(n_queries):
        for j in np.argsort(weights[i]):  # the strongest is drawn last, on top
            if weights[i, j] > 0.03:
                best = j == weights[i].argmax()
                ax.plot(
                    [0, 1],
                    [left[i], right[j]],
                    color=COLOURS[1] if best else COLOURS[0],
                    linestyle="-",
                    linewidth=6 * weights[i, j],
                    alpha=min(1, 0.15 + weights[i, j]),
                    solid_capstyle="butt",
                )
    for x, y, names, side in ((-0.03, left, queries, "right"), (1.03, right, keys, "left")):
        for at, name in zip(y, names, strict=True):
            ax.text(x, at, name, ha=side, va="center", parse_math=False)
    ax.text(-0.03, -1, "queries", ha="right", va="center", color="#666666", style="italic")
    ax.text(1.03, -1, "keys", ha="left", va="center", color="#666666", style="italic")
    ax.set(xlim=(-0.45, 1.45), ylim=(tallest - 0.4, -1.4))
    ax.axis("off")
    ax.legend(
        handles=[
            plt.Line2D([], [], color=COLOURS[1], linestyle="-", linewidth=4, label="strongest of its query"),
            plt.Line2D([], [], color=COLOURS[0], linestyle="-", linewidth=4, alpha=0.6, label="the others"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=2,
    )
    set_title(figure, title)
    return ax


def masks(named_masks, title="", rows="queries", columns="keys"):
    """Which query may see which key. {name: bool mask (n_queries, n_keys)}, True = may attend. Returns the figure.

    rows, columns: what the two axes are called, as "blocks of queries" and "blocks of keys".
    """
    named_masks = {str(n): as_mask(m, f"mask {n!r}") for n, m in as_named(named_masks, "masks").items()}
    n_columns = min(len(named_masks), 4)
    n_rows = -(-len(named_masks) // n_columns)
    side = min(3.2, 8.6 / n_columns)
    figure, grid = plt.subplots(
        n_rows, n_columns, squeeze=False, layout="compressed", figsize=(max(5, side * n_columns), side * n_rows + 1.0)
    )
    for ax in grid.flat[len(named_masks) :]:
        ax.set_visible(False)
    for ax, (name, mask) in zip(grid.flat, named_masks.items(), strict=False):
        ax.imshow(mask, cmap=MASK_COLOURS, vmin=0, vmax=1)
        _label_axes(ax, None, None)
        ax.set_title(name, fontsize=11, fontweight="normal")
        ax.set(xlabel=columns, ylabel=rows)
        if max(mask.shape) <= 24:  # beyond that a dot is a smudge
            _cell_lines(ax, mask.shape)
            i, j = np.nonzero(mask)
            ax.plot(j, i, "o", color="white", markersize=min(5, 45 * side / 3 / max(mask.shape)), linestyle="none")
    figure.legend(
        handles=[
            Patch(facecolor=COLOURS[0], label="may attend (dot)"),
            Patch(facecolor="#f2f2f2", edgecolor="#999999", label="blocked"),
        ],
        loc="outside lower center",
        ncols=2,
    )
    set_title(figure, title)
    return figure


def _draw(values, rows, columns, title, ax, annotate, xlabel, ylabel, names, cmap, limits):
    """The image with its labels, its numbers and its title, on `ax` or on a figure of a fitting size."""
    n_rows, n_columns = values.shape
    rows, columns = as_labels(rows, n_rows, names[0]), as_labels(columns, n_columns, names[1])
    if ax is None:
        width = min(8.5, max(5, 2.6 + 0.55 * n_columns))
        height = min(8.5, max(2.6, 1.5 + (width - 2.6) * n_rows / n_columns))
        figure, ax = plt.subplots(figsize=(width, height))
        set_title(figure, title)
    else:
        ax.set_title(title)
    image = ax.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="equal")
    _label_axes(ax, rows, columns)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if annotate if annotate is not None else values.size <= 100 and n_columns <= 12:
        _write_numbers(ax, image, values)
    return image


def _write_numbers(ax, image, values):
    for (i, j), value in np.ndenumerate(values):
        if np.ma.is_masked(values[i, j]):
            continue
        red, green, blue, _ = image.to_rgba(value)
        ink = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        ax.text(j, i, "0" if value == 0 else f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)


def _label_axes(ax, rows, columns, size=10):
    """Words at the cells; without words, whole numbers at a few of them."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if columns:
        steep = max(map(len, columns)) > 3
        ax.set_xticks(range(len(columns)), columns, rotation=90 if steep else 0, fontsize=size, parse_math=False)
    else:
        ax.xaxis.set_major_locator(plt.MaxNLocator(8, integer=True))
    if rows:
        ax.set_yticks(range(len(rows)), rows, fontsize=size, parse_math=False)
    else:
        ax.yaxis.set_major_locator(plt.MaxNLocator(8, integer=True))


def _cell_lines(ax, shape):
    ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    ax.grid(True, which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)


def _top(weights):
    """The top of the colour scale. Never below twice the uniform weight, or uniform attention would look strong."""
    return max(weights.max(), min(1, 2 / weights.shape[-1]))
