"""Lecture 04: share of attention, needle, loss by position, effective length. The oracles go number by number."""

import math
from fractions import Fraction

import numpy as np

from utils.judge.function import exercise

MODULE = "long_context"


def each(function, n):
    """A function of one int, for every element of an array."""
    return np.array([function(int(i)) for i in np.ravel(n)]).reshape(np.shape(n))


# --- 4.1 -------------------------------------------------------------------------------------------------------------


@exercise("4.1", MODULE)
def attention_share(n, n_params, n_layers, d_model):
    def share(tokens):
        by_length = 4 * tokens * n_layers * d_model
        return float(Fraction(by_length, by_length + 2 * n_params))

    return each(share, n)


@attention_share.property("4 n d L over 4 n d L + 2 N")
def _(ask, rng):
    ask(np.array([1, 2, 3]), 30, 3, 4)
    ask(rng.integers(1, 100_000, size=5), 70_553_706_496, 80, 8192)


@attention_share.property("one share for each n, in the shape of n")
def _(ask, rng):
    ask(rng.integers(1, 50, size=(2, 3)), 100, 3, 4)
    ask(rng.integers(1, 50, size=(2, 1)), 100, 3, 4)
    ask(np.array([7]), 100, 3, 4)


@attention_share.property("no tokens, no attention; a million tokens, nearly all of it")
def _(ask, rng):
    ask(np.array([0, 10**6]), 1000, 3, 8)


@attention_share.property("every layer has scores of its own: d and L count alike")
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
    "Only the scores are counted: the weighted sum of the values costs 2 n d as well.": share_with(
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


# --- 4.2 -------------------------------------------------------------------------------------------------------------


@exercise("4.2", MODULE)
def place_needle(haystack, needle, depth):
    documents = np.array(haystack)
    for document, statement, d in zip(documents, needle, depth):
        document[math.floor(d * (len(document) - 1) + 0.5)] = statement
    return documents


def hay(rng, batch, seq_len):
    return rng.integers(100, 1000, size=(batch, seq_len)), rng.integers(10, 100, size=batch)


@place_needle.property("each document gets its own needle at its own depth")
def _(ask, rng):
    ask(*hay(rng, 2, 5), np.array([0.25, 0.75]))
    ask(*hay(rng, 4, 9), np.array([0.5, 0.125, 0.875, 0.25]))


@place_needle.property("0 is the first place, 1 the last", hint="The last place has the index seq_len - 1.")
def _(ask, rng):
    ask(*hay(rng, 2, 4), np.array([0.0, 1.0]))


@place_needle.property(
    "between two places: the nearer one", hint="Adding a half and rounding down rounds to the nearest."
)
def _(ask, rng):
    ask(*hay(rng, 3, 5), np.array([0.2, 0.3, 0.95]))


@place_needle.property("equally near: the later one", hint="np.round and np.rint round a half to the even number.")
def _(ask, rng):
    ask(*hay(rng, 3, 4), np.array([0.5, 1 / 6, 5 / 6]))
    ask(*hay(rng, 2, 2), np.array([0.5, 0.5]))


@place_needle.property("a document of one statement becomes the needle")
def _(ask, rng):
    ask(*hay(rng, 2, 1), np.array([0.3, 1.0]))


def placed(places):
    """The usual answer; the mistakes differ in where the needle goes."""

    def answer(haystack, needle, depth):
        documents = haystack.copy()
        documents[np.arange(len(documents)), places(depth, haystack.shape[1])] = needle
        return documents

    return answer


for message, places in {
    "The places are numbered from the other end: depth 0 is the start.": lambda d, n: np.floor(
        (1 - d) * (n - 1) + 0.5
    ).astype(int),
    "depth * seq_len goes one too far: the last of seq_len places has the index seq_len - 1.": lambda d, n: np.minimum(
        (d * n).astype(int), n - 1
    ),
    "Rounded down: add a half before.": lambda d, n: (d * (n - 1)).astype(int),
    "A half was rounded to the even number; the later place was asked for.": lambda d, n: np.rint(d * (n - 1)).astype(
        int
    ),
}.items():
    place_needle.mistake(message)(placed(places))


@place_needle.mistake("Every document got the needle at every depth: index with the rows as well as the places.")
def _(haystack, needle, depth):
    documents = haystack.copy()
    documents[:, np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)] = needle[:, None]
    return documents


@place_needle.mistake("The needle was put in between; it takes the place of the statement that stood there.")
def _(haystack, needle, depth):
    places = np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)
    return np.array([np.insert(row, place, n) for row, place, n in zip(haystack, places, needle)])


# --- 4.3 -------------------------------------------------------------------------------------------------------------


