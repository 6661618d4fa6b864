"""What each rung of a ladder of kernels is bound by: three bars, and the longest is the time."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from utils.plotting.figure import COLOURS, INK, set_title
from utils.plotting.inputs import as_finite, as_named

PARTS = (
    ("bytes / bandwidth", COLOURS[0], ""),
    ("turns / clock", COLOURS[4], "//"),
    ("operations / peak", COLOURS[2], ".."),
)


def ladder(rungs, bandwidth, turns_per_second, peak, title=""):
    """Three bars a rung, logarithmic: the least seconds that its bytes, its shared-memory turns and its operations take.

    rungs: {name: (bytes, turns, operations)}, counted, 0 where there is none. bandwidth in bytes a second,
    turns_per_second in shared-memory turns of the whole chip (multiprocessors times clock), peak in operations a second.
    No rung can be faster than its longest bar, which carries its time. Returns {name: seconds of the longest}.
    Raises ValueError for negative or missing numbers.
    """
    for name, value in (("bandwidth", bandwidth), ("turns_per_second", turns_per_second), ("peak", peak)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    counts = {
        str(name): as_finite(row, f"rungs[{name!r}]", dims=(1,)) for name, row in as_named(rungs, "rungs").items()
    }
    for name, row in counts.items():
        if row.shape != (3,) or row.min() < 0 or row.max() <= 0:
            raise ValueError(f"rungs[{name!r}] must be (bytes, turns, operations), none negative, got {row.tolist()}")
    times = {name: row / (bandwidth, turns_per_second, peak) for name, row in counts.items()}
    floor = min(row[row > 0].min() for row in times.values()) / 3
    figure, ax = plt.subplots(figsize=(8.5, 1.2 + 0.62 * len(times)))
    tall = 0.26
    for index, row in enumerate(times.values()):
        for part, (label, colour, hatch) in enumerate(PARTS):
            if row[part] > 0:
                ax.barh(
                    index + (part - 1) * tall, row[part] - floor, tall, left=floor, color=colour, hatch=hatch,
                    edgecolor="white", label=label if index == 0 else None,
                )  # fmt: skip
        longest = int(np.argmax(row))
        seconds = EngFormatter(unit="s", places=1)(row[longest])
        ax.text(
            row[longest] * 1.06,
            index + (longest - 1) * tall,
            seconds,
            va="center",
            fontsize=9,
            fontweight="bold",
            color=INK,
        )
    ax.set(xscale="log", xlabel="least time (seconds)", xlim=(floor, max(row.max() for row in times.values()) * 2.5))
    ax.xaxis.set_major_formatter(EngFormatter(unit="s"))
    ax.set_yticks(range(len(times)), list(times))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) < len(PARTS):
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour, hatch=hatch) for _, colour, hatch in PARTS]
        labels = [label for label, _, _ in PARTS]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    set_title(figure, title)
    return {name: float(row.max()) for name, row in times.items()}
