"""The words of a figure, in a fixed order: titles, axes, legends, ticks and labels, as they are drawn."""


def words_of(figure):
    """A list of strings: what a reader can read in a matplotlib figure, axes after axes."""
    figure.canvas.draw()  # only then do the ticks know their labels
    found = [figure.get_suptitle(), *(text.get_text() for text in figure.texts if text is not figure._suptitle)]
    for legend in figure.legends:
        found += _legend(legend)
    for ax in figure.axes:
        found += [ax.get_title(place) for place in ("left", "center", "right")]
        if ax.axison:
            for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
                found += [axis.get_label_text(), *_ticks(axis, getattr(ax, f"get_{name}lim")())]
        if ax.get_legend() is not None:
            found += _legend(ax.get_legend())
        found += [text.get_text() for text in ax.texts if text.get_visible()]
    return [" ".join(word.split()) for word in found if word.strip()]


def _legend(legend):
    return [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


def _ticks(axis, limits):
    """The tick labels that lie in view, and the power of ten that stands beside them."""
    low, high = sorted(limits)
    margin = 1e-9 * (high - low)
    if not axis.get_visible():
        return []
    both = [(tick.get_loc(), tick.label1) for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    seen = [label.get_text() for at, label in both if low - margin <= at <= high + margin and label.get_visible()]
    return [*seen, axis.get_offset_text().get_text()]
