"""Lecture 13: a softmax over the edges of each target. The oracle collects one node's edges after another."""

import numpy as np

from utils.exercises.arrays import INF, draw, kept_dtype, or_one, weights_of
from utils.judge.function import exercise

MODULE = "beyond"


@exercise("13A", MODULE, importance="essential")
def segment_softmax(scores, target, n_nodes):
    out = np.zeros(scores.shape)
    for node in range(n_nodes):
        mine = [e for e, where in enumerate(target) if where == node]
        for head in range(scores.shape[1]):
            column = [float(scores[e, head]) for e in mine]
            for e, weight in zip(mine, weights_of(column, [True] * len(mine))):
                out[e, head] = weight
    return out


def edges(rng, n_edges=7, n_nodes=4, heads=2, size=1.0):
    return size * draw(rng, n_edges, heads), rng.integers(0, n_nodes, n_edges), n_nodes


@segment_softmax.property("one node: a softmax over all of its edges", hint="By what is each power divided?")
def _(ask, rng):
    ask(np.array([[0.0], [0.0]]), np.array([0, 0]), 1)
    ask(draw(rng, 4, 1), np.zeros(4, int), 1)


@segment_softmax.property(
    "the edges of each target sum to 1, in any order",
    hint="Which entry of the totals belongs to an edge: the one at its own place, or the one at its target?",
)
def _(ask, rng):
    ask(np.array([[0.0], [0.0], [0.0]]), np.array([1, 0, 1]), 2)
    ask(*edges(rng, heads=1))
    ask(*edges(rng, n_edges=12, n_nodes=3, heads=1))


@segment_softmax.property("several heads, each on its own", hint="Over which axis may nothing be summed?")
def _(ask, rng):
    ask(*edges(rng))
    ask(*edges(rng, n_edges=9, n_nodes=3, heads=3))


@segment_softmax.property(
    "nodes without edges, and no edges at all",
    hint="Which shape have the totals, and who says how many nodes there are?",
)
def _(ask, rng):
    ask(draw(rng, 3, 2), np.array([0, 4, 4]), 6)
    ask(np.zeros((0, 2)), np.zeros(0, int), 3)


@segment_softmax.property(
    "scores of 1e4 and of -1e4 do not overflow", hint="What is subtracted from a score: whose maximum, exactly?"
)
def _(ask, rng):
    ask(*edges(rng, size=1e4))
    scores, target, n_nodes = edges(rng, n_edges=8, n_nodes=2)
    ask(scores + 1e4 * np.where(target == 0, 1, -1)[:, None], target, n_nodes)


@segment_softmax.property(
    "an edge of -inf is not there", hint="What is -inf minus -inf, and what does a target get whose edges are all -inf?"
)
def _(ask, rng):
    ask(np.array([[0.0], [-INF], [-INF]]), np.array([0, 0, 1]), 2)
    scores, target, n_nodes = edges(rng, n_edges=9)
    scores[2:5, 0] = -INF
    ask(scores, target, n_nodes)


@segment_softmax.property(
    "the float type of the scores", hint="In which float type are the maxima and the totals made?"
)
def _(ask, rng):
    kept_dtype(ask, np.float32, *edges(rng))


@segment_softmax.property(
    "all at once: one head, large scores, -inf, float32", hint="Which two of these have you never tried together?"
)
def _(ask, rng):
    for dtype, size in ((np.float64, 1e4), (np.float32, 3.0)):
        for heads in (1, 3):
            scores, target, n_nodes = edges(rng, n_edges=20, n_nodes=6, heads=heads, size=size)
            scores[::3] = -INF
            scores[target == 2] = -INF
            kept_dtype(ask, dtype, scores.astype(dtype), target, n_nodes)


def own_maximum(scores, target, n_nodes):
    top = np.full((n_nodes, *scores.shape[1:]), -np.inf, scores.dtype)
    np.maximum.at(top, target, scores)
    return np.where(top == -np.inf, 0, top)[target]


def own_total(powers, target, n_nodes):
    total = np.zeros((n_nodes, *powers.shape[1:]), powers.dtype)
    np.add.at(total, target, powers)
    return total[target]


def usual(scores, target, n_nodes, *, maximum=own_maximum, total=own_total, guard=or_one):
    """The function in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    with np.errstate(all="ignore"):
        powers = np.exp(scores - maximum(scores, target, n_nodes))
        return (powers / guard(total(powers, target, n_nodes))).astype(scores.dtype)


def by_index(powers, target, n_nodes):
    """Totals as `total[target] += powers` makes them: of a repeated target the last edge counts."""
    total = np.zeros((n_nodes, *powers.shape[1:]), powers.dtype)
    total[target] += powers
    return total[target]


def from_zero(scores, target, n_nodes):
    top = np.zeros((n_nodes, *scores.shape[1:]), scores.dtype)
    np.maximum.at(top, target, scores)
    return top[target]


def whole(values, reduce):
    return reduce(values, axis=0, keepdims=True) if len(values) else values


segment_softmax.mistakes_of(
    usual,
    {
        "The softmax runs over all edges: those of one target sum to 1.": {
            "maximum": lambda s, t, n: whole(s, np.max),
            "total": lambda p, t, n: whole(p, np.sum),
        },
        "total[target] += powers adds one edge of each target only: use np.add.at.": {"total": by_index},
        "One maximum for all edges: a target with small scores underflows; take the maximum of each target.": {
            "maximum": lambda s, t, n: whole(s, np.max)
        },
        "The maxima begin at 0: they have to begin at -inf, or scores far below 0 underflow.": {"maximum": from_zero},
        "exp overflows: subtract the largest score of the target first.": {"maximum": lambda s, t, n: 0 * s},
        "The heads are summed: each head has a softmax of its own.": {
            "total": lambda p, t, n: own_total(p.sum(1, keepdims=True), t, n)
        },
        "A target whose edges are all -inf becomes nan: it gets zeros.": {"guard": lambda total: total},
    }
    | {
        f"{small:g} is added to every total: the weights then sum to less than 1. Which totals need help?": {
            "guard": lambda total, small=small: total + small
        }
        for small in (1e-6, 1e-8, 1e-9, 1e-10)
    },
)
