"""Answers to the exercises of lecture 06 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_06/
are further wrong answers. Those in PyTorch and in CUDA, and those of the loop over tiles, stand in files of their own.
"""

import numpy as np
import torch

from tests.lectures.collect import collect
from tests.lectures.lecture_06 import answers_forward, answers_kernels, answers_torch
from tests.lectures.lecture_06.answers_forward import in_one_piece, keys_outside, scale_of

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_forward, answers_torch)


# --- 6C --------------------------------------------------------------------------------------------------------------


def rows_to_try(seed=0):
    rng = np.random.default_rng(seed)
    for n, m, causal in ((5, 7, False), (6, 6, True), (3, 8, True), (7, 4, True)):
        q, k, v = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)), rng.normal(size=(m, 2))
        yield q, k, v, causal
        yield np.full_like(q, -1000.0), abs(k) + 1, v, causal
        yield 500.0 * np.arange(n)[:, None] * np.ones((n, 3)), k, v, causal


@right("6C")
def against_the_matrix(attend):
    for q, k, v, causal in rows_to_try():
        got = attend(q, k, v, causal, 0.6, 2, 3)
        for a, b in zip(got, in_one_piece(q, k, v, causal, 0.6, len(k) - len(q))):
            assert np.allclose(a, b)


@right("6C")
def with_a_loop(attend):
    for q, k, v, causal in rows_to_try(4):
        out, lse = attend(q, k, v, causal, 0.45, 2, 2)
        for i in range(len(q)):
            scores = [0.45 * float(q[i] @ k[j]) for j in range(len(k)) if not causal or j <= i + len(k) - len(q)]
            if not scores:
                if np.any(out[i] != 0) or lse[i] != -np.inf:
                    raise ValueError(f"row {i} sees nothing")
                continue
            powers = np.exp(np.array(scores) - max(scores))
            mean = powers @ v[: len(scores)] / powers.sum()
            if not np.allclose(out[i], mean) or not np.isclose(lse[i], max(scores) + np.log(powers.sum())):
                raise ValueError(f"row {i} is wrong")


@wrong("6C", "finds: the maximum starts at 1e-30")
def random_rows_only(attend):
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(6, 4)), rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    out, lse = attend(q, k, v, True, 0.5, 2, 4)
    assert np.allclose(out, in_one_piece(q, k, v, True, 0.5, 3)[0])


@wrong("6C", "What do you compare lse with?")
def without_lse(attend):
    for q, k, v, causal in rows_to_try():
        out, _ = attend(q, k, v, causal, 0.6, 2, 3)
        assert np.allclose(out, in_one_piece(q, k, v, causal, 0.6, len(k) - len(q))[0])


@wrong("6C", "Does the maximum of a row rise in your test after its first tile?")
def sizes_that_fit(attend):
    for q, k, v, causal in rows_to_try():
        got = attend(q, k, v, causal, 0.6, len(q), len(k))
        for a, b in zip(got, in_one_piece(q, k, v, causal, 0.6, len(k) - len(q))):
            assert np.allclose(a, b)


@wrong("6C", "With which scale do you call it?")
def default_scale(attend):
    for q, k, v, causal in rows_to_try():
        got = attend(q, k, v, causal, 3**-0.5, 2, 3)
        for a, b in zip(got, in_one_piece(q, k, v, causal, None, len(k) - len(q))):
            assert np.allclose(a, b)


@wrong("6C", "A test says no with an exception")
def returns_a_verdict(attend):
    q, k, v, causal = next(rows_to_try())
    return np.allclose(attend(q, k, v, causal, 0.6, 2, 3)[0], in_one_piece(q, k, v, causal, 0.6, 2)[0])


@wrong("6C", "The right code is refused")
def expects_equal_bits(attend):
    q, k, v, causal = next(rows_to_try())
    assert (attend(q, k, v, causal, 0.6, 1, 1)[0] == in_one_piece(q, k, v, causal, 0.6, 2)[0] * (1 + 1e-9)).all()


# --- 6H --------------------------------------------------------------------------------------------------------------


