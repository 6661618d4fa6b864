"""Lecture 04: the bytes of a cache."""

import numpy as np

from utils.exercises.lecture_04.measures import each
from utils.judge.function import exercise

MODULE = "long_context"


# --- 4F -------------------------------------------------------------------------------------------------------------


@exercise("4F", MODULE, formerly="4.6", importance="useful")
def kv_cache_bytes(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    def size(tokens):
        kept = sum([tokens] * n_full) + sum([min(tokens, window)] * n_windowed)
        return kept * n_kv_heads * d_head * n_bytes * len(("key", "value"))

    return each(size, seq_len)


@kv_cache_bytes.property(
    "a key and a value for each token, layer and KV head",
    hint="What does one token leave in one layer, and how many numbers is that?",
)
def _(ask, rng):
    ask(np.array([1, 10]), 2, 4, 3)
    ask(np.array([131072]), 8, 128, 80)


@kv_cache_bytes.property(
    "one number for each seq_len, in its shape", hint="What does your function return for two rows of lengths?"
)
def _(ask, rng):
    ask(rng.integers(1, 500, size=(2, 3)), 2, 8, 2)


@kv_cache_bytes.property(
    "layers with a window keep at most `window` tokens",
    hint="How many tokens has a windowed layer after 1,000, with a window of 50?",
)
def _(ask, rng):
    ask(np.array([100, 1000]), 2, 4, 1, n_windowed=3, window=50)
    ask(np.array([100, 1000]), 2, 4, 0, n_windowed=2, window=300)


@kv_cache_bytes.property("and not more than there are", hint="np.minimum takes arrays.")
def _(ask, rng):
    ask(np.array([0, 3, 8]), 2, 4, 1, n_windowed=3, window=8)


@kv_cache_bytes.property("n_bytes is the size of a number", hint="Which argument says how large a number is?")
def _(ask, rng):
    ask(np.array([5, 6]), 2, 4, 3, n_bytes=4)
    ask(np.array([5, 6]), 2, 4, 3, n_bytes=1)


@kv_cache_bytes.property(
    "all at once: full layers, windows, a size of numbers, many lengths",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    ask(rng.integers(1, 600, size=(2, 1, 3)), 3, 16, 5, n_windowed=7, window=128, n_bytes=4)
    ask(rng.integers(1, 600, size=4), 1, 8, 2, n_windowed=1, window=300, n_bytes=1)


def cache_with(factor=2, kept=np.minimum, size=lambda n_bytes: n_bytes, whole=True):
    def answer(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
        tokens = (n_full if whole else 1) * seq_len + n_windowed * kept(seq_len, window)
        return factor * n_kv_heads * d_head * size(n_bytes) * tokens

    return answer


for message, answer in {
    "Only one of the two is counted: each token leaves a key and a value.": cache_with(factor=1),
    "A layer with a window keeps the window even before it is full: never more than seq_len.": cache_with(
        kept=lambda n, window: window + 0 * n
    ),
    "Layers with a window keep everything here: at most `window` tokens each.": cache_with(kept=lambda n, window: n),
    "n_bytes is ignored: a number need not have two bytes.": cache_with(size=lambda n_bytes: 2),
    "The layers are missing: each one keeps keys and values of its own.": cache_with(whole=False),
}.items():
    kv_cache_bytes.mistake(message)(answer)


@kv_cache_bytes.mistake("The windows share one window here: each layer with a window keeps its own.")
def _(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return 2 * n_kv_heads * d_head * n_bytes * (n_full * seq_len + np.minimum(seq_len, n_windowed * window))


@kv_cache_bytes.mistake("Full layers keep everything: the window is for the others.")
def _(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    kept = np.minimum(seq_len, window) if n_windowed else seq_len
    return 2 * n_kv_heads * d_head * n_bytes * (n_full + n_windowed) * kept


@kv_cache_bytes.mistake("The shape of seq_len is lost: one number for each of its elements.")
def _(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    return kv_cache_bytes.oracle(seq_len, n_kv_heads, d_head, n_full, n_windowed, window, n_bytes).ravel()
