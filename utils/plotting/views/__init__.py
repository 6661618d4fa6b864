"""Interactive views, each followed by a static picture for places where scripts do not run."""

from IPython import get_ipython
from IPython.display import HTML, display

from utils.plotting.attention import heads as every_head
from utils.plotting.figure import as_sentence, show
from utils.plotting.views.bertviz import bertviz_html
from utils.plotting.views.heads import head_viewer_html

PLAIN = "All heads: rows are queries, columns are keys"  # the picture's title where a lecture gives none


def head_viewer(weights, tokens, description, keys=None, title=PLAIN):
    """Point at a token, choose layer and head, also by keyboard; then all heads as a picture with `description`.

    weights (layers, heads, n_queries, n_keys) or (heads, ...); tokens: labels of the queries, and of the keys unless
    `keys` is given; title: of the picture, what is to be seen. Ends its cell as show() does. ValueError for bad input.
    """
    html = head_viewer_html(weights, tokens, keys)
    _view(html, weights, tokens, tokens if keys is None else keys, description, title)


def bertviz_head_view(attention, tokens, description, title=PLAIN):
    """bertviz's head view, then all heads as a picture. attention (layers, heads, n_tokens, n_tokens), as rows of
    probabilities; choose layers before, as in attention[[0, 3]]: each costs bytes. Ends its cell as show() does.
    """
    _view(bertviz_html("head_view", attention, tokens), attention, tokens, tokens, description, title)


def bertviz_model_view(attention, tokens, description, title=PLAIN):
    """bertviz's model view (all heads of all layers at a glance), else as bertviz_head_view."""
    _view(bertviz_html("model_view", attention, tokens), attention, tokens, tokens, description, title)


def _view(html, weights, queries, keys, description, title):
    as_sentence(description)  # refuse before anything is shown
    every_head(weights, queries, keys, title=title)
    if get_ipython() is not None:
        display(HTML(html))
    show(description)
