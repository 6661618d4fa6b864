"""Lecture 03: ALiBi's slopes."""

import math
from functools import partial

import numpy as np

from utils.judge.function import exercise

MODULE = "rotary"


# --- 3H -------------------------------------------------------------------------------------------------------------


@exercise("3H", MODULE, formerly="3.1", importance="extra")
def alibi_slopes(n_heads):
    power = 1
    while 2 * power <= n_heads:
        power *= 2
    slopes = [0.5 ** (8 * (i + 1) / power) for i in range(power)]
    between = [0.5 ** (8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return np.array(slopes + between[: n_heads - power])


@alibi_slopes.property(
    "8 heads: 1/2, 1/4 and so on to 1/256",
    hint="What is the first exponent, and what the last?",
)
def _(ask, rng):
    ask(8)


@alibi_slopes.property(
    "other powers of two: from their own ratio to 1/256",
    hint="What is the ratio of neighbours with 4 heads?",
)
def _(ask, rng):
    for n_heads in (4, 1, 2, 16):
        ask(n_heads)


@alibi_slopes.property(
    "12 heads: those of 8, then every second of 16",
    hint="Which slopes of 16 heads are not among those of 8?",
)
def _(ask, rng):
    ask(12)


@alibi_slopes.property(
    "3, 5, 6, 20 and 71 heads",
    hint="Which is the largest power of two that is not above n, and how many slopes are missing?",
)
def _(ask, rng):
    for n_heads in (3, 5, 6, 15, 20, 71):
        ask(n_heads)


def powers(n_heads, first=1):
    """The slopes of a power of two; a mistake begins at 0."""
    return 2.0 ** (-8 * np.arange(first, n_heads + first) / n_heads)


def usual_slopes(n_heads, *, own=powers, missing=lambda slopes: slopes[::2], smaller=math.floor, order=list):
    """The slopes in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    power = 2 ** smaller(math.log2(n_heads))
    return np.array(order([*own(power), *missing(own(2 * power))][:n_heads]))


for message, changes in {
    "The first slope is the ratio itself, 2^(-8/n), not 1: count from 1.": {"own": partial(powers, first=0)},
    "The missing slopes are every second of the 2p, beginning with the first.": {"missing": lambda slopes: slopes},
    "The missing slopes begin with the first of the 2p, not with the second: the second ones are there already.": {
        "missing": lambda slopes: slopes[1::2]
    },
    "The slopes of the next larger power of two, cut off: begin with the largest power that is not above n_heads.": {
        "smaller": math.ceil
    },
    "These are sorted: first all of the smaller power of two, then the missing ones.": {
        "order": lambda slopes: sorted(slopes, reverse=True)
    },
}.items():
    alibi_slopes.mistake(message)(partial(usual_slopes, **changes))


@alibi_slopes.mistake(
    "2^(-8i/n) is meant for powers of two only: take those of the largest one, then the missing ones."
)
def _(n_heads):
    return powers(n_heads)


@alibi_slopes.mistake("A slope is positive: the minus stands where the bias is made.")
def _(n_heads):
    return -usual_slopes(n_heads)
