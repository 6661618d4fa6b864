"""Lecture 03: two ways to stretch RoPE."""

import math
from functools import partial

import numpy as np

from utils.judge.function import exercise

MODULE = "rotary"


# --- 3.5 -------------------------------------------------------------------------------------------------------------


@exercise("3.5", MODULE)
def ntk_frequencies(frequencies, factor):
    step = factor ** (1 / (len(frequencies) - 1))
    slower = []
    for i, frequency in enumerate(frequencies):
        slower.append(float(frequency) / math.prod([step] * i))
    return np.array(slower)


def clocks(n_pairs, base=10000.0):
    return base ** (-np.arange(n_pairs) / n_pairs)


@ntk_frequencies.property("two pairs: the fastest stays, the slowest is `factor` times slower")
def _(ask, rng):
    ask(np.array([1.0, 0.01]), 4.0)


@ntk_frequencies.property("three pairs: the middle one is sqrt(factor) times slower")
def _(ask, rng):
    ask(np.array([1.0, 0.1, 0.01]), 4.0)


@ntk_frequencies.property("eight pairs")
def _(ask, rng):
    ask(clocks(8), 8.0)


@ntk_frequencies.property("frequencies of another base, or of none")
def _(ask, rng):
    ask(clocks(5, base=500_000.0), 2.5)
    ask(np.array([0.7, 0.3, 0.2, 0.05]), 3.0)


for message, slowed in {
    "The slowest pair is not slow enough: it has passed n - 1 steps, so one step is the (n - 1)th root of factor.": (
        lambda f, s: f / s ** (np.arange(len(f)) / len(f))
    ),
    "Every pair is slowed: that is position interpolation. Pair 0 keeps its frequency.": lambda f, s: f / s,
    "The fastest pair is slowed most: it is the other way round.": lambda f, s: f / s ** np.linspace(1, 0, len(f)),
    "The pairs get faster: divide.": lambda f, s: f * s ** np.linspace(0, 1, len(f)),
    "The slowing grows by equal steps: it has to grow by equal factors.": lambda f, s: f / np.linspace(1, s, len(f)),
    "These are the factors only: the frequencies have to be divided by them.": (
        lambda f, s: s ** np.linspace(0, 1, len(f))
    ),
    "The frequencies are geometric, not the slowing: pair i is divided by factor^(i / (n - 1)).": (
        lambda f, s: np.geomspace(f[0], f[-1] / s, len(f))
    ),
    "The frequencies are made anew from a base of 10,000: use the ones that are given.": (
        lambda f, s: clocks(len(f)) / s ** np.linspace(0, 1, len(f))
    ),
}.items():
    ntk_frequencies.mistake(message)(lambda frequencies, factor, slowed=slowed: slowed(frequencies, factor))


# --- 3.6 -------------------------------------------------------------------------------------------------------------


@exercise("3.6", MODULE)
def keep_by_turns(frequencies, length, slow, fast):
    kept = []
    for frequency in frequencies:
        turns = length * float(frequency) / math.tau
        kept.append(0.0 if turns <= slow else 1.0 if turns >= fast else (turns - slow) / (fast - slow))
    return np.array(kept)


@keep_by_turns.property("0 for at most `slow` turns")
def _(ask, rng):
    ask(np.array([0.4, 0.3, 0.05, 0.001]), 64, 1.0, 4.0)


@keep_by_turns.property("1 for at least `fast` turns")
def _(ask, rng):
    ask(np.array([1.0, 0.5, 0.2]), 64, 1.0, 4.0)


@keep_by_turns.property("a straight line between")
def _(ask, rng):
    ask(np.array([0.35, 0.3, 0.2, 0.1]), 64, 1.0, 4.0)
    ask(clocks(8), 8192, 1.0, 32.0)


@keep_by_turns.property("the trained length counts")
def _(ask, rng):
    for length in (64, 1000, 8192):
        ask(clocks(8), length, 0.25, 8.0)
    ask(np.array([0.2]), 64, 0.5, 6.0)


def usual_keep(frequencies, length, slow, fast, *, turns=lambda f, n: n * f / math.tau, span=lambda a, b: b - a):
    """The ramp in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    return np.clip((turns(frequencies, length) - slow) / span(slow, fast), 0, 1)


for message, change in {
    "These are radians: a turn is 2 pi of them.": {"turns": lambda f, n: n * f},
    "This is the wavelength, tokens for a turn: the ramp is over turns within the length.": {
        "turns": lambda f, n: math.tau / f
    },
    "The length is left out: turns = length * frequency / (2 pi).": {"turns": lambda f, n: f / math.tau},
    "The ramp ends too late: divide by fast - slow, not by fast.": {"span": lambda a, b: b},
}.items():
    keep_by_turns.mistake(message)(partial(usual_keep, **change))


@keep_by_turns.mistake("The ramp is upside down: slow pairs keep 0, fast ones 1.")
def _(frequencies, length, slow, fast):
    return 1 - usual_keep(frequencies, length, slow, fast)


@keep_by_turns.mistake("The line goes on below 0 and above 1: cut it off.")
def _(frequencies, length, slow, fast):
    return (length * frequencies / math.tau - slow) / (fast - slow)


@keep_by_turns.mistake("There is no ramp: between slow and fast is a straight line.")
def _(frequencies, length, slow, fast):
    return (length * frequencies / math.tau >= fast).astype(float)
