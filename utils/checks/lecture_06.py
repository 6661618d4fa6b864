"""The exercises of lecture 06: the online softmax, merging, flash attention and its gradient, tiles, packed sequences, the
ring. Its kernels are in kernels_06.py.

The oracles see the whole row at once, one query after another in float64: what the lecture must not do.
"""

import math
from functools import partial

import numpy as np

from utils.checks import Failed, exercise
from utils.checks.kernels_06 import flash_shared, swizzle
from utils.checks.lecture_01 import draw, or_one

__all__ = ["flash_shared", "swizzle"]  # exercises too
MODULE = "flash"
INF = np.inf


def row(scores, values):
    """Output and log-sum-exp of one query: scores (n_keys,), values (n_keys, d_v); 0 and -inf without a key."""
    top = max(scores, default=-INF)
    if top == -INF:
        return np.zeros(values.shape[-1]), -INF
    powers = np.array([math.exp(s - top) for s in scores])
    total = math.fsum(powers)
    return powers @ values / total, top + math.log(total)


def whole(q, k, v, allowed, scale):
    """Attention of float64 arrays, row by row: (out, lse). allowed: booleans (n_queries, n_keys)."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])).astype(float) for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = np.zeros((*lead, q.shape[-2], v.shape[-1])), np.full((*lead, q.shape[-2]), -INF)
    for place in np.ndindex(*lse.shape):
        keys = np.flatnonzero(allowed[place[-1]])
        out[place], lse[place] = row(scale * (k[place[:-1]][keys] @ q[place]), v[place[:-1]][keys])
    return out, lse


def seen(n_queries, n_keys, causal, shift=None):
    """Booleans (n_queries, n_keys): who may see whom; aligned at the bottom right unless a shift is given."""
    shift = n_keys - n_queries if shift is None else shift
    i, j = np.indices((n_queries, n_keys))
    return (j <= i + shift) | (not causal)


def finite(m):
    return np.where(np.isneginf(m), 0, m)


# --- 6.1 -------------------------------------------------------------------------------------------------------------


@exercise("6.1", MODULE, returns=("m", "ell"))
def online_softmax(m, ell, scores):
    m_new, l_new = np.empty(np.shape(m)), np.empty(np.shape(m))
    for place in np.ndindex(*np.shape(m)):
        block = [float(s) for s in scores[place]]
        top = max([float(m[place]), *block])
        m_new[place] = top
        old = ell[place] * math.exp(m[place] - top) if m[place] > -INF else 0.0
        l_new[place] = 0.0 if top == -INF else old + math.fsum(math.exp(s - top) for s in block)
    return m_new, l_new


def begin(rows, dtype=float):
    return np.full(rows, -INF, dtype), np.zeros(rows, dtype)


@online_softmax.property("the first block: its maximum, and its sum of exp(score - maximum)")
def _(ask, rng):
    ask(*begin(2), draw(rng, 2, 3))


@online_softmax.property("a higher maximum: what was summed before is rescaled")
def _(ask, rng):
    ask(np.array([1.0, 2.0]), np.array([1.5, 1.2]), 3 + abs(draw(rng, 2, 3)))


@online_softmax.property("a lower block: the maximum stays")
def _(ask, rng):
    ask(np.array([5.0, 4.0]), np.array([1.5, 1.2]), draw(rng, 2, 3))


@online_softmax.property("leading axes, and a block of one score")
def _(ask, rng):
    ask(*begin((2, 3)), draw(rng, 2, 3, 5))
    ask(draw(rng, 2, 3), 1 + abs(draw(rng, 2, 3)), draw(rng, 2, 3, 1))


@online_softmax.property(
    "scores of -800 and of 1e4 neither vanish nor overflow", hint="The maximum starts at -inf, whatever the scores."
)
def _(ask, rng):
    ask(*begin(2), np.array([[-800.0, -801.0, -799.0], [1e4, 1e4 - 1, -1e4]]))
    ask(np.array([-900.0, -1e4]), np.array([1.5, 1.5]), np.array([[-800.0, -801.0], [1e4, -1e4]]))


@online_softmax.property("a score of -inf adds nothing")
def _(ask, rng):
    ask(np.array([1.0, 0.5]), np.array([1.5, 2.0]), np.array([[-INF, 0.5], [-INF, -INF]]))


@online_softmax.property("a row that has seen only -inf keeps -inf and 0, not nan")
def _(ask, rng):
    ask(*begin(2), np.array([[-INF, -INF], [0.5, -INF]]))


@online_softmax.property("the float type of the scores is kept")
def _(ask, rng):
    for part in ask(*begin(2, np.float32), draw(rng, 2, 3).astype(np.float32)):
        if part.dtype != np.float32:
            raise Failed(f"returned {part.dtype}, expected float32 for scores of float32")


@online_softmax.property(
    "a score of nan stays visible: ell is nan", hint="Guard the maximum of -inf alone; a fault before it must not look like 0."
)
def _(ask, rng):
    ell = ask.run(*begin(2), np.array([[0.5, np.nan], [0.5, 1.0]])).values[-1].array
    if ell is None or ell.shape != (2,) or not np.isnan(ell[0]):
        raise Failed("ell: expected nan for the row with a score of nan")


def usual_online(
    m,
    ell,
    scores,
    *,
    top=lambda m, block: np.maximum(m, block),
    factor=lambda m, m_new: np.exp(m - m_new),
    against=lambda m_new, block: m_new,
    axis=-1,
    guard=finite,
):
    """The online softmax in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    block = scores.max(axis=-1)
    m_new = top(m, block)
    safe = guard(m_new)
    powers = np.exp(scores - guard(against(m_new, block))[..., None])
    return m_new, ell * factor(m, safe) + powers.sum(axis=axis)


