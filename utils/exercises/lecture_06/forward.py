"""Lecture 06: attention in tiles."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import INF, draw, or_one
from utils.exercises.lecture_06.rows import finite, seen, whole
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "flash"


# --- 6B --------------------------------------------------------------------------------------------------------------


@exercise("6B", MODULE, returns=("out", "lse"), formerly="6.3", importance="essential")
def tiled_attention(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return whole(q, k, v, seen(q.shape[-2], k.shape[-2], causal), scale)


def head(rng, n_queries, n_keys, d=4, d_v=3):
    return draw(rng, n_queries, d), draw(rng, n_keys, d), draw(rng, n_keys, d_v)


@tiled_attention.property(
    "one tile: the attention of lecture 01",
    hint="What are the three things that a row keeps, and what is done to them at the end?",
)
def _(ask, rng):
    ask(*head(rng, 2, 3))


@tiled_attention.property(
    "tiles of any size, the last ones smaller",
    hint="How many rows has the last tile, and what changes in a row when the maximum rises?",
)
def _(ask, rng):
    q, k, v = head(rng, 5, 7)
    for block_q, block_k in ((2, 7), (5, 3), (2, 3), (1, 1), (4, 9)):
        ask(q, k, v, block_q=block_q, block_k=block_k)


@tiled_attention.property(
    "causal: the diagonal crosses tiles", hint="Which key of the whole sequence is column c of a tile that begins at j?"
)
def _(ask, rng):
    q, k, v = head(rng, 6, 6)
    for block_q, block_k in ((6, 6), (2, 2), (4, 3)):
        ask(q, k, v, causal=True, scale=None, block_q=block_q, block_k=block_k)


@tiled_attention.property(
    "causal with fewer queries than keys: the last query sees every key",
    hint="Up to which key may query i look when there are fewer queries than keys?",
)
def _(ask, rng):
    ask(*head(rng, 2, 5), True, None, 1, 2)
    ask(*head(rng, 3, 7), True, None, 2, 3)


@tiled_attention.property(
    "a row with nothing to attend to: 0 and -inf, not nan", hint="What is -inf minus -inf, and what is 0 divided by 0?"
)
def _(ask, rng):
    ask(*head(rng, 5, 3), True, None, 2, 2)
    ask(*head(rng, 4, 1), True)


@tiled_attention.property(
    "all scores -200, 1e4 or -1e6", hint="Where does the running maximum start, and what do you subtract before exp?"
)
def _(ask, rng):
    q, k, v = head(rng, 3, 5)
    for size in (-200.0, 1e4, -1e6):
        ask(np.full_like(q, size / 4), np.ones_like(k), v, False, 1.0, 2, 2)


@tiled_attention.property(
    "a scale that is given is used, 0 too",
    hint="What is the scale multiplied with, and does your code ask whether it is true?",
)
def _(ask, rng):
    ask(*head(rng, 2, 3), scale=0.25)
    ask(*head(rng, 2, 3), scale=0.0)


@tiled_attention.property(
    "leading axes, and v wider than k", hint="What stands in front of the last two axes, and how wide is the output?"
)
def _(ask, rng):
    q, k, v = draw(rng, 2, 3, 4, 2), draw(rng, 2, 3, 5, 2), draw(rng, 2, 3, 5, 6)
    ask(q, k, v, True, None, 3, 2)


@tiled_attention.property(
    "float32 and float16 in: right to their precision, in the same type",
    hint="In which type is computed, and in which is returned?",
)
def _(ask, rng):
    for dtype in (np.float32, np.float16):
        out, _ = ask(*(a.astype(dtype) for a in head(rng, 3, 5)), True, None, 2, 2)
        if out.dtype != dtype:
            raise Failed(f"out: returned {out.dtype}, expected {dtype.__name__}")
    q, k, v = head(rng, 3, 5)
    q, k, v = (a.astype(np.float16) for a in (4 * q, k / 2e5, v))
    ask(q, k, v, False, 6e4, 2, 2)  # the scaled query is no number in half precision


@tiled_attention.property(
    "all at once: causal, a scale, leading axes, one of them 1, small tiles, rows of very different size, float32",
    hint="Is the maximum of a row taken for each row by itself? Which two of the options do not work together?",
)
def _(ask, rng):
    q, k, v = draw(rng, 2, 1, 5, 3), draw(rng, 2, 1, 8, 3), draw(rng, 2, 1, 8, 2)
    ask(np.array([[1e3], [1.0], [1e-3], [1.0], [300.0]]) * q, k, v, True, 0.7, 3, 2)
    ask(*(a.astype(np.float32) for a in (q, k, v)), True, 0.7, 3, 2)
    ask(*(a.astype(np.float32) for a in (q[..., 1:, :], k[..., :2, :], v[..., :2, :])), True, 1.1, 3, 2)


@tiled_attention.property(
    "no more scores at a time than a tile holds",
    hint="Are k and v cut too, and are m, ell and o updated after each tile?",
)
def _(ask, rng):
    k, v = draw(rng, 1500, 1), draw(rng, 1500, 1)  # one row of scores is larger than k and v
    for block_q, block_k in ((2, 16), (4, 3)):
        q, tile = draw(rng, 16, block_q, 1), 16 * block_q * block_k  # for all leading axes at once
        largest = ask.largest_exp(q, k, v, False, None, block_q, block_k)
        if largest > tile:
            raise Failed(
                f"{largest:,} scores go through exp at once, and a tile of {block_q} x {block_k} for 16 rows of axes "
                f"has {tile:,}"
            )


def usual_flash(
    q,
    k,
    v,
    causal=False,
    scale=None,
    block_q=64,
    block_k=64,
    *,
    start=-INF,
    default=lambda d: 1 / math.sqrt(d),
    rescale_l=True,
    rescale_o=True,
    shift=lambda n, m: m - n,
    guard=finite,
    finish=lambda o, total: o / or_one(total),
    lse_of=lambda m, total: m + np.log(total),
    given=lambda scale: scale,
    ragged=True,
    top=lambda s: s.max(axis=-1, keepdims=True),
):
    """Flash attention in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    scale = default(q.shape[-1]) if given(scale) is None else scale
    (n, n_keys), width = (q.shape[-2], k.shape[-2]), v.shape[-1]
    out, lse = np.zeros((*q.shape[:-1], width)), np.full(q.shape[:-1], -INF)
    for i in range(0, n, block_q):
        q_i = q[..., i : i + block_q, :].astype(float)
        m, total = np.full((*q_i.shape[:-1], 1), start), np.zeros((*q_i.shape[:-1], 1))
        o = np.zeros((*q_i.shape[:-1], width))
        for j in range(0, n_keys if ragged else max(block_k, n_keys - n_keys % block_k), block_k):
            s = q_i @ np.swapaxes(k[..., j : j + block_k, :], -1, -2) * scale
            rows, columns = np.indices(s.shape[-2:])
            s = np.where(causal & (columns + j > rows + i + shift(n, n_keys)), -INF, s)
            m_new = np.maximum(m, top(s))
            safe = guard(m_new)
            p, factor = np.exp(s - safe), np.exp(m - safe)
            total = total * (factor if rescale_l else 1) + p.sum(axis=-1, keepdims=True)
            o = o * (factor if rescale_o else 1) + p @ v[..., j : j + block_k, :]
            m = m_new
        out[..., i : i + block_q, :] = finish(o, total)
        lse[..., i : i + block_q] = lse_of(m, total)[..., 0]
    return out.astype(q.dtype), lse


