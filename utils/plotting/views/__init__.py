"""Interactive views, each followed by a static picture for places where scripts do not run."""

from IPython import get_ipython
from IPython.display import HTML, display

from utils.plotting.attention import heads as every_head
from utils.plotting.figure import as_sentence, show
from utils.plotting.views.bertviz import bertviz_html
from utils.plotting.views.heads import head_viewer_html


def head_viewer(weights, tokens, description, keys=None):
    """Point at a token, choose layer and head, also by keyboard; then all heads as a picture with `description`.

    weights (layers, heads, n_queries, n_keys) or (heads, ...); tokens: labels of the queries, and of the keys unless
    `keys` is given. Ends its cell as show() does. Raises ValueError for bad input.
    """
    html = head_viewer_html(weights, tokens, keys)
    _view(html, weights, tokens, tokens if keys is None else keys, description)


def bertviz_head_view(attention, tokens, description):
    """bertviz's head view, then all heads as a picture. attention (layers, heads, n_tokens, n_tokens), as rows of
    probabilities; choose layers before, as in attention[[0, 3]]: each costs bytes. Ends its cell as show() does.
    """
    _view(bertviz_html("head_view", attention, tokens), attention, tokens, tokens, description)


def bertviz_model_view(attention, tokens, description):
    """bertviz's model view (all heads of all layers at a glance), else as bertviz_head_view."""
    _view(bertviz_html("model_view", attention, tokens), attention, tokens, tokens, description)


def _view(html, weights, queries, keys, description):
    as_sentence(description)  # refuse before anything is shown
    every_head(weights, queries, keys, title="All heads: rows are queries, columns are keys")
    if get_ipython() is not None:
        display(HTML(html))
    show(description)
