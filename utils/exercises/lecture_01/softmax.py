"""Lecture 01: a softmax that survives.

The oracles go one row at a time in float64, with Python's own arithmetic where that is short: slow, and unlike the
lecture."""

from functools import partial

import numpy as np

from utils.exercises.arrays import INF, draw, or_one, weights_of
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "fundamentals"


@exercise("1A", MODULE, formerly="1.1", importance="essential")
def softmax(x, axis=-1):
    def row(scores):
        return weights_of([float(s) for s in scores], [True] * len(scores))

    return np.apply_along_axis(row, axis, x)


@softmax.property("each row becomes weights that sum to 1", hint="Which axis is summed, and what is divided by what?")
def _(ask, rng):
    ask(draw(rng, 2, 3))
    ask(draw(rng, 5, 17))


@softmax.property("axis chooses what sums to 1", hint="Which calls in your softmax take an axis?")
def _(ask, rng):
    ask(draw(rng, 2, 3), axis=0)
    ask(draw(rng, 2, 3, 4), axis=1)
    ask(draw(rng, 4))


@softmax.property(
    "scores of 1e4 and -1e4 do not overflow",
    hint="What does exp give for 1e4, and which number may be subtracted from a whole row?",
)
def _(ask, rng):
    ask(np.array([[1e4, 1e4 - 1, 0.0], [-1e4, -1e4 + 1, -1e4]]))
    ask(1e4 * draw(rng, 3, 9))
    late = np.zeros((2, 40))  # the largest score beyond the first lanes of any loop
    late[:, -1] = 1e4
    ask(late)


@softmax.property("a score of -inf gets the weight 0", hint="What is exp(-inf)?")
def _(ask, rng):
    ask(np.array([[0.5, -INF, 1.0], [-INF, -INF, 2.0]]))


@softmax.property(
    "a row of only -inf gives zeros, not nan", hint="What is -inf minus -inf, and what is the sum of such a row?"
)
def _(ask, rng):
    ask(np.array([[0.5, 1.0], [-INF, -INF]]))
    ask(np.array([[0.5, -INF], [1.0, -INF]]), axis=0)


@softmax.property(
    "the float type of x is kept",
    hint="In which float type is x when your lines begin, and which one has to come back?",
)
def _(ask, rng):
    for dtype in (np.float32, np.float16):
        result = ask(draw(rng, 2, 3).astype(dtype))
        if result.dtype != dtype:
            raise Failed(f"returned {result.dtype}, expected {dtype.__name__} for scores of {dtype.__name__}")
    ask(np.array([[0.5, 1.0], [-INF, -INF]], dtype=np.float16))


@softmax.property("all at once, the axis in the middle", hint="Do rows of very different size disturb each other?")
def _(ask, rng):
    sizes = np.array([1.0, 1e-3, 1e3]).reshape(3, 1, 1, 1)
    scores = (sizes * draw(rng, 3, 4, 1, 5)).astype(np.float32)
    scores[0, 1, 0, :2] = -INF
    scores[1, :, 0, 3] = -INF
    ask(scores, axis=1)


def highest(x, axis):
    return x.max(axis=axis, keepdims=True)


def summed(powers, axis):
    return powers.sum(axis=axis, keepdims=True)


def usual_softmax(x, axis=-1, *, top=highest, total=summed, divisor=or_one, guarded=True):
    """The softmax in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    shift = top(x, axis)
    powers = np.exp(x - (np.where(np.isneginf(shift), 0, shift) if guarded else shift))
    return powers / divisor(total(powers, axis))


def keeps_no_axis(reduce):
    return lambda x, axis: reduce(x, axis).squeeze(axis)


for message, changes in {
    "exp overflows: subtract the largest score of each row first.": [{"top": lambda x, axis: np.zeros_like(x)}],
    "The sum runs over the whole array: sum along the axis, with keepdims=True.": [
        {"total": lambda powers, axis: powers.sum()}
    ],
    "The largest score of the whole array is subtracted: take the maximum along the axis, with keepdims=True.": [
        {"top": lambda x, axis: x.max()}
    ],
    "What is subtracted is not the row's own maximum: of -10000 and -9999 that is -9999, and not 0 or 10000.": [
        {"top": lambda x, axis: np.maximum(highest(x, axis), 0)},
        {"top": lambda x, axis: highest(np.where(np.isinf(x), x, np.abs(x)), axis)},
    ],
    "The axis is ignored: it is always the last one.": [
        {"top": lambda x, axis: highest(x, -1), "total": lambda powers, axis: summed(powers, -1)}
    ],
    "keepdims=True keeps the axis that was summed, or whose maximum was taken.": [
        {"total": keeps_no_axis(summed)},
        {"top": keeps_no_axis(highest)},
    ],
    "Nothing may be added to the denominator; replace a zero sum by 1.": [
        {"divisor": lambda total, small=small: total + small} for small in (1e-6, 1e-7, 1e-8, 1e-9)
    ],
    "In float16 so small a number is 0, and 0/0 is nan: replace a zero sum by 1.": [
        {"divisor": lambda total: np.maximum(total, 1e-30)}
    ],
}.items():
    for change in changes:
        softmax.mistake(message)(partial(usual_softmax, **change))
        if "divisor" not in change:  # the same mistake without the guard, which may be still to come
            softmax.mistake(message)(partial(usual_softmax, **change, divisor=lambda total: total, guarded=False))

for change in {"guarded": False}, {"divisor": lambda total: total}:
    softmax.mistake("-inf minus -inf is nan, and so is 0/0: guard the row that has nothing to attend to.")(
        partial(usual_softmax, **change)
    )


@softmax.mistake("A row of only -inf became a uniform average: it has nothing to attend to, so its weights are 0.")
def _(x, axis=-1):
    return usual_softmax(np.where(np.isneginf(summed(x, axis)) & np.isneginf(highest(x, axis)), 0, x), axis)
