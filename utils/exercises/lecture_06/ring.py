"""Lecture 06: the ring."""

import numpy as np

from utils.exercises.arrays import draw
from utils.exercises.lecture_06.rows import whole
from utils.judge.function import exercise

MODULE = "flash"


# --- 6H --------------------------------------------------------------------------------------------------------------


@exercise("6H", MODULE, formerly="6.7", importance="extra")
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


@ring_attention_numpy.property(
    "three ranks: each sees the keys of all",
    hint="Whose block does rank r hold at step t, and how many steps are there?",
)
def _(ask, rng):
    ask(*ring(rng, 3, 2))


@ring_attention_numpy.property("one rank, and five", hint="How many steps does a ring of five take, and a ring of one?")
def _(ask, rng):
    ask(*ring(rng, 5, 2))
    ask(*ring(rng, 1, 3))


@ring_attention_numpy.property(
    "causal, contiguous: some blocks are all in the future", hint="What does a rank keep that has seen nothing yet?"
)
def _(ask, rng):
    ask(*ring(rng, 3, 2), causal=True)


@ring_attention_numpy.property(
    "causal, striped: the mask follows the positions", hint="Whose positions are those of the visiting keys?"
)
def _(ask, rng):
    ask(*ring(rng, 3, 2, striped=True), causal=True)


@ring_attention_numpy.property("a scale that is given is used", hint="Does attend_block get the scale?")
def _(ask, rng):
    ask(*ring(rng, 2, 3), scale=0.25)


@ring_attention_numpy.property(
    "scores of 1e4 do not overflow", hint="Are parts merged by their log-sum-exp, or by what exp makes of it?"
)
def _(ask, rng):
    q, k, v, positions = ring(rng, 2, 2)
    ask(1e3 * q, 10 * k, v, positions, scale=1.0)


@ring_attention_numpy.property(
    "all at once: causal, striped, a scale, rows of very different size, one query a rank",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    q, k, v, positions = ring(rng, 4, 3, d_v=1, striped=True)
    ask(np.array([[1e3], [1.0], [1e-3]]) * q, k, v, positions, causal=True, scale=0.7)
    ask(*(a.astype(np.float32) for a in (q, k, v)), positions, causal=True, scale=0.7)
    q, k, v, positions = ring(rng, 5, 1)
    ask(1e3 * q, k, v, positions[::-1], causal=True, scale=0.4)


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
    allowed = (positions[:, None] <= positions[:, :, None]) | (not causal)  # the own positions, for every block
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
