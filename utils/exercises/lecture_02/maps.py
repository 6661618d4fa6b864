"""Lecture 02: patterns in maps of weights, and what each head writes."""

import numpy as np

from utils.exercises.arrays import draw
from utils.exercises.lecture_02.multi_head import joined
from utils.judge.function import exercise

MODULE = "multi_head"


# --- 2E --------------------------------------------------------------------------------------------------------------


@exercise("2E", MODULE, formerly="2.4", importance="useful", returns=("previous", "induction"))
def pattern_scores(weights, period):
    n = weights.shape[-1]
    previous = sum(weights[..., i, i - 1] for i in range(1, n)) / (n - 1)
    induction = sum(weights[..., i, i - period + 1] for i in range(period, n)) / (n - period)
    return previous, induction


def rows_of_weights(rng, *shape):
    drawn = rng.random(shape)
    return (drawn / drawn.sum(-1, keepdims=True)).round(2)


@pattern_scores.property(
    "previous: the mean weight on the key before the query",
    hint="On which side of the main diagonal is key i - 1, and how many queries have one?",
)
def _(ask, rng):
    ask(np.diag([1.0, 0.0, 2.0, 5.0, 0.0, 4.0], -1), period=4)  # whatever is taken for induction is 0


@pattern_scores.property(
    "induction: the mean weight on the key period - 1 before the query",
    hint="How far before query i is key i - period + 1?",
)
def _(ask, rng):
    ask(np.maximum(np.arange(6.0)[:, None] - np.arange(6), 0), 3)  # whichever queries count, it is 2


@pattern_scores.property(
    "induction begins with query number period, and ends with the last one",
    hint="Which query has the first entry of your diagonal, and which the last?",
)
def _(ask, rng):
    ask(rows_of_weights(rng, 6, 6), 3)
    for query in (2, 3, 4):
        weights = np.zeros((5, 5))
        weights[query, query - 2] = 1.0
        ask(weights, 3)


@pattern_scores.property(
    "any period, also one with a last round that is cut off", hint="Which number of queries is your mean over?"
)
def _(ask, rng):
    ask(rows_of_weights(rng, 7, 7), 2)
    ask(rows_of_weights(rng, 7, 7), 5)


@pattern_scores.property("leading axes: one score for each map", hint="Which two axes does your diagonal run over?")
def _(ask, rng):
    ask(rows_of_weights(rng, 4, 5, 5), 3)
    ask(rows_of_weights(rng, 5, 2, 6, 6), 3)
    ask(rows_of_weights(rng, 3, 1, 9, 9), 4)


def below(weights, distance, first):
    """The weights [i, i - distance] of the queries from `first` on."""
    return np.diagonal(weights, -distance, -2, -1)[..., max(first - distance, 0) :]


def means(previous, induction):
    return lambda weights, period: (previous(weights).mean(-1), induction(weights, period).mean(-1))


def one_before(weights):
    return below(weights, 1, 1)


def behind_the_last(weights, period):
    return below(weights, period - 1, period)


for message, answer in {
    "Induction looks at the key after the last occurrence, not at the occurrence itself: i - period + 1.": means(
        one_before, lambda w, period: below(w, period, period)
    ),
    "Induction looks one too far back: the key after the last occurrence is i - period + 1.": means(
        one_before, lambda w, period: below(w, period + 1, period + 1)
    ),
    "The first entry of that diagonal is query period - 1, whose token stands there for the first time.": means(
        one_before, lambda w, period: below(w, period - 1, period - 1)
    ),
    "Rows are queries: the key before query i is weights[i, i - 1], below the main diagonal.": means(
        lambda w: np.diagonal(w, 1, -2, -1), behind_the_last
    ),
    "Take the mean over the queries, not the sum.": lambda w, period: (
        one_before(w).sum(-1),
        behind_the_last(w, period).sum(-1),
    ),
    "The mean runs over all axes: each map has scores of its own.": lambda w, period: (
        np.asarray(one_before(w).mean()),
        np.asarray(behind_the_last(w, period).mean()),
    ),
    "The mean is over the queries that have such a key, not over all n.": lambda w, period: (
        one_before(w).sum(-1) / w.shape[-1],
        behind_the_last(w, period).sum(-1) / w.shape[-1],
    ),
    "The two have changed places: (previous, induction).": lambda w, period: pattern_scores.oracle(w, period)[::-1],
    "np.diagonal takes the first two axes unless told: axis1=-2, axis2=-1.": lambda w, period: (
        np.diagonal(w, -1).mean(-1),
        np.diagonal(w, 1 - period)[..., 1:].mean(-1),
    ),
}.items():
    pattern_scores.mistake(message)(answer)


