"""Lecture 06: the online softmax, and the merge of parts."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import INF, draw, or_one
from utils.exercises.lecture_06.rows import finite, row
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "flash"


# --- 6A --------------------------------------------------------------------------------------------------------------


@exercise("6A", MODULE, returns=("m", "ell"), formerly="6.1", importance="useful")
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


@online_softmax.property(
    "the first block: its maximum, and its sum of exp(score - maximum)",
    hint="Which axis does the maximum of a row run along, and the sum?",
)
def _(ask, rng):
    ask(*begin(2), draw(rng, 2, 3))


@online_softmax.property(
    "a higher maximum: what was summed before is rescaled",
    hint="Against which maximum was the old sum measured, and by which factor is it too large?",
)
def _(ask, rng):
    ask(np.array([1.0, 2.0]), np.array([1.5, 1.2]), 3 + abs(draw(rng, 2, 3)))


@online_softmax.property(
    "a lower block: the maximum stays", hint="What is the new maximum when the block is lower than what was seen?"
)
def _(ask, rng):
    ask(np.array([5.0, 4.0]), np.array([1.5, 1.2]), draw(rng, 2, 3))


@online_softmax.property(
    "leading axes, and a block of one score", hint="Which axis is the block's, whatever stands in front?"
)
def _(ask, rng):
    ask(*begin((2, 3)), draw(rng, 2, 3, 5))
    ask(draw(rng, 2, 3), 1 + abs(draw(rng, 2, 3)), draw(rng, 2, 3, 1))


@online_softmax.property(
    "scores of -800 and of 1e4 neither vanish nor overflow", hint="The maximum starts at -inf, whatever the scores."
)
def _(ask, rng):
    ask(*begin(2), np.array([[-800.0, -801.0, -799.0], [1e4, 1e4 - 1, -1e4]]))
    ask(np.array([-900.0, -1e4]), np.array([1.5, 1.5]), np.array([[-800.0, -801.0], [1e4, -1e4]]))


@online_softmax.property("a score of -inf adds nothing", hint="What is exp(-inf), and what does your sum do with it?")
def _(ask, rng):
    ask(np.array([1.0, 0.5]), np.array([1.5, 2.0]), np.array([[-INF, 0.5], [-INF, -INF]]))


@online_softmax.property(
    "a row that has seen only -inf keeps -inf and 0, not nan",
    hint="What is -inf minus -inf? Which finite number can be subtracted in its place?",
)
def _(ask, rng):
    ask(*begin(2), np.array([[-INF, -INF], [0.5, -INF]]))


@online_softmax.property(
    "the float type of the scores is kept",
    hint="In which type are m and ell when they come, and in which do they leave?",
)
def _(ask, rng):
    for part in ask(*begin(2, np.float32), draw(rng, 2, 3).astype(np.float32)):
        if part.dtype != np.float32:
            raise Failed(f"returned {part.dtype}, expected float32 for scores of float32")


@online_softmax.property(
    "a score of nan stays visible: ell is nan",
    hint="Guard the maximum of -inf alone; a fault before it must not look like 0.",
)
def _(ask, rng):
    ell = ask.run(*begin(2), np.array([[0.5, np.nan], [0.5, 1.0]])).values[-1].array
    if ell is None or ell.shape != (2,) or not np.isnan(ell[0]):
        raise Failed("ell: expected nan for the row with a score of nan")


@online_softmax.property(
    "all at once: leading axes, one of them 1, rows of very different size, -inf; m in double, scores in single",
    hint="In which float type do m and ell come back, and do rows of very different size disturb each other?",
)
def _(ask, rng):
    m, ell = begin((3, 1, 2))
    for _ in range(3):
        scores = np.array([1e4, 1.0, 1e-3])[:, None, None, None] * draw(rng, 3, 1, 2, 40)
        scores[1, 0, 0], scores[0, 0, 1, 5:] = -INF, -INF
        m, ell = ask(m, ell, scores)
    ask(*begin((3, 1), np.float32), scores[:, :, 1].astype(np.float32))
    for part in ask(*begin((2, 3)), draw(rng, 2, 3, 5).astype(np.float32)):
        if part.dtype != np.float32:
            raise Failed(f"returned {part.dtype}, expected float32 for scores of float32, whatever the type of m")


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
    "The old sum was measured against the old maximum: multiply it by exp(m - m_new).": {
        "factor": lambda m, m_new: 1.0
    },
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


# --- 6G --------------------------------------------------------------------------------------------------------------


@exercise("6G", MODULE, returns=("out", "lse"), formerly="6.2", importance="useful")
def merge_by_lse(outs, lses):
    out, lse = np.zeros(np.shape(outs)[1:]), np.full(np.shape(lses)[1:], -INF)
    for place in np.ndindex(*lse.shape):
        parts = [float(part[place]) for part in lses]
        out[place], lse[place] = row(parts, np.array([part[place] for part in outs], dtype=float))
    return out, lse


def parts(rng, n_parts, *shape, d_v=2):
    return draw(rng, n_parts, *shape, d_v), draw(rng, n_parts, *shape)


@merge_by_lse.property(
    "two parts, weighted by exp(lse)", hint="If the log-sum-exps are scores, what are the weights of the outputs?"
)
def _(ask, rng):
    ask(*parts(rng, 2, 2))


@merge_by_lse.property("one part, and five", hint="Over which axis do you add?")
def _(ask, rng):
    ask(*parts(rng, 1, 3))
    ask(*parts(rng, 5, 3))


@merge_by_lse.property(
    "leading axes, and a d_v that is no other size",
    hint="Which axis is missing in the weights so that they broadcast over d_v?",
)
def _(ask, rng):
    ask(*parts(rng, 2, 3, 4, d_v=5))


@merge_by_lse.property("an empty part changes nothing", hint="What is the weight of a part whose log-sum-exp is -inf?")
def _(ask, rng):
    outs, lses = parts(rng, 3, 2)
    outs[1], lses[1] = 0.0, -INF
    ask(outs, lses)


@merge_by_lse.property(
    "all parts empty: zeros and -inf, no nan",
    hint="What is subtracted when the largest is -inf, and what is divided by?",
)
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


@merge_by_lse.property(
    "all at once: leading axes, one of them 1, empty parts, large log-sum-exps, float32",
    hint="Do rows of very different size disturb each other?",
)
def _(ask, rng):
    outs, lses = parts(rng, 4, 3, 1, 5, d_v=1)
    lses = np.array([1e4, 1.0, 1e-3])[:, None, None] * lses
    outs[1, 0], lses[1, 0] = 0.0, -INF
    outs[:, 2, 0, 3], lses[:, 2, 0, 3] = 0.0, -INF
    ask(outs, lses)
    lses = np.clip(lses, -9, 9, where=np.isfinite(lses), out=lses.copy())  # single precision knows these to six digits
    ask(outs.astype(np.float32), lses.astype(np.float32))


@merge_by_lse.property(
    "lists and tuples of arrays, as the lecture has them", hint="np.asarray makes one array of a list of arrays."
)
def _(ask, rng):
    outs, lses = parts(rng, 3, 2)
    ask(list(outs), list(lses))
    ask(tuple(outs), tuple(lses))


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
