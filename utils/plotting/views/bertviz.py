"""bertviz's views (Jesse Vig, github.com/jessevig/bertviz) as HTML that needs no network.

bertviz 1.4.1 fetches require.js, d3 and jQuery from a CDN and is blank without one. Here its own HTML is kept, but for
three things: the loading of libraries, the random id, and the page's colours. d3 and jQuery come from utils/plotting/views/vendor.
"""

import hashlib
import re
from pathlib import Path

from utils.plotting.inputs import as_heads, as_labels

VENDOR = Path(__file__).parent / "vendor"
WIDEST = 780  # pixels: what JupyterLab shows beside its file browser in a window of 1280
LIBRARIES = {"jquery": "jquery-3.7.1.min.js", "d3": "d3-5.7.0.min.js"}
carrier = None  # the id of the view that carries the libraries, 326 KB, for the others of its notebook


def bertviz_html(view, attention, tokens):
    """One view as a string of HTML; the first of a kernel's session carries the libraries, and so does its repetition.

    view: "head_view" or "model_view". attention (layers, heads, n_tokens, n_tokens), or a list of (1, heads, ...) as
    transformers returns it; tokens: one label each. Weights are rounded to 3 decimals. Raises ValueError for bad input.
    """
    global carrier
    import bertviz  # here, not on top: it imports transformers, which takes seconds
    import torch

    attention = as_heads(attention, "attention")
    if attention.shape[2] != attention.shape[3]:
        raise ValueError(f"attention must have as many queries as keys for bertviz, got shape {attention.shape}")
    tokens = as_labels(tokens, attention.shape[2], "tokens")
    if tokens is None:
        raise ValueError("tokens must be a list of labels, got None")
    mode = {"display_mode": "light"} if view == "model_view" else {}
    layers = [torch.from_numpy(layer.round(3))[None] for layer in attention]
    html = getattr(bertviz, view)(layers, tokens, html_action="return", **mode).data
    if view == "model_view":
        html = _replace_once(r"const DIV_WIDTH = 970;", f"const DIV_WIDTH = {WIDEST};", html)
    name, html = _without_loader(html)
    if carrier is None:
        carrier = name
    # bertviz writes black text: a white card keeps it readable on dark pages.
    return (
        _libraries() if name == carrier else ""
    ) + f'<div style="background:#fff;color:#000;padding:8px;overflow-x:auto">{html}</div>'


def _without_loader(html):
    """(id, html) with libraries taken from the page instead of a CDN, and an id from the content instead of chance."""
    html = _replace_once(r'<script src="https://cdnjs\.cloudflare\.com/[^"]*"></script>', "", html)
    html = _replace_once(r"require\.config\(\{.*?\}\s*\}\);", "", html)
    script_start = html.index("<script")
    start, script = html[:script_start], html[script_start:]
    random_id = re.search(r"bertviz-[0-9a-f]{32}", start).group()
    name = "bertviz-" + hashlib.sha256(html.replace(random_id, "").encode()).hexdigest()[:12]
    script = _replace_once(
        r"requirejs\(\['jquery', 'd3'\], function ?\(\$, d3\) \{",
        lambda _: (
            f"""\
(function (libraries) {{
    if (!libraries) {{
        document.getElementById("{name}").textContent = "Run the whole notebook, or trust it, for this view.";
        return;
    }}
    const $ = libraries.jquery, d3 = libraries.d3;
"""
        ),
        script,
    )
    script = _replace_once(r"\}\);\s*</script>\s*$", "})(window.bertvizLibraries);</script>", script)
    body, end = script[: -len("</script>")], "</script>"
    return name, (start + body.replace("</", "<\\/").replace("<!--", "<\\!--") + end).replace(random_id, name)


def _replace_once(pattern, replacement, text):
    text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
    if count != 1:
        raise RuntimeError(
            f"utils.plotting.views.bertviz knows bertviz 1.4.1, and this one differs: {pattern!r} occurs {count} times"
        )
    return text


def _libraries():
    """d3 and jQuery in one script, each given its own `module`, so that a page's module loader does not take them."""
    wrapped = ",\n".join(
        f"{name}: (function () {{ var module = {{exports: {{}}}}, exports = module.exports, define;\n"
        f"{(VENDOR / file).read_text(encoding='utf-8')}\nreturn module.exports; }})()"
        for name, file in LIBRARIES.items()
    )
    return f"<script>window.bertvizLibraries = {{{wrapped}}};</script>"
