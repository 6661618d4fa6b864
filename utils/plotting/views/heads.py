"""The course's own view of attention heads: one piece of HTML with inline SVG and JavaScript, no library, no network.

It has a box that heads.js fills. The box is named by a hash of its content, so the same weights give the same bytes.
Where scripts do not run (GitHub, an untrusted notebook) the box keeps a sentence that says so.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from utils.plotting.inputs import as_heads, as_labels, told_apart

DIGITS = np.array(list("0123456789abcdefghijklmnopqrstuvwxyz"))
MOST_WEIGHTS = 200_000  # two bytes each: what still opens at once in a browser
SCRIPT = (Path(__file__).parent / "heads.js").read_text(encoding="utf-8").rstrip()

# Colours come from the page, so that dark themes stay readable; the orange and the blue are seen on black and on white.
STYLE = """
[data-head-viewer]{font:14px/1.4 system-ui,sans-serif;color:inherit;max-width:100%;overflow-x:auto}
[data-head-viewer] .bar label{margin-right:16px}
[data-head-viewer] select{font:inherit;color:inherit;background:transparent;border:1px solid #888;border-radius:3px}
[data-head-viewer] option{color:#111;background:#fff}
[data-head-viewer] p{margin:6px 0;min-height:1.4em}
[data-head-viewer] text{fill:currentColor;font:14px system-ui,sans-serif}
[data-head-viewer] text.dim{opacity:.65;font-style:italic}
[data-head-viewer] line{stroke:#3a9bdc}
[data-head-viewer] rect{fill:#e69f00}
[data-head-viewer] .token{cursor:pointer;outline:none}
[data-head-viewer] .token:focus-visible rect{stroke:currentColor;stroke-width:2}
"""


def head_viewer_html(weights, queries, keys=None):
    """The viewer as a string of HTML.

    weights (layers, heads, n_queries, n_keys) or (heads, ...), rows of probabilities or of zeros, kept to 3 decimals;
    queries, keys: one label each, keys are the queries by default. Raises ValueError for bad input or too many weights.
    """
    weights = as_heads(weights)
    if weights.size > MOST_WEIGHTS:
        raise ValueError(
            f"weights must hold at most {MOST_WEIGHTS} numbers for a viewer, got {weights.size}: "
            f"choose some layers, as in weights[[0, 3]]"
        )
    queries_shown = as_labels(queries, weights.shape[2], "tokens")
    keys_shown = as_labels(queries if keys is None else keys, weights.shape[3], "tokens" if keys is None else "keys")
    if queries_shown is None:
        raise ValueError("tokens must be a list of labels, got None")
    spec = {
        "shape": weights.shape,
        "queries": told_apart(queries_shown),
        "keys": told_apart(keys_shown),
        "weights": _packed(weights),
        "longest": max(8, *map(len, told_apart(queries_shown) + told_apart(keys_shown))),
    }
    spec["id"] = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12]
    return (
        f'<div data-head-viewer="{spec["id"]}">'
        f"Run this cell, or trust the notebook, for the interactive view; the picture below shows the same weights.</div>"
        f"<style>{STYLE}</style><script>{SCRIPT}({script_json(spec)})</script>"
    )


def script_json(value):
    """JSON that cannot end the script element that holds it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")


def _packed(weights):
    """Thousandths, two base-36 digits each: a third of the bytes of JSON numbers."""
    thousandths = np.rint(weights.clip(0, 1) * 1000).astype(int).ravel()
    return "".join(np.stack([DIGITS[thousandths // 36], DIGITS[thousandths % 36]], axis=1).ravel())
