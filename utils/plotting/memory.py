"""Memory drawn from the real objects: caches, rings, pages and their tables, tiles, splits."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import ConnectionPatch, Rectangle

from utils.plotting.figure import COLOURS, INK, set_title
from utils.plotting.inputs import as_named, printable

MOST_CELLS = 64  # in a row
EMPTY = "#f2f2f2"


def memory(rows, links=(), title="", owners=None):
    """Rows of memory cells, one below the other. Returns the axes.

    rows: {name: cells}. cells (n,) or (lines, n): booleans (taken or free), whole numbers (whose cell it is; -1: nobody's), or
    strings (what stands in it; "": free). links: ((name, cell), (name, cell)) draws an arrow between two cells; a cell is a
    number, or (line, number). owners: {whole number: name} for the legend. Raises ValueError for other cells, more than
    64 in a line, and links to cells that are not there.
    """
    grids = {str(name): _cells(cells, str(name)) for name, cells in as_named(rows, "rows").items()}
    lines = sum(len(grid) for grid in grids.values())
    longest = max(grid.shape[1] for grid in grids.values())
    figure, ax = plt.subplots(figsize=(9, 0.42 * lines + 0.55 * len(grids) + 0.5))
    places, y = {}, 0.0
    for name, grid in grids.items():
        ax.text(-0.01 * longest - 0.2, y + len(grid) / 2, name, ha="right", va="center", fontweight="bold")
        for line, cells in enumerate(grid):
            for column, cell in enumerate(cells):
                _draw_cell(ax, column, y + line, cell, crowded=longest > 32)
        places[name] = (y, grid.shape)
        y += len(grid) + 0.9
    for index, link in enumerate(links):
        start, end = (_place(end, places, f"links[{index}]") for end in link)
        down = start[1] < end[1]
        ax.add_patch(
            ConnectionPatch(
                (start[0] + 0.5, start[1] + (0.85 if down else 0.15)),
                (end[0] + 0.5, end[1] + (0.0 if down else 1.0)),
                "data",
                arrowstyle="-|>",
                connectionstyle="arc3,rad=0.25",
                color="#555555",
                linewidth=1.1,
                shrinkA=0,
            )
        )
    for number, owner in (owners or {}).items():
        ax.add_patch(Rectangle((-9, -9), 0, 0, facecolor=_colour(number), edgecolor=INK, label=str(owner)))
    if owners:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=min(6, len(owners)))
    ax.set(xlim=(-0.05 * longest - 0.3, longest + 0.2), ylim=(y - 0.7, -0.2))
    ax.axis("off")
    set_title(figure, title)
    return ax


def _cells(cells, name):
    grid = np.asarray(cells.detach().cpu() if hasattr(cells, "detach") else cells)
    grid = grid[None] if grid.ndim == 1 else grid
    if grid.ndim != 2 or not grid.size or grid.dtype.kind not in "biuU":
        raise ValueError(
            f"rows[{name!r}] must be booleans, whole numbers or strings (n,) or (lines, n), "
            f"got {grid.dtype} of shape {grid.shape}"
        )
    if grid.shape[1] > MOST_CELLS:
        raise ValueError(f"rows[{name!r}] has {grid.shape[1]} cells in a line: at most {MOST_CELLS} can be seen")
    return grid


def _draw_cell(ax, x, y, cell, crowded):
    kind = cell.dtype.kind if hasattr(cell, "dtype") else "U"
    free = cell == "" if kind == "U" else cell < 0 if kind == "i" else kind == "b" and not cell
    colour = EMPTY if free else COLOURS[5] if kind in "bU" else _colour(int(cell))
    ax.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=INK if not free else "#bbbbbb", linewidth=0.8))
    words = printable(str(cell)) if kind == "U" and not free else str(cell) if kind in "iu" and not free else ""
    if words and not (crowded and len(words) > 1):
        white = colour in (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[6])
        size = 9 if len(words) < 4 else 7
        ax.text(x + 0.5, y + 0.5, words, ha="center", va="center", fontsize=size, color="white" if white else INK)


def _colour(number):
    return EMPTY if number < 0 else COLOURS[number % len(COLOURS)]


def _place(end, places, what):
    try:
        name, cell = end
        line, column = cell if isinstance(cell, tuple) else (0, cell)
        top, (n_lines, n_cells) = places[name]
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"{what} must join two of (name, cell), names among {', '.join(places)}, got {end!r}"
        ) from None
    if not (0 <= line < n_lines and 0 <= column < n_cells):
        raise ValueError(f"{what} points at cell {cell} of {name!r}, which has {n_lines} x {n_cells}")
    return column, top + line