@exercise("4.3", MODULE)
def loss_by_position(losses, edges):
    means = []
    for first, end in zip(edges[:-1], edges[1:]):
        known = [float(x) for row in losses for x in row[first:end] if not math.isnan(x)]
        means.append(math.fsum(known) / len(known) if known else math.nan)
    return np.array(means)


def mean_of_known(x, axis=None):
    """np.nanmean without its warning about empty slices."""
    known = ~np.isnan(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, x, 0).sum(axis) / np.asarray(known.sum(axis))


def some_losses(rng, batch, seq_len, known=1.0):
    losses = rng.uniform(0, 5, size=(batch, seq_len)).round(1)
    return np.where(rng.random(losses.shape) < known, losses, np.nan)


@loss_by_position.property("the mean over the positions of each bucket")
def _(ask, rng):
    ask(some_losses(rng, 2, 6), np.array([0, 3, 6]))
    ask(some_losses(rng, 5, 20), np.array([0, 5, 10, 20]))


@loss_by_position.property("buckets may differ in width and leave positions out")
def _(ask, rng):
    ask(some_losses(rng, 3, 12), np.array([2, 3, 7, 11]))


@loss_by_position.property(
    "positions without a loss (nan) are left out", hint="np.isnan finds them; divide by how many are left."
)
def _(ask, rng):
    ask(some_losses(rng, 2, 4, 0.6), np.array([0, 2, 4]))
    ask(some_losses(rng, 6, 18, 0.5), np.array([0, 9, 18]))


@loss_by_position.property("every loss counts once, whichever document it is in")
def _(ask, rng):
    ask(np.array([[1.0, np.nan, np.nan], [4.0, 4.0, 4.0]]), np.array([0, 3]))


@loss_by_position.property("a bucket without any loss is nan")
def _(ask, rng):
    ask(np.array([[1.0, 2.0, np.nan, np.nan], [3.0, np.nan, np.nan, np.nan]]), np.array([0, 2, 4]))


@loss_by_position.property(
    "all at once: buckets of any width, positions without a loss, an empty bucket",
    hint="Which two of them do not work together?",
)
def _(ask, rng):
    losses = some_losses(rng, 7, 60, 0.5)
    losses[:, 12:14] = np.nan
    ask(losses, np.array([1, 2, 12, 14, 45, 57]))
    ask(1e3 * losses[:1], np.array([1, 2, 12, 14, 45, 57]))


@loss_by_position.mistake("edges[i + 1] belongs to the next bucket.")
def _(losses, edges):
    return np.array([mean_of_known(losses[:, a : b + 1]) for a, b in zip(edges[:-1], edges[1:])])


@loss_by_position.mistake("A nan counts as zero here: divide by the number of losses, not by the size of the bucket.")
def _(losses, edges):
    return np.array([np.nan_to_num(losses[:, a:b]).mean() for a, b in zip(edges[:-1], edges[1:])])


@loss_by_position.mistake("One nan makes its whole bucket nan: leave out the positions without a loss.")
def _(losses, edges):
    return np.array([losses[:, a:b].mean() for a, b in zip(edges[:-1], edges[1:])])


@loss_by_position.mistake("This is a mean of the documents' means: a document with few losses counts too much.")
def _(losses, edges):
    return np.array([mean_of_known(mean_of_known(losses[:, a:b], axis=1)) for a, b in zip(edges[:-1], edges[1:])])


@loss_by_position.mistake("This is a mean of the positions' means: every loss counts once.")
def _(losses, edges):
    return np.array([mean_of_known(mean_of_known(losses[:, a:b], axis=0)) for a, b in zip(edges[:-1], edges[1:])])


@loss_by_position.mistake("The buckets are of positions: slice the columns, losses[:, a:b].")
def _(losses, edges):
    return np.array([mean_of_known(losses[a:b]) for a, b in zip(edges[:-1], edges[1:])])


@loss_by_position.mistake("This is the mean up to the end of each bucket: it begins at edges[i].")
def _(losses, edges):
    return np.array([mean_of_known(losses[:, :b]) for b in edges[1:]])


@loss_by_position.mistake("A bucket without any loss is nan, not 0: nothing was measured there.")
def _(losses, edges):
    return np.nan_to_num(loss_by_position.oracle(losses, edges))


# --- 4.4 -------------------------------------------------------------------------------------------------------------


@exercise("4.4", MODULE)
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


@effective_length.property("the last length above the threshold")
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


@effective_length.property("a score equal to the threshold is not above it")
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


@effective_length.mistake("np.minimum.accumulate runs down the models by default: axis=1.")
def _(lengths, scores, threshold):
    return np.concatenate([[0], lengths])[np.logical_and.accumulate(scores > threshold, axis=0).sum(axis=1)]