for message, change in {
    "The old sum was measured against the old maximum: multiply it by exp(m - m_new).": {"factor": lambda m, m_new: 1.0},
    "The factor is upside down: the old sum gets smaller, exp(m - m_new).": {
        "factor": lambda m, m_new: np.exp(np.where(np.isneginf(m), 0, m_new - m))
    },
    "The maximum is that of the block only: it must not fall.": {"top": lambda m, block: block},
    "The maximum never falls below 0: start at -inf, or low scores vanish.": {
        "top": lambda m, block: np.maximum(np.maximum(m, block), 1e-30)
    },
    "The block is summed against its own maximum: use the new one.": {"against": lambda m_new, block: block},
    "-inf minus -inf is nan: subtract 0 where the new maximum is -inf.": {"guard": lambda m: m},
    "The sum runs over all rows: sum along the last axis.": {"axis": None},
}.items():
    online_softmax.mistake(message)(partial(usual_online, **change))


# --- 6.2 -------------------------------------------------------------------------------------------------------------


@exercise("6.2", MODULE, returns=("out", "lse"))
def merge_by_lse(outs, lses):
    out, lse = np.zeros(np.shape(outs)[1:]), np.full(np.shape(lses)[1:], -INF)
    for place in np.ndindex(*lse.shape):
        parts = [float(part[place]) for part in lses]
        out[place], lse[place] = row(parts, np.array([part[place] for part in outs], dtype=float))
    return out, lse


def parts(rng, n_parts, *shape, d_v=2):
    return draw(rng, n_parts, *shape, d_v), draw(rng, n_parts, *shape)


@merge_by_lse.property("two parts, weighted by exp(lse)")
def _(ask, rng):
    ask(*parts(rng, 2, 2))


@merge_by_lse.property("one part, and five")
def _(ask, rng):
    ask(*parts(rng, 1, 3))
    ask(*parts(rng, 5, 3))


@merge_by_lse.property("leading axes, and a d_v that is no other size")
def _(ask, rng):
    ask(*parts(rng, 2, 3, 4, d_v=5))


@merge_by_lse.property("an empty part changes nothing")
def _(ask, rng):
    outs, lses = parts(rng, 3, 2)
    outs[1], lses[1] = 0.0, -INF
    ask(outs, lses)


@merge_by_lse.property("all parts empty: zeros and -inf, no nan")
def _(ask, rng):
    outs, lses = parts(rng, 2, 2)
    outs[:, 1], lses[:, 1] = 0.0, -INF
    ask(outs, lses)


