"""What flows where: a data-flow figure from a lecture's own arrays, left to right, the same look in all lectures."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path

from utils.plotting.figure import INK, PALE, set_title
from utils.plotting.inputs import as_array, as_named

LARGEST_DRAWN = 24  # rows or columns of an array whose numbers are drawn as colours
SMALLEST, LARGEST = 0.32, 0.95  # inches: the sides of an array's box
CARDS = 3  # boxes drawn behind one another for leading axes
COLUMN_GAP, ROW_GAP = 0.28, 0.62  # inches around an operation, and between rows
LETTER = 0.088  # inches: the width of a letter of an operation
WIDEST = 11.0  # inches


def flow(arrays, operations, title=""):
    """Boxes of arrays, joined by operations. Returns the axes.

    arrays: {name: array}, in the order in which those of one column stand below one another. Each box has the name above and the shape
    below; its sides grow with the last two axes, leading axes are cards behind it, and up to 24 rows and columns are
    shown in colours. operations: (sources, target, label), sources one name or a tuple: ("q", "k"), "s", "q kᵀ / √d".
    A column is one operation further than the furthest of its sources.
    Raises ValueError for a name that is not in arrays, a second operation into one array, and a circle.
    """
    boxes = {str(name): _Box(str(name), array) for name, array in as_named(arrays, "arrays").items()}
    steps = _steps(operations, boxes)
    columns = _columns(boxes, steps)
    lanes = _lanes(boxes, steps, columns)
    x, width = _across(lanes, boxes, steps)
    y, height = _down(lanes, boxes)
    figure = plt.figure(
        figsize=(min(width, WIDEST), height * min(1.0, WIDEST / width) + 0.5),
        layout=PlaceHolderLayoutEngine(True, True),
    )
    ax = figure.add_axes((0, 0, 1, height / (height + 0.5 * max(1.0, width / WIDEST))))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    size = 10 * min(1.0, WIDEST / width)
    for name, box in boxes.items():
        box.draw(ax, x[name], y[name], size)
    for step in steps:
        _draw_step(ax, step, boxes, lanes, x, y, size)
    set_title(figure, title)
    return ax


class _Box:
    """One array: its sides in inches, its shape in words, and what is drawn in it."""

    def __init__(self, name, array):
        values = as_array(array, f"arrays[{name!r}]")
        self.name, self.shape = name, values.shape
        rows, columns = (1, 1, *values.shape)[-2:]
        self.height, self.width = (_side(n) for n in (rows, columns))
        self.cards = min(CARDS, int(np.prod(values.shape[:-2], dtype=int)) or 1) if values.ndim > 2 else 1
        first = values.reshape(-1, rows, columns)[0] if values.size else values
        drawn = values.size and max(rows, columns) <= LARGEST_DRAWN
        self.picture = np.where(np.isfinite(first), first, np.nan) if drawn and np.ptp(first) else None

    def draw(self, ax, x, y, size):
        left, bottom = x - self.width / 2, y - self.height / 2
        for card in range(self.cards - 1, -1, -1):
            step = 0.05 * card
            ax.add_patch(
                Rectangle(
                    (left + step, bottom + step), self.width, self.height, facecolor=PALE, edgecolor=INK, linewidth=0.9
                )
            )
        if self.picture is not None:
            extent = (left, left + self.width, bottom, bottom + self.height)
            ax.imshow(self.picture, extent=extent, aspect="auto", interpolation="nearest", zorder=2)
            ax.add_patch(
                Rectangle(
                    (left, bottom), self.width, self.height, facecolor="none", edgecolor=INK, linewidth=0.9, zorder=3
                )
            )
        above = self.height / 2 + 0.05 * (self.cards - 1) + 0.04
        ax.text(x, y + above, self.name, ha="center", va="bottom", fontsize=size + 1, fontweight="bold")
        shape = " × ".join(map(str, self.shape)) or "a number"
        ax.text(x, bottom - 0.04, shape, ha="center", va="top", fontsize=size - 1.5, color="#555555")


def _side(count):
    """Inches for a side of `count` elements: one for one up to some eight, then ever slower."""
    return float(np.clip(0.16 * count**0.62 + 0.1, SMALLEST, LARGEST))


def _steps(operations, boxes):
    steps, targets = [], set()
    for index, operation in enumerate(operations):
        try:
            sources, target, label = operation
        except (TypeError, ValueError):
            raise ValueError(f"operations[{index}] must be (sources, target, label), got {operation!r:.60}") from None
        sources = (sources,) if isinstance(sources, str) else tuple(sources)
        unknown = [name for name in (*sources, target) if name not in boxes]
        if unknown:
            raise ValueError(f"operations[{index}] names {unknown[0]!r}, which is not among arrays: {', '.join(boxes)}")
        if target in targets:
            raise ValueError(
                f"operations[{index}] is the second one into {target!r}: give its result a name of its own"
            )
        targets.add(target)
        steps.append((sources, target, str(label)))
    return steps


def _columns(boxes, steps):
    """{name: column}: how many operations an array is away from the arrays that nothing makes."""
    made = {target: sources for sources, target, _ in steps}
    columns = {}

    def column(name, above=()):
        if name in above:
            raise ValueError(f"operations go in a circle through {name!r}")
        if name not in columns:
            columns[name] = max((column(s, (*above, name)) + 1 for s in made.get(name, ())), default=0)
        return columns[name]

    for name in boxes:
        column(name)
    last = {s: min(columns[t] for sources, t, _ in steps if s in sources) for sources, _, _ in steps for s in sources}
    for name in boxes:  # what nothing makes stands beside what needs it first
        if name not in made and name in last:
            columns[name] = last[name] - 1
    return columns


def _lanes(boxes, steps, columns):
    """The rows of each column, top to bottom: names, and (source, target, column) where an arrow only passes by."""
    lanes = [[name for name in boxes if columns[name] == c] for c in range(max(columns.values()) + 1)]
    for sources, target, _ in steps:
        for source in sources:
            for c in range(columns[source] + 1, columns[target]):
                lanes[c].append((source, target, c))
    made = {target: sources for sources, target, _ in steps}
    for before, lane in zip(lanes, lanes[1:]):  # as high as what it comes from, so that few arrows cross
        high = {entry: index / len(before) for index, entry in enumerate(before)}
        for entry in before:
            if isinstance(entry, tuple):
                high.setdefault(entry[0], high[entry])

        def height(entry, high=high):
            sources = (entry[0],) if isinstance(entry, tuple) else made.get(entry, ())
            known = [high[source] for source in sources if source in high]
            return sum(known) / len(known) if known else 1.0

        lane.sort(key=height)
    return lanes


def _across(lanes, boxes, steps):
    """Middles in inches of arrays, of operations ("into", target), half the width of columns; the figure's width."""
    x, at = {}, 0.25
    for c, lane in enumerate(lanes):
        labels = [label for _, target, label in steps if target in lane]
        if c:
            width = max((_label_width(label) for label in labels), default=0.4)
            for _, target, _ in steps:
                if target in lane:
                    x["into", target] = at + COLUMN_GAP + width / 2
            at += width + 2 * COLUMN_GAP
        names = [entry for entry in lane if entry in boxes]
        width = max((_box_width(boxes[name]) for name in names), default=0.3)
        for entry in lane:
            x[entry] = at + width / 2
            x["half", entry] = width / 2
        at += width
    return x, at + 0.25


