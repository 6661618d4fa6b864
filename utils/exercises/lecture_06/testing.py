"""Lecture 06: a test that finds the bug in attention in tiles."""

from functools import partial

import numpy as np

from utils.exercises.arrays import INF
from utils.exercises.lecture_06.forward import usual_flash
from utils.exercises.lecture_06.rows import seen, whole
from utils.judge.bug import bug

MODULE = "flash"


@bug("6C", MODULE, subject="attend", importance="useful")
def test_flash(attend):
    rng = np.random.default_rng(9)
    for n, n_keys, causal in ((4, 9, False), (7, 7, True), (3, 8, True), (8, 5, True), (1, 6, False)):
        q, k, v = rng.normal(size=(n, 2)), rng.normal(size=(n_keys, 2)), rng.normal(size=(n_keys, 3))
        for q in (q, 1e3 * q[:, :1] * [1, 0] * np.arange(n)[:, None], np.full((n, 2), -300.0)):
            out, lse = attend(q, abs(k), v, causal, 0.8, 2, 3)
            expected, expected_lse = whole(q, abs(k), v, seen(n, n_keys, causal), 0.8)
            assert np.allclose(out, expected) and np.allclose(lse, expected_lse)


@test_flash.right
def _(q, k, v, causal, scale, block_q, block_k):
    with np.errstate(divide="ignore"):
        return usual_flash(q, k, v, causal, scale, block_q, block_k)


@test_flash.right
def _(q, k, v, causal, scale, block_q, block_k):
    """The whole matrix at once: no tile, the same numbers."""
    return whole(q, k, v, seen(len(q), len(k), causal), scale)


@test_flash.right
def _(q, k, v, causal, scale, block_q, block_k):
    """Keys from right to left."""
    n, n_keys = len(q), len(k)
    m, ell, o = np.full(n, -INF), np.zeros(n), np.zeros((n, v.shape[1]))
    for end in range(n_keys, 0, -block_k):
        keys = np.arange(max(0, end - block_k), end)
        s = np.where(seen(n, n_keys, causal)[:, keys], scale * q @ k[keys].T, -INF)
        m_new = np.maximum(m, s.max(1))
        safe = np.nan_to_num(m_new, neginf=0.0)
        p, factor = np.exp(s - safe[:, None]), np.exp(m - safe)
        m, ell, o = m_new, ell * factor + p.sum(1), o * factor[:, None] + p @ v[keys]
    with np.errstate(divide="ignore"):
        return o / np.where(ell == 0, 1, ell)[:, None], m + np.log(ell)


def mutant(q, k, v, causal, scale, block_q, block_k, **changes):
    with np.errstate(all="ignore"):
        return usual_flash(q, k, v, causal, scale, block_q, block_k, **changes)


HARD = "Has your test scores so low that all their exponentials are 0? In double precision that is below -745."
DIAGONAL = "Has your test a mask, and as many queries as keys, fewer, and more?"
for name, changes, hint in (
    ("the maximum starts at 1e-30", {"start": 1e-30}, HARD),
    ("the output is not rescaled", {"rescale_o": False}, "Does the maximum of a row rise in your test after its first tile?"),
    ("the sum is not rescaled", {"rescale_l": False}, "Does the maximum of a row rise in your test after its first tile?"),
    ("one maximum for all rows of a tile", {"top": lambda s: s.max() + 0 * np.isneginf(s[..., :1])}, "Are there rows of very different size in one tile of your test?"),
    ("an empty row becomes nan", {"finish": lambda o, total: o / total}, "What do you expect of a query that may look nowhere?"),
    ("the mask starts at the top left", {"shift": lambda n, m: 0}, DIAGONAL),
    ("the last tile of keys is left out where it is smaller", {"ragged": False}, "Which sizes leave a rest when they are cut?"),
    ("lse without the maximum", {"lse_of": lambda m, total: np.log(total)}, "What do you compare lse with?"),
    ("the scale that is given is not used", {"given": lambda scale: None}, "With which scale do you call it?"),
):  # fmt: skip
    test_flash.mutant(name, hint)(partial(mutant, **changes))


@test_flash.mutant("the mask compares places inside the tile", DIAGONAL)
def _(q, k, v, causal, scale, block_q, block_k):
    i, j = np.indices((len(q), len(k)))
    allowed = (j % block_k <= i % block_q + len(k) - len(q)) | (not causal)
    return whole(q, k, v, allowed, scale)
