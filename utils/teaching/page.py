"""Markdown of the course as HTML that needs no network: tables, formulas by a copy of MathJax, one style, prints well.

What a page loads lies in a folder `assets` beside it, copied from the pinned packages of requirements-teaching.txt.
"""

import html
import importlib.util
import re
import shutil
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from utils.paths import ROOT

BUILD = ROOT / "build" / "teaching"
MATHJAX = "django-static-mathjax", "mathjax", "static/mathjax/es5/tex-svg-full.js"
REVEAL = "sphinx-revealjs", "sphinx_revealjs", "_static/revealjs"
REVEAL_FILES = "dist/reveal.js", "dist/reveal.css", "dist/reset.css", "plugin/notes/notes.js", "LICENSE"
# Everything else of MathJax would be fetched when asked for: the menu's explorer, other input formats.
MATHJAX_OPTIONS = """
window.MathJax = {
  tex: {inlineMath: [["\\\\(", "\\\\)"]], displayMath: [["\\\\[", "\\\\]"]]},
  options: {enableMenu: false, ignoreHtmlClass: "tex2jax_ignore", processHtmlClass: "math"},
  svg: {fontCache: "global"}
};
"""
STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; color: #222; background: #fff;
       max-width: 52rem; margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; break-after: avoid; } h2 { border-bottom: 2px solid #0072b2; margin-top: 2rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .8rem 0; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th { background: #eef3f8; } tr { break-inside: avoid; }
code { font: .92em/1.4 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; background: #f3f3f3; padding: 0 .2em; }
pre { background: #f6f6f6; padding: .6rem .8rem; overflow-x: auto; } pre code { background: none; padding: 0; }
img { max-width: 100%; height: auto; } a { color: #005a8c; }
.room { border-bottom: 1px solid #bbb; height: 2rem; }
mjx-container { overflow-x: auto; overflow-y: hidden; max-width: 100%; }
mjx-container[jax="SVG"]:not([display="true"]) { display: inline-block; vertical-align: middle; }
@media print { body { font-size: 11pt; margin: 0; max-width: none; } h2 { margin-top: 1.2rem; } .new-page { break-before: page; }
  pre { white-space: pre-wrap; } a { color: inherit; text-decoration: none; } }
"""


class Missing(Exception):
    """A package of requirements-teaching.txt that is not installed, in a sentence."""


def renderer():
    """A Markdown renderer whose formulas MathJax finds."""
    made = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    made.use(dollarmath_plugin, double_inline=True, renderer=_formula)
    made.add_render_rule("table_open", lambda *_: '<div class="table" tabindex="0"><table>')
    made.add_render_rule("table_close", lambda *_: "</table></div>")
    return made


def _formula(text, options):
    left, right = ("\\[", "\\]") if options["display_mode"] else ("\\(", "\\)")
    return f"{left}{html.escape(text.strip())}{right}"


def markdown(text):
    """The HTML of a piece of Markdown."""
    return renderer().render(text)


def inline(text):
    """The HTML of one line of Markdown, without a paragraph around it."""
    return renderer().renderInline(text)


def plain(text):
    """A line of Markdown without its marks, for titles."""
    return re.sub(r"[*`$]", "", text)


def document(title, body, style=STYLE, scripts=""):
    """A whole page. `body` is HTML."""
    return (
        f'<!doctype html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(plain(title))}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style>\n<script>{MATHJAX_OPTIONS}</script>\n"
        f'<script defer src="assets/{Path(MATHJAX[2]).name}"></script>\n</head>\n<body>\n{body}\n{scripts}</body>\n</html>\n'
    )


def write(name, text, folder=BUILD):
    """Write a page beside its assets. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    copy(MATHJAX, folder / "assets")
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def packaged(package, module, inner):
    """The path of a file or folder inside an installed package, which is not imported. Raises Missing."""
    spec = importlib.util.find_spec(module)
    places = [Path(place) / inner for place in (spec.submodule_search_locations if spec else ())]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise Missing(f"{package} is not installed: python -m pip install -r requirements-teaching.txt")
    return found


def copy(asset, folder, files=None):
    """Copy a file of a package, or some files of a folder of one, into a folder of assets."""
    folder.mkdir(parents=True, exist_ok=True)
    source = packaged(*asset)
    for path in [source / name for name in files] if files else [source]:
        target = folder / path.name
        if not target.exists() or target.stat().st_size != path.stat().st_size:
            shutil.copyfile(path, target)


def image(output):
    """The picture of a notebook's output, in the page itself, with its alternative text."""
    alternative = html.escape(output.metadata["image/png"]["alt"], quote=True)
    return f'<img alt="{alternative}" src="data:image/png;base64,{output["data"]["image/png"].replace(chr(10), "")}">'