@right("6H")
def blocks_hop(q, k, v, positions, causal=False, scale=None):
    """The blocks move from hand to hand, as messages would."""
    n_ranks, scale = len(q), scale_of(q, scale)
    m, total = np.full((*q.shape[:2], 1), -np.inf), np.zeros((*q.shape[:2], 1))
    o, held = np.zeros((*q.shape[:2], v.shape[-1])), (k, v, positions)
    for _ in range(n_ranks):
        s = scale * q @ held[0].swapaxes(1, 2)
        s = np.where((held[2][:, None] <= positions[:, :, None]) | (not causal), s, -np.inf)
        m_new = np.maximum(m, s.max(-1, keepdims=True))
        safe = np.nan_to_num(m_new, neginf=0.0)
        p, factor = np.exp(s - safe), np.exp(m - safe)
        m, total, o = m_new, total * factor + p.sum(-1, keepdims=True), o * factor + p @ held[1]
        held = tuple(np.roll(a, 1, axis=0) for a in held)  # to the next rank
    return o / total


@right("6H")
def all_at_once(q, k, v, positions, causal=False, scale=None):
    where = positions.ravel()
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    s = scale_of(q, scale) * flat[0] @ flat[1].T
    s = np.where((where <= where[:, None]) | (not causal), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True) @ flat[2]).reshape(*q.shape[:2], -1)


@wrong("6H", "Each rank sees its own block only")
def no_messages(q, k, v, positions, causal=False, scale=None):
    return np.stack(
        [all_at_once(*(a[r : r + 1] for a in (q, k, v, positions)), causal, scale)[0] for r in range(len(q))]
    )


@wrong("6H", "causal is forgotten")
def ring_never_causal(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, positions, False, scale)


@wrong("6H", "not the positions in the sequence")
def ring_by_places(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, np.arange(positions.size).reshape(positions.shape), causal, scale)


@wrong("6H", "The keys' positions belong to the block's owner")
def ring_with_own_positions(q, k, v, positions, causal=False, scale=None):
    out = []
    for rank, own in enumerate(positions):
        s = scale_of(q, scale) * q[rank] @ np.concatenate(np.roll(k, -rank, axis=0)).T
        s = np.where((np.tile(own, len(q)) <= own[:, None]) | (not causal), s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        out.append(p / p.sum(axis=-1, keepdims=True) @ np.concatenate(np.roll(v, -rank, axis=0)))
    return np.array(out)


@wrong("6H", "The scale is forgotten")
def ring_never_scaled(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, positions, causal)


@wrong("6H", "nan")
def ring_overflows(q, k, v, positions, causal=False, scale=None):
    where = positions.ravel()
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    p = np.exp(scale_of(q, scale) * flat[0] @ flat[1].T) * ((where <= where[:, None]) | (not causal))
    return (p / p.sum(axis=-1, keepdims=True) @ flat[2]).reshape(*q.shape[:2], -1)


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
heads = [numbers((2, n, 16)) for n in (37, 53, 53)]
single = [numbers((2, 3, n, 8)).astype(np.float32) for n in (9, 7, 7)]
square = np.arange(12).reshape(3, 4)
given = [torch.from_numpy(a) for a in (*single, *keys_outside(*single, True), numbers((2, 3, 9, 8)).astype(np.float32))]

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "6A": [
        ((np.full(3, -np.inf), np.zeros(3), numbers((3, 4))), {}),
        ((np.array([2.0]), np.array([1.6]), np.array([[1.0, 0.0]])), {}),
        ((np.full((2, 5), -np.inf), np.zeros((2, 5)), numbers((2, 5, 3))), {}),
    ],
    "6B": [
        ((*heads,), {}),
        ((*heads, True, None, 16, 7), {}),
        ((*single, True), {"block_q": 2, "block_k": 2}),
        ((*heads,), {"scale": 1.0}),
        ((*(a[0] for a in heads), True), {}),
    ],
    "6C": [],
    "6D": [((*given, True), {}), ((*given,), {"causal": True, "scale": 0.4})],
    "6E": [],
    "6G": [
        (([numbers((5, 4)), numbers((5, 4))], [numbers(5), np.full(5, -np.inf)]), {}),
        (((numbers((5, 4)), numbers((5, 4))), (numbers(5), numbers(5))), {}),
    ],
    "6H": [((*(numbers((3, 4, 8)) for _ in range(3)), square, True), {})],
}
