"""Pictures of numbers that were measured: curves, bars, scaling laws and rooflines."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter

from utils.plotting.figure import COLOURS, INK, MARKERS, set_title
from utils.plotting.inputs import as_finite, as_named
from utils.plotting.series import looks


def curves(
    series, x=None, xlabel="", ylabel="", title="", threshold=None, threshold_name="threshold", log_y=False, ax=None
):
    """Lines. {label: y (n,) or (seeds, n)}: of several seeds the mean is drawn, and a band from the lowest to the highest.

    x (n,): shared by all, 0, 1, 2, ... by default. threshold: a horizontal line, and its name. Returns the axes.
    Raises ValueError for lengths that differ from x, values that are not finite, or not positive with log_y.
    """
    named = {
        str(label): np.atleast_2d(as_finite(y, f"series {label!r}", dims=(1, 2)))
        for label, y in as_named(series, "series").items()
    }
    x = None if x is None else as_finite(x, "x", dims=(1,))
    for label, y in named.items():
        if x is not None and y.shape[1] != len(x):
            raise ValueError(f"series {label!r} must have {len(x)} values, one for each x, got {y.shape[1]}")
        if log_y and y.min() <= 0:
            raise ValueError(f"series {label!r} must be positive for a logarithmic axis, got {y.min():.4g}")
    ax, drawn = _axes(ax, title), looks(list(named))
    for index, (label, y) in enumerate(named.items()):
        at = np.arange(y.shape[1]) if x is None else x
        look = _look(index, drawn[index], markers=y.shape[1] <= 12)
        ax.plot(at, y.mean(0), label=label, **look)
        if len(y) > 1:
            ax.fill_between(at, y.min(0), y.max(0), color=look["color"], alpha=0.18, linewidth=0)
    if threshold is not None:
        ax.axhline(
            threshold, color="#666666", linewidth=1.2, linestyle=(0, (2, 2)), label=f"{threshold_name} {threshold:g}"
        )
    if log_y:
        ax.set_yscale("log")
    seeds = {len(y) for y in named.values()} - {1}
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if x is not None and _are_few_powers_of_two(x):
        ax.set_xticks(x, [f"{value:g}" for value in x])
    elif x is None or (np.equal(x, np.round(x)).all() and ax.get_xscale() == "linear"):
        ax.xaxis.set_major_locator(plt.MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    band = f"band: range over {' or '.join(map(str, sorted(seeds)))} seeds" if seeds else None
    ax.legend(title=band, title_fontsize=9, alignment="left")
    return ax


def bars(values, ylabel="", title=""):
    """Bars with their numbers. {label: value, or list over seeds}: the bar is the mean, a dot each seed. Returns the axes."""
    named = {
        str(label): np.atleast_1d(as_finite(value, f"value {label!r}", dims=(0, 1)))
        for label, value in as_named(values, "values").items()
    }
    inches = min(9, max(5, 1.5 + 1.15 * len(named)))
    figure, ax = plt.subplots(figsize=(inches, 4.2))
    means = [v.mean() for v in named.values()]
    ax.bar(range(len(named)), means, color=COLOURS[0], width=0.65)
    for index, (seeds, mean) in enumerate(zip(named.values(), means, strict=True)):
        if len(seeds) > 1:
            spread = np.linspace(-0.18, 0.18, len(seeds))
            ax.plot(index + spread, seeds, "o", color="white", markeredgecolor=INK, markersize=5, linestyle="none")
        tip = max(seeds.max(), 0) if mean >= 0 else min(seeds.min(), 0)
        ax.annotate(
            f"{mean:.3g}",
            (index, tip),
            xytext=(0, 5 if mean >= 0 else -5),
            textcoords="offset points",
            ha="center",
            va="bottom" if mean >= 0 else "top",
            fontsize=10,
        )
    ax.axhline(0, color=INK, linewidth=0.8, linestyle="-")
    size = 10 if len(named) <= 6 else 9
    wrap = max(8, int((inches - 0.9) * 72 / len(named) / (0.62 * size)))  # a letter is 0.62 of its size wide
    ax.set_xticks(
        range(len(named)),
        [_wrapped(label, wrap) for label in named],
        fontsize=size,
    )
    ax.set_ylabel(ylabel)
    ax.margins(y=0.12)
    ax.grid(False, axis="x")
    ax.tick_params(axis="x", length=0)
    set_title(figure, title)
    return ax


def scaling(series, xlabel="", ylabel="", title=""):
    """Double logarithmic points with a fitted power law y = a x^slope. {label: (x (n,), y (n,))}, n >= 2, positive.

    Returns {label: slope}; the legend shows the slopes. Raises ValueError for values that are not positive.
    """
    figure, ax = plt.subplots()
    slopes, all_x = {}, set()
    drawn = looks(list(map(str, as_named(series, "series"))))
    for index, (label, pair) in enumerate(as_named(series, "series").items()):
        x, y = _pair(pair, f"series {label!r}")
        if len(x) < 2:
            raise ValueError(f"series {label!r} must have at least two points for a slope, got {len(x)}")
        slope, height = np.polyfit(np.log(x), np.log(y), 1)
        look = _look(index, drawn[index], markers=True)
        ax.plot(x, np.exp(height) * x**slope, color=look["color"], linestyle=look["linestyle"], linewidth=1.5)
        ax.plot(x, y, color=look["color"], marker=look["marker"], linestyle="none", markersize=7)
        ax.plot([], [], label=f"{label}: slope {slope:.2f}", **look)
        slopes[label] = float(slope)
        all_x |= set(x)
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    if len(all_x) <= 8:  # lengths are powers of two: name them, not 10^3
        ax.set_xticks(sorted(all_x), [f"{value:g}" for value in sorted(all_x)])
        ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.legend()
    set_title(figure, title)
    return slopes


def roofline(kernels, bandwidth, peak, title=""):
    """How fast a kernel could be. {label: (FLOP per byte moved, FLOP per second reached)}; bandwidth in bytes per second,
    peak in FLOP per second. Left of the ridge memory limits, right of it arithmetic. Returns the axes.
    """
    for name, value in (("bandwidth", bandwidth), ("peak", peak)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    points = {label: _pair(pair, f"kernel {label!r}") for label, pair in as_named(kernels, "kernels").items()}
    ridge = peak / bandwidth
    intensities = [float(x[0]) for x, _ in points.values()]
    low, high = min([*intensities, ridge]) / 4, max([*intensities, ridge]) * 6
    figure, ax = plt.subplots(figsize=(8, 4.6))
    ax.plot([low, ridge, high], [low * bandwidth, peak, peak], color=INK, linestyle="-")
    ax.axvline(ridge, color="#999999", linewidth=1, linestyle=":")
    for index, (label, (x, y)) in enumerate(points.items()):
        share = float(y[0]) / min(peak, float(x[0]) * bandwidth)
        ax.plot(
            x,
            y,
            marker=MARKERS[index % 7],
            color=COLOURS[index % 7],
            markersize=10,
            linestyle="none",
            label=f"{label}: {share:.0%} of its roof",
        )
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="arithmetic intensity (FLOP per byte moved)")
    ax.set_ylim(top=peak * 4)
    ax.set_ylabel("FLOP per second")
    ax.yaxis.set_major_formatter(EngFormatter())
    ax.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    ax.text(ridge, peak * 3.6, f"ridge: {ridge:.3g} FLOP/byte ", ha="right", va="top", color="#555555", fontsize=9)
    ax.text(high, peak * 1.5, f"peak {_short(peak)}FLOP/s ", ha="right", va="bottom", fontsize=10)
    ax.text(low, peak * 1.5, f" bandwidth {_short(bandwidth)}B/s", ha="left", va="bottom", fontsize=10)
    ax.legend(loc="lower right")
    set_title(figure, title)
    return ax


def _wrapped(label, width):
    """A label in lines of at most `width` letters: broken where it says so, else after commas, else between words."""
    lines = [line.replace(", ", ",\n") if len(line) > width else line for line in label.split("\n")]
    return "\n".join(textwrap.fill(line, width) for line in "\n".join(lines).split("\n"))


def _are_few_powers_of_two(x):
    """Whether x are such lengths as 32, 64, 128, far enough apart to be written below a linear axis."""
    powers = x.min() >= 1 and np.equal(np.log2(x), np.round(np.log2(x))).all()
    return powers and 2 < len(x) <= 8 and np.diff(np.sort(x)).min() > 0.05 * np.ptp(x)


def _short(value):
    """A number with its prefix and the digits it was given with: 3.35 T, 989 T."""
    digits, prefix = EngFormatter(places=6)(value).partition(" ")[::2]
    return f"{float(digits):g} {prefix}"


def _axes(ax, title):
    if ax is not None:
        ax.set_title(title)
        return ax
    figure, ax = plt.subplots()
    set_title(figure, title)
    return ax


def _look(index, drawn, markers):
    """Colour and line style as `drawn`, and the marker of series number `index`: never told apart by colour alone."""
    colour, line = drawn
    return {
        "color": colour,
        "linestyle": line,
        "marker": MARKERS[index % 7] if markers else None,
    }


def _pair(pair, name):
    """(x, y) as two positive arrays of one length."""
    try:
        x, y = pair
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (x, y), got {pair!r:.60}") from None
    x, y = (np.atleast_1d(as_finite(v, f"{axis} of {name}", dims=(0, 1))) for axis, v in (("x", x), ("y", y)))
    if len(x) != len(y):
        raise ValueError(f"{name} must have as many x as y, got {len(x)} and {len(y)}")
    if min(x.min(), y.min()) <= 0:
        raise ValueError(f"{name} must be positive for logarithmic axes, got {min(x.min(), y.min()):.4g}")
    return x, y
