"""Lecture 04: a test of what places needles, tried on right functions and on ones with a bug each."""

import math

import numpy as np

from utils.judge.bug import bug

MODULE = "long_context"


def nearest(d, n):
    return np.floor(d * (n - 1) + 0.5).astype(int)


def place(
    haystack, needle, depth, *, places=nearest, copy=True, rows=lambda a: a, depths=lambda d: d, low=0.0, high=1.0
):
    """Places needles. The bugs are in what follows the `*`; as it stands, it is right."""
    if np.size(depth) and (np.min(depth) < low or np.max(depth) > high):
        raise ValueError(f"depth must lie between 0 and 1, got {np.min(depth)} to {np.max(depth)}")
    documents = haystack.copy() if copy else haystack
    at = places(np.clip(depths(depth), 0, 1), haystack.shape[1])
    documents[np.arange(len(documents)), at] = rows(needle)
    return documents


@bug("4B", MODULE, subject="place", importance="useful")
def test_place_needle(place):
    rng = np.random.default_rng(3)
    for n in (1, 4, 9):
        hay, needle = rng.integers(100, size=(12, n)), rng.integers(200, 300, size=12)
        depth = np.concatenate([[0.0, 1.0, 0.5], (np.arange(3) + 0.5) / 8, rng.random(6)])
        before = hay.copy()
        got = place(hay, needle, depth)
        assert np.array_equal(hay, before) and got.shape == hay.shape
        for b in range(12):
            at = math.floor(depth[b] * (n - 1) + 0.5)
            assert got[b, at] == needle[b]
            assert np.array_equal(np.delete(got[b], at), np.delete(before[b], at))
    for outside in (-0.2, 1.2):
        try:
            place(np.zeros((1, 3), int), np.ones(1, int), np.array([outside]))
        except ValueError:
            continue
        raise AssertionError


@test_place_needle.right
def _(haystack, needle, depth):
    return place(haystack, needle, depth)


@test_place_needle.right
def _(haystack, needle, depth):
    """The same with one comparison for all places."""
    if any(d < 0 or d > 1 for d in np.ravel(depth)):
        raise ValueError("a depth outside 0 to 1")
    at = np.trunc(np.asarray(depth) * (haystack.shape[1] - 1) + 0.5)
    return np.where(np.arange(haystack.shape[1]) == at[:, None], np.asarray(needle)[:, None], haystack)


def inserted(haystack, needle, depth):
    if np.min(depth) < 0 or np.max(depth) > 1:
        raise ValueError
    at = nearest(depth, haystack.shape[1])
    return np.array([np.insert(row, i, x)[: len(row)] for row, i, x in zip(haystack, at, needle)])


EDGE = "Which place do you expect for a depth between two places? And exactly in the middle?"
for name, changes, hint in (
    ("the depth is counted from the end", {"depths": lambda d: 1 - d}, "What do you expect for a depth of 0?"),
    (
        "one place too far, held back at the end",
        {"places": lambda d, n: np.minimum((d * n).astype(int), n - 1)},
        EDGE,
    ),
    ("a half is rounded to the even number", {"places": lambda d, n: np.rint(d * (n - 1)).astype(int)}, EDGE),
    ("rounded down", {"places": lambda d, n: (d * (n - 1)).astype(int)}, EDGE),
    (
        "every document has the depth of the first",
        {"depths": lambda d: np.full_like(d, d[0])},
        "Have your documents depths of their own?",
    ),
    (
        "every document has the needle of the first",
        {"rows": lambda a: a[0]},
        "Have your documents needles of their own?",
    ),
    ("the haystack itself is changed", {"copy": False}, "What should the haystack look like after the call?"),
    ("a depth of 1.5 is taken as 1", {"high": math.inf}, "What does the docstring promise for a depth of 1.5?"),
    ("a negative depth is taken as 0", {"low": -math.inf}, "What does the docstring promise for a depth of -0.1?"),
):

    def wrong(haystack, needle, depth, changes=changes):
        return place(haystack, needle, depth, **changes)

    test_place_needle.mutant(name, hint)(wrong)

test_place_needle.mutant(
    "the needle is put in between, and the last statement lost",
    "What has become of the other statements of a document?",
)(inserted)