@merge_by_lse.property("log-sum-exps of 1e4 and -1e4 do not overflow", hint="Subtract the largest before exp.")
def _(ask, rng):
    outs, _ = parts(rng, 2, 3)
    ask(outs, np.array([[1e4, -1e4, 1e4], [1e4 - 1, -1e4 + 1, -1e4]]))


@merge_by_lse.property("the float types are kept", hint="A float64 array in the arithmetic turns all into float64.")
def _(ask, rng):
    for part in ask(*(a.astype(np.float32) for a in parts(rng, 2, 3))):
        if part.dtype != np.float32:
            raise Failed(f"returned {part.dtype}, expected float32 for parts of float32")


def usual_merge(
    outs,
    lses,
    *,
    weight=np.exp,
    top=lambda lses: lses.max(axis=0),
    guard=finite,
    divisor=or_one,
    log=lambda top, total: top + np.log(total),
):
    """The merge in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    safe = guard(top(lses))
    weights = weight(lses - safe)
    total = weights.sum(axis=0)
    return (weights[..., None] * outs).sum(axis=0) / divisor(total)[..., None], log(safe, total)


for message, change in {
    "The log-sum-exp is a logarithm: exp it before it is a weight.": {"weight": lambda x: x},
    "The weights do not sum to 1: divide by their sum.": {"divisor": np.ones_like},
    "exp overflows: subtract the largest log-sum-exp first.": {"top": lambda lses: np.zeros(lses.shape[1:])},
    "-inf minus -inf is nan: subtract 0 where every part is empty.": {"guard": lambda m: m},
    "0/0 is nan: where every part is empty, divide by 1.": {"divisor": lambda total: total},
    "The log-sum-exp of the whole is not the largest of the parts.": {"log": lambda top, total: top},
}.items():
    merge_by_lse.mistake(message)(partial(usual_merge, **change))


@merge_by_lse.mistake("All parts count, not only two.")
def _(outs, lses):
    return usual_merge(outs[:2], lses[:2])


@merge_by_lse.mistake("Every part has the same weight here: weigh it by its share of the sum, exp(lse).")
def _(outs, lses):
    return outs.mean(axis=0), usual_merge(outs, lses)[1]


@merge_by_lse.mistake("Logarithms of sums do not add: the lse of the whole is log(sum of exp(lse)).")
def _(outs, lses):
    return usual_merge(outs, lses)[0], lses.sum(axis=0)


# --- 6.3 -------------------------------------------------------------------------------------------------------------


@exercise("6.3", MODULE, returns=("out", "lse"))
def flash_attention_numpy(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    return whole(q, k, v, seen(q.shape[-2], k.shape[-2], causal), scale)


def head(rng, n_queries, n_keys, d=4, d_v=3):
    return draw(rng, n_queries, d), draw(rng, n_keys, d), draw(rng, n_keys, d_v)


@flash_attention_numpy.property("one tile: the attention of lecture 01")
def _(ask, rng):
    ask(*head(rng, 2, 3))


@flash_attention_numpy.property("tiles of any size, the last ones smaller")
def _(ask, rng):
    q, k, v = head(rng, 5, 7)
    for block_q, block_k in ((2, 7), (5, 3), (2, 3), (1, 1), (4, 9)):
        ask(q, k, v, block_q=block_q, block_k=block_k)


@flash_attention_numpy.property("causal: the diagonal crosses tiles")
def _(ask, rng):
    q, k, v = head(rng, 6, 6)
    for block_q, block_k in ((6, 6), (2, 2), (4, 3)):
        ask(q, k, v, True, None, block_q, block_k)


@flash_attention_numpy.property("causal with fewer queries than keys: the last query sees every key")
def _(ask, rng):
    ask(*head(rng, 2, 5), True, None, 1, 2)
    ask(*head(rng, 3, 7), True, None, 2, 3)


@flash_attention_numpy.property("a row with nothing to attend to: 0 and -inf, not nan")
def _(ask, rng):
    ask(*head(rng, 5, 3), True, None, 2, 2)
    ask(*head(rng, 4, 1), True)


@flash_attention_numpy.property("all scores -200, 1e4 or -1e4")
def _(ask, rng):
    q, k, v = head(rng, 3, 5)
    for size in (-200.0, 1e4, -1e4):
        ask(np.full_like(q, size / 4), np.ones_like(k), v, False, 1.0, 2, 2)


@flash_attention_numpy.property("a scale that is given is used, 0 too")
def _(ask, rng):
    ask(*head(rng, 2, 3), scale=0.25)
    ask(*head(rng, 2, 3), scale=0.0)


@flash_attention_numpy.property("leading axes, and v wider than k")
def _(ask, rng):
    q, k, v = draw(rng, 2, 3, 4, 2), draw(rng, 2, 3, 5, 2), draw(rng, 2, 3, 5, 6)
    ask(q, k, v, True, None, 3, 2)


@flash_attention_numpy.property("float32 and float16 in: right to their precision, in the same type")
def _(ask, rng):
    for dtype in (np.float32, np.float16):
        out, _ = ask(*(a.astype(dtype) for a in head(rng, 3, 5)), True, None, 2, 2)
        if out.dtype != dtype:
            raise Failed(f"out: returned {out.dtype}, expected {dtype.__name__}")


@flash_attention_numpy.property(
    "no more scores at a time than a tile holds", hint="Cut k and v with block_k too, and update m, ell and o after each tile."
)
def _(ask, rng):
    q, k, v = draw(rng, 16, 2, 1), draw(rng, 1500, 1), draw(rng, 1500, 1)        # one row of scores is larger than k and v
    peak, plenty = ask.peak(q, k, v, False, None, 2, 16), 10 * k.nbytes
    ask(q, k, v, False, None, 2, 16)                                              # only its memory is at fault
    if peak > plenty:
        raise Failed(f"{peak // 1000:,} kB are held at once, {plenty // 1000:,} are plenty with tiles of 2 x 16 scores")


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
            m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
            safe = guard(m_new)
            p, factor = np.exp(s - safe), np.exp(m - safe)
            total = total * (factor if rescale_l else 1) + p.sum(axis=-1, keepdims=True)
            o = o * (factor if rescale_o else 1) + p @ v[..., j : j + block_k, :]
            m = m_new
        out[..., i : i + block_q, :] = finish(o, total)
        lse[..., i : i + block_q] = lse_of(m, total)[..., 0]
    return out.astype(q.dtype), lse


for message, change in {
    "The output so far is not rescaled when the maximum rises: o, like ell, times exp(m - m_new).": {"rescale_o": False},
    "The sum so far is not rescaled when the maximum rises: ell times exp(m - m_new).": {"rescale_l": False},
    "The running maximum starts too high: scores of -200 vanish. Start at -inf.": {"start": 1e-30},
    "-inf minus -inf is nan: subtract 0 from a row that has seen nothing yet.": {"guard": lambda m: m},
    "0/0 is nan: where nothing was attended to, divide by 1.": {"finish": lambda o, total: o / total},
    "The output is not divided by the sum.": {"finish": lambda o, total: o},
    "The causal mask starts at the top left: query i may see the keys up to i + n_keys - n_queries.": {
        "shift": lambda n, m: 0
    },
    "The scores are scaled by d_head, not by sqrt(d_head).": {"default": lambda d: 1 / d},
    "A scale of 0 is a scale too: ask whether it is None.": {"given": lambda scale: scale or None},
    "The maximum is missing in the log-sum-exp: it is m + log(ell).": {"lse_of": lambda m, total: np.log(total)},
    "The log of the sum is missing in the log-sum-exp: it is m + log(ell).": {"lse_of": lambda m, total: m},
    "The log-sum-exp is m + log(ell), not m + ell.": {"lse_of": lambda m, total: m + total},
    "The last tile of keys is left out when it is smaller than block_k.": {"ragged": False},
}.items():
    flash_attention_numpy.mistake(message)(partial(usual_flash, **change))


@flash_attention_numpy.mistake("The mask compares places inside the tile: add i to the rows and j to the columns.")
def _(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    i, j = np.indices((q.shape[-2], k.shape[-2]))
    allowed = (j % block_k <= i % block_q + k.shape[-2] - q.shape[-2]) | (not causal)
    return whole(q, k, v, allowed, scale)


# --- 6.4 -------------------------------------------------------------------------------------------------------------


@exercise("6.4", MODULE)
def causal_tiles(n_queries, n_keys, block_q, block_k):
    allowed = seen(n_queries, n_keys, True)
    counts = [0, 0, 0]
    for i in range(0, n_queries, block_q):
        for j in range(0, n_keys, block_k):
            tile = allowed[i : i + block_q, j : j + block_k]
            counts[0 if tile.all() else 1 if tile.any() else 2] += 1
    return np.array(counts)


@causal_tiles.property("square tiles that fit")
def _(ask, rng):
    ask(8, 8, 2, 2)
    ask(64, 64, 16, 16)


@causal_tiles.property("tiles of one pair, and one tile for all")
def _(ask, rng):
    ask(5, 7, 1, 1)
    ask(5, 5, 8, 8)


@causal_tiles.property("tiles that are not square")
def _(ask, rng):
    ask(12, 12, 4, 2)
    ask(12, 12, 2, 4)


@causal_tiles.property("smaller tiles at the ends")
def _(ask, rng):
    ask(7, 7, 3, 3)
    ask(10, 10, 4, 3)


@causal_tiles.property("fewer queries than keys")
def _(ask, rng):
    ask(4, 12, 2, 2)
    ask(3, 10, 2, 4)


@causal_tiles.property("more queries than keys")
def _(ask, rng):
    ask(12, 4, 2, 2)
    ask(9, 2, 4, 4)


def count_tiles(n_queries, n_keys, block_q, block_k, *, shift=None, ends=min, strict=0):
    counts = [0, 0, 0]
    shift = n_keys - n_queries if shift is None else shift
    for i in range(0, n_queries, block_q):
        for j in range(0, n_keys, block_k):
            last_i, last_j = ends(i + block_q, n_queries) - 1, ends(j + block_k, n_keys) - 1
            counts[0 if last_j <= i + shift - strict else 1 if j <= last_i + shift - strict else 2] += 1
    return np.array(counts)


for message, change in {
    "The diagonal starts at the top left here: query i may see the keys up to i + n_keys - n_queries.": {"shift": 0},
    "The last tiles are taken for whole ones: they end at n_queries and n_keys.": {"ends": lambda end, size: end},
    "A query sees its own position: use <=, not <.": {"strict": 1},
}.items():
    causal_tiles.mistake(message)(partial(count_tiles, **change))


@causal_tiles.mistake("Only whole tiles are counted: round the number of tiles up.")
def _(n_queries, n_keys, block_q, block_k):
    return causal_tiles.oracle(n_queries - n_queries % block_q, n_keys - n_keys % block_k, block_q, block_k)


@causal_tiles.mistake("The order is full, partial, skipped.")
def _(n_queries, n_keys, block_q, block_k):
    return causal_tiles.oracle(n_queries, n_keys, block_q, block_k)[::-1]


@causal_tiles.mistake("Only tiles on the diagonal of the grid are called partial: compare positions, not numbers of tiles.")
def _(n_queries, n_keys, block_q, block_k):
    tiles = [(i, j) for i in range(-(-n_queries // block_q)) for j in range(-(-n_keys // block_k))]
    return np.array([sum(j < i for i, j in tiles), sum(j == i for i, j in tiles), sum(j > i for i, j in tiles)])


# --- 6.5 -------------------------------------------------------------------------------------------------------------


@exercise("6.5", MODULE, returns=("d_q", "d_k", "d_v"))
def flash_attention_backward_numpy(q, k, v, out, lse, d_out, causal=False, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    allowed = seen(q.shape[-2], k.shape[-2], causal)
    d_q, d_k, d_v = (np.zeros(a.shape) for a in (q, k, v))
    for place in np.ndindex(*q.shape[:-1]):
        lead, i = place[:-1], place[-1]
        keys = np.flatnonzero(allowed[i])
        if not keys.size:
            continue
        own_k, own_v, gradient = k[lead][keys].astype(float), v[lead][keys].astype(float), d_out[place].astype(float)
        s = scale * own_k @ q[place].astype(float)
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        d_s = (np.diag(p) - np.outer(p, p)) @ (own_v @ gradient)                 # the Jacobian of the softmax, written out
        d_q[place] = scale * d_s @ own_k
        d_k[lead][keys] += scale * np.outer(d_s, q[place])
        d_v[lead][keys] += np.outer(p, gradient)
    return d_q, d_k, d_v


def backward_input(rng, *shape_q, n_keys, d_v=2, causal=False, scale=None, dtype=float):
    """Arguments of the backward pass: what the forward pass was given and what it returned."""
    *lead, n_queries, d = shape_q
    q, k, v, d_out = (draw(rng, *lead, n, w) for n, w in ((n_queries, d), (n_keys, d), (n_keys, d_v), (n_queries, d_v)))
    q, k, v, d_out = (a.astype(dtype) for a in (q, k, v, d_out))
    out, lse = flash_attention_numpy.oracle(q, k, v, causal, scale)
    return q, k, v, out.astype(dtype), lse.astype(dtype), d_out, causal, scale


@flash_attention_backward_numpy.property("one tile: dQ, dK and dV")
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, n_keys=3))


@flash_attention_backward_numpy.property("several tiles add up, the last ones smaller")
def _(ask, rng):
    ask(*backward_input(rng, 70, 2, n_keys=5))
    ask(*backward_input(rng, 5, 2, n_keys=130))
    ask(*backward_input(rng, 70, 2, n_keys=90))


@flash_attention_backward_numpy.property("causal, in one tile and in several")
def _(ask, rng):
    ask(*backward_input(rng, 4, 3, n_keys=4, causal=True))
    ask(*backward_input(rng, 70, 2, n_keys=90, causal=True))


@flash_attention_backward_numpy.property("a row with nothing to attend to has no gradient, and no nan")
def _(ask, rng):
    ask(*backward_input(rng, 5, 3, n_keys=2, causal=True))


@flash_attention_backward_numpy.property("a scale that is given is used")
def _(ask, rng):
    ask(*backward_input(rng, 3, 3, n_keys=4, scale=0.25))


@flash_attention_backward_numpy.property("leading axes, and v wider than k")
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 4, 2, n_keys=5, d_v=4, causal=True))


@flash_attention_backward_numpy.property("float32 in, the same gradients to 1e-5")
def _(ask, rng):
    ask(*backward_input(rng, 3, 3, n_keys=4, dtype=np.float32))


def usual_flash_backward(
    q,
    k,
    v,
    out,
    lse,
    d_out,
    causal=False,
    scale=None,
    *,
    masked=True,
    weights=lambda s, lse: np.exp(s - np.where(np.isneginf(lse), INF, lse)[..., None]),
    minus=lambda d_out, out: (d_out * out).sum(axis=-1, keepdims=True),
    scaled=lambda d_s, scale: d_s * scale,
    overwritten=(),
    block=64,
):
    """The backward pass in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right.

    overwritten: the gradients in which a tile overwrites what other tiles brought.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    d_q, d_k, d_v = (np.zeros_like(a) for a in (q, k, v))
    allowed = seen(q.shape[-2], k.shape[-2], causal and masked)
    for j in range(0, k.shape[-2], block):
        for i in range(0, q.shape[-2], block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            if not seen(q.shape[-2], k.shape[-2], causal)[rows, columns].any():
                continue
            q_i, k_j, v_j, d_i = q[..., rows, :], k[..., columns, :], v[..., columns, :], d_out[..., rows, :]
            s = np.where(allowed[rows, columns], scale * q_i @ np.swapaxes(k_j, -1, -2), -INF)
            p = weights(s, lse[..., rows])
            d_s = scaled(p * (d_i @ np.swapaxes(v_j, -1, -2) - minus(d_i, out[..., rows, :])), scale)
            for name, sums, place, part in (
                ("dQ", d_q, rows, d_s @ k_j),
                ("dK", d_k, columns, np.swapaxes(d_s, -1, -2) @ q_i),
                ("dV", d_v, columns, np.swapaxes(p, -1, -2) @ d_i),
            ):
                sums[..., place, :] = part + (0 if name in overwritten else sums[..., place, :])
    return d_q, d_k, d_v


for message, change in {
    "Other tiles add to the same rows: use +=, not =.": {"overwritten": ("dQ", "dK", "dV")},
    "Each tile adds to dQ: use +=, not =.": {"overwritten": ("dQ",)},
    "Each tile adds to dK: use +=, not =.": {"overwritten": ("dK",)},
    "Each tile adds to dV: use +=, not =.": {"overwritten": ("dV",)},
    "The mask is missing: weights of the future are 0, so mask the scores before exp.": {"masked": False},
    "D is missing: dS = P * (dP - D).": {"minus": lambda d_out, out: 0.0},
    "D is the sum over the row of dO * O, not of dO alone.": {
        "minus": lambda d_out, out: d_out.sum(axis=-1, keepdims=True)
    },
    "The scale is missing in dQ and dK.": {"scaled": lambda d_s, scale: d_s},
    "The scale is applied twice: once is enough, in dS.": {"scaled": lambda d_s, scale: d_s * scale**2},
    "The weights are not finished: P = exp(S - lse).": {"weights": lambda s, lse: np.exp(s)},
    "-inf minus -inf is nan: for an empty row subtract +inf, as the given code does.": {
        "weights": lambda s, lse: np.exp(s - lse[..., None])
    },
}.items():
    flash_attention_backward_numpy.mistake(message)(partial(usual_flash_backward, **change))


# --- 6.6 -------------------------------------------------------------------------------------------------------------


@exercise("6.6", MODULE, returns=("out", "lse"))
def flash_attention_varlen(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, packed(cu_queries, cu_keys, causal), scale)


def packed(cu_queries, cu_keys, causal):
    """Booleans (total_queries, total_keys): squares along the diagonal."""
    allowed = np.zeros((cu_queries[-1], cu_keys[-1]), bool)
    for (i, i_end), (j, j_end) in zip(zip(cu_queries, cu_queries[1:]), zip(cu_keys, cu_keys[1:])):
        allowed[i:i_end, j:j_end] = seen(i_end - i, j_end - j, causal)
    return allowed


def starts(*lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@flash_attention_varlen.property("two sequences do not see each other")
def _(ask, rng):
    ask(*head(rng, 5, 5), starts(2, 3), starts(2, 3))


@flash_attention_varlen.property("one sequence alone is flash attention")
def _(ask, rng):
    ask(*head(rng, 3, 4), starts(3), starts(4))
    ask(*head(rng, 3, 4), starts(3), starts(4), causal=True)


@flash_attention_varlen.property("other numbers of keys than of queries")
def _(ask, rng):
    ask(*head(rng, 5, 8), starts(2, 3), starts(6, 2))


@flash_attention_varlen.property("causal in each sequence: its last query sees its last key")
def _(ask, rng):
    ask(*head(rng, 6, 9), starts(2, 4), starts(5, 4), causal=True)


@flash_attention_varlen.property("a sequence without keys, and one without anything")
def _(ask, rng):
    ask(*head(rng, 5, 4), starts(2, 1, 0, 2), starts(3, 0, 0, 1))


@flash_attention_varlen.property("leading axes, and a scale")
def _(ask, rng):
    ask(draw(rng, 2, 5, 3), draw(rng, 2, 5, 3), draw(rng, 2, 5, 3), starts(1, 4), starts(1, 4), scale=0.3)


@flash_attention_varlen.mistake("The sequences see each other: attend to the keys of the own sequence only.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, seen(q.shape[-2], k.shape[-2], causal), scale)


@flash_attention_varlen.mistake("The keys are cut where the queries are: use cu_keys for k and v.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    cut = np.minimum(np.asarray(cu_queries), k.shape[-2])
    allowed = np.zeros((q.shape[-2], k.shape[-2]), bool)
    squares = packed(cut, cut, causal)
    allowed[: squares.shape[0], : squares.shape[1]] = squares
    return whole(q, k, v, allowed, scale)


@flash_attention_varlen.mistake("causal is forgotten: hand it on to flash attention.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, packed(cu_queries, cu_keys, False), scale)


@flash_attention_varlen.mistake("The scale is forgotten: hand it on to flash attention.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, packed(cu_queries, cu_keys, causal), None)


@flash_attention_varlen.mistake("The causal mask counts positions in the pack: each sequence begins at 0.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    allowed = packed(cu_queries, cu_keys, False) & seen(q.shape[-2], k.shape[-2], causal, shift=0)
    return whole(q, k, v, allowed, scale)


# --- 6.7 -------------------------------------------------------------------------------------------------------------


@exercise("6.7", MODULE)
def ring_attention_numpy(q, k, v, positions, causal=False, scale=None):
    return around(q, k, v, positions, causal, scale)


def around(q, k, v, positions, causal, scale, visits=lambda rank, owner, n_ranks: True):
    """The ring's output, each row at once over the blocks that visit."""
    n_ranks, n_local, _ = q.shape
    rank = np.repeat(np.arange(n_ranks), n_local)
    where = positions.ravel()
    allowed = (where[None] <= where[:, None]) | (not causal)
    allowed = allowed & np.array([[visits(r, o, n_ranks) for o in rank] for r in rank])
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    return whole(*flat, allowed, scale)[0].reshape(n_ranks, n_local, -1)


def ring(rng, n_ranks, n_local, d=3, d_v=2, striped=False):
    positions = np.arange(n_ranks * n_local)
    positions = positions.reshape(n_local, n_ranks).T if striped else positions.reshape(n_ranks, n_local)
    return [draw(rng, n_ranks, n_local, width) for width in (d, d, d_v)] + [np.ascontiguousarray(positions)]


@ring_attention_numpy.property("three ranks: each sees the keys of all")
def _(ask, rng):
    ask(*ring(rng, 3, 2))


@ring_attention_numpy.property("one rank, and five")
def _(ask, rng):
    ask(*ring(rng, 5, 2))
    ask(*ring(rng, 1, 3))


@ring_attention_numpy.property("causal, contiguous: some blocks are all in the future")
def _(ask, rng):
    ask(*ring(rng, 3, 2), causal=True)


@ring_attention_numpy.property("causal, striped: the mask follows the positions")
def _(ask, rng):
    ask(*ring(rng, 3, 2, striped=True), causal=True)


@ring_attention_numpy.property("a scale that is given is used")
def _(ask, rng):
    ask(*ring(rng, 2, 3), scale=0.25)


@ring_attention_numpy.property("scores of 1e4 do not overflow")
def _(ask, rng):
    q, k, v, positions = ring(rng, 2, 2)
    ask(1e3 * q, 10 * k, v, positions, scale=1.0)


for message, visits in {
    "Each rank sees its own block only: go on for n_ranks steps.": lambda rank, owner, n_ranks: rank == owner,
    "The last block never arrives: there are n_ranks steps, from 0.": lambda rank, owner, n_ranks: (
        owner != (rank + 1) % n_ranks or n_ranks == 1
    ),
    "The own block is left out: at step 0 a rank holds its own.": lambda rank, owner, n_ranks: rank != owner,
}.items():
    ring_attention_numpy.mistake(message)(
        lambda q, k, v, positions, causal=False, scale=None, visits=visits: around(
            q, k, v, positions, causal, scale, visits
        )
    )


@ring_attention_numpy.mistake("causal is forgotten: hand it on.")
def _(q, k, v, positions, causal=False, scale=None):
    return around(q, k, v, positions, False, scale)


@ring_attention_numpy.mistake("The mask follows the places in the shards, not the positions in the sequence.")
def _(q, k, v, positions, causal=False, scale=None):
    return around(q, k, v, np.arange(positions.size).reshape(positions.shape), causal, scale)


@ring_attention_numpy.mistake("The keys' positions belong to the block's owner: positions[(rank - step) % n_ranks].")
def _(q, k, v, positions, causal=False, scale=None):
    n_ranks, n_local = positions.shape
    allowed = (positions[:, None] <= positions[:, :, None]) | (not causal)       # the own positions, for every block
    allowed = np.tile(allowed, (1, 1, n_ranks)).reshape(n_ranks * n_local, -1)
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    return whole(*flat, allowed, scale)[0].reshape(n_ranks, n_local, -1)


@ring_attention_numpy.mistake("The blocks are averaged: merge them by their log-sum-exp.")
def _(q, k, v, positions, causal=False, scale=None):
    blocks = [
        around(q, k, v, positions, causal, scale, lambda rank, owner, n, step=step: owner == (rank - step) % n)
        for step in range(len(q))
    ]
    return np.mean(blocks, axis=0)


@ring_attention_numpy.mistake("The scale is forgotten: hand it on.")
def _(q, k, v, positions, causal=False, scale=None):
    return around(q, k, v, positions, causal, None)
