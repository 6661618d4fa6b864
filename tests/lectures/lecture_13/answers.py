"""Answers to the exercises of lecture 13 in NumPy as learners write them: right ones, unlike the lecture's, and wrong ones.

Those in PyTorch and in CUDA stand in files of their own.
"""

import numpy as np

from attention.fundamentals import softmax
from tests.lectures.collect import collect
from tests.lectures.lecture_13 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 13A -------------------------------------------------------------------------------------------------------------


@right("13A")
def one_node_at_a_time(scores, target, n_nodes):
    out = np.zeros_like(scores)
    for node in set(target.tolist()):
        rows = scores[target == node]
        top = rows.max(axis=0)
        powers = np.exp(rows - np.where(top == -np.inf, 0, top))
        total = powers.sum(axis=0)
        out[target == node] = powers / np.where(total == 0, 1, total)
    return out


@right("13A")
def by_sorting(scores, target, n_nodes):
    """np.maximum.reduceat over sorted edges."""
    if not len(target):
        return scores.copy()
    order = np.argsort(target, kind="stable")
    first = np.flatnonzero(np.diff(target[order], prepend=-1))
    which = np.searchsorted(target[order][first], target)
    top = np.maximum.reduceat(scores[order], first)[which]
    powers = np.exp(scores - np.where(top == -np.inf, 0, top))
    total = np.add.reduceat(powers[order], first)[which]
    return powers / np.where(total == 0, 1, total)


@wrong("13A", "those of one target sum to 1")
def over_all(scores, target, n_nodes):
    return softmax(scores, axis=0) if len(scores) else scores


@wrong("13A", "use np.add.at")
def buffered(scores, target, n_nodes):
    top = np.full((n_nodes, scores.shape[1]), -np.inf, scores.dtype)
    np.maximum.at(top, target, scores)
    powers = np.exp(scores - np.where(top == -np.inf, 0, top)[target])
    total = np.zeros((n_nodes, scores.shape[1]), scores.dtype)
    total[target] += powers
    return powers / np.where(total == 0, 1, total)[target]


@wrong("13A", "it gets zeros")
def nan_where_nothing_is(scores, target, n_nodes):
    with np.errstate(all="ignore"):
        top = np.full((n_nodes, scores.shape[1]), -np.inf, scores.dtype)
        np.maximum.at(top, target, scores)
        powers = np.exp(scores - top[target])
        total = np.zeros_like(top)
        np.add.at(total, target, powers)
        return powers / total[target]


@wrong("13A", "nodes without edges")
def as_many_nodes_as_targets(scores, target, n_nodes):
    total = np.zeros((len(set(target.tolist())), scores.shape[1]), scores.dtype)
    top = np.full_like(total, -np.inf)
    np.maximum.at(top, target, scores)
    top = np.where(top == -np.inf, 0, top)
    powers = np.exp(scores - top[target])
    np.add.at(total, target, powers)
    return powers / np.where(total == 0, 1, total)[target]


@wrong("13A", "do not overflow")
def no_maximum(scores, target, n_nodes):
    with np.errstate(all="ignore"):
        powers = np.exp(scores)
        total = np.zeros((n_nodes, scores.shape[1]), scores.dtype)
        np.add.at(total, target, powers)
        return powers / np.where(total == 0, 1, total)[target]


@wrong("13A", "the float type of the scores")
def in_double(scores, target, n_nodes):
    return one_node_at_a_time(scores.astype(float), target, n_nodes)


@wrong("13A", "several heads")
def heads_share_a_total(scores, target, n_nodes):
    weights = one_node_at_a_time(scores, target, n_nodes)
    return (weights / scores.shape[1]).astype(scores.dtype)


@wrong("13A", "all at once")
def small_numbers_become_zero(scores, target, n_nodes):
    weights = one_node_at_a_time(scores, target, n_nodes)
    return weights * (len(scores) < 20)


# --- 13D -------------------------------------------------------------------------------------------------------------


@right("13D")
def one_set_at_a_time(pool):
    rng = np.random.default_rng(11)
    sets = [rng.standard_normal((n, 8)) for n in (1, 3, 6)]
    alone = [pool(s[None], np.ones((1, len(s)), bool))[0] for s in sets]
    for filler in (0.0, -20.0, 3.0):
        x, mask = np.full((3, 9, 8), filler), np.zeros((3, 9), bool)
        for b, s in enumerate(sets):
            where = rng.permutation(9)[: len(s)]
            x[b, where], mask[b, where] = s, True
        np.testing.assert_allclose(pool(x, mask), np.stack(alone), rtol=1e-4, atol=1e-4)
    for s, result in zip(sets, alone):
        for j in range(len(s)):
            other = s.copy()
            other[j] *= -1
            assert not np.allclose(pool(other[None], np.ones((1, len(s)), bool))[0], result, atol=1e-4)


@wrong("13D", "finds: the first element counts twice")
def padding_only(pool):
    rng = np.random.default_rng(11)
    x, mask = rng.standard_normal((2, 5, 8)), np.ones((2, 5), bool)
    right = pool(x, mask)
    padded = np.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=9.0)
    np.testing.assert_allclose(pool(padded, np.pad(mask, ((0, 0), (0, 3)))), right, rtol=1e-4)


@wrong("13D", "finds: the mask is ignored")
def order_only(pool):
    rng = np.random.default_rng(11)
    x, mask = rng.standard_normal((2, 5, 8)), np.ones((2, 5), bool)
    np.testing.assert_allclose(pool(x[:, ::-1], mask), pool(x, mask), rtol=1e-4)
    other = x + np.eye(5)[0][:, None]
    assert not np.allclose(pool(other, mask), pool(x, mask))


@wrong("13D", "finds: a constant")
def nothing_has_to_change(pool):
    rng = np.random.default_rng(11)
    x, mask = rng.standard_normal((2, 5, 8)), np.ones((2, 5), bool)
    mask[1, 3:] = False
    right = pool(x, mask)
    for order in ([4, 3, 2, 1, 0], [1, 2, 3, 4, 0]):
        np.testing.assert_allclose(pool(x[:, order], mask[:, order]), right, rtol=1e-4)
    np.testing.assert_allclose(pool(np.where(mask[..., None], x, 40.0), mask), right, rtol=1e-4)
    np.testing.assert_allclose(pool(x[1:, :3], mask[1:, :3])[0], right[1], rtol=1e-4)


@wrong("13D", "finds: positions are added")
def shape_only(pool):
    assert pool(np.zeros((2, 5, 8)), np.ones((2, 5), bool)).shape[0] == 2


@wrong("13D", "finds: the mean of the batch is subtracted")
def one_batch(pool):
    rng = np.random.default_rng(11)
    x, mask = rng.standard_normal((1, 5, 8)), np.ones((1, 5), bool)
    right = pool(x, mask)
    np.testing.assert_allclose(pool(x[:, ::-1], mask), right, rtol=1e-4, atol=1e-6)


@wrong("13D", "accepts the right code")
def exact(pool):
    x = np.random.default_rng(11).standard_normal((2, 5, 8))
    assert pool(x, np.ones((2, 5), bool))[0, 0] == x[0, :, 0].sum()


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


CALLS = {
    "13A": [((numbers((7, 1)), np.array([0, 2, 2, 1, 0, 2, 1]), 3), {})],
    "13B": [],
    "13C": [],
    "13D": [],
    "13E": [],
}
