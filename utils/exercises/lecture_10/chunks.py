"""Lecture 10: linear attention in chunks. The oracle sums over single keys, without a state in between."""

import math

import numpy as np

from utils.exercises.arrays import draw, kept_dtype
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "linear"


@exercise("10A", MODULE, returns=("out", "state"), importance="essential")
def chunked_attention(q, k, v, chunk, state=None):
    n, last = q.shape[-2], np.einsum("...nd,...ne->...de", k.astype(float), v.astype(float))
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for i in range(n):
        weights = np.einsum("...d,...nd->...n", q[..., i, :].astype(float), k[..., : i + 1, :].astype(float))
        out[..., i, :] = np.einsum("...n,...ne->...e", weights, v[..., : i + 1, :].astype(float))
    if state is not None:
        out, last = out + np.einsum("...nd,...de->...ne", q.astype(float), state), last + state
    return out, last


def inputs(rng, n, lead=(), d_k=3, d_v=2, size=1.0):
    return size * draw(rng, *lead, n, d_k), draw(rng, *lead, n, d_k), draw(rng, *lead, n, d_v)


@chunked_attention.property(
    "one chunk: a token sees itself and those before", hint="Which scores of a chunk lie above the diagonal?"
)
def _(ask, rng):
    ask(np.array([[1.0], [1.0], [2.0]]), np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [10.0], [100.0]]), 3)
    ask(*inputs(rng, 4), 4)
    ask(*inputs(rng, 3), 100)


@chunked_attention.property(
    "several chunks: the state of before, then the chunk's own",
    hint="What is in the state when a chunk reads it, and when does the chunk come into it?",
)
def _(ask, rng):
    ask(*inputs(rng, 4), 2)
    ask(*inputs(rng, 6), 2)
    ask(*inputs(rng, 3), 1)


@chunked_attention.property(
    "any length: the last chunk may be short", hint="How many rows has the chunk that begins last?"
)
def _(ask, rng):
    ask(*inputs(rng, 5), 2)
    ask(*inputs(rng, 40, d_k=5, d_v=7), 16)
    ask(*inputs(rng, 1), 3)


@chunked_attention.property(
    "a state that is handed in, and the one handed back",
    hint="Does the first chunk read the state that was given, and is it part of what comes back?",
)
def _(ask, rng):
    ask(*inputs(rng, 3), 2, state=draw(rng, 3, 2))
    ask(*inputs(rng, 4), 4, state=draw(rng, 3, 2))


@chunked_attention.property(
    "leading axes, all at once: a state, short chunks, float32, large and single numbers",
    hint="Does each transpose swap the last two axes only, and which float type has the array that you fill?",
)
def _(ask, rng):
    ask(*inputs(rng, 5, (2,)), 2)
    ask(*inputs(rng, 7, (2, 3), size=1000.0), 3, state=draw(rng, 2, 3, 3, 2))
    ask(*inputs(rng, 5, (1, 1), d_k=1, d_v=1, size=1000.0), 2, state=draw(rng, 1, 1, 1, 1))
    kept_dtype(ask, np.float32, *inputs(rng, 7, (2,)), chunk=3, state=draw(rng, 2, 3, 2).astype(np.float32))
    kept_dtype(ask, np.float32, *inputs(rng, 5, (2, 1)), chunk=2, state=draw(rng, 2, 1, 3, 2).astype(np.float32))
    kept_dtype(ask, np.float32, *inputs(rng, 5), chunk=2)


@chunked_attention.property(
    "scores of all tokens are never made at once",
    hint="How large is the largest array that is made: chunk x chunk, or n x n?",
)
def _(ask, rng):
    q, k, v = inputs(rng, 1500, d_k=4, d_v=4)
    made = ask.memory(q, k, v, 50)
    if made > 12 * q.nbytes + 8 * 8 * 50 * 50:
        raise Failed(f"{made:,} bytes were taken at once; scores of all tokens would be {8 * 1500 * 1500:,}")


def usual(
    q, k, v, chunk, state=None, *, tri=0, after=False, read=True, given=True, carry=True, stuck=False, short=False,
    scaled=False, divided=False, turned=False,
):  # fmt: skip
    """The function in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    shape = (*q.shape[:-2], q.shape[-1], v.shape[-1])
    state = np.zeros(shape, q.dtype) if state is None or not given else state
    first_state, q = state, q / math.sqrt(q.shape[-1]) if scaled else q
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    end = q.shape[-2] // chunk * chunk if short else q.shape[-2]
    for first in range(0, end, chunk):
        rows = slice(first, first + chunk)
        q_c, k_c, v_c = q[..., rows, :], k[..., rows, :], v[..., rows, :]
        scores = q_c @ k_c.swapaxes(-1, -2)
        new = (state if carry else first_state) + k_c.swapaxes(-1, -2) @ v_c
        scores = scores if tri is None else np.tril(scores, tri)
        inside = (scores / scores.sum(-1, keepdims=True) if divided else scores) @ v_c
        out[..., rows, :] = (q_c @ (new if after else state) if read else 0) + inside
        state = state if stuck else new
    return (state, out) if turned else (out, state)


chunked_attention.mistakes_of(
    usual,
    {
        "Inside a chunk every token sees all others: only the lower triangle of the scores counts.": {"tri": None},
        "A token does not see itself: the diagonal belongs to the lower triangle.": {"tri": -1},
        "The chunk is counted twice: the state is read after the chunk was added to it.": {"after": True},
        "The state is never read: what came before the chunk is missing from the output.": {"read": False},
        "The state that was handed in is not used.": {"given": False},
        "The chunks in between are lost: a chunk's K^T V is added to the state that it has read.": {"carry": False},
        "The state never moves on: after each chunk K^T V is added to it.": {"stuck": True},
        "The last, shorter chunk is left out.": {"short": True},
        "The scores are divided by the root of d_k: q and k are features, and there is no scale.": {"scaled": True},
        "The weights are divided by their sum: here they are only added up.": {"divided": True},
        "out and state are exchanged: out comes first.": {"turned": True},
    },
)
