"""Lecture 03: how much of its speed each pair keeps."""

import math
from functools import partial

import numpy as np

from utils.judge.function import exercise

MODULE = "rotary"


def clocks(n_pairs, base=10000.0):
    return base ** (-np.arange(n_pairs) / n_pairs)


# --- 3F -------------------------------------------------------------------------------------------------------------


@exercise("3F", MODULE, formerly="3.6", importance="useful")
def keep_by_turns(frequencies, length, slow, fast):
    kept = []
    for frequency in frequencies:
        turns = length * float(frequency) / math.tau
        kept.append(0.0 if turns <= slow else 1.0 if turns >= fast else (turns - slow) / (fast - slow))
    return np.array(kept)


@keep_by_turns.property(
    "0 for at most `slow` turns",
    hint="How many turns does a pair make in `length` tokens?",
)
def _(ask, rng):
    ask(np.array([0.4, 0.3, 0.05, 0.001]), 64, 1.0, 4.0)


@keep_by_turns.property(
    "1 for at least `fast` turns",
    hint="What does the line give above `fast`, and what cuts it off?",
)
def _(ask, rng):
    ask(np.array([1.0, 0.5, 0.2]), 64, 1.0, 4.0)


@keep_by_turns.property(
    "a straight line between",
    hint="Where is the line 0, where is it 1, and how long is the way between?",
)
def _(ask, rng):
    ask(np.array([0.35, 0.3, 0.2, 0.1]), 64, 1.0, 4.0)
    ask(clocks(8), 8192, 1.0, 32.0)


@keep_by_turns.property(
    "the trained length counts",
    hint="What happens to the turns when the length doubles?",
)
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


for cut in (np.minimum, 1.0), (np.maximum, 0.0):

    @keep_by_turns.mistake("The line is cut off at one end only: it goes on below 0, or above 1.")
    def _(frequencies, length, slow, fast, cut=cut):
        end, limit = cut
        return end(limit, (length * frequencies / math.tau - slow) / (fast - slow))


@keep_by_turns.mistake("There is no ramp: between slow and fast is a straight line.")
def _(frequencies, length, slow, fast):
    return (length * frequencies / math.tau >= fast).astype(float)