# --- 2F --------------------------------------------------------------------------------------------------------------


@exercise("2F", MODULE, formerly="2.5", importance="useful")
def head_contributions(heads, w_o):
    n_heads, d_v = heads.shape[-3], heads.shape[-1]
    parts = [np.einsum("...td,dm->...tm", heads[..., i, :, :], w_o[i * d_v : (i + 1) * d_v]) for i in range(n_heads)]
    return np.stack(parts, axis=-3)


@head_contributions.property("each head by its own block of rows", hint="Which rows of w_o has head 1?")
def _(ask, rng):
    ask(np.ones((2, 1, 1)), np.array([[1.0, 2.0], [3.0, 4.0]]))
    ask(draw(rng, 2, 3, 2), draw(rng, 4, 2))


@head_contributions.property("the heads are not added up yet", hint="Which axis of the result counts the heads?")
def _(ask, rng):
    ask(draw(rng, 3, 2, 2), draw(rng, 6, 4))


@head_contributions.property("d_model need not be n_heads * d_v", hint="Where does d_model come from in your code?")
def _(ask, rng):
    ask(draw(rng, 2, 3, 2), draw(rng, 4, 5))
    ask(draw(rng, 3, 4, 1), draw(rng, 3, 2))


@head_contributions.property("leading axes", hint="Which axes do you count from the front?")
def _(ask, rng):
    ask(draw(rng, 2, 2, 3, 2), draw(rng, 4, 3))


@head_contributions.property("float32 in, the same to 1e-5", hint="Which array do you make with a type of its own?")
def _(ask, rng):
    ask(draw(rng, 2, 3, 2).astype(np.float32), draw(rng, 4, 3).astype(np.float32))


@head_contributions.property(
    "all at once: leading axes, one of them 1, one head, float32", hint="Which axes do you count from the front?"
)
def _(ask, rng):
    ask(draw(rng, 2, 1, 3, 4, 2).astype(np.float32), draw(rng, 6, 5).astype(np.float32))
    ask(draw(rng, 2, 1, 4, 2), draw(rng, 2, 5))
    ask(np.array([[[100.0]], [[1.0]], [[0.01]]]) * draw(rng, 2, 3, 4, 2), draw(rng, 6, 1))


def sizes(heads):
    return heads.shape[-3], heads.shape[-1]


for message, answer in {
    "The heads are added up: keep what each one adds.": lambda heads, w_o: joined(heads) @ w_o,
    "The rows are dealt out in turn: head 0 owns the first d_v rows of w_o.": lambda heads, w_o: (
        heads @ w_o.reshape(*sizes(heads)[::-1], -1).swapaxes(0, 1)
    ),
    "w_o is transposed: its rows belong to the heads, its columns to the output.": lambda heads, w_o: (
        heads @ w_o.T.reshape(*sizes(heads), -1)
    ),
    "The blocks are in the wrong order: head 0 owns the first d_v rows.": lambda heads, w_o: (
        heads @ w_o.reshape(*sizes(heads), -1)[::-1]
    ),
    "A sum over the heads, not a mean: nothing is divided by n_heads.": lambda heads, w_o: (
        heads @ w_o.reshape(*sizes(heads), -1) / heads.shape[-3]
    ),
    "Every head uses the first block: each has rows of its own.": lambda heads, w_o: heads @ w_o[: heads.shape[-1]],
}.items():
    head_contributions.mistake(message)(answer)
