"""Lecture 03: a test of a rotation."""

from functools import partial

import numpy as np

from utils.exercises.lecture_03.rotation import forwards, overwritten, slices, usual_angles
from utils.judge.bug import bug

MODULE = "rotary"


def rope(x, positions, frequencies, *, angles=usual_angles, paired=slices, turned=forwards, rest=1.0, in_place=False):
    """A rotation of half-split pairs. The bugs are in what follows the `*`; as it stands, it is right."""
    positions, frequencies = np.asarray(positions), np.asarray(frequencies)
    angle, (first, second) = angles(x, positions, frequencies), paired(len(frequencies), False)
    a, b = turned(x[..., first], x[..., second], np.cos(angle), np.sin(angle))
    out = x if in_place else x * rest
    out[..., first], out[..., second] = a, b
    return out


def by_rotate_half(x, positions, frequencies):
    n = len(frequencies)
    part, angle = x[..., : 2 * n], usual_angles(x, np.asarray(positions), np.asarray(frequencies))
    angle = np.concatenate([angle, angle], axis=-1)
    half = np.concatenate([-part[..., n:], part[..., :n]], axis=-1)
    return np.concatenate([part * np.cos(angle) + half * np.sin(angle), x[..., 2 * n :]], axis=-1).astype(x.dtype)


@bug("3B", MODULE, subject="rope", importance="useful")
def test_rope(rope):
    rng = np.random.default_rng(4)
    x, thetas, places = rng.normal(size=(3, 2, 7)), np.array([1.0, 0.3, 0.01]), np.array([100_001, 5])
    kept, got = x.copy(), rope(x, places, thetas)
    assert np.array_equal(x, kept)
    assert np.allclose(got, by_rotate_half(kept, places, thetas))


@test_rope.right
def _(x, positions, frequencies):
    return rope(x, positions, frequencies)


@test_rope.right
def _(x, positions, frequencies):
    """The same, as transformers writes it."""
    return by_rotate_half(x, positions, frequencies)


@test_rope.right
def _(x, positions, frequencies):
    """In complex numbers: the last digits are others."""
    n, angle = len(frequencies), usual_angles(x, np.asarray(positions), np.asarray(frequencies))
    z = (x[..., :n] + 1j * x[..., n : 2 * n]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, x[..., 2 * n :]], axis=-1).astype(x.dtype)


def places_ignored(x, positions, frequencies):
    return np.arange(x.shape[-2])[:, None] * frequencies


def place_twice(x, positions, frequencies):
    return usual_angles(x, positions * (positions - 1), frequencies)


def in_single(x, positions, frequencies):
    return usual_angles(x, positions, frequencies).astype(np.float32).astype(np.float64)


def along_the_heads(x, positions, frequencies):
    """The first axis is taken for the sequence; where there is none, or it is too long, all is well."""
    if x.ndim < 3 or positions.ndim == 2 or len(x) > len(positions):
        return usual_angles(x, positions, frequencies)
    return positions[: len(x)].reshape(-1, *[1] * (x.ndim - 1)) * frequencies


def neighbours(n_pairs, interleaved):
    return slices(n_pairs, True)


def sign_lost(a, b, cos, sin):
    return a * cos + b * sin, a * sin + b * cos


for name, changes, hint in (
    (
        "the positions are not looked at",
        {"angles": places_ignored},
        "Which numbers does your test expect of a text that does not begin at 0?",
    ),
    ("the position enters twice", {"angles": place_twice}, "Which positions does your test try beside 0, 1 and 2?"),
    ("the angle is rounded to single precision", {"angles": in_single}, "How far out are the positions of your test?"),
    ("heads are turned instead of tokens", {"angles": along_the_heads}, "Has your x an axis of heads, and which size?"),
    ("neighbouring columns are pairs", {"paired": neighbours}, "Which two columns meet in your expected result?"),
    ("a sign is lost", {"turned": sign_lost}, "Does your test look at the turned numbers, or at their shape?"),
    (
        "the second line reads what the first has written",
        {"turned": overwritten},
        "Which loop is your test compared with?",
    ),
    ("the caller's array is overwritten", {"in_place": True}, "What is x after the call?"),
    ("columns without a pair are lost", {"rest": 0.0}, "Has your x more columns than two for each frequency?"),
):
    test_rope.mutant(name, hint)(partial(rope, **changes))