for message, change in {
    "The output so far is not rescaled when the maximum rises: o, like ell, times exp(m - m_new).": {
        "rescale_o": False
    },
    "The sum so far is not rescaled when the maximum rises: ell times exp(m - m_new).": {"rescale_l": False},
    "The running maximum starts too high: scores of -200 vanish. Start at -inf.": {"start": 1e-30},
    "-inf minus -inf is nan: subtract 0 from a row that has seen nothing yet.": {"guard": lambda m: m},
    "0/0 is nan: where nothing was attended to, divide by 1.": {"finish": lambda o, total: o / total},
    "The output is not divided by the sum.": {"finish": lambda o, total: o},
    "The causal mask starts at the top left: query i may see the keys up to i + n_keys - n_queries.": {
        "shift": lambda n, m: 0
    },
    "The scores are scaled by d_head, not by sqrt(d_head).": {"default": lambda d: 1 / d},
    "The scores are not scaled: where no scale is given, times 1/sqrt(d_head).": {"default": lambda d: 1.0},
    "A scale of 0 is a scale too: ask whether it is None.": {"given": lambda scale: scale or None},
    "The maximum is missing in the log-sum-exp: it is m + log(ell).": {"lse_of": lambda m, total: np.log(total)},
    "The log of the sum is missing in the log-sum-exp: it is m + log(ell).": {"lse_of": lambda m, total: m},
    "The log-sum-exp is m + log(ell), not m + ell.": {"lse_of": lambda m, total: m + total},
    "The maximum is that of the whole tile: each row has its own, s.max(axis=-1, keepdims=True).": {
        "top": lambda s: s.max() + 0 * s[..., :1].clip(0, 0)
    },
    "The last tile of keys is left out when it is smaller than block_k.": {"ragged": False},
}.items():
    tiled_attention.mistake(message)(partial(usual_flash, **change))


@tiled_attention.mistake("The mask compares places inside the tile: add i to the rows and j to the columns.")
def _(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    i, j = np.indices((q.shape[-2], k.shape[-2]))
    allowed = (j % block_k <= i % block_q + k.shape[-2] - q.shape[-2]) | (not causal)
    return whole(q, k, v, allowed, scale)
