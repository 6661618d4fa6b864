"""Lecture 06: packed sequences, and the ring."""

import numpy as np

from utils.exercises.arrays import draw
from utils.exercises.lecture_06.forward import head
from utils.exercises.lecture_06.rows import seen, whole
from utils.judge.function import exercise

MODULE = "flash"


# --- 6.6 -------------------------------------------------------------------------------------------------------------


@exercise("6.6", MODULE, returns=("out", "lse"))
def flash_attention_varlen(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, packed(cu_queries, cu_keys, causal), scale)


def packed(cu_queries, cu_keys, causal):
    """Booleans (total_queries, total_keys): squares along the diagonal."""
    allowed = np.zeros((cu_queries[-1], cu_keys[-1]), bool)
    for (i, i_end), (j, j_end) in zip(zip(cu_queries, cu_queries[1:]), zip(cu_keys, cu_keys[1:])):
        allowed[i:i_end, j:j_end] = seen(i_end - i, j_end - j, causal)
    return allowed


def starts(*lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@flash_attention_varlen.property("two sequences do not see each other")
def _(ask, rng):
    ask(*head(rng, 5, 5), starts(2, 3), starts(2, 3))


@flash_attention_varlen.property("one sequence alone is flash attention")
def _(ask, rng):
    ask(*head(rng, 3, 4), starts(3), starts(4))
    ask(*head(rng, 3, 4), starts(3), starts(4), causal=True)


@flash_attention_varlen.property("other numbers of keys than of queries")
def _(ask, rng):
    ask(*head(rng, 5, 8), starts(2, 3), starts(6, 2))


@flash_attention_varlen.property("causal in each sequence: its last query sees its last key")
def _(ask, rng):
    ask(*head(rng, 6, 9), starts(2, 4), starts(5, 4), causal=True)


@flash_attention_varlen.property("a sequence without keys, and one without anything")
def _(ask, rng):
    ask(*head(rng, 5, 4), starts(2, 1, 0, 2), starts(3, 0, 0, 1))


@flash_attention_varlen.property("leading axes, and a scale")
def _(ask, rng):
    ask(draw(rng, 2, 5, 3), draw(rng, 2, 5, 3), draw(rng, 2, 5, 3), starts(1, 4), starts(1, 4), scale=0.3)


@flash_attention_varlen.property(
    "all at once: causal, a scale, leading axes, empty sequences, float32",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    q, k, v = draw(rng, 2, 1, 7, 3), draw(rng, 2, 1, 9, 3), draw(rng, 2, 1, 9, 1)
    cuts = starts(2, 1, 0, 4), starts(3, 0, 4, 2)
    ask(q, k, v, *cuts, causal=True, scale=0.7)
    ask(*(a.astype(np.float32) for a in (q, k, v)), *cuts, causal=True, scale=0.7)


@flash_attention_varlen.mistake("The sequences see each other: attend to the keys of the own sequence only.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, seen(q.shape[-2], k.shape[-2], causal), scale)


@flash_attention_varlen.mistake("The keys are cut where the queries are: use cu_keys for k and v.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    cut = np.minimum(np.asarray(cu_queries), k.shape[-2])
    allowed = np.zeros((q.shape[-2], k.shape[-2]), bool)
    squares = packed(cut, cut, causal)
    allowed[: squares.shape[0], : squares.shape[1]] = squares
    return whole(q, k, v, allowed, scale)


@flash_attention_varlen.mistake("causal is forgotten: hand it on to flash attention.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, packed(cu_queries, cu_keys, False), scale)


@flash_attention_varlen.mistake("The scale is forgotten: hand it on to flash attention.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return whole(q, k, v, packed(cu_queries, cu_keys, causal), None)


@flash_attention_varlen.mistake("The causal mask counts positions in the pack: each sequence begins at 0.")
def _(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    allowed = packed(cu_queries, cu_keys, False) & seen(q.shape[-2], k.shape[-2], causal, shift=0)
    return whole(q, k, v, allowed, scale)


# --- 6.7 -------------------------------------------------------------------------------------------------------------


@exercise("6.7", MODULE)
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


@ring_attention_numpy.property("three ranks: each sees the keys of all")
def _(ask, rng):
    ask(*ring(rng, 3, 2))


@ring_attention_numpy.property("one rank, and five")
def _(ask, rng):
    ask(*ring(rng, 5, 2))
    ask(*ring(rng, 1, 3))


@ring_attention_numpy.property("causal, contiguous: some blocks are all in the future")
def _(ask, rng):
    ask(*ring(rng, 3, 2), causal=True)


@ring_attention_numpy.property("causal, striped: the mask follows the positions")
def _(ask, rng):
    ask(*ring(rng, 3, 2, striped=True), causal=True)


@ring_attention_numpy.property("a scale that is given is used")
def _(ask, rng):
    ask(*ring(rng, 2, 3), scale=0.25)


@ring_attention_numpy.property("scores of 1e4 do not overflow")
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
