"""Lecture 04: share of attention, effective length. The oracles go number by number."""

from fractions import Fraction

import numpy as np

from utils.judge.function import exercise

MODULE = "long_context"


def each(function, n):
    """A function of one int, for every element of an array."""
    return np.array([function(int(i)) for i in np.ravel(n)]).reshape(np.shape(n))


# --- 4A -------------------------------------------------------------------------------------------------------------


@exercise("4A", MODULE, formerly="4.1", importance="useful")
def attention_share(n, n_params, n_layers, d_model):
    def share(tokens):
        by_length = 4 * tokens * n_layers * d_model
        return float(Fraction(by_length, by_length + 2 * n_params))

    return each(share, n)


@attention_share.property("4 n d L over 4 n d L + 2 N", hint="Which two sums are there, and what is the whole?")
def _(ask, rng):
    ask(np.array([1, 2, 3]), n_params=30, n_layers=3, d_model=4)
    ask(rng.integers(1, 100_000, size=5), 70_553_706_496, 80, 8192)


@attention_share.property(
    "one share for each n, in the shape of n", hint="What does your function return for two rows of n?"
)
def _(ask, rng):
    ask(rng.integers(1, 50, size=(2, 3)), 100, 3, 4)
    ask(rng.integers(1, 50, size=(2, 1)), 100, 3, 4)
    ask(np.array([7]), 100, 3, 4)


@attention_share.property(
    "no tokens, no attention; a million tokens, nearly all of it", hint="What is a share divided by?"
)
def _(ask, rng):
    ask(np.array([0, 10**6]), 1000, 3, 8)


@attention_share.property(
    "every layer has scores of its own: d and L count alike", hint="How many layers compute scores?"
)
def _(ask, rng):
    ask(np.array([5, 6]), 1000, 3, 8)
    ask(np.array([5, 6]), 1000, 8, 3)


def share_with(by_length, by_weights=2.0, whole=True):
    """The usual answer; the mistakes differ in what they count."""

    def answer(n, n_params, n_layers, d_model):
        attention, weights = by_length(np.asarray(n, float), n_layers, d_model), by_weights * n_params
        return attention / (weights + attention if whole else weights)

    return answer


for message, answer in {
    "This is attention over the weights alone: a share divides by both together.": share_with(
        lambda n, layers, d: 4 * n * d * layers, whole=False
    ),
    "This is half of what attention costs: the weighted sum of the values is 2 n d as well, and the token sees n.": share_with(
        lambda n, layers, d: 2 * n * d * layers
    ),
    "Each weight takes part in a multiplication and an addition: 2 N.": share_with(
        lambda n, layers, d: 4 * n * d * layers, by_weights=1.0
    ),
    "The layers are missing in 4 n d L, or were put into 2 N as well: N counts all layers already.": share_with(
        lambda n, layers, d: 4 * n * d + 0 * layers
    ),
    "This is the whole sequence over one token: a single query costs 4 n d, not 4 n² d.": share_with(
        lambda n, layers, d: 4 * n**2 * d * layers
    ),
}.items():
    attention_share.mistake(message)(answer)


@attention_share.mistake("This is the share of the weights.")
def _(n, n_params, n_layers, d_model):
    return 1 - share_with(lambda n, layers, d: 4 * n * d * layers)(n, n_params, n_layers, d_model)


@attention_share.mistake("A share lies between 0 and 1: this is per cent.")
def _(n, n_params, n_layers, d_model):
    return 100 * share_with(lambda n, layers, d: 4 * n * d * layers)(n, n_params, n_layers, d_model)


# --- 4C -------------------------------------------------------------------------------------------------------------


@exercise("4C", MODULE, formerly="4.4", importance="useful")
def effective_length(lengths, scores, threshold):
    longest = []
    for row in scores:
        best = 0
        for length, score in zip(lengths, row):
            if not score > threshold:
                break
            best = int(length)
        longest.append(best)
    return np.array(longest)


@effective_length.property(
    "the last length above the threshold",
    hint="How many lengths of a row have passed, and which length is the last of them?",
)
def _(ask, rng):
    ask(np.array([4, 8, 16]), np.array([[0.9, 0.88, 0.5], [0.9, 0.7, 0.2]]), 0.85)
    ask(np.array([1, 3, 10, 50]), -np.sort(-rng.random((6, 4)).round(2), axis=1), 0.5)


@effective_length.property(
    "one answer for each model, all lengths passed or none",
    hint="Where nothing fails argmin and argmax give 0 as well: count the ones instead.",
)
def _(ask, rng):
    ask(np.array([4, 8]), np.array([[0.9, 0.95], [0.1, 0.2], [0.9, 0.2]]), 0.5)
    ask(np.array([7]), np.array([[0.4]]), 0.5)


@effective_length.property(
    "after the first failure nothing counts", hint="A score that comes back later does not help."
)
def _(ask, rng):
    ask(np.array([4, 8, 16, 32]), np.array([[0.9, 0.4, 0.9, 0.95], [0.2, 0.9, 0.9, 0.9]]), 0.5)


@effective_length.property("a score equal to the threshold is not above it", hint="Is 0.75 above 0.75?")
def _(ask, rng):
    ask(np.array([4, 8, 16]), np.array([[0.9, 0.75, 0.6], [0.75, 0.75, 0.75]]), 0.75)


@effective_length.property(
    "all at once: many models, scores that come back, scores equal to the threshold",
    hint="Which two of them do not work together?",
)
def _(ask, rng):
    ask(np.array([4, 8, 16, 32, 64, 128]), rng.integers(3, 9, size=(60, 6)) / 8, 0.5)


def passed_with(above=np.greater, choose=None):
    def answer(lengths, scores, threshold):
        good = above(scores, threshold)
        return choose(np.asarray(lengths), good)

    return answer


def in_a_row(lengths, good):
    return np.concatenate([[0], lengths])[np.logical_and.accumulate(good, axis=1).sum(axis=1)]


for message, answer in {
    "The longest length that passes, although a shorter one fails: all shorter ones have to pass too.": passed_with(
        choose=lambda lengths, good: np.where(good, lengths, 0).max(axis=1)
    ),
    "A score equal to the threshold is not above it.": passed_with(above=np.greater_equal, choose=in_a_row),
    "This is how many lengths pass; asked for is the longest of them.": passed_with(
        choose=lambda lengths, good: np.logical_and.accumulate(good, axis=1).sum(axis=1)
    ),
    "This is the first length that fails; asked for is the one before.": passed_with(
        choose=lambda lengths, good: np.concatenate([lengths, lengths[-1:]])[
            np.logical_and.accumulate(good, axis=1).sum(axis=1)
        ]
    ),
    "A model that fails at the first length has the effective length 0.": passed_with(
        choose=lambda lengths, good: lengths[np.maximum(np.logical_and.accumulate(good, axis=1).sum(axis=1) - 1, 0)]
    ),
}.items():
    effective_length.mistake(message)(answer)


@effective_length.mistake("This runs down the models: for `accumulate` the lengths are axis=1.")
def _(lengths, scores, threshold):
    return np.concatenate([[0], lengths])[np.logical_and.accumulate(scores > threshold, axis=0).sum(axis=1)]
