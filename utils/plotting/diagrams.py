"""Diagrams computed from real shapes, strides and tile sizes; and the timeline."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from utils.plotting.figure import COLOURS, INK, PALE, set_title
from utils.plotting.inputs import as_mask

ROW_TINTS = ["#9ecae9", "#f7c29c", "#a3dcc6", "#e8c3d8", "#f5d98f", "#c9c9c9", "#c6e5f7", "#e2b49a"]
MOST_ELEMENTS = 128


def memory_layout(array, title="", touched=None, sector_bytes=32):
    """Which element lies at which address, read off a real array's shape and strides.

    array: NumPy array or torch tensor with 1 or 2 axes and at most 128 elements; views (transposed, sliced, broadcast)
    are what it is for. Left the elements with their byte offsets, right memory in rows of `sector_bytes`, the least a GPU
    fetches. touched: bool, the shape of array: elements read in one step are framed, and the sectors counted.
    Returns the number of sectors touched (of all elements if touched is None).
    Raises ValueError for other shapes or sizes.
    """
    if hasattr(array, "element_size"):  # a torch tensor counts strides in elements
        itemsize, strides = array.element_size(), [s * array.element_size() for s in array.stride()]
    else:
        array = np.asarray(array)
        itemsize, strides = array.itemsize, list(array.strides)
    shape = tuple(array.shape)
    if len(shape) not in (1, 2) or not 0 < np.prod(shape) <= MOST_ELEMENTS:
        raise ValueError(f"array must have 1 or 2 axes and 1 to {MOST_ELEMENTS} elements, got shape {shape}")
    if sector_bytes % itemsize:
        raise ValueError(f"sector_bytes must be a multiple of the element's {itemsize} bytes, got {sector_bytes}")
    if len(shape) == 1:
        shape, strides = (1, *shape), [0, *strides]
    if touched is not None:
        touched = as_mask(np.reshape(touched, shape) if np.size(touched) == np.prod(shape) else touched, "touched")
        if touched.shape != shape:
            raise ValueError(f"touched must have the shape of array {shape}, got {touched.shape}")
    offsets = np.arange(shape[0])[:, None] * strides[0] + np.arange(shape[1]) * strides[1]
    offsets -= offsets.min()
    per_sector = sector_bytes // itemsize
    if offsets.max() // sector_bytes > 64:
        raise ValueError(f"array must span at most 64 sectors of {sector_bytes} bytes, got {offsets.max()} bytes")
    sectors = np.unique((offsets if touched is None else offsets[touched]) // sector_bytes)

    n_sectors = int(offsets.max()) // sector_bytes + 1
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.9 + 0.36 * max(shape[0], n_sectors)), width_ratios=(shape[1] + 1, per_sector + 1.5)
    )
    holders = {}
    for (i, j), offset in np.ndenumerate(offsets):
        holders.setdefault(int(offset) // itemsize, []).append((i, j))
        _cell(left, j, i, f"{offset}", ROW_TINTS[i % 8], touched is not None and touched[i, j])
    for slot in range(n_sectors * per_sector):
        line, place = divmod(slot, per_sector)
        names = holders.get(slot)
        text = "" if names is None else f"{names[0][0]},{names[0][1]}" + (f" ×{len(names)}" if len(names) > 1 else "")
        colour = "#eeeeee" if names is None else ROW_TINTS[names[0][0] % 8]
        _cell(right, place, line, text, colour, touched is not None and any(touched[n] for n in names or ()))
    _frame(
        left,
        shape[1],
        shape[0],
        range(shape[0]),
        f"column j\n{shape[0]} × {shape[1]}, strides {strides[0]} and {strides[1]} bytes",
        "row i",
    )
    left.set_xticks(range(shape[1]))
    left.set_title("the array: byte offset\nof each element", fontsize=11, fontweight="normal")
    _frame(right, per_sector, n_sectors, [s * sector_bytes for s in range(n_sectors)], "", "byte offset")
    right.set_xticks([])
    right.set_title(f"memory, {sector_bytes} bytes a row:\nthe element i,j there", fontsize=11, fontweight="normal")
    if touched is not None:
        for sector in sectors:
            right.add_patch(
                Rectangle(
                    (-0.55, sector - 0.5),
                    per_sector + 0.1,
                    1,
                    fill=False,
                    edgecolor=COLOURS[1],
                    linewidth=2,
                    clip_on=False,
                    zorder=4,
                )
            )
        right.set_xlabel(
            f"{np.count_nonzero(touched)} elements (bold, framed) touch {len(sectors)} sectors (orange):\n"
            f"{len(sectors) * sector_bytes} bytes fetched for {np.count_nonzero(touched) * itemsize} used"
        )
    set_title(figure, title)
    return len(sectors)


def tiles(n_queries, n_keys, d_head, block_q, block_k, steps, causal=False, itemsize=4, title=""):
    """Which tiles of Q, K, V and the scores exist at each of up to three steps of tiled attention.

    steps: list of (query tile, key tile), counted from 0; the loop over key tiles is the inner one. causal: tiles in which
    no query may see a key are skipped (bottom-right aligned). itemsize: bytes of an element. Returns the figure.
    Raises ValueError for sizes below 1, a step outside the grid, or a skipped one.
    """
    for name, value in (
        ("n_queries", n_queries),
        ("n_keys", n_keys),
        ("d_head", d_head),
        ("block_q", block_q),
        ("block_k", block_k),
        ("itemsize", itemsize),
    ):
        if int(value) != value or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    n_i, n_j = -(-n_queries // block_q), -(-n_keys // block_k)
    if not 1 <= len(steps) <= 3 or n_i * n_j > 1024:
        raise ValueError(
            f"steps must hold 1 to 3 steps of a grid of at most 1024 tiles, got {len(steps)} of {n_i * n_j}"
        )
    first_key = np.arange(n_j) * block_k
    last_query = np.minimum((np.arange(n_i) + 1) * block_q, n_queries) - 1
    skipped = causal & (first_key[None] > last_query[:, None] + n_keys - n_queries)
    for i, j in steps:
        if not (0 <= i < n_i and 0 <= j < n_j) or skipped[i, j]:
            raise ValueError(f"steps must lie in the grid of {n_i} by {n_j} tiles and not be skipped, got {(i, j)}")

    figure, panels = plt.subplots(1, len(steps), figsize=(min(9, 3.6 * len(steps) + 1.4), 5.0), squeeze=False)
    for ax, (i, j) in zip(panels.flat, steps, strict=True):
        _draw_step(ax, (n_queries, n_keys, block_q, block_k), skipped, i, j)
        rows, columns = min(block_q, n_queries - i * block_q), min(block_k, n_keys - j * block_k)
        held = itemsize * (2 * rows * d_head + 2 * columns * d_head + rows * columns)
        ax.set_title(f"query tile {i}, key tile {j}", fontsize=11, fontweight="normal", loc="center")
        ax.text(
            0.5,
            -0.01,
            f"on chip: Q, O {rows}×{d_head}, K, V {columns}×{d_head},\nscores {rows}×{columns}: {_bytes(held)}\n"
            f"(all scores: {_bytes(itemsize * n_queries * n_keys)})",
            transform=ax.transAxes,
            ha="center",
            va="top",
            fontsize=9,
        )
    figure.legend(
        handles=[
            Patch(facecolor=COLOURS[1], edgecolor=INK, label="on chip now"),
            Patch(facecolor="#9ecae9", edgecolor=INK, hatch="..", label="done; scores not kept"),
            Patch(facecolor="white", edgecolor=INK, label="still to come"),
            *([Patch(facecolor=PALE, edgecolor="#888888", hatch="xx", label="skipped: all masked")] if causal else []),
        ],
        loc="outside lower center",
        ncols=4,
    )
    set_title(figure, title)
    return figure


def timeline(events, title=""):
    """What came when: [(year, label, note)], in any order. A true scale of years left, one line for each event right.

    Returns the axes. Raises ValueError if an event is not a triple that begins with a year.
    """
    try:
        events = sorted(((float(year), str(label), str(note)) for year, label, note in events), key=lambda e: e[0])
    except (TypeError, ValueError):
        raise ValueError("events must be a list of (year, label, note), with a number as year") from None
    if not events:
        raise ValueError("events must hold at least one (year, label, note), got none")
    lines = [textwrap.wrap(note, 62) or [""] for _, _, note in events]
    tops = np.cumsum([0, *(len(wrapped) + 0.45 for wrapped in lines)])
    height = tops[-1]
    figure, ax = plt.subplots(figsize=(9, 0.7 + 0.24 * height))
    first, last = events[0][0], events[-1][0]
    scale = (height - 1.45) / max(last - first, 1)
    ax.plot([0, 0], [0, scale * (last - first)], color=INK, linewidth=2, linestyle="-")
    for (year, label, _), wrapped, top in zip(events, lines, tops[:-1], strict=True):
        at = scale * (year - first)
        ax.plot([0, 0.055, 0.075], [at, top, top], color="#aaaaaa", linewidth=1, linestyle="-", zorder=0)
        ax.plot(0, at, "o", color=COLOURS[0], markersize=6, linestyle="none")
        ax.text(0.08, top, f"{year:.0f}", va="center", color=COLOURS[0], fontweight="bold", fontsize=10)
        ax.text(0.135, top, textwrap.shorten(label, 34, placeholder="…"), va="center", fontweight="bold", fontsize=10)
        for step, line in enumerate(wrapped):
            ax.text(0.42, top + step, line, va="center", fontsize=9.5)
    ax.set(xlim=(-0.01, 1), ylim=(height - 0.6, -0.8))
    ax.axis("off")
    set_title(figure, title)
    return ax


def _cell(ax, x, y, text, colour, framed):
    ax.add_patch(
        Rectangle(
            (x - 0.5, y - 0.5),
            1,
            1,
            facecolor=colour,
            edgecolor=INK if framed else "white",
            linewidth=2 if framed else 1,
            zorder=3 if framed else 2,
        )
    )
    ax.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=9 if len(text) < 4 else 8,
        zorder=5,
        fontweight="bold" if framed else "normal",
    )


def _frame(ax, n_columns, n_rows, row_names, xlabel, ylabel):
    ax.set(xlim=(-0.6, n_columns - 0.4), ylim=(n_rows - 0.4, -0.6), xlabel=xlabel, ylabel=ylabel)
    ax.set_yticks(range(n_rows), row_names, fontsize=9)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _draw_step(ax, sizes, skipped, i, j):
    """One step: Q at the left, K and V on top, the scores in the middle, O at the right. One unit is one position."""
    n_queries, n_keys, block_q, block_k = sizes
    ax.set(xlim=(-0.3 * n_keys, 1.24 * n_keys), ylim=(1.02 * n_queries, -0.42 * n_queries))
    ax.axis("off")

    def tile(x, y, width, height, state):
        colour, hatch = {
            "now": (COLOURS[1], None),
            "done": ("#9ecae9", ".."),
            "later": ("white", None),
            "skipped": (PALE, "xx"),
        }[state]
        ax.add_patch(
            Rectangle(
                (x, y),
                width,
                height,
                facecolor=colour,
                hatch=hatch,
                linewidth=0.8,
                edgecolor="#888888" if state == "skipped" else INK,
            )
        )

    def state(at, now):
        return "now" if at == now else "done" if at < now else "later"

    thick_x, thick_y = 0.14 * n_keys, 0.12 * n_queries
    for row in range(skipped.shape[0]):
        top, height = row * block_q, min(block_q, n_queries - row * block_q)
        tile(-0.2 * n_keys, top, thick_x, height, state(row, i))
        tile(1.06 * n_keys, top, thick_x, height, state(row, i))
        for column in range(skipped.shape[1]):
            tile(
                column * block_k,
                top,
                min(block_k, n_keys - column * block_k),
                height,
                "skipped" if skipped[row, column] else state((row, column), (i, j)),
            )
    for column in range(skipped.shape[1]):
        for top in (-0.36 * n_queries, -0.2 * n_queries):  # read again for every query tile: never "done"
            tile(
                column * block_k,
                top,
                min(block_k, n_keys - column * block_k),
                thick_y,
                "now" if column == j else "later",
            )
    for x, y, name in ((-0.13, -0.05, "Q"), (1.13, -0.05, "O"), (-0.05, -0.3, "K"), (-0.05, -0.14, "V")):
        ax.text(x * n_keys, y * n_queries, name, ha="center", va="center", fontweight="bold")


def _bytes(count):
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1024
    return f"{count:.3g} GiB"
