"""Pictures of memory accesses and tiles, drawn from lists of what a kernel really touched. End the cell with
`plotting.show("One sentence.")`; the titles state what was found.

An access list is 32 byte offsets, one for each lane of a warp, in lane order; a lane that does not take part is -1.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from utils.plotting.figure import COLOURS, INK, PALE, set_title
from utils.plotting.walk import steps_of, summary, walk

__all__ = ["bank_map", "sectors_of", "tiles_over_time", "walk", "walk_picture", "warp_access", "wavefronts_of"]

WARP, WORD, SECTOR, LINE, BANKS = 32, 4, 32, 128, 32
BLUE, RED, SKY = COLOURS[0], COLOURS[1], COLOURS[5]


def sectors_of(offsets, size=WORD):
    """The 32-byte sectors that one request of a warp fetches: sorted sector numbers.

    offsets (lanes,): byte offsets, -1 for a lane that does not take part. size: bytes that each lane asks for.
    """
    offsets = _offsets(offsets, size)
    first, last = offsets // SECTOR, (offsets + size - 1) // SECTOR
    return np.unique(np.concatenate([first, last]))


def wavefronts_of(offsets, size=WORD):
    """How many wavefronts the 32 banks of shared memory need for one request; 1 is ideal for 4-byte accesses.

    A bank delivers one 4-byte word a wavefront, to any number of lanes. Accesses of 8 and 16 bytes are served in half and in
    quarter warps, each with wavefronts of its own.
    """
    return sum(max(len(words) for words in part.values()) for part in _banks(offsets, size))


def warp_access(offsets, size=WORD, title=None, ax=None):
    """Where a warp's 32 accesses fall in global memory, and what the memory has to fetch for them.

    offsets (lanes,): byte offsets into the array, -1 for a lane that does not take part. size: bytes for each lane.
    A row of the picture is one 128-byte line of memory, a cell is one 4-byte word. Lines that nobody touches are left
    out. Returns the axes.
    """
    taking_part = _offsets(offsets, size)
    sectors = sectors_of(offsets, size)
    asked = len(taking_part) * size
    used = _touched_words(taking_part, size)
    best = -(-len(used) * WORD // SECTOR)
    if title is None:
        title = f"{len(taking_part)} lanes ask for {asked} bytes: {len(sectors)} sectors fetched, {best} would do"
        if len(sectors) <= best:
            title = f"{len(taking_part)} lanes ask for {asked} bytes: {len(sectors)} sectors fetched, none wasted"
    lines = np.unique(sectors * SECTOR // LINE)
    row_of = {line: row for row, line in enumerate(lines)}
    if ax is None:
        ax = plt.subplots(figsize=(9, 1.9 + 0.24 * len(lines)))[1]
    for sector in sectors:
        line, place = divmod(int(sector) * SECTOR, LINE)
        ax.add_patch(Rectangle((place, row_of[line]), SECTOR, 1, facecolor=SKY, edgecolor="white", linewidth=1.5))
    for word, lanes in sorted(used.items()):
        line, place = divmod(word * WORD, LINE)
        ax.add_patch(Rectangle((place, row_of[line]), WORD, 1, facecolor=BLUE, edgecolor="white", linewidth=0.5))
        ax.text(
            place + WORD / 2, row_of[line] + 0.5, _short(lanes), color="white", fontsize=7, ha="center", va="center"
        )
    ax.set(
        xlim=(0, LINE),
        ylim=(len(lines), 0),
        xlabel="byte within a line of 128 bytes",
        ylabel="line at byte",
        xticks=range(0, LINE + 1, SECTOR),
        yticks=np.arange(len(lines)) + 0.5,
    )
    ax.set_yticklabels([f"{line * LINE:,}" for line in lines], fontsize=8)
    ax.grid(visible=False)
    _legend(ax, [(BLUE, "asked for, by this lane"), (SKY, "fetched with it")])
    set_title(ax.figure, title)
    return ax


def bank_map(offsets, size=WORD, title=None, ax=None):
    """Which banks of shared memory a warp's 32 accesses meet in; every cell above the first row is one more wavefront.

    offsets (lanes,): byte offsets into shared memory, -1 for a lane that does not take part. size: bytes for each lane.
    Lanes that want the same word share a cell: that is no conflict. Returns the axes.
    """
    parts = _banks(offsets, size)
    count = wavefronts_of(offsets, size)
    if title is None:
        busy = len(set().union(*parts))
        title = f"{len(_offsets(offsets, size))} lanes meet in {busy} of 32 banks: {count} wavefronts, {len(parts)} would do"
        if count == len(parts):
            title = f"No conflict: {busy} of 32 banks at work, " + (
                "one wavefront" if count == 1 else f"{count} wavefronts"
            )
    if ax is None:
        ax = plt.subplots(figsize=(9, 1.8 + 0.24 * count))[1]
    base = 0
    for part in parts:
        for bank, words in sorted(part.items()):
            for height, lanes in enumerate(words.values()):
                ax.add_patch(
                    Rectangle(
                        (bank - 0.5, base + height),
                        1,
                        1,
                        facecolor=RED if height else BLUE,
                        edgecolor="white",
                        linewidth=0.8,
                    )
                )
                ax.text(bank, base + height + 0.5, _short(lanes), color="white", fontsize=7, ha="center", va="center")
        base += max(len(words) for words in part.values())
    ax.set(
        xlim=(-0.5, BANKS - 0.5),
        ylim=(0, max(base, 2)),
        xlabel="bank (4-byte word modulo 32)",
        ylabel="wavefront",
        xticks=range(0, BANKS, 4),
    )
    ax.yaxis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.grid(visible=False)
    _legend(ax, [(BLUE, "first word of its bank (number: lane)"), (RED, "waits for another wavefront")])
    set_title(ax.figure, title)
    return ax


def tiles_over_time(loads, n_steps=None, title=None, ax=None):
    """Which tile each buffer of shared memory holds, step by step.

    loads: (step, buffer, tile) for every tile that a block loads, in any order: step a whole number, buffer a name such
    as "K", tile a number. A tile stays until its buffer is loaded again. n_steps: where the picture ends; by default one
    step after the last load. Returns the axes.
    """
    loads = sorted(((int(step), str(buffer), int(tile)) for step, buffer, tile in loads), key=lambda load: load[0])
    if not loads or loads[0][0] < 0:
        raise ValueError(f"loads must hold at least one (step, buffer, tile) with step >= 0, got {loads[:1]}")
    end = max(loads[-1][0] + 1, n_steps or 0)
    buffers = list(dict.fromkeys(buffer for _, buffer, _ in loads))
    if title is None:
        counts = ", ".join(f"{buffer} {sum(b == buffer for _, b, _ in loads)}" for buffer in buffers)
        title = f"Tiles loaded in {end} steps: {counts}"
    if ax is None:
        ax = plt.subplots(figsize=(9, 1.4 + 0.55 * len(buffers)))[1]
    colours = plt.get_cmap("viridis")(np.linspace(0.15, 0.85, max(tile for *_, tile in loads) + 1))
    for row, buffer in enumerate(buffers):
        mine = [(step, tile) for step, b, tile in loads if b == buffer]
        for (step, tile), until in zip(mine, [step for step, _ in mine[1:]] + [end]):
            ax.add_patch(Rectangle((step, row + 0.1), until - step, 0.8, facecolor=colours[tile], edgecolor="white"))
            ax.text(
                (step + until) / 2,
                row + 0.5,
                f"{tile}",
                color="white" if tile < 0.7 * len(colours) else INK,
                fontsize=9,
                ha="center",
                va="center",
            )
    ax.set(
        xlim=(0, end),
        ylim=(len(buffers), 0),
        xlabel="step of the block (number: tile held)",
        ylabel="buffer",
        yticks=np.arange(len(buffers)) + 0.5,
        yticklabels=buffers,
    )
    ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.grid(visible=False)
    set_title(ax.figure, title)
    return ax


def walk_picture(visits, title=None, ax=None):
    """The static twin of `walk`: at which step each tile of the score matrix is worked on, coloured by block.

    visits: (block, query_tile, key_tile) in the order in which each block makes them. Returns the axes.
    """
    steps = steps_of(visits)
    n_queries, n_keys = 1 + max(q for *_, q, _ in steps), 1 + max(k for *_, k in steps)
    if ax is None:
        ax = plt.subplots(figsize=(min(9, 2.2 + 0.6 * n_keys), 1.6 + 0.5 * n_queries))[1]
    ax.add_patch(Rectangle((-0.5, -0.5), n_keys, n_queries, facecolor="white", edgecolor=PALE, hatch=".."))
    for step, block, q, k in steps:
        ax.add_patch(Rectangle((k - 0.5, q - 0.5), 1, 1, facecolor=COLOURS[block % 6], edgecolor="white"))
        ax.text(k, q, f"{step}", color="white", ha="center", va="center", fontsize=9)
    ax.set(
        xlim=(-0.5, n_keys - 0.5),
        ylim=(n_queries - 0.5, -0.5),
        xlabel="tile of K and V (number: step)",
        ylabel="tile of Q (colour: block)",
        xticks=range(n_keys),
        yticks=range(n_queries),
        aspect="equal",
    )
    ax.grid(visible=False)
    set_title(ax.figure, title or summary(visits))
    return ax


def _offsets(offsets, size):
    values = np.asarray(offsets)
    if values.ndim != 1 or not 1 <= len(values) <= WARP or values.dtype.kind not in "iu":
        raise ValueError(f"offsets must be 1 to 32 whole numbers of bytes, got shape {values.shape} of {values.dtype}")
    if size not in (1, 2, 4, 8, 16):
        raise ValueError(f"size must be 1, 2, 4, 8 or 16 bytes for each lane, got {size!r}")
    values = values[values >= 0].astype(np.int64)
    if not len(values):
        raise ValueError("offsets must name at least one lane that takes part, got only -1")
    return values


def _touched_words(offsets, size):
    """{word number: lanes that asked for it}"""
    words = {}
    for lane, offset in enumerate(offsets):
        for word in range(int(offset) // WORD, int(offset + size - 1) // WORD + 1):
            words.setdefault(word, []).append(lane)
    return words


def _banks(offsets, size):
    """For each part of the warp that is served together: {bank: {word: lanes}}."""
    _offsets(offsets, size)
    lanes_at_once = min(WARP, WARP * WORD // size)
    parts = []
    for start in range(0, len(offsets), lanes_at_once):
        part = {}
        for lane, offset in enumerate(offsets[start : start + lanes_at_once], start):
            if offset >= 0:
                for word in range(int(offset) // WORD, int(offset + size - 1) // WORD + 1):
                    part.setdefault(word % BANKS, {}).setdefault(word, []).append(lane)
        if part:
            parts.append(part)
    return parts


def _short(lanes):
    return str(lanes[0]) if len(lanes) == 1 else f"×{len(lanes)}"


def _legend(ax, entries):
    ax.figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in entries],
        loc="outside lower left",
        ncols=len(entries),
    )
