"""A text whose tokens are coloured by a number each: the loss of a token, or the weight it received."""

import html
import textwrap
from itertools import takewhile

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import Rectangle

from utils.plotting.figure import COLOURS, INK, as_sentence, show
from utils.plotting.fonts import families
from utils.plotting.inputs import as_array

COLUMNS = 84  # characters in a line of the picture
SIZE, ADVANCE = 11, 0.60205  # of the font in points, and how much of that a letter is wide in DejaVu Sans Mono
FONTS = ["DejaVu Sans Mono", *families()]
STRONGEST = 0.85  # of the colour; the text on it stays readable on white and on black
RED, GREEN, BLUE = (round(255 * part) for part in to_rgb(COLOURS[1]))


def text(tokens, values, label, description, highest=None, title=""):
    """The tokens as running text, coloured by `values`: point at one to read its number. Then the same as a picture.

    tokens: strings, with their spaces and line breaks; values: one number from 0 for each, nan for a token without one;
    label: what the numbers are ("loss, nats"); highest: the value of the strongest colour, by default the largest.
    Ends its cell as show() does. Raises ValueError for bad input.
    """
    tokens, values, highest = _checked(tokens, values, highest)
    as_sentence(description)  # refuse before anything is shown
    draw_text(tokens, values, label, highest, title)
    if get_ipython() is not None:
        display(HTML(text_html(tokens, values, label, highest)))
    show(description)


def text_html(tokens, values, label, highest=None):
    """The coloured text as a string of HTML, without a script. Arguments as those of text()."""
    tokens, values, highest = _checked(tokens, values, highest)
    spans = []
    for token, value in zip(tokens, values):
        style, note = "", "no number"
        if not np.isnan(value):
            strength = STRONGEST * min(value / highest, 1)
            style, note = f"background:rgba({RED},{GREEN},{BLUE},{strength:.3f})", f"{value:.3f}"
        spans.append(f'<span title="{note}" style="{style}">{html.escape(_with_line_signs(token))}</span>')
    legend = html.escape(f"{label}: point at a token; the strongest colour is {highest:.3g} or more")
    return (
        '<div style="font:14px/1.9 system-ui,sans-serif;white-space:pre-wrap;max-width:60em">'
        f'{"".join(spans)}</div><div style="font:12px system-ui,sans-serif;opacity:.7">{legend}</div>'
    )


def draw_text(tokens, values, label, highest=None, title=""):
    """The coloured text as a figure, in lines of 84 characters. Arguments as those of text(). Returns the figure."""
    tokens, values, highest = _checked(tokens, values, highest)
    places, n_lines = _places(tokens)
    width, height = COLUMNS * ADVANCE * SIZE / 72, n_lines * 0.24  # inches
    still = PlaceHolderLayoutEngine(
        adjust_compatible=True, colorbar_gridspec=True
    )  # "none" would not outlive a savefig
    figure = plt.figure(figsize=(width, height + 1.1), layout=still)
    ax = figure.add_axes([0, 0.6 / (height + 1.1), 1, height / (height + 1.1)], xlim=(0, COLUMNS), ylim=(n_lines, 0))
    ax.axis("off")
    shades = LinearSegmentedColormap.from_list("shades", ["white", to_rgb(COLOURS[1])])
    colours = ScalarMappable(Normalize(0, highest / STRONGEST), shades)
    for pieces, value in zip(places, values):
        for line, column, piece in pieces:
            if not np.isnan(value):
                shade = colours.to_rgba(min(value, highest))
                ax.add_patch(Rectangle((column, line + 0.08), len(piece), 0.84, color=shade, linewidth=0))
            ax.text(column, line + 0.5, piece, size=SIZE, va="center", color=INK, family=FONTS, parse_math=False)
    below = figure.add_axes([0.01, 0.42 / (height + 1.1), 0.5, 0.12 / (height + 1.1)])
    figure.colorbar(colours, cax=below, label=label, orientation="horizontal")
    below.set_xlim(0, highest)
    if title:
        figure.suptitle(textwrap.fill(title, 75), x=0, y=1, ha="left", va="top")
    return figure


def _checked(tokens, values, highest):
    tokens, values = list(tokens), as_array(values, "values")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"tokens must be a list of strings with at least one, got {tokens!r:.60}")
    if values.shape != (len(tokens),):
        raise ValueError(f"values must be one number for each of the {len(tokens)} tokens, got shape {values.shape}")
    known = values[~np.isnan(values)]
    if not np.isfinite(known).all() or (known < 0).any():
        raise ValueError("values must be finite and not negative, or nan where there is none")
    if highest is None:
        highest = float(known.max()) if known.size and known.max() > 0 else 1.0
    if not highest > 0:
        raise ValueError(f"highest must be positive, got {highest}")
    return tokens, values, highest


def _with_line_signs(token):
    """A line break is a sign and a break, so that its colour can be seen."""
    return token.replace("\n", "⏎\n").replace("\t", "⇥")


def _places(tokens):
    """For each token its pieces (line, column, text), and the number of lines. A word that does not fit begins a line."""
    line = column = 0
    places = []
    for index, token in enumerate(tokens):
        pieces = []
        word = len(token) + sum(map(len, takewhile(lambda part: not part[:1].isspace(), tokens[index + 1 :])))
        if token[:1] == " " and column + word > COLUMNS >= word:
            line, column = line + 1, 0
        for part in _with_line_signs(token).splitlines(keepends=True):
            shown = part.rstrip("\n")
            if column and column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            for start in range(0, len(shown), COLUMNS):
                piece = shown[start : start + COLUMNS]
                if start:
                    line, column = line + 1, 0
                pieces.append((line, column, piece))
                column += len(piece)
            if part.endswith("\n"):
                line, column = line + 1, 0
        places.append(pieces)
    return places, line + (column > 0)