def _label_width(label):
    return LETTER * max(map(len, label.split("\n"))) + 0.16


def _box_width(box):
    words = max(len(box.name) * 0.1, len(" × ".join(map(str, box.shape))) * 0.078)
    return max(box.width + 0.05 * (box.cards - 1), words)


def _down(lanes, boxes):
    """{entry: middle} in inches from the bottom, and the height of the figure."""

    def heights(lane):
        return [boxes[entry].height if entry in boxes else 0.1 for entry in lane]

    height = max(sum(heights(lane)) + sum(ROW_GAP if e in boxes else 0.3 for e in lane) for lane in lanes)
    y = {}
    for lane in lanes:
        gap = (height - sum(heights(lane))) / len(lane)
        top = height
        for entry, tall in zip(lane, heights(lane), strict=True):
            y[entry] = top - gap / 2 - tall / 2
            top -= gap + tall
    return y, height


def _draw_step(ax, step, boxes, lanes, x, y, size):
    sources, target, label = step
    middle, level = x["into", target], y[target]
    half = _label_width(label) / 2
    tall = 0.2 * (label.count("\n") + 1) + 0.06
    ax.add_patch(
        FancyBboxPatch(
            (middle - half + 0.05, level - tall / 2), 2 * half - 0.1, tall,
            boxstyle="round,pad=0.02,rounding_size=0.07", facecolor="white", edgecolor="#777777", linewidth=0.9, zorder=4,
        )
    )  # fmt: skip
    ax.text(middle, level, label, ha="center", va="center", fontsize=size - 0.5, zorder=5)
    end = x[target] - boxes[target].width / 2
    _arrow(ax, [(middle + half - 0.03, level), (end, level)], head=True)
    ways = sorted((_way(source, target, boxes, lanes, x, y) for source in sources), key=lambda way: -way[-1][1])
    for index, way in enumerate(ways):  # the highest enters highest
        enter = level + 0.07 * ((len(ways) - 1) / 2 - index)
        _arrow(ax, [*way, (middle - half + 0.03, enter)], head=False)


def _way(source, target, boxes, lanes, x, y):
    """The points of an arrow from an array to the column before its operation."""
    box = boxes[source]
    points = [(x[source] + box.width / 2 + 0.05 * (box.cards - 1), y[source])]
    for entry in (entry for lane in lanes for entry in lane if entry[:2] == (source, target)):
        points += [(x[entry] - x["half", entry], y[entry]), (x[entry] + x["half", entry], y[entry])]
    return points


def _arrow(ax, points, head):
    """A smooth line through points, flat where it starts and ends."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        bend = (x0 + x1) / 2
        vertices += [(bend, y0), (bend, y1), (x1, y1)]
        codes += [Path.CURVE4] * 3
    ax.annotate(
        "", points[-1], points[-2] if head else points[-1],
        arrowprops={"arrowstyle": "-|>" if head else "-", "color": "#555555", "shrinkA": 0, "shrinkB": 0, "lw": 1.1},
    )  # fmt: skip
    if not head:
        ax.add_patch(PathPatch(Path(vertices, codes), facecolor="none", edgecolor="#555555", lw=1.1, zorder=1))
