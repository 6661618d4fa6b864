"""One style for every figure of the course, and the way a cell ends: show()."""

import io
import textwrap

import matplotlib
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import Markdown, display
from PIL import Image

from utils.plotting.fonts import families
from utils.plotting.words import words_of

# Okabe and Ito's colours for categories (jfly.uni-koeln.de/color), without their yellow: too pale on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, PALE = "#222222", "#d9d9d9"
DPI = 100


def style():
    """Set all that decides how a figure looks: readable at 100 dpi from the last row of a classroom.

    What the user's own matplotlibrc says is put aside first: the same figure is the same picture everywhere.
    """
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
        {
            "figure.figsize": (8, 4.2),
            "figure.dpi": DPI,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",  # also in dark notebooks
            "font.size": 11,
            "font.family": families(),
            "figure.titlesize": 13,
            "figure.titleweight": "bold",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS, linestyle=LINES),
            "lines.linewidth": 2,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "legend.framealpha": 0.85,
            "legend.handlelength": 3.2,  # a whole turn of the longest line style
            "legend.edgecolor": "none",
            "image.cmap": "viridis",
        }
    )


def set_title(figure, title):
    """The finding, top left, wrapped to the figure's width."""
    if title:
        width = int(figure.get_size_inches()[0] * 9)
        figure.suptitle(textwrap.fill(title, width), x=0.01, ha="left")


# JupyterLab gives a picture no alternative text. This hands it the caption, in a notebook that is trusted or was run.
CAPTION_AS_ALT = (
    "<script>(s => { const i = s.closest('.jp-OutputArea-child')?.previousElementSibling?.querySelector('img');"
    " if (i) i.alt = s.parentElement.querySelector('em').textContent; })(document.currentScript)</script>"
)


def show(description):
    """End a cell: show the open figures as one picture with `description`, one sentence, as alt text and caption.

    The picture is a PNG of 100 dpi and 64 colours; the same figure gives the same bytes. Its words (titles, axes, legends,
    ticks, labels) are kept in its metadata: what a small picture cannot tell apart, they can. Outside IPython the figures
    open in a window. Raises ValueError for an empty description, RuntimeError if no figure is open.
    """
    description = as_sentence(description)
    figures = [plt.figure(number) for number in plt.get_fignums()]
    if not figures:
        raise RuntimeError("show() found no open figure: draw one earlier in the same cell")
    if get_ipython() is None:
        plt.show()
    else:
        bundle = {"image/png": _png(figures), "text/plain": description}
        words = [word for figure in figures for word in words_of(figure)]
        display(bundle, raw=True, metadata={"image/png": {"alt": description, "words": words}})
        display(Markdown("*" + description.replace("*", r"\*") + "*\n\n" + CAPTION_AS_ALT))
    plt.close("all")


def as_sentence(description):
    """`description` on one line. Raises ValueError if it is empty or no string."""
    if not isinstance(description, str) or not description.strip():
        raise ValueError(f"description must be a sentence that says what the figure shows, got {description!r}")
    return " ".join(description.split())


def _png(figures):
    """The figures, one below the other, as the bytes of one PNG."""
    pictures = []
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
        pictures.append(Image.open(buffer).convert("RGB"))
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    buffer = io.BytesIO()
    # Maximum coverage keeps rare colours: the single brightest cell of a map must not turn into its neighbour's colour.
    few = sheet.quantize(64, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
