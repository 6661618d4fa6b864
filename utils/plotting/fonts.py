"""The fonts of every figure: the same on every machine, because both come with packages that the course pins."""

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from matplotlib import font_manager, ft2font

LATIN = "DejaVu Sans"  # comes with matplotlib
JAPANESE = "IPAexGothic"  # comes with matplotlib-fontja


@cache
def families():
    """The names to put into font.family: a letter that the first font lacks is taken from the second."""
    package = find_spec("matplotlib_fontja")  # found, not imported: its import would change matplotlib's settings
    if package is None:
        return [LATIN]
    fonts = font_manager.fontManager
    fonts.addfont(Path(package.origin).parent / "fonts" / "ipaexg.ttf")
    fonts.ttflist.append(
        replace(fonts.ttflist[-1], weight="bold")
    )  # it has no bold: in a title matplotlib would complain
    return [LATIN, JAPANESE]


@cache
def has_glyph(character):
    """Whether one of the fonts can draw a character."""
    return any(font.get_char_index(ord(character)) for font in _fonts())


@cache
def _fonts():
    paths = [font_manager.findfont(name, fallback_to_default=False) for name in families()]
    return [ft2font.FT2Font(str(path)) for path in paths]
