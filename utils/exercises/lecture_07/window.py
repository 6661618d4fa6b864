"""Lecture 07: the sliding window."""

import numpy as np

from utils.judge.function import exercise

MODULE = "sparse"


@exercise("7A", MODULE, importance="essential")
def sliding_window_mask(n_queries, n_keys, window):
    """One pair at a time: the key's place among the last `window` up to the query's."""
    mask = np.zeros((n_queries, n_keys), bool)
    for i in range(n_queries):
        own = i + n_keys - n_queries
        for j in range(n_keys):
            mask[i, j] = own - window < j <= own
    return mask


@sliding_window_mask.property(
    "as many keys as the window says, the query's own among them",
    hint="How many keys should row 3 have, and which is the last of them?",
)
def _(ask, rng):
    ask(5, 5, 3)
    ask(6, 6, 2)


@sliding_window_mask.property("a window of 1 is the query itself", hint="Is the key at the query's own place counted?")
def _(ask, rng):
    ask(4, 4, 1)


@sliding_window_mask.property(
    "a window as long as the text, and longer, is the causal mask",
    hint="Which keys does query 0 see, when the window is longer than the text?",
)
def _(ask, rng):
    ask(4, 4, 4)
    ask(3, 3, 100)


@sliding_window_mask.property(
    "fewer queries than keys: the last query is at the last key",
    hint="At which position stands query 0 of 2, with 5 keys?",
)
def _(ask, rng):
    ask(2, 5, 3)
    ask(1, 7, 2)


@sliding_window_mask.property(
    "more queries than keys: the first queries see nothing", hint="Which positions have the first queries then?"
)
def _(ask, rng):
    ask(5, 2, 2)


@sliding_window_mask.property("many sizes, an empty one too", hint="Does a size of 0 or 1 fall out of your comparison?")
def _(ask, rng):
    for n_queries, n_keys, window in ((0, 3, 2), (3, 0, 2), (1, 1, 1), (37, 70, 19), (70, 37, 5), (130, 130, 64)):
        ask(n_queries, n_keys, window)


def banded(n_queries, n_keys, window, *, shift=None, wider=0, future=False, own=True, both=False):
    """The band in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    shift = n_keys - n_queries if shift is None else shift
    back = np.arange(n_queries)[:, None] + shift - np.arange(n_keys)
    mask = (back < window + wider) & ((back >= 0) | future)
    if both:
        mask = np.abs(back) < window
    return mask & ((back != 0) | own)


sliding_window_mask.mistakes_of(
    banded,
    {
        "The window is one key too wide: it counts the query itself.": {"wider": 1},
        "The window is one key too narrow: it counts the query itself.": {"wider": -1},
        "The future is not hidden: a key must not stand after the query.": {"future": True},
        "The window reaches to both sides: keys after the query are hidden.": {"both": True},
        "A query does not see its own key.": {"own": False},
        "The mask starts at the top left: with fewer queries than keys, the last query stands at the last key.": {
            "shift": 0
        },
    },
)


@sliding_window_mask.mistake("Longformer's convention: half of the window on each side. Here all of it lies behind.")
def _(n_queries, n_keys, window):
    back = np.arange(n_queries)[:, None] + n_keys - n_queries - np.arange(n_keys)
    return np.abs(back) <= window // 2


@sliding_window_mask.mistake("True and False are turned round: True means may attend.")
def _(n_queries, n_keys, window):
    return ~banded(n_queries, n_keys, window)
